"""The minimum of a smooth function of a few numbers, to the last digits: Newton's method that cannot walk uphill."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def minimise(value: Callable[[Tensor], Tensor], starts: Iterable[Tensor], *, max_steps: int = 200) -> Tensor:
    """Where a function [K] -> scalar is least, the best of what is reached from each start.

    The Hessian's eigenvalues are taken by their size, so a step goes downhill also where the function is not convex;
    a step that does not lower the value is halved. Where values differ only by rounding, it is the slope that has to fall
    to a half. A minimum at infinity is followed for `max_steps` steps.

    Example:
        >>> at = minimise(lambda x: (x - 3).square().sum() + x.exp().sum(), [torch.zeros(1, dtype=torch.float64)])
        >>> round(at.item(), 6)
        1.251758
    """
    reached = [_descend(value, start.detach().double(), max_steps) for start in starts]
    return min(reached, key=lambda x: value(x).item())


def _descend(value: Callable[[Tensor], Tensor], x: Tensor, max_steps: int) -> Tensor:
    now, slope = _value_and_slope(value, x)
    for _ in range(max_steps):
        if slope.abs().max() < 1e-14 * (1 + now.abs()):
            return x
        curvature = torch.autograd.functional.hessian(value, x)
        sizes, directions = torch.linalg.eigh((curvature + curvature.T) / 2)
        # flat directions (a constant added to logits) have no slope either: any floor will do
        step = directions @ ((directions.T @ slope) / sizes.abs().clamp_min(1e-9))
        step = step * (8 / step.norm().clamp_min(8))
        for _ in range(30):
            then, left = _value_and_slope(value, x - step)
            alike = then <= now + 1e-15 * (1 + now.abs())
            if then < now or (alike and left.norm() < slope.norm() / 2):
                break
            step = step / 2
        else:
            return x
        x, now, slope = x - step, then, left
    return x


def _value_and_slope(value: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    variable = x.clone().requires_grad_()
    now = value(variable)
    return now.detach(), torch.autograd.grad(now, variable)[0]
