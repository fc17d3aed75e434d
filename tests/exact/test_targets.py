"""Every modified target is the maximiser of the objective it is named for, found by descent on the simplex.

Three prompts over the 15 strings of an autoregressive space, enumerated: every string drawn once from the uniform law.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd.functional import hessian, jacobian

from klimb.data import Scored
from klimb.exact import (
    all_strings,
    categorical,
    kl,
    log_prob,
    mean,
    normalise,
    random_logits,
    token_log_prob,
    tuples,
)
from klimb.exact import tilt as exact_tilt
from klimb.numbers.moments import fit_moments
from klimb.numbers.tilt import log_partition, tilted_kl
from klimb.objectives import forward_kl, log_variance, reverse_kl
from klimb.rewards.weighted_sum import weighted_sum
from klimb.target import (
    Tilt,
    chi_squared,
    composed_beta,
    entropy_bonus,
    forbid,
    geometric_mixture,
    implied_reward,
    length_normalized,
    mixture,
    moment_tilt,
    moving_reference,
    settled_betas,
    standardized,
    tilt,
)

P = 3
SPACE = all_strings(3, 3)
Y = SPACE.size
G = torch.Generator().manual_seed(7)
TABLES = random_logits(P, SPACE.num_prefixes, 3, generator=G)
OTHER_TABLES = random_logits(P, SPACE.num_prefixes, 3, generator=G)
LOG_REF = torch.stack([log_prob(table, SPACE) for table in TABLES])
LOG_OTHER = torch.stack([log_prob(table, SPACE) for table in OTHER_TABLES])
REWARD = random_logits(P, Y, generator=G)
UNIFORM = torch.full((P, Y), 1 / Y, dtype=torch.float64).log()
LENGTHS = SPACE.lengths.expand(P, -1)
ENUMERATED = Scored(log_ref=LOG_REF, reward=REWARD, log_q=UNIFORM, lengths=LENGTHS)
BETA = 0.7


class TablePolicy:
    """A policy over the space, a table a prompt; prompts are called "0", "1", "2"."""

    def __init__(self, tables):
        self.tables = tables

    def render(self, example):
        return [int(example.prompt)]

    def parameters(self):
        return []

    def log_prob(self, draws):
        rows = []
        for example, group in zip(draws.examples, draws.completions, strict=True):
            each = token_log_prob(self.tables[int(example.prompt)], SPACE)
            for ids in group:
                y = next(y for y, known in enumerate(SPACE.completions) if known.tolist() == ids.tolist())
                rows.append(each[y][: len(ids)])
        return torch.cat(rows)


REF, OTHER = TablePolicy(TABLES), TablePolicy(OTHER_TABLES)


def rewarded(reward):
    """[P, Y] what a reward says of every string."""
    values = reward(
        prompts=[str(p) for p in range(P) for _ in range(Y)],
        completions=[""] * (P * Y),
        completion_ids=[ids.tolist() for ids in SPACE.completions] * P,
        known=REWARD.flatten().tolist(),
        said=FEATURE.flatten().tolist(),
    )
    return torch.tensor(values, dtype=torch.float64).reshape(P, Y)


FEATURE = (torch.rand(P, Y, generator=G) < 0.4).double()


def known(known, **columns):
    return known


def said(said, **columns):
    return said


def law(target, scored=ENUMERATED):
    """[P, Y] the normalised target; of a plain tilt by its own reward, where it has one."""
    if isinstance(target, Tilt) and target.reward is not None:
        scored = dataclasses.replace(scored, reward=rewarded(target.reward))
    return normalise(target.log_target(scored))


def entropy(log_pi):
    return -mean(log_pi, log_pi)


def mixed(share):
    return torch.logaddexp(math.log1p(-share) + LOG_REF, math.log(share) + LOG_OTHER)


SD_REF = (mean(LOG_REF, REWARD**2) - mean(LOG_REF, REWARD) ** 2).sqrt()
REPLACED = dataclasses.replace(ENUMERATED, log_q=LOG_OTHER)

# name -> (target's law, the objective [P, Y] -> [P], what a nat of KL(pi||p) costs)
CASES = {
    "tilt": (
        law(tilt(REF, known, BETA)),
        lambda pi: mean(pi, REWARD) - BETA * kl(pi, LOG_REF),
        BETA,
    ),
    "entropy_bonus": (
        law(entropy_bonus(REF, None, BETA, bonus=0.4)),
        lambda pi: mean(pi, REWARD) - BETA * kl(pi, LOG_REF) + 0.4 * entropy(pi),
        BETA + 0.4,
    ),
    "moving_reference": (
        law(moving_reference(REF, None, BETA), REPLACED),
        lambda pi: mean(pi, REWARD) - BETA * kl(pi, LOG_OTHER),
        BETA,
    ),
    "moving_reference_anchored": (
        law(moving_reference(REF, None, BETA, anchor=0.3), REPLACED),
        lambda pi: mean(pi, REWARD) - BETA * kl(pi, LOG_OTHER) - 0.3 * kl(pi, LOG_REF),
        BETA + 0.3,
    ),
    "standardized": (
        law(standardized(REF, None, BETA)),
        lambda pi: mean(pi, REWARD) / SD_REF - BETA * kl(pi, LOG_REF),
        BETA,
    ),
    "length_normalized": (
        law(length_normalized(REF, None, BETA)),
        lambda pi: mean(pi, REWARD / LENGTHS) - BETA * kl(pi, LOG_REF),
        BETA,
    ),
    "geometric_mixture": (
        law(geometric_mixture(REF, OTHER, 0.3)),
        lambda pi: -0.7 * kl(pi, LOG_REF) - 0.3 * kl(pi, LOG_OTHER),
        1.0,
    ),
    "geometric_mixture_beyond": (
        law(geometric_mixture(REF, OTHER, 1.5, reward=known, beta=BETA)),
        lambda pi: mean(pi, REWARD) + BETA * (0.5 * kl(pi, LOG_REF) - 1.5 * kl(pi, LOG_OTHER)),
        BETA,
    ),
    "mixture": (law(mixture(REF, OTHER, 0.2)), lambda pi: -kl(pi, mixed(0.2)), 1.0),
    "mixture_as_reference": (
        law(mixture(REF, OTHER, 0.2, reward=known, beta=BETA)),
        lambda pi: mean(pi, REWARD) - BETA * kl(pi, mixed(0.2)),
        BETA,
    ),
    "moment_tilt": (
        law(moment_tilt(REF, [said], [1.3], reward=known, beta=BETA)),
        lambda pi: mean(pi, REWARD) + BETA * 1.3 * mean(pi, FEATURE) - BETA * kl(pi, LOG_REF),
        BETA,
    ),
}


def maximise(objective, policy=categorical):
    """L-BFGS over the parameters [P, Y] of the laws of all prompts together, then Newton for the last digits."""
    theta = torch.full((P, Y), 0.5, dtype=torch.float64).requires_grad_()

    def loss(theta):  # a law has many parameters: those of mean one half are as good as any
        return ((theta.mean(-1) - 0.5) ** 2).sum() - objective(policy(theta)).sum()

    optimizer = torch.optim.LBFGS([theta], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    optimizer.step(closure)
    theta = theta.detach()
    for _ in range(4):  # values agree to 1e-16 before laws agree to 1e-8
        curvature = hessian(loss, theta).reshape(P * Y, P * Y)
        theta = theta - torch.linalg.solve(curvature, jacobian(loss, theta).flatten()).reshape(P, Y)
    return policy(theta)


def random_policies():
    return [categorical(random_logits(P, Y, generator=torch.Generator().manual_seed(s))) for s in range(5)]


@pytest.mark.parametrize("name", CASES)
def test_target_is_the_maximiser_of_its_objective(name):
    log_p, objective, _ = CASES[name]
    found = maximise(objective)
    assert (found.exp() - log_p.exp()).abs().max() < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_to_climb_is_beta_times_the_divergence(name):
    """J(p) - J(pi) = beta KL(pi||p) at every policy, so the target's beta is the price of the gap."""
    log_p, objective, beta = CASES[name]
    for log_pi in random_policies():
        gap = objective(log_p) - objective(log_pi)
        torch.testing.assert_close(gap, beta * kl(log_pi, log_p), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CASES if name != "tilt"])
