"""On a model so small that every completion can be written down, samplers draw from the laws they state.

57 completions of at most two tokens over a vocabulary of 8. Each law is compared by a chi-square test with the exact
probabilities, summed from plain forward passes, and the same test must reject a neighbour's law.
"""

import math
from collections import Counter
from functools import partial

import pytest
import torch
from scipy.stats import chi2

from klimb.data import Example
from klimb.models.policy import CausalPolicy
from klimb.numbers.best_of_n import best_of_n_law
from klimb.rewards.score import score
from klimb.samplers.ancestral import ancestral
from klimb.samplers.best_of import best_of
from klimb.samplers.rejection import rejection
from klimb.target import tilt

ACCEPTED, REJECTED = 1e-3, 1e-9  # p-values; seeds are fixed, so an accepted test stays accepted
short = partial(ancestral, max_completion_length=2)
BETA = 0.7


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def p_value(group, keys, probabilities):
    """Pearson's chi-square of drawn completions against a law; outcomes expected below five times share a cell."""
    counts = Counter(tuple(ids.tolist()) for ids in group)
    assert set(counts) <= set(keys)
    observed = torch.tensor([counts[key] for key in keys], dtype=torch.float64)
    expected = len(group) * probabilities
    assert observed[expected == 0].sum() == 0
    rare = expected < 5
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    return chi2.sf(statistic, len(expected) - 1)


def tempered(temperature=1.0, top_p=1.0):
    """The law of one token after temperature and top-p, from logits [V] in float64."""

    def law(logits):
        p = (logits / temperature).softmax(0)
        ordered, index = p.sort(descending=True)
        kept = ordered.cumsum(0) - ordered < top_p
        p = torch.zeros_like(p).scatter(0, index[kept], ordered[kept])
        return p / p.sum()

    return law


def count_x(completions, **columns):
    """Rewards 0, 1, 2 with many ties, minus a little for a z, so that some are unique."""
    return [text.count("x") - 0.4 * text.count("z") for text in completions]


@pytest.fixture(scope="module")
def examples():
    return [Example("xyzzyxzyxx"), Example("y")]


@pytest.fixture(scope="module")
def texts(letters_policy):
    return lambda keys: [letters_policy.decode(torch.tensor(key)) for key in keys]


def test_finished_and_cut_completions_have_all_the_mass(letters_policy, enumerated, examples):
    for example in examples:
        keys, p = enumerated(letters_policy, example, 2)
        assert len(keys) == 1 + 7 * 8
        assert abs(p.sum().item() - 1) < 1e-12
        cut = torch.tensor([key[-1] not in letters_policy.end for key in keys])
        assert 0.05 < p[cut].sum() < 0.95  # both kinds matter: forgetting either would show


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (1.3, 1.0), (0.6, 1.0), (1.0, 0.7), (1.5, 0.8)]
)
def test_ancestral_draws_from_the_law_it_states(letters_policy, enumerated, examples, temperature, top_p):
    draws = short(letters_policy, examples, 10_000, generator=seeded(1), temperature=temperature, top_p=top_p)
    assert draws.full_support == (top_p == 1.0)
    for p, example in enumerate(examples):
        keys, exact = enumerated(letters_policy, example, 2, tempered(temperature, top_p))
        assert abs(exact.sum().item() - 1) < 1e-12
        assert p_value(draws.completions[p], keys, exact) > ACCEPTED
        table = dict(zip(keys, exact.tolist(), strict=True))
        stated = torch.tensor([math.log(table[tuple(ids.tolist())]) for ids in draws.completions[p]])
        assert (draws.log_q[p] - stated).abs().max() < 1e-4
        # mutants: the policy's own law for tempered draws, a tempered law for the policy's own draws
        neighbour = (1.3, 1.0) if (temperature, top_p) == (1.0, 1.0) else (1.0, 1.0)
        _, wrong = enumerated(letters_policy, example, 2, tempered(*neighbour))
        assert p_value(draws.completions[p], keys, wrong) < REJECTED


