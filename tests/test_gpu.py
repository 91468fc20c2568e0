"""What only a GPU shows: races, host synchronisation, CUDA graphs, streams, devices. `OKD_TEST_DEVICE=cuda` runs it."""

import copy
from contextlib import contextmanager

import pytest
import torch
from problems import DEVICE, SIDES, Problem, assert_as_good_as_the_reference, relative_error, values_of
from sparse_problems import SparseProblem, assert_as_good_as_the_definition

from okd_kernels import DIVERGENCES, Objective, linear_distillation_loss

pytestmark = pytest.mark.skipif(
    DEVICE != "cuda" or not torch.cuda.is_available(), reason="needs a GPU, and Triton without its interpreter"
)
OKD = {"student": "forward_kl", "teacher": Objective("forward_kl", weight=0.5, ce_weight=0.5)}
JSD = {"student": Objective("jsd", weight=0.7, ce_weight=0.3), "teacher": "jsd"}
GENERATION = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GENERATION >= (8, 0) else [])]


@contextmanager
def without_synchronisation():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def everything(found):
    """(values, gradients) as a list of tensors."""
    return [x for part in found for x in part.values() if x is not None]


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [50257, 32000])
@pytest.mark.parametrize("options", [OKD, JSD, {"student": "reverse_kl", "target_mix": 0.4, "temperature": 2.0}])
def test_real_vocabularies_against_the_reference(options, v, dtype):
    """Many blocks of columns a row, the last one cut within 16 bytes; several chunks."""
    problem = Problem(v=v, n=96, dtype=dtype, ignored=(0, 5, 95))
    assert_as_good_as_the_reference(problem, "triton", workspace_bytes=40 * 2 * 4 * v, **options)


MODES = [("bucket", "reverse_kl"), ("bucket", "jsd"), ("renormalize", "alpha_beta"), ("none", "forward_kl")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tail", "name"), MODES)
def test_sparse_targets_against_the_definition(tail, name, dtype):
    problem = SparseProblem(k=16, n=48, v=32003, dtype=dtype, temperature=1.5)
    assert_as_good_as_the_definition(problem, "triton", student=Objective(name, 0.7, 0.3), tail=tail)


def test_mixed_sparse_targets_against_the_definition():
    problem = SparseProblem(k=16, n=48, v=32003)
    assert_as_good_as_the_definition(problem, "triton", student="forward_kl", target_mix=0.3)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_that_lie_over_their_logits_are_those_beside_them(name):
    """A 16-bit row takes the first half of its fp32 logits: a warp that writes before another has read would show."""
    from okd_kernels.row_kernels import TritonRows
    from okd_kernels.rows import LogitRows, Rows

    n, v = 512, 50304
    logits, objective = torch.randn(2, n, v, device=DEVICE) * 3, Objective(name, 0.7, 0.3)
    labels, weights = torch.randint(-1, v, (n,), device=DEVICE), torch.rand(n, 4, device=DEVICE)
    found = []
    for over in (False, True):
        rows = logits.clone()
        gradients = rows.view(torch.bfloat16) if over else torch.empty_like(rows, dtype=torch.bfloat16)
        sides = [LogitRows(x, objective, dx[:, :v]) for x, dx in zip(rows, gradients, strict=True)]
        results = TritonRows(v, 1.5).run(Rows(*sides, labels, weights), lambda _: None)
        counted = labels >= 0
        found.append([*(x.gradient for x in sides), results[0][:, counted], results[1][counted]])
    for beside, over in zip(*found, strict=True):
        assert torch.equal(beside, over)


def test_twenty_runs_of_two_large_chunks_are_bitwise_the_same():
    n, v, d = 4096, 128256, 256  # 2 GiB of logits hold 2048 rows
    tensors = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for shape in ((n, d), (v, d), (n, d), (v, d))]
    tensors = [(x / d**0.25).requires_grad_() for x in tensors]
    labels = torch.randint(0, v, (n,), device=DEVICE)
    first = None
    for _ in range(20):
        loss = linear_distillation_loss(*tensors, labels, **OKD)
        found = [loss.student, loss.teacher, *loss.metrics.values(), *torch.autograd.grad(loss.total, tensors)]
        assert all(x.isfinite().all() for x in found)
        first = first or found
        assert all(map(torch.equal, found, first))


