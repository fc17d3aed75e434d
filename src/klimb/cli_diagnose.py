"""klimb diagnose RUN: why the policy of a run is where it is, from what the run has left.

Nothing heavy is imported before the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command("diagnose")(diagnose_)


def diagnose_(
    run: Annotated[Path, typer.Argument(help="Directory of a run.")],
    audit: Annotated[
        str | None,
        typer.Option(
            help="A reward that training did not see, named as reward_funcs names one: does it rise too?"
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="As JSON on stdout, nothing else there.")] = False,
) -> None:
    """Say why the policy of a run is where it is, how sure that is, and what to type next."""
    import yaml

    from klimb.diagnosis import diagnosed
    from klimb.records import diagnosis_record

    spec = yaml.safe_load(audit) if audit is not None and audit.startswith("{") else audit
    record = diagnosis_record(diagnosed(run, audit=spec))
    if json_:
        from klimb.store import as_json

        print(as_json(record))
        return
    from rich.console import Console

    from klimb.screen_diagnose import show

    show(Console(highlight=False), record)
