"""Several runs side by side: what each reached, and which is nearer to the best policy as far as their draws can tell.

Runs are compared on the held-out prompts that all of them were measured on, by the draws that `klimb measure` kept.
They must have one reference and one reward: between others no difference means anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from klimb.data import Example
from klimb.numbers.estimate import Estimate
from klimb.numbers.paired import Difference, clearly_behind, paired_difference
from klimb.report.found import Found, as_estimate, chosen_beta, read_run
from klimb.report.time_chart import seconds_spent
from klimb.store import read_draws

ALPHA = 0.05
SEED = 0
"""of the resamples: the same runs compare the same"""
SAME = {
    "model": "reference",
    "reward": "reward",
    "template": "chat template",
    "max_completion_length": "max_completion_length",
}
"""what draws depend on -> what it is called"""


@dataclass(frozen=True)
class Side:
    """One of the runs.

    Attributes:
        name: of its directory, made longer where two are alike.
        found: its files.
        seconds: that its steps took.
        objective: J = E[r] - beta KL on the shared prompts, at the beta of the comparison.
    """

    name: str
    found: Found
    seconds: float
    objective: float


@dataclass(frozen=True)
class Comparison:
    """What several runs say of each other.

    Attributes:
        beta: at which J is formed: the first run's.
        betas: of each run, by name.
        prompts: how many all were measured on.
        left_out: prompts that not all were measured on.
        sides: the runs, in the order given.
        pairs: (one, other) by name -> one minus other, every pair once.
        leader: the run with the largest J on these draws.
        behind: those that it is ahead of by more than chance.
        options: names of options -> each run's value, where they differ.
    """

    beta: float
    betas: Mapping[str, float | None]
    prompts: int
    left_out: int
    sides: Sequence[Side]
    pairs: Mapping[tuple[str, str], Difference]
    leader: str
    behind: Sequence[str]
    options: Mapping[str, Sequence[str]]

    @property
    def best(self) -> str | None:
        """The run that is ahead of all others by more than chance; None if there is none."""
        return self.leader if len(self.behind) == len(self.sides) - 1 else None

    @property
    def words(self) -> str:
        """One sentence that says which is better, as far as the draws can tell."""
        if self.best is not None:
            than = "the other" if len(self.sides) == 2 else f"each of the {len(self.sides) - 1} others"
            return f"{self.leader} is nearer to the best policy than {than}, by more than chance would do."
        close = [side.name for side in self.sides if side.name not in {*self.behind, self.leader}]
        surely = (
            f"{self.leader} is nearer to the best policy than {' and '.join(self.behind)}; "
            if self.behind
            else ""
        )
        return (
            f"{surely}the draws do not tell whether {self.leader} is nearer than {' and '.join(close)}: it is ahead on {self.prompts} "
            "shared prompts, but by no more than chance could do."
        )


def compare(paths: Sequence[str | Path]) -> Comparison:
    """Read runs and compare them.

    Args:
        paths: directories of measured runs, two or more.

    Raises:
        ValueError: one run twice, a run that was not measured with a reward, runs of different references or rewards,
            or without prompts in common.
    """
    founds = [read_run(path) for path in paths]
    places = [found.path.resolve() for found in founds]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise ValueError(f"report: {twice.name} is given twice; give different runs")
    names = _names(places)
    pools = [_measured(found) for found in founds]
    _one_target(founds, pools)
    draws, all_prompts = _on_shared_prompts([pool for pool, _ in pools])
    shared = len(draws[0])
    if shared < 2:
        raise ValueError(
            f"report: {names[0]} and the others were measured on {shared} prompts in common; expected at least 2: give them one "
            "dataset_name and dataset_test_split"
        )
    betas = {name: chosen_beta(found)[0] for name, found in zip(names, founds, strict=True)}
    beta = betas[names[0]]
    if beta is None:
        raise ValueError(f"report: {founds[0].path} says no beta; measure it again")
    generator = torch.Generator().manual_seed(SEED)
    pairs = {
        (names[i], names[j]): paired_difference(draws[i], draws[j], beta=beta, generator=generator)
        for i in range(len(names))
        for j in range(i)
    }
    objective = {
        name: (x[..., 0] - beta * x[..., 1]).mean().item() for name, x in zip(names, draws, strict=True)
    }
    leader = max(objective, key=objective.__getitem__)
    against = {(set(pair) - {leader}).pop(): found.p_value for pair, found in pairs.items() if leader in pair}
    return Comparison(
        beta=beta,
        betas=betas,
        prompts=shared,
        left_out=all_prompts - shared,
        sides=[
            Side(name, found, sum(seconds_spent(found).values()), objective[name])
            for name, found in zip(names, founds, strict=True)
        ],
        pairs=pairs,
        leader=leader,
        behind=clearly_behind(against, level=ALPHA),
        options=_options(founds),
    )


def record(found: Comparison) -> dict[str, Any]:
    """All numbers of a comparison, as `klimb report --json` prints them."""

    def estimate(e: Estimate) -> dict[str, Any]:
        return {"value": e.value, "low": e.low, "high": e.high, "n": e.n, "warnings": list(e.warnings)}

    return {
        "beta": found.beta,
        "prompts": found.prompts,
        "left_out": found.left_out,
        "runs": [
            {
                "name": side.name,
                "path": str(side.found.path),
                "beta": found.betas[side.name],
                "seconds": side.seconds,
                "objective": side.objective,
                "measure": side.found.measurement,
            }
            for side in found.sides
        ],
        "differences": [
            {
                "one": one,
                "other": other,
                "reward": estimate(d.reward),
                "kl": estimate(d.kl),
                "objective": estimate(d.objective),
                "p_value": d.p_value,
            }
            for (one, other), d in found.pairs.items()
        ],
        "best": found.best,
        "leader": found.leader,
        "says": found.words,
        "options": {name: list(values) for name, values in found.options.items()},
    }


def _names(places: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    for parts in range(1, max(len(place.parts) for place in places) + 1):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def _measured(found: Found) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Of the policy's held-out draws: prompt -> [G, 2] reward and log pi/ref; and what they depend on."""
    if as_estimate(found.measurement.get("reward")) is None:
        raise ValueError(
            f"report: {found.path} has no measured reward, so it cannot be compared; klimb measure {found.path} measures it"
        )
    stored = read_draws(found.path / "draws" / "measure.parquet")
    if stored.reward is None or stored.log_pi is None or stored.log_ref is None:
        raise ValueError(
            f"report: {found.path}: its draws hold no reward or log-probability; klimb measure {found.path} draws them again"
        )
    numbers = torch.stack([stored.reward, stored.log_pi - stored.log_ref], -1).double()
    if not numbers.isfinite().all():
        raise ValueError(
            f"report: {found.path}: its policy draws what is forbidden (reward -inf), so it is infinitely far from the best one and "
            "no difference to it is finite; leave it out"
        )
    keys = [_key(example) for example in stored.draws.examples]
    if len(set(keys)) < len(keys):
        raise ValueError(
            f"report: {found.path} was measured twice on one prompt; prompts must differ to be paired"
        )
    return dict(zip(keys, numbers, strict=True)), stored.hashes


