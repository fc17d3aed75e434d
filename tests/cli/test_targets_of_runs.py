"""A run towards another target: every verb speaks of the reward whose plain tilt it is, end to end on the tiny model.

What plan.json and measure.json say is compared with the formulas, computed here from the draws on disk.
"""

import pytest
import torch
import yaml

from klimb.numbers.certificate import certificate
from klimb.numbers.tilt import log_partition, solve_beta, tilted_kl, tilted_mean
from klimb.store import read_draws, read_json, read_jsonl

pytestmark = pytest.mark.usefixtures("no_report")
BETA, BONUS = 0.5, 0.05
RUNS = {
    "length_normalized": ({}, BETA),
    "entropy_bonus": ({"target.bonus": BONUS}, BETA + BONUS),
}


def own(kind, found):
    """The target's own reward, by its formula."""
    reward, log_ref = found.reward.double(), found.log_ref.double()
    return reward / found.draws.lengths if kind == "length_normalized" else reward - BONUS * log_ref


@pytest.fixture(params=RUNS)
def climbed(request, klimb, tiny_run, options, tmp_path):
    """A whole run towards each target, and the price of a nat there."""
    more, price = RUNS[request.param]
    settings = {**tiny_run, "kl_budget": None, "beta": BETA, "target.kind": request.param, **more}
    status, out, err = klimb("climb", *options({**settings, "eval_steps": 3, "eval_prompts": 4}))
    assert (status, err) == (0, ""), err
    assert request.param in out
    return tmp_path / "run", request.param, price


def test_plan_and_certificate_are_of_the_targets_own_reward(climbed, klimb):
    run, kind, price = climbed
    plan, measured = read_json(run / "plan.json"), read_json(run / "measure.json")
    assert plan["target"]["kind"] == measured["target"]["kind"] == kind
    assert yaml.safe_load((run / "config.yaml").read_text())["beta"] == BETA
    assert plan["beta"]["value"] == measured["beta"] == pytest.approx(price)

    pool = read_draws(run / "draws/plan.parquet")
    reward = own(kind, pool)
    assert (reward - pool.reward).abs().max() > 0.05  # else this test could not fail
    assert plan["reference"]["reward"]["value"] == pytest.approx(reward.mean().item(), abs=1e-5)
    assert plan["optimum"]["kl"]["value"] == pytest.approx(tilted_kl(reward, price).mean().item(), abs=1e-4)
    best = tilted_mean(reward, price).mean().item()
    assert plan["optimum"]["reward"]["value"] == pytest.approx(best, abs=1e-4)

    policy, reference = (
        read_draws(run / f"draws/{name}.parquet") for name in ("measure", "measure-reference")
    )
    again = certificate(
        beta=price,
        reward_policy=own(kind, policy).float(),
        log_pi_policy=policy.log_pi,
        log_ref_policy=policy.log_ref,
        reward_reference=own(kind, reference).float(),
        log_pi_reference=reference.log_pi,
        log_ref_reference=reference.log_ref,
        generator=torch.Generator().manual_seed(0),
    )
    for name in ("reward", "objective", "gap", "log_z", "attained"):
        assert measured[name]["value"] == pytest.approx(getattr(again, name).value, abs=1e-4), name
    raw = measured["raw_reward"]
    assert raw["policy"]["value"] == pytest.approx(policy.reward.mean().item(), abs=1e-6)
    assert raw["reference"]["value"] == pytest.approx(reference.reward.mean().item(), abs=1e-6)

    last = read_jsonl(run / "metrics.jsonl")[-1]
    drawn = read_draws(run / "draws/train-000006.parquet")
    worth = own(kind, drawn) - price * (drawn.draws.log_q - drawn.log_ref)
    assert last["regularised_reward"]["value"] == pytest.approx(worth.mean().item(), abs=1e-4)
    assert last["reward"]["value"] == pytest.approx(drawn.reward.mean().item(), abs=1e-6)

    status, _, err = klimb("measure", run, "--json")
    assert (status, err) == (0, ""), err


