"""The backward pass: signed maximum likelihood with the objective's table of coefficients, chunk by chunk.

P prompts, G draws a prompt, N packed tokens:

    gradient = sum over draws of coefficient * grad log pi(draw)

An objective may tie a whole group together; the pass over the network still goes in pieces of any size. What it saw of
the draws on its way is handed back, so that nothing has to be scored twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klimb.data import Draws, Pool, Scored, chunks, pick
from klimb.models.policy import CausalPolicy
from klimb.objectives.bind import bind
from klimb.objectives.coefficients import coefficients
from klimb.target import Tilt

Objective = Callable[..., Tensor]


@dataclass(frozen=True)
class Passed:
    """What a backward pass saw of its P x G draws, under the policy before the update; nothing is differentiable.

    Attributes:
        value: [P] the objective.
        residual: [P, G] log_target - log_pi, nats.
        log_pi: [P, G] nats.
        token_log_pi: [N] the same per packed token.
        asked: the names of the numbers that the objective took.
    """

    value: Tensor
    residual: Tensor
    log_pi: Tensor
    token_log_pi: Tensor
    asked: frozenset[str]


def backward(
    policy: CausalPolicy, pool: Pool, target: Tilt, objective: Objective, *, scale: float, num_fresh: int = 0
) -> Passed:
    """Add scale * the objective's gradient to the parameters' gradients, chunk by chunk.

    The first `num_fresh` draws of each prompt are the policy's own, as it is now: the law they were drawn from is the
    policy, so their importance weight is exactly 1, whatever a sampler in low precision said of them.

    Groups that fit into a chunk are passed once: the objective reads the same log-probabilities that the backward
    pass goes through. A group too large for that is first looked at without gradients, for its coefficients, and
    then passed again in pieces.

    Raises:
        ValueError: the draws are of a law that cannot draw everything, or the objective asks for what is unknown.
    """
    if pool.draws.full_support is False:
        raise ValueError(
            "these draws come from a law that cannot draw every completion (top-p, filtered, best of n), so what it "
            "leaves out would go unlearned; draw at temperature 1 without top-p"
        )
    numbers = {name: x for name, x in vars(scored(pool, target)).items() if isinstance(x, Tensor)}
    values, residuals, sums, per_token, start = [], [], [], [], 0
    asked: frozenset[str] = frozenset()
    for group in chunks(pool.draws, policy.max_chunk_tokens):
        here = slice(start, start + group.num_prompts)
        start += group.num_prompts
        part = {name: x[here] for name, x in numbers.items()}
        fits = int(group.lengths.sum()) <= policy.max_chunk_tokens
        with torch.set_grad_enabled(fits):
            tokens = policy.log_prob(group)
            log_pi = group.sequence_sums(tokens)
        own = log_pi.detach()[:, :num_fresh]
        if "log_q" in part:
            part["log_q"] = torch.cat([own, part["log_q"][:, num_fresh:]], 1)
            part["log_w"] = part["log_target"] - part["log_q"]
        arguments = bind(objective, {**part, "log_pi": log_pi.detach()})
        asked = frozenset(arguments)
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
        sums.append(log_pi.detach())
        per_token.append(tokens.detach())
    return Passed(*(torch.cat(x) for x in (values, residuals, sums, per_token)), asked)


def scored(pool: Pool, target: Tilt) -> Scored:
    """What an objective may see of a pool besides the network's numbers."""
    bare = Scored(
        log_ref=pool.log_ref, reward=pool.reward, log_q=pool.draws.log_q, lengths=pool.draws.lengths
    )
    log_target = target.log_target(bare)
    log_w = None if bare.log_q is None else log_target - bare.log_q
    return replace(bare, log_target=log_target, log_w=log_w)


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