def _key(example: Example) -> str:
    return json.dumps([example.prompt, dict(example.columns)], sort_keys=True, default=str)


def _one_target(founds: Sequence[Found], pools: Sequence[tuple[Any, Mapping[str, str]]]) -> None:
    first, known = founds[0].path, pools[0][1]
    for found, (_, hashes) in zip(founds[1:], pools[1:], strict=True):
        apart = [word for name, word in SAME.items() if hashes.get(name) != known.get(name)]
        if apart:
            raise ValueError(
                f"report: {first} and {found.path} differ in {', '.join(apart)}; only runs that climb one reward from one "
                "reference can be compared"
            )


def _on_shared_prompts(pools: Sequence[Mapping[str, Tensor]]) -> tuple[list[Tensor], int]:
    """Of each run [P, G, 2] on the prompts of all, in the first one's order; and how many prompts any has."""
    keys = [key for key in pools[0] if all(key in pool for pool in pools)]
    every = {key for pool in pools for key in pool}
    return [
        torch.stack([pool[key] for key in keys]) if keys else torch.zeros(0, 1, 2) for pool in pools
    ], len(every)


def _options(founds: Sequence[Found]) -> dict[str, list[str]]:
    """Options of config.yaml that are not the same everywhere, one level deep."""
    written = [_flat(yaml.safe_load(found.config) or {}) for found in founds]
    names = dict.fromkeys(name for one in written for name in one)
    values = {name: [_shown(one.get(name)) for one in written] for name in names if name != "output_dir"}
    return {name: told for name, told in values.items() if len(set(told)) > 1}


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        inner = value if isinstance(value, Mapping) and name in {"family", "target"} else None
        flat |= {name: value} if inner is None else {f"{name}.{key}": x for key, x in inner.items()}
    return flat


def _shown(value: object) -> str:
    return "–" if value is None else str(value)
