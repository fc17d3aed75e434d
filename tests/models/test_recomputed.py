"""Layers that run once more in the backward pass give the gradients of layers that keep what they computed, and keep less."""

from dataclasses import replace

import pytest
import torch

from klimb.models import policy as policy_module
from klimb.models.families import full, lora
from klimb.models.policy import CausalPolicy
from klimb.models.prefix import prefix
from klimb.models.recomputed import layers_of
from klimb.models.soft_prompt import soft_prompt
from klimb.ranks import Ranks

EXACT = 1e-12
ROUNDING = 1e-4
"""transformers' norms are float32 in any model, and two roads round differently"""
FAMILIES = {
    "full": full,
    "lora": lambda *what: lora(*what, r=3),
    "lora of the last layer": lambda *what: lora(*what, r=3, layers=1),
    "virtual tokens": lambda *what: soft_prompt(*what, num_virtual_tokens=4),
}


def moved(policy):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in policy.trainable:
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    return policy


def gradients(policy, draws):
    """Log-probabilities, and the gradient of a sum of them with weights of both signs."""
    for tensor in policy.trainable:
        tensor.grad = None
    found = policy.log_prob(draws)
    (found * torch.linspace(-1, 2, len(found), dtype=found.dtype)).sum().backward()
    return [found.detach(), *(tensor.grad.clone() for tensor in policy.trainable)]


def apart(ours, theirs):
    """The largest difference, in values and in gradients relative to the largest."""
    scale = [torch.ones(()), *[max(g.abs().max() for g in theirs[1:])] * (len(ours) - 1)]
    assert all(x.isfinite().all() for x in ours)
    return max(((a - b).abs().max() / s).item() for a, b, s in zip(ours, theirs, scale, strict=True))


def by_rows(policy):
    """The same policy on the road that reads each completion with its prompt, as one of split layers does."""
    return replace(policy, sharded=Ranks(0, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_layers_that_keep_everything(
    build, tokenizer, architecture, family, examples, made_up, monkeypatch
):
    policy = moved(FAMILIES[family](build(architecture, dtype=torch.float64), tokenizer)[0])
    saving, draws = replace(policy, gradient_checkpointing=True), made_up(examples, 3, len(tokenizer))
    if architecture.startswith(("llama", "qwen2")):  # written out
        assert apart(gradients(saving, draws), gradients(policy, draws)) < EXACT
    monkeypatch.setattr(policy_module, "is_llama_like", lambda model: False)
    found = gradients(saving, draws)
    assert apart(found, gradients(by_rows(policy), draws)) < EXACT
    assert apart(gradients(by_rows(saving), draws), found) < EXACT
    if (
        architecture != "gemma2"
    ):  # its windows give NaN in float64 on the usual road, where a prompt is mostly padding
        assert apart(found, gradients(policy, draws)) < ROUNDING


def test_a_layer_runs_again_with_the_adapter_that_spoke(build, tokenizer, examples, made_up):
    policy, reference = lora(build("gpt2", dtype=torch.float64), tokenizer, r=3)
    saving, draws = replace(moved(policy), gradient_checkpointing=True), made_up(examples, 3, len(tokenizer))
    expected = gradients(saving, draws)
    for tensor in policy.trainable:
        tensor.grad = None
    found = saving.log_prob(draws)
    with reference.activate():  # somebody else speaks by then
        (found * torch.linspace(-1, 2, len(found), dtype=found.dtype)).sum().backward()
    assert apart([found.detach(), *(t.grad for t in policy.trainable)], expected) < EXACT


def of_layers_written_out(found):
    """The node of the graph that all layers are."""
    nodes, seen = [found.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if hasattr(node, "kept"):
            return node
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    raise AssertionError("no written-out layers in the graph")


def tensors_in(x):
    """All tensors in nested tuples, lists and dataclasses other than layers."""
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x if isinstance(x, tuple | list) else vars(x).values() if hasattr(x, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


def test_written_out_layers_keep_what_went_into_them(build, tokenizer, examples, made_up):
    policy, _ = full(build("llama_untied"), tokenizer)
    draws, kept = made_up(examples, 3, len(tokenizer)), {}
    for saving in (False, True):
        found = replace(policy, gradient_checkpointing=saving).log_prob(draws)
        layers = [tensors_in(seen) for _, seen in of_layers_written_out(found).kept]
        kept[saving] = [sum(x.numel() for x in tensors) for tensors in layers]
    tokens = sum(len(policy.render(x)) for x in examples) + int((draws.lengths - 1).sum())
    assert kept[True] == [tokens * 32] * 2  # 32 wide, two layers
    assert min(kept[False]) > 8 * tokens * 32


def test_other_layers_keep_nothing_inside(build, tokenizer, architecture, examples, made_up, monkeypatch):
    monkeypatch.setattr(policy_module, "is_llama_like", lambda model: False)
    policy, _ = full(build(architecture), tokenizer)
    draws, sizes = made_up(examples, 3, len(tokenizer)), {}
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    for saving in (False, True):
        kept = {}

        def keep(x, kept=kept):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            by_rows(replace(policy, gradient_checkpointing=saving)).log_prob(draws)
        sizes[saving] = sum(n for place, n in kept.items() if place not in weights)
    assert sizes[False] > 4 * sizes[True]


def test_the_model_is_left_as_it_was(build, tokenizer, examples, made_up, monkeypatch):
    monkeypatch.setattr(policy_module, "is_llama_like", lambda model: False)
    policy, _ = full(build("gpt2"), tokenizer)
    layers = layers_of(policy.model.get_decoder())
    own = layers[0].forward
    layers[1].forward = layers[1].forward  # somebody else's
    gradients(replace(policy, gradient_checkpointing=True), made_up(examples, 3, len(tokenizer)))
    assert "forward" not in vars(layers[0])
    assert layers[0].forward == own
    assert vars(layers[1])["forward"] == type(layers[1]).forward.__get__(layers[1])


def test_without_gradients_nothing_is_run_twice(build, tokenizer, examples, made_up, monkeypatch):
    def refuse(*args):
        raise AssertionError("layers were to run twice")

    monkeypatch.setattr(policy_module, "recomputed", refuse)
    policy = replace(CausalPolicy(build("gpt2"), tokenizer), gradient_checkpointing=True)
    with torch.no_grad():
        policy.log_prob(made_up(examples, 3, len(tokenizer)))
    with pytest.raises(AssertionError):
        policy.log_prob(made_up(examples, 3, len(tokenizer)))


def test_a_prefix_is_refused(build, tokenizer):
    policy, _ = prefix(build("llama_tied"), tokenizer, num_virtual_tokens=2)
    with pytest.raises(ValueError, match="gradient_checkpointing: got the family prefix"):
        replace(policy, gradient_checkpointing=True)
