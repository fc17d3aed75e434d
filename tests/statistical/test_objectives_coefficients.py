"""Training is signed maximum likelihood: a table of coefficients and the network's numbers, chunk by chunk."""

from functools import partial

import pytest
import torch

from klimb.exact import all_strings, draw, random_logits
from klimb.objectives import bind, coefficients, forward_kl, log_variance, reverse_kl

SPACE = all_strings(4, 4)
P, G, WIDTH = 5, 6, 8


class Network(torch.nn.Module):
    """Small, but with everything shared between strings: embeddings, a tanh, a running sum over the prefix."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(60)
        self.embed = torch.nn.Parameter(random_logits(4, WIDTH, generator=generator))
        self.head = torch.nn.Parameter(random_logits(WIDTH, 4, generator=generator))

    def forward(self, index):
        """Log-probability of strings, [...] -> [...]."""
        ids = SPACE.strings[index]
        before = torch.nn.functional.pad(self.embed[ids].cumsum(-2), (0, 0, 1, 0))[..., :-1, :]
        tokens = torch.log_softmax(torch.tanh(before) @ self.head, -1).gather(-1, ids[..., None])[..., 0]
        return (tokens * SPACE.mask[index]).sum(-1)


NETWORK = Network()
GENERATOR = torch.Generator().manual_seed(61)
LOG_TARGET = random_logits(SPACE.size, generator=GENERATOR, scale=3.0)
UNIFORM = torch.full((SPACE.size,), 1 / SPACE.size, dtype=torch.float64).log()
DRAWS = draw(UNIFORM, G, num_prompts=P, generator=GENERATOR)
CASES = {
    "reverse_kl": (reverse_kl, {"log_target": LOG_TARGET[DRAWS], "log_q": UNIFORM[DRAWS]}),
    "forward_kl": (forward_kl, {"log_w": (LOG_TARGET - UNIFORM)[DRAWS]}),
    "log_variance": (log_variance, {"log_target": LOG_TARGET[DRAWS]}),
    "clipped": (partial(log_variance, clip=1.0), {"log_target": LOG_TARGET[DRAWS]}),
}


def whole(objective, numbers):
    value = objective(NETWORK(DRAWS), **numbers)
    return value, torch.autograd.grad(value.sum(), list(NETWORK.parameters()))


def in_chunks(table, size):
    NETWORK.zero_grad()
    for index, coefficient in zip(DRAWS.flatten().split(size), table.flatten().split(size), strict=True):
        (coefficient * NETWORK(index)).sum().backward()
    return [p.grad for p in NETWORK.parameters()]


def apart(left, right):
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("size", [1, 4, 7, P * G])
@pytest.mark.parametrize("case", CASES)
def test_chunks_add_up_to_the_whole(case, size):
    """Also for chunks that cut through groups (G = 6), although the objective ties a group together."""
    objective, numbers = CASES[case]
    value, gradient = whole(objective, numbers)
    with torch.no_grad():
        log_pi = NETWORK(DRAWS)
    again, table = coefficients(objective, log_pi=log_pi, **numbers)
    assert not again.requires_grad
    torch.testing.assert_close(again, value.detach(), rtol=1e-13, atol=1e-13)
    assert table["log_pi"].shape == (P, G)
    assert apart(in_chunks(table["log_pi"], size), gradient) < 1e-12


def test_mutant_objective_of_each_chunk_is_another_objective():
    _, gradient = whole(log_variance, {"log_target": LOG_TARGET[DRAWS]})
    halves = [log_variance(NETWORK(d), LOG_TARGET[d]).sum() for d in DRAWS.split(G // 2, dim=1)]
    assert apart(torch.autograd.grad(sum(halves), list(NETWORK.parameters())), gradient) > 1e-2


def test_coefficients_work_without_gradients_and_leave_the_inputs_alone():
    log_pi = torch.zeros(1, 2, requires_grad=True)
    with torch.no_grad():
        _, table = coefficients(log_variance, log_pi=log_pi, log_target=torch.tensor([[1.0, 0.0]]))
    assert table["log_pi"].tolist() == [[-0.5, 0.5]]
    assert log_pi.grad is None


def test_several_numbers_of_the_network():
    def balance(log_pi, log_target, log_z):
        return (log_pi - log_target + log_z[:, None]).square().mean(1) / 2

    log_pi, log_target = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.0]])
    _, table = coefficients(
        balance, network=("log_pi", "log_z"), log_pi=log_pi, log_target=log_target, log_z=torch.tensor([1.0])
    )
    assert table["log_pi"].tolist() == [[0.5, 1.0]]
    assert table["log_z"].tolist() == [1.5]


def test_coefficients_refuse():
    with pytest.raises(ValueError, match="got no tensor log_pi, values"):
        coefficients(log_variance, network=("log_pi", "values"), log_target=torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"value of shape \[\], expected \[P\]"):
        coefficients(lambda log_pi: log_pi.sum(), log_pi=torch.zeros(1, 2))


X = torch.zeros(1, 2)


def test_bind_takes_what_is_known():
    available = {"log_pi": X, "log_target": X + 1, "log_q": X + 2, "reward": X, "log_w": None}
    assert set(bind(reverse_kl, available)) == {"log_pi", "log_target", "log_q"}
    assert set(bind(reverse_kl, available | {"log_q": None})) == {"log_pi", "log_target"}
    assert bind(reverse_kl, available)["log_q"] is available["log_q"]


def test_what_a_partial_has_fixed_stays_fixed():
    assert set(
        bind(partial(reverse_kl, log_q=None, clip=5.0), {"log_pi": X, "log_target": X, "log_q": X})
    ) == {
        "log_pi",
        "log_target",
    }


def test_bind_names_all_that_is_missing():
    with pytest.raises(ValueError, match=r"reverse_kl: got no log_pi, log_target, .* known are log_q"):
        bind(partial(reverse_kl, clip=5.0), {"log_target": None, "log_q": X})
    with pytest.raises(ValueError, match=r"forward_kl: got no log_w, .* known are log_pi"):
        bind(forward_kl, {"log_pi": X})


def test_bind_and_coefficients_together():
    numbers = bind(forward_kl, {"log_pi": X, "log_w": X, "log_target": None})
    value, table = coefficients(forward_kl, **numbers)
    assert value.tolist() == [0.0]
    assert table["log_pi"].tolist() == [[-0.5, -0.5]]
