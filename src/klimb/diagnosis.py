"""What a run on disk says of itself: its plan, steps and draws as evidence, and from it the verdicts.

Whatever is not there is None in the evidence, and the verdicts that need it say "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from klimb import store
from klimb.aim import aimed_at, recorded_aim
from klimb.config import TAUGHT
from klimb.data import Pool, Target
from klimb.measure import evidence_of_pools
from klimb.nearest import nearest_run
from klimb.numbers.diagnose import Diagnosis, diagnose
from klimb.numbers.estimate import Estimate
from klimb.numbers.evidence import (
    Evidence,
    Quantity,
    as_written,
    evidence_of_plan,
    exact,
    joined,
    mean_of,
    trend,
)
from klimb.numbers.frontier import FrontierPoint
from klimb.numbers.next_run import Setting
from klimb.rewards.load import load_reward
from klimb.rewards.score import score
from klimb.rewards.weighted_sum import weighted_sum
from klimb.target import own_reward

SEED = 0
"""of the resamples: the same run has the same diagnosis"""


@dataclass(frozen=True)
class Run:
    """What is read of a run before any of its draws.

    Attributes:
        path: its directory.
        config: config.yaml.
        plan: plan.json, or empty.
        steps: metrics.jsonl.
        measured: measure.json, or empty.
        rewarded: whether a reward says what is good; not where the target is a policy.
        target: where it went; None where no reward says, or no beta is known yet.
    """

    path: Path
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    measured: Mapping[str, Any]
    rewarded: bool
    target: Target | None


def diagnosed(
    path: str | Path,
    *,
    audit: str | Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Diagnosis:
    """Why the policy of a run is where it is.

    Args:
        path: the directory of the run.
        audit: a reward that training did not see, as `reward_funcs` names one; left out: the first of the run's own
            rewards of weight 0, if there is one.
        measured: what measure.json is going to hold, where it is not written yet; its draws are.

    Raises:
        ValueError: there is no run, or a file of it cannot be read.
    """
    run = _read(Path(path), measured)
    found, planned = _measured(run, audit), _planned(run)
    # what training saw counts where both know: prompts that are flat, or that find nothing
    of_plan = Evidence(flat=planned.flat, never=planned.never)
    found = joined(of_plan, joined(found, planned))
    found = replace(found, done=_done(run), rise=_rise(run))
    return diagnose(found, _setting(run))


def _read(path: Path, measured: Mapping[str, Any] | None) -> Run:
    if not (path / "config.yaml").is_file():
        raise ValueError(
            f"{path}: holds no run{nearest_run(path)}; expected the output_dir of a run that was started"
        )
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path / 'config.yaml'}: not YAML: {getattr(error, 'problem', None) or error}; write it as it was"
        ) from error
    if not isinstance(config, Mapping):
        raise ValueError(
            f"{path / 'config.yaml'}: got a {type(config).__name__}, expected names and values; is it a run of klimb?"
        )
    if config.get("method") == "reward_model":
        raise ValueError(
            f"{path}: holds a reward model, and a diagnosis is of a policy; klimb measure {path} audits the reward"
        )

    def mapping(name: str) -> Mapping[str, Any]:
        value = store.read_json(path / name) if (path / name).is_file() else {}
        if not isinstance(value, Mapping):
            raise ValueError(f"{path / name}: got a {type(value).__name__}, expected a JSON object")
        return value

    metrics = path / "metrics.jsonl"
    measured = mapping("measure.json") if measured is None else measured
    aim, beta = recorded_aim(measured.get("target") or config.get("target")), config.get("beta")
    if measured.get("beta") is not None and aim.kind != "entropy_bonus":  # of that the sum of two is written
        beta = measured["beta"]
    known: Any = None  # neither model nor reward is needed where both have already scored the draws
    rewarded = bool(config.get("reward_funcs")) and aim.kind not in TAUGHT
    return Run(
        path=path,
        config=config,
        plan=mapping("plan.json"),
        steps=store.read_jsonl(metrics) if metrics.is_file() else [],
        measured=measured,
        rewarded=rewarded,
        target=aimed_at(aim, known, known, beta) if rewarded and beta is not None else None,
    )


def _setting(run: Run) -> Setting:
    return Setting(
        str(run.path),
        run.config,
        planned=store.draws_path(run.path, "plan").is_file(),
        trained=(run.path / "policy").is_dir(),
        rewarded=run.rewarded,
    )


def _pool(path: Path) -> Pool | None:
    """Draws with rewards, or None where there are none."""
    if not path.is_file():
        return None
    found = store.read_draws(path)
    if found.reward is None or found.log_ref is None:
        return None
    return Pool(found.draws, found.reward, found.log_ref, found.reward_parts, log_pi=found.log_pi)


def _planned(run: Run) -> Evidence:
    pool = _pool(store.draws_path(run.path, "plan"))
    if pool is None or run.target is None or not run.plan:
        return Evidence()
    return evidence_of_plan(
        own_reward(run.target, pool),
        beta=run.target.beta,
        frontier=[_point(record) for record in run.plan.get("frontier") or ()],
        finished=pool.draws.finished,
        generator=torch.Generator().manual_seed(SEED),
    )


def _measured(run: Run, audit: str | Mapping[str, Any] | None) -> Evidence:
    policy, reference = (_pool(store.draws_path(run.path, name)) for name in ("measure", "measure-reference"))
    generator = torch.Generator().manual_seed(SEED)
    if policy is None:
        return Evidence()
    if reference is None or policy.log_pi is None or reference.log_pi is None or run.target is None:
        return Evidence(cut=mean_of(1 - policy.draws.finished.double(), generator=generator))
    found = evidence_of_pools(
        run.target,
        policy,
        reference,
        audit=audited(run.config, policy, reference, audit),
        generator=generator,
    )
    return as_written(found, _published(run.measured))


def audited(
    config: Mapping[str, Any], policy: Pool, reference: Pool, audit: str | Mapping[str, Any] | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What a reward that training did not see says of both pools, [P, G] each; None where there is none.

    Raises:
        ValueError: the audit cannot be loaded, or fails.
    """
    if audit is not None:
        judge = weighted_sum([load_reward(audit)])
        found = [score(judge, pool.draws).total.double() for pool in (policy, reference)]
    else:
        weights = config.get("reward_weights") or ()
        names = [name for name in policy.parts if "/" not in name]  # not an ensemble's members
        unseen = [n for n, weight in zip(names, weights, strict=False) if weight == 0]
        if len(names) != len(weights) or not unseen or unseen[0] not in reference.parts:
            return None
        found = [pool.parts[unseen[0]].double() for pool in (policy, reference)]
    if any(bool(x.isnan().any()) for x in found):
        return None
    return found[0], found[1]


