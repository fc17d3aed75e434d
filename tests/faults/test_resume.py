"""A run killed at any moment and resumed ends in the numbers of one never killed, bit by bit."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from klimb import run as edge
from klimb import training
from klimb.config import load
from klimb.numbers.kl_control import adapted_beta
from klimb.run import climb, run_train
from klimb.store import load_latest_checkpoint, read_draws, read_jsonl
from klimb.watch import Watch

SEED = 20  # of the moments to kill at
PRELOAD = ["klimb.run", "peft", "transformers.models.llama.modeling_llama"]


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr(edge, "report", lambda path, watch: None)


@pytest.fixture(scope="module")
def settings(make_run, options, tmp_path_factory):
    """Everything that a checkpoint has to remember plays a part: average, warm-up, replay, passes over the data."""
    changes = {
        "max_steps": 8,
        "save_steps": 3,
        "prompts_per_step": 3,
        "ema_decay": 0.5,
        "warmup_steps": 2,
        "replay_steps": 1,
    }
    return load(None, options({**make_run(tmp_path_factory.mktemp("resume")), **changes}))


def at(settings, folder):
    return settings.model_copy(update={"output_dir": str(folder)})


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    """A run never stopped, measured too."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    child(at(settings, folder), resume=False)
    return folder


def stopped_after(steps, config):
    """The directory of a training that was asked to stop after so many steps, and did."""
    seen = []
    watch = Watch(
        event=lambda kind, record: seen.append(kind) if kind == "step" else None,
        stop=lambda: len(seen) == steps,
    )
    outcome = run_train(config, watch=watch)
    assert (outcome.step, outcome.interrupted) == (steps, True)
    return outcome.path


@pytest.fixture(scope="module")
def four_steps(settings, tmp_path_factory):
    """A run that was asked to stop after four of its eight steps."""
    return stopped_after(4, at(settings, tmp_path_factory.mktemp("four") / "run"))


@pytest.fixture
def interrupted(four_steps, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(four_steps, tmp_path / "run"))


@pytest.fixture
def config(settings, tmp_path):
    return at(settings, tmp_path / "run")


def steps_of(run):
    return [
        {**record, "seconds": None, "tokens_per_second": None} for record in read_jsonl(run / "metrics.jsonl")
    ]


def everything(run):
    """All that must not depend on kills: metrics without timings, weights, state, draws, certificate."""
    newest = load_latest_checkpoint(run / "checkpoints")
    assert newest.warnings == []
    return {
        "metrics": steps_of(run),
        "policy": (run / "policy/adapter_model.safetensors").read_bytes(),
        "checkpoint": {name: t.numpy().tobytes() for name, t in newest.tensors.items()},
        "state": newest.state,
        "draws": {
            path.name: [
                read_draws(path).draws.texts,
                read_draws(path).reward.tolist(),
                read_draws(path).log_ref.tolist(),
            ]
            for path in sorted((run / "draws").iterdir())
        },
        # its diagnosis names commands, and they the run
        "measure": json.loads((run / "measure.json").read_text().replace(str(run), "RUN"))
        if (run / "measure.json").exists()
        else None,
        "files": sorted(str(p.relative_to(run)) for p in run.rglob("*")),
    }


def child(config, resume):
    """Plan, train and measure, without the page."""
    torch.set_num_threads(1)
    drawn, edge.report = edge.report, lambda path, watch: None
    climb(config, resume=resume)
    edge.report = drawn


def test_killed_at_random_moments(config, whole, tmp_path):
    never_killed, killed = everything(whole), tmp_path / "run"
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    moments = random.Random(SEED)
    kills, was_at = 0, []
    for steps in (0, 1, 4, 7):  # after so many records, and a random moment more
        resume = (killed / "config.yaml").is_file()
        process = processes.Process(target=child, args=(config, resume))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and time.monotonic() < deadline:
            there = (
                (killed / "metrics.jsonl").read_bytes().count(b"\n")
                if (killed / "metrics.jsonl").exists()
                else 0
            )
            if there >= steps and (killed / "config.yaml").is_file():
                time.sleep(moments.uniform(0, 0.05))
                break
            time.sleep(0.001)
        if process.is_alive():
            process.kill()
            kills += 1
        process.join()
        was_at.append(len(read_jsonl(killed / "metrics.jsonl")) if (killed / "metrics.jsonl").exists() else 0)
    assert kills >= 3, was_at
    process = processes.Process(target=child, args=(config, True))
    process.start()
    process.join(60)
    assert process.exitcode == 0

    after = everything(killed)
    for name, value in never_killed.items():
        assert after[name] == value, (name, was_at)


