"""Every f-divergence, settled over all tuples of draws: value, gradient, minimum, and what a wrong log Z does.

The generators are written here once more, in plain t as the papers have them: what is tested is compared with these.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch

from klimb.exact import (
    categorical,
    expectation,
    gradient_variance,
    kl,
    log_partition,
    mean,
    normalise,
    random_logits,
)
from klimb.objectives import coefficients, f_divergence, reverse_kl
from klimb.objectives.generators import FAMILIES, GENERATORS, divergence

ATOMS, DRAWS = 7, 3
GENERATOR = torch.Generator().manual_seed(90)
THETA, OTHER, LOG_TARGET = (random_logits(ATOMS, generator=GENERATOR) for _ in range(3))
LOG_TARGET = LOG_TARGET + 3.0  # well off normalised, so that a lost log Z shows
LOG_P, LOG_Z = normalise(LOG_TARGET), log_partition(LOG_TARGET)
ON, OFF = categorical(THETA), categorical(OTHER)
UNIFORM = torch.full((1, ATOMS), 1 / ATOMS, dtype=torch.float64).log()


def power(a):
    return lambda t: (t**a - 1) / (a * (a - 1))


def mixed(b):  # b KL(p||m) + (1 - b) KL(pi||m), divided by p
    return lambda t: -b * (b + (1 - b) * t).log() + (1 - b) * t * (t / (b + (1 - b) * t)).log()


PLAIN = {
    "reverse_kl": lambda t: t * t.log(),
    "forward_kl": lambda t: -t.log(),
    "jensen_shannon": lambda t: (t * t.log() - (t + 1) * ((t + 1) / 2).log()) / 2,
    "total_variation": lambda t: (t - 1).abs() / 2,
    "chi2_reverse": lambda t: t**2 - 1,
    "chi2_forward": lambda t: 1 / t - 1,
    "squared_hellinger": lambda t: (1 - t.sqrt()) ** 2,
    "alpha(-0.7)": power(-0.7),
    "alpha(0.3)": power(0.3),
    "alpha(2.5)": power(2.5),
    "skew_kl(0.1)": lambda t: -(0.1 + 0.9 * t).log(),
    "skew_reverse_kl(0.1)": lambda t: t * (t / (0.1 * t + 0.9)).log(),
    "generalized_js(0.2)": mixed(0.2),
}
NAMES = list(PLAIN)
POWERS = {  # f' is t^(a - 1) and a constant
    "reverse_kl": 1.0,
    "forward_kl": 0.0,
    "chi2_reverse": 2.0,
    "chi2_forward": -1.0,
    "squared_hellinger": 0.5,
    "alpha(-0.7)": -0.7,
    "alpha(0.3)": 0.3,
    "alpha(2.5)": 2.5,
}


def of(plain, log_pi, log_p=LOG_P):
    """D_f by definition: E_p f(pi / p)."""
    return (log_p.exp() * plain((log_pi - log_p).exp())).sum()


def objective(f, **options):
    """As a function of [M, G] numbers, with the true log Z if none is given."""

    def call(log_pi, log_target, log_q=None, log_z=LOG_Z):
        return f_divergence(log_pi, log_target, log_z.expand(len(log_pi)), log_q, f=f, **options)

    return call


def expected(function, log_q, num_draws=DRAWS):
    """Value and gradient of function(log_pi [M, G], log_target [M, G], log_q [M, G]) over all tuples of q."""
    theta = THETA.clone().requires_grad_()
    log_pi = categorical(theta)
    value, (gradient,) = expectation(
        lambda y: function(log_pi[y], LOG_TARGET[y], log_q[y]), log_q, num_draws, parameters=[theta]
    )
    return value, gradient


def enumerated(f, theta, log_z=LOG_Z, log_target=LOG_TARGET):
    return f_divergence(
        categorical(theta)[None], log_target[None], log_z.reshape(1), UNIFORM, f=f, baseline=None
    )


@pytest.fixture(scope="module")
def truth(numeric_gradient):
    return {
        name: numeric_gradient(lambda x, f=f: of(f, categorical(x)), THETA, 1e-3) for name, f in PLAIN.items()
    }


def test_all_of_them_are_here():
    assert set(GENERATORS) <= set(PLAIN)
    assert {name.split("(")[0] for name in PLAIN} - set(GENERATORS) == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_fresh_draws_give_value_and_gradient_without_bias(name, truth):
    value, gradient = expected(lambda pi, target, _: objective(name)(pi, target), ON)
    assert abs(value - of(PLAIN[name], ON)) < 1e-12
    assert (gradient - truth[name]).abs().max() < 1e-7
    assert truth[name].abs().max() > 1e-2


@pytest.mark.parametrize("num_draws", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_so_do_weighted_draws_of_any_law(name, num_draws, truth):
    options = {"baseline": None} if num_draws == 1 else {}
    value, gradient = expected(objective(name, **options), OFF, num_draws)
    assert abs(value - of(PLAIN[name], ON)) < 1e-12
    assert (gradient - truth[name]).abs().max() < 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_enumeration_is_exact(name, truth):
    theta = THETA.clone().requires_grad_()
    value = enumerated(name, theta)
    (gradient,) = torch.autograd.grad(value.sum(), theta)
    assert abs(value.item() - of(PLAIN[name], ON)) < 1e-12
    assert (gradient - truth[name]).abs().max() < 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_mutants_are_seen(name, truth):
    """A baseline with the draw in it, a weight left out, f in the place of f'."""

    def self_mean(x):
        return x.mean(1, keepdim=True).expand_as(x)

    _, own = expected(lambda pi, target, _: objective(name, baseline=self_mean)(pi, target), ON)
    assert (own - (DRAWS - 1) / DRAWS * truth[name]).abs().max() < 1e-7  # short by one draw in G
    assert (own - truth[name]).abs().max() > 3e-3
    _, unweighted = expected(lambda pi, target, _: objective(name)(pi, target), OFF)
    assert (unweighted - truth[name]).abs().max() > 1e-2
    f = divergence(name)
    mutant = replace(f, slope=lambda x: torch.exp(x) * f.value(x))
    _, not_derived = expected(lambda pi, target, _: objective(mutant)(pi, target), ON)
    assert (not_derived - truth[name]).abs().max() > 1e-2


