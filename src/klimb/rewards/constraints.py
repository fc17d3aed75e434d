"""Verifiers of instructions that a program can check: so many words, no comma, begins with, ... (as in IFEval).

A rule is a name and a value: `{max_words: 8}`. Rules are options of the reward, the same for every prompt, or stand in a
column of the data, where a row's rules say what its prompt asks for.

Source: Zhou et al., Instruction-Following Evaluation for Large Language Models, 2023.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from klimb.data import Prompt
from klimb.nearest import nearest
from klimb.rewards.texts import against, column_needed, said, words


@dataclass(frozen=True, kw_only=True)
class Constraints:
    """The share of the rules that a completion keeps, or 1 only where it keeps all. An empty one keeps none.

    Attributes:
        rules: a list of rules, `[{max_words: 8}, {contains: [cat, dog]}]`; one mapping of several will do.
        column: in place of them, where each row's rules are (such a list, or its JSON text).
        all_or_nothing: 1 where every rule is kept, else 0.

    Example:
        >>> rules = Constraints(rules=[{"max_words": 3}, {"lowercase": True}])
        >>> rules(["?"] * 3, ["so it is", "So it is", "So it is now"])
        [1.0, 0.5, 0.0]
        >>> sorted(RULES)
        ['bullets', 'contains', 'ends_with', 'excludes', 'lowercase', 'max_sentences', 'max_words', 'min_sentences', 'min_words', 'no_comma', 'starts_with', 'words']
    """

    rules: list[Mapping[str, Any]] | Mapping[str, Any] | None = None
    column: str | None = None
    all_or_nothing: bool = False

    name = "constraints"
    needs = property(column_needed)

    def __post_init__(self) -> None:
        if (self.rules is None) == (self.column is None):
            raise ValueError("expected one of the options rules and column")
        if self.rules is not None:
            _pairs(self.rules, "option rules")

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        """One number a completion.

        Raises:
            ValueError: a column that holds no rules.
        """
        if self.column is None:
            pairs = _pairs(self.rules, "option rules")
            return [self._kept(said(completion), pairs) for completion in completions]
        where = f"column {self.column!r}"
        return against(
            completions, columns[self.column], lambda text, rules: self._kept(text, _pairs(rules, where))
        )

    def _kept(self, text: str, pairs: Sequence[tuple[str, Any]]) -> float:
        if not text.strip():
            return 0.0  # saying nothing would keep half of all rules
        kept = [RULES[name](text, value) for name, value in pairs]
        return float(all(kept)) if self.all_or_nothing else sum(kept) / len(kept)


def sentences(text: str) -> int:
    """How many sentences: ends of one (. ! ? before white space or the end), and what stands after the last.

    Example:
        >>> sentences("One. Two... three! And 3.5"), sentences("None")
        (4, 1)
    """
    return sum(bool(words(part)) for part in re.split(r"[.!?…]+(?=[\s\"')\]]|$)", text))


def has(text: str, word: str) -> bool:
    """Whether a text has a word or phrase, in any case, not as a part of another word.

    Example:
        >>> has("A Cat.", "cat"), has("concatenate", "cat")
        (True, False)
    """
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE) is not None


RULES: Mapping[str, Callable[[str, Any], bool]] = {
    "words": lambda text, n: len(words(text)) == n,
    "max_words": lambda text, n: len(words(text)) <= n,
    "min_words": lambda text, n: len(words(text)) >= n,
    "max_sentences": lambda text, n: sentences(text) <= n,
    "min_sentences": lambda text, n: sentences(text) >= n,
    "bullets": lambda text, n: len(re.findall(r"(?m)^\s*[*•-]\s+\S", text)) == n,
    "lowercase": lambda text, _: text == text.lower(),
    "no_comma": lambda text, _: "," not in text,
    "contains": lambda text, found: all(has(text, word) for word in found),
    "excludes": lambda text, found: not any(has(text, word) for word in found),
    "starts_with": lambda text, start: text.lstrip().startswith(start),
    "ends_with": lambda text, end: text.rstrip().endswith(end),
}
"""rule -> whether a text keeps it, given its value"""


def _pairs(rules: Any, where: str) -> list[tuple[str, Any]]:
    """Rules as (name, value), looked at."""
    if isinstance(rules, str):
        try:
            rules = json.loads(rules)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: got {rules[:80]!r}, no JSON: {error}") from error
    each = [rules] if isinstance(rules, Mapping) else rules
    if not isinstance(each, list | tuple) or not all(isinstance(one, Mapping) for one in each):
        raise ValueError(f"{where}: got {rules!r}, expected a list of rules such as {{max_words: 8}}")
    # Parquet fills the keys that other rows have with None
    pairs = [(name, value) for one in each for name, value in one.items() if value is not None]
    if not pairs:
        raise ValueError(f"{where}: got {rules!r}, expected at least one rule, such as {{max_words: 8}}")
    return [(name, _value(name, value, where)) for name, value in pairs]


def _value(name: str, value: Any, where: str) -> Any:
    if name not in RULES:
        raise ValueError(
            f"{where}: no rule {name!r}{nearest(str(name), RULES)}; there are {', '.join(RULES)}"
        )
    if name in ("lowercase", "no_comma"):
        right, expected = value is True, "true; leave the rule out where it does not hold"
    elif name in ("starts_with", "ends_with"):
        right, expected = isinstance(value, str) and value.strip() != "", "a text"
    elif name in ("contains", "excludes"):
        value = [value] if isinstance(value, str) else value
        right = isinstance(value, list | tuple) and value and all(isinstance(v, str) and v for v in value)
        expected = "a word, or a list of them"
    else:
        right, expected = type(value) is int and value >= 0, "a whole number of 0 or more"
    if not right:
        raise ValueError(f"{where}: rule {name}: got {value!r}, expected {expected}")
    return value
