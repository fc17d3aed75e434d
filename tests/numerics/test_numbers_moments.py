"""Moment constraints: Newton against scipy and against closed forms, intervals by Monte Carlo, infeasible goals.

An enumerated space is a pool in which every atom is drawn once from the uniform law: log_w = log ref + log K.
"""

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from klimb.numbers.hull import reach
from klimb.numbers.moments import Moments, _covariance, fit_moments

P, Y, K = 4, 64, 3


def space(seed=0, prompts=P, atoms=Y, features=K):
    """Features [P, Y, K], log ref [P, Y]; one feature boolean, one atom nearly impossible."""
    g = torch.Generator().manual_seed(seed)
    phi = torch.randn(prompts, atoms, features, generator=g, dtype=torch.float64)
    phi[..., 0] = (phi[..., 0] > 0.5).double()
    logits = torch.randn(prompts, atoms, generator=g, dtype=torch.float64)
    logits[:, 2] -= 30
    return phi, torch.log_softmax(logits, -1)


def tilted(phi, log_ref, lam):
    return torch.log_softmax(log_ref + phi @ torch.as_tensor(lam, dtype=torch.float64), -1)


def moments(phi, log_p):
    return (log_p.exp()[..., None] * phi).sum(1).mean(0)


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1).mean()


def values(estimates):
    return torch.tensor([e.value for e in estimates], dtype=torch.float64)


def fit_exactly(phi, goal, log_w=None):
    """The plug-in, which is exact on an enumerated space."""
    return fit_moments(phi, goal, log_w, correct=False)


@pytest.mark.parametrize("prompts", [1, P, 12])
@pytest.mark.parametrize("seed", range(3))
def test_newton_finds_the_lam_that_made_the_moments(seed, prompts):
    phi, log_ref = space(seed, prompts)
    lam = torch.tensor([1.5, -0.8, 0.6], dtype=torch.float64)
    log_p = tilted(phi, log_ref, lam)
    goal = moments(phi, log_p)
    found = fit_exactly(phi, goal, log_ref)
    torch.testing.assert_close(values(found.lam), lam, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.tensor(found.reached, dtype=torch.float64), goal, rtol=0, atol=1e-10)
    torch.testing.assert_close(values(found.reference), moments(phi, log_ref), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.log_z, torch.logsumexp(log_ref + phi @ lam, -1), rtol=0, atol=1e-9)
    assert found.steps <= 8


def test_newton_against_an_independent_minimiser():
    """scipy's BFGS on the dual, written anew, for a goal that no tilt was asked for."""
    phi, log_ref = space(5)
    goal = moments(phi, log_ref) + torch.tensor([0.3, -0.2, 0.4], dtype=torch.float64)
    x, base, mu = phi.numpy(), log_ref.numpy(), goal.numpy()

    def dual(lam):
        tilt = base + x @ lam
        top = tilt.max(1, keepdims=True)
        return (np.log(np.exp(tilt - top).sum(1)) + top[:, 0]).mean() - lam @ mu

    best = scipy.optimize.minimize(dual, np.zeros(K), method="BFGS", options={"gtol": 1e-9})
    found = fit_exactly(phi, goal, log_ref)
    np.testing.assert_allclose(values(found.lam).numpy(), best.x, atol=1e-6)
    log_p = tilted(phi, log_ref, values(found.lam))
    assert kl(log_p, log_ref).item() == pytest.approx(-best.fun, abs=1e-10)


def test_of_all_laws_with_these_moments_it_is_the_nearest():
    """Pythagoras: KL(q||ref) = KL(q||p) + KL(p||ref) for laws q that meet the goal, averaged over prompts; 1e-9."""
    phi, log_ref = space(1)
    goal = moments(phi, log_ref) + torch.tensor([0.2, 0.3, -0.2], dtype=torch.float64)
    log_p = tilted(phi, log_ref, values(fit_exactly(phi, goal, log_ref).lam))
    # changes of all prompts' laws together that keep every total, and the moments averaged over prompts
    totals = torch.block_diag(*[torch.ones(1, Y, dtype=torch.float64)] * P)
    rows = torch.cat([totals, phi.reshape(P * Y, K).T]) * log_p.exp().flatten()
    free = torch.linalg.svd(rows).Vh[P + K :]
    g = torch.Generator().manual_seed(2)
    for _ in range(10):
        change = (torch.randn(len(free), generator=g, dtype=torch.float64) @ free).reshape(P, Y)
        q = log_p + (1 - 0.9 * change / change.abs().max()).log()
        torch.testing.assert_close(moments(phi, q), goal, rtol=0, atol=1e-9)
        assert kl(q, log_p) > 1e-6
        assert abs(kl(q, log_ref) - kl(q, log_p) - kl(log_p, log_ref)).item() < 1e-9


