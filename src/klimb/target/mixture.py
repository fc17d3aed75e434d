"""Part reference, part another policy. What another policy says of a completion is a reward, so its target is a tilt.

The reward is d = log other - log ref, in nats:

    ref^(1 - a) other^a          = ref exp(a d)                   the geometric mixture: the tilt of d at beta 1 / a
    (1 - a) ref + a other        = ref ((1 - a) + a exp(d))       the arithmetic one, whose log Z is exactly 0

The KL that is reported stays the one to the reference, and plan, measure and the samplers need nothing new.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from klimb.data import Draws, Example, Policy, Prompt, Reward
from klimb.models.policy import CausalPolicy
from klimb.rewards.weighted_sum import weighted_sum
from klimb.target.tilt import Tilt, require_beta, tilt


@dataclass(frozen=True)
class LogRatio:
    """The reward log other(y|x) - log ref(y|x) of a completion, nats.

    Both policies score the very tokens that were drawn, a row at a time: each prompt is read once a completion, twice.

    Attributes:
        other: the policy to go towards; of the same tokenizer.
        reference: the policy to start from.

    Source: Rafailov et al., "Direct preference optimization", 2023 (the implicit reward, which is beta times this).
    """

    other: Policy
    reference: Policy

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[object],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[object],
    ) -> list[float]:
        """One number a completion, nats; -inf where `other` cannot make it.

        Raises:
            ValueError: the reference cannot make a completion.
        """
        draws = Draws(
            [
                Example(p, {name: column[i] for name, column in columns.items()})
                for i, p in enumerate(prompts)
            ],
            [[torch.as_tensor(ids)] for ids in completion_ids],
            finished=torch.ones(len(prompts), 1, dtype=torch.bool),
        )
        log_ref = draws.sequence_sums(self.reference.log_prob(draws))
        if not log_ref.isfinite().all():
            raise ValueError(
                "LogRatio: got a completion that the reference cannot make: the ratio is infinite"
            )
        return (draws.sequence_sums(self.other.log_prob(draws)) - log_ref)[:, 0].tolist()


@dataclass(frozen=True)
class MixtureRatio:
    """The reward log((1 - share) + share exp(d)) of a completion, nats: its log-ratio under the arithmetic mixture.

    Attributes:
        ratio: gives d.
        share: of the other policy.
    """

    ratio: LogRatio
    share: float

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[object],
        completion_ids: Sequence[Sequence[int]],
        **columns: Sequence[object],
    ) -> list[float]:
        """One number a completion, nats; never below log(1 - share)."""
        d = torch.tensor(self.ratio(prompts, completions, completion_ids, **columns), dtype=torch.float64)
        return torch.logaddexp(torch.full_like(d, math.log1p(-self.share)), math.log(self.share) + d).tolist()


def geometric_mixture(
    reference: CausalPolicy,
    other: Policy,
    share: float,
    *,
    reward: Reward | None = None,
    beta: float | None = None,
) -> Tilt:
    r"""The target between two policies on the log scale, or beyond the second one.

    $$ p \propto ref^{1-a}\, other^{a}\; [\exp(r/\beta)] $$

    Where `other` is itself the tilt of `reference` at some beta_0, this is the plain tilt of the same reward at
    beta_0 / share: every beta from one trained policy. A share above 1 goes beyond it.

    Args:
        reference: share 0.
        other: share 1; of the same tokenizer.
        share: a > 0.
        reward: what is wanted besides, with its `beta`.
        beta: units of `reward` per nat; given if and only if `reward` is.

    Returns:
        A `Tilt`: of d = log other - log ref at beta 1 / share, or of r + share beta d at `beta`.

    Raises:
        ValueError: share is not positive; one of reward and beta without the other.

    Example:
        >>> target = geometric_mixture(None, None, 0.5)
        >>> target.beta, type(target.reward).__name__
        (2.0, 'LogRatio')

    Source: Liu et al., "Decoding-time realignment of language models", 2024 (DeRa).

    Not the same as mixing the logits of each token (what DeRa does while decoding): that normalises at every token and
    is another law over completions.
    """
    if not (math.isfinite(share) and share > 0):
        raise ValueError(f"geometric_mixture: got share {share}, expected a positive number (1 is `other`)")
    return _tilted(reference, LogRatio(other, reference), share, reward, beta)


def mixture(
    reference: CausalPolicy,
    other: Policy,
    share: float,
    *,
    reward: Reward | None = None,
    beta: float | None = None,
) -> Tilt:
    r"""The target that is the other policy in a share of all cases and the reference in the rest.

    $$ p = (1-a)\, ref + a\, other \qquad [\;p \propto ((1-a)\, ref + a\, other)\exp(r/\beta)\;] $$

    With a `reward` it is the tilt of the mixture in the place of the reference: the maximiser of
    E[r] - beta KL(pi||mixture). Without one it is normalised: log Z = 0, and whatever a plan says of log Z is its error.

    Args:
        reference: share 0.
        other: share 1; of the same tokenizer.
        share: 0 < a < 1. At 1 it would be `other`.
        reward: what is wanted besides, with its `beta`.
        beta: units of `reward` per nat; given if and only if `reward` is.

    Returns:
        A `Tilt` of `reference`, so its KL is to `reference`, not to the mixture.

    Raises:
        ValueError: share is not inside (0, 1); one of reward and beta without the other.

    Example:
        >>> mixture(None, None, 0.25).beta
        1.0

    Source: finite mixtures are Pearson, 1894.

    Not the same as `geometric_mixture`, which wants both policies to agree; nor as mixing next-token probabilities,
    where the share of each policy would not follow which of them the beginning looks like.
    """
    if not 0 < share < 1:
        raise ValueError(f"mixture: got share {share}, expected a number between 0 and 1, both exclusive")
    ratio = MixtureRatio(LogRatio(other, reference), float(share))
    return _tilted(reference, ratio, 1.0, reward, beta)


def _tilted(
    reference: CausalPolicy, ratio: Reward, share: float, reward: Reward | None, beta: float | None
) -> Tilt:
    """Reference x exp(share ratio + reward / beta)."""
    if reward is None and beta is None:
        return tilt(reference, ratio, 1 / share)
    if reward is None or beta is None:
        missing = "reward" if reward is None else "beta"
        raise ValueError(f"mixture: got no {missing}, expected both reward and beta, or neither")
    require_beta(beta)
    return tilt(reference, weighted_sum([reward, ratio], [1.0, beta * share]), beta)
