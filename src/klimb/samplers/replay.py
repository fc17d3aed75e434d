"""Draws kept to be learned from again: the plan's pool at first, then what the policy drew itself.

Draws of the plan come from the reference and later ones from earlier policies, so there is no one law: objectives
that ask for a law (`reverse_kl`, `forward_kl`) cannot use them without it, `log_variance` can.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from klimb.data import Draws, Example, Pool, joint_support


@dataclass(frozen=True)
class Kept:
    """One completion and all that is known of it."""

    completion: Tensor
    text: str
    finished: bool
    log_q: float | None
    log_ref: float
    reward: float
    full_support: bool | None = True


@dataclass(frozen=True)
class Replay:
    """For each prompt the completions kept, the oldest first.

    Attributes:
        rows: example id -> completions.
        limit: how many are kept a prompt; the oldest go first.
    """

    rows: Mapping[str, Sequence[Kept]] = field(default_factory=dict)
    limit: int = 64

    def __post_init__(self) -> None:
        assert self.limit >= 1

    def extended(self, pool: Pool) -> Replay:
        """A replay that also holds the draws of `pool`; of those that somebody else wrote no law is known.

        Raises:
            ValueError: they have no texts.
        """
        if pool.draws.texts is None:
            raise ValueError("replay: got draws without texts; expected draws that were decoded")
        rows = dict(self.rows)
        for p, example in enumerate(pool.draws.examples):
            new = [
                Kept(
                    pool.draws.completions[p][g],
                    pool.draws.texts[p][g],
                    bool(pool.draws.finished[p, g]),
                    None if pool.draws.log_q is None else float(pool.draws.log_q[p, g]),
                    float(pool.log_ref[p, g]),
                    float(pool.reward[p, g]),
                    pool.draws.full_support,
                )
                for g in range(pool.draws.num_draws)
            ]
            rows[example.id] = [*rows.get(example.id, ()), *new][-self.limit :]
        return replace(self, rows=rows)

    def draw(self, examples: Sequence[Example], num_draws: int, *, generator: torch.Generator) -> Pool:
        """`num_draws` kept completions of each example, without repetition within one call.

        Raises:
            ValueError: fewer are kept.
        """
        chosen = []
        for example in examples:
            kept = self.rows.get(example.id, ())
            if len(kept) < num_draws:
                raise ValueError(
                    f"replay: {len(kept)} draws are kept of the prompt {str(example.prompt)[:60]!r}, expected "
                    f"{num_draws}; plan with more draws, or replay fewer"
                )
            order = torch.randperm(len(kept), generator=generator)[:num_draws].tolist()
            chosen.append([kept[i] for i in order])
        return pool_of(examples, chosen)


def pool_of(examples: Sequence[Example], kept: Sequence[Sequence[Kept]]) -> Pool:
    """A rectangular pool of kept completions."""

    def table(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor([[getattr(row, name) for row in group] for group in kept], dtype=dtype)

    draws = Draws(
        examples=list(examples),
        completions=[[row.completion for row in group] for group in kept],
        finished=table("finished", torch.bool),
        texts=[[row.text for row in group] for group in kept],
        log_q=None if any(row.log_q is None for group in kept for row in group) else table("log_q"),
        full_support=joint_support(row.full_support for group in kept for row in group),
    )
    return Pool(draws, table("reward"), table("log_ref"))
