"""Where the time and the memory of a training went, looked at in one or two of its steps with torch's profiler.

The second step is looked at, and the second one that draws, where that is another: the first of its kind is slower. A
profiler only watches: the numbers of a training are the same with it. What it saw becomes a record (`klimb.spans`) in
RUN/profile.json, and a trace for https://ui.perfetto.dev in RUN/trace.json.gz: at most TRACE_SPANS spans, 3 MB.
"""

from __future__ import annotations

import gzip
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Collection, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from klimb import store
from klimb.spans import RANGE, STEP, Span, chrome_trace, where_time_went
from klimb.steps import Step

TRACE_SPANS = 200_000
WRITE = RANGE + "write"


@dataclass(frozen=True)
class Seen:
    """What a profiler saw of a training.

    Attributes:
        spans: step number -> what went on in it.
        kinds: step number -> "drawn", or "replayed" where nothing was.
        seconds: of every other step but the first: draw, score and update together, and of which kind it was.
        origin: nanoseconds, from where the spans count their seconds.
    """

    spans: dict[int, list[Span]] = field(default_factory=dict)
    kinds: dict[int, str] = field(default_factory=dict)
    seconds: list[tuple[str, float]] = field(default_factory=list)
    origin: int = field(default_factory=time.time_ns)


def steps_to_look_at(first: int, last: int, *, replay_steps: int) -> tuple[int, ...]:
    """The second step after `first` that is taken, and the second that draws; at most up to `last`.

    Example:
        >>> steps_to_look_at(0, 40, replay_steps=24), steps_to_look_at(30, 40, replay_steps=24)
        ((2, 26), (32,))
    """
    seconds = {min(first + 2, last), min(max(first, replay_steps) + 2, last)}
    return tuple(sorted(step for step in seconds if step > first))


def looked_at(
    steps: Iterator[Step], which: Collection[int], seen: Seen, *, first: int, device: torch.device
) -> Generator[Step]:
    """The same steps; those whose number is in `which` are profiled, until the next one is asked for.

    Args:
        steps: of a training.
        which: numbers of steps.
        seen: is told what was seen.
        first: the number before the first of the steps.
        device: where the model is.
    """
    number = first
    while True:
        number += 1
        with _looking(seen, number, device) if number in which else nullcontext():
            step = next(steps, None)
            if step is None:
                return
            kind = "replayed" if step.fresh is None else "drawn"
            if number in which:
                seen.kinds[number] = kind
            elif number > first + 1:
                seen.seconds.append((kind, sum(step.seconds.values())))
            with record_function(WRITE):  # the draws, the line, and what is due: evaluation, checkpoint
                yield step


@contextmanager
def _looking(seen: Seen, number: int, device: torch.device) -> Generator[None]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notes on stderr
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with torch_profile(activities=activities, acc_events=True) as profiler, record_function(STEP):
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seen.spans[number] = spans_of(profiler, origin=seen.origin)


def spans_of(profiler: torch_profile, *, origin: int) -> list[Span]:
    """What a profiler that has ended saw, in seconds from `origin` (nanoseconds since 1970).

    Its own list of events takes forty times as long to make, and a gigabyte.
    """
    inner: Any = profiler.profiler
    events = inner.kineto_results.events()
    host = torch.autograd.DeviceType.CPU
    return [
        Span(
            e.name(),
            (e.start_ns() - origin) / 1e9,
            (e.start_ns() - origin + e.duration_ns()) / 1e9,
            e.start_thread_id() if e.device_type() == host else e.device_resource_id(),
            e.device_type() != host,
        )
        for e in events
        # the accelerator's side repeats the ranges of the host
        if e.device_type() == host or not e.is_user_annotation()
    ]


def profile_record(seen: Seen, memory: dict[str, int]) -> dict[str, Any]:
    """What profile.json holds: seconds of each part by what it was spent on, and bytes of memory.

    `seconds_without_profiler` is the median of the other steps of the same kind, parts together: a profiler slows small
    operations down.
    """
    steps = []
    for number, spans in sorted(seen.spans.items()):
        parts = where_time_went(spans)
        others = [seconds for kind, seconds in seen.seconds if kind == seen.kinds[number]]
        steps.append(
            {
                "step": number,
                "kind": seen.kinds[number],
                "seconds": sum(sum(kinds.values()) for kinds in parts.values()),
                "seconds_without_profiler": statistics.median(others) if others else None,
                "parts": parts,
            }
        )
    return {"steps": steps, "memory": memory}


def memory_used(model: Iterable[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes: of the model's weights, of what the optimizer keeps beside them, and the most there was.

    `peak` is of the process on the host (Python and its libraries take about half a gigabyte of it); `device_peak`, on
    CUDA, is the most that tensors took there.
    """
    weights = {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in model}
    kept = [w for group in optimizer.param_groups for w in group["params"]]
    kept += [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    beside = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    found = {
        "weights": sum(weights.values()),
        "optimizer": sum(n for place, n in beside.items() if place not in weights),
        "peak": peak_of_process(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["device_peak"] = torch.cuda.max_memory_allocated()
    return found


def peak_of_process() -> int:
    """Bytes that this process has held at most.

    The system's account of resources (`ru_maxrss`) begins with what the program held that started this one, so Linux is asked for
    the memory itself.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write_profile(path: Path, seen: Seen, memory: dict[str, int]) -> dict[str, Any]:
    """Write profile.json and trace.json.gz into the directory of a run; what profile.json holds."""
    record = profile_record(seen, memory)
    trace = chrome_trace([s for spans in seen.spans.values() for s in spans], most=TRACE_SPANS)
    packed = gzip.compress(json.dumps(trace, separators=(",", ":")).encode(), compresslevel=6)
    store.write_whole(path / "trace.json.gz", packed)
    store.write_json(path / "profile.json", record)
    return record
