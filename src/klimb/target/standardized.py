"""The reward in its own standard deviations: another beta for every prompt, and it matters whose deviation it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from klimb.data import Policy, Reward, Scored
from klimb.numbers.tilt import shares
from klimb.target.tilt import require_beta

Law = Literal["reference", "draws"]


@dataclass(frozen=True)
class StandardizedTarget:
    """The tilt at beta_x = beta sd_x(r), prompt by prompt; see `standardized`.

    Attributes:
        reference: the policy that is tilted.
        reward: what is good.
        beta: standard deviations of the reward per nat.
        over: whose standard deviation, "reference" or "draws".
    """

    reference: Policy
    reward: Reward
    beta: float
    over: Law

    def betas(self, scored: Scored) -> Tensor:
        """[P] beta_x = beta sd_x, units of reward per nat: each prompt's target is the plain tilt at its beta_x."""
        assert scored.reward is not None
        if not scored.reward.isfinite().all():
            raise ValueError(
                "standardized: got a reward that is -inf or NaN, which has no standard deviation; expected finite "
                "rewards (forbid completions in a plain tilt)"
            )
        log_w = torch.zeros_like(scored.reward)
        if self.over == "reference":
            if scored.log_q is None:
                raise ValueError(
                    "standardized: got draws of an unknown law, expected log_q: the standard deviation under the "
                    "reference weighs them by log ref - log q (or take that of the draws, over='draws')"
                )
            assert scored.log_ref is not None
            log_w = scored.log_ref - scored.log_q
        return (self.beta * _deviation(scored.reward.double(), log_w.double())).to(scored.reward)

    def log_target(self, scored: Scored) -> Tensor:
        """[P, G] log ref + r / (beta sd), nats, unnormalised; log ref where all draws have one reward."""
        betas = self.betas(scored)[..., None]
        assert scored.log_ref is not None
        assert scored.reward is not None
        return scored.log_ref + torch.where(betas > 0, scored.reward, 0.0) / torch.where(
            betas > 0, betas, 1.0
        )


def standardized(
    reference: Policy, reward: Reward, beta: float, *, over: Law = "reference"
) -> StandardizedTarget:
    r"""The target of rewards divided by their standard deviation within the prompt.

    $$ \arg\max_\pi E_\pi[r]/sd_x - \beta\,KL(\pi\|ref) \;\propto\; ref \exp\!\big(r/(\beta\, sd_x)\big) $$

    The plain tilt at beta_x = beta sd_x: prompts whose rewards hardly differ are pushed as hard as those where they
    differ much. Whose sd it is decides whether that is a target at all. Plan with r / sd_x (`implied_reward`).

    "reference": sd under ref, by the weights ref / q. One fixed number a prompt (estimated from every group anew;
    consistent, biased low at O(1/G)), so this is a target: the maximiser of the objective above.

    "draws": sd of the group at hand, as GRPO takes it. For the policy's own draws it moves with the policy, and where
    training settles, if it does, is beta_x = beta sd(r under the tilt at beta_x): `settled_betas`. For a reward in
    {0, 1} the objective so climbed is 2 arcsin sqrt(E_pi r) - beta KL(pi||ref), whose slope is infinite at a pass rate
    of 1: below a certain beta (1.51 at a pass rate of one half) nothing stops the climb short of that, whatever the KL.

    Args:
        reference: the policy that is tilted.
        reward: under TRL's contract, finite.
        beta: standard deviations of the reward per nat, > 0.
        over: whose standard deviation.

    Raises:
        ValueError: beta is not positive; `over` is neither; a reward is -inf; the law of the draws is not known.

    Example:
        >>> law = torch.full((1, 4), 0.25).log()
        >>> scored = Scored(log_ref=law, log_q=law, reward=torch.tensor([[0.0, 0.0, 4.0, 4.0]]))
        >>> standardized(None, None, 0.5).betas(scored)
        tensor([1.])

    Source: Shao et al., "DeepSeekMath", 2024 (GRPO); Mroueh, "Reinforcement learning with verifiable rewards: GRPO's
    effective loss, dynamics, and success amplification", 2025, for binary rewards.

    Not the same as GRPO itself, whose KL term is a forward one; nor as its divisor, the sample deviation (G - 1) plus
    1e-4: here it is the deviation of the weighted draws (G), and groups without any leave the reference as it is.
    """
    require_beta(beta)
    if over not in get_args(Law):
        raise ValueError(f"standardized: got over={over!r}, expected one of {', '.join(get_args(Law))}")
    return StandardizedTarget(reference, reward, float(beta), over)


def settled_betas(reward: Tensor, beta: float, log_w: Tensor | None = None) -> Tensor:
    """Where a policy settles whose reward is divided by its own standard deviation: beta_x = beta sd_{tilt(beta_x)}(r).

    The largest solution, which is the one nearest the reference; 0 where there is none, and the policy goes on until
    only the best completions are left. Plug-in: exact on an enumerated space, and on a pool only while the tilt at the
    answer is supported by it.

    Args:
        reward: [P, G], finite.
        beta: standard deviations of the reward per nat, > 0.
        log_w: [P, G] nats, log ref - log q; None if drawn from the reference.

    Returns:
        [P] units of reward per nat; 0 also where all rewards are equal.

    Raises:
        ValueError: beta is not positive, or a reward is not finite.

    Example: at a pass rate of one half there is a place to settle for beta 1.6, and none for beta 1.4.
        >>> pool = torch.tensor([[0.0, 1.0]])
        >>> settled_betas(pool, 1.6), settled_betas(pool, 1.4)
        (tensor([0.5630]), tensor([0.]))

    Source: the condition is that of a stationary point; Mroueh, 2025, studies such fixed points for binary rewards.
    """
    require_beta(beta)
    if not reward.isfinite().all():
        raise ValueError("settled_betas: got a reward that is not finite, which has no standard deviation")
    r = reward.detach().double()
    w = torch.zeros_like(r) if log_w is None else log_w.detach().double()
    r = r - r.mean(-1, keepdim=True)
    span = r.amax(-1) - r.amin(-1)
    unit = torch.where(span > 0, span, 1.0)

    def excess(at: Tensor) -> Tensor:
        return beta * _deviation(r, r / at[..., None] + w) - at

    # no deviation is more than half the span, so no solution is above the start; from there downwards in steps of 2 %
    low = 0.51 * beta * unit
    high, found = low.clone(), torch.zeros_like(low, dtype=torch.bool)
    for _ in range(700):
        found |= excess(low) >= 0
        if found.all():
            break
        high = torch.where(found, high, low)
        low = torch.where(found, low, low * 0.98)
    for _ in range(60):
        middle = (low + high) / 2
        above = excess(middle) >= 0
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(found & (span > 0), low, 0.0).to(reward)


def _deviation(reward: Tensor, log_w: Tensor) -> Tensor:
    """Standard deviation of the reward under the law with these log-weights, [..., G] -> [...]."""
    weight = shares(log_w)
    reward = reward - reward[..., :1]  # so that equal rewards give exactly zero
    centred = reward - (weight * reward).sum(-1, keepdim=True)
    return (weight * centred**2).sum(-1).sqrt()
