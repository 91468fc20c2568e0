"""The losses as one graph under `torch.compile`, and the operators against `torch.library.opcheck`."""

import pytest
import torch

from okd_kernels import Objective, distillation_loss, linear_distillation_loss, ops

V, D_S, D_T = 37, 8, 12
OKD = {"student": "jsd", "teacher": Objective("forward_kl", weight=0.5, ce_weight=0.5)}


def problem(n, seed=0):
    torch.manual_seed(seed)
    tensors = [torch.randn(n, D_S), torch.randn(V, D_S), torch.randn(n, D_T), torch.randn(V, D_T)]
    labels = torch.randint(0, V, (n,))
    labels[::3] = -100
    return [t.requires_grad_() for t in tensors], labels


def run(loss_function, tensors, labels, **options):
    for t in tensors:
        t.grad = None
    loss = loss_function(*tensors, labels, **{**OKD, **options})
    (loss.student.sum() + 2 * loss.teacher.sum()).backward()
    values = [loss.student, loss.teacher, *loss.metrics.values()]
    return [x.detach().clone() for x in values] + [t.grad.clone() for t in tensors]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [False, None])
def test_one_graph_gives_the_same_numbers_for_changing_n(reduction, dynamic):
    """Liger #1338, TRL #6942: a wrong loss under torch.compile where rows are ignored."""
    torch._dynamo.reset()
    compiled = torch.compile(linear_distillation_loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 11, 5):
        tensors, labels = problem(n, seed=n)
        expected = run(linear_distillation_loss, tensors, labels, reduction=reduction, workspace_bytes=2048)
        found = run(compiled, tensors, labels, reduction=reduction, workspace_bytes=2048)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


def test_the_loss_inside_a_compiled_model():
    torch._dynamo.reset()
    layer = torch.nn.Linear(D_S, D_S)

    def step(x, w, y, u, labels):
        return linear_distillation_loss(layer(x).tanh(), w, y, u, labels, **OKD)

    tensors, labels = problem(9)
    expected = run(lambda *a, **_: step(*a), tensors, labels)
    expected.append(layer.weight.grad.clone())
    layer.weight.grad = None
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found = run(lambda *a, **_: compiled(*a), tensors, labels)
    found.append(layer.weight.grad.clone())
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_logits_under_compile():
    torch._dynamo.reset()
    compiled = torch.compile(distillation_loss, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (distillation_loss, compiled):
        torch.manual_seed(0)
        z, u = torch.randn(5, V, requires_grad=True), torch.randn(5, V, requires_grad=True)
        labels = torch.tensor([1, -100, 3, 4, -100])
        function(z, u, labels, **OKD).total.backward()
        gradients.append((z.grad, u.grad))
    for x, y in zip(*gradients, strict=True):
        torch.testing.assert_close(x, y)


def arguments(n=5, per_token=False, needs=(True,) * 10, extras=True):
    (x, w, y, u), targets = problem(n)
    sides = []
    for hidden, weight in ((x, w), (y, u)):
        others = [torch.randn(s, requires_grad=True) if extras else None for s in (V, (n, 2), (V, 2))]
        sides += [hidden, weight, *others]
    return (
        *sides,
        torch.where(targets >= 0, targets, -1) if extras else None,
        *(torch.rand(n, 2), torch.tensor(0.3), per_token),
        *ops.pack(Objective("jsd")),
        *ops.pack(Objective("reverse_kl", ce_weight=0.5 if extras else 0.0)),
        *([1.0, 0.0, 0.7, 5.0], 1.3, 1.0, V, 2048, "torch"),
        [need and operand is not None for need, operand in zip(needs, sides, strict=True)],
    )


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("needs", [(True,) * 10, (True, False, False, False, True) * 2])
@pytest.mark.parametrize("extras", [True, False])
def test_opcheck_linear(per_token, needs, extras):
    """With bias, LoRA and labels, and without."""
    torch.library.opcheck(
        torch.ops.okd_kernels.linear_distillation.default,
        arguments(per_token=per_token, needs=needs, extras=extras),
    )


def test_opcheck_logits():
    z, u = torch.randn(4, V, requires_grad=True), torch.randn(4, V, requires_grad=True)
    labels = torch.tensor([0, -1, 2, 3])
    torch.library.opcheck(
        torch.ops.okd_kernels.logit_distillation.default,
        (z, u, labels, *ops.pack(Objective("tvd")), *ops.pack(Objective("jsd")), 1.0, V, "torch", [True, True]),
    )
