"""A vLLM server that is not there, is another one, answers nonsense, or dies in the middle: one clear message, nothing lost."""

import importlib.util
import json
import re
import threading
import time

import pytest
import torch

from klimb.config import load
from klimb.data import Example
from klimb.models.families import full, lora
from klimb.models.hub import load_model
from klimb.run import climb, run_plan, run_train
from klimb.samplers.vllm import Vllm
from klimb.samplers.vllm_server import Server
from klimb.store import list_checkpoints, load_latest_checkpoint, read_draws, read_jsonl
from klimb.watch import Watch

stamina = pytest.importorskip("stamina")
pytest.importorskip("httpx2")
from fake_vllm import fake_vllm  # noqa: E402

EXAMPLES = [Example(f"write a review of the {thing}") for thing in ("film", "meal", "room")]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Attempts follow each other at once, three of them; no run draws its page."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("klimb.run.report", lambda path, watch=None: None)
    with stamina.set_testing(True, attempts=3, cap=True):
        yield


@pytest.fixture
def fake(tiny_model):
    with fake_vllm(tiny_model, ends=[1]) as server:
        yield server


@pytest.fixture
def policy(tiny_model):
    policy, _ = lora(*load_model(str(tiny_model), dtype=torch.float32), r=2)
    return policy


def drawn(fake, policy, **options):
    sampler = Vllm(engines=[Server(fake.url, **options)], max_completion_length=5)
    return sampler(policy, EXAMPLES, 3, generator=torch.Generator().manual_seed(0))


def broken(**changes):
    """What a server says, with something of the first completion changed."""

    def change(answer):
        answer["choices"][0] |= changes
        return answer

    return change


NONSENSE = [
    ("no JSON", lambda answer: "busy", "got 'busy', expected vLLM's completions with token_ids"),
    ("no token ids", broken(token_ids=None), "choices.0.token_ids: Input should be a valid array"),
    ("too few draws", lambda a: {"choices": a["choices"][1:]}, "got 2 completions, expected 3"),
    ("one index twice", broken(index=1), "got 3 completions, expected 3"),
    ("no law", broken(logprobs={"token_logprobs": []}), "got 0 log-probabilities"),
    ("null law", broken(logprobs={"token_logprobs": [None]}), "token_logprobs.0: Input should be"),
    (
        "logits",
        broken(token_ids=[5, 1], logprobs={"token_logprobs": [4.5, 1.0]}, finish_reason="stop"),
        "the largest 4.5, for 2 tokens; expected one a token, at most 0",
    ),
    (
        "another end",
        broken(token_ids=[5], logprobs={"token_logprobs": [-1.0]}, finish_reason="stop"),
        "ended with 5 for the reason 'stop'; expected one of the ends [1]",
    ),
    (
        "given up",
        broken(token_ids=[5], logprobs={"token_logprobs": [-1.0]}, finish_reason="abort"),
        "for the reason 'abort'",
    ),
    (
        "went on past an end",
        broken(token_ids=[1], logprobs={"token_logprobs": [-1.0]}, finish_reason="length"),
        "ended with 1 for the reason 'length'",
    ),
    (
        "cut too early",
        broken(token_ids=[5], logprobs={"token_logprobs": [-1.0]}, finish_reason="length"),
        "a completion of 1 tokens ended with 5 for the reason 'length'; expected one of the ends [1], or 5 tokens",
    ),
    (
        "too long",
        broken(token_ids=[5] * 6, logprobs={"token_logprobs": [-1.0] * 6}, finish_reason="length"),
        "a completion of 6 tokens",
    ),
]


@pytest.mark.parametrize(("change", "message"), [case[1:] for case in NONSENSE], ids=[c[0] for c in NONSENSE])
def test_nonsense_is_one_error_that_names_the_address(fake, policy, change, message):
    fake.change = change
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        drawn(fake, policy)
    assert fake.url in str(raised.value)


