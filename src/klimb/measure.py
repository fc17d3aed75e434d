"""Measure: how far a policy is from the best one, on prompts it has not seen, with an interval and a diagnosis.

The gap beta KL(pi||p) = beta log Z - (E_pi[r] - beta KL(pi||ref)) needs log Z, which policy draws alone cannot give:
they do not see what the policy has dropped. So it is taken from policy and reference draws together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from klimb.data import Example, Policy, Pool, Sampler, Target
from klimb.numbers.certificate import Certificate, certificate
from klimb.numbers.diagnose import Diagnosis, diagnose
from klimb.numbers.estimate import Estimate
from klimb.numbers.evidence import (
    Evidence,
    Side,
    as_written,
    evidence_of_draws,
    evidence_of_plan,
    joined,
)
from klimb.numbers.frontier import default_betas, frontier
from klimb.pool import Parts, Progress, draw_pool, scored_under, silent
from klimb.target import ChiSquaredTarget, StandardizedTarget, own_reward


@dataclass(frozen=True)
class Measurement:
    """The certificate of a policy, the draws it rests on, and what to do next.

    Attributes:
        certificate: rewards (the target's own: `klimb.target.own_reward`), KL, gap, share attained, with intervals.
        evidence: what the draws say besides, with resamples; what a diagnosis rests on.
        diagnosis: verdicts, because of what, and advice; without the plan and the steps of a run (`klimb.diagnosis`).
        policy_pool: draws of the policy, with their log-probability under both.
        reference_pool: draws of the reference, with their log-probability under both.
    """

    certificate: Certificate
    evidence: Evidence
    diagnosis: Diagnosis
    policy_pool: Pool
    reference_pool: Pool


def measure(
    examples: Sequence[Example],
    policy: Policy,
    target: Target,
    sampler: Sampler,
    *,
    num_draws: int,
    generator: torch.Generator,
    reference_pool: Pool | None = None,
    progress: Progress = silent,
    policy_parts: Parts | None = None,
    reference_parts: Parts | None = None,
) -> Measurement:
    """Draw from policy and reference, score each draw under both, certify the policy, and say what to do next.

    Args:
        examples: held-out prompts.
        policy: the policy to be measured.
        target: the best policy it is measured against; not `standardized` or `chi_squared`, whose law the draws at hand fix.
        sampler: must draw from a policy itself (temperature 1, no top-p).
        num_draws: from each of the two, a prompt.
        generator: of draws and of bootstrap resamples.
        reference_pool: reference draws of these prompts already made.
        progress: told how far it is.
        policy_parts: finished draws of the policy, which are not drawn again, and where further ones are put as they come.
        reference_parts: the same of the reference.
    """
    found, policy_pool, reference_pool = certify(
        examples,
        policy,
        target,
        sampler,
        num_draws=num_draws,
        generator=generator,
        reference_pool=reference_pool,
        progress=progress,
        policy_parts=policy_parts,
        reference_parts=reference_parts,
    )
    evidence = evidence_of_pools(target, policy_pool, reference_pool, generator=generator)
    evidence = as_written(evidence, published(found))
    rewards = own_reward(target, reference_pool)
    flat = bool((rewards == rewards[:, :1]).all())  # no curve, but still a certificate
    points = [] if flat else frontier(rewards, default_betas(rewards), generator=generator)
    predicted = evidence_of_plan(rewards, beta=target.beta, frontier=points, generator=generator)
    diagnosis = diagnose(joined(evidence, predicted))
    return Measurement(found, evidence, diagnosis, policy_pool, reference_pool)


def evidence_of_pools(
    target: Target,
    policy: Pool,
    reference: Pool,
    *,
    audit: tuple[torch.Tensor, torch.Tensor] | None = None,
    generator: torch.Generator,
) -> Evidence:
    """What draws of policy and reference, scored under both, say (`klimb.numbers.evidence.evidence_of_draws`).

    Args:
        target: the best policy.
        policy: draws of the policy.
        reference: draws of the reference, of the same prompts.
        audit: [P, G] each, of policy and reference: a reward that training did not see.
        generator: of bootstrap resamples.
    """
    sides = []
    for pool, seen in zip((policy, reference), audit or (None, None), strict=True):
        assert pool.log_pi is not None
        sides.append(
            Side(
                own_reward(target, pool),
                pool.log_pi,
                pool.log_ref,
                finished=pool.draws.finished,
                log_q=pool.draws.log_q,
                audit=seen,
            )
        )
    return evidence_of_draws(*sides, beta=target.beta, generator=generator)


def published(found: Certificate) -> dict[str, Estimate]:
    """The certificate's estimates under the names that evidence has for them."""
    renamed = {"frontier_efficiency": "efficiency"}
    return {renamed.get(n, n): x for n, x in vars(found).items() if isinstance(x, Estimate)}


def certify(
    examples: Sequence[Example],
    policy: Policy,
    target: Target,
    sampler: Sampler,
    *,
    num_draws: int,
    generator: torch.Generator,
    reference_pool: Pool | None = None,
    progress: Progress = silent,
    policy_parts: Parts | None = None,
    reference_parts: Parts | None = None,
) -> tuple[Certificate, Pool, Pool]:
    """The certificate alone, and the draws of policy and reference that it rests on. Arguments and errors as `measure`."""
    if isinstance(target, StandardizedTarget | ChiSquaredTarget):
        raise ValueError(
            f"measure: got a {type(target).__name__}, whose law is fixed by the draws at hand, and those of policy and reference "
            "differ; expected a target with one reward for all draws, such as a tilt (of r / sd, or at beta sd)"
        )
    both = (policy, target.reference)
    if reference_pool is None:
        reference_pool = draw_pool(
            examples,
            target.reference,
            target.reward,
            sampler,
            num_draws=num_draws,
            generator=generator,
            under=both,
            progress=progress,
            what="draw from the reference",
            parts=reference_parts,
        )
    else:
        reference_pool = scored_under(reference_pool, *both, progress=progress, what="score reference draws")
    policy_pool = away(
        examples,
        policy,
        target,
        sampler,
        num_draws=num_draws,
        generator=generator,
        progress=progress,
        parts=policy_parts,
    )
    assert policy_pool.log_pi is not None
    assert reference_pool.log_pi is not None
    found = certificate(
        beta=target.beta,
        reward_policy=own_reward(target, policy_pool),
        log_pi_policy=policy_pool.log_pi,
        log_ref_policy=policy_pool.log_ref,
        reward_reference=own_reward(target, reference_pool),
        log_pi_reference=reference_pool.log_pi,
        log_ref_reference=reference_pool.log_ref,
        generator=generator,
    )
    return found, policy_pool, reference_pool


def away(
    examples: Sequence[Example],
    policy: Policy,
    target: Target,
    sampler: Sampler,
    *,
    num_draws: int,
    generator: torch.Generator,
    progress: Progress = silent,
    parts: Parts | None = None,
) -> Pool:
    """Draws of the policy with their log-probabilities under both: what its distance from the reference is read from.

    Arguments as `measure`; `parts` are those of the policy.
    """
    return draw_pool(
        examples,
        policy,
        target.reward,
        sampler,
        num_draws=num_draws,
        generator=generator,
        under=(policy, target.reference),
        progress=progress,
        what="draw from the policy",
        parts=parts,
    )
