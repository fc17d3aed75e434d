"""Squared residuals: what they estimate and where they lead, right where log Z is right, and elsewhere where it is not.

Six atoms, all tuples of draws; minima by L-BFGS on the logits, to the end.
"""

import pytest
import torch
from scipy.optimize import brentq
from scipy.special import lambertw

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
from klimb.numbers.best_of_n import quantile_log_partition
from klimb.objectives import (
    coefficients,
    length_normalised_balance,
    log_variance,
    parted,
    pmd_mean,
    trajectory_balance,
)

ATOMS, BETA = 6, 0.5
GENERATOR = torch.Generator().manual_seed(80)
LOG_REF = categorical(random_logits(ATOMS, generator=GENERATOR))
REWARD = random_logits(ATOMS, generator=GENERATOR)
LOG_TARGET = tilt(LOG_REF, REWARD, BETA)
LOG_P, LOG_Z = normalise(LOG_TARGET), log_partition(LOG_TARGET)
THETA = random_logits(ATOMS, generator=GENERATOR)
ON, OFF = categorical(THETA), categorical(random_logits(ATOMS, generator=GENERATOR))
LENGTHS = torch.tensor([1, 2, 3, 4, 2, 1])


@pytest.fixture
def minimise(to_the_end):
    """The policy, and `extra` further numbers, at which loss(log_pi, extra) is least."""

    def found(loss, *, num_atoms=ATOMS, start=None, extra=0):
        theta = torch.zeros(num_atoms, dtype=torch.float64) if start is None else start
        if not extra:
            (theta,) = to_the_end(lambda theta: loss(categorical(theta), None), theta)
            return categorical(theta), None
        theta, other = to_the_end(
            lambda theta, other: loss(categorical(theta), other),
            theta,
            torch.zeros(extra, dtype=torch.float64),
        )
        return categorical(theta), other

    return found


def balance(log_pi, y, log_z, log_target=LOG_TARGET):
    return trajectory_balance(log_pi[y], log_target[y], torch.as_tensor(log_z).expand(len(y)))


def population(objective, log_q, num_draws=1):
    outcomes, prob = tuples(log_q, num_draws)
    return lambda log_pi, other: (prob * objective(log_pi, outcomes, other)).sum()


def expected(objective, log_q, num_draws, *parameters):
    theta = THETA.clone().requires_grad_()
    log_pi = categorical(theta)
    return expectation(lambda y: objective(log_pi, y), log_q, num_draws, parameters=[theta, *parameters])


@pytest.fixture(scope="module")
def grad_kl(numeric_gradient):
    return numeric_gradient(lambda x: kl(categorical(x), LOG_P), THETA, 1e-3)


# trajectory balance: gradients and values


@pytest.mark.parametrize("shift", [0.0, 3.0, -10.0])
def test_on_policy_the_gradient_is_that_of_the_kl_for_any_log_z(shift, grad_kl):
    _, (gradient,) = expected(lambda log_pi, y: balance(log_pi, y, LOG_Z + shift), ON, 2)
    assert (gradient - grad_kl).abs().max() < 1e-8
    assert grad_kl.abs().max() > 1e-2
    assert (-gradient - grad_kl).abs().max() > 1e-2


def test_off_policy_it_is_the_gradient_of_the_half_square_and_depends_on_log_z(numeric_gradient):
    def half_square(x):
        return mean(OFF, (LOG_TARGET - categorical(x) - LOG_Z - 1.0) ** 2) / 2

    value, (gradient,) = expected(lambda log_pi, y: balance(log_pi, y, LOG_Z + 1.0), OFF, 2)
    assert abs(value - half_square(THETA)) < 1e-12
    assert (gradient - numeric_gradient(half_square, THETA, 1e-3)).abs().max() < 1e-8
    _, (right,) = expected(lambda log_pi, y: balance(log_pi, y, LOG_Z), OFF, 2)
    assert (gradient - right).abs().max() > 1e-2


@pytest.mark.parametrize("law", [ON, OFF])
def test_gradient_in_log_z_is_what_it_lacks_of_the_mean_residual(law):
    log_z = (LOG_Z + 0.3).clone().requires_grad_()
    _, (_, gradient) = expected(lambda log_pi, y: balance(log_pi, y, log_z), law, 3, log_z)
    assert abs(gradient - (log_z.detach() - mean(law, LOG_TARGET - ON))) < 1e-12


