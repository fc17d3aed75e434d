"""Attention of packed tokens by the compiled loops of a CPU: against the same in float64, by each kind of product a processor may have."""

import pytest
import torch

from klimb.models import compiled, shared_attention, tiled_attention, written_out
from klimb.models.families import lora

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no compiler")

ROUNDING = 6e-3
"""of bfloat16: what came out of a sum of weights that were rounded, rounded once more"""


def random_tokens(prompts, rows, heads, kv, width):
    """Query, key and value of packed tokens as they come out of one product, and an upstream gradient."""
    total = sum(prompts) + sum(map(sum, rows))
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(total, heads + 2 * kv, width, generator=generator).to(torch.bfloat16)
    upstream = torch.randn(total, heads, width, generator=generator).to(torch.bfloat16)
    return *both.split([heads, kv, kv], 1), upstream


def through(road, query, key, value, upstream, prompts, rows):
    layout, scale = road.laid_out(prompts, rows), query.shape[2] ** -0.5
    out, seen = road.attend(query, key, value, layout, scale)
    return [out, *road.attend_backward(upstream, out, seen, layout, scale)]


def apart(found, wanted):
    """The largest relative error of attention and of its three gradients."""
    return max(
        ((a.double() - b).norm() / b.norm()).item()
        for a, b in zip(found, wanted, strict=True)
        if b.norm() > 0
    )


@pytest.mark.parametrize(
    ("prompts", "rows", "heads", "kv", "width"),
    [
        ([3, 3], [[2, 2], [2, 2]], 4, 2, 16),
        ([40, 7, 90], [[3, 0, 130], [2, 2, 2], [0, 0, 40]], 6, 2, 16),
        ([4], [[0, 0]], 4, 4, 64),
        ([33], [[255] * 3], 9, 3, 64),
        ([300, 2], [[1, 500], [33, 32]], 8, 1, 80),
        ([5, 31], [[2, 40, 7, 1, 0, 33, 64, 9, 12, 3]] * 2, 3, 1, 24),
    ],
    ids=["nothing padded", "ragged", "prompts alone", "as SmolLM2's", "long", "more than there are parts"],
)
def test_attention_and_its_backward_pass(prompts, rows, heads, kv, width, products):
    tokens = random_tokens(prompts, rows, heads, kv, width)
    found = through(tiled_attention, *tokens, prompts, rows)
    wanted = through(shared_attention, *(x.double() for x in tokens), prompts, rows)
    assert apart(found, wanted) < ROUNDING
    if sum(map(sum, rows)) == 0:
        return
    # the mutants: keys of the tokens after; a completion that does not see its prompt's first token as it is
    query, key, value, upstream = tokens
    assert (
        apart(through(tiled_attention, query, key.roll(-1, 0), value, upstream, prompts, rows), wanted) > 0.05
    )
    other = value.clone()
    other[0] = 8.0
    assert apart(through(tiled_attention, query, key, other, upstream, prompts, rows), wanted) > 0.02


def test_nothing_comes_from_a_later_token(products):
    prompts, rows = [40], [[100, 70]]
    query, key, value, _ = random_tokens(prompts, rows, 6, 2, 16)
    before = tiled_attention.attend(query, key, value, tiled_attention.laid_out(prompts, rows), 0.25)[0]
    for token in (20, 40 + 65, 40 + 100 + 31):  # of the prompt, and of both completions
        changed = [x.clone() for x in (key, value)]
        for x in changed:
            x[token] = 3.0
        after = tiled_attention.attend(query, *changed, tiled_attention.laid_out(prompts, rows), 0.25)[0]
        moved = (after != before).flatten(1).any(1)
        ends = {20: [(20, 210)], 105: [(105, 140)], 171: [(171, 210)]}[token]
        assert moved.nonzero()[:, 0].tolist() == [i for start, end in ends for i in range(start, end)]
        changed[0][token] = torch.nan
        after = tiled_attention.attend(query, *changed, tiled_attention.laid_out(prompts, rows), 0.25)[0]
        assert torch.equal(after.isnan().flatten(1).all(1), moved)


def test_as_many_threads_as_one_likes(products):
    prompts, rows = [9, 40], [[33, 0, 70], [64, 2, 5]]
    tokens = random_tokens(prompts, rows, 6, 2, 16)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(through(tiled_attention, *tokens, prompts, rows))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_heads_may_lie_as_they_like(products):
    prompts, rows = [9], [[33, 40]]
    query, key, value, upstream = random_tokens(prompts, rows, 6, 2, 16)
    wanted = through(tiled_attention, query, key, value, upstream, prompts, rows)
    other = value.transpose(1, 2).contiguous().transpose(1, 2)
    assert other.stride() != value.stride()
    found = through(tiled_attention, query, key.clone(), other, upstream, prompts, rows)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_prompts_are_remembered_on_the_left():
    prompts, rows = [2, 5], [[0], [0]]
    query, key, value, _ = random_tokens(prompts, rows, 4, 2, 16)
    for road in (tiled_attention, shared_attention):
        layout = road.laid_out(prompts, rows)
        for given, kept in zip(
            (key, value), road.of_prompts(road.attend(query, key, value, layout, 1.0)[1], layout), strict=True
        ):
            assert kept.shape == (2, 2, 5, 16)
            assert torch.equal(kept[0, :, :2].transpose(0, 1).to(given.dtype), given[:2])
            assert torch.equal(kept[1].transpose(0, 1).to(given.dtype), given[2:])


def test_a_policy_in_bfloat16_takes_this_road(build, tokenizer, examples, made_up, monkeypatch):
    """Its log-probabilities and their gradients are as far from those in float32 as the other road's."""
    draws = made_up(examples, 3, len(tokenizer))

    def found(dtype):
        policy, _ = lora(build("llama_untied", dtype=torch.bfloat16).to(dtype), tokenizer, r=3)
        generator = torch.Generator().manual_seed(1)
        for tensor in policy.trainable:
            drawn = torch.randn(tensor.shape, generator=generator) * 0.1
            tensor.data.copy_(drawn.to(torch.bfloat16))
        log_prob = policy.log_prob(draws)
        log_prob.sum().backward()
        return log_prob.detach(), torch.cat([x.grad.flatten() for x in policy.trainable]).float()

    model = build("llama_untied", dtype=torch.bfloat16)
    assert written_out.attention_of(model, torch.bfloat16) is tiled_attention
    assert written_out.attention_of(model, torch.float32) is shared_attention
    exact, ours = found(torch.float32), found(torch.bfloat16)
    monkeypatch.setattr(written_out, "attention_of", lambda model, dtype: shared_attention)
    theirs = found(torch.bfloat16)
    for wanted, a, b in zip(exact, ours, theirs, strict=True):
        assert not torch.equal(a, b)
        assert (a - wanted).norm() < 1.25 * (b - wanted).norm() < 0.1 * wanted.norm()
