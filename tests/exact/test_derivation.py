"""The chain holds at every policy, to rounding; what differs from it fails where it says, on numbers."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klimb.exact import kl, mean
from klimb.exact.check import check, example
from klimb.exact.derivation import cost, derive, objective, values_at
from klimb.exact.newton import minimise
from klimb.exact.problem import Problem, best, padded, problem
from klimb.exact.remarks import remarks
from klimb.exact.variants import VARIANTS

INF = math.inf


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_problem(seed, beta, *, sizes=(3, 7, 2), forbid=False):
    generator = seeded(seed)
    refs = [torch.log_softmax(2 * torch.randn(n, generator=generator, dtype=torch.float64), 0) for n in sizes]
    rewards = [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]
    if forbid:
        rewards[0][0] = -INF
    return padded(refs, rewards, beta)


@pytest.mark.parametrize("forbid", [False, True])
@pytest.mark.parametrize("beta", [1e-2, 0.1, 0.35, 1.0, 10.0, 1e2])
def test_every_line_is_an_equality_at_every_policy(beta, forbid):
    found = derive(random_problem(1, beta, forbid=forbid), generator=seeded())
    assert [step.number for step in found.steps] == [1, 2, 3, 4, 5, 6]
    assert found.holds
    assert found.worst < 1e-12 * max(1, 5 / beta, 10 * beta)
    if 0.3 < beta < 2:
        assert found.worst < 1e-13
    for step in found.steps:
        for sides in step.sides:
            assert sides.difference <= sides.worst
            assert math.isfinite(sides.left_value)


def test_the_sides_are_what_they_are_called():
    # by hand: ref (1/2, 1/2), r (1, 0), beta 1, pi (0.8, 0.2)
    given = problem([[0.5, 0.5]], [[1.0, 0.0]], 1.0)
    log_pi = torch.tensor([[0.8, 0.2]], dtype=torch.float64).log()
    steps = derive(given, log_pi, generator=seeded()).steps
    price = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    z = (math.e + 1) / 2
    p = [math.e / 2 / z, 0.5 / z]
    away = 0.8 * math.log(0.8 / p[0]) + 0.2 * math.log(0.2 / p[1])
    expected = [0.8 - price, price - 0.8, 1.0, price - 0.8, away - math.log(z)]
    for step, value in zip(steps, expected, strict=False):
        assert step.sides[0].left_value == pytest.approx(value, abs=1e-12)
        assert step.sides[0].right_value == pytest.approx(value, abs=1e-12)
    # d/dlogits of KL(pi||p): pi (f - E f), f = log(pi/p)
    f = [math.log(0.8 / p[0]), math.log(0.2 / p[1])]
    slope = 0.8 * 0.2 * (f[0] - f[1])
    assert steps[5].sides[0].left_value == pytest.approx(abs(slope) * math.sqrt(2), abs=1e-12)
    assert steps[5].sides[1].right_value == 0


def test_a_wrong_target_would_be_seen():
    # mutant: a p that is the tilt at another beta; the chain's comparison must not take it for p
    class Mutant(Problem):
        @property
        def log_p(self):
            return torch.log_softmax(self.log_ref + self.reward / (1.001 * self.beta), -1)

    right = random_problem(2, 0.5)
    mutant = Mutant(right.log_ref, right.reward, right.beta)
    assert derive(right, generator=seeded()).holds
    found = derive(mutant, generator=seeded())
    assert not found.holds
    assert found.worst > 1e-5


def test_values_at_tie_together_also_off_the_support_of_some_policy():
    given = problem([[0.5, 0.3, 0.2], [0.5, 0.5, 0.0]], [[1.0, 0.0, 2.0], [0.0, 1.0, 9.0]], 0.5)
    log_pi = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0]], dtype=torch.float64).log()
    found = values_at(given, log_pi)
    assert found["objective"] == pytest.approx(0.5 * found["log_z"] - found["gap"], abs=1e-12)
    assert derive(given, log_pi, generator=seeded()).holds


def test_the_remarks_on_numbers():
    given = random_problem(3, 0.4)
    found = {remark.name: remark for remark in remarks(given, generator=seeded())}
    for name, remark in found.items():
        for sides in remark.sides[1:] if name == "moving_z" else remark.sides:
            assert sides.worst < 1e-11, (name, sides.left)
    assert found["moving_z"].sides[0].difference > 1e-2  # it says that these differ
    agree = [row[1:] for row in found["directions_agree"].rows]
    assert max(map(abs, agree[2])) < 1e-12
    assert min(min(row) for i, row in enumerate(agree) if i != 2) > 1e-3


def test_the_class_too_small_seeks_or_covers():
    (part,) = [r for r in remarks(example(), generator=seeded()) if r.name == "directions_part"]
    rows = {row[0]: row[1:] for row in part.rows}
    itself, seeking, covering = rows["p itself"], rows["min KL(π‖p)"], rows["min KL(p‖π)"]
    assert itself[:2] == (0, 0)
    assert seeking[0] < covering[0]
    assert covering[1] < seeking[1]
    # taking one mode of weight 0.6 costs -log 0.6, had they no overlap
    assert seeking[0] == pytest.approx(-math.log(0.6), abs=1e-3)
    assert seeking[2] < 1e-5
    assert covering[2] > 0.3
    assert covering[3] > 50 * itself[3]
    for _, law in part.pictures:
        assert sum(law) == pytest.approx(1, abs=1e-12)


def test_what_beta_does():
    given = problem([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], [[1.0, 0.0, 2.0], [3.0, 3.0, 1.0]], 0.7)
    (found,) = [r for r in remarks(given, generator=seeded()) if r.name == "beta"]
    rows = [row[1:] for row in found.rows]
    assert found.sides[0].left_value == pytest.approx(0.7, abs=1e-12)  # the slope
    reward, price, best_value = (list(column) for column in zip(*(row[:3] for row in rows), strict=True))
    for column in (reward, price):
        assert all(x >= y - 1e-12 for x, y in itertools.pairwise(column))
    assert rows[0][0] == pytest.approx(2.5, abs=1e-12)  # max r
    assert rows[0][1] == pytest.approx((-math.log(0.1) - math.log(0.7)) / 2, abs=1e-12)  # -log ref(best)
    assert best_value[0] == pytest.approx(2.5, abs=1e-12)
    assert rows[-1][1] == pytest.approx(0, abs=1e-15)
    assert best_value[-1] == pytest.approx((0.8 + 2.4) / 2, abs=1e-12)  # E_ref r
    flat = problem([[0.6, 0.4]], [[1.0, 1.0]], 0.7)
    (same,) = [r for r in remarks(flat, generator=seeded()) if r.name == "beta"]
    assert same.sides == ()
    assert "same for all outcomes" in same.says


def test_best_is_the_target_and_its_neighbours():
    found = best(problem([[0.6, 0.3, 0.1]], [[1.0, 0.0, 2.0]], 0.5))
    weights = [0.6 * math.e**2, 0.3, 0.1 * math.e**4]
    z = sum(weights)
    assert found.p == pytest.approx([w / z for w in weights], abs=1e-12)
    assert found.log_z == pytest.approx(math.log(z), abs=1e-12)
    # Jeffreys: E_p r - E_ref r = beta (KL + reverse KL)
    gained = found.reward - found.reward_ref
    assert gained == pytest.approx(0.5 * (found.kl_p_ref + found.kl_ref_p), abs=1e-12)
    assert found.reward - 0.5 * found.kl_p_ref == pytest.approx(found.objective, abs=1e-12)


WRONG = [name for name, variant in VARIANTS.items() if variant.step is not None]
RIGHT = [name for name, variant in VARIANTS.items() if variant.step is None]
ANYWHERE = [
    example(),
    random_problem(5, 0.4, sizes=(4, 4)),
    problem([[0.6, 0.3, 0.1]], [[1.0, 0.5, 2.0]], 0.5),
]


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("given", ANYWHERE)
def test_every_changed_objective_fails_with_a_counterexample(name, given):
    found = check(name, given, generator=seeded())
    assert not found.right
    assert found.step == VARIANTS[name].step
    assert found.sides.difference > 1e-3
    for true, preferred in [found.witnesses] if found.witnesses else []:
        assert preferred.objective < true.objective
        assert preferred.changed < true.changed
        assert preferred.distance > true.distance


MOVES = {"z_dropped_early": False, "z_averaged": False, "z_moves": None}


@pytest.mark.parametrize("name", WRONG)
def test_which_of_them_move_the_optimum(name):
    assert check(name, example(), generator=seeded()).moves_optimum is MOVES.get(name, True)


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("given", ANYWHERE)
def test_a_right_one_is_not_flagged(name, given):
    found = check(name, given, generator=seeded())
    assert found.right
    assert found.step is None
    assert found.sides.worst < 1e-11
    assert found.moves_optimum is False


def test_the_optima_that_the_caveats_name():
    given = problem([[0.6, 0.3, 0.1]], [[1.0, 0.5, 2.0]], 0.5)
    ref, r, beta = given.log_ref[0], given.reward[0], 0.5
    tilts = {
        "no_beta": ref + r,
        "beta_upside_down": ref + beta * r,
        "entropy_for_kl": r / beta,
        "reward_in_log": ref + r.log(),
    }
    for name, logits in tilts.items():
        preferred = check(name, given, generator=seeded()).witnesses[1]
        assert preferred.prompt == pytest.approx(torch.softmax(logits, 0).tolist(), abs=1e-6), name
    # beta ref / (nu - r): the ratio ref / pi is linear in r
    pi = torch.tensor(check("reversed_kl", given, generator=seeded()).witnesses[1].prompt)
    nu = ref.exp() * beta / pi + r
    assert nu.max() - nu.min() < 1e-4
    corner = check("wrong_sign", given, generator=seeded()).witnesses[1].prompt
    assert max(corner) > 0.999


def test_a_mistake_that_these_numbers_hide_is_shown_on_others():
    hidden = problem([[0.5, 0.5]], [[1.0, 2.0]], 1.0)  # beta 1: no_beta is right here
    found = check("no_beta", hidden, generator=seeded())
    assert (found.right, found.elsewhere, found.step) == (False, True, 2)
    assert not check("no_beta", example(), generator=seeded()).elsewhere
    normalised = problem([[0.5, 0.5]], [[math.log(1.6), math.log(0.4)]], 1.0)  # Z = 1
    for asked in ("z_dropped_early", "1,2,3,4,6,5"):
        found = check(asked, normalised, generator=seeded())
        assert (found.right, found.elsewhere) == (False, True), asked


def fails_at(order):
    found = check(order, example(), generator=seeded())
    assert found.sides is None or found.sides.difference > 1e-2
    return found.step


@pytest.mark.parametrize(
    "order", ["1,2,3,4,5,6", "1,3,2,4,5,6", "3 1 2 4 5 6", "(1),(2)", "1", "3,6,5,4,2,1", "3,6,5"]
)
def test_right_orders(order):
    assert fails_at(order) is None


@pytest.mark.parametrize(
    ("order", "step"),
    [
        ("1,2,4,3,5,6", 4),
        ("1,3,4,2,5,6", 4),
        ("2,1,3,4,5,6", 2),
        ("1,2,3,5,4,6", 5),
        ("1,2,3,4,6,5", 6),
        ("1,2,4,5,6", 4),
        ("1,2,3,5,6", 5),
        ("6,5,4,3,2,1", 6),
        ("3,6,4,5,2,1", 4),
    ],
)
def test_wrong_orders_and_the_step_that_fails(order, step):
    assert fails_at(order) == step


def test_of_all_orders_four_are_right():
    # (1), (2), (4), (5), (6) in a row with (3) anywhere before (4); and upwards, after (3)
    right = [o for o in itertools.permutations(range(1, 7)) if fails_at(",".join(map(str, o))) is None]
    assert sorted(right) == [(1, 2, 3, 4, 5, 6), (1, 3, 2, 4, 5, 6), (3, 1, 2, 4, 5, 6), (3, 6, 5, 4, 2, 1)]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("z_kep", "did you mean z_kept"),
        ("reverse_kl", "did you mean reversed_kl"),
        ("1,2,7", "no step 7"),
        ("1,2,2", "step 2 is there 2 times"),
        ("", "no such objective"),
    ],
)
def test_unknown_checks(asked, words):
    with pytest.raises(ValueError, match=words):
        check(asked, example(), generator=seeded())


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3),
    st.lists(st.one_of(st.just(-INF), st.floats(-5, 5)), min_size=3, max_size=3).filter(
        lambda r: max(r) > -INF
    ),
    st.floats(0.02, 50),
)
def test_the_chain_on_any_numbers(weights, reward, beta):
    total = math.fsum(weights)
    given = problem([[w / total for w in weights]], [reward], beta)
    assert derive(given, num_random=20, generator=seeded()).holds
    log_pi = given.random_policies(5, generator=seeded(1))
    excess = cost(given, log_pi) - cost(given, given.log_p)
    assert torch.allclose(excess, kl(log_pi, given.log_p), atol=1e-12 * given.scale)
    assert (objective(given, log_pi) <= objective(given, given.log_p) + 1e-12 * given.scale).all()


def test_newton_finds_a_least_value_to_the_last_digits():
    target = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    at = minimise(lambda x: -mean(target.log(), torch.log_softmax(x, 0)), [torch.zeros(3)])
    assert torch.softmax(at, 0).tolist() == pytest.approx(target.tolist(), abs=1e-10)
    # not convex: from its top, a small push, and two starts
    starts = [torch.tensor([0.1]), torch.tensor([-0.1])]
    low = minimise(lambda x: ((x**2 - 1).square() + 0.3 * x).sum(), starts).item()
    assert low == pytest.approx(-1.0358, abs=1e-3)
