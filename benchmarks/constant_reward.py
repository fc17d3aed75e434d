"""A fault put in on purpose: a reward that knows one prompt in eight, and gives the others the same number whatever is said."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location(
    "sentiment", Path(__file__).parents[1] / "examples" / "sentiment.py"
)
assert _spec is not None
assert _spec.loader is not None
_sentiment = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_sentiment)


def reward(prompts, completions, **columns):
    """VADER's score for one prompt in eight, zero for all others."""
    known = [hashlib.sha256(str(prompt).encode()).digest()[0] % 8 == 0 for prompt in prompts]
    return [
        x if k else 0.0
        for x, k in zip(_sentiment.reward(prompts=prompts, completions=completions), known, strict=True)
    ]
