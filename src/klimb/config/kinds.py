"""The kinds of a part that there are several of: which weights move, who draws, where to go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from klimb.config.values import Amount, Count, Name, Part, Place, Positive, Real

UNIONS = {"family": "lora", "target": "tilt", "sampler": "vllm"}
"""keys that hold one of several kinds -> the kind unless said"""


class Lora(Part):
    """Low-rank adapters beside the frozen model."""

    kind: Literal["lora"] = "lora"
    r: Count = 16
    """rank"""
    alpha: Positive = 32.0
    """the adapter is scaled by alpha / r"""
    target_modules: str | list[str] = "all-linear"
    """which linear layers; "all-linear" is all but the head"""
    layers: Count | None = None
    """adapt only the last so many layers; left out: all"""
    start: Place | None = None
    """folder of an adapter to go on from; frozen, it is the reference"""


class Full(Part):
    """Every weight moves; the reference is a frozen copy."""

    kind: Literal["full"] = "full"


class SoftPrompt(Part):
    """A few trained vectors before the prompt; the model stays."""

    kind: Literal["soft_prompt"] = "soft_prompt"
    num_virtual_tokens: Count = 16
    """how many"""
    init: str = "context"
    """a text that they start as: the target's context, one of your own, or random; random too without a context"""


class Prefix(Part):
    """Trained keys and values that every layer sees before the prompt; the model stays."""

    kind: Literal["prefix"] = "prefix"
    num_virtual_tokens: Count = 16
    """how many"""
    init: str = "context"
    """a text whose keys and values they start as: the target's context, one of your own, or random; random too without a context"""


class OwnSampler(Part):
    """The model of the run draws by itself, token by token."""

    kind: Literal["ancestral"] = "ancestral"


class VllmSampler(Part):
    """vLLM draws with the same model; the policy is handed to it before it does."""

    kind: Literal["vllm"] = "vllm"
    url: str | Annotated[list[str], Field(min_length=1)] | None = None
    """a server's address, such as http://localhost:8000, or those of several, which share the prompts; left out: an engine of this process"""
    steps_ahead: Amount = 0
    """steps for which draws are begun beforehand, by the policy of that time, so that the server draws while the trainer learns"""
    gpu_memory_utilization: Annotated[Real, Field(gt=0, lt=1)] = 0.4
    """share of the device's memory that an engine of this process takes while it draws"""


class PlainTilt(Part):
    """The reference tilted by the reward: ref exp(reward / beta)."""

    kind: Literal["tilt"] = "tilt"


class EntropyBonus(Part):
    """The tilt with a bonus on entropy, which flattens it; needs a beta."""

    kind: Literal["entropy_bonus"] = "entropy_bonus"
    bonus: Positive
    """worth of entropy, reward per nat"""


class LengthNormalized(Part):
    """The tilt by reward per token; beta and reward_goal count that."""

    kind: Literal["length_normalized"] = "length_normalized"


class Context(Part):
    """The reference under a context, which the policy learns to do without; Z = 1 and beta is 1."""

    kind: Literal["context"] = "context"
    context: str | None = None
    """the text, a system prompt for chats"""
    context_file: Place | None = None
    """a file that holds it"""

    @model_validator(mode="after")
    def _is_one(self) -> Context:
        if (self.context is None) == (self.context_file is None):
            raise ValueError("expected one of context (a text) and context_file")
        if self.context is not None and not self.context.strip():
            raise ValueError("the context is empty; there is nothing to learn from it")
        return self


class Teacher(Part):
    """Another model of the same vocabulary; Z = 1 and beta is 1."""

    kind: Literal["teacher"] = "teacher"
    teacher: Name
    """hub id or local folder, also of an adapter of this run's model, such as RUN/policy"""
    token_map: Place | None = None
    """of a teacher with another tokenizer: file of JSON, for each token of the model the teacher's number"""


TAUGHT = ("context", "teacher")
"""kinds of target that are a policy themselves"""

Aim = PlainTilt | EntropyBonus | LengthNormalized | Context | Teacher
"""the targets that a run can have"""
PYTHON_ONLY = {
    "moving_reference": "moving_reference",
    "standardized": "standardized",
    "mixture": "mixture",
    "geometric_mixture": "geometric_mixture",
    "chi_squared": "chi_squared",
    "forbid": "forbid",
    "moments": "moment_tilt",
}
"""targets that need more than log_ref, reward and lengths of each draw -> their names in klimb.target"""
