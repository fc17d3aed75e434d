"""What moves and what does not: the reference is the policy as it starts, to the last bit, and stays so.

Also what a saved policy is worth: peft and transformers, which know nothing of klimb, load it and score alike.
"""

import copy
import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from klimb.models.families import full, lora, save_policy
from klimb.models.policy import CausalPolicy, adapters

PEFT_NOISE = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def log_probs(policy, draws):
    with torch.no_grad():
        return policy.log_prob(draws)


def shake(tensors, seed=0, std=0.3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor += std * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def few_steps(policy, draws, steps=3):
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        policy.log_prob(draws).mean().neg().backward()
        optimizer.step()


@pytest.fixture
def draws(examples, made_up, tokenizer):
    return made_up(examples, 3, len(tokenizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", [full, lora])
def test_at_step_zero_policy_and_reference_agree_to_the_bit(
    build, tokenizer, architecture, draws, family, dtype
):
    policy, reference = family(build(architecture, dtype=dtype), tokenizer)
    with_gradients = policy.log_prob(draws)  # the road that training takes
    assert with_gradients.requires_grad
    assert torch.equal(with_gradients.detach(), log_probs(reference, draws))
    assert torch.equal(log_probs(policy, draws), log_probs(reference, draws))
    assert not list(reference.parameters())


@pytest.mark.parametrize("family", [full, lora])
def test_training_moves_the_policy_and_not_one_bit_of_the_reference(
    build, tokenizer, architecture, draws, family
):
    policy, reference = family(build(architecture), tokenizer)
    before = log_probs(reference, draws)
    few_steps(policy, draws)
    assert (log_probs(policy, draws).mean() - before.mean()) > 0.01
    assert torch.equal(log_probs(reference, draws), before)


def test_the_adapter_is_small_and_the_base_does_not_move(build, tokenizer, draws):
    model = build("llama_tied")
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    policy, _ = lora(model, tokenizer, r=2)
    few_steps(policy, draws)
    assert len(policy.trainable) == 2 * 7 * 2  # A and B of seven linear layers, twice
    assert all(t.dtype == model.dtype for t in policy.trainable)
    after = model.state_dict()
    for name, tensor in base.items():
        inner = name.replace("_proj.weight", "_proj.base_layer.weight")
        assert torch.equal(after[inner if inner in after else name], tensor)


def test_the_adapters_seed_is_its_own(build, tokenizer):
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first, _ = lora(build("llama_tied"), tokenizer, seed=5)
    torch.manual_seed(99)
    second, _ = lora(build("llama_tied"), tokenizer, seed=5)
    other, _ = lora(build("llama_tied"), tokenizer, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.trainable, second.trainable, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.trainable, other.trainable, strict=True))
    model = build("llama_tied")
    torch.manual_seed(123)
    lora(model, tokenizer)
    assert torch.equal(torch.rand(3), expected)  # the global generator stands where it stood


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_starting_adapter_is_the_reference(build, tokenizer, draws, tmp_path, dropout):
    earlier, base = lora(build("llama_untied"), tokenizer, r=4)
    shake(earlier.trainable)
    save_policy(earlier, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": dropout}))

    policy, reference = lora(build("llama_untied"), tokenizer, start=tmp_path)
    start = log_probs(reference, draws)
    assert torch.equal(log_probs(policy, draws), start)
    assert torch.equal(start, log_probs(earlier, draws))
    assert (start - log_probs(base, draws)).abs().max() > 0.1  # mutant: the bare base as the reference
    few_steps(policy, draws)
    assert torch.equal(log_probs(reference, draws), start)
    assert (log_probs(policy, draws).mean() - start.mean()) > 0.01


def test_the_context_of_adapters_restores_even_after_an_error(build, tokenizer, draws):
    policy, reference = lora(build("llama_untied"), tokenizer)
    shake(policy.trainable)
    wrapped = policy.activate.args[0]
    before = [t.requires_grad for t in wrapped.parameters()]

    def active():
        layers = [m for m in wrapped.modules() if isinstance(m, BaseTunerLayer)]
        return [(tuple(m.active_adapters), m.disable_adapters) for m in layers]

    outside = active()
    with adapters(wrapped, active=None):
        assert all(off for _, off in active())
        with adapters(wrapped, active="policy"):
            assert not any(off for _, off in active())
        assert all(off for _, off in active())
        log_probs(policy, draws)
        assert all(off for _, off in active())
    assert active() == outside
    with pytest.raises(RuntimeError, match="broken"), reference.activate():
        raise RuntimeError("broken")
    assert active() == outside
    assert [t.requires_grad for t in wrapped.parameters()] == before


def test_tied_weights_are_trained_once(build, tokenizer):
    tied, _ = full(build("llama_tied"), tokenizer)
    untied, _ = full(build("llama_untied"), tokenizer)
    assert len(tied.trainable) == len(untied.trainable) - 1
    assert len({t.data_ptr() for t in tied.trainable}) == len(tied.trainable)
    assert tied.model.get_output_embeddings().weight is tied.model.get_input_embeddings().weight


def test_full_turns_dropout_off(build, tokenizer, draws):
    policy, reference = full(build("gpt2").train(), tokenizer)
    assert torch.equal(log_probs(policy, draws), log_probs(policy, draws))
    assert torch.equal(log_probs(policy, draws), log_probs(reference, draws))


# what is saved


@PEFT_NOISE
def test_a_saved_adapter_is_what_peft_loads(build, tokenizer, architecture, draws, tmp_path):
    base = tmp_path / "base"
    build(architecture).save_pretrained(base)
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    policy, _ = lora(model, tokenizer, r=4)
    shake(policy.trainable)
    save_policy(policy, tmp_path / "policy")
    held = {path.name for path in (tmp_path / "policy").iterdir()}
    assert "adapter_model.safetensors" in held
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in held)
    assert not any(path.is_dir() for path in (tmp_path / "policy").iterdir())

    expected = log_probs(policy, draws)
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32)
    by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "policy")
    for loaded in (auto, by_hand):
        again = CausalPolicy(
            loaded.get_base_model().eval(), AutoTokenizer.from_pretrained(tmp_path / "policy")
        )
        assert torch.allclose(log_probs(again, draws), expected, atol=1e-5)
        merged = CausalPolicy(loaded.merge_and_unload(), tokenizer)
        assert torch.allclose(log_probs(merged, draws), expected, atol=1e-4)


