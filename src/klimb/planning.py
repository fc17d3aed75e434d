"""A plan on disk: its pool drawn or taken from where it lies, and the beta found from it, written down."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from klimb import store
from klimb.aim import aimed_at, target_record
from klimb.choice import takes_forbidden
from klimb.config import Config, Full
from klimb.data import Pool, Target
from klimb.distil import Lesson
from klimb.loaded import Loaded, depends, generator_for
from klimb.models.hub import weights_of
from klimb.models.policy import CausalPolicy
from klimb.plan import Plan, plan
from klimb.plan_distil import advice, plan_distil
from klimb.pool import draw_block, draw_pool, scored_again, seed_of
from klimb.records import apart_record, plan_record
from klimb.rewards.unscored import Unscored
from klimb.target import own_reward
from klimb.watch import Watch

POOL = 8
"""draws a prompt, of teacher and reference each, from which their distance is read; both KLs have little noise"""
NOT_THE_REFERENCE = {
    "train": "draws of the policy in training",
    "measure": "draws of the measured policy",
    "sample-policy": "draws of a policy that is not the reference",
    "sample-best_of": "best of n, not draws of the reference: their law is another one and has no log_q",
    "sample-rejection": "draws of the target (by rejection), not of the reference",
}
"""verbs whose draws no plan can rest on"""


def planned(
    loaded: Loaded, path: Path, watch: Watch, *, to_train: bool
) -> tuple[Pool | None, float, dict[str, Any]]:
    """Draw the pool, or take the one that is there or that `config.plan` names; write it and plan.json.

    Args:
        loaded: what the configuration names.
        path: the directory of the run, which is there; config.yaml there gets its beta.
        watch: told how far it is.
        to_train: whether the pool is going to be trained on.

    Returns:
        The pool (none with distill, which learns from nothing kept), the beta and what plan.json holds.

    Raises:
        Unscored: a reward of another process failed; what was drawn is kept, to be scored by a resume.
        ValueError: a given pool is not of this reference, reward and prompts; training could not live on the pool;
            beta cannot be found from it; all rewards are the same.
    """
    config = loaded.config
    if config.method == "distill":
        return None, 1.0, _planned_lesson(loaded, path, watch)
    own, ranks = store.draws_path(path, "plan"), loaded.ranks
    unscored: list[str] = []
    parts = None
    pool = ranks.from_first(partial(_kept_pool, loaded, path))
    if pool is None:
        parts = ranks.from_first(partial(plan_parts, loaded, path))
        pool = draw_pool(
            loaded.train_examples,
            loaded.reference,
            loaded.reward,
            loaded.sampler,
            num_draws=config.num_plan_draws,
            generator=generator_for(config.seed, "plan"),
            progress=watch.progress,
            what="plan: draw from the reference",
            unscored=unscored,
            parts=parts,
        )
    if bool(pool.reward.isnan().any()):
        parts = None  # they do not have what is scored late
        pool, said = ranks.from_first(partial(scored_again, pool, loaded.reward))
        unscored = [] if said is None else [said]
        if unscored or ranks.from_first(own.is_file):
            ranks.from_first(partial(_keep, own, pool, loaded, unscored=True))
    if unscored:
        missing = pool.reward.isnan()
        raise Unscored(
            f"{unscored[0]}\n{int(missing.sum())} of {missing.numel()} completions are not scored yet; all are kept in {own}, and "
            f"--resume {path} scores them and goes on",
            [],
            (),
        )
    if to_train:
        _check_pool(pool, config)
    # whatever beta a budget gets, the reward whose tilt the target is stays the same
    target = aimed_at(config.target, loaded.reference, loaded.reward, config.beta or 1.0)
    generator = generator_for(config.seed, "frontier")
    found = _found(pool, loaded, target, generator)
    asked = {
        "beta": None if config.beta is None else target.beta,
        "kl": config.kl_budget,
        "reward": config.reward_goal,
    }
    price = found.solve(**asked)
    beta = config.beta or price
    record = loaded.ranks.from_first(partial(_written, path))
    if record is None:
        record = _record(found, price, loaded, generator, why=_why(config))
        if loaded.teacher is not None and not to_train:
            record |= _apart(loaded, watch)
        loaded.ranks.from_first(partial(_write, loaded, path, pool, record, parts))
    loaded.ranks.from_first(partial(_settle, path, config, beta))
    return pool, beta, record


def _kept_pool(loaded: Loaded, path: Path) -> Pool | None:
    """The pool that the run has, or the one that `config.plan` names."""
    own = store.draws_path(path, "plan")
    if own.is_file():
        return _stored_pool(own, loaded, unscored=True)
    if loaded.config.plan is None:
        return None
    given = Path(loaded.config.plan)
    return _stored_pool(store.draws_path(given, "plan") if given.is_dir() else given, loaded)


def _written(path: Path) -> dict[str, Any] | None:
    """What plan.json holds. Of a resumed run config.yaml holds the beta already, and plan.json knows why."""
    where = path / "plan.json"
    return store.read_json(where) if where.is_file() else None


def _write(
    loaded: Loaded, path: Path, pool: Pool, record: dict[str, Any], parts: store.StoredParts | None
) -> None:
    own = store.draws_path(path, "plan")
    if parts is not None:
        parts.merge()
    elif not own.is_file():
        _keep(own, pool, loaded)
    store.remove_parts(own)
    store.write_json(path / "plan.json", record)


def _keep(own: Path, pool: Pool, loaded: Loaded, *, unscored: bool = False) -> None:
    store.write_pool(own, pool, verb="plan", hashes=loaded.hashes, unscored=unscored)
    store.remove_parts(own)


def plan_block(loaded: Loaded, block: range, *, unscored: list[str]) -> Pool:
    """One block of a plan's pool by itself, as `planned` draws it among the others."""
    return draw_block(
        loaded.train_examples,
        block,
        policy=loaded.reference,
        reward=loaded.reward,
        sampler=loaded.sampler,
        num_draws=loaded.config.num_plan_draws,
        seed=seed_of(generator_for(loaded.config.seed, "plan")),
        unscored=unscored,
    )


