"""Best of n: what drawing n and keeping the best would earn and cost, exactly, ties included.

Best-of-n is the tilt of the reward log u at 1 / beta = n - 1, where u is the quantile of the reward under the reference
(density n u^(n-1)): a rule about ranks, not about rewards. With ties, all outcomes of one reward share one ratio
pi_n / ref = (F^n - F-^n) / (F - F-), F = P(r' <= r) and F- = P(r' < r).

P prompts, N draws a prompt in the pool, K atoms. Nats; reward in its own units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.numbers.estimate import FEW_PROMPTS, Estimate, bootstrap


@dataclass(frozen=True)
class BestOfNPoint:
    """Best-of-n on the axes of the frontier: n, the reward, and KL(best-of-n||ref) in nats."""

    n: int
    reward: Estimate
    kl: Estimate


def best_of_n(
    reward: Tensor, ns: Sequence[int], *, generator: torch.Generator, num_resamples: int = 1000
) -> list[BestOfNPoint]:
    """Reward and KL of best-of-n for each n, means over prompts with 95 % intervals, from one pool of reference draws.

    Args:
        reward: [P, N].
        ns: each between 1 and N.
        generator: draws the resamples.
        num_resamples: R.

    Returns:
        One point an n. Above N / 3 few distinct maxima carry it and it is marked unreliable.

    Raises:
        ValueError: for n outside 1..N, NaN or +inf rewards.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> point = best_of_n(torch.rand(16, 64, generator=g), [4], generator=g)[0]
        >>> abs(point.reward.value - 0.8) < 0.02, abs(point.kl.value - best_of_n_kl_bound(4)) < 1e-9
        (True, True)
    """

    def values(r: Tensor) -> Tensor:
        return torch.stack(
            [torch.stack([f(r, n) for f in (best_of_n_reward, best_of_n_kl)], -1) for n in ns], -2
        )

    r = reward.detach().double().cpu()
    num_prompts, num_draws = r.shape
    per_prompt = values(r)
    if num_prompts < FEW_PROMPTS:
        # a resampled pool is full of ties, which would shrink the KL: only the reward is resampled within a prompt
        low, high = bootstrap(
            lambda x: torch.stack([best_of_n_reward(x, n).mean(-1) for n in ns], -1),
            r,
            generator=generator,
            num_resamples=num_resamples,
            within=True,
        )
        kl = per_prompt[..., 1].mean(0)
        low, high = torch.stack([low, kl], -1), torch.stack([high, kl], -1)
    else:
        low, high = bootstrap(
            lambda x: x.mean(1), per_prompt, generator=generator, num_resamples=num_resamples
        )
    points = []
    for j, n in enumerate(ns):
        said = ()
        if n > 1 and 3 * n > num_draws:
            said = (
                f"unreliable: best of {n} rests on few maxima; needs {3 * n} draws a prompt, has {num_draws}",
            )
        reward_, kl_ = (
            Estimate(per_prompt[:, j, i].mean().item(), low[j, i].item(), high[j, i].item(), r.numel(), said)
            for i in range(2)
        )
        points.append(BestOfNPoint(n=int(n), reward=reward_, kl=kl_))
    return points


def best_of_n_reward(reward: Tensor, n: int) -> Tensor:
    """The expected reward of the best of n draws, from a pool of N.

    sum_i C(i-1, n-1) / C(N, n) r_(i), with r_(i) the i-th smallest: the mean of max over all n-subsets of the pool.

    Unbiased for every law, with ties or without, for n <= N.

    Args:
        reward: [P, N].
        n: between 1 and N.

    Returns:
        [P] in units of reward; -inf where a best of n may still be forbidden.

    Raises:
        ValueError: for n outside 1..N, NaN or +inf rewards.

    Example:
        >>> best_of_n_reward(torch.tensor([[3.0, 1.0, 2.0]]), 2)
        tensor([2.6667])

    Source: the U-statistic of the maximum; Hoeffding, 1948, "A class of statistics with asymptotically normal
    distribution".
    """
    r = _sorted(reward, n)
    weights = _rank_weights(r.shape[-1], n)
    return torch.where(weights > 0, weights * r, 0.0).sum(-1).to(_dtype(reward))


def best_of_n_kl(reward: Tensor, n: int) -> Tensor:
    """KL(best-of-n||ref) from a pool of N draws: ties are atoms, a reward seen once is taken as continuous.

    sum over tied rewards of q log(q / (F - F-)) with q = F^n - F-^n, plus the integral of n u^(n-1) log(n u^(n-1))
    over the quantiles u of the untied draws.

    Equals log n - (n - 1) / n without ties and the exact KL where the pool's shares are those of the law; an atom that
    was drawn only once counts as continuous, which errs on the high side.

    Args:
        reward: [P, N].
        n: between 1 and N.

    Returns:
        [P] nats, between 0 and `best_of_n_kl_bound(n)`.

    Raises:
        ValueError: as `best_of_n_reward`.

    Example:
        >>> best_of_n_kl(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), 2)  # from (1/2, 1/2) to (1/4, 3/4)
        tensor([0.1308])

    Source: Beirami, Agarwal, Berant, D'Amour, Eisenstein, Nagpal, Suresh, 2025, "Theoretical guarantees on the best-of-n
    alignment policy" (the law with ties, and that the popular formula is a bound).
    """
    r = _sorted(reward, n)
    pool = r.shape[-1]
    below = torch.searchsorted(r, r, right=False)
    upto = torch.searchsorted(r, r, right=True)
    low, high = below.double() / pool, upto.double() / pool
    tied = upto - below
    q = high**n - low**n
    atom = torch.xlogy(q, q / (high - low)) / tied  # each of the tied draws brings its part
    untied = _integral(high, n) - _integral(low, n)
    kl = torch.where(tied > 1, atom, untied).sum(-1)
    return kl.clamp(0.0, best_of_n_kl_bound(n)).to(_dtype(reward))


def best_of_n_law(probs: Tensor, reward: Tensor, n: int) -> Tensor:
    """The exact law of best-of-n on enumerated atoms, ties broken at random among the draws.

    pi_n(y) = ref(y) (F(r)^n - F-(r)^n) / (F(r) - F-(r))

    Args:
        probs: [P, K] ref's probabilities of the atoms.
        reward: [P, K].
        n: >= 1.

    Returns:
        [P, K], which sum to one over K; 0 where ref is 0.

    Example:
        >>> best_of_n_law(torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.0, 1.0, 1.0]]), 2)
        tensor([[0.2500, 0.3750, 0.3750]])

    Source: Beirami et al., 2025, "Theoretical guarantees on the best-of-n alignment policy".
    """
    if n < 1:
        raise ValueError(f"best_of_n_law: got n={n}; expected n >= 1.")
    p, r = probs.double(), reward.double()
    below = torch.where(r[..., None, :] < r[..., :, None], p[..., None, :], 0.0).sum(-1)
    same = torch.where(r[..., None, :] == r[..., :, None], p[..., None, :], 0.0).sum(-1)
    ratio = torch.where(same > 0, ((below + same) ** n - below**n) / same, 0.0)
    return (p * ratio).to(probs.dtype)


def best_of_n_kl_bound(n: int) -> float:
    """The KL of best-of-n without ties, log n - (n - 1) / n nats, and a bound of it with ties.

    Example:
        >>> round(best_of_n_kl_bound(4), 4)
        0.6363
    """
    return math.log(n) - (n - 1) / n


def best_of_n_beta(n: int) -> float:
    """The beta at which best-of-n is the tilt of the reward log u: 1 / (n - 1); inf for n = 1.

    Example:
        >>> best_of_n_beta(5)
        0.25

    Source: Gui, Garbacea, Veitch, 2024, "BoNBoN alignment" (the quantile form); Sessa et al., 2025, "BOND".
    """
    return math.inf if n == 1 else 1 / (n - 1)


def quantile_log_partition(beta: float) -> float:
    """The log Z where the reward is the quantile u itself, uniform on [0, 1]: log(beta (e^(1/beta) - 1)), nats.

    Example:
        >>> round(quantile_log_partition(1.0), 4)
        0.5413

    Source: Matrenok, Moalla, Gulcehre, 2025, "Quantile reward policy optimization". Fails with ties: see `bounds` for
    binary rewards.
    """
    return 1 / beta + math.log(beta) + math.log(-math.expm1(-1 / beta))


def _rank_weights(pool: int, n: int) -> Tensor:
    """C(i-1, n-1) / C(N, n) for i = 1..N, by log-gamma: the binomials themselves overflow."""
    i = torch.arange(1, pool + 1, dtype=torch.float64)
    lg = torch.lgamma
    size = torch.tensor(float(pool), dtype=torch.float64)
    one = torch.tensor(float(n), dtype=torch.float64)
    usable = i >= n
    i = i.clamp_min(n)
    log_top = lg(i) - lg(one) - lg(i - n + 1)
    log_all = lg(size + 1) - lg(one + 1) - lg(size - n + 1)
    return torch.where(usable, (log_top - log_all).exp(), 0.0)


def _integral(u: Tensor, n: int) -> Tensor:
    """Integral of n v^(n-1) log(n v^(n-1)) from 0 to u."""
    return u**n * math.log(n) + (n - 1) * (torch.xlogy(u**n, u) - u**n / n)


def _sorted(reward: Tensor, n: int) -> Tensor:
    pool = reward.shape[-1]
    if not 1 <= n <= pool:
        raise ValueError(f"got n={n} and {pool} draws a prompt; expected n between 1 and {pool}: draw more.")
    r = reward.detach().double()
    if not (r < math.inf).all():
        raise ValueError("got rewards that are NaN or +inf; expected finite numbers or -inf.")
    return r.sort(-1).values.contiguous()


def _dtype(reward: Tensor) -> torch.dtype:
    return reward.dtype if reward.is_floating_point() else torch.get_default_dtype()
