"""What proximal objectives estimate, over all strings and all tuples of draws: no seed, no tolerance for luck.

Strings up to T = 3 over V = 3: 15 of them, 1 to 3 tokens long, so that lengths matter. J = E[r] - beta KL(pi||ref).
"""

from functools import partial

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck

from klimb.exact import (
    all_strings,
    expectation,
    log_prob,
    mean,
    objective,
    random_logits,
    tilt,
    token_log_prob,
)
from klimb.exact.tabular import table_of
from klimb.exact.truth import normalise
from klimb.numbers.advantages import (
    gae,
    group_centred,
    group_standardized,
    leave_one_out_advantage,
    token_reward,
    whiten,
)
from klimb.objectives import bind, coefficients, reverse_kl
from klimb.objectives.aggregate import mean_each, mean_over_batch, mean_over_group, sum_tokens
from klimb.objectives.clip import capped, clipped
from klimb.objectives.importance import importance, masked, truncated
from klimb.objectives.kl_penalty import k3
from klimb.objectives.ratio import geometric_ratio_by_token, sequence_ratio, token_ratio
from klimb.objectives.surrogate import (
    COMPOSITIONS,
    cispo,
    dapo,
    dr_grpo,
    grpo,
    gspo,
    ppo,
    rloo,
    surrogate,
)
from klimb.objectives.value_loss import value_loss

SPACE = all_strings(3, 3)
GENERATOR = torch.Generator().manual_seed(50)
REF, THETA, OTHER = (random_logits(SPACE.num_prefixes, 3, generator=GENERATOR) for _ in range(3))
REWARD = random_logits(SPACE.size, generator=GENERATOR)
CRITIC = random_logits(SPACE.num_prefixes, generator=GENERATOR)  # of prefixes, and quite wrong
BETA = 0.7
TOKENS, TOKENS_REF, TOKENS_OTHER = (token_log_prob(table, SPACE) for table in (THETA, REF, OTHER))
ON, LOG_REF, OFF = TOKENS.sum(1), TOKENS_REF.sum(1), TOKENS_OTHER.sum(1)


def layout(outcomes):
    """row and lengths of outcomes [M, G]."""
    lengths = SPACE.lengths[outcomes]
    return torch.arange(lengths.numel()).repeat_interleave(lengths.flatten()), lengths


def packed(per_token, outcomes):
    """[Y, T] -> [N], the tokens of outcomes [M, G] end to end."""
    return per_token[outcomes][SPACE.mask[outcomes]]


def expected(estimator, log_law, num_draws=1):
    """E over all tuples of the gradient of estimator(token_log_pi [N], outcomes, row, lengths) -> [M]."""
    theta = THETA.clone().requires_grad_()
    tokens = token_log_prob(theta, SPACE)
    _, (gradient,) = expectation(
        lambda y: estimator(packed(tokens, y), y, *layout(y)), log_law, num_draws, parameters=[theta]
    )
    return gradient


def error(left, right):
    return (left - right).abs().max().item()


def cosine(left, right):
    return torch.nn.functional.cosine_similarity(left.flatten(), right.flatten(), dim=0).item()


@pytest.fixture(scope="module")
def grad_j(numeric_gradient):
    return numeric_gradient(lambda x: objective(log_prob(x, SPACE), LOG_REF, REWARD, BETA), THETA, 1e-3)


@pytest.fixture(scope="module")
def grad_reward(numeric_gradient):
    return numeric_gradient(lambda x: mean(log_prob(x, SPACE), REWARD), THETA, 1e-3)


# PPO


def ppo_gradient(values, *, lam, after=None, num_draws=1, aggregate=sum_tokens, gamma=1.0):
    def estimator(token_log_pi, y, row, lengths):
        old = token_log_pi.detach()
        rewards = token_reward(REWARD[y], old, packed(TOKENS_REF, y), lengths, beta=BETA)
        advantage, _ = gae(rewards, packed(values[SPACE.prefixes], y), lengths, gamma=gamma, lam=lam)
        if after is not None:
            groups = advantage.split(lengths.sum(1).tolist())
            advantage = torch.cat([after(group) for group in groups])
        return ppo(token_log_pi, old, row, lengths, advantage, aggregate=aggregate)

    return expected(estimator, ON, num_draws)


