"""Llama's layers written out for drawing: one more token of every completion, a dozen operations a layer.

R rows (completions still running) of P prompts, D hidden width, L prompt tokens, T completion tokens. What transformers does
for any architecture is done here for one kind of it (Llama, Mistral, Qwen2 and whatever has their parts) with three differences:

- the memory of a prompt is read where it lies by all of its completions (`klimb.models.attended`), instead of being copied to each;
- on a CPU query, key and value are one matrix product, gate and up another, of weights laid out once for the
  processor; on a GPU the whole step is recorded once and played again for every token;
- the low-rank adapters of layers side by side are one narrow product and one wide one.

Same numbers as the model's own forward pass up to rounding. Nothing is differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from klimb.models import fused_attention
from klimb.models.attended import Attended, Kernels, Matrices
from klimb.models.between_products import gated, normed, turned
from klimb.models.recorded import recorded
from klimb.models.written_out import attention_of, written_out


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
        body = model.get_decoder()
        attention = body.layers[0].self_attn
        fused = attention_of(model, keys[0].dtype) is fused_attention
        self.fixed = device.type == "cuda" if fixed is None else fixed or fused
        self.dead = 1 / 2 if self.fixed else 1 / 16  # a recording for fewer rows costs as much as two steps
        self.play = None
        self.body, self.width, self.length = body, attention.head_dim, 0
        self.layers = [written_out(layer) for layer in body.layers]
        prompts, self.kv_heads, _, _ = keys[0].shape
        self.prompt = torch.arange(prompts, device=device).repeat_interleave(num_draws)
        self.position = mask.sum(1)[self.prompt]
        what = (keys, values, mask, self.prompt, longest, attention.scaling)
        self.memory: Attended = Kernels(*what) if fused else Matrices(*what, fixed=self.fixed)

    def keep(self, kept: Tensor) -> None:
        """Forget all rows but these."""
        self.prompt, self.position = self.prompt[kept], self.position[kept]
        self.memory.keep(kept, self.prompt)
        self.play = None

    @torch.no_grad()
    def next_hidden(self, tokens: Tensor) -> Tensor:
        """[R] the tokens just drawn -> [R, D] the states that predict the ones after them."""
        x = self.body.embed_tokens(tokens)
        cos, sin = self.body.rotary_emb(x, position_ids=(self.position + self.length)[:, None])
        self.length += 1
        self.memory.begin_token(self.length)
        if not self.fixed:
            return self._through(x, cos, sin)
        if self.play is None:
            self.play = recorded(self._through, x, cos, sin) if x.is_cuda else self._through
        return self.play(x, cos, sin)

    def _through(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[R, D] embedded tokens through all layers; what they say to later tokens is written down."""
        for i, layer in enumerate(self.layers):
            heads = layer.query_key_value(normed(layer.attention_norm, x))
            query, key, value = turned(heads, cos, sin, self.kv_heads)
            found = self.memory.attention(i, query, key, value).reshape(len(x), -1)
            x = x + layer.output(found)
            x = x + layer.down(gated(layer.gate_up(normed(layer.mlp_norm, x))))
        return normed(self.body.norm, x)
