"""--profile: the same run, bit by bit, and beside it where its time and memory went."""

import gzip
import json
import subprocess
import sys

import pytest

from klimb.spans import KINDS
from klimb.store import load_latest_checkpoint, read_draws, read_json, read_jsonl
from klimb.watch import Watch

TIMINGS = {"seconds": None, "tokens_per_second": None}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("klimb.run.report", lambda path, watch: None)


@pytest.fixture
def runs(klimb, tiny_run, options, tmp_path):
    """Two folders of one training, without and with the profiler, and what the second one printed."""
    settings = {**tiny_run, "replay_steps": 2, "max_steps": 7}
    printed = []
    for name, flags in (("plain", []), ("profiled", ["--profile"])):
        status, out, err = klimb("train", *flags, *options({**settings, "output_dir": str(tmp_path / name)}))
        assert (status, err) == (0, "")
        printed.append(out)
    return tmp_path / "plain", tmp_path / "profiled", printed[1]


def test_the_numbers_are_the_same_and_the_profile_is_whole(runs):
    plain, profiled, out = runs
    steps = [[record | TIMINGS for record in read_jsonl(run / "metrics.jsonl")] for run in (plain, profiled)]
    assert steps[0] == steps[1]
    weights = [load_latest_checkpoint(run / "checkpoints").tensors for run in (plain, profiled)]
    assert weights[0].keys() == weights[1].keys()
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    draws = [read_draws(run / "draws/train-000004.parquet") for run in (plain, profiled)]
    assert draws[0].log_pi.equal(draws[1].log_pi)

    assert not (plain / "profile.json").exists()
    record = read_json(profiled / "profile.json")
    assert [(s["step"], s["kind"]) for s in record["steps"]] == [(2, "replayed"), (4, "drawn")]
    assert [set(s["parts"]) for s in record["steps"]] == [
        {"update", "write", "rest"},
        {"draw", "score", "update", "write", "rest"},
    ]
    for step in record["steps"]:
        assert step["seconds"] == pytest.approx(sum(sum(p.values()) for p in step["parts"].values()))
        for kinds in step["parts"].values():
            assert tuple(kinds) == KINDS
            assert min(kinds.values()) >= 0
    drawn = record["steps"][1]["parts"]
    assert all(drawn[part]["matrix products"] > 0 for part in ("draw", "score", "update"))
    assert drawn["write"]["matrix products"] == drawn["rest"]["matrix products"] == 0
    assert 0 < record["memory"]["weights"] < record["memory"]["peak"] < 1e11
    assert record["memory"]["optimizer"] > 0

    trace = json.loads(gzip.decompress((profiled / "trace.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"]]
    assert names.count("klimb:step") == 2
    assert trace["left_out"] == 0
    for words in (
        "step 2 (replayed)",
        "step 4 (drawn)",
        "matrix products",
        "trace.json.gz",
        "peak of the process",
    ):
        assert words in out


def test_metrics_say_how_many_tokens_a_second(runs):
    plain, *_, out = runs
    for record in read_jsonl(plain / "metrics.jsonl"):
        rates, seconds = record["tokens_per_second"], record["seconds"]
        assert rates["trained"] * seconds["update"] == pytest.approx(record["tokens"])
        assert ("drawn" in rates) == ("draw" in seconds) == (record["step"] > 2)
        if "drawn" in rates:
            drawn = 4 * 4 * record["completion_length"]  # prompts, draws, mean tokens
            assert rates["drawn"] * seconds["draw"] == pytest.approx(drawn)
    assert " drawn, " in out
    assert " trained" in out


def test_a_run_that_takes_no_step_or_stops_before_has_no_profile(klimb, runs, tmp_path):
    plain, *_ = runs
    status, out, err = klimb("train", "--profile", "--resume", plain)
    assert (status, err) == (0, "")
    assert "no profile" in out
    assert not (plain / "profile.json").exists()
    status, out, _ = klimb("train", "--profile", "--json", "--resume", plain)
    assert json.loads(out)["profile"] is None


def test_a_training_stopped_after_the_step_that_was_looked_at(tiny_run, options, tmp_path):
    from klimb.config import load
    from klimb.run import run_train

    steps = []

    def event(kind, record):
        if kind == "step":
            steps.append(record)

    stopped = Watch(event=event, stop=lambda: len(steps) == 3)
    outcome = run_train(load(None, options(tiny_run)), watch=stopped, profile=True)
    assert outcome.interrupted
    assert [s["step"] for s in outcome.profile["steps"]] == [2]
    assert (tmp_path / "run/trace.json.gz").stat().st_size < 3e6


@pytest.mark.skipif(
    sys.platform != "linux", reason="elsewhere there is only the system's account of resources"
)
def test_the_peak_is_not_that_of_the_process_that_started_this_one():
    """A program that holds two gigabytes starts one that imports klimb's profiler: the account of resources gives it both."""
    child = "import resource; from klimb.profile import peak_of_process; print(peak_of_process(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    parent = f"import subprocess, sys; held = b'x' * 2_000_000_000; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    ours, account = map(int, done.stdout.split())
    assert 1e7 < ours < 1.5e9
    assert account * 1024 > 1.9e9
