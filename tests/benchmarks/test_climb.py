"""The convergence benchmark without a model: what is skipped, straight lines between checkpoints, the tables of records."""

import doctest
import json
import math
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
MACHINE = {"device": "cpu", "name": "a processor", "threads": 1, "jobs": 1}
SETTINGS = {
    "beta": 0.2,
    "prompts": 4,
    "generations": 8,
    "tokens": 16,
    "held_out": 24,
    "held_out_draws": 32,
    "dtype": "float32",
    "certified_in": "float32",
}


@pytest.fixture
def records_of(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import climb_records

    return climb_records


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import climb_vs_trl

    return climb_vs_trl


def point(step, tokens, seconds, gap):
    """A checkpoint; everything else follows from the gap, which is 0.4 at the start."""
    numbers = {"gap": gap, "attained": 1 - gap / 0.4, "kl": 1 - gap, "reward": 0.5 - gap}
    certified = {name: {"value": x, "low": x, "high": x} for name, x in numbers.items()}
    return {"step": step, "tokens": tokens, "seconds": seconds} | certified


def record(method, gaps, *, rate=1e-3, seed=0, start=0.0, pace=10.0, ended=None, options=None):
    """A run with a checkpoint every ten steps of `pace` seconds and 100 tokens."""
    return {
        "method": method,
        "options": options or {},
        "rate": rate,
        "seed": seed,
        "machine": MACHINE,
        "settings": SETTINGS,
        "steps": 10 * (len(gaps) - 1),
        "every": 10,
        "versions": {"torch": "2"},
        "ended": ended,
        "checkpoints": [point(10 * i, 1000 * i, start + pace * 10 * i, gap) for i, gap in enumerate(gaps)],
    }


def test_examples(records_of):
    found = doctest.testmod(records_of)
    assert (found.attempted > 1, found.failed) == (True, 0)


def test_a_machine_is_called_by_the_best_it_has(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import processor

    assert doctest.testmod(processor).failed == 0
    for flags, best in (("avx2 avx512_bf16 amx_bf16", "amx_bf16"), ("avx512_bf16 avx2", "avx512_bf16")):
        (tmp_path / "cpuinfo").write_text(f"flags : fpu {flags} sse\n")
        assert processor.processor(tmp_path / "cpuinfo") == f"{platform.machine()} {best}"


def test_between_checkpoints_the_line_is_straight(records_of):
    points = record("a", [0.4, 0.3, 0.1], start=50)["checkpoints"]  # at 50, 150 and 250 s
    at = [records_of.value_at(points, "seconds", x, "gap") for x in (0, 50, 100, 150, 225, 250)]
    assert at == pytest.approx([0.4, 0.4, 0.35, 0.3, 0.15, 0.1])
    assert math.isnan(records_of.value_at(points, "seconds", 251, "gap"))


def test_half_the_gap_is_where_the_line_first_crosses_it(records_of):
    until = records_of.until_closed
    points = record("a", [0.4, 0.3, 0.1, 0.3], start=50)["checkpoints"]
    assert until(points, "seconds") == pytest.approx(200)  # a plan's 50 s are counted
    assert until(points, "tokens") == pytest.approx(1500)
    assert until(points, "seconds", share=0.25) == pytest.approx(150)
    assert until(record("a", [0.4, 0.3, 0.21])["checkpoints"], "seconds") == math.inf
    assert until(record("a", [0.4, 0.1])["checkpoints"], "tokens") == pytest.approx(1000 * 2 / 3)


def test_a_run_is_skipped_only_where_the_same_one_is_recorded(records_of):
    known = [record("a", [0.4, 0.3, 0.2])]  # 20 steps
    same = {**known[0], "steps": 20}
    others = [
        {**same, "steps": 30},
        {**same, "rate": 3e-3},
        {**same, "seed": 1},
        {**same, "method": "b"},
        {**same, "options": {"num_replay": 8}},
        {**same, "machine": MACHINE | {"threads": 2}},
        {**same, "settings": SETTINGS | {"held_out": 8}},
    ]
    assert records_of.missing([same, {**same, "steps": 10}, *others], known) == others


def test_the_best_rate_of_each_table_is_its_own(records_of):
    known = [
        record("a", [0.4, 0.3, 0.10], rate=1e-4),  # ends lowest
        record("a", [0.4, 0.15, 0.14], rate=1e-3),  # is at half first
        record("a", [0.4, 0.01], rate=1e-2, ended="the gradient is not finite"),
        record("a", [0.4, 0.0, 0.0], rate=1.0, seed=1),  # not the seed that is tuned on
        record("b", [0.4, 0.35, 0.3], rate=1e-4),
        record("b", [0.4, 0.35, 0.25], rate=1e-3),
    ]
    best = records_of.best_rate
    assert best(known, "a", 0, records_of.last_gap) == 1e-4
    assert best(known[:2], "a", 0, records_of.seconds_to_half) == 1e-3
    assert best(known, "b", 0, records_of.seconds_to_half) == 1e-3  # neither got there: the lower end
    assert records_of.best_rates(known[:2], "a", 0) == [1e-4, 1e-3]
    assert records_of.best_rates(known, "b", 0) == [1e-3]
    assert records_of.best_rates(known, "c", 0) == []


def test_the_tables_say_what_the_records_say(records_of):
    known = [
        record("klimb_x", [0.4, 0.2, 0.1], start=100, pace=1),  # half at 110 s, 1000 tokens; ends at 120 s
        record("klimb_x", [0.4, 0.3, 0.1], start=100, pace=1, seed=1),  # half at 115 s
        record("trl_x", [0.4, 0.3, 0.2], pace=30),  # half at 600 s
        record("trl_y", [0.4, 0.39, 0.38], pace=40),  # never in its 800 s
    ]
    text = records_of.tables(known, {"klimb_x": "ours", "trl_x": "theirs", "trl_y": "other"}, 0)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line]
    by_name = {}
    for name, *cells in rows:
        by_name.setdefault(name, []).append(cells)
    budgets, times = by_name["ours"]
    assert budgets[:3] == ["0.900 [0.900, 0.900]", "0.100 [0.100, 0.100]", "0.750 [0.750, 0.750]"]
    assert budgets[3:] == [*budgets[:3], "0.001"]  # all of it in 120 s
    assert times[:4] == ["109 [107, 112]", "1", "112 [110, 115]", "1"]
    assert times[4:] == ["1250 [1000, 1500]", "1.00 [1.00, 1.00]", "0.001"]
    budgets, times = by_name["theirs"]
    assert budgets[:3] == ["0.800", "0.200", "0.500"]
    assert budgets[3:6] == ["0.640", "0.360", "0.100"]  # 120 s are two fifths of the way to step 10
    assert times == ["400", "3.7", "600", "5.3", "2000", "30.00", "0.001"]
    assert by_name["other"][1] == ["not in 800", "> 7.3", "not in 800", "> 7.1", "never", "40.00", "0.001"]
    slow = [record("klimb_x", [0.4, 0.3]), record("trl_x", [0.4, 0.3], pace=30)]
    assert "not in 100 |  | not in 100 |  | never" in records_of.tables(
        slow, {"klimb_x": "ours", "trl_x": "theirs"}, 0
    )  # against nothing no ratio
    assert "gap at 2000 tokens" in text
    assert "gap at 120 seconds" in text


def test_machines_and_settings_are_never_in_one_table(records_of):
    one, other = record("klimb_x", [0.4, 0.2]), record("trl_x", [0.4, 0.3])
    other["machine"] = MACHINE | {"jobs": 2}
    names = {"klimb_x": "ours", "trl_x": "theirs"}
    first, second = records_of.tables([one, other], names, 0).split("a processor")[1:]
    assert ("ours" in first, "theirs" in first) == (True, False)
    assert ("ours" in second, "theirs" in second) == (False, True)


def test_a_second_day_runs_what_is_left(script, records_of, tmp_path, monkeypatch):
    """Workers that write what a run would have left: each is called once, and a recorded run not at all."""
    called = []

    def worker(options, kind, job, result):
        folder = Path(job["folder"])
        if (folder / result).exists():
            return
        called.append((kind, *(job.get(name) for name in ("method", "rate", "seed"))))
        folder.mkdir(parents=True, exist_ok=True)
        steps, rate = job.get("steps"), job.get("rate", 1)
        mark = {"step": steps, "tokens": 9, "seconds": 9.0}
        certified = {name: point(0, 0, 0, 0.1 / rate)[name] for name in ("gap", "kl", "reward", "attained")}
        contents = {
            "untrained.json": point(0, 0, 0, 0.4),
            "cost.json": {},
            "trained.json": {"ended": None, "marks": [{"step": 0, "tokens": 0, "seconds": 0.0}, mark]},
            "certified.json": {str(steps): certified},
        }
        (folder / result).write_text(json.dumps(contents[result]))

    monkeypatch.setattr(script, "worker", worker)
    monkeypatch.setattr(script, "version", lambda name: "1")
    options = SimpleNamespace(
        device="cpu",
        threads=1,
        jobs=2,
        steps=4,
        every=2,
        held_out=8,
        held_out_draws=8,
        seeds=[0, 1],
        rates=[1.0, 2.0],
        only=["klimb_log_variance", "trl_rloo"],
        records=tmp_path / "records",
        work=tmp_path / "work",
    )
    script.climb(options)
    trained = [call for call in called if call[0] in ("klimb", "trl")]
    every = [(method, rate, 0) for method in ("klimb_log_variance", "trl_rloo") for rate in (1.0, 2.0)]
    best = [("klimb_log_variance", 2.0, 1), ("trl_rloo", 2.0, 1)]
    assert sorted(call[1:] for call in trained) == sorted([*every, *best])
    assert sum(call[0] == "plan" for call in called) == 2  # one a seed, and none for TRL
    assert [point["gap"]["value"] for point in records_of.read(options.records)[0]["checkpoints"]] == [
        0.4,
        0.1,
    ]
    called.clear()
    script.climb(options)
    assert called == []
    next(options.records.rglob("trl_rloo-2-seed1.json")).unlink()
    (tmp_path / "work").rename(tmp_path / "gone")
    script.climb(options)
    assert [call[:2] for call in called] == [
        ("reference", None),
        ("trl", "trl_rloo"),
        ("certify", "trl_rloo"),
    ]


def test_the_table_needs_no_run(script, tmp_path, monkeypatch, capsys):
    method = next(iter(script.METHODS))
    kept = record(method, [0.4, 0.2], options=script.METHODS[method][2])
    stale = record("trl_rloo", [0.4, 0.1], options={"family": "another"})
    for name, x in {"kept": kept, "stale": stale}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(x))
    monkeypatch.setattr(sys, "argv", ["climb_vs_trl.py", "--table", "--records", str(tmp_path)])
    script.main()
    shown = capsys.readouterr().out
    assert script.METHODS[method][0] in shown
    assert script.METHODS["trl_rloo"][0] not in shown
