"""What a run left on disk, read leniently: a file that is not there yet is empty here, further keys do no harm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from klimb.nearest import nearest_run
from klimb.numbers.estimate import Estimate
from klimb.store import read_json, read_jsonl


@dataclass(frozen=True)
class Found:
    """The files of a run directory; empty where there is none.

    Attributes:
        path: the run directory.
        config: text of config.yaml.
        environment: env.json.
        plan: plan.json.
        steps: the records of metrics.jsonl.
        measurement: measure.json.
        draws: the Parquet files.
    """

    path: Path
    config: str
    environment: Mapping[str, Any]
    plan: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    measurement: Mapping[str, Any]
    draws: Sequence[Path]


@dataclass(frozen=True)
class Point:
    """One point of the frontier, or a policy beside it: reward against KL in nats.

    Attributes:
        reward: in its own units.
        kl: nats.
        beta: reward per nat, where it is the best policy of one.
        log_z: nats.
        ess: effective draws a prompt.
        pareto_k: tail shape of the weights.
        reliable: whether the pool supports it.
    """

    reward: Estimate
    kl: Estimate
    beta: float | None = None
    log_z: Estimate | None = None
    ess: float | None = None
    pareto_k: float | None = None
    reliable: bool = True


def read_run(run: str | Path) -> Found:
    """Read what is there of a run.

    Raises:
        ValueError: nothing of a run is there, or a file is not what its name says.
    """
    path = Path(run)
    names = ("config.yaml", "env.json", "plan.json", "metrics.jsonl", "measure.json")
    if not any((path / name).is_file() for name in names):
        got = (
            "got a folder without a run"
            if path.is_dir()
            else "got a file"
            if path.exists()
            else "no such folder"
        )
        raise ValueError(
            f"{path}: {got}{nearest_run(path)}, expected a folder that holds at least one of {', '.join(names)}; "
            "name the output_dir of a run"
        )

    def mapping(name: str) -> Mapping[str, Any]:
        value = read_json(path / name) if (path / name).is_file() else {}
        if not isinstance(value, Mapping):
            raise ValueError(f"{path / name}: got a {type(value).__name__}, expected a JSON object")
        return value

    config = path / "config.yaml"
    return Found(
        path=path,
        config=config.read_text(encoding="utf-8") if config.is_file() else "",
        environment=mapping("env.json"),
        plan=mapping("plan.json"),
        steps=read_jsonl(path / "metrics.jsonl") if (path / "metrics.jsonl").is_file() else [],
        measurement=mapping("measure.json"),
        draws=sorted((path / "draws").glob("*.parquet")),
    )


def as_number(value: object) -> float | None:
    """A finite number, or None."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if math.isfinite(value) else None


def as_estimate(value: object) -> Estimate | None:
    """What was written as an estimate; a bare number has no interval (NaN); None where there is no value.

    Example:
        >>> print(as_estimate({"value": 0.5, "low": 0.4, "high": 0.6, "n": 128, "warnings": []}))
        0.50 [0.40, 0.60]
        >>> as_estimate({"value": None}) is None
        True
    """
    written: Mapping[str, Any] = value if isinstance(value, Mapping) else {"value": value}
    centre, low, high = (as_number(written.get(key)) for key in ("value", "low", "high"))
    if centre is None:
        return None
    return Estimate(
        centre,
        math.nan if low is None else low,
        math.nan if high is None else high,
        int(as_number(written.get("n")) or 0),
        tuple(str(warning) for warning in written.get("warnings") or ()),
    )


def as_point(record: object) -> Point | None:
    """A record with reward and kl; None without one of them."""
    if not isinstance(record, Mapping):
        return None
    reward, kl = as_estimate(record.get("reward")), as_estimate(record.get("kl"))
    if reward is None or kl is None:
        return None
    return Point(
        reward=reward,
        kl=kl,
        beta=as_number(record.get("beta")),
        log_z=as_estimate(record.get("log_z")),
        ess=as_number(record.get("ess")),
        pareto_k=as_number(record.get("pareto_k")),
        reliable=bool(record.get("reliable", reward.reliable)),
    )


def frontier(found: Found) -> list[Point]:
    """The predicted frontier, from small KL to large."""
    points = [as_point(record) for record in found.plan.get("frontier") or ()]
    return sorted((p for p in points if p is not None), key=lambda p: p.kl.value)


def chosen_beta(found: Found) -> tuple[float | None, str]:
    """The beta of the run, and why it is this one."""
    written = found.plan.get("beta")
    target = found.plan.get("target")
    means = target.get("means") if isinstance(target, Mapping) else None
    if isinstance(written, Mapping):
        why = str(written.get("why") or "")
        return as_number(written.get("value")), f"{why}; {means}" if means else why
    measured = as_number(found.measurement.get("beta"))
    return (measured if as_number(written) is None else as_number(written)), ""


def reference_reward(found: Found) -> Estimate | None:
    """The reference's reward on the prompts of the plan."""
    return as_estimate((found.plan.get("reference") or {}).get("reward"))


def predicted(found: Found) -> Point | None:
    """The best policy at the chosen beta, values and intervals interpolated on the plan's grid in log beta.

    None where the plan has no beta, or one outside its grid.
    """
    beta, _ = chosen_beta(found)
    grid = sorted(((p.beta, p) for p in frontier(found) if p.beta), key=lambda pair: pair[0])
    if not grid or not beta or not grid[0][0] * (1 - 1e-9) <= beta <= grid[-1][0] * (1 + 1e-9):
        return None
    logs = np.log([b for b, _ in grid])
    at = math.log(beta)
    near = np.abs(logs - at) < 1e-9
    first = int(np.argmax(near)) if near.any() else int(np.searchsorted(logs, at)) - 1
    beside = [p for _, p in grid[first : first + (1 if near.any() else 2)]]

    def between(name: str) -> Estimate:
        estimates = [getattr(p, name) for _, p in grid]
        value, low, high = (
            float(np.interp(at, logs, [getattr(e, end) for e in estimates]))
            for end in ("value", "low", "high")
        )
        said = dict.fromkeys(warning for p in beside for warning in getattr(p, name).warnings)
        return Estimate(value, low, high, getattr(beside[0], name).n, tuple(said))

    return Point(between("reward"), between("kl"), beta, reliable=all(p.reliable for p in beside))


def of_step(record: Mapping[str, Any], name: str) -> Estimate | None:
    """An estimate of a step's fresh draws: under "estimates", or beside the step's number. None if it drew nothing."""
    return as_estimate((record.get("estimates") or {}).get(name)) or as_estimate(record.get(name))


def evaluation(record: Mapping[str, Any], name: str) -> Estimate | None:
    """An estimate of a step's evaluation on held-out prompts, if there was one."""
    held_out = record.get("evaluation") or {}
    known = "objective" if name == "regularised_reward" else name  # as the certificate calls it
    return as_estimate(held_out.get(name)) or as_estimate(held_out.get(known))
