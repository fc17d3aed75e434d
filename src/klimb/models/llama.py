"""Llama's layers written out for drawing: one more token of every completion, a dozen operations a layer.

R rows (completions still running) of P prompts, D hidden width, L prompt tokens, T completion tokens. What transformers does
for any architecture is done here for one kind of it (Llama, Mistral, Qwen2 and whatever has their parts) with three differences:

- the memory of a prompt is read where it lies by all of its completions, instead of being copied to each; one softmax runs
  over the prompt's tokens and the completion's own;
- on a CPU query, key and value are one matrix product, gate and up another, of weights laid out once for the
  processor; on a GPU the whole step is recorded once and played again for every token;
- the low-rank adapters of layers side by side are one narrow product and one wide one.

Same numbers as the model's own forward pass up to rounding. Nothing is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klimb.models.recorded import recorded
from klimb.models.written_out import half_turned, written_out


class LlamaDecoder:
    """What P prompts and their running completions remember, and the step from one token to the next.

    Made with the adapters on that are to speak. Not for use after the weights have moved.
    """

    def __init__(
        self,
        model: Any,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        mask: Tensor,
        num_draws: int,
        longest: int,
        *,
        fixed: bool | None = None,
    ):
        """Start from what the layers remember of the prompts.

        Args:
            model: Llama-like.
            keys: of each layer, [P, heads, L, width], as its attention uses them.
            values: likewise.
            mask: [P, L], 1 for tokens.
            num_draws: G.
            longest: tokens of a completion.
            fixed: whether every step has the same shapes, so that it can be recorded; left out: on a GPU.
        """
        device = mask.device
        self.fixed = device.type == "cuda" if fixed is None else fixed
        self.dead = 1 / 2 if self.fixed else 1 / 16  # a recording for fewer rows costs as much as two steps
        self.play = None
        body = model.get_decoder()
        attention = body.layers[0].self_attn
        self.body, self.scaling, self.width = body, attention.scaling, attention.head_dim
        self.layers = [written_out(layer) for layer in body.layers]
        wide = torch.promote_types(keys[0].dtype, torch.float32)
        self.keys, self.values = [k.to(wide) for k in keys], [v.to(wide) for v in values]
        prompts, self.kv_heads, _, _ = keys[0].shape
        self.groups = model.config.get_text_config().num_attention_heads // self.kv_heads
        rows = prompts * num_draws
        self.prompt = torch.arange(prompts, device=device).repeat_interleave(num_draws)
        self.grid = _grid(self.prompt, prompts)
        self.position = mask.sum(1)[self.prompt]
        padding = torch.zeros(mask.shape, dtype=wide, device=device)
        padding = padding.masked_fill(mask == 0, -torch.inf)[:, None, None]
        self.padding = None if bool(mask.all()) else padding
        self.own = [
            torch.zeros(2, rows, self.kv_heads, longest, self.width, dtype=wide, device=device)
            for _ in self.layers
        ]
        self.length, self.at = 0, torch.zeros(1, dtype=torch.int64, device=device)
        self.unwritten = torch.full((longest,), -torch.inf, dtype=wide, device=device)

    def keep(self, kept: Tensor) -> None:
        """Forget all rows but these."""
        self.prompt, self.position = self.prompt[kept], self.position[kept]
        self.grid, self.play = _grid(self.prompt, len(self.keys[0])), None
        for i, own in enumerate(self.own):
            self.own[i] = own[:, kept]

    @torch.no_grad()
    def next_hidden(self, tokens: Tensor) -> Tensor:
        """[R] the tokens just drawn -> [R, D] the states that predict the ones after them."""
        x = self.body.embed_tokens(tokens)
        cos, sin = self.body.rotary_emb(x, position_ids=(self.position + self.length)[:, None])
        self.length += 1
        if not self.fixed:
            return self._through(x, cos, sin)
        self.at.fill_(self.length - 1)
        self.unwritten[: self.length] = 0.0
        if self.play is None:
            self.play = recorded(self._through, x, cos, sin) if x.is_cuda else self._through
        return self.play(x, cos, sin)

    def _through(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[R, D] embedded tokens through all layers; what they say to later tokens is written down."""
        for i, layer in enumerate(self.layers):
            heads = layer.query_key_value(layer.attention_norm(x)).reshape(len(x), -1, self.width)
            turned, value = heads[:, : -self.kv_heads], heads[:, -self.kv_heads :]
            turned = (turned * cos).add_(half_turned(turned).mul_(sin))
            query, key = turned[:, : -self.kv_heads], turned[:, -self.kv_heads :]
            self._write_down(i, key, value)
            x = x + layer.output(self._attention(i, query).reshape(len(x), -1))
            gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, 1)
            x = x + layer.down(layer.activation(gate) * up)
        return self.body.norm(x)

    def _write_down(self, i: int, key: Tensor, value: Tensor) -> None:
        """[R, kv, width] what this token says to later ones, at the place of it.

        A recording finds the place on the device; elsewhere a slice is two to ten times quicker.
        """
        own = self.own[i]
        if self.fixed:
            for place, said in zip(own, (key, value), strict=True):
                place.index_copy_(2, self.at, said[:, :, None].to(own.dtype))
        else:
            own[0, :, :, self.length - 1], own[1, :, :, self.length - 1] = key, value

    def _attention(self, i: int, query: Tensor) -> Tensor:
        """[R, heads, width]: one softmax over the prompt's tokens and the row's own, summed in the memory's dtype.

        Products by hand: for one query a row the fused operations of torch take twice as long.
        """
        own_key, own_value = self.own[i] if self.fixed else self.own[i][..., : self.length, :]
        asked = query.to(own_key.dtype).unflatten(1, (self.kv_heads, self.groups))
        of_prompt = self.grid.spread(asked) @ self.keys[i].transpose(-2, -1)
        if self.padding is not None:
            of_prompt = of_prompt.add_(self.padding)
        of_own = asked @ own_key.transpose(-2, -1)
        if self.fixed:
            of_own = of_own.add_(self.unwritten)
        score = torch.cat([self.grid.gathered(of_prompt, self.groups), of_own], -1).mul_(self.scaling)
        on_prompt, on_own = score.softmax(-1).split([self.keys[i].shape[2], own_key.shape[2]], -1)
        said = self.grid.gathered(self.grid.spread(on_prompt) @ self.values[i], self.groups)
        return (on_own @ own_value).add_(said).to(query.dtype)


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
