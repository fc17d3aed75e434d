"""Llama's layers written out draw what transformers' own layers draw, token by token, with and without adapters."""

from functools import partial

import pytest
import torch

from klimb.models import decoding, fused_attention, llama, written_out
from klimb.models.attended import Matrices
from klimb.models.families import lora
from klimb.models.llama import LlamaDecoder
from klimb.models.policy import CausalPolicy
from klimb.models.written_out import is_llama_like
from klimb.samplers.ancestral import ancestral

LONGEST = 12


def both_roads(policy, examples, monkeypatch, num_draws=6):
    """The same uniforms through Llama's own layers and through the cache of transformers."""

    def drawn():
        generator = torch.Generator().manual_seed(2)
        return ancestral(policy, examples, num_draws, generator=generator, max_completion_length=LONGEST)

    ours = drawn()
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "has_loops", lambda model: False)
        by_torch = drawn()
        patch.setattr(decoding, "is_llama_like", lambda model: False)
        theirs = drawn()
    assert apart(by_torch, theirs) < 1e-3  # the road of a machine without a compiler
    return ours, theirs


def apart(one, other):
    same = all(
        torch.equal(a, b)
        for mine, theirs in zip(one.completions, other.completions, strict=True)
        for a, b in zip(mine, theirs, strict=True)
    )
    return (one.log_q - other.log_q).abs().max().item() if same else float("inf")


def moved(model, tokenizer, **options):
    policy, reference = lora(model, tokenizer, r=4, **options)
    with torch.no_grad():
        for tensor in policy.trainable:
            tensor.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    return policy, reference


@pytest.mark.parametrize("name", ["llama_tied", "llama_untied", "qwen2"])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-3), (torch.float64, 1e-10)])
def test_both_roads_draw_the_same(name, dtype, rounding, build, tokenizer, examples, monkeypatch):
    policy = CausalPolicy(build(name, dtype=dtype), tokenizer)
    assert is_llama_like(policy.model)
    assert apart(*both_roads(policy, examples, monkeypatch)) < rounding


@pytest.mark.parametrize(
    "options",
    [{}, {"layers": 1}, {"target_modules": ["q_proj", "v_proj", "up_proj"]}, {"target_modules": ["o_proj"]}],
    ids=["all", "last layer", "some of those side by side", "one"],
)
def test_both_roads_draw_the_same_with_adapters(options, build, tokenizer, examples, monkeypatch):
    policy, reference = moved(build("llama_untied"), tokenizer, **options)
    own, other = both_roads(policy, examples, monkeypatch)
    assert apart(own, other) < 1e-3
    monkeypatch.undo()
    with reference.activate():
        assert is_llama_like(reference.model)
    assert apart(own, both_roads(reference, examples, monkeypatch)[0]) > 0.1  # the mutant: the other adapter


@pytest.mark.parametrize("name", ["llama_tied", "qwen2"])
def test_steps_of_fixed_shapes_draw_the_same(name, build, tokenizer, examples, monkeypatch):
    """What a GPU records: attention over all places a completion may have, those not yet written left out."""
    policy, _ = moved(build(name), tokenizer)
    monkeypatch.setattr(decoding, "has_loops", lambda model: False)

    def drawn():
        generator = torch.Generator().manual_seed(2)
        return ancestral(policy, examples, 6, generator=generator, max_completion_length=LONGEST)

    growing = drawn()
    monkeypatch.setattr(decoding, "LlamaDecoder", partial(LlamaDecoder, fixed=True))
    assert apart(growing, drawn()) < 1e-3

    class Forgetful(Matrices):  # the mutant: places not yet written are read
        def begin_token(self, length):
            super().begin_token(length)
            self.unwritten.zero_()

    monkeypatch.setattr(llama, "Matrices", Forgetful)
    assert apart(growing, drawn()) > 0.01


@pytest.mark.parametrize("name", ["llama_untied", "qwen2"])
def test_fused_attention_draws_the_same(name, build, tokenizer, examples, monkeypatch, plain_kernels):
    """What a GPU's kernels are told of a draw: rows that leave, prompts of many lengths, places not yet written."""
    policy, _ = moved(build(name), tokenizer)
    monkeypatch.setattr(decoding, "has_loops", lambda model: False)

    def drawn():
        generator = torch.Generator().manual_seed(2)
        return ancestral(policy, examples, 6, generator=generator, max_completion_length=LONGEST)

    by_hand = drawn()
    for place in (llama, written_out):
        monkeypatch.setattr(place, "attention_of", lambda model, dtype: fused_attention)
    assert apart(by_hand, drawn()) < 1e-3
    monkeypatch.setattr(
        fused_attention, "merged", lambda own, prompt: own[0]
    )  # the mutant: the prompt is forgotten
    assert apart(by_hand, drawn()) > 0.01


def test_weights_that_moved_are_laid_out_again(build, tokenizer, examples):
    policy = CausalPolicy(build("llama_untied"), tokenizer)

    def law():
        generator = torch.Generator().manual_seed(2)
        draws = ancestral(policy, examples, 4, generator=generator, max_completion_length=LONGEST)
        return (draws.log_q - draws.sequence_sums(policy.log_prob(draws))).abs().max().item()

    assert law() < 1e-3
    with torch.no_grad():
        policy.model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    assert law() < 1e-3


def test_what_it_does_not_know_takes_the_other_road(build, tokenizer):
    assert not is_llama_like(build("gpt2"))
    assert not is_llama_like(build("gemma2"))
    model = build("llama_untied")
    policy, _ = lora(model, tokenizer, r=4)
    layer = model.model.layers[0].self_attn.q_proj
    with policy.activate():
        assert is_llama_like(model)
        layer.lora_bias["policy"] = True  # an adapter that does more than a product of low rank
        assert not is_llama_like(model)
