"""A reward that another process gives, over HTTP: rows are posted as JSON, `{"rewards": [...]}` comes back.

A reward in its own process also keeps its code away from this one. Needs httpx2 and stamina, of the extra `http`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from klimb.data import Prompt
from klimb.rewards.post import check_url, post_json, secrets, shown
from klimb.rewards.texts import optional


class Answer(BaseModel):
    """What has to come back; what else is in it is not looked at."""

    model_config = ConfigDict(strict=True)

    rewards: list[FiniteFloat | None]


@dataclass(frozen=True, kw_only=True)
class Http:
    """What the address gives for `{"prompts": [...], "completions": [...], ...columns}`: one number or null a completion.

    Attributes:
        url: where rows are posted to.
        columns: which columns of the data go along; left out, all.
        batch_size: rows of one question.
        timeout: seconds for one attempt.
        attempts: how often a question is asked whose answer does not come or has status 5xx.
        total_timeout: seconds for all attempts of one question.
        headers_env: header -> the environment variable that holds its value. The value goes into no file, log or hash.
    """

    url: str
    columns: list[str] | None = None
    batch_size: int = field(default=64, compare=False)
    timeout: float = field(default=30.0, compare=False)
    attempts: int = field(default=4, compare=False)
    total_timeout: float = field(default=120.0, compare=False)
    headers_env: Mapping[str, str] = field(default_factory=dict, compare=False)

    name = "http"

    def __post_init__(self) -> None:
        check_url(self.url)
        check_limits(self.timeout, self.attempts, self.total_timeout)
        if self.batch_size < 1:
            raise ValueError(f"option batch_size: got {self.batch_size}, expected 1 or more")
        secrets(self.headers_env)
        optional("httpx2", extra="http")
        optional("stamina", extra="http")

    @property
    def needs(self) -> tuple[str, ...] | None:
        """The columns it looks at; None is all."""
        return None if self.columns is None else tuple(self.columns)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        """One number a completion.

        Raises:
            ValueError: no answer, or one that is not such a list of as many finite numbers; names the address.
        """
        httpx2 = optional("httpx2", extra="http")
        headers = secrets(self.headers_env)
        columns.pop("completion_ids", None)  # ids of a tokenizer that the other side has not got
        rows = {**columns, "prompts": prompts, "completions": completions}
        rewards: list[float | None] = []
        with httpx2.Client(headers=headers) as client:
            for start in range(0, len(prompts), self.batch_size):
                some = {name: list(x[start : start + self.batch_size]) for name, x in rows.items()}
                text = post_json(
                    client,
                    self.url,
                    some,
                    timeout=self.timeout,
                    attempts=self.attempts,
                    total_timeout=self.total_timeout,
                    hidden=headers.values(),
                )
                rewards += self._read(text, len(some["prompts"]), headers)
        return rewards

    def _read(self, text: str, rows: int, headers: Mapping[str, str]) -> list[float | None]:
        expected = f'expected {{"rewards": [...]}} with {rows} finite numbers (null where it does not apply)'
        try:
            rewards = Answer.model_validate_json(text).rewards
        except ValidationError as error:
            said = error.errors()[0]
            where = ".".join(map(str, said["loc"]))
            raise ValueError(
                f"{self.url}: got {shown(text, headers.values())}, {expected}: {where + ': ' if where else ''}{said['msg']}"
            ) from error
        if len(rewards) != rows:
            raise ValueError(
                f"{self.url}: got {len(rewards)} rewards in {shown(text, headers.values())}, {expected}"
            )
        return rewards


def check_limits(timeout: float, attempts: int, total_timeout: float) -> None:
    """Refuse limits that would let a question wait for ever, or never be asked."""
    for name, value in (("timeout", timeout), ("attempts", attempts), ("total_timeout", total_timeout)):
        if not 0 < value < float("inf"):
            raise ValueError(f"option {name}: got {value}, expected more than 0, and not for ever")