def test_the_law_is_asked_for_in_full(fake, policy):
    drawn(fake, policy)
    for asked in fake.requests:
        assert (asked["temperature"], asked["top_p"], asked["top_k"], asked["min_p"]) == (1.0, 1.0, -1, 0.0)
        assert (asked["repetition_penalty"], asked["presence_penalty"], asked["frequency_penalty"]) == (
            1,
            0,
            0,
        )
        assert asked["stop_token_ids"] == [1]
        assert asked["model"].startswith("klimb-vllm-")
    assert len({asked["seed"] for asked in fake.requests}) == len(EXAMPLES)


def test_a_server_that_began_anew_is_told_again(fake, policy):
    sampler = Vllm(engines=[Server(fake.url)], max_completion_length=5)
    first = sampler(policy, EXAMPLES, 3, generator=torch.Generator().manual_seed(0))
    for name in list(fake.models):
        if name != "base":
            del fake.models[name]
    again = sampler(policy, EXAMPLES, 3, generator=torch.Generator().manual_seed(0))
    assert [[c.tolist() for c in g] for g in first.completions] == [
        [c.tolist() for c in g] for g in again.completions
    ]


def test_adapters_that_nobody_names_any_more_are_taken_away(fake, policy):
    sampler = Vllm(engines=[Server(fake.url)], max_completion_length=5, keep=2)
    for _ in range(4):
        sampler(policy, EXAMPLES, 1, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            next(iter(policy.parameters())).add_(0.1)
    assert len(fake.loads) == len(set(fake.loads)) == 4
    assert set(fake.models) == {"base", *fake.loads[-2:]}
    folder = sampler.told["folder"]
    assert {p.name for p in folder.iterdir()} == set(fake.loads[-2:])
    del sampler
    assert not folder.exists()
    assert set(fake.models) == {"base"}


def test_what_passes_is_asked_again_and_one_that_dies_in_the_middle_is_named(fake, policy):
    calls = []

    def once(path, payload):
        calls.append(path)
        return "die" if calls.count("/v1/completions") == 1 and path == "/v1/completions" else None

    fake.fault = once
    assert drawn(fake, policy).num_prompts == 3
    fake.fault = lambda path, payload: "die" if path == "/v1/completions" and len(fake.requests) > 4 else None
    with pytest.raises(ValueError, match=rf"{fake.url}/v1/completions: no answer: .*; asked 3 times"):
        drawn(fake, policy)


def test_a_server_that_keeps_what_it_remembers_under_old_weights_is_refused(fake, tiny_model):
    policy, _ = full(*load_model(str(tiny_model), dtype=torch.float32))
    sampler = Vllm(engines=[Server(fake.url)], max_completion_length=5)
    sampler.check(policy, EXAMPLES[0])
    with torch.no_grad():
        next(iter(policy.parameters())).add_(0.1)
    fake.fault = lambda path, payload: (200, {"success": False}) if path == "/reset_prefix_cache" else None
    with pytest.raises(ValueError, match="still draws for somebody under the old weights"):
        sampler(policy, EXAMPLES, 1, generator=torch.Generator().manual_seed(0))
    fake.fault = lambda path, payload: None
    before = len(fake.loads)
    sampler(policy, EXAMPLES, 1, generator=torch.Generator().manual_seed(0))
    assert len(fake.loads) == before + 1  # they are given again, since nobody knows what it holds


def anew_at(fake, *numbers):
    """Die and begin anew at the completions of these numbers, from 1, counted from now on."""
    seen = []

    def fault(path, payload):
        seen.extend([path] if path == "/v1/completions" else [])
        if path == "/v1/completions" and len(seen) in numbers:
            fake.begin_anew()
            return "die"
        return None

    fake.fault = fault


@pytest.fixture
def moved(tiny_model):
    """A policy all of whose weights are others than those that a server is started with."""
    policy, _ = full(*load_model(str(tiny_model), dtype=torch.float32))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    return policy


def tokens(draws):
    return [[ids.tolist() for ids in group] for group in draws.completions]


def test_one_that_begins_anew_while_it_draws_is_given_all_weights_again(fake, moved):
    """And draws again what it drew under those that it was started with: the same as if nothing had happened."""
    whole = drawn(fake, moved)
    assert len(fake.loads) == 1
    fake.begin_anew()
    sampler = Vllm(engines=[Server(fake.url)], max_completion_length=5)
    anew_at(fake, 2)
    draws = sampler(moved, EXAMPLES, 3, generator=torch.Generator().manual_seed(0))
    assert len(fake.loads) == 3
    assert tokens(draws) == tokens(whole)
    with torch.no_grad():
        assert (moved.log_prob(draws) - draws.packed_log_q).abs().max() < 1e-4
    # between two draws too
    fake.begin_anew()
    assert tokens(sampler(moved, EXAMPLES, 3, generator=torch.Generator().manual_seed(0))) == tokens(whole)
    assert len(fake.loads) == 4
    # and it has them, so nobody gives them again, another process neither
    assert tokens(drawn(fake, moved)) == tokens(whole)
    assert len(fake.loads) == 4


def test_one_that_begins_anew_again_and_again_is_named(fake, moved):
    def fault(path, payload):
        if path == "/v1/completions" and fake.version != "default":
            fake.begin_anew()
            return "die"
        return None

    fake.fault = fault
    with pytest.raises(ValueError, match=rf"{fake.url} .*: it began anew while it drew, or .*, 3 times"):
        drawn(fake, moved)
    assert len(fake.loads) == 3


def test_weights_that_somebody_else_gave_it_are_found_out(fake, moved, tiny_model):
    other, _ = full(*load_model(str(tiny_model), dtype=torch.float32))
    sampler = Vllm(engines=[Server(fake.url)], max_completion_length=5)
    draw = sampler.handed_over(moved)
    draw(moved, EXAMPLES, 3, generator=torch.Generator().manual_seed(0))
    drawn(fake, other)
    with pytest.raises(ValueError, match="somebody else gave it weights; what was drawn before is kept"):
        draw(moved, EXAMPLES, 3, generator=torch.Generator().manual_seed(0))


def test_weights_that_were_read_by_half_are_given_again(fake, moved):
    drawn(fake, moved)
    with torch.no_grad():
        next(iter(moved.parameters())).add_(0.1)
    fake.fault = lambda path, payload: (400, "no such folder") if path == "/collective_rpc" else None
    with pytest.raises(ValueError, match=r"no such folder.*VLLM_SERVER_DEV_MODE=1"):
        drawn(fake, moved)
    with torch.no_grad():
        next(iter(moved.parameters())).sub_(0.1)
    fake.fault, before = lambda path, payload: None, len(fake.loads)
    drawn(fake, moved)
    assert len(fake.loads) == before + 1


def test_a_slow_server_is_given_up(fake, policy):
    let_go = threading.Event()

    def hang(path, payload):
        if path == "/v1/completions":
            let_go.wait(10)

    fake.fault = hang
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"no answer within 0\.2 seconds"):
        drawn(fake, policy, timeout=0.2)
    assert time.monotonic() - began < 5
    let_go.set()


