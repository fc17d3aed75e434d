"""A tiny random Llama whose every completion can be listed: each trained method brings it nearer to the target.

Seven tokens, at most two of them: 43 completions a prompt, so the gap is summed and not estimated.
"""

from dataclasses import replace
from functools import partial
from typing import get_args

import pytest
import torch

from klimb import log_z as log_z_of_steps
from klimb.choice import chosen, needs_log_z, takes_forbidden
from klimb.config import FAMILIES, NEED_LOG_Z, TRAINED, UNTRAINED, Config, load, together
from klimb.data import Draws, Example
from klimb.exact import all_strings, kl, log_partition, normalise
from klimb.learn import Recipe, learn
from klimb.log_z import plan_log_z, start_learned, start_log_z, take_in
from klimb.methods import KL_PENALTIES, METHODS, working_with
from klimb.models.critic import Critic
from klimb.models.families import lora
from klimb.numbers import kl_control
from klimb.numbers.running import add_draws, running_log_z
from klimb.objectives import generators, log_variance, trajectory_balance
from klimb.pool import draw_pool
from klimb.samplers.ancestral import ancestral
from klimb.steps import TrainState
from klimb.target import tilt
from klimb.train import train

BETA = 0.3
AIM = tilt(None, None, BETA)
EXAMPLES = [Example("a"), Example("ba")]
SPACE = all_strings(7, 2)


def brevity(prompts, completions, **columns):
    """One for each letter b, a little more for prompts that end in a."""
    return [
        min(c.count("b"), 2) / 2 + 0.2 * p.endswith("a") for p, c in zip(prompts, completions, strict=True)
    ]


@pytest.fixture
def policies(seven_tokens):
    return lora(*seven_tokens, r=4, alpha=8)


def listed(policy):
    texts = [policy.decode(ids) for ids in SPACE.completions]
    return Draws(
        EXAMPLES,
        [SPACE.completions] * len(EXAMPLES),
        SPACE.finished.expand(len(EXAMPLES), -1),
        texts=[texts] * len(EXAMPLES),
        full_support=True,
    )


@torch.no_grad()
def truth(policy, reference):
    """log pi [P, Y], log_target [P, Y] of every completion."""
    draws = listed(policy)
    rewards = torch.tensor([brevity([e.prompt] * SPACE.size, draws.texts[0]) for e in EXAMPLES]).double()
    log_pi, log_ref = (draws.sequence_sums(p.log_prob(draws)).double() for p in (policy, reference))
    return log_pi, log_ref + rewards / BETA


def gap(policy, reference):
    log_pi, log_target = truth(policy, reference)
    assert torch.allclose(log_pi.exp().sum(1), torch.ones(2, dtype=torch.float64), atol=1e-5)
    return BETA * kl(log_pi, normalise(log_target)).mean().item()


def climbed(
    policies, method, *, max_steps=12, lr=0.01, running=None, seed=1, objective=None, derived=None, **options
):
    policy, reference = policies
    words = ["--dataset_name", "a.jsonl", "--reward_funcs", "math:hypot", "--method", method]
    choice = chosen(load(None, [*words, "--num_replay", "0"]))
    _, log_target = truth(policy, reference)
    log_z = {e.id: z.item() for e, z in zip(EXAMPLES, log_partition(log_target), strict=True)}
    steps = train(
        EXAMPLES,
        policy,
        tilt(reference, brevity, BETA),
        partial(ancestral, max_completion_length=2),
        Recipe(
            objective or choice.objective,
            choice.derived if derived is None else derived,
            in_nats=choice.in_nats,
            **options,
        ),
        torch.optim.Adam(policy.trainable, lr=lr),
        max_steps=max_steps,
        prompts_per_step=2,
        num_draws=16,
        log_z=log_z if choice.needs_log_z and running is None else None,
        state=TrainState(log_z=running),
        generator=torch.Generator().manual_seed(seed),
    )
    return list(steps)


