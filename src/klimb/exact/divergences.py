"""Every divergence between two laws over Y outcomes, by plain summation, with its zeros handled; and their table.

Laws a, b are log-probabilities [..., Y] in nats, -inf where an outcome cannot be. D(a||b) is 0 exactly where a = b.
The conventions (which factor, which direction) are those of `klimb.objectives`; each docstring says its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.exact.truth import kl


def entropy(log_a: Tensor) -> Tensor:
    """H(a) = -sum_y a(y) log a(y), [..., Y] -> [...] nats; 0 log 0 = 0.

    Example:
        >>> round(entropy(torch.tensor([0.5, 0.5, 0.0]).log()).item(), 4)
        0.6931
    """
    return kl(log_a, torch.zeros_like(log_a)).neg() + 0.0


def generalized_jensen_shannon(log_a: Tensor, log_b: Tensor, *, share: float) -> Tensor:
    """GJS = s KL(a||m) + (1-s) KL(b||m), m = s a + (1-s) b, [..., Y] -> [...] nats; at most the entropy of (s, 1-s).

    Exchanging a and b is exchanging s and 1-s.

    Raises:
        ValueError: the share is not strictly between 0 and 1.

    Example:
        >>> sure, other = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
        >>> round(generalized_jensen_shannon(sure, other, share=0.1).item(), 4)
        0.3251

    Source: Lin, 1991, "Divergence measures based on the Shannon entropy". Not the same as the form without weights
    in front of the two KL terms.
    """
    log_m = _mixture(log_a, log_b, share)
    return share * kl(log_a, log_m) + (1 - share) * kl(log_b, log_m)


def jensen_shannon(log_a: Tensor, log_b: Tensor) -> Tensor:
    """JS(a, b) = (KL(a||m) + KL(b||m)) / 2, m = (a + b) / 2, [..., Y] -> [...] nats; at most log 2.

    Example:
        >>> sure, other = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
        >>> round(jensen_shannon(sure, other).item(), 4)
        0.6931

    Not the same as its square root (the distance that `scipy.spatial.distance.jensenshannon` returns).
    """
    return generalized_jensen_shannon(log_a, log_b, share=0.5)


def skew_kl(log_a: Tensor, log_b: Tensor, *, share: float) -> Tensor:
    """KL(a || s a + (1-s) b), [..., Y] -> [...] nats; at most -log s, so finite whatever b lacks.

    Raises:
        ValueError: the share is not strictly between 0 and 1.

    Example:
        >>> sure, other = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
        >>> round(skew_kl(sure, other, share=0.1).item(), 4)
        2.3026

    Source: Lee, 1999, "Measures of distributional similarity"; Ko et al., 2024, "DistiLLM".
    """
    return kl(log_a, _mixture(log_a, log_b, share))


def total_variation(log_a: Tensor, log_b: Tensor) -> Tensor:
    """TV(a, b) = sum_y |a(y) - b(y)| / 2, [..., Y] -> [...]; from 0 to 1: the mass that has to be moved.

    Example:
        >>> round(total_variation(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()).item(), 4)
        0.3
    """
    return (log_a.exp() - log_b.exp()).abs().sum(-1) / 2


def squared_hellinger(log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum_y (sqrt a(y) - sqrt b(y))^2, [..., Y] -> [...]; from 0 to 2.

    Not the same as the convention with 1/2 in front, which ends at 1.

    Example:
        >>> sure, other = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
        >>> squared_hellinger(sure, other).item()
        2.0
    """
    return ((log_a / 2).exp() - (log_b / 2).exp()).square().sum(-1)


def chi_squared(log_a: Tensor, log_b: Tensor) -> Tensor:
    """chi2(a||b) = sum_y (a(y) - b(y))^2 / b(y), [..., Y] -> [...]; +inf where b lacks what a has.

    1 + chi2(p||ref) is the factor by which weights p/ref lower the effective sample size.

    Example:
        >>> round(chi_squared(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()).item(), 4)
        0.5625
    """
    a, b = log_a.exp(), log_b.exp()
    terms = (a - b).square() / b
    return torch.where((a == 0) & (b == 0), 0.0, terms).sum(-1)


