"""KL(pi||p), the divergence of reinforcement learning, by the score function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from klimb.numbers.baselines import leave_one_out
from klimb.objectives.require import require_clip, require_finite


def reverse_kl(
    log_pi: Tensor,
    log_target: Tensor,
    log_q: Tensor | None = None,
    *,
    baseline: Callable[[Tensor], Tensor] | None = leave_one_out,
    clip: float | None = None,
) -> Tensor:
    r"""KL(pi||p) - log Z, with the score function as its gradient.

    $$ \frac1G \sum_g w_g (f_g - b_g) + b_g, \qquad
       f = \log\pi - \log\text{target} \text{ (detached)}, \quad w = \pi / q $$

    Value: unbiased for KL(pi||p) - log Z. Gradient: unbiased for that of KL(pi||p), from draws of any law q that reaches
    all that pi reaches. Both rest on b_g not depending on draw g, as then E_q[w_g b_g] = E_q[b_g] and
    E_q[w_g b_g grad log pi_g] = 0; leave-one-out is the mean of the *other* draws' f, so it needs independent draws.
    It takes f and not w f, because f is constant at p: there w (f - b) is zero draw by draw, whatever the law q, and
    value and gradient have no variance at all.

    Enumerated (every outcome once, log_q = -log|Y|, baseline=None), value and gradient are exact.

    Args:
        log_pi: [P, G] log-probability under the policy, nats; what is differentiated.
        log_target: [P, G] log ref + r / beta, unnormalised, nats.
        log_q: [P, G] log-probability under the law that drew them, nats; None for fresh draws of the policy, whose
            weight is exactly 1. Detached.
        baseline: [P, G] -> [P, G], b from f; None for no baseline.
        clip: at most this many nats of |f - b| count. It bounds what one draw can do, and biases value and gradient
            wherever it acts; None for never.

    Returns:
        [P] nats. Its derivative in log_pi is the table w (f - b) / G.

    Raises:
        ValueError: log_target is -inf for a draw (forward_kl takes that), a number is NaN or infinite, shapes differ,
            or leave-one-out has one draw only.

    Example:
        >>> import torch
        >>> log_pi = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
        >>> value = reverse_kl(log_pi, log_target=torch.tensor([[0.0, -1.0]]))
        >>> value.backward()
        >>> round(value.item(), 4), log_pi.grad.tolist()  # the second draw is too likely by one nat
        (-0.1931, [[-0.5, 0.5]])

    Source: Williams, "Simple statistical gradient-following algorithms for connectionist reinforcement learning", 1992;
    Ahmadian et al., "Back to basics: revisiting REINFORCE-style optimization for learning from human feedback in
    LLMs", 2024 (leave-one-out).

    Not the same as a mean over the group as the baseline, which shrinks the gradient by (G-1)/G; nor as dividing by
    the group's standard deviation, which changes the target.
    """
    log_q = log_pi if log_q is None else log_q
    require_finite("reverse_kl", log_pi=log_pi, log_target=log_target, log_q=log_q)
    require_clip("reverse_kl", clip)
    f = (log_pi - log_target).detach()
    b = torch.zeros_like(f) if baseline is None else baseline(f)
    advantage = f - b if clip is None else (f - b).clamp(-clip, clip)
    weight = torch.exp(log_pi - log_q.detach())  # differentiable: its derivative is the score function
    return (weight * advantage + b).mean(1)
