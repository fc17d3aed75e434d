"""Draws are made in parts: a plan or measurement killed at any moment, by any number of ranks, ends in the same files, byte by byte."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.stats
import torch

from klimb import pool as drawing
from klimb import run as edge
from klimb.config import load
from klimb.data import Example
from klimb.loaded import depends, prepare
from klimb.models.hub import load_model
from klimb.models.policy import CausalPolicy
from klimb.pool import blocks, draw_block, draw_pool
from klimb.ranks import ALONE
from klimb.samplers import ancestral as decoding
from klimb.samplers.ancestral import ancestral
from klimb.sampling import run_sample
from klimb.store import begin_parts, check_free, read_draws, remove_parts, write_yaml
from klimb.store import parts as stored
from ranked import PRELOAD, ended, started

SEED = 11  # of the moments to kill at
ROWS = 64  # two prompts of 32 draws a block: a plan of 16 prompts has eight, a measurement of 8 prompts four and four
SLOW = '''
import time
def good(completions, **columns):
    """Share of kind words, after a while."""
    time.sleep(0.1)
    said = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(w in ("good", "great", "fine", "kind", "warm") for w in s.split()) / 4 for s in said]
'''


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(drawing, "ROWS_AT_ONCE", ROWS)
    monkeypatch.setattr(edge, "report", lambda path, watch=None: None)


@pytest.fixture(scope="module")
def slow(make_run, tmp_path_factory):
    """Options of a run whose reward takes its time, so that there is a middle to be killed in."""
    folder = tmp_path_factory.mktemp("slow")
    found = {**make_run(folder), "max_steps": 1}
    Path(folder, "rewards.py").write_text(SLOW)
    return found


def plan(ranks, settings, resume=False):
    """klimb plan without the page, in a process of its own."""
    torch.set_num_threads(1)
    drawing.ROWS_AT_ONCE, edge.report = ROWS, lambda path, watch=None: None
    edge.run_plan(config_of(settings), resume=resume, ranks=ranks)


def measure(ranks, run):
    """klimb measure RUN."""
    torch.set_num_threads(1)
    drawing.ROWS_AT_ONCE = ROWS
    edge.run_measure(load(run / "config.yaml", []), policy_folder=run / "policy", output_dir=run, ranks=ranks)


def config_of(settings):
    return load(None, [part for name, x in settings.items() for part in (f"--{name}", str(x))])


def parts_of(run, verb="plan"):
    return sorted(path.name for path in (run / "draws" / f"{verb}.parts").glob("[0-9]*.parquet"))


def killed_at(processes, there, *, seconds=60):
    """Kill them all as soon as `there()`, which they did not finish before."""
    deadline = time.monotonic() + seconds
    while not there() and any(p.is_alive() for p in processes) and time.monotonic() < deadline:
        time.sleep(0.002)
    for process in processes:
        process.kill()
        process.join()
    assert [p.exitcode for p in processes] == [-signal.SIGKILL] * len(processes)


def alone(work, *arguments):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    process = processes.Process(target=work, args=(ALONE, *arguments))
    process.start()
    return process


def content(run, *verbs):
    """What must not depend on kills: the draws byte by byte, and the record but for the name of the run."""
    record = json.loads((run / f"{verbs[0]}.json").read_text().replace(str(run), "RUN"))
    return [record, *((run / "draws" / f"{verb}.parquet").read_bytes() for verb in verbs)]


def files(run):
    return sorted(str(path.relative_to(run)) for path in run.rglob("*"))


@pytest.fixture(scope="module")
def whole(slow, tmp_path_factory):
    """A plan that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "run"
    process = alone(plan, {**slow, "output_dir": str(run)})
    process.join(60)
    assert process.exitcode == 0
    return run


@pytest.fixture(scope="module")
def killed(slow, tmp_path_factory):
    """A plan killed with three of its eight parts there, or a few more."""
    run = tmp_path_factory.mktemp("killed") / "run"
    killed_at([alone(plan, {**slow, "output_dir": str(run)})], lambda: len(parts_of(run)) >= 3)
    return run


