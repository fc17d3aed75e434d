"""The rules of the diagnosis: for each verdict a margin, what it means, what to do and what to type.

A margin is a number without a unit that is above zero where the rule fires. The order of the table is the order of the
verdicts: first what makes other readings void, then what no training can mend, then what went wrong in training, then good news.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from klimb.numbers.evidence import Evidence
from klimb.numbers.next_run import Setting, again, covering, half_way, larger, lower_beta, times

CLOSE = 0.8
"""share attained from which nothing is left to repair"""
MEDIOCRE = 1 / 3
"""share of the lift in the plan's reach below which the best policy itself is mediocre"""
MOVED = 0.1
"""share of the best policy's KL below which a policy has hardly moved"""
VOID = ("kl", "gap", "attained", "efficiency")
"""numbers that rest on the policy's log-probabilities"""


@dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        name: of the verdict.
        needs: numbers of the evidence that the margin uses; also the lines that are shown.
        margin: of those numbers, each [1 + R]; above zero the rule fires.
        says: what it means.
        advice: what to do.
        command: what to type.
        may: numbers that are used where they are there.
        unless: rules that say more where they fire: then this one is not given.
        voids: numbers that mean nothing where this rule fires: rules below that need one are not judged.
    """

    name: str
    needs: tuple[str, ...]
    margin: Callable[[Any], Tensor]
    says: str
    advice: Callable[[Evidence], str]
    command: Callable[[Evidence, Setting], str]
    may: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    voids: tuple[str, ...] = ()


def every(*margins: Tensor) -> Tensor:
    """The margin of "and": the least of them."""
    return torch.stack(torch.broadcast_tensors(*margins)).amin(0)


def some(*margins: Tensor) -> Tensor:
    """The margin of "or": the largest of them; one that is not defined does not count."""
    return torch.stack(torch.broadcast_tensors(*margins)).nan_to_num(nan=-math.inf).amax(0)


TABLE = (
    Rule(
        "sampler and scorer disagree",
        needs=("mismatch", "overlap", "kl"),
        margin=lambda e: some(e.mismatch - e.kl.clamp_min(1.0) / 10, e.overlap - 1.25),
        voids=VOID,
        says="Completions are drawn from another law than the one they are scored under, so KL and gap are of neither.",
        advice=lambda e: "Measure in float32; if it stays, sampler and scorer differ by more than rounding.",
        command=lambda e, s: shlex.join(["klimb", "measure", s.run, "--dtype", "float32"]),
    ),
    Rule(
        "impossible",
        needs=("reward", "ceiling", "spread", "kl"),
        margin=lambda e: (e.reward - e.ceiling) / e.spread - 0.1,
        voids=VOID,
        says="The policy earns more than any policy can at its KL: one of these numbers is wrong.",
        advice=lambda e: (
            "Look for a bug: sampler and scorer that disagree, a reward that leaks, a KL that is counted short."
        ),
        command=lambda e, s: shlex.join(["klimb", "measure", s.run, "--dtype", "float32"]),
    ),
    Rule(
        "completions truncated",
        needs=("cut",),
        may=("cut_loss", "spread", "never"),
        margin=lambda e: every(
            e.cut - 0.2, some(e.cut_loss / e.spread - 0.25, every(e.cut - 0.5, e.never - 0.5))
        ),
        says="Completions are cut at max_completion_length before they have earned their reward.",
        advice=lambda e: "Allow longer completions, or ask for shorter ones in the prompt.",
        command=lambda e, s: again(
            s, "longer", plan=None, max_completion_length=times(s, "max_completion_length", 2)
        ),
    ),
    Rule(
        "exploration-limited",
        needs=("never",),
        margin=lambda e: e.never - 0.5,
        unless=("completions truncated",),
        says="On most prompts the reference never finds any reward, so there is nothing to reinforce.",
        advice=lambda e: (
            "Draw more completions a prompt, take easier prompts or a better starting policy, or give partial credit."
        ),
        command=lambda e, s: again(s, "more-draws", plan=None, num_plan_draws=times(s, "num_plan_draws", 4)),
    ),
    Rule(
        "reward flat",
        needs=("flat",),
        margin=lambda e: e.flat - 0.5,
        unless=("completions truncated", "exploration-limited"),
        says="On most prompts every completion has the same reward: nothing tells good from bad there.",
        advice=lambda e: "Change the reward, the prompts or the sampler: no training can help.",
        command=lambda e, s: shlex.join(["klimb", "sample", s.run, "--num-draws", "8", "--show", "20"]),
    ),
    Rule(
        "beta too high",
        needs=("lift_share", "plan_lift"),
        margin=lambda e: MEDIOCRE - e.lift_share,
        says="The best policy at this beta is itself hardly better than the reference: training cannot go further than it.",
        advice=lower_beta,
        command=half_way,
    ),
    Rule(
        "reward hacked",
        needs=("reward_gain", "audit_gain", "spread"),
        may=("tail",),
        margin=lambda e: every(e.reward_gain / e.spread - 0.1, -e.audit_gain),
        says="The reward rose while the reward that training did not see fell.",
        advice=lambda e: (
            "Read the completions of highest reward; add what the audit sees to reward_funcs, and until then raise beta."
        ),
        command=lambda e, s: again(s, "higher-beta", beta=times(s, "beta", 2.0)),
    ),
    Rule(
        "mode dropped",
        needs=("dropped",),
        may=("gap", "self_gap"),
        margin=lambda e: e.dropped - 0.1,
        says="The policy has given up completions that the best policy would make; its own draws do not show it.",
        advice=lambda e: "Train with forward_kl, which covers what the target has, or with a larger beta.",
        command=covering,
    ),
    Rule(
        "stopped early",
        needs=("done",),
        margin=lambda e: 0.99 - e.done,
        says="Training was stopped before its last step.",
        advice=lambda e: "Go on with it.",
        command=lambda e, s: shlex.join(["klimb", "climb", "--resume", s.run]),
    ),
    Rule(
        "hardly moved",
        needs=("kl", "optimum_kl", "gap", "spread"),
        margin=lambda e: every(MOVED - e.kl / e.optimum_kl, e.gap / e.spread - 0.1),
        says="The policy is where it started: the optimizer is stuck, or its steps are too small.",
        advice=lambda e: (
            "Raise the learning rate tenfold; if nothing moves, look at grad_norm in metrics.jsonl."
        ),
        command=lambda e, s: again(s, "faster", learning_rate=times(s, "learning_rate", 10.0)),
    ),
    Rule(
        "KL wasted",
        needs=("efficiency", "reward", "bought", "kl", "optimum_kl", "spread", "wasted"),
        margin=lambda e: every(
            (e.bought - e.reward) / e.spread - 0.2,
            some(0.4 - e.efficiency, every(CLOSE - e.efficiency, e.kl / e.optimum_kl - 1)),
        ),
        says="The policy went away from the reference without earning what that distance could buy.",
        advice=lambda e: (
            "Lower the learning rate; check that the method charges KL at all (klimb methods inspect)."
        ),
        command=lambda e, s: again(s, "slower", learning_rate=times(s, "learning_rate", 1 / 3)),
    ),
    Rule(
        "capacity",
        needs=("gap", "attained", "rise", "kl", "optimum_kl"),
        margin=lambda e: every(CLOSE - e.attained, e.kl / e.optimum_kl - MOVED, 0.25 - e.rise / e.gap),
        says="Training has come to rest short of the best policy: this family of policies may not hold it.",
        advice=lambda e: (
            "Let more weights move: more layers or a higher rank; where all of them do, a larger model."
        ),
        command=larger,
    ),
    Rule(
        "undertrained",
        needs=("kl", "optimum_kl", "attained"),
        may=("reward", "optimum_reward", "gap", "rise"),
        unless=("stopped early", "hardly moved", "capacity"),
        margin=lambda e: every(CLOSE - e.attained, 1 - e.kl / e.optimum_kl),
        says="KL and reward are both still below the best policy's.",
        advice=lambda e: (
            "Train longer or with a larger learning rate; if the gap stays, the family may be too small."
        ),
        command=lambda e, s: again(s, "longer-training", max_steps=times(s, "max_steps", 2)),
    ),
    Rule(
        "close to the best",
        needs=("attained", "gap"),
        margin=lambda e: e.attained - CLOSE,
        says="The policy went most of the way to the best policy at this beta.",
        advice=lambda e: "Stop here, or lower beta to climb further.",
        command=lambda e, s: shlex.join(["klimb", "sample", s.run]),
    ),
)
"""the decision table, in the order in which verdicts are given"""
