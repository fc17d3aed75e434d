"""Policies that can be anything: one row of logits a prefix (autoregressive), or one logit an outcome (categorical).

The parameters are a plain tensor, the policy is a function of it. Every law over the space is one of these, so here
the family always holds the target.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klimb.exact.space import Space


def random_logits(
    *shape: int, generator: torch.Generator, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Normal logits of any shape: [S, V] for a table over strings, [K] for K atoms.

    Example:
        >>> random_logits(2, 3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3])
    """
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def categorical(logits: Tensor) -> Tensor:
    """Log-probabilities of K atoms, [..., K] -> [..., K] nats; differentiable.

    Example:
        >>> categorical(torch.zeros(4)).exp().tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    return torch.log_softmax(logits, -1)


def token_log_prob(table: Tensor, space: Space) -> Tensor:
    """Log-probability of each token given its prefix, for each string.

    Args:
        table: [S, V] logits, a row a prefix.
        space: what the rows belong to.

    Returns:
        [Y, T] nats, 0 at the padding; differentiable.

    Raises:
        ValueError: the table is not [S, V].

    Example:
        >>> from klimb.exact import all_strings
        >>> token_log_prob(torch.zeros(3, 3), all_strings(3, 2))[0].exp()  # "end", and a padding
        tensor([0.3333, 1.0000])
    """
    if table.shape != (space.num_prefixes, space.vocab_size):
        raise ValueError(
            f"token_log_prob: got a table {list(table.shape)}, expected {[space.num_prefixes, space.vocab_size]}: "
            "prefixes, vocabulary"
        )
    return torch.log_softmax(table, -1)[space.prefixes, space.strings].masked_fill(~space.mask, 0.0)


def log_prob(table: Tensor, space: Space) -> Tensor:
    """Log-probability of every string, [S, V] -> [Y] nats; differentiable. They sum to one.

    Example:
        >>> from klimb.exact import all_strings
        >>> round(log_prob(torch.zeros(3, 3), all_strings(3, 2)).exp().sum().item(), 6)
        1.0
    """
    return token_log_prob(table, space).sum(1)


def table_of(log_p: Tensor, space: Space) -> Tensor:
    """The table of any law over the space: pi(token | prefix) = mass through both / mass through the prefix.

    Args:
        log_p: [Y] nats; -inf where a string cannot be.
        space: the strings.

    Returns:
        [S, V] log-probabilities. At a prefix that cannot be reached every row would do: it is the uniform one.

    Example:
        >>> from klimb.exact import all_strings
        >>> space = all_strings(3, 2)
        >>> law = categorical(torch.arange(7.0))
        >>> torch.allclose(law, log_prob(table_of(law, space), space))
        True
    """
    prob = log_p.exp()[:, None].expand(space.strings.shape)
    mass = torch.zeros(space.num_prefixes, space.vocab_size, dtype=prob.dtype)
    mass.index_put_(
        (space.prefixes[space.mask], space.strings[space.mask]), prob[space.mask], accumulate=True
    )
    through = mass.sum(1, keepdim=True)
    return (
        torch.where(through > 0, mass, 1.0).log() - torch.where(through > 0, through, space.vocab_size).log()
    )


def draw(log_q: Tensor, num_draws: int, *, num_prompts: int = 1, generator: torch.Generator) -> Tensor:
    """Independent draws from a law over Y outcomes: [Y] -> indices [P, G].

    Example:
        >>> draw(torch.tensor([0.0, -torch.inf]), 3, generator=torch.Generator().manual_seed(0))
        tensor([[0, 0, 0]])
    """
    flat = torch.multinomial(log_q.exp(), num_prompts * num_draws, replacement=True, generator=generator)
    return flat.reshape(num_prompts, num_draws)
