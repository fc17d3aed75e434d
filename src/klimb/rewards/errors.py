"""What an error of a reward shows: the row it is about, and where somebody's own code raised."""

from __future__ import annotations

import reprlib
import traceback
from typing import Any

from klimb.data import Prompt
from klimb.rewards.texts import said

SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = 240  # a prompt or completion in an error: both its ends


def about(prompt: Prompt, completion: Any) -> str:
    """The row that an error is about, on two lines of their own."""
    return f"\n  prompt: {SHOWN.repr(said(prompt))}\n  completion: {SHOWN.repr(said(completion))}"


def raised(error: BaseException, file: str | None) -> str:
    """What was raised and where: the last line of the user's own file, or the last line of all."""
    if isinstance(error, SyntaxError):  # says itself where it is
        return f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename == file] or [f for f in frames if "importlib" not in f.filename]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"
