"""What the running completions of a draw attend to: the tokens of their prompt, and their own so far.

R rows (completions still running) of P prompts, H query heads, K heads of keys and values, w wide, L prompt tokens, T completion
tokens. The memory of a prompt is read where it lies by all of its completions; one softmax runs over it and the row's own.
`Kernels` leaves it to those of a GPU (`klimb.models.fused_attention`); `Matrices` multiplies by hand and sums in float32 or wider. On a CPU
with a compiler neither is used (`klimb.models.llama_on_cpu`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from klimb.models import fused_attention
from klimb.models.fused_attention import Run, starts


class Attended(Protocol):
    """The memory of a draw: of all its prompts, and of every row."""

    def begin_token(self, length: int) -> None:
        """One more token of every row is about to be written, its `length`-th."""
        ...

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write down what this token says, [R, K, w] twice, and read [R, H, w] what its query [R, H, w] finds."""
        ...

    def keep(self, kept: Tensor, prompt: Tensor) -> None:
        """Forget all rows but these, which are of these prompts [R]."""
        ...


class Matrices:
    """Products by hand.

    Args:
        keys: of each layer, [P, K, L, w], as its attention uses them.
        values: likewise.
        mask: [P, L], 1 for tokens.
        prompt: [R] of each row.
        longest: T.
        scale: what products of query and key are multiplied by.
        fixed: whether every step has the same shapes, so that it can be recorded.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        mask: Tensor,
        prompt: Tensor,
        longest: int,
        scale: float,
        *,
        fixed: bool,
    ):
        self.fixed, self.scale = fixed, scale
        wide = torch.promote_types(keys[0].dtype, torch.float32)
        self.keys, self.values = [k.to(wide) for k in keys], [v.to(wide) for v in values]
        prompts, kv_heads, _, width = keys[0].shape
        self.grid = _grid(prompt, prompts)
        padding = torch.zeros(mask.shape, dtype=wide, device=mask.device)
        padding = padding.masked_fill(mask == 0, -torch.inf)[:, None, None]
        self.padding = None if bool(mask.all()) else padding
        self.own = [
            torch.zeros(2, len(prompt), kv_heads, longest, width, dtype=wide, device=mask.device)
            for _ in keys
        ]
        self.length, self.at = 0, torch.zeros(1, dtype=torch.int64, device=mask.device)
        self.unwritten = torch.full((longest,), -torch.inf, dtype=wide, device=mask.device)

    def begin_token(self, length: int) -> None:
        """One more token."""
        self.length = length
        if self.fixed:
            self.at.fill_(length - 1)
            self.unwritten[:length] = 0.0

    def keep(self, kept: Tensor, prompt: Tensor) -> None:
        """Forget all rows but these."""
        self.grid = _grid(prompt, len(self.keys[0]))
        for i, own in enumerate(self.own):
            self.own[i] = own[:, kept]

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write and read."""
        self._write_down(layer, key, value)
        own_key, own_value = self.own[layer] if self.fixed else self.own[layer][..., : self.length, :]
        asked = query.to(own_key.dtype).unflatten(1, (key.shape[1], -1))
        groups = asked.shape[2]
        of_prompt = self.grid.spread(asked) @ self.keys[layer].transpose(-2, -1)
        if self.padding is not None:
            of_prompt = of_prompt.add_(self.padding)
        of_own = asked @ own_key.transpose(-2, -1)
        if self.fixed:
            of_own = of_own.add_(self.unwritten)
        score = torch.cat([self.grid.gathered(of_prompt, groups), of_own], -1).mul_(self.scale)
        on_prompt, on_own = score.softmax(-1).split([self.keys[layer].shape[2], own_key.shape[2]], -1)
        said = self.grid.gathered(self.grid.spread(on_prompt) @ self.values[layer], groups)
        return (on_own @ own_value).add_(said).to(query.dtype).flatten(1, 2)

    def _write_down(self, layer: int, key: Tensor, value: Tensor) -> None:
        """A recording finds the place on the device; elsewhere a slice is two to ten times quicker."""
        own = self.own[layer]
        if self.fixed:
            for place, said in zip(own, (key, value), strict=True):
                place.index_copy_(2, self.at, said[:, :, None].to(own.dtype))
        else:
            own[0, :, :, self.length - 1], own[1, :, :, self.length - 1] = key, value


