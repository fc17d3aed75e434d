"""The certificate reads both log-probabilities of a draw in one way, so that rounding is not counted as KL."""

from dataclasses import replace

import pytest
import torch

from klimb.measure import certify, measure
from klimb.models.families import lora
from klimb.numbers.certificate import certificate
from klimb.plan import plan
from klimb.samplers.ancestral import ancestral
from klimb.target import chi_squared, forbid, standardized, tilt


def shortness(prompts, completions, **columns):
    return [-float(len(c if isinstance(c, str) else c[0]["content"])) / 4 for c in completions]


def sampler(policy, examples, num_draws, *, generator):
    return ancestral(policy, examples, num_draws, generator=generator, max_completion_length=12)


def test_an_untrained_policy_in_bfloat16_has_no_kl_and_attained_nothing(build, tokenizer, examples):
    policy, reference = lora(build("llama_tied", dtype=torch.bfloat16), tokenizer, r=4)
    target = tilt(reference, shortness, 1.0)
    found, of_policy, of_reference = certify(
        examples, policy, target, sampler, num_draws=16, generator=torch.Generator().manual_seed(0)
    )
    assert found.kl.value == 0
    for pool in (of_policy, of_reference):
        assert torch.equal(pool.log_pi, pool.log_ref)
        assert torch.equal(pool.token_log_pi, pool.token_log_ref)
    mutant = certificate(  # the sampler's number for the policy's draws, the scorer's for the reference's
        beta=1.0,
        reward_policy=of_policy.reward,
        log_pi_policy=of_policy.draws.log_q,
        log_ref_policy=of_policy.log_ref,
        reward_reference=of_reference.reward,
        log_pi_reference=of_reference.log_pi,
        log_ref_reference=of_reference.draws.log_q,
        generator=torch.Generator().manual_seed(0),
    )
    assert mutant.kl.value != 0


@pytest.mark.parametrize("kind", [standardized, chi_squared])
def test_a_target_that_the_draws_at_hand_fix_is_refused(kind, build, tokenizer, examples):
    policy, reference = lora(build("llama_tied"), tokenizer, r=4)
    with pytest.raises(ValueError, match="fixed by the draws at hand"):
        measure(
            examples,
            policy,
            kind(reference, shortness, 1.0),
            sampler,
            num_draws=4,
            generator=torch.Generator(),
        )


def test_a_constraint_alone_is_planned_and_measured(build, tokenizer, examples):
    """The target is the reference given that it holds: log Z = log P(allowed) = -KL(p||ref), at every beta."""

    def allowed(completions):
        return [len(text) % 3 > 0 for text in completions]

    policy, reference = lora(build("llama_tied"), tokenizer, r=4)
    found = plan(
        examples,
        reference,
        forbid(allowed),
        sampler,
        num_draws=24,
        generator=torch.Generator().manual_seed(0),
    )
    held = (found.pool.reward == 0).double().mean(1)
    assert 0.2 < held.mean() < 0.98
    (point,) = found.frontier
    assert point.kl.value == pytest.approx(-held.log().mean().item(), abs=0.05)
    measured = measure(
        examples,
        policy,
        tilt(reference, forbid(allowed), 1.0),
        sampler,
        num_draws=24,
        generator=torch.Generator().manual_seed(1),
    )
    assert measured.certificate.log_z.value == pytest.approx(held.log().mean().item(), abs=0.3)


def test_log_probabilities_are_of_the_policy_that_is_measured(build, tokenizer, examples):
    policy, reference = lora(build("llama_tied"), tokenizer, r=4)
    with torch.no_grad():
        for tensor in policy.trainable:
            tensor.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    target = tilt(reference, shortness, 1.0)
    generator = torch.Generator().manual_seed(0)
    _, of_policy, of_reference = certify(examples, policy, target, sampler, num_draws=4, generator=generator)
    assert (of_policy.log_pi - of_policy.draws.log_q).abs().max() < 1e-3
    assert (of_reference.log_ref - of_reference.draws.log_q).abs().max() < 1e-3
    assert (of_policy.log_pi - of_policy.log_ref).abs().max() > 1  # mutant: one of them for both
    given = replace(of_reference, log_pi=None, log_ref=torch.zeros_like(of_reference.log_ref))
    again = certify(
        examples, policy, target, sampler, num_draws=4, generator=generator, reference_pool=given
    )[2]
    assert torch.equal(again.log_ref, of_reference.log_ref)
