"""Sparse targets: values, metrics and gradients, against the divergence of K + 1 outcomes in fp64."""

import itertools
import math

import pytest
import torch
from sparse_problems import (
    DEVICE,
    EPS,
    MODES,
    TAILS,
    D,
    N,
    SparseProblem,
    V,
    assert_as_good_as_the_definition,
    budgets,
    relative_error,
)

from okd_kernels import DIVERGENCES, Objective, linear_distillation_loss, linear_topk

BACKENDS = ("torch", "triton")
ROWS = {"reference": N, "torch": N, "triton": 4}  # the interpreter takes 20 ms a row
FEW = [("bucket", "forward_kl"), ("bucket", "reverse_kl"), ("bucket", "jsd"), ("renormalize", "alpha_beta")]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tail, divergence", MODES)
def test_definition(tail, divergence, temperature, backend):
    problem = SparseProblem(n=ROWS[backend], temperature=temperature)
    assert_as_good_as_the_definition(problem, backend, tail=tail, student=Objective(divergence, 0.7, 0.3))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("k", [1, 60, V])
@pytest.mark.parametrize("tail, divergence", [*FEW, ("none", "forward_kl")])
def test_one_id_to_all_ids(tail, divergence, k, backend):
    assert_as_good_as_the_definition(SparseProblem(k, n=ROWS[backend]), backend, tail=tail, student=divergence)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spread", [1.0, 0.03])
@pytest.mark.parametrize("tail, divergence", [*FEW[:3], ("none", "forward_kl")])
def test_close_models_in_every_dtype(tail, divergence, spread, dtype, backend):
    """Near convergence, where bf16 logits would have lost the gradient of the bucketed losses altogether."""
    problem = SparseProblem(n=ROWS[backend], dtype=dtype, spread=spread)
    assert_as_good_as_the_definition(problem, backend, tail=tail, student=divergence)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("tail, divergence", [("bucket", "jsd"), ("renormalize", "forward_kl"), ("none", "forward_kl")])
def test_scale_softcap_bias_lora(tail, divergence, backend):
    problem = SparseProblem(n=ROWS[backend], temperature=2.0)
    problem.head_options = {"logit_scale": 1.7, "softcap": 4.0}
    options = {"tail": tail, "student": Objective(divergence, ce_weight=0.5)}
    assert_as_good_as_the_definition(problem, backend, **options)
    problem.lora = True
    assert_as_good_as_the_definition(problem, backend, **options)
    problem.bias, problem.head_options = False, {}
    assert_as_good_as_the_definition(problem, backend, **options)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
@pytest.mark.parametrize("target_mix", [0.0, 0.4])
@pytest.mark.parametrize("tail, divergence", [*FEW[:3], ("renormalize", "skew_kl")])
def test_target_mix(tail, divergence, target_mix, backend):
    """q^(1 - t) p^t over the K + 1 outcomes, normalised, q held still: the tail goes there as one, as its tokens do."""
    problem = SparseProblem(n=ROWS[backend], temperature=1.5)
    options = {"tail": tail, "student": Objective(divergence, ce_weight=0.2), "target_mix": target_mix}
    assert_as_good_as_the_definition(problem, backend, **options)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_whole_vocabulary_equals_the_dense_loss(divergence, temperature):
    """K = V, ids in any order, in fp64: values and gradients of the teacher's own logits."""
    problem = SparseProblem(dtype=torch.float64)
    t, teacher = problem.leaves(), torch.randn(N, D, device=DEVICE).double()
    targets = linear_topk(teacher, t["weight"].detach().flip(0), V, temperature=temperature)
    order, tail = torch.randperm(V, device=DEVICE), "renormalize" if divergence == "alpha_beta" else "bucket"
    problem.bias, problem.ids, problem.log_p = False, targets.ids[:, order], targets.log_probs[:, order]
    options = {"student": Objective(divergence, ce_weight=0.5), "temperature": temperature}
    values, gradients = problem.run(tail=tail, **options)
    head = t["weight"].detach().flip(0)
    dense = linear_distillation_loss(t["hidden"], t["weight"], teacher, head, problem.labels, **options)
    dense.student.backward()
    torch.testing.assert_close(values["student"], dense.student.detach(), rtol=1e-12, atol=0)
    for name, x in dense.metrics.items():
        if name != "teacher_nll" or temperature == 1:  # log-probabilities at T are no logits at 1 but for a constant
            torch.testing.assert_close(values[name], x, rtol=1e-12, atol=1e-14)
    for name in ("hidden", "weight"):
        assert relative_error(gradients[name], t[name].grad) < 1e-12


