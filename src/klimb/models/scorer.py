"""A model with one logit that is trained: a language model's trunk and a head of one number, as `from_pretrained` writes it.

A head that is not in the weights starts at zero, so that every score is zero and every comparison a coin. Adapters
(family lora) are merged into the saved weights: what comes out is a plain sequence-classification model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klimb.models.families import last_layers, quietly
from klimb.models.hub import resolve
from klimb.models.low_rank import fuse_adapters
from klimb.models.policy import CHUNK_TOKENS


@dataclass(frozen=True)
class Scorer:
    """A sequence-classification model with one output, some of whose weights move.

    Attributes:
        model: what transformers loads; adapters are inside it.
        tokenizer: its tokenizer, with a token to pad with.
        trainable: the weights that move.
        wrapped: peft's model around it, where there are adapters.
        max_chunk_tokens: tokens, padding too, that go through the model together; None: what keeps the device busy.
    """

    model: Any
    tokenizer: Any
    trainable: tuple[Tensor, ...]
    wrapped: Any = None
    max_chunk_tokens: int | None = None

    @property
    def chunk_tokens(self) -> int:
        """Tokens that go through the model together."""
        return self.max_chunk_tokens or CHUNK_TOKENS.get(self.model.device.type, 512)

    @property
    def context_length(self) -> int:
        """Tokens that prompt and completion may have together."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", 1 << 30)

    def parameters(self) -> Iterable[Tensor]:
        """The trainable tensors."""
        return self.trainable


def load_scorer(
    name: str,
    *,
    lora: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    revision: str = "main",
    trust_remote_code: bool = False,
    seed: int = 0,
    max_chunk_tokens: int | None = None,
) -> Scorer:
    """A causal language model, or a reward model to go on from, with a head of one number.

    Args:
        name: hub id, folder, or an alias of `klimb.models.hub`.
        lora: r, alpha, target_modules and layers of adapters in the trunk (the head moves whole); None: every weight moves.
        dtype: of the weights.
        device: where they go.
        revision: of a hub model.
        trust_remote_code: run Python code that comes with the model.
        seed: of what starts at random: the adapters' A, and layers of a head below its last.
        max_chunk_tokens: see `Scorer`.

    Raises:
        ValueError: no such model, or its architecture has no sequence-classification model in transformers; weights of the
            trunk are missing; nothing to pad with.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from klimb.rewards.model import ready_to_pad

    place = resolve(name)
    code = {"revision": revision, "trust_remote_code": trust_remote_code}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            loaded: Any = AutoModelForSequenceClassification.from_pretrained(
                place, num_labels=1, dtype=dtype, use_safetensors=True, output_loading_info=True, **code
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(place, **code)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"model {name!r} cannot be loaded as a reward model: {first}; expected a hub id or a folder with config.json, "
                "tokenizer and safetensors, of an architecture that transformers has for sequence classification"
            ) from error
    model, report = loaded
    trunk = f"{model.base_model_prefix}."
    missing = sorted(report["missing_keys"])
    if lacking := [key for key in missing if key.startswith(trunk)]:
        raise ValueError(
            f"model {name!r}: its safetensors lack {len(lacking)} of the weights that config.json asks for "
            f"({', '.join(lacking[:3])}, ...); expected a whole model"
        )
    ready_to_pad(model, tokenizer, f"model {name!r}")
    heads = dict(model.named_parameters())
    for key in missing:
        if heads[key].shape[0] == 1:
            torch.nn.init.zeros_(heads[key])
    model.to(device).eval()  # dropout would make the same text score differently each time
    head = [p for key, p in heads.items() if not key.startswith(trunk)]
    if lora is None:
        model.requires_grad_(True)
        return Scorer(model, tokenizer, tuple(model.parameters()), None, max_chunk_tokens)
    wrapped = _adapted(model, seed=seed, **lora)
    adapters = [p for key, p in wrapped.named_parameters() if ".lora_" in key]
    for parameter in adapters:
        parameter.data = parameter.data.to(dtype)
    for parameter in (moving := (*adapters, *head)):
        parameter.requires_grad_(True)
    return Scorer(model, tokenizer, moving, wrapped, max_chunk_tokens)


def _adapted(
    model: Any, *, r: int, alpha: float, target_modules: str | list[str], layers: int | None, seed: int
) -> Any:
    from peft import LoraConfig, get_peft_model

    total = model.config.get_text_config().num_hidden_layers
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,  # ty: ignore[invalid-argument-type]  # peft divides it, an int is not needed
        lora_dropout=0.0,
        target_modules=last_layers(model, target_modules, total if layers is None else layers),
    )
    with torch.random.fork_rng(devices=[]), quietly():  # peft draws A from the global generator
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=False)
    wrapped.eval()
    fuse_adapters(wrapped)
    return wrapped


def save_scorer(scorer: Scorer, folder: str | Path) -> None:
    """Write a sequence-classification model and its tokenizer; adapters are merged, and gone from the model in memory.

    Merged weights are float32: bfloat16 would round small adapters away.
    """
    model = scorer.model
    if scorer.wrapped is not None:
        model = scorer.wrapped.float().merge_and_unload()
    model.save_pretrained(folder, safe_serialization=True)
    scorer.tokenizer.save_pretrained(folder)


def rows_of(lengths: Sequence[int], group: int, max_tokens: int) -> list[list[int]]:
    """Groups of rows that go through the model together, the shortest first: at most `max_tokens` with padding, one at least.

    Args:
        lengths: the longest text of each row, tokens.
        group: texts a row.
        max_tokens: of a piece.

    Example:
        >>> rows_of([5, 3, 9], 2, 20)
        [[1, 0], [2]]
    """
    pieces: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if pieces and (len(pieces[-1]) + 1) * group * lengths[i] <= max_tokens:
            pieces[-1].append(i)
        else:
            pieces.append([i])
    return pieces
