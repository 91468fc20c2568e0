"""Every divergence x side x backend x dtype against the fp64 reference on the same operands, and every option.

The budget of a comparison is computed: twice the error of the reference itself in the operands' dtype with fp32 logits
(that error is one draw of a random variable; so is ours), plus a few eps. So a backend may be as wrong as plain PyTorch
with fp32 logits is, and no more.
"""

import math
import os
from contextlib import nullcontext

import pytest
import torch
from okd_kernels.chunks import Model, project, row_stride
from torch import nn

from okd_kernels import (
    DIVERGENCES,
    LinearDistillationLoss,
    LinearHead,
    Objective,
    chunks,
    distillation_loss,
    linear_distillation_loss,
    memory,
    ops,
    scale_kernel,
    torch_rows,
)

BACKENDS = ("torch", "triton")
DEVICE = os.environ.get("OKD_TEST_DEVICE", "cpu")
N, D_S, D_T = 7, 16, 24
BF16 = 0.006  # two roundings to bf16; the interpreter truncates where a GPU rounds to nearest
GRADIENTS = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")


class Problem:
    """Random operands in `dtype`, whose logits have std(z) of about 2 and std(z - u) = spread."""

    def __init__(self, v=131, n=N, dtype=torch.float32, spread=1.0, offset=0.0, ignored=(2,), seed=0):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

        hidden, weight = normal(n, D_S), normal(v, D_S, scale=2 / D_S**0.5)
        # The teacher sees the student's logits through D_S of its dimensions, and a disagreement through the others.
        self.operands = {
            "student_hidden": hidden,
            "student_weight": weight,
            "student_bias": normal(v, scale=0.1) + offset,
            "teacher_hidden": torch.cat([hidden, normal(n, D_T - D_S)], 1),
            "teacher_weight": torch.cat([weight, normal(v, D_T - D_S, scale=spread / (D_T - D_S) ** 0.5)], 1),
            "teacher_bias": normal(v, scale=0.1 * spread) - offset,
        }
        self.operands = {name: x.to(DEVICE, dtype) for name, x in self.operands.items()}
        self.labels = torch.randint(0, v, (n,), generator=g).to(DEVICE)
        self.labels[[i for i in ignored if i < n]] = -100
        self.bias = True
        self.head_options = ({}, {})
        self.loss_options = {}

    def run(self, backend, dtype=None, upstream=(1.0, 1.0), requires=GRADIENTS, watch=None, **options):
        """(values, gradients) of one run; operands are widened to `dtype` if given; `watch` sees loss and backward."""
        t = {k: x.to(dtype or x.dtype).clone().requires_grad_(k in requires) for k, x in self.operands.items()}
        heads = [
            LinearHead(t[f"{side}_weight"], t[f"{side}_bias"] if self.bias else None, **head_options)
            for side, head_options in zip(("student", "teacher"), self.head_options, strict=True)
        ]
        with watch or nullcontext():
            loss = linear_distillation_loss(
                t["student_hidden"],
                heads[0],
                t["teacher_hidden"],
                heads[1],
                self.labels,
                backend=backend,
                **{"workspace_bytes": 4096, **self.loss_options, **options},
            )
            total = (loss.student * upstream[0]).sum()
            if loss.teacher is not None:
                total = total + (loss.teacher * upstream[1]).sum()
            if total.requires_grad:
                total.backward()
        values = {"student": loss.student, "teacher": loss.teacher, **loss.metrics}
        return values, {k: t[k].grad for k in GRADIENTS}