def test_the_plain_tilt_is_not_the_maximiser_of_a_modified_objective(name):
    """The check above can tell: by 0.004 at least, for every one of them."""
    log_p, objective, _ = CASES[name]
    plain = CASES["tilt"][0]
    assert (plain.exp() - log_p.exp()).abs().max() > 0.02
    assert (objective(log_p) - objective(plain)).max() > 0.004


FULL = {
    "tilt": (tilt(None, None, BETA), ENUMERATED),
    "entropy_bonus": (entropy_bonus(None, None, BETA, bonus=0.4), ENUMERATED),
    "moving_reference_anchored": (moving_reference(None, None, BETA, anchor=0.3), REPLACED),
    "standardized": (standardized(None, None, BETA), ENUMERATED),
    "length_normalized": (length_normalized(None, None, BETA), ENUMERATED),
}


@pytest.mark.parametrize("name", FULL)
def test_implied_reward_lets_plan_and_measure_see_any_target(name):
    """log Z and KL(p||ref) of the plain tilt of the implied reward at the target's beta are the target's own."""
    target, scored = FULL[name]
    assert target.beta == CASES[name][2]
    implied, log_w = implied_reward(target, scored), LOG_REF - UNIFORM
    log_z = torch.logsumexp(target.log_target(scored), -1)
    torch.testing.assert_close(log_partition(implied, target.beta, log_w, correct=False), log_z)
    log_p = normalise(target.log_target(scored))
    torch.testing.assert_close(tilted_kl(implied, target.beta, log_w, correct=False), kl(log_p, LOG_REF))
    torch.testing.assert_close(log_p, CASES[name][0], rtol=0, atol=1e-12)


