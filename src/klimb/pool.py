"""A pool: draws of a policy with their rewards, made a block of prompts at a time, in any order and by anybody.

P prompts, G draws a prompt, N packed tokens. Each block has a generator of its own, from the seed of the pool and the number of its first
prompt, and is drawn in the same company always. So its draws depend on no other block: a pool that was killed goes on where it was, several
ranks or machines draw blocks of their own, and all come to the same pool, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch

from klimb.data import Draws, Example, Policy, Pool, Reward, Sampler, select, stack_pools
from klimb.models.sharded import whole
from klimb.ranks import ALONE
from klimb.rewards.score import Rewards, asked_alone, score
from klimb.rewards.weighted_sum import WeightedSum, weighted_sum

Progress = Callable[[str, int, int], None]
"""called with what is being done, how much of it is done, and how much there is"""

ROWS_AT_ONCE = 192
"""completions between two words about progress; enough for the matrix products to be large"""


def silent(what: str, done: int, total: int) -> None:
    """Say nothing."""


class Parts(Protocol):
    """Where finished blocks of a pool are kept until all are there (`klimb.store.parts`)."""

    def done(self) -> Sequence[range]:
        """The blocks that are there."""
        ...

    def read(self, block: range) -> Pool:
        """One of them, as it was."""
        ...

    def write(self, block: range, pool: Pool) -> None:
        """Keep this block, unless it is there."""
        ...


def prompts_at_once(num_draws: int, policy: object = None) -> int:
    """How many prompts go together so that about ROWS_AT_ONCE completions do, on each of the ranks that share the policy's work.

    Example:
        >>> prompts_at_once(40), prompts_at_once(1000)
        (4, 1)
    """
    return max(1, ROWS_AT_ONCE // num_draws) * getattr(policy, "ranks", ALONE).world


def blocks(num_prompts: int, num_draws: int) -> list[range]:
    """The prompts that are drawn together; the same whoever draws.

    Example:
        >>> blocks(10, 40)
        [range(0, 4), range(4, 8), range(8, 10)]
    """
    size = prompts_at_once(num_draws)
    return [range(start, min(start + size, num_prompts)) for start in range(0, num_prompts, size)]


def seed_of(generator: torch.Generator) -> int:
    """The seed of a pool, drawn from a generator, which moves on by one number however many draws the pool has."""
    return int(torch.randint(2**62, (1,), generator=generator))


def draw_pool(
    examples: Sequence[Example],
    policy: Policy,
    reward: Reward,
    sampler: Sampler,
    *,
    num_draws: int,
    generator: torch.Generator,
    under: tuple[Policy, Policy] | None = None,
    reference: Policy | None = None,
    progress: Progress = silent,
    what: str = "draw",
    unscored: list[str] | None = None,
    parts: Parts | None = None,
) -> Pool:
    """Draw from `policy` and score with `reward`, block by block; of several ranks each draws whole blocks.

    `log_ref` of the pool is the law of the draw, so `policy` is taken to be the reference, unless `under` or `reference` is given.

    Args:
        examples: P prompts.
        policy: whom to draw from.
        reward: under TRL's contract.
        sampler: must draw from the policy itself (temperature 1, no top-p), unless `reference` is given.
        num_draws: G.
        generator: where the seed of the pool comes from.
        under: policy and reference under which each draw is read again, both in the same way (`scored_under`).
        reference: who says `log_ref`, of draws from any law.
        progress: told how far it is.
        what: is being done, for `progress`.
        unscored: where given and a reward of another process fails, the rest is drawn without asking it; rows without a number
            are NaN (`scored_again`), and why is put there.
        parts: finished blocks, which are not drawn again; each further one is put there as soon as it is drawn.

    Raises:
        ValueError: a sampler of another law; what sampler, reward or `parts` refuse.
    """
    ranks, seed = getattr(policy, "ranks", ALONE), seed_of(generator)
    sampler = handed_over(sampler, policy)
    draw = partial(draw_block, examples, sampler=sampler, num_draws=num_draws, seed=seed)
    every = blocks(len(examples), num_draws)
    kept = {} if parts is None else ranks.from_first(partial(_kept, parts, examples))
    mine = {"policy": alone(policy), "reward": asked_alone(reward)}
    mine["under"] = None if under is None else tuple(alone(who) for who in under)
    mine["reference"] = None if reference is None else alone(reference)

    def word() -> None:
        progress(what, sum(map(len, kept)) * num_draws, len(examples) * num_draws)

    word()
    with ExitStack() as stack:
        if ranks.world > 1:
            asked = [policy, *(under or ()), *([] if reference is None else [reference])]
            models: dict[int, Any] = {id(getattr(x, "model", x)): x for x in asked}
            for who in models.values():
                stack.enter_context(whole(who))
        left = [block for block in every if block not in kept]
        for turn in (left[i : i + ranks.world] for i in range(0, len(left), ranks.world)):
            if parts is None and len(turn) < ranks.world:  # so that nobody waits: all share each block
                shared = partial(draw, policy=policy, reward=reward, under=under, reference=reference)
                found = [(block, shared(block), None) for block in turn]
            else:
                found = ranks.gather(partial(_turn, turn, ranks.rank, draw, mine, unscored, parts))
            for block, pool, said in filter(None, found):
                kept[block] = pool
                if said and unscored is not None and not unscored:
                    unscored += said[:1]
            if parts is not None and ranks.world > 1:  # what another machine could not write
                ranks.from_first(partial(_write_all, parts, {b: kept[b] for b in turn}))
            word()
    return stack_pools([kept[block] for block in every])


def handed_over(sampler: Sampler, policy: Policy) -> Sampler:
    """The sampler as each rank may call it by itself: an engine elsewhere has the policy before any of them does; all call this together."""
    hand_over = getattr(sampler, "handed_over", None)
    return sampler if hand_over is None else hand_over(policy)


def draw_block(
    examples: Sequence[Example],
    block: range,
    *,
    policy: Policy,
    reward: Reward,
    sampler: Sampler,
    num_draws: int,
    seed: int,
    under: tuple[Policy, Policy] | None = None,
    reference: Policy | None = None,
    unscored: list[str] | None = None,
) -> Pool:
    """The draws of one block, all arguments as those of `draw_pool`; where `unscored` says something, the reward is not asked."""
    generator = torch.Generator().manual_seed(seed + block.start)  # of the pool's blocks no two have the same
    draws = sampler(policy, examples[block.start : block.stop], num_draws, generator=generator)
    if reference is not None:
        with torch.no_grad():
            tokens = reference.log_prob(draws)
        log_ref = draws.sequence_sums(tokens)
    elif draws.own_law and draws.log_q is not None:
        tokens, log_ref = draws.packed_log_q, draws.log_q
    else:
        raise ValueError(
            "the sampler draws from another law than the policy's own (temperature, top-p, best of n); planning "
            "and measuring need the policy's own draws"
        )
    if unscored:
        unknown = torch.full_like(log_ref, torch.nan)
        several = reward if isinstance(reward, WeightedSum) else weighted_sum([reward])
        rewards = Rewards(unknown, dict.fromkeys(several.rewards, unknown))
    else:
        rewards = score(reward, draws, unscored=unscored)
    pool = Pool(replace(draws, token_log_q=None), rewards.total, log_ref, rewards.parts, token_log_ref=tokens)
    return pool if under is None else scored_under(pool, *under)


def _turn(
    turn: Sequence[range],
    rank: int,
    draw: Callable[..., Pool],
    mine: dict[str, Any],
    unscored: list[str] | None,
    parts: Parts | None,
) -> tuple[range, Pool, list[str] | None] | None:
    """This rank's block of those that are drawn at a time, what could not be scored of it, and the block kept."""
    if rank >= len(turn):
        return None
    said = None if unscored is None else list(unscored)
    pool = draw(turn[rank], unscored=said, **mine)
    if parts is not None:
        parts.write(turn[rank], pool)
    return turn[rank], pool, said


