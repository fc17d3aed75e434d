"""Checkpoints: a folder a step, with sums that `sha256sum --check` understands; the newest few stay."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from klimb.store.whole import as_json, from_json, read_json, remove_whole, write_directory_whole

TENSORS, STATE, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"


@dataclass(frozen=True)
class Checkpoint:
    """What training goes on from; `warnings` names newer ones that could not be read."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Any
    warnings: list[str]


def save_checkpoint(
    folder: str | Path, step: int, tensors: Mapping[str, Tensor], state: object, *, keep: int = 2
) -> Path:
    """Write step-000020/: tensors, state (JSON) and their sums; remove all but the newest `keep` folders.

    Generator states are tensors of bytes (`generator.get_state()`).

    Raises:
        ValueError: the disk is full, or the state does not come back from JSON as it was (say, a dict with
            keys that are numbers). Older checkpoints are still there.
    """
    from safetensors.torch import save_file

    text = as_json(state, indent=None)
    if from_json(text, "state") != state:
        raise ValueError(
            "checkpoint: the state changes on its way through JSON; use text keys, lists, plain numbers"
        )

    def fill(temporary: Path) -> None:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary / TENSORS)
        (temporary / STATE).write_text(text, encoding="utf-8")
        sums = [f"{_sha256(temporary / name)}  {name}\n" for name in (TENSORS, STATE)]
        (temporary / SUMS).write_text("".join(sums), encoding="utf-8")

    path = Path(folder) / f"step-{step:06d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_directory_whole(path, fill)
    for old in list_checkpoints(folder)[:-keep]:
        remove_whole(old)
    return path


def list_checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoints that are there, oldest first, valid or not."""
    return sorted(Path(folder).glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def load_latest_checkpoint(folder: str | Path) -> Checkpoint:
    """The newest checkpoint whose sums are right; those that are not are named in its warnings.

    Raises:
        ValueError: there is none, or none is valid.
    """
    from safetensors.torch import load_file

    warnings: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        wrong = _wrong_file(path)
        if wrong is not None:
            warnings.append(
                f"checkpoint {path} is corrupt ({wrong}) and was left out; the one before it is used"
            )
            continue
        state = read_json(path / STATE)
        return Checkpoint(int(path.name.removeprefix("step-")), load_file(path / TENSORS), state, warnings)
    if warnings:
        raise ValueError(f"{folder}: no checkpoint is valid, start the run again: " + "; ".join(warnings))
    raise ValueError(
        f"{folder}: holds no checkpoint yet, so there is nothing to go on from; start the run again"
    )


def _wrong_file(path: Path) -> str | None:
    if not (path / SUMS).is_file():
        return f"no {SUMS}"
    sums = {}
    for line in (path / SUMS).read_bytes().decode("utf-8", "replace").splitlines():
        digest, _, name = line.partition("  ")
        sums[name] = digest
    for name in (TENSORS, STATE):
        if not (path / name).is_file():
            return f"no {name}"
        if sums.get(name) != _sha256(path / name):
            return f"{name} is not what was written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
