"""Where a run's numbers go besides its files: to any experiment tracker that accelerate knows, by name."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from klimb.config import Config
from klimb.watch import Watch


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


@contextmanager
def tracked(watch: Watch, config: Config, path: Path) -> Generator[Watch]:
    """`watch`, whose records also go to the trackers of `report_to`; they are ended however the block ends.

    A step's numbers keep their names and its number. Those of the plan begin with plan/ and belong to step 0, those of
    the measurement begin with measure/ and belong to the last step.

    Args:
        watch: who looks on anyway.
        config: names the trackers, and is what they are told of the run.
        path: the directory of the run, for trackers that write files.
    """
    if not config.report_to:
        yield watch
        return
    from accelerate import Accelerator

    accelerator = Accelerator(log_with=list(config.report_to), project_dir=path)
    flat = {
        name: x if isinstance(x, int | float | str) else str(x) for name, x in config.model_dump().items()
    }
    accelerator.init_trackers("klimb", config=flat)
    last = config.max_steps

    def event(kind: str, record: Any) -> None:
        nonlocal last
        if kind == "step":
            last = record["step"]
            accelerator.log(dict(_flat(record)), step=last)
        elif kind in ("plan", "measure"):
            accelerator.log(dict(_flat(record, f"{kind}/")), step=0 if kind == "plan" else last)
        watch.event(kind, record)

    try:
        yield replace(watch, event=event)
    finally:
        accelerator.end_training()


def _flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in record.items():
        if isinstance(value, Mapping) and "value" in value:
            value = value["value"]
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            yield prefix + name, value  # not what is unknown (None), words and lists
