"""Numbers and verdicts in plain words; no number without its interval where it has one."""

from __future__ import annotations

import math
import unicodedata

from klimb.numbers.estimate import Estimate
from klimb.report.found import Found, as_estimate, chosen_beta, of_step, predicted, reference_reward


def number(x: float | None, digits: int = 2) -> str:
    """A number with so many decimals and a true minus sign; nothing for None.

    Example:
        >>> number(-0.456), number(math.inf), number(None)
        ('−0.46', '∞', '')
    """
    if x is None or math.isnan(x):
        return ""
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    return f"{round(x, digits) + 0.0:.{digits}f}".replace("-", "−")  # + 0.0: no "−0.00"


def short(x: float | None) -> str:
    """A number with three digits that count."""
    return "" if x is None else f"{x:.3g}".replace("-", "−")


def digits(e: Estimate) -> int:
    """Decimals that its interval justifies, 2 at least."""
    width = e.high - e.low
    return min(max(2, math.ceil(-math.log10(width))), 8) if 0 < width < math.inf else 2


def value(e: Estimate | None, *, percent: bool = False) -> str:
    """The value alone, as rounded as its interval allows."""
    if e is None:
        return ""
    return f"{number(100 * e.value, 0)} %" if percent else number(e.value, digits(e))


def interval(e: Estimate | None, *, percent: bool = False) -> str:
    """The 95 % interval in brackets; nothing where there is none.

    Example:
        >>> interval(Estimate(0.62, 0.55, 0.69, 512), percent=True)
        '[55 to 69]'
    """
    if e is None or math.isnan(e.low) or math.isnan(e.high):
        return ""
    low, high = (number(100 * x, 0) if percent else number(x, digits(e)) for x in (e.low, e.high))
    return f"[{low} to {high}]"


def both(e: Estimate | None, *, percent: bool = False) -> str:
    """Value and interval, with the word "unreliable" where it has to be said."""
    if e is None:
        return "unknown"
    said = [value(e, percent=percent), interval(e, percent=percent), "" if e.reliable else "(unreliable)"]
    return " ".join(part for part in said if part)


def headline(found: Found) -> tuple[str, str]:
    """One sentence that says how far the run has come, and what else has to be said at once (or nothing)."""
    beta, _ = chosen_beta(found)
    of_beta = f" at beta {short(beta)}" if beta else ""
    if found.measurement:
        attained = as_estimate(found.measurement.get("attained"))
        orders = found.measurement.get("comparisons") or {}
        right = as_estimate(orders.get("accuracy"))
        scored = found.measurement.get("reward_model") or {}
        if (ordered := as_estimate(scored.get("accuracy"))) is not None:
            return (
                f"The reward model prefers the better completion in {both(ordered, percent=True)} of held-out pairs.",
                " ".join(str(said) for said in found.measurement.get("findings") or ()),
            )
        apart = found.measurement.get("distance") or {}
        closed = as_estimate(apart.get("closed"))
        if closed is not None:
            return (
                f"The policy has closed {both(closed, percent=True)} of the KL from its target to the reference.",
                f"KL(target‖policy) is {both(as_estimate(apart.get('forward')))} nats a completion, before it was "
                f"{both(as_estimate(apart.get('forward_reference')))}.",
            )
        if attained is None and right is not None:
            return (
                f"The policy puts {both(right, percent=True)} of held-out pairs in the order in which they were judged.",
                f"It is {both(as_estimate(found.measurement.get('kl')))} nats from the reference; no reward says how good it is.",
            )
        if attained is None:
            return f"The policy was measured; how far the best policy{of_beta} still is cannot be told.", ""
        share = both(attained, percent=True)
        if attained.value <= 0:
            return (
                f"The policy has come no nearer to the best policy{of_beta}: share attained {share}.",
                rest(found),
            )
        return f"The policy went {share} of the way from the reference to the best policy{of_beta}.", rest(
            found
        )
    rewards = [of_step(record, "reward") for record in found.steps]
    rewards = [reward for reward in rewards if reward is not None]
    if found.steps:
        said = f"The policy has trained for {counted(len(found.steps), 'step')}"
        if len(rewards) > 1:
            said += f": reward from {both(rewards[0])} to {both(rewards[-1])}"
        return f"{said}.", "It has not been measured yet."
    best, start = predicted(found), reference_reward(found)
    if best is not None:
        return (
            f"The best policy{of_beta} would earn {both(best.reward)}; the reference earns {both(start)}.",
            f"It would spend {both(best.kl)} nats of KL. Nothing has been trained yet.",
        )
    apart = as_estimate((found.plan.get("apart") or {}).get("forward"))
    if apart is not None:
        said = (found.plan.get("advice") or {}).get("words") or [""]
        return (
            f"KL(target‖reference) is {both(apart)} nats a completion; none of it has been learned yet.",
            str(said[-1]),
        )
    if start is not None:
        return f"The reference earns {both(start)}.", "Nothing has been trained yet."
    return "This run has only begun: nothing has been planned, trained or measured yet.", ""


def rest(found: Found) -> str:
    """Why the policy did not go further, in the diagnosis' own words; nothing where there is none."""
    verdicts = (found.measurement.get("diagnosis") or {}).get("verdicts") or ()
    return " ".join(str(verdict.get("says", "")) for verdict in verdicts[:2])


def counted(count: int, thing: str) -> str:
    """So many things.

    Example:
        >>> counted(1, "step"), counted(2000, "step")
        ('1 step', '2,000 steps')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def visible(text: object) -> str:
    """Text as it may stand in a page: control characters as their pictures, lone surrogates replaced.

    Example:
        >>> visible("a" + chr(0) + "b")
        'a␀b'
    """
    whole = str(text).encode("utf-8", "replace").decode()
    return "".join(_picture(c) if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in whole)


def _picture(control: str) -> str:
    code = ord(control)
    return chr(0x2400 + code) if code < 0x20 else ("␡" if code == 0x7F else "�")
