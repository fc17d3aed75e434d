"""Rows that a reward could not score, beside those that it could.

A reward of another process may die in the middle, or answer nonsense for one row. Whoever can wait keeps the rows, to score
them later; to anybody else this is an error like others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence


class Unscored(ValueError):
    """Some rows have no value.

    Attributes:
        values: one a row; None for those without.
        missing: the numbers of the rows without.

    Example:
        >>> error = Unscored("no answer", [1.0, None], {1})
        >>> str(error), sorted(error.missing)
        ('no answer', [1])
    """

    def __init__(self, message: str, values: Sequence[float | None], missing: Collection[int]) -> None:
        super().__init__(message)
        self.values = list(values)
        self.missing = frozenset(missing)