def first_step(policies, name, *, knows_law, log_z=None):
    """One step of a row, from Python, on draws whose law the sampler tells or not."""
    policy, reference = policies

    def sampler(*arguments, **options):
        draws = ancestral(*arguments, max_completion_length=2, **options)
        return draws if knows_law else replace(draws, log_q=None, token_log_q=None, own_law=False)

    row = METHODS[name]
    steps = train(
        EXAMPLES,
        policy,
        tilt(reference, brevity, BETA),
        sampler,
        Recipe(row.objective, row.derived, in_nats=row.unit == "nats"),
        torch.optim.SGD(policy.trainable, lr=0.0),
        max_steps=1,
        prompts_per_step=2,
        num_draws=8,
        keep_fresh=False,
        log_z=log_z,
        generator=torch.Generator().manual_seed(1),
    )
    return next(steps)


def advised(policies, name, **known):
    """The methods that the message names, where a row lacks a number."""
    with pytest.raises(ValueError, match="it cannot do without; known are") as refusal:
        first_step(policies, name, **known)
    return str(refusal.value).partition("These methods can do with what is known: ")[2].split(", ")


def test_draws_of_an_unknown_law_are_refused_with_the_methods_that_can_learn_from_them(policies):
    named = advised(policies, "forward_kl", knows_law=False)
    likelihood = ["sft", "reward_weighted", "raft", "filtered"]
    compared = [
        "dpo",
        "ipo",
        "wpo",
        "slic",
        "chi_po",
        "f_dpo(jensen_shannon)",
        "simpo",
        "cpo",
        "orpo",
        "kto",
        "bco",
    ]
    assert named == ["log_variance", "pmd_mean", "exo", "info_nca", "nca", *compared, *likelihood]
    for name in named:
        assert first_step(policies, name, knows_law=False).step == 1
    # these would run, as if the draws were the policy's own
    assert {"reverse_kl", "rloo", "ppo"}.isdisjoint(named)


def test_without_log_z_the_message_names_every_method_that_runs_without_it_and_no_other(policies):
    named = advised(policies, "jensen_shannon", knows_law=True)
    for name in (name for name, row in METHODS.items() if row.objective is not None):
        if name in named:
            assert first_step(policies, name, knows_law=True).step == 1
        else:
            assert advised(policies, name, knows_law=True) == named
    assert "jensen_shannon" in working_with(["log_target", "log_q", "log_z"])


@pytest.mark.parametrize("penalty", ["k1_in_reward", "k2_as_loss", "k1_as_loss"])
def test_a_price_on_kl_brings_dr_grpo_to_a_target(policies, penalty):
    """Without a price it ends on the best completion; k1 as a loss is no price at all."""
    before = gap(*policies)
    words = ["--dataset_name", "a.jsonl", "--reward_funcs", "math:hypot", "--num_replay", "0"]
    choice = chosen(load(None, [*words, "--method", "dr_grpo", "--kl_penalty", penalty]))
    climbed(policies, "dr_grpo", objective=choice.objective, derived=choice.derived, max_steps=20)
    assert (gap(*policies) < 0.6 * before) == (penalty != "k1_as_loss")


def mean_reward(policy, reference):
    log_pi, log_target = truth(policy, reference)
    log_ref, _ = truth(reference, reference)
    return (log_pi.exp() * BETA * (log_target - log_ref)).sum(1).mean().item()


ARRIVE = [n for n in TRAINED if METHODS[n].claim in ("gradient", "minimiser") and n != "sft"] + [
    "pmd_mean",
    "reinforce_pp",
]
SHORT = ["ipo", "slic", "chi_po", "cpo", "orpo", "kto", "bco", "nca"]
ELSEWHERE = [n for n in TRAINED if n not in (*ARRIVE, *SHORT, "sft")]


