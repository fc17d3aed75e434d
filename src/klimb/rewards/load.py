"""Rewards found by name, and their contract.

The contract: `reward(prompts, completions, **columns) -> list[float | None]`, plain or async, one number a
completion. For a text prompt the completion is a string, for chat messages it is a list of one assistant
message; every other column of the data is a list as long. None means "does not apply here", -inf "forbidden";
NaN and +inf are errors (`klimb.rewards.ask`).

Reward code is code that you run: it is imported as any other module, with all your rights.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from klimb.data import Prompt, Reward
from klimb.nearest import nearest, nearest_file
from klimb.rewards.builtin import BUILTIN, bound, made, parted
from klimb.rewards.errors import SHOWN, raised
from klimb.rewards.source_hash import sha256


def load_reward(spec: str | Mapping[str, Any]) -> Reward:
    """The reward that a text names, or a mapping `{func: NAME, ...options}`.

    A short name is one of those that come with klimb (`klimb.rewards.builtin`). "file.py:function" imports the file (`~` is the
    home folder), "package.module:function" the module, also one here; their options are keyword arguments. Anything else is a
    sequence-classification model, by folder or hub id (see `klimb.rewards.model`).

    Raises:
        ValueError: the file, module or function is not there, importing it failed, it cannot be called, or an option does not
            fit.

    Example:
        >>> load_reward("math:hypot").__name__
        'hypot'
        >>> load_reward("math:hypott")
        Traceback (most recent call last):
        ...
        ValueError: math:hypott: module math has no 'hypott' (did you mean 'hypot'?)
        >>> load_reward({"func": "length", "target": 12})
        Length(target=12, unit='characters')
    """
    name, options = parted(spec)
    name = os.path.expanduser(name)
    if name in BUILTIN:
        return made(name, load_function(BUILTIN[name]), options)
    if ":" in name or name.endswith(".py"):
        function = load_function(name)
        if isinstance(function, type):
            raise ValueError(f"{name}: got a class, expected a function")
        return bound(name, function, options)
    from klimb.rewards.model import model_reward  # transformers is loaded only for a model

    try:
        return made(name, model_reward, options, name)
    except ValueError as error:
        near = nearest(name, BUILTIN)
        raise ValueError(f"{error}{near}") from error


def load_function(spec: str) -> Callable[..., Any]:
    """The function that "file.py:function" or "package.module:function" names; its code is run.

    Raises:
        ValueError: the file, module or function is not there, importing it failed, or it cannot be called.

    Example:
        >>> load_function("math:hypot")(3, 4)
        5.0
    """
    place, colon, name = os.path.expanduser(spec).rpartition(":")
    if not colon and spec.endswith(".py"):
        raise ValueError(f"{spec}: got a file, expected a function in it: {spec}:function")
    if not place or not name:
        raise ValueError(f"{spec!r}: expected file.py:function or package.module:function")
    found: Any = _module_from_file(Path(place)) if place.endswith(".py") else _module_by_name(place)
    kind = "file" if place.endswith(".py") else "module"
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{spec}: {kind} {place} has no {name!r}{nearest(part, dir(found))}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{spec}: got {type(found).__name__} {SHOWN.repr(found)}, expected a function")
    return found


def no_reward(prompts: Sequence[Prompt], completions: Sequence[Any], **columns: object) -> list[float]:
    """Zero for everything: where completions come judged, and nobody named a reward.

    Example:
        >>> no_reward(["a"], ["b"])
        [0.0]
    """
    return [0.0] * len(completions)


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{path}: no such file{nearest_file(path)}")
    # A name that cannot hide an installed module; registered, because dataclasses look their module up.
    name = f"klimb_reward_{sha256(str(path.resolve()))[:12]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _searching(path.resolve().parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends itself
        del sys.modules[name]
        raise ValueError(f"{path}: importing it failed: {raised(error, str(path))}") from error
    return module


def _module_by_name(name: str) -> ModuleType:
    try:
        with _searching(Path.cwd()):
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name}: importing this module failed: {raised(error, None)}") from error


@contextlib.contextmanager
def _searching(folder: Path) -> Generator[None]:
    """Find modules in `folder` too, after all other places, as `python file.py` would."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
