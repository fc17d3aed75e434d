"""Puzzles that are made: the same from the same seed, other ones to test on, scored by what their columns hold."""

import json

import pytest

from klimb.dataset import load_examples
from klimb.rewards.load import load_reward
from klimb.rewards.weighted_sum import weighted_sum
from klimb.tasks import generated

pytest.importorskip("reasoning_gym")
SUMS = "reasoning_gym:chain_sum?size=20&seed=3&max_terms=3"


def test_rows_are_the_tasks_own():
    examples = load_examples(SUMS)
    assert len(examples) == 20
    assert set(examples[0].columns) == {"question", "answer", "puzzle"}
    assert examples[0].prompt == [{"role": "user", "content": examples[0].columns["question"]}]
    assert load_examples(SUMS, prompt_column="question")[0].prompt == examples[0].columns["question"]
    assert load_examples(SUMS) == examples
    assert len(load_examples("reasoning_gym:chain_sum", limit=7)) == 7
    puzzle = json.loads(examples[0].columns["puzzle"])
    assert puzzle["task"] == "chain_sum"
    assert puzzle["options"] == {"size": 20, "seed": 3, "max_terms": 3}
    assert all(json.loads(x.columns["puzzle"])["entry"]["metadata"]["num_terms"] <= 3 for x in examples)


def test_the_splits_are_others():
    train, test = ([x.prompt[0]["content"] for x in load_examples(SUMS, split=s)] for s in ("train", "test"))
    assert not set(train) & set(test)
    shifted = [x.prompt[0]["content"] for x in load_examples(SUMS.replace("seed=3", "seed=4"))]
    assert set(train) & set(shifted)  # which is why the test's seed is far away, and not the next one


@pytest.mark.parametrize("task", ["chain_sum", "word_sorting", "spell_backward", "countdown?min_value=2"])
def test_answers_of_their_own_are_right(task):
    examples = load_examples(f"reasoning_gym:{task}", limit=5)
    whole = weighted_sum(
        [load_reward({"func": "reasoning_gym", "run_answers": task.startswith("countdown")})]
    )
    puzzles = [x.columns["puzzle"] for x in examples]
    answers = [x.columns["answer"] for x in examples]
    assert whole([x.prompt for x in examples], [f" {a}\n" for a in answers], puzzle=puzzles) == [1.0] * 5
    assert max(whole([x.prompt for x in examples], ["no idea"] * 5, puzzle=puzzles)) < 0.5
    assert min(whole([x.prompt for x in examples], answers[1:] + answers[:1], puzzle=puzzles)) < 1


def test_a_tag_holds_the_answer():
    (example,) = load_examples(SUMS, limit=1)
    reward, right = load_reward({"func": "reasoning_gym", "tag": "answer"}), example.columns["answer"]
    texts = [f"<answer>7</answer> or <answer>\n{right} </answer>!", right, f"<answer>{right}"]
    assert reward(["p"] * 3, texts, puzzle=[example.columns["puzzle"]] * 3) == [1.0, 0.0, 0.0]


def test_what_a_model_wrote_is_not_run_unasked(tmp_path):
    (example,) = load_examples("reasoning_gym:spiral_matrix", limit=1)
    written = tmp_path / "written"
    attack = f"[open({str(written)!r}, 'w')]"
    with pytest.raises(ValueError, match=r"reasoning-gym scores spiral_matrix by running answers as Python"):
        load_reward("reasoning_gym")(["p"], [attack], puzzle=[example.columns["puzzle"]])
    assert not written.exists()


def test_answers_that_a_checker_stumbles_over_are_worth_nothing():
    (example,) = load_examples("reasoning_gym:prime_factorization", limit=1)
    assert load_reward("reasoning_gym")(["p"], ["x"], puzzle=[example.columns["puzzle"]]) == [0.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("chain_sums", r"no task 'chain_sums' \(did you mean 'chain_sum'\?\)"),
        ("chain_sum?sise=2", r"no option 'sise' \(did you mean 'size'\?\); there are "),
        ("chain_sum?size=0", r"size: got 0, expected a whole number from 1 to"),
        ("chain_sum?size=many", r"size: got 'many', expected a whole number"),
        ("chain_sum?seed=a", r"seed: got 'a', expected a whole number"),
        ("chain_sum?size", r"got 'size', expected options after the \?"),
        ("chain_sum?max_terms=0", r"chain_sum refuses these options: "),
    ],
)
def test_what_cannot_be_made(name, message):
    with pytest.raises(ValueError, match=message):
        load_examples(f"reasoning_gym:{name}")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_task_that_json_changes():
    with pytest.raises(ValueError, match="written as JSON, its puzzles are scored otherwise"):
        load_examples("reasoning_gym:arc_agi?size=1")


def test_splits_and_columns_that_are_not_there():
    with pytest.raises(ValueError, match=r"no split 'dev'; there are train and test"):
        list(generated(SUMS, "dev"))
    for puzzle in ("x", "{}", 3, '{"task": "chain_sum"}'):
        with pytest.raises(ValueError, match=r"column 'puzzle': got .*, expected a puzzle that dataset_name"):
            load_reward("reasoning_gym")(["p"], ["1"], puzzle=[puzzle])
