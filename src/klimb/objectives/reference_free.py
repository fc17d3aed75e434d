r"""Learning from comparisons without a reference: the policy's own likelihood is the score, and what holds it in place is another term.

P prompts, G draws a prompt, all pairs of which are compared, as in `klimb.objectives.preference`. None of these has p for its
minimum: p is relative to a reference, and they know none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klimb.objectives.preference import Part, bradley_terry, logistic, members, outcome_cost, pair_scores
from klimb.objectives.require import require_finite


def simpo(
    log_pi: Tensor,
    reward: Tensor,
    beta: Tensor | float,
    lengths: Tensor,
    *,
    margin: float = 0.5,
    judge: Part = bradley_terry,
    link: Part = logistic,
) -> Tensor:
    r"""The cost of who wins where a completion's score is its mean log-probability a token, less a margin that winning asks for.

    $$ \operatorname{mean}_{i<j} P_{ij}\,\ell(m_{ij} - \gamma) + (1 - P_{ij})\,\ell(-m_{ij} - \gamma), \qquad
       m_{ij} = \beta\,(\log\pi_i/|y_i| - \log\pi_j/|y_j|) $$

    The minimum at margin 0 is exp(|y| (r / beta + c)): no reference, and long completions are tilted as often as they have tokens.

    Args:
        log_pi: [P, G] nats; differentiated.
        reward: [P, G] units of reward, or labels for `given`.
        beta: units of reward per nat a token.
        lengths: [P, G] tokens.
        margin: gamma, in units of reward.
        judge: differences of rewards -> chances.
        link: margins of what wins -> costs.

    Returns:
        [P] nats.

    Raises:
        ValueError: fewer than two draws a prompt, a number is NaN or infinite, or shapes differ.

    Example:
        >>> simpo(torch.tensor([[-1.0, -1.0]]), torch.tensor([[0.0, 0.0]]), 2.0, torch.tensor([[1, 2]]), margin=0.0)
        tensor([0.8133])

    Source: Meng, Xia, Chen, "SimPO: simple preference optimization with a reference-free reward", 2024.
    """
    require_finite("simpo", log_pi=log_pi)
    difference, wins = pair_scores("simpo", log_pi / lengths.clamp(min=1), reward, judge)
    score = beta * difference
    return outcome_cost(score, wins, lambda m: link(m - margin)).mean(1)


def cpo(
    log_pi: Tensor,
    reward: Tensor,
    beta: Tensor | float,
    lengths: Tensor,
    *,
    likelihood: float = 1.0,
    judge: Part = bradley_terry,
    link: Part = logistic,
) -> Tensor:
    r"""The cost of who wins by likelihood alone, and beside it the winner's negative log-likelihood a token.

    $$ \operatorname{mean}_{i<j} P_{ij}\,[\ell(m_{ij}) - a \log\pi_i/|y_i|] + (1 - P_{ij})\,[\ell(-m_{ij}) - a\log\pi_j/|y_j|],
       \qquad m_{ij} = \beta\,(\log\pi_i - \log\pi_j) $$

    dpo with a uniform reference; the likelihood of what won, a = `likelihood`, is what keeps it near the data. Other arguments,
    shapes and errors as `simpo`.

    Example:
        >>> cpo(torch.tensor([[-1.0, -1.0]]), torch.tensor([[0.0, 0.0]]), 2.0, torch.tensor([[1, 2]]))
        tensor([1.4431])

    Source: Xu et al., "Contrastive preference optimization", 2024.
    Not the same as TRL's, whose likelihood is the mean over all tokens of the batch's winners.
    """
    require_finite("cpo", log_pi=log_pi)
    difference, wins = pair_scores("cpo", log_pi, reward, judge)
    margin = beta * difference
    cost = outcome_cost(margin, wins, link)
    return (cost + likelihood * _winners(log_pi / lengths.clamp(min=1), wins)).mean(1)


def orpo(
    log_pi: Tensor,
    reward: Tensor,
    lengths: Tensor,
    *,
    weight: float = 0.1,
    judge: Part = bradley_terry,
) -> Tensor:
    r"""The winner's negative log-likelihood a token, and beside it how the odds of the two compare.

    $$ \operatorname{mean}_{i<j} -\log\pi_w/|y_w| - \lambda \log\sigma(\mathrm{logit}\,a_w - \mathrm{logit}\,a_l), \qquad
       a = \pi^{1/|y|} $$

    `weight` is lambda (TRL's beta). Other arguments, shapes and errors as `simpo`.

    Example:
        >>> orpo(torch.tensor([[-1.0, -1.0]]), torch.tensor([[0.0, 0.0]]), torch.tensor([[1, 1]]))
        tensor([1.0693])

    Source: Hong, Lee, Thorne, "ORPO: monolithic preference optimization without reference model", 2024.
    Not the same as TRL's, whose likelihood is the mean over all tokens of the batch's winners, prompt included.
    """
    require_finite("orpo", log_pi=log_pi)
    mean = log_pi / lengths.clamp(min=1)
    sure = mean.clamp(max=-1e-6)  # of a probability of one the odds are infinite
    odds = sure - torch.log(-torch.expm1(sure))
    difference, wins = pair_scores("orpo", odds, reward, judge)
    cost = outcome_cost(difference, wins, logistic)
    return (_winners(mean, wins) + weight * cost).mean(1)


def _winners(mean: Tensor, wins: Tensor) -> Tensor:
    """[P, pairs] the winner's negative log-probability a token, each outcome with its chance."""
    first, second = members(mean.shape[1], mean.device)
    return -wins * mean[:, first] - (1 - wins) * mean[:, second]