@pytest.mark.parametrize("log_q", [None, "other"])
@pytest.mark.parametrize("options", [{}, {"clip": 0.7}, {"baseline": None}])
def test_reverse_kl_is_reverse_kl_draw_by_draw(log_q, options):
    generator = torch.Generator().manual_seed(91)
    log_pi, log_target, law = (random_logits(500, 4, generator=generator, scale=3.0) for _ in range(3))
    log_q = None if log_q is None else law
    # without a baseline, the constant log Z makes a difference to a table, though none to its mean
    log_z = 0.0 if "baseline" in options else 5.0
    log_z = torch.full((500,), log_z, dtype=torch.float64)
    numbers = {"log_pi": log_pi, "log_target": log_target, "log_q": log_q}
    left_value, left = coefficients(f_divergence, **numbers, log_z=log_z, f="reverse_kl", **options)
    right_value, right = coefficients(reverse_kl, **numbers, **options)
    scale = right["log_pi"].abs().max()
    assert (left["log_pi"] - right["log_pi"]).abs().max() < 1e-13 * scale
    if "clip" not in options:  # reverse_kl clips its value too
        assert (left_value - log_z - right_value).abs().max() < 1e-13 * scale


def test_known_divergences_are_scipys():
    pi, p = ON.exp().numpy(), LOG_P.exp().numpy()
    middle, skewed = (pi + p) / 2, 0.1 * p + 0.9 * pi
    known = {
        "reverse_kl": scipy.stats.entropy(pi, p),
        "forward_kl": scipy.stats.entropy(p, pi),
        "jensen_shannon": scipy.spatial.distance.jensenshannon(pi, p, base=math.e) ** 2,
        "total_variation": scipy.spatial.distance.cityblock(pi, p) / 2,
        "squared_hellinger": scipy.spatial.distance.euclidean(np.sqrt(pi), np.sqrt(p)) ** 2,
        "chi2_reverse": scipy.stats.chisquare(pi, p).statistic,
        "chi2_forward": scipy.stats.chisquare(p, pi).statistic,
        "skew_kl(0.1)": scipy.stats.entropy(p, skewed),
        "skew_reverse_kl(0.9)": scipy.stats.entropy(pi, skewed),
        "generalized_js(0.1)": 0.1 * scipy.stats.entropy(p, skewed) + 0.9 * scipy.stats.entropy(pi, skewed),
        "generalized_js(0.5)": (scipy.stats.entropy(p, middle) + scipy.stats.entropy(pi, middle)) / 2,
    }
    for name, value in known.items():
        assert abs(enumerated(name, THETA).item() - value) < 1e-12, name


