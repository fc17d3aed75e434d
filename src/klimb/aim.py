"""From the configuration's `target` to the target that is planned, trained towards and measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from klimb.config import Aim, EntropyBonus, LengthNormalized
from klimb.data import Policy, Reward, Target
from klimb.target import entropy_bonus, length_normalized, tilt

REWARD_OF = {
    "entropy_bonus": "rewards are reward - bonus log ref, and beta is the configuration's plus the bonus",
    "length_normalized": "rewards are reward / tokens",
    "context": "rewards are log p/ref, where p is the reference under the context",
    "teacher": "rewards are log p/ref, where p is the teacher",
}
"""what the numbers of plan.json and measure.json are of, where it is not the plain reward"""


def aimed_at(chosen: Aim, reference: Policy, reward: Reward, beta: float) -> Target:
    """The target of that kind at this beta.

    Each is the plain tilt of a reward that beta has no part in (`klimb.target.own_reward`), at `target.beta`; so a
    plan can have that reward before it has found beta.

    Args:
        chosen: `config.target`.
        reference: the policy that is tilted.
        reward: what is good.
        beta: `config.beta`, reward per nat; for length_normalized reward per token, per nat.

    Example:
        >>> aimed_at(EntropyBonus(bonus=0.25), None, None, 0.5).beta
        0.75
    """
    known: Any = reference
    if isinstance(chosen, EntropyBonus):
        return entropy_bonus(known, reward, beta, bonus=chosen.bonus)
    return (length_normalized if isinstance(chosen, LengthNormalized) else tilt)(known, reward, beta)


def target_record(chosen: Aim) -> dict[str, Any]:
    """What plan.json and measure.json say of the target.

    Example:
        >>> target_record(LengthNormalized())
        {'kind': 'length_normalized', 'means': 'rewards are reward / tokens'}
    """
    means = REWARD_OF.get(chosen.kind)
    return {**chosen.model_dump(), **({} if means is None else {"means": means})}


def recorded_aim(record: Mapping[str, Any] | None) -> Aim:
    """The `config.target` that `target_record` told of; the plain tilt where a record tells of none.

    Example:
        >>> recorded_aim(target_record(EntropyBonus(bonus=0.25)))
        EntropyBonus(kind='entropy_bonus', bonus=0.25)
    """
    known = {name: x for name, x in (record or {}).items() if name != "means"}
    kinds = {kind.model_fields["kind"].default: kind for kind in get_args(Aim)}
    return kinds[known.get("kind", "tilt")](**known)
