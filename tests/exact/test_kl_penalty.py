"""The table of KL penalties as klimb has it: every cell does what it says, by enumeration against differences.

`test_kl_gradients` proves the mathematics; here the functions and the table of `klimb.objectives.kl_penalty` are held
to it. Strings up to T = 3 over V = 3; G = 1, every string once with its probability.
"""

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck

from klimb.exact import (
    all_strings,
    expectation,
    kl,
    log_prob,
    random_logits,
    token_log_prob,
)
from klimb.exact.tabular import table_of
from klimb.exact.truth import normalise, tilt
from klimb.methods import KL_PENALTIES, METHODS, with_penalty
from klimb.objectives.aggregate import sum_tokens
from klimb.objectives.bind import bind
from klimb.objectives.kl_penalty import (
    CELLS,
    ESTIMATORS,
    TRAPS,
    fixed_weight,
    k1,
    k2,
    k3,
    kl_loss,
    kl_reward,
    rao_blackwell,
    score_weight,
    token_kl_loss,
)
from klimb.objectives.ratio import geometric_ratio, sequence_ratio, token_ratio
from klimb.objectives.surrogate import surrogate

SPACE = all_strings(3, 3)
GENERATOR = torch.Generator().manual_seed(60)
REF, THETA, OTHER = (random_logits(SPACE.num_prefixes, 3, generator=GENERATOR) for _ in range(3))
LOG_REF = log_prob(REF, SPACE)
REWARD = torch.randn(SPACE.size, generator=GENERATOR, dtype=torch.float64)
ON, OFF = log_prob(THETA, SPACE), log_prob(OTHER, SPACE)


def packed(per_token, y):
    return per_token[y][SPACE.mask[y]]


def layout(y):
    lengths = SPACE.lengths[y]
    return torch.arange(lengths.numel()).repeat_interleave(lengths.flatten()), lengths


TOKENS_REF, TOKENS_OTHER = token_log_prob(REF, SPACE), token_log_prob(OTHER, SPACE)
REF_ALL = torch.log_softmax(REF, -1)[SPACE.prefixes]  # [Y, T, V]


def gradient(method, log_law, num_draws=1):
    """Value and gradient, in expectation, of method(theta, log_pi [Y], tokens [Y, T], outcomes) -> [M]."""
    theta = THETA.clone().requires_grad_()
    tokens = token_log_prob(theta, SPACE)
    value, (slope,) = expectation(
        lambda y: method(theta, tokens.sum(1), tokens, y), log_law, num_draws, parameters=[theta]
    )
    return value, slope


def error(left, right):
    return (left - right).abs().max().item()


@pytest.fixture(scope="module")
def reverse(numeric_gradient):
    return numeric_gradient(lambda x: kl(log_prob(x, SPACE), LOG_REF), THETA, 1e-3)


@pytest.fixture(scope="module")
def forward(numeric_gradient):
    return numeric_gradient(lambda x: kl(LOG_REF, log_prob(x, SPACE)), THETA, 1e-3)


def cell(name, use, log_q=None):
    """The penalty of one cell, as a method of `gradient`; log_q [Y] of the draws, None for fresh ones."""
    estimator = ESTIMATORS[name]

    def as_reward(_, log_pi, tokens, y):
        reward = kl_reward(log_pi[y], LOG_REF[y], beta=1.0, estimator=estimator)
        drawn = log_pi.detach() if log_q is None else log_q
        return -(score_weight(log_pi[y], drawn[y]) * reward).mean(1)

    def as_loss(_, log_pi, tokens, y):
        weight = score_weight if use == "weighted loss" else fixed_weight
        drawn = None if log_q is None else log_q[y]
        return kl_loss(log_pi[y], LOG_REF[y], drawn, estimator=estimator, weight=weight)

    return as_reward if use == "reward" else as_loss


def off_by(slope, reverse, forward):
    """What no combination of the two known gradients explains."""
    both = torch.stack([reverse.flatten(), forward.flatten()], 1)
    return error(both @ torch.linalg.lstsq(both, slope.flatten()[:, None]).solution, slope.flatten()[:, None])


