"""The compiled loops of a CPU (`cpu_kernels.cpp`) for torch's tensors: norms, gates, angles, attention of a token, its choice.

N tokens, D wide. Each does in one pass over its data what torch does in four to twenty; sums are in float32, what comes out is rounded once. For
float32 and bfloat16 on a CPU where there is a compiler (`klimb.models.compiled`): ask `usable` first. Nothing here is differentiable.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from klimb.models.compiled import library
from klimb.spans import LOOP

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LANES = 16
"""numbers that the loops take at a time"""
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float}
SIGNATURES = {
    "norm": "ppppppiif",
    "norm_backward": "ppppppii",
    "gated": "ppii",
    "gated_backward": "pppii",
    "adapt": "ppppiiiiipp",
    "turn": "pppiiiif",
    "attend_token": "pppppppppiiiiiiif",
    "choose": "ppppii",
    "absorb": "ppppppiiii",
    "soften": "pppiiiiiiipf",
    "reweigh": "ppiiiiiiipif",
    "soften_backward": "pppiif",
    "lay_out": "ppii",
    "multiply_few": "pppi",
    "next_token": "pippppppppiiiiiiiff",
    "attend_packed": "pppppppiiiiiiiif",
    "attend_packed_backward": "ppppppppppppiiiiiiiiif",
}
"""of each loop: pointers, 64-bit integers and floats"""


def usable(x: Tensor, *others: Tensor) -> bool:
    """True where these tensors, of one dtype, can go through the loops."""
    return (
        x.is_cpu
        and x.dtype in NAMES
        and all(other.dtype == x.dtype for other in others)
        and library() is not None
    )


def norm(x: Tensor, weight: Tensor, eps: float, plus: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(x + plus) at unit mean square times the weight [N, D]; what it was multiplied by [N, 1]; and the sum [N, D]."""
    x, plus = x.contiguous(), None if plus is None else plus.contiguous()
    total = x if plus is None else torch.empty_like(x)
    out, size = torch.empty_like(x), x.new_empty(len(x), 1, dtype=torch.float32)
    _call("norm", x.dtype, x, plus, weight, total, out, size, *x.shape, eps)
    return out, size, total


def norm_backward(g: Tensor, x: Tensor, weight: Tensor, size: Tensor, above: Tensor) -> Tensor:
    """[N, D] `above` plus the gradient of x, given that of its norm, and what it was multiplied by."""
    g, x, above = g.contiguous(), x.contiguous(), above.contiguous()
    out = torch.empty_like(x)
    _call("norm_backward", x.dtype, g, x, weight, size, above, out, *x.shape)
    return out


def gated(gate_up: Tensor) -> Tensor:
    """[N, 2 D] gate and up side by side -> [N, D] silu(gate) up."""
    gate_up = gate_up.contiguous()
    out = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    _call("gated", out.dtype, gate_up, out, *out.shape)
    return out


def gated_backward(g: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient [N, 2 D] of gate and up, given that of `gated` [N, D]."""
    g, gate_up = g.contiguous(), gate_up.contiguous()
    out = torch.empty_like(gate_up)
    _call("gated_backward", g.dtype, g, gate_up, out, *g.shape)
    return out


@dataclass(frozen=True)
class Adapters:
    """Low-rank adapters of layers side by side, for few rows.

    Attributes:
        a: [D_in, r] of all of them, times their scales.
        b: [r_i, d_i] of each, one after the other, flat.
        ranks: [n] int64, r_i, 0 for a layer without one.
        columns: [n] int64, d_i.
    """

    a: Tensor
    b: Tensor
    ranks: Tensor
    columns: Tensor


def adapt(y: Tensor, x: Tensor, adapters: Adapters) -> None:
    """Y [N, d_1 + ... + d_n] += x A' B' for few rows x [N, D_in]; all contiguous."""
    a, b, ranks, columns = adapters.a, adapters.b, adapters.ranks, adapters.columns
    _call("adapt", x.dtype, x, a, b, y, *x.shape, a.shape[1], y.shape[1], len(ranks), ranks, columns)


@cache
def multiplies() -> bool:
    """True where `multiply_few` and `next_token` run and gain over torch's products: on a processor with AMX that the system lends, or, without it, AVX512-BF16."""
    loops = library()
    return loops is not None and bool(loops.products_ready())


LAID = 32
"""a matrix is laid out in blocks of so many rows and columns, with zeros beyond its edges"""


def laid_size(columns: int, width: int) -> int:
    """How many numbers a matrix [columns, width] has when it is laid out."""
    return -(-columns // LAID) * LAID * -(-width // LAID) * LAID


def lay_out(weight: Tensor, to: Tensor | None = None) -> Tensor:
    """[D_out, D_in] as products of few rows read it, flat, in memory that is given or new."""
    weight = weight.contiguous()
    to = weight.new_empty(laid_size(*weight.shape)) if to is None else to
    _call("lay_out", weight.dtype, weight, to, *weight.shape)
    return to


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "a", "b")),
        *((name, ctypes.c_int64) for name in ("width", "columns", "rank")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("attention_norm", ctypes.c_void_p),
        ("query_key_value", _Linear),
        ("output", _Linear),
        ("mlp_norm", ctypes.c_void_p),
        ("gate_up", _Linear),
        ("down", _Linear),
        *((name, ctypes.c_void_p) for name in ("prompt_key", "prompt_value", "key", "value")),
    ]


