"""Learning from judged completions, end to end on the tiny model: pairs, labels, ranks, completions alone."""

import json
import shutil

import pytest
import torch
import yaml

from klimb.samplers.rejection import acceptance
from klimb.store import read_draws, read_json, read_jsonl

GOOD, BAD = ("very good film <end>", "kind room"), ("bad", "poor cold meal")
PROMPTS = ["review the film", "review of the room", "write a review", "review"]


def rows_of(kind, n=24):
    for i in range(n):
        prompt, good, bad = PROMPTS[i % 4], GOOD[i % 2].removesuffix(" <end>"), BAD[i // 2 % 2]
        split = {"split": "test" if i >= 16 else "train"}
        if kind == "pairs":
            yield {"prompt": prompt, "chosen": good, "rejected": bad, "margin": 1.5, **split}
        elif kind == "chat":
            chat = [{"role": "user", "content": prompt}]
            yield {
                "chosen": [*chat, {"role": "assistant", "content": good}],
                "rejected": [*chat, {"role": "assistant", "content": bad}],
                **split,
            }
        elif kind == "unpaired":
            yield {"prompt": prompt, "completion": good if i % 3 else bad, "label": bool(i % 3), **split}
        elif kind == "ranked":
            yield {"prompt": prompt, "completions": [bad, good, "a meal"], "scores": [0, 2, 0.5], **split}
        else:
            yield {"prompt": prompt, "completion": good, **split}


@pytest.fixture
def learned(klimb, tiny_model, tmp_path, no_report):
    """Train on a file of that kind, and what the run left."""

    def run(kind, *words, method="dpo", verb="climb", steps=12):
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))
        settings = {
            "model_name_or_path": tiny_model,
            "dtype": "float32",
            "dataset_name": file,
            "learn_from": "data",
            "method": method,
            "max_steps": steps,
            "learning_rate": 0.02,
            "max_completion_length": 6,
            "measure_prompts": 4,
            "measure_draws": 8,
            "output_dir": tmp_path / "run",
        }
        options = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
        status, out, err = klimb(verb, *options, *words)
        return status, out, err, tmp_path / "run"

    return run


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("pairs", "dpo"),
        ("chat", "ipo"),
        ("pairs", "wpo"),
        ("pairs", "slic"),
        ("pairs", "simpo"),
        ("pairs", "cpo"),
        ("pairs", "orpo"),
        ("pairs", "chi_po"),
        ("pairs", "f_dpo(alpha(0.5))"),
        ("pairs", "exo"),
        ("pairs", "log_variance"),
        ("ranked", "dpo"),
        ("ranked", "info_nca"),
        ("unpaired", "kto"),
        ("unpaired", "bco"),
        ("pairs", "kto"),
    ],
)
def test_it_orders_held_out_completions_better_than_before(learned, kind, method):
    status, _, err, run = learned(kind, method=method, verb="train")
    assert (status, err) == (0, ""), err
    steps = read_jsonl(run / "metrics.jsonl")
    if kind != "unpaired":
        assert steps[0]["margin"] == pytest.approx(0, abs=1e-5)
        assert steps[-1]["margin"] > 0
        assert steps[-1]["accuracy"] > 0.7
    pool = read_draws(run / "draws" / "data.parquet")
    assert pool.draws.log_q is None
    assert pool.log_ref.isfinite().all()


def test_climb_without_a_reward_says_how_far_and_how_well_ordered_and_no_share(learned):
    status, out, err, run = learned("pairs")
    assert (status, err) == (0, ""), err
    found = read_json(run / "measure.json")
    assert found["comparisons"]["accuracy"]["value"] == 1
    assert found["comparisons"]["accuracy"]["n"] == 8
    assert found["comparisons"]["surprise"]["high"] < 0.693
    assert found["kl"]["value"] > 0
    assert "attained" not in found
    assert "no reward_funcs says what is good" in " ".join(out.split())
    assert yaml.safe_load((run / "config.yaml").read_text())["beta"] == 0.1


def test_the_report_shows_held_out_pairs_and_the_margin(learned, klimb, monkeypatch):
    status, _, err, run = learned("pairs")
    assert status == 0, err
    monkeypatch.undo()
    assert klimb("report", run)[0] == 0
    page = (run / "report.html").read_text()
    for words in ("Held-out pairs", "of held-out pairs in the order", "favours the better completion"):
        assert words in page


def test_with_a_reward_it_is_certified_beside_methods_that_draw(learned, tmp_path):
    (tmp_path / "r.py").write_text(
        "def good(completions, **columns):\n    return [float(c.count('good') > 0) for c in completions]\n"
    )
    status, out, err, run = learned("pairs", "--reward_funcs", f"{tmp_path}/r.py:good", "--beta", "0.3")
    assert (status, err) == (0, ""), err
    found = read_json(run / "measure.json")
    assert {"gap", "attained", "comparisons"} <= set(found)
    assert "held-out accuracy" in out
    assert found["reward"]["value"] > found["reference"]["reward"]["value"]


def test_likelihood_of_a_file_of_completions_rises(learned):
    status, _, err, run = learned("alone", method="sft", verb="train")
    assert (status, err) == (0, ""), err
    values = [step["objective_value"] for step in read_jsonl(run / "metrics.jsonl")]
    assert values[-1] < values[0] - 1


def test_scores_give_chances_and_labels_do_not(learned, tmp_path):
    values = []
    for words in ((), ("--judge", "scores")):
        status, _, err, run = learned("pairs", *words, steps=1, verb="train")
        assert (status, err) == (0, ""), err
        pool = read_draws(run / "draws" / "data.parquet")
        values.append(pool.reward[0].tolist())
        run.rename(tmp_path / f"run-{len(values)}")
    assert values == [[1.0, 0.0], [1.5, 0.0]]


