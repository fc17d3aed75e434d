"""Why a policy is where it is: a table of rules over the numbers of a run, and what to type next.

A rule is a margin: a number without a unit that is above zero where the rule fires. It is computed on the estimates and
again on every resample of the prompts; the share of resamples on which it fires is how sure the verdict is. The order of
the table is the order of the verdicts: first what makes other readings void, then what no training can mend, then what
went wrong in training, then good news.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from klimb.numbers.estimate import Estimate
from klimb.numbers.evidence import Evidence, Quantity

SURE, LIKELY, UNLIKELY = 0.95, 0.8, 0.2
"""shares of resamples from which a verdict is sure, or likely, and below which it is ruled out"""
CLOSE = 0.8
"""share attained from which nothing is left to repair"""
MEDIOCRE = 1 / 3
"""share of the lift in the plan's reach below which the best policy itself is mediocre"""
MOVED = 0.1
"""share of the best policy's KL below which a policy has hardly moved"""
VOID = ("kl", "gap", "attained", "efficiency")
"""numbers that rest on the policy's log-probabilities"""
MOST = 100
"""times as many draws as there are: more is never asked for"""


@dataclass(frozen=True)
class Verdict:
    """One reason, how sure it is, what it rests on, and what to do.

    Attributes:
        name: of the rule.
        confidence: "sure", "likely", "cannot tell" or "known"; the last for what needs no estimate.
        share: of the resamples on which the rule fires.
        says: what it means, one sentence.
        evidence: the numbers it rests on, a line each, with their intervals.
        advice: what to do.
        command: what to type; empty where nothing is known of a run on disk.
        more: draws in addition that would decide it; 0 where it is sure.
    """

    name: str
    confidence: str
    share: float
    says: str
    evidence: tuple[str, ...]
    advice: str
    command: str = ""
    more: int = 0


@dataclass(frozen=True)
class Diagnosis:
    """The verdicts, first the one to act on, and what was not measured.

    Attributes:
        verdicts: at least one.
        unmeasured: name of a rule -> the numbers that it lacks.
        shares: name of a rule -> the share of resamples on which it fires, for those that could be judged.
    """

    verdicts: tuple[Verdict, ...]
    unmeasured: Mapping[str, tuple[str, ...]]
    shares: Mapping[str, float]

    @property
    def verdict(self) -> str:
        """Name of the first verdict."""
        return self.verdicts[0].name

    @property
    def because(self) -> str:
        """What the first verdict rests on, in one line."""
        return "; ".join(self.verdicts[0].evidence)

    @property
    def advice(self) -> str:
        """What the first verdict advises."""
        return self.verdicts[0].advice


@dataclass(frozen=True)
class Setting:
    """What a command line needs to know of a run.

    Attributes:
        run: its directory, as it was named.
        config: its resolved configuration.
        planned: whether its plan's draws are there.
        trained: whether its policy is there.
        rewarded: whether a reward says what is good.
    """

    run: str
    config: Mapping[str, Any] = field(default_factory=dict)
    planned: bool = True
    trained: bool = True
    rewarded: bool = True


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


def again(s: Setting, word: str, **options: object) -> str:
    """The command that does a run again with other options, on the same plan unless a new one is asked for.

    Example:
        >>> again(Setting("runs/a"), "b", learning_rate=1e-3)
        'klimb climb -c runs/a/config.yaml --plan runs/a --output_dir runs/a-b --learning_rate 0.001'
    """
    given: dict[str, object] = {"plan": s.run} if s.planned else {}
    given |= {"output_dir": f"{s.run}-{word}", **options}
    words = ["klimb", "climb", "-c", f"{s.run}/config.yaml"]
    for name, value in given.items():
        said = "null" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        words += [f"--{name}", said]
    return shlex.join(words)


def _of(config: Mapping[str, Any], name: str, times: float) -> float | int:
    value = config.get(name) or 1
    return math.ceil(times * value) if isinstance(value, int) else times * value


def _covering(e: Evidence, s: Setting) -> str:
    return again(s, "covering", method="forward_kl", num_replay=0, replay_steps=0)


