"""Reading prompts: a JSONL, CSV or Parquet file, or the name of a data set, becomes a list of examples.

The columns are TRL's: `prompt` is a text, or a list of chat messages `{"role": ..., "content": ...}`; every
other column goes to the reward as it is. What cannot be read is refused here, by line, before a model is
loaded.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from klimb.data import Example
from klimb.nearest import nearest, nearest_file
from klimb.tasks import BEGIN, generated

Row = tuple[str, dict[str, object]]  # where it stands ("prompts.jsonl, line 3") and its columns


def load_examples(
    path_or_id: str | Path,
    *,
    split: str | None = None,
    prompt_column: str = "prompt",
    limit: int | None = None,
) -> list[Example]:
    """Read prompts and the columns that go with them.

    Files are told apart by their ending: `.jsonl` (one object a line), `.csv` (with a header; every value is
    text), `.parquet`. A file with a column `split` gives the rows whose value there is `split`; a file
    without one is all "train", as in `datasets`. Anything else is a folder or id for `datasets.load_dataset`,
    a configuration after a colon ("openai/gsm8k:main"), and without `split` its "train"; or puzzles that are
    made (`reasoning_gym:TASK`, see `klimb.tasks`).

    Args:
        path_or_id: a file, a folder of data files, or the id of a data set; `~` is the home folder.
        split: which part to take; None takes all rows of a file.
        prompt_column: the column that holds the prompt.
        limit: at most this many examples, from the start.

    Returns:
        The examples in the order of the file. A column missing in some rows is None there.

    Raises:
        ValueError: the file, the column or the split is not there, a line cannot be read, a prompt is empty
            or is neither text nor messages, or nothing is left.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = tempfile.TemporaryDirectory()
        >>> file = Path(folder.name, "sums.jsonl")
        >>> _ = file.write_text('{"prompt": "1 + 1 =", "answer": 2}')
        >>> load_examples(file)
        [Example(prompt='1 + 1 =', columns={'answer': 2})]
        >>> folder.cleanup()

    Not the same as `datasets.load_dataset("csv")`, which guesses types: here "007" stays "007".
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1, or none to take all")
    rows, names = read_rows(path_or_id, split=split)
    if prompt_column not in names:
        raise ValueError(
            f"{path_or_id}: no column {prompt_column!r}{nearest(prompt_column, names)}; "
            f"the columns there are {', '.join(names)}; name the right one with prompt_column"
        )
    others = [name for name in names if name != prompt_column]
    return [
        Example(
            checked_prompt(row.get(prompt_column), prompt_column, where),
            {name: row.get(name) for name in others},
        )
        for where, row in rows[:limit]
    ]


def read_rows(path_or_id: str | Path, *, split: str | None = None) -> tuple[list[Row], list[str]]:
    """The rows of a file or data set, each with where it stands, and the names of all columns.

    Raises:
        ValueError: as `load_examples`, but for what a prompt is.
    """
    path_or_id = os.path.expanduser(path_or_id)
    path = Path(path_or_id)
    read = READERS.get(path.suffix.lower())
    if read is None and path.is_file():
        raise ValueError(
            f"{path}: got a file ending in {path.suffix!r}, expected one of {', '.join(READERS)}"
        )
    if read is None:
        rows = list((generated if path_or_id.startswith(BEGIN) else _from_datasets)(path_or_id, split))
    else:
        if not path.is_file():
            raise ValueError(f"{path}: no such file{nearest_file(path)}")
        rows = list(read(path))
    if not rows:
        raise ValueError(f"{path_or_id}: the data set is empty; expected at least one prompt")
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    if read is not None and split is not None:
        rows = _only_split(rows, split, names, path)
    return rows, names


def checked_prompt(prompt: object, column: str, where: str) -> str | list[dict[str, str]]:
    """The prompt as it is, if it is text or chat messages that say something.

    Raises:
        ValueError: it is not.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where}: the prompt is empty; write one or delete the row")
        return prompt
    if prompt is None or prompt == []:
        raise ValueError(
            f"{where}: the prompt is empty (column {column!r} is {prompt}); write one or delete the row"
        )
    if not isinstance(prompt, list):
        raise ValueError(
            f"{where}: got a prompt of type {type(prompt).__name__}, expected text or a list of chat messages"
        )
    messages = [checked_message(message, where) for message in prompt]
    if not messages[-1]["content"].strip():
        raise ValueError(
            f"{where}: the prompt is empty: its last message says nothing; write it or delete the row"
        )
    return messages


def checked_message(message: object, where: str) -> dict[str, str]:
    """The message without keys that are None.

    Raises:
        ValueError: it has no role or no content.
    """
    if isinstance(message, dict):
        role, content = message.get("role"), message.get("content")
        if isinstance(role, str) and isinstance(content, str):
            # Parquet fills the keys that other messages have with None; a template must not see them.
            return {key: value for key, value in message.items() if value is not None}
    raise ValueError(
        f'{where}: got the message {message!r}, expected {{"role": "user", "content": "some text"}}'
    )


def _only_split(rows: list[Row], split: str, names: list[str], path: Path) -> list[Row]:
    if "split" not in names:
        if split == "train":
            return rows
        raise ValueError(
            f"{path}: no split {split!r}: the file has no column 'split', so all of it is 'train'; "
            "add the column, or take all of it (split None, in a configuration dataset_test_split: null)"
        )
    there = list(dict.fromkeys(str(row.get("split")) for _, row in rows))
    kept = [(where, row) for where, row in rows if row.get("split") == split]
    if not kept:
        raise ValueError(
            f"{path}: no split {split!r}{nearest(split, there)}; the ones there are {', '.join(there)}"
        )
    return kept


def _from_jsonl(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: not JSON: {error.msg} at column {error.colno}; got {line[:80]!r}"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(
                f'{where}: got {line[:80]!r}, expected an object such as {{"prompt": "some text"}}'
            )
        yield where, row


def _from_csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise ValueError(
                    f"{where}: got more or fewer values than the header has columns; quote the commas"
                )
            yield where, dict(row)
    except csv.Error as error:
        raise ValueError(f"{path}, after line {reader.line_num}: not CSV: {error}") from error


def _from_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: not a Parquet file: {error}") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {number}", row


def _from_datasets(name: str, split: str | None) -> Iterator[Row]:
    import datasets

    path, _, config = name.partition(":")
    try:
        table = datasets.load_dataset(path, config or None, split=split or "train")
    except Exception as error:  # datasets, the hub and the network each raise classes of their own
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if Path(name).is_dir():
            raise ValueError(
                f"{name}: datasets cannot read this folder ({why}); or name a file in it that ends in "
                f"{', '.join(READERS)}"
            ) from error
        raise ValueError(
            f"{name}: no file of this name{nearest_file(Path(name))}, and as a data set: {why}"
        ) from error
    for number, row in enumerate(table, start=1):
        yield f"{name}, row {number}", row


READERS = {".jsonl": _from_jsonl, ".csv": _from_csv, ".parquet": _from_parquet}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # with or without the mark that spreadsheets put first
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