def plan_parts(loaded: Loaded, path: Path) -> store.StoredParts:
    """Where the finished draws of a plan lie, those of a killed one among them.

    Raises:
        ValueError: those that are there are of another model, reward, seed, ...
    """
    return store.begin_parts(
        store.draws_path(path, "plan"),
        verb="plan",
        hashes=loaded.hashes,
        depends=depends(loaded, loaded.train_examples, loaded.config.num_plan_draws),
    )


def _planned_lesson(loaded: Loaded, path: Path, watch: Watch) -> dict[str, Any]:
    """What plan.json holds of a distillation, written unless it is there."""
    written = loaded.ranks.from_first(partial(_written, path))
    if written is None:
        record = {
            "target": target_record(loaded.config.target),
            "beta": {"value": 1.0, "why": "the target is a law"},
        }
        record |= _apart(loaded, watch)
        loaded.ranks.from_first(partial(store.write_json, path / "plan.json", record))
        written = loaded.ranks.from_first(partial(_written, path))
        assert written is not None
    return written


def _apart(loaded: Loaded, watch: Watch) -> dict[str, Any]:
    """How far a target that is a policy is from the reference, and what to choose."""
    config = loaded.config
    assert loaded.teacher is not None
    lesson = Lesson(
        loaded.teacher,
        divergence=config.divergence if config.method == "distill" else "forward_kl",
        top_k=config.top_k,
    )
    found = plan_distil(
        loaded.train_examples[: config.measure_prompts],
        loaded.policy,
        loaded.reference,
        loaded.sampler,
        lesson,
        num_draws=min(config.num_plan_draws, POOL),
        step=(config.prompts_per_step, max(config.num_generations, 1)),
        generator=generator_for(config.seed, "plan a distillation"),
        progress=watch.progress,
    )
    holds = holds_teacher(config, loaded.reference, loaded.teacher)
    return apart_record(found, advice(found, holds=holds), holds=holds, config=config)


def holds_teacher(config: Config, reference: CausalPolicy, teacher: CausalPolicy) -> bool | None:
    """True where the family is known to hold the target: all weights, and a teacher of the same shape. Else None: it cannot be told."""
    if not isinstance(config.family, Full) or teacher.context or teacher.num_virtual:
        return None
    shapes = [{name: w.shape for name, w in who.model.named_parameters()} for who in (reference, teacher)]
    return True if shapes[0] == shapes[1] else None


