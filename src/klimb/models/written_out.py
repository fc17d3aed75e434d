"""Llama's layers written out for scoring and learning: prompts and all their completions in one pass, packed, with its gradients.

N packed tokens (`klimb.models.shared_attention`), D wide. What transformers does layer by layer for a padded batch, reading prompts
first and completions after them, is done here in one go: each prompt once, no padding outside of attention, adapters of layers
side by side as one. The backward pass is written out too: what is cheap to form again (norms, the activation, the
weights of attention) is not kept, and below the lowest layer with anything trained nothing is kept at all. Asked to, a layer
keeps only what went into it, and is run once more before it is gone back through (`klimb.models.recomputed`).

Same numbers as the model's own forward pass up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from klimb.models import fused_attention, shared_attention, tiled_attention
from klimb.models.between_products import (
    added_norm,
    gated,
    gated_backward,
    norm,
    norm_backward,
    normed,
    turned,
    turned_back,
)
from klimb.models.low_rank import base_of
from klimb.models.products import Gradients, Product, side_by_side

KINDS = {"llama", "mistral", "qwen2"}


def is_llama_like(model: Any) -> bool:
    """True if the model's layers are those that this file writes out, each linear layer plain or with one adapter."""
    config, body = model.config.get_text_config(), model.get_decoder()
    if config.model_type not in KINDS or config.hidden_act != "silu" or not hasattr(body, "layers"):
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
class Layer:
    """The parts of one layer; norms are the model's own modules."""

    attention_norm: Any
    query_key_value: Product
    output: Product
    mlp_norm: Any
    gate_up: Product
    down: Product

    def trained(self) -> list[Tensor]:
        """Its tensors that training moves."""
        products = (self.query_key_value, self.output, self.gate_up, self.down)
        norms = (self.attention_norm, self.mlp_norm)
        weights = [x.weight for x in norms if x.weight.requires_grad]
        return weights + [x for product in products for part in product.parts for x in part.trained()]


def written_out(layer: Any) -> Layer:
    """A layer that `is_llama_like` knows, with the adapters that are on now."""
    attention, mlp = layer.self_attn, layer.mlp
    return Layer(
        layer.input_layernorm,
        side_by_side([attention.q_proj, attention.k_proj, attention.v_proj]),
        side_by_side([attention.o_proj]),
        layer.post_attention_layernorm,
        side_by_side([mlp.gate_proj, mlp.up_proj]),
        side_by_side([mlp.down_proj]),
    )


@dataclass(frozen=True)
class Place:
    """What all layers are told: where the tokens lie, their angles [N, 1, w], heads of keys, how attention is computed, and its scale."""

    layout: Any
    cos: Tensor
    sin: Tensor
    kv_heads: int
    attention: ModuleType
    scale: float


def attention_of(model: Any, dtype: torch.dtype) -> ModuleType:
    """How packed tokens attend: by the kernels of a GPU, by the compiled loops of a CPU, or by products of matrices."""
    width = model.get_decoder().layers[0].self_attn.head_dim
    if fused_attention.is_fused(model.device, dtype, width):
        return fused_attention
    return tiled_attention if tiled_attention.is_tiled(model.device, dtype) else shared_attention


def through_layers(
    model: Any,
    embedded: Tensor,
    position: Tensor,
    prompts: Sequence[int],
    rows: Sequence[Sequence[int]],
    *,
    recompute: bool = False,
) -> Tensor:
    """[N, D] embedded tokens -> [N, D] the states after the last layer, before the last norm.

    Args:
        model: one that `is_llama_like`, its adapters on that are to speak.
        embedded: [N, D] those of the prompts first, then those of their completions.
        position: [N] of each token in its sequence.
        prompts: [P] tokens of each prompt.
        rows: [P][G] tokens of each completion that are read (all but its last).
        recompute: keep only what goes into each layer.

    Returns:
        The states; differentiable once in `embedded` and in all weights of the layers.
    """
    layers = [written_out(layer) for layer in model.get_decoder().layers]
    place = _place(model, embedded, position, prompts, rows, attention_of(model, embedded.dtype))
    trained = [x for layer in layers for x in layer.trained()]
    if torch.is_grad_enabled() and (trained or embedded.requires_grad):
        return _Layers.apply(embedded, layers, place, recompute, *trained)
    for layer in layers:
        embedded = _forward(layer, embedded, place)[0]
    return embedded


