"""A person's own derivation, checked: an order of the six steps, or an objective that is a little different.

What is wrong is shown on numbers: two sides that should be equal and are not, and, where the mistake moves the optimum,
the policy that the changed objective prefers to the best one. Right variants are told apart from wrong ones by the same
numbers, not by their names.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from klimb.exact.derivation import TOLERANCE, Sides, cost, equality, gradients_equal, objective
from klimb.exact.newton import minimise
from klimb.exact.problem import Problem, problem
from klimb.exact.truth import kl
from klimb.exact.variants import VARIANTS, Variant

STEPS = range(1, 7)
NEEDS: Mapping[int, tuple[int, ...]] = MappingProxyType({2: (1,), 4: (2, 3), 5: (4,), 6: (5,)})
"""what must have been done before each step; (3) only defines, so it may come anywhere before (4)"""
BACKWARDS: Mapping[int, tuple[int, ...]] = MappingProxyType({6: (3,), 5: (6,), 4: (5,), 2: (4,), 1: (2,)})
"""the same from the end: every line is an equality, so the chain may be read upwards once Z and p have their names"""
SEARCHABLE = 200
"""numbers of a policy up to which the changed objective's own optimum is looked for"""


@dataclass(frozen=True)
class Witness:
    """A policy in the comparison of two objectives: its name, J, what the changed objective makes of it, KL(pi||p)."""

    policy: str
    objective: float
    changed: float
    distance: float
    prompt: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        asked: the order or the name.
        right: nothing fails.
        step: at which step it fails, or None.
        formula: what was checked.
        says: why it is right or wrong.
        sides: two sides, at the policy where they part most if it is wrong.
        witnesses: the best policy and the one that the changed objective prefers; () if the optimum does not move.
        moves_optimum: whether the best policy is another one; None if there is no objective or too many numbers.
        elsewhere: nothing fails on the numbers given, so the built-in example is shown.
    """

    asked: str
    right: bool
    step: int | None
    formula: str
    says: str
    sides: Sides | None
    witnesses: tuple[Witness, ...] = ()
    moves_optimum: bool | None = None
    elsewhere: bool = False


def example() -> Problem:
    """The built-in numbers, two prompts, on which every mistake shows.

    Example:
        >>> example().log_z
        tensor([2.3711, 4.8908], dtype=torch.float64)
    """
    return problem(
        [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3]], [[1.0, 0.5, 2.0], [2.0, 0.4, 3.0]], 0.5, name="example: "
    )


def check(asked: str, given: Problem, *, num_random: int = 200, generator: torch.Generator) -> Verdict:
    """Check an order of steps ("1,2,4,3,5,6") or a changed objective by name ("reversed_kl").

    Args:
        asked: the order or the name.
        given: the numbers to show it on.
        num_random: policies at which both sides are evaluated.
        generator: of them.

    Raises:
        ValueError: an unknown name (the nearest is named), a step that is none of 1 to 6 or is there twice.

    Example:
        >>> found = check("1,2,4,3,5,6", example(), generator=torch.Generator().manual_seed(0))
        >>> found.right, found.step
        (False, 4)
        >>> check("constant", example(), generator=torch.Generator().manual_seed(0)).right
        True
    """
    order = _order(asked)
    here = given.random_policies(max(num_random, 1), generator=generator)
    there = example().random_policies(max(num_random, 1), generator=generator)
    look = _check_variant if order is None else _check_order
    found = look(asked, given, here)
    if found.right and look(asked, example(), there).right:
        return found
    # wrong, but these numbers do not show it (beta = 1, one prompt, a uniform reference): others do
    hidden = found.sides is not None and found.sides.worst <= TOLERANCE * given.scale
    if found.right or hidden or (VARIANTS.get(asked) and VARIANTS[asked].shared and not found.moves_optimum):
        other = look(asked, example(), there)
        return replace(other, elsewhere=True)
    return found


def _order(asked: str) -> tuple[int, ...] | None:
    words = asked.replace(" ", ",").split(",")
    words = [word.strip("()") for word in words if word]
    if not words or not all(word.lstrip("-").isdigit() for word in words):
        return None
    order = tuple(int(word) for word in words)
    for step in order:
        if step not in STEPS:
            raise ValueError(f"--check {asked}: there is no step {step}, expected numbers from 1 to 6")
        if order.count(step) > 1:
            raise ValueError(
                f"--check {asked}: step {step} is there {order.count(step)} times, expected each once"
            )
    return order


def _check_order(asked: str, given: Problem, log_pi: Tensor) -> Verdict:
    order = _order(asked)
    assert order is not None
    written = " → ".join(f"({step})" for step in order)
    without_names = [step for step in order if step != 3]
    up = without_names[:1] == [6]
    failure = _first_failure(order, BACKWARDS if up else NEEDS)
    if failure is None:
        last = order[-1]
        whole = last == (1 if up else 6)
        says = "Right" + (", read upwards: every line is an equality" if up else "")
        if not whole:
            says += f", as far as it goes: it ends at ({last})"
        elif not up and order.index(3) != 2:
            says += ": (3) only gives names, so it may stand anywhere before (4)"
        return Verdict(asked, True, None, written, says + ".", None)
    step, missing = failure
    says, left, right, values = GAPS.get(failure) or GAPS.get((missing, step)) or GAPS[4, 3]
    off = _largest(equality, left, right, *values(given, log_pi))
    why = "comes only later" if missing in order else "is left out"
    return Verdict(
        asked, False, step, written, f"Step ({step}) fails: it needs ({missing}), which {why}. {says}", off
    )


def _first_failure(order: Sequence[int], needs: Mapping[int, tuple[int, ...]]) -> tuple[int, int] | None:
    """The first step that lacks something, and what it lacks."""
    for place, step in enumerate(order):
        for needed in needs.get(step, ()):
            if needed not in order[:place]:
                return step, needed
    return None


def _not_divided(given: Problem, log_pi: Tensor) -> tuple[Tensor, Tensor]:
    return objective(given, log_pi), cost(given, log_pi)


def _not_defined(given: Problem, log_pi: Tensor) -> tuple[Tensor, Tensor]:
    """With p = ref e^{r/beta}, Z = 1: what stands where p's total should."""
    return given.log_z.exp().expand(len(log_pi), -1), torch.ones(len(log_pi), len(given.log_z)).to(log_pi)


