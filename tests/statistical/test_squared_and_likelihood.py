"""Squared and likelihood losses for any numbers at all: derivatives, constants in the reward, ties, order, precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.gradcheck import gradcheck, gradgradcheck

from klimb.exact import random_logits
from klimb.objectives import (
    coefficients,
    dpg,
    filtered,
    length_normalised_balance,
    pmd_mean,
    raft,
    reward_weighted,
    sft,
    trajectory_balance,
)

P, G = 2, 4
LENGTHS = torch.tensor([[1, 2, 5, 3], [1, 1, 7, 2]])
# every objective as a function of policy, reference, reward (beta = 1), log Z: [P, G] three times, [P]
SQUARED = {
    "trajectory_balance": lambda pi, ref, r, z: trajectory_balance(pi, ref + r, z),
    "pmd_mean": lambda pi, ref, r, z: pmd_mean(pi, ref + r, ref),
    "length_normalised_balance": lambda pi, ref, r, z: length_normalised_balance(
        pi, ref + r, ref, LENGTHS, z
    ),
}
LIKELIHOOD = {
    "sft": lambda pi, ref, r, z: sft(pi),
    "reward_weighted": lambda pi, ref, r, z: reward_weighted(pi, ref + r, ref),
    "raft": lambda pi, ref, r, z: raft(pi, r, keep=2),
    "filtered": lambda pi, ref, r, z: filtered(pi, r, threshold=z.mean().item()),
    "dpg": lambda pi, ref, r, z: dpg(pi, ref + r, z, ref),
}
ALL = SQUARED | LIKELIHOOD

log_probs = st.one_of(st.floats(-20, 0), st.sampled_from([0.0, -1.0, -1.0]))
rewards = st.one_of(st.floats(-5, 5), st.sampled_from([0.0, 1.0, 1.0]))
some = settings(deadline=None, max_examples=40, derandomize=True)


def groups(values, rows=P, columns=G):
    matrix = st.lists(values, min_size=rows * columns, max_size=rows * columns)
    return matrix.map(lambda x: torch.tensor(x, dtype=torch.float64).reshape(rows, columns))


def table(name, pi, ref, r, z):
    value, tables = coefficients(lambda log_pi: ALL[name](log_pi, ref, r, z), log_pi=pi)
    return value, tables["log_pi"]


def close(left, right, scale=1.0):
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-10 * scale)


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name):
    generator = torch.Generator().manual_seed(110)
    pi, ref, r = (random_logits(P, G, generator=generator).requires_grad_() for _ in range(3))
    z = random_logits(P, generator=generator)
    assert gradcheck(lambda x: ALL[name](x, ref.detach(), r.detach(), z), pi)
    if name in SQUARED:
        assert gradgradcheck(lambda x: ALL[name](x, ref.detach(), r.detach(), z), pi)
    if name in ("trajectory_balance", "length_normalised_balance"):
        z = z.requires_grad_()
        assert gradcheck(lambda x: ALL[name](pi.detach(), ref.detach(), r.detach(), x), z)


@pytest.mark.parametrize("name", ALL)
def test_nothing_flows_into_reference_or_reward(name):
    generator = torch.Generator().manual_seed(111)
    pi, ref, r = (random_logits(P, G, generator=generator).requires_grad_() for _ in range(3))
    z = random_logits(P, generator=generator).requires_grad_()
    ALL[name](pi, ref, r, z).sum().backward()
    assert pi.grad is not None
    assert ref.grad is r.grad is None
    learned = name in ("trajectory_balance", "length_normalised_balance")
    assert (z.grad is not None) == learned


@some
@given(groups(log_probs), groups(log_probs), groups(rewards), st.floats(-5, 5))
def test_a_constant_in_the_reward_changes_log_z_and_no_more(pi, ref, r, c):
    """log_z, where there is one, moves along; and the threshold."""
    z = torch.tensor([0.5, 0.5]).double()
    step = round(c)  # exact in floating point, so that ties stay ties
    r = (16 * r).round() / 16
    for name in ALL:
        value, coefficient = table(name, pi, ref, r, z)
        shifted, again = table(name, pi, ref, r + step, z + step)
        close(shifted, value, 1e3 * max(1.0, value.abs().max().item()))
        close(again, coefficient, 1e3 * max(1.0, coefficient.abs().max().item()))
    fixed = table("trajectory_balance", pi, ref, r + 3.0, z)[1]  # the mutant whose log Z stays behind
    assert (fixed - table("trajectory_balance", pi, ref, r, z)[1]).abs().min() > 0.7


@some
@given(groups(log_probs), groups(log_probs), groups(st.floats(-5, 5)), st.permutations(range(G)))
def test_order_of_draws_and_neighbouring_prompts_do_not_matter(pi, ref, r, order):
    r = r + 1e-3 * torch.arange(G) * torch.tensor([[1.0], [2.0]])  # few ties: raft breaks them by order
    z = torch.tensor([0.3, -0.2]).double()
    for name in set(ALL) - {"length_normalised_balance"}:
        if name == "raft" and any(len(set(row)) < G for row in r.tolist()):
            continue
        value, coefficient = table(name, pi, ref, r, z)
        permuted, again = table(name, pi[:, order], ref[:, order], r[:, order], z)
        close(permuted, value, 1e3 * max(1.0, value.abs().max().item()))
        close(again, coefficient[:, order], 1e3 * max(1.0, coefficient.abs().max().item()))
        other, _ = table(name, pi, ref + torch.tensor([[0.0], [1.0]]), r, z)
        close(other[0], value[0], max(1.0, value.abs().max().item()))


@some
@given(groups(log_probs), st.floats(-5, 5))
def test_an_even_residual_asks_for_nothing(pi, log_z):
    """At pi = p every draw's coefficient is zero, for those whose target is p: also drawn again and again."""
    z = torch.full((P,), log_z, dtype=torch.float64)
    for name in ("trajectory_balance", "dpg"):
        value, coefficient = table(
            name, pi, pi - 1.0, torch.full((P, G), log_z + 1.0, dtype=torch.float64), z
        )
        assert value.abs().max() < 1e-12
        assert coefficient.abs().max() < 1e-12
    assert table("reward_weighted", pi, pi, torch.zeros(P, G).double(), z)[1].abs().min() > 0.2


