"""The space of strings is complete: it has every string once, and every autoregressive law on it sums to one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klimb.exact import all_strings, log_prob, random_logits, token_log_prob

SIZES = [(1, 3), (2, 1), (2, 4), (3, 3), (4, 4), (5, 2)]


@pytest.mark.parametrize(("vocab_size", "max_length"), SIZES)
def test_number_of_strings(vocab_size, max_length):
    space = all_strings(vocab_size, max_length)
    prefixes = sum((vocab_size - 1) ** t for t in range(max_length))
    assert space.num_prefixes == prefixes
    assert space.size == prefixes + (vocab_size - 1) ** max_length
    assert space.finished.sum() == prefixes


@pytest.mark.parametrize(("vocab_size", "max_length"), SIZES)
@pytest.mark.parametrize("eos", [0, -1])
def test_each_string_once_and_well_formed(vocab_size, max_length, eos):
    eos = eos % vocab_size
    space = all_strings(vocab_size, max_length, eos=eos)
    strings = [tuple(ids.tolist()) for ids in space.completions]
    assert len(set(strings)) == space.size
    for ids, finished in zip(strings, space.finished.tolist(), strict=True):
        assert eos not in ids[:-1]
        assert finished == (ids[-1] == eos)
        assert finished or len(ids) == max_length


def test_prefix_index_is_a_name_of_the_prefix():
    space = all_strings(4, 3)
    seen = {}
    for y, ids in enumerate(space.completions):
        for t in range(len(ids)):
            assert seen.setdefault(space.prefixes[y, t].item(), tuple(ids[:t].tolist())) == tuple(
                ids[:t].tolist()
            )
    assert len(seen) == len(set(seen.values())) == space.num_prefixes


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.sampled_from(SIZES), st.floats(0.1, 300.0), st.integers(0, 10**6))
def test_total_mass_is_one(size, scale, seed):
    space = all_strings(*size)
    table = random_logits(
        space.num_prefixes, space.vocab_size, generator=torch.Generator().manual_seed(seed), scale=scale
    )
    assert abs(log_prob(table, space).exp().sum().item() - 1) < 1e-12


def test_mutant_without_the_cut_strings_loses_mass():
    space = all_strings(3, 3)
    law = log_prob(torch.zeros(space.num_prefixes, 3, dtype=torch.float64), space).exp()
    assert (
        abs(law[~space.finished].sum().item() - (2 / 3) ** 3) < 1e-15
    )  # what a finished-only space would miss


def test_the_order_is_always_the_same():
    a, b = all_strings(4, 3), all_strings(4, 3)
    assert torch.equal(a.strings, b.strings)
    assert torch.equal(a.prefixes, b.prefixes)


def test_padding_has_no_log_prob():
    space = all_strings(3, 3)
    tokens = token_log_prob(torch.ones(space.num_prefixes, 3), space)
    assert torch.equal(tokens == 0, ~space.mask)


@pytest.mark.parametrize("bad", [(0, 2, 0), (2, 0, 0), (2, 2, 2), (2, 2, -1), (11, 9, 0)])
def test_refused(bad):
    with pytest.raises(ValueError, match="all_strings: got"):
        all_strings(*bad[:2], eos=bad[2])
