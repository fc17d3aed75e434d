"""A linear layer with a low-rank adapter as one operation: y = x W' + s (x A') B', and its gradients.

peft builds it from five operations, two of which write a tensor as large as y and another two read it again in the
backward pass. Here the scale goes onto the narrow x A' [N, r], and the adapter's share is added inside the product
that makes it. Only x and x A' are kept for the backward pass, which forms no gradient of the frozen weight.

Same numbers as peft up to rounding; what is saved and loaded remains peft's. For drawing, where every token passes
every layer by itself, `merged` puts the adapters into the weights for as long as it lasts.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
) -> Tensor:
    """A linear layer with its low-rank adapter: x weight' + bias + scale (x a') b'.

    Args:
        x: [..., D_in].
        weight: [D_out, D_in], not differentiated.
        bias: [D_out] or None, not differentiated.
        a: [r, D_in].
        b: [D_out, r].
        scale: alpha / r.

    Returns:
        [..., D_out]; differentiable once in x, a and b.

    Example:
        >>> one = torch.ones(1, 1)
        >>> low_rank_linear(one, 2 * one, None, 3 * one, 5 * one, 0.1).item()
        3.5

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """
    return _LowRankLinear.apply(x, weight, bias, a, b, scale)


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float):
        rows = x.reshape(-1, x.shape[-1])
        narrow = (rows @ a.t()).mul_(scale)
        y = nn.functional.linear(rows, weight, bias).addmm_(narrow, b.t())
        ctx.save_for_backward(rows, narrow, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return y.reshape(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        rows, narrow, weight, a, b = ctx.saved_tensors
        g = upstream.reshape(-1, upstream.shape[-1])
        g_narrow = (g @ b).mul_(ctx.scale)
        wants_x, *_, wants_a, wants_b, _ = ctx.needs_input_grad
        g_x = (g @ weight).addmm_(g_narrow, a).reshape(ctx.shape) if wants_x else None
        g_a = g_narrow.t() @ rows if wants_a else None
        g_b = g.t() @ narrow if wants_b else None
        return g_x, None, None, g_a, g_b, None


def fuse_adapters(wrapped: nn.Module) -> None:
    """Let the plain LoRA layers on plain linear layers inside a peft model run as one operation each.

    Layers of any other kind (quantized, DoRA, Conv1D) keep peft's own way, and so does a layer whose adapter is off,
    merged, with dropout, of another dtype than its layer, or one of several.
    """
    from peft.tuners.lora import Linear

    for layer in wrapped.modules():
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear and not layer.lora_variant:
            layer.forward = partial(_forward, layer)


@contextmanager
def merged(model: nn.Module) -> Generator[None]:
    """Within this context the active adapters of fused layers lie inside their layers' weights: one product a layer.

    W + s B A is formed once, beside W, in memory as large as the adapted weights; x W' + s (x A') B' would be formed for
    every token drawn. Nothing is written into the model, so leaving the context restores it exactly. In float32 or
    wider only: bfloat16 would round small adapters away, and what is drawn must follow what is scored.
    """
    layers: list[Any] = [layer for layer in model.modules() if _fused(layer)]
    try:
        for layer in layers:
            weight, adapter = layer.base_layer.weight.detach(), _adapter(layer)
            if adapter is not None and torch.finfo(weight.dtype).bits >= 32:
                a, b, scale = adapter
                layer.whole = torch.addmm(weight, b.detach(), a.detach(), alpha=scale)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("whole", None)


def base_of(layer: Any) -> nn.Linear | None:
    """The linear layer in `layer`, if all that `layer` does is that one and at most one low-rank adapter beside it."""
    if type(layer) is nn.Linear:
        return layer
    plain = _fused(layer) and (layer.disable_adapters or _adapter(layer) is not None)
    return layer.base_layer if plain else None


def adapter_of(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """A, B and scale of the adapter that is on in a layer that `base_of` knows, or None."""
    return None if type(layer) is nn.Linear else _adapter(layer)


def _fused(layer: nn.Module) -> bool:
    forward = layer.__dict__.get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def _adapter(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """A, B and scale of the adapter that is on, if all it does is to add s (x A') B' in its layer's dtype."""
    name = layer.active_adapters[0] if len(layer.active_adapters) == 1 else None
    if layer.disable_adapters or layer.merged or name not in layer.lora_A or layer.lora_bias.get(name):
        return None
    if layer.training and isinstance(layer.lora_dropout[name], nn.Dropout):
        return None
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return (a, b, layer.scaling[name]) if a.dtype == layer.base_layer.weight.dtype else None


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base = layer.base_layer
    if layer.disable_adapters:
        return base(x)
    whole = layer.__dict__.get("whole")
    if whole is not None:
        return nn.functional.linear(x, whole, base.bias)
    adapter = _adapter(layer)
    if adapter is None or args or kwargs or base.weight.requires_grad or base.weight.dtype != x.dtype:
        return type(layer).forward(layer, x, *args, **kwargs)
    a, b, scale = adapter
    return low_rank_linear(x, base.weight, base.bias, a, b, scale)