@pytest.fixture
def half(killed, tmp_path):
    """A copy of it."""
    return Path(shutil.copytree(killed, tmp_path / "half"))


@pytest.fixture
def counted(monkeypatch):
    """How many completions each call of the sampler drew."""
    rows, decode = [], decoding._decode

    def counting(policy, examples, num_draws, uniforms, **options):
        rows.append(len(uniforms))
        return decode(policy, examples, num_draws, uniforms, **options)

    monkeypatch.setattr(decoding, "_decode", counting)
    return rows


# A plan.


def test_a_killed_plan_goes_on_where_it_was(klimb, slow, whole, half, counted):
    there = parts_of(half)
    assert 3 <= len(there) < 8
    assert there[:3] == ["000000-000002.parquet", "000002-000004.parquet", "000004-000006.parquet"]
    assert not (half / "draws/plan.parquet").exists()

    status, _, err = klimb("plan", "-q", *options_of({**slow, "output_dir": str(half)}))
    text = " ".join(err.split())
    assert status == 2
    assert "holds another run, which was stopped while drawing" in text
    assert f"{2 * len(there)} prompts are drawn, in plan.parts, and are not drawn again" in text
    assert f"--resume {half}" in text

    status, _, err = klimb("plan", "-q", "--resume", half)
    assert status == 0, err
    assert counted == [ROWS] * (8 - len(there))  # nothing twice
    assert content(half, "plan") == content(whole, "plan")
    assert files(half) == files(whole)


def options_of(settings):
    return [part for name, x in settings.items() for part in (f"--{name}", str(x))]


def test_killed_again_and_again_at_random_moments(slow, whole, tmp_path):
    run, moments, kills = tmp_path / "run", random.Random(SEED), 0
    for _ in range(5):
        resume = (run / "config.yaml").is_file()
        process = alone(plan, {**slow, "output_dir": str(run)}, resume)
        before = len(parts_of(run))
        deadline = time.monotonic() + 30
        while process.is_alive() and len(parts_of(run)) == before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.2))
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills >= 3
    process = alone(plan, {**slow, "output_dir": str(run)}, True)
    process.join(60)
    assert process.exitcode == 0
    assert content(run, "plan") == content(whole, "plan")
    assert files(run) == files(whole)


def test_the_comparison_sees_another_seed(slow, whole, tmp_path):
    run = tmp_path / "run"
    plan(ALONE, {**slow, "output_dir": str(run), "seed": 1})
    assert content(run, "plan")[1] != content(whole, "plan")[1]


def test_killed_between_the_one_file_and_its_parts(slow, whole, half, counted):
    """Both are there; and a temporary file of a writer that was killed."""
    finished = Path(shutil.copytree(whole, half.parent / "copy"))
    shutil.copy(finished / "draws/plan.parquet", half / "draws")
    (half / "draws/plan.parts/.000008-000010.parquet.0.tmp").write_text("half of a part")
    plan(ALONE, {**slow, "output_dir": str(half)}, resume=True)
    assert counted == []
    assert content(half, "plan") == content(whole, "plan")
    assert files(half) == files(whole)