@pytest.mark.parametrize("method", ARRIVE)
def test_it_lowers_the_exact_gap(policies, method):
    before = gap(*policies)
    climbed(policies, method)
    assert before > 0.1
    assert gap(*policies) < 0.6 * before


@pytest.mark.parametrize("method", ELSEWHERE)
def test_a_method_of_another_target_climbs_past_this_one(policies, method):
    """Its reward rises as well; how far from the best policy at this beta it ends is what nobody tells it."""
    gap_before, reward_before = gap(*policies), mean_reward(*policies)
    climbed(policies, method)
    assert mean_reward(*policies) > reward_before + 0.1
    assert gap(*policies) > gap_before


@pytest.mark.parametrize("method", SHORT)
def test_a_milder_method_stops_short_of_the_target(policies, method):
    """Chances of winning lie closer together than rewards do, a hinge ends at its margin: the reward rises, and not as far."""
    gap_before, reward_before = gap(*policies), mean_reward(*policies)
    one_by_one = "held_against" in METHODS[method].derived  # these take the reward for a chance
    derived = {"reward": lambda reward: reward / 1.2, **METHODS[method].derived} if one_by_one else None
    climbed(policies, method, max_steps=60, lr=0.02, derived=derived)
    assert reward_before + 0.03 < mean_reward(*policies)
    assert gap(*policies) > 0.1 * gap_before


def test_dpo_does_not_stop_short(policies):
    before = gap(*policies)
    climbed(policies, "dpo", max_steps=100, lr=0.02)
    assert gap(*policies) < 0.2 * before


def test_learning_the_other_way_is_noticed(policies):
    before = gap(*policies)
    policy, reference = policies
    steps = train(
        EXAMPLES,
        policy,
        tilt(reference, brevity, BETA),
        partial(ancestral, max_completion_length=2),
        Recipe(lambda log_pi, log_target: -log_variance(log_pi, log_target)),
        torch.optim.Adam(policy.trainable, lr=0.02),
        max_steps=25,
        prompts_per_step=2,
        num_draws=16,
        generator=torch.Generator().manual_seed(1),
    )
    assert len(list(steps)) == 25
    assert gap(*policies) > before


@pytest.mark.parametrize("method", ["ppo", "rloo", "reverse_kl"])
def test_several_updates_a_batch_climb_faster(policies, method):
    before = gap(*policies)
    steps = climbed(policies, method, num_iterations=2, num_minibatches=2, max_steps=6)
    assert gap(*policies) < 0.8 * before
    assert all(step.numbers["updates"] == 4 for step in steps)
    assert steps[-1].numbers["kl_from_old"] > 0


def test_a_critic_learns_the_rewards_that_follow(policies):
    critic = Critic(32)
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.01)
    before = gap(*policies)
    steps = climbed(policies, "ppo", critic=critic, critic_optimizer=optimizer, num_iterations=2)
    losses = [step.numbers["value_loss"] for step in steps]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert gap(*policies) < 0.6 * before


def test_a_batch_is_left_when_the_policy_has_gone_too_far(policies):
    steps = climbed(policies, "ppo", num_iterations=8, kl_stop=1e-4, max_steps=3)
    assert all(1 <= step.numbers["updates"] < 8 for step in steps)


def test_minibatches_of_one_iteration_see_every_prompt_once(policies):
    """At a learning rate of zero nothing moves, so the parts must report what the whole does."""
    whole, parts = (climbed(policies, "ppo", num_minibatches=n, max_steps=1, lr=0.0)[0] for n in (1, 2))
    torch.testing.assert_close(parts.fresh.log_pi, whole.fresh.log_pi)
    torch.testing.assert_close(parts.fresh.token_log_pi, whole.fresh.token_log_pi)
    assert abs(parts.numbers["objective_value"] - whole.numbers["objective_value"]) < 1e-6


