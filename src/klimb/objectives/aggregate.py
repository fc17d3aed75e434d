"""From a number a token to a number a prompt, and who counts how much on the way.

P prompts, G draws a prompt, N packed tokens. Each is a function (x [N], row [N], lengths [P, G]) -> [P].
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from klimb.objectives.packed import completion_sums

Aggregate = Callable[[Tensor, Tensor, Tensor], Tensor]


def mean_each(x: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
    """The mean over each completion's tokens, then over the draws, [P].

    With a number a token, a long completion's tokens count less than a short one's: the expected gradient is that of
    advantage / |y|. With one number a completion it is just the mean over draws.

    Example:
        >>> import torch
        >>> mean_each(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), torch.tensor([[2, 1]]))
        tensor([3.5000])

    Source: Shao et al., "DeepSeekMath", 2024 (GRPO).
    """
    return (completion_sums(x, row, lengths) / lengths.to(x)).mean(1)


def mean_over_group(x: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
    """The mean over all tokens of all draws of a prompt, [P].

    The group is the prompt's G draws, as DAPO is written. A ratio of two means over draws: a group with long
    completions counts each of its tokens less, so this is biased too.

    Example:
        >>> import torch
        >>> mean_over_group(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), torch.tensor([[2, 1]]))
        tensor([3.])

    Source: Yu et al., "DAPO: an open-source LLM reinforcement learning system at scale", 2025.
    """
    return completion_sums(x, row, lengths).sum(1) / lengths.to(x).sum(1)


def mean_over_batch(x: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
    """Each prompt's sum, scaled so that the mean of the P values is the mean over all tokens given, [P].

    Value p is (sum over the prompt's tokens) * P / N. TRL and verl run DAPO like this, over the whole batch. The batch
    is what this one call sees: a trainer that calls prompt by prompt gets `mean_over_group`.

    Example:
        >>> import torch
        >>> x, row, lengths = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0, 0, 1]), torch.tensor([[2], [1]])
        >>> mean_over_batch(x, row, lengths).tolist(), x.mean().item()
        ([2.0, 4.0], 3.0)
    """
    return completion_sums(x, row, lengths).sum(1) * lengths.shape[0] / lengths.to(x).sum()


def sum_tokens(x: Tensor, row: Tensor, lengths: Tensor, *, divisor: float = 1.0) -> Tensor:
    """The sum over each completion's tokens divided by a constant, then the mean over draws, [P].

    No length changes anyone's weight: of these four only this one keeps a token-level policy gradient unbiased (times
    1 / divisor, which a learning rate absorbs). Dr. GRPO's divisor is the longest length allowed.

    Example:
        >>> import torch
        >>> sum_tokens(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), torch.tensor([[2, 1]]))
        tensor([4.5000])

    Source: Liu et al., "Understanding R1-Zero-like training: a critical perspective", 2025 (Dr. GRPO).
    """
    return completion_sums(x, row, lengths).mean(1) / divisor
