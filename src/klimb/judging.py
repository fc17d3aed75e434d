"""The judged completions of a run with learn_from data, as a pool that is scored once and kept in draws/data.parquet."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from klimb import store
from klimb.data import Pool
from klimb.loaded import Loaded
from klimb.offline import judged_pool
from klimb.watch import Watch


def kept_pool(loaded: Loaded, path: Path, watch: Watch) -> Pool:
    """The judged completions under the reference, from draws/data.parquet where a killed run left it."""
    where = store.draws_path(path, "data")

    def kept() -> Pool | None:
        if not where.is_file():
            return None
        found = store.read_draws(where, expect_hashes=loaded.hashes)
        assert found.reward is not None
        assert found.log_ref is not None
        return Pool(found.draws, found.reward, found.log_ref, token_log_ref=found.token_log_ref)

    if (there := loaded.ranks.from_first(kept)) is not None:
        return there
    length = loaded.config.max_completion_length
    pool = judged_pool(loaded.judged, loaded.reference, max_completion_length=length, progress=watch.progress)
    if cut := int((~pool.draws.finished).sum()):
        watch.event(
            "warning",
            f"{cut} of {pool.reward.numel()} completions were cut at max_completion_length {length}: what follows is not learned",
        )
    loaded.ranks.from_first(partial(_write, where, pool, loaded.hashes))
    return pool


def _write(where: Path, pool: Pool, hashes: Mapping[str, str]) -> None:
    where.parent.mkdir(parents=True, exist_ok=True)
    store.write_pool(where, pool, verb="data", hashes=hashes)
