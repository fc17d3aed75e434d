"""A run on disk: the only code that writes files.

Everything is written whole or not at all: a reader never sees half of anything, whenever the process is
killed, and what a full disk interrupts is cleared away. Formats are JSON, YAML, Parquet and safetensors;
nothing here runs code when it is read.

    RUN/config.yaml   env.json   plan.json   metrics.jsonl   draws/*.parquet   checkpoints/   policy/
        measure.json  report.html

whole.py         files and folders that are whole or not there; JSON, YAML, JSONL
run.py           the directory of a run
draws.py         tables of draws
parts.py         the same while they are being drawn
rows.py          rows of data, as klimb.dataset reads them
checkpoints.py   what a training goes on from
"""

from klimb.store.checkpoints import Checkpoint, list_checkpoints, load_latest_checkpoint, save_checkpoint
from klimb.store.draws import StoredDraws, read_draws, write_draws, write_pool
from klimb.store.parts import StoredParts, begin_parts, remove_parts, unfinished
from klimb.store.rows import check_new, write_rows
from klimb.store.run import (
    check_free,
    create_run,
    differs_now,
    draws_path,
    environment,
    held,
    remove_draws_after,
    undo_run,
)
from klimb.store.whole import (
    FULL,
    append_jsonl,
    as_json,
    hash_of,
    read_json,
    read_jsonl,
    truncate_jsonl,
    write_directory_whole,
    write_json,
    write_whole,
    write_yaml,
)

__all__ = [
    "FULL",
    "Checkpoint",
    "StoredDraws",
    "StoredParts",
    "append_jsonl",
    "as_json",
    "begin_parts",
    "check_free",
    "check_new",
    "create_run",
    "differs_now",
    "draws_path",
    "environment",
    "hash_of",
    "held",
    "list_checkpoints",
    "load_latest_checkpoint",
    "read_draws",
    "read_json",
    "read_jsonl",
    "remove_draws_after",
    "remove_parts",
    "save_checkpoint",
    "truncate_jsonl",
    "undo_run",
    "unfinished",
    "write_directory_whole",
    "write_draws",
    "write_json",
    "write_pool",
    "write_rows",
    "write_whole",
    "write_yaml",
]
