"""Which completions the page carries: best, worst, most re-weighted, some at random, from every prompt some.

Draws of `measure` come first: they are of held-out prompts and of the policy as it ended. Without them the
policy speaks by its last training steps, and the reference by the pool of the plan. The rest stays in Parquet.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup

from klimb.numbers.tilt import shares
from klimb.report.words import visible
from klimb.store import StoredDraws, read_draws

MAX_ROWS = 1400
MAX_BYTES = 900_000
"""of the rows as they stand in the page; the page has 3 MB, a third of it is what draws the charts"""
EXTREMES = 10
"""so many best, worst, most re-weighted and most moved of each are carried before any others"""
MARKUP_BYTES = 120
"""what a row costs beside its text"""
LONGEST = 700
"""characters of a completion"""


@dataclass(frozen=True)
class Row:
    """One completion in the page.

    Attributes:
        who: "policy" or "reference".
        place: of its prompt in the file.
        draw: its number among the draws of its prompt.
        prompt_id: of its prompt.
        prompt: beginning of its text.
        completion: beginning of its text.
        more: characters of the completion that were left out.
        reward: in its own units.
        log_ratio: log pi - log ref, nats; None if one of them is unknown.
        weight: how much likelier it is under the best policy than under the law that drew it, the draws of its prompt
            together having 1; None if the best policy is not known.
        finished: whether it ended by itself.
        extreme: whether it is among the best and worst of all.
        tokens: characters of each token and its log pi - log ref in nats; empty if unknown.
        file: that it is from.
    """

    who: str
    place: int
    draw: int
    prompt_id: str
    prompt: str
    completion: str
    more: int
    reward: float
    log_ratio: float | None
    weight: float | None
    finished: bool
    extreme: bool = False
    tokens: Sequence[tuple[int, float]] = ()
    file: str = ""


@dataclass(frozen=True)
class Table:
    """The rows, best first, the files they come from, and how many draws those files hold."""

    rows: Sequence[Row]
    files: Sequence[str]
    drawn: int


def draw_table(
    paths: Sequence[Path],
    *,
    beta: float | None = None,
    tokenizer: Path | None = None,
    max_rows: int = MAX_ROWS,
    max_bytes: int = MAX_BYTES,
) -> Table:
    """The completions to show, best first.

    Args:
        paths: Parquet files of a run.
        beta: of the best policy that weights are of.
        tokenizer: tokenizer.json, which tells where tokens begin; without it they are not coloured.
        max_rows: policy and reference together.
        max_bytes: of their text, escaped.

    Raises:
        ValueError: a file is not one that klimb wrote.
    """
    rows: list[Row] = []
    files: list[str] = []
    stored: dict[str, StoredDraws] = {}
    drawn = 0
    for who in ("policy", "reference"):
        for path in _sources(paths, who):
            if sum(row.who == who for row in rows) >= max_rows // 4:
                break  # enough of training's last steps
            read = read_draws(path)
            found = rows_of(read, who, beta, path.name)
            stored[path.name] = read
            rows += found
            drawn += len(found)
            files += [path.name] if found else []
    kept = chosen_rows(rows, max_rows, max_bytes)
    if tokenizer is not None and tokenizer.is_file():
        kept = with_tokens(kept, stored, tokenizer)
    return Table(sorted(kept, key=lambda row: -row.reward), files, drawn)


def chosen_rows(rows: Sequence[Row], max_rows: int, max_bytes: int) -> list[Row]:
    """At most so many of them, the most telling first."""
    return _within(_by_interest(rows), max_rows, max_bytes)


def table_record(table: Table) -> tuple[list[str], list[list[object]]]:
    """The prompts, and the rows as draws.js reads them."""
    places: dict[str, int] = {}
    prompts = []
    for row in table.rows:
        if row.prompt_id not in places:
            places[row.prompt_id] = len(prompts)
            prompts.append(row.prompt)
    return prompts, [
        [
            int(row.who == "reference"),
            places[row.prompt_id],
            row.completion,
            row.more,
            _rounded(row.reward, 6),
            _rounded(row.log_ratio, 3),
            _rounded(row.weight, 4),
            int(row.finished),
            int(row.extreme),
            *_tokens(row.tokens),
        ]
        for row in table.rows
    ]


def _rounded(x: float | None, digits: int) -> float | None:
    return None if x is None or not math.isfinite(x) else float(f"{x:.{digits}g}")


def _tokens(tokens: Sequence[tuple[int, float]]) -> list[str]:
    """Lengths in characters, and log ratios in tenths of a nat, a byte each."""
    if not tokens:
        return []
    tenths = [min(max(round(10 * ratio), -127), 127) % 256 for _, ratio in tokens]
    return [base64.b64encode(bytes(x)).decode() for x in ([length for length, _ in tokens], tenths)]


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


def with_tokens(rows: Sequence[Row], stored: Mapping[str, StoredDraws], tokenizer: Path) -> list[Row]:
    """The rows with the characters of each token and its log pi - log ref, where both are known and the pieces fit."""
    from tokenizers import Tokenizer

    pieces = Tokenizer.from_file(str(tokenizer))
    ratios: dict[str, Sequence[Sequence[float]]] = {}
    for name, read in stored.items():
        if read.token_log_pi is not None and read.token_log_ref is not None:
            parts = (read.token_log_pi - read.token_log_ref).split(read.draws.lengths.flatten().tolist())
            ratios[name] = [part.tolist() for part in parts]
    coloured = []
    for row in rows:
        own: Sequence[tuple[int, float]] = ()
        if row.file in ratios:
            draws = stored[row.file].draws
            assert draws.texts is not None
            ids = draws.completions[row.place][row.draw].tolist()
            lengths = token_lengths(pieces, ids, draws.texts[row.place][row.draw])
            known = ratios[row.file][row.place * draws.num_draws + row.draw]
            if lengths is not None and all(map(math.isfinite, known)):
                own = _until(list(zip(lengths, known, strict=True)), LONGEST)
        coloured.append(replace(row, tokens=own))
    return coloured


def token_lengths(tokenizer: Any, ids: Sequence[int], text: str) -> list[int] | None:
    """Characters of each token of a completion; None where they do not add up to its text, or one is longer than a byte says."""
    pieces = tokenizer.decode_batch([[i] for i in ids])
    if "".join(pieces) != text:  # a letter of several tokens, or words that are joined by spaces
        ends = [0]
        for k in range(1, len(ids) + 1):
            begun = tokenizer.decode(ids[:k]).rstrip("\ufffd")
            ends.append(max(len(begun), ends[-1]) if text.startswith(begun) else ends[-1])
        if ends[-1] != len(text):
            return None
        return _bytes([b - a for a, b in pairwise(ends)])
    return _bytes([len(piece) for piece in pieces])


def _bytes(lengths: list[int]) -> list[int] | None:
    return lengths if max(lengths, default=0) < 256 else None


def _until(tokens: list[tuple[int, float]], most: int) -> list[tuple[int, float]]:
    """Whole tokens within so many characters."""
    total = 0
    for i, (length, _) in enumerate(tokens):
        total += length
        if total > most:
            return tokens[:i]
    return tokens


def rows_of(stored: StoredDraws, who: str, beta: float | None, file: str = "") -> list[Row]:
    """Every scored draw of a file."""
    draws = stored.draws
    if stored.reward is None or draws.texts is None:
        return []
    ratios = None
    if stored.log_pi is not None and stored.log_ref is not None:
        ratios = stored.log_pi - stored.log_ref
    weights = None
    if beta and (who == "reference" or ratios is not None):
        log_w = stored.reward.double() / beta - (
            ratios.double() if who == "policy" and ratios is not None else 0
        )
        weights = (shares(log_w.nan_to_num(-math.inf)) * draws.num_draws).tolist()
    rewards, finished = stored.reward.tolist(), draws.finished.tolist()
    moved = None if ratios is None else ratios.tolist()
    rows = []
    said_once = opening([example.prompt for example in draws.examples])
    for p, (example, texts) in enumerate(zip(draws.examples, draws.texts, strict=True)):
        prompt, _ = cut(spoken(example.prompt, without=said_once), 160)
        for g, text in enumerate(texts):
            if math.isnan(rewards[p][g]):
                continue  # the store reads what was never scored as NaN
            completion, more = cut(text, LONGEST)
            ratio = moved[p][g] if moved else math.nan
            rows.append(
                Row(
                    who,
                    p,
                    g,
                    example.id,
                    prompt,
                    completion,
                    more,
                    rewards[p][g],
                    ratio if math.isfinite(ratio) else None,
                    weights[p][g] if weights else None,
                    finished[p][g],
                    file=file,
                )
            )
    return rows


def _by_interest(rows: Sequence[Row]) -> list[Row]:
    """The most extreme of all, then of each prompt the best, the worst, one at random, the second best, and so on."""
    ranked: list[tuple[float, Row]] = []
    generator = torch.Generator().manual_seed(0)
    for who in ("policy", "reference"):
        order = sorted((row for row in rows if row.who == who), key=lambda row: -row.reward)
        sizes, seen = Counter(row.prompt_id for row in order), Counter[str]()
        lots = torch.rand(len(order), generator=generator).tolist()
        telling = set()
        for name in ("log_ratio", "weight"):
            known = [i for i, row in enumerate(order) if getattr(row, name) is not None]
            telling |= set(sorted(known, key=lambda i: -getattr(order[i], name))[:EXTREMES])
        for place, row in enumerate(order):
            from_top = seen[row.prompt_id]
            from_bottom = sizes[row.prompt_id] - 1 - from_top
            seen[row.prompt_id] += 1
            extreme = min(place, len(order) - 1 - place) < EXTREMES
            by_lot = 3 * lots[place] * sizes[row.prompt_id] + 2
            depth = -1 if extreme or place in telling else min(3 * from_top, 3 * from_bottom + 1, by_lot)
            ranked.append((depth, replace(row, extreme=extreme)))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])]


def _within(rows: Iterable[Row], max_rows: int, max_bytes: int) -> list[Row]:
    kept: list[Row] = []
    size = 0
    for row in rows:
        size += MARKUP_BYTES + len(as_json(row.completion).encode())
        if len(kept) == max_rows or size > max_bytes:
            break
        kept.append(row)
    return kept


def spoken(prompt: object, *, without: object = None) -> str:
    """A prompt as text, a chat line by line, without the message that it begins with if it is this one."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, Sequence):
        return json.dumps(prompt, ensure_ascii=False, default=str)
    messages = prompt[1:] if without is not None and prompt[0] == without else prompt
    return "\n".join(f"{message.get('role')}: {message.get('content')}" for message in messages)


