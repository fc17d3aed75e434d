"""The cache of rewards: nothing is scored twice, nothing is mixed up, and a broken file is one error."""

import math
import sqlite3
import subprocess
import sys

import pytest
import torch

from klimb.data import Draws, Example
from klimb.rewards.cache import reward_cache
from klimb.rewards.load import load_reward
from klimb.rewards.score import score
from klimb.rewards.source_hash import source_hash
from klimb.rewards.weighted_sum import weighted_sum

CHAT = [{"role": "user", "content": "hi"}]


def counting(values):
    """A reward that looks its values up, and the completions that it was asked for."""
    calls = []

    def reward(completions, level=None, **columns):
        calls.append(list(completions))
        return [values[c] for c in completions]

    return reward, calls


def test_nothing_is_scored_twice_within_a_batch_or_across_runs(tmp_path):
    values = {"a": 1.5, "b": -math.inf, "c": 2.0, "d": 0.1}
    reward, calls = counting(values)
    other, others = counting(values)
    file = tmp_path / "deep" / "cache.sqlite"
    for _ in range(2):  # another object, as of another run
        whole = weighted_sum([reward], cache=reward_cache(file))
        assert whole(["p"] * 4, ["a", "b", "a", "c"]) == [1.5, -math.inf, 1.5, 2.0]
    assert calls == [["a", "b", "c"]]
    assert whole(["p"] * 2, ["d", "b"]) == [0.1, -math.inf]
    assert whole(["p", "q", "p"], ["a", "a", "a"]) == [1.5, 1.5, 1.5]
    assert whole(["p", "p"], ["a", "a"], level=[1, 2]) == [1.5, 1.5]  # other columns, other keys
    assert calls[1:] == [["d"], ["a"], ["a", "a"]]
    with_weights = weighted_sum([reward, other], [2.0, 1.0], cache=reward_cache(file))
    assert source_hash(with_weights) == source_hash(weighted_sum([reward, other], [2.0, 1.0]))
    with_weights(["p"], ["a"])
    assert (calls[4:], others) == ([], [])  # one source, so one cache: `counting` made both


def test_none_is_kept_as_none(tmp_path):
    reward, calls = counting({"a": None, "b": 1.0})
    one, _ = counting({"a": 1.0, "b": 1.0})
    whole = weighted_sum([reward], cache=reward_cache(tmp_path / "cache"))
    draws = Draws(
        [Example("p")], [[torch.tensor([1])] * 2], torch.ones(1, 2, dtype=torch.bool), texts=[["b", "b"]]
    )
    assert score(whole, draws).total.tolist() == [[1.0, 1.0]]
    for _ in range(2):
        with pytest.raises(ValueError, match="got None from all"):
            whole(["p"], ["a"])
    assert calls == [["b"], ["a"]]
    assert one(["a"]) == [1.0]


def test_a_reward_whose_code_or_options_change_is_asked_again(tmp_path):
    mine, log = tmp_path / "mine.py", tmp_path / "log"
    code = (
        f"def reward(completions, *, scale=1.0):\n    with open({str(log)!r}, 'a') as f: f.write('x')\n"
        "    return [scale * len(c) for c in completions]\n"
    )

    def asked(code, **options):
        mine.write_text(code)
        part = load_reward({"func": f"{mine}:reward", **options})
        return weighted_sum([part], cache=reward_cache(tmp_path / "cache"))(["p"], ["abc"])[0]

    assert [asked(code), asked(code), asked(code, scale=2.0), asked(code, scale=2.0)] == [3.0, 3.0, 6.0, 6.0]
    assert log.read_text() == "xx"
    assert asked(code.replace("scale * len(c)", "7.0")) == 7.0
    assert log.read_text() == "xxx"
    # what a file reads while the run goes on is not what was loaded
    part = load_reward(f"{mine}:reward")
    whole = weighted_sum([part], cache=reward_cache(tmp_path / "cache"))
    mine.write_text(code.replace("scale * len(c)", "8.0"))
    assert whole(["p"], ["new"]) == [7.0]
    assert asked(code.replace("scale * len(c)", "8.0")) == 8.0


def test_a_reward_that_comes_with_klimb_is_keyed_by_the_columns_it_looks_at(tmp_path):
    whole = weighted_sum([load_reward("exact")], cache=reward_cache(tmp_path / "cache"))
    for ids in ([[1]], [[2]]):
        assert whole([CHAT], [[{"role": "assistant", "content": "a"}]], answer=["a"], completion_ids=ids) == [
            1.0
        ]
    with sqlite3.connect(tmp_path / "cache") as file:
        assert file.execute("SELECT count(*) FROM rewards").fetchone() == (1,)
    file.close()
    assert whole([CHAT], [[{"role": "assistant", "content": "a"}]], answer=["b"]) == [0.0]
    with pytest.raises(ValueError, match="reward exact asks for 'answer'"):
        whole(["p"], ["a"])


def test_errors_of_the_reward_are_not_kept(tmp_path):
    reward, calls = counting({"a": math.nan})
    whole = weighted_sum([reward], cache=reward_cache(tmp_path / "cache"))
    for _ in range(2):
        with pytest.raises(ValueError, match="got nan, expected a finite number"):
            whole(["p"], ["a"])
    assert len(calls) == 2


@pytest.mark.parametrize("broken", ["text", "cut", "folder", "another table"])
def test_a_file_that_is_no_cache_is_one_error(tmp_path, broken):
    path = tmp_path / "cache.sqlite"
    if broken == "text":
        path.write_text("reward: 1\n" * 100)
    elif broken == "folder":
        path.mkdir()
    elif broken == "another table":
        with sqlite3.connect(path) as file:
            file.execute("CREATE TABLE rewards (name TEXT)")
        file.close()
    else:
        reward, _ = counting({str(i): float(i) for i in range(500)})
        names = [str(i) for i in range(500)]
        weighted_sum([reward], cache=reward_cache(path))(["p"] * 500, names)
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(
        ValueError, match=rf"reward_cache {path}: got a file that is no cache .*; delete it, or name"
    ):
        reward_cache(path)


PROCESS = """
import sys
from klimb.rewards.cache import reward_cache
from klimb.rewards.weighted_sum import weighted_sum
def reward(completions): return [float(len(c)) for c in completions]
whole = weighted_sum([reward], cache=reward_cache(sys.argv[1]))
for i in range(150):
    texts = ["a" * (1 + (i * int(sys.argv[2]) + j) % 97) for j in range(20)]
    assert whole(["p"] * 20, texts) == [float(len(t)) for t in texts]
"""


def test_two_processes_at_once(tmp_path):
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path / "cache"), str(step)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for step in (7, 11, 13)
    ]
    for run in runs:
        assert run.communicate(timeout=120)[1] == ""
        assert run.returncode == 0
    with sqlite3.connect(tmp_path / "cache") as file:
        assert file.execute("SELECT count(DISTINCT value) FROM rewards").fetchone() == (97,)
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    file.close()