@pytest.fixture(scope="module")
def exact_critic():
    """The mean reward to go of each prefix under the policy, KL included."""
    rewards = -BETA * (TOKENS - TOKENS_REF)
    rewards[torch.arange(SPACE.size), SPACE.lengths - 1] += REWARD
    to_go = rewards.flip(1).cumsum(1).flip(1)
    prob = ON.exp()[:, None].expand(to_go.shape)
    zeros = torch.zeros(SPACE.num_prefixes, dtype=prob.dtype)
    at = (SPACE.prefixes[SPACE.mask],)
    mass = zeros.index_put(at, prob[SPACE.mask], accumulate=True)
    return zeros.index_put(at, (prob * to_go)[SPACE.mask], accumulate=True) / mass


def test_ppo_at_the_first_inner_step_is_the_policy_gradient_whatever_the_critic(grad_j):
    for critic in (CRITIC, torch.zeros_like(CRITIC)):
        assert error(-ppo_gradient(critic, lam=1.0), grad_j) < 1e-8
    assert grad_j.abs().max() > 1e-2


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95])
def test_ppo_below_lambda_one_is_as_good_as_its_critic(grad_j, exact_critic, lam):
    assert error(-ppo_gradient(exact_critic, lam=lam), grad_j) < 1e-8
    assert error(-ppo_gradient(CRITIC, lam=lam), grad_j) > 1e-3


def test_ppo_whitened_over_few_draws_averaged_over_tokens_or_discounted_is_another_direction(grad_j):
    assert cosine(-ppo_gradient(CRITIC, lam=1.0, after=whiten, num_draws=2), grad_j) < 1 - 1e-3
    assert cosine(-ppo_gradient(CRITIC, lam=1.0, aggregate=mean_each), grad_j) < 1 - 1e-3
    assert cosine(-ppo_gradient(CRITIC, lam=1.0, gamma=0.5), grad_j) < 1 - 1e-3


def test_the_critic_of_least_loss_is_the_mean_return(exact_critic):
    values = exact_critic.clone().requires_grad_()

    def estimator(_, y, row, lengths):
        rewards = token_reward(REWARD[y], packed(TOKENS, y), packed(TOKENS_REF, y), lengths, beta=BETA)
        here = packed(values[SPACE.prefixes], y)
        _, returns = gae(rewards, packed(CRITIC[SPACE.prefixes], y), lengths, lam=1.0)
        return value_loss(here, returns, here.detach(), row, lengths, aggregate=sum_tokens)

    outcomes = torch.arange(SPACE.size)[:, None]
    value = (ON.exp() * estimator(None, outcomes, *layout(outcomes))).sum()
    assert torch.autograd.grad(value, values)[0].abs().max() < 1e-12
    assert value > 1e-2


def test_ppo_whitened_over_very_many_draws_is_the_same_direction(grad_j):
    """One mean and one deviation of the whole population, fixed: a baseline, and a scale."""

    def estimator(token_log_pi, y, row, lengths):
        old = token_log_pi.detach()
        rewards = token_reward(REWARD[y], old, packed(TOKENS_REF, y), lengths, beta=BETA)
        advantage, _ = gae(rewards, packed(CRITIC[SPACE.prefixes], y), lengths, lam=1.0)
        return ppo(token_log_pi, old, row, lengths, whiten(advantage))

    assert cosine(-expected(estimator, ON), grad_j) > 1 - 1e-12


# Advantages by completion


def group_gradient(method, advantage, reward=REWARD, *, num_draws=3, log_law=ON, tokens_old=None):
    def estimator(token_log_pi, y, row, lengths):
        old = token_log_pi.detach() if tokens_old is None else packed(tokens_old, y)
        return method(token_log_pi, old, row, lengths, advantage(reward[y]))

    return expected(estimator, log_law, num_draws)


