"""log softmax(head(hidden))[token] without all logits at once: value, gradient and memory.

The measure of it is the one expression it stands for, with autograd: log_softmax of all logits, then gather.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from klimb.models import logprob
from klimb.models.logprob import Head, token_log_prob

N, D, V = 300, 16, 77

HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 3.0},
    "all": {"bias": True, "scale": 1.7, "softcap": 5.0},
}


@pytest.fixture(autouse=True, params=[1024, 32], ids=["one block", "three blocks"])
def block(request, monkeypatch):
    """Tokens of the vocabulary that are taken together."""
    monkeypatch.setattr(logprob, "CPU_VOCABULARY", request.param)
    return request.param


def make(kind="plain", *, dtype=torch.float64, trained=False, shape=(N, D, V), spread=1.0):
    generator = torch.Generator().manual_seed(1)
    n, d, v = shape
    options = dict(HEADS[kind])
    weight = (torch.randn(v, d, generator=generator, dtype=torch.float64) * spread).to(dtype)
    bias = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype)
    head = Head(
        weight.requires_grad_(trained),
        bias.requires_grad_(trained) if options.pop("bias", False) else None,
        **options,
    )
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return hidden, head, torch.randint(0, v, (n,), generator=generator)


def expression(hidden, head, tokens):
    logits = hidden @ head.weight.T
    logits = logits if head.bias is None else logits + head.bias
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]


def leaves(hidden, head):
    return [x for x in (hidden, head.weight, head.bias) if x is not None and x.requires_grad]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("kind", HEADS)
def test_value_and_gradient_are_those_of_the_expression(kind, trained):
    hidden, head, tokens = make(kind, trained=trained)
    upstream = torch.randn(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = expression(hidden, head, tokens)
    found = token_log_prob(hidden, head, tokens)
    assert (found - expected).abs().max() < 1e-12
    wanted = torch.autograd.grad(expected, leaves(hidden, head), upstream)
    got = torch.autograd.grad(found, leaves(hidden, head), upstream)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() < 1e-10
    # the mutant: the sign of a gradient that leaves out the chosen token
    assert (got[0] + wanted[0]).abs().max() > 0.1


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("kind", HEADS)
def test_gradcheck(kind, trained):
    hidden, head, tokens = make(kind, trained=trained, shape=(5, 3, 4))

    def function(hidden, *rest):
        weight, bias = (*rest, head.bias)[:2] if trained else (head.weight, head.bias)
        return token_log_prob(hidden, Head(weight, bias, head.scale, head.softcap), tokens, rows=2)

    assert torch.autograd.gradcheck(function, tuple(leaves(hidden, head)))


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_narrow_states_give_wide_numbers(kind, dtype):
    hidden, head, tokens = make(kind, dtype=dtype)
    found = token_log_prob(hidden, head, tokens)
    assert found.dtype == torch.float32
    exact = Head(
        head.weight.double(), None if head.bias is None else head.bias.double(), head.scale, head.softcap
    )
    wanted = expression(hidden.detach().double().requires_grad_(), exact, tokens)
    # a bfloat16 logit of about 10 is rounded by up to 0.03
    assert (found - wanted).abs().max() < (2e-5 if dtype == torch.float32 else 0.2)
    (got,) = torch.autograd.grad(found.sum(), hidden)
    (same,) = torch.autograd.grad(expression(hidden, head, tokens).sum(), hidden)
    assert got.dtype == dtype
    error = (got - same).float().norm() / same.float().norm()
    assert error < (1e-6 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("kind", HEADS)
def test_roads_with_and_without_gradient_give_the_same_bits(kind):
    hidden, head, tokens = make(kind, dtype=torch.float32)
    with torch.no_grad():
        quiet = token_log_prob(hidden, head, tokens)
    assert torch.equal(token_log_prob(hidden, head, tokens).detach(), quiet)
    assert torch.equal(token_log_prob(hidden.detach(), head, tokens), quiet)
    trained = Head(head.weight.clone().requires_grad_(), head.bias, head.scale, head.softcap)
    assert torch.equal(token_log_prob(hidden, trained, tokens).detach(), quiet)


@given(rows=st.integers(1, 400), kind=st.sampled_from(sorted(HEADS)), trained=st.booleans())
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_rows_held_at_a_time_change_nothing(rows, kind, trained):
    hidden, head, tokens = make(kind, trained=trained)
    usual = token_log_prob(hidden, head, tokens)
    other = token_log_prob(hidden, head, tokens, rows=rows)
    assert (usual - other).abs().max() < 1e-13
    for a, b in zip(
        torch.autograd.grad(usual.sum(), leaves(hidden, head)),
        torch.autograd.grad(other.sum(), leaves(hidden, head)),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-11


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
def test_tokens_that_the_head_rules_out_have_no_mass(trained):
    hidden, head, tokens = make("bias", trained=trained)
    with torch.no_grad():
        head.bias[:40] = -torch.inf  # a padded vocabulary; the whole first block of three
    tokens = tokens.clamp(min=40)
    found, expected = token_log_prob(hidden, head, tokens), expression(hidden, head, tokens)
    assert (found - expected).abs().max() < 1e-12
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    (same,) = torch.autograd.grad(expected.sum(), hidden)
    assert (gradient - same).abs().max() < 1e-11


def test_extreme_logits_stay_finite():
    hidden, head, _ = make(dtype=torch.float32, spread=200.0)
    logits = head.logits(hidden.detach())
    likely, unlikely = logits.argmax(1), logits.argmin(1)
    assert (token_log_prob(hidden, head, likely) <= 0).all()
    found = token_log_prob(hidden, head, unlikely)
    assert found.isfinite().all()
    assert found.min() < -1000  # far below log of the smallest float32
    (gradient,) = torch.autograd.grad(found.sum(), hidden)
    assert gradient.isfinite().all()


def test_no_tokens():
    hidden, head, tokens = make()
    assert token_log_prob(hidden[:0], head, tokens[:0]).shape == (0,)
    with torch.no_grad():
        assert token_log_prob(hidden[:0], head, tokens[:0]).shape == (0,)


def test_a_second_derivative_is_refused_rather_than_wrong():
    hidden, head, tokens = make()
    square = token_log_prob(hidden, head, tokens).square().sum()
    (gradient,) = torch.autograd.grad(square, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gave."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("trained", [False, True], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_no_tensor_is_as_large_as_all_logits(kind, trained, block):
    n, d, v, rows = 1024, 8, 500, 128
    hidden, head, tokens = make(kind, trained=trained, shape=(n, d, v))

    def largest(function):
        with Largest() as seen:
            function().sum().backward()
        return seen.numel

    assert largest(lambda: token_log_prob(hidden, head, tokens, rows=rows)) == max(
        rows * min(v, block), n * d
    )
    assert (
        largest(lambda: expression(hidden, head, tokens)) == n * v
    )  # the mutant, and the proof of the meter
