"""A policy that is the target, end to end on the tiny model: a context or a teacher, adapters or a soft prompt."""

import json
import shutil
from pathlib import Path

import pytest

from klimb.store import read_json, read_jsonl

CONTEXT = "very good kind warm"


@pytest.fixture
def taught(klimb, tiny_run, tmp_path, no_report):
    def run(*words, verb="climb", **changes):
        settings = {
            **{
                name: x
                for name, x in tiny_run.items()
                if name not in ("reward_funcs", "kl_budget", "num_replay", "num_plan_draws")
            },
            "target.context": CONTEXT,
            "method": "distill",
            "learning_rate": 0.02,
            "max_steps": 30,
            "num_generations": 8,
            "prompts_per_step": 8,
            "measure_prompts": 8,
            "measure_draws": 16,
            "output_dir": tmp_path / "run",
            **changes,
        }
        options = [
            str(x) for name, value in settings.items() if value is not None for x in (f"--{name}", value)
        ]
        status, out, err = klimb(verb, *options, *words)
        return status, out, err, tmp_path / "run"

    return run


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--family.kind", "full", "--learning_rate", "0.003"),
        ("--divergence", "reverse_kl", "--teacher_draws", "0"),
        ("--divergence", "reverse_kl", "--teacher_draws", "0.25", "--sequence_gradient", "true"),
        ("--divergence", "jensen_shannon", "--teacher_draws", "0.5"),
        ("--divergence", "skew_kl(0.1)"),
        ("--top_k", "8"),
    ],
)
def test_a_context_is_learned(taught, words):
    status, _, err, run = taught(*words)
    assert (status, err) == (0, ""), err
    found = read_json(run / "measure.json")["distance"]
    assert found["closed"]["low"] > 0.2
    assert found["forward"]["value"] < found["forward_reference"]["value"]
    assert found["reverse"]["value"] < found["reverse_reference"]["value"]
    assert found["prompt_tokens"]["teacher"] > found["prompt_tokens"]["policy"]
    steps = read_jsonl(run / "metrics.jsonl")
    assert {step["taught"] for step in steps} <= {0.0, 1.0}


@pytest.mark.parametrize("kind", ["soft_prompt", "prefix"])
def test_virtual_tokens_take_the_place_of_a_context_and_are_measured_again(taught, klimb, kind):
    status, out, err, run = taught(
        "--family.kind", kind, "--family.num_virtual_tokens", "2", "--learning_rate", "0.05"
    )
    assert (status, err) == (0, ""), err
    found = read_json(run / "measure.json")["distance"]
    assert found["closed"]["value"] > 0.2
    assert found["prompt_tokens"]["virtual"] == 2
    assert "tokens in the place of" in out
    status, out, err = klimb("measure", run, "--json")
    assert (status, err) == (0, ""), err
    again = json.loads(out)["distance"]
    assert again["closed"]["value"] == pytest.approx(found["closed"]["value"], abs=1e-5)


def test_the_report_shows_both_kls_and_completions_side_by_side(taught, klimb, monkeypatch):
    status, _, err, run = taught("--max_steps", "3")
    assert status == 0, err
    monkeypatch.undo()  # with the report again
    assert klimb("report", run)[0] == 0
    page = (run / "report.html").read_text()
    for words in ("KL(target ‖ policy)", "Side by side", "What training makes small", "has closed"):
        assert words in page
    assert "no plan.json and no measure.json" not in page


def test_a_teacher_is_learned(taught, other_model):
    status, _, err, run = taught("--target.teacher", other_model, **{"target.context": None})
    assert (status, err) == (0, ""), err
    found = read_json(run / "measure.json")["distance"]
    assert found["closed"]["low"] > 0.2
    assert found["prompt_tokens"]["teacher"] == found["prompt_tokens"]["policy"]


