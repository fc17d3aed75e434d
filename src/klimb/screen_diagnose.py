"""What a person sees of a diagnosis: each verdict with what it rests on, what to do, and what to type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

UNLIKELY, LIKELY = 0.2, 0.8
"""shares of resamples up to which a verdict is ruled out, and from which it is given (a test compares them)"""


def verdict_rows(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Label and text of the lines about a diagnosis in a panel of other numbers.

    Example:
        >>> verdict_rows({"verdict": "stopped early", "confidence": "known", "advice": "Go on.", "command": "", "verdicts": []})
        [('verdict', 'stopped early (known)'), ('try next', 'Go on.')]
    """
    rows = [("verdict", named(found)), ("try next", found["advice"])]
    rows += [("  type", found["command"])] if found["command"] else []
    return [*rows, *(("also", f"{named(v)}: {v['says']}") for v in found["verdicts"][1:])]


def named(verdict: Mapping[str, Any]) -> str:
    """A verdict's name, and how sure it is where that is not said by the name."""
    name, confidence = verdict.get("verdict", verdict.get("name")), verdict["confidence"]
    return name if confidence == "cannot tell" else f"{name} ({confidence})"


def show(console: Console, record: Mapping[str, Any]) -> None:
    """Print all verdicts, the first one to act on first. Commands stand on a line of their own, to be copied."""
    for verdict in record["verdicts"]:
        console.print(Text(named(verdict), style="bold"))
        said = [verdict["says"], *(f"- {line}" for line in verdict["evidence"]), verdict["advice"]]
        if verdict["more"] and verdict["confidence"] == "likely":
            said.append(
                f"It fires on {verdict['share']:.0%} of the resamples; {verdict['more']} more draws would settle it."
            )
        for line in said:
            console.print(Padding(Text(line), (0, 0, 0, 2)))
        if verdict["command"]:
            console.print(Text(f"  $ {verdict['command']}", style="cyan"), soft_wrap=True)
        console.print()
    given = {verdict["name"] for verdict in record["verdicts"]}
    rest = {name: share for name, share in record["shares"].items() if name not in given}
    if out := [name for name, share in rest.items() if share <= UNLIKELY]:
        console.print(Text(f"ruled out: {', '.join(out)}"))
    if left := [f"{name} ({share:.0%})" for name, share in rest.items() if UNLIKELY < share < LIKELY]:
        console.print(Text(f"left open: {', '.join(left)}"))
    if record["unmeasured"]:
        console.print(Text(f"not measured: {', '.join(record['unmeasured'])}", style="yellow"))
