"""Which tensors may move: all of them (`full`), or low-rank adapters beside a frozen model (`lora`).

A family makes a policy and its reference from one loaded model. The reference is the policy as it starts. With LoRA
it needs no second copy of the weights: it is the same model with the adapter off, or, when training goes on from an
adapter, with that starting adapter kept frozen beside the one that moves.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from klimb.models.hub import weights_of
from klimb.models.low_rank import fuse_adapters
from klimb.models.policy import CausalPolicy, adapters, check_head
from klimb.models.prefix import load_prefix, save_prefix
from klimb.models.sharded import gathered
from klimb.models.soft_prompt import load_soft_prompt, save_soft_prompt

VIRTUAL = {"PROMPT_TUNING": load_soft_prompt, "PREFIX_TUNING": load_prefix}
"""peft's names of adapters that are virtual tokens -> how to load them"""


def full(
    model: Any, tokenizer: Any, *, max_chunk_tokens: int | None = None
) -> tuple[CausalPolicy, CausalPolicy]:
    """Every weight moves; the reference is a frozen copy. Returns (policy, reference).

    Raises:
        ValueError: an architecture whose logits klimb cannot form from its hidden states; weights of 4 bits.
    """
    if weights_of(model) == "nf4":
        raise ValueError("full: got weights of 4 bits (nf4), which cannot move; use lora, or another dtype")
    model.eval()  # dropout would make the same text score differently each time
    reference = CausalPolicy(
        copy.deepcopy(model).requires_grad_(False), tokenizer, max_chunk_tokens=max_chunk_tokens
    )
    check_head(reference)
    model.requires_grad_(True)
    moving = tuple(dict.fromkeys(model.parameters()))  # tied weights once
    return CausalPolicy(model, tokenizer, trainable=moving, max_chunk_tokens=max_chunk_tokens), reference


def lora(
    model: Any,
    tokenizer: Any,
    *,
    r: int = 16,
    alpha: float = 32,
    target_modules: str | list[str] = "all-linear",
    layers: int | None = None,
    start: str | Path | None = None,
    seed: int = 0,
    max_chunk_tokens: int | None = None,
) -> tuple[CausalPolicy, CausalPolicy]:
    """Low-rank adapters move: W + (alpha / r) B A, B zero at first. Returns (policy, reference).

    Args:
        model: a loaded causal language model; the adapter layers are put inside it.
        tokenizer: its tokenizer.
        r: rank.
        alpha: scale of the adapter.
        target_modules: which linear layers; "all-linear" means all but the head.
        layers: adapt only the last so many layers; None: all. Below them nothing is differentiated, so a step is
            cheaper, and fewer weights remember less of the draws they were trained on.
        start: folder of an adapter to go on from; the reference is then that adapter, frozen.
        seed: of A's random start.
        max_chunk_tokens: how many completion tokens go through the model together; left out, what keeps the device busy.

    Raises:
        ValueError: `start` is no LoRA adapter, or one that also replaces whole layers or adapts the head, where it
            could not be turned off for the reference; an architecture whose logits klimb cannot form.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    if start is None:
        config = LoraConfig(
            r=r,
            lora_alpha=alpha,  # ty: ignore[invalid-argument-type]  # peft divides it, an int is not needed
            lora_dropout=0.0,
            target_modules=target_modules if layers is None else last_layers(model, target_modules, layers),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]), quietly():  # peft draws A from the global generator
            torch.manual_seed(seed)
            wrapped = get_peft_model(model, config, adapter_name="policy", autocast_adapter_dtype=False)
        speaks_as_reference = None
    else:
        _check_adapter(Path(start))
        with quietly():
            wrapped = PeftModel.from_pretrained(
                model, start, adapter_name="policy", is_trainable=True, autocast_adapter_dtype=False
            )
            wrapped.load_adapter(
                start, adapter_name="reference", is_trainable=False, autocast_adapter_dtype=False
            )
        speaks_as_reference = "reference"
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ValueError(
            "lora: an adapter on the output embedding is not supported; leave the head out of target_modules"
        )
    wrapped.eval()
    fuse_adapters(wrapped)
    moving = []
    for name, parameter in wrapped.named_parameters():
        parameter.requires_grad_(".policy." in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)
            moving.append(parameter)
    policy = CausalPolicy(
        model,
        tokenizer,
        activate=partial(adapters, wrapped, active="policy"),
        trainable=tuple(moving),
        max_chunk_tokens=max_chunk_tokens,
    )
    reference = CausalPolicy(
        model,
        tokenizer,
        activate=partial(adapters, wrapped, active=speaks_as_reference),
        max_chunk_tokens=max_chunk_tokens,
    )
    check_head(reference)
    return policy, reference


def save_policy(
    policy: CausalPolicy, folder: str | Path, *, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write what `from_pretrained` loads: a peft adapter if there is one, otherwise the whole model.

    `state` is what `whole_state` gave, where layers are split over ranks.
    """
    if policy.num_virtual:
        (save_prefix if policy.virtual is None else save_soft_prompt)(policy, folder)
        policy.tokenizer.save_pretrained(folder)
        return
    saved, adapted = _saved_module(policy)
    given = {} if state is None else {"state_dict": dict(state)}
    if adapted:
        save_adapter(saved, "policy", folder, **given)
    else:
        saved.save_pretrained(folder, safe_serialization=True, **given)
    policy.tokenizer.save_pretrained(folder)


