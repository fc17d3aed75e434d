"""Verifiers that hold a completion against an answer in the data: the same text, or the same number.

A row whose answer is None is one to which the reward does not apply.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from klimb.data import Prompt
from klimb.rewards.texts import against, column_needed

NUMBER = re.compile(
    r"(?:(?<![\w.)\]])[-+])?"  # a sign
    r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:[eE][-+]?\d{1,3}(?!\d))?"  # with more digits a short text would be a number of a billion
)


@dataclass(frozen=True, kw_only=True)
class Exact:
    r"""1 where the completion is the answer, else 0.

    Attributes:
        column: where the answer is; a list of them means that any will do.
        strip: do not look at white space at both ends.
        casefold: do not look at upper and lower case.

    Example:
        >>> Exact()(["Capital of France?"] * 2, [" Paris\n", "paris"], answer=["Paris"] * 2)
        [1.0, 0.0]
    """

    column: str = "answer"
    strip: bool = True
    casefold: bool = False

    name = "exact"
    needs = property(column_needed)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        """One number a completion."""
        return against(completions, columns[self.column], self._same)

    def _same(self, text: str, answer: Any) -> float:
        return float(self._plain(text) in self._all(answer))

    def _all(self, answer: Any) -> list[str]:
        return [self._plain(str(one)) for one in (answer if isinstance(answer, list | tuple) else [answer])]

    def _plain(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.casefold else text


@dataclass(frozen=True, kw_only=True)
class Numeric:
    """1 where the last number of the completion is the answer, up to a tolerance, else 0.

    The last number of the answer counts too, so a solution that ends with one will do ("... #### 18"). Commas between thousands
    are read over, and numbers are compared digit by digit, not as floats.

    Attributes:
        column: where the answer is.
        tolerance: how far away still counts; 0 is the very same number.

    Example:
        >>> Numeric()(["6 * 7?"] * 3, ["6 * 7 = 42.0", "42, or 43", "many"], answer=[42] * 3)
        [1.0, 0.0, 0.0]
    """

    column: str = "answer"
    tolerance: float = 0.0

    name = "numeric"
    needs = property(column_needed)

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"option tolerance: got {self.tolerance}, expected 0 or more")

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        """One number a completion.

        Raises:
            ValueError: an answer without a number.
        """
        return against(completions, columns[self.column], self._right)

    def _right(self, text: str, answer: Any) -> float:
        found, wanted = last_number(text), last_number(str(answer))
        if wanted is None:
            raise ValueError(f"column {self.column!r}: got {answer!r}, expected a number, or text with one")
        if found is None:
            return 0.0
        tolerance = Decimal(str(self.tolerance))
        return float(found == wanted if not tolerance else abs(found - wanted) <= tolerance)


def last_number(text: str) -> Decimal | None:
    """The last number in a text, or None.

    A minus counts as a sign where no letter, digit or bracket stands before it.

    Example:
        >>> [str(last_number(t)) for t in ("so 1,234.50 in all.", "x = -3", "7-3", "no. 5e3", "a b")]
        ['1234.50', '-3', '3', '5E+3', 'None']
    """
    found = NUMBER.findall(text.replace("\u2212", "-"))
    return Decimal(found[-1].replace(",", "")) if found else None
