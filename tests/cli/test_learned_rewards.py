"""A reward model from the command line: learned from pairs, written for any tool, audited on held-out pairs, used as a reward."""

import json
import random
from pathlib import Path

import pytest
import torch

from klimb.rewards.load import load_reward
from klimb.store import read_draws, read_jsonl

KIND, COLD = ("good", "great", "fine", "kind", "warm"), ("bad", "poor", "cold", "not")


def rows_of(split, size, seed):
    """Pairs of which the better one has more kind words; its length says nothing."""
    draw = random.Random(seed)
    rows = []
    for _ in range(size):
        tail = ["the film"] * draw.randint(0, 2)
        words = [
            " ".join([draw.choice(of), *draw.sample(tail, draw.randint(0, len(tail)))]) for of in (KIND, COLD)
        ]
        prompt = [
            {"role": "user", "content": f"write a review of the {draw.choice(('film', 'meal', 'room'))}"}
        ]
        chosen, rejected = ([{"role": "assistant", "content": w}] for w in words)
        scores = {"score_chosen": 0.8, "score_rejected": -0.4}
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "split": split, **scores})
    return rows


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, [*rows_of("train", 64, 0), *rows_of("test", 40, 1)])))
    return file


@pytest.fixture
def settings(tiny_model, pairs, tmp_path):
    return {
        "model_name_or_path": str(tiny_model),
        "dtype": "float32",
        "device": "cpu",
        "dataset_name": str(pairs),
        "learn_from": "data",
        "method": "reward_model",
        "prompts_per_step": 8,
        "max_steps": 24,
        "learning_rate": 0.03,
        "save_steps": 10,
        "output_dir": str(tmp_path / "run"),
    }


@pytest.mark.parametrize("family", ["lora", "full"])
def test_it_learns_and_any_tool_loads_it(klimb, options, settings, tmp_path, family):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    status, out, err = klimb("climb", "--json", *options({**settings, "family.kind": family}))
    assert status == 0, err
    record = json.loads(out)
    found = json.loads((tmp_path / "run/measure.json").read_text())
    assert record["measure"] == found
    assert record["product"] == "reward_model"
    of = found["reward_model"]
    assert of["accuracy"]["value"] > 0.9
    assert of["surprise"]["value"] < 0.5
    assert (of["accuracy"]["n"], found["num_rows"]) == (40, 40)
    assert not (tmp_path / "run/policy").exists()
    steps = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert steps[0]["objective_value"] == pytest.approx(0.6931, abs=1e-4)  # a head of zeros says nothing
    assert steps[-1]["objective_value"] < 0.5

    folder = tmp_path / "run/reward_model"
    assert not list(folder.glob("adapter*"))
    model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = [{"role": "user", "content": "write a review of the film"}]
    texts = ["good the film", "cold"]
    chats = [[*prompt, {"role": "assistant", "content": text}] for text in texts]
    with torch.no_grad():
        logits = [
            model(
                torch.tensor([tokenizer(tokenizer.apply_chat_template(c, tokenize=False))["input_ids"]])
            ).logits.item()
            for c in chats
        ]
    reward = load_reward(str(folder))
    scores = reward([prompt, prompt], [[c[-1]] for c in chats])
    assert scores == pytest.approx(logits, abs=1e-5)
    assert scores[0] > scores[1]

    status, out, err = klimb("measure", tmp_path / "run", "--json", "-q")
    assert status == 0, err
    assert json.loads(out) == found
    assert (tmp_path / "run/report.html").is_file()


def test_what_a_person_sees(klimb, options, settings):
    status, out, err = klimb("climb", *options({**settings, "max_steps": 4}))
    assert status == 0, err
    for words in (
        "held-out accuracy",
        "of 40 pairs",
        "calibration error",
        "unreliable",
        "goes with length",
        "reward model",
    ):
        assert words in out, words
    assert "step 4/4  accuracy" in out


