"""Keys and values before every prompt: as peft runs them, drawn and scored alike on every road, and what a gradient does to them."""

from dataclasses import replace

import pytest
import torch

from klimb.data import Draws
from klimb.models.families import VIRTUAL, adapter_kind, save_policy
from klimb.models.prefix import prefix, remembered
from klimb.models.soft_prompt import soft_prompt
from klimb.samplers.ancestral import ancestral

ROTARY = ("llama_tied", "llama_untied", "qwen2", "gpt2")
TOLERANCE = 1e-4


@pytest.fixture(params=ROTARY)
def policies(request, build, tokenizer):
    """A policy that has moved from its start, and its reference."""
    policy, reference = prefix(
        build(request.param), tokenizer, num_virtual_tokens=5, init="be kind and brief."
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        policy.prefix.add_(0.5 * torch.randn(policy.prefix.shape, generator=generator))
    return policy, reference


def drawn(policy, examples, n=4):
    return ancestral(policy, examples, n, generator=torch.Generator().manual_seed(0), max_completion_length=9)


def sums(policy, draws):
    return draws.sequence_sums(policy.log_prob(draws)).detach()


def worst(a, b):
    return (a.double() - b.double()).abs().max().item()


def peft_sums(model, policy, draws):
    """[P, G] of peft's own forward pass, one completion at a time."""
    table = []
    for example, group in zip(draws.examples, draws.completions, strict=True):
        prompt = policy.render(example)
        for ids in group:
            whole = torch.tensor([[*prompt, *ids.tolist()]])
            with torch.no_grad():
                logits = model(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0]
            law = logits[len(prompt) - 1 : -1].float().log_softmax(1)
            table.append(law.gather(1, ids[:, None]).sum())
    return torch.stack(table).reshape(len(draws.examples), -1)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_it_is_what_peft_runs_and_what_is_drawn(policies, examples, tmp_path):
    from peft import PeftModel

    policy, reference = policies
    draws = drawn(policy, examples)
    save_policy(policy, tmp_path)
    assert adapter_kind(tmp_path) == "PREFIX_TUNING"
    theirs = PeftModel.from_pretrained(policy.model, tmp_path).eval()
    plain = peft_sums(theirs, reference, draws)
    assert plain.std() > 1
    assert worst(sums(policy, draws), plain) < TOLERANCE
    assert worst(draws.log_q, plain) < TOLERANCE
    # mutants: without the prefix, and with its tokens in another order of positions
    assert worst(sums(reference, draws), plain) > 100 * TOLERANCE
    assert worst(sums(replace(policy, prefix=policy.prefix[:-1]), draws), plain) > 100 * TOLERANCE


@pytest.mark.parametrize("architecture", ["llama_tied", "qwen2"])
def test_both_decoders_draw_by_the_same_law(build, tokenizer, examples, monkeypatch, architecture):
    policy, _ = prefix(build(architecture), tokenizer, num_virtual_tokens=3, init="be kind.")
    ours = drawn(policy, examples)
    monkeypatch.setattr("klimb.models.decoding.is_llama_like", lambda model: False)
    theirs = drawn(policy, examples)
    assert [[c.tolist() for c in g] for g in ours.completions] == [
        [c.tolist() for c in g] for g in theirs.completions
    ]
    assert worst(ours.log_q, theirs.log_q) < TOLERANCE


def test_company_and_chunks_change_nothing(policies, examples):
    policy, _ = policies
    draws = drawn(policy, examples)
    whole = sums(policy, draws)
    assert worst(sums(replace(policy, max_chunk_tokens=7), draws), whole) < TOLERANCE
    for p in (0, 1):
        alone = Draws([examples[p]], [draws.completions[p]], draws.finished[p : p + 1])
        assert worst(sums(policy, alone)[0], whole[p]) < TOLERANCE


@pytest.mark.parametrize("architecture", ROTARY)
def test_at_first_it_is_the_soft_prompt_of_the_same_text(build, tokenizer, examples, architecture):
    words = {"num_virtual_tokens": 5, "init": "be kind and brief."}
    whole, _ = prefix(build(architecture), tokenizer, **words)
    soft, _ = soft_prompt(build(architecture), tokenizer, **words)
    draws = drawn(whole, examples)
    assert worst(sums(whole, draws), sums(soft, draws)) < TOLERANCE
    assert whole.prefix.numel() == soft.virtual.shape[0] * whole.prefix[0].numel()


def test_saved_and_loaded_it_is_the_same(policies, examples, tmp_path):
    policy, reference = policies
    save_policy(policy, tmp_path)
    again = VIRTUAL["PREFIX_TUNING"](reference, tmp_path)
    draws = drawn(policy, examples)
    assert torch.equal(sums(again, draws), sums(policy, draws))
    assert again.num_virtual == policy.num_virtual == 5
    assert again.context_length == reference.context_length - 5


def test_of_another_model_it_is_refused(build, tokenizer, tmp_path):
    policy, _ = prefix(build("llama_tied"), tokenizer, num_virtual_tokens=2, seed=1)
    save_policy(policy, tmp_path)
    _, other = prefix(build("gpt2"), tokenizer, num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"got a prefix of shape \[2, 64\], expected \[n, 128\]"):
        VIRTUAL["PREFIX_TUNING"](other, tmp_path)


def test_only_keys_and_values_move_and_every_token_of_them_can(policies, examples):
    policy, _ = policies
    policy.log_prob(drawn(policy, examples)).sum().backward()
    (own,) = policy.parameters()
    assert own is policy.prefix
    assert (own.grad.flatten(1).abs().sum(1) > 0).all()
    assert (own.grad.transpose(0, 1).flatten(1).abs().sum(1) > 0).all()  # of every layer
    assert all(weight.grad is None for weight in policy.model.parameters())


def test_layers_that_see_a_window_are_refused(build, tokenizer):
    with pytest.raises(ValueError, match="use family soft_prompt"):
        prefix(build("gemma2"), tokenizer, num_virtual_tokens=3)


def test_what_is_remembered_is_of_each_token(build, tokenizer):
    model = build("llama_untied")
    ids = torch.tensor(tokenizer("abcd")["input_ids"])
    table = model.get_input_embeddings()
    whole = remembered(model, table(ids))
    assert whole.shape == (4, 2, 2, 2, 8)
    torch.testing.assert_close(remembered(model, table(ids[:2])), whole[:2], rtol=0, atol=1e-5)
