"""Comparisons and candidates: where they lead, for any draws of full support, and where a neighbour's belief fails.

Six atoms, all tuples of draws; minima by L-BFGS on the logits, to the end.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd.gradcheck import gradcheck

from klimb.exact import categorical, kl, log_prob, normalise, random_logits, tilt, tuples
from klimb.exact.linter import inspect, toy
from klimb.methods import method
from klimb.objectives import bco, chi_po, cpo, dpo, exo, info_nca, ipo, kto, nca, orpo, preference, simpo, wpo
from klimb.objectives.generators import divergence
from klimb.objectives.preference import (
    bradley_terry,
    given,
    hinge,
    log_ratio,
    logistic,
    ratio_and_log,
    squared,
)

ATOMS, BETA = 6, 0.5
GENERATOR = torch.Generator().manual_seed(90)
LOG_REF, OFF = (categorical(random_logits(ATOMS, generator=GENERATOR)) for _ in range(2))
REWARD = random_logits(ATOMS, generator=GENERATOR)
LOG_TARGET = tilt(LOG_REF, REWARD, BETA)
LOG_P = normalise(LOG_TARGET)
LAWS = {"reference": LOG_REF, "another": OFF}


def compared(log_pi, y, objective=dpo):
    return objective(log_pi[y], LOG_REF[y], REWARD[y], BETA)


def candidates(log_pi, y, objective):
    return objective(log_pi[y], LOG_TARGET[y], LOG_REF[y])


def expected(method, log_q, num_draws=2):
    outcomes, prob = tuples(log_q, num_draws)
    return lambda log_pi: (prob * method(log_pi, outcomes)).sum()


TO_THE_TARGET = {
    "dpo": compared,
    "dpo, by the squared distance to the chances": partial(
        compared,
        objective=partial(
            preference, link=lambda m: (1 - torch.sigmoid(m)).square()
        ),  # any proper score will do
    ),
    "exo": partial(candidates, objective=exo),
    "info_nca": partial(candidates, objective=info_nca),
}


@pytest.mark.parametrize("num_draws", [2, 3])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", TO_THE_TARGET)
def test_its_minimum_is_the_target_whoever_drew(name, law, num_draws, minimise):
    found = minimise(expected(TO_THE_TARGET[name], LAWS[law], num_draws))
    assert kl(found, LOG_P) < 1e-8
    assert kl(LOG_REF, LOG_P) > 0.1


@pytest.mark.parametrize("name", TO_THE_TARGET)
def test_at_the_target_every_group_is_silent(name):
    outcomes, _ = tuples(OFF, 3)
    log_p = LOG_P.clone().requires_grad_()
    (table,) = torch.autograd.grad(TO_THE_TARGET[name](log_p, outcomes).sum(), log_p)
    assert table.abs().max() < 1e-12
    log_ref = LOG_REF.clone().requires_grad_()
    (table,) = torch.autograd.grad(TO_THE_TARGET[name](log_ref, outcomes).sum(), log_ref)
    assert table.abs().max() > 1e-2


@pytest.mark.parametrize("law", LAWS)
def test_ipo_follows_the_chance_of_beating_the_law_that_drew(law, minimise):
    """Caveat: it is the target of another reward, which depends on whom a completion is compared with."""
    found = minimise(expected(partial(compared, objective=ipo), LAWS[law]))
    beats = (bradley_terry(REWARD[:, None] - REWARD) * LAWS[law].exp()).sum(1)
    assert kl(found, normalise(tilt(LOG_REF, beats, BETA))) < 1e-8
    other = LAWS["another" if law == "reference" else "reference"]
    beats_other = (bradley_terry(REWARD[:, None] - REWARD) * other.exp()).sum(1)
    assert kl(found, normalise(tilt(LOG_REF, beats_other, BETA))) > 1e-5
    assert kl(found, LOG_P) > 1e-2


def test_ipo_of_its_own_draws_stops_at_the_regularised_nash_equilibrium():
    """Where nash_md leads: pi = ref exp(P(y beats pi) / beta), the best answer to itself."""
    at = replace(toy(beta=0.3), reward=4 * toy().reward)
    log_ref, chances = log_prob(at.ref, at.space), bradley_terry(at.reward[:, None] - at.reward)
    log_pi = log_ref
    for _ in range(500):
        log_pi = normalise(tilt(log_ref, chances @ log_pi.exp(), at.beta))
    found = inspect(ipo, at, num_draws=2).fixed_point.log()
    assert kl(found, log_pi) < 1e-10
    fixed_opponent = normalise(tilt(log_ref, chances @ log_ref.exp(), at.beta))
    assert kl(found, fixed_opponent) > 1e-6
    assert kl(found, at.log_p) > 1e-2


@pytest.mark.parametrize(
    "name",
    [
        "reverse_kl",
        "forward_kl",
        "jensen_shannon",
        "chi2_forward",
        "squared_hellinger",
        "alpha(0.5)",
        "alpha(-0.5)",
        "skew_reverse_kl(0.3)",
        "generalized_js(0.2)",
    ],
)
def test_f_dpo_has_the_best_policy_under_that_divergence(name, minimise):
    """The same law as from the value itself, E r - beta D_f(pi||ref) made large without any comparison."""
    f = divergence(name)

    def worth(log_pi):
        return (log_pi.exp() * (REWARD - BETA * f.value(log_pi - LOG_REF))).sum()

    found = minimise(expected(partial(compared, objective=method(f"f_dpo({name})").objective), OFF))
    best = minimise(lambda log_pi: -worth(log_pi))
    assert kl(found, best) < 1e-8
    left = REWARD - BETA * f.slope(found - LOG_REF)
    assert left.max() - left.min() < 1e-5
    assert (kl(found, LOG_P) < 1e-8) == (name == "reverse_kl")
    if name != "reverse_kl":  # the caveat, and the mutant: as if it were dpo's
        assert kl(found, LOG_P) > 1e-4
        assert (REWARD - BETA * log_ratio(found - LOG_REF)).std() > 1e-2


def test_chi_po_has_the_best_policy_under_both_prices(minimise):
    found = minimise(expected(partial(compared, objective=chi_po), OFF))
    left = REWARD - BETA * ratio_and_log(found - LOG_REF)
    assert left.max() - left.min() < 1e-5
    assert kl(found, LOG_P) > 1e-3


@pytest.mark.parametrize("name", ["total_variation", "chi2_reverse", "skew_kl(0.1)", "alpha(2)"])
def test_f_dpo_of_a_slope_that_ends_at_zero_is_refused(name):
    with pytest.raises(ValueError, match="may leave completions out"):
        method(f"f_dpo({name})")


def test_what_is_refused_would_lead_elsewhere(minimise):
    """The best policy under chi-squared leaves a completion out; comparisons by its slope then end at another law."""
    beta, slope = 0.2, divergence("chi2_reverse").slope
    low, high = REWARD.min() - 1e3, REWARD.max()
    for _ in range(200):  # ref relu(1 + (r - nu) / (2 beta)), nu by bisection
        nu = (low + high) / 2
        best = LOG_REF.exp() * torch.relu(1 + (REWARD - nu) / (2 * beta))
        low, high = (nu, high) if best.sum() > 1 else (low, nu)
    assert (best == 0).any()

    def method_of(log_pi, y):
        return preference(log_pi[y], LOG_REF[y], REWARD[y], beta, score=slope)

    found = minimise(expected(method_of, OFF)).exp()
    assert (found - best).abs().max() > 1e-2


def test_labels_of_the_judge_average_to_its_chances():
    """Offline pairs with their labels and judged pairs have the same expectation, outcome by outcome."""
    outcomes, _ = tuples(OFF, 2)
    log_pi = categorical(random_logits(ATOMS, generator=GENERATOR))[outcomes]
    log_ref, reward = LOG_REF[outcomes], REWARD[outcomes]
    labels = torch.tensor([[1.0, 0.0]]).double().expand(len(outcomes), 2)
    first, second = (preference(log_pi, log_ref, wins, BETA, judge=given) for wins in (labels, 1 - labels))
    chance = bradley_terry(reward[:, 0] - reward[:, 1])
    judged = preference(log_pi, log_ref, reward, BETA)
    torch.testing.assert_close(chance * first + (1 - chance) * second, judged, rtol=0, atol=1e-12)
    assert (first - judged).abs().max() > 0.1


def test_labels_that_never_err_lead_to_certainty():
    """Caveat: with a margin of any size there is always a larger one that costs less."""
    method = partial(compared, objective=partial(preference, judge=given))
    loss = expected(method, OFF)
    steps = [loss(normalise(LOG_REF + scale * REWARD)).item() for scale in (1, 10, 100)]
    assert steps[0] > steps[1] > steps[2]
    judged = expected(compared, OFF)
    steps = [judged(normalise(LOG_REF + scale * REWARD)).item() for scale in (1, 2, 10)]
    assert steps[0] > steps[1] < steps[2]


@pytest.mark.parametrize("flipped", [0.1, 0.3])
def test_labels_wrong_at_a_known_rate_cancel_where_they_are_unbiased(flipped):
    margin = torch.linspace(-3, 3, 13).double()

    def mean(link):
        return (1 - flipped) * link(margin) + flipped * link(-margin)

    clean = logistic(margin)
    torch.testing.assert_close(
        mean(partial(logistic, smoothing=flipped, unbias=True)), clean, rtol=0, atol=1e-12
    )
    assert (mean(logistic) - clean).abs().max() > 0.1  # the mutant that believes them
    # smoothing's least cost is at the margin whose chance is the rate, and not at infinity
    believed = torch.logit(torch.tensor(1 - flipped, dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad(logistic(believed, smoothing=flipped), believed)
    assert abs(slope) < 1e-12


@pytest.mark.parametrize("link", [logistic, squared, partial(logistic, smoothing=0.2)])
def test_gradients_by_differences_and_dtype(link):
    log_pi = torch.randn(2, 4, generator=GENERATOR, dtype=torch.float64).requires_grad_()
    log_ref, reward = (torch.randn(2, 4, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
    assert gradcheck(lambda x: preference(x, log_ref, reward, BETA, link=link), log_pi)
    assert gradcheck(lambda x: exo(x, log_ref + reward, log_ref), log_pi)
    assert gradcheck(lambda x: info_nca(x, log_ref + reward, log_ref), log_pi)
    single = preference(log_pi.float(), log_ref.float(), reward.float(), BETA, link=link)
    assert single.dtype == torch.float32


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: dpo(x[:, :1], x[:, :1], x[:, :1], 1.0), "preference: got 1 draw a prompt"),
        (lambda x: exo(x[:, :1], x[:, :1], x[:, :1]), "exo: got 1 draw a prompt"),
        (lambda x: dpo(x, x, x - torch.inf, 1.0), "got reward = -inf"),
        (lambda x: info_nca(x, x - torch.inf, x), "log_target = -inf"),
        (lambda x: dpo(x, x[:1], x, 1.0), "log_ref of shape"),
    ],
)
def test_bad_numbers_are_refused(call, said):
    with pytest.raises(ValueError, match=said):
        call(torch.zeros(2, 3))


def test_a_hinge_is_silent_past_its_margin():
    margin = torch.tensor([0.5, 2.0], requires_grad=True)
    hinge(margin).sum().backward()
    assert margin.grad.tolist() == [-1.0, 0.0]


LENGTH = torch.tensor([1, 2, 3, 1, 2, 4])


@pytest.mark.parametrize("law", LAWS)
def test_wpo_has_dpos_minimum_where_that_makes_every_pair_silent(law, minimise):
    def weighted(log_pi, y):
        return wpo(log_pi[y], LOG_REF[y], REWARD[y], BETA, LENGTH[y])

    outcomes, prob = tuples(LAWS[law], 2)
    log_p = LOG_P.clone().requires_grad_()
    (slope,) = torch.autograd.grad((prob * weighted(log_p, outcomes)).sum(), log_p)
    assert slope.abs().max() < 1e-12
    log_ref = LOG_REF.clone().requires_grad_()
    weights, plain = (
        torch.autograd.grad((prob * method(log_ref, outcomes)).sum(), log_ref)[0]
        for method in (weighted, compared)
    )
    assert torch.cosine_similarity(weights, plain, dim=0) < 0.999  # the way there is another


def test_without_a_margin_simpo_tilts_by_length(minimise):
    def method(log_pi, y):
        return simpo(log_pi[y], REWARD[y], BETA, LENGTH[y], margin=0.0)

    found = minimise(expected(method, OFF))
    left = found / LENGTH - REWARD / BETA  # one constant: log pi = |y| (r / beta + c)
    assert left.max() - left.min() < 1e-5
    assert kl(found, LOG_P) > 1e-2


@pytest.mark.parametrize("objective", [cpo, orpo])
def test_without_a_reference_no_reference_matters(objective):
    log_pi = LOG_REF[None].clone().requires_grad_()
    numbers = {"beta": BETA} if objective is cpo else {"weight": 10.0}
    value = objective(log_pi, REWARD[None], lengths=LENGTH[None], **numbers)
    (slope,) = torch.autograd.grad(value.sum(), log_pi)
    assert slope[0, REWARD.argmax()] < 0 < slope[0, REWARD.argmin()]


def test_bco_with_log_z_for_its_middle_is_the_target_of_the_logit(minimise):
    chance = torch.sigmoid(REWARD - 0.3)
    log_z = torch.logsumexp(LOG_REF + torch.logit(chance) / BETA, 0)

    def loss(log_pi, middle):
        return (OFF.exp() * bco(log_pi[:, None], LOG_REF[:, None], chance[:, None], BETA, middle)).sum()

    found = minimise(lambda log_pi: loss(log_pi, -log_z))
    assert (
        kl(found, LOG_P) < 1e-8
    )  # logit of a logistic curve of the reward is the reward, but for a constant
    off = minimise(lambda log_pi: loss(log_pi, -log_z + 1))
    assert kl(off, LOG_P) > 1e-3


def test_kto_goes_to_certainty_of_what_is_good_more_often_than_bad():
    chance = torch.sigmoid(REWARD - REWARD.median() - 0.1)

    def loss(log_pi):
        zero = torch.tensor(0.0)
        return (OFF.exp() * kto(log_pi[:, None], LOG_REF[:, None], chance[:, None], BETA, zero)).sum()

    steps = [loss(LOG_REF + scale * (chance - 0.5)).item() for scale in (1, 10, 100, 1000)]
    assert steps == sorted(steps, reverse=True)
    with pytest.raises(ValueError, match="expected the chance that each completion is called good"):
        kto(LOG_REF[None], LOG_REF[None], REWARD[None], BETA, torch.tensor(0.0))


def test_nca_nears_the_target_as_the_group_grows(minimise):
    def away(num_draws):
        method = partial(candidates, objective=nca)
        return kl(minimise(expected(method, LOG_REF, num_draws)), LOG_P)

    two, four = away(2), away(4)
    assert 1e-4 < four < 0.7 * two
