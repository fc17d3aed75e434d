"""`--nproc` and its faults: each run ends or goes on with a clear message, no record is lost or doubled, the checkpoint loads."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from klimb import store
from klimb.ranks import ALONE
from klimb.store import load_latest_checkpoint, read_draws, read_jsonl
from ranked import ended, run, started


@pytest.fixture
def settings(tiny_run):
    return {**tiny_run, "max_steps": 8, "save_steps": 2, "save_total_limit": 9}


def command(settings, *options):
    """klimb train --nproc 2, as a person types it."""
    file = Path(settings["output_dir"]).parent / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return [sys.executable, "-m", "klimb", "train", "-q", "-c", str(file), "--nproc", "2", *options]


def steps_of(path):
    file = Path(path) / "metrics.jsonl"
    return [record["step"] for record in read_jsonl(file)] if file.exists() else []


def slow_down(settings):
    """So that there is time between two steps to do something."""
    file = Path(settings["reward_funcs"].partition(":")[0])
    file.write_text("import time\n" + file.read_text().replace('"""Share', 'time.sleep(0.1)\n    """Share'))


def workers_of(process):
    """The processes that a launcher started, in their order."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def same(one, two):
    """Two runs learned the same from the same draws, and wrote each step once."""
    one, two = Path(one), Path(two)
    assert steps_of(one) == steps_of(two) == list(range(1, 9))
    newest = [load_latest_checkpoint(path / "checkpoints") for path in (one, two)]
    assert [n.warnings for n in newest] == [[], []]
    assert newest[0].state == newest[1].state
    for name, x in newest[0].tensors.items():
        if name.startswith("weights"):
            assert (x - newest[1].tensors[name]).abs().max() < 1e-4, name  # float32, at rate 0.01
    for path in (one / "draws").iterdir():
        assert read_draws(path).draws.texts == read_draws(two / "draws" / path.name).draws.texts
    assert not list(two.rglob("*.tmp"))


@pytest.fixture
def whole(settings, tmp_path):
    """A run that nothing happened to, on one rank."""
    run(ALONE, {**settings, "output_dir": str(tmp_path / "whole")}, "run_train")
    return tmp_path / "whole"


@pytest.mark.slow
def test_killed_ranks_start_again_by_themselves(settings, whole):
    """The second rank dies after two steps, the first after five; the run ends as if nobody had."""
    slow_down(settings)
    path = Path(settings["output_dir"])
    process = subprocess.Popen(command(settings), stderr=subprocess.PIPE, text=True)
    killed = 0
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if killed < 2 and len(steps_of(path)) >= (2, 5)[killed]:
            os.kill(workers_of(process)[(1, 0)[killed]], signal.SIGKILL)
            killed += 1
            time.sleep(1)
        time.sleep(0.02)
    _, said = process.communicate(timeout=10)
    assert (process.returncode, killed) == (0, 2), said
    same(whole, path)