@torch.no_grad()
def read_prompts(
    model: Any, layers: Sequence[Layer], embedded: Tensor, prompts: Sequence[int]
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The states of packed prompts [N, D] after the last norm, and of each layer the keys and values [P, K, L, w] of its tokens.

    The tokens of a prompt stand on the left, and what is on the right of them means nothing.

    Args:
        model: one that `is_llama_like`, its adapters on that are to speak.
        layers: its own, written out.
        embedded: [N, D].
        prompts: [P] tokens of each.
    """
    position = torch.cat([torch.arange(n, device=embedded.device) for n in prompts])
    road = attention_of(model, embedded.dtype)
    place = _place(model, embedded, position, prompts, [[0]] * len(prompts), road)
    remembered = []
    for layer in layers:
        embedded, seen = _forward(layer, embedded, place)
        key, value = road.of_prompts(seen.attended, place.layout)
        remembered.append((key.to(embedded.dtype), value.to(embedded.dtype)))
    return normed(model.get_decoder().norm, embedded), remembered


def _place(
    model: Any,
    embedded: Tensor,
    position: Tensor,
    prompts: Sequence[int],
    rows: Sequence[Sequence[int]],
    road: ModuleType,
) -> Place:
    body = model.get_decoder()
    cos, sin = body.rotary_emb(embedded, position_ids=position[None])
    layout = road.laid_out(prompts, rows, device=embedded.device)
    kv_heads = model.config.get_text_config().num_key_value_heads
    return Place(layout, cos[0, :, None], sin[0, :, None], kv_heads, road, body.layers[0].self_attn.scaling)


class _Layers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, layers: Sequence[Layer], place: Place, recompute: bool, *trained: Tensor
    ) -> Tensor:
        lowest = 0 if x.requires_grad else next(i for i, layer in enumerate(layers) if layer.trained())
        kept = []
        for i, layer in enumerate(layers):
            y, seen = _forward(layer, x, place)
            if i >= lowest:
                kept.append((layer, x if recompute else seen))
            x = y
        ctx.kept, ctx.place, ctx.trained = kept, place, [id(tensor) for tensor in trained]
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        if not ctx.kept:
            raise RuntimeError(
                "these layers were gone back through already, which frees what they kept; score the draws again"
            )
        found: Gradients = {}
        wants_x = ctx.needs_input_grad[0]
        while ctx.kept:
            layer, seen = ctx.kept.pop()  # what is behind us is memory again
            if not isinstance(seen, _Seen):
                seen = _forward(layer, seen, ctx.place)[1]
            g = _backward(layer, seen, g, ctx.place, found, wants_x=wants_x or bool(ctx.kept))
        return g if wants_x else None, None, None, None, *(found[name] for name in ctx.trained)


@dataclass(frozen=True)
class _Seen:
    """What a layer's backward pass wants of its forward pass."""

    x: Tensor
    """[N, D] what went in"""
    out: Tensor
    """[N, H, w] of attention"""
    attended: list[Any]
    """what attention wants of itself"""
    middle: Tensor
    """[N, D] after attention"""
    gate_up: Tensor
    """[N, 2 F]"""
    narrow: tuple[Tensor | None, ...]
    """of the four products"""


def _forward(layer: Layer, x: Tensor, place: Place) -> tuple[Tensor, _Seen]:
    heads, n_qkv = layer.query_key_value.forward(norm(layer.attention_norm, x)[0])
    query, key, value = turned(heads, place.cos, place.sin, place.kv_heads)
    out, attended = place.attention.attend(query, key, value, place.layout, place.scale)
    y, n_output = layer.output.forward(out.flatten(1))
    read, middle = added_norm(layer.mlp_norm, x, y)
    gate_up, n_gate_up = layer.gate_up.forward(read)
    y, n_down = layer.down.forward(gated(gate_up))
    seen = _Seen(x, out, attended, middle, gate_up, (n_qkv, n_output, n_gate_up, n_down))
    return middle + y, seen


def _backward(
    layer: Layer, seen: _Seen, g: Tensor, place: Place, found: Gradients, *, wants_x: bool
) -> Tensor:
    n_qkv, n_output, n_gate_up, n_down = seen.narrow
    g_active = layer.down.backward(g, gated(seen.gate_up), n_down, found)
    read, size = norm(layer.mlp_norm, seen.middle)
    g_read = layer.gate_up.backward(gated_backward(g_active, seen.gate_up), read, n_gate_up, found)
    g = norm_backward(layer.mlp_norm, g_read, seen.middle, size, g, found)
    g_out = layer.output.backward(g, seen.out.flatten(1), n_output, found)
    to_query, to_key, to_value = place.attention.attend_backward(
        g_out.view_as(seen.out), seen.out, seen.attended, place.layout, place.scale
    )
    g_heads = turned_back(to_query, to_key, to_value, place.cos, place.sin)
    read, size = norm(layer.attention_norm, seen.x)
    if not (wants_x or layer.attention_norm.weight.requires_grad):
        layer.query_key_value.collect(g_heads, read, n_qkv, found)
        return g
    g_read = layer.query_key_value.backward(g_heads, read, n_qkv, found)
    return norm_backward(layer.attention_norm, g_read, seen.x, size, g, found)
