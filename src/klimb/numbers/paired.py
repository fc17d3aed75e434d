"""Two policies on the same prompts: which is nearer to the best one, prompt by prompt.

Both have one target p (one reference, reward and beta), so log Z is the same and drops out of the difference:

    gap(a) - gap(b) = J(b) - J(a),    J(pi) = E_pi[r] - beta KL(pi||ref)

and what is compared is J alone, an average over each policy's own draws. Prompts differ far more than policies do; a
difference within the prompt does not see that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.numbers.estimate import FEW_PROMPTS, Estimate, bootstrap

NAMES = ("reward", "kl", "objective")


@dataclass(frozen=True)
class Difference:
    """What one policy has more than another, means over prompts; positive `objective` is nearer to the best policy.

    Attributes:
        reward: of E[r].
        kl: of KL(pi||ref), nats.
        objective: of J, units of reward; the gap differs by as much the other way.
        p_value: of the chance that differences of random sign are as far from zero as those of J; two-sided.
        prompts: how many are shared.
    """

    reward: Estimate
    kl: Estimate
    objective: Estimate
    p_value: float
    prompts: int


def paired_difference(
    one: Tensor, other: Tensor, *, beta: float, generator: torch.Generator, num_resamples: int = 1000
) -> Difference:
    """`one` minus `other`, 95 % intervals from a bootstrap over shared prompts (over draws within them if P < 8).

    Args:
        one: [P, G1, 2] reward and log pi/ref of each draw of the one policy.
        other: [P, G2, 2] of the other, on the same prompts in the same order.
        beta: reward per nat, of both.
        generator: draws the resamples and the signs.
        num_resamples: R.

    Returns:
        A Difference. All its values are unbiased. The test is exact where the two are exchangeable prompt by prompt.

    Raises:
        ValueError: beta <= 0, shapes that do not fit, fewer than two prompts with one draw, a reward that is not finite.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> prompts = 10 * torch.randn(40, 1, 1, generator=g)     # prompts differ by far more than policies do
        >>> worse = prompts + torch.randn(40, 32, 2, generator=g)
        >>> better = prompts + torch.tensor([0.5, 0.0]) + torch.randn(40, 32, 2, generator=g)
        >>> found = paired_difference(better, worse, beta=0.1, generator=g)
        >>> found.reward.low > 0, found.p_value < 0.01
        (True, True)

    Source: Fisher, 1935, "The design of experiments" (the test by random signs); Efron and Tibshirani, 1993.
    """
    if not beta > 0:
        raise ValueError(f"paired_difference: got beta {beta}, expected a positive number, reward per nat")
    if one.ndim != 3 or other.ndim != 3 or len(one) != len(other) or {one.shape[-1], other.shape[-1]} != {2}:
        raise ValueError(
            f"paired_difference: got {list(one.shape)} and {list(other.shape)}; expected [P, G, 2] of the same prompts"
        )
    if not (one.isfinite().all() and other.isfinite().all()):
        raise ValueError(
            "paired_difference: got a reward or log-probability that is not finite; a policy that draws what is forbidden is "
            "infinitely far from the best one"
        )
    one, other = (torch.cat([x, x[..., :1] - beta * x[..., 1:]], -1).double() for x in (one, other))
    per_prompt = one.mean(1) - other.mean(1)
    centre = per_prompt.mean(0)
    if len(one) < FEW_PROMPTS:
        low, high = bootstrap(
            lambda a, b: a.mean((-3, -2)) - b.mean((-3, -2)),
            *(one, other),
            generator=generator,
            num_resamples=num_resamples,
            within=True,
        )
    else:
        low, high = bootstrap(
            lambda x: x.mean(-2), per_prompt, generator=generator, num_resamples=num_resamples
        )
    draws = one[..., 0].numel() + other[..., 0].numel()
    found = {
        name: Estimate(centre[i].item(), low[i].item(), high[i].item(), draws) for i, name in enumerate(NAMES)
    }
    return Difference(**found, p_value=sign_test(per_prompt[:, 2], generator=generator), prompts=len(one))


def sign_test(differences: Tensor, *, generator: torch.Generator, num_signs: int = 9999) -> float:
    """How often random signs put the mean of [P] differences as far from zero as it is; all signs where P <= 13.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> sign_test(torch.tensor([1.0, 2.0, 3.0]), generator=g)   # 2 of the 8 choices of sign
        0.25
    """
    prompts = len(differences)
    if prompts <= 13:
        bits = torch.arange(2**prompts)[:, None] >> torch.arange(prompts)
        signs, drawn = (bits & 1).to(differences.dtype) * 2 - 1, 0
    else:
        signs = torch.randint(0, 2, (num_signs, prompts), generator=generator).to(differences.dtype) * 2 - 1
        drawn = 1  # the signs as they are count among those drawn, or p could be zero
    reached = (signs @ differences).abs()
    own = differences.sum().abs()
    as_far = int((reached >= own * (1 - 1e-12)).sum())
    return (as_far + drawn) / (len(signs) + drawn)


def clearly_behind(p_values: Mapping[str, float], *, level: float = 0.05) -> list[str]:
    """Which of several the leading one is ahead of by more than chance: their p-value times their number is below `level`.

    Args:
        p_values: name -> of the difference to the leading one.
        level: chance of one wrong name among all of them, where none differs (Bonferroni).

    Example:
        >>> clearly_behind({"a": 0.01, "b": 0.03})
        ['a']
    """
    return [name for name, p in p_values.items() if p * len(p_values) < level]
