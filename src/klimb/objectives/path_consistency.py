"""Trajectory balance at every token: a learned log Z for each prefix, and a residual for each suffix.

P prompts, G draws a prompt, N packed tokens, T tokens of the longest completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klimb.objectives.require import require_finite


def path_consistency(
    token_log_pi: Tensor,
    token_log_ref: Tensor,
    values: Tensor,
    log_target: Tensor,
    row: Tensor,
    *,
    span: int | None = None,
) -> Tensor:
    r"""Half the sum over tokens of the squared inconsistency of values and policy, mean over draws.

    $$ \frac{1}{2 G} \sum_g \sum_t (A_t - A_{t+d})^2, \qquad
       A_t = V_t - \Big(\log\text{target} - \sum_{s<t} \log\text{ref}_s - \sum_{s \ge t} \log\pi_s\Big) $$

    A_t compares the value of the prefix before token t with the residual of the policy that follows ref up to there:
    V_t = r / beta - sum_{s>=t} log(pi_s / ref_s). A is zero after the last token, so the reward enters at the end. With
    span = d the d tokens from t on are compared, V_t - V_{t+d} = -sum log(pi_s / ref_s) (+ r / beta where they reach
    the end); without it the whole suffix, from every token.

    Value: unbiased for the expectation of this under the law q that drew. Gradient: unbiased for that of this
    expectation with q held fixed, in token_log_pi and in values. It is zero for every q of full support only at pi = p
    and the soft values V = log E_ref[exp(r / beta) | prefix], where it has no variance either. For fresh draws of the
    policy and whole suffixes the gradient in token_log_pi is, whatever the values are, sum_t of the gradient of
    KL(pi||p) for what follows the prefix at t, the prefixes held as drawn; t = 0 is the KL(pi||p) of sequences.

    Args:
        token_log_pi: [N] log-probability of each token under the policy, nats; what is differentiated.
        token_log_ref: [N] the same under the reference, nats. Detached.
        values: [N] the learned V of the prefix before each token, nats (reward / beta); differentiated. The first of a
            completion is the log Z of its prompt.
        log_target: [P, G] log ref + r / beta, unnormalised, nats, by this same reference. Detached.
        row: [N] the completion p * G + g of each token, in order.
        span: d tokens; None for the whole suffix.

    Returns:
        [P] nats squared, summed over tokens: a completion of T tokens counts T times that of one.

    Raises:
        ValueError: row is not in order or misses a completion, span is below 1, log_target is -inf for a draw (forward_kl
            takes that), a number is NaN or infinite, or shapes differ.

    Example: one token, so trajectory balance with values for log_z.
        >>> import torch
        >>> log_pi = torch.tensor([0.5, 0.5]).log()
        >>> log_target = log_pi[None] + torch.tensor([[1.0, 0.0]])
        >>> path_consistency(log_pi, log_pi, torch.zeros(2), log_target, row=torch.tensor([0, 1]))
        tensor([0.2500])

    Source: Nachum, Norouzi, Xu, Schuurmans, "Bridging the gap between value and policy based reinforcement learning",
    2017; here with the KL to a reference for the entropy, and without a discount.

    Not the same as a critic's regression: the value here is the soft one, log E exp and not E, at the same beta.
    """
    apart = _inconsistency(token_log_pi, token_log_ref, values, log_target, row)
    if span is not None:
        if span < 1:
            raise ValueError(
                f"path_consistency: got span = {span}, expected at least 1 token, or None for all"
            )
        later = torch.zeros_like(apart)
        later[:, :-span] = apart[:, span:]
        apart = apart - later
    return apart.square().sum(1).reshape(log_target.shape).mean(1) / 2


def _inconsistency(
    token_log_pi: Tensor, token_log_ref: Tensor, values: Tensor, log_target: Tensor, row: Tensor
) -> Tensor:
    """A of `path_consistency`, [P * G, T], 0 at the padding."""
    require_finite("path_consistency", log_target=log_target)
    for name, x in (("token_log_pi", token_log_pi), ("token_log_ref", token_log_ref), ("values", values)):
        if x.shape != row.shape or row.ndim != 1:
            raise ValueError(
                f"path_consistency: got {name} of shape {list(x.shape)}, expected {list(row.shape)} like row: one number "
                "a packed token"
            )
        if not x.isfinite().all():
            raise ValueError(f"path_consistency: got {name} with NaN or infinity, expected finite nats")
    num_completions = log_target.numel()
    lengths = torch.bincount(row, minlength=num_completions)
    if (row.diff() < 0).any() or len(lengths) != num_completions or not lengths.all():
        raise ValueError(
            f"path_consistency: got a row that is not 0, ..., {num_completions - 1} in order with a token for each; "
            "expected the packed tokens of one completion after another"
        )
    position = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]

    def dense(x: Tensor) -> Tensor:
        return x.new_zeros(num_completions, int(lengths.max())).index_put((row, position), x)

    ref = dense(token_log_ref.detach())
    before = ref.cumsum(1) - ref
    after = dense(token_log_pi).flip(1).cumsum(1).flip(1)
    inconsistency = dense(values) - (log_target.detach().reshape(-1, 1) - before - after)
    return inconsistency * dense(torch.ones_like(values.detach()))
