"""Divergences of the next token over the whole vocabulary, summed along completions: the chain rule, by enumeration."""

import itertools

import pytest
import torch

from klimb.exact import expectation, kl, random_logits
from klimb.exact.divergences import jensen_shannon, squared_hellinger, total_variation
from klimb.exact.space import all_strings
from klimb.exact.tabular import log_prob, token_log_prob
from klimb.objectives.generators import divergence
from klimb.objectives.token_divergence import token_divergence, what_follows

GENERATOR = torch.Generator().manual_seed(5)
SPACE = all_strings(3, 3)
PI, P = (random_logits(SPACE.num_prefixes, 3, generator=GENERATOR) for _ in range(2))


def along(table, which):
    """[Y] a number a prefix, summed over the prefixes that a string visits."""
    del which
    return (table[SPACE.prefixes] * SPACE.mask).sum(1)


def sequence(f, law, pi=PI, p=P):
    per_prefix = token_divergence(pi.log_softmax(1), p.log_softmax(1), f=f)
    return (log_prob(law, SPACE).exp().detach() * along(per_prefix, None)).sum()


def test_the_chain_rule_gives_both_kls():
    log_pi, log_p = log_prob(PI, SPACE), log_prob(P, SPACE)
    assert sequence("forward_kl", P).item() == pytest.approx(kl(log_p, log_pi).item(), abs=1e-12)
    assert sequence("reverse_kl", PI).item() == pytest.approx(kl(log_pi, log_p).item(), abs=1e-12)
    # the wrong prefixes give another number
    assert abs(sequence("forward_kl", PI).item() - kl(log_p, log_pi).item()) > 1e-3


def gradient(value, table):
    (slope,) = torch.autograd.grad(value, table)
    return slope


def test_forward_on_the_teachers_prefixes_has_the_gradient_of_the_kl():
    pi = PI.clone().requires_grad_()
    ours = gradient(sequence("forward_kl", P, pi=pi), pi)
    true = gradient(kl(log_prob(P, SPACE), log_prob(pi, SPACE)), pi)
    torch.testing.assert_close(ours, true, rtol=0, atol=1e-12)


def test_reverse_on_the_policys_prefixes_leaves_a_part_out():
    pi = PI.clone().requires_grad_()
    ours = gradient(sequence("reverse_kl", pi, pi=pi), pi)
    true = gradient(kl(log_prob(pi, SPACE), log_prob(P, SPACE)), pi)
    cosine = torch.cosine_similarity(ours.flatten(), true.flatten(), dim=0)
    assert 0.5 < cosine < 0.9999
    at = P.clone().requires_grad_()
    assert gradient(sequence("reverse_kl", at, pi=at), at).abs().max() < 1e-12


INDEPENDENT = {
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
    "squared_hellinger": squared_hellinger,
    "forward_kl": lambda pi, p: kl(p, pi),
    "reverse_kl": kl,
}


@pytest.mark.parametrize("f", INDEPENDENT)
def test_a_prefix_at_a_time_it_is_the_divergence(f):
    log_pi, log_p = PI.log_softmax(1), P.log_softmax(1)
    found = token_divergence(log_pi, log_p, f=f)
    wanted = torch.stack([INDEPENDENT[f](a, b) for a, b in zip(log_pi, log_p, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("f", ["skew_kl(0.1)", "skew_reverse_kl(0.1)", "generalized_js(0.3)", "alpha(0.5)"])
def test_families_are_zero_at_the_teacher_and_bounded_far_away(f):
    log_p = P.log_softmax(1)
    assert token_divergence(log_p, log_p, f=f).abs().max() < 1e-12
    far = torch.tensor([[0.0, -300.0, -300.0], [-300.0, 0.0, -300.0]]).double().log_softmax(1)
    found = token_divergence(far[:1], far[1:], f=f)
    assert found.isfinite().all()
    assert found.item() == pytest.approx(divergence(f).at_zero + divergence(f).at_infinity, rel=1e-6)


def test_the_top_of_the_teacher_with_the_rest_as_one_is_a_lower_bound():
    log_pi, log_p = (random_logits(8, 20, generator=GENERATOR).log_softmax(1) for _ in range(2))
    found = [token_divergence(log_pi, log_p, top_k=k) for k in (1, 5, 15, 19, 20)]
    for less, more in itertools.pairwise(found):
        assert (less <= more + 1e-12).all()
    torch.testing.assert_close(found[-1], token_divergence(log_pi, log_p), rtol=0, atol=0)
    assert (found[0] > 0).all()
    with pytest.raises(ValueError, match="the same vocabulary"):
        token_divergence(log_pi, log_p[:, :7])


def per_tuple(f, pi, outcomes, long_term=True):
    """[M] what a step on the policy's own draws makes small, for each tuple of them."""
    mask, lengths = SPACE.mask[outcomes], SPACE.lengths[outcomes]
    per_prefix = token_divergence(pi.log_softmax(1), P.log_softmax(1), f=f)
    found = per_prefix[SPACE.prefixes[outcomes]][mask]
    if long_term:
        found = found + what_follows(found, lengths) * token_log_prob(pi, SPACE)[outcomes][mask]
    return torch.zeros(mask.shape, dtype=found.dtype).masked_scatter(mask, found).sum(2).mean(1)


@pytest.mark.parametrize("num_draws", [1, 2, 3])
@pytest.mark.parametrize("f", ["reverse_kl", "jensen_shannon", "forward_kl", "skew_kl(0.1)"])
def test_with_what_follows_it_is_the_gradient_of_the_whole_sequence(f, num_draws):
    pi = PI.clone().requires_grad_()
    value = (
        log_prob(pi, SPACE).exp() * along(token_divergence(pi.log_softmax(1), P.log_softmax(1), f=f), None)
    ).sum()
    if f == "reverse_kl":
        assert value.item() == pytest.approx(kl(log_prob(PI, SPACE), log_prob(P, SPACE)).item(), abs=1e-12)
    true = gradient(value, pi)

    def ours(**options):
        _, (slope,) = expectation(
            lambda outcomes: per_tuple(f, pi, outcomes, **options),
            log_prob(PI, SPACE),
            num_draws,
            parameters=[pi],
        )
        return slope

    torch.testing.assert_close(ours(), true, rtol=0, atol=1e-12)
    assert (ours(long_term=False) - true).abs().max() > 1e-2  # the mutant that leaves the long term out
