"""A run on disk: what is written comes back bit by bit; what is interrupted leaves nothing half-written."""

import errno
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from klimb import store
from klimb.data import Draws, Example

CHAT = [{"role": "user", "content": "Wie heißt du?"}]
HASHES = {"model": "aa" * 32, "reward": "bb" * 32, "template": "cc" * 32, "max_completion_length": 32}


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def files(folder):
    """Every name below the folder, hidden ones too."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def make_draws(*, texts=True, log_q=True):
    """Three prompts (two of them the same) with two draws each, one of them empty of text."""
    generator = torch.Generator().manual_seed(5)
    lengths = [[1, 4], [2, 3], [5, 1]]
    examples = [
        Example('["not", "chat"]', {"answer": 3, "tags": ["a", None]}),
        *[Example(CHAT, {"answer": 1.5})] * 2,
    ]
    return Draws(
        examples,
        [[torch.randint(0, 50000, (n,), generator=generator) for n in row] for row in lengths],
        finished=torch.tensor([[True, False], [True, True], [False, True]]),
        texts=[["", "\U0001f600 hi"], ["a\nb", "c"], ["<b>d</b>", "é"]] if texts else None,
        log_q=torch.randn(3, 2, generator=generator) if log_q else None,
        full_support=True,
    )


def written(path, draws, **known):
    store.write_draws(path, draws, verb="train", step=12, hashes=HASHES, **known)
    return store.read_draws(path, expect_hashes=HASHES)


# Whole or not at all.


def test_write_whole_takes_bytes_text_and_functions(tmp_path):
    store.write_whole(tmp_path / "a", b"\x00\xff")
    store.write_whole(tmp_path / "b", "höch")
    store.write_whole(tmp_path / "c", lambda path: path.write_text("by itself"))
    assert [(tmp_path / name).read_bytes() for name in "abc"] == [b"\x00\xff", "höch".encode(), b"by itself"]
    assert files(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("where", ["fsync", "content"])
@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, where, before):
    path = tmp_path / "plan.json"
    if before:
        path.write_text("before")

    def half(temporary):
        temporary.write_text("half a fi")
        if where == "content":
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")

    if where == "fsync":
        monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        ValueError, match=r"the disk is full: .*plan.json was not written, what was there before is whole"
    ):
        store.write_whole(path, half)
    assert files(tmp_path) == (["plan.json"] if before else [])
    assert not before or path.read_text() == "before"


def test_other_failures_and_ctrl_c_leave_nothing_and_are_not_renamed(tmp_path):
    for error in (OSError(errno.EACCES, "no"), KeyboardInterrupt()):

        def fill(temporary, error=error):
            (temporary / "half").write_text("x")
            raise error

        with pytest.raises(type(error)):
            store.write_directory_whole(tmp_path / "policy", fill)
        assert files(tmp_path) == []


def test_write_directory_whole_replaces(tmp_path, monkeypatch):
    path = tmp_path / "policy"
    store.write_directory_whole(path, lambda p: (p / "old").write_text("1"))
    store.write_directory_whole(path, lambda p: ((p / "deep").mkdir(), (p / "deep" / "new").write_text("2")))
    assert files(tmp_path) == ["policy", "policy/deep", "policy/deep/new"]
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ValueError, match="the disk is full"):
        store.write_directory_whole(path, lambda p: (p / "newer").write_text("3"))
    assert files(tmp_path) == ["policy", "policy/deep", "policy/deep/new"]


def test_a_really_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs rights that are not there")
    try:
        log = disk / "metrics.jsonl"
        store.append_jsonl(log, {"step": 1})
        before = log.read_bytes()
        store.save_checkpoint(disk, 1, {"w": torch.ones(64)}, {})
        names = files(disk)
        big = torch.ones(65536)
        with pytest.raises(ValueError, match=r"the disk is full: .*metrics.jsonl"):
            store.append_jsonl(log, {"text": "x" * 200_000})
        with pytest.raises(ValueError, match=r"the disk is full: .*step-000002"):
            store.save_checkpoint(disk, 2, {"w": big}, {})
        draws = Draws([Example("a")], [[torch.randint(0, 2**60, (65536,))]], torch.ones(1, 1))
        with pytest.raises(ValueError, match=r"the disk is full: .*pool.parquet"):
            store.write_draws(disk / "pool.parquet", draws, verb="plan", hashes={})
        assert files(disk) == names
        assert log.read_bytes() == before
        assert store.load_latest_checkpoint(disk).step == 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# JSON, YAML, JSONL.


def test_json_takes_what_verbs_yield_and_floats_come_back_exactly(tmp_path):
    value = {
        "a": torch.tensor(0.1, dtype=torch.float64),
        "b": torch.tensor([1.5, -math.inf]),
        "c": (1, None, True, "ü"),
        "d": store.Checkpoint(3, {}, math.inf, []),
        "e": math.pi * 1e-300,
    }
    store.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert store.read_json(tmp_path / "x.json") == {
        "a": 0.1,
        "b": [1.5, -math.inf],
        "c": [1, None, True, "ü"],
        "d": {"step": 3, "tensors": {}, "state": math.inf, "warnings": []},
        "e": math.pi * 1e-300,
    }
    with pytest.raises(ValueError, match=r"frontier\[1\].kl is NaN; expected a number, or None"):
        store.write_json(tmp_path / "x.json", {"frontier": [{"kl": 1.0}, {"kl": math.nan}]})
    with pytest.raises(ValueError, match="model: got function, expected numbers"):
        store.write_json(tmp_path / "x.json", {"model": full_disk})
    assert (tmp_path / "x.json").read_text() == text


def test_yaml_round_trip(tmp_path):
    value = {"z": 1, "a": {"beta": 0.1, "path": tmp_path, "list": (1, 2)}, "model": "on", "inf": math.inf}
    store.write_yaml(tmp_path / "c.yaml", value)
    back = yaml.safe_load((tmp_path / "c.yaml").read_text())
    assert back == {
        "z": 1,
        "a": {"beta": 0.1, "path": str(tmp_path), "list": [1, 2]},
        "model": "on",
        "inf": math.inf,
    }
    assert list(back) == list(value)


def test_a_torn_last_line_is_not_there_and_is_overwritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    store.append_jsonl(path, {"step": 1}, {"step": 2, "low": -math.inf})
    whole = path.read_bytes()
    for torn in (b"{", b'{"step": 3', b'{"step": 3}', b'{"text": "' + b"x" * 200_000):
        path.write_bytes(whole + torn)
        assert store.read_jsonl(path) == [{"step": 1}, {"step": 2, "low": -math.inf}]
        store.append_jsonl(path, {"step": 3})
        assert path.read_bytes() == whole + b'{"step": 3}\n'
    path.write_bytes(b"torn from the start")
    assert store.read_jsonl(path) == []
    path.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: not JSON"):
        store.read_jsonl(path)


def test_truncate_jsonl(tmp_path):
    path = tmp_path / "metrics.jsonl"
    store.append_jsonl(path, *({"step": s} for s in range(5)))
    store.truncate_jsonl(path, 3)
    assert [r["step"] for r in store.read_jsonl(path)] == [0, 1, 2]
    with pytest.raises(ValueError, match="got 3 records, expected 4"):
        store.truncate_jsonl(path, 4)
    store.truncate_jsonl(path, 0)
    assert store.read_jsonl(path) == []


def test_a_full_disk_takes_the_half_record_back(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    store.append_jsonl(path, {"step": 1})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ValueError, match="the disk is full"):
        store.append_jsonl(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n'


# The run directory.


def test_create_run(tmp_path):
    config = {"beta": 0.1, "prompts": "a.jsonl", "sizes": (8, 8)}
    run = store.create_run(tmp_path / "deep" / "run", config=config, seed=7, reward_hashes={"reward": "ab"})
    assert files(run) == ["checkpoints", "config.yaml", "draws", "env.json"]
    env = store.read_json(run / "env.json")
    assert (env["seed"], env["reward_hashes"], env["versions"]["torch"]) == (
        7,
        {"reward": "ab"},
        torch.__version__,
    )
    assert {"klimb", "transformers", "peft"} < set(env["versions"])
    assert env["git_revision"] is None or re.fullmatch("[0-9a-f]{40}", env["git_revision"])

    with pytest.raises(ValueError, match=r"holds another run; use --resume .* or another output_dir"):
        store.create_run(run, config=config)
    (run / ".metrics.jsonl.12345678.tmp").write_text("left by a kill")
    (run / "checkpoints" / ".step-000001.12345678.tmp").mkdir()
    assert store.create_run(run, config=config, resume=True) == run
    assert files(run) == ["checkpoints", "config.yaml", "draws", "env.json"]
    with pytest.raises(
        ValueError, match=r"holds another run: its beta, seed differ \(beta: got 0.2, there it is 0.1\)"
    ):
        store.create_run(run, config=config | {"beta": 0.2, "seed": 1}, resume=True)
    with pytest.raises(ValueError, match="holds no run to resume"):
        store.create_run(tmp_path / "other", config=config, resume=True)
    with pytest.raises(ValueError, match="got a file, expected a folder"):
        store.create_run(run / "env.json", config=config)
    assert files(tmp_path / "deep") == ["run", *[f"run/{name}" for name in files(run)]]


def test_no_run_where_the_disk_was_full(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(ValueError, match="the disk is full"):
            store.create_run(tmp_path / "run", config={})
    assert files(tmp_path / "run") == ["checkpoints", "draws"]
    store.create_run(tmp_path / "run", config={})  # and it can be started again


def test_draws_after_a_step_are_removed(tmp_path):
    run = store.create_run(tmp_path / "run", config={})
    for verb, step in [("plan", None), ("train", 1), ("train", 2), ("train", 1000001), ("measure", 5)]:
        store.draws_path(run, verb, step).write_text("")
    store.remove_draws_after(run, "train", 1)
    assert files(run / "draws") == ["measure-000005.parquet", "plan.parquet", "train-000001.parquet"]


# Draws.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_draws_come_back_bit_by_bit(tmp_path, dtype):
    draws = make_draws()
    size = int(draws.lengths.sum())
    generator = torch.Generator().manual_seed(1)
    pairs = [torch.randn(3, 2, generator=generator).to(dtype) for _ in range(3)]
    packed = [torch.randn(size, generator=generator).to(dtype) for _ in range(2)]
    pairs[0][1, 1] = -math.inf
    parts = {
        "short": torch.tensor([[1.0, math.nan]] * 3, dtype=dtype),
        "never": torch.full((3, 2), math.nan, dtype=dtype),
    }
    known = dict(
        zip(["reward", "log_ref", "log_pi", "token_log_ref", "token_log_pi"], pairs + packed, strict=True)
    )
    back = written(tmp_path / "pool.parquet", draws, reward_parts=parts, **known)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    for name, value in known.items():
        torch.testing.assert_close(getattr(back, name), value.to(wide), rtol=0, atol=0)
    assert list(back.reward_parts) == ["short", "never"]
    for name, value in parts.items():
        torch.testing.assert_close(back.reward_parts[name], value.to(wide), rtol=0, atol=0, equal_nan=True)
    assert (back.verb, back.step) == ("train", 12)
    assert back.hashes == {name: str(value) for name, value in HASHES.items()}
    assert list(back.draws.examples) == draws.examples
    assert [e.id for e in back.draws.examples] == [e.id for e in draws.examples]
    assert back.draws.texts == draws.texts
    assert back.draws.full_support is True
    assert torch.equal(back.draws.finished, draws.finished)
    assert torch.equal(back.draws.log_q, draws.log_q)
    assert torch.equal(back.draws.row, draws.row)
    for got, expected in zip(back.draws.completions, draws.completions, strict=True):
        assert all(torch.equal(a, b) and a.dtype == torch.int64 for a, b in zip(got, expected, strict=True))


def test_what_is_unknown_stays_unknown(tmp_path):
    draws = make_draws(texts=False, log_q=False)
    store.write_draws(tmp_path / "d.parquet", draws, verb="plan", hashes={})
    back = store.read_draws(tmp_path / "d.parquet")
    assert (back.draws.texts, back.draws.log_q, back.step, back.reward_parts) == (None, None, None, {})
    assert (back.reward, back.log_ref, back.log_pi, back.token_log_ref, back.token_log_pi) == (None,) * 5


def test_pandas_and_datasets_open_it(tmp_path):
    import datasets

    draws = make_draws()
    path = tmp_path / "pool.parquet"
    log_pi = torch.arange(int(draws.lengths.sum())).float()
    reward = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    written(path, draws, reward=reward, reward_parts={"tone": reward / 2}, token_log_pi=log_pi)
    frame = pd.read_parquet(path)
    assert " ".join(frame.columns) == (
        "prompt_id draw prompt chat columns completion tokens finished full_support log_q log_ref log_pi token_log_ref "
        "token_log_pi reward reward_tone verb step hash_model hash_reward hash_template hash_max_completion_length"
    )
    assert frame.groupby("prompt_id", sort=False)["reward"].mean().tolist() == [1.5, 4.5]
    assert frame["tokens"].map(len).tolist() == draws.lengths.flatten().tolist()
    assert frame["token_log_pi"][1].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert json.loads(frame["prompt"][2]) == CHAT
    table = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert table["completion"][:] == [text for group in draws.texts for text in group]
    assert table["reward_tone"][:] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_draws_of_another_model_or_reward_are_refused(tmp_path):
    path = tmp_path / "pool.parquet"
    store.write_draws(path, make_draws(), verb="plan", hashes=HASHES)
    store.read_draws(path, expect_hashes={"model": HASHES["model"], "max_completion_length": 32})
    with pytest.raises(
        ValueError, match=r"of another reward \(reward: got bbbbbbbbbbbb, expected dddddddddddd\); draw a new"
    ):
        store.read_draws(path, expect_hashes=HASHES | {"reward": "dd" * 32})
    with pytest.raises(ValueError, match=r"of another model and max_completion_length \("):
        store.read_draws(path, expect_hashes=HASHES | {"model": "x", "max_completion_length": 33})
    with pytest.raises(ValueError, match=r"of another tokenizer \(tokenizer: got None, expected"):
        store.read_draws(path, expect_hashes={"tokenizer": "ee"})


def test_files_that_are_no_draws(tmp_path):
    path = tmp_path / "pool.parquet"
    with pytest.raises(ValueError, match=r"no such file; expected draws"):
        store.read_draws(path)
    store.write_draws(path, make_draws(), verb="plan", hashes={})
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    with pytest.raises(ValueError, match=r"rows are missing or moved"):
        store.read_draws(path)
    pq.write_table(table.slice(0, 0), path)
    with pytest.raises(ValueError, match=r"not draws that klimb wrote: no rows"):
        store.read_draws(path)
    pq.write_table(table.drop_columns("tokens"), path)
    with pytest.raises(ValueError, match=r"not draws that klimb wrote: no column 'tokens'"):
        store.read_draws(path)
    path.write_bytes(b"PAR1 torn")
    with pytest.raises(ValueError, match=r"not a Parquet file"):
        store.read_draws(path)


@pytest.mark.parametrize("name", ["reward", "log_pi", "token_log_ref"])
def test_nan_is_not_written(tmp_path, name):
    draws = make_draws()
    shape = (int(draws.lengths.sum()),) if name.startswith("token") else (3, 2)
    with pytest.raises(ValueError, match=rf"values of {name} are NaN"):
        written(tmp_path / "d.parquet", draws, **{name: torch.full(shape, math.nan)})
    assert files(tmp_path) == []


def test_a_full_disk_leaves_no_half_pool(tmp_path, monkeypatch):
    def half(table, path, **options):
        path.write_bytes(b"PAR1")
        full_disk()

    monkeypatch.setattr(pq, "write_table", half)
    with pytest.raises(ValueError, match="the disk is full"):
        store.write_draws(tmp_path / "d.parquet", make_draws(), verb="plan", hashes={})
    assert files(tmp_path) == []


# Checkpoints.


def tensors(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "policy.lora_a": torch.randn(4, 3, generator=generator).bfloat16().T,  # not contiguous
        "optimizer.0.exp_avg": torch.randn(3, generator=generator, dtype=torch.float64),
        "generator": generator.get_state(),
    }


STATE = {"position": 17, "rate": 0.1 + 0.2, "best": -math.inf, "order": [3, 1, 2], "note": None}


def test_checkpoints_come_back_and_the_newest_two_stay(tmp_path):
    for step in (1, 20, 300):
        store.save_checkpoint(tmp_path, step, tensors(step), STATE)
    assert [p.name for p in store.list_checkpoints(tmp_path)] == ["step-000020", "step-000300"]
    back = store.load_latest_checkpoint(tmp_path)
    assert (back.step, back.state, back.warnings) == (300, STATE, [])
    expected = tensors(300)
    assert back.tensors.keys() == expected.keys()
    assert all(
        torch.equal(back.tensors[n], t) and back.tensors[n].dtype == t.dtype for n, t in expected.items()
    )
    ahead, resumed = torch.Generator(), torch.Generator()
    ahead.set_state(expected["generator"])
    resumed.set_state(back.tensors["generator"])
    assert torch.equal(torch.rand(5, generator=ahead), torch.rand(5, generator=resumed))
    sums = (tmp_path / "step-000300" / "SHA256SUMS").read_text().splitlines()
    assert sums == [
        f"{hashlib.sha256((tmp_path / 'step-000300' / name).read_bytes()).hexdigest()}  {name}"
        for name in ("tensors.safetensors", "state.json")
    ]
    assert not [name for name in files(tmp_path) if re.search(r"\.(pt|pth|bin|pkl|tmp)$", name)]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_corrupt_checkpoint_is_named_and_the_previous_one_used(tmp_path, name, harm):
    for step in (1, 2):
        store.save_checkpoint(tmp_path, step, tensors(step), STATE)
    path = tmp_path / "step-000002" / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 3] ^= 1
    path.write_bytes(content[:-40] if harm == "cut" else content)
    if harm == "remove":
        path.unlink()
    back = store.load_latest_checkpoint(tmp_path)
    assert back.step == 1
    assert torch.equal(back.tensors["generator"], tensors(1)["generator"])
    assert len(back.warnings) == 1
    assert re.search(r"step-000002 is corrupt \(.*\) and was left out", back.warnings[0])
    # Training goes on, comes to the same step, and the corrupt one is replaced.
    store.save_checkpoint(tmp_path, 2, tensors(2), STATE)
    assert store.load_latest_checkpoint(tmp_path).step == 2


def test_no_valid_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        store.load_latest_checkpoint(tmp_path)
    store.save_checkpoint(tmp_path, 1, tensors(1), STATE)
    (tmp_path / "step-000001" / "state.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"no checkpoint is valid.*step-000001 is corrupt \(state.json is not what"
    ):
        store.load_latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "state", [{"lr": math.nan}, {0: "keys are numbers"}, {"pair": (1, 2)}, {"x": "Infinity"}]
)
def test_a_state_that_would_change_is_refused(tmp_path, state):
    with pytest.raises(ValueError, match=r"NaN|changes on its way through JSON"):
        store.save_checkpoint(tmp_path, 1, {}, state)
    assert files(tmp_path) == []


def test_a_full_disk_keeps_the_older_checkpoints(tmp_path, monkeypatch):
    for step in (1, 2):
        store.save_checkpoint(tmp_path, step, tensors(step), STATE)
    before = files(tmp_path)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ValueError, match=r"the disk is full: .*step-000003"):
        store.save_checkpoint(tmp_path, 3, tensors(3), STATE)
    assert files(tmp_path) == before
    assert store.load_latest_checkpoint(tmp_path).step == 2


KILLED = """
import sys, torch
from pathlib import Path
from klimb import store
run = store.create_run(Path(sys.argv[1]), config={}, resume=Path(sys.argv[1]).exists())
start = store.load_latest_checkpoint(run / "checkpoints").step if store.list_checkpoints(run / "checkpoints") else 0
for step in range(start + 1, 10**6):
    store.append_jsonl(run / "metrics.jsonl", {"step": step, "text": "x" * 5000})
    store.save_checkpoint(run / "checkpoints", step, {"w": torch.full((50000,), float(step))}, {"records": step})
    store.write_directory_whole(run / "policy", lambda p: (p / "w").write_text(str(step)))
    print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.013, 0.111])
def test_killed_at_any_moment_what_was_finished_is_there(tmp_path, delay):
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(run)], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "1\n"
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        finished = len(process.stdout.read().split()) + 1
    back = store.load_latest_checkpoint(run / "checkpoints")
    assert back.warnings == []
    assert back.step in (finished, finished + 1)
    assert bool((back.tensors["w"] == back.step).all())
    assert len(store.read_jsonl(run / "metrics.jsonl")) - back.step in (0, 1)
    store.truncate_jsonl(run / "metrics.jsonl", back.state["records"])
    store.create_run(run, config={}, resume=True)
    assert not [name for name in files(run) if name.endswith(".tmp")]
