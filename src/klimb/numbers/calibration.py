"""Whether scores of completions can be believed: which of two is better, how surely, and what length has to do with it.

P prompts, K completions a prompt, M = K (K - 1) / 2 pairs, R resamples. A pair is turned so that its better member comes
first; a pair whose labels tie is left out by a mask. Prompts are the independent units, so intervals resample prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from klimb.numbers.estimate import Estimate, bootstrap

FEW_PAIRS = 30
"""below this many pairs nothing that is said of them is reliable"""
FEW_FOR_A_CURVE = 100
"""below this many pairs a curve of reliability is mostly noise"""
PAIRS_A_BIN = 20


@dataclass(frozen=True)
class Pairs:
    """Pairs of completions that were judged, the better one first.

    Attributes:
        margin: [P, M] score of the better one less that of the other.
        longer: [P, M] its length less that of the other, tokens.
        judged: [P, M] False where the labels tie.
    """

    margin: Tensor
    longer: Tensor
    judged: Tensor

    @property
    def count(self) -> int:
        """Pairs whose labels differ."""
        return int(self.judged.sum())


@dataclass(frozen=True)
class Bin:
    """Some pairs of about the same predicted chance.

    Attributes:
        confidence: the mean chance that the scores give to the member they favour.
        accuracy: how often that member was the better one.
    """

    confidence: float
    accuracy: Estimate


def judged_pairs(score: Tensor, label: Tensor, length: Tensor) -> Pairs:
    """Pairs of each prompt's completions, from scores, labels and lengths [P, K].

    Example:
        >>> judged_pairs(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[4, 9]])).margin
        tensor([[2.]], dtype=torch.float64)
    """
    first, second = torch.triu_indices(label.shape[1], label.shape[1], 1)
    sign = (label[:, first] - label[:, second]).sign().double()

    def apart(x: Tensor) -> Tensor:
        return (x[:, first] - x[:, second]).double() * sign

    return Pairs(apart(score), apart(length), sign != 0)


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n independent units; never of width zero, as a bootstrap's is where all are right.

    Example:
        >>> [round(x, 3) for x in wilson(1.0, 10)]
        [0.722, 1.0]

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # share lies in the interval; rounding must not push it out
    return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)


def accuracy(pairs: Pairs, keep: Tensor | None = None) -> Estimate:
    """How often the better one has the larger score, a tie counted half; of the pairs that `keep` [P, M] lets through.

    The interval is Wilson's for as many units as there are prompts with such a pair: pairs of one prompt are not independent.
    """
    which = pairs.judged if keep is None else pairs.judged & keep
    n, units = int(which.sum()), int(which.any(1).sum())
    if n == 0:
        return Estimate(math.nan, math.nan, math.nan, 0, ("unreliable: no such pair",))
    share = right(pairs.margin)[which].mean().item()
    return few(Estimate(share, *wilson(share, units), n))


def right(margin: Tensor) -> Tensor:
    """1 where the better one has the larger score, 1/2 where they tie, 0 elsewhere. Any shape."""
    return (margin.sign() + 1) / 2


def few(e: Estimate, least: int = FEW_PAIRS) -> Estimate:
    """The estimate, called unreliable where it rests on fewer than `least` pairs."""
    if e.n >= least:
        return e
    return replace(e, warnings=(*e.warnings, f"unreliable: {e.n} pairs, expected {least} or more"))


def pair_mean(pairs: Pairs, value: Tensor, *, generator: torch.Generator) -> Estimate:
    """The mean of a number of each pair [P, M], with an interval over resampled prompts."""
    return _resampled(
        lambda x, w: (x * w).sum((-1, -2)) / w.sum((-1, -2)),
        value.masked_fill(~pairs.judged, 0.0),
        pairs.judged.double(),
        n=pairs.count,
        generator=generator,
    )


def surprise(pairs: Pairs) -> Tensor:
    """[P, M] -log of the chance that the scores give to what was judged, nats; log 2 is knowing nothing."""
    return -logsigmoid(pairs.margin)


def overconfidence(pairs: Pairs) -> Tensor:
    """[P, M] the chance given to the favoured member, less 1 where it was the better one; its mean is above 0 where scores are too far apart."""
    return torch.sigmoid(pairs.margin.abs()) - right(pairs.margin)


def bin_edges(pairs: Pairs, num_bins: int | None = None) -> Tensor:
    """Inner edges that part the pairs into bins of as many each, by their predicted chance; about 20 a bin, 10 bins at most."""
    chance = torch.sigmoid(pairs.margin.abs())[pairs.judged]
    bins = num_bins or min(10, max(2, len(chance) // PAIRS_A_BIN))
    return chance.quantile(torch.arange(1, bins, dtype=torch.float64) / bins).unique()


def reliability(pairs: Pairs, edges: Tensor) -> list[Bin]:
    """The table of reliability: of each bin what was predicted and what happened, pairs taken as independent."""
    chance, hit = torch.sigmoid(pairs.margin.abs())[pairs.judged], right(pairs.margin)[pairs.judged]
    place = torch.bucketize(chance, edges, right=True)
    table = []
    for b in place.unique().tolist():
        here = place == b
        share, n = hit[here].mean().item(), int(here.sum())
        table.append(Bin(chance[here].mean().item(), Estimate(share, *wilson(share, n), n)))
    return table


def calibration_error(pairs: Pairs, edges: Tensor, *, generator: torch.Generator) -> Estimate:
    r"""The expected calibration error: how far chances and frequencies of the bins are apart, weighted by their pairs.

    $$ \sum_b \frac{n_b}{n}\, | \operatorname{mean}_b \sigma(|m|) - \operatorname{mean}_b 1[\text{right}] | $$

    Biased upwards: with few pairs a calibrated model has some too (`calibrated_error`). The interval is the basic bootstrap's, which
    takes that bias off, 2 e - quantiles, widened to hold e itself; it begins at 0 where e is no larger than 95 of 100
    calibrated models show, since there the bootstrap knows nothing of the bound.

    Args:
        pairs: P prompts.
        edges: `bin_edges`.
        generator: of the resamples.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> margin = torch.full((400, 1), 3.0)
        >>> label = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(200, 1)  # a coin, and scores that are sure
        >>> p = judged_pairs(torch.cat([margin, 0 * margin], 1), label, torch.zeros(400, 2))
        >>> print(calibration_error(p, bin_edges(p), generator=g))
        0.45 [0.41, 0.50]

    Source: Naeini, Cooper, Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning", 2015; Guo et al., "On
    calibration of modern neural networks", 2017. Bins of equal counts and not of equal width.
    """
    chance = torch.sigmoid(pairs.margin.abs())
    place = torch.bucketize(chance, edges, right=True)
    value = _resampled(
        lambda d, b, w: _binned(d, b, w, len(edges) + 1),
        chance - right(pairs.margin),
        place,
        pairs.judged.double(),
        n=pairs.count,
        generator=generator,
    )
    _, most = calibrated_error(pairs, edges, generator=generator)
    low = 0.0 if value.value <= most else max(2 * value.value - value.high, 0.0)
    high = max(2 * value.value - value.low, value.value)
    shifted = replace(value, low=min(low, value.value), high=high, warnings=())
    return few(shifted, FEW_FOR_A_CURVE)


def calibrated_error(
    pairs: Pairs, edges: Tensor, *, generator: torch.Generator, num_resamples: int = 1000
) -> tuple[float, float]:
    """The calibration error that a calibrated model with these very chances would show: its mean, and what 95 of 100 stay below.

    Outcomes are drawn by the chances themselves; each pair by itself.
    """
    chance = torch.sigmoid(pairs.margin.abs())[pairs.judged]
    place = torch.bucketize(chance, edges, right=True)
    drawn = torch.rand(num_resamples, len(chance), generator=generator, dtype=torch.float64) < chance
    off = chance - drawn.double()
    errors = _binned(
        off[:, None], place.expand_as(off)[:, None], torch.ones_like(off)[:, None], len(edges) + 1
    )
    return errors.mean().item(), errors.quantile(0.95).item()


def goes_with_length(pairs: Pairs, value: Tensor, *, generator: torch.Generator) -> Estimate:
    r"""The correlation of a pair's difference in `value` [P, M] with its difference in length.

    $$ \sum d\,l \,/\, \sqrt{\sum d^2 \sum l^2} $$ over pairs; it does not matter which member comes first, so nothing is subtracted.

    Example:
        >>> p = judged_pairs(torch.tensor([[2.0, 0.0]] * 8), torch.tensor([[1.0, 0.0]] * 8), torch.tensor([[9, 5]] * 8))
        >>> goes_with_length(p, p.margin, generator=torch.Generator().manual_seed(0)).value
        1.0
    """

    def cosine(d: Tensor, length: Tensor) -> Tensor:
        return (d * length).sum((-1, -2)) / (d.square().sum((-1, -2)) * length.square().sum((-1, -2))).sqrt()

    kept = [x.masked_fill(~pairs.judged, 0.0) for x in (value, pairs.longer)]
    if not all(bool(x.any()) for x in kept):
        return Estimate(0.0, 0.0, 0.0, pairs.count, ("unreliable: one of the two never differs",))
    return _resampled(cosine, *kept, n=pairs.count, generator=generator)


@dataclass(frozen=True)
class Rescored:
    """The same completions scored in two ways.

    Attributes:
        spread: standard deviation of the difference, units of score.
        flipped: share of pairs whose order changes.
        log_z: what noise of this spread adds to log Z at beta, nats: spread^2 / (2 beta^2).
    """

    spread: Estimate
    flipped: float
    log_z: float


def rescored(first: Tensor, second: Tensor, beta: float, *, generator: torch.Generator) -> Rescored:
    """How far two scores [P, K] of the same completions are apart.

    Noise of a reward is climbed as if it were reward: with normal noise of spread s, E exp((r + noise) / beta) is larger by
    exp(s^2 / (2 beta^2)). What both ways have in common (a judge's bias) cannot be seen so.

    Example:
        >>> r = torch.arange(16.0).reshape(8, 2)
        >>> found = rescored(r, r, 0.1, generator=torch.Generator().manual_seed(0))
        >>> found.spread.value, found.flipped, found.log_z
        (0.0, 0.0, 0.0)
    """
    off = (second - first).double()

    def spread(x: Tensor) -> Tensor:
        centred = x - x.mean((-1, -2), keepdim=True)
        return centred.square().mean((-1, -2)).sqrt()

    e = _resampled(spread, off, n=off.numel(), generator=generator)
    i, j = torch.triu_indices(first.shape[1], first.shape[1], 1)
    flips = ((first[:, i] - first[:, j]).sign() * (second[:, i] - second[:, j]).sign() < 0).double()
    return Rescored(e, flips.mean().item(), e.value**2 / (2 * beta**2))


def within_prompts(score: Tensor, group: Tensor) -> Tensor:
    """[N] scores less the mean of their prompt, stretched by sqrt(m / (m - 1)) so that m of a prompt spread as far as many would.

    A reward model fixes scores up to a constant a prompt, which must not count as a tail. Prompts of one completion say nothing and
    are left out.

    Args:
        score: [N].
        group: [N] number of the prompt each belongs to.

    Example:
        >>> within_prompts(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([0, 0, 1]))
        tensor([-1.4142,  1.4142], dtype=torch.float64)
    """
    score = score.double()
    size = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add(0, group, torch.ones_like(score))
    total = torch.zeros_like(size).index_add(0, group, score)
    m = size[group]
    return ((score - total[group] / m) * (m / (m - 1)).sqrt())[m > 1]


def _binned(off: Tensor, place: Tensor, weight: Tensor, bins: int) -> Tensor:
    """[R, P, M] -> [R] the sum over bins of |sum of off| over the sum of weights."""
    total = sum(((place == b) * weight * off).sum((-1, -2)).abs() for b in range(bins))
    return torch.as_tensor(total) / weight.sum((-1, -2))


def _resampled(
    statistic: Callable[..., Tensor], *arrays: Tensor, n: int, generator: torch.Generator
) -> Estimate:
    value = statistic(*(x[None] for x in arrays)).item()
    if len(arrays[0]) < 2:
        return Estimate(value, -math.inf, math.inf, n, ("unreliable: one prompt has no interval",))
    low, high = bootstrap(statistic, *arrays, generator=generator, within=False)
    return few(Estimate(value, low.item(), high.item(), n))
