"""A training on disk: from the newest checkpoint to the policy's folder, each step written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klimb import store
from klimb.aim import aimed_at
from klimb.checkpoint import Moving, restore, saved
from klimb.choice import caution, chosen, importance_cap
from klimb.config import Config
from klimb.data import Example, Pool, Target
from klimb.distil import Lesson, distil
from klimb.learn import Recipe
from klimb.loaded import Loaded, generator_for
from klimb.log_z import plan_log_z, start_learned, start_log_z
from klimb.measure import certify
from klimb.models.critic import Critic
from klimb.models.families import save_policy, whole_state
from klimb.models.master import adamw, masters, moved_average, speaking_as, write_out
from klimb.pool import draw_pool
from klimb.profile import Seen, looked_at, memory_used, steps_to_look_at, write_profile
from klimb.ranks import ALONE, Ranks
from klimb.records import step_record
from klimb.samplers.replay import Replay
from klimb.steps import Step, TrainState
from klimb.train import train
from klimb.watch import Watch

PATIENCE = 5
"""steps after which a reward that never changed is called useless"""


@dataclass(frozen=True)
class Trained:
    """How far a training came.

    Attributes:
        state: what a next step would need; its `step` counts those before a resume too.
        stopped: it was asked to stop.
        profile: what profile.json holds, where that was asked for and a step was looked at.
    """

    state: TrainState
    stopped: bool
    profile: Mapping[str, Any] | None = None


def trained(
    loaded: Loaded,
    path: Path,
    *,
    pool: Pool | None,
    beta: float,
    resume: bool,
    watch: Watch,
    profile: bool = False,
) -> Trained:
    """Train, from the newest checkpoint if there is one.

    Args:
        loaded: what the configuration names; its policy is trained.
        path: the directory of the run, which is there.
        pool: reference draws of the plan: the first replay, where there is one.
        beta: reward per nat.
        resume: go on from the newest checkpoint that is valid.
        watch: who looks on.
        profile: whether profile.json and trace.json.gz are to be written; the numbers are the same.

    Raises:
        ValueError: no checkpoint is valid, one is of other weights, or the disk is full.
    """
    config = loaded.config
    target = aimed_at(config.target, loaded.reference, loaded.reward, beta)
    moving = moved_by(config, list(loaded.policy.parameters()), _critic(loaded))
    state, examples = _first(loaded, pool, target)
    state = taken_up(path, state, moving, resume, watch, ranks=loaded.ranks)
    if config.method == "distill":
        steps = _taught(loaded, moving, state, examples)
    else:
        steps = _steps(loaded, target, moving, state, examples, pool)
    if (said := caution(config)) is not None:
        watch.event("warning", said)
    seen = Seen()
    if profile and loaded.ranks.first:
        which = steps_to_look_at(state.step, config.max_steps, replay_steps=config.replay_steps)
        steps = looked_at(steps, which, seen, first=state.step, device=loaded.policy.device)
    evaluate = partial(_evaluated, loaded, target, _reference_of_evaluation(loaded))
    state, stopped = carried_out(
        steps,
        config,
        path,
        moving,
        state,
        hashes=loaded.hashes,
        evaluate=evaluate,
        watch=watch,
        ranks=loaded.ranks,
    )
    if stopped and state.step < config.max_steps:
        return Trained(state, stopped=True, profile=_profiled(seen, path, loaded, moving))
    write_out(moving.result, moving.parameters)  # from here on the policy is what was averaged
    save = partial(save_policy, loaded.policy, state=whole_state(loaded.policy))
    loaded.ranks.from_first(partial(store.write_directory_whole, path / "policy", save))
    stopped = stopped or loaded.ranks.from_first(watch.stop)
    watch.event("trained", {"step": state.step})
    return Trained(state, stopped, _profiled(seen, path, loaded, moving))


def carried_out(
    steps: Iterator[Step],
    config: Config,
    path: Path,
    moving: Moving,
    state: TrainState,
    *,
    hashes: Mapping[str, str],
    evaluate: Callable[[int], dict[str, Any]],
    watch: Watch,
    ranks: Ranks = ALONE,
) -> tuple[TrainState, bool]:
    """Take steps of any kind, each written down, with checkpoints between them; where they came to, and whether they were to stop."""
    watch.event("train", {"step": state.step, "max_steps": config.max_steps})
    rewards: set[float] = set()
    told: set[str] = set()
    for step in steps:
        state = step.state
        if moving.average:
            moving.average[:] = moved_average(
                moving.average, masters(moving.optimizer), decay=config.ema_decay, step=step.step
            )
        _check_useful(step, rewards)
        record = step_record(step)
        if config.eval_steps is not None and step.step % config.eval_steps == 0:
            with speaking_as(moving.result, moving.optimizer, moving.parameters):
                record["evaluation"] = evaluate(step.step)
        ranks.from_first(partial(_write_down, step, record, path, hashes))
        for about, warning in step.warnings.items():
            if about not in told:
                watch.event("warning", warning)
        told.update(step.warnings)
        watch.event("step", record)
        stopped = ranks.from_first(watch.stop)
        if stopped or step.step % config.save_steps == 0 or step.step == config.max_steps:
            tensors, rest = saved(state, moving)
            save = partial(store.save_checkpoint, path / "checkpoints", step.step, tensors, rest)
            ranks.from_first(lambda: str(save(keep=config.save_total_limit)))  # noqa: B023
            watch.event("checkpoint", {"step": step.step})
        if stopped:
            return state, True
    return state, False


def _taught(loaded: Loaded, moving: Moving, state: TrainState, examples: list[Example]) -> Iterator[Step]:
    """The steps of method distill."""
    config = loaded.config
    assert loaded.teacher is not None
    return distil(
        examples,
        loaded.policy,
        loaded.sampler,
        Lesson(
            loaded.teacher,
            divergence=config.divergence,
            teacher_draws=config.teacher_draws,
            top_k=config.top_k,
            sequence_gradient=config.sequence_gradient,
            num_iterations=config.num_iterations,
            max_grad_norm=config.max_grad_norm,
        ),
        moving.optimizer,
        state=state,
        **_every_step(config, moving),
    )


def _steps(
    loaded: Loaded,
    target: Target,
    moving: Moving,
    state: TrainState,
    examples: list[Example],
    pool: Pool | None,
) -> Iterator[Step]:
    """The steps of every other method."""
    config = loaded.config
    choice = chosen(config)
    of_data = pool.draws.num_draws if pool is not None and loaded.judged else 0
    return train(
        examples,
        loaded.policy,
        target,
        loaded.sampler,
        Recipe(
            choice.objective,
            choice.derived,
            in_nats=choice.in_nats,
            num_iterations=config.num_iterations,
            num_minibatches=config.num_minibatches,
            kl_stop=config.kl_stop,
            kl_target=config.kl_target,
            kl_horizon=config.kl_horizon,
            max_grad_norm=config.max_grad_norm,
            critic=moving.critic,
            critic_optimizer=moving.critic_optimizer,
            value_clip=config.value_clip,
            log_z_rate=config.log_z_learning_rate,
            importance_cap=importance_cap(config) if config.sampler.kind == "vllm" else None,
        ),
        moving.optimizer,
        num_replay=of_data or config.num_replay,
        replay_steps=config.max_steps if of_data else config.replay_steps,
        keep_fresh=config.keep_fresh and config.num_replay > 0,
        max_rounds=1 + config.dynamic_sampling,
        steps_ahead=config.sampler.steps_ahead if config.sampler.kind == "vllm" else 0,
        log_z=plan_log_z(pool, target) if choice.needs_log_z and config.log_z == "plan" else None,
        state=state,
        **_every_step(config, moving),
    )


def _every_step(config: Config, moving: Moving) -> dict[str, Any]:
    """What steps of any kind are told."""
    return {
        "max_steps": config.max_steps,
        "prompts_per_step": config.prompts_per_step,
        "num_draws": config.num_generations,
        "scheduler": moving.scheduler,
        "generator": moving.generator,
    }


def _profiled(seen: Seen, path: Path, loaded: Loaded, moving: Moving) -> dict[str, Any] | None:
    """Write down what a profiler saw, if it saw a step to its end; what profile.json holds."""
    if not seen.spans:
        return None
    weights = [w for who in (loaded.policy, loaded.reference) for w in who.model.parameters()]
    return write_profile(path, seen, memory_used(weights, moving.optimizer))


def moved_by(config: Config, parameters: list[Tensor], critic: Critic | None = None) -> Moving:
    """Optimizer, schedule, generator and average as they are before the first step."""
    optimizer = adamw(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )
    critic_optimizer = None
    if critic is not None:
        critic_optimizer = torch.optim.Adam(critic.parameters(), lr=config.value_learning_rate)
    return Moving(
        parameters,
        optimizer,
        torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, config=config)),
        generator_for(config.seed, "train"),
        [m.detach().clone() for m in masters(optimizer)] if config.ema_decay else [],
        critic,
        critic_optimizer,
    )


def _critic(loaded: Loaded) -> Critic | None:
    """What learns the returns, where the method has such a thing."""
    if loaded.config.method == "distill" or not chosen(loaded.config).has_critic:
        return None
    return Critic(loaded.policy.model.config.get_text_config().hidden_size)


def _first(loaded: Loaded, pool: Pool | None, target: Target) -> tuple[TrainState, list[Example]]:
    """The state before the first step, with the plan's pool as the first replay, and the prompts to train on."""
    config, examples = loaded.config, list(loaded.train_examples)
    if pool is not None and loaded.judged:
        return TrainState(replay=Replay(limit=pool.draws.num_draws).extended(pool)), examples
    if pool is None or not (config.num_replay > 0 or config.replay_steps > 0 or config.needs_log_z):
        return TrainState(), examples
    replay = Replay(limit=max(Replay().limit, pool.draws.num_draws)).extended(pool)
    kept = {example.id for example in pool.draws.examples}  # only of these something is known
    examples = [example for example in examples if example.id in kept]
    own = {"running": start_log_z, "learned": start_learned}.get(config.log_z)
    return TrainState(replay=replay, log_z=None if own is None else own(pool, examples, target)), examples


