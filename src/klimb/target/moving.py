"""A reference that follows the policy: every round tilts what the last one reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from klimb.data import Policy, Reward, Scored
from klimb.target.tilt import require_beta


@dataclass(frozen=True)
class MovingTarget:
    """One round from the policy that drew: maximise E[r] - step KL(pi||drew) - anchor KL(pi||reference).

    Attributes:
        reference: the first policy, which stays.
        reward: what is good.
        step: the price of leaving the policy that drew, units of reward per nat.
        anchor: the price of leaving the reference, units of reward per nat; may be 0.
    """

    reference: Policy
    reward: Reward
    step: float
    anchor: float

    @property
    def beta(self) -> float:
        """Step + anchor: what a nat of KL(pi||p) costs in this round, units of reward per nat."""
        return self.step + self.anchor

    def log_target(self, scored: Scored) -> Tensor:
        """[P, G] (step log q + anchor log ref + r) / (step + anchor), nats, unnormalised."""
        if scored.log_q is None:
            raise ValueError(
                "moving_reference: got draws of an unknown law, expected log_q: the target tilts the law that drew. "
                "With draws of another law use tilt(lagged_policy, reward, beta)"
            )
        assert scored.reward is not None
        total = self.step * scored.log_q + scored.reward
        if self.anchor > 0:  # 0 * -inf would be NaN
            assert scored.log_ref is not None
            total = total + self.anchor * scored.log_ref
        return total / self.beta


def moving_reference(reference: Policy, reward: Reward, step: float, *, anchor: float = 0.0) -> MovingTarget:
    r"""The target of one round of mirror descent: the tilt of the policy q that drew, held near the reference.

    $$ \arg\max_\pi E_\pi[r] - s\,KL(\pi\|q) - a\,KL(\pi\|ref) \;\propto\;
       q^{s/(s+a)}\, ref^{a/(s+a)} \exp\!\big(r/(s+a)\big) $$

    If every round reaches its target and q starts at ref, the policy after k rounds is the plain tilt of ref at
    `composed_beta(steps, anchor=anchor)`. Without an anchor that is 1 / sum(1 / step), which goes to 0: many rounds
    are no regularisation, and the beta of a round says little. With one it goes to `anchor`, whatever the steps. Plan
    with the composed beta; measure against the tilt at the composed beta, or this round's target by `implied_reward`.

    All draws of one call must come from one law: replayed draws of older rounds have an older q and would be given
    another target. Where the lagged policy is at hand, `tilt(lagged_policy, reward, step)` is the same target without
    anchor, for draws of any law, and its KL is to the lagged policy.

    Args:
        reference: the first policy.
        reward: under TRL's contract; -inf forbids.
        step: the price of leaving the policy that drew, units of reward per nat, > 0.
        anchor: the price of leaving the reference, units of reward per nat, >= 0.

    Raises:
        ValueError: step is not positive, or anchor is negative or not finite.

    Example:
        >>> import torch
        >>> target = moving_reference(None, None, 0.5)
        >>> scored = Scored(log_q=torch.tensor([[-2.0, -1.0]]), reward=torch.tensor([[1.0, 0.0]]))
        >>> target.log_target(scored)
        tensor([[ 0., -1.]])

    Source: Abdolmaleki et al., "Maximum a posteriori policy optimisation", 2018, for the tilt of the policy that drew;
    Gorbatovski et al., "Learn your reference model for real good alignment", 2024 (TR-DPO), for references that move.

    Not the same as averaging weights into the reference (the soft update of TR-DPO): the average of log-probabilities
    that this corresponds to, ref^(1-a) pi^a, is only near the model with averaged weights.
    """
    require_beta(step)
    if not (math.isfinite(anchor) and anchor >= 0):
        raise ValueError(
            f"moving_reference: got anchor {anchor}, expected a number >= 0, units of reward per nat"
        )
    return MovingTarget(reference, reward, float(step), float(anchor))


def composed_beta(steps: Sequence[float], *, anchor: float = 0.0) -> float:
    """The one beta at which a plain tilt of ref is what all the rounds reach together.

    1 / beta_k = (step_k / beta_{k-1} + 1) / (step_k + anchor), from 1 / beta_0 = 0;
    without an anchor 1 / beta = sum(1 / step).

    Args:
        steps: what leaving the policy costs in each round, units of reward per nat, each > 0; at least one.
        anchor: what leaving the reference costs in every round, >= 0.

    Returns:
        Units of reward per nat.

    Raises:
        ValueError: no steps, or one that is not positive.

    Example:
        >>> composed_beta([1.0, 1.0, 2.0]), round(composed_beta([1.0] * 50, anchor=0.25), 4)
        (0.4, 0.25)

    Source: without an anchor it is the semigroup of exponential tilts; the recursion follows by substitution.
    """
    if not steps:
        raise ValueError("composed_beta: got no rounds, expected at least one step")
    inverse = 0.0
    for step in steps:
        require_beta(step)
        inverse = (step * inverse + 1) / (step + anchor)
    return 1 / inverse
