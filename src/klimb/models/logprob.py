"""Log-probabilities of given tokens from hidden states, without ever holding all logits.

N packed tokens, D hidden width, V vocabulary. Logits of N x V would be the largest tensor of a training step
(2048 tokens of a 49152-word vocabulary: 400 MB in float32, and as much again for its gradient), so they are formed
about 128 rows at a time. Where the head is frozen, the gradient with respect to the hidden state,
head[token] - sum_v p_v head[v], is formed while those logits are at hand: the backward pass is one product with a
number a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

ROWS = 128
VOCABULARY = 2048
"""tokens of the vocabulary in one product on a CPU: one product over all of them leaves the cache"""


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
        raw = self._raw(hidden)
        raw = raw if raw.dtype == torch.float64 else raw.float()
        raw = raw * self.scale if self.scale != 1.0 else raw
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    def _raw(self, hidden: Tensor) -> Tensor:
        if hidden.device.type != "cpu":
            return torch.nn.functional.linear(hidden, self.weight, self.bias)
        weights = self.weight.split(VOCABULARY)
        biases = [None] * len(weights) if self.bias is None else self.bias.split(VOCABULARY)
        return torch.cat(
            [torch.nn.functional.linear(hidden, w, b) for w, b in zip(weights, biases, strict=True)], 1
        )

    @property
    def frozen(self) -> bool:
        """True if neither weight nor bias is trained."""
        return not (self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad))


def token_log_prob(hidden: Tensor, head: Head, tokens: Tensor, *, rows: int = ROWS) -> Tensor:
    """The log-probability log softmax(head(hidden))[token] of each packed token.

    Args:
        hidden: [N, D] the states that predict the tokens.
        head: the output embedding.
        tokens: [N] int64.
        rows: how many logit rows are held at a time.

    Returns:
        [N] nats, float32 or wider; differentiable in `hidden` and, where it is trained, in the head.

    Example:
        >>> head = Head(torch.eye(3))
        >>> token_log_prob(torch.zeros(1, 3), head, torch.tensor([2])).exp()
        tensor([0.3333])
    """
    wants_grad = torch.is_grad_enabled() and (hidden.requires_grad or not head.frozen)
    if not wants_grad:
        return _by_rows(lambda h, t: _log_prob(head, h, t), hidden, tokens, rows)
    if head.frozen and head.softcap is None:
        return _FrozenHead.apply(hidden, tokens, head, rows)
    return _by_rows(
        lambda h, t: checkpoint(lambda a, b: _log_prob(head, a, b), h, t, use_reentrant=False),
        hidden,
        tokens,
        rows,
    )


def _log_prob(head: Head, hidden: Tensor, tokens: Tensor) -> Tensor:
    # the same operations as in _FrozenHead, so that both roads give the same bits
    logits = head.logits(hidden)
    logits = logits - logits.detach().amax(1, keepdim=True)
    return logits.gather(1, tokens[:, None])[:, 0] - logits.exp().sum(1).log()


def _by_rows(
    function: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, tokens: Tensor, rows: int
) -> Tensor:
    parts = [function(h, t) for h, t in zip(hidden.split(rows), tokens.split(rows), strict=True)]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


class _FrozenHead(torch.autograd.Function):
    """token_log_prob where only `hidden` is differentiated: its gradient is formed in the forward pass."""

    @staticmethod
    def forward(ctx, hidden: Tensor, tokens: Tensor, head: Head, rows: int) -> Tensor:
        values, gradient = [], torch.empty_like(hidden)
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            logits = head.logits(hidden[piece])
            logits -= logits.amax(1, keepdim=True)
            chosen = logits.gather(1, tokens[piece, None])[:, 0]
            total = logits.exp_().sum(1)
            values.append(chosen - total.log())
            minus_p = logits.div_(-total[:, None])
            minus_p.scatter_add_(1, tokens[piece, None], torch.ones_like(chosen)[:, None])
            gradient[piece] = (minus_p.to(head.weight.dtype) @ head.weight) * head.scale
        ctx.save_for_backward(gradient)
        return torch.cat(values) if values else hidden.new_zeros(0, dtype=torch.float32)

    @staticmethod
    @once_differentiable  # the gradient below is a constant: a second derivative would be zero, and wrong
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None, None, None
