"""What a token gains by its ratio, and where it stops gaining.

N packed tokens. Each is a function (ratio, advantage, token_log_pi) -> [N], in units of the advantage.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Clip = Callable[[Tensor, Tensor, Tensor], Tensor]


def unclipped(ratio: Tensor, advantage: Tensor, token_log_pi: Tensor) -> Tensor:
    """What the ratio gains, ratio * advantage, [N].

    Example:
        >>> unclipped(torch.tensor([1.5]), torch.tensor([2.0]), torch.zeros(1))
        tensor([3.])
    """
    return ratio * advantage


def clipped(
    ratio: Tensor, advantage: Tensor, token_log_pi: Tensor, *, low: float = 0.2, high: float = 0.2
) -> Tensor:
    """min(ratio * advantage, clamp(ratio, 1 - low, 1 + high) * advantage), [N].

    No gradient where a good token has already gained enough (advantage > 0, ratio > 1 + high) or a bad one has lost
    enough (advantage < 0, ratio < 1 - low); everywhere else that of the ratio, so a move in the wrong direction can
    always be undone. A pessimistic bound of ratio * advantage, biased where it acts.

    Example:
        >>> ratio = torch.tensor([2.0, 2.0], requires_grad=True)
        >>> gain = clipped(ratio, torch.tensor([1.0, -1.0]), torch.zeros(2))
        >>> gain.tolist(), torch.autograd.grad(gain.sum(), ratio)[0].tolist()
        ([1.2000000476837158, -2.0], [0.0, -1.0])

    Source: Schulman et al., "Proximal policy optimization algorithms", 2017; Yu et al., "DAPO", 2025 (high above low).
    """
    return torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def capped(ratio: Tensor, advantage: Tensor, token_log_pi: Tensor, *, cap: float = 5.0) -> Tensor:
    """min(ratio, cap), detached, times advantage * log pi, [N].

    The cap bounds a token's weight and never takes its gradient away. `cap` is the largest ratio itself.

    Example:
        >>> log_pi = torch.tensor([0.5]).log().requires_grad_()
        >>> gain = capped(torch.tensor([9.0]), torch.tensor([2.0]), log_pi)
        >>> torch.autograd.grad(gain.sum(), log_pi)[0].tolist()
        [10.0]

    Source: MiniMax, "MiniMax-M1: scaling test-time compute efficiently with lightning attention", 2025 (CISPO);
    Khatri et al., "The art of scaling reinforcement learning compute for LLMs", 2025 (the cap of 5).
    """
    return ratio.detach().clamp(max=cap) * advantage * token_log_pi
