"""Baselines: what is subtracted from a score so that its estimate keeps its mean and loses variance.

P prompts, G draws a prompt.
"""

from __future__ import annotations

import torch


def leave_one_out(x: torch.Tensor) -> torch.Tensor:
    """The mean over the other draws of the same prompt.

    b[p, i] = (sum_j x[p, j] - x[p, i]) / (G - 1)

    Independent of draw i, so subtracting it leaves a score-function gradient unbiased. Differentiable in `x`.

    Args:
        x: [P, G] any number a draw; G >= 2.

    Returns:
        [P, G], in the units of `x`.

    Raises:
        ValueError: if G < 2: a single draw has no others, and a silent zero advantage would train nothing.

    Example:
        >>> leave_one_out(torch.tensor([[1.0, 2.0, 6.0]]))
        tensor([[4.0000, 3.5000, 1.5000]])

    Source: Kool, van Hoof, Welling, 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
    Not the same as the group mean (GRPO), which contains draw i and shrinks the gradient by (G - 1) / G.
    """
    num_draws = x.shape[-1]
    if num_draws < 2:
        raise ValueError(
            f"leave_one_out: got {num_draws} draw(s) a prompt; expected at least 2. "
            "Draw more completions a prompt, or pass baseline=None."
        )
    return (x.sum(-1, keepdim=True) - x) / (num_draws - 1)
