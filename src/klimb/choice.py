"""From the configuration's method to the objective that is trained, and what it needs around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from inspect import Parameter, signature
from typing import Any

from torch import Tensor

from klimb.config import TRAINED, Config
from klimb.methods import (
    KL_PENALTIES,
    METHODS,
    PENALISED,
    Method,
    method,
    takes_penalty,
    weighs_by_law,
    with_penalty,
    working_with,
    works,
)
from klimb.numbers.advantages import gae_advantage
from klimb.objectives.clip import clipped
from klimb.objectives.f_divergence import f_divergence
from klimb.objectives.generators import divergence
from klimb.objectives.importance import importance, truncated
from klimb.objectives.kl_penalty import CELLS
from klimb.objectives.preference import given, logistic

Numbers = Callable[..., Tensor]

SERVER_CAP = 2.0
"""where weights between a vLLM server and the trainer are cut unless said"""


@dataclass(frozen=True)
class Choice:
    """What a training step asks of a method.

    Attributes:
        objective: numbers -> [P], its options set.
        derived: numbers made once for a batch of draws, before it is learned from.
        in_nats: True if the objective is in nats, and is multiplied by beta to be in units of reward.
        needs_log_z: True if it cannot do without log Z of each prompt, which the plan's pool gives, or gives at first.
        has_critic: True if a critic learns the returns among the derived numbers.
        fresh_only: True if kept draws are of no use to it: its advantages hold for the policy that drew.
    """

    objective: Numbers
    derived: Mapping[str, Numbers]
    in_nats: bool
    needs_log_z: bool
    has_critic: bool
    fresh_only: bool


def chosen(config: Config) -> Choice:
    """The objective that `config.method` names, with its options.

    Raises:
        ValueError: an option that this method does not have, or replay for one that cannot use it.

    Example:
        >>> from klimb.config import load
        >>> words = ["--dataset_name", "a.jsonl", "--reward_funcs", "math:hypot", "--method", "grpo"]
        >>> chosen(load(None, words)).fresh_only
        True
    """
    if config.method in ("distill", "reward_model"):
        raise ValueError(
            f"{config.method} has no objective of draws; see klimb.distil and klimb.reward_model"
        )
    row = method(config.method)
    assert row.objective is not None, config.method
    for message in refusals(config, row):
        raise ValueError(message)
    objective, derived = row.objective, dict(row.derived)
    if config.clip is not None:
        objective = partial(objective, clip=config.clip)
    if bounds := _ratio_bounds(config):
        objective = partial(objective, clip=partial(_clip_of(row), **bounds))
    if (cap := importance_cap(config)) is not None and "correct" in signature(objective).parameters:
        limit = partial(truncated, cap=cap)
        objective = partial(objective, correct=partial(importance, limit=limit))
    if config.kl_penalty is not None:
        penalised = with_penalty(replace(row, objective=objective, derived=derived), config.kl_penalty)
        assert penalised.objective is not None
        objective, derived = penalised.objective, dict(penalised.derived)
    if config.learn_from == "data":
        objective = _judging_data(config, objective)
    has_critic = "returns" in derived
    if has_critic:
        derived["token_advantage"] = partial(gae_advantage, lam=config.gae_lambda)
    return Choice(
        objective=objective,
        derived=derived,
        in_nats=row.unit == "nats",
        needs_log_z=needs_log_z(row),
        has_critic=has_critic,
        fresh_only=fresh_only(row),
    )


def check_method(config: Config) -> None:
    """Refuse a method, or a divergence of distill, that is not there or does not go with the rest.

    Raises:
        ValueError: which, and what would.

    Example:
        >>> from klimb.config import load
        >>> words = ["--dataset_name", "a.jsonl", "--method", "distill", "--target.context", "Be brief."]
        >>> check_method(load(None, [*words, "--divergence", "skew_kl(0.1)"]))
    """
    if config.method == "distill":
        divergence(config.divergence)
    else:
        chosen(config)


def _judging_data(config: Config, objective: Numbers) -> Numbers:
    """An objective that compares, with who won in the place of a reward's chances."""
    options = signature(objective).parameters
    if "judge" in options and config.judge == "labels":
        objective = partial(objective, judge=given)
    if config.label_smoothing:
        objective = partial(objective, link=partial(logistic, smoothing=config.label_smoothing))
    return objective


