"""The space of all strings up to length T: a string ends by its end-of-sequence token, or is cut at T tokens.

Both kinds have their probability, so that an autoregressive law over this space sums to one. It is the convention of
the whole library, made small enough to list.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

LIMIT = 1_000_000


@dataclass(frozen=True, eq=False)
class Space:
    """Every string, and the prefix at which each of its tokens is chosen.

    Attributes:
        strings: [Y, T] token ids, padded with `eos`; the end-of-sequence token is one of them.
        lengths: [Y] tokens, the end-of-sequence token included.
        finished: [Y] True where the string ended by itself, False where it was cut at T tokens.
        prefixes: [Y, T] which prefix (0 to S - 1; 0 is the empty one) each token is chosen at; 0 at the padding.
        num_prefixes: S.
        vocab_size: V.
        eos: the end-of-sequence token.
    """

    strings: Tensor
    lengths: Tensor
    finished: Tensor
    prefixes: Tensor
    num_prefixes: int
    vocab_size: int
    eos: int

    @property
    def size(self) -> int:
        """Y."""
        return len(self.lengths)

    @property
    def mask(self) -> Tensor:
        """[Y, T] True at tokens, False at the padding."""
        return torch.arange(self.strings.shape[1]) < self.lengths[:, None]

    @property
    def completions(self) -> list[Tensor]:
        """[Y] token ids without padding, 1-D, as `klimb.data.Draws` has them."""
        return [ids[:n] for ids, n in zip(self.strings, self.lengths.tolist(), strict=True)]


def all_strings(vocab_size: int, max_length: int, *, eos: int = 0) -> Space:
    """List the space, always in the same order: the finished strings by length, then those cut at T.

    Y = S + (V-1)^T with S = 1 + (V-1) + ... + (V-1)^(T-1): one finished string and one choice a prefix.

    Args:
        vocab_size: V, the end-of-sequence token included.
        max_length: T, tokens.
        eos: the end-of-sequence token.

    Raises:
        ValueError: V or T below 1, eos outside the vocabulary, or more than a million strings.

    Example:
        >>> space = all_strings(3, 2)
        >>> [ids.tolist() for ids in space.completions]
        [[0], [1, 0], [2, 0], [1, 1], [1, 2], [2, 1], [2, 2]]
        >>> space.finished.tolist()
        [True, True, True, False, False, False, False]
    """
    if vocab_size < 1 or max_length < 1 or not 0 <= eos < vocab_size:
        raise ValueError(
            f"all_strings: got vocab_size={vocab_size}, max_length={max_length}, eos={eos}; expected both sizes to be "
            "at least 1 and eos to be a token"
        )
    if sum((vocab_size - 1) ** t for t in range(max_length + 1)) > LIMIT:
        raise ValueError(
            f"all_strings: got more than {LIMIT} strings; choose fewer tokens or a shorter length"
        )
    others = [token for token in range(vocab_size) if token != eos]
    prefixes = [prefix for t in range(max_length) for prefix in itertools.product(others, repeat=t)]
    index = {prefix: s for s, prefix in enumerate(prefixes)}
    strings = [(*prefix, eos) for prefix in prefixes] + list(itertools.product(others, repeat=max_length))
    padded = [(*string, *[eos] * (max_length - len(string))) for string in strings]
    chosen_at = [
        [index[string[:t]] if t < len(string) else 0 for t in range(max_length)] for string in strings
    ]
    return Space(
        strings=torch.tensor(padded),
        lengths=torch.tensor([len(string) for string in strings]),
        finished=torch.tensor([string[-1] == eos for string in strings]),
        prefixes=torch.tensor(chosen_at),
        num_prefixes=len(prefixes),
        vocab_size=vocab_size,
        eos=eos,
    )
