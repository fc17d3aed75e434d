"""A row of the table of methods: how the target is known, what is made small, on whose draws, and what is claimed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from klimb.objectives.bind import name_of

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
        derived: further numbers the objective asks for (advantages), each a function of numbers, computed once for a
            batch of draws, in order; one may take the name of a number it replaces.
        unit: what the objective is in: "nats" (trained times beta), or "reward".
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
    unit: Literal["nats", "reward"] = "nats"

    def as_dict(self) -> dict[str, object]:
        """The row as plain text, for JSON and for print."""
        return {
            **{name: x for name, x in vars(self).items() if isinstance(x, str)},
            "objective": None if self.objective is None else name_of(self.objective),
            "derived": ", ".join(f"{name} = {name_of(function)}" for name, function in self.derived.items()),
        }
