"""Maximum likelihood of chosen or weighted draws: KL(target||pi), where the choice says which target that is.

Each of these is `forward_kl` with certain weights, but for `dpg`, whose weights are not normalised over the group.
Forbidden draws (reward -inf) are taken by all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klimb.objectives.forward_kl import forward_kl
from klimb.objectives.require import require_finite


def sft(log_pi: Tensor) -> Tensor:
    r"""Supervised fine-tuning: the mean negative log-likelihood of the draws, whoever drew.

    $$ -\frac1G \sum_g \log\pi_g $$

    Value: unbiased for the cross entropy E_q[-log pi] = KL(q||pi) + H(q) of the law q that drew. Gradient: unbiased for
    that of KL(q||pi). The target is q: a data set, the best of n draws (then the target is best-of-n's law, which
    follows ranks and not rewards), or exact draws of p (by rejection: then it is KL(p||pi)).

    Args:
        log_pi: [P, G] log-probability under the policy, nats; what is differentiated.

    Returns:
        [P] nats. Its derivative in log_pi is the table -1 / G.

    Raises:
        ValueError: log_pi is not finite, or not [P, G].

    Example:
        >>> sft(torch.tensor([[0.25, 0.75]]).log())
        tensor([0.8370])

    Source: maximum likelihood; Gui, Garbacea, Veitch, "BoNBoN alignment for large language models and the sweetness of
    best-of-n sampling", 2024 (of the best of n).

    Not the same as the mean over tokens of most trainers, which gives each token of a short completion more weight;
    here completions are equal, and the target is a law of whole completions.
    """
    return forward_kl(log_pi, torch.zeros_like(log_pi))


def reward_weighted(log_pi: Tensor, log_target: Tensor, log_ref: Tensor) -> Tensor:
    r"""Reward-weighted regression: likelihood with weights exp(r / beta), normalised over the group.

    $$ -\sum_g \bar w_g \log\pi_g, \qquad \bar w = \mathrm{softmax}_g(r / \beta), \quad
       r / \beta = \log\text{target} - \log\text{ref} $$

    Value: estimates the cross entropy of q exp(r / beta) / Z_q, the tilt *of the law q that drew*. Gradient: estimates
    that of KL(this tilt||pi). Both are consistent, and biased by O(1/G) towards q. It is p only for draws of ref. On
    draws of the policy itself it does not stop at p: each round tilts once more, k rounds from ref end at beta / k.
    That is mirror descent, or MPO with its temperature for beta: forward_kl to the moving target, the tilt of the
    lagged policy.

    Args:
        log_pi: [P, G] log-probability under the policy, nats; what is differentiated.
        log_target: [P, G] log ref + r / beta, unnormalised, nats; -inf where forbidden, which has weight zero.
        log_ref: [P, G] log-probability under the reference, or the lagged policy, that log_target tilts, nats.

    Returns:
        [P] nats. Its derivative in log_pi is the table -softmax(r / beta).

    Raises:
        ValueError: log_pi or log_ref is not finite, log_target is NaN or +inf, or shapes differ.

    Example:
        >>> log_pi, log_ref = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
        >>> reward_weighted(log_pi, log_ref + torch.tensor([[50.0, 0.0]]), log_ref)  # the first draw alone
        tensor([1.3863])

    Source: Peters, Schaal, "Reinforcement learning by reward-weighted regression for operational space control", 2007;
    Peng, Kumar, Zhang, Levine, "Advantage-weighted regression", 2019 (a value in the exponent drops out of the group);
    Abdolmaleki et al., "Maximum a posteriori policy optimisation", 2018 (rounds).

    Not the same as forward_kl with log_w = log_target - log_q, whose target is p whoever drew; the two agree where
    log_q = log_ref.
    """
    forbidden = log_target.isneginf()
    require_finite(
        "reward_weighted",
        log_pi=log_pi,
        log_target=log_target.masked_fill(forbidden, 0.0),
        log_ref=log_ref,
    )
    return forward_kl(log_pi, log_target - log_ref)


def raft(log_pi: Tensor, reward: Tensor, *, keep: int = 1) -> Tensor:
    r"""Likelihood of the best `keep` draws of each group, with equal weights.

    $$ -\frac{1}{|K|} \sum_{g \in K} \log\pi_g, \qquad K = \text{the } k \text{ draws of most reward} $$

    Value: unbiased for the cross entropy of the law of one of the best k among G draws of q. Gradient: unbiased for that
    of KL(this law||pi). With keep = 1 it is best of G: it follows the ranks of the reward, and no beta. So the target
    moves with G and with q; on the policy's own draws, round after round, it ends on the best completion alone.

    The weights that keep p as the target are those of forward_kl, exp(log_w): keeping one draw of the group with
    probability softmax(log_w), and not the best, is forward_kl on average. So is `sft` on draws of p by rejection.

    Args:
        log_pi: [P, G] log-probability under the policy, nats; what is differentiated.
        reward: [P, G] in any increasing units; -inf where forbidden, which is never kept.
        keep: k of G. Ties are broken by the order of drawing, which is random.

    Returns:
        [P] nats; 0, with no gradient, for a group with all draws forbidden.

    Raises:
        ValueError: keep is not between 1 and G, log_pi is not finite, reward is NaN or +inf, or shapes differ.

    Example:
        >>> raft(torch.tensor([[0.25, 0.75]]).log(), reward=torch.tensor([[3.0, 1.0]]))
        tensor([1.3863])

    Source: Dong et al., "RAFT: reward ranked finetuning for generative foundation model alignment", 2023.

    Not the same as the tilt of the reward at any beta: best of n is the tilt of the reward's log quantile.
    """
    forbidden = reward.isneginf()
    require_finite("raft", log_pi=log_pi, reward=reward.masked_fill(forbidden, 0.0))
    if not 1 <= keep <= log_pi.shape[1]:
        raise ValueError(f"raft: got keep = {keep} of {log_pi.shape[1]} draws a prompt, expected 1 to that")
    rank = reward.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return _kept(log_pi, (rank < keep) & ~forbidden)


def filtered(log_pi: Tensor, reward: Tensor, *, threshold: float) -> Tensor:
    r"""Rejection-sampling fine-tuning: likelihood of the draws that reach a threshold, with equal weights.

    $$ -\frac{1}{|K|} \sum_{g \in K} \log\pi_g, \qquad K = \{g : r_g \ge \text{threshold}\} $$

    Value: given that a group keeps a draw, unbiased for the cross entropy of q(. | r >= threshold), q the law that drew;
    0 otherwise. So value and gradient are (1 - (1 - a)^G) times those of KL(q(. | r >= threshold)||pi) plus its entropy,
    a = q(r >= threshold): the direction is right for each prompt, and prompts that rarely succeed count less. Draws of
    ref: the target is ref under a hard constraint, the limit beta -> 0 of p for a reward of 0 or 1. It is p at no
    beta above 0. The weights that keep p, restricted to what is kept, are forward_kl's with -inf below the threshold.

    Args:
        log_pi: [P, G] log-probability under the policy, nats; what is differentiated.
        reward: [P, G] in its own units; -inf where forbidden, which is never kept.
        threshold: the least reward to keep, in the reward's units.

    Returns:
        [P] nats; 0, with no gradient, for a group that keeps none: count these before believing a mean.

    Raises:
        ValueError: threshold is NaN, log_pi is not finite, reward is NaN or +inf, or shapes differ.

    Example:
        >>> filtered(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[1.0, 0.0]]), threshold=1.0)
        tensor([1.3863])

    Source: Zelikman, Wu, Mu, Goodman, "STaR: bootstrapping reasoning with reasoning", 2022; Yuan et al., "Scaling
    relationship on learning mathematical reasoning with large language models", 2023 (rejection-sampling fine-tuning).

    Not the same as rejection sampling proper, which accepts with probability exp((r - bound) / beta) and draws p.
    """
    forbidden = reward.isneginf()
    require_finite("filtered", log_pi=log_pi, reward=reward.masked_fill(forbidden, 0.0))
    if threshold != threshold:
        raise ValueError("filtered: got threshold = nan, expected a number in units of reward")
    return _kept(log_pi, (reward >= threshold) & ~forbidden)


def dpg(log_pi: Tensor, log_target: Tensor, log_z: Tensor, log_q: Tensor | None = None) -> Tensor:
    r"""KL(p||pi) with weights that are not normalised over the group, and a baseline: unbiased given log Z.

    $$ \frac1G \sum_g w_g (\log p_g - \log\pi_g) - w_g + v_g, \qquad
       w = p / q, \quad v = \pi / q, \quad \log p = \log\text{target} - \log Z $$

    Value: unbiased for KL(p||pi), as w and v both have mean 1; no draw's part is negative. Gradient: unbiased for that
    of KL(p||pi), -E_q[(w - v) S] with S = grad log pi, in which v is the baseline: E_q[v S] = 0. Draw by draw, value
    and gradient are zero at pi = p, whatever the law q. Both need draws of a law that reaches all that p and pi reach.

    A wrong log_z scales the gradient of its prompt by Z / exp(log_z), turns it nowhere, and loses the zero variance.
    A forbidden draw (log_target = -inf) has w = 0 and is pushed down by v.

    Args:
        log_pi: [P, G] log-probability under the policy, nats; what is differentiated.
        log_target: [P, G] log ref + r / beta, unnormalised, nats; -inf where forbidden. Detached.
        log_z: [P] the log-normaliser of log_target, nats: known or estimated beforehand. Detached.
        log_q: [P, G] log-probability under the law that drew them, nats; None for fresh draws of the policy, whose v
            is exactly 1. Detached.

    Returns:
        [P] nats. Its derivative in log_pi is the table -(w - v) / G.

    Raises:
        ValueError: log_target is NaN or +inf, log_z is not [P] or not finite, another number is not finite, shapes
            differ, or a weight overflows.

    Example:
        >>> import torch
        >>> log_pi = torch.tensor([[0.5, 0.5]]).log().requires_grad_()
        >>> value = dpg(log_pi, torch.tensor([[0.75, 0.25]]).log(), log_z=torch.zeros(1))
        >>> value.backward()
        >>> round(value.item(), 4), log_pi.grad.tolist()  # each outcome once: KL(p||pi)
        (0.1308, [[-0.25, 0.25]])

    Source: Parshakova, Andreoli, Dymetman, "Distributional reinforcement learning for energy-based sequential models",
    2019; Korbak, Elsahar, Kruszewski, Dymetman, "On reinforcement learning and distribution matching for fine-tuning
    language models with no catastrophic forgetting", 2022 (the baseline; on-policy it is the constant Z).

    Not the same as forward_kl, which needs no log Z, is biased at finite G, and is noisy at p.
    """
    forbidden = log_target.isneginf()
    log_q = log_pi if log_q is None else log_q
    log_target = log_target.detach().masked_fill(forbidden, 0.0)
    require_finite("dpg", log_pi=log_pi, log_target=log_target, log_q=log_q)
    if log_z.shape != log_pi.shape[:1] or not log_z.isfinite().all():
        raise ValueError(
            f"dpg: got log_z {log_z.tolist()}, expected {log_pi.shape[0]} finite numbers in nats: one a prompt"
        )
    log_p = log_target - log_z.detach()[:, None]
    w = torch.exp(log_p - log_q.detach()).masked_fill(forbidden, 0.0)
    v = torch.exp(log_pi - log_q.detach())  # differentiable: its derivative is the baseline
    if not (w.isfinite().all() and v.isfinite().all()):
        raise ValueError(
            f"dpg: got a weight beyond {w.dtype}, expected p / q and pi / q that it can hold: check log_z and log_q, or "
            "use forward_kl"
        )
    return (w * (log_p - log_pi) - w + v).mean(1)


def _kept(log_pi: Tensor, kept: Tensor) -> Tensor:
    return forward_kl(log_pi, torch.zeros_like(log_pi).masked_fill(~kept, float("-inf")))
