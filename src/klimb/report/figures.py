"""The charts of the report as Vega-Lite specifications, each with a sentence that says what it shows.

Colours are CSS variables of the page, so that light, dark and paper need one drawing. What is not trusted is hatched
and dashed, what is of one kind has one shape: nothing is told by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from types import ModuleType
from typing import Any

import numpy as np

from klimb.numbers.estimate import Estimate
from klimb.report.found import (
    Found,
    Point,
    as_number,
    as_point,
    chosen_beta,
    evaluation,
    frontier,
    of_step,
    predicted,
    reference_reward,
)
from klimb.report.reached import ceiling_rows, ellipse_rows, trajectory_rows
from klimb.report.words import both, short

Spec = dict[str, Any]

MAX_POINTS = 300
"""of a line; more are thinned, a screen has not more to show"""
MAX_BARS = 100
HEIGHT = 400


def frontier_chart(found: Found) -> Spec | None:
    """Reward against KL in nats: predicted frontier, reference, best-of-n, best policy, trained policy."""
    points = [p for p in frontier(found) if math.isfinite(p.reward.low) and math.isfinite(p.reward.high)]
    points = _thinned(points, MAX_POINTS)
    marks = _marks(found)
    if not points and not marks:
        return None
    alt = _altair()
    x = alt.X("kl:Q", title="KL(policy ‖ reference), nats", scale=alt.Scale(nice=False, domainMin=0))
    y = alt.Y("reward:Q", title="E[reward]", scale=alt.Scale(zero=False))
    layers = []
    curve = _curve(points)
    if curve:
        layers += _band(alt, curve, x, y)
        hatch = _hatch(points)
        if hatch:
            layers.append(
                _chart(alt, hatch)
                .mark_rule(stroke="var(--accent)", strokeWidth=1, opacity=0.45)
                .encode(x=x, y=y, x2="kl2:Q", y2="reward2:Q")
            )
        layers.append(
            _chart(alt, curve)
            .mark_line(stroke="var(--accent)", strokeWidth=2.5)
            .encode(
                x=x,
                y=y,
                detail="piece:N",
                strokeDash=alt.condition("datum.trusted", alt.value([1, 0]), alt.value([6, 4])),
            )
        )
        layers.append(
            _chart(alt, curve)
            .mark_point(opacity=0, size=160)
            .encode(x=x, y=y, tooltip=_tooltip(alt, "beta", "reward_text", "kl_text", "trust"))
        )
        if hatch:
            last = max((row for row in curve if not row["trusted"]), key=lambda row: row["kl"])
            layers.append(
                _chart(alt, [last])
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
        bars = _chart(alt, marks)
        layers += [
            bars.mark_rule(strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour),
            bars.mark_rule(strokeWidth=1.5).encode(x=alt.X("kl_low:Q"), x2="kl_high:Q", y=y, color=colour),
            bars.mark_point(filled=True, size=90, opacity=1, stroke="var(--paper)", strokeWidth=1).encode(
                x=x, y=y, color=colour, shape=shape, tooltip=_tooltip(alt, "name", "reward_text", "kl_text")
            ),
            bars.mark_text(align="left", dx=8, dy=11, fill="var(--muted)").encode(x=x, y=y, text="label:N"),
        ]
    here = predicted(found) or _nearest(found, points) if curve else None
    if here is not None:
        layers.append(
            alt.Chart(alt.NamedData("here"))
            .mark_point(shape="circle", stroke="var(--ink)", strokeWidth=2.5, size=260, filled=False)
            .encode(x=x, y=y, tooltip=_tooltip(alt, "beta", "reward_text", "kl_text"))
        )
    spec = _finished(
        alt.layer(*layers),
        HEIGHT,
        "The predicted frontier of reward against KL in nats, with what was reached; the same in numbers below.",
    )
    if here is not None:
        spec["datasets"]["here"] = [
            {
                "kl": here.kl.value,
                "reward": here.reward.value,
                "beta": short(here.beta),
                "reward_text": both(here.reward),
                "kl_text": f"{both(here.kl)} nats",
            }
        ]
    return spec


def _reached(alt: ModuleType, found: Found, points: Sequence[Point], x: Any, y: Any) -> list[Any]:
    """The ceiling, dotted; the way of training, thin with small points; the policy's ellipse."""
    layers = []
    policy = as_point(found.measurement)
    far = max([p.kl.value for p in points] + ([policy.kl.value] if policy is not None else []), default=0.0)
    ceiling = ceiling_rows(points, far)
    if ceiling:
        layers.append(
            _chart(alt, ceiling)
            .mark_line(stroke="var(--muted)", strokeWidth=1.5, strokeDash=[2, 3], clip=True)
            .encode(x=x, y=y)
        )
    way = trajectory_rows(found)
    if way:
        base = _chart(alt, way)
        layers += [
            base.mark_line(stroke="var(--red)", strokeWidth=1, opacity=0.6).encode(x=x, y=y, order="place:Q"),
            base.mark_point(fill="var(--red)", strokeWidth=0, size=22, opacity=0.7).encode(
                x=x, y=y, tooltip=_tooltip(alt, "steps", "reward_text", "kl_text")
            ),
        ]
    ellipse = ellipse_rows(found, policy) if policy is not None else []
    if ellipse:
        layers.append(
            _chart(alt, ellipse)
            .mark_line(stroke="var(--red)", strokeWidth=1.5, fill="var(--red)", fillOpacity=0.1)
            .encode(x=x, y=y, order="place:Q")
        )
    return layers