def test_a_server_that_takes_no_weights_is_told_how(fake, tiny_model):
    policy, _ = full(*load_model(str(tiny_model), dtype=torch.float32))
    for place in ("/update_weight_version", "/collective_rpc"):
        fake.fault = lambda path, payload, place=place: (404, "no") if path == place else None
        with pytest.raises(ValueError, match=rf"{place}: got status 404 .*VLLM_SERVER_DEV_MODE=1"):
            drawn(fake, policy)


REFUSED = [
    (
        "/v1/load_lora_adapter",
        (404, "no"),
        r"load_lora_adapter: got status 404 .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora",
    ),
    (
        "/v1/completions",
        (404, "The model x does not exist"),
        r"got status 404 and 'The model x does not exist'",
    ),
    (
        "/v1/completions",
        (400, "maximum context length is 8"),
        r"status 400 and 'maximum context length is 8'",
    ),
]


@pytest.mark.parametrize(("place", "answer", "message"), REFUSED)
def test_refusals_are_shown(fake, policy, place, answer, message):
    fake.fault = lambda path, payload: answer if path == place else None
    with pytest.raises(ValueError, match=message):
        drawn(fake, policy)


# Whole runs.


@pytest.fixture
def config(tiny_run, options, fake):
    changes = {"sampler.url": fake.url, "sampler.steps_ahead": 1, "save_steps": 2, "num_replay": 2}
    return load(None, options({**tiny_run, **changes}))


