"""Every objective's derivative, against differences and against its formula, in float64."""

import pytest
import torch
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck

from klimb.exact import categorical, random_logits
from klimb.numbers.baselines import leave_one_out
from klimb.objectives import coefficients, forward_kl, log_variance, reverse_kl

P, G = 3, 5


def numbers(seed, *, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (random_logits(P, G, generator=generator, scale=scale) for _ in range(3))


@pytest.mark.parametrize("clip", [None, 0.7, 100.0])
def test_log_variance(clip):
    log_pi, log_target, _ = numbers(0)
    log_pi.requires_grad_()
    assert gradcheck(lambda x: log_variance(x, log_target, clip=clip), log_pi)
    assert gradgradcheck(lambda x: log_variance(x, log_target), log_pi)


def test_forward_kl():
    log_pi, log_w, _ = numbers(1)
    log_w[0, 2] = log_w[1] = -torch.inf
    log_pi.requires_grad_()
    assert gradcheck(lambda x: forward_kl(x, log_w), log_pi)


def test_reverse_kl_enumerated():
    """Over all outcomes the score function is the derivative; over draws it is so only on average."""
    theta, log_target, _ = numbers(2)
    theta.requires_grad_()
    uniform = torch.full((P, G), 1 / G, dtype=torch.float64).log()
    assert gradcheck(lambda x: reverse_kl(categorical(x), log_target, uniform, baseline=None), theta)
    with pytest.raises(GradcheckError):
        gradcheck(lambda x: reverse_kl(x, log_target), theta)


@pytest.mark.parametrize("clip", [None, 0.7])
def test_reverse_kl_table(clip):
    log_pi, log_target, log_q = numbers(3, scale=1.0)
    value, table = coefficients(reverse_kl, log_pi=log_pi, log_target=log_target, log_q=log_q, clip=clip)
    f = log_pi - log_target
    advantage = f - leave_one_out(f)
    advantage = advantage if clip is None else advantage.clamp(-clip, clip)
    expected = (log_pi - log_q).exp() * advantage / G
    torch.testing.assert_close(table["log_pi"], expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(value, expected.sum(1) + f.mean(1), rtol=1e-13, atol=1e-13)


def test_fresh_draws_weigh_exactly_one():
    log_pi, log_target, _ = numbers(4, scale=50.0)
    for log_q in (None, log_pi.clone()):
        value, table = coefficients(
            reverse_kl, log_pi=log_pi, log_target=log_target, log_q=log_q, baseline=None
        )
        torch.testing.assert_close(table["log_pi"], (log_pi - log_target) / G, rtol=1e-15, atol=0)
        assert torch.equal(value, (log_pi - log_target).mean(1))


def test_log_variance_table_and_its_clip():
    log_pi, log_target, _ = numbers(5, scale=10.0)
    d = log_target - log_pi
    centred = d - d.mean(1, keepdim=True)
    _, table = coefficients(log_variance, log_pi=log_pi, log_target=log_target)
    torch.testing.assert_close(table["log_pi"], -centred / (G - 1))
    _, table = coefficients(log_variance, log_pi=log_pi, log_target=log_target, clip=3.0)
    clipped = centred.clamp(-3, 3)
    torch.testing.assert_close(table["log_pi"], -(clipped - clipped.mean(1, keepdim=True)) / (G - 1))
    assert table["log_pi"].abs().max() <= 2 * 3.0 / (G - 1)
    assert not torch.equal(clipped, centred)


@pytest.mark.parametrize(
    ("objective", "fixed"),
    [(reverse_kl, ("log_target", "log_q")), (log_variance, ("log_target",)), (forward_kl, ("log_w",))],
)
def test_nothing_flows_into_the_target_or_the_law(objective, fixed):
    log_pi, *others = numbers(6)
    given = {name: x.requires_grad_() for name, x in zip(fixed, others, strict=False)}
    objective(log_pi.requires_grad_(), **given).sum().backward()
    assert log_pi.grad is not None
    assert all(x.grad is None for x in given.values())
