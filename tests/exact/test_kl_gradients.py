"""The table of KL estimators and their gradients, by enumeration against differences. Six cells, each a claim:

              as a detached reward, E[k S]            as a loss, E[grad k]
    k1        grad KL(pi||ref)                        0
    k2        neither                                 grad KL(pi||ref)
    k3        grad KL(pi||ref) - grad KL(ref||pi)     grad KL(ref||pi), the other direction

with rho = pi / ref, k1 = log rho, k2 = (log rho)^2 / 2, k3 = 1/rho - 1 + log rho, S = grad log pi, at sequence level.
Tang, Munos, "On a few pitfalls in KL divergence gradient estimation for RL", 2025. Strings up to T = 3 over V = 3.
"""

import pytest
import torch

from klimb.exact import all_strings, kl, log_prob, random_logits, token_log_prob

SPACE = all_strings(3, 3)
GENERATOR = torch.Generator().manual_seed(20)
REF, THETA, OTHER = (random_logits(SPACE.num_prefixes, 3, generator=GENERATOR) for _ in range(3))
LOG_REF = log_prob(REF, SPACE)

ESTIMATORS = {
    "k1": lambda log_rho: log_rho,
    "k2": lambda log_rho: log_rho**2 / 2,
    "k3": lambda log_rho: torch.exp(-log_rho) - 1 + log_rho,
}


def gradient(integrand, log_law):
    """E over the law, held fixed, of the gradient of integrand(log_pi [Y], token log_pi [Y, T])."""
    theta = THETA.clone().requires_grad_()
    tokens = token_log_prob(theta, SPACE)
    expected = (log_law.exp() * integrand(tokens.sum(1), tokens)).sum()
    return torch.autograd.grad(expected, theta)[0]


@pytest.fixture(scope="module")
def truth(numeric_gradient):
    return {
        "reverse": numeric_gradient(lambda x: kl(log_prob(x, SPACE), LOG_REF), THETA, 1e-3),
        "forward": numeric_gradient(lambda x: kl(LOG_REF, log_prob(x, SPACE)), THETA, 1e-3),
        "zero": torch.zeros_like(THETA),
    }


ON = log_prob(THETA, SPACE)
OFF = log_prob(OTHER, SPACE)


def as_reward(name):
    return lambda log_pi, _: ESTIMATORS[name](log_pi - LOG_REF).detach() * log_pi


def as_loss(name):
    return lambda log_pi, _: ESTIMATORS[name](log_pi - LOG_REF)


def error(left, right):
    return (left - right).abs().max().item()


def test_k1_as_reward_is_the_reverse_kl(truth):
    assert error(gradient(as_reward("k1"), ON), truth["reverse"]) < 1e-7


def test_k1_as_loss_is_nothing(truth):
    assert error(gradient(as_loss("k1"), ON), truth["zero"]) < 1e-14
    assert truth["reverse"].abs().max() > 1e-2


def test_k2_as_reward_is_neither(truth):
    for direction in truth.values():
        assert error(gradient(as_reward("k2"), ON), direction) > 1e-2


def test_k2_as_loss_is_the_reverse_kl(truth):
    assert error(gradient(as_loss("k2"), ON), truth["reverse"]) < 1e-7


def test_k3_as_reward_is_the_difference_of_both(truth):
    assert error(gradient(as_reward("k3"), ON), truth["reverse"] - truth["forward"]) < 1e-7
    assert error(gradient(as_reward("k3"), ON), truth["reverse"]) > 1e-2


def test_k3_as_loss_is_the_forward_kl(truth):
    assert error(gradient(as_loss("k3"), ON), truth["forward"]) < 1e-7
    assert error(gradient(as_loss("k3"), ON), truth["reverse"]) > 1e-2


@pytest.mark.parametrize("name", ["k1", "k3"])
def test_off_policy_weight_is_differentiated_too(truth, name):
    def weighted(log_pi, _):
        return torch.exp(log_pi - OFF) * ESTIMATORS[name](log_pi - LOG_REF)

    assert error(gradient(weighted, OFF), truth["reverse"]) < 1e-7


def test_off_policy_k2_takes_a_fixed_weight(truth):
    def weighted(log_pi, _):
        return torch.exp(log_pi - OFF).detach() * ESTIMATORS["k2"](log_pi - LOG_REF)

    assert error(gradient(weighted, OFF), truth["reverse"]) < 1e-7


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_off_policy_without_a_weight_is_wrong(truth, name):
    for direction in ("reverse", "forward"):
        assert error(gradient(as_loss(name), OFF), truth[direction]) > 1e-2


LOG_REF_TOKENS = token_log_prob(REF, SPACE)


def test_reward_to_go_over_tokens_is_the_reverse_kl(truth):
    def to_go(_, tokens):
        log_rho = (tokens - LOG_REF_TOKENS).detach()
        return (tokens * log_rho.flip(1).cumsum(1).flip(1)).sum(1)

    assert error(gradient(to_go, ON), truth["reverse"]) < 1e-7


def test_k2_summed_over_tokens_is_not(truth):
    """It misses what early tokens do to later prefixes, however many draws are averaged."""

    def token_k2(_, tokens):
        return ESTIMATORS["k2"](tokens - LOG_REF_TOKENS).sum(1)

    assert error(gradient(token_k2, ON), truth["reverse"]) > 1e-2


def test_k3_summed_over_tokens_is_forward_on_the_policys_prefixes(truth):
    def token_k3(_, tokens):
        return ESTIMATORS["k3"](tokens - LOG_REF_TOKENS).sum(1)

    def per_prefix(
        _, tokens
    ):  # sum over the visited prefixes of KL(ref(.|s) || pi(.|s)), prefixes held fixed
        return (LOG_REF_TOKENS - tokens).mul((LOG_REF_TOKENS - tokens.detach()).exp()).sum(1)

    assert error(gradient(token_k3, ON), gradient(per_prefix, ON)) < 1e-12
    assert error(gradient(token_k3, ON), truth["reverse"]) > 1e-2
    assert error(gradient(token_k3, ON), truth["forward"]) > 1e-2


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_values(name):
    value = (ON.exp() * ESTIMATORS[name](ON - LOG_REF)).sum()
    off = abs(value - kl(ON, LOG_REF))
    assert off > 1e-2 if name == "k2" else off < 1e-12
