"""The residual log_target - log_pi against one number a prompt that stands for log Z, squared.

At pi = p the residual is log Z for every draw, so the right number has its minimum there for any draws. A wrong one is
harmless for fresh draws of the policy, where it is only a baseline, and moves the minimum for all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klimb.objectives.require import require_finite


def trajectory_balance(log_pi: Tensor, log_target: Tensor, log_z: Tensor) -> Tensor:
    r"""Half the mean square of what is left of the residual after log Z.

    $$ \frac{1}{2 G} \sum_g (\log\text{target}_g - \log\pi_g - \log Z)^2 $$

    Value: unbiased for half the expected square under the law q that drew. It is zero where pi = p and log_z is right.
    Gradient in log_pi: unbiased for that of this expectation with q held fixed. For fresh draws of the policy it is
    unbiased for the gradient of KL(pi||p), whatever log_z is, if log_z does not depend on the draws. At p it has no
    variance if log_z is right, and for any law.
    Gradient in log_z: unbiased for log_z minus the mean residual. Learned together with the policy, both end at p and
    log Z, for any q of full support. Until then a learned log_z follows the mean residual, which for draws of the policy
    is log Z - KL(pi||p): too low by what is left to climb. `parted` says when it has come apart from an estimate.

    Held fixed and wrong, on draws of a fixed q, log_z moves the minimum to the policy that solves
    log pi + nu pi / q = log_target - log_z, with nu such that it sums to one (Lambert's W). Too low a log_z is
    timid: nu > 0 cuts what p raises most. Too high a one leaks the mass that is missing onto draws that q rarely makes.

    Args:
        log_pi: [P, G] log-probability under the policy, nats; what is differentiated.
        log_target: [P, G] log ref + r / beta, unnormalised, nats. Detached.
        log_z: [P] the log-normaliser of log_target, nats: known, or estimated beforehand, or learned (differentiated).

    Returns:
        [P] nats squared. Its derivative in log_pi is the table -(d - log_z) / G with d the residual, in log_z the sum of
        this table.

    Raises:
        ValueError: log_target is -inf for a draw (forward_kl takes that), a number is NaN or infinite, or shapes differ.

    Example:
        >>> import torch
        >>> log_pi = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
        >>> log_z = torch.zeros(1, requires_grad=True)
        >>> value = trajectory_balance(log_pi, log_pi.detach() + torch.tensor([[1.0, 0.0]]), log_z)
        >>> value.backward()
        >>> value.tolist(), log_pi.grad.tolist(), log_z.grad.tolist()
        ([0.25], [[-0.5, -0.0]], [-0.5])

    Source: Malkin, Jain, Bengio, Sun, Bengio, "Trajectory balance: improved credit assignment in GFlowNets", 2022.
    With log_z = log E_ref[exp(r / beta)] from reference draws it is A*-PO: Brantley et al., "Accelerating RL for LLM
    reasoning with optimal advantage regression", 2025. With the reward's quantile for r and
    `klimb.numbers.best_of_n.quantile_log_partition` for log_z it is QRPO: Matrenok, Moalla, Gulcehre, "Quantile reward
    policy optimization", 2025. With log_target tilted from the policy that drew, lagged, it is OAPL: Ritter et al.,
    "LLMs can learn to reason via off-policy RL", 2026.

    Not the same as log_variance, which takes the group's own mean for log Z and has nothing to be wrong about. Not the
    same as A*-PO as published, which estimates V* at one beta and regresses at another: off-policy this is a wrong
    log_z.
    """
    require_finite("trajectory_balance", log_pi=log_pi, log_target=log_target)
    if log_z.shape != log_pi.shape[:1] or not log_z.isfinite().all():
        raise ValueError(
            f"trajectory_balance: got log_z of shape {list(log_z.shape)}, {_odd(log_z)}, expected "
            f"{list(log_pi.shape[:1])} finite numbers in nats: one a prompt"
        )
    return (log_target.detach() - log_pi - log_z[:, None]).square().mean(1) / 2


def parted(log_z: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whether a learned log Z has left the interval of an estimate: the alarm of trajectory balance.

    Args:
        log_z: [P] what was learned, nats.
        low: [P] lower end of an interval for log Z, nats, from draws that log_z was not fitted to.
        high: [P] upper end.

    Returns:
        [P] True where log_z lies outside. Below is usual before the end: a log_z learned from draws of the policy stands
        at log Z - KL(pi||p). Above is the dangerous side, where mass leaks.

    Raises:
        ValueError: a number is NaN, an interval is empty, or shapes differ.

    Example:
        >>> parted(torch.tensor([0.5, 2.0]), low=torch.zeros(2), high=torch.ones(2))
        tensor([False,  True])

    Source: the two-sided check of a log-normaliser; Grosse, Ghahramani, Adams, "Sandwiching the marginal likelihood
    using bidirectional Monte Carlo", 2015.

    Not the same as a small loss, which a policy that has dropped a mode of p has as well.
    """
    if not log_z.shape == low.shape == high.shape:
        raise ValueError(
            f"parted: got shapes {list(log_z.shape)}, {list(low.shape)}, {list(high.shape)}, expected [P] three times"
        )
    if log_z.isnan().any() or not (low <= high).all():
        raise ValueError("parted: got NaN or low > high, expected numbers and low <= high, in nats")
    return (log_z < low) | (log_z > high)


def pmd_mean(log_pi: Tensor, log_target: Tensor, log_ref: Tensor) -> Tensor:
    r"""Trajectory balance with the group's mean reward where log Z should be.

    $$ \frac{1}{2 G} \sum_g \left(\frac{r_g - \bar r}{\beta} - \log\frac{\pi_g}{\text{ref}_g}\right)^2 $$

    Value: unbiased for the expectation of this over groups of G draws. Gradient: unbiased for that of this expectation
    with the law of the draws held fixed. The target is not p:

    - Draws of ref: the policy that solves beta log rho + c rho = s (r - E_ref r), rho = pi / ref, with c such that it
      sums to one. The mean reward is never above beta log Z, so c >= 0: large ratios are cut as by a chi-squared
      penalty on top of the KL.
    - Fresh draws of the policy: p at beta / s, as there the gradient is that of KL(pi||p at beta / s).

    s = (G - 1) / G appears because each draw is part of the mean it is compared with; it is 1 for many draws.

    Args:
        log_pi: [P, G] log-probability under the policy, nats; what is differentiated.
        log_target: [P, G] log ref + r / beta, unnormalised, nats. Detached.
        log_ref: [P, G] log-probability under the reference, or under the lagged policy that log_target tilts, nats.

    Returns:
        [P] nats squared.

    Raises:
        ValueError: fewer than two draws a prompt, log_target is -inf for a draw (forward_kl takes that), a number is
            NaN or infinite, or shapes differ.

    Example:
        >>> import torch
        >>> log_ref = torch.tensor([[0.5, 0.5]]).log()
        >>> pmd_mean(log_ref, log_ref + torch.tensor([[2.0, 0.0]]), log_ref)
        tensor([0.5000])

    Source: Kimi team, "Kimi k1.5: scaling reinforcement learning with LLMs", 2025; Xu, Lu, Yu, Zhao, "Approximation of
    log-partition function in policy mirror descent induces implicit regularization for LLM post-training", 2026 (the
    Lambert W and the chi-squared reading, for many draws).

    Not the same as log_variance, which subtracts the mean of the whole residual and not of the reward alone: that is
    what makes its minimum p.
    """
    require_finite("pmd_mean", log_pi=log_pi, log_target=log_target, log_ref=log_ref)
    if log_pi.shape[1] < 2:
        raise ValueError(
            f"pmd_mean: got {log_pi.shape[1]} draw a prompt, expected at least 2: one is its own mean"
        )
    return trajectory_balance(log_pi, log_target, (log_target - log_ref).mean(1).detach())


def length_normalised_balance(
    log_pi: Tensor, log_target: Tensor, log_ref: Tensor, lengths: Tensor, log_z: Tensor
) -> Tensor:
    r"""Trajectory balance with the log-ratio divided by the length: the loss of FlowRL, whose target is not p.

    $$ \frac{1}{2 G} \sum_g \left(\frac{r_g}{\beta} - \frac{1}{|y_g|} \log\frac{\pi_g}{\text{ref}_g} - \log Z\right)^2 $$

    Value: unbiased for the expectation of this under the law q that drew. Gradient: unbiased for that of this
    expectation with q held fixed, in log_pi and in log_z. With log_z learned the minimum is zero, for every q of full
    support, at the policy ref exp(|y| (r / beta - c)), c such that it sums to one, and log_z = c: a reward per token.
    Where r / beta is above c a long completion is raised by more than a short one of the same reward, where it is below,
    lowered by more. Where all lengths are equal it is p at beta / |y|. Even for fresh draws of the policy the gradient
    depends on log_z.

    Args:
        log_pi: [P, G] log-probability under the policy, nats; what is differentiated.
        log_target: [P, G] log ref + r / beta, unnormalised, nats. Detached.
        log_ref: [P, G] log-probability under the reference, nats. Detached.
        lengths: [P, G] tokens, 1 or more.
        log_z: [P] nats a token: a learned head (differentiated), or fixed.

    Returns:
        [P] nats squared.

    Raises:
        ValueError: a length below 1, log_target is -inf for a draw (forward_kl takes that), a number is NaN or infinite,
            or shapes differ.

    Example:
        >>> import torch
        >>> log_ref = torch.tensor([[0.5, 0.5]]).log()
        >>> length_normalised_balance(  # four nats on four tokens are one a token, as the reward asks
        ...     log_ref + torch.tensor([[4.0, 0.0]]), log_ref + torch.tensor([[1.0, 0.0]]), log_ref,
        ...     lengths=torch.tensor([[4, 1]]), log_z=torch.zeros(1))
        tensor([0.])

    Source: Zhu et al., "FlowRL: matching reward distributions for LLM reasoning", 2025.

    Not the same as trajectory_balance, which it is where every length is 1. Not the same as FlowRL in full, which also
    standardises the reward in the group (another target again) and clips an importance weight.
    """
    require_finite(
        "length_normalised_balance", log_pi=log_pi, log_target=log_target, log_ref=log_ref, lengths=lengths
    )
    if lengths.min() < 1:
        raise ValueError(
            f"length_normalised_balance: got a length of {lengths.min().item()}, expected at least 1 token"
        )
    return trajectory_balance(log_pi / lengths, log_target - log_ref + log_ref / lengths, log_z)


def _odd(x: Tensor) -> str:
    bad = x[~torch.isfinite(x)]
    return f"with {bad[0].item()}" if bad.numel() else "all finite"