def test_one_lam_for_all_prompts_costs_less_than_one_a_prompt():
    """The goal on the average is the weaker constraint: nearer to ref than meeting it in every prompt."""
    phi, log_ref = space(3)
    goal = moments(phi, log_ref) + 0.2
    shared = tilted(phi, log_ref, values(fit_exactly(phi, goal, log_ref).lam))
    each = torch.cat(
        [
            tilted(phi[p : p + 1], log_ref[p : p + 1], values(fit_exactly(phi[p], goal, log_ref[p]).lam))
            for p in range(P)
        ]
    )
    torch.testing.assert_close(moments(phi, each), goal, rtol=0, atol=1e-9)
    assert kl(shared, log_ref) < kl(each, log_ref) - 1e-2
    assert (moments(phi[:1], shared[:1]) - goal).abs().max() > 1e-2  # and does not hold prompt by prompt


@pytest.mark.parametrize("rate", [0.01, 1 / 3, 0.9])
def test_a_boolean_feature_is_a_logit_shift(rate):
    """lam = logit(goal) - logit(rate), KL that of two coins; in few steps also where it is far."""
    said = (torch.arange(3000) < round(3000 * rate)).double()[:, None]
    found = fit_exactly(said, [0.5])
    assert found.lam[0].value == pytest.approx(math.log((1 - rate) / rate), abs=1e-9)
    coins = 0.5 * math.log(0.5 / rate) + 0.5 * math.log(0.5 / (1 - rate))
    assert found.kl.value == pytest.approx(coins, abs=0.02)
    assert found.steps <= 12


def test_units_and_shifts_of_a_feature():
    """lam is per unit: a feature times 1000 plus 7 has a thousandth of it, and everything else is the same."""
    phi, log_ref = space(4)
    goal = moments(phi, log_ref) + 0.2
    plain = fit_exactly(phi, goal, log_ref)
    scaled = fit_exactly(1000 * phi + 7, 1000 * goal + 7, log_ref)
    torch.testing.assert_close(1000 * values(scaled.lam), values(plain.lam), rtol=1e-8, atol=1e-10)
    assert 1000 * scaled.lam[1].high == pytest.approx(plain.lam[1].high, rel=1e-7)
    assert scaled.kl.value == pytest.approx(plain.kl.value, abs=1e-9)


def test_weights_of_the_draws_count():
    """Draws repeated in proportion to the law, and the same atoms with log_w, are one pool; -inf leaves draws out."""
    phi, _ = space(6, prompts=1, atoms=5)
    counts = torch.tensor([[40, 10, 25, 5, 20]])
    log_w = counts.double().log() - 3.3
    goal = (counts[..., None] * phi).sum(1)[0] / 100 + 0.1
    repeated = fit_exactly(phi[0].repeat_interleave(counts[0], 0), goal)
    weighted = fit_exactly(phi, goal, log_w)
    torch.testing.assert_close(values(repeated.lam), values(weighted.lam), rtol=1e-9, atol=1e-9)
    holes = torch.cat([phi, torch.full((1, 1, K), torch.nan).double()], 1)
    with_holes = fit_moments(holes, goal, torch.cat([log_w, torch.tensor([[-torch.inf]])], 1))
    torch.testing.assert_close(values(with_holes.lam), values(weighted.lam), rtol=1e-12, atol=1e-12)


