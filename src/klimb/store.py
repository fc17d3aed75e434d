"""A run on disk: the only code that writes files.

Everything is written whole or not at all: into a temporary file or folder beside its place, flushed to the
disk, renamed. A reader never sees half of anything, whenever the process is killed; what a full disk
interrupts is cleared away. Only metrics.jsonl grows in place: a line without its end was interrupted, and is
not there. Formats are JSON, YAML, Parquet and safetensors; nothing here runs code when it is read.

    RUN/config.yaml   env.json   plan.json   metrics.jsonl   draws/*.parquet   checkpoints/   policy/
        measure.json  report.html

P prompts, G draws a prompt, N packed tokens; log-probabilities in nats.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from torch import Tensor

from klimb.data import Draws, Example

if TYPE_CHECKING:
    import pyarrow

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
INFINITE = {
    "Infinity": math.inf,
    "-Infinity": -math.inf,
}  # JSON has no such numbers; spelled as in proto3's JSON
TENSORS, STATE, SUMS = "tensors.safetensors", "state.json", "SHA256SUMS"

# Whole or not at all.


def write_whole(path: str | Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a file whole or not at all; `content` is what it holds, or a function that writes it to a path.

    Raises:
        ValueError: the disk is full. What was at `path` before is still there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_whole(Path(folder, "report.html"), "<p>up</p>")
        ...     os.listdir(folder)
        ['report.html']
    """
    path = Path(path)
    with _temporary_beside(path) as temporary:
        if callable(content):
            content(temporary)
        else:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        _to_disk(temporary)
        temporary.replace(path)
    _to_disk(path.parent)


def write_directory_whole(path: str | Path, fill: Callable[[Path], object]) -> None:
    """Make a folder whole or not at all: `fill` writes into an empty one, which then takes the name.

    A folder that was there is replaced. Killed in the moment between the two renames, neither has the name.

    Raises:
        ValueError: the disk is full. What was at `path` before is still there.
    """
    path = Path(path)
    with _temporary_beside(path) as temporary:
        temporary.mkdir()
        fill(temporary)
        for inside in sorted(temporary.rglob("*")):
            _to_disk(inside)
        _to_disk(temporary)
        with _temporary_beside(path) as aside:
            if path.exists():
                path.rename(aside)
            try:
                temporary.rename(path)
            except OSError:
                if aside.exists():
                    aside.rename(path)
                raise
    _to_disk(path.parent)


def write_json(path: str | Path, value: object) -> None:
    """Write a value as JSON, whole or not at all; infinities as "Infinity", NaN refused by name."""
    write_whole(path, as_json(value) + "\n")


