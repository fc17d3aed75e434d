"""Path consistency on a small tree: its minimum is p with the soft values, whatever the span and whoever drew.

Strings up to T = 3 over V = 3, a table of logits and a table of values, a row a prefix.
"""

import pytest
import torch
from torch.autograd.gradcheck import gradcheck

from klimb.exact import (
    all_strings,
    categorical,
    expectation,
    gradient_variance,
    kl,
    log_partition,
    log_prob,
    normalise,
    random_logits,
    table_of,
    tilt,
    token_log_prob,
)
from klimb.objectives import coefficients, path_consistency, trajectory_balance

SPACE = all_strings(3, 3)
S = SPACE.num_prefixes
GENERATOR = torch.Generator().manual_seed(90)
REF = random_logits(S, 3, generator=GENERATOR)
LOG_REF = log_prob(REF, SPACE)
LOG_TARGET = tilt(LOG_REF, random_logits(SPACE.size, generator=GENERATOR), 0.5)
LOG_P, LOG_Z = normalise(LOG_TARGET), log_partition(LOG_TARGET)
THETA = random_logits(S, 3, generator=GENERATOR)
ON, OFF = log_prob(THETA, SPACE), categorical(random_logits(SPACE.size, generator=GENERATOR))


def soft_values():
    """log of sum over strings through the prefix of ref exp(r / beta), over that of ref: [S]."""
    through = torch.zeros(S, SPACE.size).double()
    through[SPACE.prefixes[SPACE.mask], SPACE.mask.nonzero()[:, 0]] = 1.0
    return (through @ LOG_TARGET.exp()).log() - (through @ LOG_REF.exp()).log()


V = soft_values()


def pack(y, table, value_table):
    """The numbers of completions y [P, G], packed, as a network gives them."""
    flat, ref = y.flatten(), token_log_prob(REF, SPACE)
    mask = SPACE.mask[flat]
    return {
        "token_log_pi": token_log_prob(table, SPACE)[flat][mask],
        "token_log_ref": ref[flat][mask],
        "values": value_table[SPACE.prefixes[flat]][mask],
        "log_target": LOG_TARGET[y],
        "row": torch.arange(len(flat))[:, None].expand(mask.shape)[mask],
    }


def over(y, table, value_table, span=None):
    return path_consistency(**pack(y, table, value_table), span=span)


def exact(law, span):
    """The expectation for one draw: every string once, weighted by the law."""
    y = torch.arange(SPACE.size)[:, None]
    return lambda table, value_table: (law.exp() * over(y, table, value_table, span)).sum()


@pytest.fixture
def minimise(to_the_end):
    """The law and the soft values at which loss(theta, values) is least."""

    def found(loss):
        theta, values = to_the_end(loss, REF, torch.zeros(S, dtype=torch.float64))
        return log_prob(theta, SPACE), values

    return found


@pytest.mark.parametrize("span", [None, 1, 2, 7])
@pytest.mark.parametrize("law", [LOG_REF, OFF])
def test_minimum_is_the_target_with_the_soft_values(law, span, minimise):
    found, values = minimise(exact(law, span))
    assert kl(found, LOG_P) < 1e-8
    assert (values - V).abs().max() < 1e-4
    assert abs(values[0] - LOG_Z) < 1e-5


def test_soft_values_are_the_soft_bellman_equation():
    """p(token | prefix) = ref(token | prefix) exp(V after - V before), for the tokens that go on."""
    policy, ref = table_of(LOG_P, SPACE), REF.log_softmax(1)
    goes_on = [(0, 1, 1), (0, 2, 2), (1, 1, 3), (1, 2, 4), (2, 1, 5), (2, 2, 6)]
    for before, token, after in goes_on:
        assert abs(policy[before, token] - ref[before, token] - (V[after] - V[before])) < 1e-12


def test_mutant_of_mean_values_is_not_consistent(minimise):
    """A critic's values, E_ref[r / beta | prefix], leave a residual at p and lead elsewhere if held fixed."""
    through = torch.zeros(S, SPACE.size).double()
    through[SPACE.prefixes[SPACE.mask], SPACE.mask.nonzero()[:, 0]] = 1.0
    critic = (through @ (LOG_REF.exp() * (LOG_TARGET - LOG_REF))) / (through @ LOG_REF.exp())
    loss = exact(LOG_REF, None)
    table = table_of(LOG_P, SPACE)
    assert loss(table, V) < 1e-20
    assert loss(table, critic) > 1e-2
    found, _ = minimise(lambda theta, values: loss(theta, critic) + 0 * values.sum())
    assert kl(found, LOG_P) > 1e-2


def to_go(prefix):
    """KL(pi||p) of what follows a prefix, exactly, as a function of the table."""
    through = (SPACE.mask & (SPACE.prefixes == prefix)).any(1)
    start = int((SPACE.mask & (SPACE.prefixes == prefix))[through].nonzero()[0, 1])
    policy = table_of(LOG_P, SPACE)

    def value(table):
        log_pi = token_log_prob(table, SPACE)[through, start:].sum(1)
        return (log_pi.exp() * (log_pi - token_log_prob(policy, SPACE)[through, start:].sum(1))).sum()

    return value


