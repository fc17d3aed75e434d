"""An entropy bonus is another target: the plain tilt, flattened."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from klimb.data import Policy, Reward, Scored
from klimb.target.tilt import require_beta


@dataclass(frozen=True)
class EntropyTarget:
    """The maximiser of E[r] - anchor KL(pi||reference) + bonus H(pi); see `entropy_bonus`.

    Attributes:
        reference: the policy that is tilted.
        reward: what is good.
        anchor: the price of KL, units of reward per nat.
        bonus: the worth of entropy, units of reward per nat.
    """

    reference: Policy
    reward: Reward
    anchor: float
    bonus: float

    @property
    def beta(self) -> float:
        """Anchor + bonus: what a nat of KL(pi||p) costs, units of reward per nat."""
        return self.anchor + self.bonus

    @property
    def temperature(self) -> float:
        """(anchor + bonus) / anchor: the target is the plain tilt at `anchor`, drawn at this temperature."""
        return self.beta / self.anchor

    def log_target(self, scored: Scored) -> Tensor:
        """[P, G] (anchor log ref + r) / (anchor + bonus), nats, unnormalised."""
        assert scored.log_ref is not None
        assert scored.reward is not None
        return (self.anchor * scored.log_ref + scored.reward) / self.beta


def entropy_bonus(reference: Policy, reward: Reward, beta: float, *, bonus: float) -> EntropyTarget:
    r"""The target of a KL penalty together with an entropy bonus.

    $$ \arg\max_\pi E_\pi[r] - \beta\,KL(\pi\|ref) + b\,H(\pi) \;\propto\;
       ref^{\beta/(\beta+b)} \exp\!\big(r/(\beta+b)\big) = \big(ref\,e^{r/\beta}\big)^{\beta/(\beta+b)} $$

    It is the plain tilt at `beta`, whole completions drawn at the temperature 1 + bonus / beta. What is left to climb
    is (beta + bonus) KL(pi||p), so that sum is the target's `beta`. For plan and measure: the plain tilt of the reward
    r - bonus log ref at beta + bonus (`implied_reward`). A bonus flattens over all completions, and there are far more
    long ones than short: expect length to grow with it.

    Args:
        reference: the policy that is tilted.
        reward: under TRL's contract; -inf forbids.
        beta: the price of KL, units of reward per nat, > 0.
        bonus: the worth of entropy, units of reward per nat, >= 0; 0 gives the plain tilt.

    Raises:
        ValueError: beta is not positive, or bonus is negative or not finite.

    Example:
        >>> import torch
        >>> target = entropy_bonus(None, None, 1.0, bonus=1.0)
        >>> scored = Scored(log_ref=torch.tensor([[-2.0, -1.0]]), reward=torch.tensor([[3.0, 0.0]]))
        >>> target.log_target(scored), target.temperature
        (tensor([[ 0.5000, -0.5000]]), 2.0)

    Source: Ziebart, "Modeling purposeful adaptive behavior with the principle of maximum causal entropy", 2010, for
    the bonus alone; the mixed form follows from the same argument.

    Not the same as the entropy term of PPO implementations, which adds up next-token entropies at the prefixes visited
    and leaves out that earlier tokens choose the prefixes; nor as sampling each token at that temperature.
    """
    require_beta(beta)
    if not (math.isfinite(bonus) and bonus >= 0):
        raise ValueError(f"entropy_bonus: got bonus {bonus}, expected a number >= 0, units of reward per nat")
    return EntropyTarget(reference, reward, float(beta), float(bonus))
