"""Where step records go besides metrics.jsonl: to any experiment tracker that accelerate knows, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from klimb.config import Config


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that accelerate does not know, or that is not installed: accelerate itself drops it in silence.

    Raises:
        ValueError: such a name is among them.
    """
    if not names:
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    there = sorted(str(name) for name in get_available_trackers())
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"report_to: no tracker {name!r}; accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}"
            )
        if name not in there:
            raise ValueError(f"report_to: {name} is not installed; there are {', '.join(there) or 'none'}")


def trackers(config: Config, path: Path) -> Callable[[Mapping[str, Any]], None]:
    """Where step records go besides metrics.jsonl: nowhere, or to accelerate's trackers."""
    if not config.report_to:
        return lambda record: None
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(config.report_to), project_dir=path)
    flat = {
        name: x if isinstance(x, int | float | str) else str(x) for name, x in config.model_dump().items()
    }
    accelerator.init_trackers("klimb", config=flat)
    return lambda record: accelerator.log(dict(_flat(record)), step=record["step"])


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping) and "value" in value:
            value = value["value"]
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield prefix + name, value
