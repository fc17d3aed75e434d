"""A number with its interval, the bootstrap that makes it, and the Monte Carlo estimators of KL(policy||reference).

P prompts, G draws a prompt, R resamples, N packed tokens, V vocabulary, S sequences.
Prompts are the independent units: draws of one prompt share its difficulty, so intervals resample prompts, and draws
within the prompts only where there are too few prompts (the interval then speaks of these prompts alone).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FEW_PROMPTS = 8
"""below this many prompts the bootstrap resamples draws within each prompt"""


@dataclass(frozen=True)
class Estimate:
    """A value, its 95 % interval, the draws behind it, and what is wrong with it.

    Example:
        >>> e = Estimate(0.631, 0.6, 0.664, 512)
        >>> print(e)
        0.63 [0.60, 0.66]
        >>> e.reliable
        True
    """

    value: float
    low: float
    high: float
    n: int
    warnings: tuple[str, ...] = ()

    @property
    def reliable(self) -> bool:
        """True unless a warning says "unreliable"."""
        return not any("unreliable" in warning for warning in self.warnings)

    def as_dict(self) -> dict[str, object]:
        """What is written to JSON. A number that is not finite is None there: JSON has no infinity."""
        value, low, high = (x if math.isfinite(x) else None for x in (self.value, self.low, self.high))
        return {"value": value, "low": low, "high": high, "n": self.n, "warnings": list(self.warnings)}

    def __str__(self) -> str:
        width = self.high - self.low
        digits = max(2, math.ceil(-math.log10(width))) if 1e-9 < width < math.inf else 2
        # + 0.0 turns the negative zero that rounding leaves into a plain one
        value, low, high = (f"{round(x, digits) + 0.0:.{digits}f}" for x in (self.value, self.low, self.high))
        text = f"{value} [{low}, {high}]"
        return text if self.reliable else text + " unreliable"


def bootstrap(
    statistic: Callable[..., Tensor],
    *arrays: Tensor,
    generator: torch.Generator,
    num_resamples: int = 1000,
    within: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """95 % interval of a statistic of many prompts (or, with few prompts, of their draws).

    Every resample takes P prompts with replacement, the same ones from all arrays, so ratios of means and other joint
    statistics keep their correlations. With `within` it takes G draws of each prompt instead, from each array
    on its own; numbers of one draw therefore belong in one array, in trailing dimensions.

    The interval is the percentile interval, with tail probabilities widened for small samples.

    Args:
        statistic: arrays -> Tensor, vectorised: it gets the arrays with one more dimension in front, R, and must
            return [R, ...].
        *arrays: [P, ...], or [P, G, ...] with `within`.
        generator: draws the resamples.
        num_resamples: R.
        within: resample draws and not prompts; by default only if P < 8 and every array has draws.

    Returns:
        low, high: of the shape of the statistic.

    Raises:
        ValueError: if the arrays disagree on P, or there are too few prompts and no draws.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> a, b = torch.rand(100, generator=g), 2 + torch.rand(100, generator=g)
        >>> low, high = bootstrap(lambda a, b: a.mean(-1) / b.mean(-1), a, b, generator=g)
        >>> bool(low < 0.2 < high)
        True

    Source: Efron and Tibshirani, 1993, "An introduction to the bootstrap"; the widening is Hesterberg, 2015, "What
    teachers should know about the bootstrap".
    """
    arrays = tuple(a.detach().cpu() for a in arrays)
    num_prompts = arrays[0].shape[0]
    if any(a.shape[0] != num_prompts for a in arrays):
        raise ValueError(
            f"bootstrap: got arrays of {[a.shape[0] for a in arrays]} prompts; expected the same number."
        )
    if within is None:
        within = num_prompts < FEW_PROMPTS and all(a.ndim > 1 for a in arrays)
    if not within and num_prompts < 2:
        raise ValueError(
            f"bootstrap: got {num_prompts} prompt(s) and one number a prompt; expected at least 2 prompts, "
            "or the draws themselves, [P, G]."
        )
    units = min(a.shape[1] for a in arrays) if within else num_prompts
    # 2^22 numbers at a time: resamples of a large pool must not fill the memory
    size = max(1, 2**22 // max(a.numel() for a in arrays))
    parts = []
    for start in range(0, num_resamples, size):
        count = min(size, num_resamples - start)
        if within:
            rows = torch.arange(num_prompts)[:, None]
            chosen = [
                a[rows, _indices(count, num_prompts, a.shape[1], upto=a.shape[1], generator=generator)]
                for a in arrays
            ]
        else:
            index = _indices(count, num_prompts, upto=num_prompts, generator=generator)
            chosen = [a[index] for a in arrays]
        parts.append(statistic(*chosen))
    return interval(torch.cat(parts), units)


def resampled_means(values: Tensor, *, generator: torch.Generator, num_resamples: int = 1000) -> Tensor:
    """Means over resampled prompts, [P, K] -> [R, K], as one matrix product with the resampled weights.

    Example:
        >>> resampled_means(torch.ones(9, 2), generator=torch.Generator().manual_seed(0), num_resamples=1)
        tensor([[1., 1.]])
    """
    num_prompts = values.shape[0]
    index = _indices(num_resamples, num_prompts, upto=num_prompts, generator=generator)
    counts = torch.zeros(num_resamples, num_prompts, dtype=values.dtype)
    counts.scatter_add_(1, index, torch.ones_like(counts))
    return (counts / num_prompts) @ values


def interval(samples: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """95 % percentile interval of resampled statistics [R, ...], widened for a sample of `units` independent units.

    A bootstrap distribution is narrower than the sampling distribution by sqrt((n - 1) / n), and has a normal's tails
    and not a t's: the tail probability is therefore Phi(t_{n-1}(0.025) sqrt(n / (n - 1))) and not 0.025.

    Example:
        >>> low, high = interval(torch.arange(1001.0), 10**6)
        >>> low.item(), high.item()
        (24.0, 976.0)
    """
    from scipy.special import ndtr, stdtrit

    degrees = max(units - 1, 1)
    tail = float(ndtr(stdtrit(degrees, 0.025) * math.sqrt(1 + 1 / degrees)))
    ordered = samples.sort(0).values
    rank = math.floor(tail * (len(ordered) - 1))  # outward, and without interpolating between infinities
    return ordered[rank], ordered[-1 - rank]


def mean_estimate(
    draws: Tensor, *, generator: torch.Generator, num_resamples: int = 1000, warnings: tuple[str, ...] = ()
) -> Estimate:
    """The mean over prompts of the mean over draws, [P, G], as an Estimate.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> print(mean_estimate(torch.ones(10, 4), generator=g))
        1.00 [1.00, 1.00]
    """
    if draws.shape[0] < FEW_PROMPTS:
        low, high = bootstrap(
            lambda x: x.mean((-1, -2)),
            draws.double(),
            generator=generator,
            num_resamples=num_resamples,
            within=True,
        )
    else:
        per_prompt = draws.double().mean(-1)
        low, high = bootstrap(
            lambda x: x.mean(-1), per_prompt, generator=generator, num_resamples=num_resamples
        )
    return Estimate(draws.double().mean().item(), low.item(), high.item(), draws.numel(), warnings)


def ratio_estimate(above: Tensor, below: Tensor, *, generator: torch.Generator) -> Estimate:
    """The mean of one number a draw over the mean of another, of the same draws, [P, G] both, as an Estimate.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> print(ratio_estimate(torch.full((10, 4), 3.0), torch.full((10, 4), 12.0), generator=g))
        0.25 [0.25, 0.25]
    """

    def ratio(x: Tensor) -> Tensor:
        return x[..., 0].mean((-1, -2)) / x[..., 1].mean((-1, -2))

    pairs = torch.stack([above, below], -1).double()
    low, high = bootstrap(ratio, pairs, generator=generator)
    return Estimate(ratio(pairs).item(), low.item(), high.item(), above.numel())


@torch.no_grad()
def kl_k1(log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """KL(policy||reference) as the mean log-ratio, k1 = log pi - log ref, over draws from the policy.

    Unbiased; can be negative. A value only: no gradient passes (as a loss its expected gradient is zero).

    Args:
        log_pi: [P, G] nats, of draws from the policy.
        log_ref: [P, G] nats.

    Returns:
        [P] nats.

    Example:
        >>> kl_k1(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]]))
        tensor([0.5000])

    Source: Schulman, 2020, "Approximating KL divergence".
    """
    return (log_pi - log_ref).mean(-1)


@torch.no_grad()
def kl_k2(log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """KL(policy||reference) as half the mean square of the log-ratio, k2 = (log pi - log ref)^2 / 2.

    Biased: right to second order when the two laws are close, wrong when they are not. A value only: no gradient passes.

    Args:
        log_pi: [P, G] nats, of draws from the policy.
        log_ref: [P, G] nats.

    Returns:
        [P] nats.

    Example:
        >>> kl_k2(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]]))
        tensor([0.2500])

    Source: Schulman, 2020, "Approximating KL divergence".
    """
    return ((log_pi - log_ref) ** 2 / 2).mean(-1)


@torch.no_grad()
def kl_k3(log_pi: Tensor, log_ref: Tensor) -> Tensor:
    """KL(policy||reference) as the mean of k3 = ref / pi - 1 + log pi - log ref, over draws from the policy.

    Unbiased where the policy can draw whatever the reference can; never negative; its variance explodes where
    ref / pi does. A value only: no gradient passes (as a loss it is the forward KL(reference||policy)).

    Args:
        log_pi: [P, G] nats, of draws from the policy.
        log_ref: [P, G] nats.

    Returns:
        [P] nats.

    Example:
        >>> kl_k3(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-2.0, -2.0]]))
        tensor([0.1839])

    Source: Schulman, 2020, "Approximating KL divergence".
    """
    log_ratio = log_pi - log_ref
    return (torch.expm1(-log_ratio) + log_ratio).mean(-1)


@torch.no_grad()
def rao_blackwell_kl(
    policy_logits: Tensor, reference_logits: Tensor, row: Tensor, *, num_sequences: int
) -> Tensor:
    """KL(policy||reference) of sequences, the sum over visited prefixes of the exact next-token KL.

    sum_t KL(pi(.|s_t) || ref(.|s_t)),  s_t visited by the policy

    Unbiased for the sequence KL, never negative, and never of larger variance than k1. A value only: no gradient passes.

    Args:
        policy_logits: [N, V] logits or log-probabilities of the policy at each packed token's prefix.
        reference_logits: [N, V] the same of the reference.
        row: [N] which sequence each packed token belongs to.
        num_sequences: S.

    Returns:
        [S] nats, float32 or wider; +inf where the policy can draw a token that the reference cannot.

    Example:
        >>> kl = rao_blackwell_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]]), torch.tensor([0]), num_sequences=1)
        >>> kl
        tensor([inf])

    Source: Amini, Vieira, Cotterell, 2025, "Better estimation of the KL divergence between language models".
    Not the same as summing k1 over tokens, which has the same mean and more variance.
    """
    dtype = torch.promote_types(policy_logits.dtype, torch.float32)
    log_pi = torch.log_softmax(policy_logits.to(dtype), -1)
    log_ref = torch.log_softmax(reference_logits.to(dtype), -1)
    pi = log_pi.exp()
    per_token = torch.where(pi > 0, pi * (log_pi - log_ref), 0.0).sum(-1)
    return per_token.new_zeros(num_sequences).index_add(0, row, per_token)


def _indices(*shape: int, upto: int, generator: torch.Generator) -> Tensor:
    return torch.randint(upto, shape, generator=generator, device=generator.device).cpu()
