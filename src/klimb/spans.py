"""Where the time of a step went, from the spans that a profiler saw: which part of it, and on what.

A span is one operation, kernel or named range, with its beginning and end in seconds. A training names its parts
(`klimb:draw`) by ranges on the host. What a part spent on matrix products, attention, elementwise work and copies is the
time of the operations inside it, each without those it called, compiled loops among them (one of which is all layers of a
token that is drawn); on an accelerator the time of its kernels. All that is left of the part's wall-clock is Python: the
interpreter, the dispatch of operations, and an accelerator that waits for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RANGE = "klimb:"
"""what the names of our own ranges begin with"""
STEP = RANGE + "step"
LOOP = "klimb_loop::"
"""what the names of compiled loops begin with, as a profiler sees them"""
LONGEST_NAME = 120
"""letters of a name in a trace; those of C++ templates go on for pages"""
PARTS = ("draw", "score", "update", "write")
KINDS = ("matrix products", "attention", "elementwise", "copies", "layers", "Python")

MATRIX = frozenset({"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "_addmm_activation"})
COPIES = frozenset(
    {
        "copy", "cat", "clone", "contiguous", "constant_pad_nd", "embedding", "fill", "gather", "index", "index_put",
        "_index_put_impl", "index_select", "repeat", "repeat_interleave", "scatter", "slice_backward", "stack",
        "_to_copy", "to", "zero",
    }
)  # fmt: skip
FREE = frozenset(
    {
        "_local_scalar_dense", "_reshape_alias", "_unsafe_view", "alias", "as_strided", "chunk", "detach", "empty",
        "empty_like", "empty_strided", "expand", "expand_as", "is_nonzero", "item", "lift_fresh", "linear", "matmul",
        "narrow", "new_empty", "ones", "permute", "reshape", "resize", "resolve_conj", "resolve_neg", "result_type", "select",
        "set", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze",
        "view", "view_as", "zeros", "zeros_like",
    }
)  # fmt: skip
"""operations that only look at a tensor in another way, reserve memory, or call others: what they take is dispatch"""

LOOPS = {
    **dict.fromkeys(("multiply_few", "adapt"), "matrix products"),
    **dict.fromkeys(
        ("attend_token", "soften", "reweigh", "soften_backward", "attend_packed", "attend_packed_backward"),
        "attention",
    ),
    "lay_out": "copies",
    "next_token": "layers",
}
"""what a compiled loop of a CPU spends its time on, where that is not elementwise; one is all of a token's layers"""


@dataclass(frozen=True, slots=True)
class Span:
    """One operation, kernel or range.

    Attributes:
        name: as the profiler has it.
        start: seconds, on one clock for host and accelerator.
        end: seconds.
        thread: of the host, or the stream of the accelerator.
        device: True for work of an accelerator.
    """

    name: str
    start: float
    end: float
    thread: int = 0
    device: bool = False


def kind_of_operation(name: str) -> str:
    """What an operation of the host spends its own time on.

    Example:
        >>> kind_of_operation("aten::addmm_"), kind_of_operation("aten::view"), kind_of_operation("MulBackward0")
        ('matrix products', 'Python', 'Python')
        >>> kind_of_operation("klimb_loop::next_token"), kind_of_operation("klimb_loop::norm")
        ('layers', 'elementwise')
    """
    if name.startswith(LOOP):
        return LOOPS.get(name.removeprefix(LOOP), "elementwise")
    library, _, operation = name.rpartition("::")
    if not library or "autograd" in library:
        return "Python"
    operation = operation.rstrip("_")
    if "attention" in operation:
        return "attention"
    if operation in MATRIX or "mkldnn_linear" in operation or "linear_pointwise" in operation:
        return "matrix products"
    if operation in COPIES:
        return "copies"
    return "Python" if operation in FREE else "elementwise"