def as_json(value: object) -> str:
    """A value as JSON text; infinities as "Infinity", NaN refused by name."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False)


def read_json(path: str | Path) -> Any:
    """What `write_json` wrote."""
    return _parsed(Path(path).read_text(encoding="utf-8"), str(path))


def write_yaml(path: str | Path, value: object) -> None:
    """Write a value as YAML, whole or not at all, keys in the order given."""
    write_whole(path, yaml.safe_dump(_plain(value, json=False), sort_keys=False, allow_unicode=True))


def append_jsonl(path: str | Path, *records: Mapping[str, object]) -> None:
    """Add records, one a line, and wait until the disk has them. A torn last line is overwritten.

    Raises:
        ValueError: the disk is full; the file is as it was.
    """
    path = Path(path)
    lines = "".join(json.dumps(_plain(record), ensure_ascii=False) + "\n" for record in records).encode()
    with path.open(
        "ab+", buffering=0
    ) as file:  # no buffer: what did not fit must not be tried again on closing
        whole = _end_of_last_line(file)
        file.truncate(whole)
        try:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except OSError as error:
            file.truncate(whole)
            _explain_if_full(error, path)
            raise
    if whole == 0:
        _to_disk(path.parent)  # a new file: its name too


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """All records. A last line that was torn by a kill is left out; any other bad line is a ValueError.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "metrics.jsonl")
        ...     append_jsonl(file, {"step": 1, "reward": 0.25})
        ...     _ = file.write_bytes(file.read_bytes() + b'{"step": 2, "rew')
        ...     read_jsonl(file)
        [{'step': 1, 'reward': 0.25}]
    """
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [_parsed(line.decode(), f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def truncate_jsonl(path: str | Path, keep: int) -> None:
    """Keep the first `keep` records, as resume does with what came after the checkpoint."""
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    if len(lines) < keep:
        raise ValueError(
            f"{path}: got {len(lines)} records, expected {keep} at least; the checkpoint is of another run"
        )
    write_whole(path, b"".join(line + b"\n" for line in lines[:keep]))


# The run directory.


def create_run(
    output_dir: str | Path,
    *,
    config: Mapping[str, object],
    seed: int | None = None,
    reward_hashes: Mapping[str, str] | None = None,
    resume: bool = False,
) -> Path:
    """Make a run directory with its config.yaml and env.json, or take up the one that is there.

    Args:
        output_dir: where; it may exist, but hold no run.
        config: the resolved configuration.
        seed: of the run, for env.json.
        reward_hashes: name -> sha256 of the reward's code, for env.json.
        resume: take up the run that is there; its configuration has to be `config`.

    Raises:
        ValueError: a run is there and not to be resumed, or none is and it is, or its configuration differs.
    """
    run = Path(output_dir)
    config_file = run / "config.yaml"
    if resume:
        if not config_file.is_file():
            raise ValueError(
                f"{run}: holds no run to resume; expected the output_dir of a run that was started"
            )
        _same_config(run, yaml.safe_load(config_file.read_text(encoding="utf-8")), config)
        for left in [*run.glob(".*.tmp"), *run.glob("*/.*.tmp")]:  # what a kill left behind
            _remove(left)
        return run
    check_free(run)
    for folder in (run, run / "draws", run / "checkpoints"):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(run / "env.json", environment(seed=seed, reward_hashes=reward_hashes))
    write_yaml(config_file, config)  # last: it is what makes the folder a run
    return run


def check_free(output_dir: str | Path) -> None:
    """Refuse an output directory that is a file or already holds a run.

    Raises:
        ValueError: it is or does.
    """
    run = Path(output_dir)
    if run.exists() and not run.is_dir():
        raise ValueError(f"output_dir {run}: got a file, expected a folder or a new name")
    if (run / "config.yaml").exists():
        raise ValueError(
            f"output_dir {run} holds another run; use --resume {run} to go on with it, or another output_dir"
        )


def undo_run(run: str | Path) -> None:
    """Take back a run that `create_run` has just made and that could not begin; files of others stay."""
    run = Path(run)
    for name in ("config.yaml", "env.json"):
        (run / name).unlink(missing_ok=True)
    for folder in (run / "draws", run / "checkpoints", run):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def environment(*, seed: int | None = None, reward_hashes: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a run depended on: versions, git revision of the current folder, seed, hashes of reward code."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git_revision": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain")),
        "seed": seed,
        "reward_hashes": dict(reward_hashes or {}),
    }


def draws_path(run: str | Path, verb: str, step: int | None = None) -> Path:
    """Where a verb's draws lie: draws/plan.parquet, draws/train-000012.parquet."""
    return Path(run) / "draws" / (f"{verb}.parquet" if step is None else f"{verb}-{step:06d}.parquet")


def remove_draws_after(run: str | Path, verb: str, step: int) -> None:
    """Remove a verb's draws of all later steps, as resume does."""
    for path in (Path(run) / "draws").glob(f"{verb}-*.parquet"):
        if int(path.stem.rpartition("-")[2]) > step:
            path.unlink()


# Draws: one row a completion.


