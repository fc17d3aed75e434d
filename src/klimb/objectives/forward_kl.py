"""KL(p||pi), the divergence of maximum likelihood, with weights where draws of p are not to be had."""

from __future__ import annotations

import torch
from torch import Tensor

from klimb.objectives.require import require_finite


def forward_kl(log_pi: Tensor, log_w: Tensor) -> Tensor:
    r"""KL(p||pi) + H(p): the policy's negative log-likelihood under self-normalised weights.

    $$ -\sum_g \bar w_g \log\pi_g, \qquad \bar w = \mathrm{softmax}_g(\log w), \quad \log w = \log\text{target} - \log q $$

    Value: estimates the cross entropy E_p[-log pi], which is KL(p||pi) plus the entropy of p. Gradient: estimates
    that of KL(p||pi). Both are consistent, and biased at finite G: the bias is O(1/G), towards the law that drew.
    Neither is without variance at pi = p. Equal weights (log_w = 0) give supervised fine-tuning, unbiased.

    A draw of log_w = -inf (forbidden) has weight zero. A group of nothing else says nothing about where p is: its
    value and its gradient are zero; count such groups (`log_w.isneginf().all(1)`) before believing a mean.

    Args:
        log_pi: [P, G] log-probability under the policy, nats; what is differentiated.
        log_w: [P, G] log_target - log_q, nats; -inf where the target forbids. Fixed once drawn: detached.

    Returns:
        [P] nats. Its derivative in log_pi is the table -softmax(log_w).

    Raises:
        ValueError: log_pi is not finite, log_w is NaN or +inf, or shapes differ.

    Example:
        >>> import torch
        >>> log_pi = torch.tensor([[0.25, 0.75]]).log().requires_grad_()
        >>> value = forward_kl(log_pi, log_w=torch.tensor([[0.0, -torch.inf]]))
        >>> value.backward()
        >>> round(value.item(), 4), log_pi.grad.tolist()
        (1.3863, [[-1.0, -0.0]])

    Source: Khalifa, Elsahar, Dymetman, "A distributional approach to controlled text generation", 2021 (weights
    without self-normalisation); Bornschein, Bengio, "Reweighted wake-sleep", 2015 (self-normalised).

    Not the same as reverse_kl: the two share their minimum only where the family of policies holds p. Not the same as
    fine-tuning on the best of the draws, which follows ranks and not rewards.
    """
    forbidden = log_w.isneginf()
    require_finite("forward_kl", log_pi=log_pi, log_w=log_w.masked_fill(forbidden, 0.0))
    silent = forbidden.all(1, keepdim=True)  # softmax of nothing but -inf would be NaN
    weight = torch.softmax(log_w.detach().masked_fill(silent, 0.0), 1).masked_fill(silent, 0.0)
    return -(weight * log_pi).sum(1)
