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
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from klimb.models import cpu_kernels, fused_attention, shared_attention
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
        weights = [norm.weight for norm in (self.attention_norm, self.mlp_norm) if norm.weight.requires_grad]
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
    """How packed tokens attend: by the kernels of a GPU, or by products of matrices."""
    width = model.get_decoder().layers[0].self_attn.head_dim
    fused = fused_attention.is_fused(model.device, dtype, width)
    return fused_attention if fused else shared_attention


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
    place = _place(model, embedded, position, prompts, [[0]] * len(prompts), shared_attention)
    remembered = []
    for layer in layers:
        embedded, seen = _forward(layer, embedded, place)
        own = seen.attended[0]
        remembered.append((own.key[:, :, 0].to(embedded.dtype), own.value[:, :, 0].to(embedded.dtype)))
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
    heads, n_qkv = layer.query_key_value.forward(_norm(layer.attention_norm, x)[0])
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
    read, size = _norm(layer.mlp_norm, seen.middle)
    g_read = layer.gate_up.backward(_gated_backward(g_active, seen.gate_up), read, n_gate_up, found)
    g = _norm_backward(layer.mlp_norm, g_read, seen.middle, size, g, found)
    g_out = layer.output.backward(g, seen.out.flatten(1), n_output, found)
    to_query, to_key, to_value = place.attention.attend_backward(
        g_out.view_as(seen.out), seen.out, seen.attended, place.layout, place.scale
    )
    g_heads = _turned_back(to_query, to_key, to_value, place)
    read, size = _norm(layer.attention_norm, seen.x)
    if not (wants_x or layer.attention_norm.weight.requires_grad):
        layer.query_key_value.collect(g_heads, read, n_qkv, found)
        return g
    g_read = layer.query_key_value.backward(g_heads, read, n_qkv, found)
    return _norm_backward(layer.attention_norm, g_read, seen.x, size, g, found)


def _norm(norm: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D] -> the same at unit mean square times the norm's weight, and [N, 1] what it was multiplied by."""
    if _is_one_kernel(norm, x):
        return torch.ops.aten._fused_rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)
    if cpu_kernels.usable(x, norm.weight):
        return cpu_kernels.norm(x, norm.weight, norm.variance_epsilon)[:2]
    wide = x.float() if x.dtype != torch.float64 else x
    size = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(norm.variance_epsilon))
    return (wide * size).to(x.dtype).mul_(norm.weight), size


def _norm_backward(norm: Any, g: Tensor, x: Tensor, size: Tensor, above: Tensor, found: Gradients) -> Tensor:
    """[N, D] the gradient of what went in: that of its norm, and what came from `above` it."""
    if _is_one_kernel(norm, x):
        wanted = [True, norm.weight.requires_grad]
        g, weight = torch.ops.aten._fused_rms_norm_backward(
            g.contiguous(), x, norm.weight.shape, size, norm.weight, wanted
        )
        if norm.weight.requires_grad:
            found[id(norm.weight)] = weight
        return above + g
    if norm.weight.requires_grad:
        found[id(norm.weight)] = (g * (x.to(size.dtype) * size)).sum(0).to(norm.weight.dtype)
    if cpu_kernels.usable(x, g, norm.weight):
        return cpu_kernels.norm_backward(g, x, norm.weight, size, above)
    unit = x.to(size.dtype) * size
    g = g.to(size.dtype) * norm.weight
    return above + g.sub_(unit.mul_((g * unit).mean(-1, keepdim=True))).mul_(size).to(x.dtype)


def normed(norm: Any, x: Tensor) -> Tensor:
    """[N, D] through a norm, as one kernel where there is one."""
    return _norm(norm, x)[0] if _is_one_kernel(norm, x) or cpu_kernels.usable(x, norm.weight) else norm(x)


def added_norm(norm: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D] the sum of both through a norm, and the sum."""
    if cpu_kernels.usable(x, y, norm.weight):
        read, _, total = cpu_kernels.norm(x, norm.weight, norm.variance_epsilon, y)
        return read, total
    total = x + y
    return _norm(norm, total)[0], total


def _is_one_kernel(norm: Any, x: Tensor) -> bool:
    return x.is_cuda and x.dtype == norm.weight.dtype != torch.float64


def gated(gate_up: Tensor) -> Tensor:
    """[N, 2 F] gate and up side by side -> [N, F] silu(gate) up."""
    if cpu_kernels.usable(gate_up):
        return cpu_kernels.gated(gate_up)
    gate, up = gate_up.chunk(2, 1)
    return nn.functional.silu(gate).mul_(up)


def _gated_backward(g: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient [N, 2 F] of gate and up, given that of `gated` [N, F], which is used up."""
    if cpu_kernels.usable(gate_up, g):
        return cpu_kernels.gated_backward(g, gate_up)
    gate, up = gate_up.chunk(2, 1)
    found = torch.empty_like(gate_up)
    g_gate, g_up = found.chunk(2, 1)
    torch.mul(g, nn.functional.silu(gate), out=g_up)
    torch.ops.aten.silu_backward(g.mul_(up), gate, grad_input=g_gate)
    return found


def turned(heads: Tensor, cos: Tensor, sin: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query [N, H, w], key and value [N, K, w] of heads [N, (H + 2 K) w], turned by the angles [N, 1, w] of their positions.

    The heads may be changed.
    """
    heads = heads.unflatten(1, (-1, cos.shape[-1]))
    if cpu_kernels.usable(heads, cos, sin):
        cpu_kernels.turn(heads, heads.shape[1] - kv_heads, cos, sin)
        both = heads[:, :-kv_heads]
    else:
        both = heads[:, :-kv_heads]
        both = (both * cos).addcmul_(_half_turned(both), sin)
    return both[:, :-kv_heads], both[:, -kv_heads:], heads[:, -kv_heads:]


def _turned_back(query: Tensor, key: Tensor, value: Tensor, place: Place) -> Tensor:
    """[N, (H + 2 K) w] the gradient of the heads, given that of query, key and value."""
    if cpu_kernels.usable(query, place.cos, place.sin):
        heads = torch.cat([query, key, value], 1)
        cpu_kernels.turn(heads, heads.shape[1] - value.shape[1], place.cos, place.sin, back=True)
        return heads.flatten(1)
    both = torch.cat([query, key], 1)
    both = (both * place.cos).sub_(_half_turned(both * place.sin))
    return torch.cat([both, value], 1).flatten(1)


def _half_turned(x: Tensor) -> Tensor:
    """[..., w] the halves (a, b) -> (-b, a): what the sines of the angles multiply. Its transpose is its negative."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
