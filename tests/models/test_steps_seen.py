"""What a step's fresh draws say of the way left: exact where they enumerate the policy."""

import torch

from klimb.data import Draws, Example, Pool
from klimb.steps import fresh_estimates, residual_of
from klimb.target import tilt


def enumerated(log_pi, log_ref, reward, size=16):
    """Draws that hold each outcome as often as the policy says, for each of P prompts."""
    counts = (log_pi.exp() * size).round().long()
    index = torch.stack([torch.arange(len(row)).repeat_interleave(row) for row in counts])
    prompts = len(index)

    def at(x):
        return x.gather(1, index)

    draws = Draws(
        [Example(f"{i}") for i in range(prompts)],
        [[torch.tensor([1, 2])] * size] * prompts,
        torch.ones(prompts, size, dtype=torch.bool),
        log_q=at(log_pi),
        own_law=True,
    )
    return Pool(draws, at(reward), at(log_ref), log_pi=at(log_pi))


def test_gap_and_entropy_are_those_of_the_policy():
    g, beta = torch.Generator().manual_seed(0), 0.7
    log_pi = torch.tensor([[1, 3, 4, 8], [4, 4, 4, 4], [8, 4, 2, 2]], dtype=torch.float64).div(16).log()
    log_ref = torch.randn(3, 4, generator=g, dtype=torch.float64).log_softmax(1)
    reward = torch.randn(3, 4, generator=g, dtype=torch.float64)
    target = tilt(None, None, beta)
    found = fresh_estimates(enumerated(log_pi, log_ref, reward), target, step=1)
    log_p = (log_ref + reward / beta).log_softmax(1)
    gap = beta * (log_pi.exp() * (log_pi - log_p)).sum(1).mean().item()
    entropy = -(log_pi.exp() * log_pi).sum(1).mean().item() / 2  # two tokens each
    assert abs(found["self_gap"].value - gap) < 1e-9
    assert abs(found["entropy"].value - entropy) < 1e-9
    assert found["self_gap"].low <= gap <= found["self_gap"].high
    # the mutant: another beta's target
    other = fresh_estimates(enumerated(log_pi, log_ref, reward), tilt(None, None, 2 * beta), step=1)
    assert abs(other["self_gap"].value - gap) > 1e-3


def test_at_the_best_policy_nothing_is_left_and_every_draw_counts():
    log_pi = torch.tensor([[2, 4, 4, 6]], dtype=torch.float64).div(16).log().expand(2, 4).clone()
    log_ref = torch.full((2, 4), 0.25, dtype=torch.float64).log()
    pool = enumerated(log_pi, log_ref, log_pi - log_ref)  # beta 1: p is the policy
    found = fresh_estimates(pool, tilt(None, None, 1.0), step=1)
    assert abs(found["self_gap"].value) < 1e-12
    assert residual_of(pool, tilt(None, None, 1.0)).std(1).max() < 1e-12


def test_a_forbidden_or_a_single_draw_has_no_gap():
    log_pi = torch.tensor([[8, 8]], dtype=torch.float64).div(16).log()
    reward = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    pool = enumerated(log_pi, log_pi, reward)
    assert "self_gap" not in fresh_estimates(pool, tilt(None, None, 1.0), step=1)
