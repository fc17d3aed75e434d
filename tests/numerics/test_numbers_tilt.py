"""The tilt by exact summation: identities of the target on small float64 spaces, and what finite pools do to them.

An enumerated space is a pool in which every atom is drawn once from the uniform law: log_w = log ref + log K.
"""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from klimb.numbers.tilt import (
    draws_needed,
    log_mean_exp,
    log_partition,
    solve_beta,
    tilted_kl,
    tilted_mean,
)

BETAS = [1e-2, 0.1, 0.5, 1.0, 10.0, 100.0]


def space(seed: int, atoms: int = 9, prompts: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards [P, K], log ref [P, K] (one atom nearly impossible), log_w [P, K]."""
    g = torch.Generator().manual_seed(seed)
    r = torch.randn(prompts, atoms, generator=g, dtype=torch.float64)
    r[:, 1] = r[:, 0]  # a tie
    logits = 2 * torch.randn(prompts, atoms, generator=g, dtype=torch.float64)
    logits[:, 2] -= 40.0
    log_ref = torch.log_softmax(logits, -1)
    return r, log_ref, log_ref + math.log(atoms)


def exact(r: Tensor, log_ref: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log Z and log p by definition."""
    log_z = torch.logsumexp(log_ref + r / beta, -1)
    return log_z, log_ref + r / beta - log_z[:, None]


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def plug_in(r: Tensor, beta: float, log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(f(r, beta, log_w, correct=False) for f in (log_partition, tilted_mean, tilted_kl))


def close(a: Tensor, b: Tensor | float, tolerance: float) -> None:
    torch.testing.assert_close(
        a, torch.as_tensor(b, dtype=a.dtype).expand_as(a), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("seed", range(3))
def test_the_objective_is_log_z_minus_the_distance_to_the_target(beta, seed):
    r, log_ref, log_w = space(seed)
    _, log_p = exact(r, log_ref, beta)
    g = torch.Generator().manual_seed(100 + seed)
    log_pi = torch.log_softmax(torch.randn(r.shape, generator=g, dtype=torch.float64), -1)
    objective = (log_pi.exp() * r).sum(-1) - beta * kl(log_pi, log_ref)
    log_z, mean, cost = plug_in(r, beta, log_w)
    close(beta * log_z - beta * kl(log_pi, log_p), objective, 1e-10)
    close(mean, (log_p.exp() * r).sum(-1), 1e-10)
    close(cost, kl(log_p, log_ref), 1e-10)
    close(mean / beta - log_z, cost, 1e-9)


@pytest.mark.parametrize("beta", [0.3, 2.0])
def test_shifting_and_scaling_rewards(beta):
    r, _, log_w = space(0)
    log_z, mean, cost = plug_in(r, beta, log_w)
    c = torch.tensor([[3.0], [-2.0], [0.5], [7.0]], dtype=torch.float64)
    shifted = plug_in(r + c, beta, log_w)
    close(shifted[0], log_z + c[:, 0] / beta, 1e-12)
    close(shifted[1], mean + c[:, 0], 1e-12)
    close(shifted[2], cost, 1e-11)
    close(tilted_kl(5 * r, 5 * beta, log_w, correct=False), cost, 1e-12)


def test_thermodynamics_by_central_differences():
    r, log_ref, log_w = space(1)
    beta, h = 0.7, 1e-5
    lam = 1 / beta
    up, down = plug_in(r, 1 / (lam + h), log_w), plug_in(r, 1 / (lam - h), log_w)
    d_log_z, d_mean, d_kl = ((a - b) / (2 * h) for a, b in zip(up, down, strict=True))
    _, log_p = exact(r, log_ref, beta)
    mean = (log_p.exp() * r).sum(-1)
    variance = (log_p.exp() * (r - mean[:, None]) ** 2).sum(-1)
    close(d_log_z, mean, 1e-6)
    close(d_mean, variance, 1e-6)
    close(d_kl, lam * variance, 1e-6)
    close(d_mean / d_kl, beta, 1e-6)
    above, below = ((b * log_partition(r, b, log_w, correct=False)) for b in (beta + h, beta - h))
    close((above - below) / (2 * h), -kl(log_p, log_ref), 1e-6)


@pytest.mark.parametrize("beta", [0.3, 1.0, 20.0])
def test_the_gain_is_beta_times_both_kls_and_a_covariance(beta):
    r, log_ref, log_w = space(2)
    log_z, mean, cost = plug_in(r, beta, log_w)
    _, log_p = exact(r, log_ref, beta)
    ref = log_ref.exp()
    start = (ref * r).sum(-1)
    close(beta * (cost + kl(log_ref, log_p)), mean - start, 1e-10)
    w = (r / beta - log_z[:, None]).exp()
    close((ref * r * w).sum(-1) - start * (ref * w).sum(-1), mean - start, 1e-10)


def test_frontier_is_monotone_and_concave_and_its_own_dual():
    r, _, log_w = space(3)
    betas = torch.logspace(-2, 2, 4001, dtype=torch.float64).tolist()
    curve = [plug_in(r, b, log_w) for b in betas]
    log_z, mean, cost = (torch.stack([c[i] for c in curve]) for i in range(3))
    assert (cost.diff(dim=0) <= 1e-12).all()
    assert (mean.diff(dim=0) <= 1e-12).all()
    for j in (500, 1500, 2500):
        lines = torch.tensor(betas, dtype=torch.float64)[:, None] * (log_z + cost[j])
        close(lines.amin(0), mean[j], 1e-7)
        assert (lines >= mean[j] - 1e-9).all()


def test_pythagoras_wasted_kl():
    r, log_ref, log_w = space(4, prompts=1)
    g = torch.Generator().manual_seed(9)
    log_pi = torch.log_softmax(log_ref + torch.randn(r.shape, generator=g, dtype=torch.float64) + r, -1)
    beta = solve_beta(r, goal=(log_pi.exp() * r).sum().item(), log_w=log_w, margin=-math.inf)
    _, log_p = exact(r, log_ref, beta)
    close(kl(log_pi, log_p) + kl(log_p, log_ref), kl(log_pi, log_ref), 1e-9)
    assert kl(log_pi, log_p).item() > 0.01


def test_limits_of_beta():
    r, log_ref, log_w = space(5)
    ref = log_ref.exp()
    mean = (ref * r).sum(-1)
    variance = (ref * (r - mean[:, None]) ** 2).sum(-1)
    log_z, _, cost = plug_in(r, 1e4, log_w)
    close(cost * 2e8, variance, 1e-3)
    close(1e4 * log_z, mean, 1e-3)
    log_z, best, cost = plug_in(r, 1e-4, log_w)
    top = r.amax(-1, keepdim=True)
    mass = torch.where(r == top, log_ref, -math.inf).logsumexp(-1)
    close(cost, -mass, 1e-6)
    close(best, top[:, 0], 1e-12)
    close(1e-4 * log_z, top[:, 0] + 1e-4 * mass, 1e-9)


def test_tilts_compose_and_their_geometric_mixtures_are_tilts():
    r, log_ref, log_w = space(6)
    b1, b2, a = 0.8, 1.7, 0.4
    first, log_p = exact(r, log_ref, b1)
    second = log_partition(r, b2, log_p + math.log(r.shape[-1]), correct=False)
    close(first + second, log_partition(r, 1 / (1 / b1 + 1 / b2), log_w, correct=False), 1e-12)
    mixed = torch.log_softmax((1 - a) * log_ref + a * log_p, -1)
    close(mixed, exact(r, log_ref, b1 / a)[1], 1e-12)


def multisets(total: int, kinds: int) -> list[tuple[int, ...]]:
    if kinds == 1:
        return [(total,)]
    return [(i, *rest) for i in range(total + 1) for rest in multisets(total - i, kinds - 1)]


def expected_log_z(ref: Tensor, r: Tensor, beta: float, num_draws: int, *, correct: bool) -> float:
    """E of the estimate over all N-tuples of draws, grouped by their counts."""
    counts = torch.tensor(multisets(num_draws, len(ref)))
    log_prob = (
        math.lgamma(num_draws + 1) - torch.lgamma(counts.double() + 1).sum(-1) + (counts * ref.log()).sum(-1)
    )
    pools = torch.stack([r.repeat_interleave(row) for row in counts])
    assert abs(log_prob.exp().sum().item() - 1) < 1e-10
    return (log_prob.exp() * log_partition(pools, beta, correct=correct)).sum().item()


def test_log_mean_exp_is_a_lower_bound_that_rises_with_the_draws():
    ref = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    r = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    truth = (ref.log() + r / 0.5).logsumexp(0).item()
    values = [expected_log_z(ref, r, 0.5, n, correct=False) for n in (1, 2, 4, 8, 16, 32)]
    assert values == sorted(values)
    assert values[0] == pytest.approx((ref * r).sum().item() / 0.5, abs=1e-12)
    assert values[-1] < truth


@pytest.mark.parametrize(("beta", "num_draws"), [(1.0, 32), (0.8, 40), (0.6, 48)])
def test_the_jackknife_removes_two_thirds_of_the_bias(beta, num_draws):
    ref = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    r = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    w = (r / beta).exp()
    truth = (ref * w).sum()
    chi2 = ((ref * w**2).sum() / truth**2 - 1).item()
    assert chi2 < num_draws / 2
    plain = expected_log_z(ref, r, beta, num_draws, correct=False) - truth.log().item()
    corrected = expected_log_z(ref, r, beta, num_draws, correct=True) - truth.log().item()
    assert plain == pytest.approx(-chi2 / (2 * num_draws), rel=0.15)
    assert abs(corrected) < abs(plain) / 3


def test_the_jackknife_equals_its_definition():
    g = torch.Generator().manual_seed(0)
    r = torch.randn(1, 40, generator=g, dtype=torch.float64)
    log_w = 0.3 * torch.randn(1, 40, generator=g, dtype=torch.float64)
    left_out = [torch.arange(40) != i for i in range(40)]
    for f in (log_partition, tilted_mean, tilted_kl):
        others = torch.stack([f(r[:, k], 1.0, log_w[:, k], correct=False) for k in left_out]).mean(0)
        expected = 40 * f(r, 1.0, log_w, correct=False) - 39 * others
        close(f(r, 1.0, log_w), expected, 1e-10)
        assert (f(r, 1.0, log_w) - f(r, 1.0, log_w, correct=False)).abs().item() > 1e-4


@pytest.mark.parametrize("budget", [0.05, 0.5, 1.5])
def test_solve_beta_meets_the_budget_and_the_goal(budget):
    g = torch.Generator().manual_seed(0)
    r = torch.randn(16, 128, generator=g, dtype=torch.float64) + 1000
    beta = solve_beta(r, kl=budget)
    assert tilted_kl(r, beta, correct=False).mean().item() == pytest.approx(budget, rel=1e-9)
    goal = tilted_mean(r, beta, correct=False).mean().item()
    assert solve_beta(r, goal=goal) == pytest.approx(beta, rel=1e-6)


def test_solve_beta_refuses_what_it_cannot_do():
    r = torch.linspace(0, 1, 32).expand(4, 32)
    with pytest.raises(ValueError, match=r"kl_budget 2 nats: got 32 draws .* needs about 91"):
        solve_beta(r, kl=2.0)
    with pytest.raises(ValueError, match="nothing can be learned"):
        solve_beta(torch.ones(4, 32), kl=0.5)
    with pytest.raises(ValueError, match=r"reward_goal 1\.2 .* more than 0\.5 .* less than 1 "):
        solve_beta(r, goal=1.2)
    with pytest.raises(ValueError, match=r"reward_goal 0\.999: got 32 draws .* needs about"):
        solve_beta(r, goal=0.999)
    with pytest.raises(ValueError, match=r"kl_budget: got 0\.0, expected"):
        solve_beta(r, kl=0.0)
    with pytest.raises(ValueError, match="exactly one"):
        solve_beta(r)
    with pytest.raises(ValueError, match=r"kl_budget 0\.8 nats is out of reach.* all the mass"):
        solve_beta((torch.arange(64) % 2).double().expand(4, 64), kl=0.8)
    with pytest.raises(ValueError, match="forbidden"):
        solve_beta(torch.full((2, 32), -math.inf), kl=0.1)
    with pytest.raises(ValueError, match="NaN"):
        solve_beta(torch.full((2, 32), math.nan), kl=0.1)
    with pytest.raises(ValueError, match="beta > 0"):
        tilted_kl(r, 0.0)


def test_draws_needed():
    assert [draws_needed(k) for k in (0.0, 1.0, 2.0)] == [13, 34, 91]


entries = st.one_of(st.sampled_from([-math.inf, 0.0, 1.0]), st.floats(-50, 50))
pools = st.integers(1, 40).flatmap(lambda n: st.lists(entries, min_size=n, max_size=n))


@settings(max_examples=300, deadline=None)
@given(pools, st.floats(-4, 4), st.booleans(), st.integers(0, 2**31))
def test_any_pool_stays_finite_and_bounded(rewards, log_beta, weighted, seed):
    r = torch.tensor([rewards], dtype=torch.float64)
    beta = 10.0**log_beta
    g = torch.Generator().manual_seed(seed)
    log_w = 5 * torch.randn(r.shape, generator=g, dtype=torch.float64) if weighted else None
    for correct in (False, True):
        log_z, mean, cost = (
            f(r, beta, log_w, correct=correct) for f in (log_partition, tilted_mean, tilted_kl)
        )
        top, finite = r.amax().item(), r[r > -math.inf]
        if not len(finite):
            assert (log_z.item(), mean.item(), cost.item()) == (-math.inf, -math.inf, math.inf)
            continue
        assert -math.inf < log_z.item() <= top / beta
        assert finite.min() <= mean.item() <= top
        assert 0 <= cost.item() < math.inf
        if len(set(rewards)) == 1:
            assert cost.item() == pytest.approx(0, abs=1e-12)
        if log_w is None and not correct:
            assert cost.item() <= math.log(len(rewards)) + 1e-12


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=40))
def test_float32_stays_float32_and_near_float64(rewards):
    for f in (log_partition, tilted_mean, tilted_kl):
        narrow, wide = f(torch.tensor([rewards]), 1.0), f(torch.tensor([rewards], dtype=torch.float64), 1.0)
        assert narrow.dtype == torch.float32
        assert narrow.item() == pytest.approx(wide.item(), abs=1e-4)


def test_all_fail_single_survivor_and_low_beta():
    survivor = torch.full((1, 16), -math.inf, dtype=torch.float64)
    survivor[0, 3] = 2.0
    for correct in (True, False):
        close(log_partition(survivor, 0.5, correct=correct), 4 - math.log(16), 1e-12)
        close(tilted_kl(survivor, 0.5, correct=correct), math.log(16), 1e-12)
        close(tilted_kl(torch.zeros(1, 16), 1e-4, correct=correct), 0.0, 1e-6)
    g = torch.Generator().manual_seed(1)
    gauss = torch.randn(200, 16, generator=g, dtype=torch.float64)
    assert (tilted_kl(gauss, 0.05) >= 0).all()
    assert (log_partition(gauss, 0.05) <= gauss.amax(-1) / 0.05).all()


def test_log_mean_exp_of_nothing_is_minus_infinity():
    assert log_mean_exp(torch.full((1, 3), -math.inf), correct=True).item() == -math.inf


def test_numbers_load_neither_scipy_nor_arviz_nor_transformers():
    modules = [
        "tilt",
        "weights",
        "baselines",
        "estimate",
        "frontier",
        "best_of_n",
        "bounds",
        "certificate",
        "diagnose",
    ]
    code = (
        "import sys; import klimb.numbers; "
        + "; ".join(f"import klimb.numbers.{m}" for m in modules)
        + "; assert not {'scipy', 'arviz_stats', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