@dataclass(frozen=True)
class Laid:
    """x W' + bias + (x A') B' for few rows: what is laid out, and what it is made of.

    Attributes:
        width: D_in.
        columns: D_out.
        weight: [D_out, D_in], laid out.
        bias: [D_out] or None.
        rank: r, or 0.
        a: [r, D_in], laid out, or None.
        b: [D_out, r], laid out, or None.
    """

    width: int
    columns: int
    weight: Tensor
    bias: Tensor | None = None
    rank: int = 0
    a: Tensor | None = None
    b: Tensor | None = None

    def _told(self) -> _Linear:
        at = [None if x is None else x.data_ptr() for x in (self.weight, self.bias, self.a, self.b)]
        return _Linear(*at, self.width, self.columns, self.rank)


def multiply_few(x: Tensor, linear: Laid) -> Tensor:
    """[N, D_in] -> [N, D_out] in bfloat16: x A' is rounded, and the sum of all once. Ask `multiplies` first."""
    x = x.contiguous()
    y = x.new_empty(len(x), linear.columns)
    _call("multiply_few", x.dtype, x, ctypes.addressof(told := linear._told()), y, len(x))
    del told  # it is read until here
    return y


class Layers:
    """All layers of a Llama as `next_token` reads them: of each its norms, its four products, and what it remembers.

    Attributes:
        heads: of queries.
        kv_heads: of keys.
        width: of a head.
        eps: of the norms.
        scale: what products of query and key are multiplied by.
    """

    def __init__(
        self,
        layers: Sequence[tuple[Tensor, Laid, Laid, Tensor, Laid, Laid]],
        last_norm: Tensor,
        prompts: Sequence[tuple[Tensor, Tensor]],
        own: Sequence[tuple[Tensor, Tensor]],
        *,
        eps: float,
        scale: float,
    ):
        """Norm, query-key-value, output, norm, gate-up and down of each layer; keys and values as `attend_token` has them."""
        self.held = layers, last_norm, prompts, own  # the addresses are theirs
        self.told = (_Layer * len(layers))(
            *(
                _Layer(
                    attention_norm.data_ptr(),
                    *(x._told() for x in (query_key_value, output)),
                    mlp_norm.data_ptr(),
                    *(x._told() for x in (gate_up, down)),
                    *(x.data_ptr() for x in (*of_prompts, *of_rows)),
                )
                for (
                    attention_norm,
                    query_key_value,
                    output,
                    mlp_norm,
                    gate_up,
                    down,
                ), of_prompts, of_rows in zip(layers, prompts, own, strict=True)
            )
        )
        _, self.kv_heads, self.tiles, self.width, _ = own[0][0].shape
        self.heads, self.longest = layers[0][2].width // self.width, prompts[0][1].shape[2]
        self.eps, self.scale, self.last_norm = eps, scale, last_norm


def next_token(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    layers: Layers,
    lengths: Tensor,
    prompt: Tensor,
    slot: Tensor,
    written: int,
) -> Tensor:
    """[R, D] embedded tokens, which are used up, through all layers and the last norm; keys and values are written down.

    Args:
        x: [R, D], contiguous.
        cos: [R, 1, w] of each row's position.
        sin: likewise.
        layers: all of them.
        lengths: [P] tokens of each prompt.
        prompt: [R] of each row.
        slot: [R] where each row's own tokens lie.
        written: tokens of each row, with this one.
    """
    assert all(t.is_contiguous() for t in (x, cos, sin, lengths, prompt, slot))
    assert written <= layers.tiles * LANES
    out = torch.empty_like(x)
    where = (lengths, prompt, slot, len(x), layers.heads, layers.kv_heads, layers.width)
    sizes = (layers.longest, written, layers.tiles, layers.eps, layers.scale)
    told = ctypes.addressof(layers.told)
    _call("next_token", x.dtype, told, len(layers.told), x, cos, sin, layers.last_norm, out, *where, *sizes)
    return out


