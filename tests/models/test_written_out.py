"""Llama's layers written out for learning are transformers' own: the same log-probabilities and the same gradients.

The other road is the model's own layers, padded, with the memory of each prompt copied to its completions, differentiated by
autograd. Prompts of 1 to 61 tokens and completions of 1 to 9, so that every kind of padding occurs.
"""

from dataclasses import replace

import pytest
import torch

from klimb.data import Draws
from klimb.models import fused_attention, shared_attention, written_out
from klimb.models import policy as policy_module
from klimb.models.families import full, lora
from klimb.models.policy import CausalPolicy
from klimb.models.soft_prompt import soft_prompt

ROUNDING = 1e-4
"""transformers' norms are float32 in any model"""
NAMES = ("llama_tied", "llama_untied", "qwen2")


def gradients(policy, draws):
    """Log-probabilities, and the gradient of a sum of them with weights of both signs."""
    for tensor in policy.trainable:
        tensor.grad = None
    found = policy.log_prob(draws)
    (found * torch.linspace(-1, 2, len(found), dtype=found.dtype)).sum().backward()
    return found.detach(), [tensor.grad.clone() for tensor in policy.trainable]


def apart(policy, draws, monkeypatch):
    """By how much the two roads differ: in values, and in gradients relative to the largest."""
    ours, mine = gradients(policy, draws)
    with monkeypatch.context() as patch:
        patch.setattr(policy_module, "is_llama_like", lambda model: False)
        theirs, other = gradients(policy, draws)
    largest = max(g.abs().max() for g in other)
    return (ours - theirs).abs().max().item(), max(
        ((a - b).abs().max() / largest).item() for a, b in zip(mine, other, strict=True)
    )


def moved(pair):
    policy, _ = pair
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in policy.trainable:
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return policy


FAMILIES = {
    "lora": lambda *what: lora(*what, r=3),
    "lora of the last layer": lambda *what: lora(*what, r=3, layers=1),
    "lora of some": lambda *what: lora(*what, r=3, target_modules=["q_proj", "v_proj", "up_proj"]),
    "lora of one": lambda *what: lora(*what, r=3, target_modules=["o_proj"]),
    "full": full,
    "virtual tokens": lambda *what: soft_prompt(*what, num_virtual_tokens=4),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_values_and_gradients_are_those_of_the_models_own_layers(
    name, family, build, tokenizer, examples, made_up, monkeypatch
):
    policy = moved(FAMILIES[family](build(name, dtype=torch.float64), tokenizer))
    draws = made_up(examples, 3, len(tokenizer))
    values, slopes = apart(policy, draws, monkeypatch)
    assert values < ROUNDING
    assert slopes < ROUNDING
    one = replace(
        draws, examples=draws.examples[:1], completions=draws.completions[:1], finished=draws.finished[:1]
    )
    assert max(apart(policy, one, monkeypatch)) < ROUNDING  # nothing is padded


def test_completions_of_one_token_and_of_none(build, tokenizer, examples, monkeypatch):
    policy = moved(lora(build("llama_untied", dtype=torch.float64), tokenizer, r=3))
    one, none = torch.tensor([3]), torch.zeros(0, dtype=torch.int64)
    for rows in ([one, one], [one, none], [torch.tensor([3, 4, 5]), none]):
        draws = Draws(examples[1:3], [rows, rows], finished=torch.ones(2, 2, dtype=torch.bool))
        assert max(apart(policy, draws, monkeypatch)) < ROUNDING


def test_nothing_is_kept_below_what_is_trained(build, tokenizer, examples, made_up, monkeypatch):
    from klimb.models import written_out

    policy, _ = lora(build("llama_tied"), tokenizer, r=3, layers=1)
    went_back = []
    own = written_out._backward

    def watched(layer, *args, **options):
        went_back.append(options["wants_x"])
        return own(layer, *args, **options)

    monkeypatch.setattr(written_out, "_backward", watched)
    gradients(policy, made_up(examples, 2, len(tokenizer)))
    assert went_back == [False]


def test_a_second_backward_pass_is_refused(build, tokenizer, examples, made_up):
    policy, _ = lora(build("llama_tied"), tokenizer, r=3)
    found = policy.log_prob(made_up(examples, 2, len(tokenizer))).sum()
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="score the draws again"):
        found.backward()


def test_other_models_take_the_other_road(build, tokenizer, examples, made_up, monkeypatch):
    def refuse(*args):
        raise AssertionError("the written-out road was taken")

    draws = made_up(examples, 2, len(tokenizer))
    monkeypatch.setattr(CausalPolicy, "_hidden_packed", refuse)
    with pytest.raises(AssertionError):
        CausalPolicy(build("llama_tied"), tokenizer).log_prob(draws)
    CausalPolicy(build("gpt2"), tokenizer).log_prob(draws)


