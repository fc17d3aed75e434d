"""Why a policy is where it is: the rules judged on the numbers of a run, and what to say where none of them fires.

A rule's margin is computed on the estimates and again on every resample of the prompts; the share of resamples on which it
fires is how sure the verdict is.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from klimb.numbers.evidence import Evidence, Quantity
from klimb.numbers.labels import LABELS, line
from klimb.numbers.next_run import Setting, again, covering, times
from klimb.numbers.rules import TABLE, Rule

SURE, LIKELY, UNLIKELY = 0.95, 0.8, 0.2
"""shares of resamples from which a verdict is sure, or likely, and below which it is ruled out"""
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
            "" if setting is None else covering(e, setting),
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
        else again(setting, "longer-training", max_steps=times(setting, "max_steps", 2)),
    )


def _measure_again(setting: Setting | None, prompts: int, draws: int) -> str:
    if setting is None:
        return ""
    return shlex.join(
        ["klimb", "measure", setting.run, "--measure_prompts", str(prompts), "--measure_draws", str(draws)]
    )
