"""Draw with vLLM: completions come back as token ids, each with the law it was drawn from.

P prompts, G draws a prompt. The engines are servers (`klimb.samplers.vllm_server`) or one of this process; prompts go to them in
turn, whoever asks, so the number of ranks changes nothing. A policy's adapter is laid
into a folder of its own, named by its contents, and every engine is told of it once; a request that names no adapter is the
reference, so one engine serves both. Contents, not "the newest", name the adapter: requests under way keep theirs, and no
memory of a prompt under older weights is taken for the present one. A folder stays as long as a request may name it, for vLLM
reads it when a request comes, and ends altogether where it is gone. With every weight moving the engines read them all again, and
keep the name of their contents: one that has another name began anew, or somebody else gave it weights, and its draws are not taken.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from klimb.data import Draws, Example, Sampler, stack
from klimb.models.families import save_adapter, speaking_adapter, whole_state
from klimb.models.policy import CausalPolicy

APART = 0.1
"""nats a token by which an engine's model and ours may differ before they are called two models"""
ROUNDING = 1e-3
"""nats by which a log-probability may lie above zero"""
STARTS = 3
"""how often engines are given all weights for one set of draws, should they begin anew while they draw"""
GOES_ON = "what was drawn before is kept, and --resume goes on"
"""how an error of an engine ends while the draws of a plan or measurement are made"""
PLAIN = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""the law of the model itself; what is not said vLLM takes from generation_config.json"""


class Adapter(NamedTuple):
    """One version of a policy's adapter: the name that it is served under, and the folder that it lies in."""

    name: str
    folder: Path


class Weights(NamedTuple):
    """All weights of a policy: the name that an engine keeps of them, and the folder that they lie in."""

    name: str
    folder: Path


class Drawn(NamedTuple):
    """One completion: its tokens, the law of each of them, and why vLLM says that it ended."""

    token_ids: list[int]
    log_q: list[float]
    finish_reason: str


class Engine(Protocol):
    """What draws: a server or an engine of this process. Each of these raises ValueError, and names the engine."""

    def about(self) -> str:
        """Which one it is, for a message."""
        ...

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
        """Begin to draw `num_draws` completions of each prompt under its seed, without an adapter or with one that was loaded."""
        ...

    def load(self, adapter: Adapter) -> None:
        """Take an adapter from its folder."""
        ...

    def unload(self, name: str) -> None:
        """Forget an adapter, if it is there."""
        ...

    def take_weights(self, weights: Weights) -> None:
        """Read all weights of the model again, and remember no prompt under the old ones."""
        ...

    def holds(self) -> str | None:
        """The name of the weights that it was given last; another, or None, where it began anew since, or does not answer."""
        ...