def test_a_plan_whose_last_part_is_there_only_has_to_be_merged(slow, whole, tmp_path, monkeypatch, counted):
    run = tmp_path / "run"

    def dies(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(stored.StoredParts, "merge", dies)
        with pytest.raises(KeyboardInterrupt):
            plan(ALONE, {**slow, "output_dir": str(run)})
    assert len(parts_of(run)) == 8
    counted.clear()
    plan(ALONE, {**slow, "output_dir": str(run)}, resume=True)
    assert counted == []
    assert content(run, "plan") == content(whole, "plan")


# What is refused.


def edited(run, **changes):
    write_yaml(run / "config.yaml", {**load(run / "config.yaml", []).model_dump(), **changes})


def rewarded(run, slow):
    file = Path(run.parent / "other.py")
    file.write_text(SLOW.replace("/ 4", "/ 5"))
    edited(run, reward_funcs=[f"{file}:good"])


def other_prompts(run, slow):
    file = Path(run.parent / "other.jsonl")
    file.write_text(Path(slow["dataset_name"]).read_text().replace("meal", "room"))
    edited(run, dataset_name=str(file))


def other_weights(run, slow):
    folder = Path(shutil.copytree(slow["model_name_or_path"], run.parent / "other-model"))
    model, _ = load_model(str(folder), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        model.get_input_embeddings().weight += 0.1
    model.save_pretrained(folder)
    edited(run, model_name_or_path=str(folder))


CHANGES = {
    "seed": lambda run, slow: edited(run, seed=3),
    "draws a prompt": lambda run, slow: edited(run, num_plan_draws=40),
    "prompts": lambda run, slow: edited(run, max_prompts=12),
    "max_completion_length": lambda run, slow: edited(run, max_completion_length=5),
    "reward": rewarded,
    "prompts ": other_prompts,
    "model": other_weights,
}


@pytest.mark.parametrize("name", CHANGES)
def test_draws_of_something_else_are_not_gone_on_with(klimb, slow, half, name):
    CHANGES[name](half, slow)
    before = files(half)
    status, _, err = klimb("plan", "-q", "--resume", half)
    text = " ".join(err.split())
    assert status == 2
    assert "Traceback" not in err
    assert f"another {name.strip()}" in text or f"and {name.strip()} (" in text, text
    assert f"{half}/draws/plan.parts: " in text
    assert "go on as it was begun, or remove that folder to draw anew" in text
    assert files(half) == before
    shutil.rmtree(half / "draws/plan.parts")  # as it says
    assert klimb("plan", "-q", "--resume", half)[0] == 0


def test_another_beta_is_another_run(slow, half):
    """In Python; the command line takes no options beside --resume."""
    config = config_of({**slow, "output_dir": str(half), "kl_budget": "null", "beta": 0.3})
    with pytest.raises(ValueError, match="its beta, kl_budget differ"):
        edge.run_plan(config, resume=True)


def test_a_part_that_cannot_be_read_is_named(klimb, half):
    part = half / "draws/plan.parts/000002-000004.parquet"
    part.write_bytes(part.read_bytes()[:200])
    status, _, err = klimb("plan", "-q", "--resume", half)
    assert status == 2
    assert f"{part}: not what was written" in " ".join(err.split())
    part.unlink()
    assert klimb("plan", "-q", "--resume", half)[0] == 0


def test_a_mistake_in_the_middle_leaves_nothing(klimb, slow, tmp_path):
    reward = tmp_path / "mistaken.py"
    reward.write_text(
        "calls = []\ndef good(completions, **columns):\n    calls.append(1)\n    if len(calls) == 3:\n"
        "        raise KeyError('third')\n    return [float(len(str(c))) for c in completions]\n"
    )
    run = tmp_path / "run"
    settings = {**slow, "reward_funcs": f"{reward}:good", "output_dir": str(run)}
    status, _, err = klimb("plan", "-q", *options_of(settings))
    assert (status, "third" in err) == (2, True)
    assert not run.exists()


def test_a_full_disk_in_the_middle_leaves_what_is_drawn(klimb, slow, whole, tmp_path, monkeypatch):
    run, sync = tmp_path / "run", os.fsync

    def full(descriptor):
        if len(parts_of(run)) >= 3 and stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        status, _, err = klimb("plan", "-q", *options_of({**slow, "output_dir": str(run)}))
    assert status == 2
    assert "the disk is full" in err
    assert len(parts_of(run)) == 3
    assert klimb("plan", "-q", "--resume", run)[0] == 0
    assert content(run, "plan") == content(whole, "plan")


# A measurement.


@pytest.fixture(scope="module")
def measured(slow, tmp_path_factory):
    """A run that was trained and measured; and itself before it was."""
    run = tmp_path_factory.mktemp("measured") / "run"
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(drawing, "ROWS_AT_ONCE", ROWS)
    monkeypatch.setattr(edge, "report", lambda path, watch=None: None)
    edge.run_train(config_of({**slow, "output_dir": str(run)}))
    trained = Path(shutil.copytree(run, run.parent / "trained"))
    measure(ALONE, run)
    monkeypatch.undo()
    return run, trained


HELD_OUT = ("measure", "measure-reference")


def half_measured(trained, folder, parts, ranks=1):
    """A copy of the run, its measurement killed with so many parts there."""
    run = Path(shutil.copytree(trained, folder / "half"))
    processes = [alone(measure, run)] if ranks == 1 else started(ranks, measure, run)
    killed_at(processes, lambda: sum(len(parts_of(run, verb)) for verb in HELD_OUT) >= parts)
    return run


@pytest.mark.parametrize("parts", [2, 6])
def test_a_killed_measurement_goes_on_where_it_was(klimb, measured, tmp_path, counted, parts):
    whole, trained = measured
    run = half_measured(trained, tmp_path, parts)
    there = sum(len(parts_of(run, verb)) for verb in HELD_OUT)
    assert parts <= there < 8
    assert not (run / "measure.json").exists()
    status, _, err = klimb("measure", run, "-q")
    assert status == 0, err
    assert counted == [ROWS] * (8 - there)
    assert content(run, *HELD_OUT) == content(whole, *HELD_OUT)
    assert [f for f in files(run) if f != "report.html"] == files(whole)


def test_a_climb_killed_while_measuring_goes_on_there(slow, measured, tmp_path, counted):
    """By `climb --resume`: the policy lies where the measurement began with it."""
    whole, trained = measured
    run = half_measured(trained, tmp_path, 5)
    there = sum(len(parts_of(run, verb)) for verb in HELD_OUT)
    edge.climb(load(run / "config.yaml", ["--output_dir", str(run)]), resume=True)
    assert counted == [ROWS] * (8 - there)
    assert content(run, *HELD_OUT)[1:] == content(whole, *HELD_OUT)[1:]


def test_a_measurement_of_another_policy_is_refused(klimb, measured, tmp_path):
    run = half_measured(measured[1], tmp_path, 2)
    for options, word in ((["--measure_draws", "16"], "draws a prompt"), (["--seed", "5"], "seed")):
        status, _, err = klimb("measure", run, "-q", *options)
        text = " ".join(err.split())
        assert status == 2
        assert f"another {word}" in text, text
        assert "remove that folder to draw anew" in text
    weights = run / "policy/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    assert "another policy" in " ".join(klimb("measure", run, "-q")[2].split())


def test_a_mistake_at_once_leaves_no_trace_of_a_measurement(klimb, measured, tmp_path):
    run = Path(shutil.copytree(measured[1], tmp_path / "run"))
    reward = tmp_path / "mistaken.py"
    reward.write_text("def good(completions, **columns):\n    raise KeyError('at once')\n")
    before = files(run)
    status, _, err = klimb("measure", run, "-q", "--reward_funcs", f"{reward}:good")
    assert (status, "at once" in err) == (2, True)
    assert files(run) == before


# Samples.

LAWS = {
    "ancestral": ([], {}),
    "best_of": (["--n", "2"], {"n": 2}),
    "rejection": (["--bound", "1.5"], {"bound": 1.5}),
}
"""options of the command line, and of Python"""


def sample(ranks, settings, method):
    """klimb sample -c FILE --method METHOD --num-draws 32."""
    torch.set_num_threads(1)
    drawing.ROWS_AT_ONCE = ROWS
    config = config_of(settings)
    run_sample(
        config, output_dir=config.output_dir, method=method, num_draws=32, ranks=ranks, **LAWS[method][1]
    )


@pytest.fixture(scope="module")
def at_beta(slow):
    """Rejection needs a beta."""
    return {**slow, "kl_budget": "null", "beta": 0.5}


@pytest.fixture(scope="module")
def sampled(at_beta, tmp_path_factory):
    """Samples of each law, to which nothing happened."""
    folder = tmp_path_factory.mktemp("sampled")
    processes = [alone(sample, {**at_beta, "output_dir": str(folder / law)}, law) for law in LAWS]
    assert ended(processes) == [0, 0, 0]
    return folder


@pytest.mark.parametrize("law", LAWS)
def test_killed_samples_go_on_where_they_were(klimb, at_beta, sampled, tmp_path, counted, law):
    run = tmp_path / "run"
    settings = {**at_beta, "output_dir": str(run)}
    killed_at([alone(sample, settings, law)], lambda: len(parts_of(run, "sample")) >= 2)
    there = len(parts_of(run, "sample"))
    assert 2 <= there < 4
    assert not (run / "draws/sample.parquet").exists()
    words = [
        "sample",
        *options_of(settings),
        "--method",
        law,
        "--num-draws",
        "32",
        *LAWS[law][0],
        "--json",
        "-q",
    ]
    for another, word in ((["--seed", "9"], "seed"), (["--limit", "6"], "prompts")):
        status, _, err = klimb(*words, *another)
        assert (status, f"another {word} (" in " ".join(err.split())) == (2, True), err
    counted.clear()
    status, out, err = klimb(*words)
    assert status == 0, err
    if law != "rejection":  # which asks until it has enough
        assert counted == [ROWS * (2 if law == "best_of" else 1)] * (4 - there)
    assert (run / "draws/sample.parquet").read_bytes() == (
        sampled / law / "draws/sample.parquet"
    ).read_bytes()
    assert files(run) == files(sampled / law) == ["draws", "draws/sample.parquet"]
    record = json.loads(out)
    assert record["draws"] == len(record["samples"]) == 8 * 32
    found = read_draws(run / "draws/sample.parquet")
    assert found.reward.flatten().tolist() == [one["reward"] for one in record["samples"]]
    assert found.log_ref.flatten().tolist() == [one["log_ref"] for one in record["samples"]]


@pytest.mark.parametrize("law", LAWS)
def test_samples_of_two_ranks_are_those_of_one(at_beta, sampled, tmp_path, law):
    run = tmp_path / "run"
    processes = started(2, sample, {**at_beta, "output_dir": str(run)}, law)
    assert ended(processes) == [0, 0]
    assert (run / "draws/sample.parquet").read_bytes() == (
        sampled / law / "draws/sample.parquet"
    ).read_bytes()


def test_samples_of_another_law_are_not_gone_on_with(klimb, at_beta, tmp_path):
    run = tmp_path / "run"
    settings = {**at_beta, "output_dir": str(run)}
    killed_at([alone(sample, settings, "best_of")], lambda: len(parts_of(run, "sample")) >= 1)
    words = ["sample", *options_of(settings), "--num-draws", "32", "-q"]
    for options, word in ((["--method", "best_of", "--n", "3"], "another n"), ([], "another method and n")):
        status, _, err = klimb(*words, *options)
        assert (status, word in " ".join(err.split())) == (2, True), err
    shutil.rmtree(run / "draws/sample.parts")  # as it says
    assert klimb(*words)[0] == 0


def test_a_mistake_at_once_leaves_no_trace_of_samples(klimb, at_beta, tmp_path):
    run = tmp_path / "run"
    words = ["sample", *options_of({**at_beta, "output_dir": str(run)}), "--method", "rejection", "--bound"]
    status, _, err = klimb(*words, "0.1", "-q")
    assert (status, "the bound 0.1 is not one" in err) == (2, True)
    assert not run.exists()


# Several ranks.


@pytest.mark.slow
def test_a_rank_that_dies_while_drawing_starts_again_by_itself(slow, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "ROWS_AT_ONCE", 192)  # as it is in processes that are started
    settings = {**slow, "num_plan_draws": 96}
    plan_one = {**settings, "output_dir": str(tmp_path / "one")}
    edge.run_plan(config_of(plan_one))
    run, file = tmp_path / "run", tmp_path / "run.yaml"
    write_yaml(file, {**settings, "output_dir": str(run)})
    command = [sys.executable, "-m", "klimb", "plan", "-q", "-c", str(file), "--nproc", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(parts_of(run)) < 3:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(p) for p in children if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]
    os.kill(workers[1], signal.SIGKILL)
    assert len(parts_of(run)) < 8
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert content(run, "plan") == content(tmp_path / "one", "plan")


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 3), (2, 3)])
def test_a_plan_of_some_ranks_goes_on_with_others(slow, whole, tmp_path, first, then):
    """All of them killed at once; each rank had written its own parts."""
    run = tmp_path / "run"
    settings = {**slow, "output_dir": str(run)}
    processes = [alone(plan, settings)] if first == 1 else started(first, plan, settings)
    killed_at(processes, lambda: len(parts_of(run)) >= 2)
    there = {path.name: path.stat().st_mtime_ns for path in (run / "draws/plan.parts").glob("*.parquet")}
    assert 2 <= len(there) < 8
    assert (
        ended([alone(plan, settings, True)] if then == 1 else started(then, plan, settings, True))
        == [0] * then
    )
    assert content(run, "plan") == content(whole, "plan")
    assert files(run) == files(whole)


