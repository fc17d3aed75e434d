"""Advantages, token rewards, GAE and the KL controller against what they are by definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klimb.exact import all_strings, kl, log_prob, random_logits, token_log_prob
from klimb.numbers.advantages import (
    batch_standardized,
    gae,
    group_centred,
    group_standardized,
    leave_one_out_advantage,
    token_reward,
    whiten,
)
from klimb.numbers.kl_control import adapted_beta, kl_from_old, stops_early

BY_COMPLETION = [leave_one_out_advantage, group_centred, group_standardized, batch_standardized]


def rewards(seed=0, shape=(3, 4)):
    return random_logits(*shape, generator=torch.Generator().manual_seed(seed))


def test_one_out_is_the_centred_reward_grown_by_one_draw():
    reward = rewards()
    assert torch.allclose(leave_one_out_advantage(reward) * 3 / 4, group_centred(reward), atol=1e-14)
    others = torch.stack([torch.cat([row[:i], row[i + 1 :]]).mean() for row in reward for i in range(4)])
    assert torch.allclose(leave_one_out_advantage(reward), reward - others.reshape(3, 4), atol=1e-14)


def test_standardized_by_hand_with_divisor_g_minus_one():
    (low, middle, high) = group_standardized(torch.tensor([[0.0, 1.0, 5.0]], dtype=torch.float64))[0].tolist()
    deviation = math.sqrt((4 + 1 + 9) / 2) + 1e-4
    assert (low, middle, high) == pytest.approx((-2 / deviation, -1 / deviation, 3 / deviation), abs=1e-14)
    assert abs(low - -2 / math.sqrt(14 / 3)) > 0.1  # numpy's divisor is another number


@pytest.mark.parametrize("advantage", BY_COMPLETION)
def test_a_constant_added_to_a_group_changes_nothing(advantage):
    reward = rewards()
    shift = torch.tensor([[3.0], [3.0], [3.0]] if advantage is batch_standardized else [[3.0], [-7.0], [0.0]])
    assert torch.allclose(advantage(reward + shift), advantage(reward), atol=1e-12)
    assert advantage(reward.float()).dtype == torch.float32


def test_a_group_without_spread_has_no_advantage():
    reward = torch.full((2, 4), 1.5)
    for advantage in BY_COMPLETION:
        assert torch.equal(advantage(reward), torch.zeros(2, 4))


def test_scaling_a_group_is_undone_by_its_deviation_and_by_nothing_else():
    reward = rewards()
    scale = torch.tensor([[1.0], [10.0], [100.0]])
    assert torch.allclose(group_standardized(reward * scale), group_standardized(reward), atol=1e-3)
    for advantage in (leave_one_out_advantage, group_centred):
        assert torch.allclose(advantage(reward * scale), scale * advantage(reward), atol=1e-12)


def test_whiten():
    x = 3 + 5 * rewards(1, (1000,))
    white = whiten(x)
    assert white.mean().abs() < 1e-12
    assert abs(white.var() - 1) < 1e-8
    assert abs(whiten(x, shift_mean=False).mean() - x.mean()) < 1e-12


# Tokens

LENGTHS = torch.tensor([[2, 1], [3, 4]])
SPLIT = LENGTHS.flatten().tolist()


def tokens(seed):
    return rewards(seed, (int(LENGTHS.sum()),))


def test_token_rewards_sum_to_the_reward_minus_the_sequence_kl():
    reward, old, ref = rewards(2, (2, 2)), tokens(3), tokens(4)
    each = token_reward(reward, old, ref, LENGTHS, beta=0.3)
    sums = torch.stack([x.sum() for x in each.split(SPLIT)]).reshape(2, 2)
    log_ratio = torch.stack([x.sum() for x in (old - ref).split(SPLIT)]).reshape(2, 2)
    assert torch.allclose(sums, reward - 0.3 * log_ratio, atol=1e-14)
    before = each - token_reward(torch.zeros(2, 2), old, ref, LENGTHS, beta=0.3)
    assert [(x != 0).nonzero().flatten().tolist() for x in before.split(SPLIT)] == [[1], [0], [2], [3]]


def gae_by_definition(reward, value, gamma, lam):
    """sum_k (gamma lam)^k delta_{t+k} of one completion."""
    after = torch.cat([value[1:], torch.zeros(1, dtype=value.dtype)])
    delta = reward + gamma * after - value
    return torch.stack(
        [sum((gamma * lam) ** k * delta[t + k] for k in range(len(delta) - t)) for t in range(len(delta))]
    )


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 1), st.floats(0, 1), st.integers(0, 10_000))
def test_gae_is_its_sum(gamma, lam, seed):
    reward, values = tokens(seed), tokens(seed + 1)
    advantage, returns = gae(reward, values, LENGTHS, gamma=gamma, lam=lam)
    pairs = zip(reward.split(SPLIT), values.split(SPLIT), strict=True)
    truth = torch.cat([gae_by_definition(r, v, gamma, lam) for r, v in pairs])
    assert torch.allclose(advantage, truth, atol=1e-12)
    assert torch.equal(returns, advantage + values)


def test_gae_at_its_ends():
    reward, values = tokens(5), tokens(6)
    whole, returns = gae(reward, values, LENGTHS, lam=1.0)
    to_go = torch.cat([x.flip(0).cumsum(0).flip(0) for x in reward.split(SPLIT)])
    assert torch.allclose(returns, to_go, atol=1e-14)
    assert torch.allclose(whole, to_go - values, atol=1e-14)
    step, _ = gae(reward, values, LENGTHS, lam=0.0)
    after = torch.cat([torch.cat([v[1:], v.new_zeros(1)]) for v in values.split(SPLIT)])
    assert torch.allclose(step, reward + after - values, atol=1e-14)


def test_a_mutant_that_does_not_end_at_the_last_token_is_seen():
    """One completion's value must not leak into the one before it."""
    reward, values = tokens(7), tokens(8)
    advantage, _ = gae(reward, values, LENGTHS)
    run_on, _ = gae(reward, values, LENGTHS.sum().reshape(1, 1))
    assert (advantage - run_on).abs().max() > 1e-2
    shuffled = values.clone()
    shuffled[3:] += 1.0  # the second prompt's
    assert torch.equal(gae(reward, shuffled, LENGTHS)[0][:3], advantage[:3])