def save_base(policy: CausalPolicy, folder: str | Path) -> None:
    """Write the model that a policy stands on, without any adapter that lies in it, as `from_pretrained` loads it."""
    weights = policy.model.state_dict()
    plain = {name.replace(".base_layer.", "."): x for name, x in weights.items() if ".lora_" not in name}
    policy.model.save_pretrained(folder, safe_serialization=True, state_dict=plain)


def whole_state(policy: CausalPolicy) -> dict[str, Tensor] | None:
    """The weights to be saved, on the CPU; None where no layer is split over ranks. All ranks call this together."""
    if policy.sharded.world == 1:
        return None
    saved, adapted = _saved_module(policy)
    weights = {name: x for name, x in saved.state_dict().items() if ".lora_" in name or not adapted}
    return {name: gathered(x).cpu() for name, x in weights.items()}


def _saved_module(policy: CausalPolicy) -> tuple[Any, bool]:
    """The module whose `save_pretrained` writes the policy, and whether it writes an adapter."""
    adapter = speaking_adapter(policy)
    return (policy.model, False) if adapter is None else (adapter[0], True)


def speaking_adapter(policy: CausalPolicy) -> tuple[Any, str | None] | None:
    """The peft model that a policy's layers belong to, and which of its adapters speaks; None where there is no such model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not isinstance(policy.activate, partial):
        return None
    wrapped = policy.activate.args[0]
    if not any(isinstance(m, BaseTunerLayer) for m in wrapped.modules()):
        return None
    return wrapped, policy.activate.keywords["active"]


def save_adapter(wrapped: Any, name: str, folder: str | Path, **given: Any) -> None:
    """Write one adapter of a peft model as peft itself loads it."""
    wrapped.save_pretrained(folder, selected_adapters=[name], safe_serialization=True, **given)
    _lift(Path(folder) / name, Path(folder))


def adapter_kind(folder: str | Path) -> str | None:
    """Peft's name for the adapter in a folder, such as LORA; None where there is none."""
    config = adapter_config(folder)
    return None if config is None else str(config.get("peft_type"))


def adapter_config(folder: str | Path) -> dict[str, Any] | None:
    """What peft says of the adapter in a folder; None where there is none."""
    file = Path(folder) / "adapter_config.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _check_adapter(folder: Path) -> None:
    config = adapter_config(folder)
    if config is None:
        raise ValueError(
            f"adapter {str(folder)!r}: no adapter_config.json there; expected a folder saved by peft"
        )
    whole = [name for name in ("modules_to_save", "trainable_token_indices") if config.get(name)]
    if config.get("peft_type") != "LORA" or whole:
        raise ValueError(
            f"adapter {str(folder)!r}: got peft_type {config.get('peft_type')} "
            f"{'with ' + ' and '.join(whole) if whole else ''}; expected a LoRA adapter without whole layers: merge it "
            "into its model and start from that"
        )


def last_layers(model: Any, target_modules: str | list[str], layers: int) -> list[str]:
    """Full names of the target modules in the last `layers` layers.

    Raises:
        ValueError: the model has fewer layers, or none of the modules is there.
    """
    total = model.config.get_text_config().num_hidden_layers
    if layers > total:
        raise ValueError(f"lora: got layers {layers}, but the model has {total}; take at most as many")
    kept = {str(i) for i in range(total - layers, total)}
    wanted = [target_modules] if isinstance(target_modules, str) else target_modules
    names = [
        name
        for name, module in model.get_decoder().named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and next((part for part in name.split(".") if part.isdigit()), None)
        in kept  # the first: experts come later
        and (wanted == ["all-linear"] or name.rsplit(".", 1)[-1] in wanted)
    ]
    if not names:
        raise ValueError(
            f"lora: no module {target_modules} in the last {layers} layers; see the model's module names"
        )
    return names


@contextmanager
def quietly() -> Generator[None]:
    """Without two warnings about what peft itself does, which no user can act on; all others pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False", UserWarning)
        yield


def _lift(inner: Path, folder: Path) -> None:
    """Peft writes a named adapter into a folder of its name; tools look for it one level up."""
    for path in inner.iterdir():
        path.replace(folder / path.name)
    inner.rmdir()
