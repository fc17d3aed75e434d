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


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("dpo", {"measure_draws": 4, "prompts_per_step": 8, "num_replay": None}),
        ("compress_prompt", {"family.num_virtual_tokens": 4, "measure_draws": 2, "max_completion_length": 4}),
    ],
)
def test_an_example_that_draws_no_plan_climbs(
    klimb, options, tiny_model, tmp_path, monkeypatch, no_report, name, small
):
    """The critic's context and the pairs as they are; of the tiny model's words they are few, but they go through."""
    monkeypatch.chdir(ROOT)
    if name == "dpo":
        pytest.importorskip("vaderSentiment")
        small = {**small, "family.layers": None}
    path = tmp_path / "run"
    settings = {
        "dtype": "float32",
        "device": "cpu",
        "max_prompts": 16,
        "max_steps": 3,
        "warmup_steps": 1,
        "measure_prompts": 4,
        "model_name_or_path": roomy(tiny_model, tmp_path),
        "output_dir": path,
        **small,
    }
    status, _, err = klimb("climb", "-q", "-c", f"examples/{name}.yaml", *options(settings))
    assert status == 0, err
    found, asked = (
        json.loads((path / "measure.json").read_text()),
        yaml.safe_load((ROOT / f"examples/{name}.yaml").read_text()),
    )
    written = yaml.safe_load((path / "config.yaml").read_text())
    assert written["method"] == asked["method"]
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 3
    if name == "dpo":
        assert found["comparisons"]["accuracy"]["n"] > 100
        assert {"gap", "attained"} <= set(found)
        assert written["judge"] == "scores"
    else:
        assert found["distance"]["prompt_tokens"]["virtual"] == 4
        assert found["distance"]["forward_reference"]["value"] > 0


def roomy(tiny_model, folder):
    """The tiny model with positions for a context of a hundred words and more."""
    shutil.copytree(tiny_model, folder / "roomy")
    file = folder / "roomy/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 512}))
    return folder / "roomy"


def test_the_example_of_a_teacher_climbs(
    klimb, options, tiny_model, other_model, tmp_path, monkeypatch, no_report
):
    monkeypatch.chdir(ROOT)
    small = {key: x for key, x in SMALL.items() if key not in ("family.layers", "replay_steps")}
    settings = {
        **small,
        "model_name_or_path": tiny_model,
        "output_dir": tmp_path / "run",
        "target.teacher": other_model,
        "family.layers": 1,
    }
    status, _, err = klimb("climb", "-q", "-c", "examples/distill.yaml", *options(settings))
    assert status == 0, err
    found = json.loads((tmp_path / "run/measure.json").read_text())["distance"]
    assert found["forward"]["value"] > 0
    assert found["prompt_tokens"]["virtual"] == 0
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["method"] == "distill"
