"""All tuples, each with its probability: against textbook moments, and against the mutants that miss them."""

import pytest
import torch

from klimb.exact import categorical, expectation, gradient_variance, random_logits, tuples

LOG_Q = categorical(random_logits(6, generator=torch.Generator().manual_seed(0)))
X = random_logits(6, generator=torch.Generator().manual_seed(1))
MEAN = (LOG_Q.exp() * X).sum()
VARIANCE = (LOG_Q.exp() * (X - MEAN) ** 2).sum()


@pytest.mark.parametrize("num_draws", [1, 2, 4])
def test_tuples_are_all_of_them(num_draws):
    outcomes, prob = tuples(LOG_Q, num_draws)
    assert outcomes.shape == (6**num_draws, num_draws)
    assert len({tuple(row) for row in outcomes.tolist()}) == 6**num_draws
    assert abs(prob.sum() - 1) < 1e-14


@pytest.mark.parametrize("num_draws", [2, 3, 5])
def test_moments(num_draws):
    assert abs(expectation(lambda y: X[y].mean(1), LOG_Q, num_draws)[0] - MEAN) < 1e-14
    assert abs(expectation(lambda y: X[y].var(1), LOG_Q, num_draws)[0] - VARIANCE) < 1e-13
    of_mean = expectation(lambda y: (X[y].mean(1) - MEAN) ** 2, LOG_Q, num_draws)[0]
    assert abs(of_mean - VARIANCE / num_draws) < 1e-14
    mutant = expectation(lambda y: X[y].var(1, correction=0), LOG_Q, num_draws)[0]
    assert abs(mutant / VARIANCE - (num_draws - 1) / num_draws) < 1e-13


def test_gradient_is_the_estimators_own():
    theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    _, (gradient,) = expectation(lambda y: theta[y].sum(1), LOG_Q, 3, parameters=[theta])
    torch.testing.assert_close(gradient, 3 * LOG_Q.exp())
    assert abs(gradient_variance(lambda y: theta[y].sum(1), LOG_Q, 3, parameter=theta) - 3 * (
        1 - LOG_Q.exp().square().sum()
    )) < 1e-13  # fmt: skip


def test_impossible_outcomes_are_left_out():
    log_q = torch.tensor([0.5, 0.0, 0.5]).log()
    outcomes, prob = tuples(log_q, 2)
    assert outcomes.tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]
    torch.testing.assert_close(prob, torch.full((4,), 0.25))


def test_refused():
    with pytest.raises(ValueError, match="total 2"):
        tuples(torch.zeros(2), 2)
    with pytest.raises(ValueError, match="expected at most 1000000: draw fewer"):
        tuples(LOG_Q, 8)
    with pytest.raises(ValueError, match="num_draws=0"):
        tuples(LOG_Q, 0)
