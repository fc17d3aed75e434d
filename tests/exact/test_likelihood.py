"""Likelihood of chosen or weighted draws: which law each choice makes the target, exactly, and where that is not p.

Five atoms, all tuples of draws; minima by L-BFGS on the logits, to the end.
"""

import itertools

import pytest
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
    tilt,
    tuples,
)
from klimb.numbers.best_of_n import best_of_n_beta, best_of_n_law
from klimb.objectives import coefficients, dpg, filtered, forward_kl, raft, reward_weighted, sft

ATOMS, BETA = 5, 0.7
GENERATOR = torch.Generator().manual_seed(100)
LOG_REF = categorical(random_logits(ATOMS, generator=GENERATOR))
REWARD = random_logits(ATOMS, generator=GENERATOR)
REWARD[3] = REWARD[1]  # a tie
LOG_TARGET = tilt(LOG_REF, REWARD, BETA) + 1.0
LOG_P, LOG_Z = normalise(LOG_TARGET), log_partition(LOG_TARGET)
THETA = random_logits(ATOMS, generator=GENERATOR)
ON, OFF = categorical(THETA), categorical(random_logits(ATOMS, generator=GENERATOR))


def population(objective, log_q, num_draws):
    outcomes, prob = tuples(log_q, num_draws)
    return lambda log_pi: (prob * objective(log_pi, outcomes)).sum()


def expected(objective, log_q, num_draws):
    theta = THETA.clone().requires_grad_()
    log_pi = categorical(theta)
    value, (gradient,) = expectation(lambda y: objective(log_pi, y), log_q, num_draws, parameters=[theta])
    return value, gradient


def cross_entropy(log_p, log_pi):
    return mean(log_p, -log_pi)


def slope(log_p):
    """grad KL(p||pi) in the logits."""
    return ON.exp() - log_p.exp()


def check(value, gradient, law):
    assert abs(value - cross_entropy(law, ON)) < 1e-12
    assert (gradient - slope(law)).abs().max() < 1e-12


def test_slope_is_the_gradient(numeric_gradient):
    numeric = numeric_gradient(lambda x: kl(LOG_P, categorical(x)), THETA, 1e-3)
    assert (numeric - slope(LOG_P)).abs().max() < 1e-8
    assert slope(LOG_P).abs().max() > 1e-2


# fine-tuning on draws as they come


@pytest.mark.parametrize("law", [LOG_P, OFF])
def test_sft_is_unbiased_for_the_law_that_drew(law, minimise):
    check(*expected(lambda log_pi, y: sft(log_pi[y]), law, 3), law)
    assert kl(minimise(population(lambda log_pi, y: sft(log_pi[y]), law, 2)), law) < 1e-8


def test_best_of_n_distillation_is_sft_on_best_of_n_and_follows_ranks(minimise):
    """Caveat: the target is best-of-n's law, the same for every increasing function of the reward; not the tilt of r."""
    law = best_of_n_law(LOG_REF.exp()[None], REWARD[None], 4)[0].log()
    found = minimise(population(lambda log_pi, y: sft(log_pi[y]), law, 2))
    assert kl(found, law) < 1e-8
    cubed = best_of_n_law(LOG_REF.exp()[None], (REWARD**3)[None], 4)[0].log()
    assert (cubed - law).abs().max() < 1e-12
    tilts = [kl(law, normalise(tilt(LOG_REF, REWARD, beta))) for beta in (0.1, 0.2, 0.4, 0.8, 1.6, BETA)]
    assert min(tilts) > 1e-3


def test_best_of_n_is_the_tilt_of_the_log_quantile_as_atoms_get_fine():
    def away(num_atoms, n=5):
        probs = torch.full((1, num_atoms), 1 / num_atoms, dtype=torch.float64)
        quantile = (torch.arange(num_atoms, dtype=torch.float64)[None] + 0.5) / num_atoms
        law = best_of_n_law(probs, quantile, n)[0].log()
        return kl(law, normalise(tilt(probs[0].log(), quantile[0].log(), best_of_n_beta(n)))).item()

    assert away(100) < 1e-4
    assert away(400) < away(100) / 8