@dataclass(frozen=True)
class StoredDraws:
    """Draws as they were read, with what was known of them; what was not written is None.

    Attributes:
        draws: the P x G completions, texts and log_q among them.
        reward: [P, G] in its own units.
        reward_parts: name -> [P, G]; NaN where a part did not apply.
        log_ref, log_pi: [P, G] nats.
        token_log_ref, token_log_pi: [N] packed, nats.
        verb: which verb drew them.
        step: in which step of it, if it has any.
        hashes: of what they depend on: model, reward, template, max_completion_length, ...
    """

    draws: Draws
    verb: str
    step: int | None
    hashes: Mapping[str, str]
    reward: Tensor | None = None
    reward_parts: Mapping[str, Tensor] = field(default_factory=dict)
    log_ref: Tensor | None = None
    log_pi: Tensor | None = None
    token_log_ref: Tensor | None = None
    token_log_pi: Tensor | None = None


def write_draws(
    path: str | Path,
    draws: Draws,
    *,
    verb: str,
    hashes: Mapping[str, object],
    step: int | None = None,
    reward: Tensor | None = None,
    reward_parts: Mapping[str, Tensor] | None = None,
    log_ref: Tensor | None = None,
    log_pi: Tensor | None = None,
    token_log_ref: Tensor | None = None,
    token_log_pi: Tensor | None = None,
) -> None:
    """Write draws as Parquet, a row a completion, for pandas, datasets, duckdb and the next verb.

    Columns: prompt_id, draw (0 to G-1), prompt (JSON where `chat`), chat, columns (JSON), completion, tokens,
    finished, full_support, log_q, log_ref, log_pi, token_log_ref, token_log_pi, reward, reward_<part>, verb,
    step, hash_<name>. What is not known is null. Every number comes back as it was, bit by bit.

    Args:
        path: the file.
        draws: P x G completions.
        verb: which verb drew them.
        hashes: name -> what names the model, the reward, the template, the length limit.
        step: in which step.
        reward: [P, G].
        reward_parts: name -> [P, G]; NaN where a part does not apply.
        log_ref: [P, G] nats.
        log_pi: [P, G] nats.
        token_log_ref: [N] nats.
        token_log_pi: [N] nats.

    Raises:
        ValueError: a number is NaN, or the disk is full.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    size = draws.num_prompts * draws.num_draws
    lengths = draws.lengths.flatten()
    offsets = pa.array([0, *lengths.cumsum(0).tolist()], pa.int32())

    def once(values: Sequence[object]) -> list[object]:  # one a prompt -> one a row
        return [value for value in values for _ in range(draws.num_draws)]

    def numbers(name: str, values: Tensor | None) -> pyarrow.Array:
        if values is None:
            return pa.nulls(size, pa.float32())
        assert values.shape == (draws.num_prompts, draws.num_draws), (name, values.shape)
        return pa.array(_known(name, values).flatten().numpy())

    def tokens(name: str, values: Tensor | None) -> pyarrow.Array:
        if values is None:
            return pa.nulls(size, pa.list_(pa.float32()))
        assert values.shape == (int(lengths.sum()),), (name, values.shape)
        return pa.ListArray.from_arrays(offsets, pa.array(_known(name, values).numpy()))

    ids = [i.cpu() for group in draws.completions for i in group]
    chat = [not isinstance(example.prompt, str) for example in draws.examples]
    table = {
        "prompt_id": pa.array(once([example.id for example in draws.examples]), pa.string()),
        "draw": pa.array(list(range(draws.num_draws)) * draws.num_prompts, pa.int32()),
        "prompt": pa.array(
            once([_json(e.prompt) if c else e.prompt for e, c in zip(draws.examples, chat, strict=True)])
        ),
        "chat": pa.array(once(chat), pa.bool_()),
        "columns": pa.array(once([_json(dict(example.columns)) for example in draws.examples]), pa.string()),
        "completion": pa.nulls(size, pa.string())
        if draws.texts is None
        else pa.array([text for group in draws.texts for text in group], pa.string()),
        "tokens": pa.ListArray.from_arrays(
            offsets, pa.array((torch.cat(ids) if ids else torch.tensor([])).long().numpy())
        ),
        "finished": pa.array(draws.finished.bool().flatten().tolist(), pa.bool_()),
        "full_support": pa.array([draws.full_support] * size, pa.bool_()),
        "log_q": numbers("log_q", draws.log_q),
        "log_ref": numbers("log_ref", log_ref),
        "log_pi": numbers("log_pi", log_pi),
        "token_log_ref": tokens("token_log_ref", token_log_ref),
        "token_log_pi": tokens("token_log_pi", token_log_pi),
        "reward": numbers("reward", reward),
        **{
            f"reward_{name}": pa.array(_wide(part).flatten().numpy(), from_pandas=True)  # NaN -> null
            for name, part in (reward_parts or {}).items()
        },
        "verb": pa.array([verb] * size, pa.string()),
        "step": pa.array([step] * size, pa.int64()),
        **{f"hash_{name}": pa.array([str(value)] * size, pa.string()) for name, value in hashes.items()},
    }
    write_whole(path, lambda temporary: pq.write_table(pa.table(table), temporary, compression="zstd"))


def read_draws(path: str | Path, *, expect_hashes: Mapping[str, object] | None = None) -> StoredDraws:
    """Read what `write_draws` wrote, if it depends on what is expected.

    Args:
        path: the file.
        expect_hashes: name -> what the draws must depend on; only these are compared.

    Raises:
        ValueError: there is no such file, it is not one of klimb's, or it is of another model or reward.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; expected draws that klimb wrote")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file: {error}; draw the pool again") from error
    missing = {"prompt_id", "draw", "prompt", "chat", "columns", "tokens", "finished", "log_q"} - set(
        table.column_names
    )
    if missing or table.num_rows == 0:
        raise ValueError(
            f"{path}: not draws that klimb wrote: {f'no column {min(missing)!r}' if missing else 'no rows'}"
        )

    def column(name: str) -> list[Any]:
        return table[name].to_pylist()

    hashes = {n.removeprefix("hash_"): column(n)[0] for n in table.column_names if n.startswith("hash_")}
    _same_hashes(str(path), hashes, expect_hashes or {})
    num_draws = max(column("draw")) + 1
    if column("draw") != list(range(num_draws)) * (table.num_rows // num_draws):
        raise ValueError(
            f"{path}: expected each prompt's {num_draws} draws together and in order; "
            f"rows are missing or moved"
        )

    def grouped(values: list[Any]) -> list[list[Any]]:
        return [values[start : start + num_draws] for start in range(0, len(values), num_draws)]

    def column_of_floats(name: str) -> Tensor:
        return torch.from_numpy(table[name].to_numpy().copy()).reshape(-1, num_draws)  # null -> NaN

    def numbers(name: str) -> Tensor | None:
        return None if table[name].null_count == table.num_rows else column_of_floats(name)

    def tokens(name: str) -> Tensor | None:
        if table[name].null_count == table.num_rows:
            return None
        return torch.from_numpy(table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).copy())

    examples = [
        Example(json.loads(prompt) if chat else prompt, json.loads(columns))
        for prompt, chat, columns, draw in zip(
            column("prompt"), column("chat"), column("columns"), column("draw"), strict=True
        )
        if draw == 0
    ]
    lengths = [len(ids) for ids in column("tokens")]
    packed = table["tokens"].combine_chunks().flatten().to_numpy(zero_copy_only=False).copy()
    texts = column("completion")
    return StoredDraws(
        draws=Draws(
            examples=examples,
            completions=grouped(list(torch.from_numpy(packed).split(lengths))),
            finished=torch.tensor(grouped(column("finished"))),
            texts=None if None in texts else grouped(texts),
            log_q=numbers("log_q"),
            full_support=column("full_support")[0],
        ),
        verb=column("verb")[0],
        step=column("step")[0],
        hashes=hashes,
        reward=numbers("reward"),
        reward_parts={
            name.removeprefix("reward_"): column_of_floats(name)
            for name in table.column_names
            if name.startswith("reward_")
        },
        log_ref=numbers("log_ref"),
        log_pi=numbers("log_pi"),
        token_log_ref=tokens("token_log_ref"),
        token_log_pi=tokens("token_log_pi"),
    )