# colour and shape of each kind of mark
LOOKS = {
    "reference": ("var(--ink)", "square"),
    "best of n": ("var(--violet)", "triangle-up"),
    "predicted": ("var(--accent)", "diamond"),
    "optimum": ("var(--green)", "diamond"),
    "policy": ("var(--red)", "circle"),
}


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
    kl, reward = point.kl, point.reward
    return {
        "kind": kind,
        "what": what,
        "name": name or what,
        "label": label,
        "kl": kl.value,
        "kl_low": as_number(max(kl.low, 0.0)) if math.isfinite(kl.low) else kl.value,
        "kl_high": as_number(kl.high) or kl.value,
        "reward": reward.value,
        "low": reward.value if as_number(reward.low) is None else reward.low,
        "high": reward.value if as_number(reward.high) is None else reward.high,
        "reward_text": both(reward),
        "kl_text": f"{both(kl)} nats",
    }


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
                    "kl": point.kl.value,
                    "reward": point.reward.value,
                    "low": point.reward.low,
                    "high": point.reward.high,
                    "reward_text": both(point.reward),
                    "kl_text": f"{both(point.kl)} nats",
                }
            )
    return rows


def _band(alt: ModuleType, curve: Sequence[dict[str, Any]], x: Any, y: Any) -> list[Any]:
    return [
        _chart(alt, [row for row in curve if row["trusted"] == trusted])
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


def histogram_chart(bins: Sequence[Mapping[str, Any]] | None) -> Spec | None:
    """Shares of the rewards under the reference, filled, and under its tilt, outlined; rows named "bins".

    Args:
        bins: rows of from, to, what ("reference" or "best policy") and share.
    """
    if not bins:
        return None
    alt = _altair()
    names = ["reference", "best policy"]
    colour = alt.Color(
        "what:N",
        title=None,
        scale=alt.Scale(domain=names, range=["var(--muted)", "var(--accent)"]),
        legend=alt.Legend(symbolStrokeWidth=0),
    )
    encoded = {
        "x": alt.X("from:Q", title="reward", scale=alt.Scale(nice=False, zero=False)),
        "x2": "to:Q",
        "y": alt.Y("share:Q", title="share of draws", stack=False, axis=alt.Axis(format="%")),
        "y2": alt.datum(0),
        "color": colour,
    }
    base = alt.Chart(alt.NamedData("bins"))
    solid, outline = (base.transform_filter(f"datum.what == '{what}'") for what in names)
    spec = _finished(
        alt.layer(
            solid.mark_bar(opacity=0.35, strokeWidth=0).encode(**encoded),
            outline.mark_bar(fillOpacity=0.12, strokeWidth=2, stroke="var(--accent)").encode(**encoded),
        ),
        200,
        "Histogram of rewards under the reference and under the best policy at the slider's beta.",
    )
    spec["datasets"]["bins"] = [dict(row) for row in bins]
    return spec


def step_charts(found: Found) -> dict[str, Spec]:
    """Reward, KL and regularised reward over the steps, as far as they were recorded."""
    wanted = {
        "reward": ("reward", "Reward of the policy's draws, step by step."),
        "kl": ("KL(policy ‖ reference), nats", "KL of the policy to the reference in nats, step by step."),
        "regularised_reward": ("reward − beta · KL", "Reward less beta times KL, step by step."),
        "self_gap": (
            "gap seen by the draws",
            "What is left to climb as far as a step's own draws show it: blind to modes that the policy has dropped.",
        ),
        "entropy": ("entropy, nats a token", "Entropy of the policy a token; a fall to 0 is a collapse."),
    }
    charts = {name: _step_chart(found.steps, name, *words) for name, words in wanted.items()}
    if charts["reward"] is None:  # nothing was rewarded: what was made small, and how pairs were ordered
        plain = {
            "objective_value": ("objective", "The objective, step by step."),
            "margin": (
                "margin of pairs, reward",
                "How much more the policy favours the better completion, step by step.",
            ),
        }
        charts |= {name: _number_chart(found.steps, name, *words) for name, words in plain.items()}
    charts |= {name: _number_chart(found.steps, name, title, said) for name, (title, said) in HEALTH.items()}
    return {name: spec for name, spec in charts.items() if spec is not None}


HEALTH = {
    "grad_norm": (
        "norm of the gradient",
        "Norm of the gradient before it is clipped; a jump is a step to look at.",
    ),
    "residual_std": (
        "sd of the residual, nats",
        "Spread of log target less log policy within a prompt, nats; 0 at the best policy.",
    ),
    "completion_length": (
        "completion, tokens",
        "Mean length of a batch's completions in tokens; a reward that likes length shows here.",
    ),
    "finished": ("share that ended", "Share of completions that ended before the length limit."),
    "ess": (
        "ESS, draws a prompt",
        "How many of a prompt's fresh draws the best policy's weights leave; few means that few decide.",
    ),
    "drawn": ("tokens drawn a second", "Completion tokens drawn a second."),
    "trained": ("tokens learned a second", "Completion tokens learned from a second, fresh and kept ones."),
    "sampler_error_mean": (
        "|sampler − scorer|, nats",
        "Mean difference of log-probability between drawing and scoring a completion, nats.",
    ),
}
"""numbers of a step beside its estimates -> axis with its unit, and a line that explains it"""


def _step_chart(steps: Sequence[Mapping[str, Any]], name: str, title: str, said: str) -> Spec | None:
    fresh = [(record, of_step(record, name)) for record in steps]
    held = [(record, evaluation(record, name)) for record in steps]
    drawn = _thinned([_at(record, e) for record, e in fresh if e is not None], MAX_POINTS)
    tested = _thinned([_at(record, e) for record, e in held if e is not None], MAX_POINTS)
    if not drawn and not tested:
        return None
    alt = _altair()
    x = _along_steps(alt)
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
    tips = _tooltip(alt, "step", "text", "n")
    layers = []
    if drawn:
        base = _chart(alt, drawn)
        layers += [
            base.mark_area(fill="var(--accent)", fillOpacity=0.18).encode(x=x, y=alt.Y("low:Q"), y2="high:Q"),
            base.mark_line(stroke="var(--accent)", strokeWidth=2).encode(x=x, y=y),
            base.mark_point(
                fill="var(--accent)", strokeWidth=0, size=18, opacity=1 if len(drawn) <= 60 else 0
            ).encode(x=x, y=y, tooltip=tips),
        ]
    if tested:
        base = _chart(alt, tested)
        layers += [
            base.mark_rule(stroke="var(--red)", strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q"), y2="high:Q"),
            base.mark_point(
                shape="diamond", fill="var(--red)", stroke="var(--paper)", size=90, opacity=1
            ).encode(x=x, y=y, tooltip=tips),
        ]
    return _finished(alt.layer(*layers), 220, said)


def _number_chart(steps: Sequence[Mapping[str, Any]], name: str, title: str, said: str) -> Spec | None:
    """A number of each step that has no interval of its own: it is of a batch, not an estimate."""
    rows = _thinned(
        [
            {"step": as_number(record.get("step")), "value": value}
            for record in steps
            if (value := as_number(record.get(name, rates(record).get(name)))) is not None
        ],
        MAX_POINTS,
    )
    if not rows:
        return None
    alt = _altair()
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=True))
    line = _chart(alt, rows).mark_line(stroke="var(--accent)", strokeWidth=2).encode(x=_along_steps(alt), y=y)
    return _finished(alt.layer(line), 220, said)


