"""What plan.json, metrics.jsonl and measure.json hold, from what the verbs return."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from klimb.config import Config
from klimb.data import Pool
from klimb.distil import Distance
from klimb.measure import Measurement
from klimb.numbers.diagnose import Diagnosis
from klimb.numbers.estimate import Estimate, bootstrap, mean_estimate
from klimb.numbers.frontier import FrontierPoint
from klimb.numbers.ordering import agreement
from klimb.plan import Plan
from klimb.plan_distil import Advice, Apart
from klimb.reward_model import Audit, findings
from klimb.steps import Step


def plan_record(
    found: Plan,
    beta: float,
    *,
    why: str,
    target: Mapping[str, Any],
    weights: str,
    generator: torch.Generator,
) -> dict[str, Any]:
    """What plan.json holds; its rewards are the target's own, as `target` says where they are not the plain ones; `weights` are the reference's."""
    return {
        "target": target,
        "beta": {"value": beta, "why": why},
        "optimum": _point(found.at(beta, generator=generator)),
        "reference": {
            "reward": found.reference_reward.as_dict(),
            "reward_std": _known(found.reward_std),
            "weights": weights,
        },
        **_rewards({"reference": found.pool}),
        "frontier": [_point(point) for point in found.frontier],
        "best_of_n": [
            {"n": best.n, "reward": best.reward.as_dict(), "kl": best.kl.as_dict()}
            for best in found.best_of_n
        ],
        "num_draws": found.pool.draws.num_draws,
        "finished": found.pool.draws.finished.float().mean().item(),
        "completion_length": found.pool.draws.lengths.float().mean().item(),
        "prompts": [
            {name: _known(x) if isinstance(x, float) else x for name, x in prompt.items()}
            for prompt in found.prompts(beta)
        ],
    }


def _point(point: FrontierPoint) -> dict[str, Any]:
    return {name: x.as_dict() if isinstance(x, Estimate) else x for name, x in vars(point).items()}


def _known(value: float) -> float | None:
    """None for a spread or a mean of forbidden rewards (-inf), which is not defined."""
    return None if math.isnan(value) else value


def _rewards(pools: Mapping[str, Pool]) -> dict[str, Any]:
    """Where several rewards are asked, each one by itself under each law, and how it orders the reference's draws beside what is learned."""
    reference = pools["reference"]
    if len(reference.parts) < 2:
        return {}
    return {
        "rewards": {
            name: {
                **{law: _over_prompts(pool.parts[name].nanmean(1), pool) for law, pool in pools.items()},
                "agreement": _over_prompts(agreement(reference.reward, part), reference),
            }
            for name, part in reference.parts.items()
        }
    }


def _over_prompts(each: torch.Tensor, pool: Pool) -> dict[str, Any] | None:
    """The mean of a number a prompt, where it has one; None for fewer than two."""
    each = each[~each.isnan()].double()
    if len(each) < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    low, high = bootstrap(lambda x: x.mean(-1), each, generator=generator, within=False)
    draws = len(each) * pool.draws.num_draws
    return Estimate(each.mean().item(), low.item(), high.item(), draws).as_dict()


def step_record(step: Step) -> dict[str, Any]:
    """One line of metrics.jsonl."""
    return {
        "step": step.step,
        **{name: estimate.as_dict() for name, estimate in step.estimates.items()},
        **step.numbers,
        "seconds": step.seconds,
        "tokens_per_second": rates(step),
    }


def rates(step: Step) -> dict[str, float]:
    """Completion tokens a second: fresh ones while drawing, and those learned from, kept ones too, while updating."""
    found = (
        {} if step.fresh is None else {"drawn": int(step.fresh.draws.lengths.sum()) / step.seconds["draw"]}
    )
    return {**found, "trained": step.numbers["tokens"] / step.seconds["update"]}


def measure_record(found: Measurement, *, target: Mapping[str, Any], weights: str) -> dict[str, Any]:
    """What measure.json holds; where its rewards are the target's own, `raw_reward` has the plain ones."""
    c = found.certificate
    estimates = (
        "reward",
        "kl",
        "objective",
        "gap",
        "self_gap",
        "log_z",
        "attained",
        "frontier_efficiency",
        "overlap",
    )
    return {
        "target": target,
        "beta": c.beta,
        **({"raw_reward": _raw_reward(found)} if "means" in target else {}),
        **{name: getattr(c, name).as_dict() for name in estimates},
        "reference": {"reward": c.reference_reward.as_dict(), "weights": weights},
        **_rewards({"policy": found.policy_pool, "reference": found.reference_pool}),
        "optimum": {"reward": c.optimum_reward.as_dict(), "kl": c.optimum_kl.as_dict()},
        "diagnosis": diagnosis_record(found.diagnosis),
        "ess": c.ess,
        "pareto_k": c.pareto_k,
        "warnings": list(c.warnings),
        "num_prompts": found.policy_pool.draws.num_prompts,
        "num_draws": found.policy_pool.draws.num_draws,
    }


