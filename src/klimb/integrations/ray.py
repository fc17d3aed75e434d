"""A run on a Ray cluster: Ray Train starts the processes, and each of them does what torchrun would have it do.

A plan alone can also be drawn by Ray Data, whose workers need not wait for each other, and may come and go. The output directory, the data
and the rewards have to be where every worker finds them: on one machine, or on a disk that all share. Only the first rank reads and writes
the directory of the run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from klimb.config import Config
from klimb.loaded import Loaded, prepare
from klimb.planning import plan_block, plan_parts, planned
from klimb.pool import blocks, handed_over
from klimb.run import begun, report
from klimb.samplers.vllm import GOES_ON
from klimb.store import StoredParts, check_free, draws_path
from klimb.trackers import tracked
from klimb.watch import UNWATCHED

RESTARTS = 3
"""how often a run whose workers die is taken up again"""
VERBS = {"plan": "run_plan", "train": "run_train", "climb": "climb"}


def ray_run(
    config: Config, *, verb: str = "climb", num_workers: int, use_gpu: bool = False, resume: bool = False
) -> Path:
    """`klimb VERB` by so many Ray workers; the directory of the run.

    Args:
        config: of the run.
        verb: plan, train or climb.
        num_workers: how many ranks.
        use_gpu: a GPU for each of them.
        resume: go on with the run that is there.

    Raises:
        ValueError: Ray is not installed, an unknown verb, or what the verb raises.

    Source: Moritz et al., "Ray: a distributed framework for emerging AI applications", 2018.
    """
    if verb not in VERBS:
        raise ValueError(f"ray_run: got verb {verb!r}, expected plan, train or climb")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    try:
        engine: Any = importlib.import_module("ray.train")
        trainer_of: Any = importlib.import_module("ray.train.torch").TorchTrainer
    except ImportError as error:
        raise ValueError("ray_run: Ray Train is not installed; pip install 'klimb[ray]'") from error
    if not resume:
        check_free(config.output_dir)
    trainer = trainer_of(
        _work,
        train_loop_config={
            "settings": config.model_dump(),
            "verb": verb,
            "resume": resume,
            "folder": os.getcwd(),
        },
        scaling_config=engine.ScalingConfig(num_workers=num_workers, use_gpu=use_gpu),
        run_config=engine.RunConfig(failure_config=engine.FailureConfig(max_failures=RESTARTS)),
    )
    try:
        trainer.fit()
    except engine.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {0: error.__cause__ or error}
        rank, first = min(failures.items())
        said = str(getattr(first, "cause", first) or first).strip().splitlines()[-1]
        raise ValueError(f"ray_run: worker {rank} ended {RESTARTS + 1} times: {said}") from error
    return Path(config.output_dir)


def plan_over_ray(config: Config, *, num_workers: int, use_gpu: bool = False, resume: bool = False) -> Path:
    """`klimb plan` with its blocks of prompts drawn by so many workers of Ray Data, each with a model of its own; the directory of the run.

    What is drawn is, bit by bit, what one process would draw (`klimb.pool`). Each block is written as soon as it is there, so whatever is
    killed, a plan that is resumed, here or by `klimb plan --resume`, draws only the rest. A worker that dies is replaced.

    Args:
        config: of the run; its output_dir, data and rewards have to be where every worker finds them.
        num_workers: how many.
        use_gpu: a GPU for each of them.
        resume: go on with the run that is there.

    Raises:
        ValueError: Ray is not installed, the plan draws no pool, what `klimb plan` or a worker raises, or a worker did not see
            output_dir.

    Source: Moritz et al., "Ray: a distributed framework for emerging AI applications", 2018.
    """
    if config.learn_from == "data" or config.method in ("distill", "reward_model") or config.plan is not None:
        raise ValueError(
            "plan_over_ray: got learn_from data, method distill or reward_model, or a plan that is given, which draw no pool; expected "
            "learn_from draws and a reward"
        )
    try:
        data: Any = importlib.import_module("ray.data")
    except ImportError as error:
        raise ValueError("plan_over_ray: Ray Data is not installed; pip install 'klimb[ray]'") from error
    path = Path(config.output_dir)
    with begun(config, resume=resume) as loaded:
        if not draws_path(path, "plan").is_file():
            _draw(data, loaded, path, num_workers=num_workers, use_gpu=use_gpu)
        _, _, record = planned(loaded, path, UNWATCHED, to_train=False)
        with tracked(UNWATCHED, config, path) as told:
            told.event("plan", record)
    report(path)
    return path


def _draw(data: Any, loaded: Loaded, path: Path, *, num_workers: int, use_gpu: bool) -> None:
    """Let workers draw and write the blocks of a plan that are not there."""
    config, parts = loaded.config, plan_parts(loaded, path)
    done = parts.done()
    every = blocks(len(loaded.train_examples), config.num_plan_draws)
    left = [{"start": b.start, "stop": b.stop} for b in every if b not in done]
    if left:
        drawn = data.from_items(left, override_num_blocks=len(left)).map_batches(
            _Drawer,
            fn_constructor_kwargs={"settings": config.model_dump(), "parts": parts, "folder": os.getcwd()},
            batch_size=1,
            concurrency=num_workers,
            num_gpus=1 if use_gpu else 0,
        )
        for row in drawn.iter_rows():
            if row["wrong"]:
                raise ValueError(f"plan_over_ray: {row['wrong'].removesuffix(f'; {GOES_ON}')}; {GOES_ON}")
    missing = len(every) - len(parts.done())
    if missing:
        raise ValueError(
            f"plan_over_ray: {missing} of {len(every)} parts are not in {parts.folder}; output_dir has to be on a disk that all "
            "workers share"
        )


class _Drawer:
    """A worker: the model loaded once, and one block after the other drawn and written."""

    def __init__(self, settings: Mapping[str, Any], parts: StoredParts, folder: str) -> None:
        os.chdir(folder)  # where paths of the configuration begin
        loaded = prepare(Config.model_validate(settings))
        self.loaded = replace(loaded, sampler=handed_over(loaded.sampler, loaded.reference))
        self.parts = parts
        self.unscored: list[str] = []

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Draw these blocks; what a person has to be told if it cannot be done, which Ray would wrap up."""
        wrong = ""
        try:
            for start, stop in zip(batch["start"].tolist(), batch["stop"].tolist(), strict=True):
                block = range(start, stop)
                self.parts.write(block, plan_block(self.loaded, block, unscored=self.unscored))
        except ValueError as error:
            wrong = str(error)
        return {"wrong": np.array([wrong])}


def _work(given: Mapping[str, Any]) -> None:
    """One worker. Ray has named the ranks in the environment, and made their group."""
    from klimb import run
    from klimb.ranks import joined

    os.chdir(given["folder"])  # where paths of the configuration begin
    with joined() as ranks:
        settings = given["settings"]
        began = ranks.from_first(lambda: (Path(settings["output_dir"]) / "config.yaml").is_file())
        again = given["resume"] or began  # there was none before the first start
        getattr(run, VERBS[given["verb"]])(Config.model_validate(settings), resume=again, ranks=ranks)
