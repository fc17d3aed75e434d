"""Prompts: what is read comes back as it stood; what cannot be read is refused by name and line."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from klimb.dataset import load_examples

CHAT = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Say hi."}]
ROWS = [
    {"prompt": "1 + 1 =", "answer": "2", "split": "train"},
    {"prompt": "Was heißt „hoch“?\u2028", "answer": "007", "split": "test"},
    {"prompt": 'say "a, b"\nand stop', "answer": "", "split": "train"},
]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_three_formats_give_the_same_examples(tmp_path, suffix):
    path = write(tmp_path / f"prompts{suffix}", ROWS)
    examples = load_examples(path)
    assert [{"prompt": e.prompt, **e.columns} for e in examples] == ROWS
    assert [e.columns["answer"] for e in load_examples(path, split="train")] == ["2", ""]
    assert [e.prompt for e in load_examples(path, limit=2)] == [r["prompt"] for r in ROWS[:2]]
    renamed = load_examples(path, prompt_column="answer", limit=1)[0]
    assert (renamed.prompt, dict(renamed.columns)) == ("2", {"prompt": "1 + 1 =", "split": "train"})


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_messages_and_missing_columns(tmp_path, suffix):
    named = [{"role": "user", "content": "Hi.", "name": "ann"}]
    path = write(tmp_path / f"chat{suffix}", [{"prompt": CHAT, "level": 3}, {"prompt": named}])
    first, second = load_examples(path)
    # Parquet fills `name: None` into every message; a template must not see it.
    assert first.prompt == CHAT
    assert second.prompt == named
    assert (first.columns, second.columns) == ({"level": 3}, {"level": None})


def test_a_folder_is_read_by_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train-0.parquet", ROWS[:1])
    write(folder / "test-0.parquet", ROWS[1:])
    assert [e.prompt for e in load_examples(folder)] == [ROWS[0]["prompt"]]
    assert [e.prompt for e in load_examples(folder, split="test")] == [r["prompt"] for r in ROWS[1:]]
    with pytest.raises(ValueError, match=r"data: datasets cannot read this folder .*validation.*\.jsonl"):
        load_examples(folder, split="validation")


def test_reading_jsonl_loads_neither_datasets_nor_pyarrow():
    code = (
        "import sys, klimb.dataset; print(sorted({'datasets', 'pyarrow', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


GOOD = '{"prompt": "a", "split": "train"}\n'
BAD = {  # file, content, options, what the message must say
    "missing file": ("review.jsonl", None, {}, r"no such file \(did you mean '.*reviews.jsonl'\?\)"),
    "missing folder": ("nowhere/x.csv", None, {}, r"no such file: there is no folder .*nowhere either"),
    "neither file nor data set": ("reviews.txt", None, {}, r"no file of this name .*and as a data set: "),
    "unknown ending": ("p.yaml", "a: 1", {}, r"ending in '.yaml', expected one of .jsonl, .csv, .parquet"),
    "missing column": ("p.jsonl", '{"promt": "a", "b": 1}', {}, r"no column 'prompt' \(did you mean 'promt'\?\); the columns there are promt, b;"),
    "empty file": ("p.jsonl", "\n", {}, r"the data set is empty"),
    "header only": ("p.csv", "prompt\n", {}, r"the data set is empty"),
    "empty prompt": ("p.jsonl", GOOD + '\n{"prompt": " "}', {}, r"line 3: the prompt is empty"),
    "missing prompt": ("p.jsonl", GOOD + '{"split": "train"}', {}, r"line 2: the prompt is empty \(column 'prompt' is None\)"),
    "no messages": ("p.jsonl", '{"prompt": []}', {}, r"line 1: the prompt is empty"),
    "last message empty": ("p.jsonl", '{"prompt": [{"role": "user", "content": ""}]}', {}, r"last message says nothing"),
    "number as prompt": ("p.jsonl", '{"prompt": 3}', {}, r"line 1: got a prompt of type int, expected text or a list"),
    "message without role": ("p.jsonl", '{"prompt": [{"content": "a"}]}', {}, r"line 1: got the message .*expected"),
    "malformed line": ("p.jsonl", GOOD + '{"prompt": "a"', {}, r"line 2: not JSON: .* at column 15; got '.*prompt"),
    "list instead of object": ("p.jsonl", '["a"]', {}, r"line 1: got .*expected an object"),
    "not UTF-8": ("p.jsonl", b'{"prompt": "\xff"}', {}, r"not UTF-8 text \(byte 12\)"),
    "ragged CSV": ("p.csv", "prompt,b\na,1\nc,d,e\n", {}, r"line 3: got more or fewer values"),
    "short CSV": ("p.csv", "prompt,b\na\n", {}, r"line 2: got more or fewer values"),
    "broken CSV": ("p.csv", 'prompt\n"a" b\n', {}, r"after line 1: not CSV"),
    "not Parquet": ("p.parquet", "PAR0", {}, r"p.parquet: not a Parquet file"),
    "split not there": ("p.jsonl", GOOD, {"split": "trian"}, r"no split 'trian' \(did you mean 'train'\?\); the ones there are train"),
    "no splits at all": ("p.jsonl", '{"prompt": "a"}', {"split": "test"}, r"no column 'split', so all of it is 'train'"),
    "limit": ("p.jsonl", GOOD, {"limit": 0}, r"limit: got 0, expected at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name, content, options, message = BAD[case]
    (tmp_path / "reviews.jsonl").write_text(GOOD)
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_examples(path, **options)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}')
    assert [e.prompt for e in load_examples("~/p.jsonl")] == ["a"]
    with pytest.raises(ValueError, match=rf"{tmp_path}/q.jsonl: no such file"):
        load_examples(Path("~/q.jsonl"))


def test_a_file_without_splits_is_all_train(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}')
    assert len(load_examples(path, split="train")) == 1


def test_the_reviews_are_96_and_32_different_things_that_lean_nowhere():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    path = Path(__file__).parents[2] / "examples" / "data" / "reviews.jsonl"
    train, test = load_examples(path, split="train"), load_examples(path, split="test")
    assert (len(train), len(test)) == (96, 32)
    subjects = [e.columns["subject"] for e in train + test]
    assert len(set(subjects)) == 128
    assert max(len(subject.split()) for subject in subjects) <= 10
    analyzer = SentimentIntensityAnalyzer()
    for example in train + test:
        subject = example.columns["subject"]
        assert example.prompt == [
            {"role": "system", "content": "You write short reviews."},
            {"role": "user", "content": f"Review {subject} in a few words."},
        ]
        assert analyzer.polarity_scores(subject)["compound"] == 0, subject
