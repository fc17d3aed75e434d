"""Every completion's reward, from one call on the whole batch. P prompts, G draws a prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from klimb.data import Draws, Reward, select
from klimb.ranks import ALONE
from klimb.rewards.log_ratio import LogRatio
from klimb.rewards.weighted_sum import WeightedSum, parts_of, total, weighted_sum


@dataclass(frozen=True)
class Rewards:
    """What `score` found.

    Attributes:
        total: [P, G] float32, what is optimised; -inf is a forbidden completion.
        parts: name -> [P, G] float32, each reward by itself, before its weight; NaN where it gave None.
    """

    total: Tensor
    parts: Mapping[str, Tensor]


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
    parts = parts_of(whole, prompts, completions, columns, lost)
    summed = total(whole, parts, prompts, completions, lost or {})
    if unscored is not None and lost:
        unscored.append(next(iter(lost.values())))
    return Rewards(
        torch.tensor(summed, dtype=torch.float32).reshape(shape),
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
        >>> from klimb.ranks import Ranks
        >>> def zero(completions): return [0.0] * len(completions)
        >>> asked_alone(replace(weighted_sum([zero]), ranks=Ranks(0, 2))).ranks.world
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
