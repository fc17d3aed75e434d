"""What is left to climb on each held-out prompt, from the draws that `klimb measure` kept of policy and reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.numbers.certificate import MEANS, means_of_prompts, stacked
from klimb.numbers.estimate import Estimate, bootstrap
from klimb.report.found import Found, as_number
from klimb.store import StoredDraws, read_draws

MAX_ROWS = 500
SEED = 0
WANTED = ("reference_reward", "reward", "kl", "gap")


@dataclass(frozen=True)
class HeldOut:
    """One prompt: its text, and estimates over its own draws, 95 % intervals from resampled draws.

    Attributes:
        prompt: text or chat messages.
        numbers: name, as in measure.json -> estimate.
    """

    prompt: object
    numbers: Mapping[str, Estimate]


def held_out(found: Found) -> list[HeldOut]:
    """The held-out prompts with the largest gap first; none where their draws, rewards or a beta are not there.

    Only for the plain target (`target: {kind: tilt}`), whose reward is the one that is written.
    """
    files = [found.path / "draws" / name for name in ("measure.parquet", "measure-reference.parquet")]
    beta = as_number(found.measurement.get("beta"))
    plain = (found.measurement.get("target") or {}).get("kind", "tilt") == "tilt"
    if beta is None or beta <= 0 or not plain or not all(file.is_file() for file in files):
        return []
    policy, reference = (read_draws(file) for file in files)
    drawn, before = _numbers(policy), _numbers(reference)
    if (
        drawn is None
        or before is None
        or len(drawn) != len(before)
        or min(drawn.shape[1], before.shape[1]) < 2
    ):
        return []
    columns = [list(MEANS).index(name) for name in WANTED]

    def each(one: Tensor, other: Tensor) -> Tensor:
        return means_of_prompts(one, other, beta, [], correct=True)[..., columns]

    generator = torch.Generator().manual_seed(SEED)
    low, high = bootstrap(each, drawn, before, generator=generator, num_resamples=400, within=True)
    value = each(drawn, before)
    own, other = drawn.shape[1], before.shape[1]
    counts = {"reference_reward": other, "reward": own, "kl": own, "gap": own + other}
    rows = [
        HeldOut(
            example.prompt,
            {
                name: Estimate(value[p, k].item(), low[p, k].item(), high[p, k].item(), counts[name])
                for k, name in enumerate(WANTED)
            },
        )
        for p, example in enumerate(policy.draws.examples)
    ]
    return sorted(rows, key=lambda row: -row.numbers["gap"].value)[:MAX_ROWS]


def _numbers(stored: StoredDraws) -> Tensor | None:
    """[P, G, 3] reward, log pi, log ref; None where one is missing or a reward is forbidden."""
    reward, log_pi, log_ref = stored.reward, stored.log_pi, stored.log_ref
    if reward is None or log_pi is None or log_ref is None or not reward.isfinite().all():
        return None
    return stacked("held out", reward, log_pi, log_ref)
