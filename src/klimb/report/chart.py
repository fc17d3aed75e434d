"""What all charts share: a Vega-Lite specification of one size and look, its rows, its tooltips, its axes.

Colours are CSS variables of the page, so that light, dark and paper need one drawing. What is not trusted is hatched
and dashed, what is of one kind has one shape: nothing is told by colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from klimb.report.found import Point, as_number
from klimb.report.words import both

Spec = dict[str, Any]

HEIGHT = 400
FONT = "system-ui, sans-serif"


def altair_module() -> ModuleType:
    """Altair, imported when the first chart is drawn.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import altair
    except ImportError as error:
        raise ValueError(
            "the report draws its charts with altair, which is not installed: pip install 'klimb[report]'"
        ) from error
    return altair


def chart_of(alt: ModuleType, rows: Sequence[Mapping[str, Any]]) -> Any:
    """A chart of rows, whose mark is still to be named."""
    return alt.Chart(alt.Data(values=[dict(row) for row in rows]))


def plane(alt: ModuleType) -> tuple[Any, Any]:
    """The axes of reward against KL."""
    return (
        alt.X("kl:Q", title="KL(policy ‖ reference), nats", scale=alt.Scale(nice=False, domainMin=0)),
        alt.Y("reward:Q", title="E[reward]", scale=alt.Scale(zero=False)),
    )


def placed(point: Point) -> dict[str, Any]:
    """The row of a point: its place, the interval of its reward where that is known, and both numbers in words."""
    kl, reward = point.kl, point.reward
    return {
        "kl": kl.value,
        "reward": reward.value,
        "low": reward.value if as_number(reward.low) is None else reward.low,
        "high": reward.value if as_number(reward.high) is None else reward.high,
        "reward_text": both(reward),
        "kl_text": f"{both(kl)} nats",
    }


def crossed(point: Point) -> dict[str, Any]:
    """The row of a point that shows both its intervals."""
    kl = point.kl
    return {
        **placed(point),
        "kl_low": max(kl.low, 0.0) if math.isfinite(kl.low) else kl.value,
        "kl_high": kl.high if math.isfinite(kl.high) else kl.value,
    }


def tooltip(alt: ModuleType, *fields: str) -> list[Any]:
    """These columns of a row, under the names that readers know."""
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


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly, first and last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, most).tolist()]


def finished(chart: Any, height: int, said: str) -> Spec:
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
