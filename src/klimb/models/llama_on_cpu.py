"""Llama's layers for drawing on a CPU: matrix products, and one compiled loop for all that is between two of them.

R rows (completions still running) of P prompts, D hidden width, L prompt tokens, T completion tokens. As `klimb.models.llama`, of whose dozens of
operations a layer, most of them smaller than the call that makes them, twelve are left. A prompt's memory is read where it lies by all of
its completions; keys lie in tiles of sixteen tokens, as the loop over them reads; a row that ended leaves its place unused.
Same numbers as the model's own forward pass up to rounding. Nothing is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klimb.models import cpu_kernels
from klimb.models.products import OfFew, of_few
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
        self.body = model.get_decoder()
        self.eps, self.scale = self.body.norm.variance_epsilon, self.body.layers[0].self_attn.scaling
        self.layers = [
            _Layer(
                layer.attention_norm.weight.detach(),
                of_few(layer.query_key_value),
                of_few(layer.output),
                layer.mlp_norm.weight.detach(),
                of_few(layer.gate_up),
                of_few(layer.down),
            )
            for layer in layers
        ]
        self.prompt = torch.arange(len(lengths)).repeat_interleave(num_draws)
        self.slot = torch.arange(len(self.prompt))
        self.position, self.length = lengths[self.prompt], 0
        self.prompts = [(cpu_kernels.tiled(k), v.contiguous(), lengths) for k, v in remembered]
        key = remembered[0][0]
        _, kv, _, width = key.shape
        self.kv, self.width = kv, width
        tiles = max(1, -(-longest // cpu_kernels.LANES))
        rows, room = len(self.prompt), key.new_zeros
        self.own = [
            (
                room(rows, kv, tiles, width, cpu_kernels.LANES),
                room(rows, kv, tiles * cpu_kernels.LANES, width),
            )
            for _ in remembered
        ]

    def keep(self, kept: Tensor) -> None:
        """Forget all rows but these."""
        self.prompt, self.slot, self.position = self.prompt[kept], self.slot[kept], self.position[kept]

    @torch.no_grad()
    def next_hidden(self, tokens: Tensor) -> Tensor:
        """[R] the tokens just drawn -> [R, D] the states that predict the ones after them."""
        x = self.body.embed_tokens(tokens)
        cos, sin = self.body.rotary_emb(x, position_ids=(self.position + self.length)[:, None])
        self.length += 1
        y = None
        for i, layer in enumerate(self.layers):
            read, _, x = cpu_kernels.norm(x, layer.attention_norm, self.eps, y)
            heads = layer.query_key_value(read).view(len(x), -1, self.width)
            cpu_kernels.turn(heads, heads.shape[1] - self.kv, cos, sin)
            what = (self.prompts[i], self.own[i], self.prompt, self.slot, self.length, self.scale)
            y = layer.output(cpu_kernels.attend_token(heads, *what))
            read, _, x = cpu_kernels.norm(x, layer.mlp_norm, self.eps, y)
            y = layer.down(cpu_kernels.gated(layer.gate_up(read)))
        return cpu_kernels.norm(x, self.body.norm.weight, self.eps, y)[0]
