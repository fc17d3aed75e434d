"""Virtual tokens: as peft runs them, alone and in company, drawn and scored alike, and what a gradient does to them."""

import pytest
import torch

from klimb.data import Draws, Example
from klimb.models.families import adapter_kind, save_policy
from klimb.models.soft_prompt import load_soft_prompt, soft_prompt
from klimb.samplers.ancestral import ancestral

EXAMPLES = [Example("ab"), Example("b"), Example("abba b")]


@pytest.fixture
def policies(seven_tokens):
    return soft_prompt(*seven_tokens, num_virtual_tokens=3, init="ab ba")


def drawn(policy, n=4):
    return ancestral(policy, EXAMPLES, n, generator=torch.Generator().manual_seed(0), max_completion_length=5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_it_is_what_peft_runs(policies, seven_tokens, tmp_path):
    from peft import PeftModel

    policy, reference = policies
    draws = drawn(policy)
    ours = draws.sequence_sums(policy.log_prob(draws))
    save_policy(policy, tmp_path)
    assert adapter_kind(tmp_path) == "PROMPT_TUNING"
    theirs = PeftModel.from_pretrained(seven_tokens[0], tmp_path).eval()
    for p, example in enumerate(EXAMPLES):
        prompt = reference.render(example)
        for g, ids in enumerate(draws.completions[p]):
            whole = torch.tensor([[*prompt, *ids.tolist()]])
            with torch.no_grad():
                logits = theirs(input_ids=whole, attention_mask=torch.ones_like(whole)).logits[0]
            law = logits[3 + len(prompt) - 1 : -1].float().log_softmax(1)
            assert ours[p, g].item() == pytest.approx(law.gather(1, ids[:, None]).sum().item(), abs=1e-4)
    plain = draws.sequence_sums(reference.log_prob(draws))
    assert (ours - plain).abs().max() > 1e-2


def test_drawn_and_scored_alike_and_in_any_company(policies):
    policy, _ = policies
    draws = drawn(policy)
    scored = draws.sequence_sums(policy.log_prob(draws))
    torch.testing.assert_close(scored.detach(), draws.log_q, rtol=0, atol=1e-4)
    alone = Draws([EXAMPLES[0]], [draws.completions[0]], draws.finished[:1])
    torch.testing.assert_close(alone.sequence_sums(policy.log_prob(alone))[0], scored[0], rtol=0, atol=1e-5)


def test_saved_and_loaded_it_is_the_same(policies, tmp_path):
    policy, reference = policies
    save_policy(policy, tmp_path)
    again = load_soft_prompt(reference, tmp_path)
    draws = drawn(policy)
    assert torch.equal(again.log_prob(draws), policy.log_prob(draws).detach())
    assert adapter_kind(tmp_path / "nothing") is None


def test_only_the_virtual_tokens_move_and_every_one_of_them_can(policies):
    policy, _ = policies
    draws = drawn(policy)
    policy.log_prob(draws).sum().backward()
    (virtual,) = policy.parameters()
    assert (virtual.grad.abs().sum(1) > 0).all()
    assert all(weight.grad is None for weight in policy.model.parameters())


def test_a_start_of_any_length(seven_tokens):
    for text in ("a", "ab ba ab ba ab"):
        policy, _ = soft_prompt(*seven_tokens, num_virtual_tokens=3, init=text)
        assert policy.virtual.shape[0] == 3
    table = seven_tokens[0].get_input_embeddings()
    first, _ = soft_prompt(*seven_tokens, num_virtual_tokens=3, init="aba")
    ids = torch.tensor(seven_tokens[1]("aba", add_special_tokens=False)["input_ids"])
    assert torch.equal(first.virtual, table(ids))
    with pytest.raises(ValueError, match="has no tokens"):
        soft_prompt(*seven_tokens, num_virtual_tokens=3, init="")
