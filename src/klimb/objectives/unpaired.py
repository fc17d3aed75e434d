r"""Learning from completions that were called good or bad one by one, without a partner.

P prompts, G draws a prompt (one will do). `reward` is the chance that a completion is called good: 1 or 0 for labels of data, or
a number between. The policy's score is s = beta log pi/ref; what it is held against is one number of the whole batch, made
before the batch is learned from (`zero_kl`, `middle`) and held fixed.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from klimb.objectives.require import require_finite


def zero_kl(log_start: Tensor, log_ref: Tensor) -> Tensor:
    """What kto holds a score against: the mean log ratio of the batch's completions, not below zero. One number, nats.

    Not the same as TRL's, which takes completions of other prompts of the batch: those are unlikely under the policy, and their
    ratio is at its floor of zero more often.

    Example:
        >>> import torch
        >>> zero_kl(torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-2.0], [-2.0]])).item()
        0.5
    """
    return (log_start - log_ref).mean().clamp(min=0)


def middle(log_start: Tensor, log_ref: Tensor, reward: Tensor) -> Tensor:
    """What bco holds a score against: halfway between the mean log ratio of good and of bad completions. One number, nats.

    Example:
        >>> import torch
        >>> middle(torch.tensor([[-1.0], [-3.0]]), torch.tensor([[-2.0], [-2.0]]), torch.tensor([[1.0], [0.0]])).item()
        0.0
    """
    log_rho = (log_start - log_ref).detach()
    parts = [(weight * log_rho).sum() / weight.sum().clamp(min=1e-6) for weight in (reward, 1 - reward)]
    return (parts[0] + parts[1]) / 2


def kto(
    log_pi: Tensor,
    log_ref: Tensor,
    reward: Tensor,
    beta: Tensor | float,
    held_against: Tensor,
    *,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> Tensor:
    r"""What is missing to the full value of each completion, by a curve that flattens on both sides.

    $$ \operatorname{mean}_g\; r_g \lambda_D\, \sigma(\beta (z - \log\rho_g)) + (1 - r_g)\lambda_U\, \sigma(\beta(\log\rho_g - z)) $$

    There is no minimum inside: whatever is called good more often than bad goes to certainty, however rarely it errs. What keeps
    a training from it is that the slope fades with distance.

    Args:
        log_pi: [P, G] nats; differentiated.
        log_ref: [P, G] under the reference, nats.
        reward: [P, G] chance of being called good, in [0, 1].
        beta: units of reward per nat.
        held_against: z, one number, nats.
        desirable: weight of good completions.
        undesirable: weight of bad ones.

    Returns:
        [P] without unit.

    Raises:
        ValueError: a reward outside [0, 1], a number is NaN or infinite, or shapes differ.

    Example:
        >>> import torch
        >>> kto(torch.tensor([[-1.0]]), torch.tensor([[-1.0]]), torch.tensor([[1.0]]), 0.1, torch.tensor(0.0))
        tensor([0.5000])

    Source: Ethayarajh et al., "KTO: model alignment as prospect theoretic optimization", 2024.
    """
    score = beta * (_checked("kto", log_pi, log_ref, reward) - held_against)
    return (reward * desirable * (-score).sigmoid() + (1 - reward) * undesirable * score.sigmoid()).mean(1)


def bco(
    log_pi: Tensor, log_ref: Tensor, reward: Tensor, beta: Tensor | float, held_against: Tensor
) -> Tensor:
    r"""The cross entropy of good and bad, the policy's score less a middle as its logit.

    $$ \operatorname{mean}_g\; - r_g \log\sigma(\beta(\log\rho_g - z)) - (1 - r_g)\log\sigma(-\beta(\log\rho_g - z)) $$

    Where z is -log Z of that reward, the minimum is ref exp(logit(chance) / beta) / Z: the target, where good and bad follow a
    logistic curve of the reward. Arguments, shapes and errors as `kto`; z is `middle`.

    Example:
        >>> import torch
        >>> bco(torch.tensor([[-1.0]]), torch.tensor([[-1.0]]), torch.tensor([[1.0]]), 0.1, torch.tensor(0.0))
        tensor([0.6931])

    Source: Jung et al., "Binary classifier optimization for large language model alignment", 2024.
    """
    score = beta * (_checked("bco", log_pi, log_ref, reward) - held_against)
    return -(reward * logsigmoid(score) + (1 - reward) * logsigmoid(-score)).mean(1)


def _checked(name: str, log_pi: Tensor, log_ref: Tensor, reward: Tensor) -> Tensor:
    """The log ratio."""
    require_finite(name, log_pi=log_pi, log_ref=log_ref, reward=reward)
    if bool(((reward < 0) | (reward > 1)).any()):
        raise ValueError(
            f"{name}: got rewards from {reward.min():.3g} to {reward.max():.3g}, expected the chance that each completion is "
            "called good, from 0 to 1; use labels, a reward in that range, or dpo"
        )
    return log_pi - log_ref.detach()
