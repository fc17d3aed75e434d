"""What is true, by plain summation over all outcomes. Nothing here is clever; it is what the clever is compared with.

All laws are log-probabilities [..., Y] in nats. Where a law gives no probability a value does not count, whatever it
is: 0 * inf = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def log_partition(log_target: Tensor) -> Tensor:
    """The normaliser log Z = log sum_y exp(log_target), [..., Y] -> [...] nats.

    Not the same as `klimb.numbers`' function of this name, which estimates it from draws.

    Example:
        >>> round(log_partition(torch.zeros(2)).item(), 4)
        0.6931
    """
    return torch.logsumexp(log_target, -1)


def normalise(log_target: Tensor) -> Tensor:
    """The law log p = log_target - log Z, [..., Y] nats.

    Example:
        >>> normalise(torch.zeros(4)).exp().tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    return log_target - log_partition(log_target)[..., None]


def mean(log_prob: Tensor, values: Tensor) -> Tensor:
    """E[values] = sum_y pi(y) values(y), [..., Y] -> [...].

    Example:
        >>> mean(torch.tensor([0.0, -torch.inf]), torch.tensor([3.0, torch.inf])).item()
        3.0
    """
    prob = log_prob.exp()
    return (prob * torch.where(prob > 0, values, 0.0)).sum(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a||b) = sum_y a(y) (log a(y) - log b(y)), [..., Y] -> [...] nats; +inf where b lacks what a has.

    Example:
        >>> fair, sure = torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log()
        >>> round(kl(sure, fair).item(), 4), kl(fair, sure).item()
        (0.6931, inf)
    """
    return mean(log_a, log_a - log_b)


def tilt(log_ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """log_target = log ref + reward / beta, unnormalised, [..., Y] nats.

    Raises:
        ValueError: beta is not above zero.

    Example:
        >>> tilt(torch.zeros(2), torch.tensor([1.0, 0.0]), 0.5).tolist()
        [2.0, 0.0]
    """
    if not beta > 0:
        raise ValueError(
            f"tilt: got beta = {beta}, expected more than 0: without a price on KL there is no target"
        )
    return log_ref + reward / beta


def objective(log_pi: Tensor, log_ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """J(pi) = E_pi[reward] - beta KL(pi||ref), [..., Y] -> [...] units of reward.

    Example:
        >>> fair = torch.tensor([0.5, 0.5]).log()
        >>> objective(fair, fair, torch.tensor([1.0, 0.0]), 0.1).item()
        0.5
    """
    return mean(log_pi, reward) - beta * kl(log_pi, log_ref)


def best_objective(log_ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """The most that J can be: beta log Z, [..., Y] -> [...] units of reward. It is J(p).

    Example:
        >>> fair = torch.tensor([0.5, 0.5]).log()
        >>> round(best_objective(fair, torch.tensor([1.0, 0.0]), 1.0).item(), 4)
        0.6201
    """
    return beta * log_partition(tilt(log_ref, reward, beta))


def gap(log_pi: Tensor, log_ref: Tensor, reward: Tensor, beta: float) -> Tensor:
    """What is left to climb: beta KL(pi||p) = beta log Z - J(pi), [..., Y] -> [...] units of reward.

    Example:
        >>> fair = torch.tensor([0.5, 0.5]).log()
        >>> round(gap(fair, fair, torch.tensor([1.0, 0.0]), 1.0).item(), 4)
        0.1201
    """
    return beta * kl(log_pi, normalise(tilt(log_ref, reward, beta)))


@dataclass(frozen=True)
class Point:
    """A point of the reward-KL frontier: where beta leads. reward in its own units, kl = KL(p||ref) and log_z in nats."""

    beta: float
    reward: float
    kl: float
    log_z: float


def frontier_point(log_ref: Tensor, reward: Tensor, beta: float) -> Point:
    """E_p[reward], KL(p||ref) and log Z of one prompt, [Y]: no policy has more reward at so little KL.

    Example:
        >>> fair = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
        >>> point = frontier_point(fair, torch.tensor([1.0, 0.0], dtype=torch.float64), 1.0)
        >>> round(point.reward, 4), round(point.kl, 4), round(point.log_z, 4)
        (0.7311, 0.1109, 0.6201)
    """
    log_target = tilt(log_ref, reward, beta)
    log_p = normalise(log_target)
    return Point(
        beta=beta,
        reward=mean(log_p, reward).item(),
        kl=kl(log_p, log_ref).item(),
        log_z=log_partition(log_target).item(),
    )