# Checkpoints: a folder a step, with sums that `sha256sum --check` understands.


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

    text = json.dumps(_plain(state), ensure_ascii=False)
    if _parsed(text, "state") != state:
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
        _remove_whole(old)
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
        state = _parsed((path / STATE).read_text(encoding="utf-8"), str(path / STATE))
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


# Helpers.


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Generator[Path]:
    """A free name in the same folder, so that the rename is atomic; whatever has it is gone afterwards."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
    except Exception as error:
        _explain_if_full(error, path)
        raise
    finally:
        _remove(temporary)  # Ctrl-C too leaves nothing


def _to_disk(path: Path) -> None:
    """Wait until the disk has a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_whole(path: Path) -> None:
    """Take the name away first: a folder half removed must not look like a whole one."""
    with _temporary_beside(path) as temporary:
        path.rename(temporary)


def _explain_if_full(error: Exception, path: Path) -> None:
    # safetensors and Arrow write by themselves, and tell in words only.
    full = {errno.ENOSPC, errno.EDQUOT}
    if getattr(error, "errno", None) in full or any(os.strerror(code) in str(error) for code in full):
        raise ValueError(
            f"the disk is full: {path} was not written, what was there before is whole; make room and resume"
        ) from error


def _end_of_last_line(file: Any) -> int:
    """Bytes up to and with the last line end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _json(value: object) -> str:
    # As `Example.id` writes it, so that the id comes back the same.
    return json.dumps(value, default=str, ensure_ascii=False)


def _plain(value: object, where: str = "", *, json: bool = True) -> Any:
    """Tensors, dataclasses, paths and tuples as what JSON and YAML know; NaN is refused, by name."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError(f"{where or 'the value'} is NaN; expected a number, or None where there is none")
        if math.isinf(value) and json:
            return "Infinity" if value > 0 else "-Infinity"
        return float(value)  # numpy's float64 is one too, but not for YAML
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}".lstrip("."), json=json) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]", json=json) for i, v in enumerate(value)]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _plain(value.tolist(), where, json=json)
    if isinstance(value, Path):
        return str(value)
    raise ValueError(
        f"{where or 'the value'}: got {type(value).__name__}, expected numbers, text, lists and dicts"
    )


