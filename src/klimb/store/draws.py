"""Draws as a Parquet table, a row a completion: what one verb writes and the next reads; pandas opens it too.

P prompts, G draws a prompt, N packed tokens; log-probabilities in nats.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from klimb.data import Draws, Example, Pool
from klimb.nearest import nearest_run
from klimb.store.whole import write_whole

if TYPE_CHECKING:
    import pyarrow


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
    unscored: bool = False,
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
        unscored: whether a reward may be NaN, which is not scored yet and null in the table.

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
        "reward": numbers("reward", reward)
        if reward is None or not unscored
        else pa.array(_wide(reward).flatten().numpy(), from_pandas=True),
        **{
            f"reward_{name}": pa.array(_wide(part).flatten().numpy(), from_pandas=True)  # NaN -> null
            for name, part in (reward_parts or {}).items()
        },
        "verb": pa.array([verb] * size, pa.string()),
        "step": pa.array([step] * size, pa.int64()),
        **{f"hash_{name}": pa.array([str(value)] * size, pa.string()) for name, value in hashes.items()},
    }
    write_whole(path, lambda temporary: pq.write_table(pa.table(table), temporary, compression="zstd"))


def write_pool(
    path: str | Path,
    pool: Pool,
    *,
    verb: str,
    hashes: Mapping[str, object],
    step: int | None = None,
    unscored: bool = False,
) -> None:
    """Write a pool as `write_draws` does, with all that it knows."""
    write_draws(
        path,
        pool.draws,
        verb=verb,
        hashes=hashes,
        step=step,
        reward=pool.reward,
        reward_parts=pool.parts,
        log_ref=pool.log_ref,
        log_pi=pool.log_pi,
        token_log_ref=pool.token_log_ref,
        token_log_pi=pool.token_log_pi,
        unscored=unscored,
    )


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
        raise ValueError(f"{path}: no such file{nearest_run(Path(path))}; expected draws that klimb wrote")
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


def _json(value: object) -> str:
    # As `Example.id` writes it, so that the id comes back the same.
    return json.dumps(value, default=str, ensure_ascii=False)


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
