"""Distil: move a policy towards another policy whose law of the next token is known, and measure how far it still is.

The other policy is the target itself: a larger model, or the same model under a context. Then Z = 1, and both KLs can be
read from draws of either side without weights. P prompts, G draws a prompt, V tokens; nats a completion unless said.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.profiler import record_function

from klimb.backward import sum_gradients
from klimb.batch import next_prompts
from klimb.data import Draws, Example, Sampler, chunks, select
from klimb.models.policy import CausalPolicy
from klimb.numbers.estimate import Estimate, mean_estimate, ratio_estimate
from klimb.objectives.token_divergence import token_divergence, what_follows
from klimb.pool import Progress, prompts_at_once, silent
from klimb.steps import Step, TrainState

ROWS = 256
"""prefixes whose laws over the vocabulary are held at a time"""


@dataclass(frozen=True)
class Lesson:
    """How a policy is taught.

    Attributes:
        teacher: whose law is the target.
        divergence: `klimb.objectives.token_divergence`.
        teacher_draws: the share of steps whose completions the teacher draws; the policy draws those of the others.
        top_k: of the teacher's tokens, or None for all.
        sequence_gradient: on the policy's own draws, also learn from what a token does to the prefixes after it.
        num_iterations: updates with each batch of completions; the teacher's stay as good as new.
        max_grad_norm: the gradient is scaled down to at most this norm.
    """

    teacher: CausalPolicy
    divergence: str = "forward_kl"
    teacher_draws: float = 1.0
    top_k: int | None = None
    sequence_gradient: bool = False
    num_iterations: int = 1
    max_grad_norm: float = 1.0


def distil(
    examples: Sequence[Example],
    policy: CausalPolicy,
    sampler: Sampler,
    lesson: Lesson,
    optimizer: torch.optim.Optimizer,
    *,
    max_steps: int,
    prompts_per_step: int,
    num_draws: int,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    state: TrainState | None = None,
    generator: torch.Generator,
) -> Iterator[Step]:
    """Take steps until `max_steps` of them are done.

    The objective is the mean over completions of the divergence summed over their prefixes, over the whole vocabulary. With
    forward_kl on the teacher's draws that is KL(p||pi), value and gradient unbiased; so is KL(pi||p) with reverse_kl on the
    policy's draws and `sequence_gradient`; see `klimb.objectives.token_divergence` for the others.

    Args:
        examples: the prompts to learn on.
        policy: the policy that moves.
        sampler: draws completions, of teacher or policy.
        lesson: how.
        optimizer: over `policy.parameters()`.
        max_steps: how many steps there are in all.
        prompts_per_step: P.
        num_draws: completions a prompt.
        scheduler: of the learning rate, stepped once a step.
        state: where to go on; by default at the start.
        generator: the only source of randomness.

    Yields:
        A Step after each of them; it has no fresh draws, since nothing rewards them.

    Raises:
        ValueError: the gradient is not finite.

    Source: Agarwal et al., "On-policy distillation of language models: learning from self-generated mistakes", 2024; Snell, Klein,
    Zhong, "Learning by distilling context", 2022; Gu et al., "MiniLLM: knowledge distillation of large language models", 2024.
    """
    state = state or TrainState()
    while state.step < max_steps:
        chosen, order = next_prompts(state.order, len(examples), prompts_per_step, generator=generator)
        batch = [examples[i] for i in chosen]
        taught = torch.rand((), generator=generator).item() < lesson.teacher_draws
        clock = time.perf_counter()
        with record_function("klimb:draw"):
            draws = sampler(lesson.teacher if taught else policy, batch, num_draws, generator=generator)
        drawn = time.perf_counter()
        rate = optimizer.param_groups[0]["lr"]
        with record_function("klimb:update"):
            seen = [
                _updated(draws, policy, lesson, optimizer, state.step + 1, own=not taught)
                for _ in range(lesson.num_iterations)
            ]
            values, norm = seen[0]  # of the policy as it drew
            if scheduler is not None:
                scheduler.step()
        tokens = int(draws.lengths.sum())
        state = TrainState(state.step + 1, order)
        yield Step(
            step=state.step,
            estimates={},
            numbers={
                "objective_value": values.mean().item(),
                "divergence_a_token": values.sum().item() / tokens,
                "taught": float(taught),
                "grad_norm": norm,
                "updates": len(seen),
                "learning_rate": rate,
                "completion_length": draws.lengths.float().mean().item(),
                "finished": draws.finished.float().mean().item(),
                "tokens": tokens,
            },
            seconds={"draw": drawn - clock, "update": time.perf_counter() - drawn},
            fresh=None,
            state=state,
        )


def _updated(
    draws: Draws,
    policy: CausalPolicy,
    lesson: Lesson,
    optimizer: torch.optim.Optimizer,
    step: int,
    *,
    own: bool,
) -> tuple[Tensor, float]:
    """One update: the divergence of each completion before it, [P, G], and the norm of the gradient."""
    optimizer.zero_grad()
    values = _shared(draws, policy, lesson, own=own)
    norm = torch.nn.utils.clip_grad_norm_(list(policy.parameters()), lesson.max_grad_norm)
    if not torch.isfinite(norm):
        raise ValueError(
            f"step {step}: the gradient is not finite; the weights were left as they were before it. Lower the learning rate"
        )
    optimizer.step()
    return values, norm.item()


def _shared(draws: Draws, policy: CausalPolicy, lesson: Lesson, *, own: bool) -> Tensor:
    """`learned`, of which each rank does its share."""
    ranks = policy.ranks
    if ranks.world == 1:
        return learned(draws, policy, lesson, own=own)
    share = ranks.share(draws.num_prompts)
    part = (len(share) / draws.num_prompts) if share else 0.0
    nothing = torch.zeros(0, draws.num_draws)
    found = ranks.gather(
        lambda: learned(select(draws, share), policy, lesson, own=own, scale=part) if share else nothing
    )
    sum_gradients(policy)
    return torch.cat(found)


def learned(draws: Draws, policy: CausalPolicy, lesson: Lesson, *, own: bool, scale: float = 1.0) -> Tensor:
    """[P, G] the divergence of each completion; the gradient of their mean is added to the parameters'.

    Args:
        draws: the completions.
        policy: the policy that moves.
        lesson: how.
        own: whether the policy drew them, as it is.
        scale: of the gradient.
    """
    scale /= draws.lengths.numel()
    follows = own and lesson.sequence_gradient
    pieces = chunks(draws, policy.chunk_tokens)  # whole prompts
    return torch.cat([_learned(piece, policy, lesson, scale, follows) for piece in pieces])


def _learned(draws: Draws, policy: CausalPolicy, lesson: Lesson, scale: float, follows: bool) -> Tensor:
    with torch.no_grad():
        taught = lesson.teacher.hidden(draws)
    hidden = policy.hidden(draws)
    # the laws of few prefixes at a time: their gradient is gathered at the states, and goes through the model once
    states = hidden.detach().requires_grad_()
    at_once = list(zip(states.split(ROWS), taught.split(ROWS), strict=True))

    def compared(here: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        log_pi = policy.head.logits(here).log_softmax(1)
        log_p = lesson.teacher.head.logits(there).log_softmax(1)
        return log_pi, token_divergence(log_pi, log_p, f=lesson.divergence, top_k=lesson.top_k)

    after = None
    if follows:
        with torch.no_grad():
            first = torch.cat([compared(*pair)[1] for pair in at_once])
        tokens = torch.cat([ids for group in draws.completions for ids in group]).to(first.device)
        after = list(zip(what_follows(first, draws.lengths).split(ROWS), tokens.split(ROWS), strict=True))
    values = []
    for i, pair in enumerate(at_once):
        log_pi, value = compared(*pair)
        loss = value.sum()
        if after is not None:
            weight, token = after[i]
            loss = loss + (weight * log_pi.gather(1, token[:, None])[:, 0]).sum()
        (scale * loss).backward()
        values.append(value.detach())
    assert states.grad is not None
    hidden.backward(states.grad)
    return draws.sequence_sums(torch.cat(values).cpu())


@dataclass(frozen=True)
class Distance:
    """How far a policy is from its teacher, and how far the reference was.

    Attributes:
        forward: KL(p||pi) on the teacher's draws, nats a completion.
        forward_reference: KL(p||ref) on the same draws.
        closed: 1 - forward / forward_reference.
        reverse: KL(pi||p) on the policy's draws.
        reverse_reference: KL(ref||p) on the reference's draws.
        tokens: mean length of the teacher's completions, to read nats a token.
        teacher_draws, policy_draws, reference_draws: the completions, for side by side.
    """

    forward: Estimate
    forward_reference: Estimate
    closed: Estimate
    reverse: Estimate
    reverse_reference: Estimate
    tokens: float
    teacher_draws: Draws
    policy_draws: Draws
    reference_draws: Draws


def distance(
    examples: Sequence[Example],
    policy: CausalPolicy,
    reference: CausalPolicy,
    teacher: CausalPolicy,
    sampler: Sampler,
    *,
    num_draws: int,
    generator: torch.Generator,
    progress: Progress = silent,
) -> Distance:
    """Both KLs between policy and teacher, and between reference and teacher, on held-out prompts.

    Each is a mean over draws of one side of the sum over prefixes of the KL of the next token over the whole vocabulary:
    unbiased, never negative, and with less noise than log ratios of the tokens drawn. No weights, no log Z.

    Args:
        examples: held-out prompts.
        policy: what was taught.
        reference: what it was before.
        teacher: the target.
        sampler: must draw from a policy itself.
        num_draws: of each of the three, a prompt.
        generator: of draws and of bootstrap resamples.
        progress: told how far it is.
    """
    names = {"teacher": teacher, "policy": policy, "reference": reference}
    draws = {}
    for name, who in names.items():
        progress(f"draw from the {name}", 0, 1)
        draws[name] = sampler(who, examples, num_draws, generator=generator)
        progress(f"draw from the {name}", 1, 1)
    apart = partial(tokens_apart, teacher=teacher, progress=progress)
    taught, own, first = (draws[name] for name in names)
    forward, before = map(
        taught.sequence_sums,
        apart(taught, [policy, reference], f="forward_kl", what="score the teacher's draws"),
    )
    (back,) = apart(own, [policy], f="reverse_kl", what="score the policy's draws")
    (back_before,) = apart(first, [reference], f="reverse_kl", what="score the reference's draws")
    left = ratio_estimate(forward, before, generator=generator)
    return Distance(
        *(mean_estimate(x, generator=generator) for x in (forward, before)),
        Estimate(1 - left.value, 1 - left.high, 1 - left.low, left.n),
        *(
            mean_estimate(who.sequence_sums(x), generator=generator)
            for who, x in ((own, back), (first, back_before))
        ),
        tokens=taught.lengths.float().mean().item(),
        teacher_draws=taught,
        policy_draws=own,
        reference_draws=first,
    )


@torch.no_grad()
def tokens_apart(
    draws: Draws,
    policies: Sequence[CausalPolicy],
    *,
    teacher: CausalPolicy,
    f: str,
    progress: Progress,
    what: str,
) -> list[Tensor]:
    """[N] for each policy: the divergence of its next token from the teacher's at each packed token of `draws`, nats."""
    found: list[list[Tensor]] = [[] for _ in policies]
    at_once = prompts_at_once(draws.num_draws)
    for start in range(0, draws.num_prompts, at_once):
        stop = min(start + at_once, draws.num_prompts)
        piece = select(draws, range(start, stop))
        taught = teacher.hidden(piece)
        for policy, values in zip(policies, found, strict=True):
            values += [
                token_divergence(
                    policy.head.logits(h).log_softmax(1), teacher.head.logits(t).log_softmax(1), f=f
                ).cpu()
                for h, t in zip(policy.hidden(piece).split(ROWS), taught.split(ROWS), strict=True)
            ]
        progress(what, stop, draws.num_prompts)
    return [torch.cat(values) for values in found]
