"""What a person sees of a reward model's audit: rows of the panel at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from klimb.numbers.estimate import Estimate


def reward_model(table: Table, found: Mapping[str, Any]) -> None:
    """Add the rows of an audit, as measure.json holds it."""
    of, pairs = found["reward_model"], found["reward_model"]["accuracy"]["n"]
    table.add_row("held-out accuracy", f"{_said(of['accuracy'])} of {pairs} pairs")
    table.add_row("  surprise", f"{_said(of['surprise'])} nats a pair (0.69 knows nothing)")
    table.add_row("  margin", _said(of["margin"]))
    usual = found["calibrated"]
    table.add_row("calibration error", _said(of["calibration_error"]))
    table.add_row("  if calibrated", f"{usual['mean']:.2f}, seldom above {usual['most']:.2f}")
    table.add_row("goes with length", f"{_said(of['length'])}; judgements {_said(of['length_of_labels'])}")
    for name, label in (
        ("longer_better", "where the longer won"),
        ("shorter_better", "where the shorter won"),
    ):
        table.add_row(f"  {label}", f"{_said(of[name])} of {of[name]['n']}")
    for how, again in found["rescored"].items():
        table.add_row(
            f"scored {how}", f"{again['spread']['value']:.2g} apart; order changes in {again['flipped']:.0%}"
        )
    tail, threshold = of["tail"], found["tail_threshold"]
    if threshold is not None:
        table.add_row(
            "tail of exp(r/beta)",
            f"Pareto k {_said(tail)}, trusted below {threshold:.2f}  (beta {found['beta']:g})",
        )
    for sentence in found["findings"]:
        table.add_row("found", Text(sentence))


def _said(record: Mapping[str, Any]) -> str:
    if record["value"] is None:
        return "unknown"
    ends = (float("nan") if record[end] is None else record[end] for end in ("low", "high"))
    return str(Estimate(record["value"], *ends, record["n"], tuple(record["warnings"])))