def test_implied_reward_of_a_tilt_is_its_reward():
    torch.testing.assert_close(implied_reward(tilt(None, None, BETA), ENUMERATED), REWARD, rtol=0, atol=1e-12)


def test_implied_reward_refuses_what_the_reference_cannot_make():
    scored = Scored(
        log_ref=torch.tensor([[0.0, -torch.inf]]),
        log_q=torch.tensor([[0.5, 0.5]]).log(),
        reward=torch.zeros(1, 2),
    )
    with pytest.raises(ValueError, match="reference cannot make"):
        implied_reward(moving_reference(None, None, 1.0), scored)
    kept = implied_reward(tilt(None, None, 1.0), scored)
    assert kept.tolist() == [[0.0, -math.inf]]


# entropy


def test_entropy_target_is_the_plain_tilt_at_a_temperature():
    target = entropy_bonus(None, None, BETA, bonus=0.4)
    plain = exact_tilt(LOG_REF, REWARD, BETA)
    torch.testing.assert_close(
        normalise(plain / target.temperature), CASES["entropy_bonus"][0], rtol=0, atol=1e-12
    )


def test_without_a_bonus_it_is_the_plain_tilt():
    log_p = law(entropy_bonus(None, None, BETA, bonus=0.0))
    torch.testing.assert_close(log_p, CASES["tilt"][0], rtol=0, atol=1e-12)


def test_entropy_bonus_lengthens():
    """Reward 0 and a reference of a fair choice at every token: the bonus goes towards all strings alike."""
    fair = log_prob(torch.zeros(SPACE.num_prefixes, 3, dtype=torch.float64), SPACE)[None]
    scored = Scored(log_ref=fair, reward=torch.zeros_like(fair))
    lengths = SPACE.lengths.double()
    means = [
        mean(normalise(entropy_bonus(None, None, 1.0, bonus=b).log_target(scored)), lengths).item()
        for b in (0.0, 1.0, 10.0)
    ]
    assert means[0] + 0.2 < means[1]
    assert means[1] + 0.1 < means[2]


# moving reference


@pytest.mark.parametrize("anchor", [0.0, 0.2])
def test_rounds_compose_to_one_tilt(anchor):
    """Exact rounds from the reference: after each of them the policy is the tilt at the composed beta."""
    steps, log_pi = [0.5, 2.0, 0.3, 1.0, 4.0], LOG_REF
    for k, step in enumerate(steps, 1):
        scored = dataclasses.replace(ENUMERATED, log_q=log_pi)
        log_pi = normalise(moving_reference(None, None, step, anchor=anchor).log_target(scored))
        plain = normalise(exact_tilt(LOG_REF, REWARD, composed_beta(steps[:k], anchor=anchor)))
        torch.testing.assert_close(log_pi, plain, rtol=0, atol=1e-12)


def test_without_an_anchor_the_inverses_add_and_with_one_they_stop():
    assert composed_beta([0.5, 2.0, 4.0]) == pytest.approx(1 / (2 + 0.5 + 0.25), rel=1e-15)
    assert composed_beta([1.0] * 1000) == pytest.approx(1e-3)
    for step in (0.1, 1.0, 5.0):
        assert composed_beta([step] * 1000, anchor=0.25) == pytest.approx(0.25, rel=1e-9)


