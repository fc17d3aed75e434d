"""Which completions the page carries: the best and the worst of policy and reference, from every prompt some.

Draws of `measure` come first: they are of held-out prompts and of the policy as it ended. Without them the
policy speaks by its last training steps, and the reference by the pool of the plan. The rest stays in Parquet.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from markupsafe import escape

from klimb.report.words import visible
from klimb.store import StoredDraws, read_draws

MAX_ROWS = 2000
MAX_BYTES = 1_200_000
"""of the rows as they stand in the page; the page has 3 MB, a third of it is what draws the charts"""
EXTREMES = 10
"""so many best and so many worst of each are shown before anybody asks for more"""
MARKUP_BYTES = 300
"""what a row costs beside its text"""


@dataclass(frozen=True)
class Row:
    """One completion in the page.

    Attributes:
        who: "policy" or "reference".
        prompt_id: of its prompt.
        prompt: beginning of its text.
        completion: beginning of its text.
        more: characters of the completion that were left out.
        reward: in its own units.
        log_ratio: log pi - log ref, nats; None if one of them is unknown.
        finished: whether it ended by itself.
        extreme: whether it is among the best and worst of all.
    """

    who: str
    prompt_id: str
    prompt: str
    completion: str
    more: int
    reward: float
    log_ratio: float | None
    finished: bool
    extreme: bool = False


@dataclass(frozen=True)
class Table:
    """The rows, best first, the files they come from, and how many draws those files hold."""

    rows: Sequence[Row]
    files: Sequence[str]
    drawn: int


def draw_table(paths: Sequence[Path], *, max_rows: int = MAX_ROWS, max_bytes: int = MAX_BYTES) -> Table:
    """The completions to show, best first.

    Args:
        paths: Parquet files of a run.
        max_rows: policy and reference together.
        max_bytes: of their text, escaped.

    Raises:
        ValueError: a file is not one that klimb wrote.
    """
    rows: list[Row] = []
    files: list[str] = []
    drawn = 0
    for who in ("policy", "reference"):
        for path in _sources(paths, who):
            if sum(row.who == who for row in rows) >= max_rows // 4:
                break  # enough of training's last steps
            found = _rows(read_draws(path), who)
            rows += found
            drawn += len(found)
            files += [path.name] if found else []
    kept = _within(_by_interest(rows), max_rows, max_bytes)
    return Table(sorted(kept, key=lambda row: -row.reward), files, drawn)


def of_reference(path: Path) -> bool:
    """Whether the file's name says that the reference drew it."""
    return path.stem == "plan" or "reference" in path.stem


def _sources(paths: Sequence[Path], who: str) -> list[Path]:
    """Files of one who, those of the measurement alone if there are any; else the newest step first."""
    own = [path for path in paths if of_reference(path) == (who == "reference")]
    for verb in ("measure", "train", "plan"):
        chosen = [path for path in own if path.stem.startswith(verb)]
        if chosen:
            return sorted(chosen, reverse=True)
    return []


def _rows(stored: StoredDraws, who: str) -> list[Row]:
    draws = stored.draws
    if stored.reward is None or draws.texts is None:
        return []
    rewards, finished = stored.reward.tolist(), draws.finished.tolist()
    ratios = None
    if stored.log_pi is not None and stored.log_ref is not None:
        ratios = (stored.log_pi - stored.log_ref).tolist()
    rows = []
    for p, (example, texts) in enumerate(zip(draws.examples, draws.texts, strict=True)):
        prompt, _ = cut(_spoken(example.prompt), 160)
        for g, text in enumerate(texts):
            if math.isnan(rewards[p][g]):
                continue  # the store reads what was never scored as NaN
            completion, more = cut(text, 700)
            ratio = ratios[p][g] if ratios else math.nan
            rows.append(
                Row(
                    who,
                    example.id,
                    prompt,
                    completion,
                    more,
                    rewards[p][g],
                    ratio if math.isfinite(ratio) else None,
                    finished[p][g],
                )
            )
    return rows


def _by_interest(rows: Sequence[Row]) -> list[Row]:
    """The best and worst of all, then of each prompt the best, the worst, the second best, and so on."""
    ranked: list[tuple[float, Row]] = []
    for who in ("policy", "reference"):
        order = sorted((row for row in rows if row.who == who), key=lambda row: -row.reward)
        sizes, seen = Counter(row.prompt_id for row in order), Counter[str]()
        for place, row in enumerate(order):
            from_top = seen[row.prompt_id]
            from_bottom = sizes[row.prompt_id] - 1 - from_top
            seen[row.prompt_id] += 1
            extreme = min(place, len(order) - 1 - place) < EXTREMES
            depth = -1 if extreme else min(2 * from_top, 2 * from_bottom + 1)
            ranked.append((depth, replace(row, extreme=extreme)))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def _within(rows: Iterable[Row], max_rows: int, max_bytes: int) -> list[Row]:
    kept: list[Row] = []
    size = 0
    for row in rows:
        size += MARKUP_BYTES + len(str(escape(row.prompt) + escape(row.completion)).encode())
        if len(kept) == max_rows or size > max_bytes:
            break
        kept.append(row)
    return kept


def _spoken(prompt: object) -> str:
    """A prompt as text, a chat line by line."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence):
        return json.dumps(prompt, ensure_ascii=False, default=str)
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in prompt)


def cut(text: str, length: int) -> tuple[str, int]:
    """The beginning of a text as it may stand in a page, and how many characters were left out."""
    return visible(text[:length]), max(len(text) - length, 0)
