"""The compiled loops of a CPU give what the formulas give, for widths that fill no register and rows that fill no thread."""

import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from klimb.models import compiled, cpu_kernels, logprob, written_out
from klimb.samplers import ancestral
from klimb.spans import LOOP, LOOPS

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C++ compiler here")
DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)]


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def close(found, wanted, rounding):
    return bool(((found.double() - wanted).abs() <= rounding * (1 + wanted.abs())).all())


def normed(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


@pytest.mark.parametrize(("dtype", "rounding"), DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (5, 16), (37, 50), (64, 576)])
def test_norm_and_its_gradient(dtype, rounding, rows, width, random):
    x, y, g, above = (torch.randn(rows, width, generator=random).to(dtype) for _ in range(4))
    weight = (0.5 + torch.rand(width, generator=random)).to(dtype)
    out, size, total = cpu_kernels.norm(x, weight, 1e-5)
    wide = x.double().requires_grad_()
    wanted = normed(wide, weight.double())
    assert total is x
    assert close(out, wanted.detach(), rounding)
    wanted.backward(g.double())
    found = cpu_kernels.norm_backward(g, x, weight, size, above)
    assert close(found, wide.grad + above.double(), 2 * rounding)
    assert not close(found, wide.grad, 2 * rounding)  # the mutant: what came from above is lost
    out, _, total = cpu_kernels.norm(x, weight, 1e-5, y)
    assert torch.equal(total, x + y)
    assert close(out, normed(total.double(), weight.double()), rounding)


def test_tiles_that_the_system_does_not_lend_are_not_compiled(monkeypatch):
    monkeypatch.setattr(compiled.platform, "machine", lambda: "x86_64")
    for lends in (True, False):
        monkeypatch.setattr(compiled, "_lends_tiles", lambda lends=lends: lends)
        assert ("-U__AMX_BF16__" in compiled._flags()) == (not lends)
    monkeypatch.undo()
    if platform.machine() == "x86_64" and "amx_bf16" not in Path("/proc/cpuinfo").read_text():
        assert not compiled._lends_tiles()  # there are none


def test_a_profiler_sees_each_loop_by_its_name(random):
    x = torch.randn(4, 16, generator=random)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as looking:
        seen = cpu_kernels.norm(x, torch.ones(16), 1e-5)[0]
    names = [event.name for event in looking.events() if event.name.startswith(LOOP)]
    assert names == ["klimb_loop::norm"]
    assert torch.equal(seen, cpu_kernels.norm(x, torch.ones(16), 1e-5)[0])  # and it is the same unseen
    assert set(LOOPS) <= set(cpu_kernels.SIGNATURES)  # a loop that was renamed would count as elementwise


@pytest.mark.parametrize(("dtype", "rounding"), DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 3), (37, 50), (64, 128)])
def test_gates_and_their_gradient(dtype, rounding, rows, width, random):
    gate_up = (6 * torch.randn(rows, 2 * width, generator=random)).to(dtype)
    gate_up[0, 0], gate_up[0, 1] = -200.0, 200.0  # where the exponential ends
    g = torch.randn(rows, width, generator=random).to(dtype)
    wide = gate_up.double().requires_grad_()
    gate, up = wide.chunk(2, 1)
    wanted = nn.functional.silu(gate) * up
    wanted.backward(g.double())
    assert close(cpu_kernels.gated(gate_up), wanted.detach(), rounding)
    assert close(cpu_kernels.gated_backward(g, gate_up), wide.grad, rounding)


@pytest.mark.parametrize(("dtype", "rounding"), DTYPES)
@pytest.mark.parametrize("width", [6, 32, 64])
def test_turning_and_back(dtype, rounding, width, random):
    heads = torch.randn(9, 5, width, generator=random).to(dtype)
    angles = torch.randn(9, 1, width, generator=random).to(
        dtype
    )  # both halves apart, so that none is taken for the other
    cos, sin = angles.cos(), angles.sin()
    wide = heads[:, :3].double().requires_grad_()
    first, second = wide.chunk(2, -1)
    wanted = wide * cos.double() + torch.cat([-second, first], -1) * sin.double()
    found, g = heads.clone(), torch.randn(9, 5, width, generator=random).to(dtype)
    cpu_kernels.turn(found, 3, cos, sin)
    assert close(found[:, :3], wanted.detach(), 2 * rounding)
    assert torch.equal(found[:, 3:], heads[:, 3:])
    wanted.backward(g[:, :3].double())
    cpu_kernels.turn(g, 3, cos, sin, back=True)
    assert close(g[:, :3], wide.grad, 2 * rounding)