def test_the_families_meet_their_neighbours():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    for name, factor, other in [
        ("chi2_reverse", 2, "alpha(2)"),
        ("chi2_forward", 2, "alpha(-1)"),
        ("squared_hellinger", 0.5, "alpha(0.5)"),
        ("jensen_shannon", 1, "generalized_js(0.5)"),
    ]:
        f, g = divergence(name), divergence(other)
        torch.testing.assert_close(f.slope(x), factor * g.slope(x), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(f.value(x), factor * g.value(x), rtol=1e-13, atol=1e-13)
        assert f.at_zero == pytest.approx(factor * g.at_zero)
        assert f.at_infinity == pytest.approx(factor * g.at_infinity)
    for limit, factor, near in [
        ("forward_kl", 1, "alpha(-1e-7)"),
        ("reverse_kl", 1, "alpha(1.0000001)"),
        ("forward_kl", 1, "skew_kl(1e-8)"),
        ("reverse_kl", 1, "skew_reverse_kl(1e-8)"),
        ("forward_kl", 1e-7, "generalized_js(1e-7)"),
        ("reverse_kl", 1e-7, "generalized_js(0.9999999)"),
    ]:
        torch.testing.assert_close(
            factor * divergence(limit).slope(x), divergence(near).slope(x), rtol=1e-5, atol=2e-15
        )


@pytest.mark.parametrize("name", NAMES)
def test_slope_value_and_ends_belong_together(name):
    """f' = h + dh/dx up to a constant; f(0) and f'(inf) are the limits; both signs are right away from t = 1."""
    f = divergence(name)
    x = torch.linspace(-6, 6, 25, dtype=torch.float64).requires_grad_()  # t = 1 is one of them
    (derivative,) = torch.autograd.grad(f.value(x).sum(), x)
    constant = f.slope(x) - f.value(x) - derivative
    away = x.detach().abs() > 0
    torch.testing.assert_close(constant[away], constant[away][:1].expand(24), rtol=0, atol=1e-9)
    assert abs(f.slope(x)[~away].item()) < 1e-15
    assert abs(f.value(x)[~away].item()) < 1e-15
    assert (f.slope(x).diff() >= 0).all()
    shift = constant[away][0].detach()  # to f'(1) = 0, where f is not negative
    t = x.detach().exp()
    plain = t * f.value(x.detach()) + shift * (t - 1)
    assert plain.min() > -1e-12
    reference = PLAIN[name](t) - _slope_at_one(PLAIN[name]) * (t - 1)
    torch.testing.assert_close(plain, reference, rtol=1e-9, atol=1e-10)
    if math.isfinite(f.at_zero):
        tiny = torch.tensor([-60.0], dtype=torch.float64)
        assert abs((tiny.exp() * f.value(tiny) - shift).item() - f.at_zero) < 1e-6
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    assert f.slope(infinity).item() == pytest.approx(f.at_infinity, rel=1e-12)
    assert f.value(infinity).item() + shift.item() == pytest.approx(f.at_infinity, rel=1e-12)


def _slope_at_one(plain):
    one = torch.ones(1, dtype=torch.float64)
    return (plain(one + 1e-6) - plain(one - 1e-6)).item() / 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_no_variance_at_the_target(name):
    """Whoever drew; without a baseline for the true log Z, with leave-one-out for any."""
    for law in (LOG_P, OFF):
        for options, log_z in [({}, LOG_Z), ({}, LOG_Z + 0.7), ({"baseline": None}, LOG_Z)]:
            if name == "total_variation" and log_z is LOG_Z:
                continue  # its slope is a sign: at t = 1, rounding decides (below)
            at_p = _variance(name, law, LOG_P, log_z, **options)
            assert at_p < 1e-20
    assert _variance(name, OFF, ON, LOG_Z) > 1e-4  # the measure itself is not blind


def test_only_total_variation_stays_noisy_near_the_target():
    near = categorical(LOG_P + 1e-4 * OTHER)
    assert _variance("total_variation", LOG_P, near, LOG_Z) > 1e-2
    for name in NAMES:
        if name != "total_variation":
            assert _variance(name, LOG_P, near, LOG_Z) < 1e-6


def _variance(name, law, at, log_z, **options):
    theta = at.clone().requires_grad_()
    function = objective(name, **options)

    def estimator(y):
        return function(categorical(theta)[y], LOG_TARGET[y], law[y], log_z)

    return gradient_variance(estimator, law, 2, parameter=theta).item()


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jensen_shannon", "squared_hellinger"])
def test_a_true_log_z_is_a_baseline_and_leave_one_out_is_safe_against_a_wrong_one(name):
    """Which is why there is a choice. Far off, and with draws of the target, the others' slopes are mostly noise."""
    near = normalise(LOG_P + 0.2 * OTHER)
    for law in (near, OFF):
        assert _variance(name, law, near, LOG_Z, baseline=None) < _variance(name, law, near, LOG_Z)
        assert _variance(name, law, near, LOG_Z + 0.7, baseline=None) > _variance(
            name, law, near, LOG_Z + 0.7
        )
    lacking = normalise(LOG_P - 4.0 * torch.nn.functional.one_hot(LOG_P.argmax(), ATOMS))
    times = 200 if name in ("forward_kl", "squared_hellinger") else 10
    assert _variance(name, LOG_P, lacking, LOG_Z) > times * _variance(
        name, LOG_P, lacking, LOG_Z, baseline=None
    )


def test_nor_has_the_value_any_there():
    draws = torch.arange(ATOMS)[None]
    for name in NAMES:
        value = objective(name)(LOG_P[draws], LOG_TARGET[draws], OFF[draws])
        assert value.abs().max() < 1e-13


@pytest.fixture
def minimise(to_the_end):
    """The law at which loss(theta) is least."""

    def found(loss, start):
        (theta,) = to_the_end(lambda theta: loss(theta).sum(), start)
        return categorical(theta)

    return found


def descend(loss, start, *, step=1.0, decay=0.98, num_steps=1500):
    """Normalised subgradient steps that shrink: for a minimum that is a kink."""
    theta = start.clone()
    for _ in range(num_steps):
        theta.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(theta).sum(), theta)
        theta = theta.detach() - step * gradient / gradient.norm().clamp_min(1e-30)
        step = step * decay
    return categorical(theta)


