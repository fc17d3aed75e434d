"""The draws of one training step: which prompts are next, and fresh completions of them with all that is known of them.

P prompts a step, G draws a prompt, N examples to train on.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.profiler import record_function

from klimb.backward import Passed
from klimb.data import Draws, Example, Pool, Sampler, Target, select_pool, stack_pools
from klimb.models.policy import CausalPolicy
from klimb.rewards.score import score
from klimb.samplers.ahead import Ahead


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


@dataclass(frozen=True)
class Batch:
    """The prompts of a step and fresh completions of each.

    Attributes:
        prompts: their numbers among the N.
        order: the prompts still to come in this pass over the data.
        pool: [P, G] draws with their rewards and reference log-probabilities.
        seconds: where the time went: draw, score.
        num_drawn: prompts that completions were drawn of.
        num_alike: how many of those had one reward for all completions.
    """

    prompts: list[int]
    order: tuple[int, ...]
    pool: Pool
    seconds: dict[str, float]
    num_drawn: int
    num_alike: int


def fresh_batch(
    examples: Sequence[Example],
    prompts: Sequence[int],
    order: Sequence[int],
    draw: Callable[[Sequence[Example]], tuple[Pool, dict[str, float]]],
    *,
    max_rounds: int,
) -> Batch:
    """Draw of these prompts, and then, up to `max_rounds` times in all, of others in the place of those without contrast.

    A prompt all of whose completions have one reward gives an advantage of zero everywhere. It gives up its place to the
    next prompt of this pass over the data, and comes again in the next pass. Where no prompt has any contrast the first ones stay.

    What is learned from is then no longer a random sample of prompts: each counts in proportion to the chance that its
    completions differ in reward, and where a KL is in the reward, its pull back on solved prompts is left out.

    Args:
        examples: N.
        prompts: P numbers of the examples that come first.
        order: those to come after them.
        draw: gives the draws of some examples and the seconds it took (`fresh_pool`).
        max_rounds: 1 keeps all prompts.

    Source: Yu et al., "DAPO: an open-source LLM reinforcement learning system at scale", 2025 (dynamic sampling).
    Not the same as their buffer, which refills until a batch is full, however long that takes, and wraps around the data.
    """
    wanted, coming = list(prompts), list(order)
    kept: list[tuple[list[int], Pool]] = []
    seconds: Counter[str] = Counter()
    first, num_drawn, num_alike = None, 0, 0
    for round_ in range(max_rounds):
        pool, spent = draw([examples[i] for i in wanted])
        seconds.update(spent)
        first = pool if first is None else first
        rewards = pool.reward
        differ = (rewards != rewards[:, :1]).any(1)
        num_drawn, num_alike = num_drawn + len(wanted), num_alike + int((~differ).sum())
        if max_rounds == 1:
            differ = torch.ones_like(differ)
        here = differ.nonzero()[:, 0].tolist()
        if here:
            kept.append(([wanted[i] for i in here], pool if bool(differ.all()) else select_pool(pool, here)))
        missing = len(prompts) - sum(len(numbers) for numbers, _ in kept)
        if missing == 0 or not coming or round_ + 1 == max_rounds:
            break
        wanted, coming = coming[:missing], coming[missing:]
    assert first is not None
    numbers = [i for part, _ in kept for i in part] or list(prompts)
    whole = kept[0][1] if len(kept) == 1 else stack_pools([part for _, part in kept]) if kept else first
    return Batch(numbers, tuple(coming), whole, dict(seconds), num_drawn, num_alike)


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
    return _drawn_and_scored(lambda: sampler(policy, batch, num_draws, generator=generator), target)


def _drawn_and_scored(draw: Callable[[], Draws], target: Target) -> tuple[Pool, dict[str, float]]:
    start = time.perf_counter()
    with record_function("klimb:draw"):
        draws = draw()
    drawn = time.perf_counter()
    with record_function("klimb:score"):
        pool = scored_pool(draws, target)
    return pool, {"draw": drawn - start, "score": time.perf_counter() - drawn}


def begun(
    order: Sequence[int],
    queue: Sequence[Ahead],
    steps: Iterable[int],
    examples: Sequence[Example],
    prompts_per_step: int,
    draw: Callable[..., Callable[[], Draws]],
    *,
    version: int,
    generator: torch.Generator,
) -> tuple[tuple[int, ...], tuple[Ahead, ...]]:
    """Begin the draws of those of `steps` that are not in the queue yet; the prompts left, and the queue.

    Each has a generator of its own, since it may be drawn while others are.

    Args:
        order: prompts still to come in this pass over the data.
        queue: what was begun before, the next step first.
        steps: those whose draws are to be under way.
        examples: N.
        prompts_per_step: P.
        draw: begins the draws of some examples (`klimb.samplers.ahead.begin`).
        version: the steps done by the policy that draws.
        generator: of prompts and seeds.
    """
    order, queue = tuple(order), tuple(queue)
    there = {one.step for one in queue}
    for step in steps:
        if step not in there:
            chosen, order = next_prompts(order, len(examples), prompts_per_step, generator=generator)
            seed = int(torch.randint(2**62, (1,), generator=generator))
            own = torch.Generator().manual_seed(seed)
            draws = draw(examples=[examples[i] for i in chosen], generator=own)
            queue = (*queue, Ahead(step, version, tuple(chosen), draws))
    return order, queue


def waited_for(now: Ahead, batch: Sequence[Example], target: Target) -> tuple[Pool, dict[str, float]]:
    """Draws that were begun earlier, with all that is known of them; draw is the seconds that were waited."""
    return _drawn_and_scored(lambda: replace(now.draws(), examples=list(batch)), target)


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
