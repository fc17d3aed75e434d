"""The tasks of reasoning-gym as a reward: each scores an answer to its own puzzle, from 0 to 1.

The prompts come from `dataset_name: reasoning_gym:TASK` (see `klimb.tasks`), with a column that holds the puzzle. Needs
reasoning-gym, of the extra `tasks`.

Some of its tasks read an answer by running it as Python. Those are refused here unless you ask for them.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from klimb.data import Prompt
from klimb.rewards.texts import against, column_needed, optional

RUNS = re.compile(r"\beval\(answer|\bexec\(|\b(?:sp|sympy)\.parse_expr\(|\bparse_expr\(answer|\bsympify\(")
"""how a task's source runs an answer; sympy's parser does too"""


@dataclass(frozen=True, kw_only=True)
class ReasoningGym:
    """What the puzzle's own task gives for the completion.

    Attributes:
        column: where the puzzle is, as `klimb.tasks` writes it.
        tag: only what the last <tag>...</tag> of the completion holds is the answer, and without one it is worth 0; left
            out, all of it is, white space at the ends apart.
        run_answers: take tasks too that run what the model wrote as Python, with all your rights.
    """

    column: str = "puzzle"
    tag: str | None = None
    run_answers: bool = False

    name = "reasoning_gym"
    needs = property(column_needed)

    def __post_init__(self) -> None:
        optional("reasoning_gym", extra="tasks")

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        """One number a completion.

        Raises:
            ValueError: a column that holds no puzzle.
        """
        return against(completions, columns[self.column], self._scored)

    def _scored(self, text: str, puzzle: Any) -> float:
        try:
            given = json.loads(puzzle)
            task, options, entry = given["task"], given["options"], given["entry"]
        except (TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"column {self.column!r}: got {str(puzzle)[:80]!r}, expected a puzzle that "
                "dataset_name reasoning_gym:TASK made"
            ) from error
        score, runs = _scorer(task, json.dumps(options, sort_keys=True))
        if runs and not self.run_answers:
            raise ValueError(
                f"reasoning-gym scores {task} by running answers as Python, that is what a model wrote; take another task, or "
                "accept that with the option run_answers: true"
            )
        if self.tag is not None:
            tagged = re.findall(rf"<{re.escape(self.tag)}>(.*?)</{re.escape(self.tag)}>", text, re.DOTALL)
            if not tagged:
                return 0.0
            text = tagged[-1]
        try:
            return float(score(text.strip(), entry))
        except Exception:
            return 0.0  # some checkers stumble over an answer they cannot read; their own they can, see klimb.tasks


@functools.cache
def _scorer(task: str, options: str) -> tuple[Any, bool]:
    """What scores answers of a task, and whether it runs them."""
    puzzles = optional("reasoning_gym", extra="tasks").create_dataset(task, **json.loads(options))
    source = inspect.getsource(sys.modules[type(puzzles).__module__])
    return puzzles.score_answer, RUNS.search(source) is not None
