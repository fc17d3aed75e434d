"""The reward of a trained policy on a tiny random Llama whose every completion can be listed: its tilt is the policy, with Z = 1."""

from functools import partial

import pytest
import torch

from klimb.data import Draws, Example
from klimb.exact import all_strings, kl
from klimb.models.families import full, lora, save_policy
from klimb.models.soft_prompt import soft_prompt
from klimb.rewards.implied import Implied
from klimb.rewards.score import score
from klimb.rewards.source_hash import source_hash
from klimb.rewards.weighted_sum import weighted_sum

BETA = 0.3
EXAMPLES = [Example("a"), Example("ba"), Example("ba", {"another": "row"})]
SPACE = all_strings(7, 2)


def listed(policy):
    texts = [policy.decode(ids) for ids in SPACE.completions]
    size = len(EXAMPLES)
    return Draws(EXAMPLES, [SPACE.completions] * size, SPACE.finished.expand(size, -1), texts=[texts] * size)


@torch.no_grad()
def laws(policies):
    draws = listed(policies[0])
    return [draws.sequence_sums(who.log_prob(draws)).double() for who in policies]


FAMILIES = {
    "lora": partial(lora, r=4),
    "full": full,
    "soft prompt": partial(soft_prompt, num_virtual_tokens=2, init="ab"),
}


@pytest.fixture(params=FAMILIES)
def policies(request, seven_tokens):
    """Moved anywhere: the identity asks for no training."""
    policy, reference = FAMILIES[request.param](*seven_tokens)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in policy.trainable:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return policy, reference


def test_its_tilt_is_the_policy_and_log_z_is_zero(policies):
    log_pi, log_ref = laws(policies)
    assert kl(log_pi, log_ref).min() > 0.02
    reward = score(Implied(*policies, beta=BETA, source_hash=""), listed(policies[0])).total.double()
    log_target = log_ref + reward / BETA
    assert log_target.logsumexp(1).abs().max() < 1e-5
    assert (log_target - log_pi).abs().max() < 1e-5  # float32
    # mutants: another beta, and the two the wrong way round
    assert (log_ref + reward / (BETA / 2)).logsumexp(1).min() > 0.02
    swapped = score(Implied(*policies[::-1], beta=BETA, source_hash=""), listed(policies[0])).total.double()
    assert (log_ref + swapped / BETA).logsumexp(1).min() > 0.02


def test_beside_another_reward_it_counts_with_its_weight(policies):
    own = Implied(*policies, beta=BETA, source_hash="")

    def short(completions):
        return [-len(c) for c in completions]

    draws = listed(policies[0])
    found = score(weighted_sum([own, short], [1.0, 0.0]), draws)
    assert torch.equal(found.total, score(own, draws).total)
    assert list(found.parts) == ["implied", "short"]


def test_draws_of_other_words_are_refused(policies):
    with pytest.raises(ValueError, match="expected draws of a model of the same tokenizer"):
        Implied(*policies, beta=BETA, source_hash="")(["a"], ["zz"], [[3, 4]])


def test_its_hash_is_of_weights_and_beta(seven_tokens, tmp_path):
    from klimb.rewards.load import load_reward

    base = tmp_path / "base"
    seven_tokens[0].save_pretrained(base)
    seven_tokens[1].save_pretrained(base)
    policy, _ = lora(*seven_tokens, r=4)
    save_policy(policy, tmp_path / "policy")
    config = tmp_path / "policy" / "adapter_config.json"
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{base}"')
    )
    spec = {"func": "implied", "policy": str(tmp_path / "policy"), "beta": 0.3, "dtype": "float32"}
    one = source_hash(load_reward(spec))
    assert one == source_hash(load_reward(spec))
    assert one != source_hash(load_reward({**spec, "beta": 0.2}))
    with torch.no_grad():
        for weight in policy.trainable:
            weight += 0.1
    save_policy(policy, tmp_path / "policy")
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{base}"')
    )
    assert one != source_hash(load_reward(spec))
