"""The gap of each held-out prompt: their mean is the certificate's, and the worst stands first."""

import pytest

from klimb.report.found import read_run
from klimb.report.held_out import held_out
from klimb.store import read_json, write_json


def test_the_means_are_those_of_the_certificate(klimb, tiny_run, options, tmp_path):
    status, _, err = klimb("climb", "-q", *options({**tiny_run, "max_steps": 4}))
    assert status == 0, err
    run = tmp_path / "run"
    rows, measured = held_out(read_run(run)), read_json(run / "measure.json")
    assert len(rows) > 2
    mean = {
        name: sum(row.numbers[name].value for row in rows) / len(rows) for name in ("gap", "reward", "kl")
    }
    for name, value in mean.items():
        assert value == pytest.approx(measured[name]["value"], abs=1e-5)
    gaps = [row.numbers["gap"].value for row in rows]
    assert gaps == sorted(gaps, reverse=True)
    assert all(row.numbers["gap"].low <= row.numbers["gap"].value <= row.numbers["gap"].high for row in rows)
    assert "What is left, prompt by prompt" in (run / "report.html").read_text(encoding="utf-8")
    # another reward than the one that is written, or no beta: no table rather than a wrong one
    for changed in ({"target": {"kind": "entropy_bonus"}}, {"beta": None}):
        write_json(run / "measure.json", {**measured, **changed})
        assert held_out(read_run(run)) == []
