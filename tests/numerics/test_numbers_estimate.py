"""Estimates as they are written, intervals that cover, and KL estimators against exact sums."""

import json
import math

import pytest
import torch

from klimb.numbers.estimate import (
    Estimate,
    bootstrap,
    interval,
    kl_k1,
    kl_k2,
    kl_k3,
    mean_estimate,
    rao_blackwell_kl,
    resampled_means,
)


def test_an_estimate_as_text_and_as_json():
    e = Estimate(0.631, 0.6, 0.664, 9)
    assert str(e) == "0.63 [0.60, 0.66]"
    assert e.as_dict() == {"value": 0.631, "low": 0.6, "high": 0.664, "n": 9, "warnings": []}
    doubtful = Estimate(math.nan, -math.inf, 1.0, 9, ("unreliable: needs 34",))
    assert str(doubtful) == "nan [-inf, 1.00] unreliable"
    assert not doubtful.reliable
    assert json.loads(json.dumps(doubtful.as_dict(), allow_nan=False))["value"] is None
    assert str(Estimate(0.00312, 0.0029, 0.0033, 9)) == "0.0031 [0.0029, 0.0033]"
    assert Estimate(1.0, 0.0, 2.0, 3, ("2 of 9 prompts are flat",)).reliable


def ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.mean(-1) / b.mean(-1)


def test_intervals_of_a_ratio_of_means_cover_and_wrong_ones_do_not():
    # 20 prompts of 10 draws whose prompts differ more than their draws; the ratio's truth is 1/2
    g = torch.Generator().manual_seed(0)
    repeats, covered, pseudo, scaled = 400, 0, 0, 0
    for _ in range(repeats):
        prompt = torch.empty(20, 1, dtype=torch.float64).exponential_(generator=g)
        a = prompt + 0.5 * torch.randn(20, 10, generator=g, dtype=torch.float64)
        b = 2 + 0.5 * torch.randn(20, 10, generator=g, dtype=torch.float64)
        low, high = bootstrap(ratio, a.mean(-1), b.mean(-1), generator=g, num_resamples=400)
        covered += int(low <= 0.5 <= high)
        value, half = ratio(a.mean(-1), b.mean(-1)), (high - low) / 2
        scaled += int(abs(value - 0.5) <= half / math.sqrt(20))  # mutant: an error divided by sqrt(P) twice
        low, high = bootstrap(ratio, a.flatten(), b.flatten(), generator=g, num_resamples=400)
        pseudo += int(low <= 0.5 <= high)  # mutant: draws of one prompt taken for independent prompts
    assert 0.90 <= covered / repeats <= 0.98
    assert pseudo / repeats < 0.75
    assert scaled / repeats < 0.5


def test_small_samples_widen_the_interval_to_a_t():
    g = torch.Generator().manual_seed(1)
    covered = narrow = 0
    for _ in range(600):
        x = torch.randn(8, generator=g, dtype=torch.float64)
        low, high = bootstrap(lambda x: x.mean(-1), x, generator=g, num_resamples=500)
        covered += int(low <= 0 <= high)
        low, high = interval(resampled_means(x[:, None], generator=g, num_resamples=500)[:, 0], 10**9)
        narrow += int(low <= 0 <= high)  # mutant: the plain percentile interval
    assert 0.925 <= covered / 600 <= 0.975
    assert narrow / 600 < 0.92


def test_few_prompts_resample_their_draws():
    g = torch.Generator().manual_seed(2)
    x = torch.randn(3, 400, generator=g, dtype=torch.float64) + torch.tensor([[0.0], [10.0], [20.0]])
    e = mean_estimate(x, generator=g)
    # of these prompts: 2 * 1.96 / sqrt(1200); prompts resampled would give a width of about 20
    assert e.high - e.low == pytest.approx(0.113, rel=0.15)
    assert e.low < 10 < e.high
    assert e.n == 1200
    with pytest.raises(ValueError, match="at least 2 prompts"):
        bootstrap(lambda x: x.mean(-1), torch.ones(1), generator=g)
    with pytest.raises(ValueError, match="same number"):
        bootstrap(ratio, torch.ones(9), torch.ones(8), generator=g)


def test_bootstrap_in_chunks_keeps_every_resample_and_its_pairing():
    g = torch.Generator().manual_seed(3)
    big = torch.rand(10, 100_000, generator=g)
    low, high = bootstrap(lambda a, b: (a - b).mean((-1, -2)), big, big, generator=g, num_resamples=40)
    assert low == high == 0
    means = resampled_means(torch.eye(12, dtype=torch.float64), generator=g, num_resamples=50)
    torch.testing.assert_close(means.sum(-1), torch.ones(50, dtype=torch.float64))
    assert ((means * 12).round() - means * 12).abs().max() < 1e-12


def laws(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    pair = 1.5 * torch.randn(2, 6, generator=g, dtype=torch.float64)
    return tuple(torch.log_softmax(pair, -1))


def test_k1_and_k3_are_unbiased_and_k2_is_not():
    log_pi, log_ref = laws(1)
    pi = log_pi.exp()
    truth = (pi * (log_pi - log_ref)).sum()
    one_draw = [f(log_pi[:, None], log_ref[:, None]) for f in (kl_k1, kl_k2, kl_k3)]
    k1, k2, k3 = ((pi * k).sum() for k in one_draw)
    assert abs(k1 - truth) < 1e-12
    assert abs(k3 - truth) < 1e-12
    assert abs(k2 - truth) > 0.05
    assert (one_draw[2] >= 0).all()
    reverse = (log_ref.exp() * (log_ref - log_pi)).sum()  # mutant: the other direction
    assert abs(reverse - truth) > 0.05


def test_rao_blackwell_is_unbiased_with_less_variance_on_two_tokens():
    g = torch.Generator().manual_seed(4)
    v = 3
    first = torch.randn(2, v, generator=g, dtype=torch.float64)
    second = torch.randn(2, v, v, generator=g, dtype=torch.float64)
    lp = [torch.log_softmax(first[i], -1) for i in (0, 1)]
    ls = [torch.log_softmax(second[i], -1) for i in (0, 1)]
    joint = [(lp[i][:, None] + ls[i]).flatten() for i in (0, 1)]
    pi = joint[0].exp()
    truth = (pi * (joint[0] - joint[1])).sum()
    # every string y = (s, t) visits the empty prefix and the prefix s
    prefix = [
        torch.stack([first[i].expand(v * v, v), second[i].repeat_interleave(v, 0)], 1).flatten(0, 1)
        for i in (0, 1)
    ]
    row = torch.arange(v * v).repeat_interleave(2)
    rb = rao_blackwell_kl(prefix[0], prefix[1], row, num_sequences=v * v)
    mc = joint[0] - joint[1]
    assert abs((pi * rb).sum() - truth) < 1e-12
    assert abs((pi * mc).sum() - truth) < 1e-12
    assert (pi * (rb - truth) ** 2).sum() < (pi * (mc - truth) ** 2).sum() / 2


def test_values_carry_no_gradient():
    x = torch.zeros(1, 2, requires_grad=True)
    assert not any(f(x, torch.ones(1, 2)).requires_grad for f in (kl_k1, kl_k2, kl_k3))
    masked = torch.tensor([[0.0, -math.inf, 0.0]])
    kl = rao_blackwell_kl(masked, torch.zeros(1, 3), torch.tensor([0]), num_sequences=2)
    assert kl.tolist() == pytest.approx([math.log(1.5), 0.0])
