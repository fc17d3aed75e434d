"""f_divergence for any numbers: its table, its derivative, far-off draws, dtypes, and what it refuses by name."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.gradcheck import GradcheckError, gradcheck

from klimb.exact import categorical, draw, kl, normalise, random_logits
from klimb.numbers.baselines import leave_one_out
from klimb.objectives import coefficients, f_divergence
from klimb.objectives.bind import bind
from klimb.objectives.generators import (
    Divergence,
    alpha,
    divergence,
    generalized_js,
    skew_kl,
    skew_reverse_kl,
)

P, G = 3, 5
SMOOTH = ["reverse_kl", "forward_kl", "jensen_shannon", "chi2_reverse", "chi2_forward", "squared_hellinger"]
NAMES = [
    *SMOOTH,
    "total_variation",
    "alpha(0.3)",
    "skew_kl(0.1)",
    "skew_reverse_kl(0.1)",
    "generalized_js(0.2)",
]
BOUNDED = ["jensen_shannon", "total_variation", "skew_kl(0.1)", "skew_reverse_kl(0.1)", "generalized_js(0.2)"]
some = settings(deadline=None, max_examples=60, derandomize=True)
rows = st.lists(st.floats(-4, 4), min_size=8, max_size=8).map(
    lambda x: torch.tensor(x, dtype=torch.float64).reshape(2, 4)
)


def numbers(seed, *, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    log_z = random_logits(P, generator=generator, scale=0.3)
    return {
        "log_pi": random_logits(P, G, generator=generator, scale=scale),
        "log_target": random_logits(P, G, generator=generator, scale=scale),
        "log_q": random_logits(P, G, generator=generator, scale=0.5 * scale),
        "log_z": log_z,
    }


@pytest.mark.parametrize("clip", [None, 0.4])
@pytest.mark.parametrize("baseline", [None, leave_one_out])
@pytest.mark.parametrize("name", NAMES)
def test_the_table(name, baseline, clip):
    given_ = numbers(0)
    value, table = coefficients(f_divergence, **given_, f=name, baseline=baseline, clip=clip)
    f = divergence(name)
    x = given_["log_pi"] - given_["log_target"] + given_["log_z"][:, None]
    weight = (given_["log_pi"] - given_["log_q"]).exp()
    h, slope = f.value(x), f.slope(x)
    level, b = (0 * x, 0 * x) if baseline is None else (baseline(h), baseline(slope))
    advantage = slope - b if clip is None else (slope - b).clamp(-clip, clip)
    torch.testing.assert_close(table["log_pi"], weight * advantage / G, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(value, (weight * (h - level) + level).mean(1), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck_enumerated(name):
    """Over all outcomes the score function is the derivative; over draws it is so only on average."""
    given_ = numbers(1)
    theta = given_["log_pi"].requires_grad_()
    log_target = given_["log_target"]
    uniform = torch.full((P, G), 1 / G, dtype=torch.float64).log()
    log_z = torch.logsumexp(log_target, 1)
    assert gradcheck(
        lambda x: f_divergence(categorical(x), log_target, log_z, uniform, f=name, baseline=None), theta
    )
    with pytest.raises(GradcheckError):
        gradcheck(lambda x: f_divergence(x, log_target, log_z, f=name), theta)


@pytest.mark.parametrize("name", NAMES)
def test_fresh_draws_weigh_exactly_one(name):
    given_ = numbers(2)
    log_q = given_.pop("log_q")
    assert not torch.equal(log_q, given_["log_pi"])
    none = coefficients(f_divergence, **given_, f=name)
    same = coefficients(f_divergence, **given_, log_q=given_["log_pi"].clone(), f=name)
    assert torch.equal(none[0], same[0])
    assert torch.equal(none[1]["log_pi"], same[1]["log_pi"])
    f = divergence(name)
    slope = f.slope(given_["log_pi"] - given_["log_target"] + given_["log_z"][:, None])
    torch.testing.assert_close(none[1]["log_pi"] * G, slope - leave_one_out(slope), rtol=1e-15, atol=1e-15)


def test_nothing_flows_into_the_fixed_numbers():
    given_ = {name: x.requires_grad_() for name, x in numbers(3).items()}
    f_divergence(**given_, f="jensen_shannon").sum().backward()
    assert given_["log_pi"].grad is not None
    assert all(given_[name].grad is None for name in ("log_target", "log_q", "log_z"))


@some
@given(rows, rows, st.floats(-50, 50))
def test_a_constant_in_the_reward_changes_nothing(log_pi, log_target, c):
    """It goes into log Z, and there it cancels; without that it would be a wrong log Z."""
    log_z = torch.tensor([0.3, -0.2], dtype=torch.float64)
    for name in NAMES:
        if name == "total_variation" and (log_pi - log_target + log_z[:, None]).abs().min() < 1e-9:
            continue  # a sign, and rounding decides it
        value, table = coefficients(f_divergence, log_pi=log_pi, log_target=log_target, log_z=log_z, f=name)
        moved, again = coefficients(
            f_divergence, log_pi=log_pi, log_target=log_target + c, log_z=log_z + c, f=name
        )
        torch.testing.assert_close(moved, value, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(again["log_pi"], table["log_pi"], rtol=1e-10, atol=1e-10)


@some
@given(rows, rows)
def test_on_policy_coefficients_sum_to_zero(log_pi, log_target):
    for name in NAMES:
        _, table = coefficients(
            f_divergence, log_pi=log_pi, log_target=log_target, log_z=torch.zeros(2).double(), f=name
        )
        size = table["log_pi"].abs().sum(1)
        assert (table["log_pi"].sum(1).abs() <= 1e-14 * (1 + size)).all()


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_near_float64_and_stays_float32(name):
    given_ = numbers(4, scale=2.0)
    wide = coefficients(f_divergence, **given_, f=name)
    narrow = coefficients(f_divergence, **{k: x.float() for k, x in given_.items()}, f=name)
    for left, right in ((wide[0], narrow[0]), (wide[1]["log_pi"], narrow[1]["log_pi"])):
        assert right.dtype == torch.float32
        torch.testing.assert_close(right.double(), left, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [100.0, 300.0, 650.0])
@pytest.mark.parametrize("name", NAMES)
def test_far_draws(name, far, dtype):
    """Enumerated laws that all but miss each other: finite wherever the divergence is, and its value is right."""
    log_p = torch.log_softmax(torch.tensor([[0.0, -0.5, -far]], dtype=dtype), 1)
    log_pi = torch.log_softmax(torch.tensor([[-0.5, -far, 0.0]], dtype=dtype), 1)
    uniform = torch.full((1, 3), -math.log(3), dtype=dtype)
    numbers_ = {"log_pi": log_pi, "log_target": log_p, "log_z": torch.zeros(1, dtype=dtype), "log_q": uniform}
    if (name.startswith("chi2") and dtype == torch.float32) or (name == "chi2_forward" and far > 600):
        with pytest.raises(
            ValueError, match=rf"{name} is too large for float.*log\(pi/p\) = .*jensen_shannon"
        ):
            f_divergence(**numbers_, f=name, baseline=None)
        return
    value, table = coefficients(f_divergence, **numbers_, f=name, baseline=None)
    assert value.dtype == dtype
    assert value.isfinite().all()
    assert table["log_pi"].isfinite().all()
    x = log_pi.double() - log_p.double()
    if name == "reverse_kl":
        expected = (log_pi.double().exp() * x).sum()
    elif name == "forward_kl":
        expected = -(log_p.double().exp() * x).sum()
    elif name == "total_variation":
        expected = (log_pi.double().exp() - log_p.double().exp()).abs().sum() / 2
    elif name == "squared_hellinger":
        expected = ((log_pi.double() / 2).exp() - (log_p.double() / 2).exp()).square().sum()
    elif name == "jensen_shannon":
        log_m = torch.logaddexp(log_pi.double(), log_p.double()) - math.log(2)
        expected = (kl(log_pi.double(), log_m) + kl(log_p.double(), log_m)).sum() / 2
    elif name in ("chi2_reverse", "chi2_forward"):
        expected = (2 * x if name == "chi2_reverse" else -2 * x).add(
            log_p.double() if name == "chi2_reverse" else log_pi.double()
        )
        expected = expected.exp().sum() - 1
    else:
        return
    assert abs(value.item() / expected.item() - 1) < (1e-5 if dtype == torch.float32 else 1e-12)


def test_a_fresh_draw_that_is_too_far_is_an_error_and_not_an_infinity():
    """e^100 does not fit a float32: forward_kl says so, jensen_shannon is bounded there by the draw's own nats."""
    log_pi, log_target = torch.tensor([[-100.0, -1.0]]), torch.zeros(1, 2)
    with pytest.raises(
        ValueError, match=r"forward_kl is too large for float32 with a draw at log\(pi/p\) = -100"
    ):
        f_divergence(log_pi, log_target, torch.zeros(1), f="forward_kl")
    value, table = coefficients(
        f_divergence, log_pi=log_pi, log_target=log_target, log_z=torch.zeros(1), f="jensen_shannon"
    )
    assert value.abs().max() < 100
    assert table["log_pi"].abs().max() < 100


