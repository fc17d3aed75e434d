"""Rewards: found by name, called under TRL's contract, checked before anything believes them.

The contract: `reward(prompts, completions, **columns) -> list[float | None]`, plain or async, one number a
completion. For a text prompt the completion is a string, for chat messages it is a list of one assistant
message; every other column of the data is a list as long. None means "does not apply here", -inf "forbidden";
NaN and +inf are errors.

Reward code is code that you run: it is imported as any other module, with all your rights.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import reprlib
import sys
import traceback
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor

from klimb.data import Draws, Prompt, Reward, select
from klimb.nearest import nearest, nearest_file
from klimb.ranks import ALONE, Ranks
from klimb.rewards.builtin import BUILTIN, bound, made, parted
from klimb.rewards.ensemble import Ensemble
from klimb.rewards.log_ratio import LogRatio
from klimb.rewards.unscored import Unscored

LARGEST = torch.finfo(torch.float32).max
SHOWN = reprlib.Repr()
SHOWN.maxstring = SHOWN.maxother = 240  # a prompt or completion in an error: both its ends


@dataclass(frozen=True)
class WeightedSum:
    """Several named rewards as one: total = sum of weight x reward over those that apply to the row.

    Attributes:
        rewards: name -> reward.
        weights: name -> weight, any finite number; with 0 a reward is reported and not counted.
        caches: name -> what remembers a reward's values, for those that have one (`klimb.rewards.cache`).
        members: name of an ensemble -> names of its members, ensemble/member, which stand before it with weight 0.
        ranks: who shares the work of `score`, by whole prompts.
    """

    rewards: Mapping[str, Reward]
    weights: Mapping[str, float]
    caches: Mapping[str, Callable[..., list[float | None]]] = field(default_factory=dict)
    members: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ranks: Ranks = ALONE

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: object
    ) -> list[float]:
        """The total, one a completion."""
        return _total(self, _parts(self, prompts, completions, columns), prompts, completions)


@dataclass(frozen=True)
class Rewards:
    """What `score` found.

    Attributes:
        total: [P, G] float32, what is optimised; -inf is a forbidden completion.
        parts: name -> [P, G] float32, each reward by itself, before its weight; NaN where it gave None.
    """

    total: Tensor
    parts: Mapping[str, Tensor]


def no_reward(prompts: Sequence[Prompt], completions: Sequence[Any], **columns: object) -> list[float]:
    """Zero for everything: where completions come judged, and nobody named a reward.

    Example:
        >>> no_reward(["a"], ["b"])
        [0.0]
    """
    return [0.0] * len(completions)


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
        return bound(name, load_function(name), options)
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


def weighted_sum(
    rewards: Sequence[Reward],
    weights: Sequence[float] | None = None,
    *,
    cache: Callable[..., list[float | None]] | None = None,
) -> WeightedSum:
    """Several rewards as one, each with its weight (1 where none are given), and a cache if they shall have one.

    Example:
        >>> def tone(completions): return [1.0, None]
        >>> def length(completions): return [2.0, 5.0]
        >>> both = weighted_sum([tone, length], [10.0, 1.0])
        >>> list(both.rewards)
        ['tone', 'length']
        >>> both(prompts=["a", "b"], completions=["x", "y"])
        [12.0, 5.0]

    Raises:
        ValueError: no rewards, another number of weights, a weight that is not finite, or all of them zero.
    """
    weights = [1.0] * len(rewards) if weights is None else [float(w) for w in weights]
    if not rewards or len(weights) != len(rewards):
        raise ValueError(
            f"got {len(rewards)} rewards and {len(weights)} weights, expected as many of each, at least one"
        )
    if not all(map(math.isfinite, weights)) or not any(weights):
        raise ValueError(f"got reward weights {weights}, expected finite numbers that are not all zero")
    named: dict[str, Reward] = {}
    weight_of: dict[str, float] = {}
    members: dict[str, list[str]] = {}

    def add(reward: Reward, weight: float, within: str = "") -> str:
        short = within + reward_name(reward)
        taken = itertools.chain([short], (f"{short}_{k}" for k in itertools.count(2)))
        name = next(n for n in taken if n not in weight_of)
        weight_of[name] = weight
        if isinstance(reward, Ensemble):
            members[name] = [add(member, 0.0, f"{name}/") for member in reward.members]
        named[name] = reward  # after its members
        return name

    for reward, weight in zip(rewards, weights, strict=True):
        add(reward, weight)
    # the code as it is now, not as the file may read when a batch is scored
    kept = {} if cache is None else {n: r for n, r in named.items() if n not in members}
    caches = {n: functools.partial(cache, source_hash(r)) for n, r in kept.items()} if cache else {}
    return WeightedSum(named, weight_of, caches, members)


def score(reward: Reward, draws: Draws, *, unscored: list[str] | None = None) -> Rewards:
    """Every completion's reward, from one call on the whole batch.

    Args:
        reward: a function under the contract above, or what `weighted_sum` made.
        draws: P x G completions with their texts. The reward is called with prompts, completions,
            completion_ids and the columns of the examples, each a list of P * G; a function without **kwargs
            gets those that it names.
        unscored: where given, rows that a reward of another process could not score are NaN, and why is put here; else that is
            an error (`klimb.rewards.unscored`).

    Returns:
        The total [P, G] and each part [P, G], float32, in the reward's own units.

    Raises:
        ValueError: the reward failed, or did not return a number a completion; shown with what it was given.

    Example:
        >>> from klimb.data import Draws, Example
        >>> draws = Draws([Example("Say hi.")], [[torch.tensor([5]), torch.tensor([6, 7])]],
        ...     finished=torch.ones(1, 2, dtype=bool), texts=[["hi", "hello"]])
        >>> def brevity(completions, **columns):
        ...     return [-len(text) for text in completions]
        >>> score(brevity, draws).total
        tensor([[-2., -5.]])

    Not the same as TRL, which also passes trainer_state, log_extra and log_metric.
    """
    if isinstance(reward, LogRatio):
        return Rewards(reward.of_draws(draws), {})
    if isinstance(reward, WeightedSum) and reward.ranks.world > 1:
        return _shared_score(reward, draws)
    if draws.texts is None:
        raise ValueError(
            "score: got draws without texts, expected decoded ones; decode the completions first"
        )
    shape = (draws.num_prompts, draws.num_draws)
    prompts = [example.prompt for example in draws.examples for _ in range(shape[1])]
    completions = [
        text if isinstance(example.prompt, str) else [{"role": "assistant", "content": text}]
        for example, group in zip(draws.examples, draws.texts, strict=True)
        for text in group
    ]
    names = dict.fromkeys(name for example in draws.examples for name in example.columns)
    reserved = {"prompts", "completions", "completion_ids"}.intersection(names)
    if reserved:
        raise ValueError(
            f"the data has a column {min(reserved)!r}, a name kept for what is drawn; rename the column"
        )
    columns = {
        name: [example.columns.get(name) for example in draws.examples for _ in range(shape[1])]
        for name in names
    }
    columns["completion_ids"] = [ids.tolist() for group in draws.completions for ids in group]
    whole = reward if isinstance(reward, WeightedSum) else weighted_sum([reward])
    lost: dict[int, str] | None = {} if unscored is not None else None
    parts = _parts(whole, prompts, completions, columns, lost)
    total = _total(whole, parts, prompts, completions, lost or {})
    if unscored is not None and lost:
        unscored.append(next(iter(lost.values())))
    return Rewards(
        torch.tensor(total, dtype=torch.float32).reshape(shape),
        {
            name: torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float32).reshape(
                shape
            )
            for name, values in parts.items()
        },
    )


def asked_alone(reward: Reward) -> Reward:
    """The same reward, which each rank asks for its own completions, whatever the others do.

    Example:
        >>> asked_alone(replace(weighted_sum([no_reward]), ranks=Ranks(0, 2))).ranks.world
        1
    """
    alone: Any = reward
    if isinstance(reward, LogRatio):
        whose: Any = (reward.teacher, reward.reference)
        alone = LogRatio(*(replace(who, ranks=ALONE) if hasattr(who, "ranks") else who for who in whose))
    elif isinstance(reward, WeightedSum):
        alone = replace(reward, ranks=ALONE)
    return alone


def _shared_score(reward: WeightedSum, draws: Draws) -> Rewards:
    """Every completion's reward, each rank calling the reward on its share of the prompts."""
    alone = replace(reward, ranks=ALONE)

    def own() -> Rewards | None:
        share = reward.ranks.share(draws.num_prompts)
        return score(alone, select(draws, share)) if share else None

    found = [part for part in reward.ranks.gather(own) if part is not None]
    return Rewards(
        torch.cat([part.total for part in found]),
        {name: torch.cat([part.parts[name] for part in found]) for name in found[0].parts},
    )


