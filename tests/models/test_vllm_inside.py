"""An engine of this process, a stand-in of it: it sleeps while nobody draws, forgets what is old, and one that does not start is one message."""

import contextlib
import importlib.util
import sys

import pytest
import torch

from fake_vllm import fake_engine
from klimb.config import load
from klimb.data import Example
from klimb.models.families import full, lora, save_base
from klimb.models.hub import load_model
from klimb.run import climb
from klimb.samplers.vllm import Vllm
from klimb.samplers.vllm_inside import start
from klimb.store import read_json, read_jsonl

EXAMPLES = [Example("write a review of the film"), Example("good")]
VLLM = importlib.util.find_spec("vllm")


@pytest.fixture
def loaded(tiny_model):
    return load_model(str(tiny_model), dtype=torch.float32)


@torch.no_grad()
def moved(policy):
    for weight in policy.parameters():
        weight += 0.1


@pytest.mark.parametrize("sleeps", [True, False])
def test_it_sleeps_while_nobody_draws(loaded, tiny_model, sleeps):
    policy, reference = lora(*loaded, r=4)
    everything, _ = full(*load_model(str(tiny_model), dtype=torch.float32))
    with fake_engine(ends=[1], sleeps=sleeps) as said:
        engine = start(reference, longest=32, memory=0.1)
        sampler = Vllm(engines=[engine], max_completion_length=5, keep=1)
        for who in (policy, policy, policy, everything, everything):
            sampler(who, EXAMPLES, 2, generator=torch.Generator().manual_seed(0))
            moved(who)
        assert list(engine.llm.adapters) == [3]  # the older ones are forgotten there too
        del sampler
        assert not engine.llm.adapters
    whole = [
        "start",
        "draw",
        "sleep",
        *["wake", "draw", "sleep"] * 2,
        *["wake", "weights", "draw", "sleep"] * 2,
    ]
    assert said == (whole if sleeps else [word for word in whole if word not in ("sleep", "wake")])


def test_it_is_started_with_the_model_beneath_the_adapters(loaded, tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    policy, _ = lora(*loaded, r=4)
    moved(policy)
    save_base(policy, tmp_path)
    again, plain = (
        AutoModelForCausalLM.from_pretrained(x, dtype=torch.float32).state_dict()
        for x in (tmp_path, tiny_model)
    )
    assert again.keys() == plain.keys()
    assert all(torch.equal(x, plain[name]) for name, x in again.items())


REAL = pytest.mark.skipif(VLLM is None, reason="make test-vllm runs this")


@pytest.mark.parametrize("engine", ["stand-in", pytest.param("vllm", marks=REAL)])
@pytest.mark.parametrize("family", ["lora", "full"])
def test_a_whole_run_draws_with_it(wide_model, tiny_run, options, monkeypatch, engine, family):
    monkeypatch.setattr("klimb.run.report", lambda path, watch=None: None)
    settings = {**tiny_run, "model_name_or_path": str(wide_model), "sampler.kind": "vllm", "max_steps": 3}
    settings |= {"family.kind": family, "sampler.gpu_memory_utilization": 0.1}
    with fake_engine(ends=[1]) if engine == "stand-in" else contextlib.nullcontext([]) as said:
        run = climb(load(None, options(settings))).path
    records = read_jsonl(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert all(record["sampler_error_mean"] < 1e-3 for record in records)
    assert read_json(run / "measure.json")["kl"]["value"] > 0
    # as often as it was woken it fell asleep, so it sleeps at the end and sleeps while the trainer learns
    assert said.count("sleep") - said.count("wake") == (engine == "stand-in")


@pytest.mark.parametrize("at", ["generate", "sleep", "wake_up", "collective_rpc", "reset_prefix_cache"])
def test_one_that_dies_is_one_message_whatever_it_was_told(loaded, tiny_model, at):
    policy, reference = full(*load_model(str(tiny_model), dtype=torch.float32))
    with fake_engine(ends=[1]):
        engine = start(lora(*loaded, r=4)[1], longest=32, memory=0.1)
        sampler = Vllm(engines=[engine], max_completion_length=5)

        def dead(*arguments, **options):
            raise RuntimeError("EngineCore encountered an issue")

        def two_steps():
            for who in (reference, policy):
                sampler(who, EXAMPLES, 2, generator=torch.Generator().manual_seed(0))
                moved(policy)

        setattr(engine.llm, at, dead)
        with pytest.raises(ValueError, match="vllm in this process: RuntimeError: EngineCore"):
            two_steps()


@pytest.mark.skipif(VLLM is not None, reason="vllm is there")
def test_one_that_is_not_installed_names_the_extra(loaded):
    with pytest.raises(ValueError, match=r"needs the package vllm, .*pip install 'klimb\[colocate\]'"):
        start(lora(*loaded)[1], longest=32, memory=0.1)


def test_one_that_does_not_start_is_one_message(loaded, monkeypatch):
    def no_memory(**options):
        raise RuntimeError("no available memory for the cache blocks")

    with fake_engine(ends=[1]):
        monkeypatch.setattr(sys.modules["vllm"], "LLM", no_memory)
        with pytest.raises(ValueError, match="vllm in this process: RuntimeError: no available memory"):
            start(lora(*loaded)[1], longest=32, memory=0.1)
