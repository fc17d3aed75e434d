"""What the value of an option may be."""

from __future__ import annotations

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Part(BaseModel):
    """Options that belong together; an unknown one is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number (in YAML yes, no, on and off are true and false)")
    return value


Whole = Annotated[int, BeforeValidator(_no_truth)]
Real = Annotated[float, BeforeValidator(_no_truth)]
Count = Annotated[Whole, Field(ge=1)]
Amount = Annotated[Whole, Field(ge=0)]
Seed = Annotated[Whole, Field(ge=0, lt=10**18)]
Positive = Annotated[Real, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[Real, Field(ge=0, lt=1)]
Name = Annotated[str, Field(min_length=1)]
Place = Annotated[Name, AfterValidator(os.path.expanduser)]
"""a path that no shell has read: ~ is the home folder"""
