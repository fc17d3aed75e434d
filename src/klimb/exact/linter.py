"""Where an objective leads: its fixed point, bias and noise on a space small enough to sum over.

Strings of at most T = 2 tokens, a policy that can be anything, every tuple of G draws with its probability. The
expected update is followed to where it stops; what is said of an objective is then a number and not a belief. It
describes the population: a step in practice is finite, clipped, and taken on few draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from klimb.exact.space import Space, all_strings
from klimb.exact.tabular import log_prob, random_logits, table_of, token_log_prob
from klimb.exact.truth import kl, log_partition, normalise, tilt
from klimb.exact.tuples import tuples
from klimb.objectives.bind import bind

Objective = Callable[..., Tensor]
Law = Literal["policy", "reference", "other"]


@dataclass(frozen=True)
class Toy:
    """One prompt whose every completion is known.

    Attributes:
        space: its strings.
        ref: [S, V] logits of the reference.
        reward: [Y] of each string.
        beta: reward per nat.
        other: [S, V] logits of a law that is neither the policy's nor the reference's.
    """

    space: Space
    ref: Tensor
    reward: Tensor
    beta: float
    other: Tensor

    @property
    def log_p(self) -> Tensor:
        """[Y] the target, nats."""
        return normalise(self.log_target)

    @property
    def log_target(self) -> Tensor:
        """[Y] unnormalised, nats."""
        return tilt(log_prob(self.ref, self.space), self.reward, self.beta)


@dataclass(frozen=True)
class Findings:
    """What the linter found.

    Attributes:
        stops: "inside" (a policy at which the expected update is zero), "boundary" (it runs to certainty) or "nowhere"
            (not found within the steps allowed).
        kl_to_target: KL(fixed point||p), nats.
        kl_from_target: KL(p||fixed point), nats.
        fixed_point: [Y] probabilities.
        target: [Y] probabilities of p.
        alignment: cosine of the expected update with that of KL(pi||p), at a policy that is neither.
        scale: the expected update's length over that gradient's, along it.
        update: the length of the expected update there.
        noise_at_target: E|g - E g|^2 of the update at p, summed over the table.
        noise_at_reference: the same at the reference, to compare with.
        drift_at_target: |E g| at p: zero where p is a fixed point.
    """

    stops: Literal["inside", "boundary", "nowhere"]
    kl_to_target: float
    kl_from_target: float
    fixed_point: Tensor
    target: Tensor
    alignment: float
    scale: float
    update: float
    noise_at_target: float
    noise_at_reference: float
    drift_at_target: float


def toy(*, beta: float = 0.5, seed: int = 0) -> Toy:
    """Seven strings over three tokens, lengths one and two, rewards from 0 to 1.

    Raises:
        ValueError: beta is not above zero.

    Example:
        >>> toy().space.size
        7
    """
    generator = torch.Generator().manual_seed(seed)
    space = all_strings(3, 2)
    ref, other = (random_logits(space.num_prefixes, 3, generator=generator, scale=0.7) for _ in range(2))
    reward = torch.rand(space.size, generator=generator, dtype=torch.float64)
    reward = (reward - reward.min()) / (reward.max() - reward.min())
    found = Toy(space, ref, reward, beta, other)
    assert found.log_target.isfinite().all()
    return found


def inspect(
    objective: Objective,
    at: Toy,
    *,
    num_draws: int = 3,
    draws: Law = "policy",
    derived: Mapping[str, Objective] | None = None,
    max_steps: int = 200,
) -> Findings:
    """Follow the expected update of an objective to its end, and say where that is.

    Args:
        objective: numbers -> [P]; bound by name as in training. What comes from the network: log_pi, token_log_pi.
        at: the prompt.
        num_draws: G.
        draws: the law that draws: the policy as it moves, the reference, or another that stays.
        derived: further numbers, each a function of numbers, computed once a batch (advantages).
        max_steps: of pseudo-transient continuation.

    Raises:
        ValueError: the objective asks for a number that a finite space does not have, or gives one that is not finite.

    Example:
        >>> from klimb.objectives import log_variance
        >>> found = inspect(log_variance, toy())
        >>> found.stops, found.kl_to_target < 1e-8, found.noise_at_target < 1e-20
        ('inside', True, True)
    """
    field = _Field(objective, at, num_draws, draws, derived or {})
    floor = table_of(at.log_p, at.space).min().item() - 10  # far below anything the target asks for
    stops, table = _follow(field.mean, at.ref.clone(), max_steps, floor)
    log_fixed, log_p = log_prob(table, at.space), at.log_p
    away = (at.ref + at.other) / 2
    update, truth = field.mean(away), _grad_kl(away, at)
    at_target = table_of(log_p, at.space)
    return Findings(
        stops=stops,
        kl_to_target=kl(log_fixed, log_p).item(),
        kl_from_target=kl(log_p, log_fixed).item(),
        fixed_point=log_fixed.exp(),
        target=log_p.exp(),
        alignment=torch.nn.functional.cosine_similarity(update.flatten(), truth.flatten(), dim=0).item(),
        scale=((update * truth).sum() / (truth * truth).sum()).item(),
        update=update.norm().item(),
        noise_at_target=field.variance(at_target),
        noise_at_reference=field.variance(at.ref),
        drift_at_target=field.mean(at_target).norm().item(),
    )


def verdict(found: Findings, draws: Law) -> str:
    """What was found, in plain words.

    Example:
        >>> from klimb.objectives import log_variance
        >>> verdict(inspect(log_variance, toy(), num_draws=2), "policy").split(";")[0]
        'stops at the target'
    """
    best = int(found.fixed_point.argmax())
    if found.update < 1e-12:
        return (
            "stays wherever it starts; its expected update is zero, whatever the policy: it would train noise"
        )
    if found.stops == "boundary":
        end = f"runs to certainty: {found.fixed_point[best].item():.0%} on one of {len(found.target)} completions"
    elif found.stops == "nowhere":
        end = f"comes to no rest in the steps allowed, {found.kl_to_target:.2g} nats from the target"
    elif abs(found.kl_to_target) < 1e-8:
        end = "stops at the target"
    else:
        end = f"stops elsewhere: KL(fixed point||p) = {found.kl_to_target:.3g} nats"
    if found.alignment > 1 - 1e-8:
        way = "on the way its expected update is the gradient of KL(pi||p)" + (
            "" if abs(found.scale - 1) < 1e-6 else f" times {found.scale:.3g}"
        )
    else:
        way = f"on the way its update makes an angle of cosine {found.alignment:.3f} with the gradient of KL(pi||p)"
    if found.drift_at_target > 1e-8:
        noise = "at the target it does not stay"
    elif found.noise_at_target < 1e-16 * max(found.noise_at_reference, 1e-30):
        noise = "at the target it has no noise"
    else:
        noise = f"at the target its noise is {found.noise_at_target / found.noise_at_reference:.2g} times that at the reference"
    law = {
        "policy": "its own fresh draws",
        "reference": "draws of the reference",
        "other": "draws of another law",
    }
    return f"{end}; {way}; {noise} (on {law[draws]})"


@dataclass(frozen=True)
class _Field:
    """The expected update of an objective as a function of the policy's table."""

    objective: Objective
    at: Toy
    num_draws: int
    draws: Law
    derived: Mapping[str, Objective]

    def law(self, table: Tensor) -> Tensor:
        chosen = {"policy": table, "reference": self.at.ref, "other": self.at.other}[self.draws]
        return chosen.detach()

    def values(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """The objective of every tuple [M], differentiable in `table`, and the tuples' probabilities [M]."""
        law = self.law(table)
        outcomes, prob = tuples(log_prob(law, self.at.space), self.num_draws)
        numbers = numbers_of(self.at, table, law, outcomes)
        for name, function in self.derived.items():
            numbers[name] = function(**bind(function, {k: x.detach() for k, x in numbers.items()}))
        value = self.objective(**bind(self.objective, numbers))
        if value.shape != prob.shape:
            raise ValueError(
                f"got an objective of shape {list(value.shape)}, expected {list(prob.shape)}: one value a prompt"
            )
        if not bool(value.isfinite().all()):
            raise ValueError("the objective is not finite for some tuple of draws, all of them possible")
        return value, prob

    def mean(self, table: Tensor) -> Tensor:
        """[S, V] E[grad objective]; the law that draws is not differentiated."""
        leaf = table.detach().clone().requires_grad_()
        value, prob = self.values(leaf)
        (gradient,) = torch.autograd.grad((prob * value).sum(), leaf)
        return gradient

    def variance(self, table: Tensor) -> float:
        """E|g - E g|^2."""
        leaf = table.detach().clone().requires_grad_()
        value, prob = self.values(leaf)
        eye = torch.eye(len(value), dtype=value.dtype)
        (each,) = torch.autograd.grad(value, leaf, eye, is_grads_batched=True)
        each = each.flatten(1)
        return (prob * (each - prob @ each).square().sum(1)).sum().item()


def numbers_of(at: Toy, table: Tensor, law: Tensor, outcomes: Tensor) -> dict[str, Tensor]:
    """All that an objective may ask for, for G draws of M prompts that are all the same.

    Args:
        at: the prompt.
        table: [S, V] logits of the policy; what comes from it is differentiable.
        law: [S, V] logits of the law that drew.
        outcomes: [M, G] which strings were drawn.

    Returns:
        By name: [M, G] numbers, [N] packed token numbers, row [N], log_z [M]. `values` are the soft values of the
        prefixes, nats; `old_values` those of a critic that knows nothing, 0.
    """
    space, which = at.space, outcomes.flatten()
    mask, shape = space.mask[which], outcomes.shape
    per_token = {
        "token_log_pi": token_log_prob(table, space),
        "token_log_ref": token_log_prob(at.ref, space),
        "token_log_q": token_log_prob(law, space),
        "token_log_old": token_log_prob(law, space),
    }
    log_target = at.log_target[outcomes]
    log_q = log_prob(law, space)[outcomes]
    return {
        **{name: x[which][mask] for name, x in per_token.items()},
        "log_pi": log_prob(table, space)[outcomes],
        "log_ref": log_prob(at.ref, space)[outcomes],
        "log_q": log_q,
        "log_old": log_q,
        "log_start": log_prob(table, space)[outcomes].detach(),
        "log_target": log_target,
        "log_w": log_target - log_q,
        "log_z": log_partition(at.log_target).expand(shape[0]),
        "reward": at.reward[outcomes],
        "beta": torch.tensor(at.beta, dtype=torch.float64),
        "values": _soft_values(at)[space.prefixes][which][mask],
        "old_values": torch.zeros(int(mask.sum()), dtype=torch.float64),
        "lengths": space.lengths[outcomes],
        "row": torch.arange(len(which)).repeat_interleave(space.lengths[which]),
    }


def _soft_values(at: Toy) -> Tensor:
    """[S] log E_ref[exp(r / beta) | prefix], nats."""
    space = at.space
    through = torch.zeros(2, space.num_prefixes, dtype=torch.float64)
    for row, law in enumerate((at.log_target, log_prob(at.ref, space))):
        mass = law.exp()[:, None].expand(space.strings.shape)
        through[row].index_put_((space.prefixes[space.mask],), mass[space.mask], accumulate=True)
    return through[0].log() - through[1].log()


def _grad_kl(table: Tensor, at: Toy) -> Tensor:
    leaf = table.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(kl(log_prob(leaf, at.space), at.log_p), leaf)
    return gradient


def _follow(
    field: Callable[[Tensor], Tensor], table: Tensor, max_steps: int, floor: float
) -> tuple[Literal["inside", "boundary", "nowhere"], Tensor]:
    """The end of the flow d table / dt = -field: implicit Euler steps that grow where the flow is stable.

    Long steps alone would be Newton's method, which also stops at policies that the flow runs away from.
    """
    size, step = table.numel(), 1.0
    now = field(table)
    for _ in range(max_steps):
        if now.norm() < 1e-12:
            return "inside", table
        eye = torch.eye(size, dtype=table.dtype)
        columns = [
            (field(table + 1e-6 * e.reshape(table.shape)) - field(table - 1e-6 * e.reshape(table.shape)))
            / 2e-6
            for e in eye
        ]
        jacobian = torch.stack([c.flatten() for c in columns], 1)
        unstable = -torch.linalg.eigvals(jacobian).real.min().item()
        step = min(
            2 * step, 0.5 / max(unstable, 1e-12)
        )  # beyond 1 / unstable it would turn round to a saddle
        move = torch.linalg.solve(eye / step + jacobian, -now.flatten()).reshape(table.shape)
        move = move * min(1.0, 2.0 / move.abs().max().item())
        table = table + move
        table = table - table.mean(1, keepdim=True)  # a row's constant is no part of the policy
        now = field(table)
        if torch.log_softmax(table, 1).min() < floor:
            return "boundary", table
    return ("inside" if now.norm() < 1e-9 else "nowhere"), table
