"""All that a run depends on, as one schema.

Names are TRL's where the meaning is the same. A batch is `prompts_per_step` prompts with `num_generations` fresh
completions each: nothing is divided by anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from klimb.config.kinds import (
    TAUGHT,
    UNIONS,
    Aim,
    Full,
    Lora,
    OwnSampler,
    PlainTilt,
    Prefix,
    SoftPrompt,
    VllmSampler,
)
from klimb.config.methods import DRAWN, FAMILIES, NEED_LOG_Z, TRAINED, UNTRAINED
from klimb.config.together import DESTINATIONS, check_together
from klimb.config.values import Amount, Count, Name, Part, Place, Positive, Real, Seed, Share, Whole
from klimb.nearest import nearest


class Config(Part):
    """All that a run depends on."""

    model_name_or_path: Name = "smollm2-135m"
    """hub id, local folder with safetensors, or smollm2-135m"""
    model_revision: Name = "main"
    """branch, tag or commit of a hub model"""
    dtype: Literal["bfloat16", "float32", "float64", "float16", "nf4"] | None = None
    """of the weights; left out: bfloat16 where the processor has it, else float32; nf4: 4 bits a frozen weight (QLoRA), on a GPU"""
    device: Name | None = None
    """cpu, cuda, cuda:1, ...; left out: cuda if there is one"""
    trust_remote_code: bool = False
    """run Python code that comes with the model"""
    reference: Name | None = None
    """another model of the same tokenizer; left out: the starting policy"""
    family: Annotated[Lora | Full | SoftPrompt | Prefix, Field(discriminator="kind")] = Lora()
    """which weights move"""
    shard: bool = False
    """with several processes (--nproc, torchrun): split layers, gradients and optimizer over them (FSDP2)"""
    sampler: Annotated[OwnSampler | VllmSampler, Field(discriminator="kind")] = OwnSampler()
    """who draws completions"""

    dataset_name: Name
    """file of prompts (.jsonl, .csv, .parquet), folder, or id of a data set"""
    dataset_train_split: Name = "train"
    """prompts to plan and train on"""
    dataset_test_split: Name | None = "test"
    """prompts to measure on; null: the training prompts"""
    prompt_column: Name = "prompt"
    """text, or a list of chat messages"""
    max_prompts: Count | None = None
    """plan and train on at most this many prompts, from the start; left out: all"""

    learn_from: Literal["draws", "data"] = "draws"
    """completions that are drawn and rewarded, or those of dataset_name: chosen and rejected, labelled, ranked, or alone"""
    judge: Literal["labels", "scores", "margins"] = "labels"
    """of two completions of data: who won, the chance that the difference of their scores gives, or (reward_model) who won and by how much at least"""
    label_smoothing: Annotated[Real, Field(ge=0, lt=0.5)] = 0.0
    """chance that a label of dpo, wpo or reward_model is wrong"""
    center_rewards_coefficient: Annotated[Real, Field(ge=0, allow_inf_nan=False)] = 0.0
    """of reward_model: price of scores whose mean over a prompt's completions is not zero"""

    reward_funcs: list[str | dict[str, Any]] = Field([])
    """a built-in reward, file.py:function, package.module:function, or a sequence-classification model, also with options as {func: NAME, ...}; one or several, none only with learn_from data"""
    reward_weights: list[float] | None = None
    """one a reward; left out: 1 each"""
    reward_cache: Place | None = None
    """file that keeps each value of a reward, so that nothing is scored twice, also in later runs; left out: none"""

    target: Annotated[Aim, Field(discriminator="kind")] = PlainTilt()
    """where to go; the tilt unless said"""
    beta: Real | None = None
    """price of KL, reward per nat; give this, kl_budget or reward_goal"""
    kl_budget: Positive | None = None
    """nats the best policy may be away from the reference; the plan finds its beta"""
    reward_goal: Annotated[Real, Field(allow_inf_nan=False)] | None = None
    """mean reward the best policy shall have; the plan finds its beta"""

    plan: Place | None = None
    """an earlier run, or its draws/plan.parquet, whose pool is used instead of a new one"""
    num_plan_draws: Annotated[Whole, Field(ge=2)] = 40
    """reference draws a prompt; they support log(draws) - 2.5 nats"""

    method: str = "log_variance"
    """the objective; klimb methods lists them; distill for a target that is a policy, token by token; reward_model learns a reward from comparisons"""
    divergence: str = "forward_kl"
    """of distill, over the whole vocabulary: forward_kl, reverse_kl, jensen_shannon, skew_kl(0.1), ..."""
    teacher_draws: Annotated[Real, Field(ge=0, le=1)] = 1.0
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
    log_z_learning_rate: Annotated[Real, Field(gt=0, le=1)] = 0.1
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
    gae_lambda: Annotated[Real, Field(ge=0, le=1)] = 1.0
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
    weight_decay: Annotated[Real, Field(ge=0, allow_inf_nan=False)] = 0.0
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
    eval_draws: Annotated[Whole, Field(ge=2)] = 8
    """draws a prompt of it, of policy and reference each"""
    measure_prompts: Count = 24
    """held-out prompts of the final measurement"""
    measure_draws: Annotated[Whole, Field(ge=2)] = 32
    """draws a prompt of it, of policy and reference each"""

    output_dir: Place = "runs/klimb"
    """where everything is written"""
    save_steps: Count = 10
    """steps between checkpoints"""
    save_total_limit: Count = 2
    """checkpoints kept"""
    report_to: list[str] = Field([])
    """trackers that accelerate knows: trackio, wandb, tensorboard, mlflow, ..."""
    seed: Seed = 0
    """of everything random"""
    max_chunk_tokens: Count | None = None
    """completion tokens that go through the model together; left out: on a CPU 2048 of a tiny model and fewer the wider it is (1024 of one 576 wide), down to 512 (of one prompt 2048); 4096 on a GPU; less needs less memory"""
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
        for one in each if isinstance(each, list | tuple) else [each]:
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
        check_together(self)
        return self

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
