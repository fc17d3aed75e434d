"""Float32 copies of half-precision weights: the optimizer moves the copies, the model gets them rounded.

A bfloat16 number has 8 bits of mantissa: an update below 1/256 of a weight would be lost in it, and at the learning
rates of fine-tuning most updates are. The copies cost four bytes a trained number, little for an adapter.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def adamw(
    parameters: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW over the masters of `parameters`; a step takes their gradients, clears them, and moves both.

    Weights of float32 or wider are their own masters.

    Example:
        >>> weight = torch.ones(1, dtype=torch.bfloat16, requires_grad=True)
        >>> optimizer = adamw([weight], lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
        >>> for _ in range(4):
        ...     weight.grad = torch.ones_like(weight)
        ...     optimizer.step()
        >>> weight.item(), round(masters(optimizer)[0].item(), 4)  # bfloat16 alone would still be at 1.0
        (0.99609375, 0.996)

    Source: Micikevicius et al., "Mixed precision training", 2018 (master copies); Loshchilov, Hutter, "Decoupled
    weight decay regularization", 2019.
    """
    copies = [_master(p) for p in parameters]
    optimizer = torch.optim.AdamW(copies, lr=lr, betas=betas, weight_decay=weight_decay)

    def take_gradients(*_: object) -> None:
        for copy, parameter in zip(copies, parameters, strict=True):
            if copy is not parameter and parameter.grad is not None:
                copy.grad, parameter.grad = parameter.grad.to(copy.dtype), None

    def hand_out(*_: object) -> None:
        write_out(copies, parameters)

    optimizer.register_step_pre_hook(take_gradients)
    optimizer.register_step_post_hook(hand_out)
    return optimizer


def masters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The tensors that the optimizer moves."""
    return [p for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def write_out(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """Copy values into parameters, rounded to their dtype."""
    for value, parameter in zip(values, parameters, strict=True):
        if value is not parameter:
            parameter.copy_(value)


@contextmanager
def speaking_as(
    values: Sequence[Tensor], optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> Generator[None]:
    """Within this context the model has other weights (an average, say); afterwards its own again, bit by bit."""
    before = [
        m.detach().clone() if m is p else m for m, p in zip(masters(optimizer), parameters, strict=True)
    ]
    write_out(values, parameters)
    try:
        yield
    finally:
        write_out(before, parameters)


@torch.no_grad()
def moved_average(
    average: Sequence[Tensor], values: Sequence[Tensor], *, decay: float, step: int
) -> list[Tensor]:
    """The exponential moving average after `step` values, without weight on anything before the first.

    Example:
        >>> one = moved_average([torch.zeros(1)], [torch.ones(1)], decay=0.9, step=1)
        >>> moved_average(one, [torch.tensor([3.0])], decay=0.5, step=2)[0]  # (1/2 * 1 + 1 * 3) / (3/2)
        tensor([2.3333])
    """
    share = (1 - decay) / (1 - decay**step)
    return [a.lerp(v.detach(), share) for a, v in zip(average, values, strict=True)]


def _master(parameter: Tensor) -> Tensor:
    if parameter.dtype in (torch.bfloat16, torch.float16):
        return parameter.detach().float().clone().requires_grad_()
    return parameter
