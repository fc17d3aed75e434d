r"""A verifier of mathematics: whether the completion's expression equals the answer's, by math-verify.

"1/2", "0.5", "\frac12" and "\boxed{x = 1/2}" are the same. Needs math-verify, of the extra `rewards`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from klimb.data import Prompt
from klimb.rewards.texts import against, column_needed, optional


@dataclass(frozen=True, kw_only=True)
class Mathematics:
    r"""1 where the completion's mathematics equals the answer, else 0.

    Attributes:
        column: where the answer is, LaTeX or plain; a row without one is not judged.
        timeout: whole seconds for one completion to be read, and again to be compared. math-verify keeps time by a
            signal, which only the main thread gets: in any other thread there is no limit.

    Example:
        >>> Mathematics()(["?"] * 2, ["So it is $\\frac{1}{2}$.", "0.6"], answer=["1/2"] * 2)  # doctest: +SKIP
        [1.0, 0.0]
    """

    column: str = "answer"
    timeout: int = 5

    name = "math"
    needs = property(column_needed)

    def __post_init__(self) -> None:
        if self.timeout < 1:
            raise ValueError(f"option timeout: got {self.timeout}, expected 1 or more seconds")
        optional("math_verify", extra="rewards")

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        """One number a completion.

        Raises:
            ValueError: an answer that math-verify cannot read.
        """
        answers = columns[self.column]
        read = {str(a): self._answer(str(a)) for a in answers if a is not None}
        return against(completions, answers, lambda text, answer: self._right(read[str(answer)], text))

    @property
    def _limit(self) -> Any:
        return self.timeout if threading.current_thread() is threading.main_thread() else None

    def _answer(self, text: str) -> list[Any]:
        from math_verify import parse

        for form in (f"${text}$", text):
            read = parse(form, parsing_timeout=self._limit)
            if any(not isinstance(one, str) for one in read):  # a string is what was not understood
                return read
        raise ValueError(
            f"column {self.column!r}: got {text!r}, expected mathematics, such as \\frac{{1}}{{2}}"
        )

    def _right(self, answer: list[Any], text: str) -> float:
        from math_verify import parse, verify

        read = parse(text, parsing_timeout=self._limit)
        return float(verify(answer, read, timeout_seconds=self._limit))