def check_columns(reward: WeightedSum, columns: Iterable[str]) -> None:
    """Refuse, before anything is drawn, a reward that comes with klimb and asks for a column that the data lacks.

    Example:
        >>> check_columns(weighted_sum([load_reward("exact")]), ["prompt", "anwser"])
        Traceback (most recent call last):
        ...
        ValueError: reward exact asks for 'answer' (did you mean 'anwser'?), which is no column of the data; there are prompt, anwser
    """
    there = dict.fromkeys(columns)
    for name, part in reward.rewards.items():
        if getattr(part, "needs", None) is not None:
            _accepted(name, part, there)


def check_informative(reward: Tensor) -> None:
    """Refuse a pool of rewards [P, G] that cannot teach: all the same, or the same within every prompt.

    Example:
        >>> check_informative(torch.zeros(2, 3))
        Traceback (most recent call last):
        ...
        ValueError: nothing can be learned: every one of 6 rewards is 0; change reward or prompts or draw more
    """
    advice = "change reward or prompts or draw more"
    if bool((reward == reward.flatten()[0]).all()):
        raise ValueError(
            f"nothing can be learned: every one of {reward.numel()} rewards is "
            f"{float(reward.flatten()[0]):g}; {advice}"
        )
    if reward.shape[1] > 1 and bool((reward == reward[:, :1]).all()):
        raise ValueError(
            f"nothing can be learned: for each of the {reward.shape[0]} prompts "
            f"all {reward.shape[1]} draws have the same reward; {advice}"
        )