@pytest.mark.parametrize("name", NAMES)
def test_the_minimum_is_the_target(name, minimise):
    start = THETA * 0.5
    find = descend if name == "total_variation" else minimise
    found = find(lambda theta: enumerated(name, theta), start)
    assert kl(found, LOG_P) < 1e-8
    assert kl(categorical(start), LOG_P) > 0.1


@pytest.mark.parametrize("c", [-0.8, 1.3])
@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_log_z_is_another_generator(name, c, truth, numeric_gradient):
    """e^-c f(e^c t): for powers only another length (none for KL(pi||p)), for the others another direction."""

    def wrong(pi, target, _):
        return objective(name)(pi, target, None, LOG_Z + c)

    _, gradient = expected(wrong, ON)

    def rescaled(t):
        return math.exp(-c) * PLAIN[name](math.exp(c) * t)

    assert (
        gradient - numeric_gradient(lambda x: of(rescaled, categorical(x)), THETA, 1e-3)
    ).abs().max() < 1e-7
    cosine = torch.nn.functional.cosine_similarity(gradient, truth[name], dim=0)
    if name in POWERS:
        assert abs(cosine - 1) < 1e-9
        assert abs(gradient.norm() / truth[name].norm() / math.exp((POWERS[name] - 1) * c) - 1) < 1e-9
    else:
        assert cosine < 1 - 5e-4


