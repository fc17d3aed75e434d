"""Where the time and the memory of a training went, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from klimb.spans import KINDS

MEMORY = {
    "weights": "weights",
    "optimizer": "optimizer",
    "peak": "peak of the process",
    "device_peak": "peak on the device",
}


def profile(record: Mapping[str, Any] | None, run: str) -> RenderableType:
    """A table a step that was looked at, the memory, and where the files lie; the record is what profile.json holds."""
    if record is None:
        return Text("no profile: no step was taken to its end")
    memory = "   ".join(
        f"{label} {record['memory'][name] / 1e9:.2f} GB"
        for name, label in MEMORY.items()
        if name in record["memory"]
    )
    where = f"profile.json and trace.json.gz (https://ui.perfetto.dev opens it) are in {run}"
    return Group(*map(_step, record["steps"]), Text(memory), Text(where))


def _step(step: Mapping[str, Any]) -> RenderableType:
    bare = step["seconds_without_profiler"]
    other = "" if bare is None else f"; draw, score and update of the others take {bare:.2f} s"
    table = Table(
        "part",
        "seconds",
        "share",
        *KINDS,
        title=f"step {step['step']} ({step['kind']}), seconds{other}",
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=0,  # eighty columns are enough so
    )
    for column in table.columns[1:]:
        column.justify = "right"
    total = dict.fromkeys(KINDS, 0.0)
    for part, kinds in step["parts"].items():
        table.add_row(part, *_cells(kinds, step["seconds"]))
        total = {kind: total[kind] + kinds[kind] for kind in KINDS}
    table.add_section()
    table.add_row("all", *_cells(total, step["seconds"]))
    table.add_row("share", "", "", *(f"{100 * total[kind] / step['seconds']:.0f} %" for kind in KINDS))
    return table


def _cells(kinds: Mapping[str, float], whole: float) -> list[str]:
    seconds = sum(kinds.values())
    return [f"{seconds:.3f}", f"{100 * seconds / whole:.0f} %", *(f"{kinds[kind]:.3f}" for kind in KINDS)]
