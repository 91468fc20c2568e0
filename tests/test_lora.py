"""A LoRA on a head: honoured without being merged, in its own dtype, and alone where the head is frozen."""

import pytest
import torch
from problems import BACKENDS, D_S, D_T, DEVICE, DRAWS, Problem, V, relative_error, rounded

from okd_kernels import LinearHead, Objective, linear_distillation_loss

R, SCALING = 3, 1.7


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_lora_on_the_head_is_honoured(reduction, dtype, backend):
    """Against the merged weight in fp64: values, and gradients of hidden states, A and B of both sides.

    Plain PyTorch, which the budget is computed from as in `problems`, rounds hidden @ A.T to the head's dtype as PEFT
    does: [hidden, scaling hidden A.T] [W, B].T. The gradients of logits in 16 bits may cost their own rounding more.
    """
    g, problem = torch.Generator().manual_seed(0), Problem(dtype=dtype)
    adapters = {
        side: [(torch.randn(shape, generator=g) * 0.3).to(DEVICE, dtype) for shape in ((R, d), (V, R))]
        for side, d in (("student", D_S), ("teacher", D_T))
    }

    def run(backend, dtype, form="lora", orders=None):
        t = {k: x.to(dtype).clone() for k, x in problem.operands.items()}
        heads, wanted = [], []
        for side in ("student", "teacher"):
            order = slice(None) if orders is None else orders[side]
            hidden, weight, bias = (t[f"{side}_{x}"] for x in ("hidden", "weight", "bias"))
            hidden, weight = hidden[:, order].requires_grad_(), weight[:, order]
            down, up = (x.to(dtype).clone() for x in adapters[side])
            down, up = down[:, order].requires_grad_(), up.requires_grad_()
            if form == "merged":
                heads.append((hidden, LinearHead(weight + SCALING * up @ down, bias, softcap=9.0)))
            elif form == "columns":
                x = torch.cat([hidden, SCALING * (hidden @ down.T)], 1)
                heads.append((x, LinearHead(torch.cat([weight, up], 1), bias, softcap=9.0)))
            else:
                heads.append((hidden, LinearHead(weight, bias, softcap=9.0, lora=(down, up, SCALING))))
            wanted += [hidden, down, up]
        loss = linear_distillation_loss(
            *(*heads[0], *heads[1], problem.labels),
            **{"student": "jsd", "teacher": Objective("forward_kl", ce_weight=0.5)},
            **{"backend": backend, "reduction": reduction, "workspace_bytes": 4096},
        )
        gradients = list(torch.autograd.grad(loss.total.sum(), wanted))
        if orders is not None:
            for i, side in ((0, "student"), (1, "student"), (3, "teacher"), (4, "teacher")):
                gradients[i] = gradients[i][:, orders[side].argsort()]
        return [loss.total.sum(), *gradients]

    truth = run("reference", torch.float64, "merged")
    draws = [run("reference", dtype, "columns")]
    for _ in range(DRAWS - 1):
        orders = {side: torch.randperm(d, generator=g).to(DEVICE) for side, d in (("student", D_S), ("teacher", D_T))}
        draws.append(run("reference", dtype, "columns", orders))
    of_rounding = 0.0
    if dtype != torch.float32:
        x = torch.randn(10_000, generator=g, dtype=torch.float64)
        truncate = backend == "triton" and DEVICE == "cpu"
        of_rounding = relative_error(rounded(x, dtype, truncate), x)
    for i, (x, expected) in enumerate(zip(run(backend, dtype), truth, strict=True)):
        budget = 2 * max(relative_error(draw[i], expected) for draw in draws) + 8 * torch.finfo(torch.float32).eps
        assert relative_error(x, expected) <= budget + (of_rounding if i else 0.0), i


def test_a_lora_in_fp32_beside_a_16_bit_head():
    """As PEFT keeps it: the adapter takes part in the hidden states' dtype, its gradients come in its own."""
    problem = Problem(dtype=torch.bfloat16)
    lora = [(torch.randn(shape, device=DEVICE) * 0.3).requires_grad_() for shape in ((R, D_S), (V, R))]

    def run(*factors):
        head = LinearHead(problem.operands["student_weight"], lora=(*factors, 0.5))
        teacher = [problem.operands[f"teacher_{name}"] for name in ("hidden", "weight")]
        loss = linear_distillation_loss(problem.operands["student_hidden"], head, *teacher, problem.labels).student
        return loss, torch.autograd.grad(loss, lora)

    loss, gradients = run(*lora)
    expected, theirs = run(*(x.bfloat16() for x in lora))
    assert torch.equal(loss, expected)
    for gradient, other in zip(gradients, theirs, strict=True):
        assert gradient.dtype == torch.float32 and gradient.any()
        # B's is made in fp32, and is not rounded to bf16 on the way.
        assert torch.equal(gradient.bfloat16(), other.bfloat16())


@pytest.mark.skipif(DEVICE != "cpu", reason="the profiler's names are of the CPU's operators")
def test_lora_on_a_frozen_head_computes_no_dw():
    x, y = torch.randn(8, D_S, requires_grad=True), torch.randn(8, D_T)
    down, up = torch.randn(R, D_S, requires_grad=True), torch.randn(512, R, requires_grad=True)
    head = LinearHead(torch.randn(512, D_S), lora=(down, up, 1.0))
    with torch.profiler.profile(record_shapes=True) as profile:
        linear_distillation_loss(x, head, y, torch.randn(512, D_T), backend="torch").total.backward()
    results = [e.input_shapes[0] for e in profile.events() if e.name == "aten::addmm"]
    assert [512, R] in results and [512, D_S] not in results
