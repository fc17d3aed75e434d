"""klimb report RUN...: a page of one run, or of several side by side; its figures as files, its numbers as JSON.

Nothing heavy is imported before the command runs.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated, Any

import typer

SEVERAL = Path("klimb-report.html")
"""where the page of several runs is written, unless said otherwise: it belongs to none of them"""


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("report")(report_)


def report_(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Directories of runs; several are compared.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help=f"Where the page is written; left out: RUN/report.html, of several {SEVERAL}.",
        ),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Write each figure into this folder too, as PNG and SVG.")
    ] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="All numbers as JSON on stdout, nothing else there.")
    ] = False,
) -> None:
    """Write RUN/report.html from what a run has left, or one page that compares several."""
    missing = [name for name in ("altair", "vl_convert") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"report: {' and '.join(missing)} missing; pip install 'klimb[report]'")
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise ValueError(f"report: -o {output}: expected the name of a file in a folder that is there")
    page, charts, record = (_one if len(runs) == 1 else _several)(runs, output)
    written = []
    if figures is not None:
        from klimb.report.files import write_figures

        written = write_figures(charts, figures)
    if json_:
        from klimb.store import as_json

        print(as_json({"report": str(page), "figures": [str(file) for file in written], **record}))
        return
    for file in [page, *written]:
        print(file)
    if "says" in record:
        print(record["says"])


def _one(runs: list[Path], output: Path | None) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    from klimb.report import write_report
    from klimb.report.found import read_run
    from klimb.report.page import charts_of

    page, found = write_report(runs[0], to=output), read_run(runs[0])
    numbers = {"plan": found.plan, "steps": found.steps, "measure": found.measurement}
    return page, charts_of(found), {"run": str(runs[0]), **numbers}


def _several(runs: list[Path], output: Path | None) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    from klimb.report import write_comparison
    from klimb.report.compared import record
    from klimb.report.overlay import overlay_chart

    page = output or SEVERAL
    compared = write_comparison(runs, page)
    return page, {"overlay": overlay_chart(compared)}, record(compared)