def test_bucket_is_a_lower_bound_that_rises_to_the_whole_divergence():
    """The data-processing inequality: merging outcomes never adds divergence."""
    values = [SparseProblem(k, ignored=()).run(reduction="none")[0]["student"] for k in (1, 2, 5, 20, 60, V)]
    for less, more in itertools.pairwise(values):
        assert (less >= 0).all() and (less <= more + 8 * EPS).all()
    assert (values[0] < 0.9 * values[-1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
def test_repeated_ids_add_up(tail, backend):
    """16 draws with replacement, against the definition, and against their distinct ids with the counted masses."""
    problem = SparseProblem(16, sampled=True)
    assert max(len(row) - len(row.unique()) for row in problem.ids) > 2, "the problem must repeat ids"
    assert_as_good_as_the_definition(problem, backend, tail=tail, student=Objective(ce_weight=0.2))
    merged = SparseProblem(16, sampled=True)
    for row in range(N):
        ids, counts = problem.ids[row].unique(return_counts=True)
        merged.ids[row], merged.log_p[row] = 0, -math.inf
        merged.ids[row, : len(ids)], merged.log_p[row, : len(ids)] = ids, (counts / 16).log()
    truth = merged.truth(tail=tail)
    of_values, of_gradients = budgets(merged, backend, truth, tail=tail)
    values, gradients = problem.run(backend, tail=tail)
    assert abs(values["student"].item() - truth[0]["student"].item()) <= of_values["student"] + 8 * EPS
    for name, x in truth[1].items():
        assert relative_error(gradients[name], x.double()) <= of_gradients[name] + 8 * EPS


def test_sampled_targets_estimate_the_full_gradient_without_bias():
    """Random sampling KD: 4000 draws of 5 ids average to the dense gradient; top-5 renormalised stays away from it."""
    problem = SparseProblem(V, n=1, ignored=())
    dense = problem.truth(tail="none")[1]["hidden"]
    biased = SparseProblem(5, n=1, ignored=()).truth(tail="renormalize")[1]["hidden"]
    probabilities = torch.zeros(1, V, device=DEVICE).scatter(1, problem.ids, problem.log_p.exp())
    draws = 4000
    problem.operands["hidden"] = problem.operands["hidden"].expand(draws, D).contiguous()
    problem.ids = torch.multinomial(probabilities.expand(draws, V), 5, replacement=True)
    problem.log_p = torch.full((draws, 5), -math.log(5), device=DEVICE)
    problem.labels = None
    options = {"tail": "none", "reduction": "sum", "workspace_bytes": 1 << 22}
    estimates = problem.run(requires=("hidden",), **options)[1]["hidden"].double()
    standard_error = (estimates.var(0).sum() / draws).sqrt()
    assert (estimates.mean(0) - dense[0]).norm() < 3 * standard_error
    assert (biased - dense).norm() > 8 * standard_error


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p_tail", [1e-3, 1e-6, 1e-9])
def test_small_tails_keep_their_digits(p_tail, backend):
    """Teacher sure of one token: 1 - sum p in fp32 would have a step of 6e-8 and lose the tail.

    Tokens of no row's ids move by p_tail - q_tail alone. Both are exponentials, as wrong as their arguments x, by
    eps |x|; and p_tail is 3 p_tail - 2 p_tail.
    """
    problem = SparseProblem(2, ignored=())
    problem.log_p[:, 0], problem.log_p[:, 1] = math.log1p(-3 * p_tail), math.log(2 * p_tail)
    logits = torch.zeros(N, V, device=DEVICE).scatter_(1, problem.ids[:, :1], -math.log(p_tail / 100))
    problem.operands |= {"hidden": torch.eye(N, D, device=DEVICE), "bias": torch.zeros(V, device=DEVICE)}
    problem.operands["weight"] = torch.nn.functional.pad(logits.T, (0, D - N))
    (_, gradients), (_, truth) = problem.run(backend, reduction="none"), problem.truth(reduction="none")
    others = torch.ones(V, dtype=torch.bool, device=DEVICE)
    others[problem.ids.flatten()] = False
    budget = EPS * (3 + 2 * abs(math.log(2 * p_tail)) + 2 * abs(math.log(p_tail / 100)))
    for name in ("weight", "bias"):
        assert relative_error(gradients[name][others], truth[name][others]) <= budget


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail, divergence", [*FEW[:3], ("renormalize", "forward_kl"), ("none", "forward_kl")])
def test_peaked_rows(tail, divergence, backend):
    """Logits of +-60: most probabilities underflow, q_tail among them, and its logarithm does not."""
    problem = SparseProblem(n=ROWS[backend])
    problem.operands["hidden"] *= 12
    assert_as_good_as_the_definition(problem, backend, tail=tail, student=Objective(divergence, ce_weight=0.1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tail_that_the_student_gives_up_is_finite(backend):
    """q_tail = exp(-200) is 0 in fp32; KL is p_tail * 200 all the same, and its gradient p_tail."""
    problem = SparseProblem(1, n=1, ignored=())
    problem.operands["weight"] *= 0
    problem.operands["bias"] *= 0
    problem.operands["bias"][problem.ids[0, 0]] = 200.0
    p_tail, problem.log_p = 0.25, torch.full_like(problem.log_p, math.log(0.75))
    values, gradients = problem.run(backend)
    expected = p_tail * (math.log(p_tail) + 200 - math.log(V - 1)) + 0.75 * math.log(0.75)
    assert values["student"].item() == pytest.approx(expected, rel=8 * EPS)
    slope = torch.full((V,), -p_tail / (V - 1))
    slope[problem.ids[0, 0]] = p_tail
    # The target's logits are fp32 numbers near 200, half an ulp of which moves their probabilities by 8e-6.
    torch.testing.assert_close(gradients["bias"].cpu(), slope, rtol=200 * EPS / 2, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", TAILS)
def test_a_certain_target_is_cross_entropy(tail, backend):
    """p = 1 on the label: the value and gradient of CE, p_tail being exactly 0."""
    problem = SparseProblem(1)
    problem.ids, problem.log_p = problem.labels.clamp_min(0).unsqueeze(1), torch.zeros(N, 1, device=DEVICE)
    assert_as_good_as_the_definition(problem, backend, tail=tail)
    values, gradients = problem.run(backend, tail=tail)
    truth = problem.truth(tail=tail, student=Objective(weight=0.0, ce_weight=1.0))
    assert values["student"].item() == pytest.approx(truth[0]["student"].item(), rel=8 * EPS)
    torch.testing.assert_close(values["forward_kl"], values["student_nll"], rtol=8 * EPS, atol=8 * EPS)
    for name, x in truth[1].items():
        assert relative_error(gradients[name], x.double()) < 8 * EPS
