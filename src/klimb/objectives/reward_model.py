r"""The loss of a reward model: what judgements of completions say of their rewards, which are fixed up to a constant a prompt.

P prompts, K completions a prompt, all K (K - 1) / 2 pairs of which are compared.
"""

from __future__ import annotations

from torch import Tensor

from klimb.objectives.preference import Part, given, logistic, members, pair_scores


def reward_model(
    score: Tensor,
    label: Tensor,
    *,
    judge: Part = given,
    link: Part = logistic,
    margins: bool = False,
    centring: float = 0.0,
) -> Tensor:
    r"""The cross entropy of who wins under Bradley and Terry, and a price on the mean score.

    $$ \operatorname{mean}_{i<j}\; P_{ij}\, \ell(s_i - s_j - m_{ij}) + (1 - P_{ij})\, \ell(s_j - s_i - m_{ij})
       \;+\; c\,(2 \bar s)^2 $$

    Value: unbiased for its expectation over judgements. Gradient: of the same.
    The minimum, where every pair may be judged either way: s_i - s_j = logit P_ij, so the true rewards in units of their own
    logits; with a link of smoothing e, logit of (1 - 2 e) P + e. The first part does not see a constant added to all of a
    prompt's scores; with c > 0 the one of mean zero is the minimum, and the differences stay what they are. With labels that
    never err there is no minimum inside: the differences grow without end.

    Args:
        score: [P, K] what the model says; differentiated.
        label: [P, K] labels or scores of the judge.
        judge: differences of labels -> chances that the first wins: `given`, or `bradley_terry` where labels are scores.
        link: differences of scores -> costs of what happened.
        margins: whether s_i - s_j has to exceed how far the labels are apart, m_ij = |label_i - label_j|; else m = 0.
        centring: c >= 0, the price of scores away from zero.

    Returns:
        [P] nats for the logistic link.

    Raises:
        ValueError: fewer than two completions a prompt, or a number is NaN or infinite.

    Example:
        >>> import torch
        >>> score, label = torch.tensor([[1.5, 0.5]]), torch.tensor([[1.0, 0.0]])
        >>> reward_model(score, label), reward_model(score, label, margins=True)
        (tensor([0.3133]), tensor([0.6931]))
        >>> reward_model(score, label, centring=0.01)
        tensor([0.3533])

    Source: Bradley, Terry, "Rank analysis of incomplete block designs", 1952; Touvron et al., "Llama 2", 2023 (margins);
    Eisenstein et al., "Helping or herding? Reward model ensembles mitigate but do not eliminate reward hacking", 2023 (centring).

    Not the same as TRL's `RewardTrainer` in what a column margin does: TRL subtracts it wherever there is one, here it is asked
    for. For K = 2 the numbers are the same, those of `center_rewards_coefficient` too.
    """
    difference, wins = pair_scores("reward_model", score, label, judge)
    apart: Tensor | float = 0.0
    if margins:
        first, second = members(score.shape[1], score.device)
        apart = (label[:, first] - label[:, second]).abs().detach()
    cost = wins * link(difference - apart) + (1 - wins) * link(-difference - apart)
    value = cost.mean(1)
    # of all ways to price the sum of a pair, the one that leaves the differences of more than two alone
    return value + centring * (2 * score.mean(1)).square() if centring else value
