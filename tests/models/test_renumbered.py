"""A model under other numbers says of the other tokens what it said of its own."""

import json

import pytest
import torch

from klimb.data import Draws
from klimb.models.policy import CausalPolicy
from klimb.models.renumbered import read_numbers, renumber


@pytest.mark.parametrize("name", ["llama_tied", "llama_untied", "gpt2"])
def test_a_permuted_model_renumbered_is_the_model(name, build, tokenizer):
    """One teacher speaks its own numbers, the other those of a permutation; what they say of a text is the same."""
    own = CausalPolicy(build(name, dtype=torch.float64), tokenizer)
    order = torch.randperm(own.head.weight.shape[0], generator=torch.Generator().manual_seed(0))
    other = CausalPolicy(build(name, dtype=torch.float64), tokenizer)
    renumber(other.model, order)  # token v of the other is the own one's order[v]
    ids = torch.tensor([3, 9, 14, 0])
    with torch.no_grad():
        mine = own.model(order[ids][None]).logits[0]
        theirs = other.model(ids[None]).logits[0]
    assert (theirs - mine[:, order]).abs().max() < 1e-9
    assert (theirs - mine).abs().max() > 0.01  # the mutant: numbers left as they were


def test_of_tokens_left_out_the_rest_is_a_law(build, tokenizer, examples):
    policy = CausalPolicy(build("llama_untied", dtype=torch.float64), tokenizer)
    size = policy.head.weight.shape[0]
    with torch.no_grad():
        before = policy.model(torch.tensor([[5, 6]])).logits[0, -1]
        renumber(policy.model, torch.arange(size - 4))
        after = policy.model(torch.tensor([[5, 6]])).logits[0, -1]
    assert (after.softmax(0) - before[: size - 4].softmax(0)).abs().max() < 1e-12
    one = Draws(examples[:1], [[torch.tensor([5])]], finished=torch.ones(1, 1, dtype=torch.bool))
    assert policy.log_prob(one).isfinite().all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[0, 1", "expected a file of JSON"),
        ("[0, 1]", "got a list of 2, expected a list of 3"),
        ('{"a": 1}', "got dict"),
        ("[0, 1, true]", "whole numbers"),
        ("[0, 1, 9]", "got 9, expected numbers from 0 to 4"),
        ("[0, 1, 1]", "the same number"),
    ],
)
def test_a_bad_map_is_refused(text, words, tmp_path):
    file = tmp_path / "map.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"token_map .*map.json") as error:
        read_numbers(file, size=3, own_size=5)
    assert words in str(error.value)
    with pytest.raises(ValueError, match="No such file"):
        read_numbers(tmp_path / "none.json", size=3, own_size=5)
    file.write_text(json.dumps([4, 0, 2]))
    assert read_numbers(file, size=3, own_size=5).tolist() == [4, 0, 2]
