"""A linear layer with a low-rank adapter as one operation: y = x W' + s (x A') B', and its gradients.

peft builds it from five operations, two of which write a tensor as large as y and another two read it again in the
backward pass. Here the scale goes onto the narrow x A' [N, r], and the adapter's share is added inside the product
that makes it. Only x and x A' are kept for the backward pass, which forms no gradient of the frozen weight.

Same numbers as peft up to rounding; what is saved and loaded remains peft's.
"""

from __future__ import annotations

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


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base, active = layer.base_layer, layer.active_adapters
    if layer.disable_adapters:
        return base(x)
    name = active[0] if len(active) == 1 else None
    plain = (
        name in layer.lora_A
        and not (layer.merged or args or kwargs or layer.lora_bias.get(name))
        and not (layer.training and isinstance(layer.lora_dropout[name], nn.Dropout))
        and base.weight.dtype == x.dtype == layer.lora_A[name].weight.dtype
    )
    if not plain or base.weight.requires_grad:
        return type(layer).forward(layer, x, *args, **kwargs)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    return low_rank_linear(x, base.weight, base.bias, a, b, layer.scaling[name])
