"""Layers split over the ranks: each keeps a part of every layer, of its gradient and of what the optimizer remembers of it.

What needs no gradient (drawing, scoring) has whole layers for as long as it takes, at full speed; the backward pass gathers
them one by one, and its gradients come back summed, a part to each rank. Embeddings, the last norm and the head stay whole
everywhere: other code reads their weights directly, and of a large model they are a few per cent.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klimb.models.products import forget_laid_out
from klimb.models.recomputed import layers_of
from klimb.ranks import Ranks

if TYPE_CHECKING:
    from klimb.models.policy import CausalPolicy


def shard(policy: CausalPolicy, reference: CausalPolicy, ranks: Ranks) -> tuple[CausalPolicy, CausalPolicy]:
    """The same policy and reference, their layers split over the ranks; they share the layers that they shared.

    Raises:
        ValueError: a prefix, which is no part of any layer.

    Source: Zhao et al., "PyTorch FSDP: experiences on scaling fully sharded data parallel", 2023.
    """
    if policy.prefix is not None:
        raise ValueError("shard: got the family prefix, expected lora, full or soft_prompt; leave out shard")
    trained = {id(p) for p in policy.trainable}
    of_model = {name for name, p in policy.model.named_parameters() if id(p) in trained}
    inside = {id(p) for p in policy.model.parameters()}
    beside = tuple(p for p in policy.trainable if id(p) not in inside)  # virtual tokens
    for model in {id(who.model): who.model for who in (policy, reference)}.values():
        _split(model, ranks)
    own = tuple(p for name, p in policy.model.named_parameters() if name in of_model)
    return (
        replace(policy, trainable=(*own, *beside), sharded=ranks),
        replace(reference, sharded=ranks),
    )


def _split(model: Any, ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    body = model.get_decoder()
    layers = layers_of(body)
    mesh = init_device_mesh(model.device.type, (ranks.world,))
    half = model.dtype in (torch.bfloat16, torch.float16)
    precision = MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    split = {id(p) for p in layers.parameters()}
    fully_shard(body, mesh=mesh, ignored_params={p for p in model.parameters() if id(p) not in split})
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)  # the sum: what a rank learns from is its share of one batch
        part.set_force_sum_reduction_for_comms(True)
    with torch.no_grad():  # the first pass makes what the others need
        body(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False)


@contextmanager
def whole(policy: CausalPolicy) -> Generator[None]:
    """Within this context each rank has whole layers, for passes without gradients; all ranks enter and leave it together."""
    parts = _parts(policy.model) if policy.sharded.world > 1 else []
    for part in parts:
        part.set_reshard_after_forward(False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True)
            part.reshard()
            forget_laid_out(part)


def _parts(model: Any) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [m for m in model.modules() if isinstance(m, FSDPModule)]


def is_part(tensor: Tensor) -> bool:
    """Whether each rank holds a part of this tensor only."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, of which each rank may hold a part; all ranks call this together."""
    whole_tensor: Any = getattr(tensor, "full_tensor", None)
    return tensor if whole_tensor is None else whole_tensor()


def parted(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor that it has, split as `like` is."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    same: Any = like
    there = tensor.to(device=like.device, dtype=like.dtype)
    return distribute_tensor(there, same.device_mesh, same.placements, src_data_rank=None)


def clip_norm(gradients: Iterable[Tensor], limit: float, ranks: Ranks) -> Tensor:
    """Scale gradients down to at most this norm, that of all parts of them; the norm before it."""
    gradients = list(gradients)
    parts = [g for g in gradients if is_part(g)]
    squares = sum(
        (_local(g).double().square().sum().cpu() for g in parts), torch.zeros((), dtype=torch.float64)
    )
    ranks.add([squares])
    squares = squares + sum(g.double().square().sum().cpu() for g in gradients if not is_part(g))
    norm = squares.sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0).item()
    for gradient in gradients:
        _local(gradient).mul_(factor)
    return norm


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if is_part(tensor) else tensor
