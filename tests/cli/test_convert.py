"""From one format of judged completions to another: nothing changes on the way there and back, and what is lost is said."""

import itertools
import json

import pytest

from klimb.comparisons import load_judged
from klimb.convert import FORMATS, convert
from klimb.dataset import load_examples, read_rows
from klimb.store import write_rows

SAID = ["very good", "bad, poor", 'a "fine" meal\nof two lines', "cold \u00fc"]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "review"}]


def rows_of(kind, *, chat=False):
    """Four rows of a kind; texts have commas, quotes, lines and accents."""
    for i, (one, other) in enumerate(itertools.pairwise([*SAID, "kind room"])):
        prompt = [*CHAT[:1], {"role": "user", "content": f"review {i}"}] if chat else f"review {i}"
        good, bad = ([{"role": "assistant", "content": text}] if chat else text for text in (one, other))
        row = {"prompt": prompt}
        if kind == "pairs":
            row |= {"chosen": good, "rejected": bad, "score_chosen": 2.0 - i / 4, "score_rejected": -0.5}
        elif kind == "unpaired":
            row |= {"completion": good if i % 2 else bad, "label": bool(i % 2)}
        elif kind == "ranked":
            row |= {"completions": [bad, good], "scores": [0.0, 1.5]}
        elif kind == "messages":
            row = {
                "messages": [
                    *(prompt if chat else [{"role": "user", "content": prompt}]),
                    {"role": "assistant", "content": one},
                ]
            }
        else:
            row |= {"completion": good}
        yield {**row, "split": "test" if i == 3 else "train", "row": f"own {i}"}


@pytest.fixture
def file(tmp_path):
    def write(rows, name="data.jsonl"):
        write_rows(tmp_path / name, list(rows))
        return tmp_path / name

    return write


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("kind", "by"),
    [
        ("pairs", "ranked"),
        ("pairs", "pairs"),
        ("unpaired", "unpaired"),
        ("ranked", "ranked"),
        ("completions", "completions"),
        ("completions", "messages"),
        ("messages", "messages"),
        ("messages", "completions"),
    ],
)
def test_there_and_back_is_the_same(file, kind, by, chat):
    rows = list(rows_of(kind, chat=chat))
    there = convert(file(rows), by)
    again = convert(file(there.rows, "there.jsonl"), kind).rows
    if (
        kind == "completions" and by == "messages" and not chat
    ):  # a conversation stays one, unless it is asked for
        assert all(isinstance(row["prompt"], list) for row in again)
        again = convert(file(there.rows, "there.jsonl"), kind, form="text").rows
    assert again == rows
    assert there.dropped == 0


@pytest.mark.parametrize("chat", [False, True])
def test_pairs_by_labels_come_back_without_their_scores(file, chat):
    rows = list(rows_of("pairs", chat=chat))
    back = convert(file(convert(file(rows), "unpaired").rows, "there.jsonl"), "pairs")
    scores = ("score_chosen", "score_rejected")
    assert back.rows == [{n: x for n, x in row.items() if n not in scores} for row in rows]
    assert back.dropped == 0


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("kind", ["pairs", "unpaired", "completions"])
def test_every_kind_of_file_reads_the_same(file, kind, ending):
    rows = list(rows_of(kind))
    one, other = load_judged(file(rows)), load_judged(file(rows, f"other{ending}"))
    for a, b in zip(one, other, strict=True):
        assert (a.example, a.completions, a.labels) == (b.example, b.completions, b.labels)


def test_chats_and_lists_go_through_parquet(file):
    for kind in ("pairs", "ranked", "messages"):
        rows = list(rows_of(kind, chat=True))
        assert [row for _, row in read_rows(file(rows, "other.parquet"))[0]] == rows


def test_text_becomes_a_conversation_and_back(file):
    rows = list(rows_of("pairs"))
    there = convert(file(rows), "pairs", form="chat").rows
    assert there[0]["prompt"] == [{"role": "user", "content": "review 0"}]
    assert there[0]["chosen"] == [{"role": "assistant", "content": SAID[0]}]
    assert convert(file(there, "there.jsonl"), "pairs", form="text").rows == rows
    with pytest.raises(
        ValueError, match=r"line 1: got a prompt of the roles system, user, of which only a model's template"
    ):
        convert(file(rows_of("pairs", chat=True)), "pairs", form="text")


def test_an_implicit_prompt_becomes_a_column(file):
    chats = [[*CHAT, {"role": "assistant", "content": text}] for text in SAID[:2]]
    (row,) = convert(file([{"chosen": chats[0], "rejected": chats[1]}]), "pairs").rows
    assert (row["prompt"], row["chosen"]) == (CHAT, chats[0][2:])


def test_ranks_give_every_pair_whose_scores_differ(file):
    rows = [
        {"prompt": "a", "completions": ["x", "y", "z"], "scores": [1, 3, 1]},
        {"prompt": "b", "completions": ["x", "y", "z"], "scores": [2, 2, 2]},
    ]
    made = convert(file(rows), "pairs")
    assert [(row["chosen"], row["rejected"], row["score_chosen"]) for row in made.rows] == [
        ("y", "x", 3.0),
        ("y", "z", 3.0),
    ]
    assert (made.dropped, made.because) == (3, "all scores of a row are the same")


