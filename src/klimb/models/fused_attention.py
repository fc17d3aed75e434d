"""Attention of packed tokens by the fused kernels of a GPU, in memory that grows with the tokens and not with their pairs.

N packed tokens: those of P prompts first, then those of their P x G completions, as in `klimb.models.shared_attention`; H query
heads, K heads of keys and values, w wide. Prompts run over themselves; completions run over themselves, and all those of a
prompt over it, where it lies. These last two are halves of one softmax. With s1 and s2 the logs of the halves' sums

    out = sigmoid(s1 - s2) out1 + sigmoid(s2 - s1) out2,    log_sum = log(e^s1 + e^s2)

and a kernel that is told `out` and `log_sum` of the whole gives its own half of the gradients.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Run:
    """S sequences of queries, each over a sequence of keys.

    Attributes:
        queries: [S + 1] int32 where each sequence of queries begins, and where the last ends.
        keys: likewise of keys.
        longest_query: tokens of the longest sequence of queries.
        longest_key: likewise of keys.
        causal: whether a query sees no key after it.
        used: [S] int32 how many of its keys each sequence has by now, or None for all of them.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int
    causal: bool
    used: Tensor | None = None


@dataclass(frozen=True)
class Runs:
    """Where the packed tokens lie.

    Attributes:
        prompts: over themselves.
        own: completions over themselves, or None where no completion has a token that predicts.
        shared: all completions of a prompt over it, likewise.
        num_prompt_tokens: of all prompts.
    """

    prompts: Run
    own: Run | None
    shared: Run | None
    num_prompt_tokens: int


@dataclass(frozen=True)
class Seen:
    """What the backward pass wants of a part's forward pass: what went in, and [H, n] the log of the sum of the weights."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_sum: Tensor


def is_fused(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """True where there are kernels for heads so wide in this dtype."""
    return (
        device.type == "cuda"
        and dtype in HALF
        and width % 8 == 0
        and width <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def laid_out(
    prompts: Sequence[int], rows: Sequence[Sequence[int]], *, device: torch.device | str = "cpu"
) -> Runs:
    """The runs of prompts [P] and completions [P][G] of so many tokens."""
    of_prompts = starts(prompts, device)
    longest = max(prompts)
    prompt = Run(of_prompts, of_prompts, longest, longest, True)
    lengths = [n for row in rows for n in row]
    most = max(lengths, default=0)
    if most == 0:
        return Runs(prompt, None, None, sum(prompts))
    of_rows, groups = starts(lengths, device), [sum(row) for row in rows]
    return Runs(
        prompt,
        Run(of_rows, of_rows, most, most, True),
        Run(starts(groups, device), of_prompts, max(groups), longest, False),
        sum(prompts),
    )


def starts(lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """[S + 1] int32 where sequences of these lengths begin, and where the last ends."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def attend(query: Tensor, key: Tensor, value: Tensor, runs: Runs, scale: float) -> tuple[Tensor, list[Seen]]:
    """Attention [N, H, w] of every packed token, and of each part what `attend_backward` wants.

    Args:
        query: [N, H, w].
        key: [N, K, w].
        value: [N, K, w].
        runs: where the tokens lie.
        scale: what products of query and key are multiplied by.
    """
    n = runs.num_prompt_tokens
    asked, said = query[:n], (key[:n], value[:n])
    of_prompts, log_sum = run_forward(runs.prompts, asked, *said, scale)
    seen = [Seen(asked, *said, log_sum)]
    if runs.own is None or runs.shared is None:
        return of_prompts, seen
    asked, own = query[n:], (key[n:], value[n:])
    halves = run_forward(runs.own, asked, *own, scale), run_forward(runs.shared, asked, *said, scale)
    log_sum = torch.logaddexp(halves[0][1], halves[1][1])
    return torch.cat([of_prompts, merged(*halves)]), [*seen, Seen(asked, *own, log_sum)]


def attend_backward(
    upstream: Tensor, out: Tensor, seen: Sequence[Seen], runs: Runs, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients [N, H, w], [N, K, w], [N, K, w] of query, key and value.

    Args:
        upstream: [N, H, w] the gradient of what `attend` gave.
        out: [N, H, w] what it gave.
        seen: what it saw.
        runs: where the tokens lie.
        scale: as before.
    """
    n, prompt = runs.num_prompt_tokens, seen[0]
    said = (prompt.key, prompt.value)
    first = run_backward(runs.prompts, upstream[:n], prompt.query, *said, out[:n], prompt.log_sum, scale)
    if runs.own is None or runs.shared is None:
        return first
    own, (g, result) = seen[1], (upstream[n:], out[n:])
    to_query, to_key, to_value = run_backward(
        runs.own, g, own.query, own.key, own.value, result, own.log_sum, scale
    )
    from_query, from_key, from_value = run_backward(
        runs.shared, g, own.query, *said, result, own.log_sum, scale
    )
    return (
        torch.cat([first[0], to_query.add_(from_query)]),
        torch.cat([first[1].add_(from_key), to_key]),
        torch.cat([first[2].add_(from_value), to_value]),
    )


def merged(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> Tensor:
    """[n, H, w] two halves of a softmax, each [n, H, w] with the log of its sum [H, n], as one."""
    (out, log_sum), (out_other, log_other) = one, other
    share = torch.sigmoid(log_sum - log_other).t()[..., None]
    return torch.lerp(out_other.to(share.dtype), out.to(share.dtype), share).to(out.dtype)


def run_forward(run: Run, query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[n, H, w] attention of a run's queries [n, H, w] over its keys and values [m, K, w], and [H, n] the logs of its sums."""
    out, log_sum, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        run.queries,
        run.keys,
        run.longest_query,
        run.longest_key,
        0.0,
        run.causal,
        False,
        scale=scale,
        seqused_k=run.used,
    )
    return out, log_sum


def run_backward(
    run: Run,
    upstream: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """A run's part of the gradients of query, key and value, given what the whole softmax came to."""
    unused = torch.empty(
        2, dtype=torch.uint64, device=query.device
    )  # the state of dropout, of which there is none
    with _in_order():
        return torch.ops.aten._flash_attention_backward(
            upstream,
            query,
            key,
            value,
            out,
            log_sum,
            run.queries,
            run.keys,
            run.longest_query,
            run.longest_key,
            0.0,
            run.causal,
            unused,
            unused[:1],
            scale=scale,
        )


@contextmanager
def _in_order() -> Generator[None]:
    """Sums in a fixed order, so that a run that is resumed comes to the same numbers."""
    before, only_warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warn)
