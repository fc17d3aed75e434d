"""Files that are whole or not there: bytes, folders, JSON, YAML, and JSONL that grows a line at a time.

A file or folder is made under a temporary name beside its place, flushed to the disk and renamed. Only JSONL
grows in place: a line without its end was interrupted, and is not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

INFINITE = {
    "Infinity": math.inf,
    "-Infinity": -math.inf,
}  # JSON has no such numbers; spelled as in proto3's JSON

FULL = "the disk is full"
"""how the message of an error begins after which room can be made, and the run resumed"""

# Whole or not at all.


def write_whole(path: str | Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file whole or not at all; `content` is what it holds, or a function that writes it to a path.

    Raises:
        ValueError: the disk is full. What was at `path` before is still there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "report.html"), "<p>up</p>")
        ...     os.listdir(folder)
        ['report.html']
    """
    path = Path(path)
    with _temporary_beside(path) as temporary:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        _to_disk(temporary)
        temporary.replace(path)
    _to_disk(path.parent)


def write_directory_whole(path: str | Path, fill: Callable[[Path], object]) -> None:
    """Make a folder whole or not at all: `fill` writes into an empty one, which then takes the name.

    A folder that was there is replaced. Killed in the moment between the two renames, neither has the name.

    Raises:
        ValueError: the disk is full. What was at `path` before is still there.
    """
    path = Path(path)
    with _temporary_beside(path) as temporary:
        temporary.mkdir()
        fill(temporary)
        for inside in sorted(temporary.rglob("*")):
            _to_disk(inside)
        _to_disk(temporary)
        with _temporary_beside(path) as aside:
            if path.exists():
                path.rename(aside)
            try:
                temporary.rename(path)
            except OSError:
                if aside.exists():
                    aside.rename(path)
                raise
    _to_disk(path.parent)


def hash_of(folder: str | Path) -> str:
    """The sha256 of all files in a folder that are not hidden, by name and content."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("[!.]*")):
        if file.is_file():
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def remove_whole(path: str | Path) -> None:
    """Remove a file or folder. Its name goes first: a folder half removed must not look like a whole one."""
    path = Path(path)
    with _temporary_beside(path) as temporary:
        path.rename(temporary)


def clear_interrupted(folder: str | Path) -> None:
    """Remove what a killed writer left in a folder and in those right below it."""
    for left in [*Path(folder).glob(".*.tmp"), *Path(folder).glob("*/.*.tmp")]:
        _remove(left)


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Generator[Path]:
    """A free name in the same folder, so that the rename is atomic; whatever has it is gone afterwards."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
    except Exception as error:
        _explain_if_full(error, path)
        raise
    finally:
        _remove(temporary)  # Ctrl-C too leaves nothing


def _to_disk(path: Path) -> None:
    """Wait until the disk has a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _explain_if_full(error: Exception, path: Path) -> None:
    # safetensors and Arrow write by themselves, and tell in words only.
    full = {errno.ENOSPC, errno.EDQUOT}
    if getattr(error, "errno", None) in full or any(os.strerror(code) in str(error) for code in full):
        raise ValueError(
            f"{FULL}: {path} was not written, what was there before is whole; make room and resume"
        ) from error


# JSON and YAML.


def write_json(path: str | Path, value: object) -> None:
    """Write a value as JSON, whole or not at all; infinities as "Infinity", NaN refused by name."""
    write_whole(path, as_json(value) + "\n")


def as_json(value: object, *, indent: int | None = 2) -> str:
    """A value as JSON text, on one line without `indent`; infinities as "Infinity", NaN refused by name."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False)


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote."""
    return from_json(Path(path).read_text(encoding="utf-8"), str(path))


def write_yaml(path: str | Path, value: object) -> None:
    """Write a value as YAML, whole or not at all, keys in the order given."""
    write_whole(path, as_yaml(value))


def as_yaml(value: object) -> str:
    """A value as YAML text, keys in the order given; NaN refused by name."""
    return yaml.safe_dump(_plain(value, json=False), sort_keys=False, allow_unicode=True)


def from_json(text: str, where: str) -> Any:
    """The value that `as_json` made a text of; `where` it stands is named if it is none."""
    try:
        return _with_infinities(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _with_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _with_infinities(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_infinities(v) for v in value]
    return INFINITE.get(value, value) if isinstance(value, str) else value


def _plain(value: object, where: str = "", *, json: bool = True) -> Any:
    """Tensors, dataclasses, paths and tuples as what JSON and YAML know; NaN is refused, by name."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError(f"{where or 'the value'} is NaN; expected a number, or None where there is none")
        if math.isinf(value) and json:
            return "Infinity" if value > 0 else "-Infinity"
        return float(value)  # numpy's float64 is one too, but not for YAML
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}".lstrip("."), json=json) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]", json=json) for i, v in enumerate(value)]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _plain(value.tolist(), where, json=json)
    if isinstance(value, Path):
        return str(value)
    raise ValueError(
        f"{where or 'the value'}: got {type(value).__name__}, expected numbers, text, lists and dicts"
    )


# JSONL: a record a line.


def append_jsonl(path: str | Path, *records: Mapping[str, object]) -> None:
    """Add records, one a line, and wait until the disk has them. A torn last line is overwritten.

    Raises:
        ValueError: the disk is full; the file is as it was.
    """
    path = Path(path)
    lines = "".join(as_json(record, indent=None) + "\n" for record in records).encode()
    with path.open(
        "ab+", buffering=0
    ) as file:  # no buffer: what did not fit must not be tried again on closing
        whole = _end_of_last_line(file)
        file.truncate(whole)
        try:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(whole)
            _explain_if_full(error, path)
            raise
    if whole == 0:
        _to_disk(path.parent)  # a new file: its name too


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All records. A last line that was torn by a kill is left out; any other bad line is a ValueError.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "metrics.jsonl")
        ...     append_jsonl(file, {"step": 1, "reward": 0.25})
        ...     _ = file.write_bytes(file.read_bytes() + b'{"step": 2, "rew')
        ...     read_jsonl(file)
        [{'step': 1, 'reward': 0.25}]
    """
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [from_json(line.decode(), f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def truncate_jsonl(path: str | Path, keep: int) -> None:
    """Keep the first `keep` records, as resume does with what came after the checkpoint."""
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    if len(lines) < keep:
        raise ValueError(
            f"{path}: got {len(lines)} records, expected {keep} at least; the checkpoint is of another run"
        )
    write_whole(path, b"".join(line + b"\n" for line in lines[:keep]))


def _end_of_last_line(file: Any) -> int:
    """Bytes up to and with the last line end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
