"""Verifiers of a completion's form, with nothing to compare it with: a pattern, a JSON schema, a length."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from klimb.data import Prompt
from klimb.rewards.texts import against, column_needed, optional, said, words


@dataclass(frozen=True, kw_only=True)
class Regex:
    """1 where a pattern is found in the completion, else 0.

    Attributes:
        pattern: in Python's syntax; (?i) at its start for any case, (?s) for a dot that goes over lines.
        mode: "search" finds it anywhere, "fullmatch" asks that it is the whole completion, white space at the ends too.

    Example:
        >>> Regex(pattern="[0-9]+")(["?"] * 2, ["It is 42.", "No idea."])
        [1.0, 0.0]
    """

    pattern: str
    mode: Literal["search", "fullmatch"] = "search"

    name = "regex"
    needs = ()

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"option pattern: got {self.pattern!r}, no regular expression: {error}"
            ) from error

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float]:
        """One number a completion."""
        matches = getattr(re.compile(self.pattern), self.mode)
        return [float(matches(said(completion)) is not None) for completion in completions]


@dataclass(frozen=True, kw_only=True)
class JsonSchema:
    """1 where the whole completion is JSON that fits a schema, else 0. Needs jsonschema, of the extra `rewards`.

    Attributes:
        schema: a JSON schema; nothing that it refers to is fetched.
        column: in place of it, where each row's schema is (an object, or its text).

    Example:
        >>> fits = JsonSchema(schema={"type": "object", "required": ["city"]})
        >>> fits(["?"] * 3, ['{"city": "Rome"}', '{"town": "Rome"}', "Rome"])
        [1.0, 0.0, 0.0]
    """

    schema: Mapping[str, Any] | None = None
    column: str | None = None

    name = "json_schema"
    needs = property(column_needed)

    def __post_init__(self) -> None:
        if (self.schema is None) == (self.column is None):
            raise ValueError("expected one of the options schema and column")
        if self.schema is not None:
            _validator(self.schema, "option schema")
        optional("jsonschema", extra="rewards")

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        """One number a completion.

        Raises:
            ValueError: a column that is no schema, or a schema that refers to something outside it.
        """
        if self.column is None:
            fits = _validator(self.schema, "option schema")
            return [_fits(fits, said(completion)) for completion in completions]
        where = f"column {self.column!r}"
        return against(
            completions, columns[self.column], lambda text, schema: _fits(_validator(schema, where), text)
        )


@dataclass(frozen=True, kw_only=True)
class Length:
    """How far the completion is from a length: 0 where it has it, and less by one for every `target` it is away.

    Attributes:
        target: the length; 20 words against a target of 10 give -1.
        unit: "characters" or "words".

    Example:
        >>> Length(target=2, unit="words")(["?"] * 3, ["two words", "one", ""])
        [0.0, -0.5, -1.0]
    """

    target: int
    unit: Literal["characters", "words"] = "characters"

    name = "length"
    needs = ()

    def __post_init__(self) -> None:
        if self.target < 1:
            raise ValueError(f"option target: got {self.target}, expected 1 or more {self.unit}")

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float]:
        """One number a completion."""
        measure = len if self.unit == "characters" else lambda text: len(words(text))
        return [
            0.0 - abs(measure(said(completion)) - self.target) / self.target for completion in completions
        ]


def _validator(schema: Any, where: str) -> Any:
    jsonschema = optional("jsonschema", extra="rewards")
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: got {schema[:80]!r}, no JSON: {error}") from error
    try:
        kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
        kind.check_schema(schema)
    except (jsonschema.SchemaError, TypeError) as error:
        said = getattr(error, "message", str(error))
        raise ValueError(f"{where}: got {str(schema)[:80]!r}, no JSON schema: {said}") from error
    # an empty registry: what the schema refers to is in itself, and nothing is fetched
    return kind(schema, registry=optional("referencing", extra="rewards").Registry())


def _fits(validator: Any, text: str) -> float:
    referencing = optional("referencing", extra="rewards")
    try:
        value = json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):  # not JSON is what is found out here, and worth nothing
        return 0.0
    try:
        return float(validator.is_valid(value))
    except referencing.exceptions.Unresolvable as error:
        raise ValueError(
            f"the schema refers to {error.ref!r}, which is not in it and is not fetched; write it into $defs"
        ) from error


def _no_json(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