def taken_up(
    path: Path, state: TrainState, moving: Moving, resume: bool, watch: Watch, *, ranks: Ranks = ALONE
) -> TrainState:
    """The newest checkpoint, or `state` where there is none; what came after it is removed."""
    checkpoint = ranks.from_first(partial(_newest, path)) if resume else None
    if checkpoint is not None:
        for warning in checkpoint.warnings:
            watch.event("warning", warning)
        state = restore(checkpoint, moving, replay=state.replay)
    ranks.from_first(partial(_forget_after, path, state.step))
    return state


def _newest(path: Path) -> store.Checkpoint | None:
    """The newest checkpoint of a run, if it has any."""
    folder = path / "checkpoints"
    return store.load_latest_checkpoint(folder) if store.list_checkpoints(folder) else None


def _forget_after(path: Path, step: int) -> None:
    """Remove what a run wrote of later steps."""
    if (path / "metrics.jsonl").is_file():
        store.truncate_jsonl(path / "metrics.jsonl", step)
    store.remove_draws_after(path, "train", step)


def _check_useful(step: Step, rewards: set[float]) -> None:
    """Add the step's rewards to those seen so far, and refuse to go on where they are all one.

    Raises:
        ValueError: they are, after PATIENCE steps.
    """
    if step.fresh is None or len(rewards) > 1:
        return
    rewards.update(step.fresh.reward.unique().tolist())
    if len(rewards) < 2 and step.step >= PATIENCE:
        raise ValueError(
            f"nothing can be learned: after {step.step} steps every reward is {rewards.pop():g}; change the "
            "reward or the prompts"
        )


