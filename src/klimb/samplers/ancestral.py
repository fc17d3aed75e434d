"""Draw token by token from the policy, and say what it drew with which probability.

P prompts, G draws a prompt, V vocabulary. The prompt is read once and its memory shared by its G completions; rows
that have ended leave the batch, a few at a time. A token is chosen by one uniform number a row: first the block of the vocabulary in
which the cumulated probability passes it, then the token in that block, both cumulated in float64 (a block's own sum is of
the logits' dtype). The uniforms are
drawn beforehand for all rows and positions, so a draw does not depend on its company.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from klimb.data import Draws, Example
from klimb.models import cpu_kernels
from klimb.models.decoding import started
from klimb.models.policy import CausalPolicy

BLOCK = 256


@torch.no_grad()
def ancestral(
    policy: CausalPolicy,
    examples: Sequence[Example],
    num_draws: int,
    *,
    generator: torch.Generator,
    max_completion_length: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_rows: int = 192,
    own: Sequence[int] | None = None,
) -> Draws:
    """`num_draws` completions of each example, each drawn by itself from the policy.

    A completion ends with one of the policy's end tokens or is cut after `max_completion_length` tokens; both have
    their probability, so the law sums to one. Temperature and top-p change the law of the draw, never the policy:
    `log_q` is the law that was really drawn from (after both), and `full_support` is False with top-p below one.

    Args:
        policy: whom to draw from.
        examples: P prompts.
        num_draws: G.
        generator: the only source of randomness.
        max_completion_length: tokens.
        temperature: divides the logits.
        top_p: keep the smallest set of tokens with at least this probability.
        batch_rows: how many completions are drawn side by side.
        own: numbers of the examples to be drawn of, in order; left out, all. Each gets the completions that it gets beside the
            others, and the generator moves on as if all were drawn.

    Returns:
        Draws with log_q [P, G], nats.

    Raises:
        ValueError: a prompt that leaves no room for the completion in the model's context; a temperature or top_p
            that names no law; no draws asked for; a policy that gives NaN.
    """
    if not (temperature > 0 and 0 < top_p <= 1 and num_draws >= 1 and max_completion_length >= 1):
        raise ValueError(
            f"ancestral: got temperature {temperature}, top_p {top_p}, num_draws {num_draws}, max_completion_length "
            f"{max_completion_length}; expected temperature > 0, 0 < top_p <= 1, and at least one draw and one token"
        )
    prompts = [policy.render(example) for example in examples]
    for example, prompt in zip(examples, prompts, strict=True):
        if len(prompt) + max_completion_length > policy.context_length:
            raise ValueError(
                f"the prompt {str(example.prompt)[:60]!r}... has {len(prompt)} tokens; with max_completion_length "
                f"{max_completion_length} that is more than the model's context of {policy.context_length}; shorten one"
            )
    uniforms = torch.rand(
        len(examples) * num_draws, max_completion_length, generator=generator, dtype=torch.float64
    )
    if own is not None:
        uniforms = uniforms.reshape(len(examples), num_draws, max_completion_length)[list(own)].flatten(0, 1)
        examples, prompts = [examples[i] for i in own], [prompts[i] for i in own]
    # prompts of like length side by side, so that little is padded
    order = sorted(range(len(examples)), key=lambda p: len(prompts[p]))
    at_once = max(1, batch_rows // num_draws)
    completions: list[list[Tensor]] = [[] for _ in examples]
    token_log_q: list[list[Tensor]] = [[] for _ in examples]
    log_q = torch.zeros(len(examples), num_draws, dtype=torch.float64)
    for start in range(0, len(order), at_once):
        group = order[start : start + at_once]
        rows = torch.cat([uniforms[p * num_draws : (p + 1) * num_draws] for p in group]).to(policy.device)
        tokens, lengths, log_prob, per_token = _decode(
            policy, [examples[p] for p in group], num_draws, rows, temperature=temperature, top_p=top_p
        )
        for i, p in enumerate(group):
            here = slice(i * num_draws, (i + 1) * num_draws)
            completions[p] = [
                t[:n].clone() for t, n in zip(tokens[here], lengths[here].tolist(), strict=True)
            ]
            token_log_q[p] = [
                t[:n].clone() for t, n in zip(per_token[here], lengths[here].tolist(), strict=True)
            ]
            log_q[p] = log_prob[here]
    if bool(log_q.isnan().any()):
        raise ValueError(
            "ancestral: the policy gives NaN as the probability of a token; its weights or activations are not finite. "
            "Try dtype float32, or go back to an earlier checkpoint"
        )
    finished = torch.tensor(
        [[int(ids[-1]) in policy.end for ids in group] for group in completions], dtype=torch.bool
    )
    return Draws(
        examples=list(examples),
        completions=completions,
        finished=finished.reshape(len(examples), num_draws),
        texts=[[policy.decode(ids) for ids in group] for group in completions],
        log_q=log_q.float(),
        full_support=top_p >= 1.0,
        own_law=temperature == 1.0 and top_p >= 1.0,
        token_log_q=token_log_q,
    )


def _decode(
    policy: CausalPolicy,
    examples: Sequence[Example],
    num_draws: int,
    uniforms: Tensor,
    *,
    temperature: float,
    top_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens [R, T], lengths [R], log-probabilities of sequences [R] and tokens [R, T] of R = P * G rows."""
    num_rows, longest = uniforms.shape
    tokens = torch.zeros(num_rows, longest, dtype=torch.int64, device=policy.device)
    lengths = torch.zeros(num_rows, dtype=torch.int64, device=policy.device)
    log_q = torch.zeros(num_rows, dtype=torch.float64, device=policy.device)
    per_token = torch.zeros(num_rows, longest, device=policy.device)
    end = torch.tensor(policy.end, device=policy.device)
    logits = policy.head.laid_out()
    with policy.activate(), started(policy, examples, num_draws, longest - 1) as (hidden, decoder):
        rows = torch.arange(num_rows, device=policy.device)
        running = torch.ones(num_rows, dtype=torch.bool, device=policy.device)
        for step in range(longest):
            chosen, log_prob = draw_tokens(
                logits(hidden), uniforms[rows, step], temperature=temperature, top_p=top_p
            )
            tokens[rows, step] = chosen
            per_token[rows, step] = log_prob.float()
            lengths[rows[running]] = step + 1
            log_q[rows[running]] += log_prob[running]
            running = running & ~torch.isin(chosen, end)
            if step + 1 == longest or not running.any():
                break
            if running.sum() <= (1 - decoder.dead) * len(rows):
                kept = running.nonzero()[:, 0]
                rows, chosen, running = rows[kept], chosen[kept], running[kept]
                decoder.keep(kept)
            hidden = decoder.next_hidden(chosen)
    return tokens.cpu(), lengths.cpu(), log_q.cpu(), per_token.cpu()


