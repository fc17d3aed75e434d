"""Several runs on one frontier: the line that all could reach, each policy with its intervals, and how it came there."""

from __future__ import annotations

import math
from typing import Any

from klimb.report.chart import (
    HEIGHT,
    Spec,
    altair_module,
    chart_of,
    crossed,
    finished,
    placed,
    plane,
    thinned,
    tooltip,
)
from klimb.report.compared import Comparison
from klimb.report.found import Found, Point, as_point, frontier, reference_reward
from klimb.report.reached import steps_told
from klimb.report.words import short

COLOURS = ("var(--red)", "var(--accent)", "var(--green)", "var(--violet)", "var(--warn)", "var(--ink)")
SHAPES = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross")
MAX_POINTS = 120
"""of a line"""


def overlay_chart(compared: Comparison) -> Spec:
    """Reward against KL in nats: the first predicted frontier there is, and every run's policy and its way."""
    alt = altair_module()
    x, y = plane(alt)
    names = [side.name for side in compared.sides]
    look = {
        "color": alt.Color(
            "run:N",
            title=None,
            scale=alt.Scale(domain=names, range=[COLOURS[i % len(COLOURS)] for i in range(len(names))]),
        ),
        "shape": alt.Shape(
            "run:N",
            title=None,
            scale=alt.Scale(domain=names, range=[SHAPES[i % len(SHAPES)] for i in range(len(names))]),
        ),
    }
    layers: list[Any] = []
    curve = next((rows for side in compared.sides if (rows := _curve(side.found))), [])
    if curve:
        layers += [
            chart_of(alt, curve)
            .mark_area(fill="var(--muted)", fillOpacity=0.15)
            .encode(x=x, y=alt.Y("low:Q"), y2="high:Q"),
            chart_of(alt, curve).mark_line(stroke="var(--muted)", strokeWidth=2).encode(x=x, y=y),
            chart_of(alt, curve)
            .mark_point(opacity=0, size=160)
            .encode(x=x, y=y, tooltip=tooltip(alt, "name", "beta", "reward_text", "kl_text")),
        ]
    way = [row for side in compared.sides for row in _way(side.name, side.found)]
    if way:
        layers.append(
            chart_of(alt, way)
            .mark_line(strokeWidth=1, opacity=0.45)
            .encode(x=x, y=y, color=look["color"], order="step:Q", detail="run:N")
        )
    marks = [_mark(side.name, side.found) for side in compared.sides]
    bars = chart_of(alt, marks)
    layers += [
        bars.mark_rule(strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=look["color"]),
        bars.mark_rule(strokeWidth=1.5).encode(x=alt.X("kl_low:Q"), x2="kl_high:Q", y=y, color=look["color"]),
        bars.mark_point(filled=True, size=110, opacity=1, stroke="var(--paper)", strokeWidth=1).encode(
            x=x, y=y, **look, tooltip=tooltip(alt, "name", "reward_text", "kl_text")
        ),
    ]
    start = next((e for side in compared.sides if (e := reference_reward(side.found)) is not None), None)
    if start is not None:
        layers.append(
            chart_of(alt, [{"kl": 0.0, "reward": start.value, "label": "reference"}])
            .mark_text(align="left", dx=6, dy=22, fill="var(--muted)")
            .encode(x=x, y=y, text="label:N")
        )
    return finished(
        alt.layer(*layers),
        HEIGHT,
        "Reward against KL in nats: the predicted frontier, and each run's policy with its intervals; the same in numbers below.",
    )


def _curve(found: Found) -> list[dict[str, Any]]:
    """The trusted part of the frontier."""
    points = [p for p in frontier(found) if p.reliable and math.isfinite(p.reward.low)]
    return [
        {"name": "best policy, predicted", "beta": short(p.beta), **placed(p)}
        for p in thinned(points, MAX_POINTS)
    ]


def _way(name: str, found: Found) -> list[dict[str, Any]]:
    """Where the fresh draws of each step were; smoothed over five steps, a step has few draws."""
    told = steps_told(found)
    rows = []
    for i in range(len(told)):
        near = told[max(0, i - 2) : i + 3]
        kl, reward = (sum(row[j] for row in near) / len(near) for j in (1, 2))
        rows.append({"run": name, "step": told[i][0], "kl": max(kl, 0.0), "reward": reward})
    return thinned(rows, MAX_POINTS)


def _mark(name: str, found: Found) -> dict[str, Any]:
    point = as_point(found.measurement)
    assert isinstance(point, Point)  # it was compared
    return {"run": name, "name": f"{name}, held-out prompts", **crossed(point)}
