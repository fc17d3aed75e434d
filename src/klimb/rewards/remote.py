"""A reward that another process gives, over HTTP: rows are posted as JSON, `{"rewards": [...]}` comes back.

A reward in its own process also keeps its code away from this one. Needs httpx2 and stamina, of the extra `http`.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from pydantic_core import from_json

from klimb.data import Prompt
from klimb.rewards.post import check_url, post_json, secrets, shown
from klimb.rewards.texts import optional
from klimb.rewards.unscored import Unscored


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
        concurrency: questions under way at a time.
        timeout: seconds for one attempt.
        attempts: how often a question is asked whose answer does not come or has status 5xx.
        total_timeout: seconds for all attempts of one question.
        headers_env: header -> the environment variable that holds its value. The value goes into no file, log or hash.
    """

    url: str
    columns: list[str] | None = None
    batch_size: int = field(default=64, compare=False)
    concurrency: int = field(default=4, compare=False)
    timeout: float = field(default=30.0, compare=False)
    attempts: int = field(default=4, compare=False)
    total_timeout: float = field(default=120.0, compare=False)
    headers_env: Mapping[str, str] = field(default_factory=dict, compare=False)

    name = "http"

    def __post_init__(self) -> None:
        check_url(self.url)
        check_limits(self.timeout, self.attempts, self.total_timeout)
        for name in ("batch_size", "concurrency"):
            if getattr(self, name) < 1:
                raise ValueError(f"option {name}: got {getattr(self, name)}, expected 1 or more")
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
        """One number a completion; at most `concurrency` questions are under way at a time.

        Raises:
            Unscored: of some rows no number came: no answer, or one that is not such a list of as many finite numbers; names the
                address, and holds the numbers that came. Where an answer failed nothing more is asked.
        """
        httpx2 = optional("httpx2", extra="http")
        headers = secrets(self.headers_env)
        columns.pop("completion_ids", None)  # ids of a tokenizer that the other side has not got
        rows = {**columns, "prompts": prompts, "completions": completions}
        values: list[float | None] = [None] * len(prompts)
        missing = set(range(len(prompts)))
        said: list[str] = []
        gone = threading.Event()  # an answer failed: nothing more is asked
        with httpx2.Client(headers=headers) as client, ThreadPoolExecutor(self.concurrency) as threads:

            def ask(start: int) -> tuple[dict[int, float | None], str | None]:
                if gone.is_set():
                    return {}, None
                try:
                    return self._asked(client, rows, start, headers)
                except ValueError as error:
                    gone.set()
                    return {}, str(error)

            starts = range(0, len(prompts), self.batch_size)
            for start, (found, complaint) in zip(starts, threads.map(ask, starts), strict=True):
                for row, value in found.items():
                    values[start + row] = value
                    missing.discard(start + row)
                if complaint is not None:
                    said.append(complaint)
        if missing:
            raise Unscored(said[0], values, missing)
        return values

    def _asked(
        self, client: Any, rows: Mapping[str, Sequence[Any]], start: int, headers: Mapping[str, str]
    ) -> tuple[dict[int, float | None], str | None]:
        """The numbers of one question's rows, and what to say where some are none."""
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
        return self._read(text, len(some["prompts"]), headers)

    def _read(
        self, text: str, rows: int, headers: Mapping[str, str]
    ) -> tuple[dict[int, float | None], str | None]:
        expected = f'expected {{"rewards": [...]}} with {rows} finite numbers (null where it does not apply)'
        try:
            rewards = Answer.model_validate_json(text).rewards
        except ValidationError as error:
            said = error.errors()[0]
            where = ".".join(map(str, said["loc"]))
            complaint = f"{self.url}: got {shown(text, headers.values())}, {expected}: {where + ': ' if where else ''}{said['msg']}"
            wrong = {row["loc"] for row in error.errors()}
            if any(len(loc) != 2 for loc in wrong):
                return {}, complaint
            # all that is wrong is some of the rows
            given = from_json(text)["rewards"]
            if len(given) != rows:
                return {}, complaint
            return {i: x for i, x in enumerate(given) if ("rewards", i) not in wrong}, complaint
        if len(rewards) != rows:
            return (
                {},
                f"{self.url}: got {len(rewards)} rewards in {shown(text, headers.values())}, {expected}",
            )
        return dict(enumerate(rewards)), None


def check_limits(timeout: float, attempts: int, total_timeout: float) -> None:
    """Refuse limits that would let a question wait for ever, or never be asked."""
    for name, value in (("timeout", timeout), ("attempts", attempts), ("total_timeout", total_timeout)):
        if not 0 < value < float("inf"):
            raise ValueError(f"option {name}: got {value}, expected more than 0, and not for ever")
