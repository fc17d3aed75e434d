"""Where to go: the reference tilted by the reward, p(y|x) = ref(y|x) exp(r(x,y) / beta) / Z(x)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from klimb.data import Reward, Scored
from klimb.models.policy import CausalPolicy


@dataclass(frozen=True)
class Tilt:
    """The optimal policy of maximising E[r] - beta KL(pi||reference), known up to its normaliser.

    Attributes:
        reference: the policy that is tilted.
        reward: what is good, under TRL's contract.
        beta: units of reward per nat, at sequence level.
    """

    reference: CausalPolicy
    reward: Reward
    beta: float

    def log_target(self, scored: Scored) -> Tensor:
        """[P, G] log ref + r / beta, nats; log Z(x) would have to be subtracted to make it a probability."""
        assert scored.log_ref is not None
        assert scored.reward is not None
        return scored.log_ref + scored.reward / self.beta


def tilt(reference: CausalPolicy, reward: Reward, beta: float) -> Tilt:
    """The target p = ref exp(r / beta) / Z.

    Raises:
        ValueError: beta is not a positive number. At beta = 0 there is no target: the maximiser of the reward alone is
            no tilt of the reference, and neither a gap nor a share of the way can be stated.

    Source: Korbak, Perez, Buckley, "RL with KL penalties is better viewed as Bayesian inference", 2022.
    """
    require_beta(beta)
    return Tilt(reference, reward, float(beta))


def require_beta(beta: float) -> None:
    """Refuse a price that names no target.

    Raises:
        ValueError: beta is zero, negative, infinite or NaN.
    """
    if beta == 0:
        raise ValueError(
            "beta 0 has no target: without a price on KL the best policy is any that gives the best completion; "
            "give a small positive beta, a kl_budget in nats, or a reward_goal"
        )
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta: got {beta}, expected a positive number, in units of reward per nat")
