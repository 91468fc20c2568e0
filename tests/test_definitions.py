"""The losses and metrics written out in plain PyTorch, in fp64; derivatives; and where a divergence is infinite."""

import math

import pytest
import torch
from problems import BACKENDS, DEVICE, GRADIENTS, N, Problem, V, assert_as_good_as_the_reference, relative_error
from torch import nn

from okd_kernels import DIVERGENCES, Objective, distillation_loss

ALL = (*BACKENDS, "reference")
EXACT = V * torch.finfo(torch.float64).eps  # what a sum of V terms may be wrong by


def written_out(problem):
    """fp64 leaves, and logits of student and teacher."""
    t = {k: x.double().requires_grad_() for k, x in problem.operands.items()}
    z = t["student_hidden"] @ t["student_weight"].T + t["student_bias"]
    return t, z, t["teacher_hidden"] @ t["teacher_weight"].T + t["teacher_bias"]


def assert_defines(problem, backend, leaves, losses, **options):
    """The reference in fp64 is the definition; the backend is as good as the reference in the operands' dtype."""
    values, gradients = problem.run("reference", torch.float64, **options)
    for name, expected in zip(("student", "teacher"), losses, strict=True):
        if expected is not None:
            torch.testing.assert_close(values[name], expected.detach(), rtol=EXACT, atol=EXACT)
    for name in GRADIENTS:
        if name.startswith("student") or losses[1] is not None:
            assert relative_error(gradients[name], leaves[name].grad) < EXACT, name
        else:
            assert gradients[name] is None
    if backend != "reference":
        assert_as_good_as_the_reference(problem, backend, **options)


@pytest.mark.parametrize("backend", ALL)
def test_okd(backend):
    """Eq. 16/17 of arXiv 2409.12512: values and gradients of both sides."""
    problem, a = Problem(ignored=()), 0.3
    t, z, u = written_out(problem)
    log_q, log_p = z.log_softmax(-1), u.log_softmax(-1)
    student = (log_p.detach().exp() * (log_p.detach() - log_q)).sum(-1).mean()
    kl_student_teacher = (log_q.detach().exp() * (log_q.detach() - log_p)).sum(-1).mean()
    teacher = a * kl_student_teacher + (1 - a) * nn.functional.cross_entropy(u, problem.labels)
    (student + teacher).backward()
    options = {"student": "forward_kl", "teacher": Objective("forward_kl", weight=a, ce_weight=1 - a)}
    assert_defines(problem, backend, t, (student, teacher), **options)