def relative_error(x, truth):
    return ((x.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_as_good_as_the_reference(problem, backend, slack=8.0, **options):
    """No worse than twice plain PyTorch with fp32 logits in the operands' dtype, plus `slack` eps."""
    dtype = problem.operands["student_hidden"].dtype
    truth_values, truth_gradients = problem.run("reference", torch.float64, **options)
    plain_values, plain_gradients = problem.run("reference", **options)
    values, gradients = problem.run(backend, **options)
    for name, truth in truth_values.items():
        assert (values[name] is None) == (truth is None), name
        if truth is None:
            continue
        scale = 1 + truth.abs().max()  # logits of size 10 carry an absolute error into a small divergence
        budget = 2 * (plain_values[name].double() - truth).abs().max() + slack * 1.2e-7 * scale
        error = (values[name].double() - truth).abs().max()
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
        assert values[name].dtype == torch.float32
    for name, truth in truth_gradients.items():
        assert (gradients[name] is None) == (truth is None), name
        if truth is None:
            continue
        # 16-bit operands: the gradient that feeds the backward GEMMs is rounded once more than the result.
        budget = 2 * relative_error(plain_gradients[name], truth) + slack * max(1.2e-7, torch.finfo(dtype).eps / 8)
        error = relative_error(gradients[name], truth)
        assert error <= budget, f"d{name}: error {error:.2e}, budget {budget:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_both_sides(name, temperature, backend):
    assert_as_good_as_the_reference(
        Problem(),
        backend,
        student=Objective(name, weight=0.7, ce_weight=0.3),
        teacher=Objective(name, weight=0.4, ce_weight=0.6),
        temperature=temperature,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spread", [1.0, 0.3, 0.1, 0.03])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_close_models_in_every_dtype(name, spread, dtype, backend):
    """Near convergence, where bf16 logits would have lost the gradient altogether."""
    problem = Problem(dtype=dtype, spread=spread)
    assert_as_good_as_the_reference(problem, backend, student=name, teacher=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v", [7, 1000, 1024, 4099])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabulary_sizes(dtype, name, v, backend):
    problem = Problem(v=v, dtype=dtype)
    assert_as_good_as_the_reference(problem, backend, student=name, teacher=name, workspace_bytes=1 << 20)


@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_blocks_of_rows_one_after_the_other(name, teacher, monkeypatch):
    """They share buffers, which are wider than the vocabulary, and which the last one does not fill."""
    monkeypatch.setattr(torch_rows, "block_rows", lambda *_: 3)
    problem, options = Problem(v=1500), {"student": name, "teacher": name if teacher else None}
    assert_as_good_as_the_reference(problem, "torch", workspace_bytes=1 << 20, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "skew_kl"])
def test_offset_logits(name, backend):
    """Softmax does not see a constant: rows near +20 and -20."""
    assert_as_good_as_the_reference(Problem(offset=20.0), backend, slack=64.0, student=name, teacher=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_top1_agreement_of_rows_far_from_zero(temperature, backend):
    """Where a row's largest logit does not become 0 but for rounding; every second row has one token on top."""
    z, u = torch.randn(2, 64, 301, device=DEVICE)
    top = torch.randint(0, 150, (64, 1), device=DEVICE)
    level = torch.logspace(-2, 7, 64, device=DEVICE).unsqueeze(1)
    z.scatter_(1, top, 5.0).add_(level)
    u.scatter_(1, top + torch.arange(64, device=DEVICE).unsqueeze(1) % 2, 5.0).sub_(1.3 * level)
    loss = distillation_loss(z, u, temperature=temperature, backend=backend, reduction="none")
    assert loss.metrics["top1_agreement"].tolist() == [1.0, 0.0] * 32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", [Objective("forward_kl"), Objective("jsd"), Objective("skew_kl", ce_weight=0.5)])
@pytest.mark.parametrize("level", [-math.inf, -1e30, 3e9])
def test_a_row_without_any_preference_is_uniform(level, objective, backend):
    """Whether it says so by -inf or by numbers whose rounding is larger than any logit."""
    z, u = torch.full((3, 301), level, device=DEVICE), torch.randn(3, 301, device=DEVICE)
    z[1] = torch.randn(301, device=DEVICE)
    labels = torch.tensor([5, 6, 7], device=DEVICE)
    runs = []
    for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
        x, y = z.to(dtype, copy=True).requires_grad_(), u.to(dtype, copy=True).requires_grad_()
        loss = distillation_loss(x, y, labels, student=objective, teacher=objective, backend=name, reduction="none")
        (loss.student + loss.teacher).sum().backward()
        assert x.grad.isfinite().all() and y.grad.isfinite().all()
        runs.append({"student": loss.student, "teacher": loss.teacher, **loss.metrics})
    for key, expected in runs[0].items():
        torch.testing.assert_close(
            runs[1][key].double(), expected, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_certain_rows_have_no_negative_entropy_or_nll(backend):
    z = torch.randn(64, 301, device=DEVICE) + torch.linspace(0, 90, 64, device=DEVICE).unsqueeze(1)
    labels = torch.randint(0, 301, (64,), device=DEVICE)
    z.scatter_add_(1, labels.unsqueeze(1), torch.full((64, 1), 60.0, device=DEVICE))
    metrics = distillation_loss(z, z.roll(1, 0), labels, backend=backend, reduction="none").metrics
    for name in ("student_nll", "student_entropy", "teacher_entropy"):
        assert (metrics[name] >= 0).all() and metrics[name].isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_peaked_rows(name, backend):
    problem = Problem()
    for name_ in ("student_hidden", "teacher_hidden"):
        problem.operands[name_] *= 12  # logits of +-60: most probabilities underflow
    assert_as_good_as_the_reference(problem, backend, slack=400.0, student=name, teacher=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, spread", [(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_target_between_student_and_teacher(name, dtype, spread, backend):
    """All that comes after the logits is the mixture's: temperature, statistics, gradients near convergence."""
    problem = Problem(dtype=dtype, spread=spread)
    problem.head_options = ({"softcap": 9.0}, {"logit_scale": 0.9})
    student = Objective(name, ce_weight=0.3)
    assert_as_good_as_the_reference(problem, backend, student=student, teacher_share=0.4, temperature=1.5)


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_definition_of_taid(backend):
    """arXiv 2501.16937 in plain PyTorch: KL(softmax((1 - t) sg(z) + t u) || softmax(z)); at t = 0 nothing to learn."""
    problem, t = Problem(ignored=()), 0.4
    x = {k: v.double().requires_grad_() for k, v in problem.operands.items()}
    z = x["student_hidden"] @ x["student_weight"].T + x["student_bias"]
    u = x["teacher_hidden"] @ x["teacher_weight"].T + x["teacher_bias"]
    log_p = ((1 - t) * z + t * u).detach().log_softmax(-1)
    expected = (log_p.exp() * (log_p - z.log_softmax(-1))).sum(-1)
    expected.mean().backward()
    values, gradients = problem.run(backend, teacher_share=t)
    torch.testing.assert_close(values["student"].double(), expected.mean().detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(values["forward_kl"].double(), expected.detach(), rtol=1e-5, atol=1e-7)
    for k in GRADIENTS[:3]:
        assert relative_error(gradients[k], x[k].grad) < 2e-6, k
    assert all(gradients[k] is None for k in GRADIENTS[3:])
    assert problem.run(backend, teacher_share=0.0)[0]["student"].abs() < 1e-6
    whole, at_1 = (problem.run(backend, **options)[0]["student"] for options in ({}, {"teacher_share": 1.0}))
    assert torch.equal(whole, at_1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_scale_softcap_bias(temperature, backend):
    problem = Problem()
    problem.head_options = ({"logit_scale": 0.5, "softcap": 5.0}, {"logit_scale": 1.7, "softcap": 3.0})
    assert_as_good_as_the_reference(
        problem,
        backend,
        student=Objective("forward_kl", ce_weight=0.5),
        teacher=Objective("reverse_kl", ce_weight=0.5),
        temperature=temperature,
    )
    problem.bias = False
    assert_as_good_as_the_reference(problem, backend, student="jsd", teacher="tvd", temperature=temperature)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_any_stride(backend):
    x, w, b, y, u, c = Problem().operands.values()

    def loss(b, c):
        return linear_distillation_loss(x, LinearHead(w, b), y, LinearHead(u, c), backend=backend).student

    assert torch.equal(loss(*(torch.stack([bias, bias + 1], 1)[:, 0] for bias in (b, c))), loss(b, c))


def test_a_lora_in_fp32_beside_a_16_bit_head():
    """As PEFT keeps it: the adapter takes part in the hidden states' dtype, its gradients come in its own."""
    problem = Problem(dtype=torch.bfloat16)
    lora = [(torch.randn(shape, device=DEVICE) * 0.3).requires_grad_() for shape in ((3, D_S), (131, 3))]

    def run(*factors):
        head = LinearHead(problem.operands["student_weight"], lora=(*factors, 0.5))
        teacher = [problem.operands[f"teacher_{name}"] for name in ("hidden", "weight")]
        loss = linear_distillation_loss(problem.operands["student_hidden"], head, *teacher, problem.labels).student
        return loss, torch.autograd.grad(loss, lora)

    loss, gradients = run(*lora)
    expected, theirs = run(*(x.bfloat16() for x in lora))
    assert torch.equal(loss, expected)
    for gradient, other in zip(gradients, theirs, strict=True):
        assert gradient.dtype == torch.float32 and torch.equal(gradient, other)


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_lora_on_the_head_is_honoured(reduction, dtype, backend):
    """Against the merged weight in fp64: values, and gradients of A and B of both sides. Nothing is merged here."""
    problem, r, scaling = Problem(dtype=dtype), 3, 1.7
    adapters = {}
    for side, d in (("student", D_S), ("teacher", D_T)):
        adapters[side] = [torch.randn(r, d) * 0.3, torch.randn(131, r) * 0.3]
        adapters[side] = [x.to(DEVICE, dtype) for x in adapters[side]]

    def run(backend, dtype, merged):
        t = {k: x.to(dtype).clone().requires_grad_("hidden" in k) for k, x in problem.operands.items()}
        lora = {side: [x.to(dtype).clone().requires_grad_() for x in pair] for side, pair in adapters.items()}
        heads = []
        for side in ("student", "teacher"):
            down, up = lora[side]
            weight, bias = t[f"{side}_weight"], t[f"{side}_bias"]
            if merged:
                heads.append(LinearHead(weight + scaling * up @ down, bias, softcap=9.0))
            else:
                heads.append(LinearHead(weight, bias, softcap=9.0, lora=(down, up, scaling)))
        loss = linear_distillation_loss(
            *(t["student_hidden"], heads[0], t["teacher_hidden"], heads[1], problem.labels),
            **{"student": "jsd", "teacher": Objective("forward_kl", ce_weight=0.5)},
            **{"backend": backend, "reduction": reduction, "workspace_bytes": 4096},
        )
        loss.total.sum().backward()
        gradients = [t["student_hidden"].grad, t["teacher_hidden"].grad]
        return loss.total.sum(), gradients + [x.grad for pair in lora.values() for x in pair]

    truth_value, truth = run("reference", torch.float64, merged=True)
    value, gradients = run(backend, dtype, merged=False)
    tolerance = 2e-6 if dtype == torch.float32 else 2 * BF16  # bf16: hidden @ A.T is rounded too, as PEFT rounds it
    assert value.item() == pytest.approx(truth_value.item(), rel=tolerance)
    for x, expected in zip(gradients, truth, strict=True):
        assert relative_error(x, expected) < tolerance


def test_lora_on_a_frozen_head_computes_no_dw():
    x, y = torch.randn(8, D_S, requires_grad=True), torch.randn(8, D_T)
    down, up = torch.randn(3, D_S, requires_grad=True), torch.randn(512, 3, requires_grad=True)
    head = LinearHead(torch.randn(512, D_S), lora=(down, up, 1.0))
    with torch.profiler.profile(record_shapes=True) as profile:
        linear_distillation_loss(x, head, y, torch.randn(512, D_T), backend="torch").total.backward()
    results = [e.input_shapes[0] for e in profile.events() if e.name == "aten::addmm"]
    assert [512, 3] in results and [512, D_S] not in results


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_definition_of_okd(backend):
    """Eq. 16/17 of arXiv 2409.12512, written out in plain PyTorch: values and gradients of both sides."""
    problem, a = Problem(ignored=()), 0.3
    t = {k: x.double().requires_grad_() for k, x in problem.operands.items()}
    z = t["student_hidden"] @ t["student_weight"].T + t["student_bias"]
    u = t["teacher_hidden"] @ t["teacher_weight"].T + t["teacher_bias"]
    log_q, log_p = z.log_softmax(-1), u.log_softmax(-1)
    student = (log_p.detach().exp() * (log_p.detach() - log_q)).sum(-1).mean()
    kl_student_teacher = (log_q.detach().exp() * (log_q.detach() - log_p)).sum(-1).mean()
    teacher = a * kl_student_teacher + (1 - a) * nn.functional.cross_entropy(u, problem.labels)
    (student + teacher).backward()
    values, gradients = problem.run(
        backend, student="forward_kl", teacher=Objective("forward_kl", weight=a, ce_weight=1 - a)
    )
    torch.testing.assert_close(values["student"].double(), student.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(values["teacher"].double(), teacher.detach(), rtol=1e-6, atol=1e-7)
    for name in GRADIENTS:
        assert relative_error(gradients[name], t[name].grad) < 1e-6, name


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.parametrize("name", DIVERGENCES)
def test_joint_training_differentiates_one_divergence_into_both_sides(name, backend):
    """PESF-KD: with `teacher=student.dual`, the gradients are those of one D(p, q) that holds nothing still."""
    problem, objective = Problem(ignored=()), Objective(name)
    t = {k: x.double().requires_grad_() for k, x in problem.operands.items()}
    z = t["student_hidden"] @ t["student_weight"].T + t["student_bias"]
    u = t["teacher_hidden"] @ t["teacher_weight"].T + t["teacher_bias"]
    log_q, log_p = z.log_softmax(-1), u.log_softmax(-1)
    terms, _ = DIVERGENCES[name].formula(log_q, log_p, log_q.exp(), log_p.exp(), objective.a, objective.b)
    value = terms.sum(-1).mean()
    value.backward()
    values, gradients = problem.run(backend, student=objective, teacher=objective.dual)
    assert values["student"].item() == pytest.approx(value.item(), rel=1e-5)
    assert values["teacher"].item() == pytest.approx(value.item(), rel=1e-5)
    for k in GRADIENTS:
        assert relative_error(gradients[k], t[k].grad) < 5e-6, k


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_metrics_are_their_definitions(backend):
    problem = Problem()
    problem.operands["teacher_weight"][:, D_S:] *= 0.5
    values, _ = problem.run(backend, temperature=1.7)
    t = {k: x.double() for k, x in problem.operands.items()}
    z = t["student_hidden"] @ t["student_weight"].T + t["student_bias"]
    u = t["teacher_hidden"] @ t["teacher_weight"].T + t["teacher_bias"]
    q, p = (z / 1.7).softmax(-1), (u / 1.7).softmax(-1)
    counted = problem.labels != -100
    label = problem.labels.clamp_min(0).unsqueeze(1)
    expected = {
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "student_entropy": -(q * q.log()).sum(-1),
        "teacher_entropy": -(p * p.log()).sum(-1),
        "student_nll": -z.log_softmax(-1).gather(1, label).squeeze(1),
        "teacher_nll": -u.log_softmax(-1).gather(1, label).squeeze(1),
        "top1_agreement": (z.argmax(-1) == u.argmax(-1)).double(),
    }
    assert 0 < expected["top1_agreement"].sum() < N, "the problem must show both outcomes"
    for name, truth in expected.items():
        torch.testing.assert_close(
            values[name].double(),
            torch.where(counted, truth, 0),
            rtol=2e-5,
            atol=2e-6,
            msg=lambda m, k=name: f"{k}: {m}",
        )


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if not name.endswith("_detached")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_reference_finite_differences(side, name):
    """Central differences in fp64 of the learner's loss, along random directions of hidden, weight and bias.

    The slope of a divergence that holds a part of its learner still is no derivative of its value, on purpose.
    """
    problem = Problem(v=11, n=3, ignored=(1,), dtype=torch.float64)
    problem.head_options = ({"softcap": 9.0}, {"softcap": 7.0, "logit_scale": 0.8})
    options = {s: Objective(name, ce_weight=0.3) for s in ("student", "teacher")}
    _, gradients = problem.run("reference", temperature=1.5, **options)
    step = 1e-5
    for k in (f"{side}_hidden", f"{side}_weight", f"{side}_bias"):
        x, direction = problem.operands[k], torch.randn_like(problem.operands[k])
        losses = []
        for sign in (1, -1):
            problem.operands[k] = x + sign * step * direction
            losses.append(problem.run("reference", requires=(), temperature=1.5, **options)[0][side].item())
        problem.operands[k] = x
        slope = (losses[0] - losses[1]) / (2 * step)
        assert (gradients[k] * direction).sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-9), k


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_token_losses_with_any_upstream(backend):
    upstream = (torch.randn(N, device=DEVICE), torch.randn(N, device=DEVICE))
    assert_as_good_as_the_reference(
        Problem(),
        backend,
        slack=32.0,
        reduction="none",
        upstream=upstream,
        token_weights=torch.rand(N, device=DEVICE),
        student=Objective("jsd", ce_weight=0.5),
        teacher=Objective("forward_kl", ce_weight=0.5),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_token_upstream_of_one_over_n_survives_fp16(backend):
    upstream = (torch.full((N,), 1e-6, device=DEVICE),) * 2
    problem = Problem(dtype=torch.float16)
    big, small = (problem.run(backend, reduction="none", upstream=(u, u))[1] for u in (upstream[0] * 1e6, upstream[0]))
    # fp16 holds 1e-6 * gradient with few bits left; the head's gradient is compared where it is representable.
    truth = problem.run("reference", torch.float64, reduction="none", upstream=upstream)[1]["student_hidden"]
    assert relative_error(big["student_hidden"] * 1.0, truth * 1e6) < 2e-3
    subnormal_step = 2.0**-24
    assert (small["student_hidden"].double() - truth).abs().max() <= 0.51 * subnormal_step


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_grad_scalers_factor_saves_fp16_gradients_of_a_mean(backend):
    """It comes in backward, and must find what 1 / N has left."""
    problem = Problem(dtype=torch.float16)
    options = {"teacher": "forward_kl", "normalizer": 1e6, "upstream": (2.0**16, 2.0**16)}
    _, found = problem.run(backend, **options)
    _, truth = problem.run("reference", torch.float64, **options)
    for name in GRADIENTS:
        assert found[name].dtype == torch.float16
        assert relative_error(found[name], truth[name]) < 2e-3, name


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


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_a_weight_of_zero_drops_an_infinite_divergence(backend):
    """As at the start of an annealed one: cross-entropy is all that is left, not 0 times infinity."""
    problem = Problem()
    no_label = torch.ones(131, dtype=torch.bool, device=DEVICE).index_fill(0, problem.labels.clamp_min(0), False)
    problem.operands["student_bias"][no_label] = -math.inf
    options = {"reduction": "none", "teacher": Objective("reverse_kl", weight=0)}
    values, _ = problem.run(backend, student=Objective("forward_kl", weight=0, ce_weight=0.5), **options)
    counted = problem.labels >= 0
    assert values["forward_kl"][counted].isinf().all()
    torch.testing.assert_close(values["student"], 0.5 * values["student_nll"])
    assert (values["teacher"] == 0).all()


@pytest.mark.parametrize("weight", [math.nan, math.inf])
@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_weights_of_ignored_rows_may_be_anything(backend, weight):
    weights = torch.rand(N, device=DEVICE)
    expected_values, expected = Problem().run(backend, reduction="none", token_weights=weights)
    weights[2] = weight  # ignored
    values, gradients = Problem().run(backend, reduction="none", token_weights=weights)
    assert torch.equal(values["student"], expected_values["student"])
    for name in ("student_hidden", "student_weight", "student_bias"):
        assert torch.equal(gradients[name], expected[name])


def test_a_mean_is_its_definition_for_any_total_weight():
    weights = torch.full((N,), -0.5, device=DEVICE)
    expected, _ = Problem().run("torch")
    for normalizer in (None, torch.tensor([-0.5 * (N - 1)], device=DEVICE)):
        values, _ = Problem().run("torch", token_weights=weights, normalizer=normalizer)
        assert values["student"].shape == ()
        torch.testing.assert_close(values["student"], expected["student"])


def test_autocast_leaves_fp64_alone():
    problem = Problem(dtype=torch.float64)
    expected, _ = problem.run("torch")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        values, _ = problem.run("torch")
    assert values["student"].dtype == torch.float64 and torch.equal(values["student"], expected["student"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_reductions(reduction, backend):
    weights = torch.rand(N, device=DEVICE)
    values, _ = Problem().run(backend, reduction=reduction, token_weights=weights)
    per_token, _ = Problem().run("reference", torch.float64, reduction="none")
    counted = Problem().labels != -100
    weighted = per_token["student"] * weights
    expected = {"mean": weighted.sum() / weights[counted].sum(), "sum": weighted.sum(), "none": weighted}[reduction]
    torch.testing.assert_close(values["student"].double(), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_with_a_normalizer_equal_one_batch(backend):
    whole_values, whole = Problem().run(backend, reduction="mean")
    problem, total, parts = Problem(), 0.0, dict.fromkeys(GRADIENTS, 0.0)
    operands, labels = problem.operands, problem.labels
    for rows in (slice(0, 3), slice(3, N)):  # 2 and 4 counted tokens: a mean of means would be wrong
        problem.operands = {k: x[rows] if "hidden" in k else x for k, x in operands.items()}
        problem.labels = labels[rows]
        values, gradients = problem.run(backend, normalizer=6)
        total += values["student"].item()
        for k in GRADIENTS[1:3]:
            parts[k] = parts[k] + gradients[k]
    assert total == pytest.approx(whole_values["student"].item(), rel=1e-6)
    for k in GRADIENTS[1:3]:
        torch.testing.assert_close(parts[k], whole[k], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_ignored_rows_equal_removed_rows_and_may_hold_nan(backend):
    objectives = {"student": Objective("jsd", ce_weight=0.5), "teacher": Objective("forward_kl", ce_weight=0.5)}
    problem = Problem(ignored=(0, 4))
    for side in ("student", "teacher"):
        problem.operands[f"{side}_hidden"][[0, 4]] = math.nan
    values, gradients = problem.run(backend, **objectives)
    kept = [i for i in range(N) if i not in (0, 4)]
    removed = Problem(ignored=())
    removed.labels = removed.labels[kept]
    removed.operands = {k: x[kept] if "hidden" in k else x for k, x in removed.operands.items()}
    removed.labels = problem.labels[kept]
    expected_values, expected = removed.run(backend, **objectives)
    for name in ("student", "teacher"):
        torch.testing.assert_close(values[name], expected_values[name], rtol=1e-6, atol=1e-7)
    for name in GRADIENTS:
        ours = gradients[name]
        if "hidden" in name:
            assert (ours[[0, 4]] == 0).all()
            ours = ours[kept]
        torch.testing.assert_close(ours, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_that_stay_for_the_gemms_may_hold_nan(backend, monkeypatch):
    """As on a GPU, where finding them would synchronise; a LoRA's A, which is outside the chunks, included."""
    monkeypatch.setattr(ops, "counted_rows", lambda labels: None)
    test_ignored_rows_equal_removed_rows_and_may_hold_nan(backend)
    problem = Problem(ignored=(0, 4))
    x = problem.operands["student_hidden"]
    x[[0, 4]] = math.nan
    lora = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in ((3, D_S), (131, 3))]
    head = LinearHead(problem.operands["student_weight"], lora=(*lora, 0.5))
    teacher = [problem.operands[f"teacher_{name}"] for name in ("hidden", "weight")]
    linear_distillation_loss(x, head, *teacher, problem.labels, backend=backend).total.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in lora)


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_nan_in_a_counted_row_reaches_the_loss_of_that_row_only(backend):
    """A trainer stops at such a loss. Other rows of its block keep what they have, -inf logits included."""
    problem = Problem(ignored=())
    for side in ("student", "teacher"):
        problem.operands[f"{side}_bias"][5] = -math.inf
    expected, _ = problem.run(backend, reduction="none")
    problem.operands["student_hidden"][3] = math.nan
    values, _ = problem.run(backend, reduction="none", requires=("student_hidden",))
    others = [i for i in range(N) if i != 3]
    assert values["student"][3].isnan()
    torch.testing.assert_close(values["student"][others], expected["student"][others])


def test_a_label_outside_the_vocabulary_is_nan_where_it_cannot_be_looked_for(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on a GPU: labels are not read beforehand
    problem = Problem(ignored=())
    problem.labels[2] = 131
    values, _ = problem.run("triton", student=Objective("forward_kl", ce_weight=0.5), reduction="none")
    assert values["student"].isnan().nonzero().tolist() == [[2]]


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_all_ignored_is_zero_loss_with_zero_gradients(backend):
    values, gradients = Problem(ignored=range(N)).run(backend, teacher="forward_kl")
    assert values["student"] == 0 and values["teacher"] == 0
    assert all((g == 0).all() for g in gradients.values())


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.parametrize("n", [0, 1])
def test_no_token_and_one_token(n, backend):
    values, gradients = Problem(n=n, ignored=()).run(backend, teacher="forward_kl")
    truth, expected = Problem(n=n, ignored=()).run("reference", torch.float64, teacher="forward_kl")
    for name in ("student", "teacher"):
        assert values[name].item() == pytest.approx(truth[name].item(), rel=1e-5)
    for name in GRADIENTS:
        torch.testing.assert_close(gradients[name].double(), expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_shapes_and_strides(backend):
    flat_values, flat = Problem(n=6, ignored=(1,)).run(backend, teacher="forward_kl", reduction="none")
    problem = Problem(n=6, ignored=(1,))
    for side in ("student", "teacher"):
        x = problem.operands[f"{side}_hidden"]
        problem.operands[f"{side}_hidden"] = x.reshape(2, 3, -1).transpose(0, 1).contiguous().transpose(0, 1)
        problem.operands[f"{side}_weight"] = problem.operands[f"{side}_weight"].T.contiguous().T
    problem.labels = problem.labels.reshape(2, 3)
    values, gradients = problem.run(backend, teacher="forward_kl", reduction="none")
    for name in ("student", "teacher", "forward_kl", "top1_agreement"):
        assert values[name].shape == (2, 3)
        torch.testing.assert_close(values[name].reshape(-1), flat_values[name])
    for name in GRADIENTS:
        torch.testing.assert_close(gradients[name].reshape(flat[name].shape), flat[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_vocab_size_cuts_padding_off_both_heads(backend):
    """Two heads padded differently (151936 / 152064): padded columns exist for neither side, and get no gradient."""
    problem, v = Problem(), 131
    for side, padding in (("student", 5), ("teacher", 13)):
        weight, bias = problem.operands[f"{side}_weight"], problem.operands[f"{side}_bias"]
        problem.operands[f"{side}_weight"] = torch.cat([weight, torch.randn(padding, weight.shape[1]).to(weight) * 9])
        problem.operands[f"{side}_bias"] = torch.cat([bias, torch.full((padding,), 50.0).to(bias)])
    values, gradients = problem.run(backend, vocab_size=v, teacher="reverse_kl")
    expected_values, expected = Problem().run(backend, teacher="reverse_kl")
    assert values["student"] == expected_values["student"] and values["teacher"] == expected_values["teacher"]
    for name in GRADIENTS:
        ours = gradients[name]
        if "hidden" not in name:
            assert (ours[v:] == 0).all()
            ours = ours[:v]
        torch.testing.assert_close(ours, expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_minus_infinity_on_both_sides_equals_a_smaller_vocabulary(name, backend):
    problem = Problem()
    for side in ("student", "teacher"):
        problem.operands[f"{side}_bias"][100:] = -math.inf
    problem.labels.clamp_max_(99)
    objectives = {
        "student": Objective(name, ce_weight=0.5),
        "teacher": Objective(name, ce_weight=0.5),
        "temperature": 0.5,
    }
    values, gradients = problem.run(backend, **objectives)
    small_values, small = problem.run(backend, vocab_size=100, **objectives)
    for k in values:
        torch.testing.assert_close(values[k], small_values[k], rtol=1e-5, atol=1e-6)
    for k in GRADIENTS:
        torch.testing.assert_close(gradients[k], small[k], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_infinite_where_it_is_infinite(backend):
    """The student excludes a token that the teacher holds possible: forward KL is infinite, others are not."""
    problem = Problem()
    problem.operands["student_bias"][5] = -math.inf
    problem.labels[problem.labels == 5] = 6
    assert problem.run(backend, student="forward_kl", requires=())[0]["student"] == math.inf
    for name in ("reverse_kl", "jsd", "skew_kl", "tvd"):
        values, gradients = problem.run(backend, student=name)
        assert math.isfinite(values["student"])
        assert all(g.isfinite().all() for k, g in gradients.items() if g is not None and "student" in k)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_change_nothing_but_rounding(backend):
    options = {"student": "jsd", "teacher": Objective("forward_kl", ce_weight=0.5)}
    one, one_gradients = Problem(n=13).run(backend, workspace_bytes=1 << 30, **options)
    many, many_gradients = Problem(n=13).run(backend, workspace_bytes=1, **options)
    for name in one:
        torch.testing.assert_close(one[name], many[name], rtol=1e-6, atol=1e-6)
    for name in GRADIENTS:
        torch.testing.assert_close(one_gradients[name], many_gradients[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab_size", [1, 131, 1024, 32768, 50257, 128256, 131072, 262144, 524288])
def test_rows_of_logits_do_not_share_cache_sets(vocab_size):
    stride = row_stride(vocab_size)
    assert vocab_size <= stride <= 1.02 * vocab_size + 16
    assert stride % 16 == 0 and stride % 1024 != 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_factors_of_rows_and_sums(dtype):
    """Together weights * scale; only fp16's range wants a factor of the sums, which costs one more pass over dW."""
    weights, scale = torch.tensor([0.0, 1e-3, 2.0], dtype=ops.wide(dtype)), torch.tensor(1e-6, dtype=ops.wide(dtype))
    rows, sums = ops.row_factors(weights, scale, dtype)
    assert (sums is None) == (dtype != torch.float16)
    torch.testing.assert_close(rows * (1 if sums is None else sums), weights * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_narrower_than_its_head(backend):
    """Its gradient is summed in fp32, and rounded once to the bias's own dtype."""
    operands = Problem().operands
    narrow = operands["student_bias"].bfloat16()

    def gradient(bias):
        head = LinearHead(operands["student_weight"], bias.clone().requires_grad_())
        teacher = operands["teacher_hidden"], operands["teacher_weight"]
        linear_distillation_loss(operands["student_hidden"], head, *teacher, backend=backend).student.backward()
        return head.bias.grad

    found, expected = gradient(narrow), gradient(narrow.float())
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16()) and expected.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bitwise_equal(backend):
    runs = [Problem().run(backend, teacher=Objective("reverse_kl", ce_weight=0.1)) for _ in range(2)]
    for first, second in zip(runs[0], runs[1], strict=True):
        for name in first:
            assert torch.equal(first[name], second[name]), name


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_token_weights_survive_fp16(backend):
    problem = Problem(dtype=torch.float16, ignored=())
    weights = torch.full((N,), 3000.0, device=DEVICE)
    assert_as_good_as_the_reference(problem, backend, teacher="forward_kl", token_weights=weights)


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
def test_padding_gets_no_gradient(backend, deterministic_memory):
    """Wider than a block of the kernel, whose stores end with the vocabulary."""
    z, u = (torch.randn(3, 4200, device=DEVICE, requires_grad=True) for _ in range(2))
    labels = torch.tensor([1, -100, 5], device=DEVICE)
    loss = distillation_loss(z, u, labels, teacher="jsd", vocab_size=2048, backend=backend)
    for gradient in torch.autograd.grad(loss.total, (z, u)):
        assert gradient[:, :2048].any() and not gradient[:, 2048:].any()


@pytest.fixture
def deterministic_memory():
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_scalars_of_each_side(backend):
    """(a * student + b * teacher).backward(): each side's gradient is multiplied by its own factor."""
    _, unit = Problem().run(backend, teacher="forward_kl")
    _, scaled = Problem().run(backend, teacher="forward_kl", upstream=(3.0, 0.25))
    for name in GRADIENTS:
        torch.testing.assert_close(scaled[name], unit[name] * (3.0 if "student" in name else 0.25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scaling_by_triton(dtype, monkeypatch):
    """Every element once, also where each program has several blocks; a factor of 1 leaves all as it is."""
    for name, value in (("BLOCK", 64), ("PROGRAMS", 3)):
        monkeypatch.setattr(scale_kernel, name, value)
    x = torch.randn(19, 37, dtype=dtype, device=DEVICE)
    factors = torch.tensor([1.0, 1 / 3, math.nan], dtype=ops.wide(dtype), device=DEVICE)
    for factor in factors:
        found = scale_kernel.scale_(x.clone(), factor)
        torch.testing.assert_close(found, (x * factor).to(dtype), equal_nan=True)
    assert torch.equal(scale_kernel.scale_(x.clone(), factors[0]), x)
    assert scale_kernel.scale_(x[:0].clone(), factors[1]).shape == (0, 37)


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


def test_no_grad_does_no_gradient_work():
    with torch.no_grad():
        assert recorded(GRADIENTS, teacher="forward_kl")[0] == [LOGITS, LOGITS]


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


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere the allocator keeps memory")
def test_memory_of_one_size_does_not_stay_where_another_is_needed(monkeypatch):
    monkeypatch.setattr(memory, "KEPT_FROM", 1)
    memory.release()
    first = memory.empty_like(torch.empty(100), torch.float32)
    held, address = memory.empty_like(torch.empty(100), torch.float32)[50:], first.data_ptr()
    assert held.data_ptr() != address + 200
    del first
    assert memory.empty_like(torch.empty(100), torch.float32).data_ptr() == address
    other = memory.empty_like(torch.empty(200), torch.float32)
    assert sorted(len(kept) for kept, _ in memory._kept.gradients) == [400, 800]  # the held one and the new one
    assert other.shape == (200,) and memory.empty_like(torch.empty(50), torch.float64).dtype == torch.float64


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere the allocator keeps memory")
def test_memory_of_gradients_serves_again_once_nobody_holds_them(monkeypatch):
    monkeypatch.setattr(memory, "KEPT_FROM", 1)
    memory.release()
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
    memory.release()
    assert all(relative_error(again[k], expected[1][k].double()) < 1e-5 for k in GRADIENTS[:3])


@pytest.mark.skipif(DEVICE != "cpu", reason="the profiler's figures are of the CPU's memory")
def test_whole_logits_never_exist():
    """Chunks of 4 rows: no tensor is larger than the eight such blocks that row mathematics works in, whatever N is."""
    hidden = ("student_hidden", "teacher_hidden")
    for n in (64, 128):
        assert recorded(hidden, n=n, teacher="jsd", workspace_bytes=4 * 2 * 1024 * 4)[1] == 8 * 4 * 1024 * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_fp32_logits(backend):
    """Under autocast the operands are bf16, as for nn.Linear, and the logits fp32 all the same."""
    problem = Problem(spread=0.1)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        values, gradients = problem.run(backend, teacher="forward_kl")
    problem.operands = {k: x.bfloat16() for k, x in problem.operands.items()}
    truth_values, truth = problem.run("reference", torch.float64, teacher="forward_kl")
    assert values["student"].item() == pytest.approx(truth_values["student"].item(), rel=1e-4)
    for name in GRADIENTS:
        assert gradients[name].dtype == torch.float32
        assert relative_error(gradients[name], truth[name]) < BF16, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_sides_of_different_dtypes(backend):
    problem = Problem()
    for k in GRADIENTS[:3]:
        problem.operands[k] = problem.operands[k].bfloat16()
    _, truth = problem.run("reference", torch.float64, teacher="jsd")
    _, gradients = problem.run(backend, teacher="jsd")
    for name in GRADIENTS:
        assert gradients[name].dtype == problem.operands[name].dtype
        assert relative_error(gradients[name], truth[name]) < (BF16 if "student" in name else 1e-6), name


def test_fp64_operands_stay_fp64():
    values, gradients = Problem(dtype=torch.float64).run("torch", teacher="jsd")
    truth_values, truth = Problem(dtype=torch.float64).run("reference", teacher="jsd")
    assert values["student"].item() == pytest.approx(truth_values["student"].item(), rel=1e-13)
    for name in GRADIENTS:
        assert relative_error(gradients[name], truth[name]) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_embedding_gathers_both_gradients(backend):
    """The head is also the input embedding: autograd adds the two."""
    ids = torch.arange(N, device=DEVICE)
    problem = Problem()

    def run(backend, dtype):
        w = problem.operands["student_weight"].to(dtype).clone().requires_grad_()
        y, wt = problem.operands["teacher_hidden"].to(dtype), problem.operands["teacher_weight"].to(dtype)
        linear_distillation_loss(w[ids].tanh(), w, y, wt, backend=backend).total.backward()
        return w.grad

    assert relative_error(run(backend, torch.float32), run("reference", torch.float64)) < 1e-6


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


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distillation_loss_from_logits(dtype, backend):
    v, counted = 50, torch.arange(N) != 2
    z = (torch.randn(N, v + 3) * 2).to(DEVICE, dtype).requires_grad_()
    u = (torch.randn(N, v + 6) * 2).to(DEVICE, dtype).requires_grad_()
    labels = torch.where(counted, torch.randint(0, v, (N,)), -100).to(DEVICE)
    options = {
        "student": Objective("jsd", ce_weight=0.2),
        "teacher": Objective("forward_kl", 0.5, 0.5),
        "temperature": 2.0,
    }
    before = z.detach().clone()
    loss = distillation_loss(z, u, labels, vocab_size=v, backend=backend, **options)
    loss.total.backward()
    wide = [x.detach().double().requires_grad_() for x in (z, u)]
    truth = distillation_loss(*wide, labels, vocab_size=v, backend="reference", **options)
    truth.total.backward()
    assert torch.equal(z.detach(), before), "the caller's logits are left alone"
    assert loss.student.item() == pytest.approx(truth.student.item(), rel=1e-5)
    assert loss.teacher.item() == pytest.approx(truth.teacher.item(), rel=1e-5)
    for x, expected in zip((z, u), wide, strict=True):
        assert x.grad.dtype == dtype
        assert relative_error(x.grad, expected.grad) < (1e-6 if dtype == torch.float32 else BF16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [1e-3, 1e-4])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_near_convergence(name, spread, backend):
    """Divergences of 5e-7 and 5e-9 in fp32, whose eps times the logits is 1e-6."""
    z = torch.randn(8, 4099, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2 + 5
    u = z + spread * torch.randn(8, 4099, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    options = {"student": name, "reduction": "none"}
    truth = distillation_loss(z.double(), u.double(), backend="reference", **options)
    found = distillation_loss(z, u, backend=backend, **options)
    for value, expected, error in (
        (found.student, truth.student, 3e-7),
        *((found.metrics[kl], truth.metrics[kl], 1e-7) for kl in ("forward_kl", "reverse_kl")),
    ):
        assert (value.double() - expected).abs().max() < error
        assert backend == "triton" or value.min() >= 0


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("flat", ["student", "teacher"])
def test_jsd_of_a_flat_and_a_peaked_row(flat, beta):
    """Their sums of exponentials, by which the mixture is weighted, differ by the size of the vocabulary."""
    z, u = torch.zeros(2, 1, 150000, dtype=torch.float64, device=DEVICE)
    (z if flat == "teacher" else u)[:, 7] = 30
    runs = []
    for dtype, name in ((torch.float64, "reference"), (torch.float32, "torch")):
        x, y = (t.to(dtype, copy=True).requires_grad_() for t in (z, u))
        objective = Objective("jsd", beta=beta)
        loss = distillation_loss(x, y, student=objective, teacher=objective, backend=name)
        loss.total.backward()
        runs.append((loss.student, loss.teacher, x.grad, y.grad))
    for found, expected in zip(runs[1], runs[0], strict=True):
        assert relative_error(found, expected) < 3e-4


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


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere GEMMs of bf16 operands have an fp32 output")
@pytest.mark.parametrize(
    "dtype, own, during",
    [(torch.bfloat16, "none", "bf16"), (torch.bfloat16, "ieee", "ieee"), (torch.float32, "none", "none")],
)
def test_products_of_bf16_operands_on_a_cpu_may_be_bf16(dtype, own, during, monkeypatch, request):
    """They are exact, and are added in fp32; nothing else changes its precision, nor does what comes later."""
    setting, seen, mm = torch.backends.mkldnn.matmul, [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: (seen.append(setting.fp32_precision), mm(*a, **k))[1])
    request.addfinalizer(lambda: _set_precision(setting, "none"))
    _set_precision(setting, own)
    hidden, weight = torch.randn(64, 512).to(dtype), torch.randn(5000, 512).to(dtype)
    model, out = Model(hidden, weight, None, None, None, 1.0, None, None, None), torch.empty(64, 5000)
    project(model, slice(0, 64), out, 5000)
    assert set(seen) == {during} and setting.fp32_precision == own
    assert relative_error(out, hidden.double() @ weight.double().t()) < 1e-6
    if during == "bf16":
        monkeypatch.setattr(torch, "mm", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            project(model, slice(0, 64), out, 5000)
        assert setting.fp32_precision == own


@pytest.mark.skipif(DEVICE != "cpu", reason="other devices multiply 16-bit operands")
@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cpu_that_does_not_multiply_16_bits_is_spared_them(dtype, has, monkeypatch):
    """Its GEMMs get operands widened a block at a time; either way the gradients are as good."""
    monkeypatch.setattr(chunks, "has_fast_gemm", lambda other, _: has or other != dtype)
    monkeypatch.setattr(chunks, "HEAD_BLOCK", 24)  # of 131 head rows
    problem, seen = Problem(dtype=dtype, n=40, ignored=(2, 39)), []
    watched = {name: getattr(torch, name) for name in ("mm", "addmm")}
    for name in watched:

        def watch(*args, of=name, **options):
            seen.extend((x.dtype, x.shape) for x in args[-2:])
            return watched[of](*args, **options)

        monkeypatch.setattr(chunks.torch, name, watch)
    for workspace_bytes in (1 << 14, 1 << 17):  # chunks of 13 rows, and one chunk of them all
        assert_as_good_as_the_reference(problem, "torch", teacher="jsd", workspace_bytes=workspace_bytes)
    assert (dtype in {x for x, _ in seen}) == has
    if not has:  # but for the 38 hidden states, no more than a block is widened
        assert max(max(shape) for _, shape in seen) == 38


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


def test_module_form_holds_options_and_takes_others():
    problem = Problem()
    args = [problem.operands[k] for k in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")]
    module = LinearDistillationLoss(student="jsd", temperature=2.0)
    expected = linear_distillation_loss(*args, student="jsd", temperature=3.0)
    assert module(*args, temperature=3.0).student == expected.student
    assert repr(module) == "LinearDistillationLoss(student='jsd', temperature=2.0)"


def test_total_is_both_sides():
    problem = Problem()
    args = [problem.operands[k] for k in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")]
    frozen = linear_distillation_loss(*args)
    assert frozen.teacher is None and frozen.total is frozen.student
    online = linear_distillation_loss(*args, teacher="reverse_kl")
    assert online.total == online.student + online.teacher


X, W, Y, U = torch.zeros(4, 8), torch.zeros(32, 8), torch.zeros(4, 6), torch.zeros(32, 6)


@pytest.mark.parametrize(
    "args, options, error, message",
    [
        ((X, W, Y, torch.zeros(40, 6)), {}, ValueError, r"student 32 and teacher 40.*pass vocab_size=len\(tokenizer\)"),
        ((X, W, Y, U), {"vocab_size": 33}, ValueError, r"vocab_size in \[1, 32\].*got 33"),
        ((X, U, Y, W), {}, ValueError, r"student_hidden of shape \(\.\.\., 6\).*got \(4, 8\).*swapped"),
        ((X, W, Y[:3], U), {}, ValueError, r"one leading shape; got \(4, 8\) and \(3, 6\)"),
        ((X, W.bfloat16(), Y, U), {}, TypeError, r"student's head in torch.float32.*got torch.bfloat16.*autocast"),
        ((X.long(), W, Y, U), {}, TypeError, "floating-point student_hidden; got torch.int64"),
        ((X, W.to(torch.int8), Y, U), {}, TypeError, "got torch.int8: dequantise"),
        ((X, W[0], Y, U), {}, ValueError, r"weight of shape \(V, D\); got \(8,\)"),
        ((X, nn.Identity(), Y, U), {}, TypeError, "got Identity"),
        ((X.to("meta"), W, Y.to("meta"), U), {}, ValueError, "student's head on meta.*got cpu"),
        ((X, W, Y.to("meta"), U.to("meta")), {}, ValueError, "one device; got cpu and meta"),
        ((X, W, Y, U, torch.zeros(3).long()), {}, ValueError, r"labels of shape \(4,\).*got \(3,\)"),
        ((X, W, Y, U, torch.zeros(4)), {}, TypeError, "torch.int64; got torch.float32"),
        ((X, W, Y, U, torch.full((4,), 32)), {}, ValueError, r"labels in \[0, 32\) or ignore_index=-100; got 32"),
        ((X, W, Y, U, torch.full((4,), -1)), {}, ValueError, "got -1"),
        (
            (X, W, Y, U),
            {"student": Objective(ce_weight=0.5)},
            ValueError,
            "labels, since the student's ce_weight is 0.5",
        ),
        ((X, W, Y, U), {"student": "kl"}, ValueError, "expected a divergence out of"),
        ((X, W, Y, U), {"student": None}, TypeError, "a divergence's name or an Objective; got None"),
        ((X, W, Y, U), {"normalizer": -1}, ValueError, "normalizer >= 0; got -1"),
        ((X, W, Y, U), {"normalizer": torch.ones(2)}, ValueError, r"one normalizer; got a tensor of shape \(2,\)"),
        (
            [t.double() for t in (X, W, Y, U)],
            {"backend": "triton"},
            ValueError,
            "at most fp32 for backend='triton'; got torch.float64",
        ),
        ((X, W, Y, U), {"temperature": 0}, ValueError, "temperature > 0; got 0"),
        ((X, W, Y, U), {"teacher_share": 1.5}, ValueError, "teacher_share between 0 and 1; got 1.5"),
        ((X, W, Y, U), {"teacher_share": 0.5, "teacher": "jsd"}, ValueError, "teacher=None with teacher_share below 1"),
        ((X, W, Y, U), {"reduction": "avg"}, ValueError, "mean, sum or none; got 'avg'"),
        ((X, W, Y, U), {"reduction": "sum", "normalizer": 3}, ValueError, "normalizer with reduction='mean' only"),
        ((X, W, Y, U), {"backend": "cuda"}, ValueError, "one of auto, triton, torch, reference; got 'cuda'"),
        ((X, W, Y, U), {"workspace_bytes": 0}, ValueError, "workspace_bytes > 0; got 0"),
        ((X, W, Y, U), {"token_weights": torch.ones(3)}, ValueError, r"token_weights of shape \(4,\).*got \(3,\)"),
        ((X, W, Y, U), {"token_weights": torch.ones(4, requires_grad=True)}, ValueError, "without gradient"),
        ((X, LinearHead(W), Y, U), {"labels": torch.zeros(4, 1).long()}, ValueError, r"got \(4, 1\)"),
    ],
)
def test_errors(args, options, error, message):
    with pytest.raises(error, match=message):
        linear_distillation_loss(*args, **options)


def test_an_explicit_backend_never_falls_back(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="expected CUDA or ROCm tensors for backend='triton'; got cpu"):
        linear_distillation_loss(X, W, Y, U, backend="triton")


def test_logit_errors():
    with pytest.raises(ValueError, match="student 32 and teacher 40"):
        distillation_loss(torch.zeros(4, 32), torch.zeros(4, 40))
    with pytest.raises(TypeError, match="floating-point teacher_logits"):
        distillation_loss(torch.zeros(4, 32), torch.zeros(4, 32).long())
    with pytest.raises(ValueError, match="one leading shape"):
        distillation_loss(torch.zeros(4, 32), torch.zeros(5, 32))
