"""How alike two rewards order the draws of a prompt, against scipy's Kendall tau and by hand."""

import pytest
import torch
from scipy.stats import kendalltau

from klimb.numbers.ordering import agreement

GENERATOR = torch.Generator().manual_seed(17)


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
def test_without_ties_it_is_kendalls_tau_from_zero_to_one(noise):
    first, other = (torch.randn(5, 23, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
    second = first + noise * other
    expected = [(1 + kendalltau(a, b).statistic) / 2 for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(agreement(first, second), torch.tensor(expected))
    torch.testing.assert_close(agreement(first, second), agreement(second, first))
    torch.testing.assert_close(agreement(first, -second), 1 - torch.tensor(expected))


def test_pairs_that_one_of_them_does_not_order_do_not_count():
    first = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 2.0], [1.0, 1.0, 1.0]])
    second = torch.tensor([[0.0, 3.0, 2.0], [2.0, torch.nan, 1.0], [0.0, 1.0, 2.0]])
    found = agreement(first, second)
    assert found[:2].tolist() == [1.0, 0.0]  # its tie, and what has no value, say nothing
    assert found[2].isnan()
