"""Learn from one batch of draws: what is derived from it once, and one optimizer step or several.

P prompts, G draws a prompt, N packed tokens. With one update the policy is the one that drew, and its own pass over the
network says all there is to know. With several (iterations over the batch, minibatches of whole prompts) the draws grow
old under way: the policy before the first update is kept as `log_old` and `token_log_old`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from klimb.backward import Objective, Passed, backward, in_step, of_prompts, sum_gradients
from klimb.data import Draws, select
from klimb.methods import working_with
from klimb.models.critic import Critic
from klimb.models.policy import CausalPolicy
from klimb.models.sharded import clip_norm, whole
from klimb.numbers.kl_control import kl_from_old, stops_early
from klimb.objectives.aggregate import mean_over_batch
from klimb.objectives.bind import bind
from klimb.objectives.value_loss import value_loss
from klimb.ranks import ALONE

OLD = {"log_old", "token_log_old", "log_start"}


@dataclass(frozen=True)
class Recipe:
    """How a batch is learned from.

    Attributes:
        objective: numbers -> [P]; its arguments are bound by name.
        derived: numbers made once for the whole batch, in order; one may replace a number of its name.
        in_nats: the objective is multiplied by beta, so that learning rate and gradient norm mean what they mean for a
            policy gradient of the reward; False for objectives that are in units of reward already.
        num_iterations: how often the batch is gone through.
        num_minibatches: parts of whole prompts, each an update.
        kl_stop: nats a completion from the policy that drew, at which the batch is left; None for never.
        max_grad_norm: the gradient is scaled down to at most this norm.
        critic: learns the `returns` among the derived numbers, and gives `old_values`; without one they are zero.
        critic_optimizer: over its parameters.
        value_clip: how far, in units of reward, a value may move with one batch; None for any.
        kl_target: nats a completion that a controller of beta holds KL(pi||ref) at; None for a fixed beta.
        kl_horizon: completions over which that controller follows by a fifth.
        log_z_rate: how far a learned log Z goes towards a batch's mean residual; 1 is all the way.
        importance_cap: fresh draws are weighed by what the trainer says of them over what the sampler said, at most this; None
            believes the sampler of the policy's own draws, and weighs those of an earlier policy without a limit.
    """

    objective: Objective
    derived: Mapping[str, Objective] | None = None
    in_nats: bool = True
    num_iterations: int = 1
    num_minibatches: int = 1
    kl_stop: float | None = None
    max_grad_norm: float = 1.0
    critic: Critic | None = None
    critic_optimizer: torch.optim.Optimizer | None = None
    value_clip: float | None = None
    kl_target: float | None = None
    kl_horizon: float = 1000.0
    log_z_rate: float = 0.1
    importance_cap: float | None = None


def learn(
    policy: CausalPolicy,
    draws: Draws,
    known: Mapping[str, Tensor],
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    *,
    num_fresh: int,
    generator: torch.Generator,
    step: int = 1,
) -> tuple[Passed, dict[str, float]]:
    """Update the policy with one batch.

    Args:
        policy: what moves.
        draws: P x G completions.
        known: what is known of them besides the network's numbers (`klimb.backward.known_numbers`).
        recipe: how.
        optimizer: over `policy.parameters()`.
        num_fresh: so many first draws of each prompt are the policy's own, as it is now.
        generator: of the order of minibatches.
        step: for messages.

    Returns:
        What was seen of the draws, under the policy before its first update as far as that is known, and numbers to
        look at: grad_norm (of the last update), updates, with several kl_from_old in nats, with a critic value_loss.

    Raises:
        ValueError: the objective lacks numbers, or a gradient is not finite.
    """
    known, several = dict(known), recipe.num_iterations * recipe.num_minibatches > 1
    derived = recipe.derived or {}
    old: Tensor | None = None
    if several or any(OLD & set(signature(function).parameters) for function in derived.values()):
        with torch.no_grad():
            if recipe.critic is None:
                old = policy.log_prob(draws)
                known["old_values"] = torch.zeros_like(old)
            else:
                old, hidden = policy.log_prob_and_hidden(draws)
                hidden = hidden.to("cpu")  # where the critic and the packed numbers are
                known |= {"token_hidden": hidden, "old_values": recipe.critic(hidden).to(old)}
            known |= _old_numbers(draws, known, old, num_fresh)
        num_fresh = 0  # from here on the first draws are as old as the others
    for name, function in derived.items():
        known[name] = function(**bind(function, known, instead=working_with))
    scale = known["beta"].item() if recipe.in_nats else 1.0
    seen: list[tuple[Tensor, Passed]] = []
    moved: dict[str, float] = {"updates": 0}
    for part in _parts(draws.num_prompts, recipe, generator):
        index = part.tolist()
        whole = recipe.num_minibatches == 1
        here = draws if whole else select(draws, index)
        numbers = known if whole else of_prompts(known, draws.lengths, index)
        optimizer.zero_grad()
        passed = _passed(policy, here, numbers, recipe, scale / len(index), num_fresh)
        if len(seen) < recipe.num_minibatches:
            seen.append((part, passed))
        if several:
            away = kl_from_old(passed.token_log_pi, numbers["token_log_old"], here.lengths).mean().item()
            moved["kl_from_old"] = away
            if recipe.kl_stop is not None and moved["updates"] and stops_early(away, limit=recipe.kl_stop):
                optimizer.zero_grad()
                break
        moved["grad_norm"] = _stepped(policy, optimizer, recipe.max_grad_norm, step)
        if recipe.critic is not None:
            moved["value_loss"] = _critic_stepped(recipe, numbers, here)
        moved["updates"] += 1
    return _together(seen, draws, old), moved


def _passed(
    policy: CausalPolicy,
    draws: Draws,
    numbers: Mapping[str, Tensor],
    recipe: Recipe,
    scale: float,
    num_fresh: int,
) -> Passed:
    """The backward pass: of all prompts, or of this rank's share, and then of all by the sum over the ranks."""
    ranks = policy.ranks
    of_all: dict[str, Any] = {"num_fresh": num_fresh, "importance_cap": recipe.importance_cap}
    if ranks.world == 1:
        return backward(policy, draws, numbers, recipe.objective, scale=scale, **of_all)
    own, alone = list(ranks.share(draws.num_prompts)), replace(policy, ranks=ALONE)
    split = policy.sharded.world > 1
    later: list[tuple[Draws, dict[str, Tensor]]] = []

    def share() -> Passed | None:
        if not own and not split:
            return None
        index, weight = own or [0], scale if own else 0.0  # of split layers everybody passes something back
        known = of_prompts(numbers, draws.lengths, index)
        passed = backward(
            alone,
            select(draws, index),
            known,
            recipe.objective,
            scale=weight,
            later=later if split else None,
            **of_all,
        )
        return passed if own else None

    with whole(policy):
        found = [part for part in ranks.gather(share) if part is not None]
    if split:
        in_step(alone, later, ranks)
    sum_gradients(policy)
    names = ("value", "residual", "log_pi", "token_log_pi")
    return Passed(*(torch.cat([getattr(part, n) for part in found]) for n in names), found[0].asked)


