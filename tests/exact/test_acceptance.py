"""Which draws of the reference rejection keeps: exactly the target with a bound, and how far from it without one.

Six atoms, all tuples of draws.
"""

import pytest
import torch

from klimb.exact import categorical, kl, normalise, random_logits, tilt, tuples
from klimb.samplers.rejection import acceptance

ATOMS, BETA = 6, 0.5
GENERATOR = torch.Generator().manual_seed(91)
LOG_REF = categorical(random_logits(ATOMS, generator=GENERATOR))
REWARD = random_logits(ATOMS, generator=GENERATOR)
LOG_P = normalise(tilt(LOG_REF, REWARD, BETA))


def kept(num_draws, bound=None, beta=BETA):
    """[Y] how often each atom is kept, on average, of so many draws."""
    outcomes, prob = tuples(LOG_REF, num_draws)
    chances = acceptance(REWARD[outcomes], beta, bound) * prob[:, None]
    return torch.zeros(ATOMS, dtype=torch.float64).index_add(0, outcomes.flatten(), chances.flatten())


@pytest.mark.parametrize("above", [0.0, 0.7])
def test_with_a_bound_what_is_kept_is_the_target(above):
    bound = REWARD.max().item() + above
    found = kept(3, bound)
    z = torch.logsumexp(LOG_REF + REWARD / BETA, 0)
    torch.testing.assert_close(found, 3 * (LOG_P + z - bound / BETA).exp(), rtol=0, atol=1e-12)
    assert kl(normalise(found.log()), LOG_P) < 1e-12
    assert kl(normalise(kept(3, bound, beta=2 * BETA).log()), LOG_P) > 1e-2  # a mutant


@pytest.mark.parametrize("num_draws", [1, 2, 4])
def test_without_one_it_is_kept_as_often_as_is_said(num_draws):
    """The largest of the others is at most x with probability ref(r <= x)^(G - 1): the expectation atom by atom."""
    order = REWARD.argsort()
    at_most = LOG_REF.exp()[order].cumsum(0) ** (num_draws - 1)
    law = torch.diff(at_most, prepend=torch.zeros(1, dtype=torch.float64))
    if num_draws == 1:
        law = torch.eye(ATOMS, dtype=torch.float64)[0]  # there are no others
    largest = torch.maximum(REWARD[:, None], REWARD[order])
    said = num_draws * LOG_REF.exp() * (law * ((REWARD[:, None] - largest) / BETA).exp()).sum(1)
    torch.testing.assert_close(kept(num_draws), said, rtol=0, atol=1e-12)


def test_without_a_bound_it_lies_between_reference_and_target_and_nears_it():
    away = [kl(LOG_P, normalise(kept(n).log())).item() for n in (1, 2, 4, 5)]
    assert away == sorted(away, reverse=True)
    assert abs(away[0] - kl(LOG_P, LOG_REF)) < 1e-12
    assert away[-1] > 1e-3  # not the target itself: a bound makes it so


def test_what_is_forbidden_is_never_kept_and_a_bound_is_one():
    assert acceptance(torch.tensor([[-torch.inf, 1.0], [-torch.inf, -torch.inf]]), 1.0).tolist() == [
        [0, 1],
        [0, 0],
    ]
    with pytest.raises(ValueError, match="bound 1 is not one"):
        acceptance(torch.tensor([2.0]), 1.0, 1.0)