@pytest.mark.parametrize("num_draws", [2, 3])
def test_dr_grpo_is_the_reward_gradient_short_by_one_draw_in_g(grad_reward, num_draws):
    gradient = group_gradient(dr_grpo, group_centred, num_draws=num_draws)
    assert error(-gradient, (num_draws - 1) / num_draws * grad_reward) < 1e-8
    long = partial(dr_grpo, aggregate=partial(sum_tokens, divisor=3.0))
    assert error(group_gradient(long, group_centred, num_draws=num_draws), gradient / 3) < 1e-12
    whole = group_gradient(dr_grpo, leave_one_out_advantage, num_draws=num_draws)
    assert error(-whole, grad_reward) < 1e-8


def test_grpo_averages_over_length_and_so_weighs_by_it(grad_reward):
    """The expected gradient is that of an advantage divided by length."""
    per_token = partial(surrogate, aggregate=mean_each)
    gradient = group_gradient(per_token, leave_one_out_advantage)
    theta = THETA.clone().requires_grad_()
    weight = (ON.exp() * (REWARD - mean(ON, REWARD)) / SPACE.lengths).detach()
    (by_length,) = torch.autograd.grad((weight * log_prob(theta, SPACE)).sum(), theta)
    assert error(-gradient, by_length) < 1e-12
    assert cosine(-gradient, grad_reward) < 1 - 1e-3


def test_dapo_averages_over_the_groups_tokens_and_is_biased_too(grad_reward):
    assert cosine(-group_gradient(dapo, leave_one_out_advantage), grad_reward) < 1 - 1e-4


def test_where_lengths_are_equal_no_average_is_biased():
    lengths = torch.full((2, 3), 4)
    row = torch.arange(6).repeat_interleave(4)
    x = random_logits(24, generator=torch.Generator().manual_seed(1))
    for aggregate in (mean_each, mean_over_group, mean_over_batch):
        assert error(aggregate(x, row, lengths), sum_tokens(x, row, lengths, divisor=4.0)) < 1e-14


def test_gspo_weighs_by_length_too(grad_reward):
    assert cosine(-group_gradient(gspo, leave_one_out_advantage), grad_reward) < 1 - 1e-3
    grpo_like = group_gradient(partial(surrogate, aggregate=mean_each), leave_one_out_advantage)
    assert error(group_gradient(gspo, leave_one_out_advantage), grpo_like) < 1e-12


def test_standardizing_keeps_the_direction_of_two_valued_rewards_and_of_no_others(numeric_gradient):
    method = partial(surrogate, aggregate=sum_tokens)
    graded = (2 * REWARD).exp()
    truth = numeric_gradient(lambda x: mean(log_prob(x, SPACE), graded), THETA, 1e-3)
    assert cosine(-group_gradient(method, group_standardized, graded), truth) < 1 - 1e-3
    scales = {2: [], 3: [], 4: []}
    for threshold in (-0.5, 0.9):
        binary = (threshold < REWARD).double()
        truth = numeric_gradient(lambda x, r=binary: mean(log_prob(x, SPACE), r), THETA, 1e-3)
        for num_draws, found in scales.items():
            gradient = -group_gradient(
                method, partial(group_standardized, epsilon=1e-12), binary, num_draws=num_draws
            )
            assert cosine(gradient, truth) > 1 - 1e-12
            found.append((gradient.norm() / truth.norm()).item())
    assert scales[2] == pytest.approx([0.5**0.5] * 2, abs=1e-8)
    assert scales[3] == pytest.approx([(4 / 3) ** 0.5] * 2, abs=1e-8)
    assert (
        abs(scales[4][0] / scales[4][1] - 1) > 1e-3
    )  # from four draws on, each prompt has a scale of its own


def kl_rewarded(y):
    return REWARD[y] - BETA * (ON - LOG_REF)[y]


