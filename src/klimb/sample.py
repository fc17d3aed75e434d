"""Sample: draws from a policy, or from the target without training anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from klimb.data import Example, Pool, Sampler
from klimb.models.policy import CausalPolicy
from klimb.pool import Progress, prompts_at_once, silent
from klimb.rewards.score import score
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
) -> Iterator[Pool]:
    """Draw, score, and hand out a few prompts at a time.

    Args:
        examples: P prompts.
        policy: whom the sampler draws from (`target.reference` for best-of-n and rejection of the target).
        sampler: ancestral, best_of, rejection, ... with their options bound.
        num_draws: completions a prompt.
        generator: the only source of randomness.
        target: its reward scores the draws, its reference says how likely they were without training.
        progress: told how far it is.

    Yields:
        Pools of a few prompts each.
    """
    at_once = prompts_at_once(num_draws)
    for start in range(0, len(examples), at_once):
        draws = sampler(policy, examples[start : start + at_once], num_draws, generator=generator)
        rewards = score(target.reward, draws)
        with torch.no_grad():
            tokens = target.reference.log_prob(draws)
        progress("sample", min(start + at_once, len(examples)) * num_draws, len(examples) * num_draws)
        yield Pool(draws, rewards.total, draws.sequence_sums(tokens), rewards.parts, token_log_ref=tokens)
