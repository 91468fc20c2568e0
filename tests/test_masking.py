"""Ignored rows, with `compact` and without; labels that are no token; NaN in a counted row."""

import math

import pytest
import torch
from problems import BACKENDS, D_S, DEVICE, GRADIENTS, N, Problem, assert_as_good_as_the_reference, relative_error

from okd_kernels import (
    LinearHead,
    Objective,
    distillation_loss,
    linear_distillation_loss,
    linear_sparse_distillation_loss,
)

ALL = (*BACKENDS, "reference")
OBJECTIVES = {"student": Objective("jsd", ce_weight=0.5), "teacher": Objective("forward_kl", ce_weight=0.5)}
IGNORED, COUNTED = [0, 4], [i for i in range(N) if i not in (0, 4)]
compact = pytest.mark.parametrize("compact", [True, False])


@compact
@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ignored_rows_equal_removed_rows_and_may_hold_nan(dtype, reduction, backend, compact):
    options = {**OBJECTIVES, "reduction": reduction}
    problem = Problem(ignored=IGNORED, dtype=dtype)
    removed = Problem(ignored=IGNORED, dtype=dtype)
    removed.operands |= {k: x[COUNTED] for k, x in removed.operands.items() if "hidden" in k}
    removed.labels = removed.labels[COUNTED]
    for side in ("student", "teacher"):
        problem.operands[f"{side}_hidden"][IGNORED] = math.nan
    values, gradients = problem.run(backend, compact=compact, **options)
    for name, value in values.items():
        if value.dim():
            assert (value[IGNORED] == 0).all(), name
            values[name] = value[COUNTED]
    for name in GRADIENTS:
        if "hidden" in name:
            assert (gradients[name][IGNORED] == 0).all()
            gradients[name] = gradients[name][COUNTED]
    assert_as_good_as_the_reference(removed, backend, found=(values, gradients), **options)


@compact
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compact_changes_nothing_but_rounding(dtype, backend, compact):
    problem = Problem(n=13, ignored=(0, 3, 4, 5, 12), dtype=dtype)
    assert_as_good_as_the_reference(problem, backend, compact=compact, **OBJECTIVES)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compact_takes_ignored_rows_out_of_the_gemms(backend, monkeypatch):
    """7 rows, 5 of which count: which of the two the products of hidden states and head have."""
    from okd_kernels import gemms, sides

    seen = []

    def watched(hidden, weight, out):
        seen.append(len(hidden))
        gemms.logits_into(hidden, weight, out)

    monkeypatch.setattr(sides, "logits_into", watched)
    for compact, rows in ((True, len(COUNTED)), (False, N)):
        seen.clear()
        Problem(ignored=IGNORED).run(backend, compact=compact, workspace_bytes=1 << 20)
        assert seen == [rows, rows]


@compact
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_lora_sees_no_ignored_row(backend, compact):
    """A LoRA's A is outside the chunks: NaN in an ignored row must not reach its gradient."""
    gradients = []
    for level in (0.0, math.nan):
        problem, g = Problem(ignored=IGNORED), torch.Generator().manual_seed(1)
        problem.operands["student_hidden"][IGNORED] = level
        lora = [torch.randn(shape, generator=g).to(DEVICE).requires_grad_() for shape in ((3, D_S), (131, 3))]
        head = LinearHead(problem.operands["student_weight"], lora=(*lora, 0.5))
        teacher = [problem.operands[f"teacher_{name}"] for name in ("hidden", "weight")]
        hidden = problem.operands["student_hidden"]
        loss = linear_distillation_loss(hidden, head, *teacher, problem.labels, backend=backend, compact=compact)
        loss.total.backward()
        gradients.append([p.grad for p in lora])
    for zeros, nans in zip(*gradients, strict=True):
        assert torch.equal(zeros, nans) and zeros.any()


@compact
@pytest.mark.parametrize("backend", ALL)
def test_all_ignored_is_zero_loss_with_zero_gradients(backend, compact):
    problem = Problem(ignored=range(N))
    for side in ("student", "teacher"):
        problem.operands[f"{side}_hidden"][:] = math.nan
    values, gradients = problem.run(backend, teacher="forward_kl", compact=compact)
    assert all((x == 0).all() for x in values.values())
    assert all((g == 0).all() for g in gradients.values())


