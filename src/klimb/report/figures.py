"""The panel of numbers at the top of a run's page, and what makes them unreliable."""

from __future__ import annotations

from dataclasses import dataclass

from klimb.numbers.estimate import Estimate
from klimb.report import words
from klimb.report.found import Found, as_estimate, predicted, reference_reward


@dataclass(frozen=True)
class Figure:
    """One number of the panel: what it is, the estimate, its unit, and a line that explains it."""

    label: str
    value: str
    interval: str
    unit: str
    meaning: str
    doubtful: bool


APART = (
    ("KL(target ‖ reference)", "forward", "a completion: what the target says and the reference seldom does"),
    ("KL(reference ‖ target)", "reverse", "a completion: what the reference says and the target would not"),
)
"""of plan.json where the target is a policy -> label, name and meaning"""
PARTS = {
    "reward_model": (
        ("Held-out pairs", "accuracy", "%", "whose better completion has the larger score, ties half"),
        ("Surprise", "surprise", "nats", "of the judgements, a pair; 0.69 knows nothing"),
        ("Margin", "margin", "", "how much more the better completion scores, in log odds"),
        (
            "Calibration error",
            "calibration_error",
            "",
            "predicted chance against what happened; the text below says what is usual",
        ),
        ("Overconfidence", "overconfidence", "", "mean chance predicted, less how often it came true"),
        ("Length", "length", "", "correlation of a pair's scores with its lengths"),
        ("Length, of the judgements", "length_of_labels", "", "the same of who won"),
        ("Where the longer won", "longer_better", "%", "accuracy on those pairs"),
        ("Where the shorter won", "shorter_better", "%", "accuracy on those pairs"),
        (
            "Tail of exp(reward / beta)",
            "tail",
            "",
            "Pareto k within prompts; large means a few completions decide",
        ),
    ),
    "distance": (
        ("Closed", "closed", "%", "of KL(target ‖ reference)"),
        ("KL(target ‖ policy)", "forward", "nats", "a completion, on the target's draws"),
        ("KL(target ‖ reference)", "forward_reference", "nats", "the same before"),
        ("KL(policy ‖ target)", "reverse", "nats", "a completion, on the policy's draws"),
    ),
    "comparisons": (
        (
            "Held-out pairs",
            "accuracy",
            "%",
            "whose better completion the policy favours more than the reference does",
        ),
        ("Their margin", "margin", "reward", "beta times how much more it favours them"),
        ("Their surprise", "surprise", "nats", "of the judgements, by that margin; 0.69 knows nothing"),
    ),
}
"""parts of measure.json -> label, name, unit and meaning of their estimates"""


def figures_of(found: Found) -> list[Figure]:
    """The panel of estimates: of the policy where it was measured, else of what the plan predicts."""
    measured = found.measurement
    if measured:
        reference = as_estimate((measured.get("reference") or {}).get("reward"))
        optimum = measured.get("optimum") or {}
        best, best_kl = as_estimate(optimum.get("reward")), as_estimate(optimum.get("kl"))
        wanted = [
            ("Reward", "reward", "", f"reference {words.both(reference)}; best policy {words.both(best)}"),
            ("KL to the reference", "kl", "nats", f"the best policy spends {words.both(best_kl)}"),
            ("Share attained", "attained", "%", "of the way from the reference to the best policy"),
            ("Gap", "gap", "reward", "beta · KL(policy ‖ best policy): what is left to climb"),
            ("Efficiency", "frontier_efficiency", "%", "of the reward that this KL could buy"),
            ("log Z", "log_z", "nats", "what the best policy is normalised by"),
        ]
        found_here = [
            (label, as_estimate(measured.get(key)), unit, said) for label, key, unit, said in wanted
        ]
        for part, rows in PARTS.items():
            inside = measured.get(part) or {}
            found_here += [
                (label, as_estimate(inside.get(key)), unit, said) for label, key, unit, said in rows
            ]
    else:
        best = predicted(found)
        found_here = [
            ("Reference reward", reference_reward(found), "", "before any training"),
            ("Best policy's reward", best.reward if best else None, "", "predicted, at the chosen beta"),
            ("Best policy's KL", best.kl if best else None, "nats", "predicted, to the reference"),
            *(
                (label, as_estimate((found.plan.get("apart") or {}).get(key)), "nats", said)
                for label, key, said in APART
            ),
        ]
    return [_figure(label, e, unit, said) for label, e, unit, said in found_here if e is not None]


def _figure(label: str, e: Estimate, unit: str, meaning: str) -> Figure:
    percent = unit == "%"
    return Figure(
        label,
        words.value(e, percent=percent),
        words.interval(e, percent=percent),
        "" if percent else unit,
        meaning,
        not e.reliable,
    )


def warnings_of(found: Found) -> list[str]:
    """What is wrong with the estimates of the panel, each thing once."""
    estimates = [as_estimate(value) for value in found.measurement.values()]
    best = predicted(found)
    if not found.measurement and best is not None:
        estimates = [best.reward, best.kl]
    said = [warning for e in estimates if e is not None for warning in e.warnings]
    return list(dict.fromkeys([*said, *map(str, found.measurement.get("warnings") or ())]))
