"""A critic: what reward is to be expected after a prefix, linear in the policy's last hidden state.

It reads the states of the policy as it drew, and nothing flows back into them: how much the critic may learn and how
much the policy may move are then two settings that do not touch each other.
"""

from __future__ import annotations

from torch import Tensor, nn


class Critic(nn.Module):
    """V(prefix) = w . hidden + b, in float32; zero at first, where advantages are plain rewards to go.

    Args:
        width: D of the hidden states.

    Example:
        >>> import torch
        >>> Critic(4)(torch.ones(3, 4)).tolist()
        [0.0, 0.0, 0.0]
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, D] states before each packed token -> [N] units of reward."""
        return self.linear(hidden.detach().float())[:, 0]