def reward_name(reward: Reward) -> str:
    """A short name for tables and columns: the function's own, letters, digits and underscores only."""
    plain = reward.func if isinstance(reward, functools.partial) else reward
    name = getattr(plain, "__name__", None) or getattr(plain, "name", None) or type(plain).__name__
    return "".join(c if c.isalnum() else "_" for c in name).strip("_") or "reward"


def source_hash(reward: Reward) -> str:
    """The sha256 that names a reward's code: of its whole source file and its name in it.

    A sum's is of its parts and weights, a model's of its weights (`source_hash` of the object itself), a dataclass's of its
    class, its plain values and the rewards it holds; fields that do not count when two of them are compared do not count here.
    Modules that the file imports, and values that a function closes over, are not seen.

    Example:
        >>> import math
        >>> source_hash(weighted_sum([json.dumps], [1.0])) == source_hash(weighted_sum([json.dumps], [2.0]))
        False
    """
    if isinstance(reward, WeightedSum):
        known = [(name, reward.weights[name], source_hash(part)) for name, part in reward.rewards.items()]
        return _sha256(json.dumps(known))
    own = getattr(reward, "source_hash", None)
    if own is not None:
        return own
    if isinstance(reward, functools.partial):
        return _sha256(source_hash(reward.func) + repr((reward.args, sorted(reward.keywords.items()))))
    if is_dataclass(reward) and not isinstance(reward, type):
        held = {f.name: getattr(reward, f.name) for f in fields(reward) if f.compare}
        known = [
            (name, source_hash(x) if callable(x) else repr(x)) for name, x in held.items() if _has_value(x)
        ]
        return _sha256(source_hash(type(reward).__call__) + json.dumps(known))
    plain = inspect.unwrap(reward)
    if not inspect.isroutine(plain):
        plain = type(plain)  # an object that can be called is as its class
    name = f"{plain.__module__ if inspect.isbuiltin(plain) else ''}:{plain.__qualname__}"
    file = None if inspect.isbuiltin(plain) else inspect.getsourcefile(plain)
    if file is not None and Path(file).is_file():
        return _sha256(Path(file).read_text(encoding="utf-8") + name)
    code = getattr(plain, "__code__", None)  # typed at a prompt: no file, so its instructions name it
    return _sha256(name + ("" if code is None else _instructions(code)))


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


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# Finding.


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{path}: no such file{nearest_file(path)}")
    # A name that cannot hide an installed module; registered, because dataclasses look their module up.
    name = f"klimb_reward_{_sha256(str(path.resolve()))[:12]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _searching(path.resolve().parent):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"{path}: importing it failed: {_raised(error, str(path))}") from error
    return module


def _module_by_name(name: str) -> ModuleType:
    try:
        with _searching(Path.cwd()):
            return importlib.import_module(name)
    except Exception as error:
        raise ValueError(f"{name}: importing this module failed: {_raised(error, None)}") from error