@some
@given(groups(log_probs), groups(log_probs), groups(st.one_of(rewards, st.just(-torch.inf))))
def test_likelihoods_take_forbidden_draws(pi, ref, r):
    z = torch.zeros(P).double()
    for name in ("reward_weighted", "raft", "filtered"):
        value, coefficient = table(name, pi, ref, r, z)
        assert value.isfinite().all()
        assert (coefficient[r.isneginf()] == 0).all()
        assert (value[r.isneginf().all(1)] == 0).all()
    value, coefficient = table("dpg", pi, ref, r, z)
    assert value.isfinite().all()
    assert (coefficient[r.isneginf()] > 0).all()  # pushed down
    assert (value >= -1e-9 * (1 + coefficient.abs().max())).all()


@some
@given(groups(st.floats(-20, 0)), groups(st.floats(-20, 0)), groups(st.floats(-5, 5)))
def test_float32_is_near_float64_and_stays_float32(pi, ref, r):
    ref = pi + (ref - pi).clamp(-3, 3)  # weights within what float32 can tell
    pi, ref, r = (x.float().double() for x in (pi, ref, r))
    z = torch.zeros(P).double()
    for name in ALL:
        wide = table(name, pi, ref, r, z)
        narrow = table(name, pi.float(), ref.float(), r.float(), z.float())
        for x, y in zip(wide, narrow, strict=True):
            assert y.dtype == torch.float32
            torch.testing.assert_close(y.double(), x, rtol=1e-4, atol=1e-4 * max(1.0, x.abs().max().item()))
