"""Prompts that are made, not read: `reasoning_gym:TASK?size=200&seed=0` is a data set of that many puzzles.

The split "test" has other puzzles than "train": reasoning-gym makes puzzle i from the number seed + i, so the test's seed
lies further away than any size. A task of few different puzzles may still repeat some.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

import yaml

from klimb.nearest import nearest
from klimb.rewards.texts import optional

FAR = 1_000_000
"""from the seed of train to that of test"""
BEGIN = "reasoning_gym:"


def generated(name: str, split: str | None) -> Iterator[tuple[str, dict[str, object]]]:
    """The rows of a made data set, each with where it stands.

    Columns: `prompt` (a chat message), `question` (the same as text, for a model without a chat template: prompt_column
    question), `answer`, and `puzzle`, the JSON that the reward `reasoning_gym` scores by.

    Args:
        name: `reasoning_gym:TASK`, with options of that task after a `?`.
        split: "train" (also None) or "test".

    Raises:
        ValueError: no such task, option or split, or a puzzle that cannot be written as JSON.
    """
    task, _, query = name.removeprefix(BEGIN).partition("?")
    try:
        options: dict[str, Any] = {
            key: yaml.safe_load(value)
            for key, value in parse_qsl(query, strict_parsing=bool(query), keep_blank_values=True)
        }
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(
            f"{name}: got {query!r}, expected options after the ? such as size=200&seed=0"
        ) from error
    if split not in ("train", "test", None):
        raise ValueError(f"{name}: no split {split!r}; there are train and test")
    options = {"size": 200, "seed": 0, **options}
    if type(options["size"]) is not int or not 0 < options["size"] <= FAR:
        raise ValueError(f"{name}: size: got {options['size']!r}, expected a whole number from 1 to {FAR}")
    if type(options["seed"]) is not int:
        raise ValueError(f"{name}: seed: got {options['seed']!r}, expected a whole number")
    try:
        gym = optional("reasoning_gym", extra="tasks")
    except ValueError as error:
        raise ValueError(f"{name} {error}") from error
    known = gym.factory.DATASETS
    if task not in known:
        raise ValueError(f"{name}: reasoning-gym has no task {task!r}{nearest(task, known)}")
    fields = [field.name for field in dataclasses.fields(known[task][1])]
    for key in options:
        if key not in fields:
            raise ValueError(
                f"{name}: no option {key!r}{nearest(key, fields)}; there are {', '.join(fields)}"
            )
    chosen = {**options, "seed": options["seed"] + (FAR if split == "test" else 0)}
    try:
        puzzles = gym.create_dataset(task, **chosen)
    except (AssertionError, TypeError, ValueError) as error:  # each task checks its options in its own way
        raise ValueError(f"{name}: {task} refuses these options: {error}") from error
    for i in range(options["size"]):
        entry = puzzles[i]
        try:
            puzzle = json.dumps({"task": task, "options": options, "entry": entry}, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name}: its puzzles cannot be written as JSON ({error}); take another task"
            ) from error
        if i == 0 and puzzles.score_answer(
            entry["answer"], json.loads(puzzle)["entry"]
        ) != puzzles.score_answer(entry["answer"], entry):
            raise ValueError(f"{name}: written as JSON, its puzzles are scored otherwise; take another task")
        yield (
            f"{name}, puzzle {i + 1}",
            {
                "prompt": [{"role": "user", "content": entry["question"]}],
                "question": entry["question"],
                "answer": entry["answer"],
                "puzzle": puzzle,
            },
        )
