"""A language model small enough to be trained in a second: 24 words, one layer, random weights, made here."""

import json
import os
import shutil
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same bits in this process and in those it starts
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

WORDS = [
    "the",
    "a",
    "film",
    "meal",
    "room",
    "was",
    "is",
    "not",
    "very",
    "good",
    "bad",
    "great",
    "poor",
    "fine",
    "kind",
    "warm",
    "cold",
    "review",
    "of",
    "write",
]
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random Llama and its word-level tokenizer, as `from_pretrained` loads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-model")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<a>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
                eos_token_id=1,
                bos_token_id=None,
                pad_token_id=0,
                initializer_range=0.3,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


REWARD = '''
def good(completions, **columns):
    """Share of kind words."""
    said = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(w in ("good", "great", "fine", "kind", "warm") for w in s.split()) / 4 for s in said]
'''


@pytest.fixture(scope="session")
def make_run(tiny_model):
    """Write prompts and a reward into a folder: options of a run there, on the tiny model, of about a second."""
    return partial(_make_run, tiny_model)


@pytest.fixture
def tiny_run(make_run, tmp_path):
    """Options of a run in this test's own folder, as a dict."""
    return make_run(tmp_path)


def _make_run(tiny_model, folder):
    things = [f"{kind} {thing}" for kind in WORDS[9:17] for thing in ("film", "meal", "room")]
    rows = [
        {
            "prompt": [{"role": "user", "content": f"write a review of the {thing}"}],
            "split": "test" if i % 3 == 2 else "train",
        }
        for i, thing in enumerate(things)
    ]
    data, reward = folder / "prompts.jsonl", folder / "rewards.py"
    data.write_text("\n".join(map(json.dumps, rows)))
    reward.write_text(REWARD)
    return {
        "model_name_or_path": str(tiny_model),
        "dtype": "float32",
        "device": "cpu",
        "dataset_name": str(data),
        "reward_funcs": f"{reward}:good",
        "kl_budget": 0.5,
        "num_plan_draws": 32,
        "num_generations": 4,
        "num_replay": 4,
        "prompts_per_step": 4,
        "max_steps": 6,
        "max_completion_length": 6,
        "learning_rate": 0.01,
        "save_steps": 2,
        "measure_prompts": 8,
        "measure_draws": 32,
        "output_dir": str(folder / "run"),
    }


@pytest.fixture
def klimb(capsys):
    """Call the command line in this process: (exit status, stdout, stderr)."""
    from klimb.cli import main

    def call(*arguments):
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def options():
    """A dict as options of the command line; None is null, lists are JSON."""

    def as_options(settings):
        return [
            part
            for name, value in settings.items()
            for part in (
                f"--{name}",
                "null" if value is None else json.dumps(value) if isinstance(value, list) else str(value),
            )
        ]

    return as_options


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium, for one file of tests: as long as it is open an event loop runs here."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
