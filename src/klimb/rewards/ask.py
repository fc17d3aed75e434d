"""One reward asked under the contract, and its answer checked: a number a completion. Rows are flat, one a completion."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from klimb.data import Prompt, Reward
from klimb.nearest import nearest
from klimb.rewards.errors import SHOWN, about, raised
from klimb.rewards.unscored import Unscored

LARGEST = torch.finfo(torch.float32).max


def ask(
    name: str,
    reward: Reward,
    prompts: Sequence[Prompt],
    completions: Sequence[Any],
    columns: Mapping[str, object],
) -> list[float | None]:
    """What a reward gives for rows, each a number that float32 can hold, or None where it does not apply.

    Raises:
        Unscored: some rows have no value.
        ValueError: it failed, or gave something else; with the row.
    """
    return _checked(name, _called(name, reward, prompts, completions, columns), prompts, completions)


def _called(
    name: str,
    reward: Reward,
    prompts: Sequence[Prompt],
    completions: Sequence[Any],
    columns: Mapping[str, object],
) -> object:
    arguments = accepted(name, reward, {"prompts": prompts, "completions": completions, **columns})
    try:
        result = reward(**arguments)
        return _awaited(result) if inspect.isawaitable(result) else result
    except (Exception, SystemExit) as error:  # a script's exit() would end the run as if all were well
        if isinstance(error, Unscored):
            raise Unscored(f"reward {name}: {error}", error.values, error.missing) from error
        if isinstance(error, ValueError) and type(reward).__module__.startswith("klimb.rewards."):
            raise ValueError(f"reward {name}: {error}") from error  # ours say all there is to say
        file = getattr(getattr(inspect.unwrap(reward), "__code__", None), "co_filename", None)
        raise ValueError(
            f"reward {name} failed: {raised(error, file)}; "
            f"the first of the {len(prompts)} rows it was given:"
            f"{about(prompts[0], completions[0]) if prompts else ' none'}"
        ) from error


def accepted(name: str, reward: Reward, arguments: Mapping[str, object]) -> Mapping[str, object]:
    """Those of the arguments that a reward takes.

    Raises:
        ValueError: one that it cannot do without is not among them.
    """
    asked = getattr(reward, "needs", None)  # rewards that come with klimb say which columns they look at
    if asked is not None:
        _check_there(name, asked, arguments)
        return {n: x for n, x in arguments.items() if n in ("prompts", "completions", *asked)}
    if isinstance(reward, functools.partial):  # an option goes before a column of its name
        arguments = {n: x for n, x in arguments.items() if n not in reward.keywords}
    try:
        wanted = inspect.signature(reward).parameters.values()
    except ValueError:  # some builtins have no signature; the call itself decides
        return arguments
    if any(p.kind is p.VAR_KEYWORD for p in wanted):
        named = [p for p in wanted if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        chosen = arguments
    else:
        named = [p for p in wanted if p.kind is not p.VAR_POSITIONAL]
        chosen = {p.name: arguments[p.name] for p in named if p.name in arguments}
    _check_there(name, [p.name for p in named if p.default is p.empty], arguments)
    return chosen


def _check_there(name: str, wanted: Iterable[str], arguments: Mapping[str, object]) -> None:
    missing = [n for n in wanted if n not in arguments]
    if missing:
        raise ValueError(
            f"reward {name} asks for {missing[0]!r}{nearest(missing[0], arguments)}, "
            f"which is no column of the data; there are {', '.join(arguments) or 'none'}"
        )


def _awaited(result: Any) -> Any:
    async def wait() -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:  # the usual case: no loop runs here
        return asyncio.run(wait())
    with ThreadPoolExecutor(1) as pool:  # a notebook runs one already, and loops do not nest
        return pool.submit(asyncio.run, wait()).result()


def _checked(
    name: str, result: Any, prompts: Sequence[Prompt], completions: Sequence[Any]
) -> list[float | None]:
    values = result.tolist() if hasattr(result, "tolist") else result  # tensors and arrays
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise ValueError(
            f"reward {name}: got {SHOWN.repr(result)} ({type(result).__name__}), "
            f"expected a list of {len(prompts)} numbers, one a completion"
        )
    if len(values) != len(prompts):
        raise ValueError(
            f"reward {name}: got {len(values)} values, expected {len(prompts)}, one a completion"
        )
    return [
        None if value is None else number(name, value, prompt, completion)
        for value, prompt, completion in zip(values, prompts, completions, strict=True)
    ]


def number(name: str, value: Any, prompt: Prompt, completion: Any) -> float:
    """A value as a float.

    Raises:
        ValueError: NaN, +inf, too large for float32, or no number; with the row.
    """
    plain = (
        value.tolist() if hasattr(value, "tolist") else value
    )  # numpy's scalars, and tensors of one number
    if plain is not value and isinstance(plain, list) and len(plain) == 1:
        plain = plain[0]
    expected = None
    if not isinstance(plain, int | float):  # True and False count as 1 and 0
        expected = "a number, or None where the reward does not apply"
    elif plain != plain or plain == math.inf:
        expected = (
            "a finite number (or -inf for a forbidden completion, None where the reward does not apply)"
        )
    elif abs(plain) > LARGEST and plain != -math.inf:
        expected = f"a number that float32 can hold, at most {LARGEST:.2g}"
    if expected is not None:
        raise ValueError(
            f"reward {name}: got {SHOWN.repr(plain)}, expected {expected}, for{about(prompt, completion)}"
        )
    return float(plain)