def diagnosis_record(found: Diagnosis) -> dict[str, Any]:
    """What measure.json holds of a diagnosis: its first verdict, then all of them, and what was not measured."""
    first = found.verdicts[0]
    return {
        "verdict": found.verdict,
        "confidence": first.confidence,
        "because": found.because,
        "advice": found.advice,
        "command": first.command,
        "verdicts": [{**vars(v), "evidence": list(v.evidence)} for v in found.verdicts],
        "shares": dict(found.shares),
        "unmeasured": {name: list(numbers) for name, numbers in found.unmeasured.items()},
    }


def unrewarded_record(
    pool: Pool, orders: Mapping[str, Any], beta: float, *, target: Mapping[str, Any]
) -> dict[str, Any]:
    """What measure.json holds where there is no reward: no gap and no share, since nobody said what is good."""
    assert pool.log_pi is not None
    cost = mean_estimate(pool.log_pi - pool.log_ref, generator=torch.Generator().manual_seed(0))
    return {
        "target": target,
        "beta": beta,
        "kl": cost.as_dict(),
        "comparisons": orders,
        "warnings": [],
        "num_prompts": pool.draws.num_prompts,
        "num_draws": pool.draws.num_draws,
    }


def distance_record(
    found: Distance, *, target: Mapping[str, Any], prompt_tokens: Mapping[str, float]
) -> dict[str, Any]:
    """What measure.json holds where the target is a policy."""
    names = ("forward", "forward_reference", "closed", "reverse", "reverse_reference")
    sides = ("teacher", "policy", "reference")
    texts = {name: getattr(found, f"{name}_draws").texts for name in sides}
    examples = found.teacher_draws.examples
    return {
        "target": target,
        "beta": 1.0,
        "distance": {
            **{name: getattr(found, name).as_dict() for name in names},
            "tokens": found.tokens,
            "prompt_tokens": dict(prompt_tokens),
        },
        "side_by_side": [
            {"prompt": example.prompt, **{name: texts[name][p][0] for name in sides}}
            for p, example in enumerate(examples[:8])
        ],
        "warnings": [],
        "num_prompts": found.teacher_draws.num_prompts,
        "num_draws": found.teacher_draws.num_draws,
    }


def _raw_reward(found: Measurement) -> dict[str, Any]:
    pools = {"policy": found.policy_pool, "reference": found.reference_pool}
    return {
        name: mean_estimate(pool.reward, generator=torch.Generator().manual_seed(0)).as_dict()
        for name, pool in pools.items()
    }


def apart_record(found: Apart, said: Advice, *, holds: bool | None, config: Config) -> dict[str, Any]:
    """What plan.json holds of a target that is a policy, beside target and beta."""
    names = ("forward", "reverse", "forward_a_token", "reverse_a_token")
    cost = found.cost
    step = cost.step(teacher_draws=config.teacher_draws, num_iterations=config.num_iterations)
    return {
        "apart": {
            **{name: getattr(found, name).as_dict() for name in names},
            "places": [
                {
                    "first": place.first,
                    "last": place.last,
                    **{
                        name: None if x is None else x.as_dict()
                        for name, x in (("forward", place.forward), ("reverse", place.reverse))
                    },
                }
                for place in found.places
            ],
            "prompts": [
                {"id": example.id, "prompt": example.prompt, "forward": forward, "reverse": reverse}
                for example, forward, reverse in found.prompts
            ],
            "pareto_k": found.pareto_k if math.isfinite(found.pareto_k) else None,
            "tail_holds": found.tail_holds,
            "holds": holds,
            "trained_numbers": cost.trained_numbers,
            "prompt_tokens": {"teacher": cost.prompt_tokens[0], "policy": cost.prompt_tokens[1]},
            "tokens_a_step": cost.tokens,
            "seconds": {
                "teacher": cost.teacher_seconds,
                "policy": cost.policy_seconds,
                "update": cost.update_seconds,
                "step": step,
                "run": step * config.max_steps,
            },
        },
        "advice": {
            "divergence": said.divergence,
            "teacher_draws": said.teacher_draws,
            "words": list(said.words),
        },
    }


def audit_record(found: Audit) -> dict[str, Any]:
    """What measure.json holds of a reward model."""
    estimates = {name: x.as_dict() for name, x in vars(found).items() if isinstance(x, Estimate)}
    mean, most = found.calibrated
    said = [warning for x in vars(found).values() if isinstance(x, Estimate) for warning in x.warnings]
    return {
        "beta": found.beta,
        "reward_model": estimates,
        "calibrated": {"mean": mean, "most": most},
        "tail_threshold": _known(found.tail_threshold),
        "trusted_beta": found.trusted_beta,
        "reliability": [{"confidence": b.confidence, "accuracy": b.accuracy.as_dict()} for b in found.bins],
        "rescored": {
            how: {"spread": r.spread.as_dict(), "flipped": r.flipped, "log_z": r.log_z}
            for how, r in found.rescored.items()
        },
        "scores": found.scores,
        "findings": findings(found),
        "warnings": list(dict.fromkeys(said)),
        "num_rows": found.num_rows,
    }
