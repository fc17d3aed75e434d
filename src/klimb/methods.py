"""The table of methods: target x divergence x draws, with what each claims and where the claim ends.

`claim` says what a test of the row has to show. "gradient": its mean update is the divergence's gradient. "minimiser":
its minimum is the target. "value": its minimum is another law, which is named. "law": its draws have the law named. A
caveat is tested as well: by a case where a neighbour's belief fails.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from klimb.objectives.bind import name_of
from klimb.objectives.forward_kl import forward_kl
from klimb.objectives.log_variance import log_variance
from klimb.objectives.reverse_kl import reverse_kl

Numbers = Callable[..., Tensor]


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        knows: how the target is known.
        divergence: what is made small, and by which estimator.
        draws: whose draws it takes.
        claim: what its test shows.
        fixed_point: the law at which it stops, where the family of policies is large enough.
        caveat: where the claim ends.
        source: authors, year.
        objective: the function of numbers that is minimised; None where nothing is trained.
        derived: further numbers the objective asks for (advantages), each a function of numbers, computed once a batch.
    """

    knows: str
    divergence: str
    draws: str
    claim: Literal["gradient", "minimiser", "value", "law"]
    fixed_point: str
    caveat: str
    source: str
    objective: Numbers | None = None
    derived: Mapping[str, Numbers] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        """The row as plain text, for JSON and for print."""
        return {
            **{name: x for name, x in vars(self).items() if isinstance(x, str)},
            "objective": None if self.objective is None else name_of(self.objective),
            "derived": {name: name_of(function) for name, function in self.derived.items()},
        }


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "log_variance": Method(
            knows="density",
            divergence="half variance of the residual",
            objective=log_variance,
            draws="any of full support",
            claim="minimiser",
            fixed_point="the target",
            caveat="the gradient is that of KL(pi||p) only for fresh draws of the policy",
            source="Richter et al., 2020",
        ),
        "reverse_kl": Method(
            knows="density",
            divergence="KL(pi||p), score function, leave-one-out",
            objective=reverse_kl,
            draws="the policy, or any known law that reaches what it reaches",
            claim="gradient",
            fixed_point="the target",
            caveat="refuses forbidden completions (reward -inf)",
            source="Williams, 1992; Ahmadian et al., 2024",
        ),
        "forward_kl": Method(
            knows="density",
            divergence="KL(p||pi), self-normalised weights",
            objective=forward_kl,
            draws="any known law",
            claim="minimiser",
            fixed_point="the target",
            caveat="biased at finite G, towards the law that drew",
            source="Khalifa, Elsahar, Dymetman, 2021",
        ),
        "best_of": Method(
            knows="ranks",
            divergence="none",
            draws="the reference",
            claim="law",
            fixed_point="nothing is trained",
            caveat="the tilt of the reward's log quantile at 1/beta = n - 1, not of the reward",
            source="Beirami et al., 2025",
        ),
        "rejection": Method(
            knows="density and a bound of the reward",
            divergence="none",
            draws="the reference",
            claim="law",
            fixed_point="nothing is trained",
            caveat="a bound that a reward exceeds is an error; tries grow as exp(bound / beta) / Z",
            source="von Neumann, 1951",
        ),
    }
)