def _write_down(step: Step, record: Mapping[str, Any], path: Path, hashes: Mapping[str, str]) -> None:
    """The step's draws, then its line: a line says that all of the step is there."""
    if step.fresh is not None:
        where = store.draws_path(path, "train", step.step)
        store.write_pool(where, step.fresh, verb="train", hashes=hashes, step=step.step)
    store.append_jsonl(path / "metrics.jsonl", record)


def rate(step: int, *, config: Config) -> float:
    """The share of learning_rate that step number `step`, from 0, takes; it ends just above zero."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = min((step - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1), 1.0)
    shapes = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}
    return shapes[config.lr_scheduler_type]


def _reference_of_evaluation(loaded: Loaded) -> Callable[[], Pool]:
    """Reference draws that all evaluations share, drawn when first needed; the same after a resume."""
    drawn: list[Pool] = []

    def get() -> Pool:
        if not drawn:
            drawn.append(
                draw_pool(
                    loaded.test_examples[: loaded.config.eval_prompts],
                    loaded.reference,
                    loaded.reward,
                    loaded.sampler,
                    num_draws=loaded.config.eval_draws,
                    generator=generator_for(loaded.config.seed, "evaluate the reference"),
                )
            )
        return drawn[0]

    return get


def _evaluated(
    loaded: Loaded, target: Target, reference_pool: Callable[[], Pool], step: int
) -> dict[str, Any]:
    pool = reference_pool()
    found, _, _ = certify(
        pool.draws.examples,
        loaded.policy,
        target,
        loaded.sampler,
        num_draws=loaded.config.eval_draws,
        generator=generator_for(loaded.config.seed, f"evaluate {step}"),
        reference_pool=pool,
    )
    names = ("reward", "kl", "objective", "gap", "attained", "reference_reward")
    return {name: getattr(found, name).as_dict() for name in names}
