"""Any f-divergence to the target, by the score function with the pseudo-reward -f'(pi/p)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from klimb.numbers.baselines import leave_one_out
from klimb.objectives.generators import GENERATORS, Divergence, divergence
from klimb.objectives.require import require_clip, require_finite


def f_divergence(
    log_pi: Tensor,
    log_target: Tensor,
    log_z: Tensor,
    log_q: Tensor | None = None,
    *,
    f: Divergence | str,
    baseline: Callable[[Tensor], Tensor] | None = leave_one_out,
    clip: float | None = None,
) -> Tensor:
    r"""D_f(pi||p) of any generator f, with the score function as its gradient.

    $$ \frac1G \sum_g w_g (h(t_g) - b_g) + b_g, \qquad \nabla D_f = E_\pi[f'(t) \nabla\log\pi],
       \qquad t = \pi Z / \text{target}, \quad w = \pi / q, \quad h = f(t) / t $$

    Value: unbiased for D_f(pi||p) = E_p f(t) = E_pi h(t), given the true log Z, from draws of any law q that reaches
    all that pi reaches. It may be negative. It cannot see completions of p that the policy never makes; where f(0)
    is infinite (forward_kl, chi2_forward, alpha < 0) their share of the value is what makes it heavy-tailed.
    Gradient: unbiased for that of D_f(pi||p) under the same conditions. The table w (f' - b) is zero draw by draw at
    pi = p, with leave-one-out for any log Z, without a baseline for the true one; only the sign that total_variation
    takes of log t is there left to rounding, and its noise does not fade on the way. For f = "reverse_kl" it is the table
    of `reverse_kl`, and the value is that function's plus log Z. Both baselines are means of the *other* draws, of h
    for the value and f' for the gradient: they need independent draws. Enumerated (log_q = -log|Y|, baseline=None)
    value and gradient are exact.

    A wrong log Z, too high by c, makes it the objective of another generator, f_c(t) = e^{-c} f(e^c t):
    - reverse_kl: the same gradient. Powers of t (forward_kl, both chi2, squared_hellinger, alpha): the same direction,
      e^{(a - 1) c} times as long (a = 0 for forward_kl); over prompts this reweights the prompts.
    - jensen_shannon, generalized_js, both skews: another direction, and still the same minimum, as f_c is convex too.
    - total_variation: another direction, and it stops early, at any policy with all t on one side of e^{-c}.
    The value is in all cases no longer the divergence to p.

    Which baseline: the slope is f' - f'(1), so a true log Z is already one, and the best near p: baseline=None then has
    less variance. Leave-one-out is safe against a wrong log Z. Off policy it is noisy, most of all where f' is unbounded
    at t -> 0 (forward_kl, chi2_forward, squared_hellinger, alpha < 1).

    Args:
        log_pi: [P, G] log-probability under the policy, nats; what is differentiated.
        log_target: [P, G] log ref + r / beta, unnormalised, nats; -inf where f takes forbidden draws.
        log_z: [P] log-normaliser of the target, nats: the plan's, or a running estimate made *before* these draws
            (from them, it would bias the gradient by O(1/G)). Detached.
        log_q: [P, G] log-probability under the law that drew them, nats; None for fresh draws of the policy, whose
            weight is exactly 1. Detached.
        f: a `Divergence`, or its name as `divergence` takes it.
        baseline: [P, G] -> [P, G], b from f' (and from h, for the value); None for no baseline.
        clip: at most this much of |f' - b| counts, in units of f'. It bounds what one draw can do, and biases the
            gradient wherever it acts; the value is not clipped. None for never.

    Returns:
        [P], in the dtype of log_pi. Its derivative in log_pi is the table w (f' - b) / G.

    Raises:
        ValueError: log_target is -inf for a draw and f is infinite there (the ones that are not are named); f is
            unknown; a number is NaN or infinite, or so far off that f is too large for the dtype; shapes differ; or
            leave-one-out has one draw only.

    Example:
        >>> log_pi = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
        >>> log_target = torch.tensor([[0.0, -torch.inf]])  # p is all on the first
        >>> value = f_divergence(log_pi, log_target, torch.zeros(1), f="total_variation", baseline=None)
        >>> value.backward()
        >>> value.tolist(), log_pi.grad.tolist()  # the second is all too likely
        ([0.5], [[-0.25, 0.25]])

    Source: Go, Korbak, Kruszewski, Rozen, Ryu, Dymetman, "Aligning language models with preferences through f-divergence
    minimization", 2023.

    Not the same as a reward: the pseudo-reward -f'(t) moves with the policy. Not the same as the token-level
    divergences of distillation, whose sum over a completion is a sequence divergence for the KLs only.
    """
    f = divergence(f) if isinstance(f, str) else f
    log_q = log_pi if log_q is None else log_q
    forbidden = log_target.isneginf()
    if forbidden.any() and not f.takes_forbidden:
        fit = ", ".join(name for name, other in GENERATORS.items() if other.takes_forbidden)
        raise ValueError(
            f"f_divergence: got log_target = -inf: the target forbids a draw that the policy can make, and {f.name} "
            f"is infinite there. These take it: {fit}, alpha below 1, the skews, generalized_js"
        )
    allowed = log_target.masked_fill(forbidden, 0.0)
    require_finite("f_divergence", log_pi=log_pi, log_target=allowed, log_q=log_q)
    _require_log_z(log_z, log_pi)
    require_clip("f_divergence", clip)

    # In float64 within: e^x reaches further there, and the weight of a far draw is small where its slope is large.
    x = (log_pi.detach().double() - log_target.detach().double()) + log_z.detach().double()[:, None]
    weight = torch.exp(log_pi.double() - log_q.detach().double())  # its derivative is the score function
    h, slope = f.value(x), f.slope(x)
    level, b = (
        (torch.zeros_like(x), torch.zeros_like(x)) if baseline is None else (baseline(h), baseline(slope))
    )
    advantage = slope - b if clip is None else (slope - b).clamp(-clip, clip)
    value = (weight.detach() * (h - level) + level).mean(1)
    _require_representable(f, value, weight.detach() * advantage, x, log_pi.dtype)
    return (value + ((weight - weight.detach()) * advantage).mean(1)).to(log_pi.dtype)


def _require_log_z(log_z: Tensor, log_pi: Tensor) -> None:
    if log_z.shape != log_pi.shape[:1]:
        raise ValueError(
            f"f_divergence: got log_z of shape {list(log_z.shape)}, expected {list(log_pi.shape[:1])}: one a prompt"
        )
    bad = log_z[~torch.isfinite(log_z)]
    if bad.numel():
        raise ValueError(
            f"f_divergence: got log_z = {bad[0].item()}, expected finite nats. -inf says that no draw so far was "
            "allowed: leave that prompt out until one is"
        )


def _require_representable(
    f: Divergence, value: Tensor, table: Tensor, x: Tensor, dtype: torch.dtype
) -> None:
    bad = ~(table.to(dtype).isfinite() & value.to(dtype).isfinite()[:, None])
    if bad.any():
        far = x[bad]
        far = far[far.abs().argmax()].item()
        raise ValueError(
            f"f_divergence: {f.name} is too large for {str(dtype).removeprefix('torch.')} with a draw at log(pi/p) = "
            f"{far:.4g}. Check log_z, or take a divergence that grows slowly there: jensen_shannon"
        )
