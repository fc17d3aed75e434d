"""How far the policy has moved from the one that drew: ratios of probabilities, a number a token.

P prompts, G draws a prompt, N packed tokens. Each is a function (token_log_pi, token_log_old, row, lengths) -> [N].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from klimb.objectives.packed import completion_sums

Ratio = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def token_ratio(token_log_pi: Tensor, token_log_old: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
    """Each token's own ratio, pi(y_t | y_<t) / old(y_t | y_<t), [N].

    It leaves out how likely the prefix has become, so its gradient is that of the policy only where pi = old.

    Example:
        >>> token_ratio(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), torch.tensor([0]), torch.tensor([[1]]))
        tensor([2.])
    """
    return torch.exp(token_log_pi - token_log_old)


def sequence_ratio(token_log_pi: Tensor, token_log_old: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
    """The completion's ratio pi(y) / old(y), the same at each of its tokens, [N].

    The importance weight: unclipped, expectations under old become expectations under pi. Its spread grows with length.

    Example:
        >>> log_pi, log_old = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.5]).log()
        >>> sequence_ratio(log_pi, log_old, torch.tensor([0, 0]), torch.tensor([[2]]))
        tensor([2., 2.])
    """
    return torch.exp(completion_sums(token_log_pi - token_log_old, row, lengths)).flatten()[row]


def geometric_ratio(token_log_pi: Tensor, token_log_old: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
    """The geometric mean of a completion's token ratios, (pi(y) / old(y))^(1/|y|), at each of its tokens, [N].

    Not an importance weight: it reweights no expectation. Its gradient is that of the mean over tokens, so each
    completion counts by 1/|y|, also at the first inner step.

    Example:
        >>> log_pi, log_old = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.125, 0.5]).log()
        >>> geometric_ratio(log_pi, log_old, torch.tensor([0, 0]), torch.tensor([[2]]))
        tensor([2., 2.])

    Source: Zheng et al., "Group sequence policy optimization", 2025.
    """
    mean = completion_sums(token_log_pi - token_log_old, row, lengths) / lengths.to(token_log_pi)
    return torch.exp(mean).flatten()[row]


def geometric_ratio_by_token(
    token_log_pi: Tensor, token_log_old: Tensor, row: Tensor, lengths: Tensor
) -> Tensor:
    """`geometric_ratio` in value, and in gradient that times the token's own score (GSPO-token), [N].

    With one advantage a completion, averaged over its tokens, value and gradient are those of `geometric_ratio`; an
    advantage a token is where the two differ.

    Example:
        >>> log_pi = torch.tensor([0.5, 0.5]).log().requires_grad_()
        >>> log_old = torch.tensor([0.125, 0.5]).log()
        >>> s = geometric_ratio_by_token(log_pi, log_old, torch.tensor([0, 0]), torch.tensor([[2]]))
        >>> s.tolist(), torch.autograd.grad(s[0], log_pi)[0].tolist()
        ([2.0, 2.0], [2.0, 0.0])

    Source: Zheng et al., "Group sequence policy optimization", 2025.
    """
    value = geometric_ratio(token_log_pi, token_log_old, row, lengths).detach()
    return value * torch.exp(
        token_log_pi - token_log_pi.detach()
    )  # the second factor is 1, its derivative is not 0
