"""Why a policy is where it is, in one verdict, because of numbers whose intervals separate, with one piece of advice.

The order matters: first what makes every other reading void, then what is good news, then what went wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from klimb.numbers.certificate import DROPPED, NO_ROOM, Certificate
from klimb.numbers.estimate import Estimate
from klimb.numbers.frontier import FrontierPoint

CLOSE = 0.8
"""share attained, or efficiency on the frontier, from which nothing is left to repair"""


@dataclass(frozen=True)
class Diagnosis:
    """A verdict, the numbers behind it, and what to do."""

    verdict: str
    because: str
    advice: str


def diagnose(certificate: Certificate, frontier: Sequence[FrontierPoint] = ()) -> Diagnosis:
    """Name the reason why a policy is not better; every verdict needs intervals that separate.

    Verdicts: "overshoot: impossible", "reward flat", "beta too high", "close to the best", "KL wasted", "undertrained",
    "cannot tell". With r, k of the policy, R(b), K(b) of the target at b, and E the efficiency at k:

    - overshoot: r is above what any policy earns at k by the plan's frontier: a bug.
    - reward flat: most prompts show one reward only, or no beta of the frontier earns more than the reference.
    - close to the best: attained >= 0.8; and beta too high if the frontier at beta / 2 or less earns clearly more.
    - KL wasted: k is not below K(beta) and E is below 0.8.
    - undertrained: k < K(beta), r < R(beta) and a gap is left.

    Args:
        certificate: of the policy.
        frontier: from the plan; without it "overshoot" and "beta too high" are not looked for.

    Returns:
        A Diagnosis.

    Example:
        >>> import torch
        >>> from klimb.numbers.certificate import certificate
        >>> g = torch.Generator().manual_seed(0)
        >>> r, zero = torch.randn(32, 64, generator=g), torch.zeros(32, 64)
        >>> c = certificate(beta=1.0, reward_policy=r, log_pi_policy=zero, log_ref_policy=zero, reward_reference=r,
        ...                 log_pi_reference=zero, log_ref_reference=zero, generator=g)
        >>> diagnose(c).verdict  # the policy is the reference
        'undertrained'
    """
    c = certificate
    efficiency, attained = c.frontier_efficiency, c.attained
    if c.reward.low > (ceiling := _ceiling(c, frontier)):
        return Diagnosis(
            "overshoot: impossible",
            f"reward {c.reward} at KL {c.kl} nats; no policy earns more than {ceiling:.3g} there",
            "Look for a bug: sampler and scorer that disagree, a reward that leaks, a KL that is counted short.",
        )
    if flat := _flat(c, frontier):
        return Diagnosis(
            "reward flat", flat, "Change the reward, the prompts or the sampler: no training can help."
        )
    if not (math.isfinite(attained.value) and math.isfinite(c.gap.value)):
        return Diagnosis(
            "cannot tell",
            f"attained {attained} and gap {c.gap} are not finite: forbidden outcomes (reward -inf) were drawn",
            "Measure with a reward that is finite, or train with forward_kl until none of them is drawn.",
        )
    if not attained.reliable:
        reason = next(w for w in attained.warnings if "unreliable" in w)
        return Diagnosis(
            "cannot tell",
            reason.removeprefix("unreliable: "),
            f"Draw at least {c.needs} completions a prompt (both pools together), more if the reason says so.",
        )
    if attained.low >= CLOSE:
        better = [p for p in frontier if p.beta <= 0.55 * c.beta and p.reliable]
        worth = 0.1 * (c.optimum_reward.value - c.reference_reward.value)
        better = [p for p in better if p.reward.low > c.optimum_reward.high + worth]
        if better:
            point = max(better, key=lambda p: p.beta)
            gain = point.reward.value - c.reward.value
            return Diagnosis(
                "beta too high",
                f"attained {attained} at beta {c.beta:.3g}, but beta {point.beta:.3g} earns {point.reward} "
                f"at KL {point.kl} nats",
                f"Lower beta to {point.beta:.3g}: the predicted gain in reward is {gain:.3g}.",
            )
        return Diagnosis(
            "close to the best",
            f"attained {attained}, gap {c.gap}",
            "Stop here, or lower beta to climb further.",
        )
    dropped = f"; {DROPPED}" if DROPPED in c.warnings else ""
    if efficiency.reliable and efficiency.high < CLOSE and c.kl.high >= c.optimum_kl.low:
        return Diagnosis(
            "KL wasted",
            f"KL {c.kl} nats (the best policy spends {c.optimum_kl}) buys {efficiency} of what it could{dropped}",
            "Check the KL gradient and that sampler and scorer agree; lower the learning rate.",
        )
    if c.kl.high < c.optimum_kl.low and c.reward.high < c.optimum_reward.low and c.gap.low > 0:
        return Diagnosis(
            "undertrained",
            f"KL {c.kl} nats and reward {c.reward} are both below the best policy's, {c.optimum_kl} nats and "
            f"{c.optimum_reward}; gap {c.gap}{dropped}",
            "Train longer or with a larger learning rate; if the gap stays, the family may be too small.",
        )
    more = _more_draws(attained)
    return Diagnosis(
        "cannot tell",
        f"attained {attained}, efficiency {efficiency}, KL {c.kl} of {c.optimum_kl} nats: "
        f"no reason separates from the others{dropped}",
        f"Measure with about {more} more draws, on more prompts.",
    )


def _ceiling(c: Certificate, frontier: Sequence[FrontierPoint]) -> float:
    """The upper end of what any policy can earn at the policy's KL: beta (log Z + KL) for every beta.

    From the plan's frontier alone: the certificate's own log Z rests on the policy's log-probabilities, which are
    what is in doubt here.
    """
    bounds = [p.beta * (p.log_z.high + max(c.kl.high, 0.0)) for p in frontier if p.reliable]
    return min(bounds, default=math.inf)


def _flat(c: Certificate, frontier: Sequence[FrontierPoint]) -> str:
    if c.flat > 0.5:
        return f"{c.flat:.0%} of the prompts give every draw the same reward"
    # the certificate's own gain is paired over prompts, so easy and hard prompts do not blur it
    if NO_ROOM not in " ".join(c.attained.warnings):
        return ""
    if frontier and all(p.reliable and p.reward.low <= c.reference_reward.high for p in frontier):
        best = max(frontier, key=lambda p: p.reward.value)
        return f"no beta earns more than the reference's {c.reference_reward}: the frontier ends at {best.reward}"
    return ""


def _more_draws(attained: Estimate) -> int:
    """Draws to add until the interval, which shrinks as 1 / sqrt(n), would leave out CLOSE (at most a hundredfold)."""
    distance = max(abs(attained.value - CLOSE), 1e-12)
    factor = ((attained.high - attained.low) / 2 / distance) ** 2
    return math.ceil(attained.n * min(max(factor - 1, 1.0), 100.0))
