"""What the derivation does not say by itself, each remark on numbers.

Z and theta, the other direction, a class too small, what beta does, a constant added to the reward.

P prompts, Y outcomes, N random policies; nats and units of reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.exact.derivation import Sides, cost, equality, gradient, gradients_equal, objective
from klimb.exact.divergences import entropy
from klimb.exact.newton import minimise
from klimb.exact.problem import Problem
from klimb.exact.truth import kl, mean

TIMES = (0.0, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0, math.inf)
"""of the given beta, in the table of what beta does"""
LINE = 33
"""outcomes of the example of two modes"""


@dataclass(frozen=True)
class Remark:
    """One remark.

    Attributes:
        name: for JSON and tests.
        title: what it is about.
        sides: equalities, as in the derivation.
        columns: head of a small table, or ().
        rows: of it; text or numbers.
        pictures: name -> a law [Y] to be drawn.
        says: what follows from the numbers.
    """

    name: str
    title: str
    says: str
    sides: tuple[Sides, ...] = ()
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str | float, ...], ...] = ()
    pictures: tuple[tuple[str, tuple[float, ...]], ...] = ()


def remarks(given: Problem, *, num_random: int = 200, generator: torch.Generator) -> tuple[Remark, ...]:
    """All remarks, on the numbers given; the class too small is an example of its own.

    Args:
        given: reference, reward, beta.
        num_random: N, random policies behind each equality; the first is the one shown.
        generator: of them.

    Example:
        >>> from klimb.exact.problem import problem
        >>> small = problem([[0.6, 0.3, 0.1]], [[1.0, 0.0, 2.0]], 0.5)
        >>> [remark.name for remark in remarks(small, generator=torch.Generator().manual_seed(0))]
        ['moving_z', 'other_direction', 'directions_agree', 'directions_part', 'beta', 'constant']
    """
    policies = given.random_policies(max(num_random, 1), generator=generator)
    return (
        moving_z(given, policies),
        other_direction(given, policies),
        directions_agree(given),
        directions_part(),
        what_beta_does(given),
        constant_added(given, policies),
    )


def moving_z(given: Problem, log_pi: Tensor) -> Remark:
    """Step (6) if Z did depend on theta: the reference is the policy itself, as it is when it is refreshed all the time."""
    tilted = given.reward / given.beta

    def log_z(x: Tensor) -> Tensor:
        return torch.logsumexp(x + tilted, -1)

    def towards(x: Tensor) -> Tensor:
        return kl(x, x + tilted - log_z(x)[..., None])

    whole = gradient(log_pi, lambda x: towards(x) - log_z(x), given)
    dropped = gradient(log_pi, towards, given)
    return Remark(
        "moving_z",
        "If Z did depend on θ: the reference moves along with the policy (ref = π)",
        "The first two differ: with ref = π, ∇ log Z is not 0, it is the climb. Without it, KL(π‖p_θ) is 0 at every policy "
        "that always gives the same outcome, the worst one included. Freeze reference and reward while differentiating.",
        (
            gradients_equal("|∇ E_x[ KL(π‖p_θ) − log Z_θ ]|", "|∇ E_x KL(π‖p_θ)|", whole, dropped),
            gradients_equal(
                "|∇ E_x[ KL(π‖p_θ) − log Z_θ ]|",
                "|∇ E_x E_π[ −r/β ]|",
                whole,
                gradient(log_pi, lambda x: mean(x, -tilted), given),
            ),
        ),
    )


def other_direction(given: Problem, log_pi: Tensor) -> Remark:
    """Minimising KL(p||pi) is maximising the likelihood of p's samples."""
    log_p = given.log_p
    weight = (given.reward / given.beta - given.log_z[:, None]).exp()
    return Remark(
        "other_direction",
        "The other direction: KL(p‖π) is maximum likelihood on samples of p",
        "The entropy of p does not depend on θ and drops out. Samples of p are not needed: samples of ref will do, each "
        "with its reward as a weight exp(r/β)/Z. Its value is not that of KL(π‖p), and neither is its gradient.",
        (
            equality(
                "KL(p‖π)",
                "−E_p[log π] − H(p)",
                kl(log_p.expand_as(log_pi), log_pi),
                -mean(log_p, log_pi) - entropy(log_p),
            ),
            gradients_equal(
                "|∇ E_x KL(p‖π)|",
                "|∇ E_x( −E_p[log π] )|",
                gradient(log_pi, lambda x: kl(log_p.expand_as(x), x), given),
                gradient(log_pi, lambda x: -mean(log_p, x), given),
            ),
            equality(
                "E_p[log π]",
                "E_ref[ exp(r/β) log π ] / Z",
                mean(log_p, log_pi),
                mean(given.log_ref, weight * log_pi.masked_fill(~given.support, 0.0)),
            ),
        ),
    )