def test_the_policys_own_draws_grow_old_within_a_batch(policies):
    """Importance weights are 1 at the first update and not at the second."""
    policy, _ = policies
    weights = []

    def objective(log_pi, log_q, log_target):
        weights.append((log_pi - log_q).abs().max().item())
        return log_variance(log_pi, log_target)

    draws = ancestral(
        policy, EXAMPLES, 8, generator=torch.Generator().manual_seed(2), max_completion_length=2
    )
    known = {
        "log_q": draws.log_q,
        "log_target": draws.log_q + torch.randn(2, 8, generator=torch.Generator().manual_seed(3)),
        "beta": torch.tensor(1.0),
    }
    optimizer = torch.optim.Adam(policy.trainable, lr=0.05)
    recipe = Recipe(objective, num_iterations=2)
    learn(policy, draws, known, recipe, optimizer, num_fresh=8, generator=torch.Generator())
    first, second = weights[: len(weights) // 2], weights[len(weights) // 2 :]
    assert max(first) == 0.0
    assert min(second) > 1e-3


def test_the_configuration_knows_the_table():
    rows = {name for name, row in METHODS.items() if row.objective is not None}
    assert together.BOUND == kl_control.BOUND
    (charged,) = (a for a in get_args(Config.model_fields["kl_penalty"].annotation) if a is not type(None))
    assert get_args(charged) == tuple(KL_PENALTIES)
    assert set(TRAINED) | set(UNTRAINED) == set(METHODS)
    assert set(TRAINED) <= rows
    assert {name for name in TRAINED if needs_log_z(METHODS[name])} == set(NEED_LOG_Z)
    assert set(FAMILIES) == set(generators.FAMILIES)
    assert takes_forbidden("forward_kl")
    assert takes_forbidden("alpha(0.3)")
    assert not takes_forbidden("reverse_kl")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "ppo", "num_replay": 4}, "learns from fresh draws alone"),
        ({"method": "forward_kl", "clip": 3}, "has none"),
        ({"method": "ppo", "num_replay": 0, "kl_penalty": "k2_as_loss"}, "use one of rloo, grpo"),
        (
            {"method": "log_variance", "kl_penalty": "k2_as_loss"},
            "kl_penalty k2_as_loss: the KL of log_variance",
        ),
        ({"method": "alpha(1)"}, "alpha: got 1.0"),
        ({"method": "skew_kl(2)"}, "skew_kl"),
        ({"method": "ppo", "num_replay": 0, "clip": 3}, "has none"),
        ({"method": "log_variance", "epsilon": 0.2}, "does not clip it"),
        ({"method": "cispo", "num_replay": 0, "epsilon": 0.2}, "does not clip it"),
        ({"method": "reverse_kl", "importance_cap": 2}, "has none"),
        ({"method": "pmd_mean", "num_replay": 0, "num_iterations": 2}, "does not know how old"),
    ],
)
def test_options_that_a_method_does_not_have(options, said):
    words = [f"--{name}={value}" for name, value in options.items()]
    config = load(None, ["--dataset_name", "a.jsonl", "--reward_funcs", "math:hypot", *words])
    with pytest.raises(ValueError, match=said):
        chosen(config)