@pytest.mark.parametrize("name", [name for name in NAMES if name != "total_variation"])
def test_and_still_has_its_minimum_at_the_target(name, minimise):
    """By Jensen: the rescaled f is convex too, so E_p f_c(t) >= f_c(1). Another direction is not another aim."""
    found = minimise(lambda theta: enumerated(name, theta, LOG_Z + 0.8), THETA * 0.5)
    assert kl(found, LOG_P) < 1e-8


def test_but_total_variation_stops_where_all_ratios_are_on_one_side():
    c = 0.8
    # half way to p from the policy: no t below e^-c, and nothing more to gain
    mixture = (0.5 * LOG_P.exp() + 0.5 * ON.exp()).log()
    assert (mixture - LOG_P).min() > -c
    theta = mixture.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(enumerated("total_variation", theta, LOG_Z + c).sum(), theta)
    assert gradient.abs().max() < 1e-15
    assert kl(mixture, LOG_P) > 1e-2
    theta = mixture.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(enumerated("total_variation", theta).sum(), theta)
    assert gradient.abs().max() > 1e-2  # with the true log Z it goes on


FORBIDDEN = torch.tensor([False, True, False, False, False, True, False])
HARD = LOG_TARGET.masked_fill(FORBIDDEN, -torch.inf)
HARD_P, HARD_Z = normalise(HARD), log_partition(HARD)


@pytest.mark.parametrize("name", [name for name in NAMES if divergence(name).takes_forbidden])
def test_forbidden_outcomes_cost_what_the_policy_puts_there(name, numeric_gradient):
    f, plain, allowed = divergence(name), PLAIN[name], ~FORBIDDEN

    def exact(x):  # the usual sum where p > 0, and f'(inf) pi where not; f'(1) shifted to 0
        log_pi = categorical(x)
        inside = of(plain, log_pi[allowed], HARD_P[allowed])
        inside = inside - _slope_at_one(plain) * (log_pi[allowed].exp().sum() - 1)
        return inside + f.at_infinity * log_pi[FORBIDDEN].exp().sum()

    theta = THETA.clone().requires_grad_()
    value = enumerated(name, theta, HARD_Z, HARD)
    (gradient,) = torch.autograd.grad(value.sum(), theta)
    assert abs(value.item() - exact(THETA)) < 1e-9
    assert (gradient - numeric_gradient(exact, THETA, 1e-3)).abs().max() < 1e-7
    log_pi = categorical(theta)
    _, (gradient_of_draws,) = expectation(
        lambda y: objective(name)(log_pi[y], HARD[y], OFF[y], HARD_Z), OFF, 2, parameters=[theta]
    )
    assert (gradient_of_draws - gradient).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon", "squared_hellinger", "alpha(0.3)"])
def test_and_the_minimum_leaves_them_empty(name, minimise):
    found = minimise(lambda theta: enumerated(name, theta, HARD_Z, HARD), THETA * 0.5)
    assert kl(HARD_P, found) < 1e-8
    assert mean(found, FORBIDDEN.double()) < 1e-8