def _kept(parts: Parts, examples: Sequence[Example]) -> dict[range, Pool]:
    """What is there, with the examples themselves, whose columns a file may not hold as they are."""
    found = {block: parts.read(block) for block in parts.done()}
    return {
        block: replace(
            pool,
            draws=replace(
                pool.draws, examples=examples[block.start : block.stop], own_law=pool.draws.log_q is not None
            ),
        )
        for block, pool in found.items()
    }


def _write_all(parts: Parts, pools: dict[range, Pool]) -> None:
    for block, pool in pools.items():
        parts.write(block, pool)


def alone(policy: Any) -> Any:
    """The same policy, whose work this rank does by itself."""
    return replace(policy, ranks=ALONE) if getattr(policy, "ranks", ALONE).world > 1 else policy


def scored_again(pool: Pool, reward: Reward) -> tuple[Pool, str | None]:
    """The pool with those of its draws scored that have no reward (NaN), and why some still have none."""
    assert pool.draws.texts is not None
    rows = pool.reward.isnan().nonzero().tolist()
    if not rows:
        return pool, None
    missing = Draws(
        examples=[pool.draws.examples[p] for p, _ in rows],
        completions=[[pool.draws.completions[p][g]] for p, g in rows],
        finished=torch.stack([pool.draws.finished[p, g] for p, g in rows])[:, None],
        texts=[[pool.draws.texts[p][g]] for p, g in rows],
    )
    said: list[str] = []
    found = score(asked_alone(reward), missing, unscored=said)
    index = tuple(torch.tensor(rows).T)
    total = pool.reward.index_put(index, found.total[:, 0])
    parts = {
        name: pool.parts.get(name, torch.full_like(total, torch.nan)).index_put(index, part[:, 0])
        for name, part in found.parts.items()
    }
    return replace(pool, reward=total, parts=parts), said[0] if said else None


def scored_under(
    pool: Pool, policy: Policy, reference: Policy, *, progress: Progress = silent, what: str = "score"
) -> Pool:
    """The pool with its log-probabilities under policy and reference, both read in the same way.

    Not the sampler's own log_q: in bfloat16 the two ways round differently, by more than a tenth of a nat a completion,
    and a difference of one number of each kind would count that as KL.
    """
    log_pi = score_tokens(policy, pool, progress=progress, what=f"{what} under the policy")
    log_ref = score_tokens(reference, pool, progress=progress, what=f"{what} under the reference")
    return replace(
        pool,
        log_pi=pool.draws.sequence_sums(log_pi),
        log_ref=pool.draws.sequence_sums(log_ref),
        token_log_pi=log_pi,
        token_log_ref=log_ref,
    )


@torch.no_grad()
def score_tokens(
    policy: Policy, pool: Pool, *, progress: Progress = silent, what: str = "score"
) -> torch.Tensor:
    """[N] log-probability of every token of the pool under `policy`, nats."""
    parts, size, at_once = [], pool.draws.num_prompts, prompts_at_once(pool.draws.num_draws, policy)
    for start in range(0, size, at_once):
        stop = min(start + at_once, size)
        parts.append(policy.log_prob(select(pool.draws, range(start, stop))))
        progress(what, stop * pool.draws.num_draws, size * pool.draws.num_draws)
    return torch.cat(parts)
