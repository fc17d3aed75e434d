"""What a run's tables of draws hold, token by token, and which of them a plan may rest on."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from klimb.config import load
from klimb.loaded import prepare
from klimb.run import run_plan, run_train
from klimb.store import read_draws, read_json, read_jsonl

STEPS = 3


pytestmark = pytest.mark.usefixtures("no_report")


def train_on(options, settings, **changes):
    return run_train(load(None, options({**settings, "max_steps": STEPS, **changes}))).path


def sums(draws, tokens):
    return draws.sequence_sums(tokens)


def test_fresh_draws_keep_what_each_token_cost_under_reference_and_policy(tiny_run, options):
    run = train_on(options, tiny_run)
    for step in range(1, STEPS + 1):
        stored = read_draws(run / f"draws/train-{step:06d}.parquet")
        assert torch.allclose(sums(stored.draws, stored.token_log_ref), stored.log_ref, atol=1e-5)
        assert torch.allclose(sums(stored.draws, stored.token_log_pi), stored.log_pi, atol=1e-5)
        apart = (stored.token_log_pi - stored.token_log_ref).abs().max()
        # a new adapter is the reference; one that has learned is not
        assert apart < 1e-6 if step == 1 else apart > 1e-3
    frame = pd.read_parquet(run / "draws/train-000001.parquet")
    assert [len(row) for row in frame["token_log_pi"]] == [len(row) for row in frame["tokens"]]


def test_a_plans_draws_keep_what_each_token_cost_under_the_reference(tiny_run, options, other_model):
    config = load(None, options({**tiny_run, "reference": str(other_model)}))
    stored = read_draws(run_plan(config).path / "draws/plan.parquet")
    assert torch.allclose(sums(stored.draws, stored.token_log_ref), stored.log_ref, atol=1e-5)
    loaded = prepare(config)
    with torch.no_grad():
        scored, others = (who.log_prob(stored.draws) for who in (loaded.reference, loaded.policy))
    assert torch.allclose(stored.token_log_ref, scored, atol=1e-5)
    assert not torch.allclose(stored.token_log_ref, others, atol=1e-2)


def test_the_mutant_that_takes_the_kept_draws_tokens_for_the_fresh_ones_is_noticed(
    tiny_run, options, monkeypatch
):
    def first_ones(fresh, pool, passed):
        kept_too = passed.token_log_pi[: int(fresh.draws.lengths.sum())]
        return replace(fresh, log_pi=passed.log_pi[:, : fresh.draws.num_draws], token_log_pi=kept_too)

    monkeypatch.setattr("klimb.train.with_log_pi", first_ones)
    run = train_on(options, tiny_run, max_steps=1)
    stored = read_draws(run / "draws/train-000001.parquet")
    assert (stored.token_log_pi - stored.token_log_ref).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "high"),
    [({}, 1e-5), ({"max_chunk_tokens": 3}, 1e-5), ({"dtype": "bfloat16"}, 0.1)],
)
def test_each_step_says_how_far_sampler_and_scorer_are_apart(tiny_run, options, changes, high):
    run = train_on(options, tiny_run, **changes)
    for record in read_jsonl(run / "metrics.jsonl"):
        stored = read_draws(run / f"draws/train-{record['step']:06d}.parquet")
        error = (stored.draws.log_q - stored.log_pi).abs().flatten().numpy()
        assert record["sampler_error_mean"] == pytest.approx(error.mean(), rel=1e-6, abs=1e-9)
        assert record["sampler_error_p99"] == pytest.approx(np.percentile(error, 99), rel=1e-6, abs=1e-9)
        assert 0 <= record["sampler_error_mean"] <= record["sampler_error_p99"] < high


def test_steps_that_only_replay_have_no_sampler_to_speak_of(tiny_run, options):
    run = train_on(options, tiny_run, replay_steps=2)
    said = ["sampler_error_mean" in record for record in read_jsonl(run / "metrics.jsonl")]
    assert said == [False, False, True]


def test_reference_samples_are_a_pool_to_plan_on_and_to_train_on(klimb, tiny_run, options, tmp_path):
    drawn = {**tiny_run, "output_dir": str(tmp_path / "drawn"), "dataset_test_split": "train"}
    assert klimb("sample", "-q", *options(drawn), "--num-draws", "32")[0] == 0
    pool = tmp_path / "drawn/draws/sample.parquet"
    status, _, err = klimb("train", "-q", *options({**tiny_run, "plan": str(pool)}))
    assert status == 0, err
    a, b = read_draws(pool), read_draws(tmp_path / "run/draws/plan.parquet")
    assert a.draws.texts == b.draws.texts
    assert (a.verb, b.verb, a.hashes) == ("sample", "plan", b.hashes)
    assert a.token_log_ref.equal(b.token_log_ref)
    assert a.reward.equal(b.reward)
    plan = read_json(tmp_path / "run/plan.json")
    assert plan["reference"]["reward"]["value"] == pytest.approx(a.reward.mean().item(), abs=1e-6)
    assert plan["num_draws"] == 32


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--method", "best_of"], "best of n, not draws of the reference"),
        (["--method", "rejection", "--bound", "1.5", "--beta", "0.5", "--kl_budget", "null"], "the target"),
        (["--policy", "POLICY"], "a policy that is not the reference"),
        (["--reference", "OTHER"], "a policy that is not the reference"),
    ],
)
def test_samples_of_another_law_are_refused(klimb, tiny_run, other_model, options, tmp_path, arguments, word):
    if "POLICY" in arguments:
        train_on(options, tiny_run, max_steps=1)
    places = {"POLICY": str(tmp_path / "run/policy"), "OTHER": str(other_model)}
    arguments = [places.get(a, a) for a in arguments]
    drawn = {**tiny_run, "output_dir": str(tmp_path / "drawn"), "dataset_test_split": "train"}
    status, _, err = klimb("sample", "-q", *options(drawn), "--num-draws", "32", *arguments)
    assert status == 0, err
    pool = tmp_path / "drawn/draws/sample.parquet"
    asked = {**tiny_run, "plan": str(pool), "output_dir": str(tmp_path / "new")}
    if "--reference" in arguments:
        asked["reference"] = str(other_model)
    status, _, err = klimb("plan", "-q", *options(asked))
    assert status == 2
    assert word in err
    assert "a plan rests on draws of the reference" in err
    assert not (tmp_path / "new").exists()


def test_held_out_samples_and_draws_of_the_policy_are_no_pool_either(klimb, tiny_run, options, tmp_path):
    assert klimb("sample", "-q", *options(tiny_run), "--num-draws", "8")[0] == 0
    new = {**tiny_run, "output_dir": str(tmp_path / "new")}
    held_out = tmp_path / "run/draws/sample.parquet"
    status, _, err = klimb("plan", "-q", *options({**new, "plan": str(held_out)}))
    assert (status, "dataset_test_split" in err, "other prompts" in err) == (2, True, True)
    train_on(options, tiny_run, max_steps=1)
    fresh = tmp_path / "run/draws/train-000001.parquet"
    status, _, err = klimb("plan", "-q", *options({**new, "plan": str(fresh)}))
    assert (status, "draws of the policy in training" in err) == (2, True)


def test_an_evaluation_during_training_computes_the_certificate_alone(tiny_run, options, monkeypatch):
    def never(*arguments, **named):
        raise AssertionError("a frontier that nobody looks at")

    monkeypatch.setattr("klimb.measure.frontier", never)
    monkeypatch.setattr("klimb.measure.diagnose", never)
    run = train_on(options, tiny_run, eval_steps=2)
    assert read_jsonl(run / "metrics.jsonl")[1]["evaluation"]["kl"]["value"] > 0


def test_rejection_says_what_a_person_can_do(klimb, tiny_run, options):
    settings = {**tiny_run, "kl_budget": None, "beta": 0.05}
    status, _, err = klimb(
        "sample", "-q", *options(settings), "--method", "rejection", "--bound", "1.5", "--num-draws", "64"
    )
    assert status == 2
    assert "of 1024 reference draws were kept" in err
    assert "Ask for fewer draws a prompt, raise beta (now 0.05) or give a tighter bound than 1.5" in err