def draw_tokens(
    logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_p: float = 1.0
) -> tuple[Tensor, Tensor]:
    """One token a row by the inverse of the cumulated distribution, and its log-probability under that law.

    Args:
        logits: [R, V]; sums are in float32 or wider.
        uniform: [R] float64 in [0, 1).
        temperature: divides the logits.
        top_p: keep the smallest set of tokens with at least this probability.

    Returns:
        tokens [R], log-probabilities [R] in nats.

    Example:
        >>> draw_tokens(torch.log(torch.tensor([[0.2, 0.5, 0.3]])), torch.tensor([0.6], dtype=torch.float64))[0]
        tensor([1])
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if temperature != 1.0 or top_p < 1.0:
        logits = _altered(logits.to(wide), temperature, top_p)
    if cpu_kernels.usable(logits):
        return cpu_kernels.choose(logits, uniform)
    mass = logits.softmax(1, dtype=wide)
    rows, vocabulary = mass.shape
    padded = torch.nn.functional.pad(mass, (0, -vocabulary % BLOCK)) if vocabulary % BLOCK else mass
    blocks = padded.reshape(rows, -1, BLOCK)
    over_blocks = blocks.sum(2).double().cumsum(1)  # all in float64 would copy the whole of `blocks`
    goal = uniform * over_blocks[:, -1]
    block = _first_above(over_blocks, goal)
    reached = torch.where(block > 0, over_blocks.gather(1, (block - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    inside = blocks[torch.arange(rows), block].double().cumsum(1)
    token = block * BLOCK + _first_above(inside, goal - reached)
    # rounding may pass the last token that has any mass; step back to one that has
    massless = padded.gather(1, token[:, None])[:, 0] <= 0
    if massless.any():
        token[massless] = mass[massless].argmax(1)
    log_prob = mass.gather(1, token[:, None])[:, 0].double().log() - over_blocks[:, -1].log()
    return token, log_prob


def _altered(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    logits = logits / temperature
    if top_p == 1.0:
        return logits
    ordered, index = logits.sort(1, descending=True)
    mass = ordered.softmax(1)
    before = mass.cumsum(1) - mass
    return logits.scatter(1, index, ordered.masked_fill(before >= top_p, -torch.inf))


def _first_above(cumulated: Tensor, goal: Tensor) -> Tensor:
    index = torch.searchsorted(cumulated, goal[:, None].contiguous(), right=True)[:, 0]
    return index.clamp(max=cumulated.shape[1] - 1)
