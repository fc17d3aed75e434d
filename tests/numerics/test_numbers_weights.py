"""Effective sample size against its closed form, Pareto k on tails whose shape is known, and the baselines."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klimb.numbers.baselines import leave_one_out
from klimb.numbers.tilt import shares
from klimb.numbers.weights import (
    effective_sample_size,
    pareto_k,
    pareto_threshold,
    pooled_pareto_k,
)


def test_effective_sample_size():
    w = torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
    expected = torch.tensor([36 / 14, 3.0], dtype=torch.float64)
    torch.testing.assert_close(effective_sample_size(w.log() + 700), expected)
    forbidden = torch.tensor([[-math.inf, 0.0, -math.inf], [-math.inf] * 3])
    assert effective_sample_size(forbidden).tolist() == [1.0, 0.0]
    assert shares(forbidden).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("shape", [0.3, 0.7, 1.2])
def test_pareto_k_reads_the_right_tail(shape):
    # exp of an exponential of mean k is Pareto with shape k; of its negative, bounded. The sign matters.
    g = torch.Generator().manual_seed(0)
    log_w = shape * torch.empty(16, 4000, dtype=torch.float64).exponential_(generator=g)
    # a tail of 189 draws gives k with a standard error of (1 + k) / sqrt(189): 16 rows, 4 standard errors
    assert abs(pareto_k(log_w).mean().item() - shape) < 4 * (1 + shape) / (189 * 16) ** 0.5 + 0.03
    assert abs(pooled_pareto_k(log_w) - shape) < 4 * (1 + shape) / (3 * 64_000**0.5) ** 0.5
    assert pareto_k(-log_w).max().item() < 0.0  # a mutant that flips the sign would pass these


def test_pareto_k_where_there_is_no_tail_to_fit():
    few, many = (torch.arange(64) < 2), (torch.arange(64) < 20)
    log_w = torch.stack([torch.zeros(64), 9.0 * many, 9.0 * few, torch.where(few, 0.0, -math.inf)]).double()
    assert pareto_k(log_w).tolist() == [0.0, 0.0, math.inf, math.inf]
    assert pareto_k(torch.full((1, 32), -math.inf)).item() == math.inf
    with pytest.raises(ValueError, match="pooled_pareto_k"):
        pareto_k(torch.zeros(1, 24))
    assert pooled_pareto_k(torch.zeros(2, 4)) == math.inf
    assert pareto_threshold(100) == pytest.approx(0.5)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from([-math.inf, 0.0, 3.0]), st.floats(-1e4, 1e4)), min_size=25, max_size=80
    )
)
def test_pareto_k_is_never_nan(values):
    assert not math.isnan(pareto_k(torch.tensor([values], dtype=torch.float64)).item())


def test_a_tail_of_ties_above_nothing_is_an_atom():
    """As many equal weights as the tail is long, and all others zero: each carries a fifth or more of the total."""
    weights = torch.full((1, 25), -math.inf, dtype=torch.float64)
    weights[0, :5] = 0.0
    assert pareto_k(weights).item() == 0.0
    weights[0, 4] = -math.inf
    assert pareto_k(weights).item() == math.inf


def test_leave_one_out_leaves_one_out():
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    keep = ~torch.eye(5, dtype=torch.bool)
    expected = torch.stack([x[:, k].mean(-1) for k in keep], -1)
    torch.testing.assert_close(leave_one_out(x), expected)
    assert leave_one_out(x.float()).dtype == torch.float32
    # the group mean, which is not a leave-one-out baseline, shrinks x - b by (G - 1) / G
    torch.testing.assert_close((x - leave_one_out(x)) * 4 / 5, x - x.mean(-1, keepdim=True))
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(torch.zeros(3, 1))
