"""The directory of a run: made, taken up again or taken back; what it depended on; where its draws lie."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import yaml

from klimb.models.compiled import library
from klimb.nearest import nearest_run
from klimb.store.parts import unfinished
from klimb.store.whole import as_yaml, clear_interrupted, read_json, remove_whole, write_json, write_yaml

NO_LOCKS = (errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.EINVAL, errno.ENOSYS)
PACKAGES = (
    "klimb",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
)


def create_run(
    output_dir: str | Path,
    *,
    config: Mapping[str, object],
    seed: int | None = None,
    reward_hashes: Mapping[str, str] | None = None,
    resume: bool = False,
    written: Mapping[str, object] | None = None,
) -> Path:
    """Make a run directory with its config.yaml and env.json, or take up the one that is there.

    Args:
        output_dir: where; it may exist, but hold no run.
        config: the resolved configuration.
        seed: of the run, for env.json.
        reward_hashes: name -> sha256 of the reward's code, for env.json.
        resume: take up the run that is there; its configuration has to be `config`.
        written: what its config.yaml means today, in the place of what stands there: an older one lacks options.

    Raises:
        ValueError: a run is there and not to be resumed, or none is and it is, or its configuration differs.
    """
    run = Path(output_dir)
    config_file = run / "config.yaml"
    if resume:
        if not config_file.is_file():
            raise ValueError(
                f"{run}: holds no run to resume{nearest_run(run)}; expected the output_dir of a run that was started"
            )
        there = config_file.read_text(encoding="utf-8") if written is None else as_yaml(written)
        _same_config(run, yaml.safe_load(there), config)
        clear_interrupted(run)
        return run
    check_free(run)
    for folder in (run, run / "draws", run / "checkpoints"):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(run / "env.json", environment(seed=seed, reward_hashes=reward_hashes))
    write_yaml(config_file, config)  # last: it is what makes the folder a run
    return run


@contextlib.contextmanager
def held(run: str | Path) -> Generator[bool]:
    """Within this context nobody else holds this directory, which is made if it is not there; a process that dies lets go of it.

    Yields:
        False where the file system knows no locks (some that go over a network), and nobody can be kept out.

    Raises:
        ValueError: somebody else holds it, or it cannot be made.
    """
    import fcntl

    try:
        Path(run).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"output_dir {run}: cannot be made ({error.strerror}); use a folder that you may write to"
        ) from error
    descriptor = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError as error:
            raise ValueError(
                f"{run}: another klimb is writing there now; wait for it, or use another output_dir"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def check_free(output_dir: str | Path) -> None:
    """Refuse an output directory that is a file, cannot be written to or already holds a run.

    Raises:
        ValueError: it is or does.
    """
    run = Path(output_dir)
    there = next(place for place in (run, *run.parents) if place.exists())
    if there != run and not there.is_dir():
        raise ValueError(f"output_dir {run}: {there} is a file, expected a folder or a new name")
    if not os.access(there, os.W_OK):
        raise ValueError(
            f"output_dir {run}: no right to write in {there}; use a folder that you may write to"
        )
    if run.exists() and not run.is_dir():
        raise ValueError(f"output_dir {run}: got a file, expected a folder or a new name")
    if (run / "config.yaml").exists():
        half = "".join(
            f", which was stopped while drawing ({drawn} prompts are drawn, in {folder.name}, and are not drawn again)"
            for folder, drawn in unfinished(run)
        )
        raise ValueError(
            f"output_dir {run} holds another run{half}; use --resume {run} to go on with it, or another output_dir"
        )


def undo_run(run: str | Path) -> None:
    """Take back a run that `create_run` has just made and that could not begin; files of others stay."""
    run = Path(run)
    for name in ("config.yaml", "env.json"):
        (run / name).unlink(missing_ok=True)
    for folder, _ in unfinished(run):
        remove_whole(folder)
    for folder in (run / "draws", run / "checkpoints", run):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def differs_now(run: str | Path) -> list[str]:
    """Of what numbers are rounded by: that in which this process differs from the one that began the run, each as "torch 2.13.0, now 2.14.0".

    A run goes on to the same numbers bit by bit only where there is none.
    """
    file = Path(run) / "env.json"
    then, now = read_json(file) if file.exists() else {}, _software()
    pairs = [("python", then.get("python"), now["python"])]
    pairs += [
        (name, then.get("versions", {}).get(name), version) for name, version in now["versions"].items()
    ]
    lines = [f"{name} {before}, now {today}" for name, before, today in pairs if before not in (None, today)]
    if then.get("compiled_loops", now["compiled_loops"]) != now["compiled_loops"]:
        lines.append(
            "no compiled loops, now with them" if now["compiled_loops"] else "compiled loops, now none"
        )
    return lines


def environment(*, seed: int | None = None, reward_hashes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a run depended on: versions, compiled loops of a CPU or torch's own, git revision of the current folder, seed, hashes of reward code."""
    return {
        **_software(),
        "platform": platform.platform(),
        "git_revision": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain")),
        "seed": seed,
        "reward_hashes": dict(reward_hashes or {}),
    }


def _software() -> dict[str, Any]:
    """What numbers are rounded by."""
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "compiled_loops": library() is not None,
    }


def _version(package: str) -> str | None:
    """None for what runs without having been installed, as klimb itself from its source."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def draws_path(run: str | Path, verb: str, step: int | None = None) -> Path:
    """Where a verb's draws lie: draws/plan.parquet, draws/train-000012.parquet."""
    return Path(run) / "draws" / (f"{verb}.parquet" if step is None else f"{verb}-{step:06d}.parquet")


def remove_draws_after(run: str | Path, verb: str, step: int) -> None:
    """Remove a verb's draws of all later steps, as resume does."""
    for path in (Path(run) / "draws").glob(f"{verb}-*.parquet"):
        if int(path.stem.rpartition("-")[2]) > step:
            path.unlink()


def _same_config(run: Path, stored: Mapping[str, Any], config: Mapping[str, object]) -> None:
    given = yaml.safe_load(as_yaml(config))
    differ = sorted(key for key in {*stored, *given} if stored.get(key) != given.get(key))
    if differ:
        key = differ[0]
        raise ValueError(
            f"{run} holds another run: its {', '.join(differ)} differ "
            f"({key}: got {given.get(key)!r}, there it is {stored.get(key)!r}); "
            f"resume it as it was started, or use another output_dir"
        )


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
