"""Several ranks on this machine, as torchrun would start them, from a server that has everything imported already."""

import multiprocessing
import os
import signal
import socket
import time
import unittest.mock

import torch

PRELOAD = [
    "klimb.run",
    "klimb.ranks",
    "peft",
    "transformers.models.llama.modeling_llama",
    "torch.distributed",
]


def started(world, work, *arguments):
    """Processes, each of which calls work(ranks, *arguments)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    found = [processes.Process(target=_rank, args=(r, world, port, work, arguments)) for r in range(world)]
    for process in found:
        process.start()
    return found


def ended(processes, seconds=120):
    """Their exit statuses; whoever is late is killed, and has -9."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def together(world, work, *arguments):
    """Run it, and let nothing go wrong."""
    assert ended(started(world, work, *arguments)) == [0] * world


def _rank(rank, world, port, work, arguments):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "NO_PROXY": "127.0.0.1",
    }
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    from klimb.ranks import joined

    with joined() as ranks:
        work(ranks, *arguments)


def run(ranks, settings, verb="climb", resume=False, steps=None):
    """A verb on a configuration, without the page; asked to stop after so many steps."""
    from klimb import run as edge
    from klimb.config import load
    from klimb.watch import Watch

    seen = []
    watch = Watch(
        event=lambda kind, record: seen.append(kind) if kind == "step" else None,
        stop=lambda: steps is not None and len(seen) >= steps,
    )
    options = [
        part for name, x in settings.items() for part in (f"--{name}", "null" if x is None else str(x))
    ]
    with unittest.mock.patch.object(edge, "report", return_value=None):
        getattr(edge, verb)(load(None, options), resume=resume, ranks=ranks, watch=watch)


def runs(ranks, several):
    """One after the other: (settings, verb, resume, steps) each."""
    for one in several:
        run(ranks, *one)


def flat(record, prefix=""):
    """Every number of a record by its path, times left out."""
    for name, x in record.items() if isinstance(record, dict) else enumerate(record):
        if name in ("seconds", "tokens_per_second", "confidence"):
            continue
        if isinstance(x, dict | list):
            yield from flat(x, f"{prefix}{name}.")
        elif isinstance(x, int | float):
            yield f"{prefix}{name}", float(x)


def differences(one, two):
    """The largest difference of each metric, estimate and piece of the checkpoint of two runs, which drew the same; relative above one."""
    from klimb.store import load_latest_checkpoint, read_draws, read_json, read_jsonl

    found = {}

    def compare(a, b):
        assert a.keys() == b.keys()
        for name, x in a.items():
            here, there = torch.as_tensor(x).double(), torch.as_tensor(b[name]).double()
            apart = ((here - there).abs() / here.abs().clamp(min=1)).nan_to_num()
            found[name] = max(found.get(name, 0.0), apart.max().item() if apart.numel() else 0.0)

    for a, b in zip(*(read_jsonl(path / "metrics.jsonl") for path in (one, two)), strict=True):
        compare(dict(flat(a)), dict(flat(b)))
    if (one / "measure.json").exists():
        compare(*(dict(flat(read_json(path / "measure.json"))) for path in (one, two)))
    newest = [load_latest_checkpoint(path / "checkpoints") for path in (one, two)]
    assert newest[0].state == newest[1].state
    compare(newest[0].tensors, newest[1].tensors)
    names = sorted(path.name for path in (one / "draws").iterdir())
    assert names == sorted(path.name for path in (two / "draws").iterdir())
    for name in names:
        a, b = (read_draws(path / "draws" / name) for path in (one, two))
        assert a.draws.texts == b.draws.texts, name
    return found
