"""Train: move a policy towards the target, one optimizer step at a time.

P prompts a step, G draws a prompt. A step draws fresh completions, adds some that were kept, asks the objective for
the table of coefficients [P, G], and takes a signed maximum likelihood step with it:

    gradient = sum over draws of coefficient * grad log pi(draw)

What the next step needs (`TrainState`) is apart from what one wants to look at (`Step`). The loop yields both and
writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from klimb.data import Draws, Example, Pool, Sampler, Scored, chunks, join_pools, pick
from klimb.models.policy import CausalPolicy
from klimb.numbers.estimate import Estimate, mean_estimate
from klimb.objectives.bind import bind
from klimb.objectives.coefficients import coefficients
from klimb.rewards.load import score
from klimb.samplers.replay import Replay
from klimb.target import Tilt

Objective = Callable[..., Tensor]


@dataclass(frozen=True)
class TrainState:
    """What the next step needs besides the weights and the optimizer, which are changed in place.

    Attributes:
        step: how many steps are done.
        order: the prompts still to come in this pass over the data.
        replay: completions kept.
    """

    step: int = 0
    order: tuple[int, ...] = ()
    replay: Replay = field(default_factory=Replay)


@dataclass(frozen=True)
class Step:
    """What one step did, to be looked at.

    Attributes:
        step: its number, from 1.
        estimates: reward, kl (nats), objective of the fresh draws; empty in a step that only replays.
        numbers: value of the objective, residual_std (nats), gradient norm, learning rate, tokens, ...
        seconds: where the time went: draw, score, update.
        fresh: the draws of this step, or None.
        state: what the next step needs.
    """

    step: int
    estimates: dict[str, Estimate]
    numbers: dict[str, float]
    seconds: dict[str, float]
    fresh: Pool | None
    state: TrainState


def train(
    examples: Sequence[Example],
    policy: CausalPolicy,
    target: Tilt,
    sampler: Sampler,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    *,
    max_steps: int,
    prompts_per_step: int,
    num_draws: int,
    num_replay: int = 0,
    replay_steps: int = 0,
    keep_fresh: bool = True,
    max_grad_norm: float = 1.0,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    state: TrainState | None = None,
    generator: torch.Generator,
) -> Iterator[Step]:
    """Take optimizer steps until `max_steps` of them are done.

    The objective is multiplied by beta, so that learning rate and gradient norm mean what they mean for a policy
    gradient of the reward.

    Args:
        examples: the prompts to learn on.
        policy: the policy that moves.
        target: where to.
        sampler: draws fresh completions from the policy.
        objective: numbers -> [P]; its arguments are bound by name (log_pi, log_target, log_q, log_w, ...).
        optimizer: over `policy.parameters()`.
        max_steps: how many steps there are in all.
        prompts_per_step: P.
        num_draws: fresh completions a prompt.
        num_replay: kept completions a prompt beside the fresh ones.
        replay_steps: so many first steps draw nothing and use num_draws + num_replay kept completions.
        keep_fresh: whether fresh completions join the replay.
        max_grad_norm: the gradient is scaled down to at most this norm.
        scheduler: of the learning rate, stepped once a step.
        state: where to go on; by default at the start, with nothing kept.
        generator: the only source of randomness.

    Yields:
        A Step after each optimizer step.

    Raises:
        ValueError: the objective needs numbers or more draws than it gets; the gradient is not finite.
    """
    state = state or TrainState()
    beta = target.beta
    while state.step < max_steps:
        clock, seconds = time.perf_counter(), {}
        chosen, order = next_prompts(state.order, len(examples), prompts_per_step, generator=generator)
        batch = [examples[i] for i in chosen]

        fresh = None
        if state.step >= replay_steps:
            draws = sampler(policy, batch, num_draws, generator=generator)
            seconds["draw"], clock = _lap(clock)
            fresh = scored_pool(draws, target)
            seconds["score"], clock = _lap(clock)
        kept_draws = num_replay if fresh is not None else num_draws + num_replay
        kept = state.replay.draw(batch, kept_draws, generator=generator) if kept_draws else None
        pool = join_pools([part for part in (fresh, kept) if part is not None])

        optimizer.zero_grad()
        value, residual = backward(
            policy,
            pool,
            target,
            objective,
            scale=beta / len(batch),
            num_fresh=num_draws if fresh is not None and fresh.draws.own_law else 0,
        )
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        if not torch.isfinite(norm):
            raise ValueError(
                f"step {state.step + 1}: the gradient is not finite; the weights were left as they were before it. "
                "Lower the learning rate, or look at the rewards of the last draws"
            )
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        seconds["update"], clock = _lap(clock)

        replay = state.replay.extended(fresh) if fresh is not None and keep_fresh else state.replay
        state = TrainState(state.step + 1, order, replay)
        yield Step(
            step=state.step,
            estimates={}
            if fresh is None or fresh.log_pi is None
            else fresh_estimates(fresh, beta, step=state.step),
            numbers={
                "objective_value": value.mean().item(),
                **spread(residual),
                "grad_norm": norm.item(),
                "learning_rate": rate,
                **lengths(pool if fresh is None else fresh),
                "tokens": int(pool.draws.lengths.sum()),
            },
            seconds=seconds,
            fresh=fresh,
            state=state,
        )


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


@torch.no_grad()
def scored_pool(draws: Draws, target: Tilt) -> Pool:
    """Fresh draws with their rewards and reference log-probabilities."""
    rewards = score(target.reward, draws)
    log_ref = draws.sequence_sums(target.reference.log_prob(draws))
    # of a sampler with another law (temperature) log_q is not log pi, and its draws tell no mean under the policy
    return Pool(draws, rewards.total, log_ref, rewards.parts, log_pi=draws.log_q if draws.own_law else None)


def scored(pool: Pool, target: Tilt) -> Scored:
    """What an objective may see of a pool besides the network's numbers."""
    bare = Scored(
        log_ref=pool.log_ref, reward=pool.reward, log_q=pool.draws.log_q, lengths=pool.draws.lengths
    )
    log_target = target.log_target(bare)
    log_w = None if bare.log_q is None else log_target - bare.log_q
    return replace(bare, log_target=log_target, log_w=log_w)


