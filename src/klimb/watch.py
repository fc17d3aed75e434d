"""Who looks on while a run goes: three functions that are called, so that nothing else has to print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from klimb.pool import Progress, silent


@dataclass(frozen=True)
class Watch:
    """Who looks on.

    Attributes:
        progress: called with what is being done, how much of it is done, and how much there is.
        event: called with "plan", "train", "step", "checkpoint", "trained", "measure" or "warning",
            and its record or text.
        stop: asked after every step; True saves a checkpoint and ends the training there.
    """

    progress: Progress = silent
    event: Callable[[str, Any], None] = lambda kind, record: None
    stop: Callable[[], bool] = lambda: False


UNWATCHED = Watch()  # nobody looks on