def _published(record: Mapping[str, Any]) -> dict[str, Estimate]:
    """The estimates of measure.json under the names that evidence has for them."""
    names = {"frontier_efficiency": "efficiency"}
    nested = {
        "reference_reward": (record.get("reference") or {}).get("reward"),
        "optimum_reward": (record.get("optimum") or {}).get("reward"),
        "optimum_kl": (record.get("optimum") or {}).get("kl"),
    }
    flat = {names.get(name, name): value for name, value in record.items() if isinstance(value, Mapping)}
    found = {name: _estimate(value) for name, value in {**flat, **nested}.items()}
    return {name: estimate for name, estimate in found.items() if estimate is not None}


def _estimate(record: object) -> Estimate | None:
    """An estimate as it was written; None for anything else, and for a value that was not finite."""
    if not isinstance(record, Mapping) or record.get("value") is None:
        return None
    low, high = (
        infinite if record.get(end) is None else float(record[end])
        for end, infinite in (("low", -math.inf), ("high", math.inf))
    )
    return Estimate(
        float(record["value"]), low, high, int(record.get("n") or 0), tuple(record.get("warnings") or ())
    )


def _point(record: Mapping[str, Any]) -> FrontierPoint:
    estimates = {name: _estimate(record[name]) for name in ("reward", "kl", "log_z")}
    unknown = Estimate(math.nan, math.nan, math.nan, 0)
    return FrontierPoint(
        beta=float(record["beta"]),
        ess=float(record.get("ess") or 0),
        pareto_k=float(math.inf if record.get("pareto_k") is None else record["pareto_k"]),
        reliable=bool(record.get("reliable")) and None not in estimates.values(),
        **{name: unknown if estimate is None else estimate for name, estimate in estimates.items()},
    )


def _done(run: Run) -> Quantity | None:
    wanted = run.config.get("max_steps")
    return exact(len(run.steps) / wanted, len(run.steps)) if run.steps and wanted else None


def _rise(run: Run) -> Quantity | None:
    """The trend of the objective over the fresh draws of training, each prompt against the reference's mean there."""
    plan = _pool(store.draws_path(run.path, "plan"))
    if run.target is None or plan is None:
        return None
    means = own_reward(run.target, plan).double().mean(-1).tolist()
    start = {example.id: mean for example, mean in zip(plan.draws.examples, means, strict=True)}
    pace, paces, values = 0.0, [], []
    for record in run.steps:
        fresh = _pool(store.draws_path(run.path, "train", int(record["step"])))
        if fresh is not None and fresh.log_pi is not None:
            gained = own_reward(run.target, fresh) - run.target.beta * (fresh.log_pi - fresh.log_ref)
            base = [start.get(example.id, math.nan) for example in fresh.draws.examples]
            values.append((gained.double().mean(-1) - torch.tensor(base, dtype=torch.float64)).mean().item())
            paces.append(pace)
        pace += float(record.get("learning_rate") or 0)
    if not values or not all(map(math.isfinite, values)) or pace == 0:
        return None
    return trend(
        torch.tensor(paces), torch.tensor(values), whole=pace, generator=torch.Generator().manual_seed(SEED)
    )
