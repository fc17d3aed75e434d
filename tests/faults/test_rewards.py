"""Rewards: what they are given, what they may give back, and what is said when they do not."""

import asyncio
import functools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from klimb.data import Draws, Example
from klimb.rewards.load import load_reward
from klimb.rewards.model import folder_hash, model_reward
from klimb.rewards.score import check_informative, score
from klimb.rewards.source_hash import source_hash
from klimb.rewards.weighted_sum import reward_name, weighted_sum
from klimb.target import LogRatio, MixtureRatio, forbid

EXAMPLES = Path(__file__).parents[2] / "examples"
CHAT = [{"role": "user", "content": "Say hi."}]


def make_draws(num_draws=2):
    """Two prompts, one of each kind; the completions are texts "00", "01", "10", "11"."""
    texts = [[f"{p}{g}" for g in range(num_draws)] for p in range(2)]
    return Draws(
        [Example("Count.", {"answer": 7}), Example(CHAT, {"level": "low"})],
        [[torch.tensor([p, g]) for g in range(num_draws)] for p in range(2)],
        finished=torch.ones(2, num_draws, dtype=torch.bool),
        texts=texts,
    )


def constant(values):
    """A reward that returns `values` whatever it sees."""

    def reward(completions, **columns):
        return values

    return reward


def test_the_contract_is_trls():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [1.0] * len(prompts)

    score(reward, make_draws())
    assert seen == {
        "prompts": ["Count.", "Count.", CHAT, CHAT],
        "completions": [
            "00",
            "01",
            [{"role": "assistant", "content": "10"}],
            [{"role": "assistant", "content": "11"}],
        ],
        "completion_ids": [[0, 0], [0, 1], [1, 0], [1, 1]],
        "answer": [7, 7, None, None],
        "level": [None, None, "low", "low"],
    }


def test_signatures_without_kwargs_get_what_they_name():
    def first(completions, answer, scale=2.0):
        return [scale * (a or 0) for a in answer]

    assert score(first, make_draws()).total.tolist() == [[14.0, 14.0], [0.0, 0.0]]
    assert score(functools.partial(first, scale=1.0), make_draws()).total.tolist() == [[7.0, 7.0], [0.0, 0.0]]

    def needs_more(completions, anwser):
        return []

    with pytest.raises(
        ValueError, match=r"asks for 'anwser' \(did you mean 'answer'\?\), which is no column"
    ):
        score(needs_more, make_draws())


def test_async_rewards_with_and_without_a_running_loop():
    async def reward(completions, **columns):
        await asyncio.sleep(0)
        return range(len(completions))

    expected = [[0.0, 1.0], [2.0, 3.0]]
    assert score(reward, make_draws()).total.tolist() == expected

    async def notebook():
        return score(reward, make_draws())

    assert asyncio.run(notebook()).total.tolist() == expected


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 3, -math.inf],
        (1.0, 2.0, 3.0, -math.inf),
        np.array([1, 2, 3, -np.inf], np.float32),
        torch.tensor([1, 2, 3, -math.inf], dtype=torch.bfloat16, requires_grad=True),
        [np.float64(1), np.int64(2), torch.tensor(3), torch.tensor([-math.inf])],
        [True, 2, np.float16(3), np.array([-np.inf])],
    ],
    ids=["list", "tuple", "array", "tensor", "scalars", "mixed"],
)
def test_numbers_of_every_kind(values):
    total = score(constant(values), make_draws()).total
    assert total.dtype == torch.float32
    assert total.tolist() == [[1.0, 2.0], [3.0, -math.inf]]


