"""What the value of an option may be."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, ConfigDict, Field

STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""a path that no shell has read: ~ is the home folder"""
