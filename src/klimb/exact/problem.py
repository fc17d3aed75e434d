"""A small climb: for P prompts a reference and a reward over Y outcomes, and a beta; checked where a person gives them.

All prompts weigh the same. Prompts with fewer outcomes are padded: there log ref = -inf and the reward is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.exact.divergences import entropy
from klimb.exact.tabular import random_logits
from klimb.exact.truth import kl, log_partition, mean, tilt

NEAR_ONE = 1e-6
"""probabilities are typed with few digits: a sum this near to one is made one"""


@dataclass(frozen=True, eq=False)
class Problem:
    """What names a best policy.

    Attributes:
        log_ref: [P, Y] nats, float64.
        reward: [P, Y] in its own units; -inf is forbidden.
        beta: reward per nat.
    """

    log_ref: Tensor
    reward: Tensor
    beta: float

    @property
    def log_target(self) -> Tensor:
        """[P, Y] log ref + r/beta, nats, unnormalised."""
        return tilt(self.log_ref, self.reward, self.beta)

    @property
    def log_z(self) -> Tensor:
        """[P] log Z(x), nats."""
        return log_partition(self.log_target)

    @property
    def log_p(self) -> Tensor:
        """[P, Y] the target, nats."""
        return self.log_target - self.log_z[:, None]

    @property
    def support(self) -> Tensor:
        """[P, Y] True at outcomes that the target can give; policies live here."""
        return self.log_target > -torch.inf

    @property
    def scale(self) -> float:
        """Of the largest number that the sums run over; rounding in float64 grows with it."""
        rewards = self.reward[self.support].abs().max().item()
        nats = self.log_ref[self.support].abs().max().item() + 1
        return max(1.0, rewards, rewards / self.beta, self.beta * nats)

    def random_policies(self, count: int, *, generator: torch.Generator) -> Tensor:
        """[N, P, Y] log-probabilities, nats: any law over what the target can give, some near a corner."""
        logits = random_logits(count, *self.log_ref.shape, generator=generator)
        spread = 4 * torch.rand(count, 1, 1, generator=generator, dtype=logits.dtype)
        return self.policy(spread * logits)

    def policy(self, logits: Tensor) -> Tensor:
        """[..., P, Y] logits -> log-probabilities over what the target can give; differentiable."""
        return torch.log_softmax(logits.masked_fill(~self.support, -torch.inf), -1)


@dataclass(frozen=True)
class Best:
    """The best policy of one prompt, and what it is like; nats and units of reward.

    Attributes:
        beta: reward per nat.
        p: [Y] its probabilities.
        log_z: log Z.
        objective: beta log Z, the most that E_pi[r] - beta KL(pi||ref) can be.
        reward: E_p[r].
        reward_ref: E_ref[r].
        kl_p_ref: KL(p||ref).
        kl_ref_p: KL(ref||p).
        entropy: H(p).
        entropy_ref: H(ref).
    """

    beta: float
    p: tuple[float, ...]
    log_z: float
    objective: float
    reward: float
    reward_ref: float
    kl_p_ref: float
    kl_ref_p: float
    entropy: float
    entropy_ref: float


def best(given: Problem) -> Best:
    """The best policy of the first prompt.

    Example:
        >>> found = best(problem([[0.5, 0.5]], [[1.0, 0.0]], 1.0))
        >>> round(found.reward, 4), round(found.kl_p_ref, 4), round(found.log_z, 4)
        (0.7311, 0.1109, 0.6201)
    """
    log_ref, log_p, reward, log_z = given.log_ref[0], given.log_p[0], given.reward[0], given.log_z[0].item()
    return Best(
        beta=given.beta,
        p=tuple(log_p.exp().tolist()),
        log_z=log_z,
        objective=given.beta * log_z,
        reward=mean(log_p, reward).item(),
        reward_ref=mean(log_ref, reward).item(),
        kl_p_ref=kl(log_p, log_ref).item(),
        kl_ref_p=kl(log_ref, log_p).item(),
        entropy=entropy(log_p).item(),
        entropy_ref=entropy(log_ref).item(),
    )


def law(values: Sequence[float], *, name: str) -> Tensor:
    """Probabilities as a person writes them -> log-probabilities [Y], float64 nats; a sum within 1e-6 of 1 is made 1.

    Raises:
        ValueError: none, NaN, negative, or not summing to one.

    Example:
        >>> law([0.25, 0.75], name="ref").exp().tolist()
        [0.25, 0.75]
    """
    if not values:
        raise ValueError(f"{name}: got no numbers, expected probabilities that sum to 1")
    for place, value in enumerate(values, 1):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name}: got {value:g} at place {place}, expected probabilities from 0 to 1")
    total = math.fsum(values)
    if abs(total - 1) > NEAR_ONE:
        hint = f"divide each by {total:g}" if total > 0 else "give some outcome a probability"
        raise ValueError(
            f"{name}: got probabilities that sum to {total:.10g}, expected 1; {hint} (1/3 may be written as 1/3)"
        )
    return (torch.tensor(values, dtype=torch.float64) / total).log()


def problem(
    refs: Sequence[Sequence[float]], rewards: Sequence[Sequence[float]], beta: float, *, name: str = ""
) -> Problem:
    """A problem of P prompts from probabilities and rewards.

    Args:
        refs: of each prompt, the reference's probabilities.
        rewards: of each prompt, as many rewards; -inf forbids an outcome.
        beta: reward per nat.
        name: what the messages begin with.

    Raises:
        ValueError: no law, lengths that differ, a reward NaN or +inf, every outcome forbidden, or beta not above 0.

    Example:
        >>> problem([[0.6, 0.4]], [[0.0, 1.0]], 1.0).log_p.exp()
        tensor([[0.3556, 0.6444]], dtype=torch.float64)
    """
    check_beta(beta)
    laws = []
    for x, (ref, reward) in enumerate(zip(refs, rewards, strict=True), 1):
        where = name if len(refs) == 1 else f"{name}prompt {x}: "
        laws.append(law(ref, name=f"{where}ref"))
        if len(ref) != len(reward):
            raise ValueError(
                f"{where}got {len(ref)} probabilities in ref and {len(reward)} rewards, expected one reward an outcome"
            )
        for place, value in enumerate(reward, 1):
            if math.isnan(value) or value == math.inf:
                raise ValueError(
                    f"{where}reward: got {value:g} at place {place}, expected a number, or -inf to forbid an outcome"
                )
        if all(p == 0 or r == -math.inf for p, r in zip(ref, reward, strict=True)):
            raise ValueError(f"{where}every outcome of the reference is forbidden: there is no target")
    return padded(laws, [torch.tensor(reward, dtype=torch.float64) for reward in rewards], beta)


def padded(log_refs: Sequence[Tensor], rewards: Sequence[Tensor], beta: float) -> Problem:
    """A problem of laws and rewards [Y_x], one a prompt, that are right already."""
    return Problem(pad(log_refs, -math.inf), pad(rewards, 0.0), float(beta))


def pad(rows: Sequence[Tensor], value: float) -> Tensor:
    """Rows [Y_x] as one [P, Y]."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def check_beta(beta: float, *, name: str = "beta") -> None:
    """Refuse a beta that names no target.

    Raises:
        ValueError: it is not a finite number above zero.
    """
    if not (beta > 0 and math.isfinite(beta)):
        raise ValueError(
            f"{name}: got {beta:g}, expected a number above 0, in units of reward per nat: "
            "without a price on KL there is no target"
        )


def check_policy(log_pi: Tensor, given: Problem) -> None:
    """Refuse a policy that goes where the target cannot, since its KL to it is infinite.

    Raises:
        ValueError: it has mass where the reference has none, or on a forbidden outcome.
    """
    outside = (log_pi > -torch.inf) & ~given.support
    if outside.any():
        x, y = (int(i[0]) for i in outside.nonzero(as_tuple=True))
        why = "the reference has none" if given.log_ref[x, y] == -torch.inf else "the reward forbids it"
        raise ValueError(
            f"policy: got probability {log_pi[x, y].exp().item():.4g} at place {y + 1} of prompt {x + 1}, where {why}: "
            "its KL is infinite; give it 0 there"
        )
