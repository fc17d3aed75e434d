"""A run on a Ray cluster: Ray Train starts the processes, and each of them does what torchrun would have it do.

The output directory, the data and the rewards have to be where every worker finds them: on one machine, or on a disk that all
share. Only the first rank reads and writes the directory of the run.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from klimb.config import Config
from klimb.store import check_free

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
