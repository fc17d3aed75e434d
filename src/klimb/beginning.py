"""The directory of a run at its beginning: kept from other runs, and made or taken up."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from klimb import store
from klimb.config import DESTINATIONS, load
from klimb.loaded import Loaded, reward_hashes
from klimb.watch import Watch


def hold(path: Path, until_done: ExitStack, watch: Watch) -> None:
    """Keep other runs out of the directory."""
    if not until_done.enter_context(store.held(path)):
        watch.event(
            "warning", f"{path}: this file system knows no locks; see to it that no other run writes there"
        )


def begin(loaded: Loaded, path: Path, resume: bool) -> None:
    """Make the directory of the run, or take up the one that is there."""
    config = loaded.config
    if resume:
        written = load(path / "config.yaml").model_dump()  # options that came later than the run by default
        # a directory may have been moved, and a plan that is done has put a beta in the place of a budget
        half = any(folder.stem == "plan" for folder, _ in store.unfinished(path))
        settled = {name: written[name] for name in ("output_dir", *(() if half else DESTINATIONS))}
        store.create_run(path, config={**config.model_dump(), **settled}, resume=True, written=written)
    else:
        # as asked until the plan has found beta
        store.create_run(
            path, config=config.model_dump(), seed=config.seed, reward_hashes=reward_hashes(loaded)
        )


def say_what_differs(path: Path, watch: Watch) -> None:
    """Of a run that goes on: in what this process rounds otherwise than the one that began it, if in anything."""
    if differs := store.differs_now(path):
        watch.event(
            "warning", f"{path} was begun with {'; '.join(differs)}: what follows may be rounded otherwise"
        )