def on_machines_of_their_own(ranks, settings):
    """The second rank does not see the folder of the run: the first one writes for it."""
    if not ranks.first:
        stored.StoredParts.write = lambda self, block, pool: None
    plan(ranks, settings)


def test_ranks_need_no_common_disk(slow, whole, tmp_path):
    run = tmp_path / "run"
    assert ended(started(2, on_machines_of_their_own, {**slow, "output_dir": str(run)})) == [0, 0]
    assert content(run, "plan") == content(whole, "plan")


def test_a_measurement_of_two_ranks_goes_on_with_one(klimb, measured, tmp_path):
    whole, trained = measured
    run = half_measured(trained, tmp_path, 3, ranks=2)
    status, _, err = klimb("measure", run, "-q")
    assert status == 0, err
    assert content(run, *HELD_OUT) == content(whole, *HELD_OUT)


# Blocks and parts by themselves.


@pytest.fixture(scope="module")
def reference(tiny_model):
    return CausalPolicy(*load_model(str(tiny_model), dtype=torch.float32, device="cpu"))


def length(completions, **columns):
    return [float(len(str(c))) for c in completions]


def test_a_block_depends_on_no_other(reference):
    """Drawn by itself it is what it is in the pool, whatever was drawn before."""
    examples = [
        Example(f"write a review of the {w}", {"of": w}) for w in ("film", "meal", "room", "kind", "warm")
    ]
    sampler = partial(ancestral, max_completion_length=5)
    pool = draw_pool(
        examples, reference, length, sampler, num_draws=32, generator=torch.Generator().manual_seed(5)
    )
    seed = drawing.seed_of(torch.Generator().manual_seed(5))
    for block in reversed(blocks(5, 32)):
        own = draw_block(
            examples, block, policy=reference, reward=length, sampler=sampler, num_draws=32, seed=seed
        )
        where = slice(block.start, block.stop)
        assert own.draws.texts == pool.draws.texts[where]
        assert own.log_ref.equal(pool.log_ref[where])
        assert own.reward.equal(pool.reward[where])