def test_a_cap_between_sampler_and_trainer_reaches_the_objective(policies):
    """The sampler states another law than the trainer finds: the weight is cut at the cap, and leaves its mark."""
    policy, _ = policies
    words = ["--dataset_name", "a.jsonl", "--reward_funcs", "math:hypot", "--method", "dr_grpo"]
    draws = ancestral(
        policy, EXAMPLES, 8, generator=torch.Generator().manual_seed(2), max_completion_length=2
    )
    tokens = policy.log_prob(draws).detach()
    known = {
        "lengths": draws.lengths,
        "reward": torch.randn(2, 8, generator=torch.Generator().manual_seed(3)),
        "log_target": draws.log_q,
        "beta": torch.tensor(1.0),
    }
    norms = {}
    for off, cap in ((0.0, 2), (1.0, 2), (1.0, 100)):  # the sampler thinks each token e times less likely
        choice = chosen(load(None, [*words, "--importance_cap", str(cap)]))
        recipe = Recipe(choice.objective, choice.derived, in_nats=False, max_grad_norm=1e9)
        optimizer = torch.optim.SGD(policy.trainable, lr=0.0)
        seen = {**known, "token_log_q": tokens - off}
        _, moved = learn(policy, draws, seen, recipe, optimizer, num_fresh=8, generator=torch.Generator())
        norms[off, cap] = moved["grad_norm"]
    assert abs(norms[1.0, 2] / norms[0.0, 2] - 2) < 1e-3
    assert abs(norms[1.0, 100] / norms[0.0, 2] - 2.71828) < 1e-3


def test_a_bound_on_the_ratio_reaches_the_objective():
    words = [
        "--dataset_name",
        "a.jsonl",
        "--reward_funcs",
        "math:hypot",
        "--method",
        "grpo",
        "--epsilon",
        "0.1",
    ]
    clip = chosen(load(None, [*words, "--epsilon_high", "0.3"])).objective.keywords["clip"]
    assert clip.keywords == {"low": 0.1, "high": 0.3}


# A running log Z: the plan is small, eight reference draws a prompt, and each step adds sixteen of the policy's.


def small_plan(policies, seed=1):
    generator = torch.Generator().manual_seed(100 + seed)
    sampler = partial(ancestral, max_completion_length=2)
    return draw_pool(EXAMPLES, policies[1], brevity, sampler, num_draws=8, generator=generator)


def errors(policies, seeds=range(8)):
    """Root mean square error of log Z, nats: the small plan's, and the running one's after twelve steps."""
    policy, reference = policies
    first = [p.detach().clone() for p in policy.trainable]
    exact = log_partition(truth(reference, reference)[1])
    found = []
    for seed in seeds:
        with torch.no_grad():
            for parameter, value in zip(policy.trainable, first, strict=True):
                parameter.copy_(value)
        start = start_log_z(small_plan(policies, seed), EXAMPLES, AIM)
        last = climbed(policies, "jensen_shannon", running=start, seed=seed)[-1].state.log_z
        found.append(torch.stack([running_log_z(state) - exact for state in (start, last)]))
    return torch.stack(found).square().mean((0, 2)).sqrt().tolist()


def test_a_running_log_z_comes_nearer_to_the_true_one_than_the_small_plan(policies):
    plan, running = errors(policies)
    assert running < plan / 2


def test_draws_weighted_as_if_the_reference_had_drawn_them_lead_away_from_it(policies, monkeypatch):
    def without_the_law(state, fresh, target, prompts):
        worth = fresh.reward / target.beta
        return add_draws(state, worth, worth, prompts=prompts)

    monkeypatch.setattr(log_z_of_steps, "take_in", without_the_law)
    plan, wrong = errors(policies)
    assert wrong > plan / 2


@pytest.mark.parametrize("method", sorted(NEED_LOG_Z & set(ARRIVE)))
def test_training_with_a_running_log_z_lowers_the_exact_gap(policies, method):
    before = gap(*policies)
    climbed(policies, method, running=start_log_z(small_plan(policies), EXAMPLES, AIM))
    assert gap(*policies) < 0.6 * before


