"""The table of methods: target x divergence x draws, with what each claims and where the claim ends.

`claim` says what a test of the row has to show. "gradient": its mean update is the divergence's gradient. "minimiser":
its minimum is the target. "law": its draws have the law named. A caveat is tested as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Method:
    """One row.

    Attributes:
        knows: how the target is known.
        divergence: what is made small, and by which estimator.
        objective: the function in `klimb.objectives`, or "" where nothing is trained.
        draws: whose draws it takes.
        claim: what its test shows.
        caveat: where the claim ends.
        source: authors, year.
    """

    knows: str
    divergence: str
    objective: str
    draws: str
    claim: Literal["gradient", "minimiser", "value", "law"]
    caveat: str
    source: str


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "log_variance": Method(
            knows="density",
            divergence="half variance of the residual",
            objective="log_variance",
            draws="any of full support",
            claim="minimiser",
            caveat="the gradient is that of KL(pi||p) only for fresh draws of the policy",
            source="Richter et al., 2020",
        ),
        "reverse_kl": Method(
            knows="density",
            divergence="KL(pi||p), score function, leave-one-out",
            objective="reverse_kl",
            draws="the policy, or any known law that reaches what it reaches",
            claim="gradient",
            caveat="refuses forbidden completions (reward -inf)",
            source="Williams, 1992; Ahmadian et al., 2024",
        ),
        "forward_kl": Method(
            knows="density",
            divergence="KL(p||pi), self-normalised weights",
            objective="forward_kl",
            draws="any known law",
            claim="minimiser",
            caveat="biased at finite G, towards the law that drew",
            source="Khalifa, Elsahar, Dymetman, 2021",
        ),
        "best_of": Method(
            knows="ranks",
            divergence="none",
            objective="",
            draws="the reference",
            claim="law",
            caveat="the tilt of the reward's log quantile at 1/beta = n - 1, not of the reward",
            source="Beirami et al., 2025",
        ),
        "rejection": Method(
            knows="density and a bound of the reward",
            divergence="none",
            objective="",
            draws="the reference",
            claim="law",
            caveat="a bound that a reward exceeds is an error; tries grow as exp(bound / beta) / Z",
            source="von Neumann, 1951",
        ),
    }
)
