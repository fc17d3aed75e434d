"""Figures as files: each chart of a page as PNG and SVG, in the colours of the light page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from klimb.store import write_whole

WIDTH = 760
"""points; the page's charts take the width that they get"""


def write_figures(charts: Mapping[str, Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Write NAME.svg and NAME.png of each chart into the folder, whole or not at all.

    Args:
        charts: name -> Vega-Lite specification, with the page's colours by name.
        folder: made if it is not there; files of these names are replaced.

    Returns:
        The files.

    Raises:
        ValueError: the folder cannot be written, or vl-convert is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise ValueError(
            "figures are drawn with vl-convert, which is not installed: pip install 'klimb[report]'"
        ) from error
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--figures {folder}: {error.strerror}; name a folder that can be written"
        ) from error
    written = []
    for name, spec in charts.items():
        drawn = on_paper(spec)
        svg, png = vl_convert.vegalite_to_svg(drawn), vl_convert.vegalite_to_png(drawn, scale=2)
        for suffix, content in (("svg", svg), ("png", png)):
            path = place / f"{name}.{suffix}"
            write_whole(path, content)
            written.append(path)
    return written


def on_paper(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The specification with colours in place of their names, on white, of a fixed width.

    Example:
        >>> on_paper({"mark": {"fill": "var(--red)"}, "width": "container"})["mark"]
        {'fill': '#b5382a'}
    """
    css = (resources.files("klimb.report") / "page.css").read_text(encoding="utf-8")
    light = dict(re.findall(r"--([a-z-]+):\s*(#[0-9a-f]+)", css.split("@media")[0]))
    text = re.sub(r"var\(--([a-z-]+)\)", lambda found: light[found.group(1)], json.dumps(spec))
    drawn: dict[str, Any] = json.loads(text)
    config = {**drawn.get("config", {}), "background": "#ffffff"}
    return {**drawn, "width": WIDTH, "config": config, "padding": 16}
