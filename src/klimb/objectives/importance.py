"""The weight between a sampler and the trainer, whose probabilities of the same draw differ by rounding or staleness.

P prompts, G draws a prompt, N packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from klimb.objectives.ratio import Ratio, token_ratio


def truncated(weight: Tensor, *, cap: float = 2.0) -> Tensor:
    """min(weight, cap): an improbable draw counts at most `cap`.

    Example:
        >>> import torch
        >>> truncated(torch.tensor([0.5, 9.0]))
        tensor([0.5000, 2.0000])
    """
    return weight.clamp(max=cap)


def masked(weight: Tensor, *, low: float = 0.0, high: float = 2.0) -> Tensor:
    """The weight where it lies within [low, high], zero elsewhere: such a draw is not believed at all.

    Example:
        >>> import torch
        >>> masked(torch.tensor([0.5, 9.0]))
        tensor([0.5000, 0.0000])
    """
    return weight.masked_fill((weight < low) | (weight > high), 0.0)


def importance(
    token_log_old: Tensor,
    token_log_q: Tensor,
    row: Tensor,
    lengths: Tensor,
    *,
    ratio: Ratio = token_ratio,
    limit: Callable[[Tensor], Tensor] | None = truncated,
) -> Tensor:
    r"""How much more likely the trainer's old policy finds the draw than the sampler said, limited; detached.

    $$ w = \min(\text{old} / q, \text{cap}) $$

    With `ratio=sequence_ratio, limit=None` what is weighted is unbiased for the trainer's old policy, whatever the
    sampler, if q reaches all that old reaches. A limit biases it where it acts, in exchange for bounded variance. With
    `token_ratio` it is biased even without a limit, since the prefixes still are the sampler's.

    Args:
        token_log_old: [N] by the trainer's own pass, nats.
        token_log_q: [N] as the sampler stated it, nats.
        row: [N] which completion each token belongs to.
        lengths: [P, G] tokens.
        ratio: `token_ratio` or `sequence_ratio`.
        limit: `truncated` or `masked`, None for no limit.

    Returns:
        [N] weights.

    Example:
        >>> import torch
        >>> old, q = torch.tensor([0.9]).log(), torch.tensor([0.3]).log()
        >>> importance(old, q, torch.tensor([0]), torch.tensor([[1]]))
        tensor([2.])

    Source: Ionides, "Truncated importance sampling", 2008; Yao et al., "Your efficient RL framework secretly brings
    you off-policy RL training", 2025 (token level, truncated); Ling team, "Every step evolves", 2025 (masked: IcePop).

    Not the same as the surrogate's ratio, which is pi / old, moves with the update and is differentiated.
    """
    weight = ratio(token_log_old, token_log_q, row, lengths).detach()
    return weight if limit is None else limit(weight)
