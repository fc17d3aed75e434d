"""Two policies on the same prompts: the difference is exact where pools are, and its test keeps its level."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from klimb.numbers.paired import clearly_behind, paired_difference, sign_test


def pool_of(law, reward, log_ref, size):
    """Draws that enumerate a law exactly: outcome y stands size * law[y] times. [size, 2] reward and log pi/ref."""
    counts = (law * size).round().long()
    assert (counts.double() / size - law).abs().max() < 1e-12
    index = torch.arange(len(law)).repeat_interleave(counts)
    return torch.stack([reward[index], law.log()[index] - log_ref[index]], -1)


def test_the_difference_of_objectives_is_that_of_the_gaps_on_a_finite_space():
    g, beta, size = torch.Generator().manual_seed(0), 0.7, 64
    ones, others, gaps = [], [], []
    for _ in range(9):
        reward = torch.randn(4, generator=g, dtype=torch.float64)
        log_ref = torch.randn(4, generator=g, dtype=torch.float64).log_softmax(0)
        log_p = (log_ref + reward / beta).log_softmax(0)
        laws = [torch.tensor(weights, dtype=torch.float64) / 8 for weights in ([1, 2, 2, 3], [4, 2, 1, 1])]
        one, other = (pool_of(law, reward, log_ref, size) for law in laws)
        ones.append(one)
        others.append(other)
        gaps.append([beta * (law * (law.log() - log_p)).sum().item() for law in laws])
    found = paired_difference(torch.stack(ones), torch.stack(others), beta=beta, generator=g)
    mean = np.mean(gaps, 0)
    assert math.isclose(found.objective.value, mean[1] - mean[0], abs_tol=1e-12)
    # the mutant: rewards alone, which forget what they cost
    assert abs(found.reward.value - (mean[1] - mean[0])) > 1e-3
    assert found.prompts == 9


@pytest.mark.parametrize("prompts", [2, 5, 13])
def test_all_signs_as_scipy_has_them(prompts):
    differences = (
        torch.randn(prompts, generator=torch.Generator().manual_seed(prompts), dtype=torch.float64) + 0.4
    )
    theirs = stats.permutation_test(
        (differences.numpy(),), lambda x, axis: x.mean(axis), permutation_type="samples", vectorized=True
    ).pvalue
    assert math.isclose(sign_test(differences, generator=torch.Generator()), theirs, rel_tol=1e-9)


def test_drawn_signs_come_near_all_of_them():
    differences = torch.randn(18, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.3
    every = (((torch.arange(2**18)[:, None] >> torch.arange(18)) & 1) * 2 - 1).double()
    exact = ((every @ differences).abs() >= differences.sum().abs() - 1e-12).double().mean().item()
    drawn = sign_test(differences, generator=torch.Generator().manual_seed(0))
    assert abs(drawn - exact) < 4 * math.sqrt(exact * (1 - exact) / 9999) + 1e-4


def policies(generator, prompts=16, draws=16, better=0.0):
    """Two policies on prompts that differ by far more than they do; the effect of a policy differs from prompt to prompt."""
    hard = 5 * torch.randn(prompts, 1, 1, generator=generator)

    def one(shift):
        own = torch.randn(prompts, 1, 2, generator=generator) * 0.5  # what this policy does with this prompt
        return hard + own + torch.randn(prompts, draws, 2, generator=generator) + torch.tensor([shift, 0.0])

    return one(better), one(0.0)


def test_intervals_and_test_keep_their_level_and_a_test_of_draws_does_not():
    g, runs, beta = torch.Generator().manual_seed(1), 300, 0.5
    covered = named = mutant = 0
    for _ in range(runs):
        one, other = policies(g)
        found = paired_difference(one, other, beta=beta, generator=g, num_resamples=300)
        covered += found.objective.low <= 0 <= found.objective.high
        named += found.p_value < 0.05
        each = (one - other)[..., 0] - beta * (one - other)[..., 1]
        mutant += stats.ttest_1samp(each.flatten().numpy(), 0.0).pvalue < 0.05
    error = math.sqrt(0.05 * 0.95 / runs)
    assert abs(covered / runs - 0.95) < 4 * error
    assert named / runs < 0.05 + 4 * error
    assert mutant / runs > 0.05 + 4 * error  # draws of one prompt are not independent


def test_a_real_difference_is_seen_through_prompts_that_differ_more():
    g = torch.Generator().manual_seed(2)
    one, other = policies(g, prompts=24, better=0.8)
    found = paired_difference(one, other, beta=0.1, generator=g)
    assert found.objective.low > 0
    assert found.p_value < 0.01
    # the mutant: prompts not paired
    shuffled = other[torch.randperm(24, generator=g)]
    assert paired_difference(one, shuffled, beta=0.1, generator=g).objective.low < 0


@pytest.mark.parametrize(
    ("one", "other", "beta", "said"),
    [
        (torch.zeros(3, 4, 2), torch.zeros(3, 4, 2), 0.0, "got beta 0.0"),
        (torch.zeros(3, 4, 2), torch.zeros(2, 4, 2), 1.0, "of the same prompts"),
        (torch.zeros(3, 4, 3), torch.zeros(3, 4, 2), 1.0, "of the same prompts"),
        (torch.full((3, 4, 2), -torch.inf), torch.zeros(3, 4, 2), 1.0, "not finite"),
    ],
)
def test_what_does_not_fit_is_refused(one, other, beta, said):
    with pytest.raises(ValueError, match=said):
        paired_difference(one, other, beta=beta, generator=torch.Generator())


def test_several_share_one_chance_of_a_wrong_name():
    assert clearly_behind({"a": 0.02, "b": 0.024}) == ["a", "b"]
    assert clearly_behind({"a": 0.02, "b": 0.026}) == ["a"]
    assert clearly_behind({"a": 0.02, "b": 0.0, "c": 0.5}) == ["b"]