def plain_attention(query, key, value, prompts, rows, scale):
    """Each completion with its prompt before it, by itself, causal; the prompts by themselves."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))

    def over(queries, seen):
        score = torch.einsum("qhw,shw->hqs", query[queries], key[seen]) * scale
        hidden = torch.arange(len(seen)) > torch.arange(len(seen))[len(seen) - len(queries) :, None]
        return torch.einsum("hqs,shw->qhw", score.masked_fill(hidden, -torch.inf).softmax(-1), value[seen])

    outs, starts, at = [], [], 0
    for n in prompts:
        outs.append(over(torch.arange(at, at + n), torch.arange(at, at + n)))
        starts.append(torch.arange(at, at + n))
        at += n
    for start, group in zip(starts, rows, strict=True):
        for n in group:
            mine = torch.arange(at, at + n)
            outs.append(over(mine, torch.cat([start, mine])))
            at += n
    return torch.cat(outs)


LAYOUTS = pytest.mark.parametrize(
    ("prompts", "rows"),
    [([3, 3], [[2, 2], [2, 2]]), ([1, 5, 2], [[3, 0, 1], [2, 2, 2], [0, 0, 4]]), ([4], [[0, 0]])],
    ids=["nothing padded", "ragged", "prompts alone"],
)


def attention_apart(road, layout, prompts, rows):
    """By how much a road's attention and its gradients differ from the plain ones; its values under other layouts."""
    total, scale = sum(prompts) + sum(map(sum, rows)), 0.4
    generator = torch.Generator().manual_seed(0)
    query, key, value, upstream = (
        torch.randn(total, heads, 3, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4)
    )
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    expected = plain_attention(*leaves, prompts, rows, scale)
    wanted = torch.autograd.grad(expected, leaves, upstream)
    out, seen = road.attend(query, key, value, layout, scale)
    back = road.attend_backward(upstream, out, seen, layout, scale)
    return [(a - b).abs().max().item() for a, b in zip((out, *back), (expected, *wanted), strict=True)]


@LAYOUTS
@pytest.mark.parametrize("steps", [64, 2])
def test_attention_and_its_backward_pass(prompts, rows, steps, monkeypatch):
    monkeypatch.setattr(shared_attention, "STEPS", steps)
    layout = shared_attention.laid_out(prompts, rows)
    assert max(attention_apart(shared_attention, layout, prompts, rows)) < 1e-12
    if layout.own is None:
        return
    # the mutants: a completion that sees its own later tokens; one that does not see its prompt's padding as such
    blind = replace(layout, own=replace(layout.own, causal=torch.zeros_like(layout.own.causal)))
    assert attention_apart(shared_attention, blind, prompts, rows)[0] > 0.01
    if layout.own.unseen is not None:
        blind = replace(layout, own=replace(layout.own, unseen=None))
        assert attention_apart(shared_attention, blind, prompts, rows)[0] > 0.01


@LAYOUTS
def test_fused_attention_and_its_backward_pass(prompts, rows, plain_kernels):
    """Halves of a softmax merged, and the gradients of each half from what the whole came to."""
    runs = fused_attention.laid_out(prompts, rows)
    assert max(attention_apart(fused_attention, runs, prompts, rows)) < 1e-12
    if runs.own is None:
        return
    # the mutants: completions that see their own later tokens; completions of one prompt over that of another
    blind = replace(runs, own=replace(runs.own, causal=False))
    assert attention_apart(fused_attention, blind, prompts, rows)[0] > 0.01
    moved = runs.shared.queries.clone()
    moved[1:-1] -= 1
    blind = replace(runs, shared=replace(runs.shared, queries=moved))
    assert len(prompts) == 1 or attention_apart(fused_attention, blind, prompts, rows)[0] > 0.01


@pytest.mark.parametrize("family", ["lora", "virtual tokens"])
def test_a_pass_by_fused_kernels(family, build, tokenizer, examples, made_up, monkeypatch, plain_kernels):
    policy = moved(FAMILIES[family](build("llama_untied", dtype=torch.float64), tokenizer))
    draws = made_up(examples, 3, len(tokenizer))
    monkeypatch.setattr(written_out, "attention_of", lambda model, dtype: fused_attention)
    values, slopes = apart(policy, draws, monkeypatch)
    assert max(values, slopes) < ROUNDING