@contextlib.contextmanager
def _searching(folder: Path) -> Generator[None]:
    """Find modules in `folder` too, after all other places, as `python file.py` would."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


# Calling and checking. Rows are flat here: one a completion.


def _parts(
    whole: WeightedSum,
    prompts: Sequence[Prompt],
    completions: Sequence[Any],
    columns: Mapping[str, object],
    lost: dict[int, str] | None = None,
) -> dict[str, list[float | None]]:
    """What each reward gives; rows that one could not score go into `lost` with the reason, or without it are an error."""

    def asked(
        name: str, prompts: Sequence[Prompt], completions: Sequence[Any], columns: Mapping[str, object]
    ) -> list[float | None]:
        answer = _called(name, whole.rewards[name], prompts, completions, columns)
        return _checked(name, answer, prompts, completions)

    def one(name: str, reward: Reward) -> list[float | None]:
        ask = functools.partial(asked, name)
        if name not in whole.caches:
            return ask(prompts, completions, columns)
        given = _accepted(name, reward, {"prompts": prompts, "completions": completions, **columns})
        looked_at = {n: x for n, x in given.items() if n not in ("prompts", "completions")}
        return whole.caches[name](prompts, completions, looked_at, ask)

    parts: dict[str, list[float | None]] = {}
    for name, reward in whole.rewards.items():
        if isinstance(reward, Ensemble):
            each = [parts[member] for member in whole.members[name]]  # scored already, once
            parts[name], parts[f"{name}/spread"] = reward.together(each), reward.spread(each)
            continue
        try:
            parts[name] = one(name, reward)
        except Unscored as error:
            if lost is None:
                raise
            parts[name] = error.values
            for row in error.missing:
                lost.setdefault(row, str(error))
    return parts


def _called(
    name: str,
    reward: Reward,
    prompts: Sequence[Prompt],
    completions: Sequence[Any],
    columns: Mapping[str, object],
) -> object:
    arguments = _accepted(name, reward, {"prompts": prompts, "completions": completions, **columns})
    try:
        result = reward(**arguments)
        return _awaited(result) if inspect.isawaitable(result) else result
    except Exception as error:
        if isinstance(error, Unscored):
            raise Unscored(f"reward {name}: {error}", error.values, error.missing) from error
        if isinstance(error, ValueError) and type(reward).__module__.startswith("klimb.rewards."):
            raise ValueError(f"reward {name}: {error}") from error  # ours say all there is to say
        file = getattr(getattr(inspect.unwrap(reward), "__code__", None), "co_filename", None)
        raise ValueError(
            f"reward {name} failed: {_raised(error, file)}; "
            f"the first of the {len(prompts)} rows it was given:"
            f"{_context(prompts[0], completions[0]) if prompts else ' none'}"
        ) from error


def _accepted(name: str, reward: Reward, arguments: Mapping[str, object]) -> Mapping[str, object]:
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
        None if value is None else _number(name, value, prompt, completion)
        for value, prompt, completion in zip(values, prompts, completions, strict=True)
    ]


def _number(name: str, value: Any, prompt: Prompt, completion: Any) -> float:
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
            f"reward {name}: got {SHOWN.repr(plain)}, expected {expected}, for{_context(prompt, completion)}"
        )
    return float(plain)


def _total(
    whole: WeightedSum,
    parts: Mapping[str, Sequence[float | None]],
    prompts: Sequence[Prompt],
    completions: Sequence[Any],
    lost: Collection[int] = (),
) -> list[float]:
    counted = [name for name in parts if whole.weights.get(name)]  # not an ensemble's spread
    totals = []
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if row in lost:
            totals.append(math.nan)
            continue
        values = [(whole.weights[name], parts[name][row]) for name in counted]
        terms = [weight * value for weight, value in values if value is not None]
        if not terms:
            raise ValueError(
                f"reward {', '.join(counted)}: got None from all, expected a number from one at least, "
                f"for{_context(prompt, completion)}"
            )
        # A forbidden completion is forbidden whatever else is said; only a negative weight turns it round.
        totals.append(_number(f"{' + '.join(counted)}, weighted", sum(terms), prompt, completion))
    return totals


def _context(prompt: Prompt, completion: Any) -> str:
    said = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return f"\n  prompt: {SHOWN.repr(said)}\n  completion: {SHOWN.repr(text)}"


def _raised(error: BaseException, file: str | None) -> str:
    """What was raised and where: the last line of the user's own file, or the last line of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename == file] or [f for f in frames if "importlib" not in f.filename]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {error}{where}"
