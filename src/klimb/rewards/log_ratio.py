"""The reward of a target that is a policy itself: log p/ref of the tokens drawn, with which Z = 1 at beta 1.

P prompts, G draws a prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from klimb.data import Draws, Policy


@dataclass(frozen=True)
class LogRatio:
    """log p(y|x) - log ref(y|x), nats: ref exp(r) is p.

    It is asked for draws and not for texts: a text spelled again may have other tokens.

    Attributes:
        teacher: p.
        reference: ref.
    """

    teacher: Policy
    reference: Policy

    @torch.no_grad()
    def of_draws(self, draws: Draws) -> Tensor:
        """[P, G] nats."""
        log_p, log_ref = (draws.sequence_sums(who.log_prob(draws)) for who in (self.teacher, self.reference))
        return log_p - log_ref

    def __call__(self, prompts: object, completions: object, **columns: object) -> list[float]:
        """Refuse to be asked for texts."""
        raise TypeError("LogRatio is of tokens: use of_draws")