@compact
@pytest.mark.parametrize("weight", [math.nan, math.inf])
@pytest.mark.parametrize("backend", ALL)
def test_weights_of_ignored_rows_may_be_anything(backend, weight, compact):
    weights = torch.rand(N, device=DEVICE)
    options = {"compact": compact, "token_weights": weights}
    for reduction in ("none", "mean"):
        weights[2] = 0.5  # ignored
        expected_values, expected = Problem().run(backend, reduction=reduction, **options)
        weights[2] = weight
        values, gradients = Problem().run(backend, reduction=reduction, **options)
        assert torch.equal(values["student"], expected_values["student"])
        assert all(torch.equal(gradients[name], expected[name]) for name in GRADIENTS[:3])


@compact
@pytest.mark.parametrize("backend", ALL)
def test_nan_in_a_counted_row_reaches_the_loss_of_that_row_only(backend, compact):
    """A trainer stops at such a loss. Other rows of its block keep what they have, -inf logits included."""
    problem = Problem()
    for side in ("student", "teacher"):
        problem.operands[f"{side}_bias"][5] = -math.inf
    problem.labels[problem.labels == 5] = 6
    options = {"reduction": "none", "compact": compact, "requires": ("student_hidden",)}
    expected, of_expected = problem.run(backend, **options)
    problem.operands["student_hidden"][3] = math.nan
    values, gradients = problem.run(backend, **options)
    assert values["student"].isnan().nonzero().tolist() == [[3]]
    if backend != "reference":  # whose clamp has no gradient at NaN
        assert gradients["student_hidden"].isnan().any(1).nonzero().tolist() == [[3]]
    others = [i for i in range(N) if i != 3]
    problem.operands["student_hidden"][3] = 0  # whatever: the rows below are compared
    found = {"student": values["student"][others]}, {"student_hidden": gradients["student_hidden"][others]}
    rest = Problem()
    rest.operands |= {k: x[others] if "hidden" in k else x for k, x in problem.operands.items()}
    rest.labels = problem.labels[others]
    assert_as_good_as_the_reference(rest, backend, found=found, reduction="none", requires=("student_hidden",))
    assert torch.equal(expected["student"].isnan(), torch.zeros(N, dtype=torch.bool, device=DEVICE))
    assert of_expected["student_hidden"].isfinite().all()


def entry_points(ids=(1, 2)):
    """Each loss as a function of labels and options, on 4 rows of 32 tokens."""
    x, w, y, u = (torch.randn(shape, device=DEVICE) for shape in ((4, 8), (32, 8), (4, 6), (32, 6)))
    z, t = torch.randn(2, 4, 32, device=DEVICE)
    of_ids = torch.tensor(ids, device=DEVICE).expand(4, 2), torch.full((4, 2), -1.0, device=DEVICE)
    return [
        (x, lambda a, labels, **options: linear_distillation_loss(a, w, y, u, labels, **options)),
        (z, lambda a, labels, **options: distillation_loss(a, t, labels, **options)),
        (x, lambda a, labels, **options: linear_sparse_distillation_loss(a, w, *of_ids, labels, **options)),
    ]


@pytest.mark.skipif(DEVICE != "cpu", reason="elsewhere reading labels would wait for the device")
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("label", [-1, 32, 2**40])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
@pytest.mark.parametrize("backend", ALL)
def test_a_label_that_is_no_token_is_refused(backend, ce_weight, label, which):
    labels = torch.tensor([1, -100, label, 3])
    hidden, loss = entry_points()[which]
    with pytest.raises(ValueError, match=rf"labels in \[0, 32\) or ignore_index=-100; got {label}"):
        loss(hidden, labels, student=Objective(ce_weight=ce_weight), backend=backend)


@compact
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("label", [-1, 32])
@pytest.mark.parametrize("ce_weight", [0.0, 0.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_label_that_cannot_be_read_makes_its_row_nan(
    backend, ce_weight, label, which, reduction, compact, monkeypatch
):
    """As on a GPU: the row's loss and gradient, and those of no other."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    x, loss = entry_points()[which]
    found = []
    for value in (label, 2):
        labels = torch.tensor([1, -100, value, 3], device=DEVICE)
        hidden = x.clone().requires_grad_()
        options = {"backend": backend, "reduction": reduction, "compact": compact}
        student = loss(hidden, labels, student=Objective(ce_weight=ce_weight), **options).student
        student.sum().backward()
        found.append((student.detach(), hidden.grad))
    (losses, gradients), (expected, of_expected) = found
    if reduction == "none":
        assert losses.isnan().tolist() == [False, False, True, False]
        assert torch.equal(losses[[0, 1, 3]], expected[[0, 1, 3]])
    else:
        assert losses.isnan()
    assert gradients[2].isnan().all()
    for row in (0, 1, 3):
        assert relative_error(gradients[row], of_expected[row].double()) <= 8 * torch.finfo(torch.float32).eps
