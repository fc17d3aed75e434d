"""All that a run depends on, as one schema.

Names are TRL's where the meaning is the same. A batch is `prompts_per_step` prompts with `num_generations` fresh
completions each: nothing is divided by anything.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from klimb.nearest import nearest

DESTINATIONS = ("beta", "kl_budget", "reward_goal")
DRAWN = ("num_generations", "num_replay", "replay_steps", "dynamic_sampling")
"""options of draws, zero where there are none"""
OF_REWARDED_DRAWS = (
    *(
        "reward_weights",
        "reward_cache",
        "plan",
        "keep_fresh",
        "log_z",
        "log_z_learning_rate",
        "clip",
        "num_minibatches",
    ),
    *("epsilon", "epsilon_high", "importance_cap", "kl_stop", "kl_penalty", "kl_target", "kl_horizon"),
    *("gae_lambda", "value_learning_rate", "value_clip", "eval_steps", "eval_prompts", "eval_draws"),
)
"""options that distill has no use for"""
UNIONS = {"family": "lora", "target": "tilt", "sampler": "vllm"}
"""keys that hold one of several kinds -> the kind unless said"""
STRICT = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

Count = Annotated[int, Field(ge=1)]
Amount = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Place = Annotated[str, AfterValidator(os.path.expanduser)]
"""a path that no shell has read: ~ is the home folder"""


class Lora(BaseModel):
    """Low-rank adapters beside the frozen model."""

    model_config = STRICT

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


class Full(BaseModel):
    """Every weight moves; the reference is a frozen copy."""

    model_config = STRICT

    kind: Literal["full"] = "full"


class SoftPrompt(BaseModel):
    """A few trained vectors before the prompt; the model stays."""

    model_config = STRICT

    kind: Literal["soft_prompt"] = "soft_prompt"
    num_virtual_tokens: Count = 16
    """how many"""
    init: str = "context"
    """a text that they start as: the target's context, one of your own, or random; random too without a context"""


class Prefix(BaseModel):
    """Trained keys and values that every layer sees before the prompt; the model stays."""

    model_config = STRICT

    kind: Literal["prefix"] = "prefix"
    num_virtual_tokens: Count = 16
    """how many"""
    init: str = "context"
    """a text whose keys and values they start as: the target's context, one of your own, or random; random too without a context"""


class OwnSampler(BaseModel):
    """The model of the run draws by itself, token by token."""

    model_config = STRICT

    kind: Literal["ancestral"] = "ancestral"


class VllmSampler(BaseModel):
    """vLLM draws with the same model; the policy is handed to it before it does."""

    model_config = STRICT

    kind: Literal["vllm"] = "vllm"
    url: str | Annotated[list[str], Field(min_length=1)] | None = None
    """a server's address, such as http://localhost:8000, or those of several, which share the prompts; left out: an engine of this process"""
    steps_ahead: Amount = 0
    """steps for which draws are begun beforehand, by the policy of that time, so that the server draws while the trainer learns"""
    gpu_memory_utilization: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """share of the device's memory that an engine of this process takes while it draws"""


# written out, since the table itself needs torch; a test compares the two
TRAINED = (
    "log_variance",
    "reverse_kl",
    "forward_kl",
    "jensen_shannon",
    "total_variation",
    "chi2_reverse",
    "chi2_forward",
    "squared_hellinger",
    "alpha(0.5)",
    "skew_kl(0.1)",
    "skew_reverse_kl(0.1)",
    "generalized_js(0.1)",
    "trajectory_balance",
    "a_star_po",
    "pmd_mean",
    "flow_rl",
    "dpo",
    "ipo",
    "wpo",
    "slic",
    "chi_po",
    "f_dpo(jensen_shannon)",
    "simpo",
    "cpo",
    "orpo",
    "kto",
    "bco",
    "exo",
    "info_nca",
    "nca",
    "sft",
    "reward_weighted",
    "raft",
    "filtered",
    "dpg",
    "rloo",
    "ppo",
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "reinforce_pp",
)
FAMILIES = ("alpha", "skew_kl", "skew_reverse_kl", "generalized_js")
"""divergences with a number of one's own: alpha(0.3)"""
NEED_LOG_Z = frozenset(
    {
        "jensen_shannon",
        "total_variation",
        "chi2_reverse",
        "chi2_forward",
        "squared_hellinger",
        "trajectory_balance",
        "a_star_po",
        "flow_rl",
        "dpg",
        *(name for name in TRAINED if name.partition("(")[0] in FAMILIES),
    }
)
UNTRAINED = {
    "best_of": "it draws and trains nothing: klimb sample --method best_of",
    "rejection": "it draws and trains nothing: klimb sample --method rejection",
    "path_consistency": "its soft values need a critic, which training has not got; log_variance needs none",
}


