"""The running log Z: the plan's estimate while draws are few, and unbiased in Z whoever drew."""

import math
from dataclasses import replace

import pytest
import torch

from klimb.exact import categorical, draw, expectation, normalise, random_logits, tilt, tuples
from klimb.numbers.running import add_draws, no_draws, running_log_z
from klimb.numbers.tilt import log_partition

ATOMS, BETA = 9, 0.5
GENERATOR = torch.Generator().manual_seed(70)
LOG_REF = categorical(random_logits(ATOMS, generator=GENERATOR))
REWARD = random_logits(ATOMS, generator=GENERATOR)
LOG_TARGET = tilt(LOG_REF, REWARD, BETA)
LOG_Z = torch.logsumexp(LOG_TARGET, 0)
POLICY = categorical(random_logits(ATOMS, generator=GENERATOR))
SCALED = REWARD / BETA


def state_of(*groups, num_blocks=64):
    """Groups of (draws [P, G], the law that drew) one after the other."""
    state = no_draws(len(groups[0][0]), num_blocks=num_blocks)
    for draws, law in groups:
        state = add_draws(state, (LOG_TARGET - law)[draws], SCALED[draws])
    return state


def uncapped(state):
    return replace(state, top=torch.full_like(state.top, math.inf))


def plain_z(*groups):
    return running_log_z(uncapped(state_of(*groups)), correct=False).exp()