def directions_agree(given: Problem) -> Remark:
    """A class that holds p, the tilts ref exp(c r): both divergences are 0 at c = 1/beta and nowhere else."""
    rows = []
    for times in (0.25, 0.5, 1.0, 2.0, 4.0):
        log_pi = torch.log_softmax(given.log_ref + times * given.reward / given.beta, -1)
        reverse, forward = kl(log_pi, given.log_p).mean(), kl(given.log_p, log_pi).mean()
        rows.append((f"c = {times:g}/β", reverse.item(), forward.item()))
    return Remark(
        "directions_agree",
        "Where the two directions agree: the class holds p",
        "Policies ref exp(c·r)/norm, of which p is one (c = 1/β): both directions are 0 there, and above 0 elsewhere "
        "wherever the reward varies.",
        columns=("policy", "KL(π‖p)", "KL(p‖π)"),
        rows=tuple(rows),
    )


def directions_part() -> Remark:
    """A class too small: p has two bumps, the class is one bump, (centre, width) free; each direction to its minimum.

    The class is an exponential family, so the minimum of KL(p||pi) has the mean and the variance of p.
    """
    y = torch.arange(LINE, dtype=torch.float64)
    log_p = torch.log_softmax(
        torch.logaddexp(
            math.log(0.6) - 0.5 * ((y - 9) / 2).square(), math.log(0.4) - 0.5 * ((y - 24) / 2).square()
        ),
        -1,
    )

    def bump(shape: Tensor) -> Tensor:
        return torch.log_softmax(-0.5 * ((y - shape[0]) / shape[1].exp()).square(), -1)

    starts = [torch.tensor([centre, 1.0], dtype=torch.float64) for centre in (8.0, 16.0, 25.0)]
    seeking = bump(minimise(lambda s: kl(bump(s), log_p), starts))
    covering = bump(minimise(lambda s: kl(log_p, bump(s)), starts))
    where = (y - (log_p.exp() * y).sum()).square()
    valley = (y > 14) & (y < 19)
    rows = tuple(
        (
            name,
            kl(log_pi, log_p).item(),
            kl(log_p, log_pi).item(),
            log_pi.exp()[y >= 19].sum().item(),
            log_pi.exp()[valley].sum().item(),
        )
        for name, log_pi in (("p itself", log_p), ("min KL(π‖p)", seeking), ("min KL(p‖π)", covering))
    )
    return Remark(
        "directions_part",
        "Where they part: p has two modes, the class can only make one bump",
        "KL(π‖p) punishes mass where p has none: it takes the larger mode and drops the other (seeking). KL(p‖π) punishes "
        "missing mass: it covers both and fills the valley between them, where p has next to nothing (covering).",
        (
            equality("E_π[y]  at min KL(p‖π)", "E_p[y]", *_pair(mean(covering, y), mean(log_p, y))),
            equality(
                "Var_π[y] at min KL(p‖π)", "Var_p[y]", *_pair(mean(covering, where), mean(log_p, where))
            ),
        ),
        ("policy", "KL(π‖p)", "KL(p‖π)", "on the small mode", "in the valley"),
        rows,
        tuple(
            (name, tuple(law.exp().tolist()))
            for name, law in (("p", log_p), ("seeking", seeking), ("covering", covering))
        ),
    )


