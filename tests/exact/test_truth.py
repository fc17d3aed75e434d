"""Plain sums against identities: the target is the optimum, and what is left to climb is beta KL(pi||p)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klimb.exact import (
    all_strings,
    best_objective,
    categorical,
    frontier_point,
    gap,
    kl,
    log_partition,
    log_prob,
    mean,
    normalise,
    objective,
    random_logits,
    table_of,
    tilt,
)
from klimb.objectives import coefficients, log_variance

BETAS = [1e-2, 1e-1, 0.35, 1.0, 10.0, 1e2]


def instance(seed, num_atoms=40):
    generator = torch.Generator().manual_seed(seed)
    log_pi, log_ref = (
        categorical(random_logits(num_atoms, generator=generator, scale=2.0)) for _ in range(2)
    )
    return log_pi, log_ref, random_logits(num_atoms, generator=generator)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", range(3))
def test_objective_is_best_minus_gap(beta, seed):
    log_pi, log_ref, reward = instance(seed)
    left = objective(log_pi, log_ref, reward, beta)
    best = best_objective(log_ref, reward, beta)
    distance = gap(log_pi, log_ref, reward, beta)
    assert abs(left - (best - distance)) <= 1e-10 * max(abs(best), distance, 1.0)
    mutant = objective(log_pi, log_ref, reward, beta) + 2 * beta * kl(
        log_pi, log_ref
    )  # the sign of the KL is wrong
    assert abs(mutant - (best - distance)) > 1e-3


@pytest.mark.parametrize("beta", BETAS)
def test_nothing_beats_the_target(beta):
    _, log_ref, reward = instance(4)
    log_p = normalise(tilt(log_ref, reward, beta))
    best = best_objective(log_ref, reward, beta)
    assert abs(objective(log_p, log_ref, reward, beta) - best) < 1e-10 * max(1, abs(best))
    for seed in range(20):
        near = categorical(log_p + 0.1 * instance(seed)[2])
        assert objective(near, log_ref, reward, beta) <= best + 1e-13 * abs(best)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("c", [-3.0, 0.7, 100.0])
def test_a_constant_in_the_reward_changes_log_z_alone(beta, c):
    log_pi, log_ref, reward = instance(7)
    here, there = tilt(log_ref, reward, beta), tilt(log_ref, reward + c, beta)
    scale = max(1.0, abs(c / beta), (reward / beta).abs().max().item())
    torch.testing.assert_close(normalise(there), normalise(here), rtol=0, atol=1e-12 * scale)
    assert abs(log_partition(there) - log_partition(here) - c / beta) < 1e-12 * scale
    value, table = coefficients(log_variance, log_pi=log_pi[None], log_target=here[None])
    shifted, shifted_table = coefficients(log_variance, log_pi=log_pi[None], log_target=there[None])
    torch.testing.assert_close(shifted, value, rtol=1e-12 * scale, atol=1e-12)
    torch.testing.assert_close(shifted_table["log_pi"], table["log_pi"], rtol=0, atol=1e-12 * scale)


@pytest.mark.parametrize("a", [1e-2, 3.0, 1e3])
def test_reward_and_beta_scale_together(a):
    _, log_ref, reward = instance(8)
    here, there = normalise(tilt(log_ref, reward, 0.3)), normalise(tilt(log_ref, a * reward, a * 0.3))
    torch.testing.assert_close(there, here, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", BETAS)
def test_frontier_point(beta):
    _, log_ref, reward = instance(9)
    point = frontier_point(log_ref, reward, beta)
    assert abs(point.kl - (point.reward / beta - point.log_z)) < 1e-10 * max(1, abs(point.log_z))


@pytest.mark.parametrize(
    "beta", BETAS[1:]
)  # at 0.01 all of p is on one outcome: there is no slope to measure
def test_the_slope_of_the_frontier_is_beta(beta):
    _, log_ref, reward = instance(9)
    left, right = (frontier_point(log_ref, reward, beta * factor) for factor in (0.999, 1.001))
    assert left.kl > right.kl
    assert abs((right.reward - left.reward) / (right.kl - left.kl) / beta - 1) < 1e-5


def test_mean_of_the_ratio_is_one():
    for seed in range(10):
        log_pi, log_ref, _ = instance(seed)
        assert abs(mean(log_ref, (log_pi - log_ref).exp()) - 1) < 1e-12


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0])
def test_soft_bellman(beta):
    """V(s) = beta log E_ref[e^{r/beta} | s]; p(a|s) = ref(a|s) exp((V(s,a) - V(s)) / beta); V(empty) = beta log Z."""
    space = all_strings(3, 3)
    generator = torch.Generator().manual_seed(11)
    table_ref = random_logits(space.num_prefixes, 3, generator=generator).log_softmax(1)
    reward = random_logits(space.size, generator=generator)
    log_ref = log_prob(table_ref, space)
    table_p = table_of(normalise(tilt(log_ref, reward, beta)), space)

    def value(prefix):
        inside = torch.tensor([ids[: len(prefix)].tolist() == prefix for ids in space.completions])
        law = log_ref[inside] - log_ref[inside].logsumexp(0)
        return beta * mean(law, (reward[inside] / beta).exp()).log()

    names = {}
    for y, ids in enumerate(space.completions):
        names |= {space.prefixes[y, t].item(): ids[:t].tolist() for t in range(len(ids))}
    for s, prefix in names.items():
        for token in range(3):
            right = table_ref[s, token] + (value([*prefix, token]) - value(prefix)) / beta
            assert abs(table_p[s, token] - right) < 1e-12
    assert abs(value([]) - best_objective(log_ref, reward, beta)) < 1e-12


rewards = st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.0, 0.5, 2.0]), min_size=5, max_size=5)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(rewards, st.floats(1e-3, 1e3), st.floats(0, 700))
def test_forbidden_outcomes_ties_and_near_zero_atoms(reward, beta, tail):
    reward = torch.tensor(reward, dtype=torch.float64)
    log_ref = normalise(torch.tensor([0.0, 0.0, -1.0, -2.0, -tail], dtype=torch.float64))
    log_target = tilt(log_ref, reward, beta)
    if reward.isneginf().all():
        assert log_partition(log_target).item() == -math.inf
        return
    log_p = normalise(log_target)
    assert abs(log_p.exp().sum() - 1) < 1e-12
    assert torch.equal(log_p.isneginf(), reward.isneginf())
    assert kl(log_p, log_ref) >= -1e-12
    assert abs(mean(log_p, reward) / beta - log_partition(log_target) - kl(log_p, log_ref)) < 1e-9 * (
        1 + 2 / beta
    )
    assert kl(log_ref, log_p).isinf() == bool((log_ref.exp()[reward.isneginf()] > 0).any())


def test_beta_zero_is_refused():
    with pytest.raises(ValueError, match="got beta = 0, expected more than 0"):
        tilt(torch.zeros(2), torch.zeros(2), 0)
