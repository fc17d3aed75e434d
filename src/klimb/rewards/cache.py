"""Values of rewards on disk, so that nothing is scored twice: not within a batch, not in a later run.

An SQLite file: the sha256 of a reward's code and options, the prompt, the completion and the columns it looks at, and beside it the
value. A reward whose code changes finds nothing of what it gave before. It has to judge each completion by itself: one
that compares those of a batch is not for a cache.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from klimb.data import Prompt
from klimb.rewards.unscored import Unscored

WAIT = 60.0
"""seconds to wait for another process that writes"""
AT_ONCE = 500
"""keys of one question to the file; SQLite takes 999 at least"""
Ask = Callable[[Sequence[Prompt], Sequence[Any], Mapping[str, Any]], list[float | None]]


def reward_cache(path: str | Path) -> Callable[..., list[float | None]]:
    """What `klimb.rewards.weighted_sum` takes as its cache; several runs may use one file at the same time.

    Raises:
        ValueError: the file is there and is no such cache. It is made when it is first written to.

    Example:
        >>> import tempfile
        >>> from klimb.rewards.weighted_sum import weighted_sum
        >>> def brevity(completions):
        ...     print("scored:", *completions)
        ...     return [-float(len(c)) for c in completions]
        >>> folder = tempfile.TemporaryDirectory()
        >>> reward = weighted_sum([brevity], cache=reward_cache(f"{folder.name}/cache.sqlite"))
        >>> reward(["Say."] * 3, ["a", "bc", "a"])
        scored: a bc
        [-1.0, -2.0, -1.0]
        >>> reward(["Say."] * 2, ["bc", "d"])
        scored: d
        [-2.0, -1.0]
        >>> folder.cleanup()
    """
    path = Path(os.path.expanduser(path))
    if path.exists():
        with _opened(path):
            pass
    return partial(_cached, path)


def _cached(
    path: Path,
    source: str,
    prompts: Sequence[Prompt],
    completions: Sequence[Any],
    columns: Mapping[str, Any],
    ask: Ask,
) -> list[float | None]:
    """The value of each row: from the file, or asked for and put there."""
    keys = [
        _key(source, prompts[i], completions[i], {name: columns[name][i] for name in columns})
        for i in range(len(prompts))
    ]
    with _opened(path) as file:
        known = _known(file, list(dict.fromkeys(keys)))
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    rows = sorted(i for key, i in first.items() if key not in known)
    if rows:
        # no connection is open meanwhile: a reward may take minutes
        lost: frozenset[int] = frozenset()
        failed: Unscored | None = None
        try:
            values = ask(
                [prompts[i] for i in rows],
                [completions[i] for i in rows],
                {name: [columns[name][i] for i in rows] for name in columns},
            )
        except Unscored as error:  # what came is kept
            values, lost, failed = error.values, error.missing, error
        fresh = {keys[i]: x for j, (i, x) in enumerate(zip(rows, values, strict=True)) if j not in lost}
        with _opened(path) as file, file:
            file.executemany("INSERT OR IGNORE INTO rewards VALUES (?, ?)", fresh.items())
        known |= fresh
        if failed is not None:
            missing = {i for i, key in enumerate(keys) if key not in known}
            raise Unscored(str(failed), [known.get(key) for key in keys], missing) from failed
    return [known[key] for key in keys]


def _key(source: str, prompt: Prompt, completion: Any, columns: Mapping[str, Any]) -> bytes:
    text = json.dumps([source, prompt, completion, columns], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).digest()


def _known(file: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, float | None]:
    known: dict[bytes, float | None] = {}
    for start in range(0, len(keys), AT_ONCE):
        some = keys[start : start + AT_ONCE]
        marks = ", ".join("?" * len(some))
        known |= dict(file.execute(f"SELECT key, value FROM rewards WHERE key IN ({marks})", some))
    return known


@contextlib.contextmanager
def _opened(path: Path) -> Generator[sqlite3.Connection]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path, timeout=WAIT)) as file:
            # readers do not wait for a writer; what a crash of the machine could lose is only scored again
            file.execute("PRAGMA journal_mode = WAL")
            file.execute("PRAGMA synchronous = NORMAL")
            file.execute(
                "CREATE TABLE IF NOT EXISTS rewards (key BLOB PRIMARY KEY, value REAL) WITHOUT ROWID"
            )
            file.execute("SELECT key, value FROM rewards LIMIT 1")
            yield file
    except (OSError, sqlite3.Error) as error:
        raise ValueError(
            f"reward_cache {path}: got a file that is no cache of rewards, or cannot be used: {error}; delete it, or name another"
        ) from error