# reward-weighted regression


def counted(log_pi, law, total=24):
    """A group in which each atom stands as often as in its law: what many draws come to."""
    counts = (law.exp() * total).round().long()
    assert torch.allclose(counts / total, law.exp().to(torch.float32))
    y = torch.repeat_interleave(torch.arange(ATOMS), counts)[None]
    return log_pi[y], y


COUNTED = torch.tensor([8, 5, 2, 6, 3], dtype=torch.float64).div(24).log()
COUNTED_REF = torch.tensor([3, 4, 9, 2, 6], dtype=torch.float64).div(24).log()


def test_reward_weighted_regression_ends_at_the_tilt_of_the_law_that_drew(minimise):
    def end(law):
        def loss(log_pi):
            picked, y = counted(log_pi, law)
            return reward_weighted(picked, tilt(COUNTED_REF, REWARD, BETA)[y], COUNTED_REF[y]).sum()

        return minimise(loss)

    log_p = normalise(tilt(COUNTED_REF, REWARD, BETA))
    assert kl(end(COUNTED_REF), log_p) < 1e-8
    assert kl(end(COUNTED), normalise(tilt(COUNTED, REWARD, BETA))) < 1e-8
    assert kl(end(COUNTED), log_p) > 1e-2  # caveat: not p


def test_reward_weighted_is_forward_kl_where_the_reference_drew():
    y, _ = tuples(LOG_REF, 3)
    ours = reward_weighted(ON[y], LOG_TARGET[y], LOG_REF[y])
    torch.testing.assert_close(ours, forward_kl(ON[y], (LOG_TARGET - LOG_REF)[y]), rtol=0, atol=0)
    assert (ours - forward_kl(ON[y], (LOG_TARGET - OFF)[y])).abs().max() > 1e-2


def test_reward_weighted_is_biased_by_order_one_over_g():
    truth = cross_entropy(LOG_P, ON)

    def bias(num_draws):
        value, _ = expected(
            lambda log_pi, y: reward_weighted(log_pi[y], LOG_TARGET[y], LOG_REF[y]), LOG_REF, num_draws
        )
        return (value - truth).abs().item()

    assert bias(2) > 1e-2
    assert bias(8) < bias(4) / 1.6 < bias(2) / 2


def test_rounds_of_reward_weighting_pass_the_target_by():
    """MPO, mirror descent: k exact rounds from ref are p at beta / k; nothing holds the policy at p."""
    law = LOG_REF
    for k in range(1, 5):
        moving = tilt(law, REWARD, BETA)  # log_target by the lagged policy
        numbers = {"log_target": moving[None], "log_ref": law[None]}
        _, table = coefficients(reward_weighted, log_pi=law[None], **numbers)
        weighted = normalise(law + (-table["log_pi"][0]).log())  # enumerated: the law times the weights
        assert kl(weighted, normalise(moving)) < 1e-12
        law = normalise(moving)
        assert kl(law, normalise(tilt(LOG_REF, REWARD, BETA / k))) < 1e-12
    assert kl(law, LOG_P) > 1e-2


def test_a_moving_target_that_stays_at_p():
    """forward_kl with log_w = a (log_target - log_lag): rounds of lag^(1-a) target^a, whose fixed point is p."""
    law, distances = LOG_REF, []
    for _ in range(40):
        law = normalise(law + 0.4 * (LOG_TARGET - law))
        distances.append(kl(law, LOG_P).item())
    assert distances[0] > 1e-2
    assert distances[-1] < 1e-8
    stay = 0.4 * (LOG_TARGET - LOG_P)
    assert (stay - stay.mean()).abs().max() < 1e-12  # equal weights at p: only there


