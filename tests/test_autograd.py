"""Which gradients are made, of what upstream, how often; and what autograd keeps meanwhile."""

import pytest
import torch
from problems import (
    BACKENDS,
    D_S,
    D_T,
    DEVICE,
    GRADIENTS,
    N,
    Problem,
    assert_as_good_as_the_reference,
    relative_error,
)
from test_cpu import recorded

from okd_kernels import Objective, distillation_loss, linear_distillation_loss

LOGITS, DX_S, DW_S, DX_T, DW_T = (8, 1024), (8, D_S), (1024, D_S), (8, D_T), (1024, D_T)


@pytest.mark.parametrize(
    "requires, options, gemms",
    [
        ((), {}, [LOGITS, LOGITS]),
        (("student_hidden",), {}, [LOGITS, LOGITS, DX_S]),
        (("student_hidden", "student_weight"), {}, [LOGITS, LOGITS, DX_S, DW_S]),
        (GRADIENTS, {}, [LOGITS, LOGITS, DX_S, DW_S]),  # a frozen teacher gets none, though it requires grad
        (("student_hidden", "teacher_hidden"), {"teacher": "forward_kl"}, [LOGITS, LOGITS, DX_S, DX_T]),
        (GRADIENTS, {"teacher": "forward_kl"}, [LOGITS, LOGITS, DX_S, DW_S, DX_T, DW_T]),
    ],
)
def test_only_wanted_gradients_are_computed(requires, options, gemms):
    """What was run, not what was promised: the GEMMs of a call, by the shape of their results."""
    assert recorded(requires, **options)[0] == gemms


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sides_loss_gives_the_other_no_gradient(backend, reduction):
    """Rather than zeros, with which the teacher's optimizer would go on and its backward pass would run."""
    problem = Problem()
    for side in ("student", "teacher"):
        x = {k: t.clone().requires_grad_() for k, t in problem.operands.items() if not k.endswith("bias")}
        loss = linear_distillation_loss(*x.values(), teacher="jsd", backend=backend, reduction=reduction)
        getattr(loss, side).sum().backward()
        assert {k for k, t in x.items() if t.grad is not None} == {f"{side}_hidden", f"{side}_weight"}
        z, u = (torch.randn(3, 9, device=DEVICE, requires_grad=True) for _ in range(2))
        getattr(distillation_loss(z, u, teacher="jsd", backend=backend, reduction=reduction), side).sum().backward()
        assert (z.grad is None, u.grad is None) == (side == "teacher", side == "student")


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_in_inference_mode(backend, reduction):
    problem = Problem()
    with torch.inference_mode():
        y, u = (problem.operands[f"teacher_{name}"].clone() for name in ("hidden", "weight"))
    gradients = []
    for teacher in ((y, u), (y.clone(), u.clone())):
        x, w = (problem.operands[f"student_{name}"].clone().requires_grad_() for name in ("hidden", "weight"))
        linear_distillation_loss(x, w, *teacher, backend=backend, reduction=reduction).student.sum().backward()
        gradients.append((x.grad, w.grad))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend):
    problem = Problem()
    x = problem.operands["student_hidden"].clone().requires_grad_()
    w = problem.operands["student_weight"].clone().requires_grad_()
    for reduction in ("mean", "none"):
        x.grad = w.grad = None
        loss = linear_distillation_loss(
            x,
            w,
            problem.operands["teacher_hidden"],
            problem.operands["teacher_weight"],
            reduction=reduction,
            backend=backend,
        ).student.sum()
        loss.backward(retain_graph=True)
        once = x.grad.clone(), w.grad.clone()
        loss.backward()
        assert torch.equal(x.grad, 2 * once[0]) and torch.equal(w.grad, 2 * once[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_on_one_side_after_the_other(backend):
    z, u = (torch.randn(5, 40, device=DEVICE) for _ in range(2))
    both = [x.clone().requires_grad_() for x in (z, u)]
    distillation_loss(*both, teacher="jsd", backend=backend).total.backward()
    apart = [x.clone().requires_grad_() for x in (z, u)]
    loss = distillation_loss(*apart, teacher="jsd", backend=backend)
    loss.student.backward(retain_graph=True)
    loss.teacher.backward(retain_graph=True)
    for x, expected in zip(apart, both, strict=True):
        assert torch.equal(x.grad, expected.grad)
    loss.total.backward()
    for x, expected in zip(apart, both, strict=True):
        torch.testing.assert_close(x.grad, 2 * expected.grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend, reduction):
    """Rather than be zero; a first one is there, as for a penalty of other terms."""
    problem = Problem()
    x = problem.operands["student_hidden"].requires_grad_()
    others = [problem.operands[name] for name in ("student_weight", "teacher_hidden", "teacher_weight")]
    loss = linear_distillation_loss(x, *others, problem.labels, backend=backend, reduction=reduction).student.sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="use backend='reference'"):
        (loss + gradient.pow(2).sum()).backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_scalars_of_each_side(backend):
    """(a * student + b * teacher).backward(): each side's gradient is multiplied by its own factor."""
    _, unit = Problem().run(backend, teacher="forward_kl")
    _, scaled = Problem().run(backend, teacher="forward_kl", upstream=(3.0, 0.25))
    for name in GRADIENTS:
        torch.testing.assert_close(scaled[name], unit[name] * (3.0 if "student" in name else 0.25))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing_around_the_loss(backend):
    problem = Problem()
    x = problem.operands["student_hidden"].requires_grad_()
    args = [problem.operands[k] for k in ("student_weight", "teacher_hidden", "teacher_weight")]

    def student_loss(x):
        return linear_distillation_loss(x, *args, backend=backend).student

    student_loss(x).backward()
    expected, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(student_loss, x, use_reentrant=False).backward()
    assert torch.equal(x.grad, expected)


def test_no_grad_does_no_gradient_work():
    with torch.no_grad():
        assert recorded(GRADIENTS, teacher="forward_kl")[0] == [LOGITS, LOGITS]


@pytest.mark.parametrize("layout", ["dense", "strided", "expanded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_per_token_losses_with_any_upstream(backend, layout):
    """Upstream gradients of any layout: a column of a matrix has a stride, an expanded number has none."""
    dense = torch.randn(2, N, device=DEVICE)
    upstream = {
        "dense": tuple(dense),
        "strided": tuple(torch.stack([dense, dense + 1], 2)[:, :, 0]),
        "expanded": tuple(x[0].expand(N) for x in dense),
    }[layout]
    assert_as_good_as_the_reference(
        Problem(),
        backend,
        reduction="none",
        upstream=upstream,
        token_weights=torch.rand(N, device=DEVICE),
        student=Objective("jsd", ce_weight=0.5),
        teacher=Objective("forward_kl", ce_weight=0.5),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_that_is_expanded_adds_its_upstreams_up(backend):
    problem = Problem()
    weights = torch.randn(5, device=DEVICE)
    _, once = problem.run(backend)
    x = {name: t.clone().requires_grad_() for name, t in problem.operands.items() if not name.endswith("bias")}
    problem.bias = False
    _, once = problem.run(backend)
    loss = linear_distillation_loss(*x.values(), problem.labels, backend=backend, workspace_bytes=4096).student
    (loss.expand(5) * weights).sum().backward()
    for name in ("student_hidden", "student_weight"):
        torch.testing.assert_close(x[name].grad, once[name] * weights.sum(), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("upstream", [1e-6, 1.0, 2.0**16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp16_gradients_survive_small_and_large_upstreams(backend, reduction, upstream):
    """1 / N of a mean, and a GradScaler's factor: what fp16 holds of the result is within half a step of the truth."""
    problem = Problem(dtype=torch.float16)
    options = {"normalizer": 1e6 if upstream > 1 else 1.0} if reduction == "mean" else {}
    options |= {"reduction": reduction, "teacher": "forward_kl", "upstream": (upstream, upstream)}
    _, found = problem.run(backend, **options)
    _, truth = problem.run("reference", torch.float64, **options)
    one = {"reduction": reduction, "teacher": "forward_kl"}
    ratio = relative_error(
        problem.run(backend, **one)[1]["student_hidden"],
        problem.run("reference", torch.float64, **one)[1]["student_hidden"],
    )
    for name in GRADIENTS:
        assert found[name].dtype == torch.float16
        step = 2.0**-24 * truth[name].numel() ** 0.5  # of subnormal numbers
        assert (found[name].double() - truth[name]).norm() <= 2 * ratio * truth[name].norm() + 0.51 * step, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_without_retain_graph_is_refused(backend):
    problem = Problem()
    x = problem.operands["student_hidden"].requires_grad_()
    others = [problem.operands[name] for name in ("student_weight", "teacher_hidden", "teacher_weight")]
    loss = linear_distillation_loss(x, *others, backend=backend).student
    loss.backward()
    with pytest.raises(RuntimeError, match=r"one backward pass.*got a second: pass retain_graph=True"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saved_tensor_hooks_see_no_gradient_of_a_head(reduction):
    """Activation offloading would bring V x D to the host and back; with losses per token it sees the operands."""
    problem, seen = Problem(), []
    problem.bias = False
    _, expected = problem.run("torch", reduction=reduction)
    x = {name: t.clone().requires_grad_() for name, t in problem.operands.items() if not name.endswith("bias")}
    heads = {x[name].untyped_storage().data_ptr() for name in ("student_weight", "teacher_weight")}

    def pack(t):
        seen.append(t)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = linear_distillation_loss(*x.values(), problem.labels, reduction=reduction, workspace_bytes=4096)
    loss.student.sum().backward()
    large = [t for t in seen if t.numel() >= x["student_weight"].numel()]
    assert all(t.untyped_storage().data_ptr() in heads for t in large) and bool(large) == (reduction == "none")
    for name in ("student_hidden", "student_weight"):
        torch.testing.assert_close(x[name].grad, expected[name])


def test_gradients_are_freed_with_the_backward_pass():
    """Though the loss lives on, as a trainer's log has it; and a graph that nobody differentiates is no cycle."""
    import gc
    import weakref

    from okd_kernels import operator

    problem, made, distil = Problem(), [], operator.Model.gradients

    def spy(self):
        found = distil(self)
        made.extend(weakref.ref(g.untyped_storage()) for g in found.values())
        return found

    operator.Model.gradients = spy
    gc.disable()
    try:
        x, w = (problem.operands[name].clone().requires_grad_() for name in ("student_hidden", "student_weight"))
        teacher = problem.operands["teacher_hidden"], problem.operands["teacher_weight"]
        loss = linear_distillation_loss(x, w, *teacher, backend="torch").student
        assert len(made) == 2
        loss.backward()
        x.grad = w.grad = None
        other = linear_distillation_loss(x, w, *teacher, backend="torch").student
        del other
        assert not any(ref() is not None for ref in made)
        assert loss.item() > 0
    finally:
        gc.enable()
        operator.Model.gradients = distil


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tied_embedding_gathers_both_gradients(backend):
    """The head is also the input embedding: autograd adds the two."""
    ids, problem = torch.arange(N, device=DEVICE), Problem()

    def run(backend, dtype):
        w = problem.operands["student_weight"].to(dtype).clone().requires_grad_()
        y, wt = problem.operands["teacher_hidden"].to(dtype), problem.operands["teacher_weight"].to(dtype)
        linear_distillation_loss(w[ids].tanh(), w, y, wt, backend=backend).total.backward()
        return w.grad

    truth = run("reference", torch.float64)
    budget = 2 * relative_error(run("reference", torch.float32), truth) + 8 * torch.finfo(torch.float32).eps
    assert relative_error(run(backend, torch.float32), truth) <= budget
