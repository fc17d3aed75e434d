"""Draw with several ranks: each draws completions of some of the prompts, and all of them get all draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from klimb.data import Draws, Example, stack
from klimb.models.policy import CausalPolicy
from klimb.models.sharded import whole


def shared(
    policy: CausalPolicy,
    examples: Sequence[Example],
    num_draws: int,
    *,
    generator: torch.Generator,
    sampler: Any,
) -> Draws:
    """The draws that `sampler` alone would make, each rank making its share; its generator moves as far.

    Args:
        policy: whom to draw from, and `ranks`, who share the work.
        examples: P prompts, the same on every rank.
        num_draws: G.
        generator: in the same state on every rank.
        sampler: one that can draw for some of the prompts only (`own`, as of `klimb.samplers.ancestral`).

    Raises:
        ValueError: as the sampler, on all ranks.
    """
    ranks = policy.ranks
    if ranks.world == 1:
        return sampler(policy, examples, num_draws, generator=generator)
    own = ranks.share(len(examples))
    with whole(policy):
        parts = ranks.gather(lambda: sampler(policy, examples, num_draws, generator=generator, own=own))
    return stack([part for part in parts if part.examples])
