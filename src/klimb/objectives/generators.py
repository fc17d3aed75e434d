"""Generators of f-divergences: convex f with f(1) = 0, for D_f(pi||p) = E_p f(t), t = pi/p.

f is known up to c (t - 1), which has no mean under p. That freedom is used twice. The slope f' is shifted to vanish
at t = 1, so that it asks for nothing at pi = p. The value is read from draws of the policy, as E_pi h with
h = f(t)/t: there f is shifted to f(0) = 0 if f(0) is finite, so that a draw the policy hardly makes (t -> 0) weighs
no more than it must, and else to f'(1) = 0, so that h vanishes at p to second order.

All are functions of x = log t; logarithms are natural.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class Divergence:
    r"""A generator f, written in x = log t so that t of any size can be asked for.

    Attributes:
        name: what it is asked for by.
        value: x -> h = f(t)/t; E_pi h = D_f(pi||p). At x = inf (p = 0) its limit.
        slope: x -> f'(t) - f'(1); increasing in x. At x = inf its limit.
        at_zero: f(0) of the f with f'(1) = 0: what a unit of p costs where the policy has nothing.
        at_infinity: f'(inf) of the f with f'(1) = 0: what a unit of the policy costs where p has nothing.

    `slope = value + d value / dx`, up to a constant. Laws without common support are at_zero + at_infinity apart.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    at_zero: float
    at_infinity: float

    @property
    def takes_forbidden(self) -> bool:
        """Whether it is finite where the target forbids what the policy makes (reward -inf)."""
        return math.isfinite(self.at_infinity)

    @property
    def takes_missing(self) -> bool:
        """Whether it is finite where the policy cannot make what the target has."""
        return math.isfinite(self.at_zero)

    @property
    def leaves_out(self) -> bool:
        """Whether the best policy under a price on D_f(pi||ref) may leave out what ref can make: f'(0) is finite."""
        return math.isfinite(self.slope(torch.tensor(-math.inf)).item())


def alpha(a: float) -> Divergence:
    """The alpha family: f = (t^a - 1) / (a (a - 1)), between KL(p||pi) at a -> 0 and KL(pi||p) at a -> 1.

    For a < 1 it takes forbidden draws, for a > 0 missing ones; between, both.

    Raises:
        ValueError: a is 0 or 1, which are the two KLs and have names, or not finite.

    Example:
        >>> alpha(0.25).at_zero, alpha(0.25).takes_forbidden, alpha(2).takes_forbidden
        (4.0, True, False)

    Source: Cichocki, Amari, "Families of alpha- beta- and gamma-divergences", 2010.
    """
    if not math.isfinite(a) or a in (0, 1):
        raise ValueError(
            f"alpha: got {a}, expected a finite number other than 0 and 1: "
            "0 is forward_kl, 1 is reverse_kl; ask for them by name"
        )

    def value(x: Tensor) -> Tensor:
        if a > 0:
            return torch.expm1((a - 1) * x) / (a * (a - 1))
        return (torch.exp(-x) * torch.expm1(a * x) / a + torch.expm1(-x)) / (a - 1)

    return Divergence(
        f"alpha({a:g})",
        value=value,
        slope=lambda x: torch.expm1((a - 1) * x) / (a - 1),
        at_zero=1 / a if a > 0 else math.inf,
        at_infinity=1 / (1 - a) if a < 1 else math.inf,
    )


def skew_kl(a: float) -> Divergence:
    """KL(p || a p + (1 - a) pi): f = -log(a + (1 - a) t). At most -log a; a -> 0 is KL(p||pi).

    Raises:
        ValueError: a is not strictly between 0 and 1.

    Example:
        >>> f = skew_kl(0.1)
        >>> round(f.at_zero + f.at_infinity, 4)  # -log 0.1
        2.3026

    Source: Ko et al., "DistiLLM: towards streamlined distillation for large language models", 2024.
    """
    _require_between("skew_kl", a, "0 is forward_kl, 1 is zero everywhere")
    shift = math.log((1 - a) / a)  # a + (1 - a) t = a (1 + e^y) with y = x + shift
    return Divergence(
        f"skew_kl({a:g})",
        value=lambda x: -math.exp(shift) * _log1p_share(x + shift) - math.log(a),
        slope=lambda x: (1 - a) * (1 - torch.sigmoid(-x - shift) / a),
        at_zero=-math.log(a) - (1 - a),
        at_infinity=1 - a,
    )


