"""A base of 4 bits a weight (nf4) with adapters beside it: its law, its draws, what training moves, and what is refused.

Everything is compared with a plain model that holds the numbers which the 4 bits stand for. Needs bitsandbytes; on a CPU, where a
run refuses nf4, the same code is tested with float32 products (bitsandbytes itself would lay the weights out anew for bfloat16
there, in the first pass without gradients, and round their scales).
"""

import importlib.util
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from klimb.learn import Recipe
from klimb.measure import measure
from klimb.models import hub
from klimb.models.families import full, lora, save_policy
from klimb.models.hub import load_model, weights_of
from klimb.models.policy import CausalPolicy
from klimb.models.soft_prompt import soft_prompt
from klimb.models.trained import load_trained
from klimb.named_models import fingerprint
from klimb.objectives import log_variance
from klimb.plan import plan
from klimb.samplers.ancestral import ancestral
from klimb.samplers.replay import Replay
from klimb.steps import TrainState
from klimb.store import read_json
from klimb.train import train

installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=on_a_gpu)])
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Weights stay as they lie."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def saved(build, tokenizer, tmp_path):
    """saved(name) -> a folder that holds that model."""

    def save(name="llama_untied", **options):
        build(name, **options).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def spelled_out(folder, model):
    """A plain model with the numbers that the 4 bits of `model` stand for, and those of the adapter that is on."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    plain, _ = load_model(folder, dtype=model.dtype, device=str(model.device))
    layers = dict(plain.named_modules())
    for name, layer in model.named_modules():
        if isinstance(layer, Linear4bit):
            weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(model.dtype)
            _weight_of(layers[name.removesuffix(".base_layer")]).copy_(weight)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and not layer.disable_adapters:
            a, b = (part["policy"].weight.detach() for part in (layer.lora_A, layer.lora_B))
            _weight_of(layers[name]).add_(layer.scaling["policy"] * b @ a)
    return plain


def _weight_of(layer):
    """[out, in], also where gpt2 has it the other way round."""
    return layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data


def moved(policy):
    with torch.no_grad():
        for tensor in policy.trainable:
            tensor += 0.2 * torch.randn(tensor.shape, generator=seeded(1)).to(tensor)
    return policy


def many_vowels(prompts, completions, **columns):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [sum(letter in "aeiou" for letter in text) / 4 for text in texts]


@installed
def test_the_law_is_that_of_the_numbers_the_bits_stand_for(
    saved, tokenizer, examples, made_up, device, architecture
):
    folder, draws = saved(architecture), made_up(examples, 3, len(tokenizer))
    model, words = load_model(folder, nf4=True, dtype=torch.float32, device=device)
    assert weights_of(model) == "nf4"
    policy, reference = lora(model, words, r=3)
    moved(policy)
    original = CausalPolicy(load_model(folder, dtype=torch.float32, device=device)[0], words)
    with torch.no_grad():
        for who, spoken in ((reference, None), (policy, policy)):
            with who.activate():
                plain = CausalPolicy(spelled_out(folder, model), words)
            found, expected = who.log_prob(draws), plain.log_prob(draws)
            assert (found - expected).abs().max() < 1e-3, spoken
            # mutants: the weights before they were rounded, and the adapter left out
            assert (found - original.log_prob(draws)).abs().max() > 0.1
        assert (policy.log_prob(draws) - reference.log_prob(draws)).abs().max() > 0.1


@installed
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=on_a_gpu)])
def test_in_bfloat16_to_its_rounding(saved, tokenizer, examples, made_up, device):
    """The error of half precision is that of the plain model in half precision, twice at most."""
    folder, draws = saved(width=0.3), made_up(examples, 3, len(tokenizer))
    model, words = load_model(folder, nf4=True, dtype=torch.bfloat16, device=device)
    half = spelled_out(folder, model)
    with torch.no_grad():
        found = CausalPolicy(model, words).log_prob(draws)
        plain = CausalPolicy(half, words).log_prob(draws)
        wide = CausalPolicy(half.float(), words).log_prob(draws)
        original = CausalPolicy(load_model(folder, dtype=torch.float32, device=device)[0], words)
        rounding = (plain - wide).abs().mean()
        assert (found - wide).abs().mean() < 2 * rounding
        assert (original.log_prob(draws) - wide).abs().mean() > 4 * rounding  # the mutant


@installed
def test_the_law_of_the_draws_is_the_policys(saved, examples, device, architecture):
    policy, reference = lora(
        *load_model(saved(architecture), nf4=True, dtype=torch.float32, device=device), r=3
    )
    moved(policy)
    draws = ancestral(policy, examples, 6, generator=seeded(1), max_completion_length=12)
    with torch.no_grad():
        scored = draws.sequence_sums(policy.log_prob(draws))
        others = draws.sequence_sums(reference.log_prob(draws))
    assert (draws.log_q - scored).abs().max() < 1e-3
    assert (draws.log_q - others).abs().max() > 0.1  # the mutant: another policy's law


@installed
@pytest.mark.parametrize("family", [lora, partial(soft_prompt, num_virtual_tokens=3)], ids=["lora", "soft"])
def test_gradients_are_those_of_the_numbers_the_bits_stand_for(
    saved, tokenizer, examples, made_up, device, family
):
    folder, draws = saved(), made_up(examples, 3, len(tokenizer))
    model, words = load_model(folder, nf4=True, dtype=torch.float32, device=device)
    plain = spelled_out(folder, model)
    ours, theirs = (moved(family(m, words)[0]) for m in (model, plain))
    for saving in (False, True):  # a layer of 4 bits may run twice too
        found = []
        for policy in (replace(ours, gradient_checkpointing=saving), theirs):
            for tensor in policy.trainable:
                tensor.grad = None
            tokens = policy.log_prob(draws)
            (tokens * torch.linspace(-1, 2, len(tokens))).sum().backward()
            found.append([tensor.grad for tensor in policy.trainable])
        largest = max(g.abs().max() for g in found[1])
        assert largest > 0.1
        for mine, other in zip(*found, strict=True):
            assert (mine - other).abs().max() < 1e-3 * largest


@installed
def test_training_moves_adapters_alone_and_climbs(saved, examples, device, tmp_path):
    folder = saved(width=0.3)
    model, words = load_model(folder, nf4=True, dtype=torch.float32, device=device)
    policy, reference = lora(model, words, r=8)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    sampler = partial(ancestral, max_completion_length=8)
    found = plan(examples, reference, many_vowels, sampler, num_draws=64, generator=seeded(3))
    steps = train(
        examples,
        policy,
        target := found.target(kl=0.5),
        sampler,
        Recipe(log_variance),
        torch.optim.Adam(policy.parameters(), lr=0.01),
        max_steps=15,
        prompts_per_step=len(examples),
        num_draws=16,
        num_replay=16,
        state=TrainState(replay=Replay().extended(found.pool)),
        generator=seeded(4),
    )
    assert len(list(steps)) == 15
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name]) == (".lora_" not in name), name
    certificate = measure(examples, policy, target, sampler, num_draws=64, generator=seeded(5)).certificate
    assert certificate.reward.low > certificate.reference_reward.high

    # what is written is an adapter, and beside the same 4 bits it is the same policy
    save_policy(policy, tmp_path / "policy")
    again, start = load_trained(
        tmp_path / "policy", *load_model(folder, nf4=True, dtype=torch.float32, device=device)
    )
    draws = found.pool.draws
    with torch.no_grad():
        assert torch.equal(again.log_prob(draws), policy.log_prob(draws))
        assert torch.equal(start.log_prob(draws), reference.log_prob(draws))
    assert fingerprint(start) == fingerprint(reference)
    assert fingerprint(CausalPolicy(load_model(folder, device=device)[0], words)) != fingerprint(reference)


@installed
def test_a_whole_run(klimb, tiny_run, options, device, tmp_path, monkeypatch):
    monkeypatch.setattr("klimb.run.report", lambda path, watch=None: None)
    if device == "cpu":
        monkeypatch.setattr("klimb.loaded.require_four_bits", lambda device: None)
        monkeypatch.setattr(hub, "default_dtype", lambda device: torch.float32)
    own = {**tiny_run, "dtype": "nf4", "device": device}
    status, _, err = klimb("climb", *options(own))
    assert (status, err) == (0, "")
    run = tmp_path / "run"
    for record in ("plan.json", "measure.json"):
        assert read_json(run / record)["reference"]["weights"] == "nf4"
    assert json.loads((run / "policy" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    before = read_json(run / "measure.json")
    status, _, err = klimb("measure", run)
    assert (status, err) == (0, "")
    assert read_json(run / "measure.json")["reward"] == before["reward"]
    # a pool that the plain model drew is of another law
    plain = {**tiny_run, "device": device, "output_dir": str(tmp_path / "plain")}
    assert klimb("plan", *options(plain))[0] == 0
    status, _, err = klimb(
        "climb", *options({**own, "plan": str(tmp_path / "plain"), "output_dir": str(tmp_path / "b")})
    )
    assert status == 2
    assert "model" in err


@installed
def test_full_is_refused(saved, device):
    model, words = load_model(saved(), nf4=True, dtype=torch.float32, device=device)
    with pytest.raises(ValueError, match="full: got weights of 4 bits"):
        full(model, words)


def test_without_bitsandbytes_it_is_said(saved, monkeypatch):
    own = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "bitsandbytes" else own(name, *rest)
    )
    with pytest.raises(ValueError, match=r"pip install 'klimb\[qlora\]'"):
        load_model(saved(), nf4=True)
