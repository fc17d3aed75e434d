"""What must hold of every completion (forbidden ones), and what must hold on average (moments).

Both are rewards: -inf outside, and lam . phi. Their targets are plain tilts, so plan, measure and the samplers take
them as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from klimb.data import Prompt, Reward
from klimb.models.policy import CausalPolicy
from klimb.rewards.weighted_sum import WeightedSum, weighted_sum
from klimb.target.tilt import Tilt, tilt


@dataclass(frozen=True)
class Forbid:
    """The reward 0 where `allowed` says 1 or True, and -inf where it says 0 or False; see `forbid`.

    Attributes:
        allowed: a function under the same contract as a reward.
    """

    allowed: WeightedSum

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[object], **columns: object
    ) -> list[float]:
        """0 or -inf, one a completion."""
        values = self.allowed(prompts, completions, **columns)
        if any(value not in (0, 1) for value in values):
            bad = next(value for value in values if value not in (0, 1))
            raise ValueError(
                f"forbid: got {bad} from `allowed`, expected True or False (1 or 0) a completion"
            )
        return [0.0 if value else -math.inf for value in values]


def forbid(allowed: Reward) -> Forbid:
    r"""A hard constraint: completions for which `allowed` is False get the reward -inf.

    $$ p \propto ref\, 1[\text{allowed}]\, \exp(r/\beta) $$

    Add it to a reward with `weighted_sum([reward, forbid(allowed)])`; alone, at any beta, p is the reference given
    that the completion is allowed: log Z = log P_ref(allowed) and KL(p||ref) = -log Z.

    KL(pi||p) is infinite while the policy can still make a forbidden completion: reverse_kl and log_variance refuse
    such draws by name. forward_kl takes them (with weight zero), and so do rejection sampling and the plan; all of
    them need that the reference makes allowed completions often enough to be drawn.

    Args:
        allowed: under TRL's contract, one True or False a completion.

    Raises:
        ValueError: when called, if `allowed` gives anything but 0 and 1.

    Example:
        >>> def short(completions): return [len(text) < 3 for text in completions]
        >>> forbid(short)(prompts=["", ""], completions=["ab", "abc"])
        [0.0, -inf]

    Source: Khalifa, Elsahar, Dymetman, "A distributional approach to controlled text generation", 2021 (pointwise
    constraints).

    Not the same as a large negative reward, which leaves exp(-penalty / beta) of the forbidden mass, and which
    reverse_kl and log_variance can be trained on.
    """
    return Forbid(weighted_sum([allowed]))


def moment_tilt(
    reference: CausalPolicy,
    features: Sequence[Reward],
    lam: Sequence[float],
    *,
    reward: Reward | None = None,
    beta: float = 1.0,
) -> Tilt:
    r"""The target of moment constraints: of all laws with these mean features, the one nearest the reference.

    $$ p_\lambda(y|x) = ref(y|x) \exp(r/\beta + \lambda \cdot \phi(x,y)) / Z_\lambda(x) $$

    lam comes from `klimb.numbers.moments.fit_moments`, one lam for all prompts; its goal then holds on the average over
    prompts, and each prompt has its own Z(x). Every law that has these moments is KL(q||ref) = KL(q||p) + KL(p||ref)
    away (Pythagoras, averaged over prompts), so the rest of the way is never worth more than KL(q||p).

    Args:
        reference: the policy that is tilted.
        features: K functions under TRL's contract, one number a completion (True and False count as 1 and 0).
        lam: K numbers, nats per unit of the feature; not all zero.
        reward: what is wanted besides; then fit lam with log_w = r / beta as well.
        beta: units of `reward` per nat; without a reward it is 1, in nats of lam . phi.

    Returns:
        The plain tilt of r + beta lam . phi at `beta`.

    Raises:
        ValueError: another number of features than of lam, lam not finite or all zero, beta not positive.

    Example:
        >>> def mentions(completions): return ["good" in text for text in completions]
        >>> target = moment_tilt(None, [mentions], [1.5])
        >>> target.reward(prompts=["", ""], completions=["good", "bad"]), target.beta
        ([1.5, 0.0], 1.0)

    Source: Khalifa, Elsahar, Dymetman, "A distributional approach to controlled text generation", 2021; Csiszár,
    "I-divergence geometry of probability distributions and minimization problems", 1975 (the projection).

    Not the same as a lam for each prompt, under which the goal would hold prompt by prompt.
    """
    if len(features) != len(lam):
        raise ValueError(
            f"moment_tilt: got {len(features)} features and {len(lam)} lam, expected as many of each"
        )
    if reward is None:
        return tilt(reference, weighted_sum(features, [beta * x for x in lam]), beta)
    return tilt(reference, weighted_sum([reward, *features], [1.0, *(beta * x for x in lam)]), beta)
