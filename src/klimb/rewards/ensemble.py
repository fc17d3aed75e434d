"""Several rewards as one that is careful where they disagree.

What a policy finds that one reward model overrates, another one may not: the least of several, or their mean less their
spread, is harder to exploit than any of them. It does not help where all of them err alike (Eisenstein et al., 2023).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from klimb.data import Prompt, Reward
from klimb.rewards.load import load_reward
from klimb.rewards.source_hash import source_hash


@dataclass(frozen=True)
class Ensemble:
    """A reward of several members.

    Attributes:
        members: the rewards, two or more.
        aggregate: "mean"; "min", the most pessimistic member; or "lower", the mean less k standard deviations.
        k: of lower.
        name: for tables and columns.

    Example:
        >>> def short(completions): return [-len(c) for c in completions]
        >>> def kind(completions): return [2.0 * ("good" in c) for c in completions]
        >>> Ensemble((short, kind), "min")(["", ""], ["good", "bad"])
        [-4.0, -3.0]
    """

    members: tuple[Reward, ...]
    aggregate: str = "lower"
    k: float = 1.0
    name: str = "ensemble"

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: object
    ) -> list[float]:
        """One number a completion; in a run the members are scored, checked and cached one by one instead."""
        from klimb.rewards.weighted_sum import weighted_sum

        return weighted_sum([self])(prompts, completions, **columns)

    @property
    def source_hash(self) -> str:
        """Of the members' code and how they are put together."""
        known = [*map(source_hash, self.members), self.aggregate, repr(self.k)]
        return hashlib.sha256(" ".join(known).encode()).hexdigest()

    def together(self, each: Sequence[Sequence[float | None]]) -> list[float | None]:
        """Of each completion the aggregate of what the members gave, [members][N]."""

        def one(values: tuple[float, ...]) -> float:
            if self.aggregate == "min" or min(values) == -np.inf:  # what one forbids is forbidden
                return float(min(values))
            return float(np.mean(values) - (self.k * np.std(values) if self.aggregate == "lower" else 0.0))

        return [None if None in values else one(values) for values in zip(*each, strict=True)]

    def spread(self, each: Sequence[Sequence[float | None]]) -> list[float | None]:
        """Of each completion how far the members disagree: their standard deviation, divided by their number."""
        return [
            None if None in values or -np.inf in values else float(np.std(values))
            for values in zip(*each, strict=True)
        ]


def ensemble(
    *,
    models: list[str | dict[str, Any]],
    aggregate: Literal["mean", "min", "lower"] = "lower",
    k: float = 1.0,
) -> Ensemble:
    """An ensemble of rewards by name, as `reward_funcs` takes them.

    Args:
        models: reward models or other rewards, two or more.
        aggregate: mean, min, or lower: mean - k std, std divided by the number of members.
        k: of lower, 0 or more.

    Raises:
        ValueError: fewer than two, k below zero, or a member that is not there.

    Source: Coste et al., "Reward model ensembles help mitigate overoptimization", 2024 (worst case and uncertainty weighted, whose
    penalty is the variance, not the deviation as here); Eisenstein et al., "Helping or herding?", 2023.
    """
    if len(models) < 2:
        raise ValueError(f"reward ensemble: got {len(models)} models, expected two or more to disagree")
    if not 0 <= k < np.inf:
        raise ValueError(f"reward ensemble: option k: got {k:g}, expected 0 or more")
    return Ensemble(tuple(load_reward(one) for one in models), aggregate, k)
