"""klimb derive, target, divergence: what they print, their JSON, a run's draws, and bad input as one table."""

import json
import math
import os
import re
import subprocess
import sys
import time

import pytest

from klimb.cli_derive import CHECKS
from klimb.store import read_json

ENOUGH = ["--ref", "0.6,0.3,0.1", "--reward", "1,0,2", "--beta", "0.5"]


@pytest.fixture
def answer(klimb):
    """The JSON of a command that must work, with nothing on stderr."""

    def call(*arguments):
        status, out, err = klimb(*arguments, "--json")
        assert (status, err) == (0, ""), err
        return json.loads(out)

    return call


def test_derive_prints_the_chain_and_the_remarks(klimb):
    status, out, err = klimb("derive", *ENOUGH)
    assert (status, err) == (0, "")
    for number in range(1, 7):
        assert f"({number})" in out
    for words in (
        "max E_x[ E_π[r] − β KL(π‖ref) ]",
        "min E_x KL(π‖p)",
        "log Z = 2.321726",
        "The chain holds",
        "Remarks",
    ):
        assert words in out
    chain, remarks = out.split("Remarks")
    assert "≠" not in chain
    assert remarks.count("≠") == 1  # the remark of a Z that moves
    sides = [line for line in chain.splitlines() if re.search(r"\.\d{12}", line)]
    assert len(sides) == 18  # nine equalities
    assert len({re.search(r"\.\d{12}", line).start() for line in sides}) == 1  # digits are aligned
    assert max(map(len, out.splitlines())) <= 80


def test_derive_as_json(answer):
    found = answer("derive", *ENOUGH)
    assert set(found) == {"source", "beta", "prompts", "shown", "derivation", "remarks", "run"}
    steps = found["derivation"]["steps"]
    assert [step["number"] for step in steps] == [1, 2, 3, 4, 5, 6]
    for step in steps:
        assert set(step) == {"number", "title", "formula", "sides", "why"}
        for sides in step["sides"]:
            assert set(sides) == {"left", "right", "left_value", "right_value", "difference", "worst"}
            assert sides["worst"] < 1e-12
    assert found["derivation"]["holds"] is True
    assert found["prompts"][0]["log_z"] == pytest.approx(
        math.log(0.6 * math.e**2 + 0.3 + 0.1 * math.e**4), abs=1e-12
    )
    assert [r["name"] for r in found["remarks"]][1] == "other_direction"
    assert found["run"] is None


def test_derive_is_the_same_for_a_seed_and_at_a_policy_of_ones_own(answer):
    assert answer("derive", *ENOUGH) == answer("derive", *ENOUGH)
    assert answer("derive", *ENOUGH, "--seed", 1)["prompts"] != answer("derive", *ENOUGH)["prompts"]
    own = answer("derive", *ENOUGH, "--policy", "1/3,1/3,1/3")
    assert own["prompts"][0]["policy"] == pytest.approx([1 / 3] * 3, abs=1e-12)
    first = own["derivation"]["steps"][0]["sides"][0]
    price = sum(math.log(1 / 3 / q) for q in (0.6, 0.3, 0.1)) / 3
    assert first["left_value"] == pytest.approx(1 - 0.5 * price, abs=1e-12)


def test_derive_without_anything_and_at_another_beta(answer):
    assert len(answer("derive")["prompts"]) == 2
    assert answer("derive", "--beta", 2)["beta"] == 2


def test_derive_from_yaml(answer, tmp_path):
    one = tmp_path / "one.yaml"
    one.write_text("beta: 1/2\nref: [0.6, 0.3, 0.1]\nreward: 1,0,2\n")
    words = answer("derive", *ENOUGH)
    assert answer("derive", "-c", one)["derivation"] == words["derivation"]
    several = tmp_path / "several.yaml"
    several.write_text(
        "beta: 0.5\nprompts:\n- {ref: [0.6, 0.3, 0.1], reward: [1, 0, 2]}\n- {ref: [0.5, 0.5], target: [0.9, 0.1]}\n"
    )
    found = answer("derive", "-c", several)
    assert [len(prompt["ref"]) for prompt in found["prompts"]] == [3, 2]
    assert found["prompts"][1]["p"] == pytest.approx([0.9, 0.1], abs=1e-12)  # the reward that has this target
    assert found["prompts"][1]["log_z"] == pytest.approx(0, abs=1e-12)
    assert found["derivation"]["worst"] < 1e-12
    assert answer("derive", "-c", several, "--beta", 3)["beta"] == 3


