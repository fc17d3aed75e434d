"""Where training has log Z of each prompt from: the plan's draws alone, those and every fresh draw since, or learned.

N prompts to train on, P of them in a step, G draws a prompt. Nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klimb.backward import known_numbers
from klimb.data import Example, Pool, Target
from klimb.numbers.running import RunningLogZ, add_draws, no_draws, running_log_z
from klimb.numbers.tilt import log_partition
from klimb.objectives.squared import parted
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


WIDE = 3.0
"""standard errors around the plan's log Z that a learned one is compared with"""


@dataclass(frozen=True, eq=False)
class LearnedLogZ:
    """A log Z that follows the gradient of trajectory balance, and what the plan says it should be.

    Attributes:
        value: [N] as learned so far, nats.
        low: [N] lower end of the plan's interval, nats.
        high: [N] upper end.
    """

    value: Tensor
    low: Tensor
    high: Tensor


def start_learned(pool: Pool, examples: Sequence[Example], target: Target) -> LearnedLogZ:
    """A learned log Z of each example, which begins with the plan's; WIDE standard errors around that are its interval.

    The error of a log of a mean of G weights w is sd(w) / (mean(w) sqrt(G)) to first order.

    Raises:
        ValueError: the plan has no draws of one of them.
    """
    row = {example.id: p for p, example in enumerate(pool.draws.examples)}
    lacking = [example for example in examples if example.id not in row]
    if lacking:
        raise ValueError(
            f"learned log Z: the plan has no draws of {len(lacking)} of {len(examples)} prompts, expected some of each; plan "
            "with all prompts that are trained on"
        )
    worth = (own_reward(target, pool)[[row[example.id] for example in examples]] / target.beta).double()
    weights = (worth - worth.amax(1, keepdim=True)).exp()
    error = weights.std(1) / weights.mean(1) / math.sqrt(worth.shape[1])
    value = log_partition(worth, 1.0)
    return LearnedLogZ(value, value - WIDE * error, value + WIDE * error)


def learn_log_z(
    state: LearnedLogZ, residual: Tensor, prompts: Tensor, *, rate: float
) -> tuple[LearnedLogZ, dict[str, float]]:
    """One step down trajectory balance's gradient in log Z: `rate` of the way to the mean residual of each prompt.

    Args:
        state: before the step.
        residual: [P, G] log_target - log_pi of the step's draws, nats.
        prompts: [P] their numbers among the N.
        rate: above 0, at most 1.

    Returns:
        The state after it; log_z as the step used it and log_z_change, means over its prompts, nats; log_z_parted, the
        share of them whose log Z now lies above the plan's interval, the side on which mass leaks.
    """
    before = state.value[prompts]
    after = before.lerp(residual.double().mean(1), rate)
    low, high = state.low[prompts], state.high[prompts]
    above = parted(after, low, high) & (after > high)
    numbers = {
        "log_z": before.mean().item(),
        "log_z_change": (after - before).mean().item(),
        "log_z_parted": above.double().mean().item(),
    }
    return replace(state, value=state.value.index_copy(0, prompts, after)), numbers
