"""Kept completions: what goes in comes out, none twice in one call, the oldest leave first."""

from dataclasses import replace

import pytest
import torch

from klimb.data import Draws, Example, Pool
from klimb.samplers.replay import Replay


def made(examples, num_draws, first=0):
    """A pool whose completions, texts and numbers all carry one running number a prompt."""
    number = torch.arange(first, first + num_draws).repeat(len(examples), 1)
    place = 100 * torch.arange(len(examples))[:, None]
    label = number + place
    return Pool(
        Draws(
            examples,
            [[torch.arange(1 + int(x) % 3) + int(x) for x in group] for group in label],
            finished=label % 2 == 0,
            texts=[[str(int(x)) for x in group] for group in label],
            log_q=-label.float(),
            full_support=True,
        ),
        reward=label / 10,
        log_ref=-2.0 * label,
    )


def labels(pool):
    return [[int(text) for text in group] for group in pool.draws.texts]


def number_kept(replay, example):
    return len(replay.rows.get(example.id, ()))


@pytest.fixture
def two():
    return [Example("a"), Example("b", {"answer": 3})]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_every_field_comes_back_with_its_completion(two):
    replay = Replay().extended(made(two, 6))
    assert [number_kept(replay, e) for e in two] == [6, 6]
    pool = replay.draw([two[1], two[0]], 4, generator=seeded())
    assert [e.prompt for e in pool.draws.examples] == ["b", "a"]
    for p, group in enumerate(labels(pool)):
        for g, label in enumerate(group):
            assert (label >= 100) == (p == 0)
            assert pool.draws.completions[p][g].tolist() == [label + i for i in range(1 + label % 3)]
            assert bool(pool.draws.finished[p, g]) == (label % 2 == 0)
            assert pool.draws.log_q[p, g] == -label
            assert pool.log_ref[p, g] == -2 * label
            assert pool.reward[p, g] == torch.tensor(label / 10)


def test_nothing_twice_in_one_call(two):
    replay = Replay().extended(made(two, 8))
    for seed in range(20):
        pool = replay.draw(two, 5, generator=seeded(seed))
        assert all(len(set(group)) == 5 for group in labels(pool))
    everything = replay.draw(two, 8, generator=seeded())
    assert [sorted(group) for group in labels(everything)] == [list(range(8)), list(range(100, 108))]


def test_every_kept_completion_is_as_likely(two):
    replay, generator = Replay().extended(made(two, 5)), seeded(1)
    counts = torch.zeros(5)
    for _ in range(2000):
        for label in labels(replay.draw(two[:1], 2, generator=generator))[0]:
            counts[label] += 1
    # each is in 2 of 5: 800 of 2000, with standard deviation 22
    assert (counts - 800).abs().max() < 4 * 22


def test_the_generator_decides(two):
    replay = Replay().extended(made(two, 30))
    assert labels(replay.draw(two, 9, generator=seeded(2))) == labels(
        replay.draw(two, 9, generator=seeded(2))
    )
    assert labels(replay.draw(two, 9, generator=seeded(2))) != labels(
        replay.draw(two, 9, generator=seeded(3))
    )


def test_the_oldest_go_first(two):
    replay = Replay(limit=5).extended(made(two, 3)).extended(made(two, 4, first=3))
    assert [number_kept(replay, e) for e in two] == [5, 5]
    assert [sorted(g) for g in labels(replay.draw(two, 5, generator=seeded()))] == [
        [2, 3, 4, 5, 6],
        [102, 103, 104, 105, 106],
    ]
    assert number_kept(Replay(limit=2).extended(made(two, 9)), two[0]) == 2


def test_extending_leaves_the_earlier_replay_alone(two):
    earlier = Replay().extended(made(two[:1], 3))
    later = earlier.extended(made(two, 2, first=3))
    assert (number_kept(earlier, two[0]), number_kept(earlier, two[1])) == (3, 0)
    assert (number_kept(later, two[0]), number_kept(later, two[1])) == (5, 2)


def test_prompts_are_told_apart_by_their_columns_too(two):
    replay = Replay().extended(made(two, 3))
    assert number_kept(replay, Example("b")) == 0
    assert number_kept(replay, Example("b", {"answer": 3})) == 3


def test_too_few_kept_is_an_error(two):
    replay = Replay().extended(made(two[:1], 3))
    with pytest.raises(ValueError, match="3"):
        replay.draw(two[:1], 4, generator=seeded())
    with pytest.raises(ValueError, match="0"):
        replay.draw(two, 1, generator=seeded())


def test_draws_without_texts_are_refused(two):
    pool = made(two, 4)
    with pytest.raises(ValueError, match="got draws without texts"):
        Replay().extended(replace(pool, draws=replace(pool.draws, texts=None)))


def test_of_draws_of_an_unknown_law_no_law_is_handed_out(two):
    pool = made(two, 4)
    unknown = Replay().extended(replace(pool, draws=replace(pool.draws, log_q=None)))
    assert unknown.draw(two, 4, generator=seeded()).draws.log_q is None
    mixed = unknown.extended(made(two, 4, first=4))
    assert mixed.draw(two, 8, generator=seeded()).draws.log_q is None
    assert Replay().extended(pool).draw(two, 4, generator=seeded()).draws.log_q is not None


@pytest.mark.parametrize("known", [True, False, None])
def test_draws_that_could_not_be_everything_are_not_made_honest_by_being_kept(two, known):
    pool = made(two, 4)
    kept = Replay().extended(replace(pool, draws=replace(pool.draws, full_support=known)))
    assert kept.draw(two, 4, generator=seeded()).draws.full_support is known
    mixed = kept.extended(made(two, 4, first=4))
    assert mixed.draw(two, 8, generator=seeded()).draws.full_support is known
