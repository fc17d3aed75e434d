"""Two Ray workers on this machine train what one process trains."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from klimb.ranks import ALONE
from klimb.store import load_latest_checkpoint, read_jsonl
from ranked import run

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]


def by_ray(folder, settings):
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    recipe = [sys.executable, str(ROOT / "recipes/ray_climb.py"), str(file), "--verb", "train"]
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    quiet = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "PYTHONPATH": source}
    return subprocess.run(recipe, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_two_ray_workers_are_one_process(tiny_run, tmp_path):
    settings = {**tiny_run, "dtype": "float64", "max_steps": 4, "save_steps": 4, "learning_rate": 1e-3}
    found = by_ray(tmp_path, settings)
    assert found.returncode == 0, found.stderr[-4000:]
    run(ALONE, {**settings, "output_dir": str(tmp_path / "one")}, "run_train")
    two, one = Path(settings["output_dir"]), tmp_path / "one"
    assert [r["step"] for r in read_jsonl(two / "metrics.jsonl")] == [1, 2, 3, 4]
    weights = [load_latest_checkpoint(path / "checkpoints").tensors for path in (one, two)]
    for name, x in weights[0].items():
        if name.startswith("weights"):
            assert (x - weights[1][name]).abs().max() < 1e-6, name