def test_label_smoothing_reaches_the_objective(learned, tmp_path):
    status, _, err, run = learned("pairs", "--label_smoothing", "0.4", steps=40)
    assert (status, err) == (0, ""), err
    smooth = read_json(run / "measure.json")["comparisons"]["margin"]["value"]
    run.rename(tmp_path / "smooth")
    status, _, err, run = learned("pairs", steps=40)
    assert smooth < 0.8 * read_json(run / "measure.json")["comparisons"]["margin"]["value"]


def test_a_killed_run_goes_on_to_the_same_numbers(learned, klimb, tmp_path):
    status, _, err, run = learned("pairs", "--save_steps", "4", verb="train")
    assert (status, err) == (0, ""), err
    whole = read_jsonl(run / "metrics.jsonl")
    shutil.rmtree(run / "checkpoints" / "step-000012")
    status, _, err = klimb("train", "--resume", run)
    assert (status, err) == (0, ""), err
    again = read_jsonl(run / "metrics.jsonl")
    assert [step["margin"] for step in again] == [step["margin"] for step in whole]


def test_check_shows_what_the_model_will_see(klimb, tiny_model, tmp_path):
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows_of("chat")))
    status, out, _ = klimb(
        "data", "check", file, "--model_name_or_path", tiny_model, "--max_completion_length", "2", "--json"
    )
    found = json.loads(out)
    assert status == 0
    assert (found["kind"], found["rows"], found["completions_a_row"]) == ("pairs", 24, 2)
    first = found["examples"][0]
    assert first["prompt"].replace(" ", "") == "reviewthefilm<a>"
    assert first["completions"][0]["cut"]
    assert first["completions"][0]["tokens"] == 2
    assert found["cut"] == 36  # three words or two, and an end
    assert 0 < found["better_is_longer"] <= 1


def test_pairs_of_a_plan_have_the_better_one_first(klimb, tiny_run, options, tmp_path, no_report):
    assert klimb("plan", "-q", *options(tiny_run))[0] == 0
    status, out, _ = klimb("data", "pairs", tmp_path / "run", "-o", tmp_path / "made.jsonl")
    assert status == 0, out
    rows = [json.loads(line) for line in (tmp_path / "made.jsonl").read_text().splitlines()]
    assert rows
    assert all(row["score_chosen"] > row["score_rejected"] for row in rows)
    status, out, _ = klimb("data", "check", tmp_path / "made.jsonl", "--json")
    assert (status, json.loads(out)["problems"]) == (0, [])


def test_pairs_of_the_target_are_of_the_draws_that_rejection_keeps(
    klimb, tiny_run, options, tmp_path, no_report
):
    run, file = tmp_path / "run", tmp_path / "made.jsonl"
    assert klimb("plan", "-q", *options(tiny_run))[0] == 0
    pool = read_draws(run / "draws" / "plan.parquet")
    words = ("data", "pairs", run, "-o", file, "--from", "target", "--beta", "0.5", "--num_pairs", "16")
    status, out, err = klimb(*words, "--bound", "1.5", "--seed", "3")
    assert (status, err) == (0, "")
    chances = acceptance(pool.reward, 0.5, 1.5)
    kept = torch.rand(chances.shape, generator=torch.Generator().manual_seed(3)) < chances
    assert 0 < kept.sum() < kept.numel() / 2
    assert (
        f"rejection kept {int(kept.sum())} of {kept.numel()} draws; {int((kept.sum(1) < 2).sum())} prompts"
        in out
    )
    said = {
        (json.dumps(x.prompt), text)
        for x, texts, group in zip(pool.draws.examples, pool.draws.texts, kept.tolist(), strict=True)
        for text, is_kept in zip(texts, group, strict=True)
        if is_kept
    }
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows
    for row in rows:
        assert (json.dumps(row["prompt"]), row["chosen"][0]["content"]) in said
        assert (json.dumps(row["prompt"]), row["rejected"][0]["content"]) in said
        assert row["score_chosen"] > row["score_rejected"]
    # each prompt's largest reward is a tighter bound, so more is kept
    status, out, _ = klimb(*words, "--force")
    assert int(out.split("rejection kept ")[1].split()[0]) > kept.sum()
    for row in rows:
        row["split"] = "train"
    test = [{**row, "split": "test"} for row in rows[:4]]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *test]))
    data = {"dataset_name": file, "learn_from": "data", "prompts_per_step": 4, "output_dir": tmp_path / "rso"}
    drawn = ("num_generations", "num_replay", "num_plan_draws", "kl_budget")
    settings = {n: x for n, x in tiny_run.items() if n not in drawn} | data
    for method in ("dpo", "slic"):
        status, _, err = klimb(
            "train", "-q", *options({**settings, "method": method, "output_dir": tmp_path / method})
        )
        assert (status, err) == (0, "")
        assert read_jsonl(tmp_path / method / "metrics.jsonl")[-1]["margin"] > 0


def test_a_written_completion_is_spelled_as_a_drawn_one(tiny_model):
    from klimb.models.hub import load_model
    from klimb.models.policy import CausalPolicy

    policy = CausalPolicy(*load_model(str(tiny_model)))
    drawn = torch.tensor([13, 6, 1])
    assert policy.spell(policy.decode(drawn), max_tokens=8).tolist() == drawn.tolist()
    assert policy.spell("good film", max_tokens=2).tolist() == drawn[:2].tolist()
