"""A training on disk: from the newest checkpoint to the policy's folder, each step written down."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from klimb import store
from klimb.checkpoint import restore, saved
from klimb.config import Config
from klimb.data import Pool
from klimb.loaded import Loaded, generator_for
from klimb.measure import measure
from klimb.models.families import save_policy
from klimb.models.master import adamw, masters, moved_average, speaking_as, write_out
from klimb.objectives.forward_kl import forward_kl
from klimb.objectives.log_variance import log_variance
from klimb.objectives.reverse_kl import reverse_kl
from klimb.plan import draw_pool
from klimb.records import step_record
from klimb.samplers.replay import Replay
from klimb.target import Tilt, tilt
from klimb.trackers import trackers
from klimb.train import TrainState, train
from klimb.watch import Watch

PATIENCE = 5
"""steps after which a reward that never changed is called useless"""

OBJECTIVES = {"log_variance": log_variance, "reverse_kl": reverse_kl, "forward_kl": forward_kl}


def trained(
    loaded: Loaded, path: Path, *, pool: Pool | None, beta: float, resume: bool, watch: Watch
) -> tuple[int, bool]:
    """Train, from the newest checkpoint if there is one; (steps done, whether it was stopped).

    Args:
        loaded: what the configuration names; its policy is trained.
        path: the directory of the run, which is there.
        pool: reference draws of the plan: the first replay, where there is one.
        beta: reward per nat.
        resume: go on from the newest checkpoint that is valid.
        watch: who looks on.

    Raises:
        ValueError: no checkpoint is valid, one is of other weights, or the disk is full.
    """
    config, policy = loaded.config, loaded.policy
    parameters = list(policy.parameters())
    optimizer = adamw(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate, config=config))
    generator = generator_for(config.seed, "train")
    replays = config.num_replay > 0 or config.replay_steps > 0
    examples = list(loaded.train_examples)
    state = TrainState()
    if pool is not None and replays:
        limit = max(Replay().limit, pool.draws.num_draws)
        state = TrainState(replay=Replay(limit=limit).extended(pool))
        kept = {example.id for example in pool.draws.examples}  # only of these something is kept
        examples = [example for example in examples if example.id in kept]
    average = [m.detach().clone() for m in masters(optimizer)] if config.ema_decay else []
    checkpoints, metrics = path / "checkpoints", path / "metrics.jsonl"
    if resume and store.list_checkpoints(checkpoints):
        checkpoint = store.load_latest_checkpoint(checkpoints)
        for warning in checkpoint.warnings:
            watch.event("warning", warning)
        state = restore(checkpoint, parameters, optimizer, scheduler, average, generator, replay=state.replay)
    if metrics.is_file():
        store.truncate_jsonl(metrics, state.step)
    store.remove_draws_after(path, "train", state.step)

    target = tilt(loaded.reference, loaded.reward, beta)
    clip = {} if config.clip is None else {"clip": config.clip}
    log = trackers(config, path)
    evaluate = partial(_evaluated, loaded, target, _reference_of_evaluation(loaded))
    steps = train(
        examples,
        policy,
        target,
        loaded.sampler,
        partial(OBJECTIVES[config.method], **clip),
        optimizer,
        max_steps=config.max_steps,
        prompts_per_step=config.prompts_per_step,
        num_draws=config.num_generations,
        num_replay=config.num_replay,
        replay_steps=config.replay_steps,
        keep_fresh=config.keep_fresh and config.num_replay > 0,
        max_grad_norm=config.max_grad_norm,
        scheduler=scheduler,
        state=state,
        generator=generator,
    )
    watch.event("train", {"step": state.step, "max_steps": config.max_steps})
    seen: set[float] = set()
    for step in steps:
        state = step.state
        if average:
            average = moved_average(average, masters(optimizer), decay=config.ema_decay, step=step.step)
        if step.fresh is not None and len(seen) < 2:
            seen.update(step.fresh.reward.unique().tolist())
            if len(seen) < 2 and step.step >= PATIENCE:
                raise ValueError(
                    f"nothing can be learned: after {step.step} steps every reward is {seen.pop():g}; change the "
                    "reward or the prompts"
                )
        record = step_record(step)
        if config.eval_steps is not None and step.step % config.eval_steps == 0:
            with speaking_as(average or masters(optimizer), optimizer, parameters):
                record["evaluation"] = evaluate(step.step)
        if step.fresh is not None:
            where = store.draws_path(path, "train", step.step)
            store.write_pool(where, step.fresh, verb="train", hashes=loaded.hashes, step=step.step)
        store.append_jsonl(metrics, record)
        log(record)
        watch.event("step", record)
        stopped = watch.stop() and step.step < config.max_steps
        if stopped or step.step % config.save_steps == 0 or step.step == config.max_steps:
            tensors, rest = saved(state, parameters, optimizer, scheduler, average, generator)
            store.save_checkpoint(checkpoints, step.step, tensors, rest, keep=config.save_total_limit)
            watch.event("checkpoint", {"step": step.step})
        if stopped:
            return step.step, True
    write_out(average or masters(optimizer), parameters)  # from here on the policy is what was averaged
    store.write_directory_whole(path / "policy", partial(save_policy, policy))
    watch.event("trained", {"step": state.step})
    return state.step, False


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


def _evaluated(loaded: Loaded, target: Tilt, reference_pool: Callable[[], Pool], step: int) -> dict[str, Any]:
    pool = reference_pool()
    found = measure(
        pool.draws.examples,
        loaded.policy,
        target,
        loaded.sampler,
        num_draws=loaded.config.eval_draws,
        generator=generator_for(loaded.config.seed, f"evaluate {step}"),
        reference_pool=pool,
    ).certificate
    names = ("reward", "kl", "objective", "gap", "attained", "reference_reward")
    return {name: getattr(found, name).as_dict() for name in names}
