"""How far importance weights can be trusted: effective sample size and the shape k of their tail.

P prompts, G draws a prompt; `log_w` [P, G] are log-weights of any target, in nats, unnormalised.
Both readings are pre-asymptotic: with too few draws the effective sample size is too rosy, and an all-equal group
(nobody ever succeeded) reads as perfect. The margin log G - KL in `klimb.numbers.tilt` is the stricter judge.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from klimb.numbers.tilt import log_mean_exp, shares

SMALLEST_TAIL = 25
"""draws below which a tail of a fifth of them is too short (five) to fit"""


def effective_sample_size(log_w: Tensor) -> Tensor:
    """How many equally weighted draws these weights are worth.

    ESS = (sum w)^2 / sum w^2, between 1 and G; estimates G / (1 + chi2(p||q)) and is biased up when G < 1 + chi2.

    Args:
        log_w: [P, G] nats.

    Returns:
        [P] draws; 0 where every log-weight is -inf.

    Example:
        >>> effective_sample_size(torch.tensor([[0.0, 0.0, -torch.inf]]))
        tensor([2.])

    Source: Kong, 1992, "A note on importance sampling using standardized weights".
    """
    total = (shares(log_w.double()) ** 2).sum(-1)
    return torch.where(total > 0, 1 / total, 0.0).to(log_w.dtype)


def pareto_k(log_w: Tensor) -> Tensor:
    """Shape of the generalised Pareto tail fitted to each prompt's weights (PSIS k-hat).

    Trust the weights where k is below `pareto_threshold(G)`. For G of 25 to about 100 the fit's prior (ten pseudo-draws
    at 0.5) weighs as much as the tail itself: prefer `pooled_pareto_k` there.

    Where ties leave no tail to fit (a binary reward), the largest weight is an atom. It is trusted (k = 0) while it
    carries at most a fifth of the total weight, and not (k = inf) if it carries more.

    Args:
        log_w: [P, G] nats, G >= 25.

    Returns:
        [P].

    Raises:
        ValueError: for G < 25, or NaN or +inf weights.

    Example:
        >>> pareto_k(torch.zeros(1, 32))
        tensor([0.])

    Source: Vehtari, Simpson, Gelman, Yao, Gabry, 2024, "Pareto smoothed importance sampling".
    """
    num_draws = log_w.shape[-1]
    if num_draws < SMALLEST_TAIL:
        raise ValueError(
            f"pareto_k: got {num_draws} draws a prompt; expected at least {SMALLEST_TAIL}. "
            "Use pooled_pareto_k, which pools the prompts."
        )
    rows = log_w.detach().double().reshape(-1, num_draws).cpu().numpy()
    k = torch.tensor([_tail_shape(row) for row in rows], dtype=log_w.dtype, device=log_w.device)
    return k.reshape(log_w.shape[:-1])


def pooled_pareto_k(log_w: Tensor) -> float:
    """Pareto k of all prompts' weights together, each prompt's divided by its own mean weight.

    An average over prompts rests on this pooled tail, and pooling gives the fit draws enough. Prompts whose weights
    are all zero are left out.

    Args:
        log_w: [P, G] nats, P G >= 25.

    Returns:
        k; inf where fewer than 25 weights remain.

    Example:
        >>> pooled_pareto_k(torch.zeros(8, 4))
        0.0
    """
    x = log_w.detach().double().reshape(-1, log_w.shape[-1])
    centre = log_mean_exp(x)
    x = (x - centre[:, None])[centre > -math.inf]
    return _tail_shape(x.flatten().cpu().numpy()) if x.numel() >= SMALLEST_TAIL else math.inf


def pareto_threshold(num_draws: int) -> float:
    """The k below which weights from this many draws can be trusted: min(1 - 1 / log10 N, 0.7).

    Example:
        >>> round(pareto_threshold(100), 3), pareto_threshold(10**6)
        (0.5, 0.7)

    Source: Vehtari et al., 2024, "Pareto smoothed importance sampling".
    """
    return min(1 - 1 / math.log10(num_draws), 0.7) if num_draws > 10 else -math.inf


def _tail_shape(log_w: np.ndarray) -> float:
    if not (log_w < math.inf).all():
        raise ValueError("pareto_k: got log-weights that are NaN or +inf; expected finite numbers or -inf.")
    top = log_w.max()
    if top == -math.inf:
        return math.inf
    x = np.maximum(log_w - top, -1e3)  # e^-1000 is 0 in float64: a weight of zero, without infinities
    n = len(x)
    length = math.floor(3 * n**0.5) if n > 225 else n // 5
    above = np.sort(x)[-length - 1 :]
    excess = np.exp(above[1:]) - np.exp(above[0])
    # the fit divides by the lower quartile of the excesses over the cutoff, and by their spread: with ties there is no tail
    if excess[int(length / 4 + 0.5) - 1] <= np.finfo(float).eps * excess[-1] or above[1] == above[-1]:
        return 0.0 if np.exp(x).sum() >= 5 * (1 - 1e-12) else math.inf
    from arviz_stats.base import array_stats

    # psislw takes log-likelihoods of what is left out, that is, minus the log-weights
    return float(array_stats.psislw(-x)[1])
