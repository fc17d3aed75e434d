"""The models that a configuration names: the policy that moves, the reference that is tilted, and a policy that is the target."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from klimb.config import Config, Context, Full, Lora, Prefix, Teacher
from klimb.models.families import adapter_kind, full, lora
from klimb.models.hub import DTYPES, load_model
from klimb.models.policy import CausalPolicy, check_head
from klimb.models.prefix import prefix
from klimb.models.renumbered import read_numbers, renumber
from klimb.models.soft_prompt import soft_prompt
from klimb.models.trained import load_trained
from klimb.nearest import nearest, nearest_file


def context_of(config: Config) -> str | None:
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


def policies_of(
    config: Config, policy_folder: str | Path | None, context: str | None
) -> tuple[CausalPolicy, CausalPolicy]:
    """The policy and its reference.

    Args:
        config: the configuration.
        policy_folder: the policy that is measured or sampled; None makes a new one, to be trained.
        context: the text of a target that is one; virtual tokens may begin as it.

    Raises:
        ValueError: a model or a policy that is not there or does not fit.
    """
    options = options_of(config)
    model, tokenizer = load_model(config.model_name_or_path, revision=config.model_revision, **options)
    if policy_folder is None:
        policy, reference = _new(config, model, tokenizer, context)
    else:
        start = config.family.start if isinstance(config.family, Lora) else None
        try:
            policy, reference = load_trained(
                policy_folder,
                model,
                tokenizer,
                start=start,
                max_chunk_tokens=config.max_chunk_tokens,
                **options,
            )
        except SafetensorError as error:
            raise ValueError(
                f"{policy_folder}: its weights cannot be read ({error}); copy them again, or train once more"
            ) from error
    if config.reference is not None:
        reference = _own_reference(config, config.reference, policy)
    return policy, reference


def _new(
    config: Config, model: Any, tokenizer: Any, context: str | None
) -> tuple[CausalPolicy, CausalPolicy]:
    """A policy of the configured family, to be trained, and the model as it is."""
    family, size = config.family, config.max_chunk_tokens
    if isinstance(family, Lora):
        _check_modules(model, family.target_modules)
        return lora(
            model,
            tokenizer,
            r=family.r,
            alpha=family.alpha,
            target_modules=family.target_modules,
            layers=family.layers,
            start=family.start,
            seed=config.seed,
            max_chunk_tokens=size,
        )
    if isinstance(family, Full):
        return full(model, tokenizer, max_chunk_tokens=size)
    return (prefix if isinstance(family, Prefix) else soft_prompt)(
        model,
        tokenizer,
        num_virtual_tokens=family.num_virtual_tokens,
        init=context if family.init == "context" else None if family.init == "random" else family.init,
        seed=config.seed,
        max_chunk_tokens=size,
    )


def _own_reference(config: Config, name: str, policy: CausalPolicy) -> CausalPolicy:
    """A reference that is another model than the one the policy starts from."""
    other, words = load_model(name, **options_of(config))
    if words.get_vocab() != policy.tokenizer.get_vocab():
        raise ValueError(
            f"reference {name}: its tokenizer has other words than that of "
            f"{config.model_name_or_path}; expected a model of the same tokenizer"
        )
    reference = CausalPolicy(other, words, max_chunk_tokens=config.max_chunk_tokens)
    check_head(reference)
    if set(reference.end) != set(policy.end):
        raise ValueError(
            f"reference {name}: completions end with the tokens {sorted(reference.end)}, those of "
            f"{config.model_name_or_path} with {sorted(policy.end)}; set the same eos_token_id in both "
            "generation_config.json"
        )
    return reference


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


def teacher_of(config: Config, reference: CausalPolicy, context: str | None) -> CausalPolicy:
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