# selection


@pytest.mark.parametrize("num_draws", [2, 3, 4])
def test_raft_of_one_is_best_of_g_with_ties(num_draws, minimise):
    law = best_of_n_law(LOG_REF.exp()[None], REWARD[None], num_draws)[0].log()
    check(*expected(lambda log_pi, y: raft(log_pi[y], REWARD[y]), LOG_REF, num_draws), law)
    found = minimise(population(lambda log_pi, y: raft(log_pi[y], REWARD[y]), LOG_REF, num_draws))
    assert kl(found, law) < 1e-8
    assert kl(found, LOG_P) > 1e-3  # caveat: not p


def test_rounds_of_raft_end_on_the_best_completion_alone():
    """Caveat: nothing holds it; the 12th exact round of best of two has all its mass on the largest reward."""
    law = LOG_REF.exp()[None]
    for _ in range(12):
        law = best_of_n_law(law, REWARD[None], 2)
    assert law[0, REWARD.argmax()] > 1 - 1e-8
    assert LOG_P[REWARD.argmax()].exp() < 0.9


def test_raft_of_k_ends_at_the_law_of_one_of_the_best_k():
    y, prob = tuples(OFF, 4)
    best = torch.zeros(ATOMS).double()
    for group, p in zip(y.tolist(), prob, strict=True):
        for kept in sorted(group, key=lambda a: -REWARD[a].item())[:2]:
            best[kept] += p / 2
    check(*expected(lambda log_pi, y: raft(log_pi[y], REWARD[y], keep=2), OFF, 4), best.log())
    everything, _ = expected(lambda log_pi, y: raft(log_pi[y], REWARD[y], keep=4), OFF, 4)
    assert abs(everything - cross_entropy(OFF, ON)) < 1e-12
    mutant, _ = expected(lambda log_pi, y: raft(log_pi[y], -REWARD[y], keep=2), OFF, 4)
    assert abs(mutant - cross_entropy(best.log(), ON)) > 1e-2


def test_keeping_one_draw_by_its_weight_and_not_the_best_is_forward_kl():
    """The selection that keeps p: one of the group with probability softmax(log_w), averaged over the choice."""
    y, _ = tuples(OFF, 3)
    log_w = (LOG_TARGET - OFF)[y]
    chosen = torch.stack(
        [sft(ON[y[:, [i]]]) * torch.softmax(log_w, 1)[:, i] for i in range(3)]
    )  # fine-tuned on the one draw
    torch.testing.assert_close(chosen.sum(0), forward_kl(ON[y], log_w), rtol=1e-13, atol=1e-13)
    assert (raft(ON[y], REWARD[y]) - forward_kl(ON[y], log_w)).abs().max() > 1e-2


def test_rejection_with_the_bound_keeps_the_target_in_every_group():
    """All coins of acceptance exp(log_w - bound): the sum over accepted is the unnormalised weight on average."""
    y, prob = tuples(OFF, 2)
    log_w = (LOG_TARGET - OFF)[y]
    accept = torch.exp(log_w - (LOG_TARGET - OFF).max())
    value, kept = 0.0, 0.0
    for coins in itertools.product([True, False], repeat=2):
        mask = torch.tensor(coins)
        chance = prob * torch.where(mask, accept, 1 - accept).prod(1)
        value = value - (chance[:, None] * mask * ON[y]).sum()
        kept = kept + (chance[:, None] * mask).sum()
    assert abs(value / kept - cross_entropy(LOG_P, ON)) < 1e-12


THRESHOLD = REWARD[1].item()  # reached by the tied atoms and what is above


