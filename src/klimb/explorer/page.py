"""The explorer as one HTML file: the lines of `klimb derive` and its static parts, nothing fetched from anywhere."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import torch
from markupsafe import Markup

from klimb.exact.check import NEEDS, example
from klimb.exact.derivation import derive
from klimb.exact.variants import VARIANTS
from klimb.report.page import chart_bundle, script_hash
from klimb.store import write_whole


def write_explorer(to: str | Path) -> Path:
    """Write the page; it opens from a file, in any browser, without a network.

    Args:
        to: the file; what was there is replaced.

    Returns:
        The path of the page.

    Raises:
        ValueError: vl-convert is not installed, or the disk is full.
    """
    path = Path(to)
    write_whole(path, render())
    return path


def render() -> str:
    """The page as text."""
    parts = resources.files("klimb.explorer")

    def part(name: str) -> str:
        return (parts / name).read_text(encoding="utf-8")

    own = "".join(part(name) for name in ("numbers.js", "page.js", "exercises.js"))
    scripts = [chart_bundle(), f"(() => {{\n{own}}})();\n"]  # the bundle has names of its own
    shared = (resources.files("klimb.report") / "page.css").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(part("page.html")).render(
        css=Markup(shared + part("page.css")),
        given=given(),
        scripts=[Markup(script) for script in scripts],
        hashes=[script_hash(script) for script in scripts],
    )


def given() -> dict[str, Any]:
    """What the page is told: the derivation in words, what its steps need of each other, and the changed objectives.

    Example:
        >>> told = given()
        >>> len(told["steps"]), told["needs"][4]
        (6, [2, 3])
    """
    steps = derive(example(), num_random=1, generator=torch.Generator().manual_seed(0)).steps
    return {
        "steps": [
            {
                "number": step.number,
                "title": step.title,
                "formula": step.formula,
                "why": step.why,
                "sides": [{"left": side.left, "right": side.right} for side in step.sides],
            }
            for step in steps
        ],
        "needs": {step: list(needed) for step, needed in NEEDS.items()},
        "variants": [
            {"name": name, "formula": variant.formula, "says": variant.says}
            for name, variant in VARIANTS.items()
            if variant.step is not None
        ],
    }