def test_check_an_order_and_a_changed_objective(klimb, answer):
    status, out, err = klimb("derive", "--check", "1,2,4,3,5,6")
    assert (status, err) == (0, "")
    assert "fails at step (4)" in out
    assert "≠" in out
    status, out, _ = klimb("derive", "--check", "no_beta", *ENOUGH)
    assert "fails at step (2)" in out
    assert "E_π[r] − β KL(π‖ref)" in out
    assert "what it prefers" in out
    status, out, _ = klimb("derive", "--check", "1,3,2,4,5,6")
    assert "✓" in out
    assert "fails" not in out
    found = answer("derive", "--check", "forward_kl", *ENOUGH)["check"]
    assert (found["right"], found["step"], found["elsewhere"]) == (False, 5, True)
    assert found["sides"]["left_value"] != pytest.approx(found["sides"]["right_value"], abs=1e-3)


def test_help_names_every_check():
    from klimb.exact.variants import VARIANTS

    assert tuple(VARIANTS) == CHECKS


def test_target(klimb, answer):
    found = answer("target", *ENOUGH)
    z = 0.6 * math.e**2 + 0.3 + 0.1 * math.e**4
    p = [0.6 * math.e**2 / z, 0.3 / z, 0.1 * math.e**4 / z]
    assert found["p"] == pytest.approx(p, abs=1e-12)
    assert found["log_z"] == pytest.approx(math.log(z), abs=1e-12)
    price = sum(a * math.log(a / b) for a, b in zip(p, (0.6, 0.3, 0.1), strict=True))
    assert found["kl_p_ref"] == pytest.approx(price, abs=1e-12)
    assert found["entropy"] == pytest.approx(-sum(a * math.log(a) for a in p), abs=1e-12)
    _, out, _ = klimb("target", *ENOUGH)
    for words in ("log Z", f"{math.log(z):.12f}", "KL(p‖ref)", "KL(ref‖p)", "H(p)", "E_p[r]"):
        assert words in out
    sweep = answer("target", *ENOUGH[:4], "--sweep", "0.1,0.5,1")["sweep"]
    assert [row["beta"] for row in sweep] == [0.1, 0.5, 1]
    assert sweep[1]["kl_p_ref"] == found["kl_p_ref"]
    assert sweep[0]["kl_p_ref"] > sweep[1]["kl_p_ref"] > sweep[2]["kl_p_ref"]
    assert "E_p[r]" in klimb("target", *ENOUGH[:4], "--sweep", "0.1,0.5,1")[1]
    forbidden = answer("target", "--ref", "0.5,0.5", "--reward", "1,-inf", "--beta", "1")
    assert forbidden["kl_ref_p"] == "Infinity"
    assert forbidden["p"] == [1, 0]


def test_divergence(klimb, answer):
    found = answer("divergence", "0.5,0.5,0", "0.8,0.1,0.1")
    rows = {row["name"]: row for row in found["divergences"]}
    assert rows["KL"]["forward"] == pytest.approx(0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(5), abs=1e-12)
    assert rows["KL"]["backward"] == "Infinity"
    assert rows["total variation"]["forward"] == pytest.approx(0.4, abs=1e-12)
    assert found["asymmetry"]["verdict"] == "covers"
    status, out, err = klimb("divergence", "0.5,0.5,0", "0.8,0.1,0.1", "--alpha", "0.3")
    assert (status, err) == (0, "")
    assert "covers too much" in out
    assert "alpha 0.3" in out
    assert "misses modes" in klimb("divergence", "0.5,0.5", "1,0")[1]


@pytest.fixture(scope="module")
def a_run(make_run, options, tmp_path_factory):
    """A finished run on the tiny model."""
    from klimb.cli import main

    folder = tmp_path_factory.mktemp("derive")
    settings = {**make_run(folder), "max_steps": 4}
    with pytest.raises(SystemExit) as ended:
        main(["climb", "-q", *map(str, options(settings))])
    assert not ended.value.code
    return folder / "run"