def test_standardizing_moves_the_optimum_and_leave_one_out_does_not():
    """At p the regularised reward is constant, so any centring has no gradient there; with the KL left outside the
    standardized reward, as GRPO has it, p is no fixed point, and beta * sd is what beta was meant to be."""
    log_p = normalise(tilt(LOG_REF, REWARD, BETA))
    log_rho = log_p - LOG_REF

    def step(advantage):
        theta = table_of(log_p, SPACE).requires_grad_()
        tokens = token_log_prob(theta, SPACE)

        def estimator(y):
            now = packed(tokens, y)
            return rloo(now, now.detach(), *layout(y), advantage(y))

        return expectation(estimator, log_p, 2, parameters=[theta])[1][0].abs().max().item()

    def outside(standard):
        return lambda y: standard(REWARD[y]) - BETA * leave_one_out_advantage(log_rho[y])

    assert step(lambda y: leave_one_out_advantage(REWARD[y] - BETA * log_rho[y])) < 1e-12
    assert step(outside(leave_one_out_advantage)) < 1e-12
    assert step(outside(group_standardized)) > 1e-2


# RLOO


def test_rloo_is_beta_times_reverse_kl_draw_by_draw(grad_j):
    outcomes = torch.randint(SPACE.size, (40, 4), generator=torch.Generator().manual_seed(2))
    row, lengths = layout(outcomes)
    old = packed(TOKENS, outcomes)
    _, table = coefficients(
        rloo,
        network=["token_log_pi"],
        token_log_pi=old,
        token_log_old=old,
        row=row,
        lengths=lengths,
        advantage=leave_one_out_advantage(kl_rewarded(outcomes)),
    )
    _, kl_table = coefficients(
        reverse_kl, log_pi=ON[outcomes], log_target=tilt(LOG_REF, REWARD, BETA)[outcomes]
    )
    assert error(table["token_log_pi"], BETA * kl_table["log_pi"].flatten()[row]) < 1e-13
    assert table["token_log_pi"].abs().max() > 1e-2
    gradient = group_gradient(rloo, leave_one_out_advantage, kl_rewarded(torch.arange(SPACE.size)))
    assert error(-gradient, grad_j) < 1e-8


def test_rloo_at_the_optimum_is_silent_draw_by_draw():
    log_p = normalise(tilt(LOG_REF, REWARD, BETA))
    outcomes = torch.randint(SPACE.size, (40, 4), generator=torch.Generator().manual_seed(3))
    advantage = leave_one_out_advantage((REWARD - BETA * (log_p - LOG_REF))[outcomes])
    assert advantage.abs().max() < 1e-12


def test_off_policy_the_sequence_ratio_is_exact_and_the_token_ratio_is_not(grad_reward):
    off = {"log_law": OFF, "tokens_old": TOKENS_OTHER, "num_draws": 2}
    assert error(-group_gradient(rloo, leave_one_out_advantage, **off), grad_reward) < 1e-8
    per_token = partial(surrogate, ratio=token_ratio, aggregate=sum_tokens)
    assert error(-group_gradient(per_token, leave_one_out_advantage, **off), grad_reward) > 1e-2
    tight = partial(rloo, clip=clipped)
    assert error(-group_gradient(tight, leave_one_out_advantage, **off), grad_reward) > 1e-2


# Between sampler and trainer


def corrected(correct):
    """The first inner step on draws of another law than the trainer's old policy, which is the policy."""

    def estimator(token_log_pi, y, row, lengths):
        return rloo(
            token_log_pi,
            token_log_pi.detach(),
            row,
            lengths,
            leave_one_out_advantage(REWARD[y]),
            packed(TOKENS_OTHER, y),
            correct=correct,
        )

    return -expected(estimator, OFF, 2)


