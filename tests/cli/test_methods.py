"""klimb methods and klimb methods inspect, as they are typed."""

import json
from pathlib import Path

import pytest


def test_the_table_and_its_filters(klimb):
    status, out, _ = klimb("methods")
    assert status == 0
    assert "log_variance" in out
    assert "not the target; the mean of G draws" in " ".join(out.split())
    status, out, _ = klimb("methods", "--json", "--claim", "law")
    found = json.loads(out)
    assert set(found["methods"]) == {"best_of", "rejection"}
    assert "rebel" in found["not_provided"]
    status, out, _ = klimb("methods", "--filter", "Lambert")
    assert "pmd_mean" in out
    assert "log_variance" not in out


def test_the_page_of_the_documentation_is_the_table(klimb):
    _, out, _ = klimb("methods", "--markdown")
    assert out == (Path(__file__).parents[2] / "docs/methods.md").read_text(), (
        "klimb methods --markdown > docs/methods.md"
    )


def test_inspect_a_row(klimb):
    status, out, _ = klimb("methods", "inspect", "log_variance", "--json", "--num-draws", "2")
    found = json.loads(out)
    assert status == 0
    assert found["stops"] == "inside"
    assert abs(found["kl_to_target"]) < 1e-8
    assert abs(sum(found["fixed_point"]) - 1) < 1e-9
    status, out, _ = klimb("methods", "inspect", "pmd_mean", "--num-draws", "2")
    assert "stops elsewhere" in out


def test_inspect_your_own(klimb, tmp_path):
    file = tmp_path / "own.py"
    file.write_text("def half(log_pi, log_target):\n    return (log_target - log_pi).var(1) / 2\n")
    status, out, _ = klimb("methods", "inspect", f"{file}:half", "--num-draws", "2")
    assert status == 0
    assert "stops at the target" in " ".join(out.split())  # a long path breaks the line anywhere


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["methods", "inspect", "log_varianc"], "did you mean 'log_variance'?"),
        (["methods", "inspect", "rebel"], "log_variance at two draws"),
        (["methods", "inspect", "best_of"], "trains nothing"),
        (["methods", "inspect", "nowhere.py:f"], "no such file"),
        (["methods", "inspect", "log_variance", "--beta", "0"], "expected a positive number"),
        (["methods", "inspect", "log_variance", "--draws", "polisy"], "did you mean 'policy'?"),
        (["methods", "inspect", "forward_kl", "--num-draws", "9"], "or equal to 4"),
        (["methods", "--claim", "gradien"], "did you mean 'gradient'?"),
        (["methods", "--filter", "zzz"], "no row holds"),
        (["methods", "grpo"], "klimb methods inspect grpo"),
    ],
)
def test_wrong_input(klimb, arguments, said):
    status, _, err = klimb(*arguments)
    assert status == 2
    assert said in " ".join(err.split())
    assert "Traceback" not in err