def test_rows_of_different_numbers_become_pairs(file):
    rows = [
        {"prompt": "a", "completions": list("xyz"), "scores": [1, 2, 3]},
        {"prompt": "b", "completions": list("xy"), "scores": [1, 2]},
    ]
    made = convert(file(rows), "pairs")
    assert (len(made.rows), made.dropped) == (4, 0)
    with pytest.raises(
        ValueError, match=r"rows of 2 to 3 completions, expected as many in each; make pairs of them"
    ):
        load_judged(file(rows))


def test_labels_of_one_kind_alone_give_no_pair_and_are_counted(file):
    labels = [("a", "x", True), ("b", "y", False), ("a", "z", False), ("a", "w", True)]
    rows = [{"prompt": p, "completion": c, "label": label} for p, c, label in labels]
    made = convert(file(rows), "pairs")
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in made.rows] == [("a", "x", "z")]
    assert made.dropped == 2
    with pytest.raises(
        ValueError, match="holds unpaired, and no pairs come of them: a pair takes a good and a bad"
    ):
        convert(file(rows[:2], "few.jsonl"), "pairs")


def test_the_test_split_stays_apart(file):
    rows = [
        {"prompt": "a", "completion": "x", "label": True, "split": "train"},
        {"prompt": "a", "completion": "y", "label": False, "split": "test"},
    ]
    with pytest.raises(ValueError, match="no pairs come of them"):
        convert(file(rows), "pairs")


def test_prompts_come_once_and_can_be_planned_on(file, tmp_path):
    rows = [row for row in rows_of("pairs") for _ in range(2)]
    made = convert(file(rows), "prompts")
    assert (len(made.rows), made.dropped, made.unit) == (4, 4, "rows")
    write_rows(tmp_path / "prompts.csv", made.rows)
    assert [x.prompt for x in load_examples(tmp_path / "prompts.csv")] == [f"review {i}" for i in range(4)]


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", ["pairs", "unpaired", "ranked", "completions", "messages"])
def test_every_other_conversion_is_made_or_refused_by_name(file, kind, to):
    path = file(rows_of(kind))
    judged = {
        "pairs": ("pairs", "unpaired", "ranked"),
        "unpaired": ("unpaired",),
        "ranked": ("pairs", "ranked"),
    }
    if to in (*judged.get(kind, ()), *FORMATS[3:]):
        assert convert(path, to).rows
    else:
        with pytest.raises(ValueError, match=f"holds {kind}, and no {to} come of them: "):
            convert(path, to)


def test_the_command_writes_whole_files_and_says_what_is_left(klimb, file, tmp_path):
    path, out = file(rows_of("pairs")), tmp_path / "out.parquet"
    status, said, err = klimb("data", "convert", path, "--to", "completions", "-o", out, "--split", "train")
    assert (status, err) == (0, "")
    assert (
        said == f"{out}: 3 rows of completions, from pairs; 3 completions left out: only the best are kept\n"
    )
    assert [row["completion"] for _, row in read_rows(out)[0]] == SAID[:3]
    before = out.read_bytes()
    status, _, err = klimb("data", "convert", path, "--to", "messages", "-o", out)
    assert (status, err) == (
        2,
        f"klimb: -o {out}: is there already; take another name, or --force to replace it\n",
    )
    assert out.read_bytes() == before
    assert klimb("data", "convert", path, "--to", "messages", "-o", out, "--force")[0] == 0
    assert read_rows(out)[1][0] == "messages"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "pair"], "got 'pair' (did you mean 'pairs'?)"),
        (["--to", "pairs", "--as", "chats"], "--as: got 'chats' (did you mean 'chat'?)"),
        (["--to", "pairs", "-o", "out.json"], "expected a file ending in .jsonl, .csv or .parquet"),
        (["--to", "pairs", "-o", "no/where.csv"], "no such folder no"),
        (["--to", "ranked", "-o", "out.csv"], "column 'completions' holds a list"),
        (["--to", "pairs", "--split", "dev"], "no split 'dev'"),
    ],
)
def test_what_cannot_be_written_is_refused(klimb, file, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    path = file(rows_of("pairs"))
    there = sorted(tmp_path.rglob("*"))
    status, out, err = klimb("data", "convert", path, *words, *([] if "-o" in words else ["-o", "out.jsonl"]))
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == there


def test_a_wrong_row_stops_all_of_it(klimb, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "a", "chosen": "x", "rejected": "x"}) + "\n")
    status, _, err = klimb("data", "convert", path, "--to", "pairs", "-o", tmp_path / "b.jsonl")
    assert status == 2
    assert "line 1: chosen and rejected are the same" in err
    assert not (tmp_path / "b.jsonl").exists()


def test_scores_that_say_otherwise_than_the_choice_are_no_ranking(file):
    row = {"prompt": "a", "chosen": "x", "rejected": "y", "score_chosen": 0.0, "score_rejected": 1.0}
    with pytest.raises(ValueError, match="line 1: chosen has no larger score"):
        convert(file([row]), "ranked")
    margin = {"prompt": "a", "chosen": "x", "rejected": "y", "margin": 0.5}
    assert convert(file([margin], "m.jsonl"), "ranked").rows[0]["scores"] == [0.5, 0.0]


def test_what_a_file_cannot_hold_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"a number is NaN or infinite, which JSON has not; use \.parquet"):
        write_rows(tmp_path / "a.jsonl", [{"x": float("nan")}])
    with pytest.raises(ValueError, match="values of one kind"):
        write_rows(tmp_path / "a.parquet", [{"x": 1}, {"x": "b"}])
    assert not list(tmp_path.iterdir())
