"""Distance and distillation on a tiny model whose every completion can be listed: estimates beside sums, gradients beside autograd."""

from functools import partial

import pytest
import torch

from klimb.data import Draws, Example
from klimb.distil import Lesson, distance, distil, learned
from klimb.exact import all_strings, kl
from klimb.models.families import lora
from klimb.objectives.token_divergence import token_divergence
from klimb.samplers.ancestral import ancestral

EXAMPLES = [Example("a"), Example("ba")]
SPACE = all_strings(7, 2)
DRAW = partial(ancestral, max_completion_length=2)


@pytest.fixture
def policies(seven_tokens):
    """A policy some way from its reference, which is taken for the teacher."""
    policy, reference = lora(*seven_tokens, r=4, alpha=8)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in policy.trainable:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return policy, reference


def listed():
    return Draws(EXAMPLES, [SPACE.completions] * 2, SPACE.finished.expand(2, -1), full_support=True)


def law(policy):
    draws = listed()
    return draws.sequence_sums(policy.log_prob(draws)).double()


def test_both_kls_are_those_of_all_completions(policies):
    policy, teacher = policies
    with torch.no_grad():
        log_pi, log_p = law(policy), law(teacher)
    forward, reverse = kl(log_p, log_pi).mean().item(), kl(log_pi, log_p).mean().item()
    found = distance(
        EXAMPLES, policy, teacher, teacher, DRAW, num_draws=4000, generator=torch.Generator().manual_seed(0)
    )
    assert abs(forward - reverse) > 0.01
    for estimate, true, other in ((found.forward, forward, reverse), (found.reverse, reverse, forward)):
        error = (estimate.high - estimate.low) / 4
        assert abs(estimate.value - true) < 4 * error
        assert abs(estimate.value - other) > 4 * error  # the other direction would be told apart
    assert abs(found.forward_reference.value) < 1e-6
    assert abs(found.reverse_reference.value) < 1e-6


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_pieces_of_prefixes_give_autograds_gradient(policies, divergence, chunk, monkeypatch):
    from dataclasses import replace

    policy, teacher = policies
    policy = replace(policy, max_chunk_tokens=chunk)
    monkeypatch.setattr("klimb.distil.ROWS", 3)
    seen = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            seen.extend(p.grad.clone() for p in policy.trainable)

    kept = []

    def sampler(*arguments, **options):
        kept.append(DRAW(*arguments, **options))
        return kept[-1]

    step = next(
        distil(
            EXAMPLES,
            policy,
            sampler,
            Lesson(teacher, divergence=divergence, max_grad_norm=1e9),
            Watched(policy.trainable, lr=0.0),
            max_steps=1,
            prompts_per_step=2,
            num_draws=5,
            generator=torch.Generator().manual_seed(1),
        )
    )
    (draws,) = kept
    with torch.no_grad():
        log_p = teacher.head.logits(teacher.hidden(draws)).log_softmax(1)
    log_pi = policy.head.logits(policy.hidden(draws)).log_softmax(1)
    loss = token_divergence(log_pi, log_p, f=divergence).sum() / 10
    whole = torch.autograd.grad(loss, policy.trainable)
    assert step.numbers["objective_value"] == pytest.approx(loss.item(), rel=1e-5)
    for ours, theirs in zip(seen, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert max(g.abs().max() for g in whole) > 1e-3


def test_with_what_follows_the_network_gets_the_gradient_of_the_whole_kl(policies):
    """All completions of two tokens are drawn once each and weighed by their probability: no noise, and a mutant without the rest."""
    policy, teacher = policies
    log_pi, log_p = law(policy), law(teacher).detach()
    true = torch.autograd.grad((log_pi.exp() * (log_pi - log_p)).sum() / 2, policy.trainable)
    found = {}
    for whole in (True, False):
        lesson = Lesson(teacher, divergence="reverse_kl", sequence_gradient=whole)
        total = [torch.zeros_like(weight) for weight in policy.trainable]
        for y, ids in enumerate(SPACE.completions):
            for p, example in enumerate(EXAMPLES):
                one = Draws([example], [[ids]], SPACE.finished[y : y + 1][None])
                for weight in policy.trainable:
                    weight.grad = None
                learned(one, policy, lesson, own=True)
                for sum_, weight in zip(total, policy.trainable, strict=True):
                    sum_ += log_pi[p, y].exp().item() * weight.grad / 2
        found[whole] = torch.cat([x.flatten() for x in total])
    flat = torch.cat([x.flatten() for x in true])
    torch.testing.assert_close(found[True], flat, rtol=1e-3, atol=2e-5)
    assert (found[False] - flat).abs().max() > 20 * (found[True] - flat).abs().max()


def test_several_updates_a_batch_of_the_teachers_draws_go_further(policies):
    start = [weight.detach().clone() for weight in policies[0].trainable]
    reached = []
    for num_iterations in (1, 4):
        with torch.no_grad():
            for weight, first in zip(policies[0].trainable, start, strict=True):
                weight.copy_(first)
        steps = distil(
            EXAMPLES,
            policies[0],
            DRAW,
            Lesson(policies[1], num_iterations=num_iterations),
            torch.optim.Adam(policies[0].trainable, lr=0.01),
            max_steps=4,
            prompts_per_step=2,
            num_draws=16,
            generator=torch.Generator().manual_seed(1),
        )
        assert [step.numbers["updates"] for step in steps] == [num_iterations] * 4
        with torch.no_grad():
            reached.append(kl(law(policies[1]), law(policies[0])).mean().item())
    assert reached[1] < 0.8 * reached[0]


@pytest.mark.parametrize(
    ("divergence", "share"), [("forward_kl", 1.0), ("reverse_kl", 0.0), ("skew_kl(0.1)", 0.5)]
)
def test_it_lowers_the_exact_kl(policies, divergence, share):
    policy, teacher = policies

    def left():
        with torch.no_grad():
            return kl(law(teacher), law(policy)).mean().item()

    before = left()
    for _ in distil(
        EXAMPLES,
        policy,
        DRAW,
        Lesson(teacher, divergence=divergence, teacher_draws=share),
        torch.optim.Adam(policy.trainable, lr=0.02),
        max_steps=20,
        prompts_per_step=2,
        num_draws=8,
        generator=torch.Generator().manual_seed(1),
    ):
        pass
    assert before > 0.02
    assert left() < 0.3 * before