def test_a_log_z_learned_on_policy_is_low_by_the_kl_that_is_left():
    """Where it stands still: log Z - KL(pi||p)."""
    log_z = (LOG_Z - kl(ON, LOG_P)).clone().requires_grad_()
    _, (_, gradient) = expected(lambda log_pi, y: balance(log_pi, y, log_z), ON, 2, log_z)
    assert gradient.abs() < 1e-12
    assert kl(ON, LOG_P) > 0.1


def test_no_variance_at_the_target_where_log_z_is_right():
    theta = LOG_P.clone().requires_grad_()

    def variance(log_z, law):
        return gradient_variance(
            lambda y: balance(categorical(theta), y, log_z), law, 2, parameter=theta
        ).item()

    for law in (LOG_P, OFF):
        assert variance(LOG_Z, law) < 1e-20
        assert variance(LOG_Z + 1.0, law) > 1e-3  # off by one nat: unbiased on policy, but noise


# trajectory balance: minima


@pytest.mark.parametrize("law", [LOG_REF, OFF])
def test_off_policy_minimum_is_the_target_with_log_z_known_or_learned(law, minimise):
    found, _ = minimise(population(lambda log_pi, y, _: balance(log_pi, y, LOG_Z), law))
    assert kl(found, LOG_P) < 1e-8
    found, learned = minimise(population(lambda log_pi, y, z: balance(log_pi, y, z), law), extra=1)
    assert kl(found, LOG_P) < 1e-8
    assert abs(learned - LOG_Z) < 1e-5


def lambert(log_target, log_q):
    """log pi + nu pi / q = log_target (nu > 0), by Lambert's W and one root; the law that sums to one."""
    a, q = log_target.numpy(), log_q.exp().numpy()

    def law(log_nu):
        nu = torch.tensor(log_nu).exp().item()
        return (q / nu) * lambertw(nu * torch.from_numpy(a).exp().numpy() / q).real

    return torch.from_numpy(law(brentq(lambda x: law(x).sum() - 1, -30, 5, xtol=1e-14))).log()


@pytest.mark.parametrize("law", [LOG_REF, OFF])
def test_off_policy_too_low_a_log_z_ends_at_lambert_s_w(law, minimise):
    log_z = LOG_Z - 0.7
    found, _ = minimise(population(lambda log_pi, y, _: balance(log_pi, y, log_z), law))
    assert (found.exp() - lambert(LOG_TARGET - log_z, law).exp()).abs().max() < 1e-6
    assert kl(found, LOG_P) > 1e-3


def test_off_policy_too_high_a_log_z_leaks_onto_what_is_rarely_drawn(minimise):
    """0.7 nats high, one outcome in 170 draws takes a third and more; 0.7 nats low costs little."""
    log_ref = torch.tensor([0.5, 0.3, 0.194, 0.006], dtype=torch.float64).log()
    log_target = tilt(log_ref, torch.tensor([0.0, 0.2, 0.3, 0.15], dtype=torch.float64), BETA)
    log_p, ends = normalise(log_target), {}
    for shift in (-0.7, 0.7):
        log_z = log_partition(log_target) + shift
        loss = population(lambda log_pi, y, _, z=log_z: balance(log_pi, y, z, log_target), log_ref)
        starts = [log_ref, *(5.0 * torch.eye(4).double())]
        candidates = [minimise(loss, num_atoms=4, start=start)[0] for start in starts]
        ends[shift] = min(candidates, key=lambda log_pi: loss(log_pi, None))
        nu = (log_target - log_z - ends[shift]) * (log_ref - ends[shift]).exp()
        assert nu.std() < 1e-6  # both are of the form log pi + nu pi / q = log_target - log_z
        assert (nu.mean() > 0) == (shift < 0)
    assert log_p[3].exp() < 0.008
    assert ends[0.7][3].exp() > 0.33
    assert kl(ends[0.7], log_p) > 1
    assert kl(ends[-0.7], log_p) < 0.01


def test_a_star_at_the_same_beta_ends_at_the_target_and_at_another_beta_does_not(minimise):
    """A*-PO: log_z = V* / beta with V* = beta log E_ref exp(r / beta). Published: V* at another beta."""

    def end(beta_of_value):
        value = beta_of_value * log_partition(tilt(LOG_REF, REWARD, beta_of_value))
        return minimise(population(lambda log_pi, y, _: balance(log_pi, y, value / BETA), LOG_REF))[0]

    assert kl(end(BETA), LOG_P) < 1e-8
    assert kl(end(4 * BETA), LOG_P) > 1e-3


