"""Plan: one pool of reference draws, and from it the best policy for every beta, before any training.

P prompts, G draws a prompt. log Z(x) = log E_ref exp(r / beta), E_p[r] and KL(p||ref) are all expectations under the
reference, so one pool gives the whole frontier of reward against KL, and with it a beta for a budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from klimb.data import Example, Pool, Reward, Sampler
from klimb.models.policy import CausalPolicy
from klimb.numbers.best_of_n import BestOfNPoint, best_of_n
from klimb.numbers.estimate import Estimate, mean_estimate
from klimb.numbers.frontier import FrontierPoint, default_betas, frontier
from klimb.numbers.tilt import solve_beta, tilted_kl, tilted_mean
from klimb.pool import Progress, draw_pool, silent
from klimb.rewards.score import check_informative
from klimb.target import Tilt, tilt


@dataclass(frozen=True)
class Plan:
    """What one pool of reference draws says about every beta.

    Attributes:
        pool: the draws, [P, G]; the first data to train on.
        reference: who drew them.
        reward: what scored them.
        reference_reward: E_ref[r].
        reward_std: spread of the reward within a prompt, mean over prompts.
        frontier: reward against KL, a point a beta, from large beta (near the reference) to small.
        best_of_n: on the same axes.
    """

    pool: Pool
    reference: CausalPolicy
    reward: Reward
    reference_reward: Estimate
    reward_std: float
    frontier: Sequence[FrontierPoint]
    best_of_n: Sequence[BestOfNPoint]

    def solve(
        self, *, beta: float | None = None, kl: float | None = None, reward: float | None = None
    ) -> float:
        """The beta of a KL budget (nats, mean over prompts) or of a reward goal; or beta itself.

        Raises:
            ValueError: none or several were given, or the pool cannot support it (the message says with how many
                draws it could).
        """
        given = [x for x in (beta, kl, reward) if x is not None]
        if len(given) != 1:
            raise ValueError(f"got {len(given)} of beta, kl and reward; expected one of them")
        return beta if beta is not None else solve_beta(self.pool.reward, kl=kl, goal=reward)

    def target(
        self, *, beta: float | None = None, kl: float | None = None, reward: float | None = None
    ) -> Tilt:
        """The tilted reference with that beta, KL budget or reward goal."""
        return tilt(self.reference, self.reward, self.solve(beta=beta, kl=kl, reward=reward))

    def at(self, beta: float, *, generator: torch.Generator) -> FrontierPoint:
        """The predicted best policy at this beta."""
        return frontier(self.pool.reward, [beta], generator=generator)[0]

    def prompts(self, beta: float) -> list[dict[str, object]]:
        """What each prompt has to give at this beta: its rewards, predicted best reward and KL."""
        reward = self.pool.reward
        best, cost = tilted_mean(reward, beta), tilted_kl(reward, beta)
        return [
            {
                "id": example.id,
                "prompt": example.prompt,
                "reward": reward[p].mean().item(),
                "reward_std": reward[p].std().item(),
                "best_reward": best[p].item(),
                "kl": cost[p].item(),
                "dead": bool((reward[p] == reward[p, 0]).all()),
            }
            for p, example in enumerate(self.pool.draws.examples)
        ]


def plan(
    examples: Sequence[Example],
    reference: CausalPolicy,
    reward: Reward,
    sampler: Sampler,
    *,
    num_draws: int,
    betas: Sequence[float] | None = None,
    generator: torch.Generator,
    pool: Pool | None = None,
    progress: Progress = silent,
) -> Plan:
    """Draw a pool from the reference (or take the one given) and predict the best policy for every beta.

    Args:
        examples: P prompts.
        reference: the policy that is tilted.
        reward: under TRL's contract.
        sampler: must draw from the reference itself (temperature 1, no top-p).
        num_draws: G; the pool supports a KL of about log G - 2.5 nats.
        betas: where to compute the frontier; by default from hardly any KL to what the pool supports.
        generator: of draws and of bootstrap resamples.
        pool: reference draws already made.
        progress: told how far it is.

    Raises:
        ValueError: all rewards are the same: nothing can be learned.
    """
    if pool is None:
        pool = draw_pool(
            examples, reference, reward, sampler, num_draws=num_draws, generator=generator, progress=progress
        )
    rewards = pool.reward
    check_informative(rewards)
    points = frontier(rewards, default_betas(rewards) if betas is None else betas, generator=generator)
    sizes = [n for n in (1, 2, 4, 8, 16, 32, 64, 128) if 3 * n <= rewards.shape[1] or n == 1]
    return Plan(
        pool=pool,
        reference=reference,
        reward=reward,
        reference_reward=mean_estimate(rewards, generator=generator),
        reward_std=rewards.std(1).mean().item(),
        frontier=points,
        best_of_n=best_of_n(rewards, sizes, generator=generator),
    )