def test_asked_to_stop_and_resumed(config, interrupted, whole):
    assert not (interrupted / "policy").exists()
    outcome = climb(config, resume=True)
    assert (outcome.step, outcome.interrupted) == (8, False)
    a, b = everything(interrupted), everything(whole)
    a.pop("files"), b.pop("files")  # other checkpoints were written
    assert a == b


def resumed_warnings(config):
    said = []
    climb(
        config,
        resume=True,
        watch=Watch(event=lambda kind, what: said.append(what) if kind == "warning" else None),
    )
    return [line for line in said if "was begun with" in line]


def begun_elsewhere(run):
    """As if another torch had begun it, and with the loops where there are none now, or without."""
    env = json.loads((run / "env.json").read_text())
    env["versions"]["torch"] = "1.0"
    env["compiled_loops"] = not env["compiled_loops"]
    (run / "env.json").write_text(json.dumps(env))


def test_a_run_that_goes_on_under_other_versions_or_without_the_loops_says_so(config, interrupted):
    begun_elsewhere(interrupted)
    (line,) = resumed_warnings(config)
    assert "torch 1.0, now " in line
    assert "compiled loops, now " in line
    assert "numpy" not in line


def test_a_reward_model_that_goes_on_under_other_versions_says_so(rewarding, tmp_path):
    config = at(rewarding, tmp_path / "run")
    begun_elsewhere(stopped_after(4, config))
    (line,) = resumed_warnings(config)
    assert "torch 1.0, now " in line
    assert "compiled loops, now " in line


@pytest.mark.parametrize("env", ["as it was", "gone"])
def test_a_run_that_goes_on_as_it_began_says_nothing_of_versions(config, interrupted, env):
    if env == "gone":  # of a run that is older than the file
        (interrupted / "env.json").unlink()
    assert resumed_warnings(config) == []


def test_a_run_that_is_older_than_an_option_goes_on_with_its_default(config, interrupted, whole):
    """Options of today that its config.yaml lacks, also one of the family, mean what they mean to whoever leaves them out."""
    file = interrupted / "config.yaml"
    written = yaml.safe_load(file.read_text())
    for where, name in (
        (written, "max_grad_norm"),
        (written, "judge"),
        (written["family"], "target_modules"),
    ):
        assert where.pop(name) is not None  # null and nothing were the same before
    file.write_text(yaml.safe_dump(written))
    another = config.model_copy(update={"max_grad_norm": 2.5})
    with pytest.raises(
        ValueError, match=r"its max_grad_norm differ \(max_grad_norm: got 2.5, there it is 1.0\)"
    ):
        climb(another, resume=True)
    assert climb(config, resume=True).step == 8
    assert steps_of(interrupted) == steps_of(whole)


# what a checkpoint would have to forget: every piece is needed for the same end
FORGETS = {
    "generator": lambda c: replace(
        c, tensors={**c.tensors, "generator": torch.Generator().manual_seed(1).get_state()}
    ),
    "weights": lambda c: replace(c, tensors=scaled(c, "weights.")),
    "average": lambda c: replace(c, tensors=scaled(c, "average.")),
    "optimizer": lambda c: replace(c, tensors=scaled(c, "optimizer.")),
    "order": lambda c: replace(c, state={**c.state, "order": c.state["order"][::-1]}),
    "scheduler": lambda c: replace(
        c, state={**c.state, "scheduler": {**c.state["scheduler"], "last_epoch": 0}}
    ),
    "replay": lambda c: replace(
        c,
        tensors={**c.tensors, "replay.numbers": c.tensors["replay.numbers"].flip(0)},
    ),
}


def scaled(checkpoint, prefix):
    return {n: t * 1.5 if n.startswith(prefix) else t for n, t in checkpoint.tensors.items()}


def misremember(monkeypatch, changed):
    """From here on a checkpoint is read as `changed` makes it."""
    real = edge.store.load_latest_checkpoint
    monkeypatch.setattr(edge.store, "load_latest_checkpoint", lambda folder: changed(real(folder)))


