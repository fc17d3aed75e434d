"""The examples' configurations, run for a few steps with a tiny model in the place of the real one."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SMALL = {
    "dtype": "float32",
    "device": "cpu",
    "family.layers": None,
    "max_prompts": 8,
    "max_steps": 3,
    "replay_steps": 1,
    "warmup_steps": 1,
    "measure_prompts": 4,
    "measure_draws": 8,
}


@pytest.mark.parametrize("name", ["reviews", "verifiable"])
def test_an_example_climbs(klimb, options, tiny_model, tmp_path, monkeypatch, no_report, name):
    monkeypatch.chdir(ROOT)
    if name == "reviews":
        pytest.importorskip("vaderSentiment")
    settings = {**SMALL, "model_name_or_path": str(tiny_model), "output_dir": str(tmp_path / "run")}
    if name == "verifiable":
        settings["kl_budget"] = 0.3  # of its few words the tiny model cannot choose better ones
        settings["reward_cache"] = str(tmp_path / "cache")
    status, _, err = klimb("climb", "-q", "-c", f"examples/{name}.yaml", *options(settings))
    assert status == 0, err
    written = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    asked = yaml.safe_load((ROOT / f"examples/{name}.yaml").read_text())["reward_funcs"]
    assert written["reward_funcs"] == [asked]
    assert -1 <= json.loads((tmp_path / "run/measure.json").read_text())["reward"]["value"] <= 1


def test_the_example_of_pairs_climbs(klimb, options, tiny_model, tmp_path, monkeypatch, no_report):
    monkeypatch.chdir(ROOT)
    pytest.importorskip("vaderSentiment")
    settings = {
        **{key: x for key, x in SMALL.items() if key != "replay_steps"},
        "model_name_or_path": str(roomy(tiny_model, tmp_path)),
        "output_dir": str(tmp_path / "run"),
        "measure_draws": 4,
        "prompts_per_step": 8,
    }
    status, _, err = klimb("climb", "-q", "-c", "examples/dpo.yaml", *options(settings))
    assert status == 0, err
    found = json.loads((tmp_path / "run/measure.json").read_text())
    assert found["comparisons"]["accuracy"]["n"] > 100
    assert {"gap", "attained"} <= set(found)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["judge"] == "scores"


def roomy(tiny_model, folder):
    """The tiny model with positions for a context of a hundred words and more."""
    shutil.copytree(tiny_model, folder / "roomy")
    file = folder / "roomy/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 512}))
    return folder / "roomy"


@pytest.mark.parametrize("name", ["compress_prompt", "distill"])
def test_an_example_with_a_policy_for_its_target_climbs(
    klimb, options, tiny_model, other_model, tmp_path, monkeypatch, no_report, name
):
    monkeypatch.chdir(ROOT)
    (tmp_path / "context.txt").write_text("good kind warm film")
    small = {key: x for key, x in SMALL.items() if key not in ("family.layers", "replay_steps")}
    settings = {**small, "model_name_or_path": str(tiny_model), "output_dir": str(tmp_path / "run")}
    changes = {
        "compress_prompt": {
            "target.context_file": str(tmp_path / "context.txt"),
            "family.num_virtual_tokens": 4,
        },
        "distill": {"target.teacher": str(other_model), "family.layers": 1},
    }
    status, _, err = klimb(
        "climb", "-q", "-c", f"examples/{name}.yaml", *options({**settings, **changes[name]})
    )
    assert status == 0, err
    found = json.loads((tmp_path / "run/measure.json").read_text())["distance"]
    assert found["forward"]["value"] > 0
    assert found["prompt_tokens"]["virtual"] == (4 if name == "compress_prompt" else 0)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["method"] == "distill"


def test_a_reward_is_learned_from_the_examples_pairs(klimb, options, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    small = {
        "model_name_or_path": str(tiny_model),
        "dtype": "float32",
        "device": "cpu",
        "family.layers": None,
        "prompts_per_step": 4,
        "max_steps": 3,
        "output_dir": str(tmp_path / "run"),
    }
    status, _, err = klimb("climb", "-q", "-c", "examples/reward_model.yaml", *options(small))
    assert status == 0, err
    found = json.loads((tmp_path / "run/measure.json").read_text())
    assert found["reward_model"]["accuracy"]["n"] == 127
    page = (tmp_path / "run/report.html").read_text()
    assert "Can the reward be believed?" in page
    assert 'id="chart-reliability"' in page
    assert 'id="chart-scores"' in page