def test_a_saved_full_policy_is_what_transformers_loads(build, tokenizer, architecture, draws, tmp_path):
    policy, _ = full(build(architecture), tokenizer)
    shake(policy.trainable, std=0.05)
    save_policy(policy, tmp_path)
    weights = [path for path in tmp_path.iterdir() if path.stat().st_size > 30_000]
    assert [path.name for path in weights] == ["model.safetensors"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    again = CausalPolicy(model.eval(), tokenizer)
    assert again.end == policy.end
    if (
        architecture != "qwen2"
    ):  # there transformers puts that model's own way of splitting words in place of ours
        read = CausalPolicy(model, AutoTokenizer.from_pretrained(tmp_path))
        assert [read.render(e) for e in draws.examples] == [policy.render(e) for e in draws.examples]
    assert torch.equal(log_probs(again, draws), log_probs(policy, draws))


def test_the_frozen_starting_adapter_is_not_saved(build, tokenizer, tmp_path):
    first, _ = lora(build("llama_untied"), tokenizer, r=4)
    save_policy(first, tmp_path / "a")
    policy, _ = lora(build("llama_untied"), tokenizer, start=tmp_path / "a")
    shake(policy.trainable)
    save_policy(policy, tmp_path / "b")
    assert {p.name for p in (tmp_path / "a").iterdir()} == {p.name for p in (tmp_path / "b").iterdir()}
    again, _ = lora(build("llama_untied"), tokenizer, start=tmp_path / "b")
    assert all(torch.equal(a, b) for a, b in zip(again.trainable, policy.trainable, strict=True))


# what is refused


def test_a_folder_that_is_no_adapter(build, tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        lora(build("llama_tied"), tokenizer, start=tmp_path)


@PEFT_NOISE
@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "lm_head"]}, "output embedding"),
    ],
)
def test_an_adapter_that_changes_the_head_is_refused(build, tokenizer, tmp_path, config, message):
    # log_prob reads the head's own weight: such an adapter would be ignored in silence
    foreign = get_peft_model(build("llama_untied"), LoraConfig(task_type="CAUSAL_LM", **config))
    foreign.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match=message):
        lora(build("llama_untied"), tokenizer, start=tmp_path)


@pytest.mark.parametrize("family", [full, lora])
def test_an_architecture_that_does_more_to_its_logits_is_refused(build, tokenizer, family):
    class Doubling(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = 2 * out.logits
            return out

    model = copy.deepcopy(build("llama_untied"))
    model.__class__ = Doubling
    with pytest.raises(ValueError, match="Doubling: its logits are not those of its output embedding"):
        family(model, tokenizer)


def test_weights_that_are_not_finite_are_refused(build, tokenizer):
    model = build("llama_untied")
    model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        full(model, tokenizer)