@pytest.mark.parametrize("num_draws", [1, 2, 4])
def test_filtered_ends_at_the_law_under_a_hard_constraint(num_draws, minimise):
    above = REWARD >= THRESHOLD
    assert 1 < above.sum() < ATOMS
    law = normalise(OFF.masked_fill(~above, -torch.inf))
    share = 1 - (1 - OFF.exp()[above].sum()) ** num_draws
    value, gradient = expected(
        lambda log_pi, y: filtered(log_pi[y], REWARD[y], threshold=THRESHOLD), OFF, num_draws
    )
    assert abs(value - share * cross_entropy(law, ON)) < 1e-12
    assert (gradient - share * slope(law)).abs().max() < 1e-12
    assert (gradient - slope(law)).abs().max() > 1e-3  # caveat: rare success counts less
    found = minimise(
        population(lambda log_pi, y: filtered(log_pi[y], REWARD[y], threshold=THRESHOLD), OFF, num_draws)
    )
    assert kl(law, found) < 1e-8


def test_filtered_is_the_limit_of_a_small_beta_and_p_at_none():
    success = (REWARD >= THRESHOLD).double()
    law = normalise(LOG_REF.masked_fill(success == 0, -torch.inf))
    assert kl(law, normalise(tilt(LOG_REF, success, 0.02))) < 1e-8
    assert kl(law, normalise(tilt(LOG_REF, success, 0.5))) > 1e-2


def test_filtered_with_weights_is_p_restricted_to_what_is_kept(minimise):
    """forward_kl with -inf below the threshold: a hard constraint on the target, enumerated."""
    below = REWARD < THRESHOLD
    log_w = LOG_TARGET.masked_fill(below, -torch.inf)
    found = minimise(lambda log_pi: forward_kl(log_pi[None], log_w[None]).sum())
    assert kl(normalise(log_w), found) < 1e-8
    equal = minimise(
        lambda log_pi: filtered(log_pi[None], REWARD[None], threshold=THRESHOLD).sum()
    )  # enumerated without weights: the uniform law
    assert kl(normalise(log_w), equal) > 1e-2


# DPG


def weighted(log_pi, y, log_z=LOG_Z, law=OFF, log_target=LOG_TARGET):
    return dpg(log_pi[y], log_target[y], log_z.expand(len(y)), None if law is None else law[y])


@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("law", [ON, OFF])
def test_dpg_is_unbiased_in_value_and_gradient(law, num_draws):
    stated = None if law is ON else law
    value, gradient = expected(lambda log_pi, y: weighted(log_pi, y, law=stated), law, num_draws)
    assert abs(value - kl(LOG_P, ON)) < 1e-12
    assert (gradient - slope(LOG_P)).abs().max() < 1e-12
    _, biased = expected(
        lambda log_pi, y: forward_kl(log_pi[y], (LOG_TARGET - law)[y]), law, max(num_draws, 2)
    )
    assert (biased - slope(LOG_P)).abs().max() > 1e-3  # the self-normalised one is not


def test_dpg_without_the_right_log_z_is_scaled_and_not_turned():
    for shift in (-1.0, 0.5):
        value, gradient = expected(lambda log_pi, y, s=shift: weighted(log_pi, y, LOG_Z + s), OFF, 2)
        scale = torch.tensor(-shift, dtype=torch.float64).exp()
        assert (gradient - scale * slope(LOG_P)).abs().max() < 1e-12
        assert abs(value - (scale * (kl(LOG_P, ON) - shift) - scale + 1)) < 1e-12


def test_dpg_has_no_variance_at_the_target_and_no_negative_part():
    theta = LOG_P.clone().requires_grad_()

    def variance(objective, law):
        return gradient_variance(lambda y: objective(categorical(theta), y), law, 2, parameter=theta).item()

    for law in (LOG_P, OFF):
        assert variance(lambda log_pi, y, q=law: weighted(log_pi, y, law=q), law) < 1e-20
        assert variance(lambda log_pi, y, q=law: weighted(log_pi, y, LOG_Z + 1, q), law) > 1e-3
        assert variance(lambda log_pi, y, q=law: forward_kl(log_pi[y], (LOG_TARGET - q)[y]), OFF) > 1e-3
    without = lambda log_pi, y: -(torch.exp(LOG_P - OFF)[y] * log_pi[y]).mean(1)  # noqa: E731
    assert variance(without, OFF) > 1e-3  # the baseline's work
    parts = weighted(ON, torch.arange(ATOMS)[:, None])
    assert (parts > 0).all()
    assert weighted(LOG_P, torch.arange(ATOMS)[:, None]).abs().max() < 1e-15


