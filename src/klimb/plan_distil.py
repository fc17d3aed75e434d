"""Plan a distillation: how far reference and teacher are apart, both ways, where, and what a step costs.

One small pool of draws from either side. KL(p||ref), on the teacher's draws, is what the teacher says and the reference seldom does: forward
KL is paid for leaving it out, so it covers. KL(ref||p), on the reference's draws, is what the reference says and the teacher would not:
reverse KL is paid for saying it, so it seeks what the teacher likes best. P prompts, G draws a prompt; nats.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.data import Draws, Example, Sampler, select
from klimb.distil import Lesson, learned, tokens_apart
from klimb.models.policy import CausalPolicy
from klimb.numbers.estimate import Estimate, mean_estimate, ratio_estimate
from klimb.numbers.tilt import draws_needed
from klimb.numbers.weights import pareto_threshold, pooled_pareto_k
from klimb.plan import Progress, silent
from klimb.rewards.log_ratio import LogRatio

FAR = 1.0
"""nats a token, either way, from which single tokens fill the gradient of a KL and a bounded divergence is advised; a rule of thumb"""


@dataclass(frozen=True)
class Place:
    """Tokens `first` to `last` of completions (from 1): the KL of the next token there, nats a token."""

    first: int
    last: int
    forward: Estimate | None
    reverse: Estimate | None


@dataclass(frozen=True)
class Cost:
    """What was measured once: prompt and completion tokens of a step, and seconds.

    Attributes:
        prompt_tokens: of the teacher and of the policy, mean of a prompt.
        tokens: completion tokens of a step.
        teacher_seconds: to draw them from the teacher.
        policy_seconds: to draw as many from the policy.
        update_seconds: to learn from them once.
        trained_numbers: how many numbers move.
    """

    prompt_tokens: tuple[float, float]
    tokens: float
    teacher_seconds: float
    policy_seconds: float
    update_seconds: float
    trained_numbers: int

    def step(self, *, teacher_draws: float, num_iterations: int) -> float:
        """Seconds of a step, mean over steps of either kind."""
        drawn = teacher_draws * self.teacher_seconds + (1 - teacher_draws) * self.policy_seconds
        return drawn + num_iterations * self.update_seconds


@dataclass(frozen=True)
class Apart:
    """How far the reference is from the teacher before anything is learned.

    Attributes:
        forward: KL(p||ref), nats a completion.
        reverse: KL(ref||p), nats a completion.
        forward_a_token: the same a token.
        reverse_a_token: likewise.
        places: where in a completion.
        prompts: the prompts, with KL(p||ref) and KL(ref||p) of each.
        pareto_k: tail of p/ref over the reference's draws.
        tail_holds: whether weights p/ref, of which so many were seen, could be trusted.
        cost: of a step.
    """

    forward: Estimate
    reverse: Estimate
    forward_a_token: Estimate
    reverse_a_token: Estimate
    places: Sequence[Place]
    prompts: Sequence[tuple[Example, float, float]]
    pareto_k: float
    tail_holds: bool
    cost: Cost


def plan_distil(
    examples: Sequence[Example],
    policy: CausalPolicy,
    reference: CausalPolicy,
    sampler: Sampler,
    lesson: Lesson,
    *,
    num_draws: int,
    step: tuple[int, int],
    generator: torch.Generator,
    progress: Progress = silent,
) -> Apart:
    """Draw a small pool from teacher and reference and say how far they are apart; the policy stays as it is.

    Args:
        examples: prompts to learn on.
        policy: what is going to move; its update is timed.
        reference: what it starts as.
        sampler: must draw from a policy itself.
        lesson: teacher and divergence.
        num_draws: G, of teacher and reference each.
        step: prompts and completions a prompt of a step.
        generator: of draws and of bootstrap resamples.
        progress: told how far it is.
    """
    teacher = lesson.teacher
    draws, seconds = [], []
    for name, who in (("teacher", teacher), ("reference", reference)):
        progress(f"plan: draw from the {name}", 0, 1)
        clock = time.perf_counter()
        draws.append(sampler(who, examples, num_draws, generator=generator))
        seconds.append((time.perf_counter() - clock) / int(draws[-1].lengths.sum()))
        progress(f"plan: draw from the {name}", 1, 1)
    taught, first = draws
    tokens = []
    for side, f, of in ((taught, "forward_kl", "teacher"), (first, "reverse_kl", "reference")):
        what = f"plan: score the {of}'s draws"
        tokens += tokens_apart(side, [reference], teacher=teacher, f=f, progress=progress, what=what)
    sums = [side.sequence_sums(x) for side, x in zip(draws, tokens, strict=True)]
    log_w = LogRatio(teacher, reference).of_draws(first)
    k = pooled_pareto_k(log_w.reshape(1, -1))  # Z is 1: a prompt's weights need no mean of their few
    rates = [
        ratio_estimate(x, side.lengths, generator=generator) for side, x in zip(draws, sums, strict=True)
    ]
    return Apart(
        *(mean_estimate(x, generator=generator) for x in sums),
        *rates,
        places=list(_places(draws, tokens, generator)),
        prompts=[
            (example, a, b)
            for example, a, b in zip(examples, *(x.mean(1).tolist() for x in sums), strict=True)
        ],
        pareto_k=k,
        tail_holds=k < pareto_threshold(log_w.numel()),
        cost=_cost(taught, policy, teacher, lesson, step, seconds, progress),
    )


def _places(draws: Sequence[Draws], tokens: Sequence[Tensor], generator: torch.Generator) -> Iterator[Place]:
    """The first token, the three after it, and so on in doubling runs."""
    longest = max(int(side.lengths.max()) for side in draws)
    first, last = 1, 1
    while first <= longest:
        yield Place(
            first,
            min(last, longest),
            *(_between(side, x, first, last, generator) for side, x in zip(draws, tokens, strict=True)),
        )
        first, last = last + 1, max(4, 2 * last)


def _between(
    draws: Draws, tokens: Tensor, first: int, last: int, generator: torch.Generator
) -> Estimate | None:
    """Mean of the tokens at these places, or None where no completion reaches them."""
    lengths = draws.lengths.flatten()
    place = torch.arange(len(tokens)) - (lengths.cumsum(0) - lengths)[draws.row] + 1
    here = ((place >= first) & (place <= last)).to(tokens.dtype)
    if not here.any():
        return None
    return ratio_estimate(draws.sequence_sums(tokens * here), draws.sequence_sums(here), generator=generator)


def _cost(
    taught: Draws,
    policy: CausalPolicy,
    teacher: CausalPolicy,
    lesson: Lesson,
    step: tuple[int, int],
    seconds: Sequence[float],
    progress: Progress,
) -> Cost:
    """An update on a part of the pool is timed, and its gradient thrown away."""
    progress("plan: time an update", 0, 1)
    piece = select(taught, range(min(step[0], taught.num_prompts)))
    clock = time.perf_counter()
    learned(piece, policy, lesson, own=False)
    spent = (time.perf_counter() - clock) / int(piece.lengths.sum())
    for weight in policy.parameters():
        weight.grad = None
    progress("plan: time an update", 1, 1)
    tokens = taught.lengths.float().mean().item() * step[0] * step[1]
    mean = [
        sum(len(who.render(x)) for x in taught.examples) / taught.num_prompts for who in (teacher, policy)
    ]
    return Cost(
        (mean[0], mean[1] + policy.num_virtual),
        tokens,
        *(rate * tokens for rate in (*seconds, spent)),
        trained_numbers=sum(weight.numel() for weight in policy.parameters()),
    )


@dataclass(frozen=True)
class Advice:
    """What to choose, and why, a sentence each."""

    divergence: str
    teacher_draws: float
    words: Sequence[str]


def advice(found: Apart, *, holds: bool | None) -> Advice:
    """Which divergence and whose draws, in plain words.

    Args:
        found: what was measured.
        holds: True where the family is known to hold the teacher, None where that cannot be told.
    """
    forward, reverse = found.forward_a_token, found.reverse_a_token
    words = [
        f"KL(target||reference) is {found.forward} nats a completion, {forward} a token: what the target says and the reference "
        "seldom does. Forward KL makes it small; it covers all that the target says.",
        f"KL(reference||target) is {found.reverse} nats a completion, {reverse} a token: what the reference says and the target "
        "would not. Reverse KL makes it small; it seeks what the target likes best, and may leave the rest.",
        _larger(found),
    ]
    words += [_where(found)] if len(found.places) > 1 else []
    words += [
        "The family holds the target: all divergences have the same minimum, and forward KL on the target's draws gets there with the "
        "least noise."
        if holds
        else f"Whether {found.cost.trained_numbers:,} trained numbers can hold the target cannot be told before training. If `closed` "
        "stops early on forward KL and single completions matter more than their variety, take reverse_kl with teacher_draws 0 and "
        "sequence_gradient.",
        f"Methods that weigh the reference's draws would need about {draws_needed(found.forward.value)} of them a prompt"
        + (
            "."
            if found.tail_holds
            else f", and the tail of their weights was too heavy to tell (Pareto k {found.pareto_k:.2f})."
        ),
    ]
    if max(forward.value, reverse.value) > FAR:
        words.append(
            f"More than {FAR:g} nats a token apart: single tokens would fill the gradient of a KL. Choose the bounded skew_kl(0.1) on draws "
            "of both (a rule of thumb)."
        )
        return Advice("skew_kl(0.1)", 0.5, words)
    if reverse_is_larger(found):
        words.append("Choose forward_kl on draws of both (teacher_draws 0.5).")
        return Advice("forward_kl", 0.5, words)
    words.append(
        "Choose forward_kl on the target's draws; they do not grow old, so num_iterations may be 2 or more."
    )
    return Advice("forward_kl", 1.0, words)


def reverse_is_larger(found: Apart) -> bool:
    """Whether KL(ref||p) is above KL(p||ref) beyond both intervals."""
    return found.reverse.low > found.forward.high


def _larger(found: Apart) -> str:
    if found.forward.low > found.reverse.high:
        return "The first is larger: the reference leaves out more of the target than it adds; learn from the target's draws."
    if reverse_is_larger(found):
        return (
            "The second is larger: the reference adds more than it leaves out, and the target's draws do not show what it adds; the policy's "
            "own do."
        )
    return "Neither is larger beyond doubt."


def _where(found: Apart) -> str:
    """Which places and which prompts the KL is at."""
    known = [place for place in found.places if place.forward is not None]
    most = max(known, key=lambda place: place.forward.value if place.forward else 0.0)
    span = f"token {most.first}" if most.first == most.last else f"tokens {most.first} to {most.last}"
    ordered = sorted((forward for _, forward, _ in found.prompts), reverse=True)
    top = ordered[: max(1, len(ordered) // 4)]
    total = sum(ordered)
    share = f"; a quarter of the prompts has {sum(top) / total:.0%} of it" if total > 0 else ""
    return f"Of KL(target||reference) most a token is at {span} ({most.forward} nats){share}."
