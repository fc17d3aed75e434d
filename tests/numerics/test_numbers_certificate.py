"""The certificate: exact on pools in exact proportion, noiseless at the optimum, not blind to dropped modes."""

import math

import pytest
import torch
from torch import Tensor

from klimb.numbers.bounds import reward_ceiling
from klimb.numbers.certificate import DROPPED, Certificate, certificate
from klimb.numbers.tilt import log_mean_exp


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return torch.where(log_a > -math.inf, log_a.exp() * (log_a - log_b), 0.0).sum(-1)


def from_atoms(
    r: Tensor, log_pi: Tensor, log_ref: Tensor, mine: Tensor, theirs: Tensor, **options
) -> Certificate:
    """Certificate of a policy on atoms [P, K], from the atoms that were drawn, [P, G1] and [P, G2]."""
    options.setdefault("generator", torch.Generator().manual_seed(0))
    return certificate(
        reward_policy=r.gather(1, mine),
        log_pi_policy=log_pi.gather(1, mine),
        log_ref_policy=log_ref.gather(1, mine),
        reward_reference=r.gather(1, theirs),
        log_pi_reference=log_pi.gather(1, theirs),
        log_ref_reference=log_ref.gather(1, theirs),
        **options,
    )


def space(
    num_prompts: int, atoms: int = 12, seed: int = 0, beta: float = 0.7
) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, log ref, log p."""
    g = torch.Generator().manual_seed(seed)
    r = torch.randn(num_prompts, atoms, generator=g, dtype=torch.float64)
    log_ref = torch.log_softmax(torch.randn(num_prompts, atoms, generator=g, dtype=torch.float64), -1)
    return r, log_ref, torch.log_softmax(log_ref + r / beta, -1)


def draw(log_p: Tensor, num_draws: int, seed: int) -> Tensor:
    return torch.multinomial(log_p.exp(), num_draws, True, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_prompts", [3, 10])
@pytest.mark.parametrize("beta", [0.3, 1.0, 5.0])
def test_pools_in_exact_proportion_give_the_truth(num_prompts, beta):
    g = torch.Generator().manual_seed(0)
    r = torch.randn(num_prompts, 4, generator=g, dtype=torch.float64)
    log_pi = torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64).div(8).log().expand(num_prompts, 4)
    log_ref = torch.tensor([1.0, 1.0, 4.0, 2.0], dtype=torch.float64).div(8).log().expand(num_prompts, 4)
    mine = torch.tensor([0, 0, 0, 0, 1, 1, 2, 3]).expand(num_prompts, 8)
    theirs = torch.tensor([0, 1, 2, 2, 2, 2, 3, 3]).repeat(3).expand(num_prompts, 24)
    c = from_atoms(r, log_pi, log_ref, mine, theirs, beta=beta, correct=False, num_resamples=50)

    log_z = torch.logsumexp(log_ref + r / beta, -1)
    log_p = log_ref + r / beta - log_z[:, None]
    reward, start = (log_pi.exp() * r).sum(-1).mean(), (log_ref.exp() * r).sum(-1).mean()
    objective = reward - beta * kl(log_pi, log_ref).mean()
    ceiling = reward_ceiling(r, kl(log_pi, log_ref).mean().item(), log_ref + math.log(4), correct=False)
    truth = {
        "reward": reward,
        "kl": kl(log_pi, log_ref).mean(),
        "objective": objective,
        "log_z": log_z.mean(),
        "gap": beta * kl(log_pi, log_p).mean(),
        "self_gap": beta * kl(log_pi, log_p).mean(),
        "reference_reward": start,
        "optimum_reward": (log_p.exp() * r).sum(-1).mean(),
        "optimum_kl": kl(log_p, log_ref).mean(),
        "attained": (objective - start) / (beta * log_z.mean() - start),
        "overlap": torch.tensor(1.0),
    }
    for name, value in truth.items():
        assert getattr(c, name).value == pytest.approx(value.item(), abs=1e-10), name
    assert c.attained.value == pytest.approx(
        1 - c.gap.value / (beta * kl(log_ref, log_p).mean().item()), abs=1e-9
    )
    assert c.frontier_efficiency.value == pytest.approx(
        ((reward - start) / (ceiling - start)).item(), rel=5e-3
    )
    assert (c.objective.n, c.log_z.n) == (8 * num_prompts, 32 * num_prompts)


def test_at_the_optimum_the_gap_is_zero_without_noise():
    r, log_ref, log_p = space(16)
    mine, theirs = draw(log_p, 16, 1), draw(log_ref, 24, 2)
    c = from_atoms(r, log_p, log_ref, mine, theirs, beta=0.7)
    for e in (c.gap, c.self_gap):
        assert max(abs(e.value), abs(e.low), abs(e.high)) < 1e-10
    assert c.attained.value == pytest.approx(1, abs=1e-10)
    assert DROPPED not in c.warnings
    # the estimator without the divisor mean pi/m is noisy on the same draws
    both = torch.cat([mine, theirs], 1)
    log_m = torch.logaddexp(math.log(0.4) + log_p, math.log(0.6) + log_ref)
    plain = log_mean_exp((log_ref + r / 0.7 - log_m).gather(1, both)) - torch.logsumexp(log_ref + r / 0.7, -1)
    assert plain.std().item() > 0.03


def test_a_dropped_mode_is_seen_by_the_mixture_and_not_by_the_policy():
    r, log_ref, log_p = space(48, seed=3)
    kept = log_p.clone()
    kept[:, :3] = -60.0
    log_pi = torch.log_softmax(kept, -1)
    truth = 0.7 * kl(log_pi, log_p).mean().item()
    assert truth > 0.1
    c = from_atoms(r, log_pi, log_ref, draw(log_pi, 32, 4), draw(log_ref, 64, 5), beta=0.7)
    assert abs(c.self_gap.value) < 1e-9
    assert c.gap.low <= truth <= c.gap.high
    assert c.gap.value == pytest.approx(truth, rel=0.25)
    assert DROPPED in c.warnings
    # a policy that is only part of the way has dropped nothing
    half = torch.log_softmax(log_ref + 0.5 * r / 0.7, -1)
    c = from_atoms(r, half, log_ref, draw(half, 32, 4), draw(log_ref, 64, 5), beta=0.7)
    assert DROPPED not in c.warnings
    assert c.gap.low <= 0.7 * kl(half, log_p).mean().item() <= c.gap.high


def test_intervals_cover_the_truth_of_these_prompts():
    # sixty measurements of four prompts: within the prompts, the truth is that of the four
    r, log_ref, log_p = space(4, seed=6)
    g = torch.Generator().manual_seed(7)
    log_pi = torch.log_softmax(log_p + 0.7 * torch.randn(log_p.shape, generator=g, dtype=torch.float64), -1)
    truth = {
        "gap": 0.7 * kl(log_pi, log_p).mean().item(),
        "log_z": torch.logsumexp(log_ref + r / 0.7, -1).mean().item(),
        "reward": (log_pi.exp() * r).sum(-1).mean().item(),
        "kl": kl(log_pi, log_ref).mean().item(),
    }
    covered, scaled = dict.fromkeys(truth, 0), 0
    for i in range(60):
        c = from_atoms(
            r,
            log_pi,
            log_ref,
            draw(log_pi, 48, 100 + i),
            draw(log_ref, 48, 200 + i),
            beta=0.7,
            num_resamples=60,
            generator=g,
        )
        for name, value in truth.items():
            e = getattr(c, name)
            covered[name] += e.low <= value <= e.high
        half = (c.reward.high - c.reward.low) / 2 / math.sqrt(4)  # mutant: divided by sqrt(P) once more
        scaled += abs(c.reward.value - truth["reward"]) <= half
    assert min(covered.values()) >= 50, covered
    assert scaled < 50


def test_attained_is_zero_at_the_reference_and_negative_behind_it():
    r, log_ref, log_p = space(32, seed=8)
    theirs = draw(log_ref, 64, 1)
    c = from_atoms(r, log_ref, log_ref, theirs, theirs, beta=0.7)
    assert c.attained.value == pytest.approx(0, abs=1e-9)
    assert c.kl.value == 0
    away = torch.log_softmax(log_ref - r, -1)
    c = from_atoms(r, away, log_ref, draw(away, 64, 2), theirs, beta=0.7)
    truth = 1 - (kl(away, log_p).mean() / kl(log_ref, log_p).mean()).item()
    assert truth < -1
    assert c.attained.low <= truth <= c.attained.high < 0


def test_forbidden_outcomes_flat_rewards_and_impossible_prompts_never_crash():
    r, log_ref, _ = space(12, seed=9)
    r[:, :4] = -math.inf
    r[0] = -math.inf
    log_p = torch.log_softmax(log_ref + r / 0.7, -1)
    log_p[0] = log_ref[0]
    mine, theirs = draw(log_p, 16, 1), draw(log_ref, 16, 2)
    c = from_atoms(r, log_p, log_ref, mine, theirs, beta=0.7)
    assert (c.reference_reward.value, c.attained.value) == (-math.inf, 1.0)
    assert c.gap.value == pytest.approx(0, abs=1e-10)
    assert any("1 of 12 prompts left out" in w for w in c.log_z.warnings)
    assert any("infinite" in w for w in c.attained.warnings)
    c = from_atoms(
        r, log_ref, log_ref, theirs, theirs, beta=0.7
    )  # a policy that still draws what is forbidden
    assert c.gap.value == c.self_gap.value == math.inf
    assert math.isnan(c.attained.value)
    assert not c.attained.reliable
    assert c.attained.as_dict()["value"] is None
    c = from_atoms(torch.zeros_like(r), log_ref, log_ref, theirs, theirs, beta=0.7)
    assert c.flat == 1.0
    assert not c.attained.reliable
    assert "not clearly above zero" in c.attained.warnings[0]
    for beta in (1e-4, 1e4):
        c = from_atoms(r[1:], log_p[1:], log_ref[1:], mine[1:], theirs[1:], beta=beta, num_resamples=50)
        assert all(math.isfinite(e.value) for e in (c.log_z, c.gap, c.optimum_reward, c.optimum_kl))
    assert not from_atoms(r[1:], log_p[1:], log_ref[1:], mine[1:], theirs[1:], beta=1e-4).log_z.reliable


def test_a_policy_out_of_reach_of_the_reference_is_called_out():
    r, log_ref, _ = space(16, seed=10)
    log_ref[:, 0] = -12.0
    log_ref = torch.log_softmax(log_ref, -1)
    log_pi = torch.full_like(log_ref, -5.0)
    log_pi[:, 0] = 0.0
    log_pi = torch.log_softmax(log_pi, -1)
    c = from_atoms(r, log_pi, log_ref, draw(log_pi, 32, 1), draw(log_ref, 32, 2), beta=0.7)
    assert c.overlap.value < 0.5
    assert any("mean of pi/ref" in w for w in c.warnings)
    fine = from_atoms(r, log_ref, log_ref, draw(log_ref, 32, 1), draw(log_ref, 32, 2), beta=0.7)
    assert not any("mean of pi/ref" in w for w in fine.warnings)


def test_a_faultless_policy_is_hardly_ever_called_out():
    """The weights pi/ref are skewed: an interval alone would call out a policy whose draws and scores are exact."""
    called, outside = 0, 0
    for seed in range(200):
        r, log_ref, _ = space(12, atoms=200, seed=seed)
        noise = torch.randn(
            log_ref.shape, generator=torch.Generator().manual_seed(seed + 3000), dtype=log_ref.dtype
        )
        log_pi = torch.log_softmax(log_ref + 1.7 * noise, -1)
        mine, theirs = draw(log_pi, 16, seed + 1000), draw(log_ref, 16, seed + 2000)
        c = from_atoms(r, log_pi, log_ref, mine, theirs, beta=0.7, num_resamples=200)
        called += any("mean of pi/ref" in w for w in c.warnings)
        outside += abs(c.overlap.value - 1) > 0.1 and not c.overlap.low <= 1 <= c.overlap.high
    assert called <= 4  # 1
    assert outside >= 10  # 16: what the interval alone says


def test_what_is_refused():
    r, log_ref, log_p = space(8)
    mine = draw(log_ref, 4, 0)
    with pytest.raises(ValueError, match="beta"):
        from_atoms(r, log_p, log_ref, mine, mine, beta=0.0)
    with pytest.raises(ValueError, match="gives no probability"):
        from_atoms(r, torch.full_like(r, -math.inf), log_ref, mine, mine, beta=1.0)
    with pytest.raises(ValueError, match="NaN"):
        from_atoms(torch.full_like(r, math.nan), log_p, log_ref, mine, mine, beta=1.0)
    with pytest.raises(ValueError, match="every draw of both pools"):
        from_atoms(torch.full_like(r, -math.inf), log_p, log_ref, mine, mine, beta=1.0)
    with pytest.raises(ValueError, match="the same prompts"):
        certificate(
            beta=1.0,
            reward_policy=r,
            log_pi_policy=r,
            log_ref_policy=r,
            reward_reference=r[:4],
            log_pi_reference=r[:4],
            log_ref_reference=r[:4],
            generator=torch.Generator(),
        )
