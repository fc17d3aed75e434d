"""Attention of packed tokens by the compiled loops of a CPU, in bfloat16, in memory that grows with the tokens and not with their pairs.

N packed tokens: those of P prompts first, then those of their P x G completions, as in `klimb.models.shared_attention`, to which this is what
`klimb.models.fused_attention` is on a GPU: the same softmax over a prompt where it lies and over a completion's own tokens. Products are
of bfloat16, their sums in float32; weights and their gradients are rounded to bfloat16 before they are multiplied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from klimb.models import cpu_kernels
from klimb.models.cpu_kernels import Sequences


@dataclass(frozen=True)
class Seen:
    """What the backward pass wants of the forward pass: what went in, and [N, H] the log of the sum of the weights."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_sum: Tensor


def is_tiled(device: torch.device, dtype: torch.dtype) -> bool:
    """True where there are loops for this dtype."""
    return device.type == "cpu" and dtype == torch.bfloat16 and cpu_kernels.attends()


def laid_out(
    prompts: Sequence[int], rows: Sequence[Sequence[int]], *, device: torch.device | str = "cpu"
) -> Sequences:
    """Where prompts [P] and completions [P][G] of so many tokens lie."""
    lengths = torch.tensor([*prompts, *(n for row in rows for n in row)], device=device)
    return Sequences(len(prompts), len(rows[0]), lengths.cumsum(0) - lengths, lengths)


def attend(
    query: Tensor, key: Tensor, value: Tensor, where: Sequences, scale: float
) -> tuple[Tensor, list[Seen]]:
    """Attention [N, H, w] of every packed token, and what `attend_backward` wants.

    Args:
        query: [N, H, w].
        key: [N, K, w].
        value: [N, K, w].
        where: the tokens lie.
        scale: what products of query and key are multiplied by.
    """
    out, log_sum = cpu_kernels.attend_packed(query, key, value, where, scale)
    return out, [Seen(query, key, value, log_sum)]


def attend_backward(
    upstream: Tensor, out: Tensor, seen: Sequence[Seen], where: Sequences, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients [N, H, w], [N, K, w], [N, K, w] of query, key and value.

    Args:
        upstream: [N, H, w] the gradient of what `attend` gave.
        out: [N, H, w] what it gave.
        seen: what it saw.
        where: the tokens lie.
        scale: as before.
    """
    (own,) = seen
    return cpu_kernels.attend_packed_backward(
        upstream, out, own.query, own.key, own.value, own.log_sum, where, scale
    )


def of_prompts(seen: Sequence[Seen], where: Sequences) -> tuple[Tensor, Tensor]:
    """Keys and values [P, K, L, w] of the prompts, which stand on the left."""
    lengths = where.length[: where.prompts].tolist()
    key, value = (
        pad_sequence(list(x[: sum(lengths)].split(lengths)), batch_first=True).transpose(1, 2)
        for x in (seen[0].key, seen[0].value)
    )
    return key, value
