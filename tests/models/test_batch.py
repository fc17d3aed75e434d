"""The draws of a step: prompts without contrast give up their places, and what is known of the others stays theirs."""

import pytest
import torch

from klimb.batch import fresh_batch
from klimb.data import Draws, Example, Pool, select_pool

EXAMPLES = [Example(f"{number}") for number in range(8)]
ALIKE = {1, 2, 4}
"""examples whose completions all get one reward"""


def pool_of(examples):
    """Two completions of each; every number tells which example it belongs to."""
    numbers = torch.tensor([float(e.prompt) for e in examples])
    differ = torch.tensor([e.prompt not in {str(i) for i in ALIKE} for e in examples])
    completions = [[torch.full((2,), int(n)), torch.full((1,), int(n))] for n in numbers.tolist()]
    draws = Draws(list(examples), completions, torch.ones(len(examples), 2, dtype=torch.bool))
    reward = torch.stack([numbers, numbers + differ], 1)
    return Pool(
        draws,
        reward,
        -reward,
        {"part": 2 * reward},
        token_log_ref=numbers.repeat_interleave(3),
        log_pi=3 * reward,
    )


def batch(prompts, order, max_rounds):
    asked = []

    def draw(examples):
        asked.append([int(e.prompt) for e in examples])
        return pool_of(examples), {"draw": 1.0, "score": 0.5}

    return fresh_batch(EXAMPLES, prompts, order, draw, max_rounds=max_rounds), asked


def test_one_round_keeps_every_prompt():
    found, asked = batch([0, 1, 2], [3, 4], 1)
    assert (found.prompts, found.order, asked) == ([0, 1, 2], (3, 4), [[0, 1, 2]])
    assert (found.num_drawn, found.num_alike) == (3, 2)


def test_prompts_without_contrast_give_up_their_places():
    found, asked = batch([0, 1, 2], [3, 4, 5, 6], 3)
    assert asked == [[0, 1, 2], [3, 4], [5]]
    assert (found.prompts, found.order) == ([0, 3, 5], (6,))
    assert (found.num_drawn, found.num_alike) == (6, 3)
    assert found.seconds == {"draw": 3.0, "score": 1.5}
    assert [e.prompt for e in found.pool.draws.examples] == ["0", "3", "5"]
    assert found.pool.reward[:, 0].tolist() == [0.0, 3.0, 5.0]


def test_the_end_of_the_pass_or_of_the_rounds_ends_it():
    assert batch([0, 1, 2], [4], 5)[0].prompts == [0]
    assert batch([0, 1, 2], [4, 3], 2)[0].prompts == [0, 3]


def test_where_nothing_has_contrast_the_first_prompts_stay():
    found, asked = batch([1, 2], [4], 5)
    assert asked == [[1, 2], [4]]
    assert found.prompts == [1, 2]
    assert found.pool.reward[:, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("index", [[2, 0], [1]])
def test_what_is_known_goes_with_its_prompt(index):
    chosen, alone = select_pool(pool_of(EXAMPLES[:3]), index), pool_of([EXAMPLES[i] for i in index])
    for name in ("reward", "log_ref", "log_pi", "token_log_ref"):
        assert torch.equal(getattr(chosen, name), getattr(alone, name)), name
    assert torch.equal(chosen.parts["part"], alone.parts["part"])
    assert chosen.draws.examples == alone.draws.examples
    assert chosen.token_log_pi is None