@pytest.mark.slow
def test_ctrl_c_ends_the_step_and_all_ranks_and_measure_and_sample_take_several(settings):
    path = Path(settings["output_dir"])
    slow_down(settings)
    process = subprocess.Popen(command(settings), stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and len(steps_of(path)) < 2:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert f"klimb train --resume {path}" in said
    assert load_latest_checkpoint(path / "checkpoints").step == len(steps_of(path)) < 8
    resumed = [sys.executable, "-m", "klimb", "train", "-q", "--resume", str(path), "--nproc", "2"]
    assert subprocess.run(resumed, timeout=120, check=False).returncode == 0
    assert steps_of(path) == list(range(1, 9))
    measure = [sys.executable, "-m", "klimb", "measure", str(path), "--json"]
    two, one = (
        subprocess.run([*measure, *more], capture_output=True, text=True, timeout=120, check=True).stdout
        for more in (["--nproc", "2"], [])
    )
    assert json.loads(two)["gap"]["value"] == pytest.approx(json.loads(one)["gap"]["value"], abs=1e-4)
    sample = [sys.executable, "-m", "klimb", "sample", str(path), "--method", "best_of", "--n", "3", "--json"]
    two, one = (
        json.loads(subprocess.run([*sample, *more], capture_output=True, timeout=120, check=True).stdout)
        for more in (["--nproc", "2", "--num-draws", "96"], ["--num-draws", "96"])
    )
    assert two == one
    assert two["draws"] == len(two["samples"]) > 96


def test_a_mistake_is_said_once_and_nothing_is_written(settings):
    found = subprocess.run(
        command({**settings, "reward_funcs": "nowhere.py:good"}), capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 2
    assert found.stderr.count("nowhere.py") == found.stderr.count("klimb:") == 1, found.stderr
    assert not Path(settings["output_dir"]).exists()


def mistaken(ranks, settings):
    """A reward that fails on the second rank alone: both are told."""
    with pytest.raises(ValueError, match="only here"):
        run(ranks, settings, "run_train")


def test_a_mistake_of_one_rank_ends_all(settings):
    file = Path(settings["reward_funcs"].partition(":")[0])
    file.write_text(
        "import os\ndef good(completions, **columns):\n    if os.environ['RANK'] == '1':\n        raise KeyError('only here')\n"
        "    return [0.0] * len(completions)\n"
    )
    assert ended(started(2, mistaken, settings)) == [0, 0]
    assert not Path(settings["output_dir"]).exists()


def test_a_slow_rank_holds_the_others_up_and_changes_nothing(settings, whole):
    file = Path(settings["reward_funcs"].partition(":")[0])
    wait = "import os, time\n    time.sleep(0.2 * (os.environ.get('RANK') == '1'))\n    "
    file.write_text(file.read_text().replace('"""Share', wait + '"""Share'))
    assert ended(started(2, run, settings, "run_train")) == [0, 0]
    same(whole, settings["output_dir"])


def with_a_full_disk(ranks, settings):
    """From the fourth step on the disk of the first rank is full."""

    def full(descriptor):
        if len(steps_of(settings["output_dir"])) >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if ranks.first:
        os.fsync = full
    with pytest.raises(ValueError, match=r"the disk is full: .* make room and resume"):
        run(ranks, settings, "run_train")


def test_a_full_disk_of_the_first_rank_ends_all_and_leaves_a_run_to_resume(settings, whole):
    assert ended(started(2, with_a_full_disk, settings)) == [0, 0]
    there = steps_of(settings["output_dir"])
    assert there in ([1, 2, 3], [1, 2, 3, 4])
    assert ended(started(2, run, settings, "run_train", True)) == [0, 0]
    same(whole, settings["output_dir"])


def test_times_of_files_mean_nothing(settings, whole):
    """A clock that was wrong: the files of a stopped run lie years apart, in no order."""
    run(ALONE, settings, "run_train", False, 5)
    clock = random.Random(3)
    for file in Path(settings["output_dir"]).rglob("*"):
        moment = time.time() + clock.uniform(-3e8, 3e8)
        os.utime(file, (moment, moment))
    assert ended(started(2, run, settings, "run_train", True)) == [0, 0]
    same(whole, settings["output_dir"])


def test_a_second_run_in_the_same_place_is_refused(settings, klimb, options):
    run(ALONE, settings, "run_train", False, 3)
    before = steps_of(settings["output_dir"])
    with store.held(settings["output_dir"]):
        status, _, err = klimb("train", "-q", "--resume", settings["output_dir"])
        assert (status, "another klimb is writing there now" in err) == (2, True), err
    assert steps_of(settings["output_dir"]) == before == [1, 2, 3]
    fresh = Path(settings["output_dir"]).parent / "fresh"
    with store.held(fresh):
        status, _, err = klimb("train", "-q", *options({**settings, "output_dir": str(fresh)}))
        assert (status, "another klimb is writing there now" in err) == (2, True), err
    assert list(fresh.iterdir()) == []


def hold_and_die(ranks, path):
    with store.held(path):
        os.kill(os.getpid(), signal.SIGKILL)


def test_who_dies_lets_go(tmp_path):
    assert ended(started(1, hold_and_die, tmp_path)) == [-signal.SIGKILL]
    with store.held(tmp_path) as locked:
        assert locked


def gone(ranks):
    """The second rank dies; the first is told, and does not wait for it."""
    if not ranks.first:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(ConnectionError, match="another process of this run is gone"):
        ranks.gather(lambda: 1)


def test_who_is_left_alone_is_told(tmp_path):
    assert ended(started(2, gone), 30) == [0, -signal.SIGKILL]
