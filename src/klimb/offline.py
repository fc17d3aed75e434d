"""Judged completions as a pool: spelled in the policy's tokens, scored under the reference once, and how a policy orders them.

P prompts, K completions a prompt. Labels stand where rewards do; the law that drew the completions is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from klimb.comparisons import Judged
from klimb.data import Draws, Pool
from klimb.models.policy import CausalPolicy
from klimb.numbers.estimate import Estimate, mean_estimate
from klimb.numbers.ordering import ordering
from klimb.pool import Progress, score_tokens, silent


def judged_draws(judged: Sequence[Judged], policy: CausalPolicy, *, max_completion_length: int) -> Draws:
    """[P, K] the completions, cut at `max_completion_length` tokens; `finished` is False where they were."""
    spelled = [
        [policy.spell(text, max_tokens=max_completion_length) for text in row.completions] for row in judged
    ]
    return Draws(
        examples=[row.example for row in judged],
        completions=spelled,
        finished=torch.tensor([[int(ids[-1]) in policy.end for ids in group] for group in spelled]),
        texts=[list(row.completions) for row in judged],
    )


def judged_pool(
    judged: Sequence[Judged],
    reference: CausalPolicy,
    *,
    max_completion_length: int,
    progress: Progress = silent,
    what: str = "data: score under the reference",
) -> Pool:
    """The completions with their labels in the place of rewards, and their reference log-probabilities.

    Args:
        judged: P rows of as many completions each.
        reference: scores them, once.
        max_completion_length: tokens; longer completions are cut.
        progress: told how far it is.
        what: what to tell it.

    Raises:
        ValueError: a prompt and its completions do not fit into the model's context.
    """
    for row in judged:
        tokens = len(reference.render(row.example))
        if tokens + max_completion_length > reference.context_length:
            raise ValueError(
                f"{row.where}: the prompt has {tokens} tokens; with max_completion_length {max_completion_length} that is longer "
                f"than the model's context of {reference.context_length}; shorten one"
            )
    draws = judged_draws(judged, reference, max_completion_length=max_completion_length)
    labels = torch.tensor([row.labels for row in judged], dtype=torch.float32)
    pool = Pool(draws, labels, torch.zeros_like(labels))
    tokens = score_tokens(reference, pool, progress=progress, what=what)
    return Pool(draws, labels, draws.sequence_sums(tokens), token_log_ref=tokens)


def orders(
    pool: Pool, policy: CausalPolicy, beta: float, *, progress: Progress = silent
) -> dict[str, Estimate]:
    """What `ordering` says of held-out rows, with intervals; empty where no two labels differ."""
    tokens = score_tokens(policy, pool, progress=progress, what="score judged completions under the policy")
    log_rho = pool.draws.sequence_sums(tokens) - pool.log_ref
    found = ordering(log_rho, pool.reward, pool.draws.lengths, beta)
    if not len(found["accuracy"]):
        return {}
    generator = torch.Generator().manual_seed(0)
    # one group, so that pairs are what is resampled
    return {name: mean_estimate(x[None], generator=generator) for name, x in found.items()}
