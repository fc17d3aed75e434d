"""What a diagnosis rests on: numbers of one run, each with its interval and with the values it takes on resampled prompts.

All numbers of one pool of draws come from one joint bootstrap, so a rule that compares two of them is judged on every
resample, with their correlations. What was not measured is None.

P prompts, G draws a prompt, R resamples, S steps. Nats; reward in its own units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from klimb.numbers.certificate import (
    MEANS,
    SUMMARY,
    allowed,
    betas_around,
    means_of_prompts,
    mixture_weights,
    rewards_of,
    stacked,
    summary_of_means,
)
from klimb.numbers.estimate import FEW_PROMPTS, Estimate, interval, resampled
from klimb.numbers.frontier import FrontierPoint
from klimb.numbers.tilt import MARGIN, draws_needed, log_partition, shares, tilted_kl, tilted_mean

RARE = math.log(0.05)
"""log pi - log ref below which the policy has all but given a completion up"""
RESAMPLES = 1000
FEW_STEPS = 8
"""steps with fresh draws below which no trend is looked for"""


@dataclass(frozen=True, eq=False)
class Quantity:
    """An estimate and its values on R resamples."""

    estimate: Estimate
    resamples: Tensor


@dataclass(frozen=True, eq=False)
class Evidence:
    """The numbers of a run that verdicts rest on; means over prompts, None where not measured.

    Attributes:
        reward: E_pi[r].
        reference_reward: E_ref[r].
        optimum_reward: E_p[r].
        kl: KL(pi||ref), nats.
        optimum_kl: KL(p||ref), nats.
        gap: beta KL(pi||p), from draws of policy and reference together.
        self_gap: the same from the policy's draws alone, blind to what it has dropped.
        attained: share of the way from reference to p.
        efficiency: share of the reward that the policy's KL could buy.
        overlap: mean of pi / ref over the reference's draws; 1 if both numbers are of the laws that drew.
        bought: the most reward that a policy of this KL can earn, from both pools.
        ceiling: the same from the reference's draws alone, which no error of the policy's scores can touch.
        wasted: KL beyond the least that earns the policy's reward, nats.
        spread: standard deviation of the reference's rewards within a prompt: the unit of "much reward".
        dropped: share of p on completions that the policy has made twenty times rarer than the reference has them.
        cut: share of the policy's completions that were cut at the length limit.
        cut_loss: how much more completions earn that ended by themselves than those of the same prompt that were cut.
        mismatch: KL(sampler||scorer) of the policy's draws, nats.
        reward_gain: E_pi[r] - E_ref[r].
        audit_gain: the same of a reward that training did not see.
        tail: Hill's index of the policy's rewards: 0.5 and more is a tail that may be all error.
        flat: share of prompts where all draws have one reward.
        never: share of prompts where no draw of the reference earns more than the least reward there is.
        lift_share: the lift of p over the reference, as a share of the most that the plan's draws can predict.
        plan_lift: that lift itself, E_p[r] - E_ref[r], on the plan's prompts.
        done: share of the steps that were to be taken.
        rise: objective that as much training again would add, by the line through its second half.
        beta: reward per nat.
        frontier: what the plan predicts for other betas.
        num_prompts: that were measured.
        num_draws: of each of policy and reference, a prompt.
        needs: draws a prompt, both pools together, that would support the certificate.
    """

    reward: Quantity | None = None
    reference_reward: Quantity | None = None
    optimum_reward: Quantity | None = None
    kl: Quantity | None = None
    optimum_kl: Quantity | None = None
    gap: Quantity | None = None
    self_gap: Quantity | None = None
    attained: Quantity | None = None
    efficiency: Quantity | None = None
    overlap: Quantity | None = None
    bought: Quantity | None = None
    ceiling: Quantity | None = None
    wasted: Quantity | None = None
    spread: Quantity | None = None
    dropped: Quantity | None = None
    cut: Quantity | None = None
    cut_loss: Quantity | None = None
    mismatch: Quantity | None = None
    reward_gain: Quantity | None = None
    audit_gain: Quantity | None = None
    tail: Quantity | None = None
    flat: Quantity | None = None
    never: Quantity | None = None
    lift_share: Quantity | None = None
    plan_lift: Quantity | None = None
    done: Quantity | None = None
    rise: Quantity | None = None
    beta: float | None = None
    frontier: Sequence[FrontierPoint] = field(default=())
    num_prompts: int = 0
    num_draws: int = 0
    needs: int = 0


@dataclass(frozen=True, eq=False)
class Side:
    """Draws of the policy, or of the reference, of the same P prompts; all [P, G], None where unknown.

    Attributes:
        reward: the target's own.
        log_pi: under the policy, nats.
        log_ref: under the reference, nats.
        finished: whether a completion ended by itself.
        log_q: under the law that drew, nats.
        audit: a reward that training did not see.
    """

    reward: Tensor
    log_pi: Tensor
    log_ref: Tensor
    finished: Tensor | None = None
    log_q: Tensor | None = None
    audit: Tensor | None = None


def exact(value: float, n: int) -> Quantity:
    """A number that is known and not estimated."""
    return Quantity(Estimate(value, value, value, n), torch.full((RESAMPLES,), value, dtype=torch.float64))


def joined(first: Evidence, second: Evidence) -> Evidence:
    """What `first` knows, and of the rest what `second` knows."""
    known = {name: x for name, x in vars(first).items() if x not in (None, (), 0)}
    return replace(second, **known)


def as_written(found: Evidence, written: Mapping[str, Estimate]) -> Evidence:
    """The same evidence with the intervals (and doubts) under which its numbers were published, where they were."""
    known = {
        name: replace(quantity, estimate=estimate)
        for name, estimate in written.items()
        if (quantity := getattr(found, name, None)) is not None
    }
    return replace(found, **known)


def evidence_of_draws(policy: Side, reference: Side, *, beta: float, generator: torch.Generator) -> Evidence:
    """All that draws of policy and reference can say, from one joint bootstrap over prompts.

    Args:
        policy: G1 draws a prompt of the policy.
        reference: G2 draws a prompt of the reference, of the same prompts.
        beta: reward per nat.
        generator: draws the resamples.

    Returns:
        Evidence without a plan and without steps; a number that is not finite (the gap of a policy that draws what is
        forbidden) is None. Its estimates carry no doubts yet (`as_written`).

    Raises:
        ValueError: as `klimb.numbers.certificate.certificate`.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> r, zero = torch.randn(32, 32, generator=g), torch.zeros(32, 32)
        >>> found = evidence_of_draws(Side(r, zero, zero), Side(r, zero, zero), beta=1.0, generator=g)
        >>> abs(found.attained.estimate.value) < 1e-6, found.mismatch is None
        (True, True)
    """
    mine, theirs = _whole("policy", policy), _whole("reference", reference)
    mine, theirs, _ = allowed(mine, theirs)
    betas = betas_around(beta)
    away = [tilted_kl(theirs[..., 0], b).mean().item() for b in betas]
    trusted = [b for b, kl in zip(betas, away, strict=True) if math.log(theirs.shape[1]) - kl >= MARGIN]
    rewards = rewards_of(mine, theirs)
    away_from_both = tilted_kl(rewards / beta + mixture_weights(mine[..., :3], theirs[..., :3])[0], 1.0)
    least, most = rewards.amin().item(), rewards.amax().item()

    def prompts(mine: Tensor, theirs: Tensor) -> Tensor:
        known = means_of_prompts(mine[..., :3], theirs[..., :3], beta, betas, True)
        alone = [log_partition(theirs[..., 0], b) for b in trusted]
        return torch.cat([known, torch.stack([*_own(mine, theirs, beta, least, most), *alone], -1)], -1)

    def summary(each: Tensor) -> Tensor:
        return _summary(each, beta, betas, trusted)

    each = prompts(mine, theirs)
    centre = summary(each)
    if len(mine) < FEW_PROMPTS:
        values, units = resampled(
            lambda a, b: summary(prompts(a, b)), mine, theirs, generator=generator, within=True
        )
    else:
        values, units = resampled(summary, each, generator=generator)
    low, high = interval(values.nan_to_num(nan=-math.inf), units)
    n = mine[..., 0].numel() + theirs[..., 0].numel()
    found: dict[str, Any] = {
        name: Quantity(Estimate(centre[j].item(), low[j].item(), high[j].item(), n), values[:, j])
        for j, name in enumerate(_NAMES)
        if math.isfinite(centre[j].item())
    }
    tail = _tail(mine[..., 0], generator=generator)
    return Evidence(
        **found,
        **({} if tail is None else {"tail": tail}),
        beta=beta,
        num_prompts=len(policy.reward),
        num_draws=policy.reward.shape[1],
        needs=draws_needed(away_from_both.mean().item()),
    )


_RENAMED = {"frontier_efficiency": "efficiency", "lift": "bought"}
_OF_DRAWS = (
    "spread",
    "dropped",
    "flat",
    "never",
    "cut",
    "finished_and_cut",
    "cut_loss",
    "mismatch",
    "reward_gain",
    "audit_gain",
)
_KEPT = tuple(name for name in SUMMARY if name not in ("objective", "log_z", "room"))
_NAMES = (
    *(_RENAMED.get(name, name) for name in _KEPT),
    *(name for name in _OF_DRAWS if name != "finished_and_cut"),
    "ceiling",
    "wasted",
)


def _whole(whose: str, side: Side) -> Tensor:
    """[P, G, 6]: reward, log pi, log ref, finished, log q, audit; NaN where unknown."""
    first = stacked(whose, side.reward, side.log_pi, side.log_ref)
    rest = [
        torch.full_like(first[..., 0], math.nan) if x is None else x.detach().cpu().double()
        for x in (side.finished, side.log_q, side.audit)
    ]
    return torch.cat([first, torch.stack(rest, -1)], -1)


def _own(mine: Tensor, theirs: Tensor, beta: float, least: float, most: float) -> list[Tensor]:
    """What _OF_DRAWS names, of each prompt: [..., P, G1, 6], [..., P, G2, 6] -> [..., P] each."""
    r1, log_pi, _, finished, log_q, audit = mine.unbind(-1)
    r2, audit2 = theirs[..., 0], theirs[..., 5]
    r = torch.cat([r1, r2], -1)
    weights = shares(r / beta + mixture_weights(mine[..., :3], theirs[..., :3])[0])
    ratio = torch.cat([side[..., 1] - side[..., 2] for side in (mine, theirs)], -1)
    both = ((finished == 1).any(-1) & (finished == 0).any(-1)).double()
    loss = _mean_where(r1, finished == 1) - _mean_where(r1, finished == 0)
    return [
        _spread(r2),
        (weights * (ratio < RARE)).sum(-1),
        (r.amax(-1) == r.amin(-1)).double(),
        ((r2 == least).all(-1) & (most > least)).double(),
        1 - finished.mean(-1),
        both,
        torch.where(both > 0, loss, 0.0),
        (log_q - log_pi).mean(-1),
        r1.mean(-1) - r2.mean(-1),
        audit.mean(-1) - audit2.mean(-1),
    ]


def _spread(r: Tensor) -> Tensor:
    """Standard deviation of the rewards that are not forbidden, within each prompt."""
    finite = r > -math.inf
    count = finite.sum(-1)
    away = torch.where(finite, r - _mean_where(r, finite)[..., None], 0.0)
    return ((away**2).sum(-1) / (count - 1).clamp_min(1)).sqrt()


def _mean_where(r: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen, r, 0.0).sum(-1) / chosen.sum(-1).clamp_min(1)


def _summary(each: Tensor, beta: float, betas: list[float], trusted: list[float]) -> Tensor:
    """[..., P, K] -> [..., len(_NAMES)]."""
    means = each.mean(-2)
    n = len(MEANS) + 1 + len(betas)
    known = dict(zip(SUMMARY, summary_of_means(means[..., :n], beta, betas).unbind(-1), strict=True))
    own = dict(zip(_OF_DRAWS, means[..., n : n + len(_OF_DRAWS)].unbind(-1), strict=True))
    own["cut_loss"] = own["cut_loss"] / own.pop("finished_and_cut")  # over the prompts that show both
    log_z = means[..., n + len(_OF_DRAWS) :]
    nan = torch.full_like(means[..., 0], math.nan)
    ceiling = wasted = nan
    if trusted:
        slopes = torch.tensor(trusted, dtype=means.dtype)
        price = known["kl"].clamp_min(0.0)[..., None]
        ceiling = (slopes * (log_z + price)).amin(-1)
    slopes = torch.tensor(betas, dtype=means.dtype)
    # KL >= r / b - log Z(b) at every b: the least KL that earns a reward is the largest of these
    least = (known["reward"][..., None] / slopes - means[..., len(MEANS) + 1 : n]).amax(-1).clamp_min(0.0)
    wasted = known["kl"] - least
    known["lift"] = known["reference_reward"] + known["lift"]
    return torch.stack([*(known[name] for name in _KEPT), *own.values(), ceiling, wasted], -1)


def evidence_of_plan(
    reward: Tensor,
    *,
    beta: float,
    frontier: Sequence[FrontierPoint],
    finished: Tensor | None = None,
    generator: torch.Generator,
) -> Evidence:
    """What reference draws can say before any training.

    Args:
        reward: [P, G] of the reference's draws, the target's own.
        beta: reward per nat.
        frontier: of these rewards.
        finished: [P, G] whether a completion ended by itself.
        generator: draws the resamples.

    Example:
        >>> from klimb.numbers.frontier import frontier
        >>> g = torch.Generator().manual_seed(0)
        >>> r = torch.randn(64, 64, generator=g)
        >>> found = evidence_of_plan(r, beta=10.0, frontier=frontier(r, [10.0, 1.0], generator=g), generator=g)
        >>> print(found.lift_share.estimate.value < 0.2)
        True
    """
    r = reward.detach().cpu().double()
    r = r[(r > -math.inf).any(-1)]
    least, most = r.amin().item(), r.amax().item()
    reliable = [point.beta for point in frontier if point.reliable]
    strongest = min(reliable, default=None)

    def prompts(r: Tensor) -> Tensor:
        of_beta = [
            torch.full_like(r[..., 0], math.nan) if b is None else tilted_mean(r, b) - r.mean(-1)
            for b in (beta, strongest)
        ]
        alike = (r.amax(-1) == r.amin(-1)).double()
        none = ((r == least).all(-1) & (most > least)).double()
        return torch.stack([*of_beta, _spread(r), alike, none], -1)

    def summary(each: Tensor) -> Tensor:
        lift, best, spread, alike, none = each.mean(-2).unbind(-1)
        return torch.stack([lift, lift / best, spread, alike, none], -1)

    names = ("plan_lift", "lift_share", "spread", "flat", "never")
    few = len(r) < FEW_PROMPTS
    each = prompts(r)
    centre = summary(each)
    values, units = resampled(
        (lambda x: summary(prompts(x))) if few else summary,
        r if few else each,
        generator=generator,
        within=few,
    )
    low, high = interval(values.nan_to_num(nan=-math.inf), units)
    known: dict[str, Any] = {
        name: Quantity(Estimate(centre[j].item(), low[j].item(), high[j].item(), r.numel()), values[:, j])
        for j, name in enumerate(names)
        if not math.isnan(centre[j].item())
    }
    if finished is not None:
        known["cut"] = mean_of(1 - finished.double(), generator=generator)
    return Evidence(**known, beta=beta, frontier=tuple(frontier))


def mean_of(draws: Tensor, *, generator: torch.Generator) -> Quantity:
    """The mean over prompts of the mean over draws, [P, G]."""
    few = len(draws) < FEW_PROMPTS
    statistic = (lambda x: x.mean((-1, -2))) if few else (lambda x: x.mean(-1))
    values, units = resampled(
        statistic, draws.double() if few else draws.double().mean(-1), generator=generator, within=few
    )
    low, high = interval(values, units)
    return Quantity(Estimate(draws.double().mean().item(), low.item(), high.item(), draws.numel()), values)


def trend(
    pace: Tensor, value: Tensor, *, whole: float | None = None, generator: torch.Generator
) -> Quantity | None:
    """What as much training again would add to a value, by the straight line through the second half of it.

    slope of value against pace, over the second half of pace, times all of pace

    Pace is the sum of learning rates so far and not the step: a schedule that ends at zero has a flat end, whether or
    not there is more to gain. Gains fall as training goes on, so the line promises too much rather than too little.

    Args:
        pace: [S] rising.
        value: [S] of the steps with fresh draws.
        whole: pace of all of training; left out: the last one.
        generator: draws the resamples, of steps.

    Returns:
        None for fewer than 8 steps in that half, which show no trend.

    Example:
        >>> pace = torch.arange(1.0, 33.0)
        >>> g = torch.Generator().manual_seed(0)
        >>> print(trend(pace, 0.5 * pace, generator=g).estimate.value)
        16.0
    """
    pace, value = pace.double(), value.double()
    whole = pace.max().item() if whole is None else whole
    late = pace > whole / 2
    if int(late.sum()) < FEW_STEPS:
        return None
    points = torch.stack([pace[late], value[late]], -1)

    def slope(points: Tensor) -> Tensor:
        x, y = (points - points.mean(-2, keepdim=True)).unbind(-1)
        return (x * y).sum(-1) / (x**2).sum(-1) * whole

    values, units = resampled(slope, points, generator=generator, within=False)
    low, high = interval(values.nan_to_num(nan=-math.inf), units)
    return Quantity(Estimate(slope(points).item(), low.item(), high.item(), len(points)), values)


def _tail(reward: Tensor, *, generator: torch.Generator, share: float = 0.05) -> Quantity | None:
    """Hill's index of how far the best rewards lie above their prompt's median: mean log excess over the cutoff."""
    above = (reward - reward.median(-1, keepdim=True).values).clamp_min(0.0).nan_to_num(0.0)
    count = max(int(share * above.numel()), 5)
    if above.numel() < 4 * count or len(above) < FEW_PROMPTS:
        return None

    def hill(x: Tensor) -> Tensor:
        top = x.flatten(-2).topk(count + 1).values
        return (top[..., :-1].log() - top[..., -1:].log()).mean(-1)

    centre = hill(above).item()
    if not math.isfinite(centre):
        return None  # hardly a reward above its median: no tail
    values, units = resampled(hill, above, generator=generator, within=False, num_resamples=RESAMPLES)
    low, high = interval(values.nan_to_num(nan=-math.inf), units)
    return Quantity(Estimate(centre, low.item(), high.item(), reward.numel()), values)
