"""How a policy orders completions that somebody judged."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def ordering(log_rho: Tensor, labels: Tensor, lengths: Tensor, beta: float) -> dict[str, Tensor]:
    """How a policy orders completions that were judged, a number for each pair whose labels differ.

    Args:
        log_rho: [P, K] log pi/ref, nats.
        labels: [P, K].
        lengths: [P, K] tokens.
        beta: units of reward per nat.

    Returns:
        By name, [pairs]: `accuracy` (1 where the better one has the larger ratio, 1/2 where they tie), `margin`
        (beta times how much larger, units of reward), `surprise` (-log of the chance that a Bradley-Terry reader of the margin
        gives to what happened, nats; log 2 is knowing nothing) and `longer` (1 where the better one is longer).

    Example:
        >>> found = ordering(torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[3, 5]]), 0.5)
        >>> {name: round(x.item(), 3) for name, x in found.items()}
        {'accuracy': 1.0, 'margin': 1.0, 'surprise': 0.313, 'longer': 0.0}
    """
    first, second = torch.triu_indices(labels.shape[1], labels.shape[1], 1)
    sign = (labels[:, first] - labels[:, second]).sign()
    differ = sign != 0
    sign = sign[differ]

    def apart(x: Tensor) -> Tensor:
        return (x[:, first] - x[:, second])[differ] * sign

    margin = beta * apart(log_rho)
    return {
        "accuracy": (margin.sign() + 1) / 2,
        "margin": margin,
        "surprise": -logsigmoid(margin),
        "longer": (apart(lengths.float()).sign() + 1) / 2,
    }


def agreement(first: Tensor, second: Tensor) -> Tensor:
    """[P] of the pairs of a prompt's draws that both rewards order, the share that they order alike; NaN where there is none.

    1 is the same order, 1/2 knows nothing of it: (1 + tau) / 2 of Kendall's tau where nothing ties.

    Args:
        first: [P, G] one reward.
        second: [P, G] another one; NaN where it does not apply.

    Example:
        >>> agreement(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 5.0, 4.0]]))
        tensor([0.6667])

    Source: Kendall, "A new measure of rank correlation", 1938.
    """
    shares = []
    for one, other in zip(first, second, strict=True):  # prompt by prompt: pairs are many
        i, j = torch.triu_indices(len(one), len(one), 1)
        alike = (one[i] - one[j]).sign() * (other[i] - other[j]).sign()
        shares.append(((alike[alike.abs() == 1] + 1) / 2).mean())
    return torch.stack(shares)