def kind_of_kernel(name: str) -> str:
    """What a kernel of an accelerator is for, from its name.

    Example:
        >>> kind_of_kernel("nvjet_tst_64x8_64x16_4x1_v_bz_TNT"), kind_of_kernel("Memcpy DtoD (Device -> Device)")
        ('matrix products', 'copies')
    """
    lower = name.lower()
    for kind, marks in (
        ("attention", ("flash", "fmha", "sdpa", "attention")),
        ("matrix products", ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk")),
        ("copies", ("memcpy", "memset", "copy", "catarray", "index", "gather", "scatter", "fillfunctor")),
    ):
        if any(mark in lower for mark in marks):
            return kind
    return "elementwise"


def own_times(spans: Sequence[Span]) -> Iterator[tuple[Span, float, bool]]:
    """Of each span of the host its seconds without those of the spans inside it, and whether attention called it."""
    open_: list[tuple[Span, list[float], bool]] = []
    thread: int | None = None
    for span in sorted(spans, key=lambda s: (s.thread, s.start, -s.end)):
        while open_ and (span.thread != thread or open_[-1][0].end <= span.start):
            done, inside, attends = open_.pop()
            yield done, done.end - done.start - sum(inside), attends
        thread = span.thread
        attends = False
        if open_:
            parent, inside, attends = open_[-1]
            inside.append(min(span.end, parent.end) - span.start)
            attends = attends or "scaled_dot_product" in parent.name
        open_.append((span, [], attends))
    for done, inside, attends in reversed(open_):
        yield done, done.end - done.start - sum(inside), attends


def where_time_went(spans: Sequence[Span]) -> dict[str, dict[str, float]]:
    """Part of the step -> what it was spent on -> seconds; all of them sum to the step's wall-clock.

    Where there are kernels, they are the work and the host's operations are not counted: an accelerator runs while the
    host goes on.

    Args:
        spans: of one step, with a range `klimb:step` around it and ranges of its parts inside; a part may come
            several times. What is in none of them is "rest".

    Example:
        >>> step, draw = Span("klimb:step", 0.0, 10.0), Span("klimb:draw", 1.0, 9.0)
        >>> found = where_time_went([step, draw, Span("aten::mm", 2.0, 7.0)])
        >>> found["draw"]["matrix products"], found["draw"]["Python"], found["rest"]["Python"]
        (5.0, 3.0, 2.0)
    """
    (step,) = [s for s in spans if s.name == STEP]
    ranges = {part: [s for s in spans if s.name == RANGE + part] for part in PARTS}
    wall = {part: sum(s.end - s.start for s in found) for part, found in ranges.items() if found}
    wall["rest"] = step.end - step.start - sum(wall.values())
    found = {part: dict.fromkeys(KINDS, 0.0) for part in wall}

    def part_at(moment: float) -> str | None:
        if not step.start <= moment <= step.end:
            return None
        inside = [part for part, these in ranges.items() if any(s.start <= moment <= s.end for s in these)]
        return inside[0] if inside else "rest"

    kernels = [s for s in spans if s.device]
    if kernels:
        work = [(s, kind_of_kernel(s.name), s.end - s.start) for s in kernels]
    else:
        work = [
            (s, "attention" if attends else kind_of_operation(s.name), seconds)
            for s, seconds, attends in own_times(spans)
        ]
    for span, kind, seconds in work:
        part = part_at(span.start)
        if part is not None and kind != "Python":
            found[part][kind] += seconds
    for part, kinds in found.items():
        kinds["Python"] = max(wall[part] - sum(kinds.values()), 0.0)
    return found


def chrome_trace(spans: Sequence[Span], *, most: int) -> dict[str, Any]:
    """The spans as Chrome's trace events, which Perfetto opens.

    Of more than `most` spans the longest are kept: what is left out is too narrow to see.

    Args:
        spans: of any steps, on one clock.
        most: how many there may be.
    """
    kept = sorted(sorted(spans, key=lambda s: s.start - s.end)[:most], key=lambda s: s.start)
    begin = kept[0].start if kept else 0.0
    names: Mapping[int, str] = {0: "host", 1: "accelerator"}
    return {
        "displayTimeUnit": "ms",
        "left_out": len(spans) - len(kept),
        "traceEvents": [
            *(
                {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
                for pid, name in names.items()
            ),
            *(
                {
                    "ph": "X",
                    "name": s.name[:LONGEST_NAME],
                    "ts": round(1e6 * (s.start - begin), 3),
                    "dur": round(1e6 * (s.end - s.start), 3),
                    "pid": int(s.device),
                    "tid": s.thread,
                }
                for s in kept
            ),
        ],
    }