@pytest.mark.parametrize(("dtype", "rounding"), DTYPES)
@pytest.mark.parametrize(
    ("rows", "width", "ranks", "columns"),
    [
        (1, 5, (3,), (7,)),
        (6, 40, (4, 0, 2), (30, 10, 20)),
        (64, 96, (16, 16), (128, 70)),
        (9, 33, (70,), (100,)),
    ],
)
def test_adapters_of_few_rows(dtype, rounding, rows, width, ranks, columns, random):
    x = torch.randn(rows, width, generator=random).to(dtype)
    a = (torch.randn(width, sum(ranks), generator=random) / width**0.5).to(dtype)
    b = [torch.randn(r, d, generator=random).to(dtype) for r, d in zip(ranks, columns, strict=True)]
    y = torch.randn(rows, sum(columns), generator=random).to(dtype)
    wanted = y.double() + x.double() @ a.double() @ torch.block_diag(*(m.double() for m in b))
    adapters = cpu_kernels.Adapters(
        a, torch.cat([m.flatten() for m in b]), torch.tensor(ranks), torch.tensor(columns)
    )
    cpu_kernels.adapt(y, x, adapters)
    assert close(y, wanted, 5 * rounding)


@pytest.mark.parametrize(("dtype", "rounding"), DTYPES)
@pytest.mark.parametrize(("groups", "width"), [(1, 6), (3, 64), (5, 20), (8, 80)])
def test_attention_of_one_token_after_another(dtype, rounding, groups, width, random):
    """Prompts of several lengths, rows that leave their places, more tokens than a tile holds."""
    kv, lengths, tokens = 2, torch.tensor([19, 3, 16]), 21
    prompt, slot = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([4, 1, 0, 2, 3])
    key, value = (torch.randn(3, kv, 19, width, generator=random).to(dtype) for _ in range(2))
    own = torch.zeros(5, kv, 2, width, 16, dtype=dtype), torch.zeros(5, kv, 32, width, dtype=dtype)
    prompts, scale, said = (cpu_kernels.tiled(key), value, lengths), width**-0.5, []
    for written in range(1, tokens + 1):
        if written == 10:
            prompt, slot, said = prompt[1:], slot[1:], [[x[1:] for x in pair] for pair in said]
        heads = torch.randn(len(prompt), (groups + 2) * kv, width, generator=random).to(dtype)
        query, new_key, new_value = heads.split([groups * kv, kv, kv], 1)
        said.append([new_key, new_value])
        found = cpu_kernels.attend_token(heads, prompts, own, prompt, slot, written, scale)
        keys, values = (
            torch.cat([past[prompt], torch.stack(new, 2)], 2).double()
            for past, new in zip((key, value), zip(*said, strict=True), strict=True)
        )
        score = query.double().view(-1, kv, groups, width) @ keys.transpose(-2, -1) * scale
        place = torch.arange(19 + written)
        unseen = (place >= lengths[prompt][:, None]) & (place < 19)
        wanted = score.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1) @ values
        assert close(found, wanted.flatten(1), 2 * rounding)
    mutant = score.softmax(-1) @ values  # the padding of the shorter prompts is read
    assert not close(found, mutant.flatten(1), 2 * rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [7, 256, 700])
