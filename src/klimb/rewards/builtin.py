"""The rewards that come with klimb, by short name, and options for a reward of any kind.

Each is imported when it is asked for. An option that does not exist, is missing or is of another kind is refused
here, before anything is drawn. Imports neither torch nor any of the rewards.
"""

from __future__ import annotations

import functools
import inspect
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any

from klimb.nearest import nearest

BUILTIN = {
    "exact": "klimb.rewards.answers:Exact",
    "numeric": "klimb.rewards.answers:Numeric",
    "math": "klimb.rewards.mathematics:Mathematics",
    "regex": "klimb.rewards.form:Regex",
    "json_schema": "klimb.rewards.form:JsonSchema",
    "length": "klimb.rewards.form:Length",
    "constraints": "klimb.rewards.constraints:Constraints",
    "reasoning_gym": "klimb.rewards.puzzles:ReasoningGym",
    "similarity": "klimb.rewards.similarity:similarity",
    "ensemble": "klimb.rewards.ensemble:ensemble",
    "http": "klimb.rewards.remote:Http",
    "judge": "klimb.rewards.judge:Judge",
    "implied": "klimb.rewards.implied:implied",
}
"""short name -> what makes it, called with the options"""
DRAWN = ("prompts", "completions", "completion_ids")
"""what a reward is given besides the columns of the data"""


def parted(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a reward and its options, from a name alone or `{func: NAME, ...options}`; implied:RUN is short for its one.

    Raises:
        ValueError: a mapping without a text `func`.

    Example:
        >>> parted({"func": "regex", "pattern": "[0-9]"})
        ('regex', {'pattern': '[0-9]'})
        >>> parted("exact")
        ('exact', {})
        >>> parted("implied:runs/dpo")
        ('implied', {'policy': 'runs/dpo'})
    """
    if isinstance(spec, str):
        name, colon, policy = spec.partition(":")
        return (name, {"policy": policy}) if name == "implied" and colon else (spec, {})
    name = spec.get("func")
    if not isinstance(name, str):
        raise ValueError(
            f"got the reward {reprlib.repr(dict(spec))}, expected `func: NAME` in it and the options beside it"
        )
    return name, {key: value for key, value in spec.items() if key != "func"}


def made(who: str, factory: Callable[..., Any], options: Mapping[str, Any], *given: Any) -> Any:
    """Call what makes a reward, with options looked at first: their names, that none is missing, and their kinds.

    Args:
        who: the reward's name in messages.
        factory: a function or dataclass whose keyword-only arguments are the options.
        options: name -> value, as YAML gives them.
        given: what comes before the options.

    Raises:
        ValueError: options that do not fit, or that the factory refuses.

    Example:
        >>> from klimb.rewards.answers import Numeric
        >>> made("numeric", Numeric, {"tolerance": 1}).tolerance
        1.0
        >>> made("numeric", Numeric, {"tolerence": 1})
        Traceback (most recent call last):
        ...
        ValueError: reward numeric: no option 'tolerence' (did you mean 'tolerance'?); there are column, tolerance
        >>> made("numeric", Numeric, {"tolerance": "much"})
        Traceback (most recent call last):
        ...
        ValueError: reward numeric: option tolerance: got 'much', expected a number
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic_core import ArgsKwargs

    known = {p.name: p for p in inspect.signature(factory).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for name in options:
        if name not in known:
            raise ValueError(
                f"reward {who}: no option {name!r}{nearest(str(name), known)}; there are {', '.join(known)}"
            )
    for name, option in known.items():
        if option.default is option.empty and name not in options:
            raise ValueError(f"reward {who} needs the option {name}: {{func: {who}, {name}: ...}}")
    maker: Any = factory
    config = None if is_dataclass(factory) else ConfigDict(arbitrary_types_allowed=True)
    try:
        return TypeAdapter(maker, config=config).validate_python(ArgsKwargs(given, dict(options)))
    except ValidationError as error:
        raise ValueError("\n  ".join(f"reward {who}: {_explained(e)}" for e in error.errors())) from error


def bound(who: str, function: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """A function of one's own with options as keyword arguments.

    Raises:
        ValueError: the function names no such argument, or it is one that the draws fill.

    Example:
        >>> def brevity(completions, scale=1.0): return [-scale * len(c) for c in completions]
        >>> bound("mine.py:brevity", brevity, {"scale": 2.0})(["ab"])
        [-4.0]
        >>> bound("mine.py:brevity", brevity, {"scael": 2.0})
        Traceback (most recent call last):
        ...
        ValueError: mine.py:brevity takes no option 'scael' (did you mean 'scale'?)
    """
    if not options:
        return function
    try:
        wanted = inspect.signature(function).parameters.values()
    except ValueError as error:  # some builtins have no signature
        raise ValueError(f"{who}: got options for a function that does not tell its arguments") from error
    named = [p.name for p in wanted if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for name in options:
        if name in DRAWN:
            raise ValueError(f"{who}: got an option {name!r}, a name kept for what is drawn; rename it")
        if name not in named and not any(p.kind is p.VAR_KEYWORD for p in wanted):
            raise ValueError(f"{who} takes no option {name!r}{nearest(name, set(named).difference(DRAWN))}")
    return functools.partial(function, **options)


def _explained(details: Any) -> str:
    said = details["msg"].removeprefix("Value error, ").partition(", unable to")[0]
    where = ".".join(str(part) for part in details["loc"])
    if details["type"] == "value_error" or not where:
        return said
    said = said.replace("Input should be ", "expected ").replace("a valid integer", "a whole number")
    said = said.replace("a valid ", "a ")
    return f"option {where}: got {reprlib.repr(details['input'])}, {said}"