def _not_substituted(given: Problem, log_pi: Tensor) -> tuple[Tensor, Tensor]:
    return cost(given, log_pi), kl(log_pi, given.log_ref) - given.log_z


def _dropped_first(given: Problem, log_pi: Tensor) -> tuple[Tensor, Tensor]:
    return cost(given, log_pi), kl(log_pi, given.log_p)


GAPS: Mapping[tuple[int, int], tuple[str, str, str, Callable[[Problem, Tensor], tuple[Tensor, Tensor]]]] = (
    MappingProxyType(
        {
            (2, 1): (
                "There is nothing to divide yet; and the objective that comes afterwards stays undivided.",
                "E_π[r] − β KL(π‖ref)",
                "E_π[ log(π/ref) − r/β ]",
                _not_divided,
            ),
            (4, 2): (
                "The objective still reads r − β log(π/ref): there is no −r/β that could go under the fraction.",
                "E_π[r] − β KL(π‖ref)",
                "E_π[ log( π / (Z p) ) ]",
                _not_divided,
            ),
            (4, 3): (
                "Z and p have no meaning yet. If p is just ref exp(r/β), with no Z, it is no law and (5) has no KL:",
                "∑ ref exp(r/β)",
                "1, as a law has",
                _not_defined,
            ),
            (5, 4): (
                "Z is not inside the expectation yet; taking it out of (2) leaves the KL to ref, and is no equality:",
                "E_π[ log(π/ref) − r/β ]",
                "KL(π‖ref) − log Z",
                _not_substituted,
            ),
            (6, 5): (
                "log Z does not stand by itself yet. Dropped before it is taken out, it is missing from the equality:",
                "E_π[ log(π/ref) − r/β ]",
                "KL(π‖p)",
                _dropped_first,
            ),
        }
    )
)


def _check_variant(asked: str, given: Problem, log_pi: Tensor) -> Verdict:
    if asked not in VARIANTS:
        near = difflib.get_close_matches(asked, list(VARIANTS), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"--check {asked}: no such objective; {hint}expected an order such as 1,2,3,4,5,6 or one of "
            f"{', '.join(VARIANTS)}"
        )
    variant = VARIANTS[asked]
    measure = gradients_equal if variant.step == 6 else equality
    sides = _largest(measure, variant.left, variant.right, *variant.sides(given, log_pi))
    right = sides.worst <= TOLERANCE * given.scale * 10
    witnesses, moves = _witnesses(variant, given)
    return Verdict(
        asked,
        right and not moves,
        None if right else variant.step,
        variant.formula,
        variant.says,
        sides,
        witnesses,
        moves,
    )


def _largest(measure: Callable[..., Sides], left: str, right: str, a: Tensor, b: Tensor) -> Sides:
    """Both sides at the policy where they part most."""
    off = (a - b).abs().flatten(1).amax(1) if a.ndim == 3 else (a - b).mean(-1).abs()
    first = int(off.argmax())
    order = [first, *(i for i in range(len(a)) if i != first)]
    return measure(left, right, a[order], b[order])


def _witnesses(variant: Variant, given: Problem) -> tuple[tuple[Witness, ...], bool | None]:
    """The best policy of the class, and the one that the changed objective prefers, if that is another."""
    shape = given.log_ref.shape
    if variant.changed is None or given.support.numel() > SEARCHABLE:
        return (), None
    if variant.shared and not bool((given.support == given.support[:1]).all()):
        return (), None
    changed, free = variant.changed, shape[1:] if variant.shared else shape

    def law(logits: Tensor) -> Tensor:
        return given.policy(logits.reshape(free).expand(shape))[None]

    zero = torch.zeros(math.prod(free), dtype=torch.float64)
    start = given.log_p.masked_fill(~given.support, 0.0)
    start = start.mean(0) if variant.shared else start.flatten()
    starts = [zero, start, -start]
    if not all(bool(changed(given, law(x)).isfinite().all()) for x in starts):
        return (), None  # it has no value there: that is counterexample enough
    # a trace of curvature keeps logits finite where the changed objective has its best policy in a corner
    preferred = law(minimise(lambda x: changed(given, law(x)).mean() + 1e-9 * x.square().sum(), starts))
    best = given.log_p[None]
    if variant.shared:
        best = law(minimise(lambda x: cost(given, law(x)).mean() + 1e-9 * x.square().sum(), starts))

    def witness(name: str, log_pi: Tensor) -> Witness:
        return Witness(
            name,
            objective(given, log_pi).mean().item(),
            changed(given, log_pi).mean().item(),
            kl(log_pi, given.log_p).mean().item(),
            tuple(log_pi[0, 0].exp().tolist()),
        )

    names = ("best single law" if variant.shared else "p, the best policy", "what it prefers")
    found = (witness(names[0], best), witness(names[1], preferred))
    slack = 1e-7 * given.scale
    return (found, True) if found[0].objective - found[1].objective > slack else ((), False)
