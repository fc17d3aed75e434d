"""A reward model on disk: learned from the comparisons of a file, written as a sequence-classification model, audited on those held out.

What is measured is the folder that was written, loaded as `reward_funcs` would load it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from klimb import store
from klimb.beginning import say_what_differs
from klimb.comparisons import load_judged
from klimb.config import Config, Lora, load
from klimb.loaded import generator_for
from klimb.models.hub import default_dtype
from klimb.models.master import write_out
from klimb.models.scorer import Scorer, load_scorer, save_scorer
from klimb.named_models import options_of
from klimb.objectives.preference import bradley_terry, given, logistic
from klimb.objectives.reward_model import reward_model
from klimb.profile import Seen, looked_at, memory_used, steps_to_look_at, write_profile
from klimb.records import audit_record
from klimb.reward_model import Comparison, audit, learn_reward, spelled
from klimb.rewards.model import model_reward
from klimb.steps import TrainState
from klimb.trackers import check_trackers, tracked
from klimb.training import Trained, carried_out, moved_by, taken_up
from klimb.watch import Watch


def learned_reward(
    config: Config,
    verbs: Sequence[str],
    *,
    resume: bool,
    watch: Watch,
    profile: bool = False,
    hold: Callable[[], object] = lambda: None,
) -> tuple[Trained, dict[str, Any] | None]:
    """Train and, if "measure" is among the verbs, audit; how far the training came, and what measure.json holds.

    `hold` is called before anything is written, to keep other runs out.

    Raises:
        ValueError: for whatever cannot be done, before anything is written.
    """
    path = Path(config.output_dir)
    check_trackers(config.report_to)
    train, test = comparisons(config)
    if config.prompts_per_step > len(train):
        raise ValueError(
            f"prompts_per_step {config.prompts_per_step} is more than the {len(train)} rows there are; use fewer a step"
        )
    scorer = scorer_of(config)
    check_lengths(scorer, [*train, *test])
    hold()
    if resume:
        written = load(path / "config.yaml").model_dump()  # options that came later than the run by default
        moved = {**config.model_dump(), "output_dir": written["output_dir"]}  # as a directory may be
        store.create_run(path, config=moved, resume=True, written=written)
        say_what_differs(path, watch)
    else:
        store.create_run(path, config=config.model_dump(), seed=config.seed)
    with tracked(watch, config, path) as told:
        done = _trained(config, scorer, train, path, resume=resume, watch=told, profile=profile)
        if done.stopped or "measure" not in verbs:
            return done, None
        return done, measured_reward(config, path / config.product, path, watch=told, test=test)


def comparisons(config: Config) -> tuple[list[Comparison], list[Comparison]]:
    """The comparisons to learn from, and those held out.

    Raises:
        ValueError: the file holds none, or none in which two labels differ.
    """
    read = partial(
        load_judged,
        config.dataset_name,
        prompt_column=config.prompt_column,
        by_scores=config.judge != "labels",
    )
    splits = [config.dataset_train_split, config.dataset_test_split or config.dataset_train_split]
    train, test = (
        [Comparison(row.example.prompt, row.completions, row.labels) for row in read(split=split)]
        for split in splits
    )
    for split, rows in zip(splits, (train, test), strict=True):
        if len(rows[0].completions) < 2:
            raise ValueError(
                f"method reward_model compares completions of one prompt, and {config.dataset_name} has one a row; give chosen and "
                "rejected, or completions and scores"
            )
        if all(len(set(row.labels)) == 1 for row in rows):
            raise ValueError(
                f"{config.dataset_name}, {split}: in none of {len(rows)} rows do two scores differ, so nothing says which completion "
                "is better"
            )
    return train[: config.max_prompts], test


def scorer_of(config: Config) -> Scorer:
    """The model that learns, before its first step."""
    how = options_of(config)
    family = config.family
    adapters = None
    if isinstance(family, Lora):
        adapters = {
            "r": family.r,
            "alpha": family.alpha,
            "target_modules": family.target_modules,
            "layers": family.layers,
        }
    return load_scorer(
        config.model_name_or_path,
        lora=adapters,
        revision=config.model_revision,
        seed=config.seed,
        max_chunk_tokens=config.max_chunk_tokens,
        dtype=how["dtype"] or default_dtype(how["device"]),
        device=how["device"],
        trust_remote_code=how["trust_remote_code"],
    )


def check_lengths(scorer: Scorer, rows: Sequence[Comparison]) -> None:
    """Refuse a row that the model cannot read whole."""
    for row, group in zip(rows, spelled(rows, scorer.tokenizer), strict=True):
        longest = max(map(len, group))
        if longest > scorer.context_length:
            raise ValueError(
                f"the prompt {str(row.prompt)[:60]!r}... has with its completion {longest} tokens, expected at most "
                f"{scorer.context_length}, which is all the model reads; shorten it or delete the row"
            )


def _trained(
    config: Config,
    scorer: Scorer,
    rows: Sequence[Comparison],
    path: Path,
    *,
    resume: bool,
    watch: Watch,
    profile: bool,
) -> Trained:
    """Train from the newest checkpoint if there is one, and write the model."""
    moving = moved_by(config, list(scorer.parameters()))
    state = taken_up(path, TrainState(), moving, resume, watch)
    steps = learn_reward(
        rows,
        scorer,
        moving.optimizer,
        loss=partial(
            reward_model,
            judge=bradley_terry if config.judge == "scores" else given,
            link=partial(logistic, smoothing=config.label_smoothing),
            margins=config.judge == "margins",
            centring=config.center_rewards_coefficient,
        ),
        max_steps=config.max_steps,
        prompts_per_step=config.prompts_per_step,
        max_grad_norm=config.max_grad_norm,
        scheduler=moving.scheduler,
        state=state,
        generator=moving.generator,
    )
    seen = Seen()
    if profile:
        which = steps_to_look_at(state.step, config.max_steps, replay_steps=0)
        steps = looked_at(steps, which, seen, first=state.step, device=scorer.model.device)
    state, stopped = carried_out(
        steps, config, path, moving, state, hashes={}, evaluate=lambda step: {}, watch=watch
    )
    found = None
    if seen.spans:
        found = write_profile(path, seen, memory_used(list(scorer.model.parameters()), moving.optimizer))
    if stopped and state.step < config.max_steps:
        return Trained(state, stopped=True, profile=found)
    write_out(moving.result, moving.parameters)  # from here on the model is what was averaged
    store.write_directory_whole(path / config.product, partial(save_scorer, scorer))
    stopped = stopped or watch.stop()
    watch.event("trained", {"step": state.step})
    return Trained(state, stopped, found)


def measured_reward(
    config: Config,
    folder: Path,
    output_dir: str | Path | None,
    *,
    watch: Watch,
    test: Sequence[Comparison] | None = None,
) -> dict[str, Any]:
    """Audit the reward model in a folder on held-out comparisons, and write measure.json into `output_dir` if there is one.

    Raises:
        ValueError: no such model, or nothing to compare it with.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder; expected a trained reward model, such as RUN/reward_model"
        )
    rows = comparisons(config)[1] if test is None else test
    if config.dataset_test_split is None:
        watch.event("warning", "measured on the training rows: dataset_test_split is null")
    device = options_of(config)["device"]
    reward = model_reward(folder, device=device)
    found = audit(
        rows,
        reward,
        beta=config.beta or 1.0,
        generator=generator_for(config.seed, "measure"),
        lengths=lambda text: len(reward.tokenizer(text, add_special_tokens=False)["input_ids"]),
        others={
            "one by one": replace(reward, batch_size=1),
            "in bfloat16": model_reward(folder, device=device, dtype=torch.bfloat16),
        },
        progress=watch.progress,
    )
    record = audit_record(found)
    if output_dir is not None:
        store.write_json(Path(output_dir) / "measure.json", record)
    watch.event("measure", record)
    return record
