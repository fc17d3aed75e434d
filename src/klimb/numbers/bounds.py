"""What is known without trusting weights: binary rewards in closed form, and ceilings on any policy's reward at a KL.

For r in {0, 1} and pass rate c of the reference, the target is a logit shift: logit c* = logit c + 1 / beta.
P prompts, G draws a prompt. Nats; reward in its own units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from klimb.numbers.tilt import log_mean_exp, log_partition


def binary_log_partition(rate: Tensor, beta: float) -> Tensor:
    """The log Z for a reward in {0, 1}: log(1 - c + c e^(1/beta)), exact.

    Args:
        rate: any shape, the reference's pass rate c, in [0, 1].
        beta: reward per nat, > 0.

    Returns:
        The same shape, nats: 0 at c = 0, 1 / beta at c = 1.

    Raises:
        ValueError: for rates outside [0, 1] or beta <= 0.

    Example:
        >>> binary_log_partition(torch.tensor([0.0, 0.5, 1.0]), 1.0)
        tensor([0.0000, 0.6201, 1.0000])
    """
    c = _rate(rate, beta)
    return torch.logaddexp(torch.log1p(-c), c.log() + 1 / beta).to(rate.dtype)


def binary_tilted_rate(rate: Tensor, beta: float) -> Tensor:
    """The target's pass rate for a reward in {0, 1}: logit c* = logit c + 1 / beta, exact.

    Args:
        rate: any shape, c in [0, 1].
        beta: reward per nat, > 0.

    Returns:
        The same shape: 0 stays 0 (a target cannot find what the reference never draws), 1 stays 1.

    Example:
        >>> binary_tilted_rate(torch.tensor([0.0, 0.5, 1.0]), 1.0)
        tensor([0.0000, 0.7311, 1.0000])

    Source: Mroueh, 2025, "Reinforcement learning with verifiable rewards" (closed forms for binary rewards).
    """
    c = _rate(rate, beta)
    return torch.sigmoid(torch.logit(c) + 1 / beta).to(rate.dtype)


def binary_tilted_kl(rate: Tensor, beta: float) -> Tensor:
    """KL(p||ref) for a reward in {0, 1}: the KL of two coins, c* to c, exact.

    Not monotone in c: zero at both ends.

    Args:
        rate: any shape, c in [0, 1].
        beta: reward per nat, > 0.

    Returns:
        The same shape, nats, at most -log c.

    Example:
        >>> binary_tilted_kl(torch.tensor([0.0, 0.5, 1.0]), 1.0)
        tensor([0.0000, 0.1109, 0.0000])
    """
    c = _rate(rate, beta)
    x = torch.logit(c) + 1 / beta
    tilted = torch.sigmoid(x)
    inside = (c > 0) & (c < 1)
    safe = torch.where(inside, c, 0.5)
    x = torch.where(inside, x, 0.0)
    log_sigmoid = torch.nn.functional.logsigmoid
    kl = tilted * (log_sigmoid(x) - safe.log()) + (1 - tilted) * (log_sigmoid(-x) - torch.log1p(-safe))
    return torch.where(inside, kl.clamp_min(0.0), 0.0).to(rate.dtype)


def clopper_pearson(successes: Tensor, trials: int, *, level: float = 0.95) -> tuple[Tensor, Tensor]:
    """An interval of the pass rate that covers at least `level` of the time, whatever the rate and however few trials.

    log Z and the target's rate rise with the rate, so `binary_log_partition` and `binary_tilted_rate` of the ends are
    the ends of their intervals. (KL is not monotone: its interval is not that of the ends.)

    Args:
        successes: any shape, counts between 0 and `trials`.
        trials: draws a prompt.
        level: coverage.

    Returns:
        low, high: float64, the same shape.

    Raises:
        ValueError: for counts outside 0..trials.

    Example:
        >>> low, high = clopper_pearson(torch.tensor([0, 16]), 16)
        >>> low, high
        (tensor([0.0000, 0.7941], dtype=torch.float64), tensor([0.2059, 1.0000], dtype=torch.float64))

    Source: Clopper and Pearson, 1934, "The use of confidence or fiducial limits illustrated in the case of the binomial".
    """
    from scipy.special import betaincinv

    k = successes.double()
    if trials < 1 or not ((k >= 0) & (k <= trials)).all():
        raise ValueError(
            f"clopper_pearson: got counts outside 0..{trials}; expected 0 <= successes <= trials >= 1."
        )
    tail = (1 - level) / 2
    low = betaincinv(k.clamp_min(1e-300).numpy(), (trials - k + 1).numpy(), tail)
    high = betaincinv((k + 1).numpy(), (trials - k).clamp_min(1e-300).numpy(), 1 - tail)
    return torch.where(k > 0, torch.as_tensor(low), 0.0), torch.where(k < trials, torch.as_tensor(high), 1.0)


def reward_ceiling(reward: Tensor, kl: float, log_w: Tensor | None = None, *, correct: bool = True) -> float:
    """The most reward that any policy of mean KL `kl` can have: min over beta of beta (log Z(beta) + kl).

    E_pi r <= beta (log Z(beta) + KL(pi||ref)) for every beta, so any grid of betas gives a bound and the best of a fine
    one is within 1e-4 of the spread. Means over prompts. log Z is estimated, and biased low where unreliable: there the
    ceiling is too low.

    Args:
        reward: [P, G].
        kl: nats, >= 0.
        log_w: [P, G] nats, or None; weights are normalised within the prompt.
        correct: jackknife log Z where reliable.

    Returns:
        Units of reward; never above the mean of the prompts' best draws.

    Raises:
        ValueError: for kl < 0, or a prompt whose draws are all forbidden.

    Example:
        >>> round(reward_ceiling(torch.tensor([[0.0, 1.0]]), math.log(2)), 4)
        1.0

    Source: Donsker and Varadhan, 1975 (the variational formula); Monteiro Paes et al., 2026, "Theoretical limits of
    language model alignment".
    """
    if kl < 0:
        raise ValueError(f"reward_ceiling: got kl={kl}; expected >= 0 nats.")
    r = reward.detach().double()
    w = torch.zeros_like(r) if log_w is None else log_w.detach().double()
    r = torch.where(w > -math.inf, r, -math.inf)
    top = r.amax(-1, keepdim=True)
    if not (top > -math.inf).all():
        raise ValueError("reward_ceiling: a prompt's draws are all forbidden (reward -inf); leave it out.")
    below = r - top
    spread = -torch.where(r > -math.inf, below, 0.0).min().item() or 1.0
    w = w - log_mean_exp(w)[..., None]
    ceilings = [
        beta * (log_partition(below, beta, w, correct=correct).mean().item() + kl)
        for beta in torch.logspace(-4, 4, 801, dtype=torch.float64).mul(spread).tolist()
    ]
    return top.mean().item() + min(0.0, *ceilings)


def _rate(rate: Tensor, beta: float) -> Tensor:
    if not 0 < beta < math.inf:
        raise ValueError(f"got beta={beta}; expected a finite beta > 0.")
    c = rate.double()
    if not ((c >= 0) & (c <= 1)).all():
        raise ValueError("got pass rates outside [0, 1]; expected shares of draws that pass.")
    return c