OF_A_REWARD_MODEL = frozenset(
    [
        "model_name_or_path",
        "model_revision",
        "dtype",
        "device",
        "trust_remote_code",
        "family",
        "dataset_name",
        "dataset_train_split",
        "dataset_test_split",
        "prompt_column",
        "max_prompts",
        "learn_from",
        "judge",
        "label_smoothing",
        "center_rewards_coefficient",
        "beta",
        "method",
        "prompts_per_step",
        "max_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "max_grad_norm",
        "ema_decay",
        "output_dir",
        "save_steps",
        "save_total_limit",
        "report_to",
        "seed",
        "max_chunk_tokens",
    ]
)
"""options that method reward_model looks at; its beta is where the tail of the learned reward is looked at"""


class PlainTilt(BaseModel):
    """The reference tilted by the reward: ref exp(reward / beta)."""

    model_config = STRICT

    kind: Literal["tilt"] = "tilt"


class EntropyBonus(BaseModel):
    """The tilt with a bonus on entropy, which flattens it; needs a beta."""

    model_config = STRICT

    kind: Literal["entropy_bonus"] = "entropy_bonus"
    bonus: Positive
    """worth of entropy, reward per nat"""


class LengthNormalized(BaseModel):
    """The tilt by reward per token; beta and reward_goal count that."""

    model_config = STRICT

    kind: Literal["length_normalized"] = "length_normalized"


class Context(BaseModel):
    """The reference under a context, which the policy learns to do without; Z = 1 and beta is 1."""

    model_config = STRICT

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


class Teacher(BaseModel):
    """Another model of the same vocabulary; Z = 1 and beta is 1."""

    model_config = STRICT

    kind: Literal["teacher"] = "teacher"
    teacher: str
    """hub id or local folder, also of an adapter of this run's model, such as RUN/policy"""
    token_map: Place | None = None
    """of a teacher with another tokenizer: file of JSON, for each token of the model the teacher's number"""


TAUGHT = ("context", "teacher")
"""kinds of target that are a policy themselves"""
BOUND = 0.2
"""most by which a KL controller's relative error counts (a test compares it with klimb.numbers.kl_control)"""

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


