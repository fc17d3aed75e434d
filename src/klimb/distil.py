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

from klimb.batch import next_prompts
from klimb.data import Draws, Example, Sampler, chunks, select
from klimb.models.policy import CausalPolicy
from klimb.numbers.estimate import Estimate, mean_estimate
from klimb.objectives.token_divergence import token_divergence
from klimb.plan import Progress, prompts_at_once, silent
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
        num_iterations: updates with each batch of completions; the teacher's stay as good as new.
        max_grad_norm: the gradient is scaled down to at most this norm.
    """

    teacher: CausalPolicy
    divergence: str = "forward_kl"
    teacher_draws: float = 1.0
    top_k: int | None = None
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
    forward_kl on the teacher's draws that is KL(p||pi), value and gradient unbiased; see `klimb.objectives.token_divergence` for
    the others.

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
    Zhong, "Learning by distilling context", 2022.
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
                _updated(draws, policy, lesson, optimizer, state.step + 1)
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
    draws: Draws, policy: CausalPolicy, lesson: Lesson, optimizer: torch.optim.Optimizer, step: int
) -> tuple[Tensor, float]:
    """One update: the divergence of each completion before it, [P, G], and the norm of the gradient."""
    optimizer.zero_grad()
    pieces = chunks(draws, policy.chunk_tokens)
    values = torch.cat([_learned(piece, policy, lesson, draws.num_prompts) for piece in pieces])
    norm = torch.nn.utils.clip_grad_norm_(list(policy.parameters()), lesson.max_grad_norm)
    if not torch.isfinite(norm):
        raise ValueError(
            f"step {step}: the gradient is not finite; the weights were left as they were before it. Lower the learning rate"
        )
    optimizer.step()
    return values, norm.item()


def _learned(draws: Draws, policy: CausalPolicy, lesson: Lesson, num_prompts: int) -> Tensor:
    """[P, G] the divergence of each completion; its share of the gradient is added to the parameters'."""
    with torch.no_grad():
        taught = lesson.teacher.hidden(draws)
    hidden = policy.hidden(draws)
    # the laws of few prefixes at a time: their gradient is gathered at the states, and goes through the model once
    states = hidden.detach().requires_grad_()
    scale = 1 / (num_prompts * draws.num_draws)
    values = []
    law, other = policy.head, lesson.teacher.head
    for here, there in zip(states.split(ROWS), taught.split(ROWS), strict=True):
        value = token_divergence(
            law.logits(here).log_softmax(1),
            other.logits(there).log_softmax(1),
            f=lesson.divergence,
            top_k=lesson.top_k,
        )
        (scale * value.sum()).backward()
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
    apart = partial(_apart, teacher=teacher, progress=progress)
    forward, before = apart(
        draws["teacher"], [policy, reference], f="forward_kl", what="score the teacher's draws"
    )
    (back,) = apart(draws["policy"], [policy], f="reverse_kl", what="score the policy's draws")
    (back_before,) = apart(
        draws["reference"], [reference], f="reverse_kl", what="score the reference's draws"
    )
    return Distance(
        *(mean_estimate(x, generator=generator) for x in (forward, before)),
        _share(forward, before, generator),
        *(mean_estimate(x, generator=generator) for x in (back, back_before)),
        tokens=draws["teacher"].lengths.float().mean().item(),
        teacher_draws=draws["teacher"],
        policy_draws=draws["policy"],
        reference_draws=draws["reference"],
    )


def _share(left: Tensor, start: Tensor, generator: torch.Generator) -> Estimate:
    """1 - mean left / mean start, prompts resampled together."""
    pairs = torch.stack([left.mean(1), start.mean(1)], 1).double()

    def closed(x: Tensor) -> Tensor:
        return 1 - x[..., 0].mean(-1) / x[..., 1].mean(-1)

    index = torch.randint(len(pairs), (1000, len(pairs)), generator=generator)
    low, high = closed(pairs[index]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    few = () if len(pairs) >= 8 else ("too few prompts for an interval of prompts",)
    return Estimate(closed(pairs).item(), low.item(), high.item(), left.numel(), few)


@torch.no_grad()
def _apart(
    draws: Draws,
    policies: Sequence[CausalPolicy],
    *,
    teacher: CausalPolicy,
    f: str,
    progress: Progress,
    what: str,
) -> list[Tensor]:
    """[P, G] for each policy: the divergence of the next token from the teacher's, summed over each completion."""
    found: list[list[Tensor]] = [[] for _ in policies]
    at_once = prompts_at_once(draws.num_draws)
    for start in range(0, draws.num_prompts, at_once):
        stop = min(start + at_once, draws.num_prompts)
        piece = select(draws, range(start, stop))
        taught = teacher.hidden(piece)
        for policy, sums in zip(policies, found, strict=True):
            values = [
                token_divergence(
                    policy.head.logits(h).log_softmax(1), teacher.head.logits(t).log_softmax(1), f=f
                )
                for h, t in zip(policy.hidden(piece).split(ROWS), taught.split(ROWS), strict=True)
            ]
            sums.append(piece.sequence_sums(torch.cat(values).cpu()))
        progress(what, stop, draws.num_prompts)
    return [torch.cat(sums) for sums in found]
