"""Verifiers: each tells right from nearly right, refuses data it cannot judge by, and leaves alone rows without an answer."""

import threading

import pytest
import torch

from klimb.data import Draws, Example
from klimb.rewards.answers import last_number
from klimb.rewards.load import load_reward
from klimb.rewards.score import score
from klimb.rewards.source_hash import source_hash

CHAT = [{"role": "user", "content": "Say hi."}]


def judged(spec, texts, **columns):
    """What a reward gives for texts, through `score`; each column is one value, or a list of one a text."""
    reward = load_reward(spec)
    columns = {n: x if isinstance(x, list) else [x] * len(texts) for n, x in columns.items()}
    examples = [Example(CHAT, {n: x[i] for n, x in columns.items()}) for i in range(len(texts))]
    draws = Draws(
        examples,
        [[torch.tensor([1])] for _ in texts],
        torch.ones(len(texts), 1, dtype=torch.bool),
        texts=[[t] for t in texts],
    )
    return score(reward, draws).total.flatten().tolist()


CASES = [  # spec, columns, {completion: reward}
    ("exact", {"answer": "Paris"}, {"Paris": 1, " Paris\n": 1, "paris": 0, "Paris.": 0, "": 0}),
    ({"func": "exact", "casefold": True}, {"answer": "STRASSE"}, {"straße": 1, "strasse": 1, "strass": 0}),
    ({"func": "exact", "strip": False}, {"answer": "a"}, {"a": 1, "a ": 0}),
    ("exact", {"answer": [["yes", "yep"]] * 3}, {"yes": 1, "yep": 1, "yes yep": 0}),
    ("exact", {"answer": 7}, {"7": 1, "7.0": 0}),
    ({"func": "exact", "column": "gold"}, {"gold": "a", "answer": "b"}, {"a": 1, "b": 0}),
    (
        "numeric",
        {"answer": "She sells 9 eggs, 2 each.\n#### 18"},
        {"9 * 2 = 18": 1, "18.000": 1, "18 or 19": 0, "-18": 0, "1 8": 0, "none": 0, "180": 0},
    ),
    ("numeric", {"answer": 1234.5}, {"1,234.50 in all.": 1, "1234.5e0": 1, "1,23,4.5": 0, "12345": 0}),
    ("numeric", {"answer": -3}, {"x = -3": 1, "x = \u22123": 1, "5-3": 0, "(-3)": 1}),
    ("numeric", {"answer": 12345678901234567891}, {"12345678901234567891": 1, "12345678901234567890": 0}),
    ({"func": "numeric", "tolerance": 0.01}, {"answer": "0.333"}, {"0.34": 1, "0.33": 1, "0.35": 0}),
    ("numeric", {"answer": 1}, {"1e999999999": 0, "1" * 100_000: 0}),
    ({"func": "regex", "pattern": r"\d{4}"}, {}, {"in 1999": 1, "in 199": 0, "": 0}),
    ({"func": "regex", "pattern": r"\d{4}", "mode": "fullmatch"}, {}, {"1999": 1, "1999 ": 0, "a1999": 0}),
    ({"func": "regex", "pattern": "(?i)yes"}, {}, {"YES": 1, "no": 0}),
    ({"func": "length", "target": 4}, {}, {"four": 0, "six!!!": -0.5, "": -1, "a" * 12: -2}),
    ({"func": "length", "target": 2, "unit": "words"}, {}, {"well-known words": 0, "a b c d": -1, "?!": -1}),
]


@pytest.mark.parametrize(("spec", "columns", "expected"), CASES)
def test_right_and_nearly_right(spec, columns, expected):
    assert judged(spec, list(expected), **columns) == list(expected.values())


RULES = [  # a rule, what keeps it, what does not
    ({"words": 2}, ["two words", "It's well-known"], ["one", "one two three"]),
    ({"max_words": 2}, ["one", "one two"], ["one two three"]),
    ({"min_words": 2}, ["one two", "a b c"], ["one", "one-two"]),
    ({"max_sentences": 1}, ["One. ", "No end", "It costs 3.5 euro."], ["One. Two.", "What? No"]),
    ({"min_sentences": 2}, ['"One." Two!', "A? B"], ["One...", "3.5"]),
    (
        {"bullets": 2},
        ["- a\n- b", "List:\n * a\n * b\nDone"],
        ["- a", "- a\n- b\n- c", "-a\n-b", "a - b - c"],
    ),
    ({"lowercase": True}, ["abc 1!"], ["Abc", "aBc", "É"]),
    ({"no_comma": True}, ["a; b"], ["a, b"]),
    ({"contains": "cat"}, ["A Cat.", "cat"], ["concatenate", "cats"]),
    ({"contains": ["cat", "hot dog"]}, ["hot dog and cat"], ["cat", "dog hot cat"]),
    ({"excludes": ["cat", "dog"]}, ["concatenate"], ["a cat", "Dog!"]),
    ({"starts_with": "Dear"}, ["Dear all", "\n Dear"], ["dear", "My Dear"]),
    ({"ends_with": "."}, ["One.", "One. \n"], ["One", "One.)"]),
]


@pytest.mark.parametrize(("rule", "kept", "broken"), RULES)
def test_each_rule(rule, kept, broken):
    found = judged({"func": "constraints", "rules": [rule]}, [*kept, *broken])
    assert found == [1.0] * len(kept) + [0.0] * len(broken)


