"""One training step as a record: what the next one needs, and what there is to look at.

P prompts a step, G draws a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from klimb.backward import Objective, Passed
from klimb.data import Pool, Target
from klimb.log_z import LearnedLogZ
from klimb.numbers.estimate import Estimate, bootstrap, mean_estimate, ratio_estimate
from klimb.numbers.running import RunningLogZ
from klimb.numbers.tilt import log_mean_exp
from klimb.numbers.weights import effective_sample_size
from klimb.objectives.bind import name_of
from klimb.samplers.ahead import Ahead
from klimb.samplers.replay import Replay
from klimb.target import own_reward

FEW = 0.5
"""share of a step's draws that the weights between sampler and trainer may leave before a step warns"""
TOLERATED = 0.1
"""share of the spread of reward / beta that sampler and scorer may differ by, on average, before a step warns"""
PARTED = 0.5
"""share of a step's prompts whose learned log Z may lie above the plan's interval before a step warns"""


@dataclass(frozen=True)
class TrainState:
    """What the next step needs besides the weights and the optimizer, which are changed in place.

    Attributes:
        step: how many steps are done.
        order: the prompts still to come in this pass over the data.
        replay: completions kept.
        log_z: a running or learned log Z of each example (`klimb.log_z.start_log_z`, `start_learned`), or None.
        beta: where a KL controller has got to, units of reward per nat; None for the target's own.
        ahead: draws begun for steps to come, the next one first.
    """

    step: int = 0
    order: tuple[int, ...] = ()
    replay: Replay = field(default_factory=Replay)
    log_z: RunningLogZ | LearnedLogZ | None = None
    beta: float | None = None
    ahead: tuple[Ahead, ...] = ()


@dataclass(frozen=True)
class Step:
    """What one step did, to be looked at.

    Attributes:
        step: its number, from 1.
        estimates: reward, kl (nats), objective of the fresh draws; empty in a step that only replays.
        numbers: value of the objective, residual_std (nats), gradient norm, learning rate, tokens, sampler_error, ...
        seconds: where the time went: draw, score, update.
        fresh: the draws of this step with their log-probabilities under reference and policy, or None.
        state: what the next step needs.
        warnings: what it is about -> what to say; whoever looks on says it once.
    """

    step: int
    estimates: dict[str, Estimate]
    numbers: dict[str, float]
    seconds: dict[str, float]
    fresh: Pool | None
    state: TrainState
    warnings: Mapping[str, str] = field(default_factory=dict)


def seen(
    state: TrainState,
    pool: Pool,
    fresh: Pool | None,
    passed: Passed,
    moved: Mapping[str, float],
    seconds: Mapping[str, float],
    *,
    objective: Objective,
    target: Target,
    age: int = 0,
    cap: float | None = None,
) -> Step:
    """The record of a step that has just been taken.

    Its fresh draws are `age` updates old. They are weighed by what the trainer says of them over what the sampler said, up
    to `cap`, where they are not the policy's own or a cap is given.
    """
    own = fresh is not None and fresh.draws.own_law
    numbers = {
        "objective_value": passed.value.mean().item(),
        **spread(passed.residual),
        **moved,
        **lengths(pool if fresh is None else fresh),
        "tokens": int(pool.draws.lengths.sum()),
        **(sampler_error(fresh) if own and not age else {}),
        **(
            {"ess": effective_sample_size(residual_of(fresh, target, age=age)).mean().item()}
            if own and target.beta > 0
            else {}
        ),
    }
    warnings = {}
    if own and (age or cap is not None):
        numbers |= {"draws_age": age, **importance_seen(fresh, cap)}
        if numbers["importance_ess"] < FEW:
            warnings["importance_ess"] = (
                f"the weights between sampler and trainer leave {numbers['importance_ess']:.0%} of a step's draws: the policy has moved "
                "too far from the one that drew, or the server computes with other numbers; draw fewer steps ahead, learn more "
                "slowly, or serve the same weights in the same dtype"
            )
    # of data nobody expects what is not in it
    if pool.draws.full_support is None and not of_data(pool, fresh) and not passed.asked & {"log_q", "log_w"}:
        warnings["full_support"] = (
            f"{name_of(objective)} does not ask which law its draws come from, and of some of them it is not known "
            "whether that law can draw every completion; what it cannot draw goes unlearned, unseen"
        )
    if moved.get("log_z_parted", 0.0) > PARTED:
        warnings["log_z"] = (
            f"the learned log Z of {moved['log_z_parted']:.0%} of a step's prompts lies above what the plan's draws say: there the "
            "policy leaks mass onto what it rarely draws; use a smaller log_z_learning_rate, or log_z: plan"
        )
    if own and not age and (told := disagreement(fresh, numbers["sampler_error_mean"], target.beta)):
        warnings["sampler_error"] = told
    return Step(
        step=state.step,
        estimates=fresh_estimates(fresh, target, step=state.step, age=age) if own else {},
        numbers=numbers,
        seconds=dict(seconds),
        fresh=fresh,
        state=state,
        warnings=warnings,
    )


def of_data(pool: Pool, fresh: Pool | None) -> bool:
    """True if a step learns from completions that somebody else wrote, and nothing was drawn."""
    return fresh is None and pool.draws.log_q is None


