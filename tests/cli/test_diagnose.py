"""klimb diagnose on runs of the tiny model, each with a fault put in on purpose; and that every command it names is one."""

import json
import shlex

import pytest
import yaml

from klimb import screen_diagnose
from klimb.diagnosis import _read, _setting, diagnosed
from klimb.numbers import diagnose as judging
from klimb.numbers.evidence import Evidence
from klimb.numbers.next_run import Setting
from klimb.numbers.rules import TABLE
from klimb.store import read_json, read_jsonl

FAULTS = '''

def rare(prompts, completions, **columns):
    """Good words count for one prompt in eight, the others get the same number."""
    said = good(completions)
    return [x if " good " in p[-1]["content"] else 0.5 for p, x in zip(prompts, said)]


def bad(completions, **columns):
    """The opposite of `good`."""
    return [-x for x in good(completions)]


def ended(completions, completion_ids, **columns):
    """Only what ended by itself earns anything."""
    return [1.0 if ids[-1] == 1 else 0.0 for ids in completion_ids]
'''
LARGER = {"prompts_per_step": 8, "num_generations": 8, "num_replay": 8, "measure_draws": 64, "max_steps": 30}


@pytest.fixture
def run(klimb, tiny_run, options, tmp_path, no_report):
    """Climb with other options: the run's directory."""

    def climb(verb="climb", **changes):
        rewards = tmp_path / "rewards.py"
        if "def rare" not in rewards.read_text():
            rewards.write_text(rewards.read_text() + FAULTS)
        settings = {**tiny_run, "save_steps": 100, **changes}
        status, _, err = klimb(verb, "-q", *options(settings))
        assert status == 0, err
        return tmp_path / "run"

    return climb


def verdicts(klimb, run, *arguments):
    status, out, err = klimb("diagnose", run, "--json", *arguments)
    assert status == 0, err
    return json.loads(out)


def test_a_healthy_run_has_no_fault_and_measure_says_what_diagnose_says(klimb, run):
    path = run(**LARGER)
    found = verdicts(klimb, path)
    names = {v["name"] for v in found["verdicts"]}
    assert names <= {"undertrained", "close to the best", "no fault found", "capacity", "cannot tell"}
    assert found == read_json(path / "measure.json")["diagnosis"]
    assert set(found["shares"]) | set(found["unmeasured"]) <= {rule.name for rule in TABLE}
    assert found["unmeasured"] == {"reward hacked": ["audit_gain"]}
    for out in (klimb("diagnose", path)[1], klimb("measure", path, "-q")[1]):
        assert found["verdict"] in " ".join(out.split())
    assert "ruled out:" in klimb("diagnose", path)[1]
    # a reward that falls while the own one rises
    hacked = verdicts(klimb, path, "--audit", f"{path.parent}/rewards.py:bad")
    assert hacked["verdict"] == "reward hacked"
    assert verdicts(klimb, path, "--audit", f"{path.parent}/rewards.py:good")["shares"]["reward hacked"] == 0


def test_a_reward_of_weight_zero_is_the_audit(klimb, run, tmp_path):
    rewards = [f"{tmp_path}/rewards.py:good", f"{tmp_path}/rewards.py:bad"]
    path = run(**LARGER, reward_funcs=rewards, reward_weights=[1, 0])
    assert verdicts(klimb, path)["verdict"] == "reward hacked"


def test_a_learning_rate_far_too_small(klimb, run):
    found = verdicts(klimb, run(learning_rate=1e-6))
    assert found["verdict"] == "hardly moved"
    assert found["confidence"] == "sure"
    assert "--learning_rate 1e-05" in found["command"]
    assert any("KL to the reference" in line for line in found["verdicts"][0]["evidence"])


def test_a_beta_far_too_high(klimb, run):
    found = verdicts(klimb, run(kl_budget=None, beta=5.0))
    assert found["verdict"] == "beta too high"
    beta = float(shlex.split(found["command"])[-1])
    assert 0.01 < beta < 1
    assert "would earn" in found["advice"]


def test_a_reward_that_is_constant_on_most_prompts(klimb, run, tmp_path):
    path = run(reward_funcs=f"{tmp_path}/rewards.py:rare", kl_budget=None, beta=0.1)
    found = verdicts(klimb, path)
    assert found["verdict"] == "reward flat"


def test_completions_that_are_cut(klimb, run, tmp_path):
    changes = {"reward_funcs": f"{tmp_path}/rewards.py:ended", "kl_budget": None, "beta": 2.0}
    found = verdicts(klimb, run(**changes, max_completion_length=4, max_steps=1))
    assert "completions truncated" in {v["name"] for v in found["verdicts"]}


def test_a_run_that_only_planned_or_was_stopped_or_not_measured(klimb, run):
    path = run("plan")
    found = verdicts(klimb, path)
    assert found["verdict"] == "not measured"
    assert found["command"] == f"klimb climb --resume {path}"
    assert {"beta too high", "reward flat", "exploration-limited"} <= set(found["shares"])
    assert klimb("train", "-q", "--resume", path)[0] == 0
    assert verdicts(klimb, path)["command"] == f"klimb measure {path}"
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(lines[:3]))
    found = verdicts(klimb, path)
    assert (found["verdict"], found["confidence"]) == ("stopped early", "known")
    assert len(read_jsonl(path / "metrics.jsonl")) == 3  # it only looks
    (path / "draws" / "plan.parquet").unlink()
    assert "beta too high" in verdicts(klimb, path)["unmeasured"]


def test_every_command_of_the_table_is_one_that_the_command_line_takes(klimb, run):
    path = run("plan")
    setting = _setting(_read(path, None))
    planned = diagnosed(path)
    assert planned.verdict == "not measured"
    from klimb.diagnosis import _planned

    found = _planned(_read(path, None))
    lora, soft = setting.config["family"], {"kind": "soft_prompt", "num_virtual_tokens": 4, "init": "random"}
    for family in (lora, {**lora, "layers": 1}, soft, {"kind": "full"}):
        config = {**setting.config, "family": family}
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        for rule in TABLE:
            command = rule.command(found, Setting(str(path), config))
            words = shlex.split(command)
            if rule.name == "capacity" and family["kind"] == "full":
                assert not words  # nothing is larger but another model
                continue
            assert words[0] == "klimb"
            if words[1] == "sample" or "--resume" in words:
                continue
            assert klimb(*words[1:], "--dry-run")[0] == 0, command
    assert isinstance(found, Evidence)


def test_shares_that_are_written_twice_are_the_same():
    assert (screen_diagnose.UNLIKELY, screen_diagnose.LIKELY) == (judging.UNLIKELY, judging.LIKELY)


def test_a_run_without_a_reward_says_so(klimb, run, options, tiny_run, tmp_path):
    settings = {"target.kind": "context", "target.context": "be kind", "method": "distill", "kl_budget": None}
    path = run(**settings, reward_funcs=[], num_replay=0)
    found = verdicts(klimb, path)
    assert found["verdict"] == "not measured"
    assert "No reward" in found["verdicts"][0]["says"]
    assert found["command"] == f"klimb report {path}"


def test_files_that_are_none_are_named(klimb, run):
    path = run("plan")
    (path / "measure.json").write_text("[1]")
    status, out, err = klimb("diagnose", path)
    assert status == 2
    assert "measure.json" in err
    assert "Traceback" not in out + err
    (path / "measure.json").unlink()
    (path / "draws" / "measure.parquet").write_text("no parquet")
    status, _, err = klimb("diagnose", path)
    assert status == 2
    assert "measure.parquet" in err
