"""The chart of the frontier: what was predicted, how far it is trusted, and what was reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from types import ModuleType
from typing import Any

import numpy as np

from klimb.numbers.estimate import Estimate
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
from klimb.report.found import (
    Found,
    Point,
    as_number,
    as_point,
    chosen_beta,
    frontier,
    predicted,
    reference_reward,
)
from klimb.report.reached import ceiling_rows, ellipse_rows, trajectory_rows
from klimb.report.words import short

MAX_POINTS = 300
"""of the line; more are thinned, a screen has not more to show"""


def frontier_chart(found: Found) -> Spec | None:
    """Reward against KL in nats: predicted frontier, reference, best-of-n, best policy, trained policy."""
    points = [p for p in frontier(found) if math.isfinite(p.reward.low) and math.isfinite(p.reward.high)]
    points = thinned(points, MAX_POINTS)
    marks = _marks(found)
    if not points and not marks:
        return None
    alt = altair_module()
    x, y = plane(alt)
    layers = []
    curve = _curve(points)
    if curve:
        layers += _band(alt, curve, x, y)
        hatch = _hatch(points)
        if hatch:
            layers.append(
                chart_of(alt, hatch)
                .mark_rule(stroke="var(--accent)", strokeWidth=1, opacity=0.45)
                .encode(x=x, y=y, x2="kl2:Q", y2="reward2:Q")
            )
        layers.append(
            chart_of(alt, curve)
            .mark_line(stroke="var(--accent)", strokeWidth=2.5)
            .encode(
                x=x,
                y=y,
                detail="piece:N",
                strokeDash=alt.condition("datum.trusted", alt.value([1, 0]), alt.value([6, 4])),
            )
        )
        layers.append(
            chart_of(alt, curve)
            .mark_point(opacity=0, size=160)
            .encode(x=x, y=y, tooltip=tooltip(alt, "beta", "reward_text", "kl_text", "trust"))
        )
        if hatch:
            last = max((row for row in curve if not row["trusted"]), key=lambda row: row["kl"])
            layers.append(
                chart_of(alt, [last])
                .mark_text(align="right", fontStyle="italic", fill="var(--muted)")
                .encode(x=x, y=alt.value(HEIGHT - 10), text=alt.value("hatched: not trusted, too few draws"))
            )
    layers += _reached(alt, found, points, x, y)
    if marks:
        kinds = list(dict.fromkeys(mark["what"] for mark in marks))
        look = [LOOKS[mark["kind"]] for mark in {m["what"]: m for m in marks}.values()]
        colour = alt.Color(
            "what:N", title=None, scale=alt.Scale(domain=kinds, range=[colour for colour, _ in look])
        )
        shape = alt.Shape(
            "what:N", title=None, scale=alt.Scale(domain=kinds, range=[shape for _, shape in look])
        )
        bars = chart_of(alt, marks)
        layers += [
            bars.mark_rule(strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour),
            bars.mark_rule(strokeWidth=1.5).encode(x=alt.X("kl_low:Q"), x2="kl_high:Q", y=y, color=colour),
            bars.mark_point(filled=True, size=90, opacity=1, stroke="var(--paper)", strokeWidth=1).encode(
                x=x, y=y, color=colour, shape=shape, tooltip=tooltip(alt, "name", "reward_text", "kl_text")
            ),
            bars.mark_text(align="left", dx=8, dy=11, fill="var(--muted)").encode(x=x, y=y, text="label:N"),
        ]
    here = predicted(found) or _nearest(found, points) if curve else None
    if here is not None:
        layers.append(
            alt.Chart(alt.NamedData("here"))
            .mark_point(shape="circle", stroke="var(--ink)", strokeWidth=2.5, size=260, filled=False)
            .encode(x=x, y=y, tooltip=tooltip(alt, "beta", "reward_text", "kl_text"))
        )
    spec = finished(
        alt.layer(*layers),
        HEIGHT,
        "The predicted frontier of reward against KL in nats, with what was reached; the same in numbers below.",
    )
    if here is not None:
        spec["datasets"]["here"] = [{**placed(here), "beta": short(here.beta)}]
    return spec


def _reached(alt: ModuleType, found: Found, points: Sequence[Point], x: Any, y: Any) -> list[Any]:
    """The ceiling, dotted; the way of training, thin with small points; the policy's ellipse."""
    layers = []
    policy = as_point(found.measurement)
    far = max([p.kl.value for p in points] + ([policy.kl.value] if policy is not None else []), default=0.0)
    ceiling = ceiling_rows(points, far)
    if ceiling:
        layers.append(
            chart_of(alt, ceiling)
            .mark_line(stroke="var(--muted)", strokeWidth=1.5, strokeDash=[2, 3], clip=True)
            .encode(x=x, y=y)
        )
    way = trajectory_rows(found)
    if way:
        base = chart_of(alt, way)
        layers += [
            base.mark_line(stroke="var(--red)", strokeWidth=1, opacity=0.6).encode(x=x, y=y, order="place:Q"),
            base.mark_point(fill="var(--red)", strokeWidth=0, size=22, opacity=0.7).encode(
                x=x, y=y, tooltip=tooltip(alt, "steps", "reward_text", "kl_text")
            ),
        ]
    ellipse = ellipse_rows(found, policy) if policy is not None else []
    if ellipse:
        layers.append(
            chart_of(alt, ellipse)
            .mark_line(stroke="var(--red)", strokeWidth=1.5, fill="var(--red)", fillOpacity=0.1)
            .encode(x=x, y=y, order="place:Q")
        )
    return layers


