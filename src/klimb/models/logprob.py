"""Log-probabilities of given tokens from hidden states, without ever holding all logits.

N packed tokens, D hidden width, V vocabulary. Logits of N x V would be the largest tensor of a training step
(2048 tokens of a 49152-word vocabulary: 400 MB in float32, and as much again for its gradient). They are formed for
a few rows at a time and, on a CPU, for one block of the vocabulary at a time, so that a block is still in the
processor's cache when its exponentials are summed: the sum goes on from block to block, rescaled whenever the largest
logit so far grows. Where the head is frozen, the gradient with respect to the hidden state, head[token] - sum_v p_v head[v], grows
along in the same way: the backward pass is one product with a number a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from klimb.models import cpu_kernels
from klimb.models.products import laid_out_product

ROWS = 512
"""hidden states in one product, where all logits of a state are formed at once"""
CPU_ROWS, CPU_VOCABULARY = 512, 1024
"""the same on a CPU, and the tokens of the vocabulary in one block: their logits take 2 MB"""


@dataclass(frozen=True)
class Head:
    """From a hidden state to logits: weight [V, D], bias [V] or None, then `softcap * tanh(logits / softcap)`.

    `scale` multiplies the logits before the cap (Cohere, Granite); 1.0 for most architectures.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, D] -> [n, V] in float32 or wider."""
        return torch.cat([block._logits(hidden) for block in self.blocks()], 1)

    def laid_out(self) -> Callable[[Tensor], Tensor]:
        """`logits` for many calls with few rows each, narrow ones as the product leaves them: on a CPU its weight is laid out once.

        Not differentiable, and not for use after the weight has moved.
        """
        product = laid_out_product(self.weight, self.bias)
        if self.scale == 1.0 and self.softcap is None:
            return product
        return lambda hidden: self._as_logits(product(hidden))

    def blocks(self) -> list[Head]:
        """The head of each block of the vocabulary, in order; a single one where there is no cache to stay in."""
        if self.weight.device.type != "cpu":
            return [self]
        weights = self.weight.split(CPU_VOCABULARY)
        biases = [None] * len(weights) if self.bias is None else self.bias.split(CPU_VOCABULARY)
        return [replace(self, weight=w, bias=b) for w, b in zip(weights, biases, strict=True)]

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._as_logits(torch.nn.functional.linear(hidden, self.weight, self.bias))

    def _as_logits(self, raw: Tensor) -> Tensor:
        raw = raw if raw.dtype == torch.float64 else raw.float()
        raw = raw * self.scale if self.scale != 1.0 else raw
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    @property
    def frozen(self) -> bool:
        """True if neither weight nor bias is trained."""
        return not (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad))


def token_log_prob(hidden: Tensor, head: Head, tokens: Tensor, *, rows: int | None = None) -> Tensor:
    """The log-probability log softmax(head(hidden))[token] of each packed token.

    Args:
        hidden: [N, D] the states that predict the tokens.
        head: the output embedding.
        tokens: [N] int64.
        rows: how many hidden states go through the head together; left out: what suits the device.

    Returns:
        [N] nats, float32 or wider; differentiable in `hidden` and, where it is trained, in the head.

    Example:
        >>> head = Head(torch.eye(3))
        >>> token_log_prob(torch.zeros(1, 3), head, torch.tensor([2])).exp()
        tensor([0.3333])
    """
    tokens = tokens.to(torch.int64).contiguous()
    rows = rows or (CPU_ROWS if hidden.device.type == "cpu" else ROWS)
    if torch.is_grad_enabled() and hidden.requires_grad and head.frozen and head.softcap is None:
        return _FrozenHead.apply(hidden, tokens, head, rows)
    if torch.is_grad_enabled() and not head.frozen and _has_loops(head, hidden):
        return _TrainedHead.apply(hidden, head.weight, head.bias, tokens, rows)
    parts = [_log_prob(head, h, t) for h, t in zip(hidden.split(rows), tokens.split(rows), strict=True)]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _log_prob(head: Head, hidden: Tensor, tokens: Tensor) -> Tensor:
    # the same operations as in _FrozenHead, so that both roads give the same bits
    found = _start(hidden)
    for block in head.blocks():
        step = partial(_after, block, hidden, tokens)
        # differentiated, a block's logits are formed once more in the backward pass instead of being kept
        found = checkpoint(step, found, use_reentrant=False) if torch.is_grad_enabled() else step(found)
    return found.chosen - found.total.log()


@dataclass(frozen=True)
class _Sum:
    """What is known of the softmax of some rows after some blocks of the vocabulary, all [n]."""

    seen: int
    """tokens of the vocabulary gone through"""
    largest: Tensor
    """logit; not differentiated, it cancels"""
    total: Tensor
    """sum of exp(logit - largest)"""
    chosen: Tensor
    """logit of the row's own token, less `largest`; until its block has come, it means nothing"""


