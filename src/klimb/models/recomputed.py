"""Layers that keep nothing but what went into them: the backward pass runs each of them once more.

What the layers keep of each token is most of the memory of a pass over a long sequence. Kept only at the borders of the layers it is some
twenty times less, for one more forward pass. Known as activation or gradient checkpointing.

Source: Chen et al., "Training deep nets with sublinear memory cost", 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def layers_of(body: Any) -> nn.ModuleList:
    """The layers of a model without its head."""
    return max((m for m in body.children() if isinstance(m, nn.ModuleList)), key=len)


@contextmanager
def recomputed(body: Any, speaking: Callable[[], AbstractContextManager]) -> Generator[None]:
    """Within this context what the model's own layers compute is kept at their borders alone.

    A layer must not change anything while it runs (no cache), or it would change it twice. It is `forward` that is run again, inside
    of what torch hangs around a module, so that split layers are gathered as for any backward pass.

    Args:
        body: a model without its head.
        speaking: opens the context that a layer is run in, the first time and again: that of its adapters.
    """
    layers: list[Any] = list(layers_of(body))
    before = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = partial(_kept_at_its_borders, layer.forward, speaking)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def _kept_at_its_borders(
    forward: Callable, speaking: Callable[[], AbstractContextManager], *args: Any, **kwargs: Any
) -> Any:
    # no layer draws random numbers: dropout is off
    again = partial(_run, forward, speaking, **kwargs)
    return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False)


def _run(forward: Callable, speaking: Callable[[], AbstractContextManager], *args: Any, **kwargs: Any) -> Any:
    with speaking():
        return forward(*args, **kwargs)
