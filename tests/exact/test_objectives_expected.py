"""What the objectives estimate, settled over all tuples of draws: no seed, no tolerance for luck.

Seven atoms, three draws: 343 tuples. The derivative to compare with comes from central differences.
"""

import pytest
import torch

from klimb.exact import categorical, expectation, kl, log_partition, mean, normalise, random_logits
from klimb.numbers.baselines import leave_one_out
from klimb.objectives import coefficients, forward_kl, log_variance, reverse_kl

ATOMS, DRAWS = 7, 3
GENERATOR = torch.Generator().manual_seed(30)
THETA, OTHER, LOG_TARGET = (random_logits(ATOMS, generator=GENERATOR) for _ in range(3))
LOG_TARGET = LOG_TARGET + 3.0  # well off normalised, so that a lost log Z shows
LOG_P, LOG_Z = normalise(LOG_TARGET), log_partition(LOG_TARGET)
ON, OFF = categorical(THETA), categorical(OTHER)


def expected(objective, log_q, num_draws=DRAWS):
    """Value and gradient of objective(log_pi [M, G], log_target [M, G], log_q [M, G]) over all tuples of q."""
    theta = THETA.clone().requires_grad_()
    log_pi = categorical(theta)
    value, (gradient,) = expectation(
        lambda y: objective(log_pi[y], LOG_TARGET[y], log_q[y]), log_q, num_draws, parameters=[theta]
    )
    return value, gradient


@pytest.fixture(scope="module")
def grad_kl(numeric_gradient):
    return numeric_gradient(lambda x: kl(categorical(x), LOG_P), THETA, 1e-3)


def rloo(log_pi, log_target, log_q):
    return reverse_kl(log_pi, log_target)


def weighted(log_pi, log_target, log_q):
    return reverse_kl(log_pi, log_target, log_q)


def vargrad(log_pi, log_target, log_q):
    return log_variance(log_pi, log_target)


@pytest.mark.parametrize("objective", [rloo, weighted, vargrad])
def test_on_policy_gradient_is_that_of_the_kl(objective, grad_kl):
    _, gradient = expected(objective, ON)
    assert (gradient - grad_kl).abs().max() < 1e-8
    assert grad_kl.abs().max() > 1e-2
    assert (-gradient - grad_kl).abs().max() > 1e-2  # the wrong sign does not pass


@pytest.mark.parametrize("num_draws", [2, 3, 4])
def test_off_policy_reverse_kl_is_unbiased_in_value_and_gradient(num_draws, grad_kl):
    value, gradient = expected(weighted, OFF, num_draws)
    assert abs(value - (kl(ON, LOG_P) - LOG_Z)) < 1e-12
    assert (gradient - grad_kl).abs().max() < 1e-8
    _, unweighted = expected(rloo, OFF, num_draws)
    assert (unweighted - grad_kl).abs().max() > 1e-2


def test_values():
    assert abs(expected(rloo, ON)[0] - (kl(ON, LOG_P) - LOG_Z)) < 1e-12
    for law in (ON, OFF):
        residual = LOG_TARGET - ON
        variance = mean(law, (residual - mean(law, residual)) ** 2)
        assert abs(expected(vargrad, law)[0] - variance / 2) < 1e-12


def test_without_a_baseline_it_is_unbiased_too(grad_kl):
    value, gradient = expected(lambda pi, target, q: reverse_kl(pi, target, q, baseline=None), OFF, 1)
    assert abs(value - (kl(ON, LOG_P) - LOG_Z)) < 1e-12
    assert (gradient - grad_kl).abs().max() < 1e-8


def test_enumeration_is_the_uniform_proposal(grad_kl):
    theta = THETA.clone().requires_grad_()
    uniform = torch.full((1, ATOMS), 1 / ATOMS, dtype=torch.float64).log()
    value = reverse_kl(categorical(theta)[None], LOG_TARGET[None], uniform, baseline=None)
    (gradient,) = torch.autograd.grad(value.sum(), theta)
    assert abs(value.item() - (kl(ON, LOG_P) - LOG_Z)) < 1e-12
    assert (gradient - grad_kl).abs().max() < 1e-8


def test_enumeration_is_no_place_for_leave_one_out():
    """The outcomes are not independent draws: leave-one-out then biases the value (why DESIGN asks baseline=None)."""
    uniform = torch.full((1, ATOMS), 1 / ATOMS, dtype=torch.float64).log()
    value = reverse_kl(ON[None], LOG_TARGET[None], uniform, baseline=leave_one_out)
    assert abs(value.item() - (kl(ON, LOG_P) - LOG_Z)) > 1e-2