def test_replayed_draws_of_an_older_round_would_get_another_target():
    """Caveat: the target tilts the law of each draw, so draws of two laws in one group have no common target."""
    both = torch.where(torch.arange(Y) % 2 == 0, LOG_REF, LOG_OTHER)
    scored = dataclasses.replace(ENUMERATED, log_q=both)
    residual = moving_reference(None, None, BETA).log_target(scored) - normalise(
        exact_tilt(LOG_REF, REWARD, BETA)
    )
    assert residual.std(1).min() > 0.1
    assert residual[:, ::2].std(1).max() < 1e-12


# standardized


def pool_of(counts, reward):
    """A group in which atom i stands counts[i] times, drawn from the law counts / sum."""
    index = torch.tensor([i for i, n in enumerate(counts) for _ in range(n)])
    log_q = (torch.tensor(counts, dtype=torch.float64) / sum(counts)).log()
    ref = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    rewards = torch.tensor(reward, dtype=torch.float64)
    return Scored(log_ref=ref[index][None], log_q=log_q[index][None], reward=rewards[index][None])


def test_standard_deviation_of_the_reference_is_one_number_whoever_draws():
    """sd under ref of (0, 1, 3) with (1/2, 1/4, 1/4) is sqrt(1.5); the draws' own moves with who draws."""
    of_ref, of_policy = pool_of([4, 2, 2], [0, 1, 3]), pool_of([1, 3, 12], [0, 1, 3])
    fixed, moving = standardized(None, None, 0.5), standardized(None, None, 0.5, over="draws")
    assert fixed.betas(of_ref).item() == pytest.approx(0.5 * math.sqrt(1.5), abs=1e-12)
    assert fixed.betas(of_policy).item() == pytest.approx(0.5 * math.sqrt(1.5), abs=1e-12)
    assert moving.betas(of_ref).item() == pytest.approx(0.5 * math.sqrt(1.5), abs=1e-12)
    variance = (3 + 12 * 9) / 16 - ((3 + 36) / 16) ** 2
    assert moving.betas(of_policy).item() == pytest.approx(0.5 * math.sqrt(variance), abs=1e-12)
    assert abs(variance - 1.5) > 0.4


def test_standardized_is_the_plain_tilt_at_a_beta_of_each_prompt():
    betas = standardized(None, None, BETA).betas(ENUMERATED)
    torch.testing.assert_close(betas, BETA * SD_REF, rtol=1e-12, atol=0)
    each = torch.stack([normalise(exact_tilt(LOG_REF[p], REWARD[p], betas[p].item())) for p in range(P)])
    torch.testing.assert_close(each, CASES["standardized"][0], rtol=0, atol=1e-12)


def test_a_prompt_without_differences_stays_at_the_reference():
    scored = dataclasses.replace(ENUMERATED, reward=torch.full_like(REWARD, 2.0))
    assert standardized(None, None, 0.1).log_target(scored).equal(LOG_REF)
    assert settled_betas(scored.reward, 0.1).tolist() == [0.0] * P


def test_the_standard_deviation_of_the_policy_settles_elsewhere():
    """At the settled beta the law is that of its own standard deviation, and it is not the law of the reference's."""
    log_w = LOG_REF - UNIFORM
    for beta in (5.0, 10.0):
        betas = settled_betas(REWARD, beta, log_w)
        assert (betas > 0).all()
        log_p = normalise(LOG_REF + REWARD / betas[:, None])
        own = (mean(log_p, REWARD**2) - mean(log_p, REWARD) ** 2).sqrt()
        torch.testing.assert_close(beta * own, betas, rtol=1e-10, atol=0)
    assert ((betas - 10.0 * SD_REF).abs() > 1e-2 * SD_REF).all()


def binary(rate):
    return torch.tensor([[1 - rate, rate]], dtype=torch.float64).log(), torch.tensor([[0.0, 1.0]]).double()


def arcsine_objective(log_pi, log_ref, beta):
    return 2 * log_pi[..., 1].exp().sqrt().asin() - beta * kl(log_pi, log_ref)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.8])
