"""A sequence-classification model as a reward: its one logit, read off prompt and completion together.

Conversations are written with the model's own chat template where it has one. Weights are safetensors only,
no code comes with them, scores are float32, nothing is random.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from klimb.data import Prompt
from klimb.models.hub import DTYPES


@dataclass(frozen=True)
class ModelReward:
    """A reward that is a model; called under the contract of `klimb.rewards.load`.

    Attributes:
        name: the last part of its folder or id.
        source_hash: sha256 of the folder's files, or of the id and its revision on the hub.
        batch_size: texts scored at once, of about the same length.
    """

    name: str
    source_hash: str
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)
    batch_size: int = 16

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Any], **_: object) -> list[float]:
        """One logit a completion.

        Raises:
            ValueError: prompt and completion together are longer than the model reads; nothing is cut off.
        """
        ids = [written(self.tokenizer, p, c) for p, c in zip(prompts, completions, strict=True)]
        limit = self.model.config.get_text_config().max_position_embeddings
        longest = max(map(len, ids), default=0)
        if longest > limit:
            raise ValueError(
                f"got a prompt and completion of {longest} tokens, "
                f"expected at most {limit}, which is all the model reads; "
                f"shorten the prompts or max_completion_length"
            )
        scores = [0.0] * len(ids)
        by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
        for start in range(0, len(ids), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            with torch.inference_mode():
                logits = logits_of(self.model, self.tokenizer, [ids[i] for i in rows])
            for i, value in zip(rows, logits.tolist(), strict=True):
                scores[i] = value
        return scores


def written(tokenizer: Any, prompt: Prompt, completion: Any) -> list[int]:
    """Token ids of prompt and completion together, as a sequence-classification model reads them."""
    if isinstance(prompt, str):
        return tokenizer(prompt + completion, verbose=False)["input_ids"]
    messages = [*prompt, *completion]
    if tokenizer.chat_template is None:
        return tokenizer("\n".join(m["content"] for m in messages), verbose=False)["input_ids"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # the template wrote them


def logits_of(model: Any, tokenizer: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """[N] the one logit of each of N rows of token ids, float32 or wider; padding is on the right."""
    batch = tokenizer.pad({"input_ids": [list(r) for r in rows]}, padding_side="right", return_tensors="pt")
    logits = model(**batch.to(model.device)).logits[:, 0]
    return logits if logits.dtype == torch.float64 else logits.float()


def ready_to_pad(model: Any, tokenizer: Any, who: str) -> None:
    """Agree on a token to pad with: decoders read the score at the last token that is not padding.

    Raises:
        ValueError: there is none.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"{who}: its tokenizer has no padding token and no end of sequence; set one")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def model_reward(
    name_or_path: str | Path,
    *,
    batch_size: int = 16,
    device: str = "cpu",
    dtype: torch.dtype | str = torch.float32,
) -> ModelReward:
    """Load a sequence-classification model with one output, by folder or hub id, as a reward.

    Text prompts are joined to their completion as they are; messages go through the chat template, or without
    one are joined by line breaks. A tokenizer's special tokens are added where no template wrote them.
    Padding is on the right.

    Args:
        name_or_path: the folder or id.
        batch_size: texts scored at once.
        device: where it runs.
        dtype: of the weights, also by its name; scores are float32 whatever it is.

    Raises:
        ValueError: no such dtype, there is no such model, its weights are not safetensors, its head is not in them or has
            more than one output, or its tokenizer has nothing to pad with.

    Not the same as TRL, which adds no special tokens to plain text either.
    """
    name = os.path.expanduser(name_or_path)
    if (Path(name) / "reward_model").is_dir():
        raise ValueError(
            f"reward model {name}: got the directory of a run, expected the model in it: {Path(name) / 'reward_model'}"
        )
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ValueError(
                f"reward model {name}: dtype: got {dtype!r}, expected one of {', '.join(DTYPES)}"
            )
        dtype = DTYPES[dtype]
    try:
        model, loading = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=1,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"reward model {name}: cannot be loaded: {str(error).strip().partition(chr(10))[0]}; expected a folder or hub id of a "
            f"sequence-classification model with one output, in safetensors "
            f"(for a function write file.py:function or package.module:function)"
        ) from error
    if loading["missing_keys"]:
        raise ValueError(
            f"reward model {name}: the weights hold no {', '.join(sorted(loading['missing_keys'])[:3])}, "
            f"so its score would be random; expected a model trained for sequence classification"
        )
    ready_to_pad(model, tokenizer, f"reward model {name}")
    return ModelReward(
        name=Path(name).resolve().name if Path(name).is_dir() else name.rpartition("/")[2],
        source_hash=folder_hash(Path(name), model.config, *([] if dtype == torch.float32 else [str(dtype)])),
        model=model.eval().requires_grad_(False).to(device),
        tokenizer=tokenizer,
        batch_size=batch_size,
    )


def folder_hash(folder: Path, config: Any, *beside: str) -> str:
    """A sha256 of a model's files, or of its id and revision on the hub, and of what else its score depends on.

    Raises:
        ValueError: it is no folder, and the configuration names no revision of the hub.
    """
    digest = hashlib.sha256("".join(beside).encode())
    if not folder.is_dir():
        revision = getattr(config, "_commit_hash", None)
        if revision is None:
            raise ValueError(
                f"model {folder}: got neither a folder nor a revision of the hub, so nothing would tell when its weights change; "
                "expected the folder that save_pretrained wrote, or a hub id"
            )
        digest.update(f"{folder}@{revision}".encode())
    for file in sorted(
        p for p in folder.glob("*") if p.suffix in {".json", ".jinja", ".safetensors", ".model", ".txt"}
    ):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