def what_beta_does(given: Problem) -> Remark:
    """The best policies from beta = 0 to infinity: limits, monotone columns, and beta as the slope of the frontier."""
    rows = []
    for times in TIMES:
        beta = times * given.beta
        log_p, log_z_beta = _at(given, beta)
        rows.append(
            (
                f"{beta:.4g}",
                mean(log_p, given.reward).mean().item(),
                kl(log_p, given.log_ref).mean().item(),
                log_z_beta.mean().item(),
                entropy(log_p).mean().item(),
            )
        )
    reward, price = _moments_in_rate(given)
    allowed = given.reward[given.support]
    flat = bool(
        (
            given.reward.masked_fill(~given.support, -torch.inf).amax(-1)
            == given.reward.masked_fill(~given.support, torch.inf).amin(-1)
        ).all()
    )
    # where p has reached its end nothing moves any more, and a ratio of two roundings is no slope
    moves = price.abs().item() > 1e-9 * allowed.abs().max().item()
    slope = (
        ()
        if not moves
        else (equality("dE_p[r] / dKL(p‖ref)", "β", *_pair(reward / price, reward * 0 + given.beta)),)
    )
    end = (
        "The reward is the same for all outcomes: every beta has the same best policy, the reference."
        if flat
        else "At β → 0 p is ref restricted to the best outcomes, at β → ∞ it is ref. Reward and KL fall as β grows, and "
        "along the way β is the slope of the frontier: what one more nat buys."
    )
    return Remark(
        "beta",
        "What β does",
        end,
        slope,
        ("β", "E_p[r]", "KL(p‖ref)", "β log Z", "H(p)"),
        tuple(rows),
    )


def constant_added(given: Problem, log_pi: Tensor, *, constant: float = 10.0) -> Remark:
    """With r + c p stays, log Z moves by c/beta, every policy's objective moves by c."""
    moved = Problem(given.log_ref, given.reward + constant, given.beta)
    shift = torch.full_like(given.log_z, constant / given.beta)
    return Remark(
        "constant",
        f"What a constant added to the reward does (r + {constant:g})",
        "Nothing but to Z: p, every KL and every gradient stay. Only differences of reward at one prompt count.",
        (
            equality("KL(π‖p) with r + c", "KL(π‖p)", kl(log_pi, moved.log_p), kl(log_pi, given.log_p)),
            equality("log Z with r + c", "log Z + c/β", moved.log_z[None], (given.log_z + shift)[None]),
            equality(
                "E_π[r + c] − β KL(π‖ref)",
                "E_π[r] − β KL(π‖ref) + c",
                objective(moved, log_pi),
                objective(given, log_pi) + constant,
            ),
            gradients_equal(
                "|∇ of the objective with r + c|",
                "|∇ of the objective|",
                gradient(log_pi, lambda x: cost(moved, x), given),
                gradient(log_pi, lambda x: cost(given, x), given),
            ),
        ),
    )


def _at(given: Problem, beta: float) -> tuple[Tensor, Tensor]:
    """The target [P, Y] and beta log Z [P] at a beta from 0 to infinity, the ends as limits."""
    if 0 < beta < math.inf:
        there = Problem(given.log_ref, given.reward, beta)
        return there.log_p, beta * there.log_z
    if beta == 0:
        allowed = given.reward.masked_fill(~given.support, -torch.inf)
        best = allowed.amax(-1, keepdim=True)
        return _law(given.log_ref.masked_fill(allowed < best, -torch.inf)), best[:, 0]
    log_p = _law(given.log_ref.masked_fill(~given.support, -torch.inf))
    # with a forbidden outcome log Z tends to the log of what is allowed, and beta times it has no limit
    forbidden = ((given.log_ref > -torch.inf) & ~given.support).any(-1)
    return log_p, torch.where(forbidden, -torch.inf, mean(log_p, given.reward))


def _moments_in_rate(given: Problem) -> tuple[Tensor, Tensor]:
    """Derivatives of E_p[r] and of KL(p||ref), means over prompts, in 1/beta, by autograd."""
    rate = torch.tensor(1 / given.beta, dtype=torch.float64, requires_grad=True)
    log_p = given.policy(given.log_ref + rate * given.reward.masked_fill(~given.support, 0.0))
    reward, price = mean(log_p, given.reward).mean(), kl(log_p, given.log_ref).mean()
    (reward_moves,) = torch.autograd.grad(reward, rate, retain_graph=True)
    (price_moves,) = torch.autograd.grad(price, rate)
    return reward_moves, price_moves


def _law(log_weights: Tensor) -> Tensor:
    return torch.log_softmax(log_weights, -1)


def _pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return left.detach().reshape(1, 1), right.detach().reshape(1, 1)
