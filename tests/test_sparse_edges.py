"""Edge cases of sparse targets: no mass, too much, infinities, empty calls, dtypes; and errors."""

import math

import pytest
import torch
from sparse_problems import (
    DEVICE,
    EPS,
    TAILS,
    N,
    SparseProblem,
    V,
    assert_as_good_as_the_definition,
    assert_same,
    relative_error,
)

from okd_kernels import Objective, linear_sparse_distillation_loss

BACKENDS = ("torch", "triton")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("tail", TAILS)
def test_a_row_without_any_target_is_one_that_the_student_has_reached(tail, backend):
    problem = SparseProblem()
    problem.log_p[:] = -math.inf
    values, gradients = problem.run(backend, tail=tail)
    for name in ("student", "target_mass", "student_mass", "forward_kl", "reverse_kl"):
        assert values[name].abs().max() <= 8 * EPS, name
    torch.testing.assert_close(values["teacher_entropy"], values["student_entropy"], rtol=8 * EPS, atol=0)
    one = problem.truth(student=Objective(weight=0.0, ce_weight=1.0))[1]
    for name, x in gradients.items():  # of the size of rounding beside a gradient that is none
        assert x.norm() <= 8 * EPS * one[name].norm(), name


def test_minus_infinity_logits_equal_a_smaller_vocabulary():
    """A padded vocabulary, and K = all that is left: rounding of sum p must not become an infinite tail."""
    for k in (5, 100):
        problem = SparseProblem(k, v=100)
        expected = problem.run(temperature=0.5)
        for name in ("weight", "bias", "up"):
            x = problem.operands[name]
            problem.operands[name] = torch.cat([x, torch.zeros_like(x[:31])])
        problem.operands["bias"][100:] = -math.inf
        values, gradients = problem.run(temperature=0.5)
        cut = {name: x if name == "hidden" else x[:100] for name, x in gradients.items()}
        assert_same((values, cut), expected, rtol=32 * EPS)
        assert all((gradients[name][100:] == 0).all() for name in ("weight", "bias"))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("tail", TAILS)
def test_infinite_where_it_is_infinite(tail, backend):
    """One id of row 0 that the student excludes, with a mass of e^-40."""
    problem = SparseProblem(ignored=())
    problem.operands["bias"][problem.ids[0, 1]] = -math.inf
    problem.log_p[0, 1] = -40.0
    others = [row for row in range(N) if problem.ids[0, 1] not in problem.ids[row]]
    values, _ = problem.run(backend, requires=(), tail=tail, reduction="none")
    assert values["student"][0] == values["forward_kl"][0] == math.inf
    assert values["student"][others].isfinite().all() and others


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("k", [5, V])
def test_targets_stored_in_bf16(k, divergence, backend):
    """Rounded to 8 bits, K = V probabilities do not sum to 1: they are divided by their sum, above 1 and below."""
    problem = SparseProblem(k, n=4, ignored=())
    problem.log_p = problem.log_p.bfloat16()
    mass = problem.log_p.double().exp().sum(-1)
    assert k < V or (mass.max() > 1.0004 and mass.min() < 0.9996)
    assert_as_good_as_the_definition(problem, backend, student=divergence)


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_mass_than_1_is_renormalised(backend):
    """Two ids of 0.5025 each, as 16-bit storage may leave them, and others that have no tail then."""
    problem = SparseProblem(2, n=4)
    problem.log_p[:] = math.log(0.5025)
    assert_as_good_as_the_definition(problem, backend)
    values, _ = problem.run(backend)
    problem.log_p[:] = math.log(0.5)
    assert values["student"].item() == pytest.approx(problem.truth()[0]["student"].item(), rel=8 * EPS)


def test_reverse_kl_of_a_certain_target_is_finite():
    """A tail of 0 would cost the student infinitely much; it counts as eps, in fp32's resolution."""
    problem = SparseProblem(1)
    problem.log_p[:] = 0
    assert 1 < problem.run(student="reverse_kl")[0]["student"] < -math.log(EPS)
    assert_as_good_as_the_definition(problem, "auto", student="reverse_kl")


def test_all_ignored_and_no_token():
    for problem in (SparseProblem(ignored=range(N)), SparseProblem(n=0)):
        values, gradients = problem.run(student=Objective(ce_weight=0.5))
        assert values["student"] == 0 and all((g == 0).all() for g in gradients.values())


def test_lora_of_one_token():
    """One row of gradients to split between hidden states and LoRA: outputs of an operator must not share memory."""
    problem = SparseProblem(n=1, ignored=())
    problem.lora = True
    assert_as_good_as_the_definition(problem, "torch", student=Objective("jsd", ce_weight=0.5))


