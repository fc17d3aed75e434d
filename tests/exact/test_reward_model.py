"""Where a reward model's loss leads: all outcomes of all comparisons of six items, weighed with their chance; minima to the end."""

from functools import partial
from itertools import product

import pytest
import torch
from torch.autograd.gradcheck import gradcheck

from klimb.exact import random_logits
from klimb.objectives import reward_model
from klimb.objectives.preference import bradley_terry, given, logistic

ITEMS = 6
TRUTH = random_logits(ITEMS, generator=torch.Generator().manual_seed(40)).double()
PAIRS = torch.combinations(torch.arange(ITEMS))
WON, LOST = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()


def expected(score, chance, **options):
    """The loss over both outcomes of every pair, each with its chance."""
    pairs = score[PAIRS]
    first, second = (reward_model(pairs, label.expand(len(PAIRS), 2), **options) for label in (WON, LOST))
    return (chance * first + (1 - chance) * second).mean()


def differences(x):
    return x[PAIRS[:, 0]] - x[PAIRS[:, 1]]


CHANCE = torch.sigmoid(differences(TRUTH))


def test_the_minimum_has_the_true_differences(to_the_end):
    (found,) = to_the_end(partial(expected, chance=CHANCE), torch.zeros(ITEMS).double())
    assert torch.allclose(differences(found), differences(TRUTH), atol=1e-6)
    # the mutant: scores of half the size, which no loss of chances can want
    assert expected(TRUTH / 2, CHANCE) > expected(found, CHANCE) + 1e-3


def test_chances_in_the_place_of_outcomes_are_the_same_loss():
    pairs = TRUTH[PAIRS] * 0.7
    soft = reward_model(pairs, TRUTH[PAIRS], judge=bradley_terry).mean()
    assert torch.allclose(soft, expected(TRUTH * 0.7, CHANCE), atol=1e-12)


def test_smoothing_shrinks_towards_a_coin(to_the_end):
    wrong = 0.1
    link = partial(logistic, smoothing=wrong)
    (found,) = to_the_end(partial(expected, chance=CHANCE, link=link), torch.zeros(ITEMS).double())
    # chances (1 - 2e) P + e are of no one reward, so pair by pair: each has its own two items
    for chance in (0.2, 0.7):

        def loss(s, chance=chance):
            won, lost = (reward_model(s[None], label[None], link=link).sum() for label in (WON, LOST))
            return chance * won + (1 - chance) * lost

        (two,) = to_the_end(loss, torch.zeros(2).double())
        assert (two[0] - two[1]).item() == pytest.approx(
            torch.logit(torch.tensor((1 - 2 * wrong) * chance + wrong)).item(), abs=1e-6
        )
    assert differences(found).abs().sum() < differences(TRUTH).abs().sum()


@pytest.mark.parametrize("size", [2, 3])
def test_the_gradient_at_the_truth_is_zero_over_all_outcomes(size):
    """A group of completions, every pair of which is judged by itself: all 2^pairs outcomes."""
    score = TRUTH[:size].clone().requires_grad_()
    gaps = score.detach()[torch.combinations(torch.arange(size))]
    gradient, most = torch.zeros(size).double(), 0.0
    for outcome in product([0, 1], repeat=len(gaps)):
        chance = torch.stack(
            [torch.sigmoid((g[0] - g[1]) * (1 if o else -1)) for g, o in zip(gaps, outcome, strict=True)]
        ).prod()
        pairs = score[torch.combinations(torch.arange(size))]
        labels = torch.stack([WON if o else LOST for o in outcome])
        (slope,) = torch.autograd.grad(reward_model(pairs, labels).mean(), score)
        gradient += chance * slope
        most = max(most, slope.abs().max().item())
    assert gradient.abs().max() < 1e-12
    assert most > 0.05  # each outcome alone pulls


def test_a_constant_is_not_seen_without_centring():
    pairs, label = TRUTH[PAIRS], WON.expand(len(PAIRS), 2)
    assert torch.allclose(reward_model(pairs, label), reward_model(pairs + 3.7, label), atol=1e-12)
    assert not torch.allclose(
        reward_model(pairs, label, centring=0.01), reward_model(pairs + 3.7, label, centring=0.01)
    )


@pytest.mark.parametrize("size", [2, 4])
def test_centring_picks_the_one_of_mean_zero_and_moves_no_difference(to_the_end, size):
    reward = TRUTH[:size][None]

    def loss(s, c):
        return reward_model(s, reward, judge=bradley_terry, centring=c).sum()

    start = torch.full((1, size), 2.0).double()
    (plain,), (centred,) = (to_the_end(partial(loss, c=c), start) for c in (0.0, 0.3))
    assert centred.mean().abs() < 1e-6 < plain.mean().abs()
    assert torch.allclose(centred - centred.mean(), reward - reward.mean(), atol=1e-5)


def test_a_margin_has_to_be_exceeded():
    score, label = torch.tensor([[2.0, 0.5]]).double(), torch.tensor([[0.9, 0.2]]).double()
    at = reward_model(score, label, margins=True)
    assert at.item() == pytest.approx(-torch.sigmoid(torch.tensor(1.5 - 0.7)).log().item(), abs=1e-6)
    # the worse one is first: the same cost
    assert torch.allclose(at, reward_model(score.flip(1), label.flip(1), margins=True))


@pytest.mark.parametrize("options", [{}, {"judge": bradley_terry, "centring": 0.2}, {"margins": True}])
def test_gradcheck(options):
    label = torch.tensor([[1.0, 0.0, 0.3], [0.2, 0.2, 0.9]]).double()
    score = torch.tensor([[0.3, -1.0, 0.4], [1.2, 0.1, 0.0]]).double().requires_grad_()
    assert gradcheck(lambda s: reward_model(s, label, **options), (score,))


def test_one_completion_is_no_comparison():
    with pytest.raises(ValueError, match="reward_model: got 1 draw a prompt"):
        reward_model(torch.zeros(2, 1), torch.zeros(2, 1), judge=given)
