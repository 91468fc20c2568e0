"""Memory that a call makes and keeps, the precision of its GEMMs, and rows of chunks: most of it the CPU's own."""

import math

import pytest
import torch
from problems import (
    BACKENDS,
    D_S,
    DEVICE,
    GRADIENTS,
    Problem,
    assert_as_good_as_the_reference,
    assert_within_budgets,
    relative_error,
    rounding_errors,
)

from okd_kernels import cpu, distillation_loss, gemms, row_kernels, torch_rows
from okd_kernels.gemms import chunk_rows, row_stride
from okd_kernels.sides import wide


def recorded(requires, n=8, **options):
    """What a call really ran and allocated, by torch's profiler: result shapes of GEMMs, largest tensor."""
    problem = Problem(v=1024, n=n, ignored=())
    problem.bias = False
    profile = torch.profiler.profile(record_shapes=True, profile_memory=True)
    problem.run("torch", requires=requires, watch=profile, **{"workspace_bytes": 1 << 30, **options})
    gemms = []
    for event in profile.events():
        if event.name == "aten::mm":
            gemms.append((event.input_shapes[0][0], event.input_shapes[1][1]))
        elif event.name == "aten::addmm":
            gemms.append(tuple(event.input_shapes[0]))
    return gemms, max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.skipif(DEVICE != "cpu", reason="the profiler's figures are of the CPU's memory")
def test_frozen_head_allocates_no_dw():
    """In chunks of one row, a dW of 1024 x 16 floats is by far the largest tensor."""
    frozen, trained = (recorded((k,), workspace_bytes=1)[1] for k in ("student_hidden", "student_weight"))
    assert frozen < 1024 * D_S * 4 == trained


@pytest.mark.skipif(DEVICE != "cpu", reason="the profiler's figures are of the CPU's memory")
def test_buffers_of_a_small_vocabulary_are_small():
    z, u = torch.randn(2, 20000, 40)
    with torch.profiler.profile(profile_memory=True) as profile:
        distillation_loss(z, u, backend="torch")
    assert max(event.self_cpu_memory_usage for event in profile.events()) <= 8 * torch_rows.BLOCK_ELEMENTS * 4