@pytest.mark.parametrize("backend", ALL)
def test_taid(backend):
    """arXiv 2501.16937: KL(softmax((1 - t) sg(z) + t u) || softmax(z)); at t = 0 nothing to learn."""
    problem, mix = Problem(ignored=()), 0.4
    t, z, u = written_out(problem)
    log_p = ((1 - mix) * z + mix * u).detach().log_softmax(-1)
    expected = (log_p.exp() * (log_p - z.log_softmax(-1))).sum(-1)
    expected.mean().backward()
    assert_defines(problem, backend, t, (expected.mean(), None), target_mix=mix)
    metric = problem.run("reference", torch.float64, target_mix=mix)[0]["forward_kl"]
    torch.testing.assert_close(metric, expected.detach(), rtol=EXACT, atol=EXACT)
    assert problem.run(backend, target_mix=0.0)[0]["student"].abs() <= 2 * torch.finfo(torch.float32).eps
    whole, at_1 = (problem.run(backend, **options)[0]["student"] for options in ({}, {"target_mix": 1.0}))
    assert torch.equal(whole, at_1)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_joint_training_differentiates_one_divergence_into_both_sides(name, backend):
    """PESF-KD: with `teacher=student.dual`, the gradients are those of one D(p, q) that holds nothing still."""
    problem, objective = Problem(ignored=()), Objective(name)
    t, z, u = written_out(problem)
    log_q, log_p = z.log_softmax(-1), u.log_softmax(-1)
    entry = DIVERGENCES[name]
    terms, _ = entry.formula(log_q, log_p, log_q.exp(), log_p.exp(), objective.alpha, objective.beta)
    value = terms.sum(-1).mean()
    value.backward()
    assert_defines(problem, backend, t, (value, value), student=objective, teacher=objective.dual)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_metrics(reduction, backend):
    problem, temperature = Problem(), 1.7
    problem.operands["teacher_weight"][:, 16:] *= 0.5
    _, z, u = (x.detach() if isinstance(x, torch.Tensor) else x for x in written_out(problem))
    q, p = (z / temperature).softmax(-1), (u / temperature).softmax(-1)
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
    values, _ = problem.run("reference", torch.float64, temperature=temperature, reduction=reduction)
    for name, truth in expected.items():
        torch.testing.assert_close(values[name], torch.where(counted, truth, 0), rtol=EXACT, atol=EXACT)
    if backend != "reference":
        assert_as_good_as_the_reference(problem, backend, temperature=temperature, reduction=reduction)
        assert torch.equal(problem.run(backend)[0]["top1_agreement"].double(), values["top1_agreement"])


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if not name.endswith("_detached")])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_finite_differences(side, name):
    """Central differences in fp64 of the learner's loss, along random directions of hidden, weight and bias.

    Their error falls with the square of the step, to a sixteenth at a quarter of it, so that two steps make a better
    estimate, and say by how much each of them may be wrong. The slope of a divergence that holds a part of its learner
    still is no derivative of its value, on purpose.
    """
    problem = Problem(v=11, n=3, ignored=(1,), dtype=torch.float64)
    problem.head_options = ({"softcap": 9.0}, {"softcap": 7.0, "logit_scale": 0.8})
    options = {s: Objective(name, ce_weight=0.3) for s in ("student", "teacher")} | {"temperature": 1.5}
    _, gradients = problem.run("reference", **options)

    def slope(k, x, direction, step):
        losses = []
        for sign in (1, -1):
            problem.operands[k] = x + sign * step * direction
            losses.append(problem.run("reference", requires=(), **options)[0][side].item())
        problem.operands[k] = x
        return (losses[0] - losses[1]) / (2 * step), abs(losses[0]) * torch.finfo(torch.float64).eps / step

    for k in (f"{side}_hidden", f"{side}_weight", f"{side}_bias"):
        x, direction = problem.operands[k], torch.randn_like(problem.operands[k])
        (coarse, _), (fine, rounding) = (slope(k, x, direction, step) for step in (4e-4, 1e-4))
        assert abs((gradients[k] * direction).sum().item() - fine) <= abs(coarse - fine) + 8 * rounding, k


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("p", [1e-3, 1e-22, 1e-30])
def test_mass_however_little_where_the_other_side_has_none_is_infinite(p, backend):
    """KL(p || q) and KL(q || p), loss and metric, of the row that has it and of no other."""
    z, u = torch.randn(2, 3, 40, dtype=torch.float64)
    u[1, 7] = u[1].logsumexp(-1) + math.log(p)
    z[1, 7] = -math.inf
    z, u = (x.float().to(DEVICE) for x in (z, u))
    for a, b, name in ((z, u, "forward_kl"), (u, z, "reverse_kl")):
        loss = distillation_loss(a, b, student=name, backend=backend, reduction="none")
        other = "reverse_kl" if name == "forward_kl" else "forward_kl"
        for value in (loss.student, loss.metrics[name]):
            assert value.isinf().tolist() == [False, True, False]
        assert loss.metrics[other].isfinite().all()
        assert distillation_loss(a, b, student=name, backend=backend).student == math.inf


@pytest.mark.parametrize("backend", ALL)
def test_other_divergences_are_finite_there(backend):
    """The student excludes a token that the teacher holds possible: forward KL is infinite, others are not."""
    problem = Problem()
    problem.operands["student_bias"][5] = -math.inf
    problem.labels[problem.labels == 5] = 6
    assert problem.run(backend, student="forward_kl", requires=())[0]["student"] == math.inf
    for name in ("reverse_kl", "jsd", "skew_kl", "tvd"):
        if backend == "reference":
            values, gradients = problem.run(backend, student=name)
            assert math.isfinite(values["student"])
            assert all(g.isfinite().all() for k, g in gradients.items() if "student" in k)
        else:
            assert_as_good_as_the_reference(problem, backend, student=name)


@pytest.mark.parametrize("backend", ALL)
def test_a_weight_of_zero_drops_an_infinite_divergence(backend):
    """As at the start of an annealed one: cross-entropy is all that is left, not 0 times infinity."""
    problem = Problem()
    no_label = torch.ones(V, dtype=torch.bool, device=DEVICE).index_fill(0, problem.labels.clamp_min(0), False)
    problem.operands["student_bias"][no_label] = -math.inf
    options = {"reduction": "none", "teacher": Objective("reverse_kl", weight=0)}
    values, _ = problem.run(backend, student=Objective("forward_kl", weight=0, ce_weight=0.5), **options)
    counted = problem.labels >= 0
    assert values["forward_kl"][counted].isinf().all()
    assert torch.equal(values["student"], 0.5 * values["student_nll"])
    assert (values["teacher"] == 0).all()