def skew_reverse_kl(a: float) -> Divergence:
    """KL(pi || a pi + (1 - a) p): f = t log(t / (a t + 1 - a)). At most -log a; a -> 0 is KL(pi||p).

    Raises:
        ValueError: a is not strictly between 0 and 1.

    Example:
        >>> skew_reverse_kl(0.1).takes_forbidden
        True

    Source: Ko et al., "DistiLLM: towards streamlined distillation for large language models", 2024.
    """
    _require_between("skew_reverse_kl", a, "0 is reverse_kl, 1 is zero everywhere")
    shift = math.log(a / (1 - a))  # a t / (a t + 1 - a) = sigmoid(y) with y = x + shift
    return Divergence(
        f"skew_reverse_kl({a:g})",
        value=lambda x: logsigmoid(x + shift) - math.log(a),
        slope=lambda x: logsigmoid(x + shift) - math.log(a) + torch.sigmoid(-x - shift) - (1 - a),
        at_zero=1 - a,
        at_infinity=-math.log(a) - (1 - a),
    )


def generalized_js(b: float) -> Divergence:
    """Generalised JS, b KL(p||m) + (1 - b) KL(pi||m) with m = b p + (1 - b) pi: at most the entropy of a coin of b.

    f = -b log(b + (1 - b) t) + (1 - b) t log(t / (b + (1 - b) t)). At b = 1/2 it is jensen_shannon.

    Raises:
        ValueError: b is not strictly between 0 and 1.

    Example:
        >>> f = generalized_js(0.5)
        >>> round(f.at_zero + f.at_infinity, 4)  # log 2
        0.6931

    Source: Agarwal et al., "On-policy distillation of language models: learning from self-generated mistakes", 2024.

    Not the same as b KL(p||pi) + (1 - b) KL(pi||p), which has no bound; towards b = 0 and b = 1 both fade alike.
    """
    _require_between("generalized_js", b, "divided by b, 0 is forward_kl; divided by 1 - b, 1 is reverse_kl")
    shift = math.log((1 - b) / b)  # (1 - b) t / m = sigmoid(y) with y = x + shift

    def log_share(x: Tensor) -> Tensor:  # log(pi / m)
        return logsigmoid(x + shift) - math.log1p(-b)

    return Divergence(
        f"generalized_js({b:g})",
        value=lambda x: (1 - b) * (log_share(x) - _log1p_share(x + shift)) - b * math.log(b),
        slope=lambda x: (1 - b) * log_share(x),
        at_zero=-b * math.log(b),
        at_infinity=-(1 - b) * math.log1p(-b),
    )


def _log1p_share(y: Tensor) -> Tensor:
    """log(1 + e^y) / e^y, from 1 (y -> -inf) to 0; beyond the clamp float64 has no more digits, and 0 * inf is NaN."""
    y = y.clamp(-40.0, 80.0)
    return torch.logaddexp(y, torch.zeros_like(y)) * torch.exp(-y)


def _split(name: str) -> tuple[str, float | None]:
    match = re.fullmatch(r"(\w+)\((.*)\)", name.replace(" ", ""))
    if match is None:
        return name, None
    try:
        return match[1], float(match[2])
    except ValueError:
        raise ValueError(f"f_divergence: got {name!r}, expected a number in the brackets") from None


def _require_between(name: str, parameter: float, ends: str) -> None:
    if not 0 < parameter < 1:
        raise ValueError(f"{name}: got {parameter}, expected a number strictly between 0 and 1 ({ends})")


