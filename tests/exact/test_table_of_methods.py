"""Every row of the table of methods is put to the test of its claim, by being in the table."""

from functools import partial

import pytest
import torch

from klimb.exact.linter import inspect, toy, verdict
from klimb.methods import METHODS, NOT_PROVIDED, TARGETS, method
from klimb.objectives import kl_loss
from klimb.objectives.generators import FAMILIES
from klimb.objectives.kl_penalty import k1
from klimb.objectives.surrogate import ppo

TOY = toy()
TRAINED = {name: row for name, row in METHODS.items() if row.objective is not None}
NOISE_STAYS = {
    "sft",
    "ppo",
    "total_variation",
    "forward_kl",
}  # whose draws at the target still move something


def found(name, draws="policy", num_draws=2):
    row = TRAINED[name]
    most = 30 if name == "total_variation" else 200  # a sign for a slope: it comes to no rest
    return inspect(row.objective, TOY, draws=draws, num_draws=num_draws, derived=row.derived, max_steps=most)


def leads_to_the_target(name):
    return TRAINED[name].claim in ("gradient", "minimiser") and name not in ("sft", "total_variation")


@pytest.mark.parametrize("name", [n for n in TRAINED if leads_to_the_target(n)])
def test_it_stops_at_the_target(name):
    at = found(name)
    assert at.stops == "inside"
    assert abs(at.kl_to_target) < 1e-8
    assert at.drift_at_target < 1e-10
    if name not in NOISE_STAYS:
        assert at.noise_at_target < 1e-20


@pytest.mark.parametrize("name", [n for n in TRAINED if not leads_to_the_target(n) and n != "sft"])
def test_a_row_that_claims_no_target_does_not_have_it(name):
    """The other way round: a caveat that stops being true fails here."""
    at = found(name)
    assert abs(at.kl_to_target) > 1e-4
    assert at.drift_at_target > 1e-3


@pytest.mark.parametrize("name", ["reverse_kl", "rloo", "ppo", "log_variance", "trajectory_balance"])
def test_its_update_is_the_gradient_of_the_reverse_kl(name):
    at = found(name)
    unit = TOY.beta if TRAINED[name].unit == "reward" else 1.0
    assert abs(at.alignment - 1) < 1e-9
    assert abs(at.scale - unit) < 1e-8


@pytest.mark.parametrize("name", ["log_variance", "trajectory_balance", "path_consistency"])
def test_any_law_will_do_for_the_minimum_but_not_for_the_gradient(name):
    at = found(name, draws="other")
    assert abs(at.kl_to_target) < 1e-8
    assert at.alignment < 0.99


@pytest.mark.parametrize("name", ["dr_grpo", "dapo", "gspo", "cispo", "raft"])
def test_without_a_price_on_kl_it_runs_to_certainty(name):
    at = found(name)
    assert at.stops == "boundary"
    assert at.fixed_point[TOY.reward.argmax()] > 0.99


def test_stale_draws_need_the_whole_ratio_and_a_fresh_advantage():
    """RLOO on draws that never change keeps a fixed advantage, and runs past the target."""
    assert found("rloo", draws="other").stops == "boundary"


def test_likelihood_of_its_own_draws_teaches_nothing():
    at = found("sft")
    assert at.update < 1e-14
    assert "train noise" in verdict(at, "policy")
    other = found("sft", draws="other")
    assert other.stops == "inside"
    assert (other.fixed_point - found("sft").fixed_point).abs().max() > 1e-2


def test_the_linter_tells_a_wrong_method_from_a_right_one():
    """k1 as a loss, and PPO that forgot the KL, would not pass as rows."""
    noise = inspect(partial(kl_loss, estimator=k1), TOY, num_draws=2)
    assert noise.update < 1e-12
    row = METHODS["ppo"]
    unpriced = dict(row.derived) | {"token_reward": lambda reward, lengths: last_token(reward, lengths)}
    assert inspect(ppo, TOY, num_draws=2, derived=unpriced).stops == "boundary"


def last_token(reward, lengths):
    rewards = torch.zeros(int(lengths.sum()), dtype=reward.dtype)
    rewards[lengths.flatten().cumsum(0) - 1] = reward.flatten()
    return rewards


@pytest.mark.parametrize("name", METHODS)
def test_every_row_is_complete(name):
    row = METHODS[name].as_dict()
    assert all(
        row[part] for part in ("knows", "divergence", "draws", "claim", "fixed_point", "caveat", "source")
    )
    assert (row["objective"] is None) == (row["claim"] == "law")
    assert name not in NOT_PROVIDED


@pytest.mark.parametrize("family", FAMILIES)
def test_a_divergence_with_a_number_of_ones_own_has_the_texts_of_its_family_alone(family):
    (row,) = (row for name, row in METHODS.items() if name.startswith(f"{family}("))
    own = method(f"{family}(0.3)")
    assert own.objective.keywords["f"] == f"{family}(0.3)"
    assert {**own.as_dict(), "objective": None} == {**row.as_dict(), "objective": None}
    assert [other.divergence for other in METHODS.values()].count(own.divergence) == 1


def test_f_dpo_of_any_divergence_has_the_texts_of_its_row_alone():
    row, own = METHODS["f_dpo(jensen_shannon)"], method("f_dpo(alpha(0.3))")
    assert {**own.as_dict(), "objective": None} == {**row.as_dict(), "objective": None}
    assert own.objective.keywords["score"] is not row.objective.keywords["score"]
    assert method("f_dpo(reverse_kl)") is METHODS["dpo"]


@pytest.mark.parametrize("name", [n for n in TRAINED if leads_to_the_target(n)])
def test_a_constant_added_to_every_reward_changes_no_fixed_point(name):
    """It is a factor of Z and nothing else."""
    row = TRAINED[name]
    shifted = type(TOY)(TOY.space, TOY.ref, TOY.reward + 3.0, TOY.beta, TOY.other)
    at = inspect(row.objective, shifted, num_draws=2, derived=row.derived, max_steps=60)
    here = inspect(row.objective, TOY, num_draws=2, derived=row.derived, max_steps=60)
    torch.testing.assert_close(at.fixed_point, here.fixed_point, rtol=1e-6, atol=1e-6)
    assert abs(at.alignment - here.alignment) < 1e-9


def test_every_target_is_one_that_can_be_made():
    import klimb.target

    assert all(callable(getattr(klimb.target, name)) for name in TARGETS)
