"""Best of n: the law with ties, unbiased rewards by enumeration of subsets, and the ceiling that is not an equality."""

import itertools
import math

import pytest
import torch

from klimb.numbers.best_of_n import (
    best_of_n,
    best_of_n_beta,
    best_of_n_kl,
    best_of_n_kl_bound,
    best_of_n_law,
    best_of_n_reward,
    quantile_log_partition,
)
from klimb.numbers.tilt import log_partition


def law(seed: int, atoms: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    probs = torch.softmax(torch.randn(1, atoms, generator=g, dtype=torch.float64), -1)
    return probs, torch.randint(0, 4, (1, atoms), generator=g).double()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_law_with_ties_is_that_of_all_tuples(n, seed):
    probs, r = law(seed)
    p, reward = probs[0].tolist(), r[0].tolist()
    expected = [0.0] * len(p)
    for draws in itertools.product(range(len(p)), repeat=n):
        top = max(reward[i] for i in draws)
        best = [i for i in draws if reward[i] == top]
        for i in best:
            expected[i] += math.prod(p[j] for j in draws) / len(best)
    got = best_of_n_law(probs, r, n)[0]
    assert got.tolist() == pytest.approx(expected, abs=1e-12)
    assert got.sum().item() == pytest.approx(1, abs=1e-12)
    kl = (got * (got / probs[0]).log()).sum().item()
    assert kl <= best_of_n_kl_bound(n) + 1e-12


def test_a_binary_reward_never_costs_more_than_log_of_its_rate():
    probs, r = torch.tensor([[0.5, 0.5]], dtype=torch.float64), torch.tensor([[0.0, 1.0]])
    for n in (2, 8, 64, 1024):
        q = best_of_n_law(probs, r, n)
        assert torch.special.xlogy(q, q / probs).sum().item() <= math.log(2)
    assert best_of_n_kl_bound(1024) > 5  # the popular "equality" is far off


def test_without_ties_the_kl_is_the_bound_and_fine_atoms_approach_it():
    atoms = 200_000
    u = torch.linspace(0, 1, atoms + 1, dtype=torch.float64)
    for n in (2, 8):
        q = u[1:] ** n - u[:-1] ** n
        kl = torch.special.xlogy(q, q * atoms).sum().item()
        assert kl == pytest.approx(best_of_n_kl_bound(n), abs=1e-8)
        pool = torch.rand(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert best_of_n_kl(pool, n).tolist() == pytest.approx([best_of_n_kl_bound(n)] * 3, abs=1e-12)


def test_the_kl_of_a_pool_in_exact_proportion_is_exact():
    r = torch.tensor([0.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]], dtype=torch.float64)
    pool = r.repeat_interleave(torch.tensor([8, 4, 2, 2]))[None]
    q = best_of_n_law(probs, r[None], 3)
    assert best_of_n_kl(pool, 3).item() == pytest.approx((q * (q / probs).log()).sum().item(), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_the_reward_is_the_mean_over_all_subsets(n):
    pool = torch.tensor([0.3, -1.0, 2.0, 2.0, 0.5, 0.1, -3.0], dtype=torch.float64)
    subsets = [max(s) for s in itertools.combinations(pool.tolist(), n)]
    assert best_of_n_reward(pool[None], n).item() == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_the_reward_is_unbiased_over_all_pools():
    # all 3^4 pools of four draws, weighted: the U-statistic for n = 2 and n = 4 has the exact mean
    p, r = [0.5, 0.3, 0.2], [0.0, 1.0, 5.0]
    for n in (2, 4):
        truth = (
            (best_of_n_law(torch.tensor([p]).double(), torch.tensor([r]), n)[0] * torch.tensor(r))
            .sum()
            .item()
        )
        mean = biased = 0.0
        for pool in itertools.product(range(3), repeat=4):
            weight = math.prod(p[i] for i in pool)
            draws = torch.tensor([[r[i] for i in pool]], dtype=torch.float64)
            mean += weight * best_of_n_reward(draws, n).item()
            q = best_of_n_law(torch.full((1, 4), 0.25).double(), draws, n)  # mutant: n draws with replacement
            biased += weight * (q * draws).sum().item()
        assert mean == pytest.approx(truth, abs=1e-6)
        assert abs(biased - truth) > 0.05


def test_best_of_n_is_the_tilt_of_log_u():
    u = torch.rand(1, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in (2, 5):
        # the tilt of r = log u at 1 / beta = n - 1 has density u^(n-1) / Z, and Z = 1 / n
        tilted = torch.exp(u.log() / best_of_n_beta(n)) * n
        torch.testing.assert_close(tilted, n * u ** (n - 1))
    assert best_of_n_beta(1) == math.inf
    grid = ((torch.arange(2_000_000) + 0.5) / 2_000_000).double()[None]
    for beta in (0.1, 1.0):
        midpoint = log_partition(grid, beta, correct=False).item()
        assert quantile_log_partition(beta) == pytest.approx(midpoint, abs=1e-9)


def test_points_with_intervals_and_their_doubts():
    g = torch.Generator().manual_seed(0)
    pool = torch.rand(200, 30, generator=g, dtype=torch.float64)
    one, four, many = best_of_n(pool, [1, 4, 20], generator=g)
    assert one.kl.value == 0
    assert one.reward.value == pytest.approx(pool.mean().item())
    assert four.reward.low < 0.8 < four.reward.high
    assert four.reward.reliable
    assert not many.reward.reliable
    assert "needs 60" in many.kl.warnings[0]
    few = best_of_n(pool[:2], [4], generator=g)[0]
    assert few.reward.low < few.reward.value < few.reward.high
    assert few.kl.value == pytest.approx(best_of_n_kl_bound(4))
    with pytest.raises(ValueError, match="between 1 and 30"):
        best_of_n(pool, [31], generator=g)
    forbidden = torch.tensor([[-math.inf, -math.inf, 1.0, 2.0]])
    assert best_of_n_reward(forbidden, 2).item() == -math.inf
    assert best_of_n_reward(forbidden, 3).item() == pytest.approx(1.75)
    assert 0 <= best_of_n_kl(forbidden, 3).item() <= best_of_n_kl_bound(3)