@pytest.mark.parametrize("law", ["on", "off"])
@pytest.mark.parametrize(("name", "use"), CELLS)
def test_every_cell_optimises_what_it_says(name, use, law, reverse, forward):
    log_law, log_q = (ON, None) if law == "on" else (OFF, OFF)
    _, slope = gradient(cell(name, use, log_q), log_law)
    says = CELLS[name, use]
    if says.reverse is None:
        assert off_by(slope, reverse, forward) > 1e-2
    else:
        assert error(slope, says.reverse * reverse + says.forward * forward) < 1e-8
    assert (error(slope, reverse) < 1e-8) == says.right
    assert says.right or error(slope, reverse) > 1e-2
    assert ("wrong" in says.says) != says.right


@pytest.mark.parametrize("choice", KL_PENALTIES)
def test_a_method_with_that_penalty_has_the_gradient_of_the_reward_less_its_cell(choice, reverse, forward):
    """rloo with each penalty: what training computes, in expectation over all pairs of draws."""
    row, beta = with_penalty(METHODS["rloo"], choice), 0.5
    says = CELLS[KL_PENALTIES[choice]]

    def method(_, log_pi, tokens, y):
        now = packed(tokens, y)
        places, lengths = layout(y)
        numbers = {
            "token_log_pi": now,
            "token_log_old": now.detach(),
            "log_pi": log_pi[y],
            "log_old": log_pi[y].detach(),
            "log_ref": LOG_REF[y],
            "reward": REWARD[y],
            "row": places,
            "lengths": lengths,
            "beta": beta,
        }
        for name, function in row.derived.items():
            numbers[name] = function(**bind(function, numbers))
        return row.objective(**bind(row.objective, numbers))

    _, slope = gradient(method, ON, num_draws=2)
    theta = THETA.clone().requires_grad_()
    (gain,) = torch.autograd.grad((log_prob(theta, SPACE).exp() * REWARD).sum(), theta)
    if says.reverse is not None:
        assert error(slope + gain, beta * (says.reverse * reverse + says.forward * forward)) < 1e-7
    assert (error(slope + gain, beta * reverse) < 1e-7) == says.right


def test_the_table_is_complete():
    assert set(CELLS) == {(k, use) for k in ESTIMATORS for use in ("reward", "loss", "weighted loss")}
    right = {key for key, says in CELLS.items() if says.right}
    assert right == {("k1", "reward"), ("k2", "loss"), ("k1", "weighted loss"), ("k3", "weighted loss")}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_off_policy_without_a_weight_every_cell_is_biased(name, reverse, forward):
    for use in ("reward", "loss"):
        _, slope = gradient(cell(name, use), OFF)
        says = CELLS[name, use]
        if says.reverse is not None:
            assert error(slope, says.reverse * reverse + says.forward * forward) > 1e-2


def test_k3_in_the_reward_is_almost_no_penalty_near_the_reference():
    """To leading order both directions have one gradient, and here they are subtracted."""
    shares = []
    for step in (0.1, 0.01):
        near = REF + step * (THETA - REF)
        theta = near.clone().requires_grad_()
        log_pi = log_prob(theta, SPACE)
        law = log_pi.detach()
        kept = [
            -(law.exp() * kl_reward(law, LOG_REF, beta=1.0, estimator=k) * log_pi).sum() for k in (k3, k1)
        ]
        norms = [torch.autograd.grad(x, theta, retain_graph=True)[0].norm() for x in kept]
        shares.append((norms[0] / norms[1]).item())
    assert shares[1] < 0.02
    assert 8 < shares[0] / shares[1] < 12  # it falls with the distance


@pytest.mark.parametrize("log_q", [None, OFF])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_values(name, log_q):
    law = ON if log_q is None else OFF
    value, _ = gradient(cell(name, "loss", log_q), law)
    off = abs(value - kl(ON, LOG_REF))
    assert off > 1e-2 if name == "k2" else off < 1e-12


def test_a_reward_with_k3_as_loss_has_another_optimum_than_p():
    """pi = beta ref / (nu - r), with nu such that it sums to one; with k2 in its place the optimum is p."""
    beta = 0.7
    reward = random_logits(SPACE.size, generator=torch.Generator().manual_seed(62))
    low, high = reward.max(), reward.max() + beta
    for _ in range(200):
        nu = (low + high) / 2
        low, high = (nu, high) if (beta * LOG_REF.exp() / (nu - reward)).sum() > 1 else (low, nu)
    inverse = (beta * LOG_REF.exp() / (nu - reward)).log()
    log_p = normalise(tilt(LOG_REF, reward, beta))

    def step(log_law, estimator):
        theta = table_of(log_law, SPACE).requires_grad_()
        log_pi = log_prob(theta, SPACE)
        gain = score_weight(log_pi, log_law)[:, None] * reward[:, None]
        loss = beta * kl_loss(log_pi[:, None], LOG_REF[:, None], estimator=estimator) - gain.mean(1)
        return torch.autograd.grad((log_law.exp() * loss).sum(), theta)[0].abs().max().item()

    assert step(inverse, k3) < 1e-12
    assert step(log_p, k2) < 1e-12
    assert step(log_p, k3) > 1e-2
    assert step(inverse, k2) > 1e-2


