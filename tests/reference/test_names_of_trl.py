"""docs/from_trl.md against both sides: every TRL name is there in the TRL that is installed, every klimb name in the schema."""

import dataclasses
import importlib
import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import yaml

from klimb.config import Config
from klimb.config.loading import NAMES
from klimb.config.of_trl import OF_TRL

PAGE = Path(__file__).parents[2] / "docs" / "from_trl.md"
EXPERIMENTAL = {"KTO": "kto", "GKD": "gkd", "OnlineDPO": "online_dpo", "CPO": "cpo", "ORPO": "orpo"}
GONE = ("PPO",)


@pytest.fixture(autouse=True)
def silent(monkeypatch):
    """No warning that what is experimental may change: these tests would tell."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def cells(column, text):
    """What stands in backquotes in one column of the tables that compare TRL's names with klimb's."""
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        rows = [re.split(r"(?<!\\)\|", row.strip("|\n")) for row in table.splitlines()]
        if rows[0][0].strip() in ("TRL", "TRL before"):
            for row in rows[2:]:
                yield from re.findall(r"`([^`]+)`", row[column])


TRL_NAMES = sorted(set(cells(0, PAGE.read_text())))
KLIMB_NAMES = sorted(set(cells(1, PAGE.read_text())))


def in_trl(name):
    """True if the class is in the installed TRL, and the option a field of it or an argument."""
    trl = pytest.importorskip("trl")
    owner, _, option = name.partition(".")
    stem = re.sub("(Config|Trainer)$", "", owner)
    if owner == "TrainingArguments":
        found = importlib.import_module("transformers").TrainingArguments
    elif stem in EXPERIMENTAL:
        found = getattr(importlib.import_module(f"trl.experimental.{EXPERIMENTAL[stem]}"), owner, None)
    else:
        found = getattr(trl, owner, None)
    if found is None or not option:
        return found is not None
    if dataclasses.is_dataclass(found):
        return option in {field.name for field in dataclasses.fields(found)}
    return option in inspect.signature(found.__init__).parameters


def in_klimb(name):
    """True if it is an option, an option with a value that is taken, a command, or a name of Python's."""
    if name.startswith("klimb "):
        from typer.main import get_command

        from klimb.cli import app

        verb, option = name.split()[1:3]
        command = get_command(app).commands.get(verb)
        return command is not None and any(option in p.opts for p in command.params)
    if re.fullmatch(r"klimb(\.\w+)+", name):
        module, _, what = name.rpartition(".")
        return hasattr(importlib.import_module(module), what)
    given = yaml.safe_load(name) if ":" in name else {name: None}
    ((option, value),) = given.items()
    if option not in NAMES:
        return False
    if value is None or "." in option:
        return True
    whole = (
        {"learn_from": "data"} if value in ("sft", "reward_model", "kto", "bco") else {"reward_funcs": ["x"]}
    )
    if option in ("divergence", "teacher_draws") or value == "distill":
        whole = {"method": "distill", "target": {"teacher": "x"}}
    if isinstance(value, dict) and value.get("kind") == "entropy_bonus":
        whole["beta"] = 0.1
    if value == "dpo" or option == "kl_penalty":
        whole = {"reward_funcs": ["x"], "method": "rloo"}
    try:
        return Config(**{"dataset_name": "x", **whole, **given}) is not None
    except ValueError:
        return False


@pytest.mark.parametrize("name", [n for n in TRL_NAMES if not n.startswith(GONE)])
def test_every_name_of_trl_is_there(name):
    assert in_trl(name)


@pytest.mark.parametrize("name", [n for n in TRL_NAMES if n.startswith(GONE)])
def test_what_is_said_to_be_gone_is_gone(name):
    assert not in_trl(name)
    assert importlib.util.find_spec("trl.experimental.ppo") is None


@pytest.mark.parametrize("name", KLIMB_NAMES)
def test_every_name_of_klimb_is_there(name):
    assert in_klimb(name)


@pytest.mark.parametrize(
    "name", ["RLOOConfig.betta", "NoConfig.beta", "GRPOTrainer.ref_model", "KTOConfig.x"]
)
def test_a_wrong_name_of_trl_is_found(name):
    assert not in_trl(name)


@pytest.mark.parametrize(
    "name",
    ["betta", "method: gropo", "family.rank", "klimb climb --resum RUN", "klimb.target.moved", "beta: 0"],
)
def test_a_wrong_name_of_klimb_is_found(name):
    assert not in_klimb(name)


def test_who_types_a_name_of_trl_is_told_ours(klimb, tmp_path):
    assert set(OF_TRL.values()) <= set(NAMES)
    assert not set(OF_TRL) & set(NAMES)
    assert set(OF_TRL) <= {name.rpartition(".")[2] for name in TRL_NAMES}
    status, _, err = klimb("climb", "--loss_type", "dapo")
    assert status == 2
    assert "no option --loss_type (TRL's name; here '--method', see docs/from_trl.md)" in err
    (tmp_path / "run.yaml").write_text("lora_r: 8\n")
    _, _, err = klimb("climb", "-c", tmp_path / "run.yaml")
    assert "no key 'lora_r' (TRL's name; here 'family.r'" in err


def test_the_tables_are_read():
    assert len(TRL_NAMES) > 60
    assert len(KLIMB_NAMES) > 50
    assert list(cells(0, "| TRL | klimb |\n|---|---|\n| `a`, `b` | `c` |\n")) == ["a", "b"]
