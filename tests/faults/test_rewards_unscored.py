"""A reward server that is slow, dies, or answers nonsense for one row: no draw is lost, none is made twice."""

import json
import re
import threading
import time

import pytest
import torch

from klimb.rewards.cache import reward_cache
from klimb.rewards.load import load_reward
from klimb.rewards.score import score
from klimb.rewards.unscored import Unscored
from klimb.rewards.weighted_sum import weighted_sum
from klimb.samplers import ancestral as drawing
from klimb.store import draws_path, read_draws

stamina = pytest.importorskip("stamina")
pytest.importorskip("httpx2")
from serving import serving  # noqa: E402


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with stamina.set_testing(True, attempts=2, cap=True):
        yield


def letters(path, headers, payload):
    return 200, {"rewards": [len(str(c)) for c in payload["completions"]]}


def failing(reward, completions, **columns):
    with pytest.raises(Unscored) as raised:
        reward(["p"] * len(completions), list(completions), **columns)
    return raised.value


def test_nonsense_for_one_row_costs_that_row(monkeypatch):
    def answer(path, headers, payload):
        return 200, {"rewards": ["?" if c == "bad" else len(c) for c in payload["completions"]]}

    with serving(answer) as url:
        reward = load_reward({"func": "http", "url": url, "batch_size": 3})
        error = failing(reward, ["a", "bad", "ccc", "dd", "e"])
    assert error.values == [1, None, 3, 2, 1]
    assert error.missing == {1}
    assert re.search(r"'{\"rewards\": .*rewards\.1: Input should be a valid number", str(error))


def test_one_that_dies_midway_keeps_what_it_gave_and_is_asked_no_more():
    calls = []

    def answer(path, headers, payload):
        calls.append(payload["completions"])
        return (503, "dead") if len(calls) > 2 else letters(path, headers, payload)

    with serving(answer) as url:
        spec = {"func": "http", "url": url, "batch_size": 2, "concurrency": 1}
        error = failing(load_reward(spec), list("abcdefghij"))
    assert error.values == [1] * 4 + [None] * 6
    assert error.missing == set(range(4, 10))
    assert "asked 2 times" in str(error)
    assert len(calls) == 4  # two answers, two attempts at the third question, none at the others


def test_no_more_questions_are_under_way_than_may_be():
    now, most, lock = 0, 0, threading.Lock()

    def answer(path, headers, payload):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.05)
        with lock:
            now -= 1
        return letters(path, headers, payload)

    with serving(answer) as url:
        for concurrency in (1, 3):
            most = 0
            spec = {"func": "http", "url": url, "batch_size": 1, "concurrency": concurrency}
            assert load_reward(spec)(["p"] * 9, [("ab" * i)[:i] for i in range(9)]) == list(range(9))
            assert most == concurrency
    with pytest.raises(ValueError, match="option concurrency: got 0, expected 1 or more"):
        load_reward({"func": "http", "url": url, "concurrency": 0})


def test_a_cache_keeps_what_came(tmp_path):
    alive = [False]

    def answer(path, headers, payload):
        if "cc" in payload["completions"] and not alive[0]:
            return 500, "dead"
        seen.append(payload["completions"])
        return letters(path, headers, payload)

    seen = []
    with serving(answer) as url:
        spec = {"func": "http", "url": url, "batch_size": 1, "concurrency": 1}
        reward = weighted_sum([load_reward(spec)], cache=reward_cache(tmp_path / "cache.sqlite"))
        error = failing(reward, ["a", "a", "cc", "b"])
        assert (error.values, error.missing) == ([1, 1, None, None], {2, 3})
        alive[0] = True
        assert reward(["p"] * 4, ["a", "a", "cc", "b"]) == [1, 1, 2, 1]
    assert seen == [["a"], ["cc"], ["b"]]  # what was known is not asked again


def test_a_judge_keeps_its_scores(monkeypatch):
    def answer(path, headers, payload):
        text = payload["messages"][0]["content"]
        if "second" in text:
            return 400, "no"
        return 200, {"choices": [{"message": {"content": "Score: 10"}}]}

    with serving(answer) as url:
        spec = {"func": "judge", "url": url, "model": "m", "rubric": "r", "concurrency": 1}
        error = failing(load_reward(spec), ["first", "second", "third"])
    assert (error.values, error.missing) == ([1.0, None, None], {1, 2})