@pytest.mark.parametrize("mutant", [False, True])
def test_blocks_are_independent_draws_of_the_law(reference, mutant, monkeypatch):
    """One prompt in 512 blocks: their first tokens have its exact law, together. The mutant: one generator for all of them."""
    monkeypatch.setattr(drawing, "ROWS_AT_ONCE", 2)
    examples = [Example("write a review of the film")] * 512
    sampler = partial(ancestral, max_completion_length=2)
    first = torch.tensor(
        [
            int(ids[0])
            for block in blocks(512, 2)
            for group in draw_block(
                examples, block, policy=reference, reward=length, sampler=sampler, num_draws=2,
                seed=2**40 - (block.start if mutant else 0),
            ).draws.completions
            for ids in group
        ]
    )  # fmt: skip
    with torch.no_grad():
        states, *_ = reference.read_prompts(examples[:1])
        law = reference.head.laid_out()(states)[0].double().softmax(0)
    seen = torch.bincount(first, minlength=len(law)).double()
    expected = law * len(first)
    assert expected.min() > 5
    p = scipy.stats.chisquare(seen.numpy(), (expected * seen.sum() / expected.sum()).numpy()).pvalue
    assert (p < 1e-6) if mutant else (p > 1e-3), p


def test_no_two_blocks_share_a_generator():
    """torch takes 32 bits of a seed; hashed ones would meet in a large pool."""
    states = {
        torch.rand(4, generator=torch.Generator().manual_seed(2**61 + start)).numpy().tobytes()
        for start in range(0, 20000, 4)
    }
    assert len(states) == 5000