def test_derive_a_run(klimb, answer, a_run):
    found = answer("derive", a_run)
    assert found["derivation"]["holds"] is True
    assert found["derivation"]["worst"] < 1e-11
    about, measured = found["run"], read_json(a_run / "measure.json")
    assert found["beta"] == measured["beta"]
    assert about["prompts"] == 8
    assert about["draws"] == ["measure.parquet", "measure-reference.parquet"]
    assert 8 < about["completions"] <= 8 * 64
    assert sum(len(prompt["policy"]) for prompt in found["prompts"]) == about["completions"]
    assert 0 < about["mass"]["policy"] < 1
    for space in ("restricted", "weighted"):
        values = about[space]
        gap = found["beta"] * values["log_z"] - values["objective"]
        assert values["gap"] == pytest.approx(gap, abs=1e-12), space
    # weighted draws stand for the whole space, the restricted ones do not
    for name in ("reward", "log_z", "objective"):
        told = about["estimates"][name]
        assert told["low"] <= about["weighted"][name] <= told["high"], name
    assert about["estimates"]["gap"] == measured["gap"]
    assert about["estimates"]["kl_p"]["value"] == pytest.approx(measured["gap"]["value"] / found["beta"])
    status, out, _ = klimb("derive", a_run)
    assert status == 0
    for words in ("the run's policy", "whole space", "The chain holds", "["):
        assert words in out
    assert max(map(len, out.splitlines())) <= 80
    assert answer("derive", a_run, "--beta", 1)["run"]["estimates"] is None  # measured at another beta
    assert answer("derive", a_run, "--check", "no_beta")["check"]["right"] is False


def test_derive_a_run_that_was_only_planned(klimb, answer, a_run, tmp_path):
    (tmp_path / "draws").mkdir()
    for name in ("plan.json", "draws/plan.parquet"):
        (tmp_path / name).write_bytes((a_run / name).read_bytes())
    found = answer("derive", tmp_path)
    assert found["derivation"]["holds"] is True
    assert found["run"]["draws"] == ["plan.parquet"]
    assert found["run"]["weighted"] is None
    assert "a random policy" in klimb("derive", tmp_path)[1]


def test_help_is_there_at_once_and_loads_no_torch():
    code = "import sys, klimb.cli; print(sorted({'torch', 'numpy', 'rich.table', 'yaml'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "yaml"} & set(json.loads(out.replace("'", '"')))
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "klimb", "derive", "--help"], capture_output=True, check=True, env=os.environ
    )
    assert time.monotonic() - began < 5  # half a second on an idle machine


