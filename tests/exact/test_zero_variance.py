"""At the optimum the residual is a constant, so sequence-level objectives have no gradient noise there. Others have.

Strings up to T = 2 over V = 3, the policy exactly at p, all pairs of draws.
"""

import pytest
import torch

from klimb.exact import (
    all_strings,
    categorical,
    expectation,
    gradient_variance,
    log_partition,
    log_prob,
    normalise,
    random_logits,
    table_of,
    tilt,
    token_log_prob,
)
from klimb.numbers.baselines import leave_one_out
from klimb.objectives import forward_kl, log_variance, reverse_kl

SPACE = all_strings(3, 2)
GENERATOR = torch.Generator().manual_seed(40)
REF = random_logits(SPACE.num_prefixes, 3, generator=GENERATOR).log_softmax(1)
LOG_REF = log_prob(REF, SPACE)
LOG_TARGET = tilt(LOG_REF, random_logits(SPACE.size, generator=GENERATOR), 0.5)
R = LOG_TARGET - LOG_REF
LOG_P, LOG_Z = normalise(LOG_TARGET), log_partition(LOG_TARGET)
OFF = categorical(random_logits(SPACE.size, generator=GENERATOR))


def variance(objective, log_q, *, table=None):
    """The gradient variance of objective(token log_pi [M, G, T], draws [M, G]) at `table`, by default at p."""
    theta = (table_of(LOG_P, SPACE) if table is None else table).clone().requires_grad_()
    tokens = token_log_prob(theta, SPACE)
    return gradient_variance(lambda y: objective(tokens[y], y, theta), log_q, 2, parameter=theta).item()


def rloo(tokens, y, _):
    return reverse_kl(tokens.sum(-1), LOG_TARGET[y])


def weighted(tokens, y, _):
    return reverse_kl(tokens.sum(-1), LOG_TARGET[y], OFF[y])


def vargrad(tokens, y, _):
    return log_variance(tokens.sum(-1), LOG_TARGET[y])


def balance(tokens, y, _):  # trajectory balance with the true log Z
    return (tokens.sum(-1) - LOG_TARGET[y] + LOG_Z).square().mean(1) / 2


def reward_alone(tokens, y):
    return ((leave_one_out(R[y]) - R[y]) * tokens.sum(-1)).mean(1)


def with_k2(tokens, y, _):
    return reward_alone(tokens, y) + (tokens.sum(-1) - LOG_REF[y]).square().mean(1) / 2


def with_k3(tokens, y, _):
    log_rho = tokens.sum(-1) - LOG_REF[y]
    return reward_alone(tokens, y) + (torch.exp(-log_rho) - 1 + log_rho).mean(1)


def with_reward_to_go(tokens, y, _):
    log_rho = (tokens - token_log_prob(REF, SPACE)[y]).detach()
    return reward_alone(tokens, y) + (tokens * log_rho.flip(-1).cumsum(-1).flip(-1)).sum(-1).mean(1)


def with_rao_blackwell(tokens, y, theta):
    """The KL of each next-token law, summed exactly: itself differentiated, and as a return for earlier tokens."""
    policy = theta.log_softmax(1)
    per_prefix = (policy.exp() * (policy - REF)).sum(1)[SPACE.prefixes[y]] * SPACE.mask[y]
    later = per_prefix.detach().flip(-1).cumsum(-1).flip(-1) - per_prefix.detach()
    return reward_alone(tokens, y) + (per_prefix + tokens * later).sum(-1).mean(1)


@pytest.mark.parametrize(
    ("objective", "law"),
    [(rloo, LOG_P), (vargrad, LOG_P), (vargrad, OFF), (weighted, LOG_P), (weighted, OFF), (balance, LOG_P)],
)
def test_no_variance_at_the_target(objective, law):
    assert variance(objective, law) < 1e-20
    elsewhere = variance(objective, law, table=REF)  # the measure itself is not blind
    assert elsewhere > 1e-3


@pytest.mark.parametrize("control", [with_k2, with_k3, with_reward_to_go, with_rao_blackwell])
def test_controls_are_noisy_at_the_target(control):
    assert variance(control, LOG_P) > 1e-3


@pytest.mark.parametrize("control", [with_k2, with_reward_to_go, with_rao_blackwell])
def test_controls_are_unbiased_all_the_same(control):
    """Noise is all that is wrong with these three: away from p their mean gradient is that of rloo."""
    gradients = []
    for objective in (control, rloo):
        theta = REF.clone().requires_grad_()
        tokens = token_log_prob(theta, SPACE)
        _, (gradient,) = expectation(
            lambda y, objective=objective, tokens=tokens, theta=theta: objective(tokens[y], y, theta),
            LOG_REF,
            2,
            parameters=[theta],
        )
        gradients.append(gradient)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    assert gradients[1].abs().max() > 1e-2


def test_a_baseline_of_weighted_scores_would_be_noisy_off_policy():
    """Why leave-one-out takes f and not w f."""

    def mutant(tokens, y, _):
        log_pi = tokens.sum(-1)
        weight = torch.exp(log_pi - OFF[y])
        f = (log_pi - LOG_TARGET[y]).detach()
        return (weight * f - torch.exp(log_pi - log_pi.detach()) * leave_one_out((weight * f).detach())).mean(
            1
        )

    assert variance(mutant, OFF) > 1e-3


def test_forward_kl_keeps_its_noise():
    assert variance(lambda t, y, _: forward_kl(t.sum(-1), LOG_TARGET[y] - OFF[y]), OFF) > 1e-3


def test_value_has_no_variance_either():
    table = table_of(LOG_P, SPACE)
    draws = torch.arange(SPACE.size).reshape(1, -1)
    value = reverse_kl(log_prob(table, SPACE)[draws], LOG_TARGET[draws], OFF[draws])
    assert abs(value.item() + LOG_Z) < 1e-12
