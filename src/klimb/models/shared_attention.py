"""Attention of completions over the prompt they share and over themselves, forward and backward, nothing copied G times.

N packed tokens: those of P prompts first, then those of their P x G completions, without padding. H query heads, K heads of keys
and values (H / K queries share one), w wide. A prompt's keys are read where they lie by all of its completions; a completion's
softmax runs over both, prompt and own tokens, as one:

    out_t = sum_s exp(q_t . k_s * scale - log_sum_t) v_s,    s over the prompt's tokens, then over the completion's up to t

The backward pass forms the weights once more from `log_sum`, so that nothing of the size of the weights is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Queries on a grid of P prompts x G rows x T tokens, and what they may see besides their own row's past.

    Attributes:
        index: [P, G, T] where each place's token lies among the packed ones; any at all where there is none.
        here: [P, G, T] whether there is a token, or None if there is one everywhere.
        places: [n] the places of the grid that hold a token, in the order in which they are packed; None if all do.
        causal: [T, T] 0 where a token (row) sees another (column) of its own row, else -inf.
        unseen: [P, 1, 1, 1, L] 0 for the prompt's tokens, -inf for its padding; None if there is none.
    """

    index: Tensor
    here: Tensor | None
    places: Tensor | None
    causal: Tensor
    unseen: Tensor | None


@dataclass(frozen=True)
class Layout:
    """Where the packed tokens lie.

    Attributes:
        prompt: the prompts' own tokens: one row a prompt.
        own: the completions' tokens, or None where no completion has one that predicts.
    """

    prompt: Block
    own: Block | None

    @property
    def blocks(self) -> list[Block]:
        """In the order in which their tokens are packed."""
        return [self.prompt] if self.own is None else [self.prompt, self.own]


def laid_out(
    prompts: Sequence[int], rows: Sequence[Sequence[int]], *, device: torch.device | str = "cpu"
) -> Layout:
    """The layout of prompts and completions of so many tokens.

    Args:
        prompts: [P] tokens of each prompt.
        rows: [P][G] tokens of each completion that are read (all but its last).
        device: where attention is computed.
    """
    prompt = _block([[n] for n in prompts], 0, device)
    if max((n for row in rows for n in row), default=0) == 0:
        return Layout(prompt, None)
    own = _block(rows, sum(prompts), device)
    longest = max(prompts)
    unseen = None
    if min(prompts) < longest:
        beyond = torch.arange(longest) >= torch.tensor(prompts)[:, None]
        unseen = torch.zeros(beyond.shape).masked_fill(beyond, -torch.inf)[:, None, None, None].to(device)
    return Layout(prompt, Block(own.index, own.here, own.places, own.causal, unseen))


