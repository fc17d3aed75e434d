"""The charts of a reward model's audit: what its chances are worth, and the scores of better and worse completions."""

from __future__ import annotations

from itertools import pairwise

from klimb.report.chart import HEIGHT, Spec, altair_module, chart_of, finished, tooltip
from klimb.report.found import Found, as_estimate, as_number
from klimb.report.words import both, short


def reliability_chart(found: Found) -> Spec | None:
    """Predicted chance of each bin against how often it came true, with the line on which both are one."""
    rows = []
    for record in found.measurement.get("reliability") or ():
        hit, chance = as_estimate(record.get("accuracy")), as_number(record.get("confidence"))
        if hit is not None and chance is not None:
            rows.append(
                {
                    "chance": chance,
                    "value": hit.value,
                    "low": hit.low,
                    "high": hit.high,
                    "text": both(hit, percent=True),
                    "predicted": short(chance),
                    "n": hit.n,
                }
            )
    if not rows:
        return None
    alt = altair_module()
    x = alt.X("chance:Q", title="predicted chance of the favourite", scale=alt.Scale(domain=[0.5, 1.0]))
    y = alt.Y("value:Q", title="how often it was the better one", scale=alt.Scale(domain=[0.0, 1.0]))
    line = chart_of(alt, [{"chance": 0.5, "value": 0.5}, {"chance": 1.0, "value": 1.0}])
    bars = chart_of(alt, rows)
    return finished(
        alt.layer(
            line.mark_line(stroke="var(--muted)", strokeWidth=1.5, strokeDash=[6, 4]).encode(x=x, y=y),
            bars.mark_rule(stroke="var(--accent)", strokeWidth=1.5).encode(
                x=x, y=alt.Y("low:Q"), y2="high:Q"
            ),
            bars.mark_point(
                fill="var(--accent)", stroke="var(--paper)", strokeWidth=1, size=90, opacity=1
            ).encode(x=x, y=y, tooltip=tooltip(alt, "predicted", "text", "n")),
        ),
        HEIGHT,
        "Predicted chance of the favoured completion against how often it was the better one, with intervals; the table of bins.",
    )


def scores_chart(found: Found) -> Spec | None:
    """Histograms of the scores of better and worse completions, one above the other's outline."""
    scores = found.measurement.get("scores") or {}
    edges = [as_number(x) for x in scores.get("edges") or ()]
    known = [x for x in edges if x is not None]
    if len(known) < 2:
        return None
    names = ["better", "worse"]
    rows = [
        {"from": low, "to": high, "what": what, "count": count, "text": f"{short(low)} to {short(high)}"}
        for what in names
        for (low, high), count in zip(pairwise(known), scores.get(what) or (), strict=False)
    ]
    alt = altair_module()
    bars = chart_of(alt, rows)
    colour = alt.Color(
        "what:N", title=None, scale=alt.Scale(domain=names, range=["var(--accent)", "var(--red)"])
    )
    encoded = {
        "x": alt.X("from:Q", title="score", scale=alt.Scale(nice=False)),
        "x2": "to:Q",
        "y": alt.Y("count:Q", title="completions", stack=False),
        "y2": alt.datum(0),
        "tooltip": tooltip(alt, "what", "text", "count"),
    }
    solid, outline = (bars.transform_filter(f"datum.what == '{what}'") for what in names)
    return finished(
        alt.layer(
            solid.mark_bar(opacity=0.45, strokeWidth=0).encode(color=colour, **encoded),
            outline.mark_bar(fillOpacity=0.0, strokeWidth=2, stroke="var(--red)").encode(
                color=colour, **encoded
            ),
        ),
        HEIGHT,
        "Histogram of the scores of the better completions, filled, and of the worse ones, outlined.",
    )