def replanned(loaded: Loaded, path: Path, pool: Pool | None, beta: float) -> dict[str, Any] | None:
    """Write down the beta that a KL controller came to in the place of the one it began with; what plan.json now holds.

    Without a plan's pool only config.yaml changes, and there is no record.
    """
    loaded.ranks.from_first(partial(_settle, path, loaded.config, beta))
    if pool is None:
        return None
    why = f"kl_target: {loaded.config.kl_target:g} nats, followed in training"
    generator = generator_for(loaded.config.seed, "frontier")
    target = aimed_at(loaded.config.target, loaded.reference, loaded.reward, beta)
    record = _record(_found(pool, loaded, target, generator), target.beta, loaded, generator, why=why)
    loaded.ranks.from_first(partial(store.write_json, path / "plan.json", record))
    return record


def _found(pool: Pool, loaded: Loaded, target: Target, generator: torch.Generator) -> Plan:
    """What the pool says of every beta, of the target's own reward."""
    return plan(
        pool.draws.examples,
        loaded.reference,
        loaded.reward,
        loaded.sampler,
        num_draws=pool.draws.num_draws,
        generator=generator,
        pool=replace(pool, reward=own_reward(target, pool)),
    )


def _record(
    found: Plan, price: float, loaded: Loaded, generator: torch.Generator, *, why: str
) -> dict[str, Any]:
    return plan_record(
        found,
        price,
        why=why,
        target=target_record(loaded.config.target),
        weights=weights_of(loaded.reference.model),
        generator=generator,
    )


def _settle(path: Path, config: Config, beta: float) -> None:
    """Put beta into config.yaml, in the place of a budget or goal."""
    settled = {**config.model_dump(), "beta": beta, "kl_budget": None, "reward_goal": None}
    store.write_yaml(path / "config.yaml", settled)


def _check_pool(pool: Pool, config: Config) -> None:
    """Refuse, before anything is trained, a pool that the configured steps cannot live on."""
    replayed = config.num_replay + (config.num_generations if config.replay_steps else 0)
    if replayed > pool.draws.num_draws:
        raise ValueError(
            f"a step would replay {replayed} kept draws a prompt, and the pool has {pool.draws.num_draws}; replay "
            "fewer, or plan with more"
        )
    if config.num_replay + config.replay_steps > 0 and config.prompts_per_step > pool.draws.num_prompts:
        raise ValueError(
            f"prompts_per_step {config.prompts_per_step} is more than the {pool.draws.num_prompts} prompts of the "
            "pool; use fewer a step, or plan with more prompts"
        )
    if bool(pool.reward.isneginf().any()) and not takes_forbidden(config.method):
        raise ValueError(
            f"the reward forbids some completions (-inf), and {config.method} cannot be infinitely far from the "
            "target; use method forward_kl or jensen_shannon, or a finite reward"
        )


def _why(config: Config) -> str:
    if config.kl_budget is not None:
        return f"kl_budget: {config.kl_budget:g} nats"
    if config.reward_goal is not None:
        return f"reward_goal: {config.reward_goal:g}"
    if config.target.kind == "entropy_bonus":
        return f"given: beta {config.beta:g} + bonus {config.target.bonus:g}"
    return "given"


def _stored_pool(path: Path, loaded: Loaded, *, unscored: bool = False) -> Pool:
    found = store.read_draws(path, expect_hashes=loaded.hashes)
    if found.verb in NOT_THE_REFERENCE:
        raise ValueError(
            f"{path}: these are {NOT_THE_REFERENCE[found.verb]}; a plan rests on draws of the reference at "
            "temperature 1, made by klimb plan, or by klimb sample with method ancestral and no trained policy"
        )
    known = {example.id for example in loaded.train_examples}
    if not {example.id for example in found.draws.examples} <= known:
        held_out = " (klimb sample draws those of dataset_test_split)" if found.verb == "sample" else ""
        raise ValueError(
            f"{path}: these draws are of other prompts than those of {loaded.config.dataset_name} to train "
            f"on{held_out}; plan again"
        )
    if found.log_ref is not None and (found.reward is None or bool(found.reward.isnan().any())):
        if not unscored:
            raise ValueError(
                f"{path}: some of these completions are not scored yet; `klimb plan --resume` of that run scores them"
            )
        unknown = torch.full_like(found.log_ref, torch.nan)
        known = unknown if found.reward is None else found.reward
        return Pool(found.draws, known, found.log_ref, found.reward_parts, token_log_ref=found.token_log_ref)
    if found.reward is None or found.log_ref is None:
        raise ValueError(f"{path}: these draws have no reward or no log_ref; draw a new pool with plan")
    return Pool(
        found.draws, found.reward, found.log_ref, found.reward_parts, token_log_ref=found.token_log_ref
    )