def test_scores_know_nothing_of_temperature(letters_policy, enumerated, examples):
    draws = short(letters_policy, examples, 50, generator=seeded(2), temperature=1.7, top_p=0.9)
    with torch.no_grad():
        scores = draws.sequence_sums(letters_policy.log_prob(draws))
    for p, example in enumerate(examples):
        table = dict(zip(*enumerated(letters_policy, example, 2), strict=True))
        exact = torch.stack([table[tuple(ids.tolist())].log() for ids in draws.completions[p]])
        assert (scores[p] - exact).abs().max() < 1e-4
    assert (scores - draws.log_q).abs().max() > 0.1


def test_importance_weights_of_tempered_draws_sum_the_space(letters_policy, examples):
    # E_q[pi / q] = 1 for a law of full support: the sum over the space, by draws from another law
    draws = short(letters_policy, examples, 10_000, generator=seeded(3), temperature=1.3)
    with torch.no_grad():
        weights = (draws.sequence_sums(letters_policy.log_prob(draws)) - draws.log_q).exp().double()
    error = weights.std(1) / math.sqrt(10_000)
    assert ((weights.mean(1) - 1).abs() < 4 * error).all()
    assert (error < 0.02).all()
    cut = short(letters_policy, examples, 2000, generator=seeded(3), top_p=0.7)
    with torch.no_grad():
        weights = (cut.sequence_sums(letters_policy.log_prob(cut)) - cut.log_q).exp().double()
    assert (weights.mean(1) < 0.95).all()  # mutant: what top-p never draws is missing


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"max_completion_length": 0},
    ],
)
def test_options_that_name_no_law_are_refused(letters_policy, examples, options):
    with pytest.raises(ValueError, match="expected temperature > 0"):
        ancestral(letters_policy, examples, 2, generator=seeded(), **{"max_completion_length": 2, **options})


def test_no_room_in_the_context(letters_policy):
    ancestral(letters_policy, [Example("x" * 94)], 1, generator=seeded(), max_completion_length=2)
    with pytest.raises(ValueError, match="has 95 tokens; with max_completion_length 2"):
        ancestral(letters_policy, [Example("x" * 95)], 1, generator=seeded(), max_completion_length=2)


def test_a_policy_that_gives_nan_is_named(build, tokenizer):
    model = build("llama_untied")
    model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="gives NaN"):
        short(CausalPolicy(model, tokenizer), [Example("a")], 2, generator=seeded())


# best of n


def test_best_of_keeps_the_best_of_the_same_draws(letters_policy, examples):
    n, num_draws = 4, 50
    best = best_of(
        letters_policy, examples, num_draws, generator=seeded(4), sampler=short, reward=count_x, n=n
    )
    draws = short(letters_policy, examples, num_draws * n, generator=seeded(4))
    rewards = score(count_x, draws).total.reshape(len(examples), num_draws, n)
    assert torch.equal(score(count_x, best).total, rewards.amax(2))
    for p, group in enumerate(best.completions):
        for k, ids in enumerate(group):
            assert ids.tolist() == draws.completions[p][k * n + int(rewards[p, k].argmax())].tolist()
    assert best.log_q is None


def test_best_of_one_is_the_sampler(letters_policy, examples):
    best = best_of(letters_policy, examples, 20, generator=seeded(5), sampler=short, reward=count_x, n=1)
    draws = short(letters_policy, examples, 20, generator=seeded(5))
    assert [[c.tolist() for c in g] for g in best.completions] == [
        [c.tolist() for c in g] for g in draws.completions
    ]
    with pytest.raises(ValueError, match="n = 0"):
        best_of(letters_policy, examples, 2, generator=seeded(), sampler=short, reward=count_x, n=0)