# --- synchronisation, graphs, streams, devices -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"labels": None, "teacher": "jsd"},
        {"reduction": "none"},
        {"normalizer": 17.0},
        {"temperature": 2.0},
        {"teacher": None, "target_mix": 0.5},
    ],
)
def test_a_call_does_not_synchronise(options, backend):
    """And gives the numbers that it gives where it may."""
    for dtype in DTYPES:
        problem, given = Problem(n=96, dtype=dtype), {**JSD, "compact": False, **options}
        if "labels" in given:
            problem.labels, given["student"] = given.pop("labels"), "reverse_kl"
        if backend == "triton" or dtype == DTYPES[-1]:
            expected = problem.run(backend, **given)
            found = problem.run(backend, watch=without_synchronisation(), **given)
            assert all(map(torch.equal, everything(found), everything(expected)))


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("tail", ["bucket", "renormalize", "none"])
@pytest.mark.parametrize("labels", [True, False])
def test_a_call_with_sparse_targets_does_not_synchronise(labels, tail, backend):
    problem, options = SparseProblem(n=96, k=9), {"tail": tail, "compact": False}
    if not labels:
        problem.labels = None
    expected = problem.run(backend, **options)
    found = problem.run(backend, watch=without_synchronisation(), **options)
    assert all(map(torch.equal, everything(found), everything(expected)))


@pytest.mark.parametrize("normalizer", [None, "on the CPU", "on the device"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_captured_step_serves_other_numbers(backend, normalizer):
    """Forward and backward as one CUDA graph, replayed for operands and ignored rows that differ from the capture's."""
    problems = Problem(n=64, v=1031, ignored=(0, 7)), Problem(n=64, v=1031, ignored=(3, 4, 5, 63), seed=1)
    options = dict(JSD)
    if normalizer is not None:
        options["normalizer"] = torch.tensor(50.0, device="cpu" if normalizer == "on the CPU" else DEVICE)
    leaves = {name: x.clone().requires_grad_() for name, x in problems[0].operands.items()}
    labels = problems[0].labels.clone()

    def step():
        heads = problems[0].heads(leaves)
        hidden = [leaves[f"{side}_hidden"] for side in SIDES]
        given = {**options, "backend": backend, "workspace_bytes": 20 * 2 * 4 * 1031}
        loss = linear_distillation_loss(hidden[0], heads[0], hidden[1], heads[1], labels, **given)
        return values_of(loss), dict(zip(leaves, torch.autograd.grad(loss.total, leaves.values()), strict=True))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and sets cuBLAS up
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for problem in (*problems, problems[0]):
        with torch.no_grad():
            for name, x in problem.operands.items():
                leaves[name].copy_(x)
            labels.copy_(problem.labels)
        graph.replay()
        found = tuple({name: x.detach().clone() for name, x in part.items()} for part in captured)
        assert_as_good_as_the_reference(problem, backend, found=found, **options)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_everything_runs_on_the_current_stream(backend):
    """Operands that another stream fills, late: whatever ran on the default one would find zeros."""
    problem = Problem(n=64, v=1031)
    expected = problem.run(backend, **OKD)
    late, stream = copy.copy(problem), torch.cuda.Stream()
    late.operands = {name: torch.zeros_like(x) for name, x in problem.operands.items()}
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # clocks: a tenth of a second
        for name, x in problem.operands.items():
            late.operands[name].copy_(x)
        found = late.run(backend, **OKD)
    torch.cuda.synchronize()
    assert_as_good_as_the_reference(problem, backend, found=found, **OKD)
    assert relative_error(found[0]["student"], expected[0]["student"].double()) < torch.finfo(torch.float32).eps * 8


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_operands_may_be_on_another_device_than_the_current_one(backend):
    problem = Problem(n=64, v=1031)
    other = copy.copy(problem)
    other.operands = {name: x.to("cuda:1") for name, x in problem.operands.items()}
    other.labels = problem.labels.to("cuda:1")
    with torch.cuda.device(0):
        found = other.run(backend, **OKD)
    assert all(x.device.index == 1 for x in everything(found))
    on_first = tuple({name: None if x is None else x.to(DEVICE) for name, x in part.items()} for part in found)
    assert_as_good_as_the_reference(problem, backend, found=on_first, **OKD)


@pytest.mark.parametrize("n", [1, 2, 129])
def test_chunks_of_any_length(n):
    """Triton treats an argument that is 1 as a constant."""
    problem = Problem(n=n, ignored=())
    for options in (OKD, JSD):
        assert_as_good_as_the_reference(problem, "triton", workspace_bytes=2 * 4 * 131 * 128, **options)


def test_scaled_and_capped_heads_inside_an_inductor_graph():
    problem = Problem(n=48, v=1031, dtype=DTYPES[-1])
    problem.head_options = {"logit_scale": 0.7}, {"softcap": 9.0}
    torch._dynamo.reset()
    compiled = torch.compile(linear_distillation_loss, fullgraph=True)
    leaves = {name: x.clone().requires_grad_() for name, x in problem.operands.items()}
    student, teacher = problem.heads(leaves)
    hidden = leaves["student_hidden"], leaves["teacher_hidden"]
    loss = compiled(hidden[0], student, hidden[1], teacher, problem.labels, **JSD)
    loss.total.backward()
    found = values_of(loss), {name: x.grad for name, x in leaves.items()}
    assert_as_good_as_the_reference(problem, "triton", found=found, **JSD)
