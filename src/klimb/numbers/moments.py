"""Moment constraints, "half of the completions mention X": the lam whose tilt exp(lam . phi) of ref has these means.

Of all laws that meet the goal it is the one nearest the reference. P prompts, G draws a prompt, K features phi; one lam
for all prompts, so the goal holds on the average over prompts, and every prompt has its own log Z:

    p(y|x) = ref(y|x) exp(lam . phi(x,y)) / Z(x),        mean over x of E_p[phi | x] = goal

The dual, mean log Z(x) - lam . goal, is convex, its gradient is the moments minus the goal and its Hessian their mean
covariance within the prompts: Newton ends in a few steps where the goal lies inside what the draws can reach, and its
own last step proves that it does. Elsewhere a linear programme says what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.numbers.estimate import FEW_PROMPTS, Estimate
from klimb.numbers.frontier import trust_warnings
from klimb.numbers.hull import combination, in_words, reach
from klimb.numbers.tilt import MARGIN, log_partition, shares, tilted_kl
from klimb.numbers.weights import effective_sample_size, pooled_pareto_k

TOLERANCE = 1e-10
"""how far the moments may be from the goal at the end, in standard deviations of the feature"""


@dataclass(frozen=True)
class Moments:
    """The fitted tilt, and how far it can be trusted.

    Attributes:
        names: of the K features.
        lam: nats per unit of each feature.
        goal: what was asked for.
        reference: E_ref[phi], where it starts from.
        reached: moments at lam on the draws it was fitted to, jackknifed if `correct`: the goal, up to `TOLERANCE`.
        held_out: moments on draws that lam was not fitted to, jackknifed: half of each prompt's draws at the lam of
            the other half, and the other way round.
        kl: KL(p||ref), nats, mean over prompts.
        log_z: [P] nats.
        ess: effective draws a prompt.
        pareto_k: tail shape of the weights, prompts pooled.
        steps: of Newton.
        warnings: everything that is wrong with it.
    """

    names: tuple[str, ...]
    lam: tuple[Estimate, ...]
    goal: tuple[float, ...]
    reference: tuple[Estimate, ...]
    reached: tuple[float, ...]
    held_out: tuple[Estimate, ...]
    kl: Estimate
    log_z: Tensor
    ess: float
    pareto_k: float
    steps: int
    warnings: tuple[str, ...]

    @property
    def reliable(self) -> bool:
        """True unless a warning says "unreliable"."""
        return not any("unreliable" in warning for warning in self.warnings)


def fit_moments(
    features: Tensor,
    goal: Tensor | Sequence[float],
    log_w: Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    correct: bool = True,
    max_steps: int = 50,
) -> Moments:
    r"""Fit lam so that the tilted draws have the mean features `goal`.

    $$ \min_\lambda \tfrac1P \textstyle\sum_x \log Z_\lambda(x) - \lambda\cdot\mu, \qquad
       \nabla = \bar E_{p_\lambda}[\phi] - \mu, \quad \nabla^2 = \overline{Cov}_{p_\lambda}(\phi) = H $$

    Bias: self-normalised means are biased at O(1/G), with the same sign for every prompt, so more prompts do not help.
    `correct` moves lam on until their jackknifed values are the goal, with what is left at O(1/G^2); `held_out` shows it.
    Noise: intervals are 95 %, by the delta method, Var(lam) = H^-1 C H^-1 with C the covariance of the mean moments over
    prompts (within the prompts if P < 8: they then speak of these prompts alone). The KL is the dual's value at its
    extreme, so that the noise of lam does not enter its interval at first order.

    Args:
        features: [P, G, K], or [N, K] of one prompt: draws from the reference (or any law, see `log_w`).
        goal: K mean features; averages over prompts.
        log_w: [P, G] or [N] nats, log ref - log q up to a constant a prompt (add r / beta to constrain the tilt of a
            reward instead); None if drawn from the reference. -inf leaves a draw out.
        names: of the features, for the messages.
        correct: jackknife within the prompts that have enough draws for it; False on an enumerated space, where the
            plug-in is exact.
        max_steps: of Newton.

    Returns:
        A `Moments`. A warning that starts with "unreliable:" names what it would need.

    Raises:
        ValueError: shapes that do not fit, NaN or infinite features; a feature that never varies within a prompt, or
            features of which one follows from the others (their lam would not be determined); a goal that the draws
            cannot reach, with the nearest one that they can; a goal on the border, which needs an infinite lam: for a
            boolean feature a hard filter, reward -inf.

    Example: a third of the draws mention it, and half of them should. It costs little, and lam is the logit's shift.
        >>> said = (torch.arange(300) % 3 == 0).double()[:, None]
        >>> found = fit_moments(said, [0.5])
        >>> round(found.lam[0].value, 2), round(found.kl.value, 2), found.steps <= 8
        (0.69, 0.06, True)

    Source: Khalifa, Elsahar, Dymetman, "A distributional approach to controlled text generation", 2021 (the target,
    fitted by gradient steps); Csiszár, 1975, "I-divergence geometry of probability distributions and minimization
    problems"; the sandwich is Huber, 1967; the jackknife as in `klimb.numbers.tilt`.

    Not the same as a lam for each prompt, which would make the goal hold prompt by prompt: for that, fit the prompts one
    by one. Not the same as `solve_beta(goal=...)`, which takes one reward, bisects, and gives no interval.
    """
    phi, u, mu, names = _checked(features, goal, log_w, names)
    scale = _spreads(phi, u, mu, names)
    x = (phi - mu) / scale  # standard deviations from the goal; the work is done in these units
    plain, steps, inside = _newton(x, u, max_steps)
    if not inside:
        raise ValueError("fit_moments: " + in_words(reach(x, u > 0), phi, u > 0, mu, scale, names))
    enough = _enough(shares(x @ plain + u.log())) & correct
    lam = _corrected(x, u, plain, enough)

    num_prompts, num_draws = u.shape
    tilted, log_u = x @ lam, u.log()
    weights = tilted + log_u
    s = shares(weights)
    log_z = log_partition(tilted, 1.0, log_u + math.log(num_draws), correct=correct)
    k = pooled_pareto_k(weights)
    reached = _means(x, s, enough).mean(0)
    held, held_half = _held_out(x, u, max_steps, correct)
    biased = f"unreliable: the bias of the moments could not be removed; needs more than {num_draws} draws a prompt"
    warnings = (
        *((biased,) if reached.abs().max() > 1e-6 else ()),
        *trust_warnings(weights, tilted_kl(weights, 1.0).mean().item(), k),
        *_missed(held, held_half, mu, scale, names, num_draws),
    )

    inverse = _inverse(_covariance(x, s).mean(0))
    width = _width(num_prompts)
    lam_half = width * (inverse @ _noise(x, s) @ inverse).diagonal().sqrt()
    # KL is lam . goal - mean log Z at its maximum over lam: at first order only the noise of log Z is left
    kl = tilted_kl(tilted, 1.0, log_u, correct=correct).mean().item()
    if num_prompts < FEW_PROMPTS:
        kl_noise = ((s - u) ** 2).sum().item() / num_prompts**2
    else:
        kl_noise = log_z.var().item() / num_prompts
    kl_half = width * math.sqrt(kl_noise)

    def estimates(centre: Tensor, half: Tensor, said: tuple[str, ...]) -> tuple[Estimate, ...]:
        rows = zip(centre.tolist(), half.tolist(), strict=True)
        return tuple(Estimate(c, c - h, c + h, u.numel(), said) for c, h in rows)

    return Moments(
        names=names,
        lam=estimates(lam / scale, lam_half / scale, warnings),
        goal=tuple(mu.tolist()),
        reference=estimates(
            mu + scale * (u[..., None] * x).sum(1).mean(0),
            width * scale * _noise(x, u).diagonal().sqrt(),
            (),
        ),
        reached=tuple((mu + scale * reached).tolist()),
        held_out=estimates(mu + scale * held, scale * held_half, warnings),
        kl=Estimate(kl, max(0.0, kl - kl_half), kl + kl_half, u.numel(), warnings),
        log_z=log_z + mu @ (lam / scale),
        ess=effective_sample_size(weights).mean().item(),
        pareto_k=k,
        steps=steps,
        warnings=warnings,
    )


def _newton(x: Tensor, u: Tensor, max_steps: int) -> tuple[Tensor, int, bool]:
    """Lam [K] of moments zero, the steps it took, and whether it was proven to exist; x [P, G, K], u [P, G] sums to 1.

    The proof: with gradient g and Hessian H the weights s (1 - (x - mean) . H^-1 g) have moments exactly zero. If they
    are positive, zero is inside. On the border the second factor stays at 0 for some draw, however small g is. The step
    is no longer than a multiple of lam, as far out it may be anything.
    """
    lam, log_u = x.new_zeros(x.shape[-1]), u.log()

    def dual(at: Tensor) -> float:
        return torch.logsumexp(x @ at + log_u, -1).mean().item()

    value, step = dual(lam), 0
    while True:
        s = shares(x @ lam + log_u)
        means = (s[..., None] * x).sum(1, keepdim=True)
        gradient, hessian = means.mean((0, 1)), _covariance(x, s).mean(0)
        move = -_inverse(hessian) @ gradient
        left = gradient.abs().max().item()
        change = torch.where(u > 0, ((x - means) @ move).abs(), 0.0).max().item()
        solved = (hessian @ move + gradient).abs().max().item() <= 1e-3 * left
        if left <= TOLERANCE and change <= 0.5 and solved:
            return lam, step, True
        # far below the tolerance the gradient is rounding and proves nothing
        if left <= TOLERANCE / 1000 or step == max_steps:
            return lam, step, False
        move = move * min(1.0, (10 + 2 * lam.abs().max().item()) / max(move.abs().max().item(), 1e-300))
        slope, length = (gradient @ move).item(), 1.0
        slack = 1e-14 * (1 + abs(value))  # near the end the gain is below rounding
        while (new := dual(lam + length * move)) > value + 1e-4 * length * slope + slack:
            length /= 2
            if length < 1e-12:
                return lam, step, False
        lam, value, step = lam + length * move, new, step + 1


def _corrected(x: Tensor, u: Tensor, lam: Tensor, enough: Tensor) -> Tensor:
    """The lam nearby at which the jackknifed moments are zero; `lam` itself if they cannot be made so."""
    start, before = lam, math.inf
    for _ in range(30):
        s = shares(x @ lam + u.log())
        gap = _means(x, s, enough).mean(0)
        left = gap.abs().max().item()
        if left <= TOLERANCE:
            return lam
        if not left < before:
            break
        lam, before = lam - _inverse(_covariance(x, s).mean(0)) @ gap, left
    return start


def _held_out(x: Tensor, u: Tensor, max_steps: int, correct: bool) -> tuple[Tensor, Tensor]:
    """Moments [K] of each half of the draws at the other half's lam, and half of their intervals; NaN if unknown.

    The noise of a half enters once as draws and once through lam, with opposite signs, so the mean of both is nearly
    free of noise and shows what is wrong with lam otherwise. They are jackknifed in any case: plug-in means would share
    the bias of a plug-in lam. The interval is that of the moments which the law fitted to all draws truly has.
    """
    halves = [(x[:, i::2], u[:, i::2]) for i in (0, 1)]
    unknown = x.new_full((x.shape[-1],), math.nan)
    if any((weight.sum(-1) == 0).any() for _, weight in halves):
        return unknown, unknown
    halves = [(part, weight / weight.sum(-1, keepdim=True)) for part, weight in halves]
    fits = [_newton(part, weight, max_steps) for part, weight in halves]
    if not all(inside for _, _, inside in fits):
        return unknown, unknown
    lams = [
        _corrected(*half, lam, _enough(shares(half[0] @ lam + half[1].log())) & correct)
        for half, (lam, _, _) in zip(halves, fits, strict=True)
    ]
    means, noises = [], []
    for (part, weight), lam in zip(halves, lams[::-1], strict=True):
        s = shares(part @ lam + weight.log())
        means.append(_means(part, s, _enough(s)))
        noises.append(_noise(part, s))
    mean = (means[0] + means[1]) / 2
    noise = (noises[0] + noises[1]) / 4 if len(x) < FEW_PROMPTS else _between(mean)
    return mean.mean(0), _width(len(x)) * noise.diagonal().sqrt()


def _enough(s: Tensor) -> Tensor:
    """[P] where to jackknife: enough draws carry the weight."""
    return torch.special.entr(s).sum(-1) >= MARGIN


def _means(x: Tensor, s: Tensor, enough: Tensor) -> Tensor:
    """[P, K] self-normalised means sum_g s x; where there are enough draws, less their bias of order 1 / G."""
    means = (s[..., None] * x).sum(1)
    # leaving draw g out moves the mean by s_g (mean - x_g) / (1 - s_g)
    ratio = s / (1 - s).clamp_min(torch.finfo(s.dtype).tiny)
    moved = (ratio[..., None] * (means[:, None] - x)).mean(1)
    return means - torch.where(enough[:, None], (s.shape[1] - 1) * moved, 0.0)


def _missed(
    held: Tensor, half: Tensor, mu: Tensor, scale: Tensor, names: Sequence[str], num_draws: int
) -> tuple[str, ...]:
    """A warning for every feature whose held-out moment is not the goal."""
    if held.isnan().any():
        return (
            f"unreliable: half of the {num_draws} draws a prompt cannot reach the goal, so that nothing can be held out; "
            "needs more",
        )
    return tuple(
        f"unreliable: on draws that lam was not fitted to, the mean of {name} is {goal + unit * value:.3g} "
        f"[{goal + unit * (value - width):.3g}, {goal + unit * (value + width):.3g}] and not {goal:.3g}; "
        f"needs more than {num_draws} draws a prompt"
        for name, goal, unit, value, width in zip(
            names, mu.tolist(), scale.tolist(), held.tolist(), half.tolist(), strict=True
        )
        if abs(value) > width + TOLERANCE
    )


def _covariance(x: Tensor, s: Tensor) -> Tensor:
    """[P, K, K] of the features within each prompt under the weights s [P, G]."""
    off = x - (s[..., None] * x).sum(1, keepdim=True)
    return torch.einsum("pg,pgk,pgl->pkl", s, off, off)


def _inverse(hessian: Tensor) -> Tensor:
    """Far out the Hessian is singular to rounding, or so small that its inverse would be infinite."""
    return torch.linalg.pinv(hessian, atol=1e-250, rtol=1e-15, hermitian=True)


def _noise(x: Tensor, s: Tensor) -> Tensor:
    """[K, K] covariance of the mean over prompts of the self-normalised means sum_g s x."""
    means = (s[..., None] * x).sum(1)
    if len(x) >= FEW_PROMPTS:
        return _between(means)
    off = s[..., None] * (
        x - means[:, None]
    )  # these prompts, other draws: the influence of draw g is s_g (x_g - mean)
    return torch.einsum("pgk,pgl->kl", off, off) / len(x) ** 2


def _between(means: Tensor) -> Tensor:
    """[K, K] covariance of the mean of P independent rows [P, K]."""
    off = means - means.mean(0)
    return off.T @ off / (len(off) * (len(off) - 1))


def _width(num_prompts: int) -> float:
    """Half a 95 % interval in standard errors: Student's where prompts are counted, else the normal's."""
    from scipy.special import ndtri, stdtrit

    return float(ndtri(0.975) if num_prompts < FEW_PROMPTS else stdtrit(num_prompts - 1, 0.975))


def _spreads(phi: Tensor, u: Tensor, mu: Tensor, names: Sequence[str]) -> Tensor:
    """[K] standard deviation within the prompts; refuses features whose lam would not be determined."""
    covariance = _covariance(phi, u).mean(0)
    spread = covariance.diagonal().sqrt()
    mean = (u[..., None] * phi).sum(1).mean(0)
    for name, width, size, now, goal in zip(names, spread, phi.abs().amax((0, 1)), mean, mu, strict=True):
        if width <= 1e-9 * size:
            raise ValueError(
                f"fit_moments: {name} is the same for all draws of a prompt, so no tilt moves its mean from "
                f"{now:.4g} to {goal:.4g}; leave it out, or draw more"
            )
    values, vectors = torch.linalg.eigh(covariance / (spread[:, None] * spread))
    if values[0] <= 1e-10 * values[-1]:
        raise ValueError(
            f"fit_moments: {combination(vectors[:, 0] / spread, names)} is the same for all draws of a prompt, so one of these "
            "features follows from the others and lam is not determined; leave it out"
        )
    return spread


def _checked(
    features: Tensor, goal: Tensor | Sequence[float], log_w: Tensor | None, names: Sequence[str] | None
) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Features [P, G, K], weights [P, G], goal [K], all float64, and names."""
    phi = features.detach().double().cpu()
    mu = torch.as_tensor(goal, dtype=torch.float64).detach().cpu()
    if phi.ndim not in (2, 3) or 0 in phi.shape or mu.shape != phi.shape[-1:]:
        raise ValueError(
            f"fit_moments: got features of shape {tuple(phi.shape)} and a goal of shape {tuple(mu.shape)}; expected "
            "[P, G, K] or [N, K], and [K]"
        )
    w = torch.zeros(phi.shape[:-1], dtype=torch.float64) if log_w is None else log_w.detach().double().cpu()
    if w.shape != phi.shape[:-1]:
        raise ValueError(
            f"fit_moments: got log_w of shape {tuple(w.shape)}; expected {tuple(phi.shape[:-1])}, one number a draw"
        )
    if phi.ndim == 2:
        phi, w = phi[None], w[None]
    if not (w < math.inf).all() or not (w > -math.inf).any(-1).all():
        raise ValueError(
            "fit_moments: got log_w that is NaN or +inf, or -inf for all draws of a prompt; expected finite numbers, or "
            "-inf for some (leave such prompts out)"
        )
    phi = torch.where((w > -math.inf)[..., None], phi, 0.0)
    if not (phi.isfinite().all() and mu.isfinite().all()):
        raise ValueError(
            "fit_moments: got features or a goal that are NaN or infinite; expected finite numbers"
        )
    names = tuple(names) if names is not None else tuple(f"feature {k}" for k in range(len(mu)))
    if len(names) != len(mu):
        raise ValueError(f"fit_moments: got {len(names)} names for {len(mu)} features; expected as many")
    return phi, shares(w), mu, names