class Kernels:
    """Two runs of a GPU's fused kernels, over the prompts and over the rows' own tokens, merged; shapes are fixed.

    Args:
        keys: of each layer, [P, K, L, w], as its attention uses them.
        values: likewise.
        mask: [P, L], 1 for tokens.
        prompt: [R] of each row, those of a prompt side by side.
        longest: T.
        scale: what products of query and key are multiplied by.
    """

    def __init__(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        mask: Tensor,
        prompt: Tensor,
        longest: int,
        scale: float,
    ):
        self.scale, self.longest = scale, longest
        here = mask.bool()
        self.prompts = [
            (k.transpose(1, 2)[here], v.transpose(1, 2)[here]) for k, v in zip(keys, values, strict=True)
        ]
        self.lengths = mask.sum(1).tolist()
        _, kv_heads, _, width = keys[0].shape
        self.own = [k.new_zeros(2, len(prompt), longest, kv_heads, width) for k in keys]
        self.at = torch.zeros(1, dtype=torch.int64, device=mask.device)
        self._lay_out(prompt)

    def _lay_out(self, prompt: Tensor) -> None:
        counts = torch.bincount(prompt, minlength=len(self.lengths)).tolist()
        rows, device = len(prompt), prompt.device
        self.used = torch.full((rows,), int(self.at) + 1, dtype=torch.int32, device=device)
        self.shared = Run(
            starts(counts, device), starts(self.lengths, device), max(counts), max(self.lengths), False
        )
        self.alone = Run(
            starts([1] * rows, device),
            starts([self.longest] * rows, device),
            1,
            self.longest,
            False,
            self.used,
        )

    def begin_token(self, length: int) -> None:
        """One more token."""
        self.at.fill_(length - 1)
        self.used.fill_(length)

    def keep(self, kept: Tensor, prompt: Tensor) -> None:
        """Forget all rows but these."""
        self.own = [own[:, kept] for own in self.own]
        self._lay_out(prompt)

    def attention(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Write and read."""
        own = self.own[layer]
        for place, said in zip(own, (key, value), strict=True):
            place.index_copy_(1, self.at, said[:, None])
        on_prompt = fused_attention.run_forward(self.shared, query, *self.prompts[layer], self.scale)
        said = (own[0].flatten(0, 1), own[1].flatten(0, 1))
        on_own = fused_attention.run_forward(self.alone, query, *said, self.scale)
        return fused_attention.merged(on_own, on_prompt)


@dataclass(frozen=True)
class _Grid:
    """Rows on a grid of their prompts, so that those of one prompt go through its memory as one product.

    Attributes:
        rows: [P, deep] the row at each place, any row where there is none; None: all places taken, in order.
        places: [R] of each row on the grid, flat.
        shape: P and deep, the most rows a prompt has.
    """

    rows: Tensor | None
    places: Tensor
    shape: tuple[int, int]

    def spread(self, x: Tensor) -> Tensor:
        """[R, kv, groups, n] -> [P, kv, deep * groups, n]."""
        on_grid = x.unflatten(0, self.shape) if self.rows is None else x[self.rows]
        return on_grid.transpose(1, 2).flatten(2, 3)

    def gathered(self, x: Tensor, groups: int) -> Tensor:
        """[P, kv, deep * groups, n] -> [R, kv, groups, n]."""
        off_grid = x.unflatten(2, (-1, groups)).transpose(1, 2).flatten(0, 1)
        return off_grid if self.rows is None else off_grid[self.places]


def _grid(prompt: Tensor, prompts: int) -> _Grid:
    """The grid of rows in the order of their prompts."""
    counts = torch.bincount(prompt, minlength=prompts)
    deep = int(counts.max())
    slot = torch.arange(len(prompt), device=prompt.device) - (counts.cumsum(0) - counts)[prompt]
    places = prompt * deep + slot
    rows = torch.zeros(prompts * deep, dtype=torch.int64, device=prompt.device)
    rows[places] = torch.arange(len(prompt), device=prompt.device)
    whole = len(prompt) == prompts * deep
    return _Grid(None if whole else rows.view(prompts, deep), places, (prompts, deep))
