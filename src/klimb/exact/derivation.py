"""The derivation: from "maximise reward, pay for KL" to "minimise KL(pi||p)", each line with both sides as numbers.

    max E_x[E_pi r - beta KL(pi||ref)]   (1)   ->   ...   ->   min E_x KL(pi||p)   (6)

Every line is an equality at every policy, not only at the best one, so it is evaluated at any policy that is given and
at many random ones. P prompts, Y outcomes, N random policies; nats and units of reward.

Source: the identity is Ziegler et al., 2019, and Korbak, Perez, Buckley, 2022, "RL with KL penalties is better viewed as
Bayesian inference"; the textbook chain is Xiao and Zhu, "Foundations of Large Language Models", chapter 4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.exact.problem import Problem
from klimb.exact.truth import kl, mean

TOLERANCE = 1e-12
"""of an equality, times the scale of the problem"""


@dataclass(frozen=True)
class Sides:
    """An equality: what stands left and right, their values at the policy shown, and how far they part.

    Attributes:
        left: formula.
        right: formula.
        left_value: number.
        right_value: number.
        difference: |left - right| at the policy shown; of vectors the largest entry, while the values are norms.
        worst: the largest difference, the random policies included.
    """

    left: str
    right: str
    left_value: float
    right_value: float
    difference: float
    worst: float


@dataclass(frozen=True)
class Step:
    """One line of the chain.

    Attributes:
        number: 1 to 6.
        title: what is done.
        formula: the objective after it.
        sides: the equalities it rests on.
        why: in words.
    """

    number: int
    title: str
    formula: str
    sides: tuple[Sides, ...]
    why: str


@dataclass(frozen=True)
class Derivation:
    """The chain on numbers.

    Attributes:
        steps: (1) to (6).
        identity: reward minus beta KL = beta log Z - what is left to climb; the chain in one line.
        num_random: random policies at which everything was evaluated besides the one shown.
        worst: the largest difference of all.
        tolerance: what float64 rounding may leave on numbers of this size.
        holds: whether no difference is above the tolerance.
    """

    steps: tuple[Step, ...]
    identity: Sides
    num_random: int
    worst: float
    tolerance: float
    holds: bool


def derive(
    given: Problem, log_pi: Tensor | None = None, *, num_random: int = 200, generator: torch.Generator
) -> Derivation:
    """The chain (1) to (6) at a policy and at random ones.

    Args:
        given: reference, reward, beta.
        log_pi: [P, Y] the policy shown, nats; left out: the first random one.
        num_random: N.
        generator: of the random policies.

    Example:
        >>> from klimb.exact.problem import problem
        >>> small = problem([[0.6, 0.3, 0.1]], [[1.0, 0.0, 2.0]], 0.5)
        >>> found = derive(small, generator=torch.Generator().manual_seed(0))
        >>> found.holds, [step.number for step in found.steps]
        (True, [1, 2, 3, 4, 5, 6])
    """
    policies = given.random_policies(max(num_random, 1), generator=generator)
    if log_pi is not None:
        policies = torch.cat([log_pi[None], policies[:num_random]])
    steps = _chain(given, policies)
    identity = equality(
        "E_π[r] − β KL(π‖ref)",
        "β log Z − β KL(π‖p)",
        objective(given, policies),
        given.beta * (given.log_z - kl(policies, given.log_p)),
    )
    everything = [*(sides for step in steps for sides in step.sides), identity]
    worst = max(sides.worst for sides in everything)
    tolerance = TOLERANCE * given.scale
    return Derivation(steps, identity, num_random, worst, tolerance, worst <= tolerance)


def values_at(given: Problem, log_pi: Tensor) -> dict[str, float]:
    """What the identity ties together at a policy [P, Y], means over prompts; nats and units of reward.

    Example:
        >>> from klimb.exact.problem import problem
        >>> small = problem([[0.5, 0.5]], [[1.0, 0.0]], 1.0)
        >>> found = values_at(small, small.log_p)
        >>> round(found["objective"], 4), found["gap"]
        (0.6201, 0.0)
    """
    away = kl(log_pi, given.log_p)
    return {
        name: value.mean().item()
        for name, value in {
            "reward": mean(log_pi, given.reward),
            "kl_ref": kl(log_pi, given.log_ref),
            "objective": objective(given, log_pi),
            "log_z": given.log_z,
            "kl_p": away,
            "gap": given.beta * away,
        }.items()
    }


def objective(given: Problem, log_pi: Tensor) -> Tensor:
    """J = E_pi[r] - beta KL(pi||ref), [..., P, Y] -> [..., P] units of reward."""
    return mean(log_pi, given.reward) - given.beta * kl(log_pi, given.log_ref)


def cost(given: Problem, log_pi: Tensor) -> Tensor:
    """E_pi[log(pi/ref) - r/beta] = -J/beta, [..., P, Y] -> [..., P] nats; what is to be made small."""
    return mean(log_pi, log_pi - given.log_ref - given.reward / given.beta)


def equality(left: str, right: str, left_values: Tensor, right_values: Tensor) -> Sides:
    """Both sides as means over prompts, [N, P] each; the first of N is the one shown."""
    a, b = left_values.mean(-1), right_values.mean(-1)
    off = (a - b).abs()
    return Sides(left, right, a[0].item(), b[0].item(), off[0].item(), off.max().item())


def gradients_equal(left: str, right: str, left_gradient: Tensor, right_gradient: Tensor) -> Sides:
    """Two gradients [N, P, Y]: their norms, and the largest entry of their difference."""
    off = (left_gradient - right_gradient).abs().flatten(1).amax(1)
    norms = (x[0].norm().item() for x in (left_gradient, right_gradient))
    return Sides(left, right, *norms, off[0].item(), off.max().item())


def gradient(log_pi: Tensor, value: Callable[[Tensor], Tensor], given: Problem) -> Tensor:
    """Of E_x value(pi) in the logits of pi, [N, P, Y]; value maps [N, P, Y] -> [N, P]."""
    logits = log_pi.detach().clamp_min(-1e4).requires_grad_()  # padding: finite here, masked in `policy`
    total = value(given.policy(logits)).mean(-1).sum()
    (found,) = torch.autograd.grad(total, logits)
    return found


def _chain(given: Problem, log_pi: Tensor) -> tuple[Step, ...]:
    """The six steps at policies [N, P, Y]."""
    r, beta, log_ref = given.reward, given.beta, given.log_ref
    log_p, log_z = given.log_p, given.log_z
    one = torch.ones_like(log_z).expand(len(log_pi), -1)
    return (
        Step(
            1,
            "The objective: much reward, and every nat away from ref costs β",
            "max E_x[ E_π[r] − β KL(π‖ref) ]",
            (
                equality(
                    "E_π[r] − β KL(π‖ref)",
                    "E_π[ r − β log(π/ref) ]",
                    objective(given, log_pi),
                    mean(log_pi, r - beta * (log_pi - log_ref)),
                ),
            ),
            "KL(π‖ref) is itself a mean under π, so reward and price stand in one expectation.",
        ),
        Step(
            2,
            "Divide by −β",
            "min E_x E_π[ log(π/ref) − r/β ]",
            (
                equality(
                    "(E_π[r] − β KL(π‖ref)) / (−β)",
                    "E_π[ log(π/ref) − r/β ]",
                    objective(given, log_pi) / -beta,
                    cost(given, log_pi),
                ),
            ),
            "β > 0, so dividing by −β turns max into min and moves no optimum; everything is in nats now.",
        ),
        Step(
            3,
            "Give the tilted reference its name: Z(x) and p",
            "Z(x) = ∑ ref exp(r/β),   p = ref exp(r/β) / Z(x)",
            (
                equality(
                    "∑ p(y|x)", "1", (given.log_target - log_z[:, None]).exp().sum(-1).expand_as(one), one
                ),
                equality(
                    "log E_ref[ exp(r/β) ]",
                    "log Z(x)",
                    # weights first, then the mean: another order of the same sum, without overflow
                    (mean(log_ref, (r / beta - _top(given)).exp()).log() + _top(given)[:, 0]).expand_as(one),
                    log_z.expand_as(one),
                ),
            ),
            "ref exp(r/β) is positive but does not sum to one; divided by its sum it is a law, one for each x.",
        ),
        Step(
            4,
            "Put Z·p for ref exp(r/β)",
            "min E_x E_π[ log( π / (Z(x) p) ) ]",
            (
                equality(
                    "E_π[ log(π/ref) − r/β ]",
                    "E_π[ log( π / (Z p) ) ]",
                    cost(given, log_pi),
                    mean(log_pi, log_pi - (log_z[:, None] + log_p)),
                ),
            ),
            "−r/β is −log exp(r/β): it goes under the fraction, and there stands ref exp(r/β) = Z·p.",
        ),
        Step(
            5,
            "Take Z out of the expectation",
            "min E_x[ KL(π‖p) − log Z(x) ]",
            (
                equality(
                    "E_π[ log( π / (Z p) ) ]",
                    "KL(π‖p) − log Z",
                    mean(log_pi, log_pi - (log_z[:, None] + log_p)),
                    kl(log_pi, log_p) - log_z,
                ),
            ),
            "log Z(x) is the same for every y and π sums to one, so its mean under π is itself.",
        ),
        Step(
            6,
            "Drop log Z: θ is not in it",
            "min E_x KL(π‖p)",
            (
                gradients_equal(
                    "|∇ E_x E_π[ log(π/ref) − r/β ]|",
                    "|∇ E_x KL(π‖p)|",
                    gradient(log_pi, lambda x: cost(given, x), given),
                    gradient(log_pi, lambda x: kl(x, log_p), given),
                ),
                gradients_equal(
                    "|∇ E_x log E_π[ ref exp(r/β) / π ]|",
                    "|∇ E_x log Z(x)| = 0",
                    gradient(log_pi, lambda x: _log_z_seen_from(given, x), given),
                    torch.zeros_like(log_pi),
                ),
            ),
            "Z(x) is made of ref, r and β alone. Written with π, as E_π[ref exp(r/β)/π], π cancels: its gradient is 0.",
        ),
    )


def _log_z_seen_from(given: Problem, log_pi: Tensor) -> Tensor:
    """What importance weighting from pi makes of log Z, [..., P, Y] -> [..., P]; the same for every pi."""
    terms = torch.where(given.support, log_pi + (given.log_target - log_pi), -torch.inf)
    return torch.logsumexp(terms, -1)


def _top(given: Problem) -> Tensor:
    """[P, 1] the largest r/beta that can occur."""
    return given.reward.masked_fill(~given.support, -torch.inf).amax(-1, keepdim=True) / given.beta