LOOKS = {
    "reference": ("var(--ink)", "square"),
    "best of n": ("var(--violet)", "triangle-up"),
    "predicted": ("var(--accent)", "diamond"),
    "optimum": ("var(--green)", "diamond"),
    "policy": ("var(--red)", "circle"),
}
"""kind of a mark -> its colour and shape"""


def _marks(found: Found) -> list[dict[str, Any]]:
    beta, _ = chosen_beta(found)
    of_beta = f" at beta {short(beta)}" if beta else ""
    marks = []
    reference = reference_reward(found)
    if reference is not None:
        marks.append(_mark("reference", "reference", Point(reference, Estimate(0.0, 0.0, 0.0, reference.n))))
    for record in found.plan.get("best_of_n") or ():
        point, n = as_point(record), as_number(record.get("n"))
        if point is not None and n is not None and n > 1:  # best of one is the reference
            marks.append(
                _mark("best of n", "best of n", point, name=f"best of {n:.0f}", label=f"n = {n:.0f}")
            )
    best = predicted(found)
    if best is not None:
        marks.append(_mark("predicted", f"best policy{of_beta}, predicted", best))
    optimum, policy = as_point(found.measurement.get("optimum")), as_point(found.measurement)
    if optimum is not None:
        marks.append(_mark("optimum", f"best policy{of_beta}, held-out prompts", optimum))
    if policy is not None:
        marks.append(_mark("policy", "trained policy, held-out prompts", policy))
    return marks


def _mark(kind: str, what: str, point: Point, *, name: str = "", label: str = "") -> dict[str, Any]:
    return {"kind": kind, "what": what, "name": name or what, "label": label, **crossed(point)}


def _curve(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Rows of the frontier in pieces; what lies between two points is trusted only if both are."""
    rows = []
    between = groupby(pairwise(points), key=lambda pair: pair[0].reliable and pair[1].reliable)
    for piece, (trusted, pairs) in enumerate(between):
        ends = list(pairs)
        for point in [ends[0][0], *(after for _, after in ends)]:
            rows.append(
                {
                    "piece": piece,
                    "trusted": trusted,
                    "trust": "trusted" if trusted else "not trusted: too few draws",
                    "beta": short(point.beta),
                    **placed(point),
                }
            )
    return rows


def _band(alt: ModuleType, curve: Sequence[dict[str, Any]], x: Any, y: Any) -> list[Any]:
    return [
        chart_of(alt, [row for row in curve if row["trusted"] == trusted])
        .mark_area(fill="var(--accent)", fillOpacity=opacity)
        .encode(x=x, y=alt.Y("low:Q"), y2="high:Q", detail="piece:N")
        for trusted, opacity in ((True, 0.18), (False, 0.06))
        if any(row["trusted"] == trusted for row in curve)
    ]


def _nearest(found: Found, points: Sequence[Point]) -> Point:
    """The point of the grid nearest to the run's beta, where that lies outside of it."""
    beta, _ = chosen_beta(found)
    return min(points, key=lambda p: abs(math.log((p.beta or 1.0) / (beta or 1.0))))


def _hatch(points: Sequence[Point], strokes: int = 60) -> list[dict[str, float]]:
    """Slanted strokes from the lower to the upper edge of the band, where it is not trusted."""
    if len(points) < 2:
        return []
    kl = np.array([p.kl.value for p in points])
    low, high = (np.array([getattr(p.reward, end) for p in points]) for end in ("low", "high"))
    step = (kl[-1] - kl[0]) / strokes
    doubted = [(a.kl.value, b.kl.value) for a, b in pairwise(points) if not (a.reliable and b.reliable)]
    return [
        {
            "kl": float(x),
            "reward": float(np.interp(x, kl, low)),
            "kl2": float(x + step),
            "reward2": float(np.interp(x + step, kl, high)),
        }
        for x in np.arange(kl[0], kl[-1] - step / 2, step)
        if any(a <= x and x + step <= b for a, b in _joined(doubted))
    ]


def _joined(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
