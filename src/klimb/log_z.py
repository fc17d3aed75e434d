"""Where training has log Z of each prompt from: the plan's draws alone, or those and every fresh draw since.

N prompts to train on, P of them in a step, G draws a prompt. Nats.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from klimb.backward import known_numbers
from klimb.data import Example, Pool, Target
from klimb.numbers.running import RunningLogZ, add_draws, no_draws, running_log_z
from klimb.numbers.tilt import log_partition
from klimb.target.implied import own_reward


def plan_log_z(pool: Pool | None, target: Target) -> dict[str, float]:
    """Log Z of each of the plan's prompts, by id, nats, from its reference draws."""
    assert pool is not None  # a method that needs log Z has a plan
    found = log_partition(own_reward(target, pool), target.beta).tolist()
    return {example.id: x for example, x in zip(pool.draws.examples, found, strict=True)}


def start_log_z(pool: Pool, examples: Sequence[Example], target: Target) -> RunningLogZ:
    """A running log Z of each example under the target, which has seen the plan's reference draws of it.

    Raises:
        ValueError: the plan has no draws of any of them.
    """
    row = {example.id: p for p, example in enumerate(pool.draws.examples)}
    known = [i for i, example in enumerate(examples) if example.id in row]
    worth = own_reward(target, pool)[[row[examples[i].id] for i in known]] / target.beta
    return add_draws(no_draws(len(examples)), worth, worth, prompts=torch.tensor(known, dtype=torch.int64))


def used_and_moved(
    state: RunningLogZ, fresh: Pool | None, target: Target, prompts: Tensor
) -> tuple[Tensor, RunningLogZ, dict[str, float]]:
    """What a step with these prompts uses, and what its fresh draws make of it.

    Returns:
        [P] log Z from before the draws, which alone does not depend on them; the state after them; the mean of the
        first (log_z) and how far the draws moved it (log_z_change), nats.

    Raises:
        ValueError: a prompt has had no draws before, or the draws' law is not fit.
    """
    before = running_log_z(state, prompts=prompts)
    after = state if fresh is None else take_in(state, fresh, target, prompts)
    moved = running_log_z(after, prompts=prompts) - before
    numbers = {"log_z": before.mean().item(), "log_z_change": moved.mean().item()}
    return before.to(torch.get_default_dtype()), after, numbers


def take_in(state: RunningLogZ, fresh: Pool, target: Target, prompts: Tensor) -> RunningLogZ:
    """The running log Z after fresh draws of the prompts numbered `prompts`, weighted by the law that drew them.

    Raises:
        ValueError: the law is not known, or cannot draw every completion: Z would lack what it leaves out.
    """
    if fresh.draws.log_q is None or fresh.draws.full_support is False:
        lacks = "without log_q" if fresh.draws.log_q is None else "that leave completions out (top-p)"
        raise ValueError(
            f"running log Z: got draws {lacks}, expected draws of a known law that can draw every completion; use "
            "ancestral with top_p 1, or the plan's log Z"
        )
    numbers = known_numbers(fresh, target)
    return add_draws(state, numbers["log_w"], numbers["log_target"] - fresh.log_ref, prompts=prompts)
