"""Each verdict on a Gaussian world where the truth is known: ref is N(0, I) in two dimensions, the reward is the first.

The target is a shift of the first coordinate by 1 / beta; a policy is a shift (m, s), its KL (m^2 + s^2) / 2.
"""

import math

import pytest
import torch

from klimb.numbers.certificate import DROPPED, Certificate, certificate
from klimb.numbers.diagnose import diagnose
from klimb.numbers.frontier import frontier


def measure(
    m: float, s: float = 0.0, *, beta: float = 1.0, size: tuple[int, int] = (64, 64), counted: float = 1.0
) -> Certificate:
    """Certificate of the policy shifted by (m, s); `counted` is the share of its log-ratio that the scorer reports."""
    g = torch.Generator().manual_seed(1)
    shift = torch.tensor([m, s], dtype=torch.float64)
    mine = torch.randn(*size, 2, generator=g, dtype=torch.float64) + shift
    theirs = torch.randn(*size, 2, generator=g, dtype=torch.float64)
    log_ref = [-(y**2).sum(-1) / 2 - 20 for y in (mine, theirs)]
    log_pi = [
        a + counted * (y @ shift - shift @ shift / 2) for a, y in zip(log_ref, (mine, theirs), strict=True)
    ]
    return certificate(
        beta=beta,
        reward_policy=mine[..., 0],
        log_pi_policy=log_pi[0],
        log_ref_policy=log_ref[0],
        reward_reference=theirs[..., 0],
        log_pi_reference=log_pi[1],
        log_ref_reference=log_ref[1],
        generator=g,
    )


def plan(*betas: float):
    g = torch.Generator().manual_seed(5)
    return frontier(torch.randn(64, 128, generator=g, dtype=torch.float64), betas, generator=g)


def test_the_numbers_of_this_world():
    c = measure(0.5, 1.0)
    for e, truth in (
        (c.reward, 0.5),
        (c.kl, 0.625),
        (c.log_z, 0.5),
        (c.gap, 0.625),
        (c.attained, -0.25),
        (c.frontier_efficiency, 0.5 / 1.25**0.5),
        (c.optimum_kl, 0.5),
    ):
        assert e.low <= truth <= e.high
        assert e.reliable


@pytest.mark.parametrize(
    ("verdict", "policy", "says"),
    [
        ("close to the best", {"m": 1.0}, "attained 1.00 [1.00, 1.00], gap 0.00 [0.00, 0.00]"),
        ("undertrained", {"m": 0.3}, "both below"),
        ("KL wasted", {"m": 0.5, "s": 1.0}, "buys 0.4"),
        ("overshoot: impossible", {"m": 2.0, "counted": 0.5}, "no policy earns more than 1.5"),
        ("cannot tell", {"m": 0.8, "s": 0.6, "size": (10, 16)}, "no reason separates"),
        ("cannot tell", {"m": 0.2, "beta": 0.4, "size": (10, 8)}, "log(draws) - KL"),
    ],
)
def test_verdicts(verdict, policy, says):
    d = diagnose(measure(**policy), plan(2.0, 1.0))
    assert d.verdict == verdict
    assert says in d.because
    if verdict == "cannot tell":
        assert any(character.isdigit() for character in d.advice)


def test_beta_too_high_needs_a_frontier_that_earns_more():
    c = measure(0.25, beta=4.0)
    d = diagnose(c, plan(4.0, 2.0, 1.0))
    assert d.verdict == "beta too high"
    assert "Lower beta to 2" in d.advice
    assert diagnose(c).verdict == "close to the best"
    assert diagnose(c, plan(4.0, 3.0)).verdict == "close to the best"


def test_reward_flat():
    g = torch.Generator().manual_seed(0)
    passed = torch.zeros(32, 32, dtype=torch.float64)
    passed[:6, ::2] = 1.0
    zero = torch.zeros_like(passed)
    c = certificate(
        beta=1.0,
        reward_policy=passed,
        log_pi_policy=zero,
        log_ref_policy=zero,
        reward_reference=passed,
        log_pi_reference=zero,
        log_ref_reference=zero,
        generator=g,
    )
    d = diagnose(c)
    assert (d.verdict, d.because) == ("reward flat", "81% of the prompts give every draw the same reward")
    assert DROPPED not in c.warnings


def test_spread_between_prompts_does_not_make_an_optimal_policy_look_useless():
    """Hard and easy prompts side by side: ten never succeed, fourteen do at 0.6; the policy is exactly the best one."""
    beta, ref = 0.5, torch.tensor([0.0] * 10 + [0.6] * 14, dtype=torch.float64)
    best = ref * math.exp(1 / beta) / (1 + ref * (math.exp(1 / beta) - 1))
    generator = torch.Generator().manual_seed(0)

    def pool(rate):
        reward = (torch.rand(24, 32, generator=generator, dtype=torch.float64) < rate[:, None]).double()
        shift = torch.where(reward > 0, (best / ref)[:, None], ((1 - best) / (1 - ref))[:, None]).log()
        return reward, shift.nan_to_num(0.0), torch.zeros_like(shift)

    (r1, pi1, ref1), (r2, pi2, ref2) = pool(best), pool(ref)
    found = certificate(
        beta=beta,
        reward_policy=r1,
        log_pi_policy=pi1,
        log_ref_policy=ref1,
        reward_reference=r2,
        log_pi_reference=pi2,
        log_ref_reference=ref2,
        generator=generator,
    )
    points = frontier(r2, [beta], generator=generator)
    assert diagnose(found, points).verdict != "reward flat"


def test_an_infinite_gap_is_not_close_to_the_best():
    """Both draw a forbidden outcome: the gap is infinite, and no share of it can be told."""
    generator = torch.Generator().manual_seed(0)
    reward, zero = (
        torch.randn(16, 32, generator=generator, dtype=torch.float64),
        torch.zeros(16, 32, dtype=torch.float64),
    )
    reward[0, 0] = -math.inf
    found = certificate(
        beta=1.0,
        reward_policy=reward,
        log_pi_policy=zero,
        log_ref_policy=zero,
        reward_reference=reward,
        log_pi_reference=zero,
        log_ref_reference=zero,
        generator=generator,
    )
    assert not found.attained.reliable
    assert diagnose(found).verdict == "cannot tell"