SHOWN = r"\n  prompt: 'Say hi.'\n  completion: '11'"
BAD = {  # what comes back, what the message must say
    "too short": ([1.0, 2.0], r"got 2 values, expected 4, one a completion"),
    "one number": (0.5, r"got 0.5 \(float\), expected a list of 4 numbers"),
    "nothing": (None, r"got None \(NoneType\), expected a list"),
    "a text": ("good", r"got 'good' \(str\), expected a list"),
    "a dict": ({"reward": 1}, r"\(dict\), expected a list"),
    "strings": ([1.0, 2.0, 3.0, "4.0"], r"got '4.0', expected a number.*" + SHOWN),
    "complex": ([1.0, 2.0, 3.0, 1j], r"got 1j, expected a number.*" + SHOWN),
    "two numbers in one": (torch.ones(4, 2), r"got \[1.0, 1.0\], expected a number"),
    "NaN": ([1.0, 2.0, 3.0, math.nan], r"got nan, expected a finite number.*" + SHOWN),
    "numpy NaN": (np.array([1, 2, 3, np.nan]), r"got nan, expected a finite number.*" + SHOWN),
    "+inf": ([1.0, 2.0, 3.0, math.inf], r"got inf, expected a finite number.*" + SHOWN),
    "past float32": (
        [1.0, 2.0, 3.0, -1e39],
        r"got -1e\+39, expected a number that float32 can hold.*" + SHOWN,
    ),
    "a huge integer": ([1.0, 2.0, 3.0, 10**400], r"expected a number that float32 can hold"),
    "None from all": ([1.0, 2.0, 3.0, None], r"got None from all, expected a number from one.*" + SHOWN),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_refused(case):
    values, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        score(constant(values), make_draws())


def test_sums_and_parts():
    short, kind, rule = constant([1, 2, 3, 4]), constant([None, 10, None, 10]), constant([0, 0, -math.inf, 0])
    found = score(weighted_sum([short, kind, rule], [1.0, 0.5, 2.0]), make_draws())
    assert found.total.tolist() == [[1.0, 7.0], [-math.inf, 9.0]]
    assert list(found.parts) == ["reward", "reward_2", "reward_3"]
    assert found.parts["reward"].tolist() == [[1.0, 2.0], [3.0, 4.0]]
    torch.testing.assert_close(
        found.parts["reward_2"], torch.tensor([[math.nan, 10.0], [math.nan, 10.0]]), equal_nan=True
    )
    # Weight 0: reported, not counted, so a forbidden completion there is not 0 x inf.
    watched = score(weighted_sum([short, rule], [1.0, 0.0]), make_draws())
    assert watched.total.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert watched.parts["reward_2"].tolist() == [[0.0, 0.0], [-math.inf, 0.0]]
    with pytest.raises(ValueError, match=r"weighted: got inf, expected a finite number"):
        score(weighted_sum([short, rule], [1.0, -1.0]), make_draws())
    with pytest.raises(ValueError, match=r"reward, reward_2: got None from all"):
        score(weighted_sum([kind, kind]), make_draws())


@pytest.mark.parametrize("weights", [[1.0], [1.0, math.nan], [0.0, 0.0]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights"):
        weighted_sum([constant([]), constant([])], weights)


def test_an_exception_shows_where_and_on_what(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "import json\n\n\ndef reward(completions, **columns):\n    return [json.loads(c) for c in 'x']\n"
    )
    reward = load_reward(f"{path}:reward")
    with pytest.raises(ValueError, match=rf"reward reward failed: JSONDecodeError: .*\({path}:5\)") as caught:
        score(reward, make_draws())
    assert caught.value.__cause__.__class__.__name__ == "JSONDecodeError"
    assert str(caught.value).endswith(
        "the first of the 4 rows it was given:\n  prompt: 'Count.'\n  completion: '00'"
    )


@pytest.mark.parametrize("status", ["", "0", "'no key'"])
def test_a_reward_that_ends_the_process_is_an_error(tmp_path, status):
    """As exit(0) it would look like a run that went well."""
    path = tmp_path / "mine.py"
    path.write_text(f"import sys\n\n\ndef reward(completions, **columns):\n    sys.exit({status})\n")
    with pytest.raises(ValueError, match=rf"reward reward failed: SystemExit: .*\({path}:5\)"):
        score(load_reward(f"{path}:reward"), make_draws())


def test_draws_without_texts_and_reserved_columns():
    draws = make_draws()
    with pytest.raises(ValueError, match="draws without texts"):
        score(constant([]), Draws(draws.examples, draws.completions, draws.finished))
    clash = Draws([Example("a", {"completions": 1})], [[torch.tensor([1])]], torch.ones(1, 1), texts=[["b"]])
    with pytest.raises(ValueError, match="a column 'completions', a name kept"):
        score(constant([1]), clash)


LOADING = {  # spec (folder filled in), what the message must say
    "missing file": ("{0}/mien.py:reward", r"mien.py: no such file \(did you mean '.*/mine.py'\?\)"),
    "missing folder": ("{0}/no/mine.py:reward", r"no such file: there is no folder .*no either"),
    "missing function": ("{0}/mine.py:rewrad", r"has no 'rewrad' \(did you mean 'reward'\?\)"),
    "no function": ("{0}/mine.py", r"mine.py: got a file, expected a function in it: .*mine.py:function"),
    "not a function": ("{0}/mine.py:SCALE", r"got int 3, expected a function"),
    "syntax error": ("{0}/broken.py:reward", r"broken.py: importing it failed: SyntaxError: "),
    "import error": ("{0}/needy.py:reward", r"importing it failed: ModuleNotFoundError: No module named 'not_there'.*needy.py:2"),
    "ends itself": ("{0}/quits.py:reward", r"importing it failed: SystemExit: 0 \(.*quits.py:2\)"),
    "missing module": ("no_such_package.x:reward", r"importing this module failed: ModuleNotFoundError"),
    "half a spec": (":reward", r"expected file.py:function or package.module:function"),
    "no such model": ("{0}/nothing", r"reward model .*nothing: cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("case", LOADING)
def test_bad_specs_are_refused(tmp_path, monkeypatch, case):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "mine.py").write_text(
        "SCALE = 3\n\ndef reward(completions, **columns):\n    return [SCALE]\n"
    )
    (tmp_path / "broken.py").write_text("def reward(:\n")
    (tmp_path / "needy.py").write_text("\nimport not_there\n")
    (tmp_path / "quits.py").write_text("import sys\nsys.exit(0)\n")
    spec, message = LOADING[case]
    with pytest.raises(ValueError, match=message):
        load_reward(spec.format(tmp_path))


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text("def reward(completions):\n    return [3.0]\n")
    assert load_reward("~/mine.py:reward")(["a"]) == [3.0]


def test_found_by_file_and_by_module(tmp_path, monkeypatch):
    (tmp_path / "klimb_test_helper.py").write_text("SCALE = 3\n")
    (tmp_path / "klimb_test_mine.py").write_text(
        "from dataclasses import dataclass\nfrom klimb_test_helper import SCALE\n\n@dataclass\nclass Kept:\n    x: int = SCALE\n\n"
        "class Rewards:\n    @staticmethod\n    def three(completions, **columns):\n        return [Kept().x] * 4\n"
    )
    by_file = load_reward(f"{tmp_path}/klimb_test_mine.py:Rewards.three")
    monkeypatch.chdir(tmp_path)
    by_module = load_reward("klimb_test_mine:Rewards.three")
    for reward in (by_file, by_module):
        assert score(reward, make_draws()).total.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert source_hash(by_file) == source_hash(by_module)
    before = source_hash(by_file)
    (tmp_path / "klimb_test_mine.py").write_text("# changed\n")
    assert source_hash(by_file) != before


def test_hashes_tell_functions_weights_and_arguments_apart():
    def other(completions, **columns):
        return []

    reward = constant([])
    sums = [
        weighted_sum([reward, other]),
        weighted_sum([reward, other], [1, 2]),
        weighted_sum([other, reward]),
    ]
    bound = [functools.partial(other, scale=s) for s in (1, 2)]
    typed: dict = {}
    exec(
        "def a(c): return (lambda: c + 1)()\ndef b(c): return (lambda: c + 2)()", typed
    )  # no file behind them
    forbidden = [
        forbid(reward),
        forbid(other),
        MixtureRatio(LogRatio(None, None), 0.25),
        MixtureRatio(LogRatio(None, None), 0.5),
    ]
    rewards = (reward, other, *sums, *bound, typed["a"], typed["b"], len, max, *forbidden)
    hashes = [source_hash(r) for r in rewards]
    assert len(set(hashes)) == len(hashes) == 15
    assert source_hash(forbid(reward)) == hashes[11]
    assert all(len(h) == 64 for h in hashes)
    again: dict = {}
    exec("def a(c): return (lambda: c + 1)()", again)
    assert source_hash(again["a"]) == source_hash(typed["a"])
    assert reward_name(bound[0]) == "other"


def test_a_pool_that_cannot_teach():
    with pytest.raises(ValueError, match=r"nothing can be learned: every one of 6 rewards is 0.5; change"):
        check_informative(torch.full((2, 3), 0.5))
    with pytest.raises(ValueError, match=r"every one of 4 rewards is -inf"):
        check_informative(torch.full((2, 2), -math.inf))
    with pytest.raises(ValueError, match=r"for each of the 2 prompts all 2 draws have the same reward"):
        check_informative(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    check_informative(torch.tensor([[1.0, 1.0], [0.0, 0.1]]))
    check_informative(torch.tensor([[1.0], [0.0]]))  # one draw a prompt: other prompts have to do


def test_sentiment_is_not_won_by_one_word():
    reward = load_reward(f"{EXAMPLES}/sentiment.py:reward")
    texts = [
        "The bread is wonderful and the staff are friendly.",
        "great",
        "great great great great",
        "great " * 30,
        "The bread is terrible and the staff are rude.",
        "terrible terrible terrible terrible",
        "It is a shop.",
        "",
        "\U0001f600",
    ]
    values = reward(["x"] * len(texts), texts)
    good, one, four, many, bad, worse, plain, empty, smiley = values
    assert all(-1 <= v <= 1 for v in values)
    assert good > 0.6
    assert max(one, four, many) < good / 2
    assert bad < -0.5
    assert worse < -0.5  # repetition does not soften
    assert plain == empty == smiley == 0
    assert reward(["x"], [[{"role": "assistant", "content": texts[0]}]]) == [good]


# A model as a reward.

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}{% endfor %}"
WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "user",
    "assistant",
    "Say",
    "hi.",
    "Count.",
    "00",
    "01",
    "10",
    "11",
    "a",
    "b",
]


def save_model(
    folder, *, template=None, pad="<pad>", eos="</s>", make=LlamaForSequenceClassification, **config
):
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=2)  # noqa: C408
    sizes |= dict(num_attention_heads=2, max_position_embeddings=16, num_labels=1, pad_token_id=None) | config  # noqa: C408
    kind = BertConfig if make is BertForSequenceClassification else LlamaConfig
    make(kind(**sizes)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=pad, eos_token=eos, bos_token="<s>", unk_token="<unk>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def by_hand(reward, ids):
    with torch.no_grad():
        return reward.model(input_ids=torch.tensor([ids])).logits[0, 0].item()


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_a_model_scores_each_text_as_if_it_were_alone(tmp_path, pad):
    reward = load_reward(str(save_model(tmp_path / "judge", template=TEMPLATE, pad=pad)))
    prompts = ["Count. ", CHAT, "Say hi. Count. "]
    completions = ["00", [{"role": "assistant", "content": "01 10 11"}], "a b a b"]
    expected = [
        by_hand(reward, [WORDS.index(w) for w in ["Count.", "00"]]),
        by_hand(reward, reward.tokenizer("<s> user Say hi. <s> assistant 01 10 11")["input_ids"]),
        by_hand(reward, [WORDS.index(w) for w in ["Say", "hi.", "Count.", "a", "b", "a", "b"]]),
    ]
    values = reward(prompts, completions, answer=[1, 2, 3])
    assert values == reward(prompts, completions)
    np.testing.assert_allclose(values, expected, atol=1e-6)
    assert len({round(v, 4) for v in values}) == 3  # the model does tell them apart
    assert reward_name(reward) == "judge"


def test_an_encoder_without_a_template(tmp_path):
    reward = model_reward(save_model(tmp_path / "bert", make=BertForSequenceClassification), batch_size=2)
    values = reward(["Count. "] * 3, ["00", "01 a", "10 a b"])
    expected = [
        by_hand(reward, reward.tokenizer(f"Count. {c}")["input_ids"]) for c in ("00", "01 a", "10 a b")
    ]
    np.testing.assert_allclose(values, expected, atol=1e-6)
    chat = reward([CHAT], [[{"role": "assistant", "content": "00"}]])
    np.testing.assert_allclose(chat, by_hand(reward, reward.tokenizer("Say hi. 00")["input_ids"]), atol=1e-6)
    assert score(reward, make_draws()).total.shape == (2, 2)


def test_models_that_cannot_be_a_reward(tmp_path):
    reward = model_reward(save_model(tmp_path / "judge"))
    with pytest.raises(ValueError, match=r"^got a prompt and completion of 20 tokens, expected at most 16"):
        reward(["a " * 10], ["b " * 10])
    with pytest.raises(ValueError, match=r"the weights hold no score.weight, so its score would be random"):
        model_reward(save_model(tmp_path / "language", make=LlamaForCausalLM))
    with pytest.raises(ValueError, match=r"cannot be loaded: (.|\n)*one output"):
        model_reward(save_model(tmp_path / "two", num_labels=2))
    with pytest.raises(ValueError, match=r"no padding token and no end of sequence"):
        model_reward(save_model(tmp_path / "bare", pad=None, eos=None))
    (tmp_path / "judge" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be loaded: "):
        model_reward(tmp_path / "judge")


def test_a_models_hash_follows_its_weights(tmp_path):
    first = model_reward(save_model(tmp_path / "a"))
    same = model_reward(save_model(tmp_path / "b"))
    other = model_reward(save_model(tmp_path / "c", num_hidden_layers=1))
    assert source_hash(first) == source_hash(same) != source_hash(other)


def test_a_model_of_no_folder_and_no_revision_is_refused(tmp_path):
    """A folder that is gone, and a configuration made by hand: what names the weights is not known."""
    with pytest.raises(
        ValueError, match=r"gone: got neither a folder nor a revision of the hub.*expected the folder"
    ):
        folder_hash(tmp_path / "gone", SimpleNamespace())
    one, other = (folder_hash(Path("a/b"), SimpleNamespace(_commit_hash=name)) for name in ("a1", "b2"))
    assert one != other