def test_without_full_support_a_learned_log_z_takes_the_blame(minimise):
    """Caveat: what is never drawn may have any probability, and log_z answers for it."""
    filtered = normalise(OFF.masked_fill(torch.arange(ATOMS) == LOG_P.argmax(), -torch.inf))
    found, learned = minimise(
        population(lambda log_pi, y, z: balance(log_pi, y, z), filtered), start=THETA, extra=1
    )
    seen = torch.arange(ATOMS) != LOG_P.argmax()
    assert (LOG_TARGET - found - learned)[seen].abs().max() < 1e-5
    assert kl(found, LOG_P) > 1e-3
    assert abs(learned - LOG_Z) > 1e-2


# what trajectory balance and log_variance are called elsewhere


def test_rebel_is_the_half_variance_of_two_draws_towards_the_tilt_of_the_lagged_policy():
    log_pi, log_lag, reward = (random_logits(50, 2, generator=GENERATOR) for _ in range(3))
    ratio = log_pi - log_lag
    rebel = (BETA * (ratio[:, 0] - ratio[:, 1]) - (reward[:, 0] - reward[:, 1])).square()
    ours = log_variance(log_pi, tilt(log_lag, reward, BETA))
    torch.testing.assert_close(rebel, 4 * BETA**2 * ours, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(rebel, 4 * BETA**2 * log_variance(log_pi, tilt(log_pi, reward, BETA)))


def test_oapl_is_trajectory_balance_towards_the_tilt_of_the_lagged_policy():
    log_pi, log_lag, reward = (random_logits(50, 4, generator=GENERATOR) for _ in range(3))
    value = BETA * ((reward / BETA).logsumexp(1, keepdim=True) - torch.tensor(4.0).log())
    oapl = (BETA * (log_pi - log_lag) - (reward - value)).square().mean(1)
    ours = trajectory_balance(log_pi, tilt(log_lag, reward, BETA), value[:, 0] / BETA)
    torch.testing.assert_close(oapl, 2 * BETA**2 * ours, rtol=1e-12, atol=1e-12)


def test_oapl_ends_at_the_tilt_of_the_lagged_policy_and_not_of_the_reference(minimise):
    moving = tilt(OFF, REWARD, BETA)
    log_z = log_partition(moving)
    found, _ = minimise(population(lambda log_pi, y, _: balance(log_pi, y, log_z, moving), OFF))
    assert kl(found, normalise(moving)) < 1e-8
    assert kl(found, LOG_P) > 1e-2


def test_log_z_from_the_same_draws_moves_the_minimum_at_small_g(minimise):
    """Caveat of OAPL, and of A*-PO without a stage of its own: the estimate and the draws are not independent."""

    def with_own_log_z(log_pi, y, _):
        log_z = (LOG_TARGET - LOG_REF)[y].logsumexp(1) - torch.tensor(y.shape[1]).double().log()
        return trajectory_balance(log_pi[y], LOG_TARGET[y], log_z)

    two, five = (kl(minimise(population(with_own_log_z, LOG_REF, g))[0], LOG_P).item() for g in (2, 5))
    assert two > 5e-2
    assert two > 2 * five > 1e-3


# PMD-mean


def mean_balance(log_pi, y, _=None):
    return pmd_mean(log_pi[y], LOG_TARGET[y], LOG_REF[y])


@pytest.mark.parametrize("num_draws", [2, 3, 4])
def test_pmd_mean_of_reference_draws_ends_at_lambert_s_w(num_draws, minimise):
    """beta log rho + c rho = (1 - 1/G) (r - E_ref r), to 1e-6; the published form is the limit of many draws."""
    found, _ = minimise(population(mean_balance, LOG_REF, num_draws))
    s = 1 - 1 / num_draws
    centred = REWARD - mean(LOG_REF, REWARD)
    predicted = lambert(LOG_REF + s * centred / BETA, LOG_REF)
    assert (found.exp() - predicted.exp()).abs().max() < 1e-6
    assert kl(found, LOG_P) > 1e-2
    c = (s * centred - BETA * (found - LOG_REF)) * (LOG_REF - found).exp()
    assert c.std() < 1e-5
    assert c.mean() > 0
    unshrunk = lambert(LOG_REF + centred / BETA, LOG_REF)
    assert (found.exp() - unshrunk.exp()).abs().max() > 1e-2  # the mutant that forgets s


def test_pmd_mean_of_many_reference_draws(minimise):
    """The population form: log Z replaced by E_ref r / beta."""
    log_z = mean(LOG_REF, REWARD) / BETA
    found, _ = minimise(population(lambda log_pi, y, _: balance(log_pi, y, log_z), LOG_REF))
    predicted = lambert(LOG_TARGET - log_z, LOG_REF)
    assert (found.exp() - predicted.exp()).abs().max() < 1e-6
    assert kl(found, LOG_P) > 1e-2


@pytest.mark.parametrize("num_draws", [2, 3])
def test_pmd_mean_on_policy_goes_to_a_beta_of_its_own(num_draws, numeric_gradient, grad_kl):
    """Caveat: each draw is in the mean it is compared with, so the reward counts (G - 1) / G."""
    s = 1 - 1 / num_draws
    elsewhere = normalise(tilt(LOG_REF, REWARD, BETA / s))
    truth = numeric_gradient(lambda x: kl(categorical(x), elsewhere), THETA, 1e-3)
    _, (gradient,) = expected(mean_balance, ON, num_draws)
    assert (gradient - truth).abs().max() < 1e-8
    assert (gradient - grad_kl).abs().max() > 1e-2


# FlowRL


def flow(log_pi, y, log_z, lengths=LENGTHS):
    return length_normalised_balance(
        log_pi[y], LOG_TARGET[y], LOG_REF[y], lengths[y], torch.as_tensor(log_z).expand(len(y))
    )


@pytest.mark.parametrize("law", [LOG_REF, OFF])
def test_length_normalised_balance_ends_at_a_reward_per_token(law, minimise):
    c = brentq(
        lambda c: (LOG_REF + LENGTHS * (REWARD / BETA - c)).exp().sum().item() - 1, -20, 20, xtol=1e-14
    )
    predicted = LOG_REF + LENGTHS * (REWARD / BETA - c)
    loss = population(flow, law)
    found, learned = minimise(loss, extra=1)
    assert kl(found, predicted) < 1e-8
    assert abs(learned - c) < 1e-5
    assert kl(found, LOG_P) > 1e-2
    assert loss(predicted, torch.tensor(c, dtype=torch.float64)) < 1e-20


def test_length_normalised_balance_of_one_length(minimise):
    """All of length 1: trajectory balance. All of length 2: p at half the beta."""
    y, _ = tuples(OFF, 2)
    torch.testing.assert_close(
        flow(ON, y, LOG_Z, torch.ones(ATOMS)), balance(ON, y, LOG_Z), rtol=1e-13, atol=1e-13
    )
    twos = torch.full((ATOMS,), 2)
    found, _ = minimise(population(lambda log_pi, y, z: flow(log_pi, y, z, twos), OFF), extra=1)
    assert kl(found, normalise(tilt(LOG_REF, REWARD, BETA / 2))) < 1e-8


def test_length_normalised_balance_depends_on_log_z_even_on_policy():
    _, (low,) = expected(lambda log_pi, y: flow(log_pi, y, LOG_Z), ON, 1)
    _, (high,) = expected(lambda log_pi, y: flow(log_pi, y, LOG_Z + 1.0), ON, 1)
    assert (low - high).abs().max() > 1e-2


# QRPO


def test_quantile_rewards_need_no_estimate_of_log_z(minimise):
    """300 atoms of one mass, mid-quantiles: the uniform law but for 1 / (24 K^2 beta^2) nats."""
    num_atoms = 300
    log_ref = torch.full((num_atoms,), 1 / num_atoms, dtype=torch.float64).log()
    quantile = (torch.arange(num_atoms) + 0.5) / num_atoms
    log_target = tilt(log_ref, quantile.double(), BETA)
    log_z = quantile_log_partition(BETA)
    assert 0 < log_z - log_partition(log_target) < 1.1 / (24 * num_atoms**2 * BETA**2)
    found, _ = minimise(
        lambda log_pi, _: trajectory_balance(
            log_pi[None], log_target[None], torch.tensor([log_z], dtype=torch.float64)
        ).sum(),
        num_atoms=num_atoms,
    )
    assert kl(found, normalise(log_target)) < 1e-8


def test_qrpo_is_trajectory_balance_with_the_quantile_log_z():
    log_pi, log_ref, u = (random_logits(20, 3, generator=GENERATOR) for _ in range(3))
    u, log_z = u.sigmoid(), quantile_log_partition(BETA)
    qrpo = (u - BETA * log_z - BETA * (log_pi - log_ref)).square().mean(1)
    ours = trajectory_balance(log_pi, tilt(log_ref, u, BETA), torch.full((20,), log_z, dtype=torch.float64))
    torch.testing.assert_close(qrpo, 2 * BETA**2 * ours, rtol=1e-12, atol=1e-12)


def test_quantile_log_z_is_wrong_with_ties_and_moves_the_minimum(minimise):
    """Caveat: a reward of 0 or 1 has quantiles of two values only."""
    win = torch.tensor([False, False, False, True, True, False])
    chance = LOG_REF.exp()[win].sum()
    quantile = torch.where(win, 1.0, 1 - chance)  # P(r' <= r)
    log_target = tilt(LOG_REF, quantile, 0.2)
    wrong, right = quantile_log_partition(0.2), log_partition(log_target)
    assert abs(wrong - right) > 0.1
    for log_z, moved in ((right, False), (torch.tensor(wrong, dtype=torch.float64), True)):
        found, _ = minimise(
            population(lambda log_pi, y, _, z=log_z: balance(log_pi, y, z, log_target), LOG_REF)
        )
        away = kl(found, normalise(log_target))
        assert away > 1e-3 if moved else away < 1e-8


# the alarm, and what is refused


def test_the_alarm():
    log_z = torch.tensor([0.0, 1.0, 2.0, -3.0])
    assert parted(log_z, torch.zeros(4), torch.ones(4)).tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="parted: got NaN or low > high"):
        parted(log_z, torch.ones(4), torch.zeros(4))
    with pytest.raises(ValueError, match="parted: got NaN or low > high"):
        parted(log_z, torch.full((4,), torch.nan), torch.zeros(4))
    with pytest.raises(ValueError, match="parted: got NaN or low > high"):
        parted(log_z * torch.nan, torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match=r"parted: got shapes \[4\], \[1\], \[4\]"):
        parted(log_z, torch.zeros(1), torch.ones(4))


