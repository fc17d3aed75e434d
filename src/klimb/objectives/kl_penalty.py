"""KL(pi||ref) as a penalty: three estimators, two uses, and what each really optimises.

P prompts, G draws a prompt, N packed tokens, V vocabulary. rho = pi / ref, draws of pi, S = grad log pi. As values k1
and k3 are unbiased for KL(pi||ref) and k2 is nearly so, but the gradient of an estimate is not an estimate of the gradient:

              as a detached reward, E[k S]            as a loss, E[grad k]
    k1        grad KL(pi||ref)                        0
    k2        neither                                 grad KL(pi||ref)
    k3        grad KL(pi||ref) - grad KL(ref||pi)     grad KL(ref||pi), the other direction

This is at sequence level; `CELLS` is the table as data, `TRAPS` what goes wrong token by token. Off-policy a draw needs
its weight pi / q. Held fixed, it gives the column "as a loss"; differentiated, it gives the sum of both columns,
which is the gradient of KL(pi||ref) for k1 and k3. Without a weight every cell is biased.

Source of the table: Tang, Munos, "On a few pitfalls in KL divergence gradient estimation for RL", 2025. Of the
estimators: Schulman, "Approximating KL divergence", 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.objectives.packed import completion_sums, require_packed, sums_before
from klimb.objectives.require import require_finite

Estimator = Callable[[Tensor], Tensor]
Weight = Callable[[Tensor, Tensor], Tensor]


def k1(log_rho: Tensor) -> Tensor:
    """The log ratio itself: unbiased for KL(pi||ref), of either sign. Any shape; nats.

    Example:
        >>> k1(torch.tensor([1.0, -1.0]))
        tensor([ 1., -1.])
    """
    return log_rho


def k2(log_rho: Tensor) -> Tensor:
    """(log rho)^2 / 2: biased for KL(pi||ref) by a third order in log rho, never negative. Any shape; nats squared.

    Example:
        >>> k2(torch.tensor([1.0, -1.0]))
        tensor([0.5000, 0.5000])
    """
    return log_rho**2 / 2


def k3(log_rho: Tensor) -> Tensor:
    """1/rho - 1 + log rho: unbiased for KL(pi||ref), never negative, unbounded where ref far exceeds pi. Any shape.

    Example:
        >>> k3(torch.tensor([1.0, -1.0]))
        tensor([0.3679, 0.7183])
    """
    return torch.expm1(-log_rho) + log_rho


@dataclass(frozen=True)
class Cell:
    """What an estimator does in one use: the expected gradient, in units of two gradients that are known.

    Attributes:
        reverse: how much of grad KL(pi||ref) it is; None where it is no combination of the two.
        forward: how much of grad KL(ref||pi) it is; None likewise.
        says: the same in words.
    """

    reverse: float | None
    forward: float | None
    says: str

    @property
    def right(self) -> bool:
        """True where the expected gradient is that of KL(pi||ref), the penalty that the target p comes from."""
        return (self.reverse, self.forward) == (1.0, 0.0)


CELLS: Mapping[tuple[str, str], Cell] = {
    ("k1", "reward"): Cell(1.0, 0.0, "grad KL(pi||ref)"),
    ("k2", "reward"): Cell(None, None, "wrong: neither direction, and not small"),
    ("k3", "reward"): Cell(
        1.0,
        -1.0,
        "wrong: grad KL(pi||ref) - grad KL(ref||pi), which vanishes near ref: almost no penalty there",
    ),
    ("k1", "loss"): Cell(0.0, 0.0, "wrong: zero, noise that penalises nothing"),
    ("k2", "loss"): Cell(1.0, 0.0, "grad KL(pi||ref)"),
    ("k3", "loss"): Cell(
        0.0,
        1.0,
        "wrong direction: grad KL(ref||pi), whose optimum with a reward is beta ref / (nu - r), not p",
    ),
    ("k1", "weighted loss"): Cell(1.0, 0.0, "grad KL(pi||ref), the score-function form"),
    ("k2", "weighted loss"): Cell(None, None, "wrong: hold the weight of k2 fixed"),
    ("k3", "weighted loss"): Cell(1.0, 0.0, "grad KL(pi||ref)"),
}
"""(estimator, use) -> what it optimises, at sequence level; "weighted loss" is a loss with the weight differentiated"""

ESTIMATORS: Mapping[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3}

TRAPS: Mapping[str, str] = {
    "k1 of a token as that token's reward alone": "leaves out what a token does to the KL of later ones; give each "
    "token the KL to go, or the whole completion's",
    "k2 summed over tokens as a loss": "the gradient with the visited prefixes held fixed: a part of grad KL(pi||ref)",
    "k3 summed over tokens as a loss": "KL(ref||pi) of the next token, on the policy's prefixes held fixed: GRPO's term",
    "k3 weighted token by token": "KL(pi||ref) of the next token, prefixes held fixed: a part, as k2 over tokens",
    "k3 of each token weighted by the geometric ratio": "the score counts by 1/|y|: no KL's gradient; weighted by the "
    "whole completion's ratio and summed it is grad KL(pi||ref)",
    "full KL of each next token as a loss": "unbiased in value; in gradient a part, as k2 over tokens, unless the "
    "prefixes are weighted too (rao_blackwell)",
}
"""what is done token by token -> what it leaves out"""


def fixed_weight(log_pi: Tensor, log_q: Tensor) -> Tensor:
    """The weight pi / q, detached: it moves an expectation of q to pi, and its gradient is left out.

    Example:
        >>> fixed_weight(torch.tensor([0.5], requires_grad=True), torch.tensor([0.5]))
        tensor([1.])
    """
    return torch.exp(log_pi - log_q).detach()


def score_weight(log_pi: Tensor, log_q: Tensor) -> Tensor:
    """The weight pi / q, differentiated: its derivative is the score function, so a value's gradient is complete.

    Example:
        >>> log_pi = torch.tensor([0.5], requires_grad=True)
        >>> torch.autograd.grad(score_weight(log_pi, log_pi.detach()).sum(), log_pi)[0].tolist()
        [1.0]
    """
    return torch.exp(log_pi - log_q.detach())


def kl_loss(
    log_pi: Tensor,
    log_ref: Tensor,
    log_q: Tensor | None = None,
    *,
    estimator: Estimator = k2,
    weight: Weight = fixed_weight,
) -> Tensor:
    r"""A KL penalty to be differentiated: the mean over draws of the weighted estimator, at sequence level.

    $$ \frac1G \sum_g w_g\, k(\log\pi_g - \log\text{ref}_g), \qquad w = \pi / q $$

    Value: unbiased for KL(pi||ref) with k1 and k3, from any law q that reaches all that pi reaches; biased with k2.
    Gradient: what `CELLS` says of the use "loss" for `fixed_weight`, and of "weighted loss" for `score_weight`. It
    estimates that of KL(pi||ref), unbiased, for k2 with `fixed_weight` (the default) and for k1 or k3 with
    `score_weight`; all other pairs are other objectives.

    Args:
        log_pi: [P, G] log-probability under the policy, nats; what is differentiated.
        log_ref: [P, G] under the reference, nats.
        log_q: [P, G] under the law that drew them, nats; None for fresh draws of the policy. Detached.
        estimator: k1, k2 or k3.
        weight: `fixed_weight` or `score_weight`.

    Returns:
        [P] nats (k2: nats squared).

    Raises:
        ValueError: a number is NaN or infinite, or shapes differ.

    Example:
        >>> log_pi = torch.tensor([[0.5, 0.25]]).log().requires_grad_()
        >>> value = kl_loss(log_pi, torch.tensor([[0.25, 0.25]]).log())
        >>> value.backward()
        >>> round(value.item(), 4), [round(x, 4) for x in log_pi.grad[0].tolist()]
        (0.1201, [0.3466, 0.0])

    Source: Tang, Munos, "On a few pitfalls in KL divergence gradient estimation for RL", 2025.

    Not the same as k3 as a loss (GRPO), which draws pi to ref in the other direction.
    """
    log_q = log_pi.detach() if log_q is None else log_q
    require_finite("kl_loss", log_pi=log_pi, log_ref=log_ref, log_q=log_q)
    return (weight(log_pi, log_q) * estimator(log_pi - log_ref.detach())).mean(1)


def kl_reward(log_pi: Tensor, log_ref: Tensor, *, beta: Tensor | float, estimator: Estimator = k1) -> Tensor:
    r"""A KL penalty to be added to a reward: -beta times the estimator, detached.

    $$ -\beta\, k(\log\pi - \log\text{ref}) $$

    Value: unbiased for -beta KL(pi||ref) over draws of pi with k1 and k3. It has no gradient of its own: times the score
    function, as any reward, it gives what `CELLS` says of the use "reward". Only k1 is right: the reward with it is
    r - beta log(pi/ref), and its policy gradient is that of E[r] - beta KL(pi||ref). Off-policy the weight belongs to
    the whole advantage and not here.

    Args:
        log_pi: [P, G] log-probability under the policy, nats, or [N] of tokens, for a token's KL to go.
        log_ref: the same shape, under the reference, nats.
        beta: units of reward per nat.
        estimator: k1, k2 or k3.

    Returns:
        The shape of log_pi, in units of reward.

    Example:
        >>> kl_reward(torch.tensor([[0.5, 0.25]]).log(), torch.tensor([[0.25, 0.25]]).log(), beta=0.1)
        tensor([[-0.0693, -0.0000]])

    Source: Ziegler et al., "Fine-tuning language models from human preferences", 2019.

    Not the same as kl_loss, which is differentiated: there k1 does nothing and k2 is right.
    """
    return -beta * estimator((log_pi - log_ref).detach())


def token_kl_loss(
    token_log_pi: Tensor, token_log_ref: Tensor, row: Tensor, lengths: Tensor, *, estimator: Estimator = k2
) -> Tensor:
    r"""The estimator of each token, summed over the completion, as a loss: what is called a KL penalty elsewhere.

    $$ \frac1G \sum_g \sum_t k(\log\pi_t - \log\text{ref}_t) $$

    Value: over draws of pi unbiased for KL(pi||ref) with k1 and k3. Gradient: with the prefixes held fixed, so not that
    of any KL between sequences: see `TRAPS`. Here to be compared with; `kl_loss` is the one to use.

    Args:
        token_log_pi: [N] log-probability of each token under the policy, nats; what is differentiated.
        token_log_ref: [N] under the reference, nats.
        row: [N] which completion each token belongs to.
        lengths: [P, G] tokens.
        estimator: k1, k2 or k3.

    Returns:
        [P] nats.

    Raises:
        ValueError: shapes do not fit, or a number is not finite.

    Example:
        >>> row, lengths = torch.tensor([0, 0]), torch.tensor([[2]])
        >>> token_kl_loss(torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -1.0]), row, lengths)
        tensor([0.5000])

    Source: Shao et al., "DeepSeekMath", 2024 (k3, with a mean in place of the sum).
    """
    require_packed("token_kl_loss", row, lengths, token_log_pi=token_log_pi, token_log_ref=token_log_ref)
    return completion_sums(estimator(token_log_pi - token_log_ref.detach()), row, lengths).mean(1)


def rao_blackwell(
    log_pi_all: Tensor,
    log_ref_all: Tensor,
    token_log_pi: Tensor,
    row: Tensor,
    lengths: Tensor,
    token_log_old: Tensor | None = None,
) -> Tensor:
    r"""KL(pi||ref) with each next token summed over the vocabulary and only the prefixes drawn.

    $$ \frac1G \sum_g \sum_t w_{<t}\, \mathrm{KL}(\pi(\cdot|y_{<t}) \,\|\, \text{ref}(\cdot|y_{<t})), \qquad
       w_{<t} = \pi(y_{<t}) / \text{old}(y_{<t}) $$

    Value: unbiased for KL(pi||ref), also from draws of an old policy that reaches all that pi reaches; its variance on
    fresh draws is at most that of k1. Gradient: unbiased for that of KL(pi||ref), because the prefix weights are
    differentiated; give token_log_pi.detach() and it is the part that holds the prefixes fixed (see `TRAPS`).

    Args:
        log_pi_all: [N, V] log-probabilities of every next token under the policy, nats; differentiated.
        log_ref_all: [N, V] under the reference, nats.
        token_log_pi: [N] of the tokens drawn, under the policy, nats; differentiated.
        row: [N] which completion each token belongs to.
        lengths: [P, G] tokens.
        token_log_old: [N] under the policy that drew, nats; None for fresh draws. Detached.

    Returns:
        [P] nats.

    Raises:
        ValueError: shapes do not fit, a number is NaN, or the reference excludes a token that the policy does not.

    Example:
        >>> row, lengths, half = torch.tensor([0]), torch.tensor([[1]]), torch.tensor([[0.5, 0.5]]).log()
        >>> value = rao_blackwell(half, torch.tensor([[0.25, 0.75]]).log(), half[:, 0], row, lengths)
        >>> round(value.item(), 4)
        0.1438

    Source: Amini, Vieira, Cotterell, "Better estimation of the KL divergence between language models", 2025.

    Not the same as kl_loss near p: all of these have a gradient there that only cancels on average with the reward's,
    where that of reverse_kl is zero draw by draw.
    """
    old = token_log_pi.detach() if token_log_old is None else token_log_old.detach()
    require_packed("rao_blackwell", row, lengths, token_log_pi=token_log_pi, token_log_old=old)
    if log_pi_all.shape != log_ref_all.shape or log_pi_all.shape[:-1] != row.shape:
        raise ValueError(
            f"rao_blackwell: got log_pi_all {list(log_pi_all.shape)} and log_ref_all {list(log_ref_all.shape)}, "
            f"expected both [{len(row)}, V]"
        )
    never = log_pi_all.isneginf()  # 0 log 0 = 0, with a gradient of zero
    log_rho = (log_pi_all - log_ref_all.detach()).masked_fill(never, 0.0)
    if not bool(torch.isfinite(log_rho).all()):
        raise ValueError(
            "rao_blackwell: got a token that the reference excludes (-inf) and the policy does not, or NaN; the KL "
            "is infinite: mask the same tokens in both"
        )
    each = (log_pi_all.exp() * log_rho).sum(1)
    weight = torch.exp(sums_before(token_log_pi - old, row, lengths))
    return completion_sums(weight * each, row, lengths).mean(1)