def test_binary_rewards_in_their_own_deviations_climb_an_arcsine(rate):
    """Where it settles the slope of 2 arcsin sqrt(E r) - beta KL vanishes; without a place to settle it never does."""
    log_ref, reward = binary(rate)
    beta = 3.0
    settled = settled_betas(reward, beta, log_ref - math.log(0.5))
    theta = normalise(log_ref + reward / settled[:, None]).requires_grad_()
    (slope,) = torch.autograd.grad(arcsine_objective(categorical(theta), log_ref, beta).sum(), theta)
    assert slope.abs().max() < 1e-10

    beta = 0.5
    assert settled_betas(reward, beta, log_ref - math.log(0.5)).item() == 0.0
    rates = torch.linspace(rate, 0.999999, 4001, dtype=torch.float64)
    climbed = arcsine_objective(torch.stack([1 - rates, rates], -1).log(), log_ref, beta)
    assert (climbed.diff() > 0).all()


def test_below_one_and_a_half_nothing_stops_a_pass_rate_of_one_half():
    """A place to settle needs 1 / beta <= max v / cosh v = 0.6627 (v = 1.1997), so beta >= 1.5089."""
    _, reward = binary(0.5)
    assert settled_betas(reward, 1.508).item() == 0.0
    assert settled_betas(reward, 1.510).item() > 0.0


# length


def test_length_normalised_is_the_plain_tilt_at_n_beta_among_strings_of_n_tokens():
    log_p = CASES["length_normalized"][0]
    for n in (1, 2, 3):
        here = SPACE.lengths == n
        plain = normalise(exact_tilt(LOG_REF, REWARD, n * BETA)[:, here])
        torch.testing.assert_close(normalise(log_p[:, here]), plain, rtol=0, atol=1e-12)


def test_a_constant_moves_the_length_normalised_target_and_no_other():
    shifted = dataclasses.replace(ENUMERATED, reward=REWARD + 2.0)
    assert kl(law(length_normalized(None, None, BETA), shifted), CASES["length_normalized"][0]).min() > 1e-2
    for name in ("entropy_bonus", "standardized"):
        moved = normalise(FULL[name][0].log_target(shifted))
        torch.testing.assert_close(moved, CASES[name][0], rtol=0, atol=1e-12)


# mixtures


@pytest.mark.parametrize("share", [0.25, 1.0, 2.0])
def test_geometric_mixture_with_a_tilt_is_the_tilt_at_beta_over_share(share):
    """DeRa: from one policy at BETA, every beta. Exact at the level of completions."""

    class Tilted(TablePolicy):
        def log_prob(self, draws):
            log_p = CASES["tilt"][0]
            rows = []
            for example, group in zip(draws.examples, draws.completions, strict=True):
                for ids in group:
                    y = next(y for y, k in enumerate(SPACE.completions) if k.tolist() == ids.tolist())
                    rows += [log_p[int(example.prompt), y].view(1), torch.zeros(len(ids) - 1).double()]
            return torch.cat(rows)

    found = law(geometric_mixture(REF, Tilted(TABLES), share))
    plain = normalise(exact_tilt(LOG_REF, REWARD, BETA / share))
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-12)


def test_mixture_is_what_it_says_and_its_log_z_is_zero():
    target = mixture(REF, OTHER, 0.2)
    log_target = target.log_target(dataclasses.replace(ENUMERATED, reward=rewarded(target.reward)))
    torch.testing.assert_close(log_target, mixed(0.2), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_target.logsumexp(-1), torch.zeros(P).double(), rtol=0, atol=1e-12)


def test_mixture_keeps_what_one_policy_cannot_make_and_the_geometric_one_forbids_it():
    holes = OTHER_TABLES.clone()
    holes[:, 0, 1] = -torch.inf
    other = TablePolicy(holes)
    cannot = torch.stack([log_prob(table, SPACE) for table in holes]).isneginf()
    assert cannot.any()
    geometric = rewarded(geometric_mixture(REF, other, 0.5).reward)
    assert geometric.isneginf().equal(cannot)
    arithmetic = rewarded(mixture(REF, other, 0.5).reward)
    torch.testing.assert_close(arithmetic[cannot], torch.full_like(arithmetic[cannot], math.log(0.5)))
    with pytest.raises(ValueError, match="reference cannot make"):
        rewarded(mixture(other, REF, 0.5).reward)


# chi-squared


def chi2(log_pi):
    return ((2 * (log_pi - LOG_REF)).exp() * LOG_REF.exp()).sum(-1) - 1


