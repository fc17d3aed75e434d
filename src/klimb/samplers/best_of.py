"""Best of n: draw n completions, keep the one with the largest reward.

The law: p of the reward log u at 1 / beta = n - 1, where u is the reward's quantile under the policy; not p of the
reward itself. KL(best of n||policy) is at most log n - (n - 1) / n nats, with equality only where rewards never tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from klimb.data import Draws, Example, Reward, Sampler, pick
from klimb.models.policy import CausalPolicy
from klimb.rewards.score import score


def best_of(
    policy: CausalPolicy,
    examples: Sequence[Example],
    num_draws: int,
    *,
    generator: torch.Generator,
    sampler: Sampler,
    reward: Reward,
    n: int,
) -> Draws:
    """`num_draws` times the best of n completions of each example.

    Ties are broken by the order of drawing, which is random.

    Args:
        policy: whom to draw from.
        examples: P prompts.
        num_draws: G.
        generator: the only source of randomness.
        sampler: draws the candidates.
        reward: what is best.
        n: candidates for each completion kept.

    Returns:
        Draws without log_q: the probability of a best of n is not that of its text.

    Raises:
        ValueError: n is below 1.

    Source: Beirami et al., "Theoretical guarantees on the best-of-n alignment policy", 2025.
    """
    if n < 1:
        raise ValueError(f"best_of: got n = {n}, expected at least 1")
    draws = sampler(policy, examples, num_draws * n, generator=generator)
    rewards = score(reward, draws).total.reshape(len(examples), num_draws, n)
    index = rewards.argmax(2) + torch.arange(num_draws) * n
    return replace(
        pick(draws, index), log_q=None, token_log_q=None, full_support=draws.full_support, own_law=False
    )