def test_who_cannot_wait_gets_an_error_and_who_can_gets_the_rest(tiny_model):
    from klimb.data import Draws, Example

    draws = Draws(
        [Example("p")],
        [[torch.tensor([1])] * 3],
        torch.ones(1, 3, dtype=torch.bool),
        texts=[["a", "bad", "c"]],
    )

    def answer(path, headers, payload):
        return 200, {"rewards": ["?" if c == "bad" else 2 for c in payload["completions"]]}

    with serving(answer) as url:
        both = weighted_sum(
            [load_reward({"func": "http", "url": url}), lambda completions: [1.0] * len(completions)]
        )
        with pytest.raises(ValueError, match="reward http: "):
            score(both, draws)
        said = []
        found = score(both, draws, unscored=said)
    assert found.total.nan_to_num(-1).tolist() == [[3, -1, 3]]
    assert found.parts["http"].nan_to_num(-1).tolist() == [[2, -1, 2]]
    assert len(said) == 1


# A plan whose reward server fails.


@pytest.fixture
def counted(monkeypatch):
    """How many completions were drawn."""
    rows = []
    decode = drawing._decode

    def counting(policy, examples, num_draws, uniforms, **options):
        rows.append(len(uniforms))
        return decode(policy, examples, num_draws, uniforms, **options)

    monkeypatch.setattr(drawing, "_decode", counting)
    monkeypatch.setattr("klimb.run.report", lambda path, watch=None: None)
    monkeypatch.setattr("klimb.pool.ROWS_AT_ONCE", 96)  # several pieces, so that one can die between them
    return rows


def good(payload):
    said = [c if isinstance(c, str) else c[-1]["content"] for c in payload["completions"]]
    return {"rewards": [sum(w in ("good", "great", "fine", "warm") for w in s.split()) / 4 for s in said]}


def planned(klimb, options, tiny_run, url, folder, **changes):
    data = folder.parent / "rewards.json"
    data.write_text(json.dumps({"func": "http", "url": url, "batch_size": 32, "concurrency": 1}))
    settings = {**tiny_run, "output_dir": str(folder), **changes}
    settings["reward_funcs"] = [{"func": "http", "url": url, "batch_size": 32, "concurrency": 1}]
    return klimb("plan", *options(settings))


def without_place(folder):
    record = json.loads((folder / "plan.json").read_text())
    return {**record, "beta": record["beta"]["value"]}


def test_a_plan_keeps_its_draws_and_a_resume_scores_them(klimb, options, tiny_run, tmp_path, counted):
    asked, alive = [], [True]

    def answer(path, headers, payload):
        asked.append(len(payload["completions"]))
        if not alive[0] and len(asked) > 5:
            return 503, "dead"
        return 200, good(payload)

    with serving(answer) as url:
        status, _, err = planned(klimb, options, tiny_run, url, tmp_path / "whole")
        assert status == 0, err
        drawn, rows = sum(counted), sum(asked)
        assert drawn == rows == 16 * 32
        counted.clear()
        asked.clear()
        alive[0] = False
        run = tmp_path / "run"
        status, _, err = planned(klimb, options, tiny_run, url, run)
        text = " ".join(err.split())
        assert status == 2
        assert "Traceback" not in err
        assert "got status 503 and 'dead'" in text
        assert f"{16 * 32 - 5 * 32} of {16 * 32} completions are not scored yet" in text
        assert f"--resume {run} scores them" in text
        assert sum(counted) == drawn  # all are drawn, also those after the reward died
        kept = read_draws(draws_path(run, "plan"))
        assert int(kept.reward.isnan().sum()) == 16 * 32 - 5 * 32
        assert not (run / "plan.json").exists()

        # still dead: nothing changes
        status, _, err = klimb("plan", "--resume", run)
        assert status == 2
        assert "not scored yet" in err
        # another run does not take what is not scored for a pool
        alive[0] = True
        status, _, err = planned(klimb, options, tiny_run, url, tmp_path / "other", plan=str(run))
        assert status == 2
        assert "not scored yet" in err
        assert not (tmp_path / "other").exists()

        counted.clear()
        asked.clear()
        status, _, err = klimb("plan", "--resume", run)
        assert status == 0, err
        assert counted == []  # no draw twice
        assert sum(asked) == 16 * 32 - 5 * 32  # and no row that had its number
    assert without_place(run) == without_place(tmp_path / "whole")
    first, second = (read_draws(draws_path(tmp_path / name, "plan")) for name in ("whole", "run"))
    assert first.reward.equal(second.reward)
    assert first.reward_parts["http"].equal(second.reward_parts["http"])
    assert first.draws.texts == second.draws.texts
    assert first.log_ref.equal(second.log_ref)


def test_a_server_that_is_away_for_a_while_is_asked_once_more(klimb, options, tiny_run, tmp_path, counted):
    asked = []

    def answer(path, headers, payload):
        asked.append(1)
        return (503, "starting") if 3 <= len(asked) <= 4 else (200, good(payload))

    with serving(answer) as url:
        status, _, err = planned(klimb, options, tiny_run, url, tmp_path / "run")
    assert status == 0, err
    assert not read_draws(draws_path(tmp_path / "run", "plan")).reward.isnan().any()
    assert (tmp_path / "run/plan.json").is_file()