@pytest.mark.parametrize("beta", [0.2, 0.7, 6.0])
def test_chi_squared_target_is_the_maximiser(beta):
    target = chi_squared(None, None, beta)
    log_target = target.log_target(ENUMERATED)
    torch.testing.assert_close(log_target.logsumexp(-1), torch.zeros(P).double(), rtol=0, atol=1e-12)

    def policy(theta):  # squares reach zero, as a softmax cannot
        prob = LOG_REF.exp() * theta**2
        return prob / prob.sum(-1, keepdim=True)

    def objective(prob):
        return (prob * REWARD - beta / 2 * prob**2 / LOG_REF.exp()).sum(-1)

    found = maximise(objective, policy)
    assert (found - log_target.exp()).abs().max() < 1e-8
    assert bool(log_target.isneginf().any()) == (beta < 6.0)


@pytest.mark.parametrize("beta", [0.2, 0.7, 6.0])
def test_what_is_left_to_climb_under_chi_squared(beta):
    """(beta / 2) E_ref (pi/ref - p/ref)^2 + E_pi relu(nu - r), which is not beta KL(pi||p)."""
    target = chi_squared(None, None, beta)
    log_p, nu = target.log_target(ENUMERATED), target.threshold(ENUMERATED)

    def objective(log_pi):
        return mean(log_pi, REWARD) - beta / 2 * chi2(log_pi)

    for log_pi in random_policies():
        ratio, best = (log_pi - LOG_REF).exp(), (log_p - LOG_REF).exp()
        left = beta / 2 * mean(LOG_REF, (ratio - best) ** 2)
        left = left + mean(log_pi, (nu[:, None] - REWARD).clamp_min(0))
        torch.testing.assert_close(objective(log_p) - objective(log_pi), left, rtol=1e-10, atol=1e-10)


def test_chi_squared_with_nothing_cut_off_has_closed_forms():
    average = mean(LOG_REF, REWARD)
    beta = (average - REWARD.amin(-1)).max().item()
    target = chi_squared(None, None, beta)
    log_p = target.log_target(ENUMERATED)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(target.threshold(ENUMERATED), average - beta, **close)
    torch.testing.assert_close(mean(log_p, REWARD), average + SD_REF**2 / beta, **close)
    torch.testing.assert_close(chi2(log_p), SD_REF**2 / beta**2, **close)


def test_chi_squared_agrees_with_the_tilt_to_first_order():
    """Ten times the beta, a hundredth of the difference in probability."""
    differences = [
        (law(chi_squared(None, None, beta)).exp() - normalise(exact_tilt(LOG_REF, REWARD, beta)).exp())
        .abs()
        .max()
        .item()
        for beta in (100.0, 1000.0)
    ]
    assert differences[0] / differences[1] == pytest.approx(100, rel=0.05)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    rewards=st.lists(st.one_of(st.floats(-5, 5), st.just(-math.inf)), min_size=1, max_size=8),
    logits=st.lists(st.one_of(st.floats(-4, 4), st.just(-math.inf)), min_size=8, max_size=8),
    beta=st.floats(1e-3, 1e3),
)
def test_threshold_against_bisection(rewards, logits, beta):
    reward = torch.tensor([rewards], dtype=torch.float64)
    log_ref = torch.tensor([logits[: len(rewards)]], dtype=torch.float64)
    usable = (log_ref > -torch.inf) & (reward > -torch.inf)
    assume(bool(usable.any()))
    log_ref = normalise(log_ref)
    uniform = torch.full_like(log_ref, 1 / len(rewards)).log()
    scored = Scored(log_ref=log_ref, log_q=uniform, reward=reward)
    target = chi_squared(None, None, beta)
    prob, values = log_ref.exp()[usable], reward[usable]
    low, high = values.min().item() - beta / prob.sum().item() - 1, values.max().item()
    for _ in range(200):
        middle = (low + high) / 2
        if (prob * (values - middle).clamp_min(0)).sum().item() > beta:
            low = middle
        else:
            high = middle
    assert target.threshold(scored).item() == pytest.approx(low, rel=1e-9, abs=1e-9)
    log_target = target.log_target(scored)
    assert not log_target.isnan().any()
    assert log_target.logsumexp(-1).item() == pytest.approx(0, abs=1e-6)


