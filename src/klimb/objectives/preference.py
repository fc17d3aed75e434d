r"""Learning from comparisons: which of two completions wins says what their rewards are, up to a constant that cancels.

P prompts, G draws a prompt, all G (G - 1) / 2 pairs of which are compared. Three parts:

    judge   the difference of two rewards -> the chance that the first wins: `bradley_terry` for a reward function, `given`
            where the "reward" is a label, 1 for what was chosen and 0 for what was rejected (then G = 2)
    score   log pi/ref -> what the policy is taken to say of a completion: itself (dpo), or a slope f'(pi/ref) of another
            divergence (`klimb.objectives.generators.divergence(name).slope`; chi_po)
    link    beta times the difference of two scores -> what it costs if the first wins: logistic, hinge, squared (ipo)

A part is a function, and `functools.partial` sets its options.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from klimb.objectives.require import require_finite

Part = Callable[[Tensor], Tensor]


def bradley_terry(difference: Tensor) -> Tensor:
    """The chance that the first of two wins, 1 / (1 + exp(r2 - r1)): the logistic of the difference of rewards. Any shape.

    Example:
        >>> bradley_terry(torch.tensor([0.0, 2.0]))
        tensor([0.5000, 0.8808])

    Source: Bradley, Terry, "Rank analysis of incomplete block designs", 1952.
    """
    return torch.sigmoid(difference)


def given(difference: Tensor) -> Tensor:
    """1 where the first has the larger label, 0 where the second has, 1/2 where they tie. Any shape.

    Example:
        >>> given(torch.tensor([1.0, -1.0, 0.0]))
        tensor([1.0000, 0.0000, 0.5000])
    """
    return (difference.sign() + 1) / 2


def log_ratio(log_rho: Tensor) -> Tensor:
    """The log ratio itself, log pi/ref: the implicit reward / beta of DPO. Any shape; nats."""
    return log_rho


def ratio_and_log(log_rho: Tensor) -> Tensor:
    """Rho + log rho, for a chi-squared penalty beside the KL (chi-PO). Any shape.

    Example:
        >>> ratio_and_log(torch.tensor([0.0, 1.0]))
        tensor([1.0000, 3.7183])

    Source: Huang et al., "Correcting the mythos of KL-regularization: direct alignment without overoptimization via
    chi-squared preference optimization", 2024.
    """
    return log_rho.exp() + log_rho


def logistic(margin: Tensor, *, smoothing: float = 0.0, unbias: bool = False) -> Tensor:
    """-log of the chance of what happened, under a Bradley-Terry policy. Any shape; nats.

    Args:
        margin: beta times the winner's score less the loser's.
        smoothing: chance in [0, 1/2) that the label was wrong: then the other outcome counts with it (cDPO).
        unbias: weigh so that wrong labels of that chance cancel on average (rDPO), in the place of believing them less.

    Example:
        >>> logistic(torch.tensor([0.0, 2.0]))
        tensor([0.6931, 0.1269])

    Source: Rafailov et al., 2023; Mitchell, "A note on DPO with noisy preferences", 2023; Chowdhury, Kini, Natarajan,
    "Provably robust DPO", 2024.
    """
    wrong = -smoothing if unbias else smoothing
    value = -(1 - smoothing) * logsigmoid(margin) - wrong * logsigmoid(-margin)
    return value / (1 - 2 * smoothing) if unbias else value


def hinge(margin: Tensor) -> Tensor:
    """What is missing to a margin of 1. Any shape.

    Example:
        >>> hinge(torch.tensor([0.0, 2.0]))
        tensor([1., 0.])

    Source: Zhao et al., "SLiC-HF", 2023; Liu et al., "Statistical rejection sampling improves preference optimization", 2024.
    """
    return torch.relu(1 - margin)


def squared(margin: Tensor) -> Tensor:
    """The squared distance to a margin of 1/2: beta squared times the loss of IPO's paper. Any shape.

    Example:
        >>> squared(torch.tensor([0.0, 0.5]))
        tensor([0.2500, 0.0000])

    Source: Azar et al., "A general theoretical paradigm to understand learning from human preferences", 2024.
    """
    return (margin - 0.5).square()


def preference(
    log_pi: Tensor,
    log_ref: Tensor,
    reward: Tensor,
    beta: Tensor | float,
    *,
    judge: Part = bradley_terry,
    score: Part = log_ratio,
    link: Part = logistic,
) -> Tensor:
    r"""The mean cost over all pairs of a prompt's draws, each outcome weighted with its chance.

    $$ \operatorname{mean}_{i<j}\; P_{ij}\, \ell(m_{ij}) + (1 - P_{ij})\, \ell(-m_{ij}), \qquad
       m_{ij} = \beta\,(s(\pi_i/\text{ref}_i) - s(\pi_j/\text{ref}_j)) $$

    Value: unbiased for its expectation over pairs of draws. With the logistic link and bradley_terry it is the cross entropy
    between the judge's and the policy's comparisons: at its least where both agree on every pair.
    Gradient: unbiased for that of this expectation, with the law that drew held fixed; of no divergence between laws of
    completions. The minimum, for any draws of full support, is where beta s(pi/ref) = r up to a constant a prompt: p for
    `log_ratio`; for a slope f', the best policy under D_f(pi||ref) in the place of KL, if f' goes to -inf at 0 (else it is
    that only where no completion ought to vanish). At the minimum each pair's gradient is zero.

    Not so: with `squared` it is ref exp(P(y beats the drawing law) / beta), with `hinge` or with labels that never err it has
    no minimum inside: whatever wins always goes to certainty.

    Args:
        log_pi: [P, G] log-probability under the policy, nats; differentiated.
        log_ref: [P, G] under the reference, nats.
        reward: [P, G] units of reward, or labels for `given`.
        beta: units of reward per nat.
        judge: differences of rewards -> chances.
        score: log ratios -> scores.
        link: margins of what wins -> costs.

    Returns:
        [P] nats for the logistic link.

    Raises:
        ValueError: fewer than two draws a prompt, a number is NaN or infinite, or shapes differ.

    Example:
        >>> log_ref = torch.tensor([[0.25, 0.75]]).log()
        >>> reward = torch.tensor([[1.0, 0.0]])
        >>> target = log_ref + reward / 0.5
        >>> at_ref, at_target = (preference(x, log_ref, reward, 0.5).item() for x in (log_ref, target))
        >>> round(at_ref, 4), round(at_target, 4)
        (0.6931, 0.5822)

    Source: Rafailov et al., "Direct preference optimization", 2023; Wang et al., "Beyond reverse KL", 2024 (other
    divergences); Guo et al., "Direct language model alignment from online AI feedback", 2024 (judged draws of the policy).

    Not the same as log_variance, which regresses the differences of log ratios on those of the rewards: the same minimum, other
    weights. Not the same as TRL's `ipo`, which divides both log ratios by their lengths.
    """
    difference, wins = pair_scores("preference", score(log_pi - log_ref.detach()), reward, judge)
    require_finite("preference", log_pi=log_pi, log_ref=log_ref)
    margin = beta * difference
    return outcome_cost(margin, wins, link).mean(1)


def wpo(
    log_pi: Tensor,
    log_ref: Tensor,
    reward: Tensor,
    beta: Tensor | float,
    lengths: Tensor,
    *,
    judge: Part = bradley_terry,
    link: Part = logistic,
) -> Tensor:
    r"""`preference`, each pair weighted by how likely the policy itself is to write it, token for token.

    $$ \operatorname{mean}_{i<j}\; w_i w_j\,[P_{ij}\, \ell(m_{ij}) + (1 - P_{ij})\, \ell(-m_{ij})], \qquad
       w_i = \pi_i^{1/|y_i|} \text{ held fixed} $$

    The minimum is dpo's wherever that makes every pair silent; elsewhere pairs that the policy would not write count less, as if
    it had drawn them. Arguments, shapes and errors as `preference`; lengths [P, G] in tokens.

    Example:
        >>> pair = torch.tensor([[0.25, 0.25]]).log()
        >>> wpo(pair, pair, torch.tensor([[0.0, 0.0]]), 1.0, torch.tensor([[1, 2]]))
        tensor([0.0866])

    Source: Zhou et al., "WPO: enhancing RLHF with weighted preference optimization", 2024.
    Not the same as TRL's `use_weighting`, which divides each token's probability by the sum of squares over the vocabulary.
    """
    require_finite("wpo", log_pi=log_pi, log_ref=log_ref)
    difference, wins = pair_scores("wpo", log_pi - log_ref.detach(), reward, judge)
    margin = beta * difference
    weight = (log_pi.detach() / lengths.clamp(min=1)).exp()
    first, second = members(log_pi.shape[1], log_pi.device)
    return (weight[:, first] * weight[:, second] * outcome_cost(margin, wins, link)).mean(1)


def outcome_cost(margin: Tensor, wins: Tensor, link: Part) -> Tensor:
    """[P, pairs] what a pair costs, each outcome with its chance."""
    return wins * link(margin) + (1 - wins) * link(-margin)


def members(num_draws: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The two members of each pair."""
    first, second = torch.triu_indices(num_draws, num_draws, 1, device=device)
    return first, second


def pair_scores(name: str, scores: Tensor, reward: Tensor, judge: Part) -> tuple[Tensor, Tensor]:
    """Difference of scores of each pair [P, pairs], differentiable, and the chance that its first member wins."""
    require_finite(name, scores=scores, reward=reward)
    num_draws = scores.shape[1]
    if num_draws < 2:
        raise ValueError(f"{name}: got {num_draws} draw a prompt, expected at least 2: it compares them")
    first, second = members(num_draws, scores.device)
    wins = judge((reward[:, first] - reward[:, second]).detach())
    return scores[:, first] - scores[:, second], wins


dpo = preference
ipo = partial(preference, link=squared)
slic = partial(preference, link=hinge)
chi_po = partial(preference, score=ratio_and_log)