def test_only_the_whole_completions_weight_without_a_limit_is_unbiased(grad_reward):
    assert error(corrected(partial(importance, ratio=sequence_ratio, limit=None)), grad_reward) < 1e-8
    biased = [
        None,
        partial(importance, limit=None),
        importance,
        partial(importance, ratio=sequence_ratio),
        partial(importance, limit=masked),
        partial(importance, ratio=sequence_ratio, limit=masked),
    ]
    for correct in biased:
        assert error(corrected(correct), grad_reward) > 1e-3
    loose = partial(importance, ratio=sequence_ratio, limit=partial(truncated, cap=1e6))
    assert error(corrected(loose), grad_reward) < 1e-8


# Parts, by hand

ROW, LENGTHS = torch.tensor([0, 0, 1]), torch.tensor([[2, 1]])
LOG_OLD = torch.tensor([0.5, 0.4, 0.2], dtype=torch.float64).log()
LOG_PI = torch.tensor([0.8, 0.4, 0.1], dtype=torch.float64).log()  # ratios 1.6, 1, 0.5
ADVANTAGE = torch.tensor([[1.0, -2.0]], dtype=torch.float64)


def value_and_table(method, **numbers):
    arguments = {
        "token_log_pi": LOG_PI,
        "token_log_old": LOG_OLD,
        "row": ROW,
        "lengths": LENGTHS,
        "advantage": ADVANTAGE,
        **numbers,
    }
    value, table = coefficients(method, network=["token_log_pi"], **arguments)
    return value.item(), table["token_log_pi"].tolist()


HAND = {  # value and table of one prompt with ratios 1.6, 1 | 0.5, advantages 1 | -2
    # -((1.2 + 1) / 2 + -2 * 0.8) / 2; the first and the last are clipped
    "grpo": (0.25, [0.0, -0.25, 0.0]),
    # -((1.2 + 1) - 1.6) / 2
    "dr_grpo": (-0.3, [0.0, -0.5, 0.0]),
    # -((1.28 + 1) - 1.6) / 3
    "dapo": (-0.68 / 3, [0.0, -1 / 3, 0.0]),
    # ratios sqrt(1.6) -> 1.0004 and 0.5 -> 0.9997, both clipped
    "gspo": (-(1.0004 - 2 * 0.9997) / 2, [0.0, 0.0, 0.0]),
    # -(1.6 log .8 + log .4 - 2 * .5 log .1) / 3
    "cispo": (
        -(1.6 * LOG_PI[0] + LOG_PI[1] - LOG_PI[2]).item() / 3,
        [-1.6 / 3, -1 / 3, 1 / 3],
    ),
    # -(1.6 * 1 + 0.5 * -2) / 2
    "rloo": (-0.3, [-0.8, -0.8, 0.5]),
}


@pytest.mark.parametrize("name", HAND)
def test_compositions_by_hand(name):
    value, table = value_and_table(COMPOSITIONS[name])
    assert value == pytest.approx(HAND[name][0], abs=1e-12)
    assert table == pytest.approx(HAND[name][1], abs=1e-12)


def test_gspo_within_its_bounds_and_its_token_form():
    """ratios (1.6)^(1/2) and 0.5, unclipped: s A / (G |y|) for each token."""
    wide = partial(gspo, clip=partial(clipped, low=0.9, high=0.9))
    s = 1.6**0.5
    value, table = value_and_table(wide)
    assert value == pytest.approx(-(s - 2 * 0.5) / 2, abs=1e-12)
    assert table == pytest.approx([-s / 4, -s / 4, 0.5], abs=1e-12)
    by_token = partial(wide, ratio=geometric_ratio_by_token)
    assert value_and_table(by_token) == (
        pytest.approx(value, abs=1e-12),
        pytest.approx(table, abs=1e-12),
    )
    per_token = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    _, apart = value_and_table(by_token, advantage=per_token)
    _, shared = value_and_table(wide, advantage=per_token)
    assert apart == pytest.approx([-s / 2 / 2, 0.0, 0.5], abs=1e-12)
    assert shared == pytest.approx([-s / 4 / 2, -s / 4 / 2, 0.5], abs=1e-12)


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    _, table = value_and_table(partial(cispo, clip=partial(capped, cap=1.2)))
    assert table == pytest.approx([-1.2 / 3, -1 / 3, 1 / 3], abs=1e-12)