def test_a_token_is_chosen_as_by_torch(dtype, vocabulary, random, monkeypatch):
    logits = (3 * torch.randn(400, vocabulary, generator=random)).to(dtype)
    logits[:200, ::3] = -torch.inf
    uniform = torch.rand(400, generator=random, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    token, log_prob = cpu_kernels.choose(logits, uniform)
    monkeypatch.setattr(cpu_kernels, "usable", lambda *tensors: False)
    by_torch, wanted = ancestral.draw_tokens(logits, uniform)
    assert (
        token == by_torch
    ).float().mean() > 0.99  # a uniform may lie within rounding of the border of two tokens
    same = token == by_torch
    assert close(log_prob[same], wanted[same], 1e-5)
    assert (token[:200] % 3 > 0).all()
    assert not (token == by_torch.roll(1)).float().mean() > 0.9  # the mutant: another row's


def test_numbers_of_other_kinds_and_strides_do_as_well(random):
    logits = torch.randn(6, 40, generator=random)
    uniform = torch.rand(6, generator=random)
    wanted = cpu_kernels.choose(logits, uniform.double())
    for given in (uniform, torch.stack([uniform, uniform], 1)[:, 0]):
        assert all(torch.equal(a, b) for a, b in zip(cpu_kernels.choose(logits, given), wanted, strict=True))
    head, hidden = logprob.Head(torch.randn(40, 8, generator=random)), torch.randn(6, 8, generator=random)
    tokens = torch.randint(40, (6,), generator=random)
    for given in (tokens.int(), torch.stack([tokens, tokens], 1)[:, 1]):
        assert torch.equal(
            logprob.token_log_prob(hidden, head, given), logprob.token_log_prob(hidden, head, tokens)
        )
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert cpu_kernels.norm(logits, torch.ones(40, dtype=torch.float32), 1e-5)[1].dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_what_is_not_a_number_stays_none(random):
    x = torch.randn(2, 40, generator=random).to(torch.bfloat16)
    x[0, 3] = torch.nan
    out = cpu_kernels.norm(x, torch.ones(40, dtype=torch.bfloat16), 1e-5)[0]
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
    assert cpu_kernels.choose(x, torch.tensor([0.5, 0.5], dtype=torch.float64))[1].isnan().tolist() == [
        True,
        False,
    ]


def test_the_layers_gradient_is_that_without_loops(build, random, monkeypatch):
    """Packed tokens of two prompts and their completions, forward and back."""
    model = build("llama_untied")
    embedded = torch.randn(3 + 2 + 4 + 1, model.config.hidden_size, generator=random).requires_grad_()
    position = torch.tensor([0, 1, 2, 0, 1, 3, 4, 5, 6, 2])

    def through():
        states = written_out.through_layers(model, embedded, position, [3, 2], [[4], [1]])
        wanted = [embedded, *(p for p in model.model.layers.parameters() if p.requires_grad)]
        return [states, *torch.autograd.grad(states.square().sum(), wanted)]

    found = through()
    monkeypatch.setattr(cpu_kernels, "usable", lambda *tensors: False)
    for ours, theirs in zip(found, through(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_a_heads_gradient_is_that_without_loops(bias, trained, random, monkeypatch):
    hidden = torch.randn(11, 24, generator=random).requires_grad_()
    weight = torch.randn(2500, 24, generator=random).requires_grad_(trained)  # three blocks
    head = logprob.Head(weight, torch.randn(2500, generator=random).requires_grad_(trained) if bias else None)
    tokens = torch.randint(2500, (11,), generator=random)
    upstream = torch.randn(11, generator=random)
    wanted = [x for x in (hidden, weight, head.bias) if x is not None and x.requires_grad]

    def through():
        found = logprob.token_log_prob(hidden, head, tokens, rows=4)
        return [found, *torch.autograd.grad(found @ upstream, wanted)]

    found = through()
    monkeypatch.setattr(cpu_kernels, "usable", lambda *tensors: False)
    for ours, theirs in zip(found, through(), strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_weights_of_attention_once_more_and_their_gradient(random):
    """Two prompts, one of them padded, a window that begins after the fourth step: the weights sum to one, and are formed alike twice."""
    window = cpu_kernels.Window(groups=3, steps=2, start=4, per_prompt=12, lengths=torch.tensor([5, 2]))
    products, shared = torch.randn(2, 2, 6, 6, generator=random), torch.randn(2, 2, 6, 5, generator=random)
    own, before = products.clone(), shared.clone()
    log_sum = cpu_kernels.soften(own, before, window, 0.7)
    step = 4 + torch.arange(6)[:, None] // 3
    hidden = torch.cat(
        [
            torch.arange(5).expand(2, 2, 6, 5) >= window.lengths.view(2, 1, 1, 1),
            (torch.arange(6) > step).expand(2, 2, 6, 6),
        ],
        -1,
    )
    scores = (0.7 * torch.cat([shared, products], -1)).masked_fill(hidden, -torch.inf)
    weights = scores.double().softmax(-1)
    assert close(torch.cat([before, own], -1), weights, 1e-6)
    assert close(log_sum[..., 0], scores.double().logsumexp(-1), 1e-6)
    assert close(cpu_kernels.reweigh(products.clone(), log_sum, window, 0.7), weights[..., 5:], 1e-6)
    again = cpu_kernels.reweigh(shared.clone(), log_sum, window, 0.7, of_prompt=True)
    assert close(again, weights[..., :5], 1e-6)
    assert not close(again, (0.7 * shared).double().softmax(-1), 1e-3)  # the mutant: a softmax of its own
    g, common = torch.randn(2, 2, 6, 6, generator=random), torch.randn(2, 2, 6, 1, generator=random)
    wanted = own.double() * (g.double() - common.double()) * 0.7
    assert close(cpu_kernels.soften_backward(g, own, common, 0.7), wanted, 1e-6)


def test_without_a_compiler_there_is_no_library(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compiled.library.__wrapped__() is None
    monkeypatch.delenv("CXX")
    monkeypatch.setenv(compiled.SWITCH, "0")
    assert compiled.library.__wrapped__() is None


FAILING = {
    "it refuses": "[ \"$2\" = --version ] || { echo 'fatal error: no such thing' >&2; exit 1; }",
    "it makes nothing of use": 'for last; do :; done; [ "$last" = --version ] || echo nothing > "$last"',
}


@pytest.mark.parametrize("how", FAILING)
def test_a_compiler_that_fails_is_named(how, monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text(f"#!/bin/sh\n{FAILING[how]}\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", f"{broken} -v")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match=r"could not be compiled.*about half the speed.*KLIMB_CPU_KERNELS=0"):
        assert compiled.library.__wrapped__() is None
    if how == "it refuses":
        assert list((tmp_path / "cache" / "klimb").iterdir()) == []


def test_a_program_that_cannot_be_run_is_named_too(monkeypatch, tmp_path):
    (tmp_path / "c++").write_text("")
    (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    with pytest.warns(UserWarning, match="Exec format error"):
        assert compiled.library.__wrapped__() is None


def test_a_name_that_stays_unknown_is_found_when_it_is_linked(monkeypatch, tmp_path):
    """As of another compiler's OpenMP."""
    target = tmp_path / "kernels.so"
    sources = {"f.cpp": b'extern "C" void of_another_openmp(); extern "C" void f() { of_another_openmp(); }'}
    with pytest.raises(RuntimeError, match="of_another_openmp"):
        compiled._compile(["g++"], sources, compiled._openmp(), target)
    assert list(tmp_path.iterdir()) == []


def test_a_torn_library_is_made_anew(tmp_path):
    """In processes of their own: one that has loaded a library is given it again whatever the file says."""
    command = [
        sys.executable,
        "-c",
        "from klimb.models.compiled import library; print(library() is not None)",
    ]

    def began():
        done = subprocess.run(
            command,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout, done.stderr

    assert began() == ("True\n", "")
    (kept,) = (tmp_path / "klimb").iterdir()
    size = kept.stat().st_size
    kept.write_bytes(b"torn")
    assert began() == ("True\n", "")
    assert kept.stat().st_size == size


def test_it_is_kept_where_nobody_else_can_write(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert compiled._cache() == tmp_path / "cache" / "klimb"
    compiled._cache().chmod(0o777)
    monkeypatch.delenv("HOME")
    mine = compiled._cache()
    assert mine.parent == tmp_path
    assert mine.stat().st_mode & 0o077 == 0
    mine.chmod(0o770)
    with pytest.raises(OSError, match="only you can write into"):
        compiled._cache()


def test_compiled_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled.library.__wrapped__() is not None
    (first,) = (tmp_path / "klimb").iterdir()
    written = first.stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled.library.__wrapped__() is not None
    assert [first.stat().st_mtime_ns for first in (tmp_path / "klimb").iterdir()] == [written]
    monkeypatch.setattr(compiled, "_processor", lambda: b"another")
    assert compiled.library.__wrapped__() is not None
    assert len(list((tmp_path / "klimb").iterdir())) == 2


def test_a_second_openmp_would_bring_threads_of_its_own():
    loaded = (
        "import torch; from klimb.models.compiled import library; assert library() is not None; "
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line or 'iomp' in line}))"
    )
    assert (
        subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout
        == "1\n"
    )
