"""Divergences by plain sums: against scipy, against each other, their bounds, and their zeros."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.special import rel_entr

from klimb.exact import kl
from klimb.exact.divergences import (
    all_divergences,
    alpha_divergence,
    asymmetry,
    chi_squared,
    entropy,
    generalized_jensen_shannon,
    jensen_shannon,
    renyi,
    skew_kl,
    squared_hellinger,
    total_variation,
)
from klimb.exact.problem import law

WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=5, max_size=5).filter(any)


def normal(weights):
    values = torch.tensor(weights, dtype=torch.float64)
    return (values / values.sum()).log()


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, WEIGHTS)
def test_kl_and_jensen_shannon_are_scipys(a, b):
    log_a, log_b = normal(a), normal(b)
    p, q = log_a.exp().numpy(), log_b.exp().numpy()
    assert kl(log_a, log_b).item() == pytest.approx(rel_entr(p, q).sum(), abs=1e-12)
    # scipy returns the root, and takes it of a rounded zero: compared before the root
    theirs = (rel_entr(p, (p + q) / 2).sum() + rel_entr(q, (p + q) / 2).sum()) / 2
    assert jensen_shannon(log_a, log_b).item() == pytest.approx(theirs, abs=1e-12)
    if theirs > 1e-6:
        assert jensen_shannon(log_a, log_b).sqrt().item() == pytest.approx(jensenshannon(p, q), abs=1e-10)


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, WEIGHTS, st.floats(0.01, 0.99))
def test_inequalities_between_them(a, b, share):
    log_a, log_b = normal(a), normal(b)
    tv, hellinger = total_variation(log_a, log_b).item(), squared_hellinger(log_a, log_b).item()
    away, slack = kl(log_a, log_b).item(), 1e-12
    assert 2 * tv**2 <= away + slack  # Pinsker
    assert tv <= math.sqrt(max(0.0, 1 - math.exp(-away))) + 1e-7  # Bretagnolle and Huber
    assert hellinger / 2 <= tv + slack  # Le Cam
    assert tv <= math.sqrt(hellinger * (1 - hellinger / 4)) + 1e-7
    assert hellinger <= away + slack
    assert away <= math.log1p(chi_squared(log_a, log_b).item()) + 1e-10
    assert jensen_shannon(log_a, log_b).item() <= math.log(2) * tv + slack
    assert skew_kl(log_a, log_b, share=share).item() <= min(-math.log(share), (1 - share) * away) + slack
    mixed = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert generalized_jensen_shannon(log_a, log_b, share=share).item() <= mixed + slack
    for row in all_divergences(log_a, log_b, share=share):
        assert -1e-12 <= row.forward <= row.most * (1 + 1e-12) + slack
        assert row.forward == pytest.approx(row.backward, abs=1e-12) or not row.symmetric


def test_pinskers_constant_is_sharp():
    near = [torch.tensor([0.5 + e, 0.5 - e], dtype=torch.float64).log() for e in (1e-3, -1e-3)]
    away, tv = kl(*near).item(), total_variation(*near).item()
    assert 2 * tv**2 <= away
    assert 2.01 * tv**2 > away  # mutant


@settings(max_examples=50, deadline=None)
@given(WEIGHTS, WEIGHTS)
def test_the_alpha_family_holds_the_others(a, b):
    log_a, log_b = normal(a), normal(b)

    def alpha(order, x=log_a, y=log_b):
        return alpha_divergence(x, y, alpha=order).item()

    assert alpha(1.0) == kl(log_a, log_b).item()
    assert alpha(0.0) == kl(log_b, log_a).item()
    assert alpha(0.5) == pytest.approx(2 * squared_hellinger(log_a, log_b).item(), abs=1e-12)
    chi = chi_squared(log_a, log_b).item()
    assert alpha(2.0) == pytest.approx(chi / 2, rel=1e-10, abs=1e-12)
    assert alpha(-1.0) == pytest.approx(chi_squared(log_b, log_a).item() / 2, rel=1e-10, abs=1e-12)
    assert alpha(0.3) == pytest.approx(alpha(0.7, log_b, log_a), abs=1e-12)  # exchanging the laws
    assert renyi(log_a, log_b, alpha=2.0).expm1().item() == pytest.approx(chi, rel=1e-10, abs=1e-12)
    orders = [renyi(log_a, log_b, alpha=order).item() for order in (0.25, 0.5, 1.0, 2.0, 4.0)]
    assert all(x <= y + 1e-12 for x, y in itertools.pairwise(orders))
    if kl(log_a, log_b) < 20:
        assert alpha(1 + 1e-6) == pytest.approx(alpha(1.0), abs=1e-3)


def test_values_known_by_hand():
    p, q = (torch.tensor(x, dtype=torch.float64).log() for x in ([0.5, 0.5], [0.8, 0.2]))
    known = {
        "KL": (math.log(1.25), 0.8 * math.log(1.6) + 0.2 * math.log(0.4)),
        "total variation": (0.3, 0.3),
        "chi-squared": (0.09 / 0.8 + 0.09 / 0.2, 0.36),
        "squared Hellinger": (2 - 2 * (math.sqrt(0.4) + math.sqrt(0.1)),) * 2,
        "Rényi 2": (math.log(0.25 / 0.8 + 0.25 / 0.2), math.log(0.64 / 0.5 + 0.04 / 0.5)),
    }
    found = {row.name: (row.forward, row.backward) for row in all_divergences(p, q)}
    for name, pair in known.items():
        assert found[name] == pytest.approx(pair, abs=1e-12), name


def test_what_one_law_lacks_is_infinite_exactly_where_it_should_be():
    two, one, other = (law(x, name="x") for x in ([0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]))
    found = {row.name: (row.forward, row.backward) for row in all_divergences(two, one)}
    infinite = {name: tuple(map(math.isinf, pair)) for name, pair in found.items()}
    assert {name for name, pair in infinite.items() if pair == (True, False)} == {
        "KL",
        "chi-squared",
        "alpha 2",
        "Rényi 2",
    }
    assert not any(pair[1] for pair in infinite.values())
    assert not any(math.isnan(x) for pair in found.values() for x in pair)
    apart = {row.name: (row.forward, row.most) for row in all_divergences(one, other)}
    for name in ("Jensen-Shannon", "total variation", "squared Hellinger", "alpha 0.5", "skew KL 0.1"):
        assert apart[name][0] == pytest.approx(apart[name][1], abs=1e-12), name
    assert entropy(one).item() == 0
    assert entropy(two).item() == pytest.approx(math.log(2), abs=1e-12)


def test_asymmetry_says_which_way_q_errs():
    two, one = law([0.5, 0.5, 0.0], name="x"), law([0.9, 0.1, 0.0], name="x")
    wide = law([0.3, 0.3, 0.4], name="x")
    assert [asymmetry(*pair).verdict for pair in [(two, two), (two, one), (two, wide), (wide, two)]] == [
        "same",
        "misses",
        "covers",
        "misses",
    ]
    found = asymmetry(two, one)
    assert (found.missed, found.extra) == (pytest.approx(0.5), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_and_dtypes_are_kept(dtype):
    logs = torch.log_softmax(
        torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0), dtype=dtype), -1
    )
    for divergence in (jensen_shannon, total_variation, squared_hellinger, chi_squared):
        value = divergence(*logs)
        assert (value.shape, value.dtype) == ((4,), dtype)
        assert value[1].item() == pytest.approx(divergence(logs[0, 1], logs[1, 1]).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: renyi(p, p, alpha=0.0), "above 0"),
        (lambda p: alpha_divergence(p, p, alpha=math.inf), "finite"),
        (lambda p: skew_kl(p, p, share=1.0), "strictly between"),
        (lambda p: all_divergences(p, p[:1]), "same outcomes"),
    ],
)
def test_outside_the_domain(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.tensor([0.5, 0.5]).log())