def test_the_audits_numbers(klimb, options, settings, tmp_path):
    """What is in measure.json beside sums done here."""
    status, _, err = klimb("climb", "-q", *options(settings))
    assert status == 0, err
    found = json.loads((tmp_path / "run/measure.json").read_text())
    rows = rows_of("test", 40, 1)
    reward = load_reward(str(tmp_path / "run/reward_model"))
    better, worse = (
        torch.tensor(reward([r["prompt"] for r in rows], [r[n] for r in rows]))
        for n in ("chosen", "rejected")
    )
    margin = better - worse
    of = found["reward_model"]
    assert of["accuracy"]["value"] == pytest.approx((margin > 0).float().mean().item())
    assert of["margin"]["value"] == pytest.approx(margin.mean().item(), abs=1e-5)
    assert of["surprise"]["value"] == pytest.approx(torch.log1p((-margin).exp()).mean().item(), abs=1e-5)
    longer = torch.tensor(
        [len(r["chosen"][0]["content"].split()) - len(r["rejected"][0]["content"].split()) for r in rows]
    ).float()
    cosine = (margin * longer).sum() / (margin.norm() * longer.norm())
    assert of["length"]["value"] == pytest.approx(cosine.item(), abs=1e-5)
    assert of["longer_better"]["n"] == int((longer > 0).sum())
    assert sum(b["accuracy"]["n"] for b in found["reliability"]) == 40
    assert found["rescored"]["one by one"]["spread"]["value"] < 1e-5
    assert 0 < found["rescored"]["in bfloat16"]["spread"]["value"] < 0.5
    assert sum(found["scores"]["better"]) == 40


def test_it_is_a_reward_of_another_run(klimb, options, settings, make_run, tmp_path, no_report):
    """The true reward beside the learned one, which alone is climbed."""
    assert klimb("climb", "-q", *options(settings))[0] == 0
    plain = make_run(tmp_path)
    funcs = [str(tmp_path / "run/reward_model"), plain["reward_funcs"]]
    asked = {
        **plain,
        "reward_funcs": funcs,
        "reward_weights": [1, 0],
        "output_dir": str(tmp_path / "climbed"),
        "max_steps": 2,
    }
    status, _, err = klimb("climb", "-q", *options(asked))
    assert status == 0, err
    found = json.loads((tmp_path / "climbed/measure.json").read_text())
    stored = read_draws(tmp_path / "climbed/draws/measure.parquet")
    parts = found["rewards"]
    assert set(parts) == {"reward_model", "good"}
    assert parts["reward_model"]["policy"]["value"] == pytest.approx(found["reward"]["value"], abs=1e-6)
    assert parts["good"]["policy"]["value"] == pytest.approx(
        stored.reward_parts["good"].mean().item(), abs=1e-6
    )


def test_judges_lead_elsewhere(klimb, options, settings, tmp_path):
    """Labels, chances, margins, smoothing and centring are different losses from the second step on."""
    seen = {}
    cases = {
        "labels": {},
        "scores": {"judge": "scores"},
        "margins": {"judge": "margins"},
        "smoothed": {"label_smoothing": 0.2},
        "centred": {"center_rewards_coefficient": 0.5},
    }
    for name, change in cases.items():
        out = tmp_path / name
        status, _, err = klimb(
            "train", "-q", *options({**settings, "max_steps": 3, **change, "output_dir": str(out)})
        )
        assert status == 0, err
        seen[name] = read_jsonl(out / "metrics.jsonl")[-1]["objective_value"]
    assert len({round(x, 6) for x in seen.values()}) == len(cases)
    gap = torch.tensor(1.2)
    assert read_jsonl(tmp_path / "margins/metrics.jsonl")[0]["objective_value"] == pytest.approx(
        torch.nn.functional.softplus(gap).item(), abs=1e-5
    )


