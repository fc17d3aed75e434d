"""What a configuration makes of what was typed."""

from klimb.config import load

NEEDED = ["--dataset_name", "a.jsonl", "--reward_funcs", "b.py:c"]


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    config = load(None, [*NEEDED, "--output_dir=~/run", "--plan=~/plan", "--family.start=~/adapter"])
    assert (config.output_dir, config.plan) == ("/home/ann/run", "/home/ann/plan")
    assert config.family.start == "/home/ann/adapter"
