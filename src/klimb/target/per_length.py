"""The reward per token instead of per completion: another target, which prefers short ways to the same reward."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from klimb.data import Policy, Reward, Scored
from klimb.target.tilt import require_beta


@dataclass(frozen=True)
class LengthNormalizedTarget:
    """The tilt by reward per token; see `length_normalized`.

    Attributes:
        reference: the policy that is tilted.
        reward: what is good, for the whole completion.
        beta: units of reward per token, per nat.
    """

    reference: Policy
    reward: Reward
    beta: float

    def log_target(self, scored: Scored) -> Tensor:
        """[P, G] log ref + r / (length beta), nats, unnormalised."""
        assert scored.log_ref is not None
        assert scored.reward is not None
        if scored.lengths is None:
            raise ValueError("length_normalized: got no lengths, expected [P, G] in tokens")
        return scored.log_ref + scored.reward / (scored.lengths.to(scored.reward) * self.beta)


def length_normalized(reference: Policy, reward: Reward, beta: float) -> LengthNormalizedTarget:
    r"""The target of the reward divided by the completion's length in tokens.

    $$ \arg\max_\pi E_\pi[r/|y|] - \beta\,KL(\pi\|ref) \;\propto\; ref \exp\!\big(r/(|y|\,\beta)\big) $$

    It is the plain tilt of the reward r / |y|; among completions of n tokens it is the plain tilt at beta_n = n beta.
    A good completion is worth more the shorter it is, a bad one (r < 0) less bad the longer it is; unlike in the plain
    tilt, adding a constant to r moves the target. Plan with r / |y| (`implied_reward`); the end-of-sequence token counts.

    Args:
        reference: the policy that is tilted.
        reward: under TRL's contract, for the whole completion; -inf forbids.
        beta: units of reward per token, per nat, > 0.

    Raises:
        ValueError: beta is not positive; lengths are not known where the target is computed.

    Example:
        >>> import torch
        >>> scored = Scored(log_ref=torch.zeros(1, 2), reward=torch.ones(1, 2), lengths=torch.tensor([[1, 4]]))
        >>> length_normalized(None, None, 0.5).log_target(scored)
        tensor([[2.0000, 0.5000]])

    Source: Meng, Xia, Chen, "SimPO: simple preference optimization with a reference-free reward", 2024, normalises the
    log-probability in the same way; Liu et al., "Understanding R1-Zero-like training", 2025, show what 1 / |y| does.

    Not the same as dividing the loss of a completion by its length (GRPO), which weighs the gradient and has no target;
    nor as FlowRL (Zhu et al., 2025), which divides the log-ratio by the length and not the reward, and so goes to
    ref exp(|y| (r / beta - c)), where long completions are worth more.
    """
    require_beta(beta)
    return LengthNormalizedTarget(reference, reward, float(beta))
