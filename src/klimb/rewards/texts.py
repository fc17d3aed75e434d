"""What rewards share: the text of a completion beside what its row gives, the words in it, packages that only some need."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

WORD = re.compile(r"\w+(?:['’-]\w+)*")


def said(completion: Any) -> str:
    """The text of a completion: itself, or the content of its last message.

    Example:
        >>> said("hi"), said([{"role": "assistant", "content": "hi"}])
        ('hi', 'hi')
    """
    return completion if isinstance(completion, str) else completion[-1]["content"]


def against(
    completions: Sequence[Any], given: Sequence[Any], judge: Callable[[str, Any], float]
) -> list[float | None]:
    """What a judge says of each completion's text beside what its row gives; None where the row gives nothing.

    Example:
        >>> against(["4", "5", "6"], ["4", "4", None], lambda text, answer: float(text == answer))
        [1.0, 0.0, None]
    """
    return [
        None if one is None else judge(said(completion), one)
        for completion, one in zip(completions, given, strict=True)
    ]


def column_needed(reward: Any) -> tuple[str, ...]:
    """The columns that a reward with an option `column` looks at: that one, or none where the option is left out."""
    return () if reward.column is None else (reward.column,)


def words(text: str) -> Sequence[str]:
    """The words of a text: letters, digits and underscores, also with a hyphen or an apostrophe inside.

    Example:
        >>> words("It's a well-known one, no?")
        ["It's", 'a', 'well-known', 'one', 'no']
    """
    return WORD.findall(text)


def optional(module: str, *, extra: str) -> ModuleType:
    """Import a package that klimb does without where nobody asks for it.

    Raises:
        ValueError: it, or one that it needs, is not installed; names the extra of klimb that has it.

    Example:
        >>> optional("not_there", extra="rewards")
        Traceback (most recent call last):
        ...
        ValueError: needs the package not_there, which is not installed; pip install 'klimb[rewards]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"needs the package {error.name}, which is not installed; pip install 'klimb[{extra}]'"
        ) from error