def test_best_of_has_its_law_and_not_that_of_the_tilted_reward(letters_policy, enumerated, texts, examples):
    n = 3
    best = best_of(letters_policy, examples, 3000, generator=seeded(6), sampler=short, reward=count_x, n=n)
    for p, example in enumerate(examples):
        keys, exact = enumerated(letters_policy, example, 2)
        rewards = torch.tensor(count_x(texts(keys)), dtype=torch.float64)
        law = best_of_n_law(exact[None], rewards[None], n)[0]
        assert p_value(best.completions[p], keys, law) > ACCEPTED
        for wrong in (
            best_of_n_law(exact[None], rewards[None], 2 * n)[0],
            (exact.log() + (n - 1) * rewards).softmax(0),  # p of r itself at 1 / beta = n - 1
        ):
            assert p_value(best.completions[p], keys, wrong) < REJECTED


# rejection


@pytest.fixture(scope="module")
def target(letters_policy):
    return tilt(letters_policy, count_x, BETA)


def reject(target, examples, num_draws, *, sampler=short, bound=2.0, batch=2000, policy=None, **options):
    return rejection(
        policy or target.reference,
        examples,
        num_draws,
        generator=seeded(7),
        sampler=sampler,
        target=target,
        bound=bound,
        batch=batch,
        **{"max_tries": 1_000_000, **options},
    )


def test_rejection_draws_from_the_target(letters_policy, enumerated, texts, examples, target):
    draws = reject(target, examples, 2500)
    reference = short(letters_policy, examples, 2500, generator=seeded(8))
    assert draws.full_support
    assert draws.log_q is None
    for p, example in enumerate(examples):
        keys, ref = enumerated(letters_policy, example, 2)
        rewards = torch.tensor(count_x(texts(keys)), dtype=torch.float64)
        law = (ref.log() + rewards / BETA).softmax(0)
        assert p_value(draws.completions[p], keys, law) > ACCEPTED
        # mutants: one draw with self-normalised weights is the reference; a beta twice as large
        assert p_value(reference.completions[p], keys, law) < REJECTED
        assert p_value(draws.completions[p], keys, (ref.log() + rewards / (2 * BETA)).softmax(0)) < REJECTED


def test_a_looser_bound_costs_tries_and_nothing_else(letters_policy, enumerated, texts, examples):
    # a draw is kept with probability Z exp(-bound / beta)
    example = examples[0]
    keys, ref = enumerated(letters_policy, example, 2)
    rewards = torch.tensor(count_x(texts(keys)), dtype=torch.float64)
    law = (ref.log() + rewards / BETA).softmax(0)
    num_draws, batch, needed = 800, 200, {}
    for bound in (2.0, 2.5):
        calls = []

        def counted(completions, calls=calls, **columns):
            calls.append(len(completions))
            return count_x(completions)

        draws = reject(tilt(letters_policy, counted, BETA), [example], num_draws, bound=bound, batch=batch)
        assert p_value(draws.completions[0], keys, law) > ACCEPTED
        rate = (ref * ((rewards - bound) / BETA).exp()).sum().item()
        needed[bound] = sum(calls)
        # tries until so many are kept, and the last batch is used in part
        spread = math.sqrt(num_draws * (1 - rate)) / rate
        assert abs(needed[bound] - num_draws / rate) < 4 * spread + batch
    assert needed[2.5] > 1.6 * needed[2.0]  # exp(0.5 / 0.7) = 2.04


def test_what_rejection_refuses(letters_policy, examples, target, build, tokenizer):
    with pytest.raises(ValueError, match="the bound 1 is not one: a completion has reward 2"):
        reject(target, examples, 10, bound=1.0)
    with pytest.raises(ValueError, match=r"0 of 64 reference draws were kept .* expected 5"):
        reject(target, examples, 5, bound=40.0, batch=32, max_tries=64)
    with pytest.raises(ValueError, match=r"pass target\.reference"):
        reject(target, examples, 5, policy=CausalPolicy(build(), tokenizer))
    with pytest.raises(ValueError, match="cannot draw everything"):
        reject(target, examples, 5, sampler=partial(short, top_p=0.7))