REFUSED = {
    "draws": (
        {"learn_from": "draws", "reward_funcs": "math:hypot"},
        ["reward_model learns", "use learn_from data"],
    ),
    "an option of draws": (
        {"num_generations": 4, "kl_target": 0.5},
        ["no use for num_generations, kl_target"],
    ),
    "a soft prompt": ({"family.kind": "soft_prompt"}, ["expected family lora without start, or full"]),
    "smoothed chances": ({"judge": "scores", "label_smoothing": 0.1}, ["chances already"]),
    "margins of a policy": (
        {"method": "dpo", "judge": "margins"},
        ["judge margins is of method reward_model, got dpo"],
    ),
    "a centre of a policy": (
        {"method": "dpo", "center_rewards_coefficient": 0.1},
        ["center_rewards_coefficient is of method reward_model"],
    ),
    "too many rows a step": ({"prompts_per_step": 65}, ["prompts_per_step 65", "64 rows"]),
    "too long": ({"prompt": "film " * 80}, ["expected at most 64, which is all the model reads"]),
    "only messages": (
        {"rows": [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]},
        ["one a row"],
    ),
    "labelled one by one": ({"rows": [{"prompt": "a", "completion": " b", "label": True}]}, ["one a row"]),
    "nothing judged": ({"rows": [{"prompt": "a", "answer": "b"}]}, ["no judged completions"]),
    "rows of several sizes": (
        {
            "rows": [
                {"prompt": "a", "completions": ["b", "c"], "scores": [0, 1]},
                {"prompt": "a", "completions": ["b", "c", "d"], "scores": [0, 1, 2]},
            ]
        },
        ["rows of 2 to 3 completions"],
    ),
    "all of them tie": (
        {"rows": [{"prompt": "a", "completions": ["b", "c"], "scores": [1, 1]}] * 8},
        ["do two scores differ"],
    ),
    "no scores for a margin": (
        {"judge": "margins", "rows": [{"prompt": "a", "chosen": " b", "rejected": " c"}]},
        ["no scores of these pairs"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(klimb, options, settings, tmp_path, case):
    change, words = REFUSED[case]
    change = dict(change)
    if "rows" in change or "prompt" in change:
        prompt = change.pop("prompt", "")
        alike = [{"prompt": prompt, "chosen": " good", "rejected": " bad"}] * 8
        rows = change.pop("rows", alike)
        file = tmp_path / "other.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        change |= {"dataset_name": str(file), "dataset_test_split": None}
    status, out, err = klimb("climb", "-q", *options({**settings, **change}))
    assert (status, out) == (2, "")
    for word in words:
        assert word in err, (word, err)
    assert not (tmp_path / "run").exists()


def test_a_reward_model_is_no_policy(klimb, options, settings, make_run, tmp_path):
    assert klimb("train", "-q", *options(settings))[0] == 0
    folder = tmp_path / "run/reward_model"
    changes = {"kl_budget": None, "beta": 0.1, "output_dir": str(tmp_path / "other")}
    plain = {**make_run(tmp_path), **changes}
    for words in (
        ("measure", *options(plain), "--policy", folder),
        ("plan", *options({**plain, "model_name_or_path": str(folder)})),
    ):
        status, _, err = klimb(*words)
        assert status == 2
        assert "is a reward model" in err
        assert "reward_funcs" in err
    status, _, err = klimb("diagnose", tmp_path / "run")
    assert status == 2
    assert f"klimb measure {tmp_path / 'run'} audits the reward" in err
    status, _, err = klimb("sample", tmp_path / "run")
    assert status == 2
    assert "a reward model draws nothing" in err
    status, _, err = klimb("plan", *options({**plain, "reward_funcs": str(tmp_path / "run")}))
    assert status == 2
    assert str(Path(tmp_path / "run/reward_model")) in err


def test_a_run_that_was_not_trained_has_nothing_to_audit(klimb, options, settings, tmp_path):
    status, _, err = klimb("measure", *options(settings), "--policy", tmp_path / "nowhere")
    assert status == 2
    assert "expected a trained reward model" in err
