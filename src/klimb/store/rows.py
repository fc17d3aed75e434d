"""Rows of data as a file that `klimb.dataset` reads again: .jsonl, .csv or .parquet, by its ending, whole or not at all."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from klimb.store.whole import write_whole

Row = Mapping[str, object]
ENDINGS = (".jsonl", ".csv", ".parquet")


def check_new(path: Path, *, force: bool) -> None:
    """Refuse, before anything is made, a file that cannot be written or is there already.

    Raises:
        ValueError: another ending, no such folder, or it is there and `force` is not set.
    """
    if path.suffix not in ENDINGS:
        raise ValueError(f"-o {path}: expected a file ending in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    if not path.parent.is_dir():
        raise ValueError(f"-o {path}: no such folder {path.parent}; make it first")
    if path.exists() and not force:
        raise ValueError(f"-o {path}: is there already; take another name, or --force to replace it")


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows, a line each; a column that some of them lack is null there.

    Raises:
        ValueError: a CSV file is to hold lists, a column holds values of different kinds for Parquet, or a number is NaN for JSON.

    Example:
        >>> import tempfile
        >>> from klimb.dataset import read_rows
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_rows(Path(folder, "a.csv"), [{"prompt": "say, a", "label": True}])
        ...     read_rows(Path(folder, "a.csv"))[0][0][1]
        {'prompt': 'say, a', 'label': 'true'}
    """
    {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[path.suffix](path, rows)


def _jsonl(path: Path, rows: Sequence[Row]) -> None:
    try:
        lines = [json.dumps(row, ensure_ascii=False, default=str, allow_nan=False) + "\n" for row in rows]
    except ValueError as error:
        raise ValueError(f"{path}: a number is NaN or infinite, which JSON has not; use .parquet") from error
    write_whole(path, "".join(lines))


def _csv(path: Path, rows: Sequence[Row]) -> None:
    names = _names(rows)
    for row in rows:
        for name in names:
            if isinstance(row.get(name), list | dict):
                raise ValueError(
                    f"{path}: a CSV file holds texts and numbers, and column {name!r} holds a {type(row[name]).__name__}; use "
                    ".jsonl or .parquet"
                )
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({n: str(x).lower() if isinstance(x, bool) else x for n, x in row.items()})
    write_whole(path, text.getvalue())


def _parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = _names(rows)
    try:
        table = pa.Table.from_pylist([{name: row.get(name) for name in names} for row in rows])
    except pa.ArrowException as error:
        raise ValueError(
            f"{path}: a Parquet column holds values of one kind, and one here does not: {error}; use .jsonl"
        ) from error
    write_whole(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))


def _names(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))
