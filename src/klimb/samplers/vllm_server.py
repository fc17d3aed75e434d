"""A vLLM server, as it is asked over HTTP: `vllm serve` runs by itself, on its own devices or another machine that shares a folder."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from klimb.rewards.post import check_url, post_json, shown
from klimb.rewards.texts import optional
from klimb.samplers.vllm import PLAIN, Adapter, Drawn, Weights, require_whole


class Likelihood(BaseModel):
    """Of one completion."""

    model_config = ConfigDict(strict=True)

    token_logprobs: list[float]


class Completion(BaseModel):
    """What has to come back of each draw."""

    model_config = ConfigDict(strict=True)

    index: int
    token_ids: list[int] = Field(min_length=1)
    logprobs: Likelihood
    finish_reason: str


class Completions(BaseModel):
    """What has to come back; what else is in it is not looked at."""

    choices: list[Completion]


@dataclass(frozen=True)
class Server:
    """A `klimb.samplers.vllm.Engine` at an address.

    Attributes:
        url: such as http://localhost:8000.
        concurrency: prompts asked for at a time; the server puts them together as it can.
        timeout: seconds for one prompt's completions.
        patience: seconds in which a server that died may come back.
        attempts: how often a prompt is asked for within them.
    """

    url: str
    concurrency: int = field(default=64, compare=False, kw_only=True)
    timeout: float = field(default=600.0, compare=False, kw_only=True)
    patience: float = field(default=600.0, compare=False, kw_only=True)
    attempts: int = field(default=20, compare=False, kw_only=True)
    told: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """what it said of itself: the name of its model"""

    def __post_init__(self) -> None:
        check_url(self.url)
        optional("httpx2", extra="vllm")
        optional("stamina", extra="vllm")

    def about(self) -> str:
        """Its address, and what it serves."""
        return f"{self.url} (it serves {self._model()!r})"

    def begin(
        self,
        adapter: Adapter | None,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        num_draws: int,
        *,
        max_tokens: int,
        end: Sequence[int],
    ) -> list[Future[list[Drawn]]]:
        """Ask for the completions of each prompt, some prompts at a time."""
        common = {
            "n": num_draws,
            "max_tokens": max_tokens,
            "stop_token_ids": sorted(end),
            "logprobs": 0,
            "return_token_ids": True,
            **PLAIN,
        }
        threads = ThreadPoolExecutor(min(self.concurrency, len(prompts)))
        asked = [
            threads.submit(self._complete, {**common, "prompt": list(prompt), "seed": seed}, adapter, end)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        threads.shutdown(wait=False)
        return asked

    def load(self, adapter: Adapter) -> None:
        """Tell it of an adapter in a folder that it sees."""
        payload = {"lora_name": adapter.name, "lora_path": str(adapter.folder)}
        try:
            self._post("/v1/load_lora_adapter", payload)
        except ValueError as error:
            if "already" in str(error):  # asked twice: the first answer was lost, or another rank was quicker
                return
            raise ValueError(
                f"{error}. The server has to take adapters: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora "
                "--max-lora-rank R, and to see the folder (docs/sampling.md)"
            ) from error

    def unload(self, name: str) -> None:
        """Let it forget an adapter; one that began anew, or is gone, has not got it."""
        httpx2 = optional("httpx2", extra="vllm")
        place = f"{self.url.rstrip('/')}/v1/unload_lora_adapter"
        with contextlib.suppress(httpx2.HTTPError):
            httpx2.post(place, json={"lora_name": name}, timeout=2.0)

    def take_weights(self, weights: Weights) -> None:
        """Let it read all weights again."""
        payload = {"method": "reload_weights", "kwargs": {"weights_path": str(weights.folder)}}
        try:
            self._post("/update_weight_version", {"new_version": ""})  # should it die half-way
            self._post("/collective_rpc", payload)
            said = self._post("/reset_prefix_cache", {})
            if json.loads(said or "{}").get("success") is not False:
                self._post("/update_weight_version", {"new_version": weights.name})
                return
        except ValueError as error:
            raise ValueError(
                f"{error}. The server has to take weights: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL, of vLLM 0.32 or later, on an "
                "address that nobody else reaches (docs/sampling.md); or use family lora"
            ) from error
        raise ValueError(
            f"{self.url}: still draws for somebody under the old weights, and keeps what it remembers of prompts under them; "
            "expected a server that nobody else asks"
        )

    def holds(self) -> str | None:
        """The name of its weights; it keeps that as long as its process lives."""
        httpx2 = optional("httpx2", extra="vllm")
        with contextlib.suppress(httpx2.HTTPError, ValueError, LookupError, TypeError):
            return httpx2.get(f"{self.url.rstrip('/')}/weight_info", timeout=30.0).json()["weight_version"]
        return None

    def _model(self) -> str:
        """The name of the model without adapters."""
        if "model" not in self.told:
            httpx2 = optional("httpx2", extra="vllm")
            place = f"{self.url.rstrip('/')}/v1/models"
            try:
                answer = httpx2.get(place, timeout=30.0)
                found = [card["id"] for card in answer.json()["data"] if not card.get("parent")]
                self.told["model"] = found[0]
            except httpx2.HTTPError as error:
                raise ValueError(
                    f"{self.url}: no vLLM server answers ({error or type(error).__name__}); start one, vllm serve MODEL "
                    "--enable-lora (docs/sampling.md), or use sampler ancestral"
                ) from error
            except (ValueError, LookupError, TypeError) as error:
                raise ValueError(
                    f"{place}: got status {answer.status_code} and {shown(answer.text)}, expected vLLM's list of models; is that "
                    "the address of a vLLM server?"
                ) from error
        return self.told["model"]

    def _complete(self, payload: dict[str, Any], adapter: Adapter | None, end: Sequence[int]) -> list[Drawn]:
        """The completions of one prompt, by index."""
        place = "/v1/completions"
        payload = {**payload, "model": self._model() if adapter is None else adapter.name}
        try:
            text = self._post(place, payload)
        except ValueError as error:
            if "status 404" not in str(error) or adapter is None:
                raise
            self.load(adapter)  # the server began anew and has forgotten it
            text = self._post(place, payload)
        try:
            found = sorted(Completions.model_validate_json(text).choices, key=lambda c: c.index)
        except ValidationError as error:
            said = error.errors()[0]
            raise ValueError(
                f"{self.url}: got {shown(text)}, expected vLLM's completions with token_ids and logprobs: "
                f"{'.'.join(map(str, said['loc']))}: {said['msg']}"
            ) from error
        if [c.index for c in found] != list(range(payload["n"])):
            raise ValueError(f"{self.url}: got {len(found)} completions, expected {payload['n']}")
        drawn = [Drawn(c.token_ids, c.logprobs.token_logprobs, c.finish_reason) for c in found]
        require_whole(drawn, max_tokens=payload["max_tokens"], end=end, about=self.url)
        return drawn

    def _post(self, place: str, payload: dict[str, Any]) -> str:
        httpx2 = optional("httpx2", extra="vllm")
        with httpx2.Client() as client:
            return post_json(
                client,
                self.url.rstrip("/") + place,
                payload,
                timeout=self.timeout,
                attempts=self.attempts,
                total_timeout=self.patience,
            )
