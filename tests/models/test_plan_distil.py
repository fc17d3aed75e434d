"""The plan of a distillation on a model whose every completion can be listed: estimates beside sums; and what it advises."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from klimb.data import Draws, Example
from klimb.distil import Lesson
from klimb.exact import all_strings, kl
from klimb.models.families import lora
from klimb.numbers.estimate import Estimate
from klimb.numbers.weights import pooled_pareto_k
from klimb.plan_distil import FAR, Apart, Cost, Place, advice, plan_distil
from klimb.rewards.log_ratio import LogRatio
from klimb.samplers.ancestral import ancestral

EXAMPLES = [Example("a"), Example("ba")]
SPACE = all_strings(7, 2)


@pytest.fixture
def found_and_truth(seven_tokens):
    """A plan whose teacher is the reference with an adapter on, and the exact log-probabilities of all completions."""
    teacher, reference = lora(*seven_tokens, r=4, alpha=8)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in teacher.trainable:
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    found = plan_distil(
        EXAMPLES,
        teacher,
        reference,
        partial(ancestral, max_completion_length=2),
        Lesson(replace(teacher, trainable=())),
        num_draws=4000,
        step=(2, 8),
        generator=torch.Generator().manual_seed(0),
    )
    listed = Draws(EXAMPLES, [SPACE.completions] * 2, SPACE.finished.expand(2, -1), full_support=True)
    with torch.no_grad():
        log_p, log_ref = (listed.sequence_sums(who.log_prob(listed)).double() for who in (teacher, reference))
    return found, log_p, log_ref, teacher


def test_both_kls_are_those_of_all_completions(found_and_truth):
    found, log_p, log_ref, _ = found_and_truth
    forward, reverse = kl(log_p, log_ref), kl(log_ref, log_p)
    for estimate, true, other in ((found.forward, forward, reverse), (found.reverse, reverse, forward)):
        error = (estimate.high - estimate.low) / 4
        assert abs(estimate.value - true.mean().item()) < 4 * error
        assert abs(estimate.value - other.mean().item()) > 4 * error  # the mutant of the other direction
    for p, (example, a, b) in enumerate(found.prompts):
        assert example is EXAMPLES[p]
        assert a == pytest.approx(forward[p].item(), rel=0.1)
        assert b == pytest.approx(reverse[p].item(), rel=0.1)


def test_places_and_tokens_are_parts_of_the_whole(found_and_truth):
    found, log_p, log_ref, _ = found_and_truth
    lengths = SPACE.lengths.double()
    tokens = (log_p.exp() @ lengths).mean().item()
    first, later = found.places
    assert (first.first, first.last, later.first, later.last) == (1, 1, 2, 2)
    # every completion has a first token, and tokens - 1 of them a second one
    whole = first.forward.value + (tokens - 1) * later.forward.value
    assert whole == pytest.approx(found.forward.value, rel=0.02)
    assert found.forward_a_token.value == pytest.approx(found.forward.value / tokens, rel=0.02)
    # the law of the first token, by sums
    law = [torch.zeros(2, 7, dtype=torch.float64) for _ in range(2)]
    start = torch.tensor([ids[0] for ids in SPACE.completions])
    for table, log in zip(law, (log_p, log_ref), strict=True):
        table.index_add_(1, start, log.exp())
    exact = (law[0] * (law[0] / law[1]).log()).sum(1).mean().item()
    assert first.forward.value == pytest.approx(exact, rel=1e-3)


def test_the_tail_and_the_cost(found_and_truth):
    found, log_p, log_ref, teacher = found_and_truth
    draws = torch.multinomial(
        log_ref.exp(), 4000, replacement=True, generator=torch.Generator().manual_seed(1)
    )
    again = pooled_pareto_k((log_p - log_ref).gather(1, draws))
    assert found.tail_holds
    assert again < 0.7
    cost = found.cost
    assert cost.tokens == pytest.approx(16 * (log_p.exp() @ SPACE.lengths.double()).mean().item(), rel=0.02)
    assert cost.trained_numbers == sum(weight.numel() for weight in teacher.trainable)
    assert all(weight.grad is None for weight in teacher.trainable)
    slow = replace(cost, teacher_seconds=5.0, policy_seconds=1.0, update_seconds=2.0)
    assert slow.step(teacher_draws=0.25, num_iterations=3) == pytest.approx(0.25 * 5 + 0.75 * 1 + 6)


def test_few_draws_a_prompt_hide_no_tail(seven_tokens):
    """Weights over the mean of a prompt's two are at most two, whatever the tail; Z = 1 needs no such mean."""
    teacher, reference = lora(*seven_tokens, r=4, alpha=8)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in teacher.trainable:
            weight += 1.5 * torch.randn(weight.shape, generator=generator)
    kept = []

    def sampler(*arguments, **options):
        kept.append(ancestral(*arguments, max_completion_length=2, **options))
        return kept[-1]

    found = plan_distil(
        EXAMPLES * 200,
        teacher,
        reference,
        sampler,
        Lesson(replace(teacher, trainable=())),
        num_draws=2,
        step=(2, 8),
        generator=torch.Generator().manual_seed(0),
    )
    log_w = LogRatio(teacher, reference).of_draws(kept[1])
    assert found.pareto_k == pytest.approx(pooled_pareto_k(log_w.reshape(1, -1)), abs=1e-6)
    assert found.pareto_k > 0.5
    assert pooled_pareto_k(log_w) < 0  # the mutant


def apart(forward, reverse, tokens=10.0, width=0.1, **changes):
    def near(x):
        return Estimate(x, x - width, x + width, 64)

    found = Apart(
        near(forward),
        near(reverse),
        near(forward / tokens),
        near(reverse / tokens),
        [Place(1, 1, near(0.1), near(0.1)), Place(2, 4, near(0.5), None)],
        [(Example("a"), 3.0, 1.0), (Example("b"), 1.0, 1.0)],
        0.3,
        True,
        Cost((9.0, 5.0), 100.0, 1.0, 1.0, 1.0, 512),
    )
    return replace(found, **changes)


def test_advice_in_words():
    said = advice(apart(3.0, 1.0), holds=None)
    assert (said.divergence, said.teacher_draws) == ("forward_kl", 1.0)
    words = " ".join(said.words)
    assert "The first is larger" in words
    assert "512 trained numbers can hold the target cannot be told" in words
    assert "most a token is at tokens 2 to 4" in words
    assert "a quarter of the prompts has 75% of it" in words
    second = advice(apart(1.0, 3.0), holds=None)
    assert (second.divergence, second.teacher_draws) == ("forward_kl", 0.5)
    assert "The second is larger" in " ".join(second.words)
    assert "Neither is larger beyond doubt" in " ".join(advice(apart(1.0, 1.1), holds=None).words)
    assert "The family holds the target" in " ".join(advice(apart(3.0, 1.0), holds=True).words)
    assert "would need about 245 of them a prompt" in words
    heavy = advice(apart(3.0, 1.0, tail_holds=False, pareto_k=1.2), holds=None).words
    assert "too heavy to tell (Pareto k 1.20)" in " ".join(heavy)


def test_far_apart_a_bounded_divergence_is_advised():
    far = advice(apart(3.0, 10.0 * FAR + 1), holds=None)
    assert (far.divergence, far.teacher_draws) == ("skew_kl(0.1)", 0.5)
    assert "rule of thumb" in far.words[-1]
