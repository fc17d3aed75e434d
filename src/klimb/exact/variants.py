"""Objectives that are nearly the right one, and some that look different and are right: the table behind `check`.

Each is written as what it makes small, in nats, beside what the chain has at the step where it leaves it. Whether it is
wrong is decided by these numbers, not by its place in the table.

[N, P, Y] policies -> [N, P], one number a prompt; nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from klimb.exact.derivation import cost, gradient
from klimb.exact.divergences import entropy
from klimb.exact.problem import Problem
from klimb.exact.truth import kl, mean

Values = Callable[[Problem, Tensor], Tensor]
"""[N, P, Y] log-probabilities of policies -> [N, P], one number a prompt"""


@dataclass(frozen=True)
class Variant:
    """A changed objective.

    Attributes:
        formula: how it is written.
        step: at which step it leaves the chain; None: it is right.
        says: what is wrong, or why it is right.
        left, right: what the two sides are called.
        sides: their values.
        changed: what it makes small, in nats; None: it has no value of its own.
        shared: it is told apart only by a class that is too small: one law for all prompts.
    """

    formula: str
    step: int | None
    says: str
    left: str
    right: str
    sides: Callable[[Problem, Tensor], tuple[Tensor, Tensor]]
    changed: Values | None = None
    shared: bool = False


def _excess(changed: Values, *, per_nat: bool = False) -> Callable[[Problem, Tensor], tuple[Tensor, Tensor]]:
    """A right objective exceeds its value at p by KL(pi||p) at every policy; `per_nat`: by beta times that."""

    def values(given: Problem, log_pi: Tensor) -> tuple[Tensor, Tensor]:
        more = changed(given, log_pi) - changed(given, given.log_p[None])
        return more / given.beta if per_nat else more, kl(log_pi, given.log_p)

    return values


def _moved(given: Problem, *, constant: float = 0.0, times: float = 1.0) -> Problem:
    return Problem(given.log_ref, times * given.reward + constant, times * given.beta)


def _against(changed: Values, right: Values) -> Callable[[Problem, Tensor], tuple[Tensor, Tensor]]:
    return lambda given, log_pi: (changed(given, log_pi), right(given, log_pi))


def _reversed_kl(given: Problem, log_pi: Tensor) -> Tensor:
    # over what the target can give, where every policy lives
    log_ref = torch.log_softmax(given.log_ref.masked_fill(~given.support, -torch.inf), -1)
    return kl(log_ref.expand_as(log_pi), log_pi) - mean(log_pi, given.reward / given.beta)


def _no_beta(given: Problem, log_pi: Tensor) -> Tensor:
    return kl(log_pi, given.log_ref) - mean(log_pi, given.reward)


def _beta_upside_down(given: Problem, log_pi: Tensor) -> Tensor:
    return kl(log_pi, given.log_ref) - mean(log_pi, given.beta * given.reward)


def _wrong_sign(given: Problem, log_pi: Tensor) -> Tensor:
    return -kl(log_pi, given.log_ref) - mean(log_pi, given.reward / given.beta)


def _entropy_for_kl(given: Problem, log_pi: Tensor) -> Tensor:
    return -entropy(log_pi) - mean(log_pi, given.reward / given.beta)


def _reward_in_log(given: Problem, log_pi: Tensor) -> Tensor:
    """KL to ref r/beta: the exponential forgotten. A reward that is not above zero has no logarithm: +inf."""
    log_reward = (given.reward / given.beta).clamp_min(0.0).log()
    return kl(log_pi, given.log_ref) - mean(log_pi, log_reward)


def _log_mean_exp(given: Problem, log_pi: Tensor) -> Tensor:
    tilted = (given.reward / given.beta).masked_fill(~given.support, -torch.inf)
    return kl(log_pi, given.log_ref) - torch.logsumexp(
        log_pi.masked_fill(~given.support, -torch.inf) + tilted, -1
    )


def _forward_kl(given: Problem, log_pi: Tensor) -> Tensor:
    return kl(given.log_p.expand_as(log_pi), log_pi) - given.log_z


def _z_kept(given: Problem, log_pi: Tensor) -> Tensor:
    return given.log_z.exp() * kl(log_pi, given.log_p)


def _z_averaged(given: Problem, log_pi: Tensor) -> Tensor:
    averaged = torch.logsumexp(given.log_z, 0) - math.log(len(given.log_z))
    return kl(log_pi, given.log_p) - averaged


def _z_moves(given: Problem, log_pi: Tensor) -> tuple[Tensor, Tensor]:
    tilted = given.reward / given.beta

    def towards(x: Tensor) -> Tensor:
        return kl(x, torch.log_softmax(x + tilted, -1))

    def whole(x: Tensor) -> Tensor:
        return -mean(x, tilted)

    return gradient(log_pi, whole, given), gradient(log_pi, towards, given)


def _undivided(given: Problem, log_pi: Tensor) -> Tensor:
    return given.beta * kl(log_pi, given.log_p)


def _z_to_the_end(given: Problem, log_pi: Tensor) -> Tensor:
    return kl(log_pi, given.log_p) - given.log_z


def _constant(given: Problem, log_pi: Tensor) -> Tensor:
    return cost(_moved(given, constant=10.0), log_pi)


def _rescaled(given: Problem, log_pi: Tensor) -> Tensor:
    return cost(_moved(given, times=2.0), log_pi)


_COST = "E_π[ log(π/ref) − r/β ]"

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "reversed_kl": Variant(
            "max E_x[ E_π[r] − β KL(ref‖π) ]",
            2,
            "KL(ref‖π) is a mean under ref, not under π: it does not join the reward in one expectation, and the best "
            "policy is β ref/(ν − r), another one.",
            "KL(ref‖π) − E_π[r]/β",
            _COST,
            _against(_reversed_kl, cost),
            _reversed_kl,
        ),
        "no_beta": Variant(
            "max E_x[ E_π[r] − KL(π‖ref) ]",
            2,
            "Without β the price of a nat is 1: the best policy is the target of beta = 1.",
            "KL(π‖ref) − E_π[r]",
            _COST,
            _against(_no_beta, cost),
            _no_beta,
        ),
        "beta_upside_down": Variant(
            "max E_x[ β E_π[r] − KL(π‖ref) ]",
            2,
            "β prices the KL; put on the reward it is 1/β: the best policy is ref exp(β r)/norm.",
            "KL(π‖ref) − β E_π[r]",
            _COST,
            _against(_beta_upside_down, cost),
            _beta_upside_down,
        ),
        "wrong_sign": Variant(
            "max E_x[ E_π[r] + β KL(π‖ref) ]",
            2,
            "Being far from ref is paid for, not charged: the best policy gives one outcome that pays best, reward and "
            "rarity together.",
            "−KL(π‖ref) − E_π[r]/β",
            _COST,
            _against(_wrong_sign, cost),
            _wrong_sign,
        ),
        "entropy_for_kl": Variant(
            "max E_x[ E_π[r] + β H(π) ]",
            2,
            "An entropy bonus is a KL to the uniform law: the reference has gone, the best policy is exp(r/β)/norm.",
            "−H(π) − E_π[r]/β",
            _COST,
            _against(_entropy_for_kl, cost),
            _entropy_for_kl,
        ),
        "reward_in_log": Variant(
            "min E_x E_π[ log( π / (ref · r/β) ) ]",
            4,
            "−r/β is −log exp(r/β). With r/β itself under the fraction the target is ref · r/norm, linear in the reward, "
            "and there is none where a reward is not above 0.",
            "E_π[ log( π / (ref r/β) ) ]",
            _COST,
            _against(_reward_in_log, cost),
            _reward_in_log,
        ),
        "log_mean_exp": Variant(
            "max E_x[ β log E_π[exp(r/β)] − β KL(π‖ref) ]",
            2,
            "The logarithm of a mean is not the mean of the logarithm (Jensen): this one loves risk, and its best policy "
            "goes further than p.",
            "KL(π‖ref) − log E_π[exp(r/β)]",
            _COST,
            _against(_log_mean_exp, cost),
            _log_mean_exp,
        ),
        "forward_kl": Variant(
            "min E_x[ KL(p‖π) − log Z(x) ]",
            5,
            "The expectation in (4) is under π, so it is KL(π‖p). Where the class holds p both directions end there; in a "
            "smaller class (shown: one law for all prompts) they end apart.",
            "KL(p‖π) − log Z",
            "E_π[ log( π / (Z p) ) ]",
            _against(_forward_kl, cost),
            _forward_kl,
            shared=True,
        ),
        "z_dropped_early": Variant(
            "p = ref exp(r/β), and then min E_x KL(π‖p)",
            3,
            "Without Z p is no law, and the KL to it is none: it is off by log Z and may be below 0. The optimum "
            "does not move, the meaning of the value does: 0 is not 'arrived'.",
            "E_π[ log( π / (ref exp(r/β)) ) ]",
            "KL(π‖p)",
            lambda given, log_pi: (cost(given, log_pi), kl(log_pi, given.log_p)),
            cost,
        ),
        "z_kept": Variant(
            "min E_x[ Z(x) KL(π‖p) ]",
            5,
            "Z kept as a factor weighs the prompts: an easy one (large Z) counts for many. Where prompts share "
            "parameters (shown: one law for all prompts) that moves the optimum.",
            "E_x[ Z(x) KL(π‖p) ]",
            "E_x KL(π‖p)",
            lambda given, log_pi: (_z_kept(given, log_pi), kl(log_pi, given.log_p)),
            _z_kept,
            shared=True,
        ),
        "z_averaged": Variant(
            "min E_x KL(π‖p) − log E_x Z(x)",
            5,
            "Every prompt has its own Z, and what comes out of the expectation is E_x log Z(x); log E_x Z(x) is larger "
            "(Jensen). The optimum does not move, the value does.",
            "E_x KL(π‖p) − log E_x Z(x)",
            "E_x[ KL(π‖p) − log Z(x) ]",
            lambda given, log_pi: (_z_averaged(given, log_pi), _z_to_the_end(given, log_pi)),
            _z_averaged,
        ),
        "z_moves": Variant(
            "min E_x KL(π‖p_θ), the reference moving along with the policy",
            6,
            "Z depends on θ as soon as ref (or r) does, and then it may not be dropped. Shown for ref = π: the gradients of "
            "(5), log Z included, and of (6).",
            "|∇ E_x[ KL(π‖p_θ) − log Z_θ ]|",
            "|∇ E_x KL(π‖p_θ)|",
            _z_moves,
        ),
        "constant": Variant(
            "max E_x[ E_π[r + 10] − β KL(π‖ref) ]",
            None,
            "Right: a constant goes into Z alone, p stays.",
            "cost(π) − cost(p), with r + 10",
            "KL(π‖p)",
            _excess(_constant),
            _constant,
        ),
        "rescaled": Variant(
            "max E_x[ E_π[2r] − 2β KL(π‖ref) ]",
            None,
            "Right: only r/β counts.",
            "cost(π) − cost(p), with 2r and 2β",
            "KL(π‖p)",
            _excess(_rescaled),
            _rescaled,
        ),
        "undivided": Variant(
            "min E_x β KL(π‖p)",
            None,
            "Right: step (2) left out and β carried along; it is what is left to climb, in units of reward.",
            "β KL(π‖p) / β",
            "KL(π‖p)",
            _excess(_undivided, per_nat=True),
            _undivided,
        ),
        "z_to_the_end": Variant(
            "min E_x[ KL(π‖p) − log Z(x) ]",
            None,
            "Right: log Z(x) as a term of its own does no harm, its gradient is 0; only the best value is −E_x log Z, not 0.",
            "its value at π − its value at p",
            "KL(π‖p)",
            _excess(_z_to_the_end),
            _z_to_the_end,
        ),
    }
)
