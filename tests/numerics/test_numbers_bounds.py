"""Binary rewards in closed form against the general sums, and ceilings that no policy passes."""

import math

import pytest
import torch

from klimb.numbers.bounds import (
    binary_log_partition,
    binary_tilted_kl,
    binary_tilted_rate,
    clopper_pearson,
    reward_ceiling,
)
from klimb.numbers.tilt import log_partition, tilted_kl, tilted_mean


@pytest.mark.parametrize("beta", [1e-2, 0.1, 0.35, 1.0, 30.0])
def test_a_binary_target_is_a_logit_shift(beta):
    c = torch.tensor([1e-6, 0.01, 0.3, 0.5, 0.999], dtype=torch.float64)
    r = torch.tensor([0.0, 1.0], dtype=torch.float64).expand(5, 2)
    log_w = torch.stack([(1 - c).log(), c.log()], -1) + math.log(2)
    general = [f(r, beta, log_w, correct=False) for f in (log_partition, tilted_mean, tilted_kl)]
    closed = [f(c, beta) for f in (binary_log_partition, binary_tilted_rate, binary_tilted_kl)]
    for a, b in zip(closed, general, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    z = (1 + c * math.expm1(1 / beta)).log()
    torch.testing.assert_close(closed[0], z, rtol=1e-12, atol=1e-12)
    shift = torch.logit(closed[1]) - torch.logit(c)
    usable = closed[1] < 1 - 1e-6
    torch.testing.assert_close(shift[usable], torch.full_like(shift, 1 / beta)[usable], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("beta", [1e-4, 1.0, 1e4])
def test_rates_of_zero_and_one(beta):
    c = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert binary_log_partition(c, beta).tolist() == pytest.approx([0.0, 1 / beta])
    assert binary_tilted_rate(c, beta).tolist() == [0.0, 1.0]
    assert binary_tilted_kl(c, beta).tolist() == [0.0, 0.0]
    near = torch.tensor([1e-300, 0.5, 1 - 1e-16], dtype=torch.float64)
    kl = binary_tilted_kl(near, beta)
    assert ((kl >= 0) & (kl <= -near.log() + 1e-9)).all()
    with pytest.raises(ValueError, match="outside"):
        binary_tilted_kl(torch.tensor([1.1]), beta)


def test_clopper_pearson_covers_by_exact_summation():
    trials = 20
    k = torch.arange(trials + 1)
    low, high = clopper_pearson(k, trials)
    binomial = (
        torch.lgamma(torch.tensor(trials + 1.0)) - torch.lgamma(k + 1.0) - torch.lgamma(trials - k + 1.0)
    )
    worst, naive = 1.0, 1.0
    for c in (0.01, 0.05, 0.1, 0.3, 0.5, 0.77, 0.95):
        prob = (binomial + k * math.log(c) + (trials - k) * math.log1p(-c)).exp()
        worst = min(worst, prob[(low <= c) & (c <= high)].sum().item())
        rate = k / trials
        wald = 1.96 * (rate * (1 - rate) / trials).sqrt()
        naive = min(naive, prob[(rate - wald <= c) & (c <= rate + wald)].sum().item())
    assert worst >= 0.95
    assert naive < 0.5  # mutant: the normal interval
    assert high[0].item() == pytest.approx(1 - 0.025 ** (1 / trials), abs=1e-12)
    assert (low[0].item(), high[-1].item()) == (0.0, 1.0)
    # all failed: log Z may be as large as this, although every estimate reads 0
    top = binary_log_partition(clopper_pearson(torch.tensor([0]), 16)[1], 0.1).item()
    assert top == pytest.approx(8.42, abs=0.01)
    with pytest.raises(ValueError, match="0 <= successes"):
        clopper_pearson(torch.tensor([5]), 4)


@pytest.mark.parametrize("seed", range(3))
def test_no_policy_passes_the_ceiling_and_the_target_touches_it(seed):
    g = torch.Generator().manual_seed(seed)
    r = torch.randn(3, 8, generator=g, dtype=torch.float64)
    log_ref = torch.log_softmax(torch.randn(3, 8, generator=g, dtype=torch.float64), -1)
    log_w = log_ref + math.log(8)
    for _ in range(6):
        log_pi = torch.log_softmax(log_ref + 2 * torch.randn(3, 8, generator=g, dtype=torch.float64), -1)
        kl = (log_pi.exp() * (log_pi - log_ref)).sum(-1).mean().item()
        reward = (log_pi.exp() * r).sum(-1).mean().item()
        assert reward <= reward_ceiling(r, kl, log_w, correct=False) + 1e-12
    for beta in (0.2, 1.0, 5.0):
        kl = tilted_kl(r, beta, log_w, correct=False).mean().item()
        best = tilted_mean(r, beta, log_w, correct=False).mean().item()
        ceiling = reward_ceiling(r, kl, log_w, correct=False)
        assert best - 1e-12 <= ceiling <= best + 2e-4
    assert reward_ceiling(r, 100.0, log_w) == pytest.approx(r.amax(-1).mean().item(), abs=1e-9)
    assert reward_ceiling(r, 0.0, log_w) == pytest.approx((log_ref.exp() * r).sum(-1).mean().item(), abs=1e-3)
    assert reward_ceiling(torch.ones(2, 4), 1.0) == 1.0