def alpha_divergence(log_a: Tensor, log_b: Tensor, *, alpha: float) -> Tensor:
    """(sum_y a(y)^alpha b(y)^(1-alpha) - 1) / (alpha (alpha - 1)), [..., Y] -> [...].

    alpha -> 1 is KL(a||b), alpha -> 0 is KL(b||a), 2 is half of chi2(a||b), 1/2 twice the squared Hellinger.
    +inf where alpha >= 1 and b lacks what a has, or alpha <= 0 and a lacks what b has.

    Raises:
        ValueError: alpha is not finite.

    Example:
        >>> a, b = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()
        >>> round(alpha_divergence(a, b, alpha=2.0).item(), 4), round(alpha_divergence(a, b, alpha=1.0).item(), 4)
        (0.2813, 0.2231)

    Source: Cressie and Read, 1984, "Multinomial goodness-of-fit tests", their lambda = alpha - 1. Not the same as
    Amari's alpha, which is 2 alpha - 1 here.
    """
    if not math.isfinite(alpha):
        raise ValueError(f"alpha_divergence: got alpha = {alpha}, expected a finite number")
    if alpha in (0.0, 1.0):
        return kl(log_a, log_b) if alpha == 1.0 else kl(log_b, log_a)
    return torch.expm1(_log_overlap(log_a, log_b, alpha)) / (alpha * (alpha - 1))