@pytest.mark.parametrize("low", [0.1, 0.2])
@pytest.mark.parametrize("high", [0.2, 0.28])
def test_the_clip_ends_the_gradient_there_and_only_there(low, high):
    ratio = torch.linspace(0.5, 1.6, 1101, dtype=torch.float64).requires_grad_()
    for advantage in (1.5, -1.5):
        gain = clipped(ratio, torch.full_like(ratio, advantage), ratio, low=low, high=high)
        (slope,) = torch.autograd.grad(gain.sum(), ratio)
        out = ratio > 1 + high if advantage > 0 else ratio < 1 - low
        edge = ((ratio - 1 - high).abs() < 1e-9) | ((ratio - 1 + low).abs() < 1e-9)
        assert torch.equal(slope[~edge], torch.where(out, 0.0, advantage)[~edge])
        assert (gain <= ratio * advantage + 1e-15).all()
        assert out.any()
        assert not out.all()


def test_a_mutant_clip_without_the_minimum_stops_what_should_be_undone():
    def clamp_only(ratio, advantage, token_log_pi):
        return ratio.clamp(0.8, 1.2) * advantage

    ratio = torch.tensor([1.6], requires_grad=True)
    bad = torch.tensor([-1.0])
    assert torch.autograd.grad(clamp_only(ratio, bad, ratio).sum(), ratio)[0] == 0
    assert torch.autograd.grad(clipped(ratio, bad, ratio).sum(), ratio)[0] == -1


def test_mean_over_batch_is_the_mean_of_all_tokens_given():
    lengths = torch.tensor([[2, 1], [4, 2]])
    row = torch.arange(4).repeat_interleave(lengths.flatten())
    x = random_logits(9, generator=torch.Generator().manual_seed(4))
    assert mean_over_batch(x, row, lengths).mean().item() == pytest.approx(x.mean().item(), abs=1e-14)
    assert abs(mean_over_group(x, row, lengths).mean() - x.mean()) > 1e-3
    assert mean_over_group(x, row, lengths)[1].item() == pytest.approx(x[3:].mean().item(), abs=1e-14)


# The table as a whole


def network_numbers():
    generator = torch.Generator().manual_seed(5)
    lengths = torch.tensor([[2, 3], [1, 4]])
    row = torch.arange(4).repeat_interleave(lengths.flatten())
    old, q, ref = (random_logits(10, generator=generator) - 2 for _ in range(3))
    return {
        "token_log_pi": old + 0.3 * random_logits(10, generator=generator),
        "token_log_old": old,
        "token_log_q": q,
        "token_log_ref": ref,
        "row": row,
        "lengths": lengths,
        "advantage": random_logits(2, 2, generator=generator),
        "token_advantage": random_logits(10, generator=generator),
        "log_pi": None,
    }


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_composition_binds_by_name_and_keeps_its_dtype(name):
    numbers = network_numbers()
    arguments = bind(COMPOSITIONS[name], numbers)
    value, table = coefficients(COMPOSITIONS[name], network=["token_log_pi"], **arguments)
    assert value.shape == (2,)
    assert table["token_log_pi"].abs().max() > 1e-3
    half = {k: x.float() if x.is_floating_point() else x for k, x in arguments.items()}
    assert COMPOSITIONS[name](**half).dtype == torch.float32
    assert error(COMPOSITIONS[name](**half), value) < 1e-5


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_gradcheck(name):
    arguments = bind(COMPOSITIONS[name], network_numbers())
    log_pi = arguments.pop("token_log_pi").requires_grad_()

    def method(x, **kw):
        return COMPOSITIONS[name](token_log_pi=x, **arguments, **kw)

    if name == "cispo":  # its weight is held fixed on purpose
        with pytest.raises(GradcheckError):
            gradcheck(method, log_pi)
    else:
        assert gradcheck(method, log_pi)


