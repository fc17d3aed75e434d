"""A running log Z a prompt, from draws of whatever policy came by, for objectives that need it when there is no plan.

Z = E_q exp(log_w) with log_w = log_target - log_q, whatever law q drew: the draws of the reference, of last week's
policy and of today's are merged by pooling their weights. What is kept is small and fixed: the weights' sums in K
blocks, filled in turn. The blocks are there for the jackknife, which is that of `klimb.numbers.tilt` over blocks in
the place of draws, and the same as long as a prompt has at most K draws.

N prompts in all, P of them at a time, G draws a prompt, K blocks. Nats. Sums are made in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.numbers.tilt import MARGIN, shares


@dataclass(frozen=True, eq=False)
class RunningLogZ:
    """What is remembered of all draws so far.

    Attributes:
        log_sums: [N, K] log of the sum of the weights in each block, nats; -inf while there is none.
        count: [N] draws so far, int64. Draw i (from 0) of a prompt went to block i mod K.
        top: [N] the largest log-weight that a draw of the reference could have had, max r / beta, nats; -inf at first.
    """

    log_sums: Tensor
    count: Tensor
    top: Tensor


def no_draws(num_prompts: int, *, num_blocks: int = 64) -> RunningLogZ:
    """The state before any draw.

    Args:
        num_prompts: N.
        num_blocks: K, at least 2; the jackknife is used from about exp(2.5) = 12 blocks that carry weight.

    Raises:
        ValueError: fewer than one prompt or two blocks.

    Example:
        >>> no_draws(3).count
        tensor([0, 0, 0])
    """
    if num_prompts < 1 or num_blocks < 2:
        raise ValueError(
            f"no_draws: got {num_prompts} prompts and {num_blocks} blocks; expected at least 1 and 2"
        )
    return RunningLogZ(
        log_sums=torch.full((num_prompts, num_blocks), -math.inf, dtype=torch.float64),
        count=torch.zeros(num_prompts, dtype=torch.int64),
        top=torch.full((num_prompts,), -math.inf, dtype=torch.float64),
    )


def add_draws(
    state: RunningLogZ, log_w: Tensor, scaled_reward: Tensor, *, prompts: Tensor | None = None
) -> RunningLogZ:
    """The state after G more draws of some prompts. The state given is left as it is.

    Args:
        state: what is remembered so far.
        log_w: [P, G] log_target - log_q, nats, q the law that drew (for the reference's own draws r / beta); -inf
            where the target forbids.
        scaled_reward: [P, G] r / beta = log_target - log_ref, nats: no log Z is above its maximum.
        prompts: [P] which of the N prompts these are, each once; None for all of them in order.

    Returns:
        A new state.

    Raises:
        ValueError: shapes differ, a prompt is there twice or is not one of the N, NaN or +inf.

    Example:
        >>> state = add_draws(no_draws(1), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]))
        >>> state = add_draws(state, torch.tensor([[2.0]]), torch.tensor([[2.0]]))
        >>> state.count, running_log_z(state, correct=False)  # log((e^0 + e^1 + e^2) / 3)
        (tensor([3]), tensor([1.3090], dtype=torch.float64))
    """
    num_prompts, num_blocks = state.log_sums.shape
    rows = torch.arange(num_prompts) if prompts is None else prompts
    w, r = _checked(log_w, scaled_reward, rows, num_prompts)
    count, old = state.count[rows], state.log_sums[rows]
    block = (count[:, None] + torch.arange(w.shape[1])) % num_blocks
    scale = torch.maximum(old.amax(1), w.amax(1))[:, None]
    scale = torch.where(scale > -math.inf, scale, 0.0)
    total = (old - scale).exp().scatter_add(1, block, (w - scale).exp())
    return RunningLogZ(
        log_sums=state.log_sums.index_copy(0, rows, total.log() + scale),
        count=state.count.index_copy(0, rows, count + w.shape[1]),
        top=state.top.index_copy(0, rows, torch.maximum(state.top[rows], r.amax(1))),
    )


def running_log_z(state: RunningLogZ, *, prompts: Tensor | None = None, correct: bool = True) -> Tensor:
    r"""The log Z of each prompt, from all draws so far.

    $$ L = \log\frac1n \sum_i e^{\log w_i}, \qquad
       K L - \sum_k (1 - \tfrac{n_k}{n}) L_{-k} \quad\text{(jackknife over blocks of } n_k \text{ draws)} $$

    The plug-in L is biased low, by half the relative variance of the mean weight; its exponential is unbiased for Z
    also where the laws that drew were trained on earlier draws. The jackknife removes the first order, and is used
    where the weight is spread over blocks of an entropy of at least MARGIN nats. Never above max r / beta over the
    draws seen. Draws of a policy that has dropped a mode do not show what is missing: the estimate is then low, most
    often, and rarely far too high; draws of the reference in the pool are the remedy.

    Give an objective the estimate from *before* the draws it is asked about. One made of these very draws depends on
    each of them, and biases the gradient by O(1/n).

    Args:
        state: what is remembered.
        prompts: [P] which prompts; None for all.
        correct: jackknife where reliable; False gives the plug-in.

    Returns:
        [P] float64 nats. -inf for a prompt whose draws were all forbidden.

    Raises:
        ValueError: a prompt has no draws yet.

    Example:
        >>> pool = torch.tensor([[0.0, 1.0, 1.0, 2.0]])
        >>> running_log_z(add_draws(no_draws(1), pool, pool))
        tensor([1.2402], dtype=torch.float64)

    Source: Burda, Grosse, Salakhutdinov, 2016, "Importance weighted autoencoders" (the lower bound); Busing, Meijer,
    van der Leeden, 1999, "Delete-m jackknife for unequal m" (the blocks).

    Not the same as a learned log Z, nor as an average of the steps' estimates of log Z, which keeps each step's bias.
    """
    log_sums, count, top = state.log_sums, state.count, state.top
    if prompts is not None:
        log_sums, count, top = log_sums[prompts], count[prompts], top[prompts]
    if (count == 0).any():
        raise ValueError(
            f"running_log_z: got {int((count == 0).sum())} prompt(s) without draws, expected at least one draw of "
            "each: add_draws some of the reference first"
        )
    value = torch.logsumexp(log_sums, 1) - count.double().log()
    if correct:
        s = shares(log_sums)
        reliable = torch.special.entr(s).sum(1) >= MARGIN
        value = value + torch.where(reliable, _jackknife(s, _sizes(count, s.shape[1])), 0.0)
    return torch.minimum(value, top)


def _sizes(count: Tensor, num_blocks: int) -> Tensor:
    """[P, K] the share of the draws in each block, which were filled in turn."""
    first = torch.arange(num_blocks) < (count % num_blocks)[:, None]
    return ((count // num_blocks)[:, None] + first).double() / count[:, None]


def _jackknife(s: Tensor, u: Tensor) -> Tensor:
    # leaving block k out moves L by log(1 - s_k) - log(1 - u_k); one block that has everything is never reliable
    moved = torch.log1p(-s) - torch.log1p(-u)
    return -((1 - u) * torch.where(u < 1, moved, 0.0)).sum(1)


def _checked(
    log_w: Tensor, scaled_reward: Tensor, prompts: Tensor, num_prompts: int
) -> tuple[Tensor, Tensor]:
    if log_w.ndim != 2 or log_w.shape[1] == 0 or log_w.shape != scaled_reward.shape:
        raise ValueError(
            f"add_draws: got log_w of shape {list(log_w.shape)} and scaled_reward of {list(scaled_reward.shape)}; "
            "expected both [P, G] with at least one draw"
        )
    named = prompts.tolist()
    if len(named) != len(log_w) or len(set(named)) != len(named):
        raise ValueError(
            f"add_draws: got {len(log_w)} rows for prompts {named}; expected each prompt once, a row each"
        )
    if not all(0 <= i < num_prompts for i in named):
        raise ValueError(f"add_draws: got prompts {named}, expected numbers from 0 to {num_prompts - 1}")
    for name, x in (("log_w", log_w), ("scaled_reward", scaled_reward)):
        if not (x < math.inf).all():
            bad = int((~(x < math.inf)).sum())
            raise ValueError(
                f"add_draws: got {bad} {name} value(s) that are NaN or +inf; expected finite nats or -inf"
            )
    return log_w.detach().double(), scaled_reward.detach().double()