def _larger(e: Evidence, s: Setting) -> str:
    family = s.config.get("family") or {}
    if family.get("layers"):
        return again(s, "larger", **{"family.layers": None})
    if family.get("kind") == "lora":
        return again(s, "larger", **{"family.r": 4 * family["r"], "family.alpha": 4.0 * family["alpha"]})
    if family.get("kind") == "soft_prompt":
        tokens = 2 * family["num_virtual_tokens"]
        return again(s, "larger", **{"family.num_virtual_tokens": tokens})
    return ""  # every weight moves already: only another model is larger


def _lower_beta(e: Evidence) -> str:
    """The betas of the plan at which p earns a half, three quarters and all of what the plan can predict."""
    points = sorted((p for p in e.frontier if p.reliable), key=lambda p: -p.beta)
    if not points or e.plan_lift is None or e.lift_share is None:
        return "Lower beta."
    best = e.plan_lift.estimate.value / e.lift_share.estimate.value
    start = points[-1].reward.value - best
    told = []
    for share in (0.5, 0.75, 1.0):
        point = next((p for p in points if p.reward.value - start >= share * best - 1e-9), points[-1])
        told.append(f"beta {point.beta:.3g} would earn {point.reward} at KL {point.kl} nats")
    return f"Lower beta: by the plan, {'; '.join(dict.fromkeys(told))}."