def renyi(log_a: Tensor, log_b: Tensor, *, alpha: float) -> Tensor:
    """log(sum_y a(y)^alpha b(y)^(1-alpha)) / (alpha - 1), [..., Y] -> [...] nats; alpha -> 1 is KL(a||b).

    exp of the one of order 2 is 1 + chi2(a||b). It does not fall as alpha grows.

    Raises:
        ValueError: alpha is not above zero, or not finite.

    Example:
        >>> a, b = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log()
        >>> round(renyi(a, b, alpha=2.0).expm1().item(), 4)
        0.5625

    Source: van Erven and Harremoës, 2014, "Rényi divergence and Kullback-Leibler divergence".
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"renyi: got alpha = {alpha}, expected a finite number above 0")
    return kl(log_a, log_b) if alpha == 1.0 else _log_overlap(log_a, log_b, alpha) / (alpha - 1)


@dataclass(frozen=True)
class Row:
    """One divergence of a pair P, Q: its name, formula for D(P||Q), value both ways, and the most that it can be."""

    name: str
    formula: str
    forward: float
    backward: float
    most: float

    @property
    def symmetric(self) -> bool:
        """Whether the two directions are the same divergence."""
        return self.name in ("Jensen-Shannon", "total variation", "squared Hellinger")


def all_divergences(
    log_p: Tensor, log_q: Tensor, *, alphas: Sequence[float] = (0.5, 2.0), share: float = 0.1
) -> tuple[Row, ...]:
    """Every divergence of this file between two laws [Y], both ways.

    Args:
        log_p: [Y] nats.
        log_q: [Y] nats.
        alphas: orders of the alpha and Rényi families.
        share: of P in the mixtures of the skew KL and of the generalized Jensen-Shannon.

    Raises:
        ValueError: the laws have different lengths, an order or the share is outside its domain.

    Example:
        >>> rows = all_divergences(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.5, 0.5]).log())
        >>> [(row.name, round(row.forward, 4), round(row.backward, 4)) for row in rows[:2]]
        [('KL', 0.6931, inf), ('Jensen-Shannon', 0.2158, 0.2158)]
    """
    if log_p.shape != log_q.shape:
        raise ValueError(
            f"got laws over {log_p.shape[-1]} and {log_q.shape[-1]} outcomes, expected the same outcomes for both"
        )
    mixed = -(share * math.log(share) + (1 - share) * math.log1p(-share)) if 0 < share < 1 else math.nan
    inf, s = math.inf, f"{share:g}"

    def row(name: str, formula: str, most: float, d: Callable[[Tensor, Tensor], Tensor]) -> Row:
        return Row(name, formula, d(log_p, log_q).item(), d(log_q, log_p).item(), most)

    rows = [
        row("KL", "∑ P log(P/Q)", inf, kl),
        row("Jensen-Shannon", "½ KL(P‖M) + ½ KL(Q‖M)", math.log(2), jensen_shannon),
        row("total variation", "½ ∑ |P − Q|", 1.0, total_variation),
        row("squared Hellinger", "∑ (√P − √Q)²", 2.0, squared_hellinger),
        row("chi-squared", "∑ (P − Q)² / Q", inf, chi_squared),
    ]
    for order in alphas:
        a = f"{order:g}"
        most = 1 / (order * (1 - order)) if 0 < order < 1 else inf
        rows.append(
            row(
                f"alpha {a}",
                f"(∑ P^{a} Q^{1 - order:g} − 1) / {order * (order - 1):g}"
                if order not in (0, 1)
                else "KL(P‖Q)"
                if order
                else "KL(Q‖P)",
                most,
                lambda x, y, order=order: alpha_divergence(x, y, alpha=order),
            )
        )
    rows += [
        row(
            f"Rényi {order:g}",
            f"log(∑ P^{order:g} Q^{1 - order:g}) / {order - 1:g}" if order != 1 else "KL",
            inf,
            lambda x, y, order=order: renyi(x, y, alpha=order),
        )
        for order in alphas
        if order > 0
    ]
    rows += [
        row(
            f"skew KL {s}",
            f"KL(P ‖ {s}P + {1 - share:g}Q)",
            -math.log(share) if 0 < share < 1 else inf,
            lambda x, y: skew_kl(x, y, share=share),
        ),
        row(
            f"generalized JS {s}",
            f"{s} KL(P‖M) + {1 - share:g} KL(Q‖M)",
            mixed,
            lambda x, y: generalized_jensen_shannon(x, y, share=share),
        ),
    ]
    return tuple(rows)


@dataclass(frozen=True)
class Asymmetry:
    """Which way Q errs as a stand-in for P.

    Attributes:
        missed: mass of P on outcomes that have less than half of it under Q.
        extra: mass of Q on outcomes that have less than half of it under P.
        verdict: "same", "misses", "covers" (too much), "both".
        says: in words.
    """

    missed: float
    extra: float
    verdict: str
    says: str


def asymmetry(log_p: Tensor, log_q: Tensor) -> Asymmetry:
    """What the two directions of KL say together, of two laws [Y].

    KL(P||Q) is large where Q is small and P is not: Q misses modes. KL(Q||P) is large where Q has mass and P has none:
    Q covers too much.

    Example:
        >>> two, one = torch.tensor([0.5, 0.5, 0.0]).log(), torch.tensor([1.0, 0.0, 0.0]).log()
        >>> asymmetry(two, one).verdict, asymmetry(one, two).verdict
        ('misses', 'covers')
    """
    p, q = log_p.exp(), log_q.exp()
    missed, extra = p[q < p / 2].sum().item(), q[p < q / 2].sum().item()
    there, back = kl(log_p, log_q).item(), kl(log_q, log_p).item()
    misses = f"outcomes that hold {missed:.1%} of P have less than half of that under Q" + (
        " (some nothing at all, so KL(P‖Q) is infinite)" if there == math.inf else ""
    )
    covers = f"outcomes that hold {extra:.1%} of Q have less than half of that under P" + (
        " (some nothing at all, so KL(Q‖P) is infinite)" if back == math.inf else ""
    )
    if max(there, back) < 1e-12:
        return Asymmetry(missed, extra, "same", "P and Q are the same law: every divergence is 0.")
    if there > 1.25 * back:
        return Asymmetry(missed, extra, "misses", f"KL(P‖Q) is the larger: Q misses modes of P; {misses}.")
    if back > 1.25 * there:
        return Asymmetry(missed, extra, "covers", f"KL(Q‖P) is the larger: Q covers too much; {covers}.")
    return Asymmetry(missed, extra, "both", f"Neither direction stands out: {misses}; {covers}.")


def _mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    if not 0 < share < 1:
        raise ValueError(f"got a share of {share} in the mixture, expected one strictly between 0 and 1")
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _log_overlap(log_a: Tensor, log_b: Tensor, alpha: float) -> Tensor:
    """Log of sum_y a^alpha b^(1-alpha); where both laws lack an outcome it does not count."""
    terms = alpha * log_a + (1 - alpha) * log_b
    return torch.logsumexp(torch.where(log_a.isneginf() & log_b.isneginf(), -torch.inf, terms), -1)
