"""One question over HTTP: JSON is posted, text comes back, in bounded time, or one error that names the address.

Transport errors and answers of 5xx are asked again, other answers are not. Values of headers come from the environment and are
shown nowhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Collection, Mapping
from typing import Any
from urllib.parse import urlsplit

from klimb.rewards.texts import optional

LARGEST = 64 * 1024 * 1024  # bytes of an answer
SHOWN = 240  # characters of an answer in an error


def check_url(url: str) -> None:
    """Refuse an address that is not one, or that holds a password.

    Example:
        >>> check_url("localhost:8000")
        Traceback (most recent call last):
        ...
        ValueError: option url: got 'localhost:8000', expected an address such as http://localhost:8000/score
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"option url: got {url!r}, expected an address such as http://localhost:8000/score")
    if parts.password or parts.username:
        raise ValueError(
            "option url: got an address with a user or password in it, which would be written into files; keep it in an "
            "environment variable and name that in headers_env"
        )


def secrets(names: Mapping[str, str]) -> dict[str, str]:
    """Headers, each with the value of the environment variable that is named for it.

    Raises:
        ValueError: what is named is no variable, or it is not set, or no header could hold it; the value is not shown.

    Example:
        >>> secrets({"Authorization": "Bearer abc"})
        Traceback (most recent call last):
        ...
        ValueError: header Authorization: expected the name of an environment variable that holds its value, such as MY_TOKEN
    """
    values = {}
    for header, variable in names.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            raise ValueError(  # it may be the secret itself
                f"header {header}: expected the name of an environment variable that holds its value, such as MY_TOKEN"
            )
        value = os.environ.get(variable, "")
        if not value:
            raise ValueError(f"header {header}: the environment variable {variable} is not set; export it")
        if not (value.isascii() and value.isprintable()):
            raise ValueError(
                f"header {header}: the value of {variable} has characters that no header can hold"
            )
        values[header] = value
    return values


def post_json(
    client: Any,
    url: str,
    payload: Mapping[str, Any],
    *,
    timeout: float,
    attempts: int,
    total_timeout: float,
    hidden: Collection[str] = (),
    ask_again: Collection[int] = (),
) -> str:
    """Post a value as JSON and give the text of the answer.

    Args:
        client: an `httpx2.Client`.
        url: where to.
        payload: what.
        timeout: seconds for one attempt, its answer read to the end.
        attempts: how often to try.
        total_timeout: seconds for all attempts and the waiting between them.
        hidden: what is not shown where an answer is.
        ask_again: statuses besides 5xx that another attempt may better.

    Raises:
        ValueError: no answer of status 2xx came; says what did.
    """
    httpx2, stamina = optional("httpx2", extra="http"), optional("stamina", extra="http")
    content = json.dumps(payload, default=str).encode()
    began = time.monotonic()
    tries = 0

    def again(error: Exception) -> bool:
        if isinstance(error, httpx2.HTTPStatusError):
            return error.response.status_code >= 500 or error.response.status_code in ask_again
        return isinstance(error, httpx2.TransportError)

    try:
        for attempt in stamina.retry_context(on=again, attempts=attempts, timeout=total_timeout):
            with attempt:
                tries += 1
                left = total_timeout - (time.monotonic() - began)
                return _answer(httpx2, client, url, content, min(timeout, max(left, 0.01)))
    except httpx2.HTTPStatusError as error:
        came = f"got status {error.response.status_code} and {_shown(error.response.text, hidden)}, expected status 200"
    except httpx2.TransportError as error:
        slow = isinstance(error, httpx2.TimeoutException)
        came = (
            f"no answer within {timeout:g} seconds" if slow else f"no answer: {error or type(error).__name__}"
        )
    passed = time.monotonic() - began
    raise ValueError(f"{url}: {came}; asked {tries} time{'s' if tries > 1 else ''} in {passed:.1f} seconds")


def shown(text: str, hidden: Collection[str] = ()) -> str:
    """An answer as an error shows it: its beginning, without secrets.

    Example:
        >>> shown("bad token abc", {"abc"})
        "'bad token ***'"
    """
    return _shown(text, hidden)


def _shown(text: str, hidden: Collection[str]) -> str:
    for value in hidden:
        text = text.replace(value, "***").replace(value.partition(" ")[2] or value, "***")
    return repr(text if len(text) <= SHOWN else text[:SHOWN] + "...")


def _answer(httpx2: Any, client: Any, url: str, content: bytes, seconds: float) -> str:
    """One attempt; the clock runs to the last byte, which httpx's own does not."""
    deadline = time.monotonic() + seconds
    headers = {"Content-Type": "application/json"}
    body = bytearray()
    with contextlib.ExitStack() as stack:
        response = stack.enter_context(
            client.stream("POST", url, content=content, headers=headers, timeout=seconds)
        )
        for piece in response.iter_bytes():
            body += piece
            if time.monotonic() > deadline:
                raise httpx2.ReadTimeout("the answer was not complete", request=response.request)
            if len(body) > LARGEST:
                raise ValueError(f"{url}: got more than {LARGEST} bytes")
    text = body.decode(response.encoding or "utf-8", errors="replace")
    if not response.is_success:
        whole = httpx2.Response(response.status_code, text=text, request=response.request)
        raise httpx2.HTTPStatusError(str(response.status_code), request=response.request, response=whole)
    return text