def _half_way(e: Evidence, s: Setting) -> str:
    """The largest beta that earns three quarters of what is in the plan's reach."""
    points = sorted((p for p in e.frontier if p.reliable), key=lambda p: -p.beta)
    assert e.plan_lift is not None
    assert e.lift_share is not None
    best = e.plan_lift.estimate.value / e.lift_share.estimate.value
    start = points[-1].reward.value - best
    point = next((p for p in points if p.reward.value - start >= 0.75 * best), points[-1])
    return again(s, "lower-beta", beta=point.beta)


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
            s, "longer", plan=None, max_completion_length=_of(s.config, "max_completion_length", 2)
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
        command=lambda e, s: again(
            s, "more-draws", plan=None, num_plan_draws=_of(s.config, "num_plan_draws", 4)
        ),
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
        advice=_lower_beta,
        command=_half_way,
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
        command=lambda e, s: again(s, "higher-beta", beta=_of(s.config, "beta", 2.0)),
    ),
    Rule(
        "mode dropped",
        needs=("dropped",),
        may=("gap", "self_gap"),
        margin=lambda e: e.dropped - 0.1,
        says="The policy has given up completions that the best policy would make; its own draws do not show it.",
        advice=lambda e: "Train with forward_kl, which covers what the target has, or with a larger beta.",
        command=_covering,
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
        command=lambda e, s: again(s, "faster", learning_rate=_of(s.config, "learning_rate", 10.0)),
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
        command=lambda e, s: again(s, "slower", learning_rate=_of(s.config, "learning_rate", 1 / 3)),
    ),
    Rule(
        "capacity",
        needs=("gap", "attained", "rise", "kl", "optimum_kl"),
        margin=lambda e: every(CLOSE - e.attained, e.kl / e.optimum_kl - MOVED, 0.25 - e.rise / e.gap),
        says="Training has come to rest short of the best policy: this family of policies may not hold it.",
        advice=lambda e: (
            "Let more weights move: more layers or a higher rank; where all of them do, a larger model."
        ),
        command=_larger,
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
        command=lambda e, s: again(s, "longer-training", max_steps=_of(s.config, "max_steps", 2)),
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

LABELS = {
    "reward": ("reward", ""),
    "reference_reward": ("the reference's reward", ""),
    "optimum_reward": ("the best policy's reward", ""),
    "kl": ("KL to the reference", " nats"),
    "optimum_kl": ("the best policy's KL", " nats"),
    "gap": ("gap", ""),
    "self_gap": ("gap that the policy's own draws show", ""),
    "attained": ("share attained", ""),
    "efficiency": ("share of the reward that this KL can buy", ""),
    "overlap": ("mean of policy / reference over the reference's draws (1 if all is well)", ""),
    "bought": ("the most that this KL can buy", ""),
    "ceiling": ("the most that any policy can earn at this KL, by the reference's draws", ""),
    "wasted": ("KL beyond what this reward costs", " nats"),
    "spread": ("standard deviation of the reference's reward within a prompt", ""),
    "dropped": ("share of the best policy on completions that the policy makes 20 times rarer", ""),
    "cut": ("share of completions cut", ""),
    "cut_loss": ("reward of finished completions above that of cut ones", ""),
    "mismatch": ("KL from sampler to scorer", " nats"),
    "reward_gain": ("gain in reward", ""),
    "audit_gain": ("gain in the audit reward", ""),
    "tail": ("tail index of the reward (0.5 and more: extremes rule it)", ""),
    "flat": ("share of prompts where all rewards are the same", ""),
    "never": ("share of prompts where the reference finds no reward", ""),
    "lift_share": ("the best policy's lift, as a share of the most in the plan's reach", ""),
    "plan_lift": ("the best policy's lift over the reference, by the plan", ""),
    "done": ("share of the steps taken", ""),
    "rise": ("what as much training again would add, by the trend", ""),
}
"""number of the evidence -> what it is called, and its unit"""


def diagnose(e: Evidence, setting: Setting | None = None) -> Diagnosis:
    """Name the reasons why a policy is where it is, the first to act on first.

    Every rule of TABLE whose numbers were measured is judged on the estimates and on each resample of the prompts. It is
    "sure" where it fires on 95 % of the resamples, "likely" on 80 %. Rules that rest on an estimate marked unreliable do
    not fire. Where none fires the verdict is "cannot tell" with the draws that would decide, "not measured", or
    "no fault found" where all are ruled out.

    Args:
        e: the numbers.
        setting: for the command to type; without it there is none.

    Example:
        >>> from klimb.numbers.evidence import Side, evidence_of_draws
        >>> g = torch.Generator().manual_seed(0)
        >>> r, zero = torch.randn(32, 64, generator=g), torch.zeros(32, 64)
        >>> e = evidence_of_draws(Side(r, zero, zero), Side(r, zero, zero), beta=1.0, generator=g)
        >>> diagnose(e).verdict, diagnose(e).verdicts[0].confidence  # the policy is the reference
        ('hardly moved', 'sure')
    """
    fired, open_, doubted, unmeasured, shares, void = [], [], [], {}, {}, set()
    for rule in TABLE:
        if void & set(rule.needs):
            continue
        missing = tuple(name for name in rule.needs if getattr(e, name) is None)
        if missing:
            unmeasured[rule.name] = missing
            continue
        margin = _margin(rule, e)
        share = (margin[1:] > 0).double().mean().item()
        doubt = [w for name in rule.needs for w in _doubts(getattr(e, name))]
        if doubt:
            doubted += doubt
            continue
        shares[rule.name] = share
        if margin[0] > 0 and share >= LIKELY:
            if not {v.name for v in fired} & set(rule.unless):
                fired.append(_verdict(rule, e, setting, share, _more(margin, e)))
                void |= set(rule.voids)
        elif share > UNLIKELY:
            open_.append((rule, share, _more(margin, e)))
    fired.sort(key=lambda v: v.confidence == "likely")  # stable: the order of the table within each
    verdicts = tuple(fired) or (_nothing(e, setting, open_, doubted, unmeasured),)
    return Diagnosis(verdicts, unmeasured, shares)


def _margin(rule: Rule, e: Evidence) -> Tensor:
    """[1 + R]: the margin of the estimates, and that of every resample."""
    known = {}
    for name in (*rule.needs, *rule.may):
        quantity = getattr(e, name)
        known[name] = (
            torch.full((1,), math.nan, dtype=torch.float64) if quantity is None else _values(quantity)
        )
    return rule.margin(SimpleNamespace(**known))


def _values(quantity: Quantity) -> Tensor:
    return torch.cat([torch.tensor([quantity.estimate.value], dtype=torch.float64), quantity.resamples])


def _doubts(quantity: Quantity) -> list[str]:
    return [w for w in quantity.estimate.warnings if w.startswith("unreliable: ")]


def _more(margin: Tensor, e: Evidence) -> int:
    """Draws to add until a margin, whose spread shrinks as 1 / sqrt(n), is two of its standard deviations from zero."""
    values = margin[1:][margin[1:].isfinite()]
    if len(values) < 2 or not margin[0].isfinite():
        return 0
    factor = (2 * values.std() / margin[0].abs().clamp_min(1e-12)).item() ** 2
    return math.ceil(_draws(e) * min(max(factor - 1, 0.0), MOST))


def _draws(e: Evidence) -> int:
    return 2 * e.num_prompts * e.num_draws


def _verdict(rule: Rule, e: Evidence, setting: Setting | None, share: float, more: int) -> Verdict:
    shown = [name for name in (*rule.needs, *rule.may) if getattr(e, name) is not None]
    known = all(getattr(e, name).estimate.low == getattr(e, name).estimate.high for name in rule.needs)
    sure = share >= SURE
    return Verdict(
        rule.name,
        "known" if known else "sure" if sure else "likely",
        share,
        rule.says,
        tuple(line(name, getattr(e, name).estimate) for name in shown),
        rule.advice(e),
        "" if setting is None else rule.command(e, setting),
        0 if sure else more,
    )


def line(name: str, estimate: Estimate) -> str:
    """A number of the evidence as a line.

    Example:
        >>> line("kl", Estimate(0.51, 0.45, 0.55, 768))
        'KL to the reference 0.51 [0.45, 0.55] nats'
    """
    label, unit = LABELS[name]
    return f"{label} {estimate}{unit}"


def _nothing(
    e: Evidence,
    setting: Setting | None,
    open_: list[tuple[Rule, float, int]],
    doubted: list[str],
    unmeasured: Mapping[str, tuple[str, ...]],
) -> Verdict:
    """What to say where no rule fires."""
    if setting is not None and not setting.rewarded:
        return Verdict(
            "not measured",
            "cannot tell",
            0.0,
            "No reward says what is good here, and the verdicts are about what a reward is worth.",
            (),
            "Look at the report: how far the policy went, and how near it came to its target.",
            shlex.join(["klimb", "report", setting.run]),
        )
    if e.kl is not None and e.gap is None:
        return Verdict(
            "cannot tell",
            "cannot tell",
            0.0,
            "The policy draws forbidden completions (reward -inf), so its gap is infinite.",
            (line("kl", e.kl.estimate),),
            "Train with forward_kl, which learns from forbidden completions, until none of them is drawn.",
            "" if setting is None else _covering(e, setting),
        )
    if "undertrained" in unmeasured:
        missing = sorted({name for names in unmeasured.values() for name in names})
        trained = setting is not None and setting.trained
        verb = ["measure"] if trained else ["climb", "--resume"]
        return Verdict(
            "not measured",
            "cannot tell",
            0.0,
            "What would tell has not been measured.",
            (f"not measured: {', '.join(LABELS[name][0] for name in missing)}",),
            "Measure the policy." if trained else "Train and measure.",
            "" if setting is None else shlex.join(["klimb", *verb, setting.run]),
        )
    if doubted:
        reasons = tuple(dict.fromkeys(w.removeprefix("unreliable: ") for w in doubted))
        draws = max(math.ceil(e.needs / 2), 2 * e.num_draws)
        return Verdict(
            "cannot tell",
            "cannot tell",
            0.0,
            "The numbers that would tell are unreliable.",
            reasons,
            f"Measure with at least {draws} completions a prompt of policy and reference each, more if the reason says so.",
            _measure_again(setting, e.num_prompts, draws),
            2 * e.num_prompts * (draws - e.num_draws),
        )
    if open_:
        rule, share, more = min(open_, key=lambda x: x[2])
        factor = 1 + max(more, 1) / max(_draws(e), 1)
        prompts = math.ceil(factor * e.num_prompts)
        return Verdict(
            "cannot tell",
            "cannot tell",
            share,
            "No reason separates from the others.",
            (
                *(f"{r.name}: on {s:.0%} of the resamples" for r, s, _ in open_),
                *(line(name, getattr(e, name).estimate) for name in rule.needs),
            ),
            f"Draw {more} more: measure on {prompts} prompts in the place of {e.num_prompts}, or, where there are no more "
            f"prompts, with {math.ceil(factor * e.num_draws)} draws of each.",
            _measure_again(setting, prompts, e.num_draws),
            more,
        )
    return Verdict(
        "no fault found",
        "sure",
        1.0,
        "The policy is on its way, and no reason why it should stop there was found.",
        tuple(
            line(name, quantity.estimate)
            for name in ("attained", "gap", "kl", "efficiency")
            if (quantity := getattr(e, name)) is not None
        ),
        "Train longer, or stop here if the share attained is enough.",
        ""
        if setting is None
        else again(setting, "longer-training", max_steps=_of(setting.config, "max_steps", 2)),
    )


def _measure_again(setting: Setting | None, prompts: int, draws: int) -> str:
    if setting is None:
        return ""
    return shlex.join(
        ["klimb", "measure", setting.run, "--measure_prompts", str(prompts), "--measure_draws", str(draws)]
    )
