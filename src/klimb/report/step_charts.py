"""The charts over the steps of training: its estimates with their intervals, and numbers that tell whether it is healthy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from klimb.numbers.estimate import Estimate
from klimb.report.chart import Spec, altair_module, chart_of, finished, thinned, tooltip
from klimb.report.found import Found, as_number, evaluation, of_step
from klimb.report.words import both

MAX_POINTS = 300
"""of a line; more are thinned, a screen has not more to show"""


def step_charts(found: Found) -> dict[str, Spec]:
    """Reward, KL and regularised reward over the steps, as far as they were recorded."""
    wanted = {
        "reward": ("reward", "Reward of the policy's draws, step by step."),
        "kl": ("KL(policy ‖ reference), nats", "KL of the policy to the reference in nats, step by step."),
        "regularised_reward": ("reward − beta · KL", "Reward less beta times KL, step by step."),
        "self_gap": (
            "gap seen by the draws",
            "What is left to climb as far as a step's own draws show it: blind to modes that the policy has dropped.",
        ),
        "entropy": ("entropy, nats a token", "Entropy of the policy a token; a fall to 0 is a collapse."),
    }
    charts = {name: _step_chart(found.steps, name, *words) for name, words in wanted.items()}
    if charts["reward"] is None:  # nothing was rewarded: what was made small, and how pairs were ordered
        plain = {
            "objective_value": ("objective", "The objective, step by step."),
            "margin": (
                "margin of pairs, reward",
                "How much more the policy favours the better completion, step by step.",
            ),
        }
        charts |= {name: _number_chart(found.steps, name, *words) for name, words in plain.items()}
    charts |= {name: _number_chart(found.steps, name, title, said) for name, (title, said) in HEALTH.items()}
    return {name: spec for name, spec in charts.items() if spec is not None}


HEALTH = {
    "grad_norm": (
        "norm of the gradient",
        "Norm of the gradient before it is clipped; a jump is a step to look at.",
    ),
    "residual_std": (
        "sd of the residual, nats",
        "Spread of log target less log policy within a prompt, nats; 0 at the best policy.",
    ),
    "completion_length": (
        "completion, tokens",
        "Mean length of a batch's completions in tokens; a reward that likes length shows here.",
    ),
    "finished": ("share that ended", "Share of completions that ended before the length limit."),
    "ess": (
        "ESS, draws a prompt",
        "How many of a prompt's fresh draws the best policy's weights leave; few means that few decide.",
    ),
    "drawn": ("tokens drawn a second", "Completion tokens drawn a second."),
    "trained": ("tokens learned a second", "Completion tokens learned from a second, fresh and kept ones."),
    "sampler_error_mean": (
        "|sampler − scorer|, nats",
        "Mean difference of log-probability between drawing and scoring a completion, nats.",
    ),
}
"""numbers of a step beside its estimates -> axis with its unit, and a line that explains it"""


def _step_chart(steps: Sequence[Mapping[str, Any]], name: str, title: str, said: str) -> Spec | None:
    fresh = [(record, of_step(record, name)) for record in steps]
    held = [(record, evaluation(record, name)) for record in steps]
    drawn = thinned([_at(record, e) for record, e in fresh if e is not None], MAX_POINTS)
    tested = thinned([_at(record, e) for record, e in held if e is not None], MAX_POINTS)
    if not drawn and not tested:
        return None
    alt = altair_module()
    x = _along_steps(alt)
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
    tips = tooltip(alt, "step", "text", "n")
    layers = []
    if drawn:
        base = chart_of(alt, drawn)
        layers += [
            base.mark_area(fill="var(--accent)", fillOpacity=0.18).encode(x=x, y=alt.Y("low:Q"), y2="high:Q"),
            base.mark_line(stroke="var(--accent)", strokeWidth=2).encode(x=x, y=y),
            base.mark_point(
                fill="var(--accent)", strokeWidth=0, size=18, opacity=1 if len(drawn) <= 60 else 0
            ).encode(x=x, y=y, tooltip=tips),
        ]
    if tested:
        base = chart_of(alt, tested)
        layers += [
            base.mark_rule(stroke="var(--red)", strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q"), y2="high:Q"),
            base.mark_point(
                shape="diamond", fill="var(--red)", stroke="var(--paper)", size=90, opacity=1
            ).encode(x=x, y=y, tooltip=tips),
        ]
    return finished(alt.layer(*layers), 220, said)


def _number_chart(steps: Sequence[Mapping[str, Any]], name: str, title: str, said: str) -> Spec | None:
    """A number of each step that has no interval of its own: it is of a batch, not an estimate."""
    rows = thinned(
        [
            {"step": as_number(record.get("step")), "value": value}
            for record in steps
            if (value := as_number(record.get(name, rates(record).get(name)))) is not None
        ],
        MAX_POINTS,
    )
    if not rows:
        return None
    alt = altair_module()
    y = alt.Y("value:Q", title=title, scale=alt.Scale(zero=True))
    line = (
        chart_of(alt, rows).mark_line(stroke="var(--accent)", strokeWidth=2).encode(x=_along_steps(alt), y=y)
    )
    return finished(alt.layer(line), 220, said)


def rates(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tokens a second of a step, by what was done with them."""
    return record.get("tokens_per_second") or {}


def _along_steps(alt: Any) -> Any:
    """The axis of a curve over the steps."""
    return alt.X(
        "step:Q",
        title="step",
        scale=alt.Scale(nice=False),
        axis=alt.Axis(tickMinStep=1, format=",d", grid=False),
    )


def _at(record: Mapping[str, Any], e: Estimate) -> dict[str, Any]:
    return {
        "step": as_number(record.get("step")),
        "value": e.value,
        "low": as_number(e.low),
        "high": as_number(e.high),
        "text": both(e),
        "n": e.n,
    }
