"""Where the objectives lead: their exact minimiser is the target, by descent on a policy that can be anything."""

import pytest
import torch

from klimb.exact import (
    all_strings,
    categorical,
    kl,
    log_prob,
    normalise,
    random_logits,
    tilt,
    tuples,
)
from klimb.objectives import forward_kl, log_variance, reverse_kl

ATOMS = 6
GENERATOR = torch.Generator().manual_seed(50)
LOG_TARGET = random_logits(ATOMS, generator=GENERATOR, scale=1.5) + 1.0
LOG_P = normalise(LOG_TARGET)
OFF = categorical(random_logits(ATOMS, generator=GENERATOR))
UNIFORM = torch.full((1, ATOMS), 1 / ATOMS, dtype=torch.float64).log()


def over_pairs(objective, log_q):
    outcomes, prob = tuples(log_q, 2)
    return lambda log_pi: (prob * objective(log_pi, outcomes)).sum()


@pytest.mark.parametrize("clip", [None, 0.3])
def test_off_policy_half_variance_ends_at_the_target(clip, minimise):
    loss = over_pairs(lambda log_pi, y: log_variance(log_pi[y], LOG_TARGET[y], clip=clip), OFF)
    assert kl(minimise(loss), LOG_P) < 1e-8


def test_mutant_of_the_reward_alone_ends_elsewhere(minimise):
    """The variance of log_target - 0.5 log_pi is flattened by p^2 / Z': the check can tell."""
    loss = over_pairs(lambda log_pi, y: log_variance(0.5 * log_pi[y], LOG_TARGET[y]), OFF)
    assert kl(minimise(loss), LOG_P) > 1e-2


def test_without_full_support_half_variance_does_not_know(minimise):
    """Caveat: a law that never draws one atom says nothing of it; the pairs among the rest are still right."""
    filtered = normalise(OFF.masked_fill(torch.arange(ATOMS) == LOG_P.argmax(), -torch.inf))
    loss = over_pairs(lambda log_pi, y: log_variance(log_pi[y], LOG_TARGET[y]), filtered)
    found = minimise(loss)
    assert kl(found, LOG_P) > 1e-2
    seen = torch.arange(ATOMS) != LOG_P.argmax()
    assert (LOG_TARGET - found)[seen].std() < 1e-5


def test_forward_kl_with_exact_weights_ends_at_the_target(minimise):
    log_w = (LOG_TARGET - UNIFORM).expand(1, -1)
    assert kl(minimise(lambda log_pi: forward_kl(log_pi[None], log_w).sum()), LOG_P) < 1e-8


def test_forward_kl_takes_forbidden_outcomes(minimise):
    forbidden = torch.tensor([False, True, False, False, True, False])
    log_target = LOG_TARGET.masked_fill(forbidden, -torch.inf)
    found = minimise(lambda log_pi: forward_kl(log_pi[None], log_target[None]).sum())
    assert kl(normalise(log_target), found) < 1e-8


def test_forward_kl_at_two_draws_ends_elsewhere(minimise):
    """Caveat: self-normalised weights are biased at finite G, and so is where they lead."""
    loss = over_pairs(lambda log_pi, y: forward_kl(log_pi[y], (LOG_TARGET - OFF)[y]), OFF)
    assert kl(minimise(loss), LOG_P) > 1e-2


def test_enumerated_reverse_kl_ends_at_the_target(minimise):
    found = minimise(lambda log_pi: reverse_kl(log_pi[None], LOG_TARGET[None], UNIFORM, baseline=None).sum())
    assert kl(found, LOG_P) < 1e-8


SPACE = all_strings(3, 3)
REF = random_logits(SPACE.num_prefixes, 3, generator=GENERATOR)
LOG_REF = log_prob(REF, SPACE)
STRINGS_TARGET = tilt(LOG_REF, random_logits(SPACE.size, generator=GENERATOR), 0.5)
STRINGS_UNIFORM = torch.full_like(LOG_REF, 1 / SPACE.size).log()


def descend(objective, *, step, num_steps):
    theta = REF.clone().requires_grad_()
    for _ in range(num_steps):
        (gradient,) = torch.autograd.grad(objective(log_prob(theta, SPACE)[None]).sum(), theta)
        theta = (theta - step * gradient).detach().requires_grad_()
    return kl(log_prob(theta, SPACE), normalise(STRINGS_TARGET)).item()


def enumerated_reverse_kl(log_pi):
    return reverse_kl(log_pi, STRINGS_TARGET[None], STRINGS_UNIFORM[None], baseline=None)


def enumerated_log_variance(log_pi):
    return log_variance(log_pi, STRINGS_TARGET[None])


@pytest.mark.parametrize(
    ("objective", "step", "num_steps"),
    [(enumerated_reverse_kl, 4.0, 3000), (enumerated_log_variance, 1.0, 500)],
)
def test_plain_descent_of_an_autoregressive_policy_reaches_the_target(objective, step, num_steps):
    """From the reference, at a constant step, with the objectives themselves over all strings: KL(pi||p) < 1e-8.

    reverse_kl is slower to the end because it weighs a prefix by how often it is reached; the half variance of an
    enumeration weighs all strings alike.
    """
    assert descend(objective, step=step, num_steps=0) > 0.1
    assert descend(objective, step=step, num_steps=num_steps) < 1e-8
