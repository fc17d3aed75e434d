"""The README's blocks are run, so that they stay true; the real model stands aside for a tiny one."""

import re
from pathlib import Path

import pytest
import yaml

from klimb.config import Config
from klimb.dataset import load_examples

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language, containing):
    blocks = re.findall(rf"```{language}\n(.*?)```", README, re.S)
    return next(text for text in blocks if containing in text)


def test_the_configuration_is_one():
    config = Config(**yaml.safe_load(block("yaml", "kl_budget")))
    assert config.kl_budget == 1.0


def test_the_reward_keeps_the_contract():
    names = {}
    exec(block("python", "def brevity"), names)
    assert names["brevity"](["p", "p"], ["ab", [{"role": "assistant", "content": "abcd"}]]) == [-0.02, -0.04]


def test_the_prompts_load(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(block("json", "corner bakery"))
    assert [len(load_examples(str(path), split=split)) for split in ("train", "test")] == [1, 1]


def test_the_python_example_runs(tiny_model, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = block("python", "import torch").replace("smollm2-135m", str(tiny_model))
    names = {}
    exec(
        compile(
            code.replace("limit=16", "limit=8").replace("max_steps=10", "max_steps=2"), "README.md", "exec"
        ),
        names,
    )
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("name", ["make climb", "make test", "make docs"])
def test_the_commands_are_there(name):
    target = name.split()[1]
    assert name in README
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
