"""Proximal objectives, PPO and its kin, from four parts: a ratio, a clip, an aggregation, and the advantage.

P prompts, G draws a prompt, N packed tokens. The draws are some updates old; the ratio of the policy to the one that
drew them (`old`) says how far it has moved since, and the clip ends a token's say where it has moved far enough.

                ratio                  clip              aggregation           advantage (klimb.numbers.advantages)
    ppo         token                  0.2, 0.2          sum over tokens       gae of token rewards, KL in the reward
    grpo        token                  0.2, 0.2          mean a completion     group_standardized
    dr_grpo     token                  0.2, 0.2          sum over tokens       group_centred
    dapo        token                  0.2, 0.28         mean over a group     group_standardized
    gspo        geometric              3e-4, 4e-4        mean a completion     group_standardized
    cispo       token                  capped at 5       mean over a group     group_standardized
    rloo        sequence               none              mean a completion     leave_one_out_advantage, KL in the reward
    reinforce_pp token                 0.2, 0.2          mean a completion     whitened reward to go, KL in the reward

A part is a function, and `functools.partial` sets its options: a row of this table is one line at the end of the file.
Advantages are in units of reward, and so are the values here: not in nats, as those of the divergences are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from klimb.objectives.aggregate import Aggregate, mean_each, mean_over_group, sum_tokens
from klimb.objectives.clip import Clip, capped, clipped, unclipped
from klimb.objectives.kl_penalty import k3
from klimb.objectives.packed import require_packed
from klimb.objectives.ratio import Ratio, geometric_ratio, sequence_ratio, token_ratio


def surrogate(
    token_log_pi: Tensor,
    token_log_old: Tensor,
    row: Tensor,
    lengths: Tensor,
    advantage: Tensor,
    token_log_q: Tensor | None = None,
    token_log_ref: Tensor | None = None,
    *,
    ratio: Ratio = token_ratio,
    clip: Clip = unclipped,
    aggregate: Aggregate = sum_tokens,
    correct: Ratio | None = None,
    penalty: Callable[[Tensor], Tensor] | None = None,
    beta: float = 0.0,
    weigh_penalty: bool = False,
) -> Tensor:
    r"""Minus the advantage that the policy gains over the one that drew, clipped and aggregated; to be minimised.

    $$ \text{aggregate}_t \left[ -w_t \, \text{clip}(\rho_t, A_t) + \beta\, k(\log\pi_t - \log\text{ref}_t) \right],
       \qquad \rho = \pi / \text{old} $$

    Value: no estimate of a divergence. At pi = old it is minus the mean advantage, which is zero for centred ones,
    whatever is left to learn. Gradient, at the first inner step (pi = old), without clip, penalty and standardization:

        token_ratio with sum_tokens, sequence_ratio with mean_each: unbiased for minus the policy gradient of the reward
        that the advantage was made from, for leave-one-out or a critic with lambda = 1; (G-1)/G of it for group_centred;
        the other pairs: biased by length;
        advantages divided by the group's deviation: beta * sd_x in the place of beta, another target.

    At later steps `sequence_ratio` without a clip stays exact for a fixed advantage; the others are proximal: they leave
    out how prefixes became more likely, and stop where the clip does.

    Args:
        token_log_pi: [N] log-probability of each token under the policy, nats; what is differentiated.
        token_log_old: [N] under the policy that drew, as the trainer scored it, nats.
        row: [N] which completion (p * G + g) each token belongs to.
        lengths: [P, G] tokens.
        advantage: [P, G] a completion or [N] a token, in units of reward.
        token_log_q: [N] as the sampler stated it, nats; used by `correct` alone.
        token_log_ref: [N] under the reference, nats; used by `penalty` alone.
        ratio: how far the policy has moved, [N].
        clip: what a token gains by it, [N].
        aggregate: tokens -> one value a prompt.
        correct: weight between sampler and trainer (`importance`); None to believe the sampler.
        penalty: k1, k2 or k3 of each token's log pi - log ref, aggregated with the rest; None for none. As in GRPO:
            not the KL of the sequence, and its `beta` is not the target's (see `klimb.objectives.kl_penalty`).
        beta: of `penalty`, units of reward per nat a token.
        weigh_penalty: multiply `penalty` by the ratio, differentiated too, as TRL 1.16 does by default.

    Returns:
        [P] in units of the advantage.

    Raises:
        ValueError: shapes do not fit, a number is not finite, a ratio overflows, or `correct` or `penalty` lacks its
            numbers.

    Example:
        >>> row, lengths = torch.tensor([0, 0, 1]), torch.tensor([[2, 1]])
        >>> log_old = torch.tensor([0.5, 0.5, 0.25]).log()
        >>> log_pi = log_old.clone().requires_grad_()
        >>> value = surrogate(log_pi, log_old, row, lengths, advantage=torch.tensor([[1.0, -1.0]]))
        >>> value.backward()
        >>> value.tolist(), log_pi.grad.tolist()
        ([-0.5], [-0.5, -0.5, 0.5])

    Source: Kakade, Langford, "Approximately optimal approximate reinforcement learning", 2002; Schulman et al.,
    "Proximal policy optimization algorithms", 2017.

    Not the same as reverse_kl, whose value is a KL and whose weights are never clipped.
    """
    require_packed("surrogate", row, lengths, token_log_pi=token_log_pi, token_log_old=token_log_old)
    if advantage.ndim == 2:
        if advantage.shape != lengths.shape:
            raise ValueError(
                f"surrogate: got advantage of shape {list(advantage.shape)}, expected {list(lengths.shape)} like "
                f"lengths, or {list(row.shape)}: one a token"
            )
        advantage = advantage.flatten()[row]
    advantage = advantage.detach()
    require_packed("surrogate", row, lengths, advantage=advantage)
    moved = ratio(token_log_pi, token_log_old.detach(), row, lengths)
    if not bool(torch.isfinite(moved).all()):
        raise ValueError(
            "surrogate: got an infinite ratio pi / old, expected finite ones: the policy has left the draws behind; "
            "take fewer steps over one batch, or a lower learning rate"
        )
    gain = clip(moved, advantage, token_log_pi)
    if correct is not None:
        if token_log_q is None:
            raise ValueError(
                "surrogate: got no token_log_q, expected what the sampler stated of each token, for `correct`; "
                "leave `correct` out to believe that it drew from token_log_old"
            )
        require_packed("surrogate", row, lengths, token_log_q=token_log_q)
        weight = correct(token_log_old, token_log_q, row, lengths).detach()
        require_packed("surrogate", row, lengths, correction=weight)
        gain = gain * weight
    loss = -gain
    if penalty is not None and beta != 0:
        if token_log_ref is None:
            raise ValueError("surrogate: got no token_log_ref, expected it for `penalty`; or set beta = 0")
        require_packed("surrogate", row, lengths, token_log_ref=token_log_ref)
        each = penalty(token_log_pi - token_log_ref.detach())
        loss = loss + beta * (moved * each if weigh_penalty else each)
    return aggregate(loss, row, lengths)


def token_surrogate(
    token_log_pi: Tensor,
    token_log_old: Tensor,
    row: Tensor,
    lengths: Tensor,
    token_advantage: Tensor,
    token_log_q: Tensor | None = None,
    *,
    ratio: Ratio = token_ratio,
    clip: Clip = unclipped,
    aggregate: Aggregate = sum_tokens,
    correct: Ratio | None = None,
) -> Tensor:
    """`surrogate` for an advantage a token: it asks for token_advantage [N] where that asks for advantage [P, G].

    Value, gradient, shapes, units and errors are those of `surrogate`. For the policy gradient of E[r] - beta KL take
    `sum_tokens` and the advantage of token rewards with the KL in them: reward to go minus anything that the prefix
    determines (a critic however wrong, lambda = 1). With lambda < 1 it is biased by the critic's error.

    Example:
        >>> row, lengths, log_old = torch.tensor([0, 0]), torch.tensor([[2]]), torch.zeros(2)
        >>> token_surrogate(torch.zeros(2), log_old, row, lengths, token_advantage=torch.tensor([1.0, 2.0]))
        tensor([-3.])

    Source: Schulman, Moritz, Levine, Jordan, Abbeel, "High-dimensional continuous control using generalized advantage
    estimation", 2016.
    """
    return surrogate(
        token_log_pi,
        token_log_old,
        row,
        lengths,
        token_advantage,
        token_log_q,
        ratio=ratio,
        clip=clip,
        aggregate=aggregate,
        correct=correct,
    )


ppo = partial(token_surrogate, clip=clipped)
grpo = partial(surrogate, clip=clipped, aggregate=mean_each, penalty=k3)
dr_grpo = partial(surrogate, clip=clipped)
dapo = partial(surrogate, clip=partial(clipped, high=0.28), aggregate=mean_over_group)
gspo = partial(
    surrogate, ratio=geometric_ratio, clip=partial(clipped, low=3e-4, high=4e-4), aggregate=mean_each
)
cispo = partial(surrogate, clip=capped, aggregate=mean_over_group)
rloo = partial(surrogate, ratio=sequence_ratio, aggregate=mean_each)
reinforce_pp = partial(token_surrogate, clip=clipped, aggregate=mean_each)

COMPOSITIONS: Mapping[str, Callable[..., Tensor]] = {
    "ppo": ppo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "rloo": rloo,
    "reinforce_pp": reinforce_pp,
}