@dataclass(frozen=True, kw_only=True)
class Vllm:
    """A sampler that asks vLLM; a policy's adapter, or all its weights, go there first.

    The law is the policy's own: temperature 1, nothing filtered, and `log_q` is what the engine says of its own draws. Each
    prompt has a seed from the generator, so the same weights on the same engine draw the same again, as far as its rounding
    does not depend on what else it serves at the time.

    With several ranks (those of the policy) the first one hands the weights over while the others wait; then each asks for the
    completions of its share of the prompts, and all get all draws. Every rank has to call this, and has to call what `begin` gives.

    Attributes:
        engines: who draws.
        max_completion_length: tokens.
        keep: adapters that lie there at a time: the newest, and those that draws under way may name.
    """

    engines: Sequence[Engine]
    max_completion_length: int
    keep: int = field(default=4, compare=False)
    told: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """what the engines were told: adapters by name, the folder they lie in"""

    def __call__(
        self, policy: CausalPolicy, examples: Sequence[Example], num_draws: int, *, generator: torch.Generator
    ) -> Draws:
        """`num_draws` completions of each example, each drawn by itself from the policy.

        Raises:
            ValueError: a family that vLLM does not know; no engine, one that does not take adapters or weights, that stops at
                other tokens, or whose answer is not what was asked for; names it. On all ranks.
        """
        return self.begin(policy, examples, num_draws, generator=generator)()

    def begin(
        self, policy: CausalPolicy, examples: Sequence[Example], num_draws: int, *, generator: torch.Generator
    ) -> Callable[[], Draws]:
        """Hand over the policy as it is now and begin to draw; what is returned waits for the draws.

        The weights may move meanwhile. Where all of them are read again by the engines, they may not, and the draws are
        waited for here; engines that began anew meanwhile are given the weights again, and draw again.
        """
        before = generator.get_state()
        for _ in range(STARTS):
            handed = self._hand_over(policy)
            if not isinstance(handed, Weights):
                return self._begin(handed, policy, examples, num_draws, generator=generator)
            generator.set_state(before)
            draws = self._begin(None, policy, examples, num_draws, generator=generator)()
            if (lost := policy.ranks.from_first(partial(self._lost, handed))) is None:
                return lambda: draws
        raise ValueError(f"{lost}, {STARTS} times")

    def handed_over(self, policy: CausalPolicy) -> Sampler:
        """What draws from the policy as it is now, and each rank may call by itself; all ranks call this together.

        Whatever is wrong with an engine then, the error says that it can be gone on: blocks drawn before are right.
        """
        handed = self._hand_over(policy)
        adapter = handed if isinstance(handed, Adapter) else None

        def draw(
            policy: Any, examples: Sequence[Example], num_draws: int, *, generator: torch.Generator
        ) -> Draws:
            try:
                draws = self._begin(adapter, policy, examples, num_draws, generator=generator)()
            except ValueError as error:
                raise ValueError(f"{error}; {GOES_ON}") from error
            # other ranks draw meanwhile, so it is not given them again here
            if isinstance(handed, Weights) and (lost := self._lost(handed)) is not None:
                raise ValueError(f"{lost}; {GOES_ON}")
            return draws

        return draw

    def check(self, policy: CausalPolicy, example: Example) -> None:
        """Draw a little, at every engine, from a policy whose model they should have, and compare what both say of it.

        Raises:
            ValueError: no engine is there, or it serves another model.
        """
        handed = self._hand_over(policy)
        adapter = handed if isinstance(handed, Adapter) else None
        for engine in self.engines:
            generator = torch.Generator().manual_seed(0)
            draws = self._begin(adapter, policy, [example], 8, generator=generator, engines=[engine])()
            assert draws.packed_log_q is not None
            with torch.no_grad():
                apart = (policy.log_prob(draws) - draws.packed_log_q).abs().mean().item()
            if not apart <= APART:
                raise ValueError(
                    f"{engine.about()}: its log-probabilities differ by {apart:.2g} nats a token from those of the model of this "
                    f"run; expected at most {APART:g}. Serve the same weights, not quantised, in the same dtype"
                )

    def _begin(
        self,
        adapter: Adapter | None,
        policy: CausalPolicy,
        examples: Sequence[Example],
        num_draws: int,
        *,
        generator: torch.Generator,
        engines: Sequence[Engine] = (),
    ) -> Callable[[], Draws]:
        """Ask for this rank's share; what is returned waits for all ranks'."""
        if num_draws < 1:
            raise ValueError(f"vllm: got num_draws {num_draws}, expected at least 1")
        engines, ranks = engines or self.engines, policy.ranks
        seeds = torch.randint(2**62, (len(examples),), generator=generator).tolist()
        prompts = [policy.render(example) for example in examples]
        mine = ranks.share(len(examples))
        asked: dict[int, Future[list[Drawn]]] = {}
        for number, engine in enumerate(engines):
            # in turn, from one that chance names: blocks of one prompt must not all go to the first
            turn = [i for i in mine if (i + seeds[0]) % len(engines) == number]
            if turn:
                found = engine.begin(
                    adapter,
                    [prompts[i] for i in turn],
                    [seeds[i] for i in turn],
                    num_draws,
                    max_tokens=self.max_completion_length,
                    end=policy.end,
                )
                asked |= dict(zip(turn, found, strict=True))
        own = partial(_waited_for, [asked[i] for i in mine], policy, [examples[i] for i in mine])
        # asked twice, by a checkpoint and by its step, it is the same
        return cache(lambda: stack([part for part in ranks.gather(own) if part is not None]))

    # What the engines are told.

    def _hand_over(self, policy: CausalPolicy) -> Adapter | Weights | None:
        """Let every engine have the policy as it is now, unless it has; the adapter or the weights that it has there, if any."""
        if policy.num_virtual:
            raise ValueError(
                "vllm: got a policy with virtual tokens, which vLLM has not; use family lora or full, or sampler ancestral"
            )
        wrapped = speaking_adapter(policy)
        if wrapped is None:
            state = whole_state(policy) or policy.model.state_dict()
            return policy.ranks.from_first(partial(self._hand_over_weights, policy, state))
        model, name = wrapped
        if name is None:
            return None
        state = whole_state(policy)
        return policy.ranks.from_first(partial(self._hand_over_adapter, model, name, state))

    def _hand_over_adapter(self, model: Any, name: str, state: dict[str, Tensor] | None) -> Adapter:
        """Lay the adapter where the engines read it; `state` is the whole of it where layers are split."""
        from peft import get_peft_model_state_dict

        weights = get_peft_model_state_dict(model, adapter_name=name, state_dict=state)
        # of two runs with the same weights each has its own, which nobody else takes away
        adapter_name = f"{self._folder().name}-{_contents(weights)}"
        adapter = Adapter(adapter_name, self._folder() / adapter_name)
        adapters = self.told["adapters"]
        if adapter.name not in adapters:
            save_adapter(model, name, adapter.folder, **({} if state is None else {"state_dict": state}))
            adapters[adapter.name] = adapter.folder
            self._each(lambda engine: engine.load(adapter))
            for old in list(adapters)[: -self.keep]:
                self._each(lambda engine: engine.unload(old))  # noqa: B023
                shutil.rmtree(adapters.pop(old))
        return adapter

    def _hand_over_weights(self, policy: CausalPolicy, state: Mapping[str, Tensor]) -> Weights:
        """Let the engines read all weights again, unless they have them."""
        weights = Weights(_contents(state), self._folder() / "weights")
        behind = [engine for engine in self.engines if engine.holds() != weights.name]
        if behind:
            policy.model.save_pretrained(weights.folder, safe_serialization=True, state_dict=dict(state))
            self._each(lambda engine: engine.take_weights(weights), behind)
        return weights

    def _lost(self, weights: Weights) -> str | None:
        """What to say of an engine that does not hold these weights any more."""
        for engine in self.engines:
            if engine.holds() != weights.name:
                return f"{engine.about()}: it began anew while it drew, or somebody else gave it weights"
        return None

    def _each(self, tell: Callable[[Engine], None], engines: Sequence[Engine] = ()) -> None:
        """Tell every engine something, or each of these, at the same time."""
        engines = engines or self.engines
        with ThreadPoolExecutor(len(engines)) as threads:
            list(threads.map(tell, engines))

    def _folder(self) -> Path:
        """Where adapters and weights lie; it goes with this object."""
        if "folder" not in self.told:
            self.told["folder"] = folder = Path(tempfile.mkdtemp(prefix="klimb-vllm-"))
            self.told["adapters"] = {}
            weakref.finalize(self, _take_away, self.engines, self.told["adapters"], folder)
        return self.told["folder"]


