"""Draws of an earlier policy, learned from later: right for what weighs by their recorded law and for what asks for none.

The space is small enough to sum over: each completion of at most two tokens is learned from by itself, one step from the
same weights, and the steps are summed with the chances under the policy that drew. That is the expected gradient, exactly.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from klimb.data import Draws, Example
from klimb.learn import Recipe
from klimb.models.families import full
from klimb.objectives import log_variance, reverse_kl
from klimb.samplers.ahead import Ahead, begin
from klimb.samplers.ancestral import ancestral
from klimb.steps import TrainState
from klimb.target import tilt
from klimb.train import train

EXAMPLES = [Example("ab")]
LONGEST = 2
REWARD = {"a": 1.0, "b": -0.5}


def reward(completions, **columns):
    return [sum(REWARD.get(letter, 0.2) for letter in c) for c in completions]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def moved(policy, seed, by):
    generator = seeded(seed)
    for weight in policy.parameters():
        weight += by * torch.randn(weight.shape, generator=generator)


@pytest.fixture
def stale(seven_tokens, enumerated):
    """(policy, target, outcomes, their log-probabilities under the policy that drew); the policy has moved since."""
    model, tokenizer = seven_tokens
    policy, reference = full(model.double(), tokenizer)
    moved(policy, 1, 0.02)
    outcomes, chance = enumerated(policy, EXAMPLES[0], LONGEST)
    moved(policy, 2, 0.05)
    return policy, tilt(reference, reward, 0.7), outcomes, chance.log()


def one_group(policy, outcomes, log_q, which):
    rows = [torch.tensor(outcomes[i]) for i in which]
    return Draws(
        examples=[],
        completions=[rows],
        finished=torch.tensor([[int(ids[-1]) in policy.end for ids in rows]]),
        texts=[[policy.decode(ids) for ids in rows]],
        log_q=log_q[list(which)][None],
        full_support=True,
        own_law=True,
    )


def gradient(policy, target, objective, draws, *, age=1, cap=None):
    """What one step on these draws, `age` updates old, would move the weights by, flat."""
    before = [weight.detach().clone() for weight in policy.parameters()]
    state = TrainState(step=3, ahead=(Ahead(3, 3 - age, (0,), lambda: draws),))
    steps = train(
        EXAMPLES,
        policy,
        target,
        sampler=None,
        recipe=Recipe(objective, in_nats=False, max_grad_norm=1e9, importance_cap=cap),
        optimizer=torch.optim.SGD(policy.parameters(), lr=1.0),
        max_steps=4,
        prompts_per_step=1,
        num_draws=draws.num_draws,
        steps_ahead=1,
        state=state,
        generator=seeded(),
    )
    (step,) = steps
    with torch.no_grad():
        moves = torch.cat([(b - w).flatten() for b, w in zip(before, policy.parameters(), strict=True)])
        for weight, was in zip(policy.parameters(), before, strict=True):
            weight.copy_(was)
    return moves, step


def expected(policy, target, outcomes, log_q, objective, **options):
    """The gradient in expectation over single draws of the law that drew."""
    return sum(
        chance * gradient(policy, target, objective, one_group(policy, outcomes, log_q, [i]), **options)[0]
        for i, chance in enumerate(log_q.exp().tolist())
    )


def exact(policy, target, outcomes):
    """The gradient of KL(pi||p), summed over the space, flat."""
    whole = one_group(policy, outcomes, torch.zeros(len(outcomes)), range(len(outcomes)))
    whole = replace(whole, examples=EXAMPLES)
    log_pi = whole.sequence_sums(policy.log_prob(whole))[0]
    with torch.no_grad():
        log_ref = whole.sequence_sums(target.reference.log_prob(whole))[0]
    log_target = log_ref + torch.tensor(reward(whole.texts[0])) / target.beta
    (log_pi.exp() * (log_pi - log_target)).sum().backward()
    found = torch.cat([weight.grad.flatten() for weight in policy.parameters()])
    for weight in policy.parameters():
        weight.grad = None
    return found


score_function = partial(reverse_kl, baseline=None)


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_weighted_reverse_kl_is_unbiased_with_draws_of_an_earlier_policy(stale):
    policy, target, outcomes, log_q = stale
    true = exact(policy, target, outcomes)
    assert relative(expected(policy, target, outcomes, log_q, score_function), true) < 1e-4
    # the mutant: draws of the earlier policy are taken for the policy's own
    assert relative(expected(policy, target, outcomes, log_q, score_function, age=0), true) > 0.05
    # a cap that cuts something biases, as it says
    assert relative(expected(policy, target, outcomes, log_q, score_function, cap=0.9), true) > 0.02


def test_log_variance_asks_for_no_law_and_is_zero_at_the_target_whoever_drew(stale):
    policy, target, outcomes, log_q = stale
    draws = one_group(policy, outcomes, log_q, [1, 5, 9, 2])
    now, _ = gradient(policy, target, log_variance, draws)
    fresh, _ = gradient(policy, target, log_variance, draws, age=0)
    assert now.norm() > 1e-3
    assert torch.equal(now, fresh)
    flat = tilt(replace(policy, trainable=()), lambda completions, **_: [0.3] * len(completions), 0.7)
    still, _ = gradient(policy, flat, log_variance, draws)
    assert still.norm() < 1e-9 * now.norm()
    away, _ = gradient(policy, flat, score_function, draws)
    assert away.norm() > 1e-3  # without a baseline that one is zero on average alone


def test_a_step_says_how_old_its_draws_are_and_what_the_weights_leave(stale):
    policy, target, outcomes, log_q = stale
    draws = one_group(policy, outcomes, log_q, range(12))
    _, step = gradient(policy, target, log_variance, draws)
    with torch.no_grad():
        named = replace(draws, examples=EXAMPLES)
        log_w = (named.sequence_sums(policy.log_prob(named)) - draws.log_q)[0].double()
    share = (log_w.exp().sum() ** 2 / log_w.exp().square().sum() / 12).item()
    assert step.numbers["draws_age"] == 1
    assert step.numbers["importance_ess"] == pytest.approx(share)
    assert step.numbers["importance_cut"] == 0
    assert "sampler_error_mean" not in step.numbers  # what differs is the policy, not the rounding
    _, capped = gradient(policy, target, log_variance, draws, cap=1.01)
    assert capped.numbers["importance_cut"] == (log_w > torch.tensor(1.01).log()).double().mean()
    # KL and reward are those of the policy that drew
    kl = (draws.log_q - named.sequence_sums(target.reference.log_prob(named))).mean()
    assert step.estimates["kl"].value == pytest.approx(kl.item(), abs=1e-5)


def test_weights_that_leave_few_draws_are_called_out(stale):
    policy, target, outcomes, log_q = stale
    draws = one_group(policy, outcomes, log_q, range(12))
    with torch.no_grad():
        named = replace(draws, examples=EXAMPLES)
        own = replace(draws, log_q=named.sequence_sums(policy.log_prob(named)).float())
    _, step = gradient(policy, target, log_variance, own)
    assert step.numbers["importance_ess"] == pytest.approx(1)
    assert step.warnings == {}
    one = torch.arange(12) == 3
    _, step = gradient(policy, target, log_variance, replace(own, log_q=own.log_q + 9 * one))
    assert step.warnings == {}  # one draw that counts for nothing leaves eleven
    _, step = gradient(policy, target, log_variance, replace(own, log_q=own.log_q - 9 * one))
    assert "too far from the one that drew" in step.warnings["importance_ess"]


def ran(policy, target, steps_ahead, *, sampler=None, max_steps=6, **options):
    recorded = []

    def recording(policy, examples, num_draws, *, generator):
        with torch.no_grad():
            recorded.append(next(iter(policy.parameters())).sum().item())
        return ancestral(policy, examples, num_draws, generator=generator, max_completion_length=LONGEST)

    steps = train(
        [Example("ab"), Example("b"), Example("ba")],
        policy,
        target,
        sampler or recording,
        Recipe(log_variance),
        torch.optim.SGD(policy.parameters(), lr=0.05),
        max_steps=max_steps,
        prompts_per_step=2,
        num_draws=4,
        steps_ahead=steps_ahead,
        generator=seeded(5),
        **options,
    )
    return list(steps), recorded


def test_draws_are_begun_by_the_policy_of_that_time(stale):
    policy, target, _, _ = stale
    steps, drew = ran(policy, target, 2)
    assert [int(step.numbers["draws_age"]) for step in steps if "draws_age" in step.numbers] == [
        1,
        2,
        2,
        2,
        2,
    ]
    assert "draws_age" not in steps[0].numbers  # the first step's are its own
    assert drew[0] == drew[1] == drew[2]
    assert len(set(drew[2:])) == 4
    assert len(drew) == 6  # and none is begun that no step would learn from
    assert steps[-1].state.ahead == ()


def test_several_rounds_ahead_are_refused(stale):
    policy, target, _, _ = stale
    with pytest.raises(ValueError, match=r"steps_ahead 1 and 2 rounds"):
        ran(policy, target, 1, max_rounds=2)


def test_a_sampler_with_begin_is_not_waited_for():
    class Slow:
        def begin(self, policy, examples, num_draws, *, generator):
            return lambda: "later"

    assert begin(Slow(), None, [], 1, generator=seeded())() == "later"
    assert begin(lambda *_, generator: "now", None, [], 1, generator=seeded())() == "now"
