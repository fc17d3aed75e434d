"""What is said of scores of pairs: by hand, beside simulations in which the truth is known, and beside models that are wrong."""

import math

import pytest
import torch

from klimb.numbers import calibration
from klimb.numbers.calibration import (
    accuracy,
    bin_edges,
    calibrated_error,
    calibration_error,
    goes_with_length,
    judged_pairs,
    overconfidence,
    pair_mean,
    reliability,
    rescored,
    right,
    surprise,
    wilson,
    within_prompts,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def simulated(n, *, scale, seed, truth=1.5):
    """Pairs judged by Bradley and Terry at true differences; the model says `scale` times them."""
    g = generator(seed)
    difference = truth * torch.randn(n, generator=g, dtype=torch.float64)
    wins = torch.rand(n, generator=g, dtype=torch.float64) < difference.sigmoid()
    label = torch.stack([wins.double(), 1 - wins.double()], 1)
    score = torch.stack([scale * difference, torch.zeros_like(difference)], 1)
    return judged_pairs(score, label, torch.zeros(n, 2))


def test_pairs_are_turned_so_that_the_better_one_comes_first():
    score = torch.tensor([[1.0, 4.0, 2.0], [0.0, 0.0, 3.0]])
    label = torch.tensor([[0.1, 0.2, 0.3], [1.0, 1.0, 0.0]])
    found = judged_pairs(score, label, torch.tensor([[5, 7, 6], [1, 2, 3]]))
    assert found.margin.tolist() == [[3.0, 1.0, -2.0], [0.0, -3.0, -3.0]]
    assert found.longer.tolist() == [[2.0, 1.0, -1.0], [0.0, -2.0, -1.0]]
    assert found.judged.tolist() == [[True, True, True], [False, True, True]]
    assert found.count == 5


def test_accuracy_counts_ties_half_and_its_interval_prompts():
    score = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [3.0, 1.0]]).repeat(10, 1)
    found = accuracy(judged_pairs(score, torch.tensor([[1.0, 0.0]]).repeat(40, 1), torch.zeros(40, 2)))
    assert (found.value, found.n, found.reliable) == (0.625, 40, True)
    assert (found.low, found.high) == pytest.approx(wilson(0.625, 40))
    # three completions a prompt are three pairs, but one unit
    three = judged_pairs(
        torch.tensor([[3.0, 2.0, 1.0]]).repeat(12, 1),
        torch.tensor([[3.0, 2.0, 1.0]]).repeat(12, 1),
        torch.zeros(12, 3),
    )
    found = accuracy(three)
    assert (found.n, found.value) == (36, 1.0)
    assert found.low == pytest.approx(wilson(1.0, 12)[0])
    assert found.low < 0.77  # a bootstrap would have said 1.00 [1.00, 1.00]


def test_few_pairs_are_called_unreliable():
    assert not accuracy(simulated(29, scale=1, seed=0)).reliable
    assert accuracy(simulated(30, scale=1, seed=0)).reliable
    pairs = simulated(99, scale=1, seed=0)
    assert not calibration_error(pairs, bin_edges(pairs), generator=generator()).reliable
    pairs = simulated(100, scale=1, seed=0)
    assert calibration_error(pairs, bin_edges(pairs), generator=generator()).reliable


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (5, 10), (10, 10), (90, 127)])
def test_wilson_is_scipys(successes, n):
    from scipy.stats import binomtest

    theirs = binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_surprise_is_the_log_loss_of_the_judgements():
    pairs = simulated(500, scale=0.7, seed=3)
    found = pair_mean(pairs, surprise(pairs), generator=generator())
    p = torch.sigmoid(pairs.margin[:, 0])
    assert found.value == pytest.approx(-p.log().mean().item(), abs=1e-12)
    assert found.low < found.value < found.high


def test_the_calibration_error_by_hand():
    """Two bins: said 0.6 and true in 3 of 4, said 0.9 and true in 3 of 6."""
    chance = torch.tensor([0.6] * 4 + [0.9] * 6).double()
    hit = torch.tensor([1, 1, 1, 0, 1, 1, 1, 0, 0, 0]).double()
    margin = torch.logit(chance) * (2 * hit - 1)
    pairs = judged_pairs(
        torch.stack([margin, 0 * margin], 1), torch.tensor([[1.0, 0.0]]).repeat(10, 1), torch.zeros(10, 2)
    )
    edges = torch.tensor([0.75]).double()
    found = calibration_error(pairs, edges, generator=generator())
    assert found.value == pytest.approx((4 * 0.15 + 6 * 0.4) / 10)
    table = reliability(pairs, edges)
    assert [(round(b.confidence, 6), b.accuracy.value, b.accuracy.n) for b in table] == [
        (0.6, 0.75, 4),
        (0.9, 0.5, 6),
    ]
    assert pair_mean(pairs, overconfidence(pairs), generator=generator()).value == pytest.approx(0.78 - 0.6)


