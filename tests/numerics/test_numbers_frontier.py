"""The predicted frontier: right where it says so, doubtful where it must be, fast enough to redraw."""

import math
import time

import pytest
import torch

from klimb.numbers.estimate import Estimate
from klimb.numbers.frontier import default_betas, frontier, trust_warnings
from klimb.numbers.tilt import tilted_kl, tilted_mean


def pool(num_prompts: int, num_draws: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        num_prompts, num_draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_gaussian_rewards_lie_on_their_known_frontier():
    # E_p[r] = 1 / beta, KL = 1 / (2 beta^2), log Z = the same
    g = torch.Generator().manual_seed(0)
    for point in frontier(pool(128, 256), [4.0, 1.5, 1.0, 0.8], generator=g):
        b = point.beta
        for e, truth in ((point.reward, 1 / b), (point.kl, 0.5 / b**2), (point.log_z, 0.5 / b**2)):
            assert e.low <= truth <= e.high
            assert e.low <= e.value <= e.high
            assert e.n == 128 * 256
        assert point.reliable
        assert 1 <= point.ess <= 256


def test_an_overstretched_pool_says_so_and_names_the_draws_it_needs():
    g = torch.Generator().manual_seed(0)
    near, far = frontier(pool(32, 32), [3.0, 0.3], generator=g)
    assert near.reliable
    assert not far.reliable
    assert not far.log_z.reliable
    first = far.kl.warnings[0]
    assert first.startswith("unreliable: log(draws) - KL = ")
    assert f"needs about {math.ceil(math.exp(far.kl.value + 2.5))} draws a prompt, has 32" in first
    # the margin alone would pass these
    said = trust_warnings(torch.zeros(4, 100), 0.5, 0.75)
    assert said == (
        "unreliable: Pareto k = 0.75, not below 0.62; needs at least 2500 draws a prompt, has 100",
    )
    assert trust_warnings(torch.zeros(4, 100), 0.5, 0.6) == ()


def test_flat_and_forbidden_prompts_are_counted_aloud():
    g = torch.Generator().manual_seed(0)
    r = pool(16, 64)
    r[3] = 1.0
    point = frontier(r, [2.0], generator=g)[0]
    assert point.reliable
    assert point.kl.warnings == (
        "1 of 16 prompts gave all draws the same reward: what they hide is not counted",
    )
    r[4] = -math.inf
    point = frontier(r, [2.0], generator=g)[0]
    assert "1 of 16 prompts left out" in point.kl.warnings[0]
    assert math.isfinite(point.log_z.value)
    point = frontier(torch.zeros(16, 64), [1.0], generator=g)[0]
    assert not point.reliable
    assert (point.kl.value, point.log_z.value) == (0.0, 0.0)
    with pytest.raises(ValueError, match="every draw is forbidden"):
        frontier(torch.full((2, 8), -math.inf), [1.0], generator=g)


@pytest.mark.parametrize("num_prompts", [1, 4, 12])
@pytest.mark.parametrize("beta", [1e-4, 0.1, 1e4])
def test_forbidden_draws_ties_and_extreme_betas_stay_finite(num_prompts, beta):
    g = torch.Generator().manual_seed(1)
    r = pool(num_prompts, 20).round()
    r[:, :5] = -math.inf
    r[0, 1:] = -math.inf
    r[0, 0] = 1.0  # a single survivor
    point = frontier(r, [beta], generator=g, num_resamples=100)[0]
    for e in (point.reward, point.kl, point.log_z):
        assert isinstance(e, Estimate)
        assert math.isfinite(e.value)
        assert not math.isnan(e.low)
        assert not math.isnan(e.high)
    assert point.log_z.value <= r.amax(-1).mean().item() / beta + 1e-9
    assert not point.reliable  # 20 draws of which five are allowed support nothing


def test_few_prompts_get_intervals_from_their_draws():
    g = torch.Generator().manual_seed(0)
    r = pool(3, 256)
    point = frontier(r + torch.tensor([[0.0], [50.0], [100.0]]), [2.0], generator=g)[0]
    assert 0.05 < point.reward.high - point.reward.low < 0.5


def test_importance_weights_undo_the_drawing_law():
    # drawn from N(0.5, 1) instead of N(0, 1): log ref - log q = 0.125 - 0.5 y
    g = torch.Generator().manual_seed(0)
    y = pool(128, 256) + 0.5
    point = frontier(y, [1.5], log_w=0.125 - 0.5 * y, generator=g)[0]
    assert point.reward.low <= 1 / 1.5 <= point.reward.high
    assert point.log_z.low <= 0.5 / 1.5**2 <= point.log_z.high
    assert point.reliable
    biased = frontier(y, [1.5], generator=g)[0]  # mutant: the weights forgotten
    assert biased.reward.low > 1 / 1.5


def test_default_betas_span_the_supported_frontier():
    r = pool(32, 64)
    betas = default_betas(r, num=40)
    assert len(betas) == 40
    assert betas == sorted(betas, reverse=True)
    kls = [tilted_kl(r, b, correct=False).mean().item() for b in (betas[0], betas[-1])]
    assert kls == pytest.approx([0.01, math.log(64) - 2.5], rel=1e-6)
    binary = (pool(32, 64) > 0).double()
    reached = tilted_mean(binary, default_betas(binary)[-1]).mean().item()
    assert 0.9 < reached < 1
    assert len(default_betas(pool(4, 8))) == 40  # too few draws to trust, still a grid to look at
    forbidden = r.clone()
    forbidden[:, :20] = -math.inf
    assert all(math.isfinite(b) for b in default_betas(forbidden))
    with pytest.raises(ValueError, match="nothing can be learned"):
        default_betas(torch.ones(4, 64))


def test_forty_betas_take_well_under_a_second():
    g = torch.Generator().manual_seed(0)
    r = pool(64, 40)
    betas = default_betas(r, num=40)
    frontier(r, betas[:1], generator=g)  # the lazy imports
    start = time.process_time()
    assert len(frontier(r, betas, generator=g, num_resamples=1000)) == 40
    assert time.process_time() - start < 0.9