def _block(rows: Sequence[Sequence[int]], start: int, device: torch.device | str) -> Block:
    lengths = torch.tensor(rows)
    width = int(lengths.max())
    step = torch.arange(width)
    here = step < lengths[..., None]
    first = start + (lengths.flatten().cumsum(0) - lengths.flatten()).reshape(lengths.shape)
    index = torch.where(here, first[..., None] + step, start)
    whole = bool(here.all())
    causal = torch.zeros(width, width).masked_fill(step[:, None] < step, -torch.inf)
    places = None if whole else here.flatten().nonzero()[:, 0].to(device)
    return Block(index.to(device), None if whole else here.to(device), places, causal.to(device), None)


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, list[Tensor]]:
    """Attention of every packed token.

    Args:
        query: [N, H, w].
        key: [N, K, w].
        value: [N, K, w].
        layout: where the tokens lie.
        scale: what products of query and key are multiplied by.

    Returns:
        [N, H, w] in the dtype of `query`, and of each block the log of the sum of weights, for `attend_backward`.
        Sums are in float32 or wider.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    heads = key.shape[1]
    shared_key, shared_value = (_seen(x, layout.prompt, wide)[:, :, 0] for x in (key, value))
    outs, log_sums = [], []
    for block in layout.blocks:
        q = _asked(query, block, heads, wide)
        if block is layout.prompt:
            own_key, own_value, shared = shared_key[:, :, None], shared_value[:, :, None], False
        else:
            own_key, own_value, shared = *(_seen(x, block, wide) for x in (key, value)), True
        weights = _scores(q, own_key, block, scale)
        largest = weights.amax(-1, keepdim=True)
        if shared:
            before = _scores_of_prompt(q, shared_key, block, scale)
            largest = torch.maximum(largest, before.amax(-1, keepdim=True))
            before = before.sub_(largest).exp_()
        weights = weights.sub_(largest).exp_()
        total, out = weights.sum(-1, keepdim=True), weights @ own_value
        if shared:
            total += before.sum(-1, keepdim=True)
            out = out.add_((before.flatten(2, 3) @ shared_value).view_as(out))
        outs.append(_packed(out.div_(total).to(query.dtype), block, query.shape[1]))
        log_sums.append(largest + total.log_())
    return torch.cat(outs), log_sums


def attend_backward(
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sums: Sequence[Tensor],
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients [N, H, w], [N, K, w], [N, K, w] of query, key and value, in their dtype.

    Args:
        upstream: [N, H, w] the gradient of what `attend` gave.
        query: as it went in.
        key: likewise.
        value: likewise.
        out: what came out.
        log_sums: likewise.
        layout: where the tokens lie.
        scale: as before.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    heads = key.shape[1]
    shared_key, shared_value = (_seen(x, layout.prompt, wide)[:, :, 0] for x in (key, value))
    common = (upstream.to(wide) * out).sum(-1, keepdim=True)
    of_query: list[Tensor] = []
    of_key: list[Tensor] = []
    of_value: list[Tensor] = []
    onto_prompt: list[tuple[Tensor, Tensor]] = []
    for block, log_sum in zip(layout.blocks, log_sums, strict=True):
        q, g, level = (_asked(x, block, heads, wide) for x in (query, upstream, common))
        if block.here is not None:  # what stands in a place without a token must not reach the keys
            there = block.here.repeat_interleave(query.shape[1] // heads, 2)[:, None, ..., None]
            g, level = g * there, level * there
        if block is layout.prompt:
            own_key, own_value, shared = shared_key[:, :, None], shared_value[:, :, None], False
        else:
            own_key, own_value, shared = *(_seen(x, block, wide) for x in (key, value)), True
        weights = _scores(q, own_key, block, scale).sub_(log_sum).exp_()
        to_value = weights.transpose(-2, -1) @ g
        inner = (g @ own_value.transpose(-2, -1)).sub_(level).mul_(weights).mul_(scale)
        to_query, to_key = inner @ own_key, inner.transpose(-2, -1) @ q
        if shared:
            weights = _scores_of_prompt(q, shared_key, block, scale).sub_(log_sum).exp_()
            flat_q, flat_g, weights = q.flatten(2, 3), g.flatten(2, 3), weights.flatten(2, 3)
            before = (
                (flat_g @ shared_value.transpose(-2, -1)).sub_(level.flatten(2, 3)).mul_(weights).mul_(scale)
            )
            to_query = to_query.add_((before @ shared_key).view_as(to_query))
            onto_prompt.append((before.transpose(-2, -1) @ flat_q, weights.transpose(-2, -1) @ flat_g))
        of_query.append(_packed(to_query.to(query.dtype), block, query.shape[1]))
        of_key.append(to_key)
        of_value.append(to_value)
    for to_key, to_value in onto_prompt:
        of_key[0] += to_key[:, :, None]
        of_value[0] += to_value[:, :, None]
    sides = [
        torch.cat(
            [_packed(x.to(key.dtype), block, heads) for x, block in zip(of, layout.blocks, strict=True)]
        )
        for of in (of_key, of_value)
    ]
    return torch.cat(of_query), sides[0], sides[1]


def _seen(x: Tensor, block: Block, wide: torch.dtype) -> Tensor:
    """[N, K, w] -> [P, K, G, T, w]."""
    return x[block.index].permute(0, 3, 1, 2, 4).to(wide, memory_format=torch.contiguous_format)


def _asked(x: Tensor, block: Block, heads: int, wide: torch.dtype) -> Tensor:
    """[N, H, w] -> [P, K, G, T * H/K, w]: the queries that share keys lie side by side."""
    grid = x[block.index].unflatten(3, (heads, -1))  # [P, G, T, K, H/K, w]
    return grid.permute(0, 3, 1, 2, 4, 5).to(wide, memory_format=torch.contiguous_format).flatten(3, 4)


def _packed(x: Tensor, block: Block, heads: int) -> Tensor:
    """[P, K, G, T * H/K, w] -> [n, H, w], only the places that hold a token."""
    prompts, groups, width, _ = *block.index.shape, None
    grid = x.unflatten(3, (width, -1)).permute(0, 2, 3, 1, 4, 5).reshape(prompts * groups * width, heads, -1)
    return grid if block.places is None else grid[block.places]


def _scores(query: Tensor, key: Tensor, block: Block, scale: float) -> Tensor:
    """[P, K, G, T * H/K, T] over the row's own tokens."""
    score = torch.matmul(query, key.transpose(-2, -1)).mul_(scale)
    shape = score.shape
    width = key.shape[-2]
    score.unflatten(3, (width, -1)).add_(block.causal[:, None])
    return score.view(shape)


def _scores_of_prompt(query: Tensor, key: Tensor, block: Block, scale: float) -> Tensor:
    """[P, K, G, T * H/K, L] over the prompt's tokens."""
    score = torch.matmul(query.flatten(2, 3), key.transpose(-2, -1)).mul_(scale)
    score = score.view(*query.shape[:-1], key.shape[-2])
    return score if block.unseen is None else score.add_(block.unseen)