@pytest.mark.parametrize("piece", FORGETS)
def test_a_checkpoint_that_forgets_a_piece_ends_elsewhere(config, interrupted, whole, monkeypatch, piece):
    misremember(monkeypatch, FORGETS[piece])
    run_train(config, resume=True)
    files = [run / "policy/adapter_model.safetensors" for run in (interrupted, whole)]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_what_came_after_the_checkpoint_is_removed_before_anything_new_is_written(config, interrupted, whole):
    """The moment after a step was written down and before its checkpoint was, made by hand."""
    shutil.rmtree(interrupted / "checkpoints/step-000004")
    assert len(steps_of(interrupted)) == 4  # the checkpoint is of step 3
    assert run_train(config, resume=True).step == 8
    assert steps_of(interrupted) == steps_of(whole)
    assert [r["step"] for r in steps_of(interrupted)] == list(range(1, 9))


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(klimb, config, whole, tmp_path, monkeypatch):
    real = edge.store.append_jsonl

    def interrupted_at_three(path, *records):
        real(path, *records)
        if records[0]["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config.model_dump()))  # JSON is YAML
    monkeypatch.setattr(edge.store, "append_jsonl", interrupted_at_three)
    status, _, err = klimb("train", "-q", "-c", file)
    monkeypatch.undo()
    run = tmp_path / "run"
    assert status == 130
    assert f"klimb train --resume {run}" in err
    assert [record["step"] for record in steps_of(run)] == [1, 2]
    monkeypatch.setattr(edge, "report", lambda path, watch: None)
    assert klimb("train", "-q", "--resume", run)[0] == 0
    assert (run / "policy/adapter_model.safetensors").read_bytes() == (
        whole / "policy/adapter_model.safetensors"
    ).read_bytes()


def stopped_in_the_last_step(config, verb):
    """A watch that is asked to stop while the last step is being taken."""
    seen = []
    watch = Watch(
        event=lambda kind, record: seen.append(record["step"]) if kind == "step" else None,
        stop=lambda: seen == list(range(1, config.max_steps + 1)),
    )
    return verb(config, watch=watch)


def test_asked_to_stop_in_the_last_step_a_climb_does_not_measure(config, whole):
    outcome = stopped_in_the_last_step(config, climb)
    assert (outcome.step, outcome.interrupted, outcome.measurement) == (8, True, None)
    assert not (outcome.path / "measure.json").exists()
    went_on = climb(config, resume=True)
    assert (went_on.step, went_on.interrupted) == (8, False)
    assert everything(went_on.path) == everything(whole)


def test_asked_to_stop_in_the_last_step_a_training_is_simply_done(config, whole):
    outcome = stopped_in_the_last_step(config, run_train)
    assert (outcome.step, outcome.interrupted) == (8, False)
    files = [run / "policy/adapter_model.safetensors" for run in (outcome.path, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_ctrl_c_in_the_last_step_of_a_climb_says_how_to_go_on(klimb, config, tmp_path, monkeypatch):
    real = edge.store.append_jsonl

    def interrupted_at_the_end(path, *records):
        real(path, *records)
        if records[0]["step"] == config.max_steps:
            os.kill(os.getpid(), signal.SIGINT)

    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(config.model_dump()))
    monkeypatch.setattr(edge.store, "append_jsonl", interrupted_at_the_end)
    status, _, err = klimb("climb", "-q", "-c", file)
    assert status == 130
    assert f"klimb climb --resume {tmp_path / 'run'}" in err
    assert not (tmp_path / "run/measure.json").exists()


@pytest.fixture(scope="module")
def ppo(make_run, options, tmp_path_factory):
    """Several updates a batch, minibatches in an order of their own, and a critic."""
    changes = {
        "method": "ppo",
        "num_replay": 0,
        "replay_steps": 0,
        "num_iterations": 2,
        "num_minibatches": 2,
        "gae_lambda": 0.9,
        "value_learning_rate": 0.1,
        "max_steps": 4,
        "save_steps": 2,
    }
    return load(None, options({**make_run(tmp_path_factory.mktemp("ppo")), **changes}))


@pytest.mark.parametrize("forgets", [None, "critic.", "critic_optimizer."])
def test_ppo_resumes_with_its_critic(ppo, tmp_path, monkeypatch, forgets):
    never = run_train(at(ppo, tmp_path / "never")).path
    stopped_after(2, at(ppo, tmp_path / "run"))
    if forgets:
        misremember(monkeypatch, lambda c: replace(c, tensors=scaled(c, forgets)))
    run_train(at(ppo, tmp_path / "run"), resume=True)
    same = steps_of(tmp_path / "run") == steps_of(never)
    assert same == (forgets is None)
    assert all("value_loss" in record and record["updates"] == 4 for record in steps_of(never))


@pytest.fixture(scope="module")
def controlled(make_run, options, tmp_path_factory):
    """A beta that follows the KL, and prompts that are drawn in the place of others."""
    changes = {
        "method": "grpo",
        "num_replay": 0,
        "beta": 0.3,
        "kl_budget": None,
        "kl_target": 0.01,
        "kl_horizon": 50,
        "dynamic_sampling": 1,
        "max_steps": 4,
        "save_steps": 2,
    }
    return load(None, options({**make_run(tmp_path_factory.mktemp("controlled")), **changes}))


@pytest.mark.parametrize("forgets", [False, True])
def test_a_kl_controller_is_taken_up_where_it_was_and_its_last_beta_is_the_runs(
    controlled, tmp_path, monkeypatch, forgets
):
    never = run_train(at(controlled, tmp_path / "never"))
    stopped_after(2, at(controlled, tmp_path / "run"))
    if forgets:
        misremember(monkeypatch, lambda c: replace(c, state={**c.state, "beta": None}))
    again = run_train(at(controlled, tmp_path / "run"), resume=True)
    records = steps_of(never.path)
    assert (steps_of(again.path) == records) == (not forgets)
    drawn = controlled.prompts_per_step * controlled.num_generations
    for earlier, later in pairwise(records):
        if earlier["prompts_drawn"] == controlled.prompts_per_step and earlier["prompts_alike"] == 0:
            moved = adapted_beta(
                earlier["beta"], earlier["kl"]["value"], goal=0.01, num_completions=drawn, horizon=50
            )
            assert abs(later["beta"] / moved - 1) < 1e-5
    betas = [record["beta"] for record in records]
    assert betas[0] == 0.3
    assert len(set(betas)) == 4
    assert never.beta not in betas  # the last step moved it once more
    assert load(never.path / "config.yaml").beta == never.beta


@pytest.fixture(scope="module", params=["running", "learned"])
def running(make_run, options, tmp_path_factory, request):
    """A method that asks for log Z, and a log Z that every step changes, on few enough prompts to come back to each."""
    changes = {
        "method": "jensen_shannon" if request.param == "running" else "trajectory_balance",
        "log_z": request.param,
        "num_replay": 0,
        "max_prompts": 4,
        "max_steps": 4,
        "save_steps": 2,
    }
    return load(None, options({**make_run(tmp_path_factory.mktemp("running")), **changes}))


@pytest.mark.parametrize("forgets", [False, True])
def test_a_running_log_z_is_taken_up_where_it_was(running, tmp_path, monkeypatch, forgets):
    never = run_train(at(running, tmp_path / "never")).path
    stopped_after(2, at(running, tmp_path / "run"))
    real = training.taken_up
    if forgets:  # and begins again with the plan's
        monkeypatch.setattr(
            training,
            "taken_up",
            lambda path, state, *rest, **more: replace(real(path, state, *rest, **more), log_z=state.log_z),
        )
    run_train(at(running, tmp_path / "run"), resume=True)
    a, b = everything(tmp_path / "run"), everything(never)
    assert all((a[name] == b[name]) == (not forgets) for name in ("metrics", "policy", "checkpoint"))
    assert a["files"] == b["files"]
    records = steps_of(never)
    assert all(record["log_z_change"] != 0 for record in records)
    for earlier, later in pairwise(records):  # all four prompts are in every step
        assert abs(earlier["log_z"] + earlier["log_z_change"] - later["log_z"]) < 1e-12


@pytest.fixture(scope="module")
def rewarding(tiny_model, options, tmp_path_factory):
    """A reward model: average, warm-up, and passes over the pairs in orders of their own."""
    folder = tmp_path_factory.mktemp("rewarding")
    words = [(" good film", " bad"), (" warm room", " cold room"), (" great", " poor meal")] * 7
    rows = [{"prompt": f"write {i}", "chosen": a, "rejected": b} for i, (a, b) in enumerate(words)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {
        "model_name_or_path": str(tiny_model),
        "dtype": "float32",
        "device": "cpu",
        "dataset_name": str(folder / "pairs.jsonl"),
        "dataset_test_split": None,
        "learn_from": "data",
        "method": "reward_model",
        "prompts_per_step": 3,
        "max_steps": 8,
        "save_steps": 3,
        "warmup_steps": 2,
        "ema_decay": 0.5,
        "learning_rate": 0.01,
        "output_dir": str(folder / "run"),
    }
    return load(None, options(changes))


@pytest.mark.parametrize("forgets", [None, *sorted(set(FORGETS) - {"replay"})])
def test_a_reward_model_resumes(rewarding, tmp_path, monkeypatch, forgets):
    never = climb(at(rewarding, tmp_path / "never")).path
    stopped_after(4, at(rewarding, tmp_path / "run"))
    assert not (tmp_path / "run/reward_model").exists()
    if forgets:
        misremember(monkeypatch, FORGETS[forgets])
    climb(at(rewarding, tmp_path / "run"), resume=True)
    weights = [(run / "reward_model/model.safetensors").read_bytes() for run in (tmp_path / "run", never)]
    measured = [json.loads((run / "measure.json").read_text()) for run in (tmp_path / "run", never)]
    same = weights[0] == weights[1] and steps_of(tmp_path / "run") == steps_of(never)
    assert same == (forgets is None)
    assert (measured[0] == measured[1]) == (forgets is None)
