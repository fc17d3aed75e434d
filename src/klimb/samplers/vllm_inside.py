"""A vLLM engine of this process, on this process's device: asleep, its memory given back, while the trainer works.

It sleeps where the platform lets it (CUDA): its weights wait in the memory of the processor, what it remembered of prompts is
gone. On a CPU it stays awake, and its weights lie beside the trainer's.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch

from klimb.models.families import save_base, speaking_adapter
from klimb.models.policy import CausalPolicy
from klimb.rewards.texts import optional
from klimb.samplers.vllm import PLAIN, Adapter, Drawn, Weights, require_whole

ABOUT = "vllm in this process"
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""of adapters, as vLLM takes them"""


@dataclass(frozen=True)
class Inside:
    """A `klimb.samplers.vllm.Engine` that was started here (`start`).

    Attributes:
        llm: vLLM's own object.
        sleeps: whether it can sleep.
    """

    llm: Any
    sleeps: bool
    told: dict[str, Any] = field(default_factory=lambda: {"asleep": False, "requests": {}}, repr=False)
    """whether it sleeps now; vLLM's object of each adapter, by name; the name of the weights it was given"""
    numbers: Iterator[int] = field(default_factory=lambda: count(1), repr=False)
    """that adapters are known by; none has been another's"""

    def about(self) -> str:
        """That it is this one."""
        return ABOUT

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
        """Draw all of it now, and fall asleep."""
        vllm = optional("vllm", extra="colocate")
        params = [
            vllm.SamplingParams(
                n=num_draws,
                seed=seed,
                max_tokens=max_tokens,
                stop_token_ids=sorted(end),
                logprobs=0,
                detokenize=False,
                **PLAIN,
            )
            for seed in seeds
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        request = None if adapter is None else self._request(adapter)
        self._wake()
        found = _told(lambda: self.llm.generate(asked, params, lora_request=request, use_tqdm=False))
        if self.sleeps:
            _told(lambda: self.llm.sleep(level=1))
            self.told["asleep"] = True
        groups = [[_drawn(one) for one in sorted(answer.outputs, key=lambda o: o.index)] for answer in found]
        for group in groups:
            require_whole(group, max_tokens=max_tokens, end=end, about=ABOUT)
        return [_done(group) for group in groups]

    def load(self, adapter: Adapter) -> None:
        """Nothing: it reads an adapter when it first draws with it."""

    def unload(self, name: str) -> None:
        """Forget an adapter."""
        if (request := self.told["requests"].pop(name, None)) is not None:
            self.llm.llm_engine.remove_lora(request.lora_int_id)

    def take_weights(self, weights: Weights) -> None:
        """Wake up, and read all weights again."""
        self.told["held"] = None  # should it fail
        self._wake()
        _told(lambda: self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(weights.folder)}))
        _told(self.llm.reset_prefix_cache)
        self.told["held"] = weights.name

    def holds(self) -> str | None:
        """The name of its weights; it dies with this process, and not before."""
        return self.told.get("held")

    def _request(self, adapter: Adapter) -> Any:
        requests = self.told["requests"]
        if adapter.name not in requests:
            lora = optional("vllm.lora.request", extra="colocate")
            requests[adapter.name] = lora.LoRARequest(adapter.name, next(self.numbers), str(adapter.folder))
        return requests[adapter.name]

    def _wake(self) -> None:
        if self.told["asleep"]:
            torch.cuda.empty_cache()  # what the trainer does not use now
            _told(self.llm.wake_up)
            self.told["asleep"] = False


def start(policy: CausalPolicy, *, longest: int, memory: float) -> Inside:
    """An engine of the model that a policy and its reference stand on, as it is now.

    Args:
        policy: with its adapter, if it has one.
        longest: tokens of a prompt and its completion.
        memory: share of the device's memory for its weights and what it remembers.

    Raises:
        ValueError: vLLM is not installed here, or did not start; says why.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # what a command prints is its own
    vllm = optional("vllm", extra="colocate")
    platform = optional("vllm.platforms", extra="colocate").current_platform
    options: dict[str, Any] = {
        "dtype": str(policy.model.dtype).removeprefix("torch."),
        "max_model_len": longest,
        "gpu_memory_utilization": memory,
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
    }
    if (wrapped := speaking_adapter(policy)) is not None:
        r = max(adapter.r for adapter in wrapped[0].peft_config.values())
        options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": min(x for x in RANKS if x >= r)}
    if platform.is_cpu():
        # vLLM 0.32 ends there when it reads a prompt in two parts for a draw that has a seed
        options |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, longest)}
        options["enforce_eager"] = True
    sleeps = bool(platform.is_sleep_mode_available())
    with tempfile.TemporaryDirectory(prefix="klimb-vllm-") as folder:
        save_base(policy, folder)
        return Inside(_told(lambda: vllm.LLM(model=folder, enable_sleep_mode=sleeps, **options)), sleeps)


def _told(work: Callable[[], Any]) -> Any:
    """What vLLM gives; whatever goes wrong in it, as one error of ours."""
    try:
        return work()
    except Exception as error:
        raise ValueError(f"{ABOUT}: {type(error).__name__}: {error}") from error


def _drawn(one: Any) -> Drawn:
    tokens = list(one.token_ids)
    laws = [law[token].logprob for token, law in zip(tokens, one.logprobs, strict=True)]
    return Drawn(tokens, laws, str(one.finish_reason))


def _done(group: list[Drawn]) -> Future[list[Drawn]]:
    future: Future[list[Drawn]] = Future()
    future.set_result(group)
    return future
