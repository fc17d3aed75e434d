"""What to hand to plan and measure for a modified target: the reward whose plain tilt it is.

Every target without holes is the plain tilt of some reward at its own beta, namely of

    implied reward = beta (log_target - log ref),       so that  log_target = log ref + implied reward / beta

so log Z, E_p, KL(p||ref), the frontier and the certificate need no second implementation: give them this reward and
this beta. For `Tilt` it is the reward itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from klimb.data import Pool, Scored, Target
from klimb.target.tilt import Tilt


def implied_reward(target: Target, scored: Scored) -> Tensor:
    """The reward that a plain tilt at `target.beta` would need to be this target: beta (log_target - log ref).

    With it, for every policy,  E_pi[implied] - beta KL(pi||ref) = beta log Z - beta KL(pi||p).  Where the target is
    the maximiser of an objective with KL or entropy penalties alone, the left side is that objective, and
    beta KL(pi||p) is what is left to climb. Not so for `chi_squared`, which says what is left in its own file.

    Args:
        target: any target.
        scored: what its `log_target` asks for; `log_ref` besides.

    Returns:
        [P, G] in the units of the target's beta times nats; -inf where the target forbids.

    Raises:
        ValueError: log_ref is not known, or the target wants a draw that the reference cannot make.

    Example:
        >>> from klimb.target.tilt import Tilt
        >>> scored = Scored(log_ref=torch.tensor([[-1.0, -2.0]]), reward=torch.tensor([[0.5, -torch.inf]]))
        >>> implied_reward(Tilt(None, None, 2.0), scored)
        tensor([[0.5000,   -inf]])

    Source: the identity is Korbak, Perez, Buckley, "RL with KL penalties is better viewed as Bayesian inference", 2022.

    Not the same as the implicit reward of a policy (Rafailov et al., 2023), beta log(pi / ref), which is this one for
    a target that has already been reached, less a constant a prompt.
    """
    if scored.log_ref is None:
        raise ValueError("implied_reward: got no log_ref, expected [P, G] in nats: score the draws under ref")
    log_target = target.log_target(scored)
    impossible = scored.log_ref.isneginf()
    if (impossible & (log_target > -torch.inf)).any():
        raise ValueError(
            "implied_reward: the target gives probability to a draw that the reference cannot make, so KL(p||ref) is "
            "infinite; expected a reference that can make every draw the target wants"
        )
    return (target.beta * (log_target - scored.log_ref)).masked_fill(impossible, -torch.inf)


def own_reward(target: Target, pool: Pool) -> Tensor:
    """The implied reward of a pool's draws, [P, G]; of a `Tilt` its reward, bit by bit.

    Raises:
        ValueError: as `implied_reward`.
    """
    if isinstance(target, Tilt):
        return pool.reward
    log_q = pool.draws.log_q
    wide = Scored(  # log_target - log_ref of long completions is a small difference
        log_ref=pool.log_ref.double(),
        reward=pool.reward.double(),
        log_q=None if log_q is None else log_q.double(),
        lengths=pool.draws.lengths,
    )
    return implied_reward(target, wide).to(pool.reward)
