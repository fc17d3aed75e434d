"""Keeping a policy near where it was: how far it has moved from its draws, when to stop, and how to set beta by a KL.

P prompts, G draws a prompt, N packed tokens. KL in nats a completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

BOUND = 0.2
"""most by which a relative error of the KL counts"""


@torch.no_grad()
def kl_from_old(token_log_pi: Tensor, token_log_old: Tensor, lengths: Tensor) -> Tensor:
    """KL(old||pi) of completions, from draws of the old policy; unbiased, and never negative.

    mean over completions of sum_t (rho_t - 1 - log rho_t),  rho = pi / old

    Token by token the estimator k3 of KL(old||pi): given its prefix each term has the mean that -log rho has, and less
    variance while the two are near.

    Args:
        token_log_pi: [N] log-probability of each token under the policy now, nats.
        token_log_old: [N] under the policy that drew, nats.
        lengths: [P, G] tokens.

    Returns:
        A scalar, nats a completion.

    Raises:
        ValueError: shapes do not fit, or a number is not finite.

    Example:
        >>> kl_from_old(torch.tensor([0.5, 0.25]).log(), torch.tensor([0.25, 0.25]).log(), torch.tensor([[1, 1]]))
        tensor(0.1534)

    Source: Schulman, 2020, "Approximating KL divergence".
    Not the same as KL(pi||ref), the divergence with a price: this one only says how stale the draws are.
    """
    total = int(lengths.sum())
    log_rho = token_log_pi - token_log_old
    if log_rho.shape != (total,) or not bool(torch.isfinite(log_rho).all()):
        raise ValueError(
            f"kl_from_old: got log-probabilities of shape {list(log_rho.shape)}, expected [{total}] finite ones"
        )
    return (torch.expm1(log_rho) - log_rho).sum() / lengths.numel()


def stops_early(kl: float, *, limit: float) -> bool:
    """Whether the policy has moved so far from its draws that new ones should be drawn: kl > limit.

    Args:
        kl: KL(old||pi), nats a completion (`kl_from_old`).
        limit: nats a completion.

    Raises:
        ValueError: limit is not above zero, or kl is NaN.

    Example:
        >>> stops_early(0.03, limit=0.02), stops_early(0.01, limit=0.02)
        (True, False)

    Source: Achiam, 2018, "Spinning up in deep RL" (where the limit is 1.5 times a target).
    """
    if not limit > 0 or kl != kl:
        raise ValueError(
            f"stops_early: got kl = {kl}, limit = {limit}; expected a number, and more than 0 nats"
        )
    return kl > limit


def adapted_beta(
    beta: float,
    kl: float,
    *,
    goal: float,
    num_completions: int,
    horizon: float = 10_000,
    bound: float = BOUND,
) -> float:
    """The next beta of a controller that raises it while the KL is above its goal and lowers it below.

    beta (1 + clamp(kl / goal - 1, -bound, bound) * num_completions / horizon)

    Its fixed point is the beta at which KL(pi||ref) = goal, if the policy keeps up; until then each beta is another
    target. The whole state is beta.

    Args:
        beta: units of reward per nat.
        kl: KL(pi||ref) measured, nats a completion.
        goal: the KL wanted, nats a completion.
        num_completions: how many completions since the last call.
        horizon: completions over which beta follows by `bound`.
        bound: most that the relative error counts.

    Returns:
        The next beta, above zero.

    Raises:
        ValueError: beta or goal is not above zero, kl is not finite, or num_completions * bound reaches horizon, where
            beta could fall to zero.

    Example:
        >>> round(adapted_beta(0.1, kl=12.0, goal=6.0, num_completions=500), 6)  # far above: by the bound
        0.101
        >>> adapted_beta(0.1, kl=6.0, goal=6.0, num_completions=500)
        0.1

    Source: Ziegler et al., 2019, "Fine-tuning language models from human preferences".
    Not the same as `klimb plan --kl_budget`, which finds this beta before training and then holds one target.
    """
    if not (beta > 0 and goal > 0 and abs(kl) < float("inf")):
        raise ValueError(
            f"adapted_beta: got beta = {beta}, goal = {goal}, kl = {kl}; expected the first two above 0 and a finite kl"
        )
    if not num_completions * bound < horizon:
        raise ValueError(
            f"adapted_beta: got num_completions = {num_completions}, bound = {bound} and horizon = {horizon}; expected "
            "num_completions * bound below horizon, or beta could reach zero"
        )
    error = min(max(kl / goal - 1, -bound), bound)
    return beta * (1 + error * num_completions / horizon)
