"""Tokens end to end: sums by completion, and a completion's number handed to each of its tokens.

P prompts, G draws a prompt, N packed tokens: prompt by prompt, draw by draw.
"""

from __future__ import annotations

import torch
from torch import Tensor


def require_packed(objective: str, row: Tensor, lengths: Tensor, **numbers: Tensor) -> None:
    """Refuse tokens that do not fill the completions in order, and numbers that are not finite and one a token.

    Args:
        objective: the name to complain in.
        row: [N] which completion (p * G + g) each token belongs to.
        lengths: [P, G] tokens; at least one in each completion.
        **numbers: [N] each, by the name the user knows them by.

    Raises:
        ValueError: lengths is not [P, G] or has an empty completion, row does not follow from it, or a number is of
            another shape, NaN or infinite.

    Example:
        >>> require_packed("surrogate", torch.tensor([0, 0, 1]), torch.tensor([[2, 1]]), values=torch.zeros(2))
        Traceback (most recent call last):
        ValueError: surrogate: got values of shape [2], expected [3]: one number a packed token
    """
    if lengths.ndim != 2 or not bool((lengths > 0).all()):
        raise ValueError(
            f"{objective}: got lengths {lengths.tolist()}, expected [P, G] with a token or more in each completion"
        )
    counts = lengths.flatten().to(row.device)
    if not torch.equal(row, torch.arange(len(counts), device=row.device).repeat_interleave(counts)):
        raise ValueError(
            f"{objective}: got a row of {row.numel()} tokens that does not follow from lengths (their sum is "
            f"{int(counts.sum())}), expected p * G + g for each token of prompt p, draw g, in order"
        )
    for name, x in numbers.items():
        if x.shape != row.shape:
            raise ValueError(
                f"{objective}: got {name} of shape {list(x.shape)}, expected {list(row.shape)}: one number a packed token"
            )
        bad = x[~torch.isfinite(x)]
        if bad.numel():
            raise ValueError(f"{objective}: got {name} = {bad[0].item()}, expected finite numbers")


def completion_sums(x: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
    """Sum over the tokens of each completion, [N] -> [P, G]; differentiable.

    Example:
        >>> completion_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1]), torch.tensor([[2, 1]]))
        tensor([[3., 4.]])
    """
    return x.new_zeros(lengths.numel()).index_add(0, row, x).reshape(lengths.shape)


def sums_before(x: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
    """Sum over the earlier tokens of the same completion, [N] -> [N]; differentiable.

    Example:
        >>> row, lengths = torch.tensor([0, 0, 0, 1]), torch.tensor([[3, 1]])
        >>> sums_before(torch.tensor([1.0, 2.0, 4.0, 8.0]), row, lengths)
        tensor([0., 1., 3., 0.])
    """
    counts = lengths.flatten().to(row.device)
    # completion by completion: one running sum over all of them would lose the digits of the last ones
    position = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    padded = x.new_zeros(len(counts), int(counts.max())).index_put((row, position), x)
    return (padded.cumsum(1) - padded)[row, position]
