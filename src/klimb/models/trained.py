"""A trained policy as training left it on disk, and the reference that it began as."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from klimb.models.families import VIRTUAL, adapter_kind, lora
from klimb.models.hub import load_model
from klimb.models.policy import CausalPolicy, adapters, check_head


def load_trained(
    folder: str | Path,
    model: Any,
    tokenizer: Any,
    *,
    start: str | Path | None = None,
    max_chunk_tokens: int | None = None,
    **options: Any,
) -> tuple[CausalPolicy, CausalPolicy]:
    """Put an adapter or virtual tokens beside the model they were trained on, or load a whole model. Returns (policy, reference).

    Args:
        folder: what `save_policy` wrote, or peft, or `save_pretrained`.
        model: what it was trained from; adapters are put inside it.
        tokenizer: its tokenizer.
        start: folder of the adapter that an adapter went on from; with it the reference speaks.
        max_chunk_tokens: how many completion tokens go through the model together.
        **options: how a whole model is loaded (`klimb.models.hub.load_model`).

    Raises:
        ValueError: no such folder, or not a policy, or an adapter of another model.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder; expected a trained policy, such as RUN/policy")
    kind = adapter_kind(folder)
    if kind in VIRTUAL:
        reference = CausalPolicy(model, tokenizer, max_chunk_tokens=max_chunk_tokens)
        check_head(reference)
        return VIRTUAL[kind](reference, folder), reference
    if kind is not None:
        try:
            policy, reference = lora(model, tokenizer, start=folder, max_chunk_tokens=max_chunk_tokens)
        except (RuntimeError, KeyError) as error:  # peft's, of shapes that differ
            raise ValueError(
                f"{folder}: this adapter does not fit the model {model.config._name_or_path}; expected one that was trained from it "
                f"({str(error).splitlines()[0]})"
            ) from error
        assert isinstance(policy.activate, partial)
        wrapped = policy.activate.args[0]
        wrapped.delete_adapter("reference")  # the policy as it ended is not where it started
        if start is not None:
            wrapped.load_adapter(
                start, adapter_name="reference", is_trainable=False, autocast_adapter_dtype=False
            )
        speaks = None if start is None else "reference"
        return policy, replace(reference, activate=partial(adapters, wrapped, active=speaks))
    moved, _ = load_model(str(folder), **options)
    policy, reference = (
        CausalPolicy(x, tokenizer, max_chunk_tokens=max_chunk_tokens) for x in (moved, model)
    )
    check_head(policy)
    check_head(reference)
    return policy, reference