def _start(hidden: Tensor) -> _Sum:
    zero = hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
    return _Sum(0, torch.full_like(zero, torch.finfo(zero.dtype).min), zero, zero)


def _after(block: Head, hidden: Tensor, tokens: Tensor, before: _Sum) -> _Sum:
    """One block further."""
    return _further(block, hidden, tokens, before)[0]


def _has_loops(head: Head, hidden: Tensor) -> bool:
    """True where the sums over a block are one compiled loop: of logits that nothing more is done to."""
    return head.scale == 1.0 and head.softcap is None and cpu_kernels.usable(hidden, head.weight)


def _further(
    block: Head, hidden: Tensor, tokens: Tensor, before: _Sum, *, keep: bool = False
) -> tuple[_Sum, Tensor, Tensor]:
    """One block further; also exp(logits - largest) [n, v], if it is to be kept, and what all sums before were multiplied by [n]."""
    if not _has_loops(block, hidden):
        return _onward(before, block._logits(hidden), tokens)
    logits = torch.nn.functional.linear(hidden, block.weight, block.bias).detach()
    largest, total, chosen = before.largest.clone(), before.total.clone(), before.chosen.clone()
    factor = cpu_kernels.absorb(logits, tokens, largest, total, chosen, before.seen, keep=keep)
    return _Sum(before.seen + len(block.weight), largest, total, chosen), logits, factor


def _onward(before: _Sum, logits: Tensor, tokens: Tensor) -> tuple[_Sum, Tensor, Tensor]:
    """One block further; also exp(logits - largest) [n, v], and what all sums before were multiplied by [n]."""
    largest = torch.maximum(before.largest, logits.detach().amax(1))
    shrunk = before.largest - largest
    factor = shrunk.exp()
    logits = logits - largest[:, None]
    column = tokens - before.seen
    here = (column >= 0) & (column < logits.shape[1])
    own = logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    mass = logits.exp() if logits.requires_grad else logits.exp_()
    total = before.total * factor + mass.sum(1)
    chosen = torch.where(here, own, before.chosen + shrunk)
    return _Sum(before.seen + logits.shape[1], largest, total, chosen), mass, factor


class _FrozenHead(torch.autograd.Function):
    """token_log_prob where only `hidden` is differentiated: its gradient is formed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, tokens: Tensor, head: Head, rows: int) -> Tensor:
        values, gradient = [], torch.empty_like(hidden)
        blocks = head.blocks()
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            states, ids = hidden[piece], tokens[piece]
            found = _start(states)
            mean = found.total.new_zeros(states.shape)  # sum of mass times the head's rows
            for block in blocks:
                found, mass, factor = _further(block, states, ids, found, keep=True)
                mean = mean.mul_(factor[:, None]).add_(mass.to(head.weight.dtype) @ block.weight)
            values.append(found.chosen - found.total.log())
            mean.div_(found.total[:, None])
            gradient[piece] = (head.weight[ids].to(mean.dtype) - mean).mul_(head.scale)
        ctx.save_for_backward(gradient)
        return torch.cat(values) if values else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable  # the gradient below is a constant: a second derivative would be zero, and wrong
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None


class _TrainedHead(torch.autograd.Function):
    """token_log_prob where the head is differentiated too, by compiled loops: a block's logits are formed once more going back."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, rows: int
    ) -> Tensor:
        values, levels = [hidden.new_zeros(0, dtype=torch.float32)], []
        for states, ids in zip(hidden.split(rows), tokens.split(rows), strict=True):
            found = _start(states)
            for block in Head(weight, bias).blocks():
                found = _after(block, states, ids, found)
            values.append(found.chosen - found.total.log())
            levels.append(found.largest + found.total.log())
        ctx.save_for_backward(hidden, weight, bias, tokens, *levels)
        ctx.rows = rows
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        hidden, weight, bias, tokens, *levels = ctx.saved_tensors
        to_hidden, to_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        to_bias = None if bias is None else torch.zeros_like(bias)
        for i, level in enumerate(levels):
            piece, seen = slice(i * ctx.rows, (i + 1) * ctx.rows), 0
            states, ids, g = hidden[piece], tokens[piece], upstream[piece, None]
            grown = torch.zeros_like(states, dtype=level.dtype)
            for block in Head(weight, bias).blocks():
                here = slice(seen, seen := seen + len(block.weight))
                inner = (block._logits(states) - level[:, None]).exp_().mul_(-g)
                own = (ids >= here.start) & (ids < here.stop)
                inner[own, ids[own] - here.start] += g[own, 0]
                inner = inner.to(weight.dtype)
                grown += inner @ block.weight
                to_weight[here] += inner.t() @ states
                if to_bias is not None:
                    to_bias[here] += inner.sum(0)
            to_hidden[piece] = grown
        return to_hidden, to_weight, to_bias, None, None
