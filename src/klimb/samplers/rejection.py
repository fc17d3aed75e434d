"""Exact draws from the target, where the reward has a known upper bound.

Draw from the reference, keep with probability exp((r - bound) / beta). What is kept has exactly the law
p = ref exp(r / beta) / Z; a draw is kept with probability Z exp(-bound / beta), so the mean number of tries is its
inverse. Nothing is trained, nothing is approximate; a bound that the reward exceeds is an error, not a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from klimb.data import Draws, Example, Sampler, join, pick, select, stack
from klimb.models.policy import CausalPolicy
from klimb.rewards.score import score
from klimb.target import Tilt


def rejection(
    policy: CausalPolicy,
    examples: Sequence[Example],
    num_draws: int,
    *,
    generator: torch.Generator,
    sampler: Sampler,
    target: Tilt,
    bound: float,
    max_tries: int = 1024,
    batch: int = 32,
) -> Draws:
    """`num_draws` independent completions of each example, exactly from the target.

    Args:
        policy: must be the target's reference; it is named so that all samplers are called alike.
        examples: P prompts.
        num_draws: G.
        generator: the only source of randomness.
        sampler: draws from the reference itself (temperature 1, no top-p).
        target: what to draw from.
        bound: an upper bound of the reward; the smaller the faster, but never below a reward.
        max_tries: reference draws a prompt before it gives up.
        batch: reference draws a prompt at a time.

    Returns:
        Draws with full support and without log_q: log p is known only up to log Z(x).

    Raises:
        ValueError: a reward above the bound; a sampler without full support; too few kept after max_tries (the message says what was seen).

    """
    if policy is not target.reference:
        raise ValueError(
            "rejection: draws must come from the target's reference; pass target.reference as the policy"
        )
    return stack(
        [
            _one(example, num_draws, generator, sampler, target, bound, max_tries, batch)
            for example in examples
        ]
    )


def _one(
    example: Example,
    num_draws: int,
    generator: torch.Generator,
    sampler: Sampler,
    target: Tilt,
    bound: float,
    max_tries: int,
    batch: int,
) -> Draws:
    kept, tries, found = [], 0, 0
    while found < num_draws:
        if tries >= max_tries:
            rate = found / tries
            raise ValueError(
                f"rejection: {found} of {tries} reference draws were kept for the prompt "
                f"{str(example.prompt)[:60]!r}, expected {num_draws}; acceptance is about {rate:.2g}. Ask for fewer "
                f"draws a prompt, raise beta (now {target.beta:g}) or give a tighter bound than {bound:g}"
            )
        draws = sampler(target.reference, [example], batch, generator=generator)
        if draws.full_support is False:
            raise ValueError(
                "rejection: got a sampler that cannot draw everything (top-p, filtered); expected one that draws from "
                "the reference itself, because what is never drawn is never kept"
            )
        tries += batch
        reward = score(target.reward, draws).total[0]
        accepted = torch.rand(batch, generator=generator) < acceptance(reward, target.beta, bound)
        index = accepted.nonzero()[:, 0]
        found += len(index)
        if len(index):
            kept.append(pick(draws, index[None]))
    whole = select(join(kept), [0])
    return replace(
        pick(whole, torch.arange(num_draws)[None]),
        log_q=None,
        token_log_q=None,
        full_support=True,
        own_law=False,
    )


def acceptance(reward: Tensor, beta: float, bound: float | None = None) -> Tensor:
    r"""[..., G] the chance with which rejection keeps each draw of the reference, exp((r - bound) / beta).

    With an upper bound of the reward what is kept has exactly the law p = ref exp(r / beta) / Z. Without one the largest reward of the
    G draws takes its place (RSO), which then is always kept: of G draws y is kept
    $$ G\, \text{ref}(y)\, E \exp((r_y - \max(r_y, M)) / \beta) $$
    times on average, M the largest reward of the others: nearer to ref than p is, all of ref at G = 1, and p as G grows.

    Args:
        reward: [..., G] units of reward; -inf is never kept.
        beta: units of reward per nat.
        bound: an upper bound of the reward, or None.

    Raises:
        ValueError: a reward above the bound.

    Example:
        >>> acceptance(torch.tensor([0.0, 1.0]), 0.5), acceptance(torch.tensor([0.0, 1.0]), 0.5, bound=2.0)
        (tensor([0.1353, 1.0000]), tensor([0.0183, 0.1353]))

    Source: Liu et al., "Statistical rejection sampling improves preference optimization", 2024, which takes what was kept away
    and begins again until there is enough; here each draw is asked once, so that they stay independent where the bound is given.
    """
    if bound is None:
        return ((reward - reward.amax(-1, keepdim=True)) / beta).exp().where(reward > -torch.inf, 0.0)
    if bool((reward > bound).any()):
        raise ValueError(
            f"rejection: the bound {bound:g} is not one: a completion has reward {reward.max().item():g}; "
            "with a bound that is exceeded the draws would not come from the target"
        )
    return ((reward - bound) / beta).exp()
