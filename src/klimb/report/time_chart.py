"""The chart of the time: seconds of each step, by what they were spent on."""

from __future__ import annotations

import math

from klimb.report.chart import Spec, altair_module, chart_of, finished, tooltip
from klimb.report.found import Found, as_number

MAX_BARS = 100


def seconds_spent(found: Found) -> dict[str, float]:
    """Seconds of each part over all steps, the longest first."""
    total: dict[str, float] = {}
    for record in found.steps:
        for part, seconds in (record.get("seconds") or {}).items():
            total[part] = total.get(part, 0.0) + (as_number(seconds) or 0.0)
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def time_chart(found: Found) -> Spec | None:
    """Seconds a step, by what they were spent on; long runs as means over stretches of steps."""
    parts = list(seconds_spent(found))
    if not parts:
        return None
    alt = altair_module()
    size = max(math.ceil(len(found.steps) / MAX_BARS), 1)
    stretches = [found.steps[start : start + size] for start in range(0, len(found.steps), size)]
    rows = [
        {
            "steps": f"{first:,.0f}"
            if len(stretch) == 1
            else f"{first:,.0f} to {first + len(stretch) - 1:,.0f}",
            "place": place,
            "part": part,
            "rank": parts.index(part),
            "seconds": sum(as_number((r.get("seconds") or {}).get(part)) or 0.0 for r in stretch)
            / len(stretch),
        }
        for place, stretch in enumerate(stretches)
        for first in [as_number(stretch[0].get("step")) or 0.0]
        for part in parts
    ]
    colours = ["var(--accent)", "var(--violet)", "var(--green)", "var(--red)", "var(--muted)"]
    first = as_number(found.steps[0].get("step")) or 0
    chart = (
        chart_of(alt, rows)
        .mark_bar(stroke="var(--paper)", strokeWidth=0.5)
        .encode(
            x=alt.X(
                "place:O",
                title="step",
                axis=alt.Axis(
                    labelExpr=f"format(datum.value * {size} + {first}, ',d')",
                    labelOverlap="greedy",
                    labelSeparation=12,
                    labelAngle=0,
                    ticks=False,
                ),
            ),
            y=alt.Y("seconds:Q", title="seconds a step", stack=True),
            color=alt.Color(
                "part:N",
                title=None,
                sort=parts,
                scale=alt.Scale(domain=parts, range=[colours[i % len(colours)] for i in range(len(parts))]),
            ),
            order=alt.Order("rank:Q"),  # as in the legend
            tooltip=tooltip(alt, "steps", "part", "seconds"),
        )
    )
    return finished(
        chart, 220, "Seconds of each training step, by what they were spent on; the sums stand above."
    )
