"""A mistyped run: every verb that takes one names the nearest that is there."""

import pytest

CALLS = [
    ["diagnose", "RUN"],
    ["report", "RUN"],
    ["measure", "RUN"],
    ["sample", "RUN"],
    ["derive", "RUN"],
    ["climb", "--resume", "RUN"],
    ["train", "--resume", "RUN"],
    ["data", "pairs", "RUN", "-o", "pairs.jsonl"],
]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("reviews", "dpo"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("beta: 1\n")


@pytest.mark.parametrize("call", CALLS, ids=" ".join)
@pytest.mark.parametrize("typed", ["runs/review", "run/reviews"])
def test_the_nearest_run_is_named(klimb, runs, call, typed):
    status, out, err = klimb(*(typed if part == "RUN" else part for part in call))
    assert (status, out) == (2, "")
    assert f"{typed}: " in err
    assert "(did you mean 'runs/reviews'?)" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("call", [["diagnose", "RUN"], ["measure", "RUN"], ["report", "RUN"]], ids=" ".join)
def test_a_folder_of_runs_is_not_one(klimb, runs, call):
    status, _, err = klimb(*("runs" if part == "RUN" else part for part in call))
    assert status == 2
    assert "it is a folder of runs: dpo, reviews" in err


@pytest.mark.parametrize("typed", ["elsewhere/other", "runs/x", "x", "/", ".", ""])
def test_nothing_is_guessed_where_nothing_is_near(klimb, runs, typed):
    status, _, err = klimb("diagnose", typed)
    assert (status, err[:7]) == (2, "klimb: ")
    assert "did you mean" not in err


@pytest.mark.parametrize("verb", ["measure", "sample"])
def test_without_a_run_or_a_file_both_are_asked_for(klimb, verb):
    status, _, err = klimb(verb)
    assert (status, err) == (2, "klimb: expected the directory of a run, or -c FILE\n")
