"""The linter finds what is known of objectives, and does not take a wrong one for right."""

import pytest
import torch

from klimb.exact.linter import inspect, numbers_of, toy
from klimb.exact.truth import kl, normalise
from klimb.objectives import forward_kl, log_variance, reverse_kl

TOY = toy()


@pytest.mark.parametrize("objective", [log_variance, reverse_kl])
def test_the_gradient_of_the_kl_ends_at_the_target_without_noise(objective):
    found = inspect(objective, TOY)
    assert found.stops == "inside"
    assert abs(found.kl_to_target) < 1e-8
    assert abs(found.alignment - 1) < 1e-10
    assert abs(found.scale - 1) < 1e-8
    assert found.noise_at_target < 1e-20 < 1e-2 < found.noise_at_reference
    assert found.drift_at_target < 1e-12


def test_log_variance_off_policy_has_another_gradient_and_the_same_end():
    found = inspect(log_variance, TOY, draws="other")
    assert abs(found.kl_to_target) < 1e-8
    assert found.alignment < 0.99


def test_self_normalised_weights_end_elsewhere():
    found = inspect(forward_kl, TOY, draws="other")
    assert found.stops == "inside"
    assert found.kl_to_target > 1e-2
    assert found.drift_at_target > 1e-2


def reward_only(log_pi, advantage):
    return -(log_pi * advantage).mean(1)


def centred(reward):
    return reward - reward.mean(1, keepdim=True)


def test_the_reward_alone_runs_to_certainty():
    found = inspect(reward_only, TOY, num_draws=2, derived={"advantage": centred})
    assert found.stops == "boundary"
    assert found.fixed_point[TOY.reward.argmax()] > 0.99


def test_a_known_other_target_is_found():
    """Residuals of half log_pi are flattened by p^2: the fixed point is found, not assumed."""
    found = inspect(lambda log_pi, log_target: log_variance(0.5 * log_pi, log_target), TOY, draws="other")
    squared = normalise(2 * TOY.log_target)
    assert abs(kl(found.fixed_point.log(), squared).item()) < 1e-8
    assert abs(found.kl_to_target - kl(squared, TOY.log_p).item()) < 1e-8


def test_packed_tokens_add_up_to_sequences():
    outcomes = torch.tensor([[0, 3, 6], [1, 2, 5]])
    numbers = numbers_of(TOY, TOY.other, TOY.ref, outcomes)
    for token, sequence in (
        ("token_log_pi", "log_pi"),
        ("token_log_ref", "log_ref"),
        ("token_log_q", "log_q"),
    ):
        sums = torch.zeros(6, dtype=torch.float64).index_add(0, numbers["row"], numbers[token])
        torch.testing.assert_close(sums.reshape(2, 3), numbers[sequence])


def test_an_objective_that_asks_too_much_is_told():
    with pytest.raises(ValueError, match="got no wins"):
        inspect(lambda log_pi, wins: log_pi.mean(1), TOY)
    with pytest.raises(ValueError, match="one value a prompt"):
        inspect(lambda log_pi: log_pi, TOY)
    with pytest.raises(ValueError, match="not finite"):
        inspect(lambda log_pi: (log_pi * torch.inf).sum(1), TOY)
