"""Files of judged completions that are wrong in some row: which, and how, before a model is loaded."""

import json

import pytest

from klimb.comparisons import load_judged, read_judged

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}
ASSISTANT = [{"role": "assistant", "content": "b"}]
WRONG = [
    ({**PAIR, "chosen": ""}, "line 2: a completion is empty"),
    ({**PAIR, "chosen": "c"}, "line 2: chosen and rejected are the same"),
    ({**PAIR, "chosen": 7}, "line 2: got a completion of type int"),
    ({**PAIR, "rejected": None}, "line 2: got a completion of type NoneType"),
    ({**PAIR, "prompt": " "}, "line 2: the prompt is empty"),
    ({**PAIR, "prompt": None, "chosen": "ab", "rejected": "cd"}, "do not begin alike"),
    ({**PAIR, "chosen": "x" * 1_000_001}, "line 2: a completion of 1,000,001 characters"),
    ({**PAIR, "chosen": ASSISTANT, "rejected": [{"role": "user", "content": "c"}]}, "role 'user'"),
    ({**PAIR, "chosen": ASSISTANT * 2, "rejected": ASSISTANT}, "several messages"),
    ({**PAIR, "chosen": [{"role": "assistant"}], "rejected": ASSISTANT}, "got the message"),
]


def written(tmp_path, *rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(("row", "said"), WRONG)
def test_a_wrong_pair_is_named_by_its_line(tmp_path, row, said):
    with pytest.raises(ValueError, match=said):
        load_judged(written(tmp_path, PAIR, row))


@pytest.mark.parametrize("label", ["yes", 2, None, 0.5])
def test_a_label_that_is_no_boolean(tmp_path, label):
    good = {"prompt": "a", "completion": "b", "label": True}
    with pytest.raises(ValueError, match=r"line 2: got the label .*expected true or false"):
        load_judged(written(tmp_path, good, {**good, "label": label}))


@pytest.mark.parametrize("scores", [[1, float("nan")], [1], ["x", 2], [True, 2]])
def test_scores_that_are_no_numbers(tmp_path, scores):
    row = {"prompt": "a", "completions": ["b", "c"], "scores": [1, 2]}
    with pytest.raises(ValueError, match=r"line 2: (got scores|expected completions and scores)"):
        load_judged(written(tmp_path, row, {**row, "scores": scores}))


def test_rows_of_different_sizes(tmp_path):
    rows = [{"prompt": "a", "completions": list("bcd")[:n], "scores": [1, 2, 3][:n]} for n in (2, 3)]
    with pytest.raises(ValueError, match="rows of 2 to 3 completions"):
        load_judged(written(tmp_path, *rows))


def test_every_problem_is_listed_and_the_good_rows_are_kept(tmp_path):
    judged, problems = read_judged(written(tmp_path, PAIR, *(row for row, _ in WRONG), PAIR))
    assert (len(judged), len(problems)) == (2, len(WRONG))
    with pytest.raises(ValueError, match=r"and 9 more; klimb data check lists them"):
        load_judged(written(tmp_path, PAIR, *(row for row, _ in WRONG)))


def test_columns_that_say_nothing_name_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'chosen'"):
        load_judged(written(tmp_path, {"prompt": "a", "choosen": "b", "rejected": "c"}))
    with pytest.raises(ValueError, match="no scores of these pairs"):
        load_judged(written(tmp_path, PAIR), by_scores=True)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(ValueError, match="not a Parquet file"):
        load_judged(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(b'{"prompt": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        load_judged(tmp_path / "b.jsonl")


def test_a_prompt_that_is_missing_is_what_both_begin_with(tmp_path):
    text = {"chosen": "Say a word: good day", "rejected": "Say a word: bad day"}
    user = [{"role": "user", "content": "Say a word"}]
    chat = {
        "chosen": [*user, {"role": "assistant", "content": "good"}],
        "rejected": [*user, {"role": "assistant", "content": "bad"}],
    }
    (judged,) = load_judged(written(tmp_path, text))
    assert (judged.example.prompt, judged.completions) == ("Say a word:", (" good day", " bad day"))
    (judged,) = load_judged(written(tmp_path, chat))
    assert (judged.example.prompt, judged.completions) == (user, ("good", "bad"))
    csv = tmp_path / "c.csv"
    csv.write_text("prompt,completion,label\na,b,true\na,c,False\n")
    assert [row.labels for row in load_judged(csv)] == [(1.0,), (0.0,)]


def test_no_two_rows_are_one_and_columns_stay(tmp_path):
    first, second = load_judged(written(tmp_path, {**PAIR, "answer": 3}, {**PAIR, "answer": 3}))
    assert first.example.id != second.example.id
    assert first.example.columns["answer"] == 3
