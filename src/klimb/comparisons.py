"""Completions that somebody has judged: read from a file in any of TRL's formats, checked row by row.

    pairs        prompt, chosen, rejected                (labels 1 and 0; or score_chosen and score_rejected, or a margin)
    unpaired     prompt, completion, label               (true or false)
    ranked       prompt, completions, scores             (a list of each, the same number in every row)
    completions  prompt, completion                      (nothing judged: method sft)
    messages     messages                                (the same, a conversation)

A prompt and its completions are text, or lists of chat messages; a prompt that is missing is what both conversations begin with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from klimb.data import Example, Prompt
from klimb.dataset import Row, checked_message, checked_prompt, read_rows
from klimb.nearest import nearest

LONGEST = 1_000_000
"""characters of a completion"""
KINDS = {
    "pairs": ("chosen", "rejected"),
    "unpaired": ("completion", "label"),
    "ranked": ("completions", "scores"),
    "completions": ("completion",),
    "messages": ("messages",),
}
"""what a file is -> the columns that say so, the first that are all there"""
SCORES = ("score_chosen", "score_rejected", "margin")


@dataclass(frozen=True)
class Judged:
    """Some completions of one prompt and what was said of them.

    Attributes:
        example: the prompt, its other columns, and the number of its row, so that no two rows are one.
        completions: K texts.
        labels: K numbers: 1 for good or chosen, 0 for bad or rejected, or scores.
        where: the row it was read from.
    """

    example: Example
    completions: tuple[str, ...]
    labels: tuple[float, ...]
    where: str


def kind_of(names: Sequence[str]) -> str | None:
    """What a file with these columns holds, or None.

    Example:
        >>> kind_of(["prompt", "chosen", "rejected", "source"]), kind_of(["prompt", "answer"])
        ('pairs', None)
    """
    return next((kind for kind, needed in KINDS.items() if set(needed) <= set(names)), None)


def load_judged(
    path_or_id: str | Path,
    *,
    split: str | None = None,
    prompt_column: str = "prompt",
    by_scores: bool = False,
    limit: int | None = None,
) -> list[Judged]:
    """Read judged completions.

    Args:
        path_or_id: as `klimb.dataset.load_examples`.
        split: which part to take.
        prompt_column: the column that holds the prompt.
        by_scores: take the scores of pairs for labels, not 1 and 0.
        limit: at most this many rows, from the start.

    Raises:
        ValueError: it holds nothing of the kind, or a row of it is wrong: which, and how.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = Path(folder.name, "pairs.jsonl")
        >>> _ = file.write_text('{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}')
        >>> load_judged(file)[0].completions
        (' 2', ' 3')
        >>> folder.cleanup()
    """
    judged, problems = read_judged(
        path_or_id, split=split, prompt_column=prompt_column, by_scores=by_scores, limit=limit
    )
    if problems:
        more = f" (and {len(problems) - 1} more; klimb data check lists them)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    return judged


def read_judged(
    path_or_id: str | Path,
    *,
    split: str | None = None,
    prompt_column: str = "prompt",
    by_scores: bool = False,
    limit: int | None = None,
) -> tuple[list[Judged], list[str]]:
    """The rows that are right, and what is wrong with each of the others. Arguments as `load_judged`.

    Raises:
        ValueError: it cannot be read at all, or holds nothing of the kind.
    """
    rows, names = read_rows(path_or_id, split=split)
    return judged_rows(path_or_id, rows[:limit], names, prompt_column=prompt_column, by_scores=by_scores)


def judged_rows(
    path_or_id: str | Path,
    rows: Sequence[Row],
    names: Sequence[str],
    *,
    prompt_column: str,
    by_scores: bool = False,
    any_number: bool = False,
) -> tuple[list[Judged], list[str]]:
    """`read_judged` of rows that were read already, with the names of their columns; with any number of completions a row, if so asked."""
    kind = kind_of(names)
    if kind is None:
        wanted = sorted({name for needed in KINDS.values() for name in needed})
        near = next((said for said in (nearest(name, wanted) for name in names) if said), "")
        raise ValueError(
            f"{path_or_id}: no judged completions{near}; the columns there are {', '.join(names)}; expected chosen and rejected, "
            "completion and label, completions and scores, or completion alone"
        )
    if (
        by_scores
        and kind == "pairs"
        and not ({"score_chosen", "score_rejected"} <= set(names) or "margin" in names)
    ):
        raise ValueError(
            f"{path_or_id}: no scores of these pairs; expected the columns score_chosen and score_rejected, or margin"
        )
    found: list[Judged] = []
    problems: list[str] = []
    for number, (where, row) in enumerate(rows):
        try:
            found.append(_judged(number, where, row, kind, prompt_column, by_scores))
        except ValueError as error:
            problems.append(str(error))
    sizes = {len(row.completions) for row in found}
    if len(sizes) > 1 and not any_number:
        problems.append(
            f"{path_or_id}: rows of {min(sizes)} to {max(sizes)} completions, expected as many in each; make pairs of them (klimb data convert --to pairs)"
        )
    return found, problems


def _judged(
    number: int, where: str, row: Mapping[str, object], kind: str, prompt_column: str, by_scores: bool
) -> Judged:
    texts, labels = READ[kind](where, row)
    if by_scores and kind == "pairs":
        labels = _pair_scores(where, row)
    prompt, completions = _apart(where, row.get(prompt_column), texts)
    for completion in completions:
        if not completion.strip():
            raise ValueError(f"{where}: a completion is empty; write it or delete the row")
        if len(completion) > LONGEST:
            raise ValueError(
                f"{where}: a completion of {len(completion):,} characters, expected at most {LONGEST:,}; delete the row"
            )
    if kind == "pairs" and completions[0] == completions[1]:
        raise ValueError(
            f"{where}: chosen and rejected are the same; there is nothing to learn from it, delete the row"
        )
    others = {
        name: value
        for name, value in row.items()
        if name not in (prompt_column, *SCORES, *(n for needed in KINDS.values() for n in needed))
    }
    return Judged(Example(prompt, {**others, "row": number}), completions, labels, where)


def _pair(where: str, row: Mapping[str, object]) -> tuple[list[object], tuple[float, ...]]:
    return [row.get("chosen"), row.get("rejected")], (1.0, 0.0)


def _pair_scores(where: str, row: Mapping[str, object]) -> tuple[float, ...]:
    if row.get("score_chosen") is not None or row.get("score_rejected") is not None:
        return _number(where, "score_chosen", row.get("score_chosen")), _number(
            where, "score_rejected", row.get("score_rejected")
        )
    return _number(where, "margin", row.get("margin")), 0.0


def _labelled(where: str, row: Mapping[str, object]) -> tuple[list[object], tuple[float, ...]]:
    label = {"true": True, "false": False}.get(str(row.get("label")).lower())
    if label is None:
        raise ValueError(f"{where}: got the label {row.get('label')!r}, expected true or false")
    return [row.get("completion")], (float(label),)


def _ranked(where: str, row: Mapping[str, object]) -> tuple[list[object], tuple[float, ...]]:
    completions, scores = row.get("completions"), row.get("scores")
    if not isinstance(completions, list) or not isinstance(scores, list) or len(completions) != len(scores):
        raise ValueError(f"{where}: expected completions and scores to be lists, as many of each")
    if len(completions) < 2:
        raise ValueError(f"{where}: got {len(completions)} completions, expected 2 or more to compare")
    return completions, tuple(_number(where, "scores", score) for score in scores)


def _alone(where: str, row: Mapping[str, object]) -> tuple[list[object], tuple[float, ...]]:
    return [row.get("completion" if "completion" in row else "messages")], (1.0,)


READ: Mapping[str, Callable[[str, Mapping[str, object]], tuple[list[object], tuple[float, ...]]]] = {
    "pairs": _pair,
    "unpaired": _labelled,
    "ranked": _ranked,
    "completions": _alone,
    "messages": _alone,
}


def _number(where: str, name: str, value: object) -> float:
    try:
        number = float(value)  # ty: ignore[invalid-argument-type]  # a CSV's are text
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or isinstance(value, bool):
        raise ValueError(f"{where}: got {name} {value!r}, expected a finite number")
    return number


def _apart(where: str, prompt: object, completions: Sequence[object]) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt and the texts of its completions, also where the prompt is what all of them begin with."""
    if all(isinstance(c, str) for c in completions):
        texts = [str(c) for c in completions]
        if prompt is not None:
            return checked_prompt(prompt, "prompt", where), tuple(texts)
        shared = _shared_words(texts) if len(texts) > 1 else 0
        if not shared:
            raise ValueError(
                f"{where}: no prompt, and the completions do not begin alike; give a column prompt"
            )
        return checked_prompt(texts[0][:shared], "prompt", where), tuple(text[shared:] for text in texts)
    chats: list[list[dict[str, str]]] = []
    odd = [c for c in completions if not isinstance(c, str | list)] or [
        c for c in completions if not isinstance(c, list)
    ]
    for completion in odd or completions:
        if not isinstance(completion, list) or not completion:
            raise ValueError(
                f"{where}: got a completion of type {type(completion).__name__}, expected text or a list of chat messages"
            )
        chats.append([checked_message(message, where) for message in completion])
    before: Prompt
    if prompt is None:
        shared = min(len(chat) for chat in chats) - 1
        begin = chats[0][:shared]
        if shared < 1 or any(chat[:shared] != begin or len(chat) != shared + 1 for chat in chats):
            raise ValueError(
                f"{where}: no prompt, and the conversations do not share all but their last message; give a column prompt"
            )
        before, last = checked_prompt(begin, "prompt", where), [chat[-1] for chat in chats]
    else:
        before = checked_prompt(prompt, "prompt", where)
        if any(len(chat) != 1 for chat in chats):
            raise ValueError(f"{where}: got a completion of several messages, expected one, the assistant's")
        last = [chat[0] for chat in chats]
    for message in last:
        if message["role"] != "assistant":
            raise ValueError(f"{where}: got a completion of the role {message['role']!r}, expected assistant")
    return before, tuple(message["content"] for message in last)


def _shared_words(texts: Sequence[str]) -> int:
    """Characters that all texts begin with, up to the end of a word."""
    shortest = min(texts, key=len)
    same = next((i for i, c in enumerate(shortest) if any(text[i] != c for text in texts)), len(shortest))
    while same and not shortest[same - 1].isspace():
        same -= 1
    return same - 1 if same else 0
