"""Several rewards as one: total = sum of weight x reward over those that apply to the row."""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from klimb.data import Prompt, Reward
from klimb.ranks import ALONE, Ranks
from klimb.rewards.ask import accepted, ask, number
from klimb.rewards.ensemble import Ensemble
from klimb.rewards.errors import about
from klimb.rewards.source_hash import sha256, source_hash
from klimb.rewards.unscored import Unscored


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
        return total(self, parts_of(self, prompts, completions, columns), prompts, completions)

    @property
    def source_hash(self) -> str:
        """Of the parts' code and their weights.

        Example:
            >>> weighted_sum([json.dumps], [1.0]).source_hash == weighted_sum([json.dumps], [2.0]).source_hash
            False
        """
        known = [(name, self.weights[name], source_hash(part)) for name, part in self.rewards.items()]
        return sha256(json.dumps(known))


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


def reward_name(reward: Reward) -> str:
    """A short name for tables and columns: the function's own, letters, digits and underscores only."""
    plain = reward.func if isinstance(reward, functools.partial) else reward
    name = getattr(plain, "__name__", None) or getattr(plain, "name", None) or type(plain).__name__
    return "".join(c if c.isalnum() else "_" for c in name).strip("_") or "reward"


def check_columns(reward: WeightedSum, columns: Iterable[str]) -> None:
    """Refuse, before anything is drawn, a reward that comes with klimb and asks for a column that the data lacks.

    Example:
        >>> from klimb.rewards.answers import Exact
        >>> check_columns(weighted_sum([Exact()]), ["prompt", "anwser"])
        Traceback (most recent call last):
        ...
        ValueError: reward exact asks for 'answer' (did you mean 'anwser'?), which is no column of the data; there are prompt, anwser
    """
    there = dict.fromkeys(columns)
    for name, part in reward.rewards.items():
        if getattr(part, "needs", None) is not None:
            accepted(name, part, there)


def parts_of(
    whole: WeightedSum,
    prompts: Sequence[Prompt],
    completions: Sequence[Any],
    columns: Mapping[str, object],
    lost: dict[int, str] | None = None,
) -> dict[str, list[float | None]]:
    """What each reward gives; rows that one could not score go into `lost` with the reason, or without it are an error."""

    def one(name: str, reward: Reward) -> list[float | None]:
        if name not in whole.caches:
            return ask(name, reward, prompts, completions, columns)
        given = accepted(name, reward, {"prompts": prompts, "completions": completions, **columns})
        looked_at = {n: x for n, x in given.items() if n not in ("prompts", "completions")}
        return whole.caches[name](prompts, completions, looked_at, functools.partial(ask, name, reward))

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


def total(
    whole: WeightedSum,
    parts: Mapping[str, Sequence[float | None]],
    prompts: Sequence[Prompt],
    completions: Sequence[Any],
    lost: Collection[int] = (),
) -> list[float]:
    """The sum of each row, NaN for those of `lost`.

    Raises:
        ValueError: no reward applies to a row, or its sum is not a number.
    """
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
                f"for{about(prompt, completion)}"
            )
        # A forbidden completion is forbidden whatever else is said; only a negative weight turns it round.
        totals.append(number(f"{' + '.join(counted)}, weighted", sum(terms), prompt, completion))
    return totals
