"""What a configuration makes of what was typed."""

import re

import pytest

from klimb.config import load

NEEDED = ["--dataset_name", "a.jsonl", "--reward_funcs", "b.py:c"]


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    config = load(None, [*NEEDED, "--output_dir=~/run", "--plan=~/plan", "--family.start=~/adapter"])
    assert (config.output_dir, config.plan) == ("/home/ann/run", "/home/ann/plan")
    assert config.family.start == "/home/ann/adapter"


TYPED = {  # what was typed, what is said of it
    "--learning_rate fast": "command line: learning_rate: got 'fast', expected a number",
    "--max_steps 1.5": "command line: max_steps: got '1.5', expected a whole number",
    "--max_steps -1": "command line: max_steps: got '-1', expected a number greater than or equal to 0",
    "--keep_fresh maybe": "command line: keep_fresh: got 'maybe', expected true or false",
    "--method grpoo": "command line: method: got 'grpoo': no such method (did you mean 'grpo'?); klimb methods lists them",
    "--family.kind prefixes": "command line: family.kind: got 'prefixes', expected one of 'lora', 'full', 'soft_prompt', 'prefix'",
    "--family full": "command line: family: got 'full', expected fields of it, such as family.kind or family.r",
    "--target tilt": "command line: target: got 'tilt', expected fields of it, such as target.kind or target.bonus",
    "--target.kind forbid": "command line: target.kind: forbid is in Python only: klimb.target.forbid",
    "--target.kind entropy_bonus": "command line: target.bonus is missing; give it in the file or as --target.bonus",
    "--target.kind entropy_bonus --target.bonus -1": "command line: target.bonus: got '-1', expected a number greater "
    "than 0",
    "--target.bonus 1": "command line: target.bonus does not go with target.kind tilt; leave it out, or change the kind",
    "--beta -1": "command line: beta: got '-1', expected a positive number, in units of reward per nat",
    "--reward_weights []": "command line: got 0 reward_weights for 1 reward_funcs, expected as many of each",
    "--learning_rate --seed 1": "command line: --learning_rate has no value; expected --learning_rate VALUE",
    "--keep_fresh": "command line: --keep_fresh has no value; expected --keep_fresh VALUE",
    "seed 1": "command line: got 'seed', expected an option such as --learning_rate 1e-3",
    "--model x": "command line: no option --model (did you mean '--model_name_or_path'?); klimb schema lists them",
    "--lr 1": "command line: no option --lr; klimb schema lists them",
    "--beta 1 --kl_budget 1": "command line: got beta 1 and kl_budget 1, expected one of beta, kl_budget, "
    "reward_goal; switch the others off (--beta null or --kl_budget null)",
}


@pytest.mark.parametrize("typed", TYPED)
def test_what_is_wrong_is_said_in_the_words_of_the_option(typed):
    with pytest.raises(ValueError, match=f"^{re.escape(TYPED[typed])}$"):
        load(None, [*NEEDED, *typed.split()])


def test_a_message_names_the_places_it_may_be_about(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("dataset_name: a.jsonl\nreward_funcs: b.py:c\nbeta: 0.1\n")
    with pytest.raises(ValueError, match=r"run\.yaml and command line: got beta 0\.1 and kl_budget 1"):
        load(file, ["--kl_budget", "1"])
    assert load(file, ["--kl_budget", "1", "--beta", "null"]).kl_budget == 1
    with pytest.raises(ValueError, match=r"got a folder, expected a YAML file"):
        load(tmp_path)
    file.write_text("")
    with pytest.raises(ValueError, match=r"run\.yaml: got an empty file"):
        load(file)


def test_an_option_changes_the_kind_of_target_or_a_field_of_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "dataset_name: a.jsonl\nreward_funcs: b.py:c\nbeta: 0.5\ntarget: {kind: entropy_bonus, bonus: 0.1}\n"
    )
    assert load(file).target.model_dump() == {"kind": "entropy_bonus", "bonus": 0.1}
    assert load(file, ["--target.bonus", "0.2"]).target.model_dump() == {
        "kind": "entropy_bonus",
        "bonus": 0.2,
    }
    assert load(file, ["--target.kind", "length_normalized"]).target.kind == "length_normalized"
    assert load(None, NEEDED).target.kind == "tilt"