def rates(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tokens a second of a step, by what was done with them."""
    return record.get("tokens_per_second") or {}


def _along_steps(alt: Any) -> Any:
    """The axis of a curve over the steps."""
    return alt.X(
        "step:Q",
        title="step",
        scale=alt.Scale(nice=False),
        axis=alt.Axis(tickMinStep=1, format=",d", grid=False),
    )


def _at(record: Mapping[str, Any], e: Estimate) -> dict[str, Any]:
    return {
        "step": as_number(record.get("step")),
        "value": e.value,
        "low": as_number(e.low),
        "high": as_number(e.high),
        "text": both(e),
        "n": e.n,
    }


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
    alt = _altair()
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
        _chart(alt, rows)
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
            tooltip=_tooltip(alt, "steps", "part", "seconds"),
        )
    )
    return _finished(
        chart, 220, "Seconds of each training step, by what they were spent on; the sums stand above."
    )


def _finished(chart: Any, height: int, said: str) -> Spec:
    """One size and one look for all of them; rows that several layers show are written once."""
    spec = chart.properties(width="container", height=height, description=said).to_dict()
    rows: list[Any] = []
    named = spec.pop("datasets", {})
    for part in [spec, *spec.get("layer", [])]:
        if "values" not in part.get("data", {}):
            continue  # rows that all layers share stand at the top already; rows with a name the page replaces
        values = part["data"]["values"]
        if values not in rows:
            rows.append(values)
        part["data"] = {"name": f"rows-{rows.index(values)}"}
    spec["datasets"] = {**named, **{f"rows-{i}": values for i, values in enumerate(rows)}}
    words = {"labelColor": "var(--muted)", "titleColor": "var(--ink)", "labelFont": FONT, "titleFont": FONT}
    spec["config"] = {
        "background": "transparent",
        "aria": False,  # the figure itself is named; its points would be read out one by one
        "font": FONT,
        "view": {"stroke": None},
        "axis": {
            **words,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titleFontWeight": "normal",
            "titlePadding": 10,
            "gridColor": "var(--line)",
            "domainColor": "var(--line)",
            "tickColor": "var(--line)",
            "tickCount": 6,
        },
        "legend": {
            "orient": "top",
            "direction": "horizontal",
            "columns": {"expr": "width < 760 ? 1 : 3"},
            "labelColor": "var(--ink)",
            "labelFont": FONT,
            "labelFontSize": {"expr": "width < 420 ? 10 : 12"},
            "labelLimit": 400,
            "symbolSize": 90,
            "symbolOpacity": 1,
            "columnPadding": 20,
            "offset": 14,
        },
        "text": {"font": FONT, "fontSize": 11},
    }
    return spec


FONT = "system-ui, sans-serif"


def _tooltip(alt: ModuleType, *fields: str) -> list[Any]:
    titles = {"reward_text": "reward", "kl_text": "KL", "text": "value", "trust": "prediction", "n": "draws"}
    kinds = {"step": "Q", "n": "Q", "seconds": "Q"}
    return [
        alt.Tooltip(
            f"{field}:{kinds.get(field, 'N')}",
            title=titles.get(field, field),
            **({"format": ".2f"} if field == "seconds" else {}),
        )
        for field in fields
    ]


def _chart(alt: ModuleType, rows: Sequence[Mapping[str, Any]]) -> Any:
    return alt.Chart(alt.Data(values=[dict(row) for row in rows]))


def _thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly, first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, most).tolist()]


def _altair() -> ModuleType:
    try:
        import altair
    except ImportError as error:
        raise ValueError(
            "the report draws its charts with altair, which is not installed: pip install 'klimb[report]'"
        ) from error
    return altair