def population_error(scale, truth=1.5, edges=None):
    """The calibration error within the given bins, over a million pairs."""
    pairs = simulated(400_000, scale=scale, seed=99, truth=truth)
    chance = torch.sigmoid(pairs.margin.abs())
    off, place = chance - right(pairs.margin), torch.bucketize(chance, edges, right=True)
    return sum((off * (place == b)).sum().abs() for b in range(len(edges) + 1)).item() / len(off)


@pytest.mark.parametrize(("scale", "n"), [(1.0, 127), (3.0, 127), (0.3, 400)])
def test_the_interval_of_the_calibration_error_covers(scale, n):
    """In 95 of 100 data sets, less four standard errors of 100; the percentile interval, which is not shifted, does not for scale 1."""
    covers, naive, trials = 0, 0, 100
    for seed in range(trials):
        pairs = simulated(n, scale=scale, seed=seed)
        edges = bin_edges(pairs, 6)
        found = calibration_error(pairs, edges, generator=generator(seed))
        true = population_error(scale, edges=edges) if scale != 1 else 0.0
        covers += found.low <= true <= found.high
        naive += 2 * found.value - found.high <= true  # the lower end of the percentile interval, about
    assert covers >= 100 * (0.95 - 4 * math.sqrt(0.05 * 0.95 / trials))
    if scale == 1:
        assert naive < 50


def test_a_calibrated_model_is_told_from_one_that_is_too_sure():
    """The calibrated one's error is above its 95 % quantile in about 5 of 100, the mutant's nearly always."""
    above = {1.0: 0, 4.0: 0}
    for scale in above:
        for seed in range(100):
            pairs = simulated(127, scale=scale, seed=seed)
            edges = bin_edges(pairs)
            mean, most = calibrated_error(pairs, edges, generator=generator(seed))
            assert 0 < mean < most
            above[scale] += calibration_error(pairs, edges, generator=generator(seed)).value > most
    assert above[1.0] <= 5 + 4 * math.sqrt(100 * 0.05 * 0.95)
    assert above[4.0] >= 90


def test_what_goes_with_length():
    g = generator(5)
    length = torch.randint(1, 40, (300, 2), generator=g)
    quality = torch.randn(300, 2, generator=g).double()
    label = (quality == quality.max(1, keepdim=True).values).double()
    fair, biased = quality, quality + 0.1 * length
    fair, biased = (judged_pairs(x, label, length) for x in (fair, biased))
    plain = goes_with_length(fair, fair.margin, generator=generator())
    found = goes_with_length(biased, biased.margin, generator=generator())
    assert plain.low < 0 < plain.high
    assert found.low > 0.5
    # it does not matter which completion comes first
    turned = judged_pairs((quality + 0.1 * length).flip(1), label.flip(1), length.flip(1))
    assert goes_with_length(turned, turned.margin, generator=generator()).value == pytest.approx(found.value)
    assert accuracy(biased, biased.longer > 0).low > accuracy(biased, biased.longer < 0).high
    none = judged_pairs(quality, label, torch.ones(300, 2))
    assert not goes_with_length(none, none.margin, generator=generator()).reliable


def test_noise_lifts_log_z_by_what_is_said():
    """Normal noise of spread s: log E exp((r + e) / beta) - log E exp(r / beta) = s^2 / (2 beta^2)."""
    g = generator(6)
    reward = torch.randn(4000, 50, generator=g, dtype=torch.float64)
    noise, beta = 0.3, 0.8
    again = reward + noise * torch.randn(reward.shape, generator=g, dtype=torch.float64)
    found = rescored(reward, again, beta, generator=generator())
    lifted = (again / beta).exp().mean().log() - (reward / beta).exp().mean().log()
    assert found.spread.low < noise < found.spread.high
    assert found.log_z == pytest.approx(lifted.item(), rel=0.1)
    assert 0 < found.flipped < 0.5
    shifted = rescored(reward, reward + 5, beta, generator=generator())
    assert (shifted.flipped, shifted.spread.value) == pytest.approx(
        (0, 0), abs=1e-9
    )  # a constant is no noise


@pytest.mark.parametrize("size", [2, 5])
def test_within_prompts_spreads_as_the_rewards_do(size):
    g = generator(7)
    prompts = 20_000 // size
    offset = 10 * torch.randn(prompts, 1, generator=g, dtype=torch.float64)
    score = offset + 0.7 * torch.randn(prompts, size, generator=g, dtype=torch.float64)
    group = torch.arange(prompts).repeat_interleave(size)
    found = within_prompts(score.flatten(), group)
    assert found.std().item() == pytest.approx(0.7, rel=0.03)
    assert within_prompts(torch.tensor([1.0]), torch.tensor([0])).numel() == 0


def test_what_never_differs_has_no_pairs():
    none = judged_pairs(torch.zeros(3, 2), torch.ones(3, 2), torch.ones(3, 2))
    found = calibration.accuracy(none)
    assert (none.count, found.n, found.reliable) == (0, 0, False)