def test_dpg_ends_at_the_target(minimise):
    found = minimise(population(weighted, OFF, 1))
    assert kl(found, LOG_P) < 1e-8
    fresh = expected(lambda log_pi, y: weighted(log_pi, y, law=None), ON, 1)[1]
    assert (fresh - slope(LOG_P)).abs().max() < 1e-12


def test_dpg_takes_forbidden_draws_and_pushes_them_down():
    log_target = LOG_TARGET.masked_fill(torch.arange(ATOMS) == 2, -torch.inf)
    log_p, log_z = normalise(log_target), log_partition(log_target)
    value, gradient = expected(lambda log_pi, y: weighted(log_pi, y, log_z, OFF, log_target), OFF, 2)
    assert abs(value - kl(log_p, ON)) < 1e-12
    assert (gradient - slope(log_p)).abs().max() < 1e-12
    _, table = coefficients(
        dpg, log_pi=ON[None], log_target=log_target[None], log_z=log_z[None], log_q=OFF[None]
    )
    assert table["log_pi"][0, 2] > 0


# what is refused


X = torch.zeros(1, 2)
FORBIDDEN = torch.tensor([[0.0, -torch.inf]])


def test_forbidden_draws_are_never_kept_and_groups_of_them_are_silent():
    log_pi = torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    reward = torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]])
    for objective in (
        lambda log_pi: raft(log_pi, reward, keep=2),
        lambda log_pi: filtered(log_pi, reward, threshold=-torch.inf),
        lambda log_pi: reward_weighted(log_pi, reward, torch.zeros(2, 2)),
    ):
        value, table = coefficients(objective, log_pi=log_pi)
        torch.testing.assert_close(value, torch.tensor([4.0, 1.0]).log())
        assert table["log_pi"].tolist() == [[-1.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: sft(torch.tensor([[0.0, -torch.inf]])), "got log_pi = -inf"),
        (lambda: sft(torch.zeros(3)), r"log_pi of shape \[3\], expected \[P, G\]"),
        (lambda: raft(X, X * torch.nan), "raft: got reward = nan"),
        (lambda: raft(X, X + torch.inf), "raft: got reward = inf"),
        (lambda: raft(X, X, keep=3), "raft: got keep = 3 of 2"),
        (lambda: raft(X, X, keep=0), "raft: got keep = 0 of 2"),
        (lambda: filtered(X, X, threshold=torch.nan), "filtered: got threshold = nan"),
        (lambda: filtered(X, X + torch.inf, threshold=0.0), "filtered: got reward = inf"),
        (lambda: reward_weighted(X, X + torch.inf, X), "reward_weighted: got log_target = inf"),
        (lambda: reward_weighted(X, X, FORBIDDEN), "reward_weighted: got log_ref = -inf"),
        (lambda: dpg(X, X * torch.nan, torch.zeros(1)), "dpg: got log_target = nan"),
        (lambda: dpg(X, X, torch.zeros(2)), "dpg: got log_z .*expected 1 finite"),
        (lambda: dpg(X, X, torch.full((1,), torch.nan)), "dpg: got log_z .nan.*expected 1 finite"),
        (lambda: dpg(X, X, torch.zeros(1), FORBIDDEN), "dpg: got log_q = -inf"),
        (lambda: dpg(X, X, torch.full((1,), -100.0)), "dpg: got a weight beyond torch.float32"),
    ],
)
def test_refused(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()