def test_chi_squared_threshold_is_low_at_few_draws():
    """Caveat: over all pairs and triples of draws of the reference the mean threshold is below the true one, less so."""
    beta = 0.3
    true = chi_squared(None, None, beta).threshold(ENUMERATED)[0].item()
    means = []
    for num_draws in (2, 3):
        outcomes, prob = tuples(LOG_REF[0], num_draws)
        group = LOG_REF[0][outcomes]
        scored = Scored(log_ref=group, log_q=group, reward=REWARD[0][outcomes])
        means.append((prob * chi_squared(None, None, beta).threshold(scored)).sum().item())
    assert means[0] < means[1] < true - 0.1


def test_chi_squared_needs_an_allowed_draw_and_a_known_law():
    with pytest.raises(ValueError, match="every draw of a prompt is forbidden"):
        chi_squared(None, None, 1.0).log_target(
            dataclasses.replace(ENUMERATED, reward=torch.full_like(REWARD, -torch.inf))
        )
    for target in (
        chi_squared(None, None, 1.0),
        standardized(None, None, 1.0),
        moving_reference(None, None, 1.0),
    ):
        with pytest.raises(ValueError, match="unknown law"):
            target.log_target(dataclasses.replace(ENUMERATED, log_q=None))


# constraints


def short(completion_ids, **columns):
    return [len(ids) < 3 for ids in completion_ids]


def test_forbidding_alone_is_conditioning():
    target = tilt(REF, forbid(short), 0.01)
    log_target = target.log_target(dataclasses.replace(ENUMERATED, reward=rewarded(target.reward)))
    allowed = LENGTHS < 3
    chance = (LOG_REF.exp() * allowed).sum(-1)
    torch.testing.assert_close(log_target.logsumexp(-1), chance.log(), rtol=1e-12, atol=0)
    log_p = normalise(log_target)
    torch.testing.assert_close(kl(log_p, LOG_REF), -chance.log(), rtol=1e-12, atol=0)
    assert log_p.isneginf().equal(~allowed)


