"""Rows of sparse targets: padding, ignored rows, weights, reductions, chunks, memory, torch.compile."""

import math

import pytest
import torch
from sparse_problems import (
    DEVICE,
    EPS,
    D,
    N,
    SparseProblem,
    V,
    assert_as_good_as_the_definition,
    assert_same,
    relative_error,
)

from okd_kernels import DistillationLoss, Objective, linear_sparse_distillation_loss, linear_topk

BACKENDS = ("torch", "triton")
MODES = [("bucket", "forward_kl"), ("bucket", "reverse_kl"), ("renormalize", "jsd"), ("none", "forward_kl")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail, divergence", MODES)
def test_ragged_padding(tail, divergence, backend):
    """-inf is no target, whatever its id: out of range, repeated, or that of a real target."""
    options = {"tail": tail, "student": divergence, "reduction": "none"}
    problem, lengths, rows = SparseProblem(9, n=4, ignored=()), [9, 1, 4, 8], []
    for row, length in enumerate(lengths):
        one = SparseProblem(9, n=4, ignored=()).rows(slice(row, row + 1))
        one.ids, one.log_p = one.ids[:, :length], one.log_p[:, :length]
        rows.append(one.truth(**options))
        problem.log_p[row, length:] = -math.inf
        ids = [-100, int(problem.ids[row, 0]), 10**9, 0, 0, -1, 7, 8]
        problem.ids[row, length:] = torch.tensor(ids, device=DEVICE)[: 9 - length]
    assert_as_good_as_the_definition(problem, backend, **options)
    truth = problem.truth(**options)  # of the definition, that it leaves padding out, too
    for name, x in truth[0].items():
        torch.testing.assert_close(x, torch.cat([of_row[0][name] for of_row in rows]), rtol=1e-12, atol=1e-12)
    assert relative_error(truth[1]["hidden"], torch.cat([of_row[1]["hidden"] for of_row in rows])) < 1e-12


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail, divergence", MODES)
def test_ignored_rows_equal_removed_rows_and_may_hold_anything(tail, divergence, backend, compact):
    """compact=False leaves them in the GEMMs, whose result must be the same."""
    options = {"tail": tail, "student": Objective(divergence, ce_weight=0.5), "temperature": 1.5}
    ignored, kept = [0, 4], [1, 2, 3]
    problem = SparseProblem(n=5, ignored=ignored)
    problem.operands["hidden"][ignored] = math.nan
    problem.ids[ignored], problem.log_p[ignored] = -5, math.nan
    values, gradients = problem.run(backend, compact=compact, **options)
    assert all((x[ignored] == 0).all() for name, x in values.items() if name != "student")
    assert (gradients["hidden"][ignored] == 0).all()
    of_kept = {name: x if name == "student" else x[kept] for name, x in values.items()}
    gradients["hidden"] = gradients["hidden"][kept]
    removed = SparseProblem(n=5, ignored=ignored).rows(kept)
    assert_as_good_as_the_definition(removed, backend, found=(of_kept, gradients), **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tail, divergence", MODES)
def test_token_weights_and_reductions(tail, divergence, reduction, backend):
    n = 4
    options = {"tail": tail, "student": Objective(divergence, 0.7, 0.4), "reduction": reduction}
    upstream = torch.randn(n, device=DEVICE) if reduction == "none" else 3.0
    weights = torch.rand(n, device=DEVICE)
    problem = SparseProblem(n=n)
    assert_as_good_as_the_definition(problem, backend, upstream=upstream, token_weights=weights, **options)


def test_micro_batches_with_a_normalizer_equal_one_batch():
    whole, total, dw = SparseProblem().truth(), 0.0, 0.0
    for rows in (slice(0, 3), slice(3, N)):  # 2 and 4 counted tokens: a mean of means would be wrong
        values, gradients = SparseProblem().rows(rows).run(normalizer=6)
        total, dw = total + values["student"].item(), dw + gradients["weight"]
    assert total == pytest.approx(whole[0]["student"].item(), rel=8 * EPS)
    assert relative_error(dw, whole[1]["weight"]) < 16 * EPS


def test_leading_shapes():
    problem = SparseProblem(n=6)
    values, gradients = problem.run(reduction="none")
    problem.rows(torch.arange(6).reshape(2, 3))
    shaped, shaped_gradients = problem.run(reduction="none")
    assert all(torch.equal(shaped[k], values[k].reshape(2, 3)) for k in values)
    assert all(torch.equal(shaped_gradients[k].reshape(x.shape), x) for k, x in gradients.items())


@pytest.mark.parametrize("v, dtype", [(V, torch.float32), (1024, torch.float64)])  # rows of 1024 get a gap
@pytest.mark.parametrize("tail, divergence", MODES)
def test_chunks_change_nothing_but_rounding(tail, divergence, v, dtype):
    options = {"tail": tail, "student": Objective(divergence, ce_weight=0.5), "target_mix": 0.5 if v == V else 1.0}
    problem = SparseProblem(n=13, v=v, dtype=dtype)
    one, many = (problem.run(workspace_bytes=size, **options) for size in (1 << 30, 1))
    assert_same(one, many, rtol=16 * torch.finfo(dtype).eps)


def test_vocab_size_cuts_padding_off():
    problem = SparseProblem()
    expected, truth = problem.run()
    for name in ("weight", "bias", "up"):
        x = problem.operands[name]
        problem.operands[name] = torch.cat([x, torch.full_like(x[:9], 50.0)])
    values, gradients = problem.run(vocab_size=V)
    assert all(torch.equal(values[name], x) for name, x in expected.items())
    assert torch.equal(gradients["hidden"], truth["hidden"])
    for name in ("weight", "bias"):
        assert torch.equal(gradients[name][:V], truth[name]) and (gradients[name][V:] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(reduction):
    problem = SparseProblem()
    t = problem.leaves()
    loss = linear_sparse_distillation_loss(
        t["hidden"], problem.head(t), problem.ids, problem.log_p, problem.labels, reduction=reduction
    ).student.sum()
    loss.backward(retain_graph=True)
    once = {name: t[name].grad.clone() for name in ("hidden", "weight", "bias")}
    loss.backward()
    assert all(torch.equal(t[name].grad, 2 * x) for name, x in once.items())


@pytest.mark.skipif(DEVICE != "cpu", reason="the profiler's figures are of the CPU's memory")
@pytest.mark.parametrize("options", [{}, {"reduction": "none"}])
def test_whole_logits_never_exist_nor_a_gradient_of_a_frozen_head(options):
    """16 rows in chunks of one: nothing is as large as all logits, or a dW, but for a dW that is wanted."""
    problem = SparseProblem(v=512, n=16, ignored=())
    largest = {}
    for requires in ("hidden", "weight"):
        profile = torch.profiler.profile(profile_memory=True)
        problem.run(requires=(requires,), watch=profile, workspace_bytes=2 * 512 * 4, **options)
        largest[requires] = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest["hidden"] < 16 * 512 * 4 == 512 * D * 4 == largest["weight"]


def step(hidden, head, ids, log_p, labels, **options):
    targets = linear_topk(hidden.flip(0), head, 3)
    loss = linear_sparse_distillation_loss(
        hidden, head, ids, log_p, labels, student=Objective("jsd", 1, 0.2), **options
    )
    more = linear_sparse_distillation_loss(hidden, head, targets.ids, targets.log_probs, labels, **options)
    return DistillationLoss(loss.student + more.student, None, loss.metrics)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_gives_the_same_numbers_for_changing_n(reduction):
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (6, 9):
        assert_same(*(SparseProblem(n=n).run(loss=f, reduction=reduction) for f in (compiled, step)))
