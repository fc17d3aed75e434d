"""Train: move a policy towards the target, one optimizer step at a time.

P prompts a step, G draws a prompt. A step draws fresh completions, adds some that were kept, and learns from them
(`klimb.learn`).

What the next step needs (`TrainState`) is apart from what one wants to look at (`Step`). The loop yields both and
writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from klimb.backward import Objective, Passed, known_numbers
from klimb.data import Draws, Example, Pool, Sampler, Target, join_pools
from klimb.learn import Recipe, learn
from klimb.log_z import LearnedLogZ, learn_log_z, used_and_moved
from klimb.models.policy import CausalPolicy
from klimb.numbers.estimate import Estimate, mean_estimate
from klimb.numbers.running import RunningLogZ
from klimb.objectives.bind import name_of
from klimb.rewards.load import score
from klimb.samplers.replay import Replay
from klimb.target import own_reward

TOLERATED = 0.1
"""share of the spread of reward / beta that sampler and scorer may differ by, on average, before a step warns"""
PARTED = 0.5
"""share of a step's prompts whose learned log Z may lie above the plan's interval before a step warns"""


@dataclass(frozen=True)
class TrainState:
    """What the next step needs besides the weights and the optimizer, which are changed in place.

    Attributes:
        step: how many steps are done.
        order: the prompts still to come in this pass over the data.
        replay: completions kept.
        log_z: a running or learned log Z of each example (`klimb.log_z.start_log_z`, `start_learned`), or None.
    """

    step: int = 0
    order: tuple[int, ...] = ()
    replay: Replay = field(default_factory=Replay)
    log_z: RunningLogZ | LearnedLogZ | None = None


@dataclass(frozen=True)
class Step:
    """What one step did, to be looked at.

    Attributes:
        step: its number, from 1.
        estimates: reward, kl (nats), objective of the fresh draws; empty in a step that only replays.
        numbers: value of the objective, residual_std (nats), gradient norm, learning rate, tokens, sampler_error, ...
        seconds: where the time went: draw, score, update.
        fresh: the draws of this step with their log-probabilities under reference and policy, or None.
        state: what the next step needs.
        warnings: what it is about -> what to say; whoever looks on says it once.
    """

    step: int
    estimates: dict[str, Estimate]
    numbers: dict[str, float]
    seconds: dict[str, float]
    fresh: Pool | None
    state: TrainState
    warnings: Mapping[str, str] = field(default_factory=dict)


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
        log_z: id of an example -> log Z of its target, nats; for objectives that ask for it. Not beside the state's
            own one, which is used as it was before a step's draws, and then takes them in or learns from them.
        scheduler: of the learning rate, stepped once a step.
        state: where to go on; by default at the start, with nothing kept.
        generator: the only source of randomness.

    Yields:
        A Step after each of them.

    Raises:
        ValueError: the objective needs numbers or more draws than it gets; the gradient is not finite; two log Z.
    """
    state = state or TrainState()
    if log_z is not None and state.log_z is not None:
        raise ValueError(
            "train: got log_z and a state with one of its own, expected one of them; leave out log_z"
        )
    while state.step < max_steps:
        chosen, order = next_prompts(state.order, len(examples), prompts_per_step, generator=generator)
        batch = [examples[i] for i in chosen]
        draws_fresh = state.step >= replay_steps
        fresh, seconds = None, {}
        if draws_fresh:
            fresh, seconds = fresh_pool(policy, batch, target, sampler, num_draws, generator=generator)
        kept_draws = num_replay if draws_fresh else num_draws + num_replay
        kept = state.replay.draw(batch, kept_draws, generator=generator) if kept_draws else None
        pool = join_pools([part for part in (fresh, kept) if part is not None])
        known = known_numbers(pool, target)
        if log_z is not None:
            known["log_z"] = torch.tensor([log_z[example.id] for example in batch])
        own_log_z, news, prompts = state.log_z, {}, torch.tensor(chosen)
        if isinstance(own_log_z, LearnedLogZ):
            known["log_z"] = own_log_z.value[prompts].to(pool.reward.dtype)
        elif own_log_z is not None:
            known["log_z"], own_log_z, news = used_and_moved(own_log_z, fresh, target, prompts)

        clock = time.perf_counter()
        rate = optimizer.param_groups[0]["lr"]
        passed, moved = learn(
            policy,
            pool.draws,
            known,
            recipe,
            optimizer,
            num_fresh=num_draws if fresh is not None and fresh.draws.own_law else 0,
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
        state = TrainState(state.step + 1, order, replay, own_log_z)
        moved |= {"learning_rate": rate, **news}
        yield seen(state, pool, fresh, passed, moved, seconds, objective=recipe.objective, target=target)


def next_prompts(
    order: Iterable[int], num_examples: int, prompts_per_step: int, *, generator: torch.Generator
) -> tuple[list[int], tuple[int, ...]]:
    """The prompts of the next step, and those to come after it; each pass over the data has an order of its own."""
    left = list(order)
    while len(left) < prompts_per_step:
        again = torch.randperm(num_examples, generator=generator).tolist()
        # a prompt must not stand twice in one step
        left += [i for i in again if i not in left] + [i for i in again if i in left]
    return left[:prompts_per_step], tuple(left[prompts_per_step:])


def fresh_pool(
    policy: CausalPolicy,
    batch: Sequence[Example],
    target: Target,
    sampler: Sampler,
    num_draws: int,
    *,
    generator: torch.Generator,
) -> tuple[Pool, dict[str, float]]:
    """Fresh draws with their rewards and reference log-probabilities, and the seconds each took."""
    start = time.perf_counter()
    draws = sampler(policy, batch, num_draws, generator=generator)
    drawn = time.perf_counter()
    pool = scored_pool(draws, target)
    return pool, {"draw": drawn - start, "score": time.perf_counter() - drawn}


@torch.no_grad()
def scored_pool(draws: Draws, target: Target) -> Pool:
    """Draws with their rewards and reference log-probabilities."""
    rewards = score(target.reward, draws)
    tokens = target.reference.log_prob(draws)
    return Pool(draws, rewards.total, draws.sequence_sums(tokens), rewards.parts, token_log_ref=tokens)


def with_log_pi(fresh: Pool, pool: Pool, passed: Passed) -> Pool:
    """The fresh draws, the first ones of each prompt of `pool`, with what the backward pass found of them."""
    num_fresh = fresh.draws.num_draws
    first = pool.draws.row % pool.draws.num_draws < num_fresh
    return replace(fresh, log_pi=passed.log_pi[:, :num_fresh], token_log_pi=passed.token_log_pi[first])


# What there is to look at.


def seen(
    state: TrainState,
    pool: Pool,
    fresh: Pool | None,
    passed: Passed,
    moved: Mapping[str, float],
    seconds: Mapping[str, float],
    *,
    objective: Objective,
    target: Target,
) -> Step:
    """The record of a step that has just been taken."""
    own = fresh is not None and fresh.draws.own_law
    numbers = {
        "objective_value": passed.value.mean().item(),
        **spread(passed.residual),
        **moved,
        **lengths(pool if fresh is None else fresh),
        "tokens": int(pool.draws.lengths.sum()),
        **(sampler_error(fresh) if own else {}),
    }
    warnings = {}
    if pool.draws.full_support is None and not passed.asked & {"log_q", "log_w"}:
        warnings["full_support"] = (
            f"{name_of(objective)} does not ask which law its draws come from, and of some of them it is not known "
            "whether that law can draw every completion; what it cannot draw goes unlearned, unseen"
        )
    if moved.get("log_z_parted", 0.0) > PARTED:
        warnings["log_z"] = (
            f"the learned log Z of {moved['log_z_parted']:.0%} of a step's prompts lies above what the plan's draws say: there the "
            "policy leaks mass onto what it rarely draws; use a smaller log_z_learning_rate, or log_z: plan"
        )
    if own and (told := disagreement(fresh, numbers["sampler_error_mean"], target.beta)):
        warnings["sampler_error"] = told
    return Step(
        step=state.step,
        estimates=fresh_estimates(fresh, target, step=state.step) if own else {},
        numbers=numbers,
        seconds=dict(seconds),
        fresh=fresh,
        state=state,
        warnings=warnings,
    )


def spread(residual: Tensor) -> dict[str, float]:
    """How uneven the residual is, nats; nothing where a prompt has fewer than two draws that are not forbidden."""
    groups = [row[row.isfinite()] for row in residual]
    if any(len(group) < 2 for group in groups):
        return {}
    return {"residual_std": sum(group.std().item() for group in groups) / len(groups)}


def lengths(pool: Pool) -> dict[str, float]:
    """Mean completion length in tokens, and the share that ended by themselves."""
    return {
        "completion_length": pool.draws.lengths.float().mean().item(),
        "finished": pool.draws.finished.float().mean().item(),
    }


def fresh_estimates(fresh: Pool, target: Target, *, step: int) -> dict[str, Estimate]:
    """Reward, KL(pi||ref) in nats, and the target's own reward - beta KL, of draws from the policy.

    Both log-probabilities are the scorer's: a sampler in low precision rounds in another way.
    """
    assert fresh.draws.own_law
    assert fresh.log_pi is not None
    each = fresh.log_pi - fresh.log_ref
    generator = torch.Generator().manual_seed(step)
    return {
        "reward": mean_estimate(fresh.reward, generator=generator),
        "kl": mean_estimate(each, generator=generator),
        "regularised_reward": mean_estimate(
            own_reward(target, fresh) - target.beta * each, generator=generator
        ),
    }


def sampler_error(fresh: Pool) -> dict[str, float]:
    """|log_q - log_pi| of the policy's own draws, nats: zero if sampler and scorer computed without rounding."""
    assert fresh.draws.log_q is not None
    assert fresh.log_pi is not None
    error = (fresh.draws.log_q - fresh.log_pi).abs().flatten()
    return {
        "sampler_error_mean": error.mean().item(),
        "sampler_error_p99": error.quantile(0.99).item(),
    }


def disagreement(fresh: Pool, sampler_error_mean: float, beta: float) -> str | None:
    """What to say where sampler and scorer differ by more than a tenth of what the reward is worth in nats.

    Forbidden completions (-inf) have no part in the spread of the rewards, and where that is zero nothing is said.
    """
    rewards = fresh.reward[fresh.reward.isfinite()].double()
    worth = rewards.std().item() / beta if len(rewards) > 1 else 0.0
    if worth == 0 or sampler_error_mean <= TOLERATED * worth:
        return None
    return (
        f"sampler and scorer differ by {sampler_error_mean:.2g} nats a completion, more than {TOLERATED:g} of the "
        f"standard deviation of reward / beta ({worth:.2g} nats): part of what is learned is rounding; use dtype "
        "float32, or a smaller beta"
    )
