"""The family of soft prompts: a few trained vectors before the prompt, where a text would be embedded; all weights stay.

n virtual tokens, D width. Kept as peft's prompt tuning, which `from_pretrained` loads.

Source: Lester, Al-Rfou, Constant, "The power of scale for parameter-efficient prompt tuning", 2021.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klimb.models.policy import CausalPolicy, check_head

WEIGHTS = "prompt_embeddings"


def soft_prompt(
    model: Any,
    tokenizer: Any,
    *,
    num_virtual_tokens: int,
    init: str | None = None,
    seed: int = 0,
    max_chunk_tokens: int | None = None,
) -> tuple[CausalPolicy, CausalPolicy]:
    """Virtual tokens move, the model does not. Returns (policy, reference); the reference has none.

    Args:
        model: a loaded causal language model.
        tokenizer: its tokenizer.
        num_virtual_tokens: n.
        init: a text whose first n embeddings they start as; a short one is repeated. None: the embeddings of tokens drawn at
            random. (Means of runs of a long text would hold all of it, but no layer has ever read such a thing.)
        seed: of that.
        max_chunk_tokens: how many completion tokens go through the model together.

    Raises:
        ValueError: a text of no tokens; an architecture whose logits klimb cannot form.
    """
    model.eval()
    model.requires_grad_(False)
    reference = CausalPolicy(model, tokenizer, max_chunk_tokens=max_chunk_tokens)
    check_head(reference)
    table = model.get_input_embeddings()
    if init is None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(table.num_embeddings, (num_virtual_tokens,), generator=generator)
        start = table(ids.to(model.device))
    else:
        ids = tokenizer(init, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"soft_prompt: the text {init!r} to start from has no tokens")
        many = ids * (num_virtual_tokens // len(ids) + 1)
        start = table(torch.tensor(many[:num_virtual_tokens], device=model.device))
    virtual = start.detach().clone().requires_grad_()
    return replace(reference, virtual=virtual, trainable=(virtual,)), reference


def save_soft_prompt(policy: CausalPolicy, folder: str | Path) -> None:
    """Write the virtual tokens as a peft adapter."""
    from peft import PromptTuningConfig

    assert policy.virtual is not None
    config = policy.model.config.get_text_config()
    own = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(policy.virtual),
        token_dim=policy.virtual.shape[1],
        num_transformer_submodules=1,
        num_attention_heads=config.num_attention_heads,
        num_layers=config.num_hidden_layers,
        base_model_name_or_path=getattr(policy.model.config, "_name_or_path", None),
        inference_mode=True,
    )
    save_virtual(own, policy.virtual, folder)


def save_virtual(config: Any, weights: Tensor, folder: str | Path) -> None:
    """Write a peft configuration and its virtual tokens, [n, anything]."""
    from safetensors.torch import save_file

    Path(folder).mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file({WEIGHTS: weights.detach().cpu().contiguous()}, Path(folder) / "adapter_model.safetensors")


def load_soft_prompt(reference: CausalPolicy, folder: str | Path) -> CausalPolicy:
    """The policy of the virtual tokens in a folder, before the reference's prompts.

    Raises:
        ValueError: they are not as wide as the model.
    """
    from safetensors.torch import load_file

    virtual: Tensor = load_file(Path(folder) / "adapter_model.safetensors")[WEIGHTS]
    width = reference.model.get_input_embeddings().weight.shape[1]
    if virtual.ndim != 2 or virtual.shape[1] != width:
        raise ValueError(
            f"{folder}: got virtual tokens of shape {list(virtual.shape)}, expected [n, {width}] for this model"
        )
    return replace(reference, virtual=virtual.to(reference.device, reference.model.dtype))
