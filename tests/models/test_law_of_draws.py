"""The law that ancestral states is the law of the policy, and the law of the text as transformers scores it.

Three numbers for one completion: log_q, summed while drawing (cached, batched, left-padded, rows leaving as they end);
log_prob, scored afterwards (prompt shared, completions side by side); plain, one forward pass of one sequence without
cache and without padding. They agree within 1e-4 nats a sequence in float32. Each way to get them wrong that we could
think of is done on purpose, and the same comparison must notice it.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch

from klimb.data import pick, select
from klimb.models.families import lora
from klimb.models.policy import CausalPolicy
from klimb.samplers.ancestral import ancestral

TOLERANCE = 1e-4
LONGEST = 9
draw = partial(ancestral, max_completion_length=LONGEST)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scored(policy, draws):
    with torch.no_grad():
        return draws.sequence_sums(policy.log_prob(draws))


def worst(a, b):
    return (a.double() - b.double()).abs().max().item()


def test_drawn_scored_and_plain_agree(policy, examples, plain_sums):
    draws = draw(policy, examples, 6, generator=seeded())
    lengths = draws.lengths.flatten().tolist()
    assert min(lengths) < LONGEST  # some end early and leave the batch
    assert max(lengths) == LONGEST
    plain = plain_sums(policy, draws)
    assert plain.std() > 1  # the law is far from uniform: a mistake would show
    assert worst(draws.log_q, plain) < TOLERANCE
    assert worst(scored(policy, draws), plain) < TOLERANCE
    assert worst(draws.log_q, scored(policy, draws)) < TOLERANCE


@pytest.mark.parametrize("batch_rows", [1, 4, 7, 1000])
def test_batch_size_changes_no_draw(policy, examples, batch_rows):
    usual = draw(policy, examples, 3, generator=seeded(1))
    other = draw(policy, examples, 3, generator=seeded(1), batch_rows=batch_rows)
    assert [[c.tolist() for c in g] for g in usual.completions] == [
        [c.tolist() for c in g] for g in other.completions
    ]
    assert worst(usual.log_q, other.log_q) < TOLERANCE


@pytest.mark.parametrize("max_chunk_tokens", [1, 17, 100_000])
def test_chunks_and_order_change_no_score(policy, examples, max_chunk_tokens):
    draws = draw(policy, examples, 3, generator=seeded(2))
    whole = scored(policy, draws)
    assert worst(scored(replace(policy, max_chunk_tokens=max_chunk_tokens), draws), whole) < TOLERANCE
    order = [3, 0, 4, 1, 2]
    assert worst(scored(policy, select(draws, order)), whole[order]) < TOLERANCE
    columns = torch.tensor([[2, 0, 1]]).expand(len(examples), -1)
    assert worst(scored(policy, pick(draws, columns)), whole.gather(1, columns)) < TOLERANCE


@pytest.mark.parametrize("max_chunk_tokens", [1, 100_000])
def test_a_completion_of_no_tokens_brings_none_and_disturbs_no_other(
    policy, examples, made_up, max_chunk_tokens
):
    policy = replace(policy, max_chunk_tokens=max_chunk_tokens)
    nothing = torch.zeros(0, dtype=torch.int64)
    whole = made_up(examples, 3, 40)
    some = replace(whole, completions=[[a, nothing, c] for a, _, c in whole.completions])
    # of one prompt there is nothing at all
    some = replace(some, completions=[[nothing] * 3, *some.completions[1:]])
    assert len(policy.log_prob(some)) == int(some.lengths.sum())
    expected = scored(policy, whole) * (some.lengths > 0)
    assert worst(scored(policy, some), expected) < TOLERANCE
    empty = replace(whole, completions=[[nothing] * 3 for _ in examples])
    assert scored(policy, empty).tolist() == [[0.0] * 3] * len(examples)


def test_the_place_in_the_list_owns_the_uniforms_not_the_prompt(build, tokenizer, examples):
    # what holds: prompt p of the list uses uniforms p, whatever stands at the other places
    policy = CausalPolicy(build("llama_tied"), tokenizer)
    usual = draw(policy, examples, 3, generator=seeded(3))
    mixed = draw(policy, [*examples[:2], *examples[:1:-1]], 3, generator=seeded(3))
    for p in (0, 1, 3):  # these prompts stand where they stood
        assert [c.tolist() for c in mixed.completions[p]] == [c.tolist() for c in usual.completions[p]]
    # what does not: the same prompt at another place is drawn with other uniforms
    assert [c.tolist() for c in mixed.completions[2]] != [c.tolist() for c in usual.completions[4]]


def test_drawing_with_an_adapter_on(build, tokenizer, examples, plain_sums):
    policy, reference = lora(build("llama_untied"), tokenizer, r=4)
    with torch.no_grad():
        for tensor in policy.trainable:
            tensor.normal_(std=0.3, generator=seeded(4))
    draws = draw(policy, examples, 4, generator=seeded(4))
    assert worst(draws.log_q, plain_sums(policy, draws)) < TOLERANCE
    assert worst(draws.log_q, scored(policy, draws)) < TOLERANCE
    assert worst(draws.log_q, scored(reference, draws)) > 1  # mutant: the other adapter speaks


def test_in_bfloat16_the_difference_is_small_and_centred(build, tokenizer, examples):
    policy = CausalPolicy(build("llama_tied", dtype=torch.bfloat16), tokenizer)
    draws = draw(policy, examples, 16, generator=seeded(5))
    difference = draws.log_q - scored(policy, draws)
    assert draws.log_q.dtype == torch.float32
    assert difference.abs().mean() < 0.2  # eight mantissa bits and a law with logits of up to 20
    assert difference.mean().abs() < 0.05


def test_every_end_token_ends_and_nothing_else_does(policy, examples):
    draws = draw(policy, examples, 12, generator=seeded(6))
    last = {int(ids[-1]) for group in draws.completions for ids in group if len(ids) < LONGEST}
    assert len(last) >= 2
    assert last <= set(policy.end)
    for p, group in enumerate(draws.completions):
        for g, ids in enumerate(group):
            assert not any(t in policy.end for t in ids[:-1].tolist())
            assert bool(draws.finished[p, g]) == (int(ids[-1]) in policy.end)


# mutants: each must be noticed by the comparison above


def without(name, value=None):
    """A policy class whose model is called with the argument `name` dropped or replaced."""

    class Changed(CausalPolicy):
        @property
        def body(self):
            true = super().body

            def call(**arguments):
                arguments[name] = None if value is None else value(arguments[name])
                return true(**arguments)

            return call

    return Changed


@pytest.mark.parametrize(
    "mutant",
    [
        without("position_ids", lambda ids: ids + 1),
        without("position_ids"),
        without("attention_mask", torch.ones_like),
    ],
    ids=["positions shifted", "positions dropped", "padding attended to"],
)
def test_mutants_of_padding_are_noticed(build, tokenizer, examples, plain_sums, mutant):
    draws = draw(mutant(build("gpt2"), tokenizer), examples, 4, generator=seeded(7))
    assert worst(draws.log_q, plain_sums(CausalPolicy(build("gpt2"), tokenizer), draws)) > 100 * TOLERANCE


def test_mutant_that_drops_the_end_token_is_noticed(policy, examples, plain_sums):
    draws = draw(policy, examples, 6, generator=seeded())
    cut = replace(
        draws,
        completions=[
            [ids[:-1] if len(ids) > 1 and int(ids[-1]) in policy.end else ids for ids in group]
            for group in draws.completions
        ],
    )
    assert worst(draws.log_q, plain_sums(policy, cut)) > 100 * TOLERANCE
    assert worst(draws.log_q, scored(policy, cut)) > 100 * TOLERANCE


def test_mutant_with_dropout_is_noticed(build, tokenizer, examples, plain_sums):
    policy = CausalPolicy(build("gpt2"), tokenizer)
    draws = draw(policy, examples, 4, generator=seeded(8))
    policy.model.train()
    assert worst(scored(policy, draws), draws.log_q) > 100 * TOLERANCE
