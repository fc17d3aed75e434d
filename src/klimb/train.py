"""Train: move a policy towards the target, one optimizer step at a time.

P prompts a step, G draws a prompt. A step draws fresh completions (`klimb.batch`), adds some that were kept, and learns
from them (`klimb.learn`).

What the next step needs (`TrainState`) is apart from what one wants to look at (`Step`); both are in `klimb.steps`. The
loop yields them and writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.profiler import record_function

from klimb.backward import known_numbers
from klimb.batch import begun, fresh_batch, fresh_pool, next_prompts, waited_for, with_log_pi
from klimb.data import Example, Pool, Sampler, Target, join_pools
from klimb.learn import Recipe, learn
from klimb.log_z import LearnedLogZ, learn_log_z, used_and_moved
from klimb.methods import weighs_by_law, working_with
from klimb.models.policy import CausalPolicy
from klimb.numbers.kl_control import adapted_beta
from klimb.numbers.ordering import ordering
from klimb.objectives.bind import name_of
from klimb.samplers.ahead import begin
from klimb.steps import Step, TrainState, log_law, of_data, seen


def train(
    examples: Sequence[Example],
    policy: CausalPolicy,
    target: Target,
    sampler: Sampler,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    *,
    max_steps: int,
    prompts_per_step: int,
    num_draws: int,
    num_replay: int = 0,
    replay_steps: int = 0,
    keep_fresh: bool = True,
    max_rounds: int = 1,
    steps_ahead: int = 0,
    log_z: Mapping[str, float] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    state: TrainState | None = None,
    generator: torch.Generator,
) -> Iterator[Step]:
    """Take steps until `max_steps` of them are done.

    Args:
        examples: the prompts to learn on.
        policy: the policy that moves.
        target: where to.
        sampler: draws fresh completions from the policy.
        recipe: the objective, and how a batch is learned from.
        optimizer: over `policy.parameters()`.
        max_steps: how many steps there are in all.
        prompts_per_step: P.
        num_draws: fresh completions a prompt.
        num_replay: kept completions a prompt beside the fresh ones.
        replay_steps: so many first steps draw nothing and use num_draws + num_replay kept completions.
        keep_fresh: whether fresh completions join the replay.
        max_rounds: how often a step may draw; from the second time on of other prompts, in the place of those whose
            completions all have one reward (`klimb.batch.fresh_batch`).
        steps_ahead: draws are begun so many steps before they are learned from, by the policy of that time, and are weighed for
            it where the objective asks for the law. A sampler with a method `begin` goes on drawing meanwhile.
        log_z: id of an example -> log Z of its target, nats; for objectives that ask for it. Not beside the state's
            own one, which is used as it was before a step's draws, and then takes them in or learns from them.
        scheduler: of the learning rate, stepped once a step.
        state: where to go on; by default at the start, with nothing kept.
        generator: the only source of randomness.

    Yields:
        A Step after each of them.

    Raises:
        ValueError: the objective needs numbers or more draws than it gets, or the law of draws that do not say; the gradient is not finite; two log Z; draws
            ahead in several rounds; a target without a beta of its own for a KL controller.
    """
    state = state or TrainState()
    if log_z is not None and state.log_z is not None:
        raise ValueError(
            "train: got log_z and a state with one of its own, expected one of them; leave out log_z"
        )
    if steps_ahead and max_rounds > 1:
        raise ValueError(
            f"train: got steps_ahead {steps_ahead} and {max_rounds} rounds, and which prompts are drawn again is known only when all "
            "is drawn; expected one of them"
        )
    draw_ahead = partial(begin, sampler, policy, num_draws=num_draws)
    while state.step < max_steps:
        aim = target if state.beta is None else at_beta(target, state.beta)
        draws_fresh, order, queue, age = state.step >= replay_steps, state.order, state.ahead, 0
        fresh, seconds, drawn = None, {}, None
        if steps_ahead:
            last = min(state.step + steps_ahead, max_steps - 1)
            order, queue = begun(
                order,
                queue,
                range(max(state.step, replay_steps), last + 1),
                examples,
                prompts_per_step,
                draw_ahead,
                version=state.step,
                generator=generator,
            )
        if steps_ahead and draws_fresh:
            now, queue = queue[0], queue[1:]
            chosen, age = list(now.prompts), state.step - now.version
            fresh, seconds = waited_for(now, [examples[i] for i in chosen], aim)
        else:
            chosen, order = next_prompts(order, len(examples), prompts_per_step, generator=generator)
        if draws_fresh and not steps_ahead:
            draw = partial(
                fresh_pool, policy, target=aim, sampler=sampler, num_draws=num_draws, generator=generator
            )
            drawn = fresh_batch(examples, chosen, order, draw, max_rounds=max_rounds)
            chosen, order, fresh, seconds = drawn.prompts, drawn.order, drawn.pool, drawn.seconds
        batch = [examples[i] for i in chosen]
        kept_draws = num_replay if draws_fresh else num_draws + num_replay
        kept = state.replay.draw(batch, kept_draws, generator=generator) if kept_draws else None
        pool = join_pools([part for part in (fresh, kept) if part is not None])
        known = known_numbers(pool, aim)
        if pool.draws.log_q is None:
            require_no_law(recipe, known)
        if log_z is not None:
            known["log_z"] = torch.tensor([log_z[example.id] for example in batch])
        own_log_z, news, prompts = state.log_z, {}, torch.tensor(chosen)
        if isinstance(own_log_z, LearnedLogZ):
            known["log_z"] = own_log_z.value[prompts].to(pool.reward.dtype)
        elif own_log_z is not None:
            known["log_z"], own_log_z, news = used_and_moved(own_log_z, fresh, aim, prompts)

        clock = time.perf_counter()
        rate = optimizer.param_groups[0]["lr"]
        with record_function("klimb:update"):
            passed, moved = learn(
                policy,
                pool.draws,
                known,
                recipe,
                optimizer,
                num_fresh=num_draws if believed(fresh, age, recipe) else 0,
                generator=generator,
                step=state.step + 1,
            )
            if scheduler is not None:
                scheduler.step()
        seconds["update"] = time.perf_counter() - clock

        if isinstance(own_log_z, LearnedLogZ):
            own_log_z, news = learn_log_z(own_log_z, passed.residual, prompts, rate=recipe.log_z_rate)
        if fresh is not None:
            fresh = with_log_pi(fresh, pool, passed)
        replay = state.replay.extended(fresh) if fresh is not None and keep_fresh else state.replay
        beta = state.beta
        if recipe.kl_target is not None:
            news |= {"beta": aim.beta}
            beta = aim.beta if fresh is None else next_beta(recipe, fresh, aim.beta, age=age)
        if of_data(pool, fresh):
            news |= order_of(pool, passed.log_pi, aim.beta)
        if drawn is not None and max_rounds > 1:
            news |= {"prompts_drawn": drawn.num_drawn, "prompts_alike": drawn.num_alike}
        state = TrainState(state.step + 1, order, replay, own_log_z, beta, queue)
        moved |= {"learning_rate": rate, **news}
        yield seen(
            state,
            pool,
            fresh,
            passed,
            moved,
            seconds,
            objective=recipe.objective,
            target=aim,
            age=age,
            cap=recipe.importance_cap,
        )


def believed(fresh: Pool | None, age: int, recipe: Recipe) -> bool:
    """True if fresh draws count as the policy's own, with weights of exactly one."""
    return fresh is not None and fresh.draws.own_law and age == 0 and recipe.importance_cap is None