def spread(residual: Tensor) -> dict[str, float]:
    """How uneven the residual is, nats; nothing where a prompt has fewer than two draws that are not forbidden."""
    groups = [row[row.isfinite()] for row in residual]
    if any(len(group) < 2 for group in groups):
        return {}
    return {"residual_std": sum(group.std().item() for group in groups) / len(groups)}


def lengths(pool: Pool) -> dict[str, float]:
    """Mean completion length in tokens, and the share that ended by themselves."""
    return {
        "completion_length": pool.draws.lengths.float().mean().item(),
        "finished": pool.draws.finished.float().mean().item(),
    }


def log_law(fresh: Pool, *, age: int) -> Tensor:
    """[P, G] nats, under the policy that drew: the scorer's, or the sampler's where that policy is gone."""
    found = fresh.draws.log_q if age else fresh.log_pi
    assert found is not None
    return found


def importance_seen(fresh: Pool, cap: float | None) -> dict[str, float]:
    """Of the weights pi / q, at most `cap`: the share of the draws that they leave (ESS / n), and the share that was cut.

    Example:
        >>> from klimb.data import Draws, Example
        >>> q = torch.tensor([[0.5, 0.1]]).log()
        >>> draws = Draws([Example("a")], [[torch.tensor([1])] * 2], torch.ones(1, 2, dtype=bool), log_q=q, own_law=True)
        >>> pool = Pool(draws, torch.zeros(1, 2), q, log_pi=torch.tensor([[0.5, 0.3]]).log())
        >>> {name: round(x, 3) for name, x in importance_seen(pool, 2.0).items()}  # weights 1 and 2: 3 ** 2 / 5 of 2
        {'importance_ess': 0.9, 'importance_cut': 0.5}
    """
    assert fresh.draws.log_q is not None
    assert fresh.log_pi is not None
    log_w = (fresh.log_pi - fresh.draws.log_q).double().flatten()
    limit = math.inf if cap is None else math.log(cap)
    left = effective_sample_size(log_w.clamp(max=limit)[None]).item()
    return {"importance_ess": left / len(log_w), "importance_cut": (log_w > limit).double().mean().item()}


def fresh_estimates(fresh: Pool, target: Target, *, step: int, age: int = 0) -> dict[str, Estimate]:
    """Reward, KL(pi||ref) in nats, the target's own reward - beta KL, entropy in nats a token, and the gap, of draws from the policy.

    The gap is the one that a prompt's own draws show, beta (log mean e^residual - mean residual): biased low with few draws a prompt,
    blind to modes that the policy has dropped, and left out where a prompt has a single draw or a forbidden one.
    Both log-probabilities are the scorer's: a sampler in low precision rounds in another way. Of draws that are `age` updates
    old it is the policy of that time that is estimated, by what the sampler said.
    """
    assert fresh.draws.own_law
    log_pi = log_law(fresh, age=age)
    each = log_pi - fresh.log_ref
    generator = torch.Generator().manual_seed(step)
    found = {
        "reward": mean_estimate(fresh.reward, generator=generator),
        "kl": mean_estimate(each, generator=generator),
        "regularised_reward": mean_estimate(
            own_reward(target, fresh) - target.beta * each, generator=generator
        ),
        "entropy": ratio_estimate(-log_pi, fresh.draws.lengths.to(log_pi), generator=generator),
    }
    if not target.beta > 0:
        return found  # no target, no gap
    residual = residual_of(fresh, target, age=age)
    if residual.shape[1] > 1 and bool(residual.isfinite().all()):
        low, high = bootstrap(lambda x: _gap(x, target.beta), residual, generator=generator, within=True)
        value = _gap(residual, target.beta).item()
        found["self_gap"] = Estimate(value, low.item(), high.item(), residual.numel())
    return found


def residual_of(fresh: Pool, target: Target, *, age: int = 0) -> Tensor:
    """[P, G] nats, log target - log pi of draws from the policy; constant within a prompt at the best policy."""
    return (own_reward(target, fresh) / target.beta + fresh.log_ref - log_law(fresh, age=age)).double()


def _gap(residual: Tensor, beta: float) -> Tensor:
    """[..., P, G] -> [...]: beta (log mean e^residual - mean residual), the mean over prompts."""
    return beta * (log_mean_exp(residual, correct=False) - residual.mean(-1)).mean(-1)


def sampler_error(fresh: Pool) -> dict[str, float]:
    """|log_q - log_pi| of the policy's own draws, nats: zero if sampler and scorer computed without rounding."""
    assert fresh.draws.log_q is not None
    assert fresh.log_pi is not None
    error = (fresh.draws.log_q - fresh.log_pi).abs().flatten()
    return {
        "sampler_error_mean": error.mean().item(),
        "sampler_error_p99": error.quantile(0.99).item(),
    }


def disagreement(fresh: Pool, sampler_error_mean: float, beta: float) -> str | None:
    """What to say where sampler and scorer differ by more than a tenth of what the reward is worth in nats.

    Forbidden completions (-inf) have no part in the spread of the rewards, and where that is zero nothing is said.
    """
    rewards = fresh.reward[fresh.reward.isfinite()].double()
    worth = rewards.std().item() / beta if len(rewards) > 1 else 0.0
    if worth == 0 or sampler_error_mean <= TOLERATED * worth:
        return None
    return (
        f"sampler and scorer differ by {sampler_error_mean:.2g} nats a completion, more than {TOLERATED:g} of the "
        f"standard deviation of reward / beta ({worth:.2g} nats): part of what is learned is rounding; use dtype "
        "float32, or a smaller beta"
    )
