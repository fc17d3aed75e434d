"""A tracker is told what the run's files hold, and is ended however the run ends."""

import pytest

from klimb.config import load
from klimb.run import climb, run_measure, run_plan, run_train
from klimb.store import read_json, read_jsonl
from klimb.watch import Watch

pytest.importorskip("tensorboard")
pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def ended(monkeypatch):
    """How often trackers were ended."""
    from accelerate import Accelerator

    calls, real = [], Accelerator.end_training

    def counted(self):
        calls.append(len(self.trackers))
        real(self)

    monkeypatch.setattr(Accelerator, "end_training", counted)
    return calls


@pytest.fixture
def config(tiny_run, options):
    return load(None, options({**tiny_run, "report_to": "tensorboard", "max_steps": 3, "eval_steps": 2}))


def arrived(run):
    """Name -> {step: number}, of all that lies there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for folder in {file.parent for file in run.rglob("events.out.tfevents.*")}:
        events = EventAccumulator(str(folder)).Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({e.step: e.value for e in events.Scalars(name)})
    return found


def single(value):
    return pytest.approx(value, rel=1e-6, abs=1e-12)  # a tracker keeps float32


def test_numbers_of_plan_steps_and_measure_arrive(config, ended):
    run = climb(config).path
    found, plan, measure = arrived(run), read_json(run / "plan.json"), read_json(run / "measure.json")
    for record in read_jsonl(run / "metrics.jsonl"):
        assert found["kl"][record["step"]] == single(record["kl"]["value"])
        assert found["sampler_error_mean"][record["step"]] == single(record["sampler_error_mean"])
        assert found["seconds/update"][record["step"]] == single(record["seconds"]["update"])
    held_out = read_jsonl(run / "metrics.jsonl")[1]["evaluation"]["gap"]["value"]
    assert found["evaluation/gap"] == {2: single(held_out)}
    assert found["plan/beta"] == {0: single(plan["beta"]["value"])}
    assert found["plan/optimum/reward"] == {0: single(plan["optimum"]["reward"]["value"])}
    assert found["measure/attained"] == {3: single(measure["attained"]["value"])}
    assert found["measure/reference/reward"] == {3: single(measure["reference"]["reward"]["value"])}
    assert ended == [1]


def test_a_stopped_run_ends_its_tracker_and_a_resumed_one_goes_on_in_it(config, ended):
    assert climb(config, watch=Watch(stop=lambda: True)).interrupted
    assert ended == [1]
    run = climb(config, resume=True).path
    assert ended == [1, 1]
    found = arrived(run)
    assert sorted(found["kl"]) == [1, 2, 3]
    assert sorted(found["measure/gap"]) == [3]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_run_that_fails_ends_it_too(config, ended, monkeypatch, error):
    def fails(*arguments, **named):
        raise error

    monkeypatch.setattr("klimb.store.save_checkpoint", fails)
    with pytest.raises(error):
        run_train(config)
    assert ended == [1]


def test_plan_and_measure_by_themselves(config, ended):
    run = run_plan(config).path
    assert sorted(arrived(run)["plan/optimum/kl"]) == [0]
    run_train(config, resume=True)
    settled = config.model_copy(update={"beta": read_json(run / "plan.json")["beta"]["value"]})
    run_measure(settled, policy_folder=run / "policy", output_dir=run)
    assert sorted(arrived(run)["measure/kl"]) == [3]
    run_measure(settled, policy_folder=run / "policy")  # writes nothing, and so tells nobody
    assert ended == [1, 1, 1]


def test_a_plan_that_cannot_be_leaves_nothing_of_a_tracker(klimb, tiny_run, options, tmp_path):
    asked = {**tiny_run, "report_to": "tensorboard", "kl_budget": None, "reward_goal": 9}
    assert klimb("plan", "-q", *options(asked))[0] == 2
    assert not (tmp_path / "run").exists()


def test_nobody_is_told_where_no_tracker_is_named(tiny_run, options, ended):
    run = run_plan(load(None, options(tiny_run))).path
    assert (arrived(run), ended) == ({}, [])
