"""What a call computes and allocates; kept memory; 16-bit operands on a CPU; autocast and the process's precision."""

import pytest
import torch
from problems import (
    BACKENDS,
    D_S,
    D_T,
    DEVICE,
    GRADIENTS,
    Problem,
    assert_as_good_as_the_reference,
    assert_logits_as_good_as_the_reference,
)

from okd_kernels import Objective, cpu, distillation_loss, gemms, torch_rows

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere the allocator keeps memory, and GEMMs take 16 bits")


def recorded(requires, n=8, **options):
    """What a call really ran and allocated, by torch's profiler: result shapes of GEMMs, largest tensor."""
    problem = Problem(v=1024, n=n, ignored=())
    problem.bias = False
    profile = torch.profiler.profile(record_shapes=True, profile_memory=True)
    problem.run("torch", requires=requires, watch=profile, **{"workspace_bytes": 1 << 30, **options})
    products = []
    for event in profile.events():
        if event.name == "aten::mm":
            products.append((event.input_shapes[0][0], event.input_shapes[1][1]))
        elif event.name == "aten::addmm":
            products.append(tuple(event.input_shapes[0]))
    return products, max(event.self_cpu_memory_usage for event in profile.events())


LOGITS, DX_S, DW_S, DX_T, DW_T = (8, 1024), (8, D_S), (1024, D_S), (8, D_T), (1024, D_T)


@on_cpu
@pytest.mark.parametrize(
    "requires, options, products",
    [
        ((), {}, [LOGITS, LOGITS]),
        (("student_hidden",), {}, [LOGITS, LOGITS, DX_S]),
        (("student_hidden", "student_weight"), {}, [LOGITS, LOGITS, DX_S, DW_S]),
        (GRADIENTS, {}, [LOGITS, LOGITS, DX_S, DW_S]),  # a frozen teacher gets none, though it requires grad
        (("student_hidden", "teacher_hidden"), {"teacher": "forward_kl"}, [LOGITS, LOGITS, DX_S, DX_T]),
        (GRADIENTS, {"teacher": "forward_kl"}, [LOGITS, LOGITS, DX_S, DW_S, DX_T, DW_T]),
    ],
)
def test_only_wanted_gradients_are_computed(requires, options, products):
    """What was run, not what was promised: the GEMMs of a call, by the shape of their results."""
    assert recorded(requires, **options)[0] == products


@on_cpu
def test_no_grad_does_no_gradient_work():
    with torch.no_grad():
        assert recorded(GRADIENTS, teacher="forward_kl")[0] == [LOGITS, LOGITS]


@on_cpu
def test_frozen_head_allocates_no_dw():
    """In chunks of one row, a dW of 1024 x 16 floats is by far the largest tensor."""
    frozen, trained = (recorded((k,), workspace_bytes=1)[1] for k in ("student_hidden", "student_weight"))
    assert frozen < 1024 * D_S * 4 == trained


@pytest.mark.slow
@on_cpu
def test_whole_logits_never_exist():
    """Chunks of 4 rows: no tensor is larger than the eight such blocks that row mathematics works in, whatever N is."""
    hidden = ("student_hidden", "teacher_hidden")
    for n in (64, 128):
        assert recorded(hidden, n=n, teacher="jsd", workspace_bytes=4 * 2 * 1024 * 4)[1] == 8 * 4 * 1024 * 4


@on_cpu
def test_buffers_of_a_small_vocabulary_are_small():
    z, u = torch.randn(2, 20000, 40)
    with torch.profiler.profile(profile_memory=True) as profile:
        distillation_loss(z, u, backend="torch")
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= torch_rows.BUFFERS * torch_rows.BLOCK_ELEMENTS * 4


@on_cpu
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


