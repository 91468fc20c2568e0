"""The loss between two vocabularies, against its definition in fp64."""

import pytest
import torch
from test_divergences import TEXTBOOK

from okd_kernels import LinearHead, Objective, Outcomes, linear_distillation_loss, linear_outcome_distillation_loss

N, V_S, V_T, D_S, D_T = 7, 61, 83, 8, 12


def outcomes(v, *groups):
    """Each group of ids is one outcome."""
    of_ids = torch.full((v,), -1)
    for k, ids in enumerate(groups):
        of_ids[ids] = k
    return Outcomes(of_ids, len(groups))


STUDENT = outcomes(V_S, *range(40, 10, -1), [3], list(range(41, 60)))  # 0-2, 4-10, 60 are in none
TEACHER = outcomes(V_T, *range(2, 62, 2), [0, 1], list(range(3, 83, 2)))
NAMES = ("student_hidden", "student_weight", "student_bias", "teacher_hidden", "teacher_weight", "teacher_bias")


def operands(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((N, D_S), (V_S, D_S), (V_S,), (N, D_T), (V_T, D_T), (V_T,))
    return {k: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for k, s in zip(NAMES, shapes, strict=True)}


def probabilities(z, of, temperature):
    """By the definition: sums of the ids' probabilities, over those that are in an outcome."""
    sums = torch.stack([(z / temperature).exp()[:, of.of_ids == k].sum(1) for k in range(of.size)], 1)
    return sums / sums.sum(1, keepdim=True)


def heads(t, **options):
    return [LinearHead(t[f"{side}_weight"], t[f"{side}_bias"], **options) for side in ("student", "teacher")]


def found(t, student, teacher, both=(STUDENT, TEACHER), head={}, upstream=(1.0, 1.0), **options):  # noqa: B006
    t = {k: x.clone().requires_grad_() for k, x in t.items()}
    ours, theirs = heads(t, **head)
    loss = linear_outcome_distillation_loss(
        *(t["student_hidden"], ours, both[0], t["teacher_hidden"], theirs, both[1]),
        student=student,
        teacher=teacher,
        **options,
    )
    total = upstream[0] * loss.student + (0 if loss.teacher is None else upstream[1] * loss.teacher)
    total.backward()
    return loss, {k: x.grad for k, x in t.items()}


@pytest.mark.parametrize("workspace_bytes", [None, 12 * 1024])
@pytest.mark.parametrize("name", TEXTBOOK)
def test_it_is_the_divergence_of_the_outcomes_probabilities(name, workspace_bytes):
    t, temperature, head = operands(), 1.7, {"logit_scale": 0.7, "softcap": 3.0}
    loss, gradients = found(
        *(t, name, Objective(name, weight=0.3)),
        head=head,
        temperature=temperature,
        normalizer=torch.tensor(5.0),
        workspace_bytes=workspace_bytes,
        upstream=(2.0, -3.0),
    )
    t = {k: x.requires_grad_() for k, x in t.items()}
    logits = [h.logits(t[f"{side}_hidden"]) for h, side in zip(heads(t, **head), ("student", "teacher"), strict=True)]
    q, p = (probabilities(z, of, temperature) for z, of in zip(logits, (STUDENT, TEACHER), strict=True))
    student = temperature**2 * TEXTBOOK[name](q, p.detach()).sum() / 5
    teacher = 0.3 * temperature**2 * TEXTBOOK[name](p, q.detach()).sum() / 5
    (2 * student - 3 * teacher).backward()
    torch.testing.assert_close((loss.student, loss.teacher), (student.detach(), teacher.detach()))
    for k in NAMES:
        torch.testing.assert_close(gradients[k], t[k].grad, msg=k)
    torch.testing.assert_close(loss.metrics["forward_kl"], TEXTBOOK["forward_kl"](q, p).detach())
    torch.testing.assert_close(loss.metrics["top1_agreement"], (q.argmax(1) == p.argmax(1)).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_one_vocabulary_it_is_the_usual_loss(dtype):
    """By values and gradients, to the rounding of the dtype."""
    t = operands(dtype)
    t["teacher_weight"], t["teacher_bias"] = (x[:V_S].clone() for x in (t["teacher_weight"], t["teacher_bias"]))
    every = Outcomes(torch.arange(V_S), V_S)
    loss, gradients = found(t, "jsd", "forward_kl", (every, every))
    t = {k: x.requires_grad_() for k, x in t.items()}
    ours, theirs = heads(t)
    usual = linear_distillation_loss(
        t["student_hidden"], ours, t["teacher_hidden"], theirs, student="jsd", teacher="forward_kl"
    )
    usual.total.backward()
    torch.testing.assert_close((loss.student, loss.teacher), (usual.student, usual.teacher))
    for name in ("forward_kl", "reverse_kl", "student_entropy", "top1_agreement"):
        torch.testing.assert_close(loss.metrics[name], usual.metrics[name])
    eps = torch.finfo(dtype).eps
    for k in NAMES:
        assert (gradients[k] - t[k].grad).abs().max() <= 4 * eps * t[k].grad.abs().max(), k


def test_it_is_as_exact_where_the_rest_has_almost_no_mass():
    """1 - sum of the others would be rounding."""
    z = torch.zeros(1, 4)
    z[0, 0] = 40.0
    one, other = outcomes(4, 0, [1, 2, 3]), outcomes(2, 0, 1)
    u = torch.tensor([[40.0, 1.0]])
    eye = [torch.eye(n) for n in (4, 2)]
    loss = linear_outcome_distillation_loss(z, eye[0], one, u, eye[1], other, student="reverse_kl")
    q, p = (probabilities(x.double(), of, 1.0) for x, of in ((z, one), (u, other)))
    torch.testing.assert_close(
        loss.student.double(), TEXTBOOK["reverse_kl"](q, p).sum(), rtol=16 * 40 * torch.finfo(z.dtype).eps, atol=0
    )


def test_only_what_is_asked_for_gets_a_gradient():
    t = operands(torch.float32)
    _, gradients = found(t, "forward_kl", None)
    assert [k for k, g in gradients.items() if g is not None] == [k for k in NAMES if k.startswith("student")]
    _, gradients = found(t, "forward_kl", "forward_kl", normalizer=0)
    assert all(g.abs().max() == 0 for g in gradients.values())
    with torch.no_grad():
        loss = linear_outcome_distillation_loss(
            *(t["student_hidden"], heads(t)[0], STUDENT, t["teacher_hidden"], heads(t)[1], TEACHER)
        )
    assert not loss.student.requires_grad and loss.teacher is None


def test_a_lora_on_the_head_learns():
    t = operands()
    lora = [torch.randn(2, D_S).double().requires_grad_(), torch.randn(V_S, 2).double().requires_grad_()]
    teacher = heads(t)[1]

    def loss(weight, lora):
        head = LinearHead(weight, lora=lora)
        return linear_outcome_distillation_loss(
            t["student_hidden"], head, STUDENT, t["teacher_hidden"], teacher, TEACHER
        ).student

    gradients = torch.autograd.grad(loss(t["student_weight"], (*lora, 0.5)), lora)
    merged = t["student_weight"] + 0.5 * lora[1] @ lora[0]
    for one, other in zip(gradients, torch.autograd.grad(loss(merged, None), lora), strict=True):
        torch.testing.assert_close(one, other)


def test_errors():
    t = operands()
    ours, theirs = heads(t)
    call = (t["student_hidden"], ours, STUDENT, t["teacher_hidden"], theirs)
    with pytest.raises(ValueError, match="expected objectives without cross-entropy"):
        linear_outcome_distillation_loss(*call, TEACHER, student=Objective("jsd", ce_weight=1.0))
    with pytest.raises(ValueError, match="expected the same outcomes of both models; got 32 of the student, and 31 of"):
        linear_outcome_distillation_loss(*call, outcomes(V_T, *range(31)))
    with pytest.raises(ValueError, match="expected an outcome, or -1, for each of the 83 rows of the teacher's head"):
        linear_outcome_distillation_loss(*call, outcomes(80, *range(32)))
    with pytest.raises(ValueError, match=r"expected outcomes in \[0, 3\), or -1; got 0 to 3"):
        Outcomes(torch.arange(4), 3)
    with pytest.raises(ValueError, match="expected a temperature > 0"):
        linear_outcome_distillation_loss(*call, TEACHER, temperature=0)