@pytest.mark.parametrize("values", [V, torch.zeros_like(V), 5 * V + 1])
def test_on_policy_gradient_is_that_of_the_kl_to_go_for_any_values(values, numeric_gradient):
    """The sum over prefixes, each as often as the policy reaches it; the reach itself is not differentiated."""
    reach = torch.zeros(S).double()
    reach.index_add_(0, SPACE.prefixes[SPACE.mask], ON.exp()[SPACE.mask.nonzero()[:, 0]])
    kls_to_go = [to_go(s) for s in range(S)]

    def frozen(x):
        return sum(reach[s] * kls_to_go[s](x.reshape(S, 3)) for s in range(S))

    truth = numeric_gradient(frozen, THETA.flatten(), 1e-3)
    theta = THETA.clone().requires_grad_()
    _, (gradient,) = expectation(lambda y: over(y, theta, values), ON, 2, parameters=[theta])
    assert (gradient.flatten() - truth).abs().max() < 1e-8
    whole = numeric_gradient(lambda x: kl(log_prob(x.reshape(S, 3), SPACE), LOG_P), THETA.flatten(), 1e-3)
    assert (gradient.flatten() - whole).abs().max() > 1e-2  # it is more than that of the sequence KL


def test_with_a_span_the_on_policy_gradient_depends_on_the_values():
    gradients = []
    for values in (V, torch.zeros_like(V)):
        theta = THETA.clone().requires_grad_()
        _, (gradient,) = expectation(
            lambda y, theta=theta, values=values: over(y, theta, values, 1), ON, 1, parameters=[theta]
        )
        gradients.append(gradient)
    assert (gradients[0] - gradients[1]).abs().max() > 1e-2


@pytest.mark.parametrize("span", [None, 1, 2])
def test_no_variance_at_the_target_with_the_soft_values(span):
    table = table_of(LOG_P, SPACE).requires_grad_()

    def variance(values, law):
        return gradient_variance(lambda y: over(y, table, values, span), law, 1, parameter=table).item()

    for law in (LOG_P, OFF):
        assert variance(V, law) < 1e-20
    assert variance(torch.zeros_like(V), LOG_P) > 1e-3


def test_the_first_token_alone_is_trajectory_balance():
    """Strings of one token: V of the empty prefix is log_z. And a span beyond every string is no span."""
    space_one = torch.tensor([[0, 0, 0]])  # the string that ends at once
    numbers = pack(space_one, THETA, V)
    ours = path_consistency(**numbers)
    torch.testing.assert_close(ours, trajectory_balance(ON[space_one], LOG_TARGET[space_one], V[:1]))
    y = torch.arange(SPACE.size)[None]
    torch.testing.assert_close(over(y, THETA, V, 3), over(y, THETA, V))
    assert (over(y, THETA, V, 1) - over(y, THETA, V)).abs().item() > 1e-2


def test_a_constant_in_the_reward_is_a_constant_in_every_value():
    y = torch.arange(SPACE.size).reshape(3, 5)
    numbers = pack(y, THETA, V)
    shifted = numbers | {"log_target": numbers["log_target"] + 3.0, "values": numbers["values"] + 3.0}
    networks = ("token_log_pi", "values")
    before = coefficients(path_consistency, network=networks, **numbers)
    after = coefficients(path_consistency, network=networks, **shifted)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("span", [None, 1, 2])
def test_gradcheck_prompts_apart_and_float32(span):
    y = torch.tensor([[14, 0, 3], [7, 7, 2]])
    numbers = pack(y, THETA, V)
    pi, values = (numbers.pop(name).clone().requires_grad_() for name in ("token_log_pi", "values"))
    assert gradcheck(
        lambda a, b: path_consistency(token_log_pi=a, values=b, **numbers, span=span), (pi, values)
    )
    together = over(y, THETA, V, span)
    torch.testing.assert_close(
        torch.cat([over(y[:1], THETA, V, span), over(y[1:], THETA, V, span)]), together
    )
    narrow = {k: x.float() if x.is_floating_point() else x for k, x in pack(y, THETA, V).items()}
    single = path_consistency(**narrow, span=span)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), together, rtol=1e-4, atol=1e-4)


def test_nothing_flows_into_the_target_or_the_reference():
    numbers = pack(torch.tensor([[14, 3]]), THETA, V)
    for name in ("token_log_ref", "log_target", "token_log_pi"):
        numbers[name] = numbers[name].clone().requires_grad_()
    path_consistency(**numbers).sum().backward()
    assert numbers["token_log_pi"].grad is not None
    assert numbers["token_log_ref"].grad is numbers["log_target"].grad is None


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"log_target": torch.tensor([[0.0, -torch.inf]])}, "got log_target = -inf.*use forward_kl"),
        ({"values": torch.zeros(2)}, r"got values of shape \[2\], expected \[3\] like row"),
        ({"token_log_pi": torch.full((3,), torch.nan)}, "got token_log_pi with NaN or infinity"),
        ({"row": torch.tensor([0, 1, 0])}, "row that is not 0, ..., 1 in order"),
        ({"row": torch.tensor([0, 0, 0])}, "with a token for each"),
        ({"row": torch.tensor([0, 1, 2])}, "with a token for each"),
        ({"span": 0}, "got span = 0"),
    ],
)
def test_refused(change, complaint):
    three = torch.zeros(3)
    numbers = {
        "token_log_pi": three,
        "token_log_ref": three,
        "values": three,
        "log_target": torch.zeros(1, 2),
    }
    numbers["row"] = torch.tensor([0, 0, 1])
    assert path_consistency(**numbers).tolist() == [0.0]
    with pytest.raises(ValueError, match=f"path_consistency: .*{complaint}"):
        path_consistency(**numbers | change)