def test_nothing_here_is_differentiated():
    old = tokens(9).requires_grad_()
    reward = token_reward(rewards(2, (2, 2)), old, tokens(4), LENGTHS, beta=0.3)
    advantage, returns = gae(reward, old, LENGTHS)
    assert not any(x.requires_grad for x in (reward, advantage, returns))


# The controller


def test_kl_from_old_is_the_kl_by_enumeration():
    space = all_strings(3, 3)
    generator = torch.Generator().manual_seed(0)
    old, now = (random_logits(space.num_prefixes, 3, generator=generator) for _ in range(2))
    log_old, log_now = log_prob(old, space), log_prob(now, space)
    each = torch.stack(
        [
            kl_from_old(now_t[m], old_t[m], m.sum().reshape(1, 1))
            for now_t, old_t, m in zip(
                token_log_prob(now, space), token_log_prob(old, space), space.mask, strict=True
            )
        ]
    )
    assert abs((log_old.exp() * each).sum() - kl(log_old, log_now)) < 1e-12
    assert (each >= 0).all()
    assert abs(kl(log_now, log_old) - kl(log_old, log_now)) > 1e-2  # the other direction is another number
    together = kl_from_old(
        token_log_prob(now, space)[space.mask], token_log_prob(old, space)[space.mask], space.lengths[None]
    )
    assert abs(together - each.mean()) < 1e-12


def test_the_controller_finds_the_beta_of_its_goal():
    """With Gaussian rewards of unit deviation KL(p||ref) = 1 / (2 beta^2)."""
    beta = 1.0
    for _ in range(3000):
        beta = adapted_beta(beta, 1 / (2 * beta**2), goal=2.0, num_completions=100)
    assert beta == pytest.approx(0.5, abs=1e-6)
    wrong = 1.0
    for _ in range(3000):  # the sign the wrong way round runs away
        wrong = adapted_beta(wrong, 2 - (1 / (2 * wrong**2) - 2), goal=2.0, num_completions=100)
    assert abs(wrong - 0.5) > 0.1


def test_the_controllers_step_is_bounded():
    assert adapted_beta(0.1, 1e9, goal=1.0, num_completions=1000) == pytest.approx(0.1 * 1.02, abs=1e-15)
    assert adapted_beta(0.1, 0.0, goal=1.0, num_completions=1000) == pytest.approx(0.1 * 0.98, abs=1e-15)
    assert adapted_beta(0.1, 1.1, goal=1.0, num_completions=1000) == pytest.approx(0.1 * 1.01, abs=1e-15)


BAD = [
    (lambda: leave_one_out_advantage(torch.zeros(2, 1)), "G of 2 or more"),
    (lambda: group_centred(torch.zeros(4)), "G of 2 or more"),
    (lambda: group_standardized(torch.tensor([[0.0, -torch.inf]])), "not finite"),
    (lambda: batch_standardized(torch.tensor([[0.0, torch.nan]])), "not finite"),
    (lambda: whiten(torch.zeros(1)), "at least 2"),
    (
        lambda: token_reward(
            torch.zeros(1, 2), torch.zeros(3), torch.zeros(2), torch.tensor([[2, 1]]), beta=1.0
        ),
        "ref",
    ),
    (
        lambda: token_reward(
            torch.zeros(2, 1), torch.zeros(3), torch.zeros(3), torch.tensor([[2, 1]]), beta=1.0
        ),
        "reward",
    ),
    (lambda: gae(torch.zeros(3), torch.zeros(2), torch.tensor([[2, 1]])), "values of shape"),
    (lambda: gae(torch.zeros(3), torch.zeros(3), torch.tensor([[3, 0]])), "a token or more"),
    (lambda: gae(torch.zeros(3), torch.zeros(3), torch.tensor([[2, 1]]), lam=1.5), "lam = 1.5"),
    (lambda: kl_from_old(torch.zeros(3), torch.full((3,), -torch.inf), torch.tensor([[2, 1]])), "finite"),
    (lambda: stops_early(0.1, limit=0.0), "limit = 0.0"),
    (lambda: stops_early(math.nan, limit=1.0), "kl = nan"),
    (lambda: adapted_beta(0.0, 1.0, goal=1.0, num_completions=1), "beta = 0.0"),
    (lambda: adapted_beta(0.1, math.inf, goal=1.0, num_completions=1), "kl = inf"),
    (lambda: adapted_beta(0.1, 1.0, goal=1.0, num_completions=100_000), "below horizon"),
]


@pytest.mark.parametrize(("call", "complaint"), BAD)
def test_mistakes_are_named(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()
