"""Record what a function launches on a GPU once, and play it again on other numbers.

A step of decoding is hundreds of small kernels; Python takes longer to launch each than the card to run it. A recording
(CUDA graph) is launched as one. It reads and writes the same places every time, so shapes must stay as they were, and
whatever else the function reads must be changed in place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def recorded(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[..., Tensor]:
    """The function for inputs of these shapes, recorded; what it returns holds until it is called again.

    The function runs once here unrecorded (libraries set themselves up on their first call), so calling it twice with
    the same inputs must leave the same state as calling it once.
    """
    held = [x.clone() for x in inputs]
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        function(*held)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*held)

    def play(*now: Tensor) -> Tensor:
        for place, x in zip(held, now, strict=True):
            place.copy_(x)
        graph.replay()
        return output

    return play
