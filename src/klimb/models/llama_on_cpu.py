"""Llama's layers for drawing on a CPU: matrix products, and one compiled loop for all that is between two of them.

R rows (completions still running) of P prompts, D hidden width, L prompt tokens, T completion tokens. As `klimb.models.llama`, of whose dozens of
operations a layer, most of them smaller than the call that makes them, twelve are left, or, in bfloat16 on a processor that multiplies it (AMX, AVX512-BF16),
one call for all layers. A prompt's memory is read where it lies by all of its completions; keys lie in tiles of sixteen tokens, as the loop over them reads; a row that ended leaves its place unused.
Same numbers as the model's own forward pass up to rounding. Nothing is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klimb.models import cpu_kernels
from klimb.models.products import OfFew, by_loop, laid_for_few, of_few
from klimb.models.written_out import Layer, is_llama_like


def has_loops(model: Any) -> bool:
    """True if the model is Llama-like, on a CPU, of a dtype and on a machine for which there are loops."""
    if not is_llama_like(model) or not torch.backends.mkldnn.is_available():
        return False
    return cpu_kernels.usable(*model.get_decoder().parameters())


@dataclass(frozen=True)
class _Layer:
    attention_norm: Tensor
    query_key_value: OfFew
    output: OfFew
    mlp_norm: Tensor
    gate_up: OfFew
    down: OfFew


class LoopDecoder:
    """What P prompts and their running completions remember, and the step from one token to the next.

    Made with the adapters on that are to speak. Not for use after the weights have moved.

    Args:
        model: one that `has_loops`.
        layers: its own, written out.
        remembered: of each layer, keys and values [P, K, L, w] of the prompts' tokens, which stand on the left.
        lengths: [P] how many tokens each prompt has.
        num_draws: G.
        longest: tokens of a completion.
    """

    dead = 1 / 16  # products for another number of rows have to be prepared

    def __init__(
        self,
        model: Any,
        layers: Sequence[Layer],
        remembered: Sequence[tuple[Tensor, Tensor]],
        lengths: Tensor,
        num_draws: int,
        longest: int,
    ):
        self.body, attention = model.get_decoder(), model.get_decoder().layers[0].self_attn
        self.eps, self.scale = self.body.norm.variance_epsilon, attention.scaling
        self.lengths, self.prompt = lengths, torch.arange(len(lengths)).repeat_interleave(num_draws)
        self.slot = torch.arange(len(self.prompt))
        self.position, self.length = lengths[self.prompt], 0
        self.prompts = [(cpu_kernels.tiled(k), v.contiguous()) for k, v in remembered]
        _, self.kv, _, self.width = remembered[0][0].shape
        self.own = _room(remembered, len(self.prompt), max(1, -(-longest // cpu_kernels.LANES)))
        whole = by_loop(self.body.norm.weight)
        self.whole = self._whole(layers) if whole else None
        self.layers = [] if whole else [_of_few(layer) for layer in layers]

    def keep(self, kept: Tensor) -> None:
        """Forget all rows but these."""
        self.prompt, self.slot, self.position = self.prompt[kept], self.slot[kept], self.position[kept]

    @torch.no_grad()
    def next_hidden(self, tokens: Tensor) -> Tensor:
        """[R] the tokens just drawn -> [R, D] the states that predict the ones after them."""
        x = self.body.embed_tokens(tokens)
        cos, sin = self.body.rotary_emb(x, position_ids=(self.position + self.length)[:, None])
        self.length += 1
        if self.whole is None:
            return self._layer_by_layer(x, cos, sin)
        where = (self.lengths, self.prompt, self.slot, self.length)
        return cpu_kernels.next_token(x, cos, sin, self.whole, *where)

    def _layer_by_layer(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = None
        for i, layer in enumerate(self.layers):
            read, _, x = cpu_kernels.norm(x, layer.attention_norm, self.eps, y)
            heads = layer.query_key_value(read).view(len(x), -1, self.width)
            cpu_kernels.turn(heads, heads.shape[1] - self.kv, cos, sin)
            prompts = (*self.prompts[i], self.lengths)
            what = (prompts, self.own[i], self.prompt, self.slot, self.length, self.scale)
            y = layer.output(cpu_kernels.attend_token(heads, *what))
            read, _, x = cpu_kernels.norm(x, layer.mlp_norm, self.eps, y)
            y = layer.down(cpu_kernels.gated(layer.gate_up(read)))
        return cpu_kernels.norm(x, self.body.norm.weight, self.eps, y)[0]

    def _whole(self, layers: Sequence[Layer]) -> cpu_kernels.Layers:
        products = [p for x in layers for p in (x.query_key_value, x.output, x.gate_up, x.down)]
        laid = iter(laid_for_few(products, self.body))
        told = [
            (
                *(layer.attention_norm.weight.detach(), next(laid), next(laid)),
                *(layer.mlp_norm.weight.detach(), next(laid), next(laid)),
            )
            for layer in layers
        ]
        last = self.body.norm.weight.detach()
        return cpu_kernels.Layers(told, last, self.prompts, self.own, eps=self.eps, scale=self.scale)


def _of_few(layer: Layer) -> _Layer:
    return _Layer(
        layer.attention_norm.weight.detach(),
        of_few(layer.query_key_value),
        of_few(layer.output),
        layer.mlp_norm.weight.detach(),
        of_few(layer.gate_up),
        of_few(layer.down),
    )


def _room(remembered: Sequence[tuple[Tensor, Tensor]], rows: int, tiles: int) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, keys [R, K, tiles, w, 16] and values [R, K, 16 tiles, w], not filled; what is not written yet is not heeded."""
    key = remembered[0][0]
    _, kv, _, width = key.shape
    lanes = cpu_kernels.LANES
    memory = cpu_kernels.large_pages(key, len(remembered), 2, rows * kv * tiles * width * lanes)
    return [
        (k.view(rows, kv, tiles, width, lanes), v.view(rows, kv, tiles * lanes, width)) for k, v in memory
    ]