@on_cpu
def test_memory_of_gradients_serves_again_once_nobody_holds_them(monkeypatch):
    monkeypatch.setattr(cpu, "KEPT_FROM", 1)
    cpu.release()
    problems = [Problem(seed=seed) for seed in (0, 1)]
    held, others = (problem.run("torch") for problem in problems)
    for problem, found in zip(problems, (held, others), strict=True):
        assert_as_good_as_the_reference(problem, "torch", found=found)
    held, others = held[1], others[1]
    a_view, addresses = held["student_weight"][1:], {x.data_ptr() for x in others.values() if x is not None}
    mine, values = held["student_weight"].data_ptr(), a_view.clone()
    del held, others, found
    again = problems[1].run("torch")
    assert again[1]["student_weight"].data_ptr() in addresses - {mine} and torch.equal(a_view, values)
    cpu.release()
    assert_as_good_as_the_reference(problems[1], "torch", found=again)


@on_cpu
@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_that_does_not_multiply_16_bits_is_spared_them(dtype, has, monkeypatch):
    """Its GEMMs get operands widened a block at a time; either way the gradients are as good."""
    monkeypatch.setattr(gemms, "has_fast_gemm", lambda other, _: has or other != dtype)
    monkeypatch.setattr(gemms, "HEAD_BLOCK", 24)  # of 131 head rows
    problem, seen = Problem(dtype=dtype, n=40, ignored=(2, 39)), []

    def watched(function):
        def watch(*args, **options):
            seen.extend((x.dtype, x.shape) for x in args[-2:])
            return function(*args, **options)

        return watch

    for workspace_bytes in (1 << 14, 1 << 17):  # chunks of 13 rows, and one chunk of them all
        assert_as_good_as_the_reference(problem, "torch", teacher="jsd", workspace_bytes=workspace_bytes)
        with monkeypatch.context() as patch:
            for name in ("mm", "addmm"):
                patch.setattr(torch, name, watched(getattr(torch, name)))
            problem.run("torch", teacher="jsd", workspace_bytes=workspace_bytes)
    assert (dtype in {x for x, _ in seen}) == has
    if not has:  # but for the 38 hidden states, no more than a block is widened
        assert max(max(shape) for _, shape in seen) == 38


def _set_precision(library, value):
    library.fp32_precision = value


PRECISIONS = {  # how to set it, how to set it back
    "default": (lambda: None, lambda: None),
    "by name": (
        lambda: torch.set_float32_matmul_precision("medium"),
        lambda: torch.set_float32_matmul_precision("highest"),
    ),
    "all": (lambda: _set_precision(torch.backends, "tf32"), lambda: _set_precision(torch.backends, "none")),
    "oneDNN": (
        lambda: _set_precision(torch.backends.mkldnn.matmul, "bf16"),
        lambda: _set_precision(torch.backends.mkldnn.matmul, "none"),
    ),
}


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_row_mathematics_is_fp32_whatever_matrix_products_are(precision, name):
    """Inner products of rows are no business of autocast's, nor of the precision of matrix products."""
    z, u = torch.randn(2, 5, 2001, device=DEVICE) * 2
    change, restore = PRECISIONS[precision]
    change()
    try:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            options = {"student": name, "teacher": name, "reduction": "none"}
            assert_logits_as_good_as_the_reference(z, u, None, "torch", **options)
    finally:
        restore()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_autocast_rounds_operands_and_nothing_else(spread, backend):
    """The operands of the GEMMs are bf16, as for nn.Linear; logits are fp32 all the same, and gradients those of fp32
    operands: dW is not rounded to bf16 on its way to an fp32 weight."""
    problem, low = Problem(spread=spread), Problem(spread=spread)
    for k, x in problem.operands.items():
        low.operands[k] = x.bfloat16()
        if "bias" in k:  # takes part in no GEMM
            problem.operands[k] = low.operands[k].float()
    options = {"student": Objective("jsd", ce_weight=0.5), "teacher": "forward_kl"}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = problem.run(backend, **options)
    assert_as_good_as_the_reference(low, backend, found=found, plain=torch.float32, **options)
    for name in ("student_weight", "teacher_weight"):
        significand = found[1][name].view(torch.int32)
        # a CPU that multiplies bf16 rounds each chunk's part of the sum
        assert (significand & 0xFFFF != 0).float().mean() > 0.5, "bf16 has only zeros there"


def test_autocast_leaves_fp64_alone():
    problem = Problem(dtype=torch.float64)
    expected, _ = problem.run("torch")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        values, _ = problem.run("torch")
    assert values["student"].dtype == torch.float64 and torch.equal(values["student"], expected["student"])
