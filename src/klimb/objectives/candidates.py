r"""Divergences between two laws on a prompt's G draws alone: the target's and the policy's, each relative to the reference.

    target      softmax_g(log target - log ref) = softmax_g(r / beta)
    policy      softmax_g(log pi - log ref)

Both are of the draws at hand, so log Z has no part in them; they agree on every group if and only if pi = p.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from klimb.objectives.require import require_finite


def exo(log_pi: Tensor, log_target: Tensor, log_ref: Tensor) -> Tensor:
    r"""KL(policy||target) on the candidates: seeks what the target likes best among them.

    $$ \sum_g \hat\pi_g\, (\log\hat\pi_g - \log\hat p_g), \qquad \hat\pi = \mathrm{softmax}(\log\pi - \log\text{ref}), \quad
       \hat p = \mathrm{softmax}(r/\beta) $$

    Value: for draws of the reference it goes to KL(pi||p) as G grows, and is biased low by O(1/G). Gradient: likewise for that of
    KL(pi||p). The minimum is p for any draws of full support and any G of 2 or more; there each group's gradient is zero.

    Args:
        log_pi: [P, G] log-probability under the policy, nats; differentiated.
        log_target: [P, G] log ref + r / beta, nats, unnormalised.
        log_ref: [P, G] under the reference, nats.

    Returns:
        [P] nats.

    Raises:
        ValueError: fewer than two draws a prompt, a number is NaN or infinite, or shapes differ.

    Example:
        >>> import torch
        >>> uniform = torch.zeros(1, 2)
        >>> exo(uniform, torch.tensor([[1.0, 0.0]]), uniform)
        tensor([0.1201])

    Source: Ji et al., "Towards efficient exact optimization of language model alignment", 2024.

    Not the same as reverse_kl, whose draws are weighted by the law that drew them and not against each other.
    """
    log_policy, log_best = _laws("exo", log_pi, log_target, log_ref)
    return (log_policy.exp() * (log_policy - log_best)).sum(1)


def info_nca(log_pi: Tensor, log_target: Tensor, log_ref: Tensor) -> Tensor:
    r"""KL(target||policy) on the candidates: covers all that the target likes among them.

    $$ \sum_g \hat p_g\, (\log\hat p_g - \log\hat\pi_g) $$

    Value: for draws of the reference it goes to KL(p||pi) as G grows, and is biased low by O(1/G). Gradient: likewise for that of
    KL(p||pi). The minimum is p for any draws of full support and any G of 2 or more; there each group's gradient is zero.
    Arguments, shapes, units and errors as `exo`.

    Example:
        >>> import torch
        >>> uniform = torch.zeros(1, 2)
        >>> info_nca(uniform, torch.tensor([[1.0, 0.0]]), uniform)
        tensor([0.1109])

    Source: Chen et al., "Noise contrastive alignment of language models with explicit rewards", 2024.

    Not the same as forward_kl, which raises the likelihood of good draws in absolute terms: here only their ratios count, so
    a draw can become likelier while its likelihood falls.
    """
    log_policy, log_best = _laws("info_nca", log_pi, log_target, log_ref)
    return (log_best.exp() * (log_best - log_policy)).sum(1)


def nca(log_pi: Tensor, log_target: Tensor, log_ref: Tensor) -> Tensor:
    r"""Each candidate against noise: a draw of the target's, or a draw of the group's.

    $$ -\sum_g \hat p_g \log\sigma(\log\rho_g) - \tfrac1G \sum_g \log\sigma(-\log\rho_g), \qquad \rho = \pi/\text{ref} $$

    Its least value for a group is at log rho_g = log(G p-hat_g): absolute ratios count, so that a good draw's likelihood cannot fall
    with the others'. The minimum goes to p as G grows, for draws of the reference; at finite G it falls short of it.
    Arguments, shapes, units and errors as `exo`.

    Example:
        >>> import torch
        >>> uniform = torch.zeros(1, 2)
        >>> nca(uniform, torch.tensor([[1.0, 0.0]]), uniform)
        tensor([1.3863])

    Source: Chen et al., "Noise contrastive alignment of language models with explicit rewards", 2024.
    Not the same as TRL's `nca_pair`, whose score is beta log rho and whose weights are 1 and 0.
    """
    _, log_best = _laws("nca", log_pi, log_target, log_ref)
    log_rho = log_pi - log_ref.detach()
    return -(log_best.exp() * logsigmoid(log_rho)).sum(1) - logsigmoid(-log_rho).mean(1)


def _laws(name: str, log_pi: Tensor, log_target: Tensor, log_ref: Tensor) -> tuple[Tensor, Tensor]:
    require_finite(name, log_pi=log_pi, log_target=log_target, log_ref=log_ref)
    if log_pi.shape[1] < 2:
        raise ValueError(
            f"{name}: got {log_pi.shape[1]} draw a prompt, expected at least 2: it compares them"
        )
    log_ref = log_ref.detach()
    return (log_pi - log_ref).log_softmax(1), (log_target.detach() - log_ref).log_softmax(1)
