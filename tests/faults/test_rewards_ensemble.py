"""An ensemble of rewards: aggregates by hand, members scored once and kept, disagreement told, bad options refused."""

import json
import math
import re

import pytest
import torch

from klimb.config import load
from klimb.data import Draws, Example
from klimb.rewards.cache import reward_cache
from klimb.rewards.ensemble import Ensemble
from klimb.rewards.load import load_reward
from klimb.rewards.score import score
from klimb.rewards.source_hash import source_hash
from klimb.rewards.weighted_sum import weighted_sum
from klimb.run import climb

CALLS = []


def first(completions, **columns):
    CALLS.append("first")
    return [1.0, 2.0, -1.0]


def second(completions, **columns):
    CALLS.append("second")
    return [3.0, 2.0, 5.0]


def third(completions, **columns):
    CALLS.append("third")
    return [5.0, 2.0, 2.0]


DRAWS = Draws(
    [Example("Say hi.")],
    [[torch.tensor([5])] * 3],
    finished=torch.ones(1, 3, dtype=torch.bool),
    texts=[["a", "b", "c"]],
)
SPREAD = [math.sqrt(8 / 3), 0.0, math.sqrt(6)]  # of 1 3 5, of 2 2 2, of -1 5 2
BY_HAND = {
    "mean": [3.0, 2.0, 2.0],
    "min": [1.0, 2.0, -1.0],
    "lower": [m - s for m, s in zip([3.0, 2.0, 2.0], SPREAD, strict=True)],
}


@pytest.mark.parametrize("aggregate", BY_HAND)
def test_aggregates_by_hand(aggregate):
    CALLS.clear()
    reward = Ensemble((first, second, third), aggregate)
    found = score(reward, DRAWS)
    assert found.total[0].tolist() == pytest.approx(BY_HAND[aggregate], abs=1e-6)
    assert CALLS == ["first", "second", "third"]  # each once
    assert list(found.parts) == [
        "ensemble/first",
        "ensemble/second",
        "ensemble/third",
        "ensemble",
        "ensemble/spread",
    ]
    assert found.parts["ensemble/third"][0].tolist() == [5.0, 2.0, 2.0]
    assert found.parts["ensemble/spread"][0].tolist() == pytest.approx(SPREAD, abs=1e-6)
    assert reward(["x"] * 3, ["a", "b", "c"]) == pytest.approx(BY_HAND[aggregate])
    best = torch.tensor(BY_HAND[aggregate]).argmax().item()
    assert best == (0 if aggregate == "mean" else 1)  # careful ones take what nobody doubts


def test_beside_another_reward_and_with_a_weight():
    found = score(weighted_sum([Ensemble((first, second), "min"), third], [2.0, 0.0]), DRAWS)
    assert found.total[0].tolist() == [2.0, 4.0, -2.0]
    assert set(found.parts) == {"ensemble/first", "ensemble/second", "ensemble", "ensemble/spread", "third"}


def test_what_one_forbids_is_forbidden_and_what_one_does_not_judge_is_not_judged():
    def forbids(completions, **columns):
        return [-math.inf, 1.0, None]

    whole = weighted_sum([Ensemble((first, forbids), "lower"), third])
    found = score(whole, DRAWS)
    assert found.total[0].tolist() == [-math.inf, 2.0 + 1.5 - 0.5, 2.0]
    assert found.parts["ensemble/spread"].isnan()[0].tolist() == [True, False, True]


def test_members_are_cached_one_by_one(tmp_path):
    cache = reward_cache(tmp_path / "values.sqlite")
    CALLS.clear()
    for aggregate in ("min", "mean"):  # another aggregate asks nobody again
        found = score(weighted_sum([Ensemble((first, second), aggregate)], cache=cache), DRAWS)
        assert found.total[0].tolist() == {"min": [1, 2, -1], "mean": [2, 2, 2]}[aggregate]
    assert CALLS == ["first", "second"]


def test_its_hash_is_of_members_and_aggregate():
    hashes = {
        source_hash(Ensemble(members, aggregate, k))
        for members in ((first, second), (first, third))
        for aggregate in ("min", "lower")
        for k in (1.0, 2.0)
    }
    assert len(hashes) == 8
    assert source_hash(Ensemble((first, second), "min")) == source_hash(Ensemble((first, second), "min"))


def test_by_name_with_options(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def loud(completions, scale=1.0):\n    return [scale * c.count('!') for c in completions]\n"
    )
    spec = {
        "func": "ensemble",
        "models": [f"{file}:loud", {"func": f"{file}:loud", "scale": 3.0}],
        "aggregate": "min",
    }
    assert load_reward(spec)(["x"], ["a!!"]) == [2.0]


REFUSED = [
    ({"models": ["math:hypot"]}, "got 1 models, expected two or more"),
    ({"models": ["math:hypot", "math:hypott"]}, "did you mean 'hypot'"),
    ({"models": ["math:hypot"] * 2, "aggregate": "max"}, "aggregate: got 'max'"),
    ({"models": ["math:hypot"] * 2, "k": -1}, "k: got -1, expected 0 or more"),
    ({"model": ["math:hypot"] * 2}, "no option 'model' (did you mean 'models'?)"),
    ({}, "needs the option models"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_reward({"func": "ensemble", **options})


def test_a_run_keeps_the_members_and_tells_how_far_they_disagree(make_run, options, tmp_path, monkeypatch):
    monkeypatch.setattr("klimb.run.report", lambda path, watch=None: None)
    settings = make_run(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(
        "def brief(completions):\n    return [-len(c[-1]['content']) / 40 for c in completions]\n"
    )
    func = {"func": "ensemble", "models": [settings["reward_funcs"], f"{file}:brief"], "aggregate": "lower"}
    config = load(
        None,
        options(
            {
                **settings,
                "reward_funcs": [func, settings["reward_funcs"]],
                "reward_weights": [1, 0],
                "max_steps": 1,
            }
        ),
    )
    climb(config)
    found = json.loads((tmp_path / "run/measure.json").read_text())
    assert (
        "reward hacked" not in found["diagnosis"]["unmeasured"]
    )  # the reward of weight 0 is the audit, not a member
    rewards = found["rewards"]
    assert set(rewards) == {"ensemble/good", "ensemble/brief", "ensemble", "ensemble/spread", "good"}
    assert rewards["ensemble/spread"]["policy"]["value"] > 0
    assert rewards["ensemble/spread"]["policy"]["low"] < rewards["ensemble/spread"]["policy"]["high"]
