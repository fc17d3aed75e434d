"""The chart of rewards: what the reference earns, and what its tilt does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from klimb.report.chart import Spec, altair_module, finished


def histogram_chart(bins: Sequence[Mapping[str, Any]] | None) -> Spec | None:
    """Shares of the rewards under the reference, filled, and under its tilt, outlined; rows named "bins".

    Args:
        bins: rows of from, to, what ("reference" or "best policy") and share.
    """
    if not bins:
        return None
    alt = altair_module()
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
    spec = finished(
        alt.layer(
            solid.mark_bar(opacity=0.35, strokeWidth=0).encode(**encoded),
            outline.mark_bar(fillOpacity=0.12, strokeWidth=2, stroke="var(--accent)").encode(**encoded),
        ),
        200,
        "Histogram of rewards under the reference and under the best policy at the slider's beta.",
    )
    spec["datasets"]["bins"] = [dict(row) for row in bins]
    return spec
