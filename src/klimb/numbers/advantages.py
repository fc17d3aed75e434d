"""Advantages: how much better a draw was than expected, by completion or by token.

P prompts, G draws a prompt, N packed tokens: prompt by prompt, draw by draw. Rewards, values and advantages are in units
of reward. An advantage reward - b keeps the policy gradient unbiased if b does not depend on the draw; what is said
of bias below is said of that gradient. Nothing here is differentiated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klimb.numbers.baselines import leave_one_out
from klimb.objectives.kl_penalty import Estimator, k1, kl_reward


def leave_one_out_advantage(reward: Tensor) -> Tensor:
    """The reward minus the mean of the other draws' (RLOO); unbiased.

    A[p, i] = r[p, i] - (sum_j r[p, j] - r[p, i]) / (G - 1)

    Args:
        reward: [P, G].

    Returns:
        [P, G]; sums to zero in every group.

    Raises:
        ValueError: G < 2, or a reward is not finite.

    Example:
        >>> leave_one_out_advantage(torch.tensor([[1.0, 2.0, 6.0]]))
        tensor([[-3.0000, -1.5000,  4.5000]])

    Source: Ahmadian et al., 2024, "Back to basics".
    """
    _require_rewards("leave_one_out_advantage", reward)
    return reward - leave_one_out(reward)


def group_centred(reward: Tensor) -> Tensor:
    """The reward minus the group's mean (Dr. GRPO): (G - 1) / G of the leave-one-out advantage, exactly.

    A[p, i] = r[p, i] - mean_j r[p, j]

    The mean contains draw i, so the gradient is short by (G - 1) / G in length and unbiased in direction.

    Args:
        reward: [P, G].

    Returns:
        [P, G]; sums to zero in every group.

    Raises:
        ValueError: G < 2, or a reward is not finite.

    Example:
        >>> group_centred(torch.tensor([[1.0, 2.0, 6.0]]))
        tensor([[-2., -1.,  3.]])

    Source: Liu et al., 2025, "Understanding R1-Zero-like training: a critical perspective".
    """
    _require_rewards("group_centred", reward)
    return reward - reward.mean(1, keepdim=True)


def group_standardized(reward: Tensor, *, epsilon: float = 1e-4) -> Tensor:
    """Centred and divided by the group's standard deviation (GRPO); biased.

    A = (r - mean r) / (sd r + epsilon), sd with divisor G - 1

    Each prompt gets its own scale 1 / sd_x, which moves as the policy does: with a KL penalty the prompt's beta is in
    effect beta * sd_x, another target. For rewards of two values it keeps the direction of each prompt's gradient and changes
    only how much prompts count (with G of 2 or 3 not even that); for more values it changes the direction too.

    Args:
        reward: [P, G].
        epsilon: added to the deviation, units of reward.

    Returns:
        [P, G], no unit; zero in a group without spread.

    Raises:
        ValueError: G < 2, or a reward is not finite.

    Example:
        >>> group_standardized(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]), epsilon=0)
        Traceback (most recent call last):
        ValueError: group_standardized: got epsilon = 0, expected more than 0: a group without spread has deviation 0
        >>> group_standardized(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]))
        tensor([[-0.9999,  0.0000,  0.9999],
                [ 0.0000,  0.0000,  0.0000]])

    Source: Shao et al., 2024, "DeepSeekMath". Divisor and epsilon are those of TRL's GRPO.
    Not the same as a divisor of G (numpy's default), which makes each group larger by sqrt(G / (G - 1)).
    """
    _require_rewards("group_standardized", reward, epsilon=epsilon)
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + epsilon)


def batch_standardized(reward: Tensor, *, epsilon: float = 1e-4) -> Tensor:
    """Centred by group, divided by the standard deviation of all rewards of the batch; nearly unbiased in direction.

    A = (r - group mean) / (sd of all P G rewards + epsilon)

    One scale for all prompts, so beta stays one number; the deviation still contains the draw itself, which is a bias of
    order 1 / (P G).

    Args:
        reward: [P, G].
        epsilon: added to the deviation, units of reward.

    Returns:
        [P, G], no unit.

    Raises:
        ValueError: G < 2, or a reward is not finite.

    Example:
        >>> batch_standardized(torch.tensor([[0.0, 2.0], [4.0, 6.0]]))
        tensor([[-0.3873,  0.3873],
                [-0.3873,  0.3873]])

    Source: Hu, 2025, "REINFORCE++" (with a baseline); as TRL's scale_rewards="batch".
    """
    _require_rewards("batch_standardized", reward, epsilon=epsilon)
    return (reward - reward.mean(1, keepdim=True)) / (reward.std() + epsilon)


def whiten(x: Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8) -> Tensor:
    """Centred by the mean of all its entries and divided by their standard deviation.

    Over very many draws a baseline and a scale, which change no direction; over few both know the draw, and the
    gradient is biased.

    (x - mean x) / sqrt(var x + epsilon), var with divisor n - 1; without `shift_mean` the mean is added again.

    Args:
        x: any shape, at least two entries: advantages [N] of all tokens (PPO, REINFORCE++).
        shift_mean: whether the mean is removed.
        epsilon: added to the variance.

    Returns:
        The same shape, no unit.

    Raises:
        ValueError: fewer than two entries, or one is not finite.

    Example:
        >>> whiten(torch.tensor([1.0, 2.0, 3.0]))
        tensor([-1.,  0.,  1.])

    Source: Andrychowicz et al., 2021, "What matters in on-policy reinforcement learning?".
    """
    if x.numel() < 2 or not bool(torch.isfinite(x).all()):
        raise ValueError(f"whiten: got {x.numel()} numbers, expected at least 2 and all of them finite")
    mean = x.mean()
    white = (x - mean) * torch.rsqrt(x.var() + epsilon)
    return white if shift_mean else white + mean


def reward_less_kl(
    reward: Tensor, log_old: Tensor, log_ref: Tensor, beta: Tensor | float, *, estimator: Estimator = k1
) -> Tensor:
    """The reward with the KL penalty in it, by k1 of the whole completion.

    R = r - beta k(log old - log ref)

    Its mean under `old` is E[r] - beta KL(old||ref), unbiased, and at old = p it is the constant beta log Z: what is
    left of a draw after a baseline is then exactly nothing.

    Args:
        reward: [P, G].
        log_old: [P, G] log-probability under the policy that drew, nats.
        log_ref: [P, G] under the reference, nats.
        beta: units of reward per nat.
        estimator: k1; k2 and k3 penalise something else (`klimb.objectives.kl_penalty.CELLS`).

    Returns:
        [P, G] units of reward.

    Example:
        >>> reward_less_kl(torch.tensor([[1.0]]), torch.tensor([[-1.0]]), torch.tensor([[-3.0]]), 0.1)
        tensor([[0.8000]])

    Source: Ziegler et al., 2019, "Fine-tuning language models from human preferences".
    """
    return (reward + kl_reward(log_old, log_ref, beta=beta, estimator=estimator)).detach()


def token_reward(
    reward: Tensor, token_log_old: Tensor, token_log_ref: Tensor, lengths: Tensor, beta: Tensor | float
) -> Tensor:
    """The reward at a completion's last token, and the KL penalty at every token.

    r_t = -beta (log old_t - log ref_t) + [t is the last token] r

    Summed over a completion it is r - beta log(old / ref), whose mean is E[r] - beta KL(old||ref): unbiased, since
    each token has its k1. With k2 or k3 in its place it would not be (`klimb.objectives.kl_penalty`).

    Args:
        reward: [P, G].
        token_log_old: [N] log-probability of each token under the policy that drew, nats.
        token_log_ref: [N] under the reference, nats.
        lengths: [P, G] tokens.
        beta: units of reward per nat.

    Returns:
        [N] units of reward.

    Raises:
        ValueError: shapes do not fit, or a number is not finite.

    Example:
        >>> old, ref = torch.tensor([-1.0, -1.0, -2.0]), torch.tensor([-2.0, -2.0, -2.0])
        >>> token_reward(torch.tensor([[5.0, 7.0]]), old, ref, torch.tensor([[2, 1]]), beta=0.5)
        tensor([-0.5000,  4.5000,  7.0000])

    Source: Ziegler et al., 2019, "Fine-tuning language models from human preferences".
    """
    _require_packed("token_reward", lengths, token_log_old=token_log_old, token_log_ref=token_log_ref)
    if reward.shape != lengths.shape or not bool(torch.isfinite(reward).all()):
        raise ValueError(
            f"token_reward: got reward of shape {list(reward.shape)}, expected finite ones of {list(lengths.shape)}"
        )
    penalty = -beta * (token_log_old - token_log_ref).detach()
    last = lengths.flatten().cumsum(0) - 1
    return penalty.index_add(0, last.to(penalty.device), reward.detach().flatten().to(penalty))


def gae(
    token_reward: Tensor, values: Tensor, lengths: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: how much better each token was than the critic expected of its prefix.

    A_t = delta_t + gamma lam A_{t+1},  delta_t = r_t + gamma V_{t+1} - V_t,  both zero after the last token

    A completion's last token is terminal, whether it ended by itself or was cut: both are whole strings of the space.
    With gamma = lam = 1 it is the reward to go minus V_t, unbiased however wrong the critic is, as V_t does not know
    token t. With lam < 1 it is biased by the critic's error, and has less variance; with gamma < 1 it is the advantage
    of another objective. All-zero values with lam = 1 give the plain reward to go.

    Args:
        token_reward: [N].
        values: [N] the critic's value of the prefix before each token.
        lengths: [P, G] tokens.
        gamma: discount a token.
        lam: lambda; 0 trusts the critic one token ahead, 1 does not trust it at all.

    Returns:
        Advantages [N], and returns [N] = advantages + values, which the critic is to learn.

    Raises:
        ValueError: shapes do not fit, a number is not finite, or gamma or lam is outside [0, 1].

    Example:
        >>> rewards, values, lengths = torch.tensor([0.0, 1.0, 5.0]), torch.tensor([0.5, 0.5, 4.0]), torch.tensor([[2, 1]])
        >>> gae(rewards, values, lengths, lam=1.0)
        (tensor([0.5000, 0.5000, 1.0000]), tensor([1., 1., 5.]))
        >>> gae(rewards, values, lengths, lam=0.0)[0]
        tensor([0.0000, 0.5000, 1.0000])

    Source: Schulman, Moritz, Levine, Jordan, Abbeel, 2016, "High-dimensional continuous control using generalized
    advantage estimation".
    """
    _require_packed("gae", lengths, token_reward=token_reward, values=values)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gae: got gamma = {gamma}, lam = {lam}; expected both within [0, 1]")
    token_reward, values = token_reward.detach(), values.detach()
    counts = lengths.flatten().to(values.device)
    mask = torch.arange(int(counts.max()), device=values.device) < counts[:, None]
    reward, value = (values.new_zeros(mask.shape).masked_scatter(mask, x) for x in (token_reward, values))
    advantage, after = torch.zeros_like(value), torch.zeros_like(value[:, 0])
    next_value = torch.zeros_like(after)
    for t in reversed(range(value.shape[1])):
        # the padding after a completion has reward and value 0, so nothing comes back from it
        after = reward[:, t] + gamma * next_value - value[:, t] + gamma * lam * after
        next_value = value[:, t]
        advantage[:, t] = after
    packed = advantage[mask]
    return packed, packed + values


def gae_advantage(
    token_reward: Tensor, old_values: Tensor, lengths: Tensor, *, gamma: float = 1.0, lam: float = 1.0
) -> Tensor:
    """The advantages [N] of `gae` alone; lambda is 1, so that they are unbiased however wrong the critic is.

    Example:
        >>> gae_advantage(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 0.5]), torch.tensor([[2]]))
        tensor([0.5000, 0.5000])
    """
    return gae(token_reward, old_values, lengths, gamma=gamma, lam=lam)[0]


def whitened_reward_to_go(token_reward: Tensor, lengths: Tensor) -> Tensor:
    """Reward to go of each token, whitened over all tokens of the batch (REINFORCE++), [N]; biased over few draws.

    Example:
        >>> whitened_reward_to_go(torch.tensor([1.0, 1.0, 4.0]), torch.tensor([[2, 1]]))
        tensor([-0.2182, -0.8729,  1.0911])

    Source: Hu, 2025, "REINFORCE++".
    """
    return whiten(gae(token_reward, torch.zeros_like(token_reward), lengths, lam=1.0)[0])


def returns(token_advantage: Tensor, old_values: Tensor) -> Tensor:
    """What the critic is to learn: advantages + values, [N] units of reward.

    Example:
        >>> returns(torch.tensor([0.5]), torch.tensor([1.0]))
        tensor([1.5000])
    """
    return (token_advantage + old_values).detach()


def _require_rewards(name: str, reward: Tensor, epsilon: float = 1.0) -> None:
    if reward.ndim != 2 or reward.shape[1] < 2:
        raise ValueError(
            f"{name}: got rewards of shape {list(reward.shape)}, expected [P, G] with G of 2 or more: "
            "a single draw has nothing to be better than"
        )
    if not bool(torch.isfinite(reward).all()):
        raise ValueError(
            f"{name}: got a reward that is not finite, expected finite ones. A forbidden draw (-inf) has no mean to be "
            "compared with: use forward_kl, or a finite reward"
        )
    if not epsilon > 0:
        raise ValueError(
            f"{name}: got epsilon = {epsilon}, expected more than 0: a group without spread has deviation 0"
        )


def _require_packed(name: str, lengths: Tensor, **numbers: Tensor) -> None:
    if lengths.ndim != 2 or not bool((lengths > 0).all()):
        raise ValueError(
            f"{name}: got lengths {lengths.tolist()}, expected [P, G] with a token or more in each completion"
        )
    total = int(lengths.sum())
    for label, x in numbers.items():
        if x.shape != (total,) or not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"{name}: got {label} of shape {list(x.shape)}, expected [{total}]: one finite number a token"
            )
