"""Attention of completions over the prompt they share and over themselves, forward and backward, nothing copied G times.

N packed tokens: those of P prompts first, then those of their P x G completions, without padding. H query heads, K heads of keys
and values (H / K queries share one), w wide. A prompt's keys are read where they lie by all of its completions; a completion's
softmax runs over both, prompt and own tokens, as one:

    out_t = sum_s exp(q_t . k_s * scale - log_sum_t) v_s,    s over the prompt's tokens, then over the completion's up to t

A window of steps at a time, so that memory grows with the tokens and not with their pairs. The backward pass forms the weights once
more from `log_sum`, so that nothing of their size is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klimb.models import cpu_kernels
from klimb.models.cpu_kernels import Window

STEPS = 64
"""queries of a row that are looked at together: their weights stay in the processor's cache, and what comes after them all is left out"""


@dataclass(frozen=True)
class Block:
    """Queries on a grid of P prompts x G rows x T tokens, and what they may see besides their own row's past.

    Attributes:
        index: [P, G, T] where each place's token lies among the packed ones; any at all where there is none.
        here: [P, G, T] whether there is a token, or None if there is one everywhere.
        places: [n] the places of the grid that hold a token, in the order in which they are packed; None if all do.
        causal: [n, n] 0 where a step of a window (row) sees another (column) of its own row, else -inf.
        unseen: [P, 1, 1, 1, L] 0 for the prompt's tokens, -inf for its padding; None if there is none.
        prompts: [P] tokens of each prompt.
    """

    index: Tensor
    here: Tensor | None
    places: Tensor | None
    causal: Tensor
    unseen: Tensor | None
    prompts: Tensor


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
    lengths = torch.tensor(prompts, device=device)
    prompt = _block([[n] for n in prompts], 0, lengths)
    if max((n for row in rows for n in row), default=0) == 0:
        return Layout(prompt, None)
    own = _block(rows, sum(prompts), lengths)
    longest = max(prompts)
    unseen = None
    if min(prompts) < longest:
        beyond = torch.arange(longest, device=device) >= lengths[:, None]
        unseen = torch.zeros(beyond.shape, device=device).masked_fill(beyond, -torch.inf)[:, None, None, None]
    return Layout(prompt, replace(own, unseen=unseen))


def _block(rows: Sequence[Sequence[int]], start: int, prompts: Tensor) -> Block:
    lengths, device = torch.tensor(rows), prompts.device
    width = int(lengths.max())
    step = torch.arange(width)
    here = step < lengths[..., None]
    first = start + (lengths.flatten().cumsum(0) - lengths.flatten()).reshape(lengths.shape)
    index = torch.where(here, first[..., None] + step, start)
    whole = bool(here.all())
    near = step[:STEPS]
    causal = torch.zeros(len(near), len(near)).masked_fill(near[:, None] < near, -torch.inf)
    places = None if whole else here.flatten().nonzero()[:, 0].to(device)
    return Block(
        index.to(device), None if whole else here.to(device), places, causal.to(device), None, prompts
    )


