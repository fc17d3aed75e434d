"""The backward pass: signed maximum likelihood with the objective's tables of coefficients, chunk by chunk.

P prompts, G draws a prompt, N packed tokens:

    gradient = sum over the network's numbers of coefficient * grad number

where a number is the log-probability of a draw or of a token. An objective may tie a whole group together; the pass over
the network still goes in pieces of any size. What it saw of the draws on its way is handed back, so that nothing has to
be scored twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.data import Draws, Pool, Scored, Target, chunks, pick
from klimb.methods import working_with
from klimb.models.policy import CausalPolicy
from klimb.models.sharded import is_part
from klimb.objectives.bind import bind
from klimb.objectives.coefficients import coefficients
from klimb.ranks import Ranks
from klimb.target import own_reward

Objective = Callable[..., Tensor]

PACKED = frozenset({"returns", "old_values"})
"""names of packed numbers [N] besides those that begin with token_"""


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
    policy: CausalPolicy,
    draws: Draws,
    known: Mapping[str, Tensor],
    objective: Objective,
    *,
    scale: float,
    num_fresh: int = 0,
    later: list[tuple[Draws, dict[str, Tensor]]] | None = None,
    importance_cap: float | None = None,
) -> Passed:
    """Add scale * the objective's gradient to the parameters' gradients, chunk by chunk.

    The first `num_fresh` draws of each prompt are the policy's own, as it is now: the law they were drawn from is the
    policy, so their importance weight is exactly 1, whatever a sampler in low precision said of them.

    Groups that fit (`CausalPolicy.group_tokens`) are passed once: the objective reads the same log-probabilities that
    the backward pass goes through. A group too large for that is first looked at without gradients, for its
    coefficients, and then passed again in pieces.

    Args:
        policy: whose parameters gain gradients.
        draws: P x G completions.
        known: all numbers that the objective may ask for besides the network's, by name: [P, ...], [N] or scalars.
            Where nothing is known of an older policy (log_old, token_log_old), it is the policy as it is now.
        objective: numbers -> [P].
        scale: what the objective is multiplied by.
        num_fresh: how many draws of each prompt are the policy's own.
        later: where given, nothing is passed back: what would be, pieces and their coefficients, is put here (`in_step`).
        importance_cap: the weight pi / q of a draw counts as this where it is more; it biases there. None for never.

    Raises:
        ValueError: the draws are of a law that cannot draw everything, or the objective asks for what is unknown.
    """
    if draws.full_support is False:
        raise ValueError(
            "these draws come from a law that cannot draw every completion (top-p, filtered, best of n), so what it "
            "leaves out would go unlearned; draw at temperature 1 without top-p"
        )
    values, residuals, sums, per_token, start, offset = [], [], [], [], 0, 0
    asked: frozenset[str] = frozenset()
    for group in chunks(draws, policy.chunk_tokens):
        num_tokens = int(group.lengths.sum())
        here, there = slice(start, start + group.num_prompts), slice(offset, offset + num_tokens)
        start, offset = here.stop, there.stop
        part = {n: x if x.ndim == 0 else x[there if is_packed(n) else here] for n, x in known.items()}
        fits = num_tokens <= policy.group_tokens and later is None
        with torch.set_grad_enabled(fits):
            tokens = policy.log_prob(group)
            log_pi = group.sequence_sums(tokens)
        seen = {"log_pi": log_pi.detach(), "token_log_pi": tokens.detach()}
        if "log_q" in part:
            part["log_q"] = torch.cat([seen["log_pi"][:, :num_fresh], part["log_q"][:, num_fresh:]], 1)
            part["log_w"] = part["log_target"] - part["log_q"]
            if importance_cap is not None:
                part["log_q"] = torch.maximum(part["log_q"], seen["log_pi"] - math.log(importance_cap))
        now = {"log_old": seen["log_pi"], "token_log_old": seen["token_log_pi"], "row": group.row}
        arguments = bind(objective, {**now, **part, **seen}, instead=working_with)
        asked = frozenset(arguments)
        network = [name for name in seen if name in arguments]
        value, tables = coefficients(objective, network=network, **arguments)
        tables = {name: scale * table for name, table in tables.items()}
        if fits:
            _likelihood(tables, log_pi, tokens).backward()
        else:
            for columns in column_pieces(group, policy.chunk_tokens):
                piece = pick(group, columns[None].expand(group.num_prompts, -1))
                inside = torch.isin(group.row % group.num_draws, columns)
                cut = {n: t[inside] if is_packed(n) else t[:, columns] for n, t in tables.items()}
                if later is None:
                    _pass_back(policy, piece, cut)
                else:
                    later.append((piece, cut))
        values.append(value)
        residuals.append(part["log_target"] - seen["log_pi"])
        sums.append(seen["log_pi"])
        per_token.append(seen["token_log_pi"])
    return Passed(*(torch.cat(x) for x in (values, residuals, sums, per_token)), asked)


def _pass_back(policy: CausalPolicy, piece: Draws, tables: Mapping[str, Tensor]) -> None:
    tokens = policy.log_prob(piece)
    _likelihood(tables, piece.sequence_sums(tokens), tokens).backward()


def in_step(policy: CausalPolicy, pieces: Sequence[tuple[Draws, dict[str, Tensor]]], ranks: Ranks) -> None:
    """Pass pieces back, as often on every rank: who has fewer repeats one with coefficients of zero, so that layers are gathered together."""
    for i in range(max(ranks.gather(lambda: len(pieces)))):
        piece, tables = pieces[min(i, len(pieces) - 1)]
        done = i >= len(pieces)
        _pass_back(policy, piece, {n: torch.zeros_like(t) if done else t for n, t in tables.items()})


def sum_gradients(policy: CausalPolicy) -> None:
    """Make the gradients of each rank's share of a batch those of the whole batch."""
    gradients = []
    for parameter in policy.parameters():
        if parameter.grad is None:  # of a rank without prompts
            parameter.grad = torch.zeros_like(parameter)
        if not is_part(parameter.grad):  # of layers that are split they come summed
            gradients.append(parameter.grad)
    policy.ranks.add(gradients)