class Config(BaseModel):
    """All that a run depends on."""

    model_config = STRICT

    model_name_or_path: str = "smollm2-135m"
    """hub id, local folder with safetensors, or smollm2-135m"""
    model_revision: str = "main"
    """branch, tag or commit of a hub model"""
    dtype: Literal["bfloat16", "float32", "float64", "float16", "nf4"] | None = None
    """of the weights; left out: bfloat16 where the processor has it, else float32; nf4: 4 bits a frozen weight (QLoRA), on a GPU"""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; left out: cuda if there is one"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""
    reference: str | None = None
    """another model of the same tokenizer; left out: the starting policy"""
    family: Annotated[Lora | Full | SoftPrompt | Prefix, Field(discriminator="kind")] = Lora()
    """which weights move"""
    shard: bool = False
    """with several processes (--nproc, torchrun): split layers, gradients and optimizer over them (FSDP2)"""
    sampler: Annotated[OwnSampler | VllmSampler, Field(discriminator="kind")] = OwnSampler()
    """who draws completions"""

    dataset_name: str
    """file of prompts (.jsonl, .csv, .parquet), folder, or id of a data set"""
    dataset_train_split: str = "train"
    """prompts to plan and train on"""
    dataset_test_split: str | None = "test"
    """prompts to measure on; null: the training prompts"""
    prompt_column: str = "prompt"
    """text, or a list of chat messages"""
    max_prompts: Count | None = None
    """plan and train on at most this many prompts, from the start; left out: all"""

    learn_from: Literal["draws", "data"] = "draws"
    """completions that are drawn and rewarded, or those of dataset_name: chosen and rejected, labelled, ranked, or alone"""
    judge: Literal["labels", "scores", "margins"] = "labels"
    """of two completions of data: who won, the chance that the difference of their scores gives, or (reward_model) who won and by how much at least"""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """chance that a label of dpo, wpo or reward_model is wrong"""
    center_rewards_coefficient: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """of reward_model: price of scores whose mean over a prompt's completions is not zero"""

    reward_funcs: list[str | dict[str, Any]] = []
    """a built-in reward, file.py:function, package.module:function, or a sequence-classification model, also with options as {func: NAME, ...}; one or several, none only with learn_from data"""
    reward_weights: list[float] | None = None
    """one a reward; left out: 1 each"""
    reward_cache: Place | None = None
    """file that keeps each value of a reward, so that nothing is scored twice, also in later runs; left out: none"""

    target: Annotated[Aim, Field(discriminator="kind")] = PlainTilt()
    """where to go; the tilt unless said"""
    beta: float | None = None
    """price of KL, reward per nat; give this, kl_budget or reward_goal"""
    kl_budget: Positive | None = None
    """nats the best policy may be away from the reference; the plan finds its beta"""
    reward_goal: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """mean reward the best policy shall have; the plan finds its beta"""

    plan: Place | None = None
    """an earlier run, or its draws/plan.parquet, whose pool is used instead of a new one"""
    num_plan_draws: Annotated[int, Field(ge=2)] = 40
    """reference draws a prompt; they support log(draws) - 2.5 nats"""

    method: str = "log_variance"
    """the objective; klimb methods lists them; distill for a target that is a policy, token by token; reward_model learns a reward from comparisons"""
    divergence: str = "forward_kl"
    """of distill, over the whole vocabulary: forward_kl, reverse_kl, jensen_shannon, skew_kl(0.1), ..."""
    teacher_draws: Annotated[float, Field(ge=0, le=1)] = 1.0
    """of distill: share of the steps that learn from completions of the target; the others from the policy's own"""
    top_k: Count | None = None
    """of distill: the target's likeliest tokens that count one by one, the rest as one; left out: all"""
    sequence_gradient: bool = False
    """of distill, on the policy's own completions: also learn from what a token does to later ones (MiniLLM)"""
    num_generations: Amount = 8
    """fresh completions a prompt in a step"""
    num_replay: Amount = 8
    """kept completions a prompt in a step, the plan's pool at first; left out: 8 for log_variance, else 0"""
    replay_steps: Amount = 0
    """first steps that only replay the plan's pool"""
    keep_fresh: bool = True
    """keep fresh completions to be replayed later"""
    dynamic_sampling: Amount = 0
    """more rounds of prompts that a step draws in the place of those whose draws all have one reward (grpo, dapo, ...)"""
    prompts_per_step: Count = 8
    """prompts in a step"""
    max_steps: Amount = 24
    """optimizer steps"""
    max_completion_length: Count = 32
    """tokens; longer completions are cut"""
    log_z: Literal["plan", "running", "learned"] = "plan"
    """of each prompt, for methods that need it: the plan's, one that every fresh draw goes into, or trajectory_balance's own"""
    log_z_learning_rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """how far a learned log Z goes towards each batch's mean residual"""
    clip: Positive | None = None
    """nats of residual above which a draw counts linearly; left out: never"""
    num_iterations: Count = 1
    """updates with each batch of draws"""
    num_minibatches: Count = 1
    """parts that a batch of prompts is updated in, one after the other"""
    epsilon: Positive | None = None
    """how far the ratio to the policy that drew counts (ppo, grpo, ...); left out: the method's own"""
    epsilon_high: Positive | None = None
    """the same upwards; left out: epsilon"""
    importance_cap: Positive | None = None
    """weights between sampler and trainer are cut here (ppo, grpo, ..., and what weighs draws by their law with sampler vllm); left out: 2 with sampler vllm, else the sampler is believed"""
    kl_stop: Positive | None = None
    """nats from the policy that drew at which a batch is left; left out: never"""
    kl_penalty: (
        Literal["k1_in_reward", "k2_in_reward", "k3_in_reward", "k1_as_loss", "k2_as_loss", "k3_as_loss"]
        | None
    ) = None
    """how KL is charged (rloo, grpo, dr_grpo, ...): k1_in_reward and k2_as_loss are right; left out: the method's own way"""
    kl_target: Positive | None = None
    """nats at which beta, from the one given or planned on, follows to hold KL(policy||reference); left out: beta stays"""
    kl_horizon: Positive = 1000.0
    """completions over which that beta moves by a fifth at most"""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 1.0
    """how far ppo trusts rewards over its critic; below 1 the critic's error biases"""
    value_learning_rate: Positive = 1e-3
    """of ppo's critic"""
    value_clip: Positive | None = None
    """reward that a value may move by in one batch; left out: any"""

    learning_rate: Positive = 5e-4
    """of AdamW"""
    lr_scheduler_type: Literal["linear", "constant", "cosine"] = "linear"
    """linear and cosine end at zero"""
    warmup_steps: Amount = 0
    """steps from zero to learning_rate"""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """of AdamW"""
    adam_beta1: Share = 0.9
    """of AdamW"""
    adam_beta2: Share = 0.999
    """of AdamW"""
    max_grad_norm: Positive = 1.0
    """larger gradients are scaled down to this norm"""
    ema_decay: Share = 0.0
    """decay of a moving average of the weights, which is then what is measured and saved; 0: none"""

    eval_steps: Count | None = None
    """measure on held-out prompts every so many steps; left out: never"""
    eval_prompts: Count = 16
    """held-out prompts of an evaluation during training"""
    eval_draws: Annotated[int, Field(ge=2)] = 8
    """draws a prompt of it, of policy and reference each"""
    measure_prompts: Count = 24
    """held-out prompts of the final measurement"""
    measure_draws: Annotated[int, Field(ge=2)] = 32
    """draws a prompt of it, of policy and reference each"""

    output_dir: Place = "runs/klimb"
    """where everything is written"""
    save_steps: Count = 10
    """steps between checkpoints"""
    save_total_limit: Count = 2
    """checkpoints kept"""
    report_to: list[str] = []
    """trackers that accelerate knows: trackio, wandb, tensorboard, mlflow, ..."""
    seed: Amount = 0
    """of everything random"""
    max_chunk_tokens: Count | None = None
    """completion tokens that go through the model together; left out: 2048 of a small model on a CPU and fewer the wider it is, down to 512 (of one prompt 2048); 4096 on a GPU; less needs less memory"""
    gradient_checkpointing: bool = False
    """keep only what goes into each layer and run it again in the backward pass: less memory for long sequences, a third more time"""
    batch_rows: Count = 192
    """completions drawn side by side"""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Defaults that depend on other fields."""
        if not isinstance(data, Mapping):
            return data
        data = dict(data)
        if data.get("learn_from") == "data":
            data |= {name: 0 for name in DRAWN if data.get(name) is None}
            if all(data.get(name) is None for name in DESTINATIONS):
                data["beta"] = 0.1
        for name, kind in UNIONS.items():
            given = data.get(name)
            if isinstance(given, Mapping) and "kind" not in given:
                said = [
                    own for own in TAUGHT if name == "target" and any(key.startswith(own) for key in given)
                ]
                data[name] = {"kind": said[0] if said else kind, **given}
        target = data.get("target")
        if isinstance(target, Mapping) and target["kind"] in TAUGHT:
            data["beta"] = 1.0 if data.get("beta") is None else data["beta"]
        if all(data.get(name) is None for name in DESTINATIONS):
            data["kl_budget"] = 1.0
        if data.get("num_replay") is None:
            data["num_replay"] = 8 if data.get("method", "log_variance") == "log_variance" else 0
        if data.get("method") == "distill":
            data |= {name: 0 for name in DRAWN[1:] if data.get(name) is None}
        return data

    @field_validator("reward_funcs", mode="before")
    @classmethod
    def _rewards_are_named(cls, value: Any) -> Any:
        each = [value] if isinstance(value, str | Mapping) else value
        for one in each if isinstance(each, list | tuple) else ():
            if not isinstance(one.get("func") if isinstance(one, Mapping) else one, str):
                raise ValueError("expected the name of a reward, or {func: NAME} with its options")
        return each

    @field_validator("report_to", "reward_weights", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | int | float) else value

    @field_validator("beta")
    @classmethod
    def _beta_is_a_price(cls, beta: float | None) -> float | None:
        if beta == 0:
            raise ValueError(
                "beta 0 has no target: without a price on KL the best policy is any that gives the best completion; "
                "give a small positive beta, a kl_budget in nats, or a reward_goal"
            )
        if beta is not None and not (math.isfinite(beta) and beta > 0):
            raise ValueError("expected a positive number, in units of reward per nat")
        return beta

    @field_validator("method")
    @classmethod
    def _method_is_known(cls, method: str) -> str:
        if method in ("distill", "reward_model"):
            return method
        if method in UNTRAINED:
            raise ValueError(UNTRAINED[method])
        stem = method.partition("(")[0]
        if stem in (*FAMILIES, "f_dpo"):
            if not method.endswith(")"):
                like = next(name for name in TRAINED if name.startswith(f"{stem}("))
                raise ValueError(f"expected it with something in brackets, as {like}")
            return method  # what is in them is looked at where divergences are known
        if method not in TRAINED:
            raise ValueError(f"no such method{nearest(method, TRAINED)}; klimb methods lists them")
        return method

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        given = [name for name in DESTINATIONS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"got {' and '.join(f'{name} {getattr(self, name):g}' for name in given)}, expected one of "
                f"{', '.join(DESTINATIONS)}; switch the others off ({' or '.join(f'--{name} null' for name in given)})"
            )
        self._samples_elsewhere()
        self._is_frozen()
        if self.gradient_checkpointing and isinstance(self.family, Prefix):
            raise ValueError(
                "gradient_checkpointing: got family.kind prefix, whose keys and values lie in a memory that a layer run twice would "
                "write twice; leave it out, take a smaller max_chunk_tokens, or family.kind soft_prompt"
            )
        if self.target.kind == "entropy_bonus" and self.beta is None:
            raise ValueError(
                f"target.kind entropy_bonus: got {given[0]} {getattr(self, given[0]):g}, expected a beta: the bonus is "
                "itself so many nats from the reference; give --beta, and --kl_budget null --reward_goal null"
            )
        if self.target.kind != "tilt" and self.method == "filtered":
            raise ValueError(
                f"method filtered keeps what reaches a threshold of the plain reward, which target.kind "
                f"{self.target.kind} is not about; use raft or log_variance, or target.kind tilt"
            )
        if self.method == "reward_model":
            self._learns_a_reward()
            return self
        if self.center_rewards_coefficient or self.judge == "margins":
            asked = "judge margins" if self.judge == "margins" else "center_rewards_coefficient"
            raise ValueError(f"{asked} is of method reward_model, got {self.method}; leave it out")
        self._controls_kl()
        if self.learn_from == "data":
            self._learns_from_data()
            return self
        if self._is_taught():
            return self
        if not self.reward_funcs and self.target.kind not in TAUGHT:
            raise ValueError(
                "no reward_funcs: expected a reward, or learn_from data with completions that are judged already"
            )
        for name in self.touched("judge", "label_smoothing"):
            raise ValueError(f"{name} is about completions of data; use learn_from data, or leave it out")
        if self.num_generations + self.num_replay < 2:
            raise ValueError(
                f"num_generations {self.num_generations} with num_replay {self.num_replay}: {self.method} compares the "
                "draws of one prompt with each other and needs at least 2; use num_generations 2 or more"
            )
        if self.num_generations == 0 and self.replay_steps < self.max_steps:
            raise ValueError(
                f"num_generations 0 leaves nothing to learn from after {self.replay_steps} replay_steps of "
                f"{self.max_steps} max_steps; use num_generations 2 or more, or as many "
                "replay_steps as max_steps"
            )
        replayed = self.num_replay + (self.num_generations if self.replay_steps else 0)
        if replayed > self.num_plan_draws:
            raise ValueError(
                f"a step would replay {replayed} kept draws a prompt, and num_plan_draws is {self.num_plan_draws}; "
                "replay fewer, or plan with more"
            )
        if self.num_minibatches > self.prompts_per_step:
            raise ValueError(
                f"num_minibatches {self.num_minibatches} is more than the {self.prompts_per_step} prompts_per_step; a "
                "minibatch holds whole prompts, one at least"
            )
        self._weighs_rewards()
        return self

    def _is_taught(self) -> bool:
        """True if the target is a policy and nothing else has to be looked at."""
        taught = self.target.kind in TAUGHT
        if self.method == "distill" and not taught:
            raise ValueError(
                f"distill learns from a target that is a policy, got target.kind {self.target.kind}; give target.context, "
                "target.context_file or target.teacher"
            )
        asked = self.touched("divergence", "teacher_draws", "top_k", "sequence_gradient")
        if asked and self.method != "distill":
            raise ValueError(f"{asked[0]} is an option of method distill, got {self.method}; leave it out")
        if not taught:
            return False
        if self.reward_funcs or self.beta != 1.0:
            raise ValueError(
                f"target.kind {self.target.kind} is a law already: no reward_funcs, and beta is 1; leave both out"
            )
        if self.method == "distill":
            self._distils()
        return self.method == "distill"

    def _distils(self) -> None:
        """Refuse what distill does not do, by name."""
        kept = [name for name in DRAWN[1:] if getattr(self, name)]
        if kept or self.num_generations < 1:
            raise ValueError(
                f"distill learns from num_generations fresh completions, one or more, and from nothing kept; leave {', '.join(DRAWN[1:])} out"
            )
        if unread := self.touched(*OF_REWARDED_DRAWS):
            raise ValueError(
                f"{', '.join(unread)}: distill does not read it; leave it out, or use another method"
            )
        if self.sequence_gradient and (self.teacher_draws == 1 or self.num_iterations > 1):
            raise ValueError(
                f"sequence_gradient is of completions that the policy draws as it is: got teacher_draws {self.teacher_draws:g} and "
                f"num_iterations {self.num_iterations}, expected less than 1 and 1"
            )

    def _samples_elsewhere(self) -> None:
        """Refuse what vLLM cannot draw."""
        if not isinstance(self.sampler, VllmSampler):
            return
        if not isinstance(self.family, Lora | Full):
            raise ValueError(
                f"sampler.kind vllm: got family.kind {self.family.kind}, expected lora or full: no server of vLLM has virtual tokens"
            )
        if self.reference is not None or self.target.kind == "teacher":
            other = "a target.teacher" if self.reference is None else f"reference {self.reference}"
            raise ValueError(
                f"sampler.kind vllm: got {other}, expected none: a server has one model, that of policy and reference"
            )
        if self.sampler.steps_ahead and self.sampler.url is None:
            raise ValueError(
                "sampler.steps_ahead: an engine of this process draws while nothing else happens; give sampler.url, or leave it out"
            )
        if self.sampler.steps_ahead and (
            self.learn_from == "data" or self.method == "distill" or self.dynamic_sampling
        ):
            raise ValueError(
                "sampler.steps_ahead: draws ahead go with neither learn_from data, distill nor dynamic_sampling; leave it out"
            )

    def _is_frozen(self) -> None:
        """Refuse what moves, splits or serves weights of 4 bits."""
        refused = {
            "family.kind full": isinstance(self.family, Full),
            "method reward_model": self.method == "reward_model",
            "shard": self.shard,
            "sampler.kind vllm": isinstance(self.sampler, VllmSampler),
        }
        got = [name for name, there in refused.items() if there]
        if self.dtype == "nf4" and got:
            raise ValueError(
                f"dtype nf4 is of frozen weights, whole on each GPU, that klimb itself draws from: got {' and '.join(got)}; leave it "
                "out, or take another dtype"
            )

    def _weighs_rewards(self) -> None:
        if self.reward_weights is not None and len(self.reward_weights) != len(self.reward_funcs):
            raise ValueError(
                f"got {len(self.reward_weights)} reward_weights for {len(self.reward_funcs)} reward_funcs, "
                "expected as many of each"
            )

    def _learns_from_data(self) -> None:
        """Refuse what only draws have."""
        drawn = [name for name in DRAWN if getattr(self, name)]
        if drawn:
            raise ValueError(
                f"learn_from data draws nothing to learn from: got {', '.join(f'{n} {getattr(self, n)}' for n in drawn)}; leave it out"
            )
        if self.beta is None:
            raise ValueError(
                "learn_from data: no plan finds a beta for a kl_budget or reward_goal without draws; give a beta"
            )
        if self.plan is not None or self.eval_steps is not None or self.kl_target is not None:
            raise ValueError(
                "learn_from data has no plan, no evaluation in between and no kl_target; leave plan, eval_steps and kl_target out"
            )
        if self.target.kind != "tilt":
            raise ValueError(f"learn_from data: got target.kind {self.target.kind}, expected tilt")
        self._weighs_rewards()

    def _learns_a_reward(self) -> None:
        """Refuse what has no part in learning a reward from comparisons."""
        if self.learn_from != "data":
            raise ValueError(
                "reward_model learns from completions that somebody compared, got learn_from draws; use learn_from data with chosen "
                "and rejected, or with completions and scores"
            )
        idle = [
            name
            for name in type(self).model_fields
            if name not in OF_A_REWARD_MODEL
            and (getattr(self, name) if name in DRAWN else name in self.touched(name))
        ]
        if idle:
            raise ValueError(
                f"reward_model has no use for {', '.join(idle)}: it draws nothing and reads whole completions; leave "
                f"{'it' if len(idle) == 1 else 'them'} out"
            )
        start = self.family.start if isinstance(self.family, Lora) else None
        if not isinstance(self.family, Lora | Full) or start is not None:
            raise ValueError(
                "reward_model: expected family lora without start, or full; to go on from a reward model name its folder as "
                "model_name_or_path"
            )
        if self.judge == "scores" and self.label_smoothing:
            raise ValueError(
                "label_smoothing is of labels that may be wrong, got judge scores, which are chances already; leave it out"
            )

    def _controls_kl(self) -> None:
        """Refuse a KL controller that could not work."""
        if self.kl_target is None:
            if self.touched("kl_horizon"):
                raise ValueError(
                    "kl_horizon is how slowly beta follows a kl_target, and there is none; give kl_target, or leave it out"
                )
            return
        if self.target.kind == "entropy_bonus":
            raise ValueError(
                "kl_target moves beta, and target.kind entropy_bonus is made of a beta and a bonus; leave one of them out"
            )
        if self.num_generations == 0:
            raise ValueError(
                "kl_target needs fresh draws to measure the KL on, and num_generations is 0; use 2 or more"
            )
        drawn = self.prompts_per_step * self.num_generations
        if drawn * BOUND >= self.kl_horizon:
            raise ValueError(
                f"kl_horizon {self.kl_horizon:g} is too short for {drawn} completions a step, which could bring beta to zero "
                f"at once; use more than {drawn * BOUND:g}, ten times that at best"
            )

    def touched(self, *names: str) -> list[str]:
        """Those of the options that are not what they are unless said."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]

    @property
    def product(self) -> str:
        """The folder of a run that holds what was trained."""
        return "reward_model" if self.method == "reward_model" else "policy"

    @property
    def needs_plan(self) -> bool:
        """True if training cannot begin without a pool of reference draws."""
        return (
            self.learn_from == "draws"
            and self.method != "distill"
            and (
                self.beta is None
                or self.num_replay > 0
                or self.replay_steps > 0
                or self.plan is not None
                or self.needs_log_z
            )
        )

    @property
    def needs_log_z(self) -> bool:
        """True if the method cannot do without log Z of each prompt, which the plan's pool gives."""
        return self.method in NEED_LOG_Z or self.method.partition("(")[0] in FAMILIES