def _old_numbers(draws: Draws, known: Mapping[str, Tensor], old: Tensor, num_fresh: int) -> dict[str, Tensor]:
    """The policy before its first update, and the law of its own draws as this scorer has it."""
    log_old = draws.sequence_sums(old)
    # log_start is said where the policy is asked for, and not the law of the draws
    found = {"token_log_old": old, "log_old": log_old, "log_start": log_old}
    if "log_q" in known:
        log_q = torch.cat([log_old[:, :num_fresh], known["log_q"][:, num_fresh:]], 1)
        found |= {"log_q": log_q, "log_w": known["log_target"] - log_q}
    return found


def _parts(num_prompts: int, recipe: Recipe, generator: torch.Generator) -> list[Tensor]:
    """Which prompts each update sees; a shuffle an iteration where there are minibatches."""
    parts: list[Tensor] = []
    for _ in range(recipe.num_iterations):
        if recipe.num_minibatches == 1:
            parts.append(torch.arange(num_prompts))
        else:
            order = torch.randperm(num_prompts, generator=generator)
            parts += [part for part in order.tensor_split(recipe.num_minibatches) if len(part)]
    return parts


def _stepped(
    policy: CausalPolicy, optimizer: torch.optim.Optimizer, max_grad_norm: float, step: int
) -> float:
    if policy.sharded.world > 1:
        gradients = (p.grad for p in policy.parameters() if p.grad is not None)
        norm = clip_norm(gradients, max_grad_norm, policy.sharded)
    else:
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
    if not torch.isfinite(norm):
        raise ValueError(
            f"step {step}: the gradient is not finite; the weights were left as they were before it. "
            "Lower the learning rate, or look at the rewards of the last draws"
        )
    optimizer.step()
    return norm.item()


def _critic_stepped(recipe: Recipe, numbers: Mapping[str, Tensor], draws: Draws) -> float:
    """One step of the critic towards the returns; the loss before it, units of reward squared."""
    assert recipe.critic is not None
    assert recipe.critic_optimizer is not None
    recipe.critic_optimizer.zero_grad()
    loss = value_loss(
        recipe.critic(numbers["token_hidden"]),
        numbers["returns"],
        numbers["old_values"],
        draws.row,
        draws.lengths,
        clip=recipe.value_clip,
        aggregate=mean_over_batch,
    ).mean()
    loss.backward()
    recipe.critic_optimizer.step()
    return loss.item()


def _together(seen: list[tuple[Tensor, Passed]], draws: Draws, old: Tensor | None) -> Passed:
    """The first look at every prompt, in the order of the batch."""
    if len(seen) == 1:
        passed = seen[0][1]
    else:
        where = torch.cat([part for part, _ in seen]).argsort()
        value, residual, log_pi = (
            torch.cat([getattr(passed, name) for _, passed in seen])[where]
            for name in ("value", "residual", "log_pi")
        )
        assert old is not None
        passed = replace(seen[0][1], value=value, residual=residual, log_pi=log_pi, token_log_pi=old)
    if old is None:
        return passed
    return replace(passed, log_pi=draws.sequence_sums(old), token_log_pi=old)