# Token by token


def per_prefix_gradient(direction):
    """Of the next token's KL, summed over the visited prefixes, which are held fixed."""

    def method(theta, log_pi, tokens, y):
        here = torch.log_softmax(theta, -1)[SPACE.prefixes]
        pair = (here, REF_ALL) if direction == "reverse" else (REF_ALL, here)
        return sum_tokens(packed(kl(*pair), y), *layout(y))

    return gradient(method, ON)[1]


def token_loss(estimator):
    return lambda theta, log_pi, tokens, y: token_kl_loss(
        packed(tokens, y), packed(TOKENS_REF, y), *layout(y), estimator=estimator
    )


def weighed(ratio):
    """k3 of each token, in the surrogate, times a ratio that is differentiated."""

    def method(theta, log_pi, tokens, y):
        row, lengths = layout(y)
        now = packed(tokens, y)
        return surrogate(
            now,
            now.detach(),
            row,
            lengths,
            torch.zeros(y.shape, dtype=now.dtype),
            token_log_ref=packed(TOKENS_REF, y),
            ratio=ratio,
            aggregate=sum_tokens,
            penalty=k3,
            beta=1.0,
            weigh_penalty=True,
        )

    return method


def frozen_full(theta, log_pi, tokens, y):
    here = packed(torch.log_softmax(theta, -1)[SPACE.prefixes], y)
    return rao_blackwell(here, packed(REF_ALL, y), packed(tokens, y).detach(), *layout(y))


def alone(theta, log_pi, tokens, y):
    """Each token rewarded with its own k1 and nothing of what comes later."""
    reward = kl_reward(packed(tokens, y), packed(TOKENS_REF, y), beta=1.0)
    return -sum_tokens(reward * packed(tokens, y), *layout(y))


TRAPPED = {
    "k1 of a token as that token's reward alone": (alone, "reverse"),
    "k2 summed over tokens as a loss": (token_loss(k2), "reverse"),
    "k3 summed over tokens as a loss": (token_loss(k3), "forward"),
    "k3 weighted token by token": (weighed(token_ratio), "reverse"),
    "k3 of each token weighted by the geometric ratio": (weighed(geometric_ratio), None),
    "full KL of each next token as a loss": (frozen_full, "reverse"),
}


def test_every_trap_is_sprung():
    assert set(TRAPPED) == set(TRAPS)


@pytest.mark.parametrize("name", TRAPPED)
def test_a_trap_is_a_part_and_not_the_whole(name, reverse, forward):
    method, part = TRAPPED[name]
    _, slope = gradient(method, ON)
    assert off_by(slope, reverse, forward) > 1e-3
    for whole in (reverse, forward):
        assert error(slope, whole) > 1e-2
    for direction in ("reverse", "forward"):
        same = error(slope, per_prefix_gradient(direction)) < 1e-12
        assert same == (direction == part)


def test_k3_of_each_token_weighted_by_the_whole_completion_is_the_reverse_kl(reverse):
    value, slope = gradient(weighed(sequence_ratio), ON)
    assert error(slope, reverse) < 1e-8
    assert abs(value - kl(ON, LOG_REF)) < 1e-12


def test_the_kl_to_go_of_k1_is_the_reverse_kl(reverse):
    def to_go(theta, log_pi, tokens, y):
        log_rho = (tokens - TOKENS_REF).detach()
        return sum_tokens(packed(log_rho.flip(1).cumsum(1).flip(1) * tokens, y), *layout(y))

    assert error(gradient(to_go, ON)[1], reverse) < 1e-8


# Rao-Blackwell


@pytest.mark.parametrize("law", ["on", "off"])
def test_rao_blackwell_has_value_and_gradient_of_the_kl(law, reverse):
    def method(theta, log_pi, tokens, y):
        here = packed(torch.log_softmax(theta, -1)[SPACE.prefixes], y)
        old = None if law == "on" else packed(TOKENS_OTHER, y)
        return rao_blackwell(here, packed(REF_ALL, y), packed(tokens, y), *layout(y), old)

    value, slope = gradient(method, ON if law == "on" else OFF)
    assert abs(value - kl(ON, LOG_REF)) < 1e-12
    assert error(slope, reverse) < 1e-8
    if law == "off":  # weights of the prefixes left out
        value, _ = gradient(frozen_full, OFF)
        assert abs(value - kl(ON, LOG_REF)) > 1e-2