def refusals(config: Config, row: Method) -> Iterator[str]:
    """What `config` asks of its method that the method has not, a message each."""
    assert row.objective is not None
    name, options, fresh = config.method, signature(row.objective).parameters, fresh_only(row)
    yield from _refused_data(config, row)
    if config.clip is not None and (fresh or "clip" not in options):
        yield (
            f"clip bounds a residual, and {name} has none; leave clip out, or use a method such as log_variance"
        )
    now = _clip_of(row)
    if _ratio_bounds(config) and (not fresh or getattr(now, "func", now) is not clipped):
        yield (
            f"epsilon bounds the ratio to the policy that drew, and {name} does not clip it; leave epsilon out, or use a "
            "method such as ppo or grpo"
        )
    weighed = config.sampler.kind == "vllm" and weighs_by_law(row.objective)
    if config.importance_cap is not None and "correct" not in options and not weighed:
        yield (
            f"importance_cap bounds the weight between sampler and trainer, and {name} has none; leave it out, or use a "
            "method such as ppo or grpo"
        )
    if config.kl_penalty is not None and not takes_penalty(row):
        yield (
            f"kl_penalty {config.kl_penalty}: the KL of {name} is a part of what it makes small; leave it out, or use one of "
            f"{', '.join(PENALISED)}"
        )
    if fresh and (config.num_replay or config.replay_steps):
        yield (
            f"{name} learns from fresh draws alone, since its advantages hold for the policy that drew: got num_replay "
            f"{config.num_replay} and replay_steps {config.replay_steps}, expected 0 of both; or use log_variance, which "
            "learns from any draws"
        )
    if config.dynamic_sampling and not fresh:
        yield (
            f"dynamic_sampling leaves out prompts whose draws all have one reward, and {name} learns from those too; leave "
            "it out, or use a method such as grpo or dapo"
        )
    if config.num_iterations > 1 and not fresh and "log_q" not in options and name != "log_variance":
        yield (
            f"num_iterations {config.num_iterations}: {name} does not know how old its draws are; use 1, or kept draws "
            "(num_replay)"
        )
    if config.kl_target is not None and needs_log_z(row):
        yield (
            f"kl_target moves beta, and {name} needs log Z, which the plan knows for one beta; leave kl_target out, or use "
            "a method such as ppo or log_variance"
        )
    if config.log_z == "running" and not needs_log_z(row):
        yield (
            f"log_z running: {name} asks for no log Z; leave log_z out, or use a method such as jensen_shannon or "
            "trajectory_balance"
        )
    if config.log_z == "learned" and name != "trajectory_balance":
        yield (
            f"log_z learned: {name} has no gradient in log Z; use log_z plan or running, or method trajectory_balance"
        )
    if config.log_z != "learned" and config.touched("log_z_learning_rate"):
        yield (
            f"log_z_learning_rate is of a learned log Z, and log_z is {config.log_z}; leave it out, or use log_z learned"
        )
    of_a_critic = config.touched("gae_lambda", "value_learning_rate", "value_clip")
    if of_a_critic and "returns" not in row.derived:
        yield f"{', '.join(of_a_critic)}: {name} has no critic; leave it out, or use method ppo"


def _refused_data(config: Config, row: Method) -> Iterator[str]:
    """What learning from data does not go with."""
    name = config.method
    known = {"log_target", "log_ref", "reward", "beta", "lengths"}
    if config.learn_from == "draws":
        if name == "sft":
            yield (
                "sft: on the policy's own draws it learns nothing; raft and filtered learn from the good ones among them; for a "
                "file of completions use learn_from data"
            )
        return
    if not works(row, known) or fresh_only(row):
        can = [other for other in working_with(known) if other in TRAINED and not fresh_only(METHODS[other])]
        yield (
            f"learn_from data: {name} needs the law that drew the completions, log Z, or fresh draws, and data has none of them; "
            f"use one of {', '.join(can)}"
        )
        return
    assert row.objective is not None
    link = signature(row.objective).parameters.get("link")
    if config.label_smoothing and (link is None or link.default is not logistic):
        yield f"label_smoothing: {name} has no logistic of a margin; leave it out, or use dpo"
    if config.judge == "scores" and name in ("kto", "bco", "sft"):
        yield f"judge scores: {name} compares nothing; leave it out, or use dpo"


def caution(config: Config) -> str | None:
    """What to say of a KL penalty that is none; None where it is right.

    Example:
        >>> from klimb.config import load
        >>> words = ["--dataset_name", "a.jsonl", "--reward_funcs", "math:hypot", "--method", "dr_grpo"]
        >>> caution(load(None, [*words, "--kl_penalty", "k2_as_loss"])) is None
        True
        >>> caution(load(None, [*words, "--kl_penalty", "k1_as_loss"])).partition(";")[0]
        'kl_penalty k1_as_loss: wrong: zero, noise that penalises nothing'
    """
    if config.kl_penalty is None:
        return None
    cell = CELLS[KL_PENALTIES[config.kl_penalty]]
    if cell.right:
        return None
    right = " and ".join(name for name, key in KL_PENALTIES.items() if CELLS[key].right)
    return f"kl_penalty {config.kl_penalty}: {cell.says}; right are {right}"


def importance_cap(config: Config) -> float | None:
    """Where the weight of a draw between sampler and trainer is cut; None where the sampler is believed."""
    if config.importance_cap is not None or config.sampler.kind != "vllm":
        return config.importance_cap
    return SERVER_CAP


def fresh_only(row: Method) -> bool:
    """True if kept draws are of no use to it: its advantages hold for the policy that drew.

    Example:
        >>> from klimb.methods import METHODS
        >>> fresh_only(METHODS["grpo"]), fresh_only(METHODS["log_variance"])
        (True, False)
    """
    return row.unit == "reward"


def _ratio_bounds(config: Config) -> dict[str, float]:
    bounds = {"low": config.epsilon, "high": config.epsilon_high or config.epsilon}
    return {name: x for name, x in bounds.items() if x is not None}


def _clip_of(row: Method) -> Any:
    """How a row bounds the ratio to the policy that drew, or None."""
    assert row.objective is not None
    options = signature(row.objective).parameters
    return options["clip"].default if "clip" in options else None


def needs_log_z(row: Method) -> bool:
    """True if the objective has log_z among the numbers it cannot do without.

    Example:
        >>> from klimb.methods import METHODS
        >>> [name for name in ("log_variance", "jensen_shannon") if needs_log_z(METHODS[name])]
        ['jensen_shannon']
    """
    if row.objective is None:
        return False
    found = signature(row.objective).parameters.get("log_z")
    return found is not None and found.default is Parameter.empty


def takes_forbidden(name: str) -> bool:
    """True if the method can learn where some completions are forbidden (reward -inf).

    Example:
        >>> takes_forbidden("forward_kl"), takes_forbidden("jensen_shannon"), takes_forbidden("log_variance")
        (True, True, False)
    """
    objective = method(name).objective
    if isinstance(objective, partial) and objective.func is f_divergence:
        return divergence(objective.keywords["f"]).takes_forbidden
    return name in ("forward_kl", "dpg", "raft", "filtered")
