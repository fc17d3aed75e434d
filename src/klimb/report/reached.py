"""What the frontier is compared with: the ceiling on any policy, the way that training took, the policy's error ellipse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from klimb.report.found import Found, Point, of_step
from klimb.report.words import short
from klimb.store import read_draws

STRETCHES = 8
CHI2 = 5.991
"""95 % quantile of chi-squared with two degrees of freedom: -2 log 0.05"""


def ceiling_rows(points: Sequence[Point], most: float, num: int = 60) -> list[dict[str, float]]:
    """Upper end of the ceiling on E[r] at a KL: min over the plan's betas of beta (log Z + KL), with log Z's upper end.

    Every beta bounds every policy (Donsker and Varadhan, 1975), so that a grid of them does; the frontier touches it.

    Args:
        points: of the frontier, with log Z.
        most: nats, the largest KL.
        num: of KLs.

    Example:
        >>> from klimb.numbers.estimate import Estimate
        >>> e = Estimate(0.0, 0.0, 0.5, 8)
        >>> ceiling_rows([Point(e, e, beta=2.0, log_z=e)], 1.0, num=2)
        [{'kl': 0.0, 'reward': 1.0}, {'kl': 1.0, 'reward': 3.0}]
    """
    known = [(p.beta, p.log_z.high) for p in points if p.beta and p.log_z and math.isfinite(p.log_z.high)]
    if not known:
        return []
    beta, log_z = np.array(known).T
    return [
        {"kl": float(kl), "reward": float((beta * (log_z + kl)).min())} for kl in np.linspace(0.0, most, num)
    ]


def steps_told(found: Found) -> list[tuple[Any, float, float]]:
    """Number, KL and reward of each step that drew."""
    steps = [(r.get("step"), of_step(r, "kl"), of_step(r, "reward")) for r in found.steps]
    return [
        (step, kl.value, reward.value) for step, kl, reward in steps if kl is not None and reward is not None
    ]


def trajectory_rows(found: Found, stretches: int = STRETCHES) -> list[dict[str, Any]]:
    """Where training went: means of the fresh draws' reward and KL over at most so many stretches of steps."""
    known = steps_told(found)
    if len(known) < 2:
        return []
    rows = []
    for place, part in enumerate(np.array_split(np.array(known, dtype=float), min(stretches, len(known)))):
        kl, reward = part[:, 1].mean(), part[:, 2].mean()
        rows.append(
            {
                "place": place,
                "steps": f"{part[0, 0]:.0f} to {part[-1, 0]:.0f}",
                "kl": float(max(kl, 0.0)),
                "reward": float(reward),
                "reward_text": short(float(reward)),
                "kl_text": f"{short(float(kl))} nats",
            }
        )
    return rows


def ellipse_rows(found: Found, policy: Point, num: int = 61) -> list[dict[str, float]]:
    """The 95 % ellipse of the policy's reward and KL around where it was measured; nothing without its draws.

    The covariance is that of means over prompts, cov / P: what resampling prompts tends to, without its noise.
    """
    own = [path for path in found.draws if path.stem in ("measure", "measure-policy")]
    if not own:
        return []
    stored = read_draws(own[0])
    if stored.reward is None or stored.log_pi is None or stored.log_ref is None or len(stored.reward) < 8:
        return []
    means = np.stack(
        [(stored.log_pi - stored.log_ref).double().mean(1).numpy(), stored.reward.double().mean(1).numpy()]
    )
    if not np.isfinite(means).all():
        return []
    root = np.linalg.cholesky(np.cov(means) / means.shape[1] + 1e-15 * np.eye(2))
    angle = np.linspace(0, 2 * math.pi, num)
    x, y = math.sqrt(CHI2) * root @ np.stack([np.cos(angle), np.sin(angle)])
    return [
        {"place": i, "kl": float(policy.kl.value + x[i]), "reward": float(policy.reward.value + y[i])}
        for i in range(num)
    ]
