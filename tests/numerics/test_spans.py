"""Where the time went, on spans written by hand: each second is counted once, and by the right name."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from klimb.profile import spans_of, steps_to_look_at
from klimb.spans import (
    KINDS,
    STEP,
    Span,
    chrome_trace,
    kind_of_kernel,
    kind_of_operation,
    own_times,
    where_time_went,
)

HOST = [
    Span(STEP, 0, 100),
    Span("klimb:draw", 10, 40),
    Span("aten::linear", 11, 21),
    Span("aten::addmm", 12, 20),  # inside linear, whose own two seconds are dispatch
    Span("aten::copy_", 13, 15),  # inside addmm
    Span("aten::scaled_dot_product_attention", 25, 35),
    Span("aten::bmm", 26, 30),  # inside attention
    Span("klimb:update", 50, 90),
    Span("MulBackward0", 51, 60, thread=2),  # the backward pass may run on a thread of its own
    Span("aten::mul", 52, 59, thread=2),
    Span("klimb:update", 95, 98),  # a part may come twice
    Span("aten::mm", 95.5, 97),
    Span("aten::mm", 200, 300),  # of another step
]


def test_every_second_of_the_host_is_counted_once():
    found = where_time_went(HOST)
    assert found["draw"] == dict(zip(KINDS, (6, 10, 0, 2, 0, 12), strict=True))
    assert found["update"] == dict(zip(KINDS, (1.5, 0, 7, 0, 0, 34.5), strict=True))
    assert found["rest"] == dict(zip(KINDS, (0, 0, 0, 0, 0, 27), strict=True))
    assert set(found) == {"draw", "update", "rest"}
    assert sum(sum(kinds.values()) for kinds in found.values()) == 100


def test_own_times_sum_to_what_is_covered():
    spans = [
        Span("a", 0, 10),
        Span("b", 0, 10),
        Span("c", 2, 5),
        Span("d", 5, 7),
        Span("e", 3, 4),
        Span("f", 12, 13),
    ]
    own = {span.name: seconds for span, seconds, _ in own_times(spans)}
    assert own == {"a": 0, "b": 5, "c": 2, "d": 2, "e": 1, "f": 1}
    assert {s.name for s, _, attends in own_times(HOST) if attends} == {"aten::bmm"}


def test_where_there_are_kernels_they_are_the_work():
    kernels = [
        Span("sm90_xmma_gemm_bf16", 12, 18, thread=7, device=True),
        Span("void pytorch_flash::flash_fwd_kernel", 18, 20, thread=7, device=True),
        Span("Memcpy DtoH (Device -> Pageable)", 60, 61, thread=7, device=True),
        Span("void at::native::vectorized_elementwise_kernel", 62, 70, thread=7, device=True),
    ]
    found = where_time_went([*HOST, *kernels])
    assert found["draw"] == dict(zip(KINDS, (6, 2, 0, 0, 0, 22), strict=True))
    assert found["update"] == dict(zip(KINDS, (0, 0, 8, 1, 0, 34), strict=True))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::baddbmm", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::_index_put_impl_", "copies"),
        ("aten::cat", "copies"),
        ("aten::silu_backward", "elementwise"),
        ("aten::_foreach_norm", "elementwise"),
        ("aten::as_strided", "Python"),
        ("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", "Python"),
        ("Optimizer.step#AdamW.step", "Python"),
    ],
)
def test_operations(name, kind):
    assert kind_of_operation(name) == kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (
            "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn>",
            "matrix products",
        ),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", "copies"),
        ("void at::native::index_elementwise_kernel<128, 4, ...>", "copies"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "elementwise"),
    ],
)
def test_kernels(name, kind):
    assert kind_of_kernel(name) == kind


def test_a_trace_keeps_the_longest():
    spans = [Span(f"aten::op{i}" + "x" * 500, float(i), i + 0.001 * (1 + i % 5)) for i in range(50)]
    trace = chrome_trace(spans, most=10)
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert trace["left_out"] == 40
    assert [e["name"].rstrip("x") for e in events] == [f"aten::op{i}" for i in range(4, 50, 5)]
    assert {e["dur"] for e in events} == {5000.0}
    assert [e["ts"] for e in events] == [
        1e6 * (i - 4) for i in range(4, 50, 5)
    ]  # from the first that is kept
    assert max(len(e["name"]) for e in events) <= 120


def test_a_real_profile_becomes_spans_inside_each_other():
    x = torch.randn(256, 256)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler, record_function(STEP):
        for _ in range(3):
            x = torch.relu(x @ x) / 100
    found = where_time_went(spans_of(profiler, origin=0))["rest"]
    assert found["matrix products"] > 0
    assert found["elementwise"] > 0
    assert found["attention"] == 0
    assert found["Python"] > 0


def test_which_steps_are_looked_at():
    assert steps_to_look_at(0, 6, replay_steps=0) == (2,)
    assert steps_to_look_at(0, 1, replay_steps=0) == (1,)
    assert steps_to_look_at(0, 40, replay_steps=24) == (2, 26)
    assert steps_to_look_at(0, 4, replay_steps=4) == (2, 4)
    assert steps_to_look_at(30, 40, replay_steps=24) == (32,)
    assert steps_to_look_at(40, 40, replay_steps=24) == ()