def _likelihood(tables: Mapping[str, Tensor], log_pi: Tensor, token_log_pi: Tensor) -> Tensor:
    numbers = {"log_pi": log_pi, "token_log_pi": token_log_pi}
    parts = [(table * numbers[name]).sum() for name, table in tables.items()]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum()


def is_packed(name: str) -> bool:
    """True for numbers that come one a token [N].

    Example:
        >>> is_packed("token_log_ref"), is_packed("reward")
        (True, False)
    """
    return name.startswith("token_") or name in PACKED


def known_numbers(pool: Pool, target: Target) -> dict[str, Tensor]:
    """What an objective may see of a pool besides the network's numbers, by name; what is unknown is not there.

    The reward is the one whose plain tilt the target is, so that objectives of reward and beta climb to it too.
    """
    bare = Scored(
        log_ref=pool.log_ref, reward=pool.reward, log_q=pool.draws.log_q, lengths=pool.draws.lengths
    )
    log_target = target.log_target(bare)
    numbers = {
        "log_ref": pool.log_ref,
        "reward": own_reward(target, pool),
        "lengths": pool.draws.lengths,
        "log_target": log_target,
        "beta": torch.tensor(target.beta, dtype=pool.reward.dtype),
    }
    if pool.draws.log_q is not None:
        numbers |= {"log_q": pool.draws.log_q, "log_w": log_target - pool.draws.log_q}
    packed = pool.draws.packed_log_q
    if packed is not None:
        numbers["token_log_q"] = packed
    if pool.token_log_ref is not None:
        numbers["token_log_ref"] = pool.token_log_ref
    return numbers


def of_prompts(known: Mapping[str, Tensor], lengths: Tensor, index: Sequence[int]) -> dict[str, Tensor]:
    """The same numbers for some of the prompts.

    Args:
        known: [P, ...], [N] or scalars, by name.
        lengths: [P, G] tokens.
        index: which prompts.
    """
    tokens = lengths.sum(1).tolist()

    def chosen(name: str, x: Tensor) -> Tensor:
        if x.ndim == 0:
            return x
        if not is_packed(name):
            return x[list(index)]
        rows = x.split(tokens)
        return torch.cat([rows[i] for i in index])

    return {name: chosen(name, x) for name, x in known.items()}


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