def test_a_reward_may_be_constrained_too():
    """With log_w + r / beta it is ref exp(r / beta + lam . phi) that has the moments."""
    phi, log_ref = space(7)
    reward = torch.randn(P, Y, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = torch.log_softmax(log_ref + reward / 0.5, -1)
    goal = moments(phi, start) + 0.1
    lam = values(fit_exactly(phi, goal, log_ref + reward / 0.5).lam)
    torch.testing.assert_close(moments(phi, tilted(phi, start, lam)), goal, rtol=0, atol=1e-10)


# intervals


def pools(seed, count, prompts, draws, *, spread=0.3):
    """Pools of a Gaussian feature whose mean differs by prompt: at lam 0.8 its mean is 0.8 and KL 0.32, all in all."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, prompts, 1, 1, generator=g, dtype=torch.float64)
    centre = spread * centre if prompts > 1 else 0.0
    return centre + torch.randn(count, prompts, draws, 1, generator=g, dtype=torch.float64)


def without_sandwich(phi, found):
    """The mutant: the inverse Hessian over the number of draws, as if prompts were alike and weights equal."""
    s = torch.softmax(phi @ values(found.lam), -1)
    half = 1.96 * (torch.linalg.inv(_covariance(phi, s).mean(0))[0, 0] / s.numel()).sqrt().item()
    return found.lam[0].value - half, found.lam[0].value + half


@pytest.mark.parametrize(("prompts", "draws"), [(1, 1000), (20, 100)])
def test_intervals_cover_and_those_without_the_sandwich_do_not(prompts, draws):
    """200 pools: the 95 % intervals of lam, KL and held-out moment cover in 90 to 99 %, the mutant's in less than 82 %.

    Held out is the mean that the law of the fitted lam truly has, which for these Gaussians is lam itself.
    """
    hits = {"lam": 0, "kl": 0, "held_out": 0, "mutant": 0}
    for phi in pools(99, 200, prompts, draws):
        found = fit_moments(phi, [0.8])
        low, high = without_sandwich(phi, found)
        hits["mutant"] += low <= 0.8 <= high
        hits["lam"] += found.lam[0].low <= 0.8 <= found.lam[0].high
        hits["kl"] += found.kl.low <= 0.32 <= found.kl.high
        hits["held_out"] += found.held_out[0].low <= found.lam[0].value <= found.held_out[0].high
    rates = {name: count / 200 for name, count in hits.items()}
    assert rates.pop("mutant") < 0.82
    assert all(0.90 <= rate <= 0.99 for rate in rates.values()), rates


def test_the_jackknife_keeps_intervals_right_where_prompts_are_many_and_draws_few():
    """25 pools of 400 prompts and 60 draws. The plug-in's lam is 3 % too large, always the same way: its intervals cover
    in half of the pools at most, and it is always warned of. Jackknifed, lam is within 1 % and the intervals are right.
    """
    pairs = [
        (fit_moments(phi, [0.8]), fit_moments(phi, [0.8], correct=False))
        for phi in pools(12, 25, 400, 60, spread=0.0)
    ]
    good, plug_in = zip(*[(one.lam[0], other.lam[0]) for one, other in pairs], strict=True)
    assert abs(np.mean([e.value for e in good]) - 0.8) < 0.008
    assert np.mean([e.value for e in plug_in]) > 0.82
    assert sum(e.low <= 0.8 <= e.high for e in good) >= 22
    assert sum(e.low <= 0.8 <= e.high for e in plug_in) <= 12
    assert sum(e.reliable for e in good) >= 22
    assert not any(e.reliable for e in plug_in)


def test_moments_reached_are_the_goal_and_the_held_out_ones_have_an_interval():
    (phi,) = pools(13, 1, 10, 80)
    found = fit_moments(phi, [0.5])
    assert found.reached[0] == pytest.approx(0.5, abs=1e-9)
    assert found.held_out[0].low < 0.5 < found.held_out[0].high
    assert found.reliable
    assert isinstance(found, Moments)


def test_too_few_draws_say_so():
    """Six draws a prompt for a goal 1.3 standard deviations away: unreliable, by the margin and by what is held out."""
    (phi,) = pools(14, 1, 200, 6)
    found = fit_moments(phi, [1.0], names=["length"])
    assert not found.reliable
    assert not found.lam[0].reliable
    assert not found.kl.reliable
    assert any("log(draws) - KL" in warning for warning in found.warnings)
    (single,) = pools(15, 1, 20, 2)
    assert not fit_moments(single, [0.1]).reliable


@pytest.mark.parametrize("draws", [14, 20, 30])
def test_the_jackknifed_goal_is_met_where_only_some_prompts_have_enough_draws(draws):
    for phi in pools(18, 5, 30, draws):
        found = fit_moments(phi, [0.6])
        assert found.reached[0] == pytest.approx(0.6, abs=1e-9)
        assert not any("could not be removed" in warning for warning in found.warnings)


def test_held_out_shows_what_was_fitted_to_noise():
    """Eight features of nothing, each to be 0.3, fitted on 100 draws: on others they are 0.4 on average, and it says so."""
    g = torch.Generator().manual_seed(16)
    phi = torch.randn(100, 8, generator=g, dtype=torch.float64)
    found = fit_moments(phi, torch.full((8,), 0.3))
    assert values(found.held_out).mean() > 0.4
    assert any("on draws that lam was not fitted to" in warning for warning in found.warnings)
    too_few = fit_moments(torch.randn(60, 12, generator=g), torch.full((12,), 0.3))
    assert any("nothing can be held out" in warning for warning in too_few.warnings)
    assert too_few.held_out[0].as_dict()["value"] is None


# goals out of reach


def test_a_goal_outside_is_refused_with_the_nearest_one_within():
    said = (torch.arange(40).reshape(4, 10) % 5 == 0).double()[..., None]
    said[3] = 0.0  # nothing is mentioned at the last prompt: 3 / 4 is the most
    with pytest.raises(
        ValueError, match=r"says good would have to be 0\.8 on average, and is at most 0\.75 .*"
    ):
        fit_moments(said, [0.8], names=["says good"])
    with pytest.raises(ValueError, match=r"nearest moments within reach are says good = 0\.75"):
        fit_moments(said, [0.8], names=["says good"])
    assert fit_moments(said, [0.7], correct=False).reached[0] == pytest.approx(0.7, abs=1e-9)


def test_two_goals_that_exclude_each_other():
    """Short and long at once: either alone is within reach, both together are not."""
    kind = torch.arange(60) % 3
    phi = torch.stack([kind == 0, kind == 1], -1).double()
    fit_moments(phi, [0.7, 0.2])
    with pytest.raises(
        ValueError, match=r"short \+ long would have to be 1\.2 on average, and is at most 1 "
    ):
        fit_moments(phi, [0.7, 0.5], names=["short", "long"])


@pytest.mark.parametrize("goal", [0.0, 1.0])
def test_a_boolean_goal_of_all_or_nothing_is_a_hard_filter(goal):
    said = (torch.arange(30) % 3 == 0).double()[:, None]
    with pytest.raises(
        ValueError, match=r"polite = [01] is as far as any weights go.*infinite lam.*-inf.*forbid"
    ):
        fit_moments(said, [goal], names=["polite"])


def test_on_the_border_between_two_features():
    kind = torch.arange(60) % 3
    phi = torch.stack([kind == 0, kind == 1], -1).double()
    with pytest.raises(ValueError, match="on the border"):
        fit_moments(phi, [0.5, 0.5])


corners = st.integers(1, 3).flatmap(
    lambda k: st.lists(
        st.lists(st.lists(st.integers(-3, 3), min_size=k, max_size=k), min_size=4, max_size=9),
        min_size=1,
        max_size=3,
    )
)


def as_pool(rows):
    """Prompts of as many draws each, by repeating; None if lam would not be determined."""
    size = max(len(row) for row in rows)
    phi = torch.stack([torch.tensor((row * size)[:size], dtype=torch.float64) for row in rows])
    covariance = _covariance(phi, torch.full(phi.shape[:2], 1 / size).double()).mean(0)
    return phi if torch.linalg.matrix_rank(covariance, atol=1e-6, hermitian=True) == phi.shape[-1] else None


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=corners, data=st.data())
def test_a_goal_within_reach_is_never_refused(rows, data):
    """Any weights that leave no draw out have moments that a finite lam reaches, however unequal they are (1 to 1000)."""
    phi = as_pool(rows)
    assume(phi is not None)
    weights = data.draw(
        st.lists(
            st.floats(1, 1000), min_size=phi.shape[0] * phi.shape[1], max_size=phi.shape[0] * phi.shape[1]
        )
    )
    s = torch.tensor(weights, dtype=torch.float64).reshape(phi.shape[:2])
    goal = ((s / s.sum(1, keepdim=True))[..., None] * phi).sum(1).mean(0)
    found = fit_moments(phi, goal, correct=False)
    torch.testing.assert_close(torch.tensor(found.reached, dtype=torch.float64), goal, rtol=0, atol=1e-8)
    scale = phi.std((0, 1)).clamp_min(0.1)
    inside = torch.ones(phi.shape[:2], dtype=torch.bool)
    assert not reach((phi - goal) / scale, inside).outside


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rows=corners, data=st.data(), beyond=st.floats(1e-4, 10))
def test_a_goal_out_of_reach_is_always_refused_and_the_proof_holds(rows, data, beyond):
    """Beyond the farthest reachable point of a direction, by a hair or by far."""
    phi = as_pool(rows)
    assume(phi is not None)
    size = phi.shape[-1]
    direction = torch.tensor(data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))).double()
    assume(bool(direction.any()))
    farthest = phi[torch.arange(len(phi)), (phi @ direction).argmax(1)].mean(0)
    goal = farthest + beyond * direction / direction.norm()
    with pytest.raises(ValueError, match="no weights on these draws reach the goal"):
        fit_moments(phi, goal)
    found = reach(phi - goal, torch.ones(phi.shape[:2], dtype=torch.bool))
    assert found.outside
    assert (phi @ found.direction).amax(1).mean() < found.direction @ goal  # separated
    assert found.nearest.abs().sum() <= beyond * (direction / direction.norm()).abs().sum() + 1e-6


# what is refused


def test_features_that_do_not_determine_lam_are_named():
    phi, log_ref = space(8)
    constant = torch.cat([phi, torch.arange(P)[:, None, None].expand(-1, Y, 1)], -1)
    with pytest.raises(ValueError, match=r"topic is the same for all draws of a prompt.*from 1\.5 to 2"):
        fit_moments(constant, [0, 0, 0, 2], log_ref, names=["a", "b", "c", "topic"])
    doubled = torch.cat([phi, phi[..., :1] - 2 * phi[..., 1:2]], -1)
    with pytest.raises(
        ValueError, match=r"0\.5 a - b - 0\.5 d is the same|- 0\.5 a \+ b \+ 0\.5 d is the same"
    ):
        fit_moments(doubled, [0, 0, 0, 0], log_ref, names=["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"goal": [0.0, 0.0]}, "a goal of shape"),
        ({"features": torch.zeros(4)}, r"features of shape \(4,\)"),
        ({"goal": [math.nan, 0.0, 0.0]}, "NaN or infinite"),
        ({"features": torch.full((P, Y, K), math.inf)}, "NaN or infinite"),
        ({"log_w": torch.zeros(P)}, r"log_w of shape \(4,\)"),
        ({"log_w": torch.full((P, Y), -math.inf)}, "-inf for all draws"),
        ({"log_w": torch.full((P, Y), math.nan)}, "NaN or \\+inf"),
        ({"names": ["one"]}, "1 names for 3 features"),
    ],
)
def test_mistakes_are_named(change, said):
    phi, log_ref = space(0)
    arguments = {"features": phi, "goal": [0.4, 0.0, 0.0], "log_w": log_ref, "names": None, **change}
    with pytest.raises(ValueError, match=said):
        fit_moments(**arguments)


def test_features_as_they_come():
    """float32 and boolean features are taken as numbers; one prompt may be [N, K]."""
    (phi,) = pools(17, 1, 1, 500)
    one = fit_moments(phi.float(), torch.tensor([0.3]))
    other = fit_moments(phi[0], [0.3])
    assert one.lam[0].value == pytest.approx(other.lam[0].value, abs=1e-5)
    assert one.log_z.shape == (1,)
    assert fit_moments(phi > 0, [0.6]).goal == (0.6,)
    assert one.lam[0].n == 500
