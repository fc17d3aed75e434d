"""How uneven the residual is: half its variance within the group, whoever drew."""

from __future__ import annotations

from torch import Tensor

from klimb.objectives.require import require_clip, require_finite


def log_variance(log_pi: Tensor, log_target: Tensor, *, clip: float | None = None) -> Tensor:
    r"""Half the sample variance of the residual, which is constant exactly where pi = p.

    $$ \frac{1}{2 (G-1)} \sum_g (d_g - \bar d)^2, \qquad d = \log\text{target} - \log\pi $$

    Value: unbiased for half the variance of the residual under the law q that drew (independent draws). It is zero if
    and only if pi = p on the draws, up to a constant, so its minimiser is p for every law of full support.
    Gradient: unbiased for that of this half variance with q held fixed. For fresh draws of the policy it is unbiased
    for the gradient of KL(pi||p), although the value is not a KL; draw by draw it is then the gradient of `reverse_kl`
    with leave-one-out. It has no variance at p. No law is asked for, but a law that cannot draw everything (top-p,
    filtered) leaves the rest of p unseen.

    Args:
        log_pi: [P, G] log-probability under the policy, nats; what is differentiated.
        log_target: [P, G] log ref + r / beta, unnormalised, nats.
        clip: deviations |d - mean d| above this many nats are punished linearly instead of by their square (Huber).
            It bounds what one draw can do and leaves the minimiser at p; None for never.

    Returns:
        [P] nats squared. Its derivative in log_pi is the table -(d - mean d) / (G - 1); with `clip`, of the clipped
        deviations, centred again. It sums to zero in every group.

    Raises:
        ValueError: fewer than two draws a prompt, log_target is -inf for a draw (forward_kl takes that), a number is
            NaN or infinite, or shapes differ.

    Example:
        >>> import torch
        >>> log_pi = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
        >>> value = log_variance(log_pi, log_target=torch.tensor([[0.0, -1.0]]))
        >>> value.backward()
        >>> value.tolist(), log_pi.grad.tolist()  # the same table as reverse_kl's
        ([0.25], [[-0.5, 0.5]])

    Source: Richter, Boustati, Nüsken, Ruiz, Akyildiz, "VarGrad: a low-variance gradient estimator for variational
    inference", 2020.

    Not the same as trajectory balance, which compares the residual with a learned log Z: off-policy a wrong log Z
    moves the minimum, and here there is none to be wrong.
    """
    require_finite("log_variance", log_pi=log_pi, log_target=log_target)
    require_clip("log_variance", clip)
    num_draws = log_pi.shape[1]
    if num_draws < 2:
        raise ValueError(
            f"log_variance: got {num_draws} draw a prompt, expected at least 2: one has no variance"
        )
    residual = log_target.detach() - log_pi
    deviation = residual - residual.mean(1, keepdim=True)
    square = deviation**2
    if clip is not None:
        square = square - (deviation.abs() - clip).clamp_min(0) ** 2
    return square.sum(1) / (2 * (num_draws - 1))
