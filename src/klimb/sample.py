"""Sample: draws from a policy, or from the target without training anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from klimb.data import Example, Pool, Sampler
from klimb.models.policy import CausalPolicy
from klimb.pool import Parts, Progress, draw_pool, silent
from klimb.target import Tilt


def sample(
    examples: Sequence[Example],
    policy: CausalPolicy,
    sampler: Sampler,
    *,
    num_draws: int,
    generator: torch.Generator,
    target: Tilt,
    progress: Progress = silent,
    parts: Parts | None = None,
) -> Pool:
    """Draw from any law and score, a block of prompts at a time, each with a generator of its own (`klimb.pool`).

    Args:
        examples: P prompts.
        policy: whom the sampler draws from (`target.reference` for best-of-n and rejection of the target).
        sampler: ancestral, best_of, rejection, ... with their options bound.
        num_draws: completions a prompt.
        generator: the only source of randomness.
        target: its reward scores the draws, its reference says how likely they were without training.
        progress: told how far it is.
        parts: finished blocks, which are not drawn again; each further one is put there as soon as it is drawn.
    """
    return draw_pool(
        examples,
        policy,
        target.reward,
        sampler,
        num_draws=num_draws,
        generator=generator,
        reference=target.reference,
        progress=progress,
        what="sample",
        parts=parts,
    )