def test_a_step_uses_the_log_z_from_before_its_draws(policies):
    used = []

    def objective(log_pi, log_target, log_z):
        used.append(log_z)
        return trajectory_balance(log_pi, log_target, log_z)

    pool = small_plan(policies)
    start = start_log_z(pool, EXAMPLES[::-1], AIM)  # rows follow the examples, not the plan
    plan = plan_log_z(pool, AIM)
    expected = torch.tensor([plan[example.id] for example in EXAMPLES[::-1]])
    torch.testing.assert_close(running_log_z(start).float(), expected)

    start = start_log_z(pool, EXAMPLES, AIM)
    steps = climbed(policies, "trajectory_balance", running=start, objective=objective, max_steps=4)
    before = start
    for step, seen in zip(steps, used, strict=True):
        prompts = torch.tensor([EXAMPLES.index(example) for example in step.fresh.draws.examples])
        old, new = (running_log_z(state, prompts=prompts) for state in (before, step.state.log_z))
        assert torch.equal(seen, old.float())
        assert not torch.allclose(seen, new.float(), atol=1e-4)
        assert step.numbers["log_z"] == old.mean().item()
        assert step.numbers["log_z_change"] == (new - old).mean().item()
        assert step.state.log_z.count.tolist() == [8 + 16 * step.step] * 2
        before = step.state.log_z


def test_a_running_log_z_refuses_what_it_cannot_weigh(policies):
    pool = small_plan(policies)
    start = start_log_z(pool, EXAMPLES, AIM)
    target = tilt(policies[1], brevity, BETA)
    for changes, said in (({"log_q": None}, "without log_q"), ({"full_support": False}, "top-p")):
        other = replace(pool, draws=replace(pool.draws, **changes))
        with pytest.raises(ValueError, match=said):
            take_in(start, other, target, torch.arange(2))
    steps = train(
        EXAMPLES,
        policies[0],
        target,
        partial(ancestral, max_completion_length=2),
        Recipe(trajectory_balance),
        torch.optim.Adam(policies[0].trainable),
        max_steps=1,
        prompts_per_step=2,
        num_draws=2,
        log_z=plan_log_z(pool, AIM),
        state=TrainState(log_z=start),
        generator=torch.Generator(),
    )
    with pytest.raises(ValueError, match="leave out log_z"):
        next(steps)


def learned(policies, *, rate, lr=0.01, method="trajectory_balance", max_steps=12):
    """Steps with a learned log Z that begins with a small plan's."""
    start = start_learned(small_plan(policies), EXAMPLES, AIM)
    return start, climbed(policies, method, running=start, log_z_rate=rate, lr=lr, max_steps=max_steps)


def test_a_learned_log_z_follows_the_gradient_of_trajectory_balance(policies):
    start, (step,) = learned(policies, rate=0.25, max_steps=1)
    prompts = [EXAMPLES.index(example) for example in step.fresh.draws.examples]
    log_z = start.value[prompts].float().requires_grad_()
    fresh = step.fresh
    trajectory_balance(fresh.log_pi, fresh.log_ref + fresh.reward / BETA, log_z).sum().backward()
    expected = start.value[prompts] - 0.25 * log_z.grad
    torch.testing.assert_close(
        step.state.log_z.value[prompts], expected, atol=1e-5, rtol=0, check_dtype=False
    )
    torch.testing.assert_close(step.numbers["log_z"], start.value[prompts].mean().item())


def test_training_with_a_learned_log_z_lowers_the_exact_gap_and_ends_below_log_z(policies):
    before = gap(*policies)
    _, steps = learned(policies, rate=0.3, max_steps=24)
    assert gap(*policies) < 0.6 * before
    log_pi, log_target = truth(*policies)
    mean_residual = (log_pi.exp() * (log_target - log_pi)).sum(1)  # log Z - KL(pi||p)
    assert (steps[-1].state.log_z.value - mean_residual).abs().max() < 0.5
    assert not any("log_z" in step.warnings for step in steps)


def test_a_learned_log_z_above_the_plans_interval_raises_the_alarm(policies):
    start = start_learned(small_plan(policies), EXAMPLES, AIM)
    leaking = replace(start, value=start.high + 2.0)
    (step,) = climbed(policies, "trajectory_balance", running=leaking, log_z_rate=0.01, max_steps=1)
    assert step.numbers["log_z_parted"] == 1.0
    assert "lies above" in step.warnings["log_z"]
