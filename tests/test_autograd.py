"""How the losses behave in autograd: upstream gradients, several backward passes, what is saved, one side alone."""

import pytest
import torch
from problems import (
    BACKENDS,
    D_S,
    DEVICE,
    GRADIENTS,
    N,
    Problem,
    assert_as_good_as_the_reference,
    relative_error,
    rounding_errors,
)

from okd_kernels import Objective, distillation_loss, linear_distillation_loss

MATRICES = [k for k in GRADIENTS if "bias" not in k]
REDUCTIONS = ["mean", "none"]


def leaves(requires=MATRICES):
    """The matrices of a problem: hidden states and heads of both sides."""
    operands = Problem().operands
    return {k: operands[k].clone().requires_grad_(k in requires) for k in MATRICES}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_per_token_losses_with_any_upstream(dtype, backend):
    assert_as_good_as_the_reference(
        Problem(dtype=dtype),
        backend,
        reduction="none",
        upstream=(torch.randn(N, device=DEVICE), torch.randn(N, device=DEVICE)),
        token_weights=torch.rand(N, device=DEVICE),
        student=Objective("jsd", ce_weight=0.5),
        teacher=Objective("forward_kl", ce_weight=0.5),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_scalars_of_each_side(backend):
    """(a * student + b * teacher).backward(): each side's gradient is multiplied by its own factor."""
    assert_as_good_as_the_reference(Problem(), backend, teacher="forward_kl", upstream=(3.0, 0.25))


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstreams_of_any_stride(backend):
    """Per token: every second element, one element for all, and what expand's backward makes."""
    x = leaves()
    loss = linear_distillation_loss(*x.values(), backend=backend, reduction="none").student

    def gradients(upstream):
        return torch.autograd.grad(loss, [x["student_hidden"], x["student_weight"]], upstream, retain_graph=True)

    spaced, one = torch.randn(N, 2, device=DEVICE)[:, 0], torch.tensor(0.7, device=DEVICE).expand(N)
    for upstream in (spaced, one):
        for found, expected in zip(gradients(upstream), gradients(upstream.clone().contiguous()), strict=True):
            assert torch.equal(found, expected) and found.any()
    found = torch.autograd.grad(loss.expand(3, N).sum(), [x["student_hidden"], x["student_weight"]], retain_graph=True)
    assert all(map(torch.equal, found, gradients(torch.full((N,), 3.0, device=DEVICE))))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_an_expanded_mean(shape, backend):
    found, expected = leaves(), leaves()
    factor = torch.Size(shape).numel()
    linear_distillation_loss(*found.values(), backend=backend).student.expand(shape).sum().backward()
    (linear_distillation_loss(*expected.values(), backend=backend).student * factor).backward()
    for k in MATRICES[:2]:
        assert torch.equal(found[k].grad, expected[k].grad) and found[k].grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_token_upstream_of_one_over_n_survives_fp16(backend):
    """fp16 holds 1e-6 * gradient with few bits left: it is right to half a step of what fp16 represents there."""
    problem = Problem(dtype=torch.float16)

    def run(upstream, name, dtype=None):
        return problem.run(name, dtype, reduction="none", upstream=(torch.full((N,), upstream, device=DEVICE),) * 2)[1]

    assert_as_good_as_the_reference(problem, backend, reduction="none")
    small, truth = run(1e-6, backend), run(1e-6, "reference", torch.float64)
    of_rounding = rounding_errors(problem, backend, run(1.0, "reference", torch.float64), reduction="none")
    for name in GRADIENTS[:3]:
        budget = 2.0**-25 + of_rounding[name] * truth[name].norm()
        assert (small[name].double() - truth[name]).abs().max() <= budget and small[name].any(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_grad_scalers_factor_saves_fp16_gradients_of_a_mean(backend):
    """It comes in backward, and must find what 1 / N has left."""
    options = {"teacher": "forward_kl", "normalizer": 1e6, "upstream": (2.0**16, 2.0**16)}
    assert_as_good_as_the_reference(Problem(dtype=torch.float16), backend, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sides_loss_gives_the_other_no_gradient(backend, reduction):
    """Rather than zeros, with which the teacher's optimizer would go on and its backward pass would run."""
    for side in ("student", "teacher"):
        x = leaves()
        loss = linear_distillation_loss(*x.values(), teacher="jsd", backend=backend, reduction=reduction)
        getattr(loss, side).sum().backward()
        assert {k for k, t in x.items() if t.grad is not None} == {f"{side}_hidden", f"{side}_weight"}
        z, u = (torch.randn(3, 9, device=DEVICE, requires_grad=True) for _ in range(2))
        getattr(distillation_loss(z, u, teacher="jsd", backend=backend, reduction=reduction), side).sum().backward()
        assert (z.grad is None, u.grad is None) == (side == "teacher", side == "student")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("requires", [("student_hidden",), ("student_weight", "teacher_bias"), ("teacher_hidden",), ()])
def test_gradients_of_what_requires_them(requires, reduction, backend):
    options = {"teacher": "jsd", "reduction": reduction, "requires": requires}
    assert_as_good_as_the_reference(Problem(), backend, **options)
    gradients = Problem().run(backend, **options)[1]
    assert {k for k, x in gradients.items() if x is not None} == set(requires)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_teacher_in_inference_mode(backend, reduction):
    with torch.inference_mode():
        made = [x.clone() for x in leaves().values()][2:]
    gradients = []
    for teacher in (made, [x.clone() for x in made]):
        x = leaves()
        student = x["student_hidden"], x["student_weight"]
        linear_distillation_loss(*student, *teacher, backend=backend, reduction=reduction).student.sum().backward()
        gradients.append([t.grad for t in student])
    assert all(map(torch.equal, *gradients)) and all(x.any() for x in gradients[0])


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice(backend, reduction):
    x = leaves(MATRICES[:2])
    loss = linear_distillation_loss(*x.values(), reduction=reduction, backend=backend).student.sum()
    loss.backward(retain_graph=True)
    once = {k: x[k].grad.clone() for k in MATRICES[:2]}
    loss.backward()
    assert all(torch.equal(x[k].grad, 2 * once[k]) and once[k].any() for k in once)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_says_what_to_do(backend):
    """Where the loss itself is the root, no other node of the graph is there to say so."""
    x = leaves(MATRICES[:2])
    loss = linear_distillation_loss(*x.values(), backend=backend).student
    loss.backward()
    kept = x["student_weight"].grad.clone()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()
    assert torch.equal(x["student_weight"].grad, kept)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_on_one_side_after_the_other(backend):
    z, u = torch.randn(2, 5, 40, device=DEVICE)
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
        assert torch.equal(x.grad, 2 * expected.grad)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend, reduction):
    """Rather than be zero; a first one is there, as for a penalty of other terms."""
    x = leaves(MATRICES[:1])
    loss = linear_distillation_loss(*x.values(), backend=backend, reduction=reduction).student.sum()
    (first,) = torch.autograd.grad(loss, x["student_hidden"], retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, x["student_hidden"], create_graph=True)
    assert torch.equal(gradient, first)
    with pytest.raises(RuntimeError, match="use backend='reference'"):
        (loss + gradient.pow(2).sum()).backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tied_embedding_gathers_both_gradients(backend):
    """The head is also the input embedding: autograd adds the two."""
    ids, x = torch.arange(N, device=DEVICE), leaves(())

    def run(backend, dtype, order):
        w = x["student_weight"][:, order].to(dtype).requires_grad_()
        y, wt = x["teacher_hidden"].to(dtype), x["teacher_weight"].to(dtype)
        linear_distillation_loss(w[ids].tanh(), w, y, wt, backend=backend).total.backward()
        return w.grad[:, order.argsort()]

    orders = [torch.arange(D_S), *(torch.randperm(D_S) for _ in range(3))]
    truth = run("reference", torch.float64, orders[0])
    plain = max(relative_error(run("reference", torch.float32, order), truth) for order in orders)
    budget = 2 * plain + 8 * torch.finfo(torch.float32).eps
    assert relative_error(run(backend, torch.float32, orders[0]), truth) <= budget


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_checkpointing_around_the_loss(backend, reduction):
    x = leaves(MATRICES[:1])
    hidden, *others = x.values()

    def student_loss(hidden):
        return linear_distillation_loss(hidden, *others, backend=backend, reduction=reduction).student.sum()

    student_loss(hidden).backward()
    expected, hidden.grad = hidden.grad, None
    torch.utils.checkpoint.checkpoint(student_loss, hidden, use_reentrant=False).backward()
    assert torch.equal(hidden.grad, expected) and expected.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_offloading_meets_no_gradient_of_the_head(backend):
    """Its hooks bring what is saved to the host and back: V x D each way, for a gradient of a step's making."""
    seen, found, expected = [], leaves(), leaves()
    linear_distillation_loss(*expected.values(), teacher="jsd", backend=backend).total.backward()

    def pack(x):
        seen.append(x.shape)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = linear_distillation_loss(*found.values(), teacher="jsd", backend=backend)
    loss.total.backward()
    assert not any(shape in [found[k].shape for k in MATRICES] for shape in seen)
    assert all(torch.equal(found[k].grad, expected[k].grad) for k in MATRICES)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):  # the hooks do see what is saved
        linear_distillation_loss(*found.values(), backend=backend, reduction="none")
    assert found["student_weight"].shape in seen
