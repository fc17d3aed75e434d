"""Plan: one pool of reference draws, and from it the best policy for every beta, before any training.

P prompts, G draws a prompt. log Z(x) = log E_ref exp(r / beta), E_p[r] and KL(p||ref) are all expectations under the
reference, so one pool gives the whole frontier of reward against KL, and with it a beta for a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from klimb.data import Draws, Example, Policy, Pool, Reward, Sampler, stack_pools
from klimb.models.policy import CausalPolicy
from klimb.numbers.best_of_n import BestOfNPoint, best_of_n
from klimb.numbers.estimate import Estimate, mean_estimate
from klimb.numbers.frontier import FrontierPoint, default_betas, frontier
from klimb.numbers.tilt import solve_beta, tilted_kl, tilted_mean
from klimb.ranks import ALONE
from klimb.rewards.load import Rewards, check_informative, score
from klimb.target import Tilt, tilt

Progress = Callable[[str, int, int], None]
"""called with what is being done, how much of it is done, and how much there is"""


ROWS_AT_ONCE = 192
"""completions between two words about progress; enough for the matrix products to be large"""


def prompts_at_once(num_draws: int, policy: object = None) -> int:
    """How many prompts go together so that about ROWS_AT_ONCE completions do, on each of the ranks that share the policy's work.

    Example:
        >>> prompts_at_once(40), prompts_at_once(1000)
        (4, 1)
    """
    return max(1, ROWS_AT_ONCE // num_draws) * getattr(policy, "ranks", ALONE).world


def silent(what: str, done: int, total: int) -> None:
    """Say nothing."""


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


def draw_pool(
    examples: Sequence[Example],
    policy: Policy,
    reward: Reward,
    sampler: Sampler,
    *,
    num_draws: int,
    generator: torch.Generator,
    progress: Progress = silent,
    what: str = "draw",
    unscored: list[str] | None = None,
) -> Pool:
    """Draw from `policy` and score with `reward`, a few prompts at a time; nothing is drawn while a few wait to be scored.

    `log_ref` of the pool is the law of the draw, so `policy` is taken to be the reference. Where `unscored` is given and a reward of
    another process fails, the rest is drawn without asking it, and it is asked once more at the end; rows that it then still has
    no number for are NaN, and why is put there.
    """
    parts, total, at_once = [], len(examples) * num_draws, prompts_at_once(num_draws, policy)
    progress(what, 0, total)
    for start in range(0, len(examples), at_once):
        draws = sampler(policy, examples[start : start + at_once], num_draws, generator=generator)
        if not draws.own_law or draws.log_q is None:
            raise ValueError(
                "the sampler draws from another law than the policy's own (temperature, top-p, best of n); planning "
                "and measuring need the policy's own draws"
            )
        if unscored:
            unknown = torch.full_like(draws.log_q, torch.nan)
            rewards = Rewards(unknown, dict.fromkeys(parts[0].parts, unknown))
        else:
            rewards = score(reward, draws, unscored=unscored)
        parts.append(Pool(draws, rewards.total, draws.log_q, rewards.parts, token_log_ref=draws.packed_log_q))
        progress(what, min(start + at_once, len(examples)) * num_draws, total)
    pool = stack_pools(parts)
    if unscored:
        pool, said = scored_again(pool, reward)
        unscored[:] = [] if said is None else [said]
    return pool


def scored_again(pool: Pool, reward: Reward) -> tuple[Pool, str | None]:
    """The pool with those of its draws scored that have no reward (NaN), and why some still have none."""
    assert pool.draws.texts is not None
    rows = pool.reward.isnan().nonzero().tolist()
    if not rows:
        return pool, None
    missing = Draws(
        examples=[pool.draws.examples[p] for p, _ in rows],
        completions=[[pool.draws.completions[p][g]] for p, g in rows],
        finished=torch.stack([pool.draws.finished[p, g] for p, g in rows])[:, None],
        texts=[[pool.draws.texts[p][g]] for p, g in rows],
    )
    said: list[str] = []
    found = score(reward, missing, unscored=said)
    index = tuple(torch.tensor(rows).T)
    total = pool.reward.index_put(index, found.total[:, 0])
    parts = {
        name: pool.parts.get(name, torch.full_like(total, torch.nan)).index_put(index, part[:, 0])
        for name, part in found.parts.items()
    }
    return replace(pool, reward=total, parts=parts), said[0] if said else None


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