X = torch.zeros(1, 2)
FORBIDDEN = torch.tensor([[0.0, -torch.inf]])


@pytest.mark.parametrize(
    ("objective", "rest"),
    [
        (trajectory_balance, {"log_z": torch.zeros(1)}),
        (pmd_mean, {"log_ref": X}),
        (length_normalised_balance, {"log_ref": X, "lengths": X + 1, "log_z": torch.zeros(1)}),
    ],
)
def test_forbidden_draws_are_refused_by_name(objective, rest):
    with pytest.raises(ValueError, match=f"{objective.__name__}: got log_target = -inf.*use forward_kl"):
        objective(X, FORBIDDEN, **rest)
    with pytest.raises(ValueError, match=f"{objective.__name__}: got log_target = nan"):
        objective(X, FORBIDDEN * 0, **rest)


def test_refused():
    with pytest.raises(ValueError, match=r"log_z of shape \[2\], all finite, expected \[1\] finite"):
        trajectory_balance(X, X, torch.zeros(2))
    with pytest.raises(ValueError, match=r"log_z of shape \[1\], with inf, expected"):
        trajectory_balance(X, X, torch.tensor([torch.inf]))
    with pytest.raises(ValueError, match="pmd_mean: got 1 draw a prompt"):
        pmd_mean(X[:, :1], X[:, :1], X[:, :1])
    with pytest.raises(ValueError, match="got a length of 0"):
        length_normalised_balance(X, X, X, X, torch.zeros(1))


def test_tables():
    log_pi, log_target = (random_logits(4, 3, generator=GENERATOR) for _ in range(2))
    log_z = random_logits(4, generator=GENERATOR)
    _, table = coefficients(
        trajectory_balance, network=("log_pi", "log_z"), log_pi=log_pi, log_target=log_target, log_z=log_z
    )
    expected_table = -(log_target - log_pi - log_z[:, None]) / 3
    torch.testing.assert_close(table["log_pi"], expected_table, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(table["log_z"], expected_table.sum(1), rtol=1e-13, atol=1e-13)
