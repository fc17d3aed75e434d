"""Draw with a vLLM server: completions come back as token ids, each with the law it was drawn from.

P prompts, G draws a prompt. The server runs by itself (`vllm serve`, on its own devices or another machine that shares a
folder); this is the client. A policy's adapter is laid into a folder of its own, named by its contents, and the server is
told of it; a request that names no adapter is the reference, so one engine serves both. Contents, not "the newest", name
the adapter: requests under way keep theirs, and no memory of a prompt under older weights is taken for the present one. A
folder stays as long as a request may name it, for vLLM reads it when a request comes, and ends altogether where it is gone.
With every weight moving the server is told to read them all again.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from klimb.data import Draws, Example
from klimb.models.families import save_adapter, speaking_adapter
from klimb.models.policy import CausalPolicy
from klimb.rewards.post import check_url, post_json, shown
from klimb.rewards.texts import optional

APART = 0.1
"""nats a token by which the server's model and ours may differ before they are called two models"""
ROUNDING = 1e-3
"""nats by which a log-probability may lie above zero"""
PLAIN = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""the law of the model itself; what is not said a server takes from generation_config.json"""


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


@dataclass(frozen=True, kw_only=True)
class Vllm:
    """A sampler that asks a vLLM server; a policy's adapter, or all its weights, go there first.

    The law is the policy's own: temperature 1, nothing filtered, and `log_q` is what the server says of its own draws. Each
    prompt has a seed from the generator, so the same weights on the same server draw the same again, as far as the server's
    rounding does not depend on what else it serves at the time.

    Attributes:
        url: of the server, such as http://localhost:8000.
        max_completion_length: tokens.
        concurrency: prompts asked for at a time; the server puts them together as it can.
        timeout: seconds for one prompt's completions.
        patience: seconds in which a server that died may come back.
        attempts: how often a prompt is asked for within them.
        keep: adapters that lie there at a time: the newest, and those that draws under way may name.
    """

    url: str
    max_completion_length: int
    concurrency: int = field(default=64, compare=False)
    timeout: float = field(default=600.0, compare=False)
    patience: float = field(default=600.0, compare=False)
    attempts: int = field(default=20, compare=False)
    keep: int = field(default=4, compare=False)
    told: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """what the server was told: its own model, adapters by name, the weights it holds, the folder they lie in"""

    def __post_init__(self) -> None:
        check_url(self.url)
        optional("httpx2", extra="vllm")
        optional("stamina", extra="vllm")

    def __call__(
        self, policy: CausalPolicy, examples: Sequence[Example], num_draws: int, *, generator: torch.Generator
    ) -> Draws:
        """`num_draws` completions of each example, each drawn by itself from the policy.

        Raises:
            ValueError: a family that vLLM does not know; no server, one that does not take adapters or weights, that stops at
                other tokens, or whose answer is not what was asked for; names its address.
        """
        return self.begin(policy, examples, num_draws, generator=generator)()

    def begin(
        self, policy: CausalPolicy, examples: Sequence[Example], num_draws: int, *, generator: torch.Generator
    ) -> Callable[[], Draws]:
        """Hand over the policy as it is now and begin to draw; what is returned waits for the draws.

        The weights may move meanwhile. Where all of them are read again by the server, they may not, and the draws are
        waited for here.
        """
        if num_draws < 1:
            raise ValueError(f"vllm: got num_draws {num_draws}, expected at least 1")
        adapter = speaking_adapter(policy)
        model = self._told_of(policy, adapter)
        seeds = torch.randint(2**62, (len(examples),), generator=generator).tolist()
        prompts = [policy.render(example) for example in examples]
        threads = ThreadPoolExecutor(min(self.concurrency, max(len(examples), 1)))
        asked = [
            threads.submit(self._complete, model, prompt, num_draws, seed, policy.end)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        threads.shutdown(wait=False)
        finish = partial(_gathered, asked, policy, list(examples))
        if adapter is not None:
            return finish
        draws = finish()
        return lambda: draws

    def check(self, policy: CausalPolicy, example: Example) -> None:
        """Draw a little from a policy whose model the server should have, and compare what both say of it.

        Raises:
            ValueError: no server is there, or it serves another model.
        """
        draws = self(policy, [example], 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            own = policy.log_prob(draws)
        theirs = draws.packed_log_q
        assert theirs is not None
        apart = (own - theirs).abs().mean().item()
        if not apart <= APART:
            raise ValueError(
                f"{self.url}: serves {self._model()!r}, whose log-probabilities differ by {apart:.2g} nats a token from those "
                f"of the model of this run; expected at most {APART:g}. Serve the same weights, not quantised, in the same dtype"
            )

    # What the server is told.

    def _told_of(self, policy: CausalPolicy, adapter: tuple[Any, str | None] | None) -> str:
        """The name under which the server draws from this policy, after it was handed over where that is needed."""
        if policy.num_virtual:
            raise ValueError(
                "vllm: got a policy with virtual tokens, which no server of vLLM has; use family lora or full, or sampler ancestral"
            )
        if adapter is None:
            self._hand_over_weights(policy)
            return self._model()
        wrapped, name = adapter
        return self._model() if name is None else self._hand_over_adapter(wrapped, name)

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

    def _hand_over_adapter(self, wrapped: Any, name: str) -> str:
        """Lay the adapter where the server reads it, unless it has it; its name there."""
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(wrapped, adapter_name=name)
        # of two runs with the same weights each has its own, which nobody else takes away
        served = f"{self._folder().name}-{_contents(weights)}"
        adapters = self.told["adapters"]
        if served not in adapters:
            folder = self._folder() / served
            save_adapter(wrapped, name, folder)
            adapters[served] = folder
            self._load(served)
            for old in list(adapters)[: -self.keep]:
                with contextlib.suppress(ValueError):  # a server that began anew has not got it
                    self._post("/v1/unload_lora_adapter", {"lora_name": old})
                shutil.rmtree(adapters.pop(old))
        return served

    def _load(self, served: str) -> None:
        payload = {"lora_name": served, "lora_path": str(self.told["adapters"][served])}
        try:
            self._post("/v1/load_lora_adapter", payload)
        except ValueError as error:
            if "already" in str(error):  # asked twice, since the first answer was lost
                return
            raise ValueError(
                f"{error}. The server has to take adapters: VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora "
                "--max-lora-rank R, and to see the folder (docs/sampling.md)"
            ) from error

    def _hand_over_weights(self, policy: CausalPolicy) -> None:
        """Let the server read all weights again, unless it has them."""
        contents = _contents(policy.model.state_dict())
        held = self.told.setdefault("held", contents)  # what is checked first is what it was started with
        if contents == held:
            return
        folder = self._folder() / "weights"
        policy.model.save_pretrained(folder, safe_serialization=True)
        try:
            self._post(
                "/collective_rpc",
                {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}},
            )
            self._post("/reset_prefix_cache", {})
        except ValueError as error:
            raise ValueError(
                f"{error}. The server has to take weights: VLLM_SERVER_DEV_MODE=1 vllm serve MODEL, on an address that "
                "nobody else reaches (docs/sampling.md); or use family lora"
            ) from error
        self.told["held"] = contents

    def _folder(self) -> Path:
        """Where adapters and weights lie; it goes with this object."""
        if "folder" not in self.told:
            self.told["folder"] = folder = Path(tempfile.mkdtemp(prefix="klimb-vllm-"))
            self.told["adapters"] = {}
            weakref.finalize(self, _take_away, self.url.rstrip("/"), self.told["adapters"], folder)
        return self.told["folder"]

    # What is asked.

    def _complete(
        self, model: str, prompt: list[int], num_draws: int, seed: int, end: Sequence[int]
    ) -> list[Completion]:
        """The completions of one prompt, by index."""
        payload = {
            "model": model,
            "prompt": prompt,
            "n": num_draws,
            "seed": seed,
            "max_tokens": self.max_completion_length,
            "stop_token_ids": sorted(end),
            "logprobs": 0,
            "return_token_ids": True,
            **PLAIN,
        }
        place = "/v1/completions"
        try:
            text = self._post(place, payload)
        except ValueError as error:
            if "status 404" not in str(error) or model not in self.told.get("adapters", {}):
                raise
            self._load(model)  # the server began anew and has forgotten it
            text = self._post(place, payload)
        return self._read(text, num_draws, end)

    def _read(self, text: str, num_draws: int, end: Sequence[int]) -> list[Completion]:
        try:
            found = sorted(Completions.model_validate_json(text).choices, key=lambda c: c.index)
        except ValidationError as error:
            said = error.errors()[0]
            raise ValueError(
                f"{self.url}: got {shown(text)}, expected vLLM's completions with token_ids and logprobs: "
                f"{'.'.join(map(str, said['loc']))}: {said['msg']}"
            ) from error
        if [c.index for c in found] != list(range(num_draws)):
            raise ValueError(f"{self.url}: got {len(found)} completions, expected {num_draws}")
        for c in found:
            stopped = c.token_ids[-1] in end
            laws = c.logprobs.token_logprobs
            if len(laws) != len(c.token_ids) or not all(x <= ROUNDING for x in laws):
                raise ValueError(
                    f"{self.url}: got {len(laws)} log-probabilities, the largest {max(laws, default=0.0):.3g}, for "
                    f"{len(c.token_ids)} tokens; expected one a token, at most 0: serve with --logprobs-mode processed_logprobs"
                )
            whole = stopped or len(c.token_ids) == self.max_completion_length
            if c.finish_reason != ("stop" if stopped else "length") or not whole:
                raise ValueError(
                    f"{self.url}: a completion of {len(c.token_ids)} tokens ended with {c.token_ids[-1]} for the reason "
                    f"{c.finish_reason!r}; expected one of the ends {sorted(end)}, or {self.max_completion_length} tokens: "
                    "its generation_config.json or its context is another one"
                )
        return found

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


def _gathered(
    asked: Sequence[Future[list[Completion]]], policy: CausalPolicy, examples: Sequence[Example]
) -> Draws:
    """Wait for all; one failure ends it, and what has not begun is not asked for any more."""
    try:
        answers = [future.result() for future in asked]
    except BaseException:
        for future in asked:
            future.cancel()
        raise
    completions = [[torch.tensor(c.token_ids) for c in group] for group in answers]
    per_token = [[torch.tensor(c.logprobs.token_logprobs).clamp(max=0.0) for c in group] for group in answers]
    return Draws(
        examples=examples,
        completions=completions,
        finished=torch.tensor([[int(ids[-1]) in policy.end for ids in group] for group in completions]),
        texts=[[policy.decode(ids) for ids in group] for group in completions],
        log_q=torch.tensor([[x.double().sum().item() for x in group] for group in per_token]),
        full_support=True,
        own_law=True,
        token_log_q=per_token,
    )


def _take_away(url: str, adapters: dict[str, Path], folder: Path) -> None:
    """Let the server forget what lies in a folder, then remove it."""
    httpx2 = optional("httpx2", extra="vllm")
    for name in adapters:
        with contextlib.suppress(httpx2.HTTPError):  # it may be gone before us
            httpx2.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=2.0)
    shutil.rmtree(folder, ignore_errors=True)


def _contents(weights: dict[str, Tensor]) -> str:
    """Sixteen hex digits that name these weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
