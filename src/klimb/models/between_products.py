"""What Llama's layers do between their matrix products: norms, gates, turning by angles; with their gradients.

N tokens, D wide. A norm is one kernel on a GPU, and each of them one compiled loop on a CPU (`klimb.models.cpu_kernels`) where there is one for the
dtype; everywhere else torch's operations do the same, up to rounding. A norm is given as the model's own module.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from klimb.models import cpu_kernels
from klimb.models.products import Gradients


def norm(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D] -> the same at unit mean square times the norm's weight, and [N, 1] what it was multiplied by."""
    if _is_one_kernel(module, x):
        return torch.ops.aten._fused_rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)
    if cpu_kernels.usable(x, module.weight):
        return cpu_kernels.norm(x, module.weight, module.variance_epsilon)[:2]
    wide = x.float() if x.dtype != torch.float64 else x
    size = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(module.variance_epsilon))
    return (wide * size).to(x.dtype).mul_(module.weight), size


def norm_backward(module: Any, g: Tensor, x: Tensor, size: Tensor, above: Tensor, found: Gradients) -> Tensor:
    """[N, D] the gradient of what went in: that of its norm, and what came from `above` it."""
    if _is_one_kernel(module, x):
        wanted = [True, module.weight.requires_grad]
        g, weight = torch.ops.aten._fused_rms_norm_backward(
            g.contiguous(), x, module.weight.shape, size, module.weight, wanted
        )
        if module.weight.requires_grad:
            found[id(module.weight)] = weight
        return above + g
    if module.weight.requires_grad:
        found[id(module.weight)] = (g * (x.to(size.dtype) * size)).sum(0).to(module.weight.dtype)
    if cpu_kernels.usable(x, g, module.weight):
        return cpu_kernels.norm_backward(g, x, module.weight, size, above)
    unit = x.to(size.dtype) * size
    g = g.to(size.dtype) * module.weight
    return above + g.sub_(unit.mul_((g * unit).mean(-1, keepdim=True))).mul_(size).to(x.dtype)


def normed(module: Any, x: Tensor) -> Tensor:
    """[N, D] through a norm, as one kernel where there is one."""
    return (
        norm(module, x)[0] if _is_one_kernel(module, x) or cpu_kernels.usable(x, module.weight) else module(x)
    )


def added_norm(module: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """[N, D] the sum of both through a norm, and the sum."""
    if cpu_kernels.usable(x, y, module.weight):
        read, _, total = cpu_kernels.norm(x, module.weight, module.variance_epsilon, y)
        return read, total
    total = x + y
    return norm(module, total)[0], total


def _is_one_kernel(module: Any, x: Tensor) -> bool:
    return x.is_cuda and x.dtype == module.weight.dtype != torch.float64


def gated(gate_up: Tensor) -> Tensor:
    """[N, 2 F] gate and up side by side -> [N, F] silu(gate) up."""
    if cpu_kernels.usable(gate_up):
        return cpu_kernels.gated(gate_up)
    gate, up = gate_up.chunk(2, 1)
    return nn.functional.silu(gate).mul_(up)


def gated_backward(g: Tensor, gate_up: Tensor) -> Tensor:
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


def turned_back(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[N, (H + 2 K) w] the gradient of the heads, given that of `turned`."""
    if cpu_kernels.usable(query, cos, sin):
        heads = torch.cat([query, key, value], 1)
        cpu_kernels.turn(heads, heads.shape[1] - value.shape[1], cos, sin, back=True)
        return heads.flatten(1)
    both = torch.cat([query, key], 1)
    both = (both * cos).sub_(_half_turned(both * sin))
    return torch.cat([both, value], 1).flatten(1)


def _half_turned(x: Tensor) -> Tensor:
    """[..., w] the halves (a, b) -> (-b, a): what the sines of the angles multiply. Its transpose is its negative."""
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