def large_pages(like: Tensor, *shape: int) -> Tensor:
    """Memory for tensors that are read from end to end again and again, not filled: in large pages, where the system has them."""
    memory = like.new_empty(shape)
    loops = library()
    if loops is not None:
        loops.in_large_pages(ctypes.c_void_p(memory.data_ptr()), ctypes.c_int64(memory.nbytes))
    return memory


def turn(heads: Tensor, count: int, cos: Tensor, sin: Tensor, *, back: bool = False) -> None:
    """Turn the first `count` heads of [N, H, w], contiguous, by their angles [N, 1, w], in place; or their gradients, back."""
    assert all(x.is_contiguous() for x in (heads, cos, sin))
    rows, per_row, width = heads.shape
    sign = -1.0 if back else 1.0
    _call("turn", heads.dtype, heads, cos, sin, rows, count, width, per_row * width, sign)


def attend_token(
    heads: Tensor,
    prompts: tuple[Tensor, Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    prompt: Tensor,
    slot: Tensor,
    written: int,
    scale: float,
) -> Tensor:
    """[R, H w] what each row's query finds among its prompt's tokens and its own; key and value are written down with them first.

    Args:
        heads: [R, H + 2 K, w] query, key and value, contiguous.
        prompts: keys [P, K, tiles, w, 16], values [P, K, L, w], and how many tokens each prompt has [P] int64; they stand on the left.
        own: keys [S, K, tiles, w, 16] and values [S, K, 16 tiles, w].
        prompt: [R] int64 of each row.
        slot: [R] int64 where each row's own tokens lie.
        written: tokens of each row, with this one.
        scale: what products of query and key are multiplied by.
    """
    rows, count, width = heads.shape
    assert written <= own[1].shape[2]
    kv, longest, tiles = own[0].shape[1], prompts[1].shape[2], own[0].shape[2]
    out = heads.new_empty(rows, (count - 2 * kv) * width)
    sizes = (rows, count - 2 * kv, kv, width, longest, written, tiles)
    _call("attend_token", heads.dtype, heads, *prompts, prompt, slot, *own, out, *sizes, scale)
    return out


def tiled(keys: Tensor) -> Tensor:
    """[..., L, w] keys -> [..., tiles, w, 16], as `attend_token` reads them."""
    padded = torch.nn.functional.pad(keys, (0, 0, 0, -keys.shape[-2] % LANES))
    return padded.unflatten(-2, (-1, LANES)).transpose(-2, -1).contiguous()


def choose(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row [R] int64 by the inverse of the cumulated distribution of the logits [R, V], and its log-probability [R] float64."""
    logits, uniform = logits.contiguous(), uniform.double().contiguous()
    assert len(uniform) == len(logits)
    token, log_prob = torch.empty_like(uniform, dtype=torch.int64), torch.empty_like(uniform)
    _call("choose", logits.dtype, logits, uniform, token, log_prob, *logits.shape)
    return token, log_prob


def absorb(
    logits: Tensor, tokens: Tensor, largest: Tensor, total: Tensor, chosen: Tensor, seen: int, *, keep: bool
) -> Tensor:
    """Go one block of the vocabulary further in log softmax(logits)[token]; what all sums before were multiplied by [n] float32.

    Args:
        logits: [n, v] contiguous; become exp(logits - largest) if `keep`.
        tokens: [n] int64.
        largest: [n] float32 the largest logit so far, in place.
        total: [n] float32 sum of exp(logit - largest), in place.
        chosen: [n] float32 logit of the row's token less `largest`, in place.
        seen: tokens of the vocabulary gone through.
        keep: whether the mass is wanted.
    """
    factor = torch.empty_like(total)
    _call(
        "absorb", logits.dtype, logits, tokens, largest, total, chosen, factor, *logits.shape, seen, int(keep)
    )
    return factor


@dataclass(frozen=True)
class Window:
    """Which rows of scores see what: P prompts x K x G x steps x groups rows, in this order.

    Attributes:
        groups: rows of one step.
        steps: of the window.
        start: steps before it.
        per_prompt: rows of a prompt.
        lengths: [P] int64 tokens of each prompt.
    """

    groups: int
    steps: int
    start: int
    per_prompt: int
    lengths: Tensor


def soften(own: Tensor, before: Tensor | None, window: Window, scale: float) -> Tensor:
    """Products of queries with the row's own keys [..., m] and its prompt's [..., L] become one softmax, in place.

    The logs of the sums come back [..., 1]; what a row does not see weighs 0. All float32 and contiguous.
    """
    log_sum = own.new_empty(*own.shape[:-1], 1)
    longest = 0 if before is None else before.shape[-1]
    _call("soften", own.dtype, own, before, log_sum, *_seen(own.shape[-1], longest, log_sum, window), scale)
    return log_sum


def reweigh(
    scores: Tensor, log_sum: Tensor, window: Window, scale: float, *, of_prompt: bool = False
) -> Tensor:
    """The weights of `soften` once more, of own tokens or of the prompt's, from the logs of the sums; in place of the products."""
    columns = scores.shape[-1]
    sizes = _seen(0 if of_prompt else columns, columns if of_prompt else 0, log_sum, window)
    _call("reweigh", scores.dtype, scores, log_sum, *sizes, int(of_prompt), scale)
    return scores


def _seen(columns: int, longest: int, log_sum: Tensor, window: Window) -> tuple[Any, ...]:
    where = (window.groups, window.steps, window.start, window.per_prompt)
    return log_sum.numel(), columns, *where, longest, window.lengths


def soften_backward(g: Tensor, weights: Tensor, common: Tensor, scale: float) -> Tensor:
    """Weights (g - common) scale [..., m], the gradient of the products, in place of g; common [..., 1]. All float32 and contiguous."""
    _call("soften_backward", g.dtype, g, weights, common, common.numel(), g.shape[-1], scale)
    return g


@cache
def attends() -> bool:
    """True where `attend_packed` runs: the system lends the processor's tiles of numbers only to who asks for them."""
    loops = library()
    return loops is not None and bool(loops.attention_ready())


@dataclass(frozen=True)
class Sequences:
    """Where packed tokens lie: those of P prompts, then those of their P x G completions.

    Attributes:
        prompts: P.
        completions: G.
        start: [P + P G] int64 where each begins.
        length: [P + P G] int64 its tokens; a completion may have none.
    """

    prompts: int
    completions: int
    start: Tensor
    length: Tensor


PARTS = 8
"""the completions of a prompt are gone back through in so many parts at most, each with its own sums for the prompt"""


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, where: Sequences, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention [N, H, w] of completions over their prompt and themselves, of prompts over themselves; and the logs of the sums [N, H].

    All bfloat16: query [N, H, w], key and value [N, K, w], the heads of a token side by side.
    """
    query, key, value = (_heads_side_by_side(x) for x in (query, key, value))
    out, log_sum = query.new_empty(query.shape), query.new_empty(query.shape[:2], dtype=torch.float32)
    sizes = (where.prompts, where.completions, *_sizes(query, key, value))
    _call(
        "attend_packed",
        query.dtype,
        query,
        key,
        value,
        out,
        log_sum,
        where.start,
        where.length,
        *sizes,
        scale,
    )
    return out, log_sum


def attend_packed_backward(
    upstream: Tensor,
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_sum: Tensor,
    where: Sequences,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients [N, H, w], [N, K, w], [N, K, w] of query, key and value, given that of what `attend_packed` gave."""
    upstream, parts = upstream.contiguous(), min(where.completions, PARTS)
    query, key, value = (_heads_side_by_side(x) for x in (query, key, value))
    found = [x.new_empty(x.shape) for x in (query, key, value)]
    of_prompts = int(where.length[: where.prompts].sum())
    shared = query.new_empty(parts + 1, 2, of_prompts, *key.shape[1:], dtype=torch.float32)
    what = (upstream, out, query, key, value, log_sum, *found, shared, where.start, where.length)
    sizes = (where.prompts, where.completions, parts, *_sizes(query, key, value))
    _call("attend_packed_backward", query.dtype, *what, *sizes, scale)
    return found[0], found[1], found[2]


def _sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    return query.shape[1], key.shape[1], query.shape[2], query.stride(0), key.stride(0), value.stride(0)


def _heads_side_by_side(x: Tensor) -> Tensor:
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def _call(name: str, dtype: torch.dtype, *what: Any) -> None:
    """Run a loop for numbers of this dtype; tensors go as their address. A profiler that looks on sees it by its name."""
    loop = _loop(name, dtype)
    addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in what]
    if torch.autograd._profiler_enabled():
        with record_function(LOOP + name):
            loop(*addresses)
    else:
        loop(*addresses)


@cache
def _loop(name: str, dtype: torch.dtype) -> Callable[..., None]:
    function = getattr(library(), f"{name}_{NAMES[dtype]}")
    function.argtypes, function.restype = [KINDS[kind] for kind in SIGNATURES[name]], None
    return function