@pytest.mark.parametrize("far", [-1e4, 1e4, math.inf])
@pytest.mark.parametrize("name", BOUNDED)
def test_bounded_generators_take_any_ratio(name, far):
    f = divergence(name)
    x = torch.tensor([far], dtype=torch.float64)
    assert f.slope(x).isfinite().all()
    assert f.value(x).isfinite().all()


@pytest.mark.parametrize("name", ["reverse_kl", "chi2_reverse", "alpha(1.5)"])
def test_a_forbidden_draw_is_refused_with_what_would_work(name):
    log_target = torch.tensor([[0.0, -torch.inf]])
    with pytest.raises(
        ValueError, match=r"the target forbids a draw.*These take it: forward_kl, jensen_shannon"
    ) as said:
        f_divergence(torch.zeros(1, 2), log_target, torch.zeros(1), f=name)
    for other in str(said.value).split("These take it: ")[1].split(", alpha")[0].split(", "):
        assert divergence(other).takes_forbidden
        assert f_divergence(torch.zeros(1, 2), log_target, torch.zeros(1), f=other).isfinite().all()


def test_a_group_of_nothing_but_forbidden_draws_says_nothing():
    value, table = coefficients(
        f_divergence,
        log_pi=torch.tensor([[-1.0, -2.0]]),
        log_target=torch.full((1, 2), -torch.inf),
        log_z=torch.zeros(1),
        f="jensen_shannon",
    )
    assert value.item() == pytest.approx(math.log(2))  # the policy's draws are all outside
    assert table["log_pi"].abs().max() == 0