def test_leave_one_out_and_half_variance_agree_draw_by_draw():
    log_pi = random_logits(500, 4, generator=torch.Generator().manual_seed(31), scale=5.0)
    log_target = random_logits(500, 4, generator=torch.Generator().manual_seed(32), scale=5.0)
    _, left = coefficients(reverse_kl, log_pi=log_pi, log_target=log_target)
    _, right = coefficients(log_variance, log_pi=log_pi, log_target=log_target)
    assert (left["log_pi"] - right["log_pi"]).abs().max() < 1e-13 * left["log_pi"].abs().max()


@pytest.mark.parametrize("num_draws", [2, 3, 4])
def test_mutant_self_mean_is_short_by_one_draw_in_g(num_draws, grad_kl):
    def self_mean(x):
        return x.mean(1, keepdim=True).expand_as(x)

    _, gradient = expected(lambda pi, target, q: reverse_kl(pi, target, baseline=self_mean), ON, num_draws)
    assert (gradient - (num_draws - 1) / num_draws * grad_kl).abs().max() < 1e-8


def test_mutant_divisor_g_is_short_by_one_draw_in_g(grad_kl):
    def biased(log_pi, log_target, log_q):
        return (log_target - log_pi).var(1, correction=0) / 2

    value, gradient = expected(biased, ON)
    assert (gradient - (DRAWS - 1) / DRAWS * grad_kl).abs().max() < 1e-8
    assert abs(value / expected(vargrad, ON)[0] - (DRAWS - 1) / DRAWS) < 1e-12


def test_mutant_divided_by_the_deviation_points_elsewhere(grad_kl):
    def standardised(log_pi, log_target, log_q):
        f = (log_pi - log_target).detach()
        centred = f - f.mean(1, keepdim=True)
        return (centred / (f.std(1, keepdim=True) + 1e-6) * log_pi).sum(1) / (DRAWS - 1)

    _, gradient = expected(standardised, ON)
    cosine = torch.nn.functional.cosine_similarity(gradient, grad_kl, dim=0)
    assert cosine < 1 - 1e-3
    assert (gradient - grad_kl).abs().max() > 1e-2


def test_mutant_differentiating_the_residual_adds_nothing_on_average_but_is_noise(grad_kl):
    """f is detached because E[grad f] = 0: the same mean, and another table."""
    theta = THETA.clone().requires_grad_()

    def attached(y):
        log_pi = categorical(theta)[y]
        return (log_pi - LOG_TARGET[y]).mean(1) + rloo(log_pi, LOG_TARGET[y], None) - log_pi.detach().mean(1)

    _, (gradient,) = expectation(attached, ON, DRAWS, parameters=[theta])
    assert (gradient - grad_kl).abs().max() < 1e-8


def test_a_clip_that_never_acts_changes_nothing_and_one_that_acts_biases(grad_kl):
    _, loose = expected(lambda pi, target, q: reverse_kl(pi, target, clip=50.0), ON)
    _, tight = expected(lambda pi, target, q: reverse_kl(pi, target, clip=0.5), ON)
    assert (loose - grad_kl).abs().max() < 1e-8
    assert (tight - grad_kl).abs().max() > 1e-2


def test_forward_kl_is_biased_by_order_one_over_g():
    """By its own weights' sum; with equal weights and draws of p it is likelihood, and unbiased."""
    near = normalise(0.85 * LOG_P + 0.15 * OFF)
    log_w = LOG_TARGET - near
    truth = mean(LOG_P, -ON)

    def bias(num_draws):
        value, _ = expectation(lambda y: forward_kl(ON[y], log_w[y]), near, num_draws)
        return (value - truth).abs().item()

    assert bias(3) > 1e-3
    assert 1.9 < bias(3) / bias(6) < 2.1  # twice the draws, half the bias
    likelihood, _ = expectation(lambda y: forward_kl(ON[y], torch.zeros_like(y, dtype=ON.dtype)), LOG_P, 3)
    assert abs(likelihood - truth) < 1e-12


def test_forward_kl_gradient_with_exact_weights(numeric_gradient):
    truth = numeric_gradient(lambda x: kl(LOG_P, categorical(x)), THETA, 1e-3)
    theta = THETA.clone().requires_grad_()
    value = forward_kl(categorical(theta)[None], LOG_TARGET[None])  # every atom once from the uniform law
    (gradient,) = torch.autograd.grad(value.sum(), theta)
    assert (gradient - truth).abs().max() < 1e-8
    assert abs(value.item() - kl(LOG_P, ON) - mean(LOG_P, -LOG_P)) < 1e-12
