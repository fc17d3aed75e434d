"""Judged completions from one format to another, and how much of them does not come along.

    to            is made of
    pairs         pairs; ranked, all pairs whose scores differ; unpaired, a prompt's good ones with its bad ones, in order
    unpaired      unpaired; pairs, two rows each
    ranked        ranked; pairs, with their scores or 1 and 0
    completions   anything: the chosen ones, the best by score, those labelled good, those that nobody judged
    messages      the same, a conversation a row
    prompts       anything: each prompt once

Whatever else stands in a row goes with it. What would take a meaning that is not there is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from klimb.comparisons import KINDS, SCORES, Judged, judged_rows, kind_of
from klimb.data import Prompt
from klimb.dataset import read_rows
from klimb.nearest import nearest

Line = dict[str, object]

FORMATS = ("pairs", "unpaired", "ranked", "completions", "messages", "prompts")
UNJUDGED = "nobody judged them"
REFUSED = {
    ("ranked", "unpaired"): "scores do not say where good begins; make pairs of them first",
    ("unpaired", "ranked"): "labels rank nothing; make pairs of them first",
    **{(kind, to): UNJUDGED for kind in ("completions", "messages") for to in FORMATS[:3]},
}
"""(what a file is, what it shall be) -> why not"""


@dataclass(frozen=True)
class Converted:
    """What `convert` made.

    Attributes:
        kind: what the file was.
        rows: the new rows.
        dropped: how many are not in them.
        unit: of what, completions or rows.
        because: why not.
    """

    kind: str
    rows: list[Line]
    dropped: int
    unit: str
    because: str


@dataclass(frozen=True)
class _Row:
    """A judged row with its prompt as it shall be written, and what else its line in the file holds."""

    prompt: Prompt
    completions: tuple[str, ...]
    labels: tuple[float, ...]
    where: str
    scores: Mapping[str, object]
    others: Mapping[str, object]

    def say(self, text: str) -> object:
        """A completion, as text or chat as the prompt is."""
        return text if isinstance(self.prompt, str) else [{"role": "assistant", "content": text}]


def convert(
    path_or_id: str | Path,
    to: str,
    *,
    split: str | None = None,
    prompt_column: str = "prompt",
    form: str | None = None,
) -> Converted:
    """Read judged completions and write their rows anew in another of TRL's formats.

    Args:
        path_or_id: as `klimb.dataset.load_examples`.
        to: one of FORMATS.
        split: which part to take.
        prompt_column: the column that holds the prompt; in the new rows it is `prompt`.
        form: "chat" makes a text prompt the one message of a user; "text" the other way round; None leaves it.

    Raises:
        ValueError: a row is wrong, the format would need what is not there, or nothing is left.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = Path(folder.name, "pairs.jsonl")
        >>> _ = file.write_text('{"prompt": "1 + 1 =", "chosen": " 2", "rejected": " 3"}')
        >>> convert(file, "unpaired").rows[1]
        {'prompt': '1 + 1 =', 'completion': ' 3', 'label': False}
        >>> folder.cleanup()
    """
    if to not in FORMATS:
        raise ValueError(f"--to: got {to!r}{nearest(to, FORMATS)}, expected one of {', '.join(FORMATS)}")
    lines, names = read_rows(path_or_id, split=split)
    by_scores = to == "ranked" and not set(SCORES).isdisjoint(names)
    judged, problems = judged_rows(
        path_or_id,
        lines,
        names,
        prompt_column=prompt_column,
        by_scores=by_scores,
        any_number=to != "ranked",
    )
    if problems:
        more = f" (and {len(problems) - 1} more; klimb data check lists them)" if len(problems) > 1 else ""
        raise ValueError(problems[0] + more)
    kind = kind_of(names)
    assert kind is not None
    if (kind, to) in REFUSED:
        raise ValueError(f"{path_or_id} holds {kind}, and no {to} come of them: {REFUSED[kind, to]}")
    rows = [_row(one, lines[i][1], prompt_column, form) for i, one in enumerate(judged)]
    made, because = MADE[to](rows, kind)
    if not made:
        raise ValueError(f"{path_or_id} holds {kind}, and no {to} come of them: {because}")
    if to == "prompts":
        return Converted(kind, made, len(rows) - len(made), "rows", because)
    held = sum(len(row.completions) for row in rows)
    return Converted(kind, made, held - _kept(rows, made, to), "completions", because)


def _row(judged: Judged, line: Mapping[str, object], prompt_column: str, form: str | None) -> _Row:
    own = {"prompt", prompt_column, *SCORES, *(name for needed in KINDS.values() for name in needed)}
    return _Row(
        _prompt(judged, form),
        judged.completions,
        judged.labels,
        judged.where,
        {name: line[name] for name in SCORES if line.get(name) is not None},
        {name: value for name, value in line.items() if name not in own},
    )


def _prompt(judged: Judged, form: str | None) -> Prompt:
    prompt = judged.example.prompt
    if form == "chat" and isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if form == "text" and not isinstance(prompt, str):
        if [message["role"] for message in prompt] != ["user"]:
            raise ValueError(
                f"{judged.where}: got a prompt of the roles {', '.join(m['role'] for m in prompt)}, of which only a model's template "
                "makes one text; expected a single message of a user, or leave --as text out"
            )
        return prompt[0]["content"]
    return prompt


# Each takes the rows and what they were, and gives the new ones and why some completion may not be in them.


def _pairs(rows: Sequence[_Row], kind: str) -> tuple[list[Line], str]:
    if kind == "pairs":
        return [_pair(row, row.completions, row.scores, row.others) for row in rows], ""
    if kind == "ranked":
        return [line for row in rows for line in _ranked_pairs(row)], "all scores of a row are the same"
    made = []
    for group in _of_one_prompt(rows):
        good, bad = ([row for row in group if row.labels[0] == label] for label in (1.0, 0.0))
        for one, other in zip(good, bad, strict=False):
            shared = {n: x for n, x in one.others.items() if n in other.others and other.others[n] == x}
            made.append(_pair(one, (one.completions[0], other.completions[0]), {}, shared))
    return made, "a pair takes a good and a bad completion of one prompt"


def _pair(
    row: _Row, texts: Sequence[str], scores: Mapping[str, object], others: Mapping[str, object]
) -> Line:
    chosen, rejected = map(row.say, texts)
    return {"prompt": row.prompt, "chosen": chosen, "rejected": rejected, **scores, **others}


def _ranked_pairs(row: _Row) -> Iterator[Line]:
    for i, j in combinations(range(len(row.labels)), 2):
        if row.labels[i] != row.labels[j]:
            better, worse = (i, j) if row.labels[i] > row.labels[j] else (j, i)
            scores = {"score_chosen": row.labels[better], "score_rejected": row.labels[worse]}
            yield _pair(row, (row.completions[better], row.completions[worse]), scores, row.others)


def _of_one_prompt(rows: Sequence[_Row]) -> list[list[_Row]]:
    """Rows of the same prompt and split, in the order of the file."""
    groups: dict[str, list[_Row]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row.prompt, row.others.get("split")], default=str), []).append(row)
    return list(groups.values())


def _unpaired(rows: Sequence[_Row], kind: str) -> tuple[list[Line], str]:
    return [
        {"prompt": row.prompt, "completion": row.say(text), "label": label == 1.0, **row.others}
        for row in rows
        for text, label in zip(row.completions, row.labels, strict=True)
    ], ""


def _ranked(rows: Sequence[_Row], kind: str) -> tuple[list[Line], str]:
    for row in rows:
        if kind == "pairs" and not row.labels[0] > row.labels[1]:
            raise ValueError(
                f"{row.where}: chosen has no larger score than rejected, and a ranking would forget who was chosen; mend the scores"
            )
    return [
        {
            "prompt": row.prompt,
            "completions": [row.say(text) for text in row.completions],
            "scores": list(row.labels),
            **row.others,
        }
        for row in rows
    ], ""


def _best(rows: Sequence[_Row], kind: str) -> Iterator[tuple[_Row, str]]:
    for row in rows:
        best = max(row.labels)
        if kind != "unpaired" or best == 1.0:
            yield row, row.completions[row.labels.index(best)]


def _completions(rows: Sequence[_Row], kind: str) -> tuple[list[Line], str]:
    return [
        {"prompt": row.prompt, "completion": row.say(text), **row.others} for row, text in _best(rows, kind)
    ], "only the best are kept"


def _messages(rows: Sequence[_Row], kind: str) -> tuple[list[Line], str]:
    def talk(row: _Row, text: str) -> list[Mapping[str, str]]:
        begin = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        return [*begin, {"role": "assistant", "content": text}]

    return [
        {"messages": talk(row, text), **row.others} for row, text in _best(rows, kind)
    ], "only the best are kept"


def _prompts(rows: Sequence[_Row], kind: str) -> tuple[list[Line], str]:
    lines = [{"prompt": row.prompt, **row.others} for row in rows]
    once = {json.dumps(line, default=str, sort_keys=True): line for line in lines}
    return list(once.values()), "the same prompt with the same columns is there already"


MADE: Mapping[str, Callable[[Sequence[_Row], str], tuple[list[Line], str]]] = {
    "pairs": _pairs,
    "unpaired": _unpaired,
    "ranked": _ranked,
    "completions": _completions,
    "messages": _messages,
    "prompts": _prompts,
}


def _kept(rows: Sequence[_Row], made: Sequence[Line], to: str) -> int:
    """Completions that are in the new rows."""
    if (
        to == "pairs" and len(rows[0].completions) != 1
    ):  # a ranked completion may be in several pairs, or in none
        return sum(len(row.completions) for row in rows if len(set(row.labels)) > 1)
    return sum(2 if to == "pairs" else len(line["completions"]) if to == "ranked" else 1 for line in made)  # ty: ignore[invalid-argument-type]
