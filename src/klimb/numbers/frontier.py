"""The reward-KL frontier, predicted from draws of the reference alone, each point with its intervals and its doubts.

At every beta the target earns E_p[r] at the price KL(p||ref), and no policy earns more at that price.
P prompts, G draws a prompt, B betas. Nats; reward in its own units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.numbers.estimate import FEW_PROMPTS, Estimate, bootstrap, interval, resampled_means
from klimb.numbers.tilt import (
    MARGIN,
    draws_needed,
    log_partition,
    solve_beta,
    tilted_kl,
    tilted_mean,
)
from klimb.numbers.weights import SMALLEST_TAIL, effective_sample_size, pareto_threshold, pooled_pareto_k


@dataclass(frozen=True)
class FrontierPoint:
    """One beta on the frontier.

    Attributes:
        beta: reward per nat.
        reward: E_p[r].
        kl: KL(p||ref), nats.
        log_z: log Z, nats.
        ess: effective draws a prompt, a mean over prompts.
        pareto_k: tail shape of the weights, all prompts pooled; inf if there are too few draws to tell.
        reliable: what the estimates' warnings say in one bit.
    """

    beta: float
    reward: Estimate
    kl: Estimate
    log_z: Estimate
    ess: float
    pareto_k: float
    reliable: bool


def frontier(
    reward: Tensor,
    betas: Sequence[float],
    *,
    log_w: Tensor | None = None,
    generator: torch.Generator,
    num_resamples: int = 1000,
) -> list[FrontierPoint]:
    """E_p[r], KL(p||ref) and log Z at each beta, means over prompts, with 95 % bootstrap intervals.

    The values are jackknifed within each prompt where that is sound, else plug-in, which is biased low. A point is
    reliable if log G - KL >= 2.5 (with `log_w`: KL to the drawing law), on the average over prompts, and the pooled
    Pareto k is below its threshold. Prompts whose draws are all forbidden are left out, and the warnings say how many.

    Args:
        reward: [P, G].
        betas: B values > 0; `default_betas` makes a sensible list.
        log_w: [P, G] nats, log ref - log q; None if drawn from the reference.
        generator: draws the resamples.
        num_resamples: R.

    Returns:
        B points, in the order of `betas`. A warning that starts with "unreliable:" names the draws it would need.

    Raises:
        ValueError: if every draw is forbidden, or as `klimb.numbers.tilt.log_partition`.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> pool = torch.randn(64, 128, generator=g)
        >>> point = frontier(pool, [1.0], generator=g)[0]
        >>> point.reliable, abs(point.reward.value - 1) < 0.1, abs(point.kl.value - 0.5) < 0.05
        (True, True, True)

    Source: Monteiro Paes, Mackraz, Theobald, Danieli, 2026, "Theoretical limits of language model alignment"
    (prediction from the base model's draws). The rule of reliability is measured, not proved.
    """
    if reward.ndim != 2:
        raise ValueError(f"frontier: got rewards of shape {tuple(reward.shape)}; expected [P, G].")
    r = reward.detach().double().cpu()
    w = torch.zeros_like(r) if log_w is None else log_w.detach().double().cpu()
    r = torch.where(w > -math.inf, r, -math.inf)
    allowed = (r > -math.inf).any(-1)
    if not allowed.any():
        raise ValueError("frontier: every draw is forbidden (reward -inf); there is no target to predict.")
    warnings = pool_warnings(r, allowed)
    r, w = r[allowed], w[allowed]
    num_prompts = len(r)
    pool = torch.stack([r, w], -1)

    def values(pool: Tensor) -> Tensor:
        """[..., P, G, 2] -> [..., P, B, 3]."""
        r, w = pool.unbind(-1)
        return torch.stack(
            [torch.stack([f(r, b, w) for f in (tilted_mean, tilted_kl, log_partition)], -1) for b in betas],
            -2,
        )

    per_prompt = values(pool)
    centre = per_prompt.mean(0)
    if num_prompts < FEW_PROMPTS:
        low, high = bootstrap(
            lambda x: values(x).mean(-3), pool, generator=generator, num_resamples=num_resamples, within=True
        )
    else:
        means = resampled_means(per_prompt.flatten(1), generator=generator, num_resamples=num_resamples)
        low, high = (x.reshape(centre.shape) for x in interval(means, num_prompts))

    points = []
    for j, beta in enumerate(betas):
        weights = r / beta + w
        # KL to the drawing law: that of the weights against equal ones, and KL(p||ref) where log_w is None
        away = tilted_kl(weights, 1.0).mean().item()
        k = pooled_pareto_k(weights)
        said = (*trust_warnings(weights, away, k), *warnings)
        reward_, kl, log_z = (
            Estimate(centre[j, i].item(), low[j, i].item(), high[j, i].item(), r.numel(), said)
            for i in range(3)
        )
        points.append(
            FrontierPoint(
                beta=float(beta),
                reward=reward_,
                kl=kl,
                log_z=log_z,
                ess=effective_sample_size(weights).mean().item(),
                pareto_k=k,
                reliable=reward_.reliable,
            )
        )
    return points


def default_betas(reward: Tensor, *, log_w: Tensor | None = None, num: int = 40) -> list[float]:
    """A log grid of betas from a KL of 0.01 nats to the largest that the pool supports, from weak to strong tilts.

    The largest is log G - 2.5 nats, or what the rewards saturate at if that is less. A pool of fewer than 13 draws
    supports nothing: its grid ends at half of log G, and `frontier` calls every point of it unreliable.

    Args:
        reward: [P, G].
        log_w: [P, G] nats, or None.
        num: how many betas.

    Returns:
        `num` betas, falling, in units of reward per nat; one, where the rewards only forbid: there beta plays no part.

    Raises:
        ValueError: if there is nothing to learn from these rewards.

    Example:
        >>> betas = default_betas(torch.linspace(-1, 1, 64).expand(3, 64), num=3)
        >>> betas == sorted(betas, reverse=True)
        True
    """
    r = reward.detach().double()
    top = r.amax(-1, keepdim=True)
    allowed = (top > -math.inf).squeeze(-1)
    finite = torch.where(r > -math.inf, r, math.inf)[allowed]
    spread = (top[allowed] - finite.amin(-1, keepdim=True)).max().item() if allowed.any() else 0.0
    if spread == 0:
        if bool((r[allowed] == -math.inf).any()):
            return [1.0]  # only a constraint: the target is the reference given that it holds, at every beta
        raise ValueError(
            "default_betas: nothing can be learned here: every prompt's allowed draws all have the same reward. "
            "Change the reward or the prompts, or draw more completions a prompt."
        )
    w = None if log_w is None else log_w[allowed]
    least = tilted_kl(r[allowed], 1e9 * spread, w, correct=False).mean().item()
    most = tilted_kl(r[allowed], 1e-9 * spread, w, correct=False).mean().item()
    room = math.log(r.shape[-1])
    strong = least + min(room - MARGIN if room > MARGIN + 0.05 else room / 2, 0.95 * (most - least))
    weak = least + min(0.01, 0.1 * (strong - least))
    first, last = (math.log10(solve_beta(r, kl=kl, log_w=log_w, margin=-math.inf)) for kl in (weak, strong))
    return torch.logspace(first, last, num, dtype=torch.float64).tolist()


def pool_warnings(reward: Tensor, allowed: Tensor) -> tuple[str, ...]:
    """What a pool [P, G] cannot show, whatever beta is: forbidden prompts and prompts without any difference."""
    num_prompts, num_draws = reward.shape
    said = []
    forbidden = num_prompts - int(allowed.sum())
    if forbidden:
        said.append(
            f"unreliable: {forbidden} of {num_prompts} prompts left out, all their draws are forbidden "
            f"(reward -inf); they need more than {num_draws} draws"
        )
    flat = int((allowed & (reward.amax(-1) == reward.amin(-1))).sum())
    if flat and flat == num_prompts - forbidden:
        said.append(
            f"unreliable: all draws of every prompt have the same reward, which shows no target; "
            f"needs more than {num_draws} draws a prompt, or other prompts"
        )
    elif flat:
        said.append(
            f"{flat} of {num_prompts} prompts gave all draws the same reward: what they hide is not counted"
        )
    return tuple(said)


def trust_warnings(log_weights: Tensor, kl: float, pareto_k: float) -> tuple[str, ...]:
    """Why averages over these weights [P, G] are not to be trusted; `kl` from the drawing law to the target, nats."""
    num_prompts, num_draws = log_weights.shape
    said = []
    if math.log(num_draws) - kl < MARGIN:
        said.append(
            f"unreliable: log(draws) - KL = {math.log(num_draws) - kl:.2f} nats, below {MARGIN}; "
            f"needs about {max(draws_needed(kl), num_draws + 1)} draws a prompt, has {num_draws}"
        )
    threshold = pareto_threshold(log_weights.numel())
    if pareto_k >= threshold and log_weights.numel() < SMALLEST_TAIL:
        said.append(
            f"unreliable: {log_weights.numel()} draws are too few to see the weights' tail; "
            f"needs about {math.ceil(SMALLEST_TAIL / num_prompts)} draws a prompt"
        )
    elif pareto_k >= threshold:
        enough = max(2 * num_draws, 10 ** (1 / (1 - pareto_k)) / num_prompts if pareto_k < 0.95 else 0)
        told = f"{math.ceil(enough)}" if enough < 1e6 else f"{enough:.0e}"
        said.append(
            f"unreliable: Pareto k = {pareto_k:.2f}, not below {threshold:.2f}; "
            f"needs at least {told} draws a prompt, has {num_draws}"
        )
    return tuple(said)
