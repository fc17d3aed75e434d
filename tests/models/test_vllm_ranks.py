"""One rank and two draw the same from one stand-in of a server or two, and learn the same: every metric and weight to 1e-6.

The stand-in computes in float32, the runs in float64.
"""

import contextlib
from pathlib import Path

import pytest

from klimb.ranks import ALONE
from klimb.store import read_jsonl
from ranked import differences, ended, run, runs, started, together

pytest.importorskip("httpx2")
pytest.importorskip("stamina")
from fake_vllm import fake_vllm
from real_vllm import PYTHON, real_vllm

RUNS = {
    "one server, a step ahead": {"servers": 1, "sampler.steps_ahead": 1, "eval_steps": 3, "eval_draws": 8},
    "two servers, fewer prompts than ranks": {"servers": 2, "prompts_per_step": 1},
    "two servers, split layers, adapters": {"servers": 2, "shard": True, "prompts_per_step": 3, "ema_decay": 0.5},
    "all weights": {"servers": 1, "family.kind": "full"},
    "two servers, split layers, all weights": {"servers": 2, "shard": True, "family.kind": "full", "prompts_per_step": 3},
}  # fmt: skip


@pytest.fixture(scope="module")
def servers(tiny_model):
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_PROXY", "127.0.0.1")
        yield [stack.enter_context(fake_vllm(tiny_model, ends=[1])) for _ in range(4)]


@pytest.fixture(scope="module")
def pairs(make_run, tmp_path_factory, servers):
    """Each of RUNS by one rank and then by two: folders of the two runs; and what each server was told by either.

    The last two servers are those of all weights: they hold those of the run before, and have to be given the first ones again.
    """
    folder = tmp_path_factory.mktemp("vllm-ranks")
    options = {**make_run(folder), "dtype": "float64", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-3}
    options |= {"sampler.kind": "vllm", "measure_draws": 8, "num_plan_draws": 24}
    at = {}
    for i, (name, changes) in enumerate(RUNS.items()):
        number = changes["servers"]
        some = servers[2:] if "family.kind" in changes else servers
        urls = [server.url for server in some[:number]]
        changes = {n: x for n, x in changes.items() if n != "servers"}
        changes["sampler.url"] = urls[0] if number == 1 else str(urls).replace("'", '"')
        at[name] = [{**options, **changes, "output_dir": str(folder / f"{i}-{n}")} for n in (1, 2)]
    told = []
    for i, go in enumerate((lambda x: runs(ALONE, x), lambda x: together(2, runs, x))):
        before = [len(server.loads) for server in servers]
        go([(both[i],) for both in at.values()])
        told.append([server.loads[n:] for server, n in zip(servers, before, strict=True)])
    return {name: [Path(one["output_dir"]) for one in both] for name, both in at.items()}, told


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(pairs, name):
    found = differences(*pairs[0][name])
    efficiency = [x for n, x in found.items() if n.startswith("frontier_efficiency")]
    assert max(efficiency, default=0.0) < 1e-4  # a resample divides by what little there was to gain
    assert max(x for n, x in found.items() if not n.startswith("frontier_efficiency")) < 1e-6


def test_every_server_is_told_once_by_however_many_ranks(pairs):
    alone, two = pairs[1]
    assert [len(told) for told in two] == [len(told) for told in alone]
    for told in two[:2]:  # those of adapters
        assert len(told) == len(set(told)) >= 8
    assert min(map(len, two[2:])) >= 5  # those of all weights


def test_draws_ahead_are_those_of_a_step_before(pairs):
    ahead, now = (pairs[0][name][1] for name in list(RUNS)[:2])
    assert [record.get("draws_age", 0) for record in read_jsonl(ahead / "metrics.jsonl")] == [0, 1, 1, 1]
    assert [record.get("draws_age", 0) for record in read_jsonl(now / "metrics.jsonl")] == [0, 0, 0, 0]


def refused(ranks, settings, message):
    """Each rank ends with the same message."""
    with pytest.raises(ValueError, match=message):
        run(ranks, settings, "run_train")


WRONG = {
    "one prompt of the second rank": ("/v1/completions", 9, "status 400 and 'only here'"),
    "an adapter that one server does not take": ("/v1/load_lora_adapter", 1, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
}  # fmt: skip


@pytest.mark.parametrize(("place", "which", "message"), WRONG.values(), ids=WRONG)
def test_what_one_rank_is_refused_ends_all(servers, tiny_run, place, which, message):
    seen = []

    def fault(path, payload):
        seen.append(path)
        return (400, "only here") if path == place and seen.count(place) == which else None

    servers[1].fault = fault
    settings = {**tiny_run, "sampler.kind": "vllm", "num_replay": 0, "kl_budget": None, "beta": 0.3}
    settings["sampler.url"] = str([server.url for server in servers[:2]]).replace("'", '"')
    try:
        assert ended(started(2, refused, settings, message)) == [0, 0]
    finally:
        servers[1].fault = lambda path, payload: None


def test_a_server_that_begins_anew_is_given_all_weights_again_by_the_first_rank(servers, tiny_run, tmp_path):
    """In the middle of a step, what both ranks drew in it is thrown away."""
    server = servers[2]
    settings = {
        **tiny_run,
        "dtype": "float64",
        "max_steps": 3,
        "learning_rate": 0.02,
        "num_replay": 0,
        "kl_budget": None,
    }
    settings |= {"beta": 0.3, "family.kind": "full", "sampler.kind": "vllm", "sampler.url": server.url}
    one, two = ({**settings, "output_dir": str(tmp_path / name)} for name in ("one", "two"))
    run(ALONE, one, "run_train")
    seen, dead, before = [], [], len(server.loads)

    def fault(path, payload):
        seen.extend([len(server.loads) - before] if path == "/v1/completions" else [])
        if path == "/v1/completions" and seen.count(2) == 3 and not dead:
            dead.append(True)
            server.begin_anew()
            return "die"
        return None

    server.fault = fault
    try:
        together(2, run, two, "run_train")
    finally:
        server.fault = lambda path, payload: None
    assert dead
    assert max(differences(tmp_path / "one", tmp_path / "two").values()) < 1e-6


def test_an_engine_of_each_process_is_refused(tiny_run):
    settings = {**tiny_run, "sampler.kind": "vllm"}
    assert ended(started(2, refused, settings, "without a url.*got 2 processes, expected one")) == [0, 0]


@pytest.mark.skipif(PYTHON is None, reason="make test-vllm runs this")
def test_two_ranks_draw_from_vllm_itself(wide_model, tiny_run, tmp_path):
    """Its rounding depends on what else it draws, so only the law can be compared."""
    settings = {**tiny_run, "model_name_or_path": str(wide_model), "sampler.kind": "vllm", "shard": True}
    with real_vllm(wide_model, tmp_path / "log") as url:
        for family in ("lora", "full"):
            changes = {"family.kind": family, "sampler.url": url, "output_dir": str(tmp_path / family)}
            together(2, run, {**settings, **changes})
            records = read_jsonl(tmp_path / family / "metrics.jsonl")
            assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
            assert all(record["sampler_error_mean"] < 1e-3 for record in records)
            assert records[-1]["kl"]["value"] > 0.01  # they drew from weights that had moved
