"""What saves memory changes no number of a run."""

import pytest

from klimb.store import read_json, read_jsonl

pytestmark = pytest.mark.usefixtures("no_report")
CLOCKS = ("seconds", "tokens_per_second")


def test_layers_that_run_twice_give_the_same_run(klimb, tiny_run, options, tmp_path):
    found = []
    for saving in (False, True):
        own = {**tiny_run, "gradient_checkpointing": saving, "output_dir": str(tmp_path / f"run-{saving}")}
        status, _, err = klimb("climb", *options({**own, "max_chunk_tokens": 16}))
        assert (status, err) == (0, "")
        steps = read_jsonl(tmp_path / f"run-{saving}" / "metrics.jsonl")
        measured = read_json(tmp_path / f"run-{saving}" / "measure.json")
        found.append(([{n: x for n, x in step.items() if n not in CLOCKS} for step in steps], measured))
    assert found[0][0] == found[1][0]
    assert {**found[0][1], "diagnosis": None} == {
        **found[1][1],
        "diagnosis": None,
    }  # its command names the run