def order_of(pool: Pool, log_pi: torch.Tensor, beta: float) -> dict[str, float]:
    """How the policy orders the judged completions of a step, before it learned from them; empty where none differ."""
    found = ordering(log_pi - pool.log_ref, pool.reward, pool.draws.lengths, beta)
    return {name: found[name].mean().item() for name in ("accuracy", "margin") if len(found[name])}


def require_no_law(recipe: Recipe, known: Mapping[str, torch.Tensor]) -> None:
    """Refuse an objective that would take draws of an unknown law for the policy's own.

    Raises:
        ValueError: it weighs draws by the law that they came from; the methods that do not are named.
    """
    asked = (recipe.objective, *(recipe.derived or {}).values())
    if any(map(weighs_by_law, asked)):
        raise ValueError(
            f"{name_of(recipe.objective)}: got no log_q, the law that these draws came from, and it cannot do without; known are "
            f"{', '.join(known)}. These methods can do with what is known: {', '.join(working_with(known))}"
        )


def at_beta(target: Target, beta: float) -> Target:
    """The same target at another beta.

    Raises:
        ValueError: its beta is not a number of its own (an entropy bonus, a moving reference).
    """
    known: Any = target
    if "beta" not in known.__dataclass_fields__:
        raise ValueError(
            f"kl_target: the beta of {type(target).__name__} is made of others, and a controller cannot set it; use a tilt"
        )
    return replace(known, beta=beta)


def next_beta(recipe: Recipe, fresh: Pool, beta: float, *, age: int = 0) -> float:
    """What the KL controller makes of the KL of a step's fresh draws, which are `age` updates old."""
    assert recipe.kl_target is not None
    return adapted_beta(
        beta,
        (log_law(fresh, age=age) - fresh.log_ref).mean().item(),
        goal=recipe.kl_target,
        num_completions=fresh.reward.numel(),
        horizon=recipe.kl_horizon,
    )
