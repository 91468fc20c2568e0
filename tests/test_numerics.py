"""Every divergence x side x backend x dtype against the fp64 reference on the same operands (budgets: `problems`)."""

import functools
import math

import pytest
import torch
from problems import (
    BACKENDS,
    DEVICE,
    Problem,
    assert_as_good_as_the_reference,
    assert_logits_as_good_as_the_reference,
    run_logits,
)

from okd_kernels import (
    DIVERGENCES,
    Objective,
    distillation_loss,
    linear_distillation_loss,
    row_kernels,
    torch_block,
    torch_rows,
)

LOW_PRECISION = [torch.bfloat16, torch.float16]


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
@pytest.mark.parametrize("dtype", [*LOW_PRECISION, torch.float32])
@pytest.mark.parametrize("spread", [1.0, 0.3, 0.1, 0.03])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_close_models_in_every_dtype(name, spread, dtype, backend):
    """Near convergence, where bf16 logits would have lost the gradient altogether."""
    assert_as_good_as_the_reference(Problem(dtype=dtype, spread=spread), backend, student=name, teacher=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_fp64_operands_stay_fp64(name, dtype):
    """Also where one side's only are: the loss takes the wider dtype, each gradient its operand's."""
    problem = Problem(dtype=torch.float64)
    for x in ("hidden", "weight", "bias"):
        problem.operands[f"teacher_{x}"] = problem.operands[f"teacher_{x}"].to(dtype)
    assert_as_good_as_the_reference(problem, "torch", student=Objective(name, ce_weight=0.5), teacher=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_sides_of_different_dtypes(dtype, side, backend):
    problem = Problem()
    for x in ("hidden", "weight", "bias"):
        problem.operands[f"{side}_{x}"] = problem.operands[f"{side}_{x}"].to(dtype)
    assert_as_good_as_the_reference(problem, backend, teacher="jsd")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v", [7, 1000, 1024, 4099])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vocabulary_sizes(dtype, name, v, backend):
    problem = Problem(v=v, dtype=dtype)
    assert_as_good_as_the_reference(problem, backend, student=name, teacher=name, workspace_bytes=1 << 20)


@pytest.fixture
def small_blocks(monkeypatch):
    """Four blocks of a row in Triton; three rows a block in PyTorch, whose columns fall into four pieces."""
    rows = functools.partial(row_kernels.TritonRows, launch=row_kernels.Launch(block=16, warps=1))
    monkeypatch.setattr(row_kernels, "TritonRows", rows)
    monkeypatch.setattr(torch_rows, "block_rows", lambda *_: 3)
    monkeypatch.setattr(torch_block, "PIECE", 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.usefixtures("small_blocks")
def test_rows_of_many_blocks(name, temperature, teacher, backend):
    """In PyTorch they share buffers, which are wider than the vocabulary, and which the last one does not fill."""
    objective = Objective(name, ce_weight=0.5)
    options = {"student": objective, "teacher": objective if teacher else None, "temperature": temperature}
    assert_as_good_as_the_reference(Problem(v=61, n=4), backend, workspace_bytes=1 << 20, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("small_blocks")
def test_tops_rise_from_block_to_block(seed, backend):
    """Sums that have begun are brought to each new top, the student's and the teacher's at different places."""
    g = torch.Generator().manual_seed(seed)
    z, u = torch.randn(2, 4, 61, generator=g)
    z += torch.linspace(-60, 60, 61)
    u += torch.linspace(60, -60, 61)
    labels = torch.randint(0, 61, (4,), generator=g)
    objective = Objective("reverse_kl", ce_weight=0.5)
    options = {"student": objective, "teacher": objective, "temperature": 1.5}
    assert_logits_as_good_as_the_reference(*(x.to(DEVICE) for x in (z, u, labels)), backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_offset_logits(name, backend):
    """Softmax does not see a constant: rows near +20 and -20."""
    assert_as_good_as_the_reference(Problem(offset=20.0), backend, student=name, teacher=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_peaked_rows(name, backend):
    problem = Problem()
    for side in ("student_hidden", "teacher_hidden"):
        problem.operands[side] *= 12  # logits of +-60: most probabilities underflow
    assert_as_good_as_the_reference(problem, backend, student=name, teacher=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype, spread", [(torch.float32, 1.0), (torch.bfloat16, 1.0), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_a_target_between_student_and_teacher(name, dtype, spread, backend):
    """All that comes after the logits is the mixture's: temperature, statistics, gradients near convergence."""
    problem = Problem(dtype=dtype, spread=spread)
    problem.head_options = ({"softcap": 9.0}, {"logit_scale": 0.9})
    student = Objective(name, ce_weight=0.3)
    assert_as_good_as_the_reference(problem, backend, student=student, target_mix=0.4, temperature=1.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [1e-3, 1e-4])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_values_near_convergence(name, spread, backend):
    """Divergences of 5e-7 and 5e-9 in fp32, whose eps times the logits is 1e-6."""
    z = torch.randn(8, 4099, generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2 + 5
    u = z + spread * torch.randn(8, 4099, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        assert_logits_as_good_as_the_reference(z, u, None, backend, student=name, teacher=name, reduction="none")
        assert (distillation_loss(z, u, student=name, backend=backend, reduction="none").student >= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("flat", ["student", "teacher"])
def test_jsd_of_a_flat_and_a_peaked_row(flat, beta, backend):
    """Their sums of exponentials, by which the mixture is weighted, differ by the size of the vocabulary.

    No two logits are equal: 150,000 times the same rounding error would not average out, in any order.
    """
    z, u = torch.randn(2, 1, 150000, device=DEVICE)
    (z if flat == "teacher" else u)[:, 7] = 30
    objective = Objective("jsd", beta=beta)
    assert_logits_as_good_as_the_reference(z, u, None, backend, student=objective, teacher=objective)


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
    options = {"student": objective, "teacher": objective, "reduction": "none"}
    with torch.set_grad_enabled(level > -math.inf):  # where the reference, which clamps, has no gradient
        assert_logits_as_good_as_the_reference(z, u, labels, backend, **options)
    assert all(x.isfinite().all() for x in run_logits(z, u, labels, backend, **options)[1].values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_certain_rows_have_no_negative_entropy_or_nll(backend):
    z = torch.randn(64, 301, device=DEVICE) + torch.linspace(0, 90, 64, device=DEVICE).unsqueeze(1)
    labels = torch.randint(0, 301, (64,), device=DEVICE)
    z.scatter_add_(1, labels.unsqueeze(1), torch.full((64, 1), 60.0, device=DEVICE))
    metrics = distillation_loss(z, z.roll(1, 0), labels, backend=backend, reduction="none").metrics
    for name in ("student_nll", "student_entropy", "teacher_entropy"):
        assert (metrics[name] >= 0).all() and metrics[name].isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_from_logits(dtype, backend):
    """Padded differently, with ignored rows; the caller's logits are left alone."""
    z, u = ((torch.randn(7, width, device=DEVICE) * 2).to(dtype) for width in (53, 56))
    labels = torch.randint(0, 50, (7,), device=DEVICE)
    labels[2] = -100
    before = z.clone(), u.clone()
    objectives = {"student": Objective("jsd", ce_weight=0.2), "teacher": Objective("forward_kl", 0.5, 0.5)}
    options = {**objectives, "temperature": 2.0, "vocab_size": 50}
    assert_logits_as_good_as_the_reference(z, u, labels, backend, **options)
    distillation_loss(z.requires_grad_(), u, labels, backend=backend, **options).total.backward()
    assert torch.equal(z, before[0]) and torch.equal(u, before[1])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v", [50257, 32768 + 13])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_large_vocabularies_of_odd_size(name, v, backend):
    """GPT-2's 50257: rows are padded, and 25 blocks are walked. std(z - u) = 0.1."""
    z = 2 * torch.randn(3, v, device=DEVICE)
    u = z + 0.1 * torch.randn(3, v, device=DEVICE)
    assert_logits_as_good_as_the_reference(z, u, None, backend, student=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_weights_and_scales_stay_within_fp16(backend):
    """Logit gradients of 1000 * 4 / N a token, and token weights of 3000, are beyond fp16 once summed or scaled."""
    problem = Problem(dtype=torch.float16, ignored=())
    problem.head_options = ({"logit_scale": 4.0}, {"logit_scale": 4.0})
    for side in ("student", "teacher"):
        problem.operands[f"{side}_hidden"] *= 0.25
    assert_as_good_as_the_reference(problem, backend, student=Objective("forward_kl", weight=1000), teacher="jsd")
    weights = torch.full((7,), 3000.0, device=DEVICE)
    assert_as_good_as_the_reference(problem, backend, teacher="forward_kl", token_weights=weights)


@pytest.mark.slow
def test_more_rows_than_a_grid_dimension():
    """70,000 rows; a grid's other dimensions end at 65,535."""
    x, w, y, u = torch.randn(70_000, 4), torch.randn(8, 4), torch.randn(70_000, 3), torch.randn(8, 3)
    operands = [t.to(DEVICE) for t in (x, w, y, u)]
    backend = "torch" if DEVICE == "cpu" else "triton"
    ours, plain = (
        linear_distillation_loss(*operands, backend=b, reduction="none").student for b in (backend, "reference")
    )
    truth = linear_distillation_loss(*(t.double() for t in operands), backend="reference", reduction="none").student
    eps = torch.finfo(torch.float32).eps
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + eps * (8 * truth.abs().max() + 2)