def test_gradcheck_of_the_penalty_the_correction_and_the_value_loss():
    numbers = network_numbers()
    arguments = bind(grpo, numbers)
    log_pi = arguments.pop("token_log_pi").requires_grad_()
    for weigh_penalty in (False, True):
        method = partial(grpo, beta=0.3, weigh_penalty=weigh_penalty, correct=importance)
        assert gradcheck(lambda x, m=method: m(x, **arguments), log_pi)
    values, returns, old = (numbers[k].clone() for k in ("token_log_q", "token_log_ref", "token_log_old"))
    for clip in (None, 0.2):
        assert gradcheck(
            lambda x, c=clip: value_loss(x, returns, old, numbers["row"], numbers["lengths"], clip=c),
            values.requires_grad_(),
        )


def test_the_penalty_is_aggregated_with_the_rest():
    numbers = network_numbers()
    arguments = bind(grpo, numbers)
    plain = grpo(**arguments)
    log_rho = numbers["token_log_pi"] - numbers["token_log_ref"]
    assert (
        error(
            grpo(**arguments, beta=0.3) - plain,
            0.3 * mean_each(k3(log_rho), numbers["row"], numbers["lengths"]),
        )
        < 1e-14
    )
    assert torch.equal(grpo(**arguments, beta=0.0), plain)


def test_value_loss_stops_where_a_value_has_moved_far_enough():
    values = torch.tensor([0.5, 0.5, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    returns = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    old = torch.tensor([0.0, 0.4, 0.0, 0.0], dtype=torch.float64)
    row, lengths = torch.zeros(4, dtype=torch.int64), torch.tensor([[4]])
    value = value_loss(values, returns, old, row, lengths, aggregate=sum_tokens)
    value.backward()
    assert value.item() == pytest.approx((0.8**2 + 0.5**2 + 0.5**2 + 0.8**2) / 2, abs=1e-14)
    assert values.grad.tolist() == pytest.approx([0.0, -0.5, 0.5, 0.0], abs=1e-14)


# Mistakes

WRONG = [
    ({"advantage": torch.zeros(1, 3)}, "advantage of shape"),
    ({"advantage": torch.full((1, 2), torch.nan)}, "advantage = nan"),
    ({"token_log_old": torch.zeros(2)}, "token_log_old of shape"),
    ({"token_log_pi": torch.tensor([0.0, -torch.inf, 0.0])}, "token_log_pi = -inf"),
    ({"row": torch.tensor([0, 1, 1])}, "does not follow from lengths"),
    ({"lengths": torch.tensor([[3, 0]])}, "a token or more"),
    ({"token_log_old": torch.full((3,), -900.0, dtype=torch.float64)}, "infinite ratio"),
    ({"correct": importance}, "no token_log_q"),
    ({"penalty": k3, "beta": 0.1}, "no token_log_ref"),
    (
        {"token_log_q": torch.full((3,), -900.0), "correct": partial(importance, limit=None)},
        "correction = inf",
    ),
]


@pytest.mark.parametrize(("change", "complaint"), WRONG)
def test_mistakes_are_named(change, complaint):
    arguments = {
        "token_log_pi": LOG_PI,
        "token_log_old": LOG_OLD,
        "row": ROW,
        "lengths": LENGTHS,
        "advantage": ADVANTAGE,
        **change,
    }
    with pytest.raises(ValueError, match=complaint):
        surrogate(**arguments)


def test_a_clip_of_nothing_and_a_value_that_is_not_finite_are_named():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="clip = 0"):
        value_loss(x, x, x, ROW, LENGTHS, clip=0.0)
    with pytest.raises(ValueError, match="returns = nan"):
        value_loss(x, x * torch.nan, x, ROW, LENGTHS)
    with pytest.raises(ValueError, match="no token_advantage"):
        bind(ppo, {"token_log_pi": x, "token_log_old": x, "row": ROW, "lengths": LENGTHS})
