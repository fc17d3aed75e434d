"""With real draws of fixed seeds: the mean gradient lies within four standard errors of the truth, and mutants do not.

200 atoms, P groups of four draws. Each check first asks that the signal is far above the noise it allows.
"""

import pytest
import torch

from klimb.exact import categorical, draw, kl, log_partition, mean, normalise, random_logits
from klimb.objectives import coefficients, log_variance, reverse_kl

ATOMS, P, G = 200, 20_000, 4
GENERATOR = torch.Generator().manual_seed(70)
THETA = random_logits(ATOMS, generator=GENERATOR)
LOG_TARGET = THETA + random_logits(ATOMS, generator=GENERATOR)
ON, LOG_P = categorical(THETA), normalise(LOG_TARGET)
OFF = categorical(THETA + 0.5 * random_logits(ATOMS, generator=GENERATOR))
F = ON - LOG_TARGET
TRUTH = ON.exp() * (F - mean(ON, F))  # grad KL(pi||p) in the logits
DIRECTION = TRUTH / TRUTH.norm()  # a fixed direction, so that there is one number to test


def along(objective, log_q, seed, **options):
    """Each group's gradient along DIRECTION, [P], and each group's value, [P]."""
    y = draw(log_q, G, num_prompts=P, generator=torch.Generator().manual_seed(seed))
    numbers = {"log_pi": ON[y], "log_target": LOG_TARGET[y]} | options
    if objective is reverse_kl and log_q is OFF:
        numbers["log_q"] = OFF[y]
    value, table = coefficients(objective, **numbers)
    score = DIRECTION[y] - (ON.exp() * DIRECTION).sum()
    return (table["log_pi"] * score).sum(1), value


def errors(sample, truth):
    """How many standard errors the mean is off, and how many of them the truth is worth."""
    error = sample.std() / len(sample) ** 0.5
    return abs((sample.mean() - truth) / error).item(), abs(truth / error).item()


CASES = [(reverse_kl, "on"), (log_variance, "on"), (reverse_kl, "off")]


@pytest.mark.parametrize(("objective", "law"), CASES)
def test_gradient(objective, law):
    gradient, _ = along(objective, {"on": ON, "off": OFF}[law], 71)
    off, signal = errors(gradient, TRUTH.norm())
    assert signal > 30
    assert off < 4
    for factor in ((G - 1) / G, -1.0, 1.25):  # a self-mean baseline or divisor G, a wrong sign, a lost factor
        assert errors(factor * gradient, TRUTH.norm())[0] > 4


@pytest.mark.parametrize("law", ["on", "off"])
def test_value(law):
    _, value = along(reverse_kl, {"on": ON, "off": OFF}[law], 72)
    truth = kl(ON, LOG_P) - log_partition(LOG_TARGET)
    off, _ = errors(value, truth)
    assert off < 4
    assert errors(value, truth + log_partition(LOG_TARGET))[0] > 20  # the KL alone, log Z forgotten


def test_mutant_without_the_weight_is_rejected_off_policy():
    y = draw(OFF, G, num_prompts=P, generator=torch.Generator().manual_seed(73))
    _, table = coefficients(reverse_kl, log_pi=ON[y], log_target=LOG_TARGET[y])
    score = DIRECTION[y] - (ON.exp() * DIRECTION).sum()
    assert errors((table["log_pi"] * score).sum(1), TRUTH.norm())[0] > 4


def test_a_baseline_pays():
    with_baseline, _ = along(reverse_kl, ON, 74)
    without, _ = along(reverse_kl, ON, 74, baseline=None)
    assert errors(without, TRUTH.norm())[0] < 4
    assert with_baseline.var() < without.var() / 2