def _waited_for(
    asked: Sequence[Future[list[Drawn]]], policy: CausalPolicy, examples: Sequence[Example]
) -> Draws | None:
    """Wait for all; one failure ends it, and what has not begun is not asked for any more. None where nothing was asked."""
    if not asked:
        return None
    try:
        answers = [future.result() for future in asked]
    except BaseException:
        for future in asked:
            future.cancel()
        raise
    completions = [[torch.tensor(one.token_ids) for one in group] for group in answers]
    per_token = [[torch.tensor(one.log_q).clamp(max=0.0) for one in group] for group in answers]
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


def require_whole(drawn: Sequence[Drawn], *, max_tokens: int, end: Sequence[int], about: str) -> None:
    """Refuse completions that have no law, or that did not end where ours do.

    Raises:
        ValueError: the first of them, after the name of the engine.
    """
    for one in drawn:
        stopped = one.token_ids[-1] in end
        if len(one.log_q) != len(one.token_ids) or not all(x <= ROUNDING for x in one.log_q):
            raise ValueError(
                f"{about}: got {len(one.log_q)} log-probabilities, the largest {max(one.log_q, default=0.0):.3g}, for "
                f"{len(one.token_ids)} tokens; expected one a token, at most 0: serve with --logprobs-mode processed_logprobs"
            )
        whole = stopped or len(one.token_ids) == max_tokens
        if one.finish_reason != ("stop" if stopped else "length") or not whole:
            raise ValueError(
                f"{about}: a completion of {len(one.token_ids)} tokens ended with {one.token_ids[-1]} for the reason "
                f"{one.finish_reason!r}; expected one of the ends {sorted(end)}, or {max_tokens} tokens: "
                "its generation_config.json or its context is another one"
            )


def _take_away(engines: Sequence[Engine], adapters: dict[str, Path], folder: Path) -> None:
    """Let the engines forget what lies in a folder, then remove it."""
    for name in adapters:
        for engine in engines:
            engine.unload(name)
    shutil.rmtree(folder, ignore_errors=True)


def _contents(weights: Mapping[str, Tensor]) -> str:
    """Sixteen hex digits that name these weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
