"""The model of a step's cost: what must hold whatever its constants are."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "benchmarks"))
from scale_model import H100, MODELS, THREAD, Work, fits, fitted, held, seconds, total

SMALL, LARGE = MODELS[0], MODELS[-1]


def test_one_rank_has_nobody_to_talk_to_and_more_ranks_change_nothing_else():
    one, eight = (seconds(H100, SMALL, Work(ranks=n)) for n in (1, 8))
    assert one["talk"] == one["sent"] == 0
    assert eight["talk"] > 0
    assert all(one[part] == eight[part] for part in ("draw", "score", "train"))


def test_a_sum_over_many_ranks_sends_twice_the_gradients_whatever_their_number():
    work = Work(ranks=512)
    assert seconds(H100, SMALL, work)["sent"] == pytest.approx(
        4 * work.adapter_share * SMALL.parameters, rel=0.01
    )


def test_reading_and_learning_cost_as_the_tokens_and_drawing_not_while_memory_is_read():
    few, many = (seconds(H100, LARGE, Work(prompts=p, prompt_tokens=0)) for p in (1, 2))
    assert many["score"] == pytest.approx(2 * few["score"])
    assert many["train"] == pytest.approx(2 * few["train"])
    assert many["draw"] < 1.1 * few["draw"]  # the weights are read once for all rows
    slow_few, slow_many = (seconds(THREAD, LARGE, Work(prompts=p)) for p in (8, 16))
    assert slow_many["draw"] == pytest.approx(2 * slow_few["draw"])  # there products decide


def test_all_weights_cost_half_as_much_again_and_more_memory():
    some, every = (Work(full=full) for full in (False, True))
    assert seconds(H100, SMALL, every)["train"] == pytest.approx(1.5 * seconds(H100, SMALL, some)["train"])
    assert held(SMALL, every) > held(SMALL, some)


def test_split_layers_are_held_once_by_all_ranks_together_and_gathered_for_each_chunk():
    whole, split = (Work(ranks=64, split=split) for split in (False, True))
    assert held(LARGE, split) < held(LARGE, whole) / 2
    coarse = replace(split, chunk=4 * split.chunk)
    assert seconds(H100, LARGE, split)["talk"] > 2 * seconds(H100, LARGE, coarse)["talk"]


def test_the_largest_model_does_not_fit_one_card_and_is_split_over_many():
    assert fits(LARGE, Work(ranks=1)) is None
    assert fits(LARGE, Work(ranks=64)).split
    assert not fits(SMALL, Work(ranks=64)).split


def test_a_fitted_machine_says_what_was_measured():
    measured, work = {"draw": 3.0, "score": 2.0, "update": 5.0}, Work()
    said = seconds(fitted(THREAD, SMALL, work, measured), SMALL, work)
    assert total(said) == pytest.approx(10.0)
    assert said["train"] == pytest.approx(5.0)
