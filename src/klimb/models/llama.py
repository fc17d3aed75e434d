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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from klimb.models.low_rank import adapter_of, base_of
from klimb.models.recorded import recorded

KINDS = {"llama", "mistral", "qwen2"}
PACKABLE = (torch.bfloat16, torch.float32)


def is_llama_like(model: Any) -> bool:
    """True if the model's layers are those that this file writes out, each linear layer plain or with one adapter."""
    config, body = model.config.get_text_config(), model.get_decoder()
    if config.model_type not in KINDS or not hasattr(body, "layers"):
        return False
    windows = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    return not windows and all(
        base_of(linear) is not None for layer in body.layers for linear in _linears(layer)
    )


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
    ]


@dataclass(frozen=True)
class _Product:
    """x -> x W' + bias + (scale * x A') B' of linear layers side by side, W and B above one another.

    Attributes:
        weights: [D_out, D_in] of each layer, or one for all of them.
        packed: whether that one is laid out for the processor.
        bias: [D_out] or None.
        adapter: A [r, D_in], scale [r], B' [r, D_out], or None.
    """

    weights: tuple[Tensor, ...]
    packed: bool
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor, Tensor] | None

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weights[0], self.bias, "none", [], "")
        elif len(self.weights) == 1:
            y = nn.functional.linear(x, self.weights[0], self.bias)
        else:
            y = torch.cat([x @ weight.t() for weight in self.weights], 1)
            y = y if self.bias is None else y.add_(self.bias)
        if self.adapter is None:
            return y
        a, scale, b = self.adapter
        return y.addmm_((x @ a.t()).mul_(scale), b)


def _side_by_side(linears: Sequence[Any]) -> _Product:
    bases = [base for linear in linears if (base := base_of(linear)) is not None]
    assert len(bases) == len(linears)
    weights, packed = _laid_out([base.weight for base in bases], bases[0])
    biases = [base.bias for base in bases]
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat(
            [
                base.weight.new_zeros(len(base.weight)) if b is None else b
                for base, b in zip(bases, biases, strict=True)
            ]
        )
    return _Product(weights, packed, bias, _adapters_side_by_side(linears, [len(b.weight) for b in bases]))


def _adapters_side_by_side(
    linears: Sequence[Any], heights: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor] | None:
    found = [(adapter_of(linear), start) for linear, start in zip(linears, _starts(heights), strict=True)]
    on = [(adapter, start) for adapter, start in found if adapter is not None]
    if not on:
        return None
    a = torch.cat([a for (a, _, _), _ in on])
    scale = torch.cat([a.new_full((len(a),), s) for (a, _, s), _ in on])
    b, row = a.new_zeros(len(a), sum(heights)), 0
    for (_, wide, _), start in on:
        b[row : row + wide.shape[1], start : start + wide.shape[0]] = wide.t()
        row += wide.shape[1]
    return a, scale, b


def _starts(heights: Sequence[int]) -> list[int]:
    return [sum(heights[:i]) for i in range(len(heights))]


def _laid_out(weights: Sequence[Tensor], keeper: nn.Module) -> tuple[tuple[Tensor, ...], bool]:
    """The weights; on a CPU above one another, packed where it gains by it, kept beside the first until one changes."""
    if weights[0].device.type != "cpu":  # a copy would cost memory that a large model has not
        return tuple(w.detach() for w in weights), False
    name = tuple((w.data_ptr(), w._version, w.dtype, len(w)) for w in weights)
    kept = keeper.__dict__.get("laid_out")
    if kept is not None and kept[0] == name:
        return kept[1], kept[2]
    weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0].detach()
    packs = weight.dtype in PACKABLE and torch.backends.mkldnn.is_available()
    if packs:
        weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
    keeper.__dict__["laid_out"] = (name, (weight,), packs)
    return (weight,), packs


ROWS = 64
"""how many rows a packed product is laid out for; others run too"""


@dataclass(frozen=True)
class _Layer:
    attention_norm: Any
    query_key_value: _Product
    output: _Product
    mlp_norm: Any
    gate_up: _Product
    down: _Product
    activation: Any


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
        self.layers = [_written_out(layer) for layer in body.layers]
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
            turned = turned * cos + _half_turned(turned) * sin
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


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


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


def _written_out(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        layer.input_layernorm,
        _side_by_side([attention.q_proj, attention.k_proj, attention.v_proj]),
        _side_by_side([attention.o_proj]),
        layer.post_attention_layernorm,
        _side_by_side([mlp.gate_proj, mlp.up_proj]),
        _side_by_side([mlp.down_proj]),
        mlp.act_fn,
    )
