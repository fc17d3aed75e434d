"""A policy gradient of the reward with a KL penalty as a loss beside it: any surrogate plus beta times an estimator.

P prompts, G draws a prompt, N packed tokens. What the estimators optimise is the table of `klimb.objectives.kl_penalty`; the
penalty in the reward needs no function of its own, since it is a part of the advantage.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from klimb.objectives.kl_penalty import Estimator, k2, kl_loss
from klimb.objectives.surrogate import dr_grpo


def penalised(
    token_log_pi: Tensor,
    token_log_old: Tensor,
    row: Tensor,
    lengths: Tensor,
    advantage: Tensor,
    log_pi: Tensor,
    log_ref: Tensor,
    log_old: Tensor,
    beta: Tensor | float,
    token_log_q: Tensor | None = None,
    *,
    surrogate: Callable[..., Tensor] = dr_grpo,
    estimator: Estimator = k2,
) -> Tensor:
    r"""A surrogate plus beta times the KL penalty of whole completions, differentiated.

    $$ L_{\text{surrogate}} + \frac\beta G \sum_g w_g\, k(\log\pi_g - \log\text{ref}_g), \qquad w = \pi / \text{old}, \text{held fixed} $$

    Value: the surrogate's, which is no divergence, plus beta KL(pi||ref) (k1 and k3 unbiased, k2 nearly). Gradient: where the
    surrogate's is minus that of E[r], it is minus that of E[r] - beta KL(pi||ref) for k2, and for k2 alone: k1 penalises
    nothing, k3 goes to a forward KL.

    Args:
        token_log_pi: [N] log-probability of each token under the policy, nats; differentiated.
        token_log_old: [N] under the policy that drew, nats.
        row: [N] which completion (p * G + g) each token belongs to.
        lengths: [P, G] tokens.
        advantage: [P, G] units of reward, without a KL in it.
        log_pi: [P, G] the sums of token_log_pi; differentiated.
        log_ref: [P, G] under the reference, nats.
        log_old: [P, G] under the policy that drew, nats.
        beta: units of reward per nat.
        token_log_q: [N] as the sampler stated it, for a surrogate that corrects for it.
        surrogate: of the reward; its own penalty is off.
        estimator: k1, k2 or k3.

    Returns:
        [P] units of reward.

    Raises:
        ValueError: as the surrogate and `kl_loss`.

    Example:
        >>> import torch
        >>> half, row, lengths = torch.tensor([0.5]).log(), torch.tensor([0]), torch.tensor([[1]])
        >>> known = dict(token_log_old=half, row=row, lengths=lengths, log_ref=half[None] - 1, log_old=half[None])
        >>> penalised(half, log_pi=half[None], advantage=torch.tensor([[2.0]]), beta=0.1, **known)
        tensor([-1.9500])

    Source: Tang, Munos, "On a few pitfalls in KL divergence gradient estimation for RL", 2025.

    Not the same as `surrogate` with a `penalty`, which sums the estimator over tokens with the prefixes held fixed.
    """
    gained = surrogate(token_log_pi, token_log_old, row, lengths, advantage, token_log_q)
    return gained + beta * kl_loss(log_pi, log_ref, log_old, estimator=estimator)