@pytest.mark.parametrize("kind", ["lora", "soft_prompt", "prefix"])
def test_an_adapter_is_a_teacher(taught, klimb, tmp_path, kind):
    """What one run learned another learns from: the teacher's law is that of the run's policy."""
    words = ("--family.kind", kind, *(() if kind == "lora" else ("--family.num_virtual_tokens", "2")))
    status, _, err, run = taught(
        *words, "--learning_rate", "0.05" if words[2:] else "0.02", output_dir=tmp_path / "first"
    )
    assert (status, err) == (0, ""), err
    first = read_json(tmp_path / "first" / "measure.json")["distance"]
    status, _, err, run = taught(
        "--target.teacher",
        tmp_path / "first" / "policy",
        "--family.kind",
        "full",
        "--learning_rate",
        "0.003",
        **{"target.context": None},
    )
    assert (status, err) == (0, ""), err
    found = read_json(run / "measure.json")["distance"]
    assert found["closed"]["low"] > 0.2
    assert found["forward_reference"]["value"] > 0.3 * first["forward_reference"]["value"]


def test_an_adapter_of_another_shape_is_refused(taught, tmp_path, other_shape):
    status, _, err, _ = taught(
        "--model_name_or_path", other_shape, "--max_steps", "1", verb="train", output_dir=tmp_path / "first"
    )
    assert (status, err) == (0, ""), err
    status, _, err, run = taught(
        "--target.teacher", tmp_path / "first" / "policy", **{"target.context": None}
    )
    assert status == 2
    assert "this adapter does not fit" in err
    assert not run.exists()


def test_a_plan_says_how_far_apart_and_what_to_choose(taught, klimb):
    status, out, err, run = taught("--num_plan_draws", "8", verb="plan")
    assert (status, err) == (0, ""), err
    found = read_json(run / "plan.json")
    apart = found["apart"]
    for name in ("forward", "reverse", "forward_a_token", "reverse_a_token"):
        assert 0 <= apart[name]["low"] < apart[name]["value"] < apart[name]["high"]
    assert apart["places"][0]["first"] == apart["places"][0]["last"] == 1
    assert len(apart["prompts"]) == 8
    assert sum(x["forward"] for x in apart["prompts"]) / 8 == pytest.approx(apart["forward"]["value"])
    assert apart["seconds"]["run"] == pytest.approx(30 * apart["seconds"]["step"])
    assert apart["holds"] is None
    assert "cannot be told before training" in " ".join(found["advice"]["words"])
    assert "KL(target||reference)" in out
    assert "choose" in out
    status, _, err, run = taught(verb="measure")  # no policy yet
    assert status == 2


def test_a_teacher_of_the_same_shape_is_held_by_all_weights(taught, other_model):
    status, _, err, run = taught(
        "--target.teacher", other_model, "--family.kind", "full", verb="plan", **{"target.context": None}
    )
    assert (status, err) == (0, ""), err
    found = read_json(run / "plan.json")
    assert found["apart"]["holds"] is True
    assert "The family holds the target" in " ".join(found["advice"]["words"])


def test_a_plan_for_draws_says_it_too_beside_the_frontier(taught):
    status, _, err, run = taught(method="log_variance", num_plan_draws=16, num_replay=4, verb="plan")
    assert (status, err) == (0, ""), err
    found = read_json(run / "plan.json")
    assert {"apart", "advice", "frontier", "optimum"} <= set(found)
    assert (run / "draws" / "plan.parquet").is_file()


def test_the_teacher_itself_is_at_no_distance(taught, tiny_run, tmp_path):
    """A mutant of every distance: with the reference for its own teacher nothing is left, and nothing was to close."""
    status, _, err, run = taught(
        "--target.teacher",
        tiny_run["model_name_or_path"],
        "--max_steps",
        "1",
        "--learning_rate",
        "1e-9",
        **{"target.context": None},
    )
    assert (status, err) == (0, ""), err
    found = read_json(run / "measure.json")["distance"]
    assert abs(found["forward"]["value"]) < 1e-5
    assert abs(found["reverse_reference"]["value"]) < 1e-5