def test_rao_blackwell_varies_less_than_the_estimators():
    y = torch.arange(SPACE.size)[:, None]

    def variance(value):
        prob = ON.exp()
        return (prob * (value - (prob * value).sum()) ** 2).sum().item()

    tokens = token_log_prob(THETA, SPACE)
    full = rao_blackwell(
        packed(torch.log_softmax(THETA, -1)[SPACE.prefixes], y),
        packed(REF_ALL, y),
        packed(tokens, y),
        *layout(y),
    )
    single = ON - LOG_REF
    assert variance(full) < variance(single) / 2
    assert variance(full) < variance(k3(single))


# Numbers that are not usual


def test_tokens_that_neither_can_draw_do_not_count_and_those_the_reference_excludes_do():
    row, lengths = torch.tensor([0]), torch.tensor([[1]])
    logits = torch.tensor([[0.3, -0.2, -torch.inf]], dtype=torch.float64)
    log_ref = torch.log_softmax(torch.tensor([[0.0, 0.5, -torch.inf]], dtype=torch.float64), -1)
    log_pi = torch.log_softmax(logits, -1).requires_grad_()
    value = rao_blackwell(log_pi, log_ref, log_pi[:, 0], row, lengths)
    value.backward()
    assert value.item() == pytest.approx(kl(log_pi.detach(), log_ref).item(), abs=1e-14)
    assert log_pi.grad.isfinite().all()
    assert log_pi.grad[0, 2] == 0
    whole = torch.log_softmax(torch.zeros(1, 3, dtype=torch.float64), -1)
    with pytest.raises(ValueError, match="the reference excludes"):
        rao_blackwell(whole, log_ref, whole[:, 0], row, lengths)


def test_k3_keeps_its_digits_near_zero():
    log_rho = torch.tensor([1e-6], dtype=torch.float32)
    assert k3(log_rho).item() == pytest.approx(0.5e-12, abs=1e-13)


def test_gradcheck():
    generator = torch.Generator().manual_seed(61)
    log_pi, log_ref, log_q = (random_logits(2, 3, generator=generator) for _ in range(3))
    log_pi.requires_grad_()
    for estimator in (k1, k2, k3):
        assert gradcheck(
            lambda x, k=estimator: kl_loss(x, log_ref, log_q, estimator=k, weight=score_weight), log_pi
        )
        with pytest.raises(GradcheckError):  # a weight held fixed is no derivative of the value
            gradcheck(lambda x, k=estimator: kl_loss(x, log_ref, log_q, estimator=k), log_pi)
    lengths = torch.tensor([[2, 1]])
    row = torch.tensor([0, 0, 1])
    logits, other = (random_logits(3, 4, generator=generator) for _ in range(2))
    old = random_logits(3, generator=generator)

    def full(x):
        log_all = torch.log_softmax(x, -1)
        return rao_blackwell(log_all, torch.log_softmax(other, -1), log_all[:, 1], row, lengths, old)

    assert gradcheck(full, logits.requires_grad_())
    tokens = random_logits(3, generator=generator).requires_grad_()
    for estimator in (k1, k2, k3):
        assert gradcheck(lambda x, k=estimator: token_kl_loss(x, old, row, lengths, estimator=k), tokens)


@pytest.mark.parametrize(
    ("call", "complaint"),
    [
        (lambda: kl_loss(torch.zeros(1, 2), torch.zeros(1, 3)), "log_ref of shape"),
        (lambda: kl_loss(torch.zeros(1, 2), torch.full((1, 2), -torch.inf)), "log_ref = -inf"),
        (
            lambda: token_kl_loss(torch.zeros(2), torch.zeros(2), torch.tensor([0, 1]), torch.tensor([[2]])),
            "row",
        ),
        (
            lambda: rao_blackwell(
                torch.zeros(2, 3),
                torch.zeros(3, 3),
                torch.zeros(2),
                torch.tensor([0, 0]),
                torch.tensor([[2]]),
            ),
            "log_ref_all",
        ),
    ],
)
def test_mistakes_are_named(call, complaint):
    with pytest.raises(ValueError, match=complaint):
        call()