def _parsed(text: str, where: str) -> Any:
    try:
        return _with_infinities(json.loads(text))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error


def _with_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _with_infinities(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_infinities(v) for v in value]
    return INFINITE.get(value, value) if isinstance(value, str) else value


def _wide(values: Tensor) -> Tensor:
    """On the CPU, float64 or float32."""
    values = values.detach().cpu()
    return values if values.dtype == torch.float64 else values.float()


def _known(name: str, values: Tensor) -> Tensor:
    """The same, without NaN."""
    values = _wide(values)
    if bool(values.isnan().any()):
        raise ValueError(
            f"draws: {int(values.isnan().sum())} of {values.numel()} values of {name} are NaN; not written"
        )
    return values


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _same_config(run: Path, stored: Mapping[str, Any], config: Mapping[str, object]) -> None:
    given = yaml.safe_load(yaml.safe_dump(_plain(config, json=False)))
    differ = sorted(key for key in {*stored, *given} if stored.get(key) != given.get(key))
    if differ:
        key = differ[0]
        raise ValueError(
            f"{run} holds another run: its {', '.join(differ)} differ "
            f"({key}: got {given.get(key)!r}, there it is {stored.get(key)!r}); "
            f"resume it as it was started, or use another output_dir"
        )


def _same_hashes(path: str, stored: Mapping[str, str], expected: Mapping[str, object]) -> None:
    differ = [name for name, value in expected.items() if stored.get(name) != str(value)]
    if differ:
        details = "; ".join(
            f"{n}: got {str(stored.get(n))[:12]}, expected {str(expected[n])[:12]}" for n in differ
        )
        raise ValueError(
            f"{path}: these draws are of another {' and '.join(differ)} ({details}); "
            f"draw a new pool with plan"
        )


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None