def backward(
    policy: CausalPolicy, pool: Pool, target: Tilt, objective: Objective, *, scale: float, num_fresh: int = 0
) -> tuple[Tensor, Tensor]:
    """Add scale * the objective's gradient to the parameters' gradients, chunk by chunk.

    The first `num_fresh` draws of each prompt are the policy's own, as it is now: the law they were drawn from is the
    policy, so their importance weight is exactly 1, whatever a sampler in low precision said of them.

    Groups that fit into a chunk are passed once: the objective reads the same log-probabilities that the backward
    pass goes through. A group too large for that is first looked at without gradients, for its coefficients, and
    then passed again in pieces.

    Returns:
        The objective's value [P], and the residual log_target - log_pi [P, G], nats.
    """
    if pool.draws.full_support is False:
        raise ValueError(
            "these draws come from a law that cannot draw every completion (top-p, filtered, best of n), so what it "
            "leaves out would go unlearned; draw at temperature 1 without top-p"
        )
    numbers = {name: x for name, x in vars(scored(pool, target)).items() if isinstance(x, Tensor)}
    values, residuals, start = [], [], 0
    for group in chunks(pool.draws, policy.max_chunk_tokens):
        here = slice(start, start + group.num_prompts)
        start += group.num_prompts
        part = {name: x[here] for name, x in numbers.items()}
        fits = int(group.lengths.sum()) <= policy.max_chunk_tokens
        with torch.set_grad_enabled(fits):
            log_pi = group.sequence_sums(policy.log_prob(group))
        own = log_pi.detach()[:, :num_fresh]
        if "log_q" in part:
            part["log_q"] = torch.cat([own, part["log_q"][:, num_fresh:]], 1)
            part["log_w"] = part["log_target"] - part["log_q"]
        arguments = bind(objective, {**part, "log_pi": log_pi.detach()})
        value, tables = coefficients(objective, **arguments)  # ty: ignore[invalid-argument-type]
        table = scale * tables["log_pi"]
        if fits:
            (table * log_pi).sum().backward()
        else:
            for columns in column_pieces(group, policy.max_chunk_tokens):
                piece = pick(group, columns[None].expand(group.num_prompts, -1))
                (table[:, columns] * piece.sequence_sums(policy.log_prob(piece))).sum().backward()
        values.append(value)
        residuals.append(part["log_target"] - log_pi.detach())
    return torch.cat(values), torch.cat(residuals)


def column_pieces(draws: Draws, max_tokens: int) -> Iterator[Tensor]:
    """Split the G draws of a group into runs of at most `max_tokens` tokens (one draw at least)."""
    tokens = draws.lengths.sum(0).tolist()
    start, total = 0, 0
    for g, n in enumerate(tokens):
        if g > start and total + n > max_tokens:
            yield torch.arange(start, g)
            start, total = g, 0
        total += n
    yield torch.arange(start, len(tokens))


def fresh_estimates(fresh: Pool, beta: float, *, step: int) -> dict[str, Estimate]:
    """Reward, KL(pi||ref) in nats, and reward - beta KL, of draws from the policy."""
    assert fresh.log_pi is not None
    each = fresh.log_pi - fresh.log_ref
    generator = torch.Generator().manual_seed(step)
    return {
        "reward": mean_estimate(fresh.reward, generator=generator),
        "kl": mean_estimate(each, generator=generator),
        "regularised_reward": mean_estimate(fresh.reward - beta * each, generator=generator),
    }


def _lap(since: float) -> tuple[float, float]:
    now = time.perf_counter()
    return now - since, now