def test_the_derivation_of_a_run_is_of_its_targets_own_reward(climbed):
    from klimb.problems import from_run

    run, kind, price = climbed
    given = from_run(run)
    assert given.problem.beta == pytest.approx(price)
    for planned_only in ("measure.json", "draws/measure.parquet", "draws/measure-reference.parquet"):
        (run / planned_only).unlink()
    pool = read_draws(run / "draws/plan.parquet")
    first = {
        tuple(ids.tolist()): r
        for ids, r in zip(pool.draws.completions[0], own(kind, pool)[0].tolist(), strict=True)
    }
    reward = from_run(run).problem.reward[0]
    assert reward[: len(first)].tolist() == pytest.approx(list(first.values()), abs=1e-5)
    assert len(set(first.values())) > 1


def test_a_budget_finds_the_beta_of_the_reward_per_token(klimb, tiny_run, options, tmp_path):
    status, _, err = klimb("plan", "-q", *options({**tiny_run, "target.kind": "length_normalized"}))
    assert (status, err) == (0, ""), err
    plan, pool = read_json(tmp_path / "run/plan.json"), read_draws(tmp_path / "run/draws/plan.parquet")
    beta = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["beta"]
    assert plan["beta"]["value"] == beta
    assert beta == pytest.approx(solve_beta(own("length_normalized", pool), kl=0.5), rel=1e-4)
    assert beta != pytest.approx(solve_beta(pool.reward, kl=0.5), rel=0.1)


@pytest.mark.parametrize("kind", RUNS)
def test_log_z_and_the_numbers_of_a_step_are_the_targets(kind):
    from klimb.backward import known_numbers
    from klimb.data import Draws, Example, Pool
    from klimb.log_z import plan_log_z
    from klimb.target import entropy_bonus, length_normalized, own_reward, tilt

    g = torch.Generator().manual_seed(3)
    ids = [[torch.arange(n) for n in (1, 2, 5)]]
    log_ref, reward = -5 * torch.rand(1, 3, generator=g), torch.randn(1, 3, generator=g)
    draws = Draws([Example("x")], ids, torch.ones(1, 3, dtype=torch.bool), log_q=log_ref)
    pool = Pool(draws, reward, log_ref)
    target = (
        length_normalized(None, None, BETA)
        if kind == "length_normalized"
        else entropy_bonus(None, None, BETA, bonus=BONUS)
    )
    numbers = known_numbers(pool, target)
    # the objectives of reward and beta and those of log_target climb to one place
    torch.testing.assert_close(numbers["log_target"], log_ref + numbers["reward"] / numbers["beta"])
    log_z = (numbers["log_target"] - log_ref).exp().mean().log()
    (found,) = plan_log_z(pool, target).values()
    assert found == pytest.approx(log_z.item(), abs=1e-5)
    assert found != pytest.approx(log_partition(reward, BETA).item(), abs=1e-2)
    assert own_reward(tilt(None, None, BETA), pool) is reward  # bit by bit


@pytest.mark.parametrize("method", ["jensen_shannon", "rloo"])
def test_methods_that_ask_for_log_z_or_reward_train_and_resume(klimb, tiny_run, options, tmp_path, method):
    replay = {"num_replay": 0} if method == "rloo" else {}
    settings = {**tiny_run, **replay, "method": method, "target.kind": "length_normalized"}
    assert klimb("plan", "-q", *options(settings))[0] == 0
    status, _, err = klimb("train", "-q", "--resume", tmp_path / "run")
    assert (status, err) == (0, ""), err
    fresh = {**settings, "output_dir": str(tmp_path / "fresh")}
    assert klimb("train", "-q", *options(fresh))[0] == 0
    a, b = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("run", "fresh"))
    timeless = [[{**r, "seconds": 0, "tokens_per_second": 0} for r in run] for run in (a, b)]
    assert timeless[0] == timeless[1]