@dataclass(frozen=True)
class Seen:
    """What the backward pass wants of a block's forward pass, on its grid, in the dtype of the sums.

    Attributes:
        query: [P, K, G, T * H/K, w].
        key: [P, K, G, T, w] of the row's own tokens.
        value: likewise.
        log_sum: [P, K, G, T * H/K, 1] log of the sum of the weights.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    log_sum: Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, list[Seen]]:
    """Attention of every packed token.

    Args:
        query: [N, H, w].
        key: [N, K, w].
        value: [N, K, w].
        layout: where the tokens lie.
        scale: what products of query and key are multiplied by.

    Returns:
        [N, H, w] in the dtype of `query`, and of each block what `attend_backward` wants. Sums are in float32 or wider.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    outs: list[Tensor] = []
    seen: list[Seen] = []
    for block in layout.blocks:
        q = _asked(query, block, key.shape[1], wide)
        k, v = (_said(x, block, wide) for x in (key, value))
        parts = [_attend(q, k, v, seen, block, window, scale) for window in _windows(block)]
        out, log_sum = (x[0] if len(x) == 1 else torch.cat(x, 3) for x in zip(*parts, strict=True))
        outs.append(_packed(out.to(query.dtype), block))
        seen.append(Seen(q, k, v, log_sum))
    return torch.cat(outs), seen


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt: Sequence[Seen],
    block: Block,
    steps: slice,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention [P, K, G, n * H/K, w] of a window of n steps, and the log of the sum of the weights."""
    q, value = query[..., _asked_at(steps, query, key), :], value[..., : steps.stop, :]
    if cpu_kernels.usable(q):
        weights = _products(q, key, steps)
        before = _products_with_prompt(q, prompt[0].key) if prompt else None
        log_sum = cpu_kernels.soften(weights, before, _window(query, key, block, steps), scale)
        out = weights @ value
        if before is not None:
            out += (before.flatten(2, 3) @ prompt[0].value[:, :, 0]).view_as(out)
        return out, log_sum
    weights = _scores(q, key, block, steps, scale)
    largest = weights.amax(-1, keepdim=True)
    before = _scores_of_prompt(q, prompt[0].key, block, scale) if prompt else None
    if before is not None:
        largest = torch.maximum(largest, before.amax(-1, keepdim=True))
    weights = weights.sub_(largest).exp_()
    total, out = weights.sum(-1, keepdim=True), weights @ value
    if before is not None:
        before = before.sub_(largest).exp_()
        total += before.sum(-1, keepdim=True)
        out += (before.flatten(2, 3) @ prompt[0].value[:, :, 0]).view_as(out)
    return out.div_(total), total.log_().add_(largest)


def attend_backward(
    upstream: Tensor, out: Tensor, seen: Sequence[Seen], layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients [N, H, w], [N, K, w], [N, K, w] of query, key and value.

    Args:
        upstream: [N, H, w] the gradient of what `attend` gave.
        out: [N, H, w] what it gave.
        seen: what it saw.
        layout: where the tokens lie.
        scale: as before.
    """
    prompt, dtype = seen[0], upstream.dtype
    wide, heads = prompt.key.dtype, prompt.key.shape[1]
    common = (upstream.to(wide) * out).sum(-1, keepdim=True)
    to_queries: list[Tensor] = []
    to_keys: list[Tensor] = []
    to_values: list[Tensor] = []
    for block, own in zip(layout.blocks, seen, strict=True):
        g, level = (_asked(x, block, heads, wide) for x in (upstream, common))
        if block.here is not None:  # what stands in a place without a token must not reach the keys
            there = block.here.repeat_interleave(out.shape[1] // heads, 2)[:, None, ..., None]
            g, level = g * there, level * there
        to_query, to_key, to_value = (torch.zeros_like(x) for x in (own.query, own.key, own.value))
        to_keys.append(to_key)
        to_values.append(to_value)
        for steps in _windows(block):
            here, said = _asked_at(steps, own.query, own.key), slice(steps.stop)
            asked, up = own.query[..., here, :], g[..., here, :]
            log_sum, at = (x[..., here, :].contiguous() for x in (own.log_sum, level))
            window = _window(own.query, own.key, block, steps)
            weights = _weights(asked, own.key, log_sum, block, window, scale)
            to_value[..., said, :] += weights.transpose(-2, -1) @ up
            inner = _inner(up @ own.value[..., said, :].transpose(-2, -1), weights, at, scale)
            part = inner @ own.key[..., said, :]
            to_key[..., said, :] += inner.transpose(-2, -1) @ asked
            if own is not prompt:
                key, value = prompt.key[:, :, 0], prompt.value[:, :, 0]
                weights = _weights_of_prompt(asked, prompt.key, log_sum, block, window, scale)
                up, weights, at, asked = (x.flatten(2, 3) for x in (up, weights, at, asked))
                inner = _inner(up @ value.transpose(-2, -1), weights, at, scale)
                part += (inner @ key).view_as(part)
                to_keys[0][:, :, 0] += inner.transpose(-2, -1) @ asked
                to_values[0][:, :, 0] += weights.transpose(-2, -1) @ up
            to_query[..., here, :] = part
        to_queries.append(to_query)
    query, key, value = (
        torch.cat([_packed(x.to(dtype), block) for x, block in zip(found, layout.blocks, strict=True)])
        for found in (to_queries, to_keys, to_values)
    )
    return query, key, value


def of_prompts(seen: Sequence[Seen], layout: Layout) -> tuple[Tensor, Tensor]:
    """Keys and values [P, K, L, w] of the prompts, which stand on the left."""
    return seen[0].key[:, :, 0], seen[0].value[:, :, 0]


def _said(x: Tensor, block: Block, wide: torch.dtype) -> Tensor:
    """[N, K, w] -> [P, K, G, T, w]."""
    return x[block.index].permute(0, 3, 1, 2, 4).to(wide, memory_format=torch.contiguous_format)


def _asked(x: Tensor, block: Block, heads: int, wide: torch.dtype) -> Tensor:
    """[N, H, w] -> [P, K, G, T * H/K, w]: the queries that share keys lie side by side."""
    grid = x[block.index].unflatten(3, (heads, -1))  # [P, G, T, K, H/K, w]
    return grid.permute(0, 3, 1, 2, 4, 5).to(wide, memory_format=torch.contiguous_format).flatten(3, 4)


def _packed(x: Tensor, block: Block) -> Tensor:
    """[P, K, G, T * H/K, w] -> [n, H, w], only the places that hold a token."""
    grid = x.unflatten(3, (block.index.shape[2], -1)).permute(0, 2, 3, 1, 4, 5).flatten(3, 4).flatten(0, 2)
    return grid if block.places is None else grid[block.places]


def _windows(block: Block) -> Iterator[slice]:
    """Steps whose queries are looked at together."""
    width = block.index.shape[2]
    for start in range(0, width, STEPS):
        yield slice(start, min(start + STEPS, width))


def _asked_at(steps: slice, query: Tensor, key: Tensor) -> slice:
    """Where the queries of these steps lie."""
    groups = query.shape[3] // key.shape[3]
    return slice(steps.start * groups, steps.stop * groups)


def _scores(query: Tensor, key: Tensor, block: Block, steps: slice, scale: float) -> Tensor:
    """[P, K, G, n * H/K, m] of the queries of a window of n steps over the row's own tokens up to its end, the m-th."""
    score = _products(query, key, steps).mul_(scale)
    n = steps.stop - steps.start
    score.unflatten(3, (n, -1))[..., steps.start :].add_(block.causal[:n, None, :n])
    return score


def _scores_of_prompt(query: Tensor, key: Tensor, block: Block, scale: float) -> Tensor:
    """[P, K, G, T * H/K, L] over the prompt's tokens."""
    score = _products_with_prompt(query, key).mul_(scale)
    return score if block.unseen is None else score.add_(block.unseen)


def _products(query: Tensor, key: Tensor, steps: slice) -> Tensor:
    return torch.matmul(query, key[..., : steps.stop, :].transpose(-2, -1))


def _products_with_prompt(query: Tensor, key: Tensor) -> Tensor:
    score = torch.matmul(query.flatten(2, 3), key[:, :, 0].transpose(-2, -1))
    return score.view(*query.shape[:-1], key.shape[-2])


def _window(query: Tensor, key: Tensor, block: Block, steps: slice) -> Window:
    """What the compiled loops are told of a window of steps; [P, K, G, T * H/K, w] all queries, [P, K, G, T, w] all keys."""
    groups, count = query.shape[3] // key.shape[3], steps.stop - steps.start
    per_prompt = query.shape[1] * query.shape[2] * count * groups
    return Window(groups, count, steps.start, per_prompt, block.prompts)


def _weights(
    query: Tensor, key: Tensor, log_sum: Tensor, block: Block, window: Window, scale: float
) -> Tensor:
    """The weights of a window's queries over the row's own tokens, once more, from the log of their sum."""
    steps = slice(window.start, window.start + window.steps)
    if not cpu_kernels.usable(query):
        return _scores(query, key, block, steps, scale).sub_(log_sum).exp_()
    return cpu_kernels.reweigh(_products(query, key, steps), log_sum, window, scale)


def _weights_of_prompt(
    query: Tensor, key: Tensor, log_sum: Tensor, block: Block, window: Window, scale: float
) -> Tensor:
    """The same over the prompt's tokens."""
    if not cpu_kernels.usable(query):
        return _scores_of_prompt(query, key, block, scale).sub_(log_sum).exp_()
    return cpu_kernels.reweigh(_products_with_prompt(query, key), log_sum, window, scale, of_prompt=True)


def _inner(g: Tensor, weights: Tensor, common: Tensor, scale: float) -> Tensor:
    """The gradient of the scores, given that of the weights, which is used up."""
    if not cpu_kernels.usable(g):
        return g.sub_(common).mul_(weights).mul_(scale)
    return cpu_kernels.soften_backward(g, weights, common, scale)
