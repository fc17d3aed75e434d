"""The plan's draws as the page carries them, so that its slider can compute: every reward, and the texts of some.

P prompts, G draws a prompt. Nats; reward in its own units.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klimb.numbers.tilt import shares, tilted_mean
from klimb.numbers.weights import pareto_threshold
from klimb.report.draws import chosen_rows, cut, opening, rows_of, spoken
from klimb.report.found import Found, chosen_beta, frontier
from klimb.store import read_draws

MAX_DRAWS = 60_000
"""320 kB of rewards; the page of a larger plan has no slider"""
MAX_ROWS = 600
MAX_BYTES = 350_000
BINS = 30


@dataclass(frozen=True)
class CarriedPool:
    """What the slider needs.

    Attributes:
        reward: [P, G], as float32 holds it; -inf is forbidden.
        betas: falling; the grid whose intervals are known, and where the slider goes.
        grid: for reward, kl and log_z: the lower and the upper ends less the value, and Pareto k, at each beta.
        beta: where the slider stands at first.
        prompts: beginning of each prompt's text.
        rows: place of the prompt, draw, text and characters left out, of the draws whose texts are carried.
        file: the Parquet file with all of them.
    """

    reward: Tensor
    betas: Sequence[float]
    grid: Mapping[str, Sequence[float]]
    beta: float
    prompts: Sequence[str]
    rows: Sequence[tuple[int, int, str, int]]
    file: str

    def as_dict(self) -> dict[str, Any]:
        """As JSON in the page."""
        flat = self.reward.float().contiguous().numpy().astype("<f4").tobytes()
        return {
            "rewards": base64.b64encode(flat).decode(),
            "draws": self.reward.shape[1],
            "betas": list(self.betas),
            "grid": {name: list(values) for name, values in self.grid.items()},
            "beta": self.beta,
            "threshold": pareto_threshold(self.reward.numel()),
            "edges": bin_edges(self.reward),
            "prompts": list(self.prompts),
            "rows": [list(row) for row in self.rows],
        }


def carried_pool(found: Found) -> CarriedPool | None:
    """The plan's draws for the slider; None where there are none, or where the plan's numbers are not of their rewards.

    A target with a reward of its own (per length, standardised, ...) has a frontier of that reward, which the draws do
    not keep: recomputing a point of the frontier tells.
    """
    points = sorted((p for p in frontier(found) if p.beta), key=lambda p: -(p.beta or 0.0))
    path = next((path for path in found.draws if path.stem == "plan"), None)
    if path is None or len(points) < 2:
        return None
    stored = read_draws(path)
    reward = stored.reward
    if reward is None or bool(reward.isnan().any()) or not 0 < reward.numel() <= MAX_DRAWS:
        return None
    allowed = reward.isfinite().any(1)
    if not bool(allowed.any()):
        return None
    finite = reward[reward.isfinite()]
    close = 1e-4 * (finite.max() - finite.min()).item()
    middle = points[len(points) // 2]
    again = tilted_mean(reward[allowed].double(), middle.beta or 1.0).mean().item()
    if not abs(again - middle.reward.value) <= close:
        return None
    betas = [p.beta or 1.0 for p in points]
    beta, _ = chosen_beta(found)
    grid: dict[str, list[float]] = {}
    for name in ("reward", "kl", "log_z"):
        estimates = [getattr(p, name) for p in points]
        if any(e is None or not math.isfinite(e.low + e.high) for e in estimates):
            return None
        grid[f"{name}_low"] = [e.low - e.value for e in estimates]
        grid[f"{name}_high"] = [e.high - e.value for e in estimates]
    grid["pareto_k"] = [math.inf if p.pareto_k is None else p.pareto_k for p in points]
    grid["pareto_k"] = [k if math.isfinite(k) else 99.0 for k in grid["pareto_k"]]  # JSON has no infinity
    said_once = opening([example.prompt for example in stored.draws.examples])
    rows = chosen_rows(rows_of(stored, "reference", beta), MAX_ROWS, MAX_BYTES)
    return CarriedPool(
        reward=reward.float(),
        betas=betas,
        grid=grid,
        beta=min(max(beta or betas[len(betas) // 2], betas[-1]), betas[0]),
        prompts=[cut(spoken(example.prompt, without=said_once), 160)[0] for example in stored.draws.examples],
        rows=[(row.place, row.draw, row.completion, row.more) for row in rows],
        file=path.name,
    )


def bin_edges(reward: Tensor, bins: int = BINS) -> list[float]:
    """Edges of equal bins over all finite rewards.

    Example:
        >>> bin_edges(torch.tensor([[0.0, 1.0, -math.inf]]), bins=2)
        [0.0, 0.5, 1.0]
    """
    finite = reward[reward.isfinite()].double()
    low, high = finite.min().item(), finite.max().item()
    return torch.linspace(low, high if high > low else low + 1.0, bins + 1, dtype=torch.float64).tolist()


def histogram_rows(reward: Tensor, beta: float, edges: Sequence[float]) -> list[dict[str, Any]]:
    """Shares of the rewards in each bin, under the reference and under its tilt at beta; each sums to one.

    Example:
        >>> rows = histogram_rows(torch.tensor([[0.0, 1.0]]), 1 / math.log(3), [0.0, 0.5, 1.0])
        >>> [(row["what"], round(row["share"], 2)) for row in rows]
        [('reference', 0.5), ('best policy', 0.25), ('reference', 0.5), ('best policy', 0.75)]
    """
    r = reward.double()
    known = r.isfinite()
    bins = len(edges) - 1
    place = ((r.nan_to_num(neginf=edges[0]) - edges[0]) / (edges[-1] - edges[0]) * bins).floor()
    place = place.clamp(0, bins - 1).long()[known]
    rows = []
    counted = {}
    for what, mass in (("reference", known.double()), ("best policy", shares(r / beta))):
        total = torch.zeros(bins, dtype=torch.float64).scatter_add(0, place, mass[known])
        counted[what] = (total / total.sum()).tolist()
    for i in range(bins):
        for what, share in counted.items():
            rows.append({"from": edges[i], "to": edges[i + 1], "what": what, "share": share[i]})
    return rows