def opening(prompts: Sequence[object]) -> Mapping[str, str] | None:
    """The system message that all of several chats begin with; said once, it does not hide what each of them asks.

    Example:
        >>> system = {"role": "system", "content": "Be kind."}
        >>> chats = [[system, {"role": "user", "content": text}] for text in ("a", "b")]
        >>> opening(chats), spoken(chats[0], without=opening(chats)), opening(chats[:1])
        ({'role': 'system', 'content': 'Be kind.'}, 'user: a', None)
    """
    chats = [p for p in prompts if isinstance(p, Sequence) and not isinstance(p, str) and len(p) > 1]
    if len(chats) < 2 or len(chats) < len(prompts):
        return None
    first: Any = chats[0][0]
    return first if first.get("role") == "system" and all(chat[0] == first for chat in chats) else None


def as_json(value: object) -> Markup:
    r"""JSON that may stand in a page's script element: no tag or comment can begin or end in it.

    Example:
        >>> print(as_json("</script>"))
        "\u003c/script\u003e"
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for c in "<>&\u2028\u2029":
        text = text.replace(c, f"\\u{ord(c):04x}")
    return Markup(text)


def cut(text: str, length: int) -> tuple[str, int]:
    """The beginning of a text as it may stand in a page, and how many characters were left out."""
    return visible(text[:length]), max(len(text) - length, 0)
