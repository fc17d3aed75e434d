"""From one token of the running completions to the state that predicts the next, for any architecture.

R rows (completions still running) of P prompts, G draws a prompt, D hidden width. `started` reads the prompts and picks the
road: Llama's layers written out where the model has them, transformers' own layers and cache everywhere else.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from klimb.data import Example
from klimb.models.llama import LlamaDecoder
from klimb.models.llama_on_cpu import LoopDecoder, has_loops
from klimb.models.low_rank import merged
from klimb.models.policy import CausalPolicy
from klimb.models.room import make_room, remembering
from klimb.models.written_out import is_llama_like, read_prompts, written_out

WRITTEN_OUT_ON = ("cpu", "cuda")


class Decoder(Protocol):
    """What the running completions remember.

    Attributes:
        dead: share of the rows that has to have ended before the others go on alone, which has its price.
    """

    dead: float

    def next_hidden(self, tokens: Tensor) -> Tensor:
        """[R] the tokens just drawn -> [R, D] the states that predict the ones after them."""
        ...

    def keep(self, kept: Tensor) -> None:
        """Forget all rows but these, in this order."""
        ...


class CacheDecoder:
    """The model's own layers, with a copy of the prompt's memory in the cache of every row."""

    dead = 1 / 16

    def __init__(self, model: Any, cache: Any, mask: Tensor, num_draws: int, longest: int):
        """Cache and mask [P, L]: of the prompts; longest: how many tokens a completion may have."""
        cache.batch_repeat_interleave(num_draws)
        make_room(cache, longest)
        self.body, self.cache, self.memory = model.get_decoder(), cache, remembering(model, cache)
        self.mask = mask.repeat_interleave(num_draws, 0)
        self.position = self.mask.sum(1)

    def keep(self, kept: Tensor) -> None:
        """Forget all rows but these."""
        self.mask, self.position = self.mask[kept], self.position[kept]
        self.cache.batch_select_indices(kept)

    @torch.no_grad()
    def next_hidden(self, tokens: Tensor) -> Tensor:
        """[R] the tokens just drawn -> [R, D] the states that predict the ones after them."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        out = self.body(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=self.position[:, None],
            **self.memory,
        )
        self.position = self.position + 1
        return out.last_hidden_state[:, -1]


@contextmanager
def started(
    policy: CausalPolicy, examples: Sequence[Example], num_draws: int, longest: int
) -> Generator[tuple[Tensor, Decoder]]:
    """Read the prompts: [P*G, D] the states that predict the first tokens, and what gives those after them.

    Entered with the policy's adapters on; the decoder is for use within the context.
    """
    model = policy.model
    if has_loops(model):
        first, decoder = _started_with_loops(policy, examples, num_draws, longest)
        yield first.repeat_interleave(num_draws, 0), decoder
        return
    first, cache, mask = policy.read_prompts(examples)
    first = first.repeat_interleave(num_draws, 0)
    if policy.device.type in WRITTEN_OUT_ON and is_llama_like(model):
        keys, values = [x.keys for x in cache.layers], [x.values for x in cache.layers]
        yield first, LlamaDecoder(model, keys, values, mask, num_draws, longest)
    else:
        with merged(model):
            yield first, CacheDecoder(model, cache, mask, num_draws, longest)


@torch.no_grad()
def _started_with_loops(
    policy: CausalPolicy, examples: Sequence[Example], num_draws: int, longest: int
) -> tuple[Tensor, LoopDecoder]:
    """[P, D] the states that predict the first tokens, and the decoder."""
    model = policy.model
    layers = [written_out(layer) for layer in policy.body.layers]
    if policy.prefix is None:
        embedded, counts = policy.packed_prompts(examples)
        lengths = torch.tensor(counts)
        states, remembered = read_prompts(model, layers, embedded, counts)
        first = states[lengths.cumsum(0) - 1]
    else:  # a prefix is keys and values, which transformers' cache takes
        first, cache, mask = policy.read_prompts(examples)
        lengths = mask.sum(1)
        left = mask.argsort(dim=1, descending=True, stable=True)[:, None, :, None]
        remembered = [tuple(x.take_along_dim(left, 2) for x in (y.keys, y.values)) for y in cache.layers]
    return first, LoopDecoder(model, layers, remembered, lengths, num_draws, longest)
