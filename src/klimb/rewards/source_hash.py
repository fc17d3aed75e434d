"""The hash that names the code of a reward: when it changes, values of before are of another reward."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType

from klimb.data import Reward


def source_hash(reward: Reward) -> str:
    """The sha256 that names a reward's code: of its whole source file and its name in it.

    Of an object that has a `source_hash` it is that (a sum's is of its parts and weights, a model's of its weights). A
    dataclass's is of its class, its plain values and the rewards it holds; fields that do not count when two of them are
    compared do not count here.
    Modules that the file imports, and values that a function closes over, are not seen.

    Example:
        >>> source_hash(json.dumps) == source_hash(json.dumps), source_hash(json.dumps) == source_hash(json.loads)
        (True, False)
    """
    own = getattr(reward, "source_hash", None)
    if own is not None:
        return own
    if isinstance(reward, functools.partial):
        return sha256(source_hash(reward.func) + repr((reward.args, sorted(reward.keywords.items()))))
    if is_dataclass(reward) and not isinstance(reward, type):
        held = {f.name: getattr(reward, f.name) for f in fields(reward) if f.compare}
        known = [
            (name, source_hash(x) if callable(x) else repr(x)) for name, x in held.items() if _has_value(x)
        ]
        return sha256(source_hash(type(reward).__call__) + json.dumps(known))
    plain = inspect.unwrap(reward)
    if not inspect.isroutine(plain):
        plain = type(plain)  # an object that can be called is as its class
    name = f"{plain.__module__ if inspect.isbuiltin(plain) else ''}:{plain.__qualname__}"
    file = None if inspect.isbuiltin(plain) else inspect.getsourcefile(plain)
    if file is not None and Path(file).is_file():
        return sha256(Path(file).read_text(encoding="utf-8") + name)
    code = getattr(plain, "__code__", None)  # typed at a prompt: no file, so its instructions name it
    return sha256(name + ("" if code is None else _instructions(code)))


def _has_value(x: object) -> bool:
    """Whether what a reward holds can be named: other rewards and plain values, not models."""
    return callable(x) or isinstance(x, str | int | float | bool | tuple | None) or _is_yaml(x)


def _is_yaml(x: object) -> bool:
    """Whether something is what an option in a YAML file can be."""
    if isinstance(x, Mapping):
        return all(isinstance(key, str) and _is_yaml(value) for key, value in x.items())
    return isinstance(x, str | int | float | bool | None) or (isinstance(x, list) and all(map(_is_yaml, x)))


def _instructions(code: CodeType) -> str:
    # Functions inside it by their instructions too: printed they show an address, another one every time.
    constants = [_instructions(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {constants}"


def sha256(text: str) -> str:
    """Of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
