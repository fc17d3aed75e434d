"""What to type next: the command of a run that is this one with something changed."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from klimb.numbers.evidence import Evidence
from klimb.numbers.frontier import FrontierPoint


@dataclass(frozen=True)
class Setting:
    """What a command line needs to know of a run.

    Attributes:
        run: its directory, as it was named.
        config: its resolved configuration.
        planned: whether its plan's draws are there.
        trained: whether its policy is there.
        rewarded: whether a reward says what is good.
    """

    run: str
    config: Mapping[str, Any] = field(default_factory=dict)
    planned: bool = True
    trained: bool = True
    rewarded: bool = True


def again(s: Setting, word: str, **options: object) -> str:
    """The command that does a run again with other options, on the same plan unless a new one is asked for.

    Example:
        >>> again(Setting("runs/a"), "b", learning_rate=1e-3)
        'klimb climb -c runs/a/config.yaml --plan runs/a --output_dir runs/a-b --learning_rate 0.001'
    """
    given: dict[str, object] = {"plan": s.run} if s.planned else {}
    given |= {"output_dir": f"{s.run}-{word}", **options}
    words = ["klimb", "climb", "-c", f"{s.run}/config.yaml"]
    for name, value in given.items():
        said = "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        words += [f"--{name}", said]
    return shlex.join(words)


def times(s: Setting, name: str, factor: float) -> float | int:
    """An option of the run times a factor; a whole number stays one."""
    value = s.config.get(name) or 1
    return math.ceil(factor * value) if isinstance(value, int) else factor * value


def covering(e: Evidence, s: Setting) -> str:
    """With likelihood, which covers what the target has."""
    return again(s, "covering", method="forward_kl", num_replay=0, replay_steps=0)


def larger(e: Evidence, s: Setting) -> str:
    """With more weights that move."""
    family = s.config.get("family") or {}
    if family.get("layers"):
        return again(s, "larger", **{"family.layers": None})
    if family.get("kind") == "lora":
        return again(s, "larger", **{"family.r": 4 * family["r"], "family.alpha": 4.0 * family["alpha"]})
    if family.get("kind") == "soft_prompt":
        tokens = 2 * family["num_virtual_tokens"]
        return again(s, "larger", **{"family.num_virtual_tokens": tokens})
    return ""  # every weight moves already: only another model is larger


def lower_beta(e: Evidence) -> str:
    """The betas of the plan at which p earns a half, three quarters and all of what the plan can predict, in words."""
    points = [_earning(e, share) for share in (0.5, 0.75, 1.0)]
    told = [
        f"beta {point.beta:.3g} would earn {point.reward} at KL {point.kl} nats"
        for point in points
        if point is not None
    ]
    return f"Lower beta: by the plan, {'; '.join(dict.fromkeys(told))}." if told else "Lower beta."


def half_way(e: Evidence, s: Setting) -> str:
    """At the largest beta that earns three quarters of what is in the plan's reach."""
    point = _earning(e, 0.75)
    return "" if point is None else again(s, "lower-beta", beta=point.beta)


def _earning(e: Evidence, share: float) -> FrontierPoint | None:
    """The point of largest beta that the plan trusts and that earns this share of what is in its reach."""
    points = sorted((p for p in e.frontier if p.reliable), key=lambda p: -p.beta)
    if not points or e.plan_lift is None or e.lift_share is None:
        return None
    best = e.plan_lift.estimate.value / e.lift_share.estimate.value
    start = points[-1].reward.value - best
    return next((p for p in points if p.reward.value - start >= share * best - 1e-9), points[-1])