def at(config, folder):
    return config.model_copy(update={"output_dir": str(folder)})


def everything(run):
    newest = load_latest_checkpoint(run / "checkpoints")
    return {
        "metrics": [
            {**record, "seconds": None, "tokens_per_second": None}
            for record in read_jsonl(run / "metrics.jsonl")
        ],
        "weights": {name: t.tolist() for name, t in newest.tensors.items()},
        "draws": {
            path.name: [[ids.tolist() for ids in group] for group in read_draws(path).draws.completions]
            for path in sorted((run / "draws").iterdir())
        },
        "measure": json.loads((run / "measure.json").read_text())["reward"],
    }


def test_a_server_that_dies_in_a_run_loses_nothing(config, fake, tmp_path):
    whole = climb(at(config, tmp_path / "whole")).path
    records = read_jsonl(whole / "metrics.jsonl")
    assert [record.get("draws_age", 0) for record in records] == [0, 1, 1, 1, 1, 1]
    assert all(0.5 < record["importance_ess"] <= 1 for record in records)
    # every step's draws are there, with the law that they came from
    assert all(read_draws(whole / f"draws/train-{i:06}.parquet").draws.log_q is not None for i in range(1, 7))

    # the server dies while the fifth step's draws are under way, and comes back
    run, adapters = tmp_path / "run", len(fake.loads)
    fake.fault = lambda path, payload: (
        "die" if path == "/v1/completions" and len(fake.loads) == adapters + 5 else None
    )
    with pytest.raises(ValueError, match=r"/v1/completions: no answer"):
        climb(at(config, run))
    assert [record["step"] for record in read_jsonl(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert list_checkpoints(run / "checkpoints")
    fake.fault = lambda path, payload: None
    climb(at(config, run), resume=True)
    assert everything(run) == everything(whole)


@pytest.fixture
def of_family(tiny_run, options, fake):
    """A function from the kind of a family to a run of it, whose plan has eight parts of two prompts."""
    changes = {"learning_rate": 0.02, "sampler.url": fake.url, "num_plan_draws": 96, "save_steps": 2}
    return lambda kind: load(None, options({**tiny_run, **changes, "family.kind": kind, "num_replay": 2}))


def test_all_weights_of_a_run_outlive_its_server(of_family, fake, tmp_path):
    """Which begins anew in the middle of a step's draws, and holds others then; and which is gone for good in the next run."""
    config = of_family("full")
    whole = climb(at(config, tmp_path / "whole")).path
    plain = fake.begin_anew
    plain()
    completions, dead, before = [], [], len(fake.loads)

    def fault(path, payload):
        completions.extend([len(fake.loads) - before] if path == "/v1/completions" else [])
        if path == "/v1/completions" and completions.count(4) == 3 and not dead:
            dead.append(True)
            plain()
            return "die"
        return None

    fake.fault = fault
    run = climb(at(config, tmp_path / "run")).path
    assert dead
    assert everything(run) == everything(whole)

    gone, before = tmp_path / "gone", len(fake.loads)
    fake.fault = lambda path, payload: "die" if len(fake.loads) >= before + 5 else None
    with pytest.raises(ValueError, match=r"no answer: .*; asked 3 times"):
        climb(at(config, gone))
    assert 0 < len(read_jsonl(gone / "metrics.jsonl")) < 6
    fake.fault = lambda path, payload: None
    plain()
    climb(at(config, gone), resume=True)
    assert everything(gone) == everything(whole)


FAMILIES = {"lora": "no answer", "full": "it began anew while it drew"}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_drawn_of_a_plan_is_kept_when_a_server_fails(of_family, fake, tmp_path, family):
    """One that is gone, with adapters; with all weights one that only began anew, which no rank may mend by itself."""
    config = of_family(family)
    whole = run_plan(at(config, tmp_path / "whole")).path
    fake.begin_anew()
    seen, run = [], tmp_path / "run"

    def fault(path, payload):
        seen.extend([path] if path == "/v1/completions" else [])
        if len(seen) != 8 or path != "/v1/completions":
            return None
        fake.begin_anew()
        if family == "lora":
            seen.pop()
        return "die"

    fake.fault = fault
    with pytest.raises(
        ValueError, match=rf"{FAMILIES[family]}.*; what was drawn before is kept, and --resume goes on"
    ):
        run_plan(at(config, run))
    there = len(list((run / "draws/plan.parts").glob("0*.parquet")))
    assert 2 <= there < 8
    fake.fault, asked = lambda path, payload: None, len(fake.requests)
    run_plan(at(config, run), resume=True)
    # one to see whether it has the model, and one that was under way when the run ended may come late
    assert len(fake.requests) - asked - 2 * (8 - there) in (1, 2)
    assert (run / "draws/plan.parquet").read_bytes() == (whole / "draws/plan.parquet").read_bytes()
    assert (run / "plan.json").read_text() == (whole / "plan.json").read_text()


def test_draws_ahead_survive_a_stop(config, tmp_path):
    whole = run_train(at(config, tmp_path / "whole")).path
    seen = []
    watch = Watch(
        event=lambda kind, record: seen.append(kind) if kind == "step" else None, stop=lambda: len(seen) == 3
    )
    stopped = run_train(at(config, tmp_path / "run"), watch=watch)
    assert stopped.interrupted
    assert len(load_latest_checkpoint(stopped.path / "checkpoints").state["ahead"]) == 1
    run_train(at(config, tmp_path / "run"), resume=True)
    first, second = (
        [
            {**record, "seconds": None, "tokens_per_second": None}
            for record in read_jsonl(run / "metrics.jsonl")
        ]
        for run in (whole, stopped.path)
    )
    assert first == second
    assert len(first) == 6


def test_no_server_another_model_and_what_does_not_go_together(klimb, tiny_run, options, fake, tmp_path):
    def said(**changes):
        status, _, err = klimb("climb", *options({**tiny_run, **changes}))
        assert status == 2
        assert "Traceback" not in err
        assert not (tmp_path / "run").exists()
        return " ".join(err.split())

    assert "no vLLM server answers" in (text := said(**{"sampler.url": "http://127.0.0.1:9"}))
    assert "sampler ancestral" in text
    assert "expected an address such as" in said(**{"sampler.url": "localhost:8000"})
    if importlib.util.find_spec("vllm") is None:
        assert "needs the package vllm, which is not installed" in said(**{"sampler.kind": "vllm"})
    assert "give sampler.url" in said(**{"sampler.kind": "vllm", "sampler.steps_ahead": 1})
    assert "url" in said(**{"sampler.url": "[]"})
    assert "expected lora or full" in said(**{"sampler.url": fake.url, "family.kind": "prefix"})
    assert "a server has one model" in said(**{"sampler.url": fake.url, "reference": "elsewhere"})
    ahead = {"sampler.url": fake.url, "sampler.steps_ahead": 1, "num_replay": 0}
    assert "dynamic_sampling" in said(**ahead, method="grpo", dynamic_sampling=1)
    with torch.no_grad():
        for weight in fake.models["base"].parameters():
            weight.mul_(1.5)
    assert "differ by" in (text := said(**{"sampler.url": fake.url}))
    assert "'base'" in text