def test_fp64_operands_stay_fp64():
    problem = SparseProblem(dtype=torch.float64)
    values, gradients = problem.run(student="jsd")
    truth = problem.truth(student="jsd")
    for name, x in truth[0].items():
        torch.testing.assert_close(values[name], x, rtol=1e-13, atol=1e-13)
    assert all(relative_error(gradients[name], x) < 1e-13 for name, x in truth[1].items())


def test_autocast_keeps_fp32_logits():
    """The truth of bf16 operands, and one rounding of logit gradients; the heads' gradients are not rounded again."""
    problem = SparseProblem(spread=0.1)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        values, gradients = problem.run()
    assert all(x.dtype == torch.float32 for x in gradients.values())
    rounded = SparseProblem(spread=0.1)
    rounded.operands = {k: x if k == "bias" else x.bfloat16() for k, x in problem.operands.items()}
    gradients = {name: x.to(rounded.operands[name].dtype) for name, x in gradients.items()}
    assert_as_good_as_the_definition(rounded, "auto", found=(values, gradients))


X, W, IDS, P = torch.zeros(4, 8), torch.zeros(32, 8), torch.zeros(4, 3).long(), torch.full((4, 3), -2.0)
FIRST = torch.tensor([1, -100, -100, -100])


@pytest.mark.parametrize(
    "args, options, error, message",
    [
        ((X, W, IDS, P), {"tail": "drop"}, ValueError, "tail to be one of bucket, renormalize, none; got 'drop'"),
        ((X, W, IDS, P), {"student": "kl"}, ValueError, "expected a divergence out of"),
        ((X, W, IDS, P), {"student": None}, TypeError, "a divergence's name or an Objective; got None"),
        (
            (X, W, IDS, P),
            {"student": "reverse_kl", "tail": "none"},
            ValueError,
            "tail='bucket' for reverse_kl; got 'no",
        ),
        ((X, W, IDS, P), {"student": "reverse_kl", "tail": "renormalize"}, ValueError, "for reverse_kl; got 'renorm"),
        ((X, W, IDS, P), {"student": "alpha_beta"}, ValueError, "tail='renormalize' for alpha_beta; got 'bucket'"),
        ((X, W, IDS, P), {"student": "jsd", "tail": "none"}, ValueError, "forward_kl for tail='none'; got 'jsd'"),
        ((X, W, IDS.int(), P), {}, TypeError, r"target_ids of dtype torch.int64; got torch.int32.*long\(\)"),
        ((X, W, IDS, P.long()), {}, TypeError, "floating-point target_log_probs; got torch.int64"),
        ((X, W, IDS[:3], P), {}, ValueError, r"target_ids of shape \(4, K\).*got \(3, 3\)"),
        ((X, W, IDS[:, :0], P[:, :0]), {}, ValueError, r"K >= 1.*got \(4, 0\)"),
        ((X, W, IDS[:, 0], P[:, 0]), {}, ValueError, r"target_ids of shape \(4, K\).*got \(4,\)"),
        ((X, W, IDS, P[:, :2]), {}, ValueError, r"target_log_probs of shape \(4, 3\).*got \(4, 2\)"),
        ((X, W, IDS.to("meta"), P), {}, ValueError, "target_ids on cpu.*got meta"),
        ((X, W, IDS + 32, P), {}, ValueError, r"target_ids in \[0, 32\).*got 32"),
        ((X, W, IDS - 1, P, FIRST), {}, ValueError, r"target_ids in \[0, 32\).*got -1"),
        ((X, W, IDS, P.exp()), {}, ValueError, "target_log_probs <= 0; got 0.1353: pass log_softmax"),
        ((X, W, IDS, P), {"vocab_size": 33}, ValueError, r"vocab_size in \[1, 32\].*got 33"),
        (
            (X, W, IDS, P),
            {"student": Objective(ce_weight=0.5)},
            ValueError,
            "labels, since the student's ce_weight is 0",
        ),
        ((X, W, IDS, P, FIRST + 31), {}, ValueError, r"labels in \[0, 32\) or ignore_index=-100; got 32"),
        ((X, W, IDS, P), {"temperature": 0}, ValueError, "temperature > 0; got 0"),
        ((X, W, IDS, P), {"target_mix": 1.5}, ValueError, "target_mix between 0 and 1; got 1.5"),
        ((X, W, IDS, P), {"reduction": "avg"}, ValueError, "mean, sum or none; got 'avg'"),
        ((X, W, IDS, P), {"backend": "cuda"}, ValueError, "one of auto, triton, torch, reference; got 'cuda'"),
        ((X, W, IDS, P), {"workspace_bytes": 0}, ValueError, "workspace_bytes > 0; got 0"),
        ((X[:, :6], W, IDS, P), {}, ValueError, r"student_hidden of shape \(\.\.\., 8\).*got \(4, 6\)"),
    ],
)
def test_errors(args, options, error, message):
    with pytest.raises(error, match=message):
        linear_sparse_distillation_loss(*args, **options)