def test_objectives_of_draws_reach_a_context_too(taught):
    """log p/ref is the reward, and Z is 1: the plan's log Z says so where KL is small against log of its draws."""
    status, _, err, run = taught(method="log_variance", num_plan_draws=64, num_replay=8)
    assert (status, err) == (0, ""), err
    plan = read_json(run / "plan.json")
    at_one = min(plan["frontier"], key=lambda point: abs(point["beta"] - 1))
    assert abs(at_one["log_z"]["value"]) < 0.3
    found = read_json(run / "measure.json")["distance"]
    assert found["forward"]["value"] < found["forward_reference"]["value"]


@pytest.mark.parametrize(
    "words",
    [
        (),
        (
            "--family.kind",
            "prefix",
            "--divergence",
            "reverse_kl",
            "--teacher_draws",
            "0.5",
            "--sequence_gradient",
            "true",
        ),
    ],
)
def test_a_killed_run_goes_on_to_the_same_numbers(taught, klimb, words):
    status, _, err, run = taught(*words, "--save_steps", "4", "--max_steps", "8", verb="train")
    assert (status, err) == (0, ""), err
    whole = read_jsonl(run / "metrics.jsonl")
    shutil.rmtree(run / "checkpoints" / "step-000008")
    status, _, err = klimb("train", "--resume", run)
    assert (status, err) == (0, ""), err
    again = read_jsonl(run / "metrics.jsonl")
    assert [step["objective_value"] for step in again] == [step["objective_value"] for step in whole]


@pytest.mark.parametrize("kind", ["soft_prompt", "prefix"])
def test_virtual_tokens_climb_a_reward(klimb, options, tiny_run, no_report, kind):
    """Any method moves them, and the certificate compares them with the reference without."""
    settings = {
        **tiny_run,
        **{"family.kind": kind, "family.num_virtual_tokens": 3, "family.init": "good kind warm"},
        **{"num_generations": 8, "prompts_per_step": 8, "max_steps": 60, "learning_rate": 0.1},
    }
    status, _, err = klimb("climb", "-q", *options(settings))
    assert (status, err) == (0, ""), err
    run = Path(settings["output_dir"])
    found = read_json(run / "measure.json")
    assert found["reward"]["value"] > found["reference"]["reward"]["value"]
    status, out, err = klimb("measure", run, "--json")
    assert (status, err) == (0, ""), err
    assert json.loads(out)["reward"]["value"] == pytest.approx(found["reward"]["value"], abs=1e-6)


def test_a_teacher_of_another_tokenizer_with_a_map(taught, other_model, tmp_path):
    """The other model under turned numbers, and a map that turns them back, is the other model."""
    import torch
    from transformers import AutoModelForCausalLM

    from klimb.models.renumbered import renumber

    turned = tmp_path / "turned"
    shutil.copytree(other_model, turned)
    model = AutoModelForCausalLM.from_pretrained(turned)
    size = model.get_output_embeddings().weight.shape[0]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
    renumber(model, order)
    model.save_pretrained(turned)
    words = (turned / "tokenizer.json").read_text()
    (turned / "tokenizer.json").write_text(words.replace('"film"', '"movie"'))
    (tmp_path / "map.json").write_text(json.dumps(order.argsort().tolist()))
    short = {"target.context": None, "target.teacher": turned, "max_steps": 3}
    status, _, err, _ = taught(**short)
    assert (status, "token_map" in err) == (2, True)
    found = []
    for changes in ({"target.token_map": tmp_path / "map.json"}, {"target.teacher": other_model}):
        status, _, err, run = taught(**{**short, **changes})
        assert (status, err) == (0, ""), err
        found.append(read_json(run / "measure.json")["distance"]["forward"]["value"])
        shutil.rmtree(run)
    assert found[0] == pytest.approx(found[1], rel=1e-3)
