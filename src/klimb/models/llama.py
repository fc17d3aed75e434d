"""Llama's layers written out for drawing: one more token of every completion, a dozen operations a layer.

R rows (completions still running) of P prompts, D hidden width, L prompt tokens, T completion tokens. What transformers does
for any architecture is done here for one kind of it (Llama, Mistral, Qwen2 and whatever has their parts) with three differences:

- the memory of a prompt is read where it lies by all of its completions, instead of being copied to each; attention over
  the prompt and over the completion's own tokens are two sums, joined by their weights;
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
        shared = wide if self.fixed else keys[0].dtype
        self.keys, self.values = [k.to(shared) for k in keys], [v.to(shared) for v in values]
        prompts, self.kv_heads, _, _ = keys[0].shape
        self.groups = model.config.get_text_config().num_attention_heads // self.kv_heads
        rows = prompts * num_draws
        self.prompt = torch.arange(prompts, device=device).repeat_interleave(num_draws)
        self.table = _table(self.prompt)
        self.position = mask.sum(1)[self.prompt]
        padded = not bool(mask.all())
        padding = torch.zeros(mask.shape, dtype=shared, device=device)
        self.padding = padding.masked_fill(mask == 0, -torch.inf)[:, None, None] if padded else None
        self.own = [
            torch.zeros(2, rows, self.kv_heads, longest, self.width, dtype=wide, device=device)
            for _ in self.layers
        ]
        self.length, self.at = 0, torch.zeros(1, dtype=torch.int64, device=device)
        self.unwritten = torch.full((longest,), -torch.inf, dtype=wide, device=device)

    def keep(self, kept: Tensor) -> None:
        """Forget all rows but these."""
        self.prompt, self.position = self.prompt[kept], self.position[kept]
        self.table, self.play = _table(self.prompt), None
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
            turned = turned * cos + half_turned(turned) * sin
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
        """[R, heads, width]: over the prompt and over the row's own tokens, joined."""
        slot, prompts, deep = self.table
        query = query.reshape(len(query), self.kv_heads, self.groups, self.width)
        num_prompts = self.keys[i].shape[0]
        own, own_weight = self._over_own(i, query)
        grouped = query.new_zeros(num_prompts, deep, *query.shape[1:])
        grouped[prompts, slot] = query
        grouped = grouped.permute(0, 2, 1, 3, 4).reshape(num_prompts, self.kv_heads, -1, self.width)
        attend = _attend if self.fixed else _attend_on_cpu
        shared, shared_weight = attend(grouped, self.keys[i], self.values[i], self.padding, self.scaling)
        back = (num_prompts, self.kv_heads, deep, self.groups)
        shared = shared.reshape(*back, self.width).transpose(1, 2)[prompts, slot]
        shared_weight = shared_weight.reshape(back).transpose(1, 2)[prompts, slot]
        share = torch.sigmoid(own_weight - shared_weight)[..., None]  # of the row's own tokens
        return shared.to(own.dtype).lerp(own, share).to(query.dtype)

    def _over_own(self, i: int, query: Tensor) -> tuple[Tensor, Tensor]:
        """Attention [R, kv, groups, width] over the row's own tokens, and the log of the sum of its weights."""
        if self.fixed:
            return _attend(query, *self.own[i], self.unwritten, self.scaling)
        return _attend(query, *self.own[i][..., : self.length, :], None, self.scaling)


def _table(prompt: Tensor) -> tuple[Tensor, Tensor, int]:
    """Of rows in the order of their prompts: the place of each among its prompt's, its prompt, and the most a prompt has."""
    counts = torch.bincount(prompt)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(prompt), device=prompt.device) - starts[prompt], prompt, int(counts.max())


def _attend(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [.., q, width] and the log of the weights' sum [.., q] of each query, summed in the memory's dtype.

    For one query a row the fused operation of torch takes twice as long as its parts.
    """
    score = torch.matmul(query.to(key.dtype), key.transpose(-2, -1)).mul_(scale)
    if hidden is not None:
        score = score.add_(hidden)
    largest = score.amax(-1, keepdim=True)
    mass = score.sub_(largest).exp_()
    total = mass.sum(-1, keepdim=True)
    return torch.matmul(mass, value).div_(total), (largest + total.log_())[..., 0]


def _attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The same for many queries, in the model's dtype."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=hidden, scale=scale
    )