def test_forbidden_completions_choose_the_objective():
    """forward_kl takes them and ends at the target; reverse_kl and log_variance refuse them by name."""
    target = tilt(REF, weighted_sum([known, forbid(short)]), BETA)
    log_target = target.log_target(dataclasses.replace(ENUMERATED, reward=rewarded(target.reward)))
    theta = torch.zeros(P, Y, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = forward_kl(categorical(theta), log_target - UNIFORM).sum()
        value.backward()
        return value

    optimizer.step(closure)
    assert kl(normalise(log_target), categorical(theta.detach())).max() < 1e-8
    with pytest.raises(ValueError, match=r"reverse_kl: got log_target = -inf.*forward_kl"):
        reverse_kl(LOG_REF, log_target)
    with pytest.raises(ValueError, match=r"log_variance: got log_target = -inf.*forward_kl"):
        log_variance(LOG_REF, log_target)


def test_a_large_penalty_is_not_a_constraint():
    """A penalty of 3 beta leaves exp(-3) of the forbidden odds."""
    allowed = LENGTHS < 3
    plain = CASES["tilt"][0].exp()
    punished = normalise(exact_tilt(LOG_REF, REWARD - 3 * BETA * ~allowed, BETA)).exp()

    def odds(prob):
        return (prob * ~allowed).sum(-1) / (prob * allowed).sum(-1)

    torch.testing.assert_close(odds(punished) / odds(plain), torch.full((P,), math.exp(-3)).double())


def test_forbid_takes_yes_and_no_only():
    def rating(completion_ids, **columns):
        return [0.5 for _ in completion_ids]

    with pytest.raises(ValueError, match=r"got 0\.5 from `allowed`"):
        rewarded(forbid(rating))


@pytest.mark.parametrize("reward", [None, known])
def test_a_fitted_moment_holds_of_the_target(reward):
    """Half of all completions, averaged over prompts: the tilt at the fitted lam has it, and the plain target has not."""
    start = LOG_REF if reward is None else LOG_REF + REWARD / BETA
    found = fit_moments(FEATURE[..., None], [0.5], start, correct=False)
    beta = 1.0 if reward is None else BETA
    log_p = law(moment_tilt(REF, [said], [found.lam[0].value], reward=reward, beta=beta))
    assert mean(log_p, FEATURE).mean().item() == pytest.approx(0.5, abs=1e-10)
    assert abs(mean(normalise(start), FEATURE).mean() - 0.5) > 0.05
    if reward is None:  # with a reward it is the KL to the tilt of the reward
        assert found.kl.value == pytest.approx(kl(log_p, LOG_REF).mean().item(), abs=1e-12)


# what is refused


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "make",
    [
        tilt,
        lambda *a: entropy_bonus(*a, bonus=0.1),
        moving_reference,
        standardized,
        length_normalized,
        chi_squared,
        lambda ref, reward, beta: mixture(REF, OTHER, 0.5, reward=known, beta=beta),
        lambda ref, reward, beta: composed_beta([1.0, beta]),
        lambda ref, reward, beta: settled_betas(REWARD, beta),
    ],
)
def test_a_beta_that_names_no_target_is_refused(make, beta):
    with pytest.raises(ValueError, match="beta"):
        make(None, None, beta)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: entropy_bonus(None, None, 1.0, bonus=-0.1), "bonus -0.1"),
        (lambda: moving_reference(None, None, 1.0, anchor=-0.1), "anchor -0.1"),
        (lambda: composed_beta([]), "no rounds"),
        (lambda: standardized(None, None, 1.0, over="policy"), "expected one of reference, draws"),
        (lambda: mixture(REF, OTHER, 1.0), "between 0 and 1"),
        (lambda: geometric_mixture(REF, OTHER, 0.0), "share 0"),
        (lambda: mixture(REF, OTHER, 0.5, reward=known), "got no beta"),
        (lambda: geometric_mixture(REF, OTHER, 0.5, beta=1.0), "got no reward"),
        (lambda: moment_tilt(REF, [said], [1.0, 2.0]), "1 features and 2 lam"),
        (lambda: length_normalized(None, None, 1.0).log_target(Scored(REWARD, REWARD)), "no lengths"),
        (
            lambda: standardized(None, None, 1.0).log_target(
                dataclasses.replace(ENUMERATED, reward=REWARD.masked_fill(FEATURE > 0, -torch.inf))
            ),
            "no standard deviation",
        ),
        (lambda: implied_reward(tilt(None, None, 1.0), Scored(reward=REWARD)), "no log_ref"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_targets_keep_the_precision_they_are_given():
    single = Scored(*(x.float() for x in (LOG_REF, REWARD)), log_q=UNIFORM.float(), lengths=LENGTHS)
    for target, _ in FULL.values():
        assert target.log_target(single).dtype == torch.float32
    assert chi_squared(None, None, BETA).log_target(single).dtype == torch.float32


# a language model


@pytest.fixture(scope="module")
def tiny_draws(tiny_model):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from klimb.data import Example
    from klimb.models.policy import CausalPolicy
    from klimb.samplers.ancestral import ancestral

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    policy = CausalPolicy(AutoModelForCausalLM.from_pretrained(tiny_model).eval(), tokenizer)
    other = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.3)
    examples = [Example("write a review of the film"), Example("the meal was")]
    draws = ancestral(
        policy, examples, 5, max_completion_length=6, generator=torch.Generator().manual_seed(3)
    )
    return policy, CausalPolicy(other, tokenizer), draws


def test_a_language_model_in_every_target(tiny_draws):
    """What training makes of draws goes through every target; a log-ratio is that of the very tokens drawn."""
    from klimb.backward import known_numbers
    from klimb.batch import scored_pool

    policy, other, draws = tiny_draws

    def brevity(completion_ids, **columns):
        return [-float(len(ids)) for ids in completion_ids]

    with torch.no_grad():
        ratio = draws.sequence_sums(other.log_prob(draws)) - draws.sequence_sums(policy.log_prob(draws))
    for target in (
        tilt(policy, brevity, 0.5),
        entropy_bonus(policy, brevity, 0.5, bonus=0.1),
        moving_reference(policy, brevity, 0.5, anchor=0.1),
        standardized(policy, brevity, 0.5),
        length_normalized(policy, brevity, 0.5),
        chi_squared(policy, brevity, 50.0),
        mixture(policy, other, 0.3, reward=brevity, beta=0.5),
        geometric_mixture(policy, other, 0.3),
        moment_tilt(policy, [brevity], [0.1]),
    ):
        pool = scored_pool(draws, target)
        found = known_numbers(pool, target)["log_target"]
        assert found.shape == (2, 5)
        assert found.isfinite().all()
    pool = scored_pool(draws, geometric_mixture(policy, other, 0.3))
    torch.testing.assert_close(pool.reward, ratio, rtol=1e-4, atol=1e-4)
    assert ratio.abs().max() > 0.1