@pytest.fixture
def many(reference, tmp_path):
    """A function that writes so many parts of one prompt's draws."""
    pool = draw_pool(
        [Example("write a review of the film")] * 2,
        reference,
        length,
        partial(ancestral, max_completion_length=6),
        num_draws=200,
        generator=torch.Generator().manual_seed(1),
    )

    def write(num, name):
        parts = begin_parts(
            tmp_path / f"{name}.parquet", verb="plan", hashes={"model": "m"}, depends={"seed": 1}
        )
        parts.write(range(0, 2), pool)
        (first,) = parts.folder.glob("*.parquet")
        for i in range(1, num):
            shutil.copy(first, parts.folder / f"{2 * i:06d}-{2 * i + 2:06d}.parquet")
        return parts

    return write


def test_merging_takes_the_memory_of_a_few_parts(many, monkeypatch):
    monkeypatch.setattr(stored, "AT_ONCE", 4)
    peak, before = {}, pa.default_memory_pool()
    for num in (8, 64):
        parts = many(num, f"pool{num}")
        counting = pa.proxy_memory_pool(before)
        pa.set_memory_pool(counting)
        try:
            parts.merge()
        finally:
            pa.set_memory_pool(before)
        peak[num] = counting.max_memory()
        file = pq.ParquetFile(parts.path)
        assert (file.metadata.num_rows, file.num_row_groups) == (400 * num, num // 4)
        assert read_draws(parts.path).draws.num_prompts == 2 * num
    assert 0 < peak[64] < 1.5 * peak[8], peak
    monkeypatch.setattr(stored, "AT_ONCE", 64)  # the mutant: all at once
    counting = pa.proxy_memory_pool(before)
    pa.set_memory_pool(counting)
    try:
        parts.merge()
    finally:
        pa.set_memory_pool(before)
    assert counting.max_memory() > 4 * peak[8]


def test_parts_come_back_in_the_order_of_their_prompts_and_go(many):
    parts = many(3, "few")
    big = range(1_000_000, 1_000_002)
    parts.write(big, parts.read(range(0, 2)))
    assert parts.done() == [range(0, 2), range(2, 4), range(4, 6), big]
    with pytest.raises(
        ValueError, match=r"8 prompts are drawn there with another seed \(seed: got 2, there it is 1\)"
    ):
        begin_parts(parts.path, verb="plan", hashes={}, depends={"seed": 2})
    again = begin_parts(parts.path, verb="plan", hashes={}, depends={"seed": 1})
    assert again.done() == parts.done()
    remove_parts(parts.path)
    assert not parts.folder.exists()
    remove_parts(parts.path)
    begin_parts(
        parts.path, verb="plan", hashes={}, depends={"seed": 1}
    )  # nothing is drawn: anything may follow
    assert begin_parts(parts.path, verb="plan", hashes={}, depends={"seed": 2}).done() == []


def test_a_folder_that_holds_nothing_is_free(tmp_path):
    check_free(tmp_path)


def test_what_draws_depend_on_names_no_beta(tiny_run):
    loaded = prepare(config_of({**tiny_run, "kl_budget": "null", "beta": 0.2}))
    other = prepare(config_of({**tiny_run, "kl_budget": "null", "beta": 0.7}))
    assert depends(loaded, loaded.train_examples, 4) == depends(other, loaded.train_examples, 4)