def test_rules_are_counted_and_nothing_said_keeps_none():
    rules = [{"max_words": 3}, {"lowercase": True}, {"no_comma": True, "ends_with": "."}]
    texts = ["so it is.", "So it is.", "So, it is it", "", " \n"]
    assert judged({"func": "constraints", "rules": rules}, texts) == [1.0, 0.75, 0.0, 0.0, 0.0]
    strict = {"func": "constraints", "rules": rules, "all_or_nothing": True}
    assert judged(strict, texts) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_rules_of_a_column_are_each_rows_own():
    rules = [[{"max_words": 1}], '{"lowercase": true}', {"words": 2, "contains": None}]
    found = judged({"func": "constraints", "column": "rules"}, ["A b", "A b", "A b"], rules=rules)
    assert found == [0.0, 0.0, 1.0]


def test_a_json_schema():
    pytest.importorskip("jsonschema")
    city = {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/name"}, "people": {"type": "integer"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"name": {"type": "string", "minLength": 1}},
    }
    expected = {
        '{"city": "Rome", "people": 3}': 1,
        ' {"city": "Rome"}\n': 1,
        '{"city": ""}': 0,
        '{"city": "Rome", "people": "3"}': 0,
        '{"city": "Rome", "people": NaN}': 0,
        '{"city": "Rome"} and more': 0,
        '```json\n{"city": "Rome"}\n```': 0,
        '{"city": "Rome"': 0,
        "[" * 100_000: 0,
        '{"city": "Rome", "people": ' + "9" * 5000 + "}": 0,  # Python reads no integer of so many digits
    }
    assert judged({"func": "json_schema", "schema": city}, list(expected)) == list(expected.values())
    own = {"func": "json_schema", "column": "schema"}
    assert judged(own, ["1", "1"], schema=[{"type": "integer"}, '{"type": "string"}']) == [1.0, 0.0]
    with pytest.raises(
        ValueError, match=r"reward json_schema: the schema refers to 'http://a.b/c', which is not in it"
    ):
        judged({"func": "json_schema", "schema": {"$ref": "http://a.b/c"}}, ["1"])
    with pytest.raises(ValueError, match=r"column 'schema': got '{', no JSON"):
        judged(own, ["1"], schema="{")


def test_mathematics():
    pytest.importorskip("math_verify")
    right = {
        "1/2": r"So $\frac12$.",
        r"\frac{1}{2}": r"\boxed{0.5}",
        "x^2+1": "It is $1 + x^2$.",
        "1,000": "1000",
    }
    assert judged("math", list(right.values()), answer=list(right)) == [1.0] * 4
    wrong = {"1/2": "0.6", "x^2+1": "$x^2$", "3": "no idea", r"\pi": "3.14", "-2": "2"}
    assert judged("math", list(wrong.values()), answer=list(wrong)) == [0.0] * 5
    with pytest.raises(ValueError, match=r"reward math: column 'answer': got '\?', expected mathematics"):
        judged("math", ["1"], answer="?")
    found = []
    thread = threading.Thread(target=lambda: found.extend(judged("math", ["1/2", "2"], answer="0.5")))
    thread.start()
    thread.join()
    assert found == [1.0, 0.0]  # a signal could not keep time there


def test_mathematics_that_never_ends_is_given_up():
    pytest.importorskip("math_verify")
    text = r"$\frac{1}{2} + 9^{9^{9^{9^{9}}}}$"
    assert judged({"func": "math", "timeout": 1}, [text], answer="7") == [0.0]


def test_rows_without_an_answer_are_left_alone():
    reward = load_reward("exact")
    assert reward(["p", "p"], ["a", "b"], answer=[None, "b"]) == [None, 1.0]
    for spec, column in [
        ("numeric", "answer"),
        ({"func": "constraints", "column": "rules"}, "rules"),
        ({"func": "json_schema", "column": "schema"}, "schema"),
    ]:
        assert load_reward(spec)(["p"], ["a"], **{column: [None]}) == [None]


DATA = [  # spec, columns, what is said
    (
        "exact",
        {"anwser": "a"},
        r"reward exact asks for 'answer' \(did you mean 'anwser'\?\), which is no column",
    ),
    ("numeric", {"answer": "many"}, r"reward numeric: column 'answer': got 'many', expected a number"),
    ({"func": "constraints", "column": "r"}, {"r": "words: 2"}, r"column 'r': got 'words: 2', no JSON"),
    (
        {"func": "constraints", "column": "r"},
        {"r": [[]]},
        r"column 'r': got \[\], expected at least one rule",
    ),
    (
        {"func": "constraints", "column": "r"},
        {"r": {"word": 2}},
        r"no rule 'word' \(did you mean 'words'\?\)",
    ),
    ({"func": "constraints", "column": "r"}, {"r": 3}, r"got 3, expected a list of rules"),
]


@pytest.mark.parametrize(("spec", "columns", "message"), DATA)
def test_data_that_cannot_be_judged_by(spec, columns, message):
    with pytest.raises(ValueError, match=message):
        judged(spec, ["a"], **columns)


def test_numbers_in_texts():
    assert last_number("no numbers.") is None
    assert [str(last_number(t)) for t in ("v1.2.", "a.5", "1e400", "+7", "50%", "$3,000")] == [
        "1.2", "0.5", "1E+400", "7", "50", "3000",
    ]  # fmt: skip


def test_options_are_part_of_the_hash_and_of_the_name_nothing():
    specs = [
        "exact",
        {"func": "exact", "casefold": True},
        {"func": "regex", "pattern": "a"},
        {"func": "regex", "pattern": "b"},
        {"func": "constraints", "rules": [{"words": 1}]},
        {"func": "constraints", "rules": [{"words": 2}]},
        {"func": "json_schema", "schema": {"type": "string"}},
        {"func": "json_schema", "schema": {"type": "object"}},
    ]
    hashes = [source_hash(load_reward(spec)) for spec in specs]
    assert len(set(hashes)) == len(specs)
    assert hashes == [source_hash(load_reward(spec)) for spec in specs]
