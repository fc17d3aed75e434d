"""A model of the same words under other numbers: the rows of its embeddings and of its head in another tokenizer's order.

V tokens of the tokenizer that is to be spoken, V' of the model's own. Token v gets the model's row `numbers[v]`, so that the model
reads and predicts the other's tokens; what it says of tokens that have no number there is left out, and the rest
divided by its sum.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def read_numbers(file: str | Path, *, size: int, own_size: int) -> Tensor:
    """[V] for each token the model's own, from a file of JSON: a list of V numbers.

    Args:
        file: where it is.
        size: V.
        own_size: V'.

    Raises:
        ValueError: no such file, not a list of that many different numbers, or one that the model has no row for.
    """
    try:
        found = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"token_map {file}: {error}; expected a file of JSON, a list of {size} numbers"
        ) from error
    whole = isinstance(found, list) and all(type(x) is int for x in found)
    if not whole or len(found) != size:
        got = f"a list of {len(found)}" if isinstance(found, list) else type(found).__name__
        raise ValueError(f"token_map {file}: got {got}, expected a list of {size} whole numbers, one a token")
    if outside := [x for x in found if not 0 <= x < own_size]:
        raise ValueError(
            f"token_map {file}: got {outside[0]}, expected numbers from 0 to {own_size - 1}, the teacher's tokens"
        )
    if len(set(found)) < size:
        raise ValueError(
            f"token_map {file}: two tokens have the same number, whose probability would count twice"
        )
    return torch.tensor(found)


@torch.no_grad()
def renumber(model: Any, numbers: Tensor) -> None:
    """Put the rows numbers[v] of embeddings and head at v, in place; tied ones stay tied.

    Args:
        model: a transformers causal language model.
        numbers: [V] int64.
    """
    numbers = numbers.to(model.device)
    inside, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = inside.weight is head.weight
    inside.weight = nn.Parameter(inside.weight[numbers], requires_grad=False)
    head.weight = inside.weight if tied else nn.Parameter(head.weight[numbers], requires_grad=False)
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias[numbers], requires_grad=False)
    inside.num_embeddings = head.out_features = len(numbers)
    inside.padding_idx = None
    model.config.get_text_config().vocab_size = len(numbers)
