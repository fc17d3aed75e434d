"""Draws begun before they are needed: by an earlier policy, while the trainer learns from those before them.

A draw that was begun k updates ago has the law of the policy of that time. That law is recorded, so what asks for it
(reverse_kl) weighs by it, and what needs none (log_variance) is as right as ever; only nobody may take such draws for the
policy's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from klimb.data import Draws, Example, Sampler


@dataclass(frozen=True)
class Ahead:
    """Draws for a step to come.

    Attributes:
        step: the steps that will be done when it is their turn.
        version: the steps that were done when they were begun; the difference is their age.
        prompts: which examples they are of.
        draws: waits for them, the first time; their examples may be left out.
    """

    step: int
    version: int
    prompts: tuple[int, ...]
    draws: Callable[[], Draws]


def begin(
    sampler: Sampler, policy: Any, examples: Sequence[Example], num_draws: int, *, generator: torch.Generator
) -> Callable[[], Draws]:
    """Begin to draw from the policy as it is now; what is returned waits for the draws.

    A sampler that can go on while the weights move has a method `begin`; any other draws at once.

    Raises:
        ValueError: what the sampler refuses.
    """
    own = getattr(sampler, "begin", None)
    if own is not None:
        return own(policy, examples, num_draws, generator=generator)
    draws = sampler(policy, examples, num_draws, generator=generator)
    return lambda: draws
