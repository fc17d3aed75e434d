"""klimb explore: write the page in which the idea can be played with.

Nothing heavy is imported before the command runs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("explore")(explore_)


def explore_(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the page is written.")] = Path(
        "klimb-explorer.html"
    ),
) -> None:
    """Write a page that opens in any browser: the best policy in one slider, the derivation, exercises."""
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise ValueError(f"explore: -o {output}: expected the name of a file in a folder that is there")
    if importlib.util.find_spec("vl_convert") is None:
        raise ValueError("explore: vl-convert is missing; pip install 'klimb[report]'")
    from klimb.explorer import write_explorer

    print(write_explorer(output))