T = ("target", "--ref")
# name, arguments, words that the message must hold
CASES = [
    ("sum", [*T, "0.6,0.3", "--reward", "1,0", "--beta", "1"], ["ref", "sum to 0.9", "expected 1"]),
    ("sum zero", [*T, "0,0", "--reward", "1,0", "--beta", "1"], ["ref", "sum to 0"]),
    ("negative", [*T, "1.1,-0.1", "--reward", "1,0", "--beta", "1"], ["ref", "-0.1 at place 2"]),
    ("NaN", [*T, "0.5,nan", "--reward", "1,0", "--beta", "1"], ["ref", "nan at place 2"]),
    ("NaN reward", [*T, "0.5,0.5", "--reward", "nan,0", "--beta", "1"], ["reward", "nan at place 1"]),
    ("infinite reward", [*T, "0.5,0.5", "--reward", "inf,0", "--beta", "1"], ["reward", "inf at place 1"]),
    ("no number", [*T, "0.5,half", "--reward", "1,0", "--beta", "1"], ["ref", "'half' at place 2", "1/4"]),
    ("division by zero", [*T, "0.5,1/0", "--reward", "1,0", "--beta", "1"], ["ref", "'1/0'"]),
    ("empty", [*T, "", "--reward", "1", "--beta", "1"], ["ref", "''", "expected a number"]),
    ("lengths", [*T, "0.5,0.5", "--reward", "1,0,2", "--beta", "1"], ["2 probabilities", "3 rewards"]),
    ("beta 0", [*T, "0.5,0.5", "--reward", "1,0", "--beta", "0"], ["beta", "got 0", "above 0"]),
    ("beta negative", [*T, "0.5,0.5", "--reward", "1,0", "--beta", "-1"], ["beta", "got -1", "above 0"]),
    ("beta NaN", [*T, "0.5,0.5", "--reward", "1,0", "--beta", "nan"], ["beta", "nan", "above 0"]),
    ("beta infinite", [*T, "0.5,0.5", "--reward", "1,0", "--beta", "inf"], ["beta", "inf"]),
    (
        "beta no number",
        [*T, "0.5,0.5", "--reward", "1,0", "--beta", "low"],
        ["beta", "'low'", "expected a number"],
    ),
    ("sweep with 0", [*T, "0.5,0.5", "--reward", "1,0", "--sweep", "1,0"], ["beta", "got 0"]),
    ("no beta", [*T, "0.5,0.5", "--reward", "1,0"], ["--beta", "--sweep"]),
    ("all forbidden", [*T, "1,0", "--reward", "-inf,0", "--beta", "1"], ["forbidden", "no target"]),
    ("two lengths", ["divergence", "0.5,0.5", "1"], ["2 and 1 outcomes"]),
    ("P no law", ["divergence", "0.5,0.6", "0.5,0.5"], ["P", "1.1"]),
    ("share", ["divergence", "0.5,0.5", "1,0", "--share", "1"], ["share", "between 0 and 1"]),
    ("alpha", ["divergence", "0.5,0.5", "1,0", "--alpha", "x"], ["alpha", "'x'"]),
    ("half given", ["derive", "--ref", "0.5,0.5"], ["--ref", "--reward", "--beta"]),
    ("run and words", ["derive", "nowhere", *ENOUGH], ["one of a run"]),
    ("no such run", ["derive", "nowhere"], ["nowhere", "no such directory"]),
    ("no draws", ["derive", "."], ["neither measured nor planned", "klimb measure"]),
    ("no such file", ["derive", "-c", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
    ("policy length", ["derive", *ENOUGH, "--policy", "0.5,0.5"], ["policy", "got 2"]),
    ("policy no law", ["derive", *ENOUGH, "--policy", "0.5,0.4,0"], ["policy", "0.9"]),
    (
        "policy off ref",
        ["derive", "--ref", "1,0", "--reward", "1,1", "--beta", "1", "--policy", "0.8,0.2"],
        ["policy", "0.2 at place 2", "the reference has none"],
    ),
    ("unknown check", ["derive", "--check", "revrsed_kl"], ["revrsed_kl", "did you mean reversed_kl"]),
    ("step 7", ["derive", "--check", "1,2,7"], ["no step 7", "1 to 6"]),
    ("step twice", ["derive", "--check", "1,1,2"], ["step 1 is there 2 times"]),
]


@pytest.mark.parametrize(
    ("arguments", "words"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_bad_input(klimb, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = klimb(*arguments)
    assert (status, out) == (2, ""), (out, err)
    assert "Traceback" not in err
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


YAML = [
    ("unknown key", "beta: 1\nref: [1]\nrewrd: [1]", ["unknown key rewrd", "did you mean reward"]),
    ("no beta", "ref: [1]\nreward: [1]", ["holds no beta", "--beta"]),
    ("no ref", "beta: 1\nreward: [1]", ["expected ref"]),
    ("reward and target", "beta: 1\nref: [1]\nreward: [1]\ntarget: [1]", ["one of reward and target"]),
    (
        "target where ref has none",
        "beta: 1\nref: [1, 0]\ntarget: [0.9, 0.1]",
        ["target", "0.1 at place 2", "ref has 0"],
    ),
    (
        "second prompt",
        "beta: 1\nprompts:\n- {ref: [1], reward: [1]}\n- {ref: [0.5], reward: [1]}",
        ["prompt 2", "0.5"],
    ),
    ("not YAML", "beta: [", ["not YAML"]),
    ("a list", "- 1", ["got list"]),
    ("no prompts", "beta: 1\nprompts: []", ["prompts", "expected a list"]),
    ("a word", "beta: 1\nref: [one]\nreward: [1]", ["ref", "'one'"]),
    ("beta 0", "beta: 0\nref: [1]\nreward: [1]", ["beta", "above 0"]),
    (
        "one policy missing",
        "beta: 1\nprompts:\n- {ref: [1], reward: [1], policy: [1]}\n- {ref: [1], reward: [1]}",
        ["policy", "prompt 2"],
    ),
]


@pytest.mark.parametrize(("text", "words"), [case[1:] for case in YAML], ids=[case[0] for case in YAML])
def test_bad_yaml(klimb, tmp_path, text, words):
    path = tmp_path / "derive.yaml"
    path.write_text(text)
    status, out, err = klimb("derive", "-c", path)
    assert (status, out) == (2, "")
    assert "derive.yaml" in err or "policy" in err
    for word in words:
        assert word in err
