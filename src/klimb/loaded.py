"""From a configuration to what it names: prompts, reward, policy and reference, checked before anything is written.

Cheap things first: a misspelt file is refused before a model is loaded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from klimb.choice import check_method, chosen
from klimb.comparisons import Judged, load_judged
from klimb.config import TAUGHT, Config, VllmSampler
from klimb.data import Example, Reward, Sampler
from klimb.dataset import load_examples
from klimb.models.hub import require_four_bits
from klimb.models.policy import CausalPolicy
from klimb.models.sharded import shard
from klimb.named_models import context_of, fingerprint, options_of, policies_of, teacher_of
from klimb.pool import prompts_at_once
from klimb.ranks import ALONE, Ranks
from klimb.rewards.cache import reward_cache
from klimb.rewards.load import load_reward, no_reward
from klimb.rewards.log_ratio import LogRatio
from klimb.rewards.source_hash import source_hash
from klimb.rewards.weighted_sum import check_columns, weighted_sum
from klimb.samplers.ancestral import ancestral
from klimb.samplers.shared import shared
from klimb.samplers.vllm import Vllm
from klimb.samplers.vllm_inside import Inside, start
from klimb.samplers.vllm_server import Server
from klimb.trackers import check_trackers


@dataclass(frozen=True)
class Loaded:
    """What a configuration names, loaded.

    Attributes:
        config: the configuration.
        policy: what moves.
        reference: what is tilted.
        reward: the weighted sum.
        train_examples: to plan and train on.
        test_examples: to measure on.
        sampler: at temperature 1, by the model itself or by a vLLM server that has been looked at.
        hashes: what a pool of draws depends on.
        judged: with learn_from data, the judged completions to learn from; else none.
        judged_test: those held out.
        teacher: where the target is a policy: that policy.
        ranks: who shares the work.
    """

    config: Config
    policy: CausalPolicy
    reference: CausalPolicy
    reward: Reward
    train_examples: Sequence[Example]
    test_examples: Sequence[Example]
    sampler: Sampler
    hashes: Mapping[str, str]
    judged: Sequence[Judged] = ()
    judged_test: Sequence[Judged] = ()
    teacher: CausalPolicy | None = None
    ranks: Ranks = ALONE


def prepare(config: Config, *, policy_folder: str | Path | None = None, ranks: Ranks = ALONE) -> Loaded:
    """Load and check everything that a run needs, cheap things first; nothing is written.

    Args:
        config: the configuration.
        policy_folder: the policy that is measured or sampled; None makes a new one, to be trained.
        ranks: who shares the work of drawing and scoring.

    Raises:
        ValueError: a prompt, reward, model or tracker that is not there or does not fit.
    """
    check_method(config)
    check_trackers(config.report_to)
    if config.dtype == "nf4":
        require_four_bits(options_of(config)["device"])
    judged, judged_test = _judged(config) if config.learn_from == "data" else ([], [])
    if judged:
        train_examples, test_examples = ([row.example for row in rows] for rows in (judged, judged_test))
        test_examples = list({str(example.prompt): example for example in test_examples}.values())
    else:
        read = partial(load_examples, config.dataset_name, prompt_column=config.prompt_column)
        train_examples = read(split=config.dataset_train_split)
        if config.dataset_test_split is None:
            test_examples = train_examples
        else:
            test_examples = read(split=config.dataset_test_split)
    reward = weighted_sum(
        [load_reward(spec) for spec in config.reward_funcs] or [no_reward],
        config.reward_weights,
        cache=None if config.reward_cache is None else reward_cache(config.reward_cache),
    )
    reward = replace(reward, ranks=ranks)
    check_columns(
        reward, dict.fromkeys(name for x in [*train_examples, *test_examples] for name in x.columns)
    )
    context = context_of(config)
    policy, reference = (replace(who, ranks=ranks) for who in policies_of(config, policy_folder, context))
    policy = replace(policy, gradient_checkpointing=config.gradient_checkpointing)
    teacher = teacher_of(config, reference, context) if config.target.kind in TAUGHT else None
    if teacher is not None:
        teacher = replace(teacher, ranks=ranks)
        reward = LogRatio(teacher, reference)
    everyone = [who for who in (policy, reference, teacher) if who is not None]
    longest = 0
    for example in [*train_examples, *test_examples]:
        for who in everyone:
            tokens = _num_tokens(example, who)
            longest = max(longest, tokens)
            if tokens + config.max_completion_length > who.context_length:
                virtual = f" beside {who.num_virtual} virtual tokens" if who.num_virtual else ""
                raise ValueError(
                    f"the prompt {str(example.prompt)[:60]!r}... has {tokens} tokens; with max_completion_length "
                    f"{config.max_completion_length} that is longer than the model's context of {who.context_length}{virtual}; "
                    "shorten one"
                )
    sampler = _sampler(config, reference, train_examples[0], longest, ranks)
    hashes = {
        "model": fingerprint(reference),
        "reward": source_hash(reward)
        if teacher is None
        else _sha256(f"{fingerprint(teacher)} {teacher.context}"),
        "template": _sha256(str(reference.tokenizer.chat_template)),
        "max_completion_length": str(config.max_completion_length),
        **({"data": _sha256(repr(judged))} if judged else {}),
    }
    if config.shard and ranks.world > 1:
        if teacher is not None:
            raise ValueError(
                "shard: got a target that is a policy, whose layers are not split; leave out shard"
            )
        policy, reference = shard(policy, reference, ranks)
    return Loaded(
        config=config,
        policy=policy,
        reference=reference,
        reward=reward,
        train_examples=train_examples[: config.max_prompts],
        test_examples=test_examples,
        sampler=sampler,
        hashes=hashes,
        judged=judged[: config.max_prompts],
        judged_test=judged_test,
        teacher=teacher,
        ranks=ranks,
    )


def _sampler(
    config: Config, reference: CausalPolicy, example: Example, longest: int, ranks: Ranks
) -> Sampler:
    """Who draws, with all ranks; vLLM is asked for a few draws first, to see that it has this model."""
    length, asked = config.max_completion_length, config.sampler
    if asked.kind == "ancestral":
        own: Any = partial(ancestral, max_completion_length=length, batch_rows=config.batch_rows)
        shares: Any = partial(shared, sampler=own)
        return own if ranks.world == 1 else shares
    try:
        if asked.url is None:
            engines: list[Any] = [_inside(asked, reference, longest + length, ranks)]
        else:
            urls = [asked.url] if isinstance(asked.url, str) else asked.url
            # what one rank lacks (a package) is said by all, before they speak of anything else
            engines = ranks.together(lambda: [Server(url) for url in urls])
        sampler: Any = Vllm(engines=engines, max_completion_length=length, keep=asked.steps_ahead + 3)
        sampler.check(reference, example)
    except ValueError as error:
        raise ValueError(f"sampler: {error}") from error
    return sampler


def _inside(asked: VllmSampler, reference: CausalPolicy, longest: int, ranks: Ranks) -> Inside:
    if ranks.world > 1:
        raise ValueError(
            f"kind vllm without a url, an engine of this process, got {ranks.world} processes, expected one; start servers and give "
            "their addresses (docs/sampling.md)"
        )
    return start(reference, longest=longest, memory=asked.gpu_memory_utilization)


def _judged(config: Config) -> tuple[list[Judged], list[Judged]]:
    """The judged completions to learn from, and those held out."""
    read = partial(
        load_judged,
        config.dataset_name,
        prompt_column=config.prompt_column,
        by_scores=config.judge == "scores",
    )
    judged = read(split=config.dataset_train_split)
    size = len(judged[0].completions)
    if size < 2 and "judge" in signature(chosen(config).objective).parameters:
        raise ValueError(
            f"method {config.method} compares completions of one prompt, and {config.dataset_name} has one a row; use kto or bco "
            "where they are labelled, sft where they are not, or give chosen and rejected"
        )
    return judged, judged if config.dataset_test_split is None else read(split=config.dataset_test_split)


def _num_tokens(example: Example, policy: CausalPolicy) -> int:
    try:
        return len(policy.render(example))
    except TemplateError as error:  # of some models it takes no system message, or wants turns in order
        raise ValueError(
            f"the chat template of the model refuses the prompt {str(example.prompt)[:60]!r}...: {error}; change its messages, or give "
            "it as text"
        ) from error


def generator_for(seed: int, purpose: str) -> torch.Generator:
    """A generator of its own for every purpose of a run.

    Example:
        >>> a, b = generator_for(0, "plan"), generator_for(0, "train")
        >>> a.initial_seed() == b.initial_seed()
        False
    """
    return torch.Generator().manual_seed(int(_sha256(f"{seed} {purpose}")[:15], 16))


def depends(loaded: Loaded, examples: Sequence[Example], num_draws: int) -> dict[str, str]:
    """All that draws of these prompts depend on, by name: hashes, seed, how many of which prompts, and how many prompts go together."""
    return {
        **loaded.hashes,
        "seed": str(loaded.config.seed),
        "prompts": _sha256(" ".join(example.id for example in examples)),
        "draws a prompt": str(num_draws),
        "prompts a part": str(prompts_at_once(num_draws)),
    }


def reward_hashes(loaded: Loaded) -> dict[str, str]:
    """The sha256 of each reward's code, by its name."""
    if loaded.teacher is not None:
        return {"teacher": loaded.hashes["reward"]}
    parts: Any = loaded.reward
    return {name: source_hash(part) for name, part in parts.rewards.items()}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
