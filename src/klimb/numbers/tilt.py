"""The target p = ref exp(r / beta) / Z seen through a pool of draws: log Z, E_p[r], KL(p||ref), and beta for a budget.

P prompts, G draws a prompt (any leading dimensions stand for P). Nats; reward in its own units; beta in reward per nat.
`log_w` are log-weights log ref - log q from the drawing law q to ref; None means drawn from ref. A reward of -inf
forbids the draw; NaN and +inf are errors. Sums are made in float64 and come back in the reward's dtype.

The plug-in log-mean-exp is biased by -chi2 / (2 G), with the same sign for every prompt, so averaging over prompts
does not remove it: the jackknife does, within the prompt, but only where enough draws carry the weight. The rule:
the entropy of the normalised weights is at least MARGIN nats (for draws from ref that is log G - KL >= MARGIN).
Elsewhere the plug-in value is returned, which errs on the low side.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

MARGIN = 2.5
"""nats that log(draws a prompt) must exceed the KL by before an estimate is called reliable"""


def draws_needed(kl: float, *, margin: float = MARGIN) -> int:
    """Draws a prompt that support a KL of `kl` nats: ceil(exp(kl + margin)).

    Example:
        >>> draws_needed(1.0)
        34

    Source: the order exp(KL) is Chatterjee and Diaconis, 2018, "The sample size required in importance sampling";
    the margin was measured on Gaussian rewards.
    """
    return math.ceil(math.exp(min(kl + margin, 700.0)))


def log_partition(
    reward: Tensor, beta: float, log_w: Tensor | None = None, *, correct: bool = True
) -> Tensor:
    """The log Z of the target, by the log-mean-exp of the weights.

    log Z = log E_ref exp(r / beta),    estimate: log (1/G) sum_i exp(r_i / beta + log_w_i)

    The plug-in is biased low by chi2 / (2 G) to first order; `correct` removes that order by the jackknife where the
    weights allow it. Never above max r / beta over the draws that ref can make, since log Z is not.

    Args:
        reward: [P, G].
        beta: reward per nat, > 0.
        log_w: [P, G] nats, or None.
        correct: jackknife where reliable; False gives the plug-in (exact on an enumerated space).

    Returns:
        [P] nats. -inf for a prompt whose draws are all forbidden.

    Raises:
        ValueError: for beta <= 0, shapes that differ, no draws, NaN or +inf.

    Example:
        >>> log_partition(torch.tensor([[0.0, 1.0, 1.0, 2.0]]), 1.0)
        tensor([1.2402])

    Source: Burda, Grosse, Salakhutdinov, 2016, "Importance weighted autoencoders" (the lower bound);
    Nowozin, 2018, "Debiasing evidence approximations" (the jackknife).
    Not the same as the optimal value, which is beta log Z.
    """
    r, w = _checked(reward, beta, log_w)
    seen = r if w is None else torch.where(w > -math.inf, r, -math.inf)
    x = r / beta if w is None else r / beta + w
    return torch.minimum(log_mean_exp(x, correct=correct), seen.amax(-1) / beta).to(_dtype(reward))


def tilted_mean(reward: Tensor, beta: float, log_w: Tensor | None = None, *, correct: bool = True) -> Tensor:
    """The reward of the target, E_p[r], by self-normalised importance sampling.

    E_p[r] = E_ref[r e^{r/beta}] / Z,    estimate: sum_i s_i r_i with s = softmax(r / beta + log_w)

    Biased low at finite G, O(1/G); jackknifed to O(1/G^2) where reliable, and kept inside the rewards that were drawn.

    Args:
        reward: [P, G].
        beta: reward per nat, > 0.
        log_w: [P, G] nats, or None; a constant in it does not matter.
        correct: jackknife where reliable.

    Returns:
        [P] in units of reward. -inf for a prompt whose draws are all forbidden.

    Raises:
        ValueError: as `log_partition`.

    Example:
        >>> tilted_mean(torch.tensor([[0.0, 1.0, 1.0, 2.0]]), 1.0)
        tensor([1.4621])

    Source: Nowozin, 2018, for the jackknife; Efron, 1982, "The jackknife, the bootstrap and other resampling plans".
    """
    r, w = _checked(reward, beta, log_w)
    s = shares(r / beta if w is None else r / beta + w)
    carried = s > 0
    value = (s * torch.where(carried, r, 0.0)).sum(-1)
    if correct:
        value = value + torch.where(_reliable(s), _mean_correction(s, r, value), 0.0)
    low = torch.where(carried, r, math.inf).amin(-1)
    high = torch.where(carried, r, -math.inf).amax(-1)
    return torch.where(carried.any(-1), value.clamp(low, high), -math.inf).to(_dtype(reward))


def tilted_kl(reward: Tensor, beta: float, log_w: Tensor | None = None, *, correct: bool = True) -> Tensor:
    """The distance of the target from the reference, KL(p||ref).

    KL(p||ref) = E_p[r] / beta - log Z,    estimate: sum_i s_i (log s_i - log u_i),
    s = softmax(r / beta + log_w), u = softmax(log_w): both laws are normalised on the draws, so that the plug-in is
    never negative, is 0 where all rewards are equal, and falls with beta. It is biased low and cannot exceed log G for
    draws from ref; jackknifed where reliable.

    Args:
        reward: [P, G].
        beta: reward per nat, > 0.
        log_w: [P, G] nats, or None; a constant in it does not matter.
        correct: jackknife where reliable.

    Returns:
        [P] nats, >= 0. +inf for a prompt whose draws are all forbidden: no draw shows what the target would cost.

    Raises:
        ValueError: as `log_partition`.

    Example:
        >>> tilted_kl(torch.tensor([[0.0, 1.0, 1.0, 2.0]]), 1.0)
        tensor([0.2219])

    Source: the identity is Korbak, Perez, Buckley, 2022, "RL with KL penalties is better viewed as Bayesian inference".
    Not the same as KL(ref||p), which adds to it to (E_p[r] - E_ref[r]) / beta.
    """
    r, w = _checked(reward, beta, log_w)
    w = torch.zeros_like(r) if w is None else w
    x = r / beta + w
    s, u = shares(x), shares(w)
    log_ratio = torch.where(s > 0, torch.log_softmax(x, -1) - torch.log_softmax(w, -1), 0.0)
    value = (s * log_ratio).sum(-1)
    if correct:
        # KL = E_p[r] / beta - log sum e^x + log sum e^w is linear in three numbers, so their corrections add.
        mean = (s * torch.where(s > 0, r, 0.0)).sum(-1)
        shift = _mean_correction(s, r, mean) / beta - _log_correction(s) + _log_correction(u)
        value = value + torch.where(_reliable(s), shift, 0.0)
    return torch.where((s > 0).any(-1), value.clamp_min(0.0), math.inf).to(_dtype(reward))


def solve_beta(
    reward: Tensor,
    *,
    kl: float | None = None,
    goal: float | None = None,
    log_w: Tensor | None = None,
    margin: float = MARGIN,
) -> float:
    """The beta whose target costs `kl` nats, or earns `goal`, averaged over prompts.

    Bisects log beta on the plug-in curve, which is monotone (the jackknifed one need not be): KL(p||ref) falls and
    E_p[r] falls as beta grows. The plug-in KL is biased low, so the true KL there is a little above `kl`: report
    `tilted_kl` at the answer beside it. Prompts whose draws are all forbidden are left out.

    Args:
        reward: [P, G].
        kl: the budget in nats, > 0; give this or `goal`. Messages call it kl_budget, as a configuration does.
        goal: the wanted E_p[r], in units of reward; in messages reward_goal.
        log_w: [P, G] nats, or None.
        margin: nats by which log(draws a prompt) must exceed the KL (a mean over prompts).

    Returns:
        beta, in units of reward per nat.

    Raises:
        ValueError: if not exactly one of `kl` and `goal` is given; if every prompt's rewards are all equal; if the
            goal or the budget is out of reach; if the pool is too small to support the KL (says how many draws a
            prompt it would take).

    Example:
        >>> pool = torch.linspace(-1, 1, 64).expand(3, 64)
        >>> beta = solve_beta(pool, kl=0.5)
        >>> round(tilted_kl(pool, beta, correct=False).mean().item(), 4)
        0.5
    """
    if (kl is None) == (goal is None):
        raise ValueError(f"solve_beta: got kl={kl} and goal={goal}; expected exactly one of them.")
    if kl is not None and not 0 < kl < math.inf:
        raise ValueError(
            f"kl_budget: got {kl}, expected a finite number of nats above 0 (0 nats is the reference)"
        )
    r, w = _checked(reward, 1.0, log_w)
    num_draws = r.shape[-1]
    r, w = (
        r.reshape(-1, num_draws),
        torch.zeros_like(r).reshape(-1, num_draws) if w is None else w.reshape(-1, num_draws),
    )
    r = torch.where(w > -math.inf, r, -math.inf)
    allowed = (r > -math.inf).any(-1)
    if not allowed.any():
        raise ValueError("solve_beta: every draw is forbidden (reward -inf); there is no target to aim at.")
    r, w = r[allowed], w[allowed]
    top = r.amax(-1)
    spread = (top - torch.where(r > -math.inf, r, math.inf).amin(-1)).max().item()
    if spread == 0 and not (r == -math.inf).any():
        raise ValueError(
            "solve_beta: nothing can be learned here: every prompt's draws all have the same reward. "
            "Change the reward or the prompts, or draw more completions a prompt."
        )
    scale = spread if spread > 0 else 1.0
    shifted = r - top[:, None]  # the target does not see the shift, and large offsets would cost digits

    def cost(beta: float) -> float:
        return tilted_kl(shifted, beta, w, correct=False).mean().item()

    def gain(beta: float) -> float:
        return (top + tilted_mean(shifted, beta, w, correct=False)).mean().item()

    least, most = 1e-9 * scale, 1e9 * scale
    if kl is not None:
        asked = f"kl_budget {kl:.4g} nats"
        if log_w is None and math.log(num_draws) - kl < margin:
            raise ValueError(_too_few(asked, num_draws, kl, margin))
        floor, ceiling = cost(most), cost(least)
        if not floor < kl < ceiling:
            raise ValueError(
                f"{asked} is out of reach; expected more than {floor:.4g} and less than {ceiling:.4g} nats, where all "
                "the mass is on the best draws of every prompt"
            )
        beta = _bisect(cost, kl, least, most)
    else:
        assert goal is not None  # exactly one of the two was given
        asked = f"reward_goal {goal:.4g}"
        floor, ceiling = gain(most), gain(least)
        if not floor < goal < ceiling:
            raise ValueError(
                f"{asked} is out of reach; expected more than {floor:.4g} (the reference) and less than "
                f"{ceiling:.4g} (the best draw of every prompt)"
            )
        beta = _bisect(gain, goal, least, most)
    carried = torch.special.entr(shares(shifted / beta + w)).sum(-1).mean().item()
    if carried < margin - 1e-9:
        raise ValueError(_too_few(asked, num_draws, math.log(num_draws) - carried, margin))
    return beta


def log_mean_exp(x: Tensor, *, correct: bool = False) -> Tensor:
    """The log-mean-exp, log (1/G) sum_i exp(x_i), over the last dimension; jackknifed where reliable if `correct`.

    A lower bound of log E e^x in expectation (Jensen); -inf where every x is -inf.

    Example:
        >>> log_mean_exp(torch.tensor([[0.0, 0.0, -torch.inf, -torch.inf]]))
        tensor([-0.6931])
    """
    value = torch.logsumexp(x, -1) - math.log(x.shape[-1])
    if not correct:
        return value
    s = shares(x)
    return value + torch.where(_reliable(s), _log_correction(s).to(value.dtype), 0.0)


def shares(x: Tensor) -> Tensor:
    """A softmax over the last dimension, but all zeros (not NaN) where every entry is -inf.

    Example:
        >>> shares(torch.tensor([[0.0, -torch.inf], [-torch.inf, -torch.inf]]))
        tensor([[1., 0.],
                [0., 0.]])
    """
    total = torch.logsumexp(x, -1, keepdim=True)
    return (x - torch.where(total > -math.inf, total, 0.0)).exp()


def _reliable(s: Tensor) -> Tensor:
    return torch.special.entr(s).sum(-1) >= MARGIN


def _log_correction(s: Tensor) -> Tensor:
    # G L - (G - 1) mean_i L_{-i} - L, with L_{-i} = L + log(G / (G - 1)) + log(1 - s_i)
    n = s.shape[-1]
    if n < 2:
        return torch.zeros_like(s[..., 0])
    return -(n - 1) * (math.log(n / (n - 1)) + torch.log1p(-s).mean(-1))


def _mean_correction(s: Tensor, r: Tensor, mean: Tensor) -> Tensor:
    # leaving draw i out moves the mean by s_i (mean - r_i) / (1 - s_i)
    off = torch.where(s > 0, mean[..., None] - r, 0.0)
    moved = s * off / (1 - s).clamp_min(torch.finfo(s.dtype).tiny)
    return -(s.shape[-1] - 1) * moved.mean(-1)


def _bisect(curve: Callable[[float], float], value: float, low: float, high: float) -> float:
    """Beta where a falling curve takes `value`, by bisection of log beta."""
    low, high = math.log(low), math.log(high)
    for _ in range(60):
        middle = (low + high) / 2
        if curve(math.exp(middle)) > value:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def _too_few(asked: str, num_draws: int, kl: float, margin: float) -> str:
    return (
        f"{asked}: got {num_draws} draws a prompt; a KL of {kl:.3g} nats needs about "
        f"{draws_needed(kl, margin=margin)} (log draws - KL >= {margin:g}); draw more, or ask for less"
    )


def _dtype(reward: Tensor) -> torch.dtype:
    return reward.dtype if reward.is_floating_point() else torch.get_default_dtype()


def _checked(reward: Tensor, beta: float, log_w: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if not 0 < beta < math.inf:
        raise ValueError(
            f"got beta={beta}; expected a finite beta > 0: without a KL price there is no target."
        )
    if reward.ndim < 1 or reward.shape[-1] == 0:
        raise ValueError(
            f"got rewards of shape {tuple(reward.shape)}; expected [P, G] with at least one draw."
        )
    r = reward.detach().double()
    w = None if log_w is None else log_w.detach().double()
    if w is not None and w.shape != r.shape:
        raise ValueError(
            f"got log_w of shape {tuple(w.shape)}; expected that of the rewards, {tuple(r.shape)}."
        )
    for name, x in (("reward", r), ("log_w", w)):
        if x is not None and not (x < math.inf).all():
            bad = int((~(x < math.inf)).sum())
            raise ValueError(
                f"got {bad} {name} value(s) that are NaN or +inf; expected finite numbers or -inf."
            )
    return r, w