@pytest.mark.skipif(DEVICE != "cpu", reason="the profiler's figures are of the CPU's memory")
def test_whole_logits_never_exist():
    """Chunks of 4 rows: no tensor is larger than the eight such blocks that row mathematics works in, whatever N is."""
    hidden = ("student_hidden", "teacher_hidden")
    for n in (64, 128):
        assert recorded(hidden, n=n, teacher="jsd", workspace_bytes=4 * 2 * 1024 * 4)[1] == 8 * 4 * 1024 * 4


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere the allocator keeps memory")
def test_memory_of_one_size_does_not_stay_where_another_is_needed(monkeypatch):
    monkeypatch.setattr(cpu, "KEPT_FROM", 1)
    cpu.release()
    first = cpu.empty_like(torch.empty(100), torch.float32)
    held, address = cpu.empty_like(torch.empty(100), torch.float32)[50:], first.data_ptr()
    assert held.data_ptr() != address + 200
    del first
    assert cpu.empty_like(torch.empty(100), torch.float32).data_ptr() == address
    other = cpu.empty_like(torch.empty(200), torch.float32)
    assert sorted(len(kept) for kept, _ in cpu._kept.gradients) == [400, 800]  # the held one and the new one
    assert other.shape == (200,) and cpu.empty_like(torch.empty(50), torch.float64).dtype == torch.float64


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere the allocator keeps memory")
def test_memory_of_gradients_serves_again_once_nobody_holds_them(monkeypatch):
    monkeypatch.setattr(cpu, "KEPT_FROM", 1)
    cpu.release()
    problems = [Problem(seed=seed) for seed in (0, 1)]
    expected = [problem.run("reference")[1] for problem in problems]
    held = problems[0].run("torch")[1]
    others = problems[1].run("torch")[1]
    for gradients, truth in ((held, expected[0]), (others, expected[1])):
        assert all(relative_error(gradients[k], truth[k].double()) < 1e-5 for k in GRADIENTS[:3])
    a_view, addresses = held["student_weight"][1:], {x.data_ptr() for x in others.values() if x is not None}
    mine, values = held["student_weight"].data_ptr(), a_view.clone()
    del held, others, gradients
    again = problems[1].run("torch")[1]
    assert again["student_weight"].data_ptr() in addresses - {mine} and torch.equal(a_view, values)
    cpu.release()
    assert all(relative_error(again[k], expected[1][k].double()) < 1e-5 for k in GRADIENTS[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_fp32_logits_and_fp32_gradients(backend):
    """Hidden states and weights enter the GEMMs in bf16, as in nn.Linear; logits are fp32, and so are the gradients,
    which were never rounded to bf16."""
    problem, narrow = Problem(spread=0.1), Problem(spread=0.1)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = problem.run(backend, teacher="forward_kl")
    for name, x in narrow.operands.items():
        narrow.operands[name] = x if "bias" in name else x.bfloat16()
    widened = Problem(spread=0.1)
    widened.operands = {name: x.float() for name, x in narrow.operands.items()}
    truth, plain = (widened.run("reference", dtype, teacher="forward_kl") for dtype in (torch.float64, torch.float32))
    of_rounding = rounding_errors(narrow, backend, truth[1], teacher="forward_kl")
    mass = {"student": 1.0, "teacher": 1.0, "forward_kl": 1.0, "reverse_kl": 1.0}
    assert_within_budgets(
        found, truth, [plain], torch.float32, mass, of_rounding, dict.fromkeys(GRADIENTS, torch.float32)
    )
    for name, gradient in found[1].items():
        assert gradient.dtype == torch.float32
        counted = gradient[gradient != 0]
        assert (counted.bfloat16().float() != counted).double().mean() > 0.9, f"d{name} was rounded"


def test_autocast_leaves_fp64_alone():
    problem = Problem(dtype=torch.float64)
    expected, _ = problem.run("torch")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        values, _ = problem.run("torch")
    assert values["student"].dtype == torch.float64 and torch.equal(values["student"], expected["student"])


@pytest.mark.skipif(DEVICE != "cpu", reason="other devices multiply 16-bit operands")
@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_that_does_not_multiply_16_bits_is_spared_them(dtype, has, monkeypatch):
    """Its GEMMs get operands widened a block at a time; either way the gradients are as good."""
    monkeypatch.setattr(gemms, "has_fast_gemm", lambda other, _: has or other != dtype)
    monkeypatch.setattr(gemms, "HEAD_BLOCK", 24)  # of 131 head rows
    problem, seen = Problem(dtype=dtype, n=40, ignored=(2, 39)), []
    watched = {name: getattr(torch, name) for name in ("mm", "addmm")}
    for name in watched:

        def watch(*args, of=name, **options):
            seen.extend((x.dtype, x.shape) for x in args[-2:])
            return watched[of](*args, **options)

        monkeypatch.setattr(gemms.torch, name, watch)
    for workspace_bytes in (1 << 14, 1 << 17):  # chunks of 13 rows, and one chunk of them all
        assert_as_good_as_the_reference(problem, "torch", teacher="jsd", workspace_bytes=workspace_bytes)
    assert (dtype in {x for x, _ in seen}) == has
    if not has:  # but for the 38 hidden states, no more than a block is widened
        assert max(max(shape) for _, shape in seen) == 38


def _set_precision(library, value):
    library.fp32_precision = value


PRECISIONS = {  # how to set it, how to set it back
    "default": (lambda: None, lambda: None),
    "of old": (
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: torch.set_float32_matmul_precision("highest"),
    ),
    "all": (lambda: _set_precision(torch.backends, "tf32"), lambda: _set_precision(torch.backends, "none")),
    "oneDNN": (
        lambda: _set_precision(torch.backends.mkldnn.matmul, "bf16"),
        lambda: _set_precision(torch.backends.mkldnn.matmul, "none"),
    ),
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_row_mathematics_is_fp32_whatever_matrix_products_are(precision):
    """Inner products of rows are no business of autocast's, nor of the precision of matrix products."""
    z, u = torch.randn(2, 5, 2001, device=DEVICE) * 2
    options = {"student": "jsd", "backend": "torch", "reduction": "none"}
    expected = distillation_loss(z, u, **options)
    change, restore = PRECISIONS[precision]
    change()
    try:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            found = distillation_loss(z, u, **options)
    finally:
        restore()
    torch.testing.assert_close(found.student, expected.student, rtol=1e-6, atol=0)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(found.metrics[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab_size", [1, 131, 1024, 32768, 50257, 128256, 131072, 262144, 524288])
def test_rows_of_logits_do_not_share_cache_sets(vocab_size):
    stride = row_stride(vocab_size)
    assert vocab_size <= stride <= 1.02 * vocab_size + 16
    assert stride % 16 == 0 and stride % 1024 != 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scaling_by_triton(dtype, monkeypatch):
    """Every element once, also where each program has several blocks; a factor of 1 leaves all as it is."""
    for name, value in (("SCALE_BLOCK", 64), ("SCALE_PROGRAMS", 3)):
        monkeypatch.setattr(row_kernels, name, value)
    x = torch.randn(19, 37, dtype=dtype, device=DEVICE)
    factors = torch.tensor([1.0, 1 / 3, math.nan], dtype=wide(dtype), device=DEVICE)
    for factor in factors:
        found = row_kernels.scale_(x.clone(), factor)
        torch.testing.assert_close(found, (x * factor).to(dtype), equal_nan=True)
    assert torch.equal(row_kernels.scale_(x.clone(), factors[0]), x)
    assert row_kernels.scale_(x[:0].clone(), factors[1]).shape == (0, 37)


@pytest.mark.parametrize("n, most", [(6277, 2048), (8192, 2048), (100, 2048), (4000, 1000), (300, 100)])
def test_chunks_on_a_gpu_end_with_a_tile(n, most):
    """128 rows where that many fit: 6277 rows go as four chunks of 1664, not of 1570; and never more than fit."""
    rows = chunk_rows(n, 10, 10 * most, torch.device("cuda"))
    assert rows <= most and (rows % 128 == 0 or most < 128 or n < 128)
    assert -(-n // rows) == -(-n // (most // 128 * 128 or most))
    assert chunk_rows(n, 10, 10 * most, torch.device("cpu")) == -(-n // -(-n // most))