def test_refusals():
    zero, z = torch.zeros(2, 3), torch.zeros(2)
    js = {"f": "jensen_shannon"}
    cases = [
        ((zero, zero, torch.zeros(2, 1)), js, r"log_z of shape \[2, 1\], expected \[2\]: one a prompt"),
        ((zero, zero, torch.zeros(3)), js, r"log_z of shape \[3\], expected \[2\]"),
        ((zero, zero, torch.tensor([0.0, -math.inf])), js, "log_z = -inf.*no draw so far was allowed"),
        ((zero, zero, torch.tensor([0.0, math.nan])), js, "log_z = nan"),
        ((zero, zero[:, :1], z), js, r"log_target of shape \[2, 1\], expected \[2, 3\]"),
        ((zero, zero + math.inf, z), js, "log_target = inf"),
        ((zero - math.inf, zero, z), js, "log_pi = -inf.*scored as it was drawn"),
        ((zero, zero, z, zero - math.inf), js, "log_q = -inf.*the law that the sampler states"),
        ((zero[:, :1], zero[:, :1], z), js, "got 1 draw"),
        ((zero, zero, z), {**js, "clip": 0.0}, "got clip = 0"),
        (
            (zero, zero, z),
            {"f": "jenson-shanon"},
            "no divergence 'jenson-shanon', did you mean jensen_shannon",
        ),
        ((zero, zero, z), {"f": "alpha"}, r"expected its parameter with it, as in alpha\(0.5\)"),
        ((zero, zero, z), {"f": "alpha(half)"}, "expected a number in the brackets"),
        ((zero, zero, z), {"f": "forward_kl(0.5)"}, "forward_kl has no parameter"),
        ((zero, zero, z), {"f": "alpha(1)"}, "alpha: got 1.0.*0 is forward_kl, 1 is reverse_kl"),
        ((zero, zero, z), {"f": "skew_kl(0)"}, "skew_kl: got 0.0.*0 is forward_kl"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            f_divergence(*arguments, **options)


@pytest.mark.parametrize("family", [skew_kl, skew_reverse_kl, generalized_js])
@pytest.mark.parametrize("parameter", [0.0, 1.0, -0.1, 2.0, math.nan])
def test_parameters_out_of_range(family, parameter):
    with pytest.raises(ValueError, match=f"{family.__name__}: got .*strictly between 0 and 1"):
        family(parameter)


@pytest.mark.parametrize("parameter", [0, 1, math.inf, math.nan])
def test_alpha_out_of_range(parameter):
    with pytest.raises(ValueError, match="ask for them by name"):
        alpha(parameter)


def test_no_log_z_is_the_compatibility_error():
    with pytest.raises(ValueError, match="f_divergence: got no log_z, f"):
        bind(f_divergence, {"log_pi": torch.zeros(1, 2), "log_target": torch.zeros(1, 2), "log_z": None})


def test_a_divergence_of_ones_own():
    """Le Cam's: f = (t - 1)^2 / (t + 1), by its two functions alone."""
    own = Divergence(
        "le_cam",
        value=lambda x: 2 * torch.tanh(x / 2),
        slope=lambda x: 1 - 4 * torch.sigmoid(-x) ** 2,
        at_zero=1.0,
        at_infinity=1.0,
    )
    generator = torch.Generator().manual_seed(5)
    theta, log_target = (random_logits(1, 6, generator=generator) for _ in range(2))
    theta.requires_grad_()
    uniform = torch.full((1, 6), 1 / 6, dtype=torch.float64).log()
    log_z = torch.logsumexp(log_target, 1)
    value = f_divergence(categorical(theta), log_target, log_z, uniform, f=own, baseline=None).sum()
    (gradient,) = torch.autograd.grad(value, theta)
    pi, p = categorical(theta).exp(), normalise(log_target).exp()
    le_cam = ((pi - p) ** 2 / (pi + p)).sum()
    (truth,) = torch.autograd.grad(le_cam, theta)
    torch.testing.assert_close(value, le_cam, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["jensen_shannon", "total_variation", "skew_kl(0.1)"])
def test_mean_of_many_draws_is_the_divergence(name):
    """Within four standard errors; the mutant that forgets log Z is not."""
    generator = torch.Generator().manual_seed(6)
    log_pi, log_q, log_target = (random_logits(20, generator=generator) for _ in range(3))
    log_pi, log_q = categorical(log_pi), categorical(log_q)
    log_target = log_target + 1.0
    log_z = torch.logsumexp(log_target, 0)
    draws = draw(log_q, 4, num_prompts=20000, generator=generator)

    def values(log_z):
        return f_divergence(log_pi[draws], log_target[draws], log_z.expand(len(draws)), log_q[draws], f=name)

    f, x = divergence(name), log_pi - normalise(log_target)
    truth = (log_pi.exp() * f.value(x)).sum()

    def distance(estimates):
        return ((estimates.mean() - truth).abs() / (estimates.std() / len(estimates) ** 0.5)).item()

    assert distance(values(log_z)) < 4
    assert distance(values(torch.zeros_like(log_z))) > 4