def draws_of(law, num_draws, num_prompts=5, seed=71):
    return draw(law, num_draws, num_prompts=num_prompts, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("num_draws", [1, 2, 12, 40, 64])
def test_up_to_k_draws_it_is_the_plans_estimate(num_draws, correct):
    draws = draws_of(LOG_REF, num_draws)
    found = running_log_z(state_of((draws, LOG_REF)), correct=correct)
    plan = log_partition(REWARD[draws], BETA, correct=correct)
    torch.testing.assert_close(found, plan, rtol=1e-12, atol=1e-13)
    if num_draws == 40:
        assert (log_partition(REWARD[draws], BETA) != log_partition(REWARD[draws], BETA, correct=False)).any()


def test_and_with_weights_of_another_law():
    draws = draws_of(POLICY, 50)
    found = running_log_z(state_of((draws, POLICY)))
    plan = log_partition(REWARD[draws], BETA, (LOG_REF - POLICY)[draws])
    torch.testing.assert_close(found, plan, rtol=1e-12, atol=1e-13)


def test_beyond_k_draws_equal_blocks_are_their_means():
    draws = draws_of(LOG_REF, 96)
    found = running_log_z(state_of((draws, LOG_REF), num_blocks=32))
    blocks = SCALED[draws].reshape(5, 3, 32).exp().mean(1).log()
    torch.testing.assert_close(found, log_partition(blocks, 1.0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("num_draws", [33, 40, 95])
def test_unequal_blocks_by_leaving_each_out(num_draws):
    """The jackknife written out: every block left out in turn, weighed by what is left."""
    draws = draws_of(LOG_REF, num_draws)
    weights = SCALED[draws].exp()
    block = torch.arange(num_draws) % 32
    whole = weights.mean(1).log()
    found = 32 * whole
    for k in range(32):
        kept = block != k
        found = found - kept.double().mean() * weights[:, kept].mean(1).log()
    torch.testing.assert_close(running_log_z(state_of((draws, LOG_REF), num_blocks=32)), found)


def test_in_one_go_or_many_and_in_any_company():
    first, second = draws_of(LOG_REF, 70), draws_of(POLICY, 9, seed=72)
    together = state_of((first, LOG_REF), (second, POLICY))
    state = no_draws(5)
    for i in range(70):
        state = add_draws(state, SCALED[first[:, i : i + 1]], SCALED[first[:, i : i + 1]])
    for some in ([3, 0], [4], [1, 2]):
        rows = torch.tensor(some)
        drawn = second[rows]
        before = state
        state = add_draws(state, (LOG_TARGET - POLICY)[drawn], SCALED[drawn], prompts=rows)
        assert (before.count[rows] == 70).all()  # the state given is left as it was
    torch.testing.assert_close(running_log_z(state), running_log_z(together), rtol=1e-12, atol=1e-13)
    chosen = torch.tensor([2, 0])
    assert torch.equal(running_log_z(state, prompts=chosen), running_log_z(state)[chosen])


def test_its_exponential_is_unbiased_whoever_drew():
    """Over all tuples: two of the reference, two of a policy, pooled by their weights. Unweighted, it is not Z."""
    ref, ref_prob = tuples(LOG_REF, 2)
    policy, policy_prob = tuples(POLICY, 2)
    pair = torch.cartesian_prod(torch.arange(len(ref)), torch.arange(len(policy)))
    prob = ref_prob[pair[:, 0]] * policy_prob[pair[:, 1]]
    ref, policy = ref[pair[:, 0]], policy[pair[:, 1]]
    z = (prob * plain_z((ref, LOG_REF), (policy, POLICY))).sum()
    assert abs(z - LOG_Z.exp()) < 1e-12
    unweighted = (prob * plain_z((ref, LOG_REF), (policy, LOG_REF))).sum()
    assert abs(unweighted - LOG_Z.exp()) > 1e-2


def test_also_if_the_second_law_follows_from_the_first_draws():
    """A policy trained on what was drawn before: E Z is still Z, for each first draw by itself."""

    def trained(first):  # towards the first draw
        return normalise(POLICY + 2.0 * torch.nn.functional.one_hot(first, ATOMS))

    expected = 0.0
    for first in range(ATOMS):
        law = trained(torch.tensor(first))
        mean, _ = expectation(
            lambda y, law=law, first=first: plain_z((torch.full_like(y[:, :1], first), LOG_REF), (y, law)),
            law,
            2,
        )
        expected += LOG_REF[first].exp() * mean
    assert abs(expected - LOG_Z.exp()) < 1e-12


@pytest.mark.parametrize("num_draws", [32, 64])
def test_the_correction_takes_most_of_the_bias(num_draws):
    """20000 pools; the plug-in is more than four standard errors low, and three times as far off or more."""
    draws = draws_of(LOG_REF, num_draws, num_prompts=20000)
    state = uncapped(state_of((draws, LOG_REF), num_blocks=32))

    def bias(correct):
        error = running_log_z(state, correct=correct) - LOG_Z
        return error.mean().item(), (error.std() / len(error) ** 0.5).item()

    plug_in, its_error = bias(False)
    corrected, _ = bias(True)
    assert plug_in < -4 * its_error
    assert abs(corrected) < abs(plug_in) / 3


def test_at_the_target_every_draw_says_the_same():
    log_p = normalise(LOG_TARGET)
    found = running_log_z(state_of((draws_of(log_p, 100), log_p)))
    assert (found - LOG_Z).abs().max() < 1e-12


def test_a_constant_in_the_reward_moves_it_by_as_much():
    draws = draws_of(POLICY, 80)
    log_w = (LOG_TARGET - POLICY)[draws]
    for c in (-700.0, 3.0, 700.0):
        moved = running_log_z(add_draws(no_draws(5), log_w + c, SCALED[draws] + c))
        torch.testing.assert_close(
            moved, running_log_z(state_of((draws, POLICY))) + c, rtol=1e-12, atol=1e-10
        )


def test_never_above_the_best_reward_seen():
    log_w, scaled = torch.tensor([[5.0, 1.0]]), torch.tensor([[0.5, 0.2]])
    assert running_log_z(add_draws(no_draws(1), log_w, scaled)).item() == pytest.approx(0.5)


def test_forbidden_draws_count_and_weigh_nothing():
    log_w = torch.tensor([[0.0, -math.inf, -math.inf, 0.0], [-math.inf] * 4])
    state = add_draws(no_draws(2), log_w, torch.where(log_w.isneginf(), -math.inf, 1.0))
    assert running_log_z(state).tolist() == [pytest.approx(-math.log(2)), -math.inf]
    state = add_draws(state, torch.zeros(2, 4), torch.zeros(2, 4))
    assert running_log_z(state).tolist() == [pytest.approx(math.log(6 / 8)), pytest.approx(math.log(4 / 8))]


def test_one_draw_with_all_the_weight_is_not_jackknifed():
    log_w = torch.cat([torch.full((1, 40), -900.0), torch.zeros(1, 1)], 1)
    state = add_draws(no_draws(1), log_w, torch.zeros(1, 41))
    assert running_log_z(state).item() == pytest.approx(-math.log(41))


def test_float32_comes_in_and_float64_goes_out():
    draws = draws_of(LOG_REF, 20)
    narrow = add_draws(no_draws(5), SCALED[draws].float(), SCALED[draws].float())
    assert running_log_z(narrow).dtype == torch.float64
    assert (running_log_z(narrow) - running_log_z(state_of((draws, LOG_REF)))).abs().max() < 1e-6


def test_refusals():
    state, one = no_draws(3), torch.zeros(1, 2)
    two = torch.zeros(2, 2)
    cases = [
        (lambda: no_draws(0), "got 0 prompts and 64 blocks"),
        (lambda: no_draws(1, num_blocks=1), "1 blocks; expected at least 1 and 2"),
        (lambda: add_draws(state, one, torch.zeros(1, 3)), r"expected both \[P, G\]"),
        (lambda: add_draws(state, torch.zeros(3, 0), torch.zeros(3, 0)), "at least one draw"),
        (lambda: add_draws(state, one, one), "1 rows for prompts"),
        (lambda: add_draws(state, two, two, prompts=torch.tensor([1, 1])), "each prompt once"),
        (lambda: add_draws(state, one, one, prompts=torch.tensor([3])), "numbers from 0 to 2"),
        (lambda: add_draws(state, one, one, prompts=torch.tensor([-1])), "numbers from 0 to 2"),
        (lambda: add_draws(state, one * math.nan, one, prompts=torch.tensor([0])), "2 log_w value"),
        (lambda: add_draws(state, one, one + math.inf, prompts=torch.tensor([0])), "2 scaled_reward value"),
        (lambda: running_log_z(state), r"got 3 prompt\(s\) without draws"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
