"""What flows between the floors: examples, draws, scores, and the three protocols.

P prompts, G draws a prompt, N packed tokens (all completions end to end, prompt by prompt, draw by draw).
All log-probabilities are natural logarithms, summed over a completion's tokens, its end-of-sequence token included.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


@dataclass(frozen=True)
class Example:
    """One prompt and the other columns of its row, which go to the reward."""

    prompt: Prompt
    columns: Mapping[str, object] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Twelve hex digits that name this prompt and its columns, the same on every machine."""
        text = json.dumps([self.prompt, dict(self.columns)], sort_keys=True, default=str, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Draws:
    """G completions of each of P prompts, and the law they were drawn from.

    Attributes:
        examples: the P prompts.
        completions: [P][G] token ids without padding, 1-D int64; the end-of-sequence token is one of them.
        texts: [P][G] the same decoded, special tokens removed; None if nobody decoded them.
        finished: [P, G] True where the completion ended by itself, False where it was cut at the length limit.
        log_q: [P, G] log-probability under the law of the draw, nats; None if that law is unknown.
        full_support: True if the law can draw every completion, False if not (top-p, filtered), None if unknown.
        own_law: True if log_q is the drawing policy's own log-probability: temperature 1, nothing filtered.
        token_log_q: [P][G] what each token added to log_q, 1-D float32; None if nobody kept it.
    """

    examples: Sequence[Example]
    completions: Sequence[Sequence[Tensor]]
    finished: Tensor
    texts: Sequence[Sequence[str]] | None = None
    log_q: Tensor | None = None
    full_support: bool | None = None
    own_law: bool = False
    token_log_q: Sequence[Sequence[Tensor]] | None = None

    @property
    def num_prompts(self) -> int:
        """P."""
        return len(self.examples)

    @property
    def num_draws(self) -> int:
        """G."""
        return len(self.completions[0]) if self.completions else 0

    @property
    def lengths(self) -> Tensor:
        """[P, G] tokens in each completion."""
        return torch.tensor([[len(ids) for ids in group] for group in self.completions]).reshape(
            self.num_prompts, self.num_draws
        )

    @property
    def row(self) -> Tensor:
        """[N] which completion (p * G + g) each packed token belongs to."""
        return torch.arange(self.num_prompts * self.num_draws).repeat_interleave(self.lengths.flatten())

    @property
    def packed_log_q(self) -> Tensor | None:
        """[N] what each packed token added to log_q, nats."""
        if self.token_log_q is None:
            return None
        return torch.cat([torch.zeros(0), *(row for group in self.token_log_q for row in group)])

    def sequence_sums(self, per_token: Tensor) -> Tensor:
        """Sum packed per-token numbers [N] to [P, G], in float32 or wider; differentiable."""
        wide = per_token if per_token.dtype == torch.float64 else per_token.float()
        sums = wide.new_zeros(self.num_prompts * self.num_draws).index_add(0, self.row.to(wide.device), wide)
        return sums.reshape(self.num_prompts, self.num_draws)


@dataclass(frozen=True)
class Scored:
    """All that an objective may see besides the network's own numbers; what is unknown is None.

    Attributes:
        log_ref: [P, G] reference log-probability, nats.
        reward: [P, G] reward, in its own units.
        log_target: [P, G] log ref + r / beta, unnormalised, nats.
        log_q: [P, G] log-probability under the law of the draw, nats.
        log_w: [P, G] log_target - log_q, fixed once drawn, nats.
        log_z: [P] log of the target's normaliser, nats.
        wins: [P, G] which completion won a comparison.
        lengths: [P, G] tokens.
        row: [N] which completion each packed token belongs to.
    """

    log_ref: Tensor | None = None
    reward: Tensor | None = None
    log_target: Tensor | None = None
    log_q: Tensor | None = None
    log_w: Tensor | None = None
    log_z: Tensor | None = None
    wins: Tensor | None = None
    lengths: Tensor | None = None
    row: Tensor | None = None


@dataclass(frozen=True)
class Pool:
    """Draws and what is known of them: what a plan holds, a replay hands out and a table on disk keeps.

    Attributes:
        draws: P x G completions.
        reward: [P, G] in the reward's own units.
        log_ref: [P, G] reference log-probability, nats.
        parts: name -> [P, G], the rewards that `reward` was summed from.
        log_pi: [P, G] log-probability under the policy, nats, where there was one.
        token_log_ref: [N] the same per packed token.
        token_log_pi: [N] the same per packed token.
    """

    draws: Draws
    reward: Tensor
    log_ref: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    log_pi: Tensor | None = None
    token_log_ref: Tensor | None = None
    token_log_pi: Tensor | None = None


@runtime_checkable
class Policy(Protocol):
    """A distribution over completions of a prompt, with parameters. Template and context are its own."""

    def render(self, example: Example) -> list[int]:
        """Token ids of the prompt as this policy sees it."""
        ...

    def log_prob(self, draws: Draws) -> Tensor:
        """[N] packed per-token log-probabilities, nats, float32 or wider; differentiable in `parameters()`."""
        ...

    def parameters(self) -> Iterable[Tensor]:
        """The trainable tensors."""
        ...


class Target(Protocol):
    """Where to go: an unnormalised law over completions, relative to a reference."""

    @property
    def reference(self) -> Policy:
        """What the law is relative to."""
        ...

    @property
    def reward(self) -> Reward:
        """What is good."""
        ...

    @property
    def beta(self) -> float:
        """Units of reward per nat."""
        ...

    def log_target(self, scored: Scored) -> Tensor:
        """[P, G] unnormalised log-probability, nats."""
        ...


class Sampler(Protocol):
    """Draws completions from a policy and states the law it drew from."""

    def __call__(
        self, policy: Policy, examples: Sequence[Example], num_draws: int, *, generator: torch.Generator
    ) -> Draws:
        """`num_draws` completions of each example."""
        ...


Reward = Callable[..., Sequence[float | None]]
"""reward(prompts, completions, **columns) -> one float (or None: not applicable) a completion."""


def select(draws: Draws, index: Sequence[int] | Tensor) -> Draws:
    """The prompts at `index`, with all their draws."""
    index = [int(i) for i in index]
    return replace(
        draws,
        examples=[draws.examples[i] for i in index],
        completions=[draws.completions[i] for i in index],
        finished=draws.finished[index],
        texts=None if draws.texts is None else [draws.texts[i] for i in index],
        log_q=None if draws.log_q is None else draws.log_q[index],
        token_log_q=None if draws.token_log_q is None else [draws.token_log_q[i] for i in index],
    )


def pick(draws: Draws, index: Tensor) -> Draws:
    """Of each prompt p the draws `index[p]`; index [P, K] -> K draws a prompt."""
    rows = index.tolist()
    return replace(
        draws,
        completions=[[group[j] for j in js] for group, js in zip(draws.completions, rows, strict=True)],
        finished=draws.finished.gather(1, index),
        texts=None
        if draws.texts is None
        else [[group[j] for j in js] for group, js in zip(draws.texts, rows, strict=True)],
        log_q=None if draws.log_q is None else draws.log_q.gather(1, index),
        token_log_q=None
        if draws.token_log_q is None
        else [[group[j] for j in js] for group, js in zip(draws.token_log_q, rows, strict=True)],
    )


def stack(parts: Sequence[Draws]) -> Draws:
    """Draws of different prompts, one after the other: [P1, G] + [P2, G] -> [P1 + P2, G]."""
    return _merge(parts, lambda groups: [g for group in groups for g in group], dim=0)


def join(parts: Sequence[Draws]) -> Draws:
    """More draws of the same prompts: [P, G1] + [P, G2] -> [P, G1 + G2].

    The joined draws do not come from one law, so full support holds only where it holds for every part.
    """
    ids = [[e.id for e in part.examples] for part in parts]
    if any(other != ids[0] for other in ids[1:]):
        raise ValueError("join: got draws of different prompts; expected the same prompts in the same order")
    merged = _merge(
        parts, lambda groups: [[g for part in row for g in part] for row in zip(*groups, strict=True)], dim=1
    )
    return replace(merged, examples=parts[0].examples)


def joint_support(supports: Iterable[bool | None]) -> bool | None:
    """Of draws put together: False if one law cannot draw every completion, else None if one is unknown, else True.

    Example:
        >>> joint_support([True, None]), joint_support([True, None, False])
        (None, False)
    """
    known = set(supports)
    return False if False in known else (None if None in known else True)


def _merge(parts: Sequence[Draws], combine: Callable, *, dim: int) -> Draws:
    return Draws(
        examples=[e for part in parts for e in part.examples],
        completions=combine([part.completions for part in parts]),
        finished=torch.cat([part.finished for part in parts], dim),
        texts=None if any(p.texts is None for p in parts) else combine([p.texts for p in parts]),
        log_q=_cat([part.log_q for part in parts], dim),
        full_support=joint_support(part.full_support for part in parts),
        own_law=all(part.own_law for part in parts),
        token_log_q=None
        if any(p.token_log_q is None for p in parts)
        else combine([p.token_log_q for p in parts]),
    )


def stack_pools(parts: Sequence[Pool]) -> Pool:
    """Pools of different prompts, one after the other."""
    return _merge_pools(parts, stack([part.draws for part in parts]), dim=0)


def select_pool(pool: Pool, index: Sequence[int]) -> Pool:
    """The prompts at `index`, with all their draws and what is known of them."""
    prompt_of = pool.draws.row // pool.draws.num_draws
    tokens = torch.cat([(prompt_of == p).nonzero()[:, 0] for p in index])
    packed = {
        name: None if (x := getattr(pool, name)) is None else x[tokens]
        for name in ("token_log_ref", "token_log_pi")
    }
    rows = list(index)
    return Pool(
        select(pool.draws, rows),
        pool.reward[rows],
        pool.log_ref[rows],
        {name: part[rows] for name, part in pool.parts.items()},
        None if pool.log_pi is None else pool.log_pi[rows],
        **packed,
    )


def join_pools(parts: Sequence[Pool]) -> Pool:
    """More draws of the same prompts; what is packed by token is dropped, unless there is nothing to join."""
    if len(parts) == 1:
        return parts[0]
    bare = [replace(part, token_log_ref=None, token_log_pi=None) for part in parts]
    return _merge_pools(bare, join([part.draws for part in parts]), dim=1)


def _merge_pools(parts: Sequence[Pool], draws: Draws, *, dim: int) -> Pool:
    return Pool(
        draws,
        torch.cat([part.reward for part in parts], dim),
        torch.cat([part.log_ref for part in parts], dim),
        {
            name: torch.cat([part.parts[name] for part in parts], dim)
            for name in parts[0].parts
            if all(name in part.parts for part in parts)
        },
        _cat([part.log_pi for part in parts], dim),
        _cat([part.token_log_ref for part in parts], 0),
        _cat([part.token_log_pi for part in parts], 0),
    )


def _cat(tensors: Sequence[Tensor | None], dim: int) -> Tensor | None:
    """All of them, or None if one is unknown."""
    known = [t for t in tensors if t is not None]
    return torch.cat(known, dim) if len(known) == len(tensors) else None


def chunks(draws: Draws, max_tokens: int) -> Iterator[Draws]:
    """Split by whole prompts into pieces of at most `max_tokens` completion tokens (one prompt at least)."""
    tokens = draws.lengths.sum(1).tolist()
    start, total = 0, 0
    for p, n in enumerate(tokens):
        if p > start and total + n > max_tokens:
            yield select(draws, range(start, p))
            start, total = p, 0
        total += n
    if tokens:
        yield select(draws, range(start, len(tokens)))
