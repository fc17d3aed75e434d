"""Parts of a table of draws: a file a block of prompts, each whole, until all are there and become one file.

    RUN/draws/plan.parts/depends_on.json   000000-000004.parquet   000004-000008.parquet   ...

What the draws depend on is written first. A part is taken up again only where all of it is the same, and a part's name says which
prompts it is of; so whoever was killed, and wherever the rest is drawn, the parts are those of one pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from klimb.data import Pool
from klimb.store.draws import read_draws, write_pool
from klimb.store.whole import read_json, remove_whole, write_json, write_whole

DEPENDS = "depends_on.json"
AT_ONCE = 64
"""parts that are in memory together while they become one file, and one row group of it"""


@dataclass(frozen=True)
class StoredParts:
    """The finished blocks of a pool (`klimb.pool.Parts`).

    Attributes:
        path: the file that they become; they lie in a folder beside it.
        verb: which verb draws them.
        hashes: what the draws depend on, for the table.
    """

    path: Path
    verb: str
    hashes: Mapping[str, str]

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return parts_folder(self.path)

    def done(self) -> list[range]:
        """The blocks that are there, in order."""
        return [prompts_of(file) for file in part_files(self.folder)]

    def read(self, block: range) -> Pool:
        """One of them, as it was written."""
        file = self._file(block)
        try:
            found = read_draws(file)
        except ValueError as error:
            raise ValueError(
                f"{file}: not what was written ({error}); remove it and go on, and it is drawn again"
            ) from error
        reward, log_ref = found.reward, found.log_ref
        assert log_ref is not None
        return Pool(
            found.draws,
            log_ref.new_full(log_ref.shape, float("nan")) if reward is None else reward,
            log_ref,
            found.reward_parts,
            found.log_pi,
            token_log_ref=found.token_log_ref,
            token_log_pi=found.token_log_pi,
        )

    def write(self, block: range, pool: Pool) -> None:
        """Keep this block, unless it is there, or this machine does not see the folder that the first rank has made.

        Raises:
            ValueError: the disk is full; the parts before it are whole.
        """
        file = self._file(block)
        if self.folder.is_dir() and not file.exists():
            write_pool(file, pool, verb=self.verb, hashes=self.hashes, unscored=True)

    def merge(self) -> None:
        """Make one file of all parts, in the order of the prompts, a few at a time; they stay (`remove_parts`)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = part_files(self.folder)

        def write(temporary: Path) -> None:
            with pq.ParquetWriter(temporary, pq.read_schema(files[0]), compression="zstd") as writer:
                for start in range(0, len(files), AT_ONCE):
                    some = [pq.read_table(file) for file in files[start : start + AT_ONCE]]
                    writer.write_table(pa.concat_tables(some))

        write_whole(self.path, write)

    def _file(self, block: range) -> Path:
        return self.folder / f"{block.start:06d}-{block.stop:06d}.parquet"


def begin_parts(
    path: str | Path, *, verb: str, hashes: Mapping[str, str], depends: Mapping[str, object]
) -> StoredParts:
    """The parts of a file of draws that is to be: those that a killed run left, or a new folder for them.

    Args:
        path: the file.
        verb: which verb draws them.
        hashes: what the draws depend on, for the table.
        depends: all that the draws depend on, `hashes` too.

    Raises:
        ValueError: the parts that are there depend on something else.
    """
    parts = StoredParts(Path(path), verb, hashes)
    now, file = {name: str(x) for name, x in depends.items()}, parts.folder / DEPENDS
    if file.is_file() and parts.done():
        _same(parts, read_json(file), now)
    else:
        parts.folder.mkdir(parents=True, exist_ok=True)
        write_json(file, now)
    return parts


def parts_folder(path: Path) -> Path:
    """Where the parts of a file lie: draws/plan.parts for draws/plan.parquet."""
    return path.with_suffix(".parts")


def remove_parts(path: Path) -> None:
    """Remove the parts of a file, if there are any."""
    if parts_folder(path).is_dir():
        remove_whole(parts_folder(path))


def part_files(folder: Path) -> list[Path]:
    """The parts in a folder, in the order of their prompts."""
    return sorted(folder.glob("[0-9]*-[0-9]*.parquet"), key=lambda file: prompts_of(file).start)


def prompts_of(file: Path) -> range:
    """The prompts of a part, by its name.

    Example:
        >>> prompts_of(Path("000004-000008.parquet"))
        range(4, 8)
    """
    start, stop = file.stem.split("-")
    return range(int(start), int(stop))


def unfinished(run: str | Path) -> Sequence[tuple[Path, int]]:
    """The folders of parts in a run, and how many prompts are drawn in each."""
    folders = sorted((Path(run) / "draws").glob("*.parts"))
    return [(folder, sum(len(prompts_of(file)) for file in part_files(folder))) for folder in folders]


def _same(parts: StoredParts, there: Mapping[str, str], now: Mapping[str, str]) -> None:
    differ = sorted(name for name in {*there, *now} if there.get(name) != now.get(name))
    if differ:
        details = "; ".join(
            f"{name}: got {str(now.get(name))[:12]}, there it is {str(there.get(name))[:12]}"
            for name in differ
        )
        drawn = sum(map(len, parts.done()))
        raise ValueError(
            f"{parts.folder}: {drawn} prompts are drawn there with another {' and '.join(differ)} ({details}); go on as it was "
            "begun, or remove that folder to draw anew"
        )
