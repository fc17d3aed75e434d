"""The family of prefixes: trained keys and values that every layer sees before the prompt; all weights stay.

n virtual tokens, L layers, H heads of keys and values, W their width, D width of the model. A soft prompt is n D numbers, which the
layers read; this is what they would remember of it, 2 n L H W numbers, and nothing has to be read. Kept as peft's prefix tuning
(without its projection), which `from_pretrained` loads.

Source: Li, Liang, "Prefix-tuning: optimizing continuous prompts for generation", 2021.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klimb.models.policy import CausalPolicy
from klimb.models.room import remembering
from klimb.models.soft_prompt import WEIGHTS, save_virtual, soft_prompt


def prefix(
    model: Any,
    tokenizer: Any,
    *,
    num_virtual_tokens: int,
    init: str | None = None,
    seed: int = 0,
    max_chunk_tokens: int | None = None,
) -> tuple[CausalPolicy, CausalPolicy]:
    """Keys and values move, the model does not. Returns (policy, reference); the reference has none.

    They start as what the layers remember of the soft prompt that would start from the same text.

    Args:
        model: a loaded causal language model.
        tokenizer: its tokenizer.
        num_virtual_tokens: n.
        init: as of `klimb.models.soft_prompt.soft_prompt`.
        seed: likewise.
        max_chunk_tokens: how many completion tokens go through the model together.

    Raises:
        ValueError: a text of no tokens; an architecture whose layers do not all remember keys and values of all tokens, or whose
            logits klimb cannot form.
    """
    policy, reference = soft_prompt(
        model,
        tokenizer,
        num_virtual_tokens=num_virtual_tokens,
        init=init,
        seed=seed,
        max_chunk_tokens=max_chunk_tokens,
    )
    assert policy.virtual is not None
    own = remembered(model, policy.virtual.detach()).requires_grad_()
    return replace(reference, prefix=own, trainable=(own,)), reference


@torch.no_grad()
def remembered(model: Any, embeddings: Tensor) -> Tensor:
    """[n, D] embedded tokens -> [n, L, 2, H, W] the keys and values that the layers keep of them.

    Raises:
        ValueError: some layer keeps something else, or only of the last tokens.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    model.get_decoder()(inputs_embeds=embeddings[None], **remembering(model, cache))
    kept: list[tuple[Any, Any]] = [
        (layer.keys, layer.values) for layer in cache.layers if type(layer) is DynamicLayer
    ]
    if len(kept) < len(cache.layers) or len({x.shape for pair in kept for x in pair}) > 1:
        raise ValueError(
            f"prefix: {type(model).__name__} has layers that do not remember keys and values of all tokens alike; use family "
            "soft_prompt, which goes with any architecture"
        )
    whole = torch.stack([torch.stack([x[0] for x in pair]) for pair in kept])
    return whole.permute(3, 0, 1, 2, 4).contiguous()


def save_prefix(policy: CausalPolicy, folder: str | Path) -> None:
    """Write keys and values as a peft adapter."""
    from peft import PrefixTuningConfig

    assert policy.prefix is not None
    n, layers, _, heads, width = policy.prefix.shape
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=n,
        token_dim=heads * width,
        num_transformer_submodules=1,
        num_attention_heads=heads,
        num_layers=layers,
        encoder_hidden_size=heads * width,
        base_model_name_or_path=getattr(policy.model.config, "_name_or_path", None),
        inference_mode=True,
    )
    save_virtual(config, policy.prefix.reshape(n, -1), folder)


def load_prefix(reference: CausalPolicy, folder: str | Path) -> CausalPolicy:
    """The policy of the keys and values in a folder, before the reference's prompts.

    Raises:
        ValueError: they are not of this model's layers, or come through a projection.
    """
    from safetensors.torch import load_file

    flat = load_file(Path(folder) / "adapter_model.safetensors").get(WEIGHTS)
    one = remembered(reference.model, reference.model.get_input_embeddings().weight[:1])[0]
    if flat is None or flat.ndim != 2 or flat.shape[1] != one.numel():
        got = "no prompt_embeddings" if flat is None else f"a prefix of shape {list(flat.shape)}"
        raise ValueError(f"{folder}: got {got}, expected [n, {one.numel()}] for this model")
    own = flat.reshape(-1, *one.shape).to(reference.device, reference.model.dtype)
    return replace(reference, prefix=own)
