"""From a configuration to what it names: prompts, reward, policy and reference, checked before anything is written.

Cheap things first: a misspelt file is refused before a model is loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from safetensors import SafetensorError

from klimb.choice import check_method, chosen
from klimb.comparisons import Judged, load_judged
from klimb.config import TAUGHT, Config, Context, Full, Lora, Prefix, Teacher, VllmSampler
from klimb.data import Example, Reward, Sampler
from klimb.dataset import load_examples
from klimb.models.families import adapter_kind, full, lora
from klimb.models.hub import DTYPES, load_model, require_four_bits
from klimb.models.policy import CausalPolicy, check_head
from klimb.models.prefix import prefix
from klimb.models.renumbered import read_numbers, renumber
from klimb.models.sharded import shard
from klimb.models.soft_prompt import soft_prompt
from klimb.models.trained import load_trained
from klimb.nearest import nearest, nearest_file
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
    context = _context(config)
    policy, reference = (replace(who, ranks=ranks) for who in _policies(config, policy_folder, context))
    policy = replace(policy, gradient_checkpointing=config.gradient_checkpointing)
    teacher = _teacher(config, reference, context) if config.target.kind in TAUGHT else None
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


def _context(config: Config) -> str | None:
    """The text of a target that is a context."""
    aim = config.target
    if not isinstance(aim, Context):
        return None
    if aim.context is not None:
        return aim.context
    assert aim.context_file is not None
    file = Path(aim.context_file)
    if not file.is_file():
        raise ValueError(f"target.context_file {file}: no such file{nearest_file(file)}")
    try:
        text = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if not text:
        raise ValueError(f"{file}: the context is empty; there is nothing to learn from it")
    return text


def _teacher(config: Config, reference: CausalPolicy, context: str | None) -> CausalPolicy:
    """The policy that is the target."""
    if context is not None:
        return replace(reference, context=context)
    assert isinstance(config.target, Teacher)
    name = config.target.teacher
    teacher = _named_teacher(name, config)
    if config.target.token_map is not None:
        size, own = (who.head.weight.shape[0] for who in (reference, teacher))
        renumber(teacher.model, read_numbers(config.target.token_map, size=size, own_size=own))
        teacher = replace(teacher, tokenizer=reference.tokenizer, end=reference.end)
    words = teacher.tokenizer
    if words.get_vocab() != reference.tokenizer.get_vocab():
        raise ValueError(
            f"target.teacher {name}: its tokenizer has other words than that of {config.model_name_or_path} "
            f"({len(words.get_vocab())} and {len(reference.tokenizer.get_vocab())}); expected a model of the same tokenizer, or "
            "target.token_map with the teacher's number for each token: no law of the next token is shared between two"
        )
    check_head(teacher)
    sizes = [who.head.weight.shape[0] for who in (teacher, reference)]
    if sizes[0] != sizes[1] or set(teacher.end) != set(reference.end):
        raise ValueError(
            f"target.teacher {name}: got {sizes[0]} logits and the ends {sorted(teacher.end)}, expected {sizes[1]} and "
            f"{sorted(reference.end)} as of {config.model_name_or_path}"
        )
    return teacher


def _named_teacher(name: str, config: Config) -> CausalPolicy:
    """A model, or an adapter of klimb or peft, beside a second copy of the model of the run."""
    folder, size, options = os.path.expanduser(name), config.max_chunk_tokens, options_of(config)
    if adapter_kind(folder) is None:
        model, words = load_model(name, **options)
        return CausalPolicy(model, words, max_chunk_tokens=size)
    model, words = load_model(config.model_name_or_path, revision=config.model_revision, **options)
    teacher, _ = load_trained(folder, model, words, max_chunk_tokens=size)
    for weight in teacher.parameters():
        weight.requires_grad_(False)
    return replace(teacher, trainable=())


def options_of(config: Config) -> dict[str, Any]:
    """How models are loaded.

    Raises:
        ValueError: there is no such device.
    """
    return {
        "dtype": None if config.dtype is None else DTYPES.get(config.dtype),
        "nf4": config.dtype == "nf4",
        "device": _device(config.device),
        "trust_remote_code": config.trust_remote_code,
    }


def _device(name: str | None) -> str:
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return "cuda" if cards else "cpu"
    try:
        torch.empty(0, device=name)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # a name that is none, or a card that is not there
        there = ", ".join(["cpu", *(["cuda"] if cards else []), *(f"cuda:{i}" for i in range(cards))])
        raise ValueError(
            f"device: got {name!r}, which torch cannot use here; expected one of {there}"
        ) from error
    return name


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


def _policies(
    config: Config, policy_folder: str | Path | None, context: str | None
) -> tuple[CausalPolicy, CausalPolicy]:
    options = options_of(config)
    size = config.max_chunk_tokens
    model, tokenizer = load_model(config.model_name_or_path, revision=config.model_revision, **options)
    start = config.family.start if isinstance(config.family, Lora) else None
    if policy_folder is not None:
        try:
            policy, reference = load_trained(
                policy_folder, model, tokenizer, start=start, max_chunk_tokens=size, **options
            )
        except SafetensorError as error:
            raise ValueError(
                f"{policy_folder}: its weights cannot be read ({error}); copy them again, or train once more"
            ) from error
    elif isinstance(config.family, Lora):
        _check_modules(model, config.family.target_modules)
        policy, reference = lora(
            model,
            tokenizer,
            r=config.family.r,
            alpha=config.family.alpha,
            target_modules=config.family.target_modules,
            layers=config.family.layers,
            start=start,
            seed=config.seed,
            max_chunk_tokens=size,
        )
    elif isinstance(config.family, Full):
        policy, reference = full(model, tokenizer, max_chunk_tokens=size)
    else:
        init = config.family.init
        policy, reference = (prefix if isinstance(config.family, Prefix) else soft_prompt)(
            model,
            tokenizer,
            num_virtual_tokens=config.family.num_virtual_tokens,
            init=context if init == "context" else None if init == "random" else init,
            seed=config.seed,
            max_chunk_tokens=size,
        )
    if config.reference is not None:
        other, words = load_model(config.reference, **options)
        if words.get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"reference {config.reference}: its tokenizer has other words than that of "
                f"{config.model_name_or_path}; expected a model of the same tokenizer"
            )
        reference = CausalPolicy(other, words, max_chunk_tokens=size)
        check_head(reference)
        if set(reference.end) != set(policy.end):
            raise ValueError(
                f"reference {config.reference}: completions end with the tokens {sorted(reference.end)}, those of "
                f"{config.model_name_or_path} with {sorted(policy.end)}; set the same eos_token_id in both "
                "generation_config.json"
            )
    return policy, reference


def _num_tokens(example: Example, policy: CausalPolicy) -> int:
    try:
        return len(policy.render(example))
    except TemplateError as error:  # of some models it takes no system message, or wants turns in order
        raise ValueError(
            f"the chat template of the model refuses the prompt {str(example.prompt)[:60]!r}...: {error}; change its messages, or give "
            "it as text"
        ) from error


def _check_modules(model: torch.nn.Module, wanted: str | list[str]) -> None:
    """Refuse the name of a layer that is not there: of several, peft passes over it and says nothing."""
    if isinstance(wanted, str):  # a pattern
        return
    layers = [name for name, _ in model.named_modules()]
    for one in wanted:
        if not any(f".{name}".endswith(f".{one}") for name in layers):
            there = sorted(
                {
                    name.rpartition(".")[2]
                    for name, part in model.named_modules()
                    if isinstance(part, torch.nn.Linear)
                }
            )
            raise ValueError(
                f"family.target_modules: no layer is called {one!r}{nearest(one, there)}; there are {', '.join(there)}"
            )


def fingerprint(policy: CausalPolicy, *, numbers: int = 64) -> str:
    """A sha256 over the configuration and, of each of the weights, its name, shape, dtype and some of its numbers."""
    active = policy.activate.keywords.get("active") if isinstance(policy.activate, partial) else None
    digest = hashlib.sha256(f"{policy.model.config.model_type} {sorted(policy.end)} {active}".encode())
    for name, weight in sorted(policy.model.state_dict().items()):
        if ".lora_" in name and f".{active}." not in name:
            continue  # of an adapter that does not speak
        flat = weight.flatten()
        some = flat[:: max(1, len(flat) // numbers)].double().cpu()
        digest.update(f"{name.replace('.base_layer', '')} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(some.numpy().tobytes())
    for own in (policy.virtual, policy.prefix):
        if own is not None:
            digest.update(own.detach().double().cpu().numpy().tobytes())
    return digest.hexdigest()


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
