"""A cache with room: each new token is written into memory reserved for it.

transformers' growing cache joins old and new with `cat`, which copies all that was remembered for every token drawn.
"""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor


def remembering(model: Any, cache: Any) -> dict[str, Any]:
    """The arguments with which a model reads from and writes to `cache`: transformers renamed one in 5.24."""
    name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


def make_room(cache: Any, tokens: int) -> None:
    """Reserve memory for so many more tokens in the full-attention layers of a cache that was just filled.

    Layers of other kinds (sliding windows) keep their own way. Not differentiable: it writes in place.
    """
    from transformers.cache_utils import DynamicLayer

    for layer in cache.layers:
        if type(layer) is DynamicLayer and layer.is_initialized:
            held = [_with_room(x, tokens) for x in (layer.keys, layer.values)]
            layer.update = partial(_update, layer, held)
            layer.batch_select_indices = partial(_select, layer, held)


def _with_room(x: Tensor, tokens: int) -> Tensor:
    """[rows, heads, length, width] -> [rows, heads, length + tokens, width]."""
    rows, heads, length, width = x.shape
    wide = x.new_empty(rows, heads, length + tokens, width)
    wide[:, :, :length] = x
    return wide


def _update(layer: Any, held: list[Tensor], keys: Tensor, values: Tensor, *args: Any, **kwargs: Any):
    start, end = layer.keys.shape[-2], layer.keys.shape[-2] + keys.shape[-2]
    assert end <= held[0].shape[-2], "more tokens than there is room for"
    held[0][:, :, start:end] = keys
    held[1][:, :, start:end] = values
    layer.keys, layer.values = held[0][:, :, :end], held[1][:, :, :end]
    return layer.keys, layer.values


def _select(layer: Any, held: list[Tensor], index: Tensor) -> None:
    length = layer.keys.shape[-2]
    held[:] = [torch.index_select(x, 0, index) for x in held]
    layer.keys, layer.values = held[0][:, :, :length], held[1][:, :, :length]