GENERATORS: Mapping[str, Divergence] = MappingProxyType(
    {
        f.name: f
        for f in (
            # KL(pi||p): f = t log t
            Divergence("reverse_kl", lambda x: x, lambda x: x, 1.0, math.inf),
            # KL(p||pi): f = -log t; entr(1/t) is log t / t, and 0 at infinity
            Divergence(
                "forward_kl",
                lambda x: -torch.expm1(-x) - torch.special.entr(torch.exp(-x)),
                lambda x: -torch.expm1(-x),
                math.inf,
                1.0,
            ),
            # KL(pi||m) / 2 + KL(p||m) / 2, m = (p + pi) / 2: f = (t log t - (t + 1) log((t + 1) / 2)) / 2
            replace(generalized_js(0.5), name="jensen_shannon"),
            # f = |t - 1| / 2; the slope jumps at p, so the gradient's noise does not fade on the way there
            Divergence(
                "total_variation",
                lambda x: torch.relu(-torch.expm1(-x)),
                lambda x: torch.sign(x) / 2,
                0.5,
                0.5,
            ),
            # chi2(pi||p): f = (t - 1)^2, which is 2 alpha(2)
            Divergence("chi2_reverse", torch.expm1, lambda x: 2 * torch.expm1(x), 1.0, math.inf),
            # chi2(p||pi): f = (t - 1)^2 / t, which is 2 alpha(-1)
            Divergence(
                "chi2_forward", lambda x: torch.expm1(-x) ** 2, lambda x: -torch.expm1(-2 * x), math.inf, 1.0
            ),
            # sum (sqrt p - sqrt pi)^2: f = (1 - sqrt t)^2, which is alpha(1/2) / 2
            Divergence(
                "squared_hellinger",
                lambda x: -2 * torch.expm1(-x / 2),
                lambda x: -torch.expm1(-x / 2),
                1.0,
                1.0,
            ),
        )
    }
)
"""Divergences without a parameter, by name: f-DPG's, with its factors."""

FAMILIES: Mapping[str, Callable[[float], Divergence]] = MappingProxyType(
    {f.__name__: f for f in (alpha, skew_kl, skew_reverse_kl, generalized_js)}
)
"""Divergences with a parameter, by name; `divergence` takes them as "alpha(0.5)"."""


def divergence(name: str) -> Divergence:
    """The divergence of this name, with its parameter in brackets if it has one.

    Raises:
        ValueError: there is none of this name (the nearest is named), a parameter is missing or out of its range.

    Example:
        >>> divergence("jensen_shannon").takes_forbidden, divergence("alpha(0.5)").name
        (True, 'alpha(0.5)')
        >>> divergence("jenson_shannon")
        Traceback (most recent call last):
        ValueError: f_divergence: no divergence 'jenson_shannon', did you mean jensen_shannon? There are reverse_kl, \
forward_kl, jensen_shannon, total_variation, chi2_reverse, chi2_forward, squared_hellinger, and with a number in \
brackets alpha, skew_kl, skew_reverse_kl, generalized_js
    """
    stem, parameter = _split(name)
    if parameter is None and stem in GENERATORS:
        return GENERATORS[stem]
    if parameter is not None and stem in FAMILIES:
        return FAMILIES[stem](parameter)
    if stem in FAMILIES:
        raise ValueError(f"f_divergence: got {name!r}, expected its parameter with it, as in {stem}(0.5)")
    if stem in GENERATORS:
        raise ValueError(f"f_divergence: got {name!r}, but {stem} has no parameter; say {stem}")
    near = difflib.get_close_matches(stem, [*GENERATORS, *FAMILIES], n=1)
    raise ValueError(
        f"f_divergence: no divergence {name!r}{f', did you mean {near[0]}' if near else ''}? There are "
        f"{', '.join(GENERATORS)}, and with a number in brackets {', '.join(FAMILIES)}"
    )
