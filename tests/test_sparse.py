"""Sparse targets and top-k against fp64 oracles: whole logits and plain autograd, written here from the definitions."""

import math
import os
from contextlib import nullcontext

import pytest
import torch

from okd_kernels import DistillationLoss, LinearHead, Objective, linear_distillation_loss, sparse_ops
from okd_kernels.sparse import TAILS, linear_sparse_distillation_loss, linear_topk

DEVICE = os.environ.get("OKD_TEST_DEVICE", "cpu")
N, V, D, R = 7, 131, 16, 3
EPS = 1.2e-7
BF16 = 0.006  # two roundings to bf16 on the way to a gradient
MODES = [*((tail, "forward_kl") for tail in TAILS), ("bucket", "reverse_kl")]
GRADIENTS = ("hidden", "weight", "bias", "down", "up")


def definition(z, ids, log_p, labels, *, tail, divergence="forward_kl", temperature=1.0, weight=1.0, ce_weight=0.0):
    """Per-token losses and metrics of whole logits (N, V), from the docstring's formulas."""
    p = torch.zeros_like(z).scatter_add(1, ids, log_p.to(z.dtype).exp())
    on = p > 0
    q = (z / temperature).softmax(-1)
    log_ratio = torch.where(on, torch.where(on, p, 1).log() - (z / temperature).log_softmax(-1), 0)
    mass = p.sum(-1)
    value = (p * log_ratio).sum(-1)
    if tail == "renormalize":
        value = value / mass - mass.log()
    forward = value
    if tail == "bucket":
        has_tail = ~on.all(-1)
        p_tail = torch.where(has_tail, (1 - mass).clamp_min(0), 0)
        q_tail = torch.where(has_tail, (q * ~on).sum(-1), 1)
        at_tail = p_tail * (torch.where(p_tail > 0, p_tail, 1) / q_tail).log()
        value = forward = value + torch.where(p_tail > 0, at_tail, 0)
        if divergence == "reverse_kl":
            ratio = torch.where(has_tail, (q_tail / p_tail.clamp_min(torch.finfo(torch.float32).eps)).log(), 0)
            value = -(torch.where(on, q, 0) * log_ratio).sum(-1) + torch.where(has_tail, q_tail, 0) * ratio
    counted = torch.ones(len(z), dtype=torch.bool, device=z.device) if labels is None else labels != -100
    nll = torch.zeros_like(value)
    if labels is not None:
        nll = -z.log_softmax(-1).gather(1, labels.clamp_min(0).unsqueeze(1)).squeeze(1)
    metrics = {"forward_kl": forward, "student_nll": nll, "target_mass": mass, "student_mass": (q * on).sum(-1)}
    losses = weight * temperature**2 * value + ce_weight * nll
    return torch.where(counted, losses, 0), {k: torch.where(counted, x, 0).detach() for k, x in metrics.items()}


class Problem:
    """Student operands with logits of std 2; K of a teacher's log-probabilities, the teacher `spread` away."""

    def __init__(self, k=5, n=N, v=V, dtype=torch.float32, spread=1.0, ignored=(2,), temperature=1.0, sampled=False):
        g = torch.Generator().manual_seed(0)

        def normal(*shape, scale=1.0):
            return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

        operands = {
            "hidden": normal(n, D),
            "weight": normal(v, D, scale=2 / D**0.5),
            "bias": normal(v, scale=0.1),
            "down": normal(R, D, scale=0.3),
            "up": normal(v, R, scale=0.3),
        }
        self.operands = {name: x.to(DEVICE, dtype) for name, x in operands.items()}
        self.head_options = {}
        self.has_bias, self.has_lora = True, False
        teacher = self.logits({name: x.double() for name, x in self.operands.items()}).cpu() + normal(
            n, v, scale=spread
        )
        log_p = (teacher / temperature).log_softmax(-1)
        if sampled:  # ids drawn with replacement: they repeat, with equal weights 1 / k
            self.ids = torch.multinomial(log_p.exp(), k, replacement=True, generator=g)
            self.log_p = torch.full((n, k), -math.log(k))
        else:
            self.log_p, self.ids = log_p.topk(k)
        self.ids, self.log_p = self.ids.to(DEVICE), self.log_p.to(DEVICE, torch.float32)
        self.labels = torch.randint(0, v, (n,), generator=g).to(DEVICE)
        self.labels[[i for i in ignored if i < n]] = -100
        self.options = {"temperature": temperature}

    def head(self, t):
        lora = (t["down"], t["up"], 0.7) if self.has_lora else None
        return LinearHead(t["weight"], t["bias"] if self.has_bias else None, lora=lora, **self.head_options)

    def logits(self, t, vocab_size=None):
        return self.head(t).logits(t["hidden"], vocab_size)

    def leaves(self, dtype=None, requires=GRADIENTS):
        return {k: x.to(dtype or x.dtype).clone().requires_grad_(k in requires) for k, x in self.operands.items()}

    def run(
        self, requires=GRADIENTS, watch=None, upstream=None, loss_function=linear_sparse_distillation_loss, **options
    ):
        """(loss, metrics, gradients) of the library."""
        t = self.leaves(requires=requires)
        with watch or nullcontext():
            loss = loss_function(
                t["hidden"],
                self.head(t),
                self.ids,
                self.log_p,
                self.labels,
                **{"workspace_bytes": 4096, **self.options, **options},
            )
            assert loss.teacher is None
            if loss.student.requires_grad:
                (loss.student.sum() if upstream is None else (loss.student * upstream).sum()).backward()
        return loss.student.detach(), loss.metrics, {k: x.grad for k, x in t.items() if x.grad is not None}

    def truth(self, dtype=torch.float64, weights=None, reduction="mean", upstream=None, **options):
        """The same by the definition, on the same operands in `dtype`."""
        t = self.leaves(dtype)
        losses, metrics = definition(self.logits(t), self.ids, self.log_p, self.labels, **{**self.options, **options})
        weights = torch.ones_like(losses) if weights is None else weights.to(dtype)
        counted = torch.ones_like(losses) if self.labels is None else (self.labels != -100).to(dtype)
        loss = losses * weights
        if reduction != "none":
            loss = loss.sum() / (1 if reduction == "sum" else (weights * counted).sum())
        (loss.sum() if upstream is None else (loss * upstream).sum()).backward()
        return loss.detach(), metrics, {k: x.grad for k, x in t.items() if x.grad is not None}


def relative_error(x, truth):
    return ((x.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def assert_as_good_as_plain(problem, slack=8.0, **options):
    """No worse than twice the definition in fp32 on the same operands, plus `slack` eps; 16-bit: plus its roundings."""
    loss, metrics, gradients = problem.run(**options)
    options.pop("workspace_bytes", None)
    if "token_weights" in options:
        options["weights"] = options.pop("token_weights")
    expected, expected_metrics, expected_gradients = problem.truth(**options)
    plain, plain_metrics, plain_gradients = problem.truth(torch.float32, **options)
    assert metrics.keys() == expected_metrics.keys()
    for name, x, y, z in (
        ("loss", loss, expected, plain),
        *((k, metrics[k], expected_metrics[k], plain_metrics[k]) for k in metrics),
    ):
        budget = 2 * (z.double() - y).abs().max() + slack * EPS * (1 + y.abs().max())
        error = (x.double() - y).abs().max()
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
        assert x.dtype == torch.float32
    assert gradients.keys() == expected_gradients.keys()
    dtype = problem.operands["hidden"].dtype
    for k, y in expected_gradients.items():
        budget = 2 * relative_error(plain_gradients[k], y) + (slack * EPS if dtype == torch.float32 else BF16)
        error = relative_error(gradients[k], y)
        assert error <= budget, f"d{k}: error {error:.2e}, budget {budget:.2e}"
        assert gradients[k].dtype == dtype


# --- values and gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5, V])
@pytest.mark.parametrize("tail, divergence", MODES)
def test_definition(tail, divergence, k, temperature):
    problem = Problem(k, temperature=temperature)
    assert_as_good_as_plain(problem, tail=tail, divergence=divergence, weight=0.7, ce_weight=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("spread", [1.0, 0.1, 0.03])
@pytest.mark.parametrize("tail, divergence", MODES)
def test_close_models_in_every_dtype(tail, divergence, spread, dtype):
    """Near convergence, where bf16 logits would have lost the gradient of the bucketed losses altogether."""
    assert_as_good_as_plain(Problem(dtype=dtype, spread=spread), tail=tail, divergence=divergence)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("tail, divergence", MODES)
def test_scale_softcap_bias_lora(tail, divergence, temperature):
    problem = Problem(temperature=temperature)
    problem.head_options = {"logit_scale": 1.7, "softcap": 4.0}
    options = {"tail": tail, "divergence": divergence, "ce_weight": 0.5}
    assert_as_good_as_plain(problem, **options)
    problem.has_lora = True
    assert_as_good_as_plain(problem, **options)
    problem.has_bias, problem.head_options = False, {}
    assert_as_good_as_plain(problem, **options)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_whole_vocabulary_equals_the_dense_loss(divergence, temperature):
    """K = V, ids in any order: the tail is exactly nothing."""
    problem = Problem()
    t, teacher = problem.leaves(), torch.randn(N, D, device=DEVICE)
    head = problem.operands["weight"].flip(0).contiguous()
    targets = linear_topk(teacher, head, V, temperature=temperature)
    order = torch.randperm(V, device=DEVICE)
    ours = linear_sparse_distillation_loss(
        t["hidden"],
        t["weight"],
        targets.ids[:, order],
        targets.log_probs[:, order],
        problem.labels,
        divergence=divergence,
        ce_weight=0.5,
        temperature=temperature,
    )
    ours.student.backward()
    gradients = t["hidden"].grad.clone(), t["weight"].grad.clone()
    t["hidden"].grad = t["weight"].grad = None
    objective = Objective(divergence, ce_weight=0.5)
    dense = linear_distillation_loss(
        t["hidden"], t["weight"], teacher, head, problem.labels, student=objective, temperature=temperature
    )
    dense.student.backward()
    assert ours.student.item() == pytest.approx(dense.student.item(), rel=1e-6)
    for name in ("forward_kl", "student_nll"):
        torch.testing.assert_close(ours.metrics[name], dense.metrics[name], rtol=1e-5, atol=1e-6)
    for x, y in zip(gradients, (t["hidden"].grad, t["weight"].grad), strict=True):
        assert relative_error(x, y.double()) < 2e-6


def test_bucket_is_a_lower_bound_that_rises_to_the_whole_divergence():
    """The data-processing inequality: merging outcomes never adds divergence. Renormalising does: it invents some."""
    values = {k: Problem(k, ignored=()).run(reduction="none")[0] for k in (1, 2, 5, 20, 60, V)}
    for (_, less), (_, more) in zip(list(values.items())[:-1], list(values.items())[1:], strict=True):
        assert (less >= 0).all() and (less <= more + 1e-6).all()
    assert (values[1] < 0.9 * values[V]).all()


@pytest.mark.parametrize("tail", TAILS)
def test_repeated_ids_add_up(tail):
    """16 draws with replacement, against their distinct ids with the counted masses."""
    problem = Problem(16, sampled=True)
    assert max(len(row) - len(row.unique()) for row in problem.ids) > 2, "the problem must repeat ids"
    assert_as_good_as_plain(problem, tail=tail, ce_weight=0.2)
    merged = Problem(16, sampled=True)
    for row in range(N):
        ids, counts = problem.ids[row].unique(return_counts=True)
        merged.ids[row] = 0
        merged.log_p[row] = -math.inf
        merged.ids[row, : len(ids)] = ids
        merged.log_p[row, : len(ids)] = (counts / 16).log()
    (loss, metrics, gradients), (expected, expected_metrics, truth) = (x.run(tail=tail) for x in (problem, merged))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    for name in metrics:
        torch.testing.assert_close(metrics[name], expected_metrics[name], rtol=1e-5, atol=1e-6)
    for k in gradients:
        assert relative_error(gradients[k], truth[k].double()) < 1e-6


def test_sampled_targets_estimate_the_full_gradient_without_bias():
    """Random sampling KD: 4000 draws of 5 ids average to the dense gradient; top-5 renormalised stays away from it."""
    problem = Problem(V, n=1, ignored=())
    dense = problem.truth(tail="none")[2]["hidden"]
    biased = Problem(5, n=1, ignored=()).truth(tail="renormalize")[2]["hidden"]
    probabilities = torch.zeros(1, V, device=DEVICE).scatter(1, problem.ids, problem.log_p.exp())
    draws = 4000
    problem.operands["hidden"] = problem.operands["hidden"].expand(draws, D).contiguous()
    problem.ids = torch.multinomial(probabilities.expand(draws, V), 5, replacement=True)
    problem.log_p = torch.full((draws, 5), -math.log(5), device=DEVICE)
    problem.labels = None
    estimates = problem.run(tail="none", reduction="sum", requires=("hidden",), workspace_bytes=1 << 22)[2]["hidden"]
    standard_error = (estimates.double().var(0).sum() / draws).sqrt()
    assert (estimates.double().mean(0) - dense[0]).norm() < 3 * standard_error
    assert (biased - dense).norm() > 8 * standard_error


@pytest.mark.parametrize("tail, divergence", MODES)
def test_ragged_padding(tail, divergence):
    """-inf is no target, whatever its id: out of range, repeated, or that of a real target."""
    problem = Problem(9, ignored=())
    lengths = [9, 1, 4, 5, 2, 8, 3]
    expected = []
    for row, length in enumerate(lengths):
        single = Problem(9, ignored=())
        single.operands["hidden"] = single.operands["hidden"][row : row + 1]
        single.ids, single.log_p = single.ids[row : row + 1, :length], single.log_p[row : row + 1, :length]
        single.labels = single.labels[row : row + 1]
        expected.append(single.run(tail=tail, divergence=divergence, reduction="none"))
        problem.log_p[row, length:] = -math.inf
        problem.ids[row, length:] = torch.tensor(
            [-100, int(problem.ids[row, 0]), 10**9, 0, 0, -1, 7, 8], device=DEVICE
        )[: 9 - length]
    loss, metrics, gradients = problem.run(tail=tail, divergence=divergence, reduction="none")
    torch.testing.assert_close(loss, torch.cat([x[0] for x in expected]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["student_mass"], torch.cat([x[1]["student_mass"] for x in expected]))
    torch.testing.assert_close(gradients["hidden"], torch.cat([x[2]["hidden"] for x in expected]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_a_row_without_any_target_is_zero(tail):
    problem = Problem()
    problem.log_p[:] = -math.inf
    loss, metrics, gradients = problem.run(tail=tail)
    assert loss.abs() < 1e-6 and (metrics["target_mass"] == 0).all() and (metrics["student_mass"] == 0).all()
    assert all(g.abs().max() < 1e-6 for g in gradients.values())


# --- numerics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p_tail", [1e-3, 1e-6, 1e-9])
def test_small_tails_keep_their_digits(p_tail):
    """Teacher sure of one token: 1 - sum p in fp32 would have a step of 6e-8 and lose the tail."""
    problem = Problem(2, ignored=())
    problem.log_p[:, 0], problem.log_p[:, 1] = math.log1p(-3 * p_tail), math.log(2 * p_tail)
    shift = torch.zeros(N, V, device=DEVICE)  # the student's tail: small as well
    problem.operands["hidden"] = torch.eye(N, D, device=DEVICE)
    problem.operands["weight"] = torch.zeros(V, D, device=DEVICE)
    shift.scatter_(1, problem.ids[:, :1], -math.log(p_tail / 100))
    problem.operands["weight"][:, :N] = shift.T
    problem.operands["bias"] *= 0
    loss, _, gradients = problem.run(reduction="none")
    expected, _, truth = problem.truth(reduction="none", tail="bucket")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    # what moves the tail's tokens alone: those of no row's ids
    others = torch.ones(V, dtype=torch.bool, device=DEVICE)
    others[problem.ids.flatten()] = False
    assert relative_error(gradients["weight"][others], truth["weight"][others]) < 1e-4
    assert relative_error(gradients["bias"][others], truth["bias"][others]) < 1e-4


@pytest.mark.parametrize("tail, divergence", MODES)
def test_peaked_rows(tail, divergence):
    """Logits of +-60: most probabilities underflow, q_tail among them, and its logarithm does not."""
    problem = Problem()
    problem.operands["hidden"] *= 12
    assert_as_good_as_plain(problem, slack=400.0, tail=tail, divergence=divergence, ce_weight=0.1)


def test_a_tail_that_the_student_gives_up_is_finite():
    """q_tail = exp(-200) is 0 in fp32; KL is p_tail * 200 all the same, and its gradient p_tail."""
    problem = Problem(1, n=1, ignored=())
    problem.operands["weight"] *= 0
    problem.operands["bias"] *= 0
    problem.operands["bias"][problem.ids[0, 0]] = 200.0
    problem.log_p[:] = math.log(0.75)
    loss, _, gradients = problem.run()
    p_tail = 0.25
    expected = p_tail * (math.log(p_tail) + 200 - math.log(V - 1)) + 0.75 * math.log(0.75)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    slope = torch.full((V,), -p_tail / (V - 1))
    slope[problem.ids[0, 0]] = p_tail
    torch.testing.assert_close(gradients["bias"].cpu(), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_values_near_zero_are_positive_and_accurate(divergence):
    """The student equal to the teacher up to 1e-3: a divergence of 1e-7 in the textbook form would be rounding."""
    problem = Problem(5, spread=1e-3, ignored=())
    loss, _, _ = problem.run(divergence=divergence, reduction="none", requires=())
    expected, _, _ = problem.truth(divergence=divergence, tail="bucket", reduction="none")
    assert (expected < 5e-7).all()
    torch.testing.assert_close(loss.double(), expected, rtol=0.02, atol=1e-9)


def test_minus_infinity_logits_equal_a_smaller_vocabulary():
    """A padded vocabulary, and K = all that is left: rounding of sum p must not become an infinite tail."""
    for k in (5, 100):
        problem = Problem(k, v=100)
        expected, _, truth = problem.run(temperature=0.5)
        for name in ("weight", "bias", "up"):
            x = problem.operands[name]
            problem.operands[name] = torch.cat([x, torch.zeros_like(x[:31])])
        problem.operands["bias"][100:] = -math.inf
        loss, _, gradients = problem.run(temperature=0.5)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        for name in gradients:
            ours = gradients[name] if name == "hidden" else gradients[name][:100]
            torch.testing.assert_close(ours, truth[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tail", TAILS)
def test_infinite_where_it_is_infinite(tail):
    problem = Problem()
    problem.operands["bias"][problem.ids[0, 1]] = -math.inf
    assert problem.run(requires=(), tail=tail, reduction="none")[0][0] == math.inf


@pytest.mark.parametrize("tail", TAILS)
def test_certain_target_is_cross_entropy(tail):
    """p = 1 on the label: the value and gradient of CE, p_tail being exactly 0."""
    problem = Problem(1)
    problem.ids = problem.labels.clamp_min(0).unsqueeze(1)
    problem.log_p = torch.zeros(N, 1, device=DEVICE)
    loss, metrics, gradients = problem.run(tail=tail)
    ce, _, expected = problem.run(tail=tail, weight=0.0, ce_weight=1.0)
    assert loss.item() == pytest.approx(ce.item(), rel=1e-6)
    torch.testing.assert_close(metrics["forward_kl"], metrics["student_nll"], rtol=1e-5, atol=1e-6)
    for k in gradients:
        assert relative_error(gradients[k], expected[k].double()) < 1e-6


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("k", [5, V])
def test_targets_stored_in_bf16(k, divergence):
    """Rounded to 8 bits, K = V probabilities do not sum to 1: the gradient stays that of the definition."""
    problem = Problem(k, ignored=())
    problem.log_p = problem.log_p.bfloat16()
    mass = problem.log_p.double().exp().sum(-1)
    assert k < V or (mass - 1).abs().max() > 1e-3
    loss, metrics, gradients = problem.run(divergence=divergence, reduction="none")
    expected, _, truth = problem.truth(tail="bucket", divergence=divergence, reduction="none")
    excess = 0 if k < V else (1 - mass) * (1 if divergence == "forward_kl" else -1)  # the generalised KL's
    torch.testing.assert_close(loss.double(), expected + excess, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["target_mass"].double(), mass, rtol=1e-6, atol=0)
    for name in truth:
        assert relative_error(gradients[name], truth[name]) < 5e-6, name


def test_reverse_kl_of_a_certain_target_is_finite():
    """A tail of 0 would cost the student infinitely much; it counts as eps."""
    problem = Problem(1)
    problem.log_p[:] = 0
    loss, _, gradients = problem.run(divergence="reverse_kl")
    assert 1 < loss < -math.log(EPS)
    assert_as_good_as_plain(problem, tail="bucket", divergence="reverse_kl")
    assert all(g.abs().max() > 0.01 for g in gradients.values())


# --- rows, weights, chunks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail, divergence", MODES)
def test_ignored_rows_equal_removed_rows_and_may_hold_anything(tail, divergence):
    options = {"tail": tail, "divergence": divergence, "ce_weight": 0.5}
    rows, kept = [0, 4], [1, 2, 3, 5, 6]
    problem = Problem(ignored=rows)
    problem.operands["hidden"][rows] = math.nan
    problem.ids[rows], problem.log_p[rows] = -5, math.nan
    loss, metrics, gradients = problem.run(**options)
    assert all((x[rows] == 0).all() for x in (*metrics.values(), gradients["hidden"]))
    removed = Problem(ignored=rows)
    removed.operands["hidden"] = removed.operands["hidden"][kept]
    removed.ids, removed.log_p, removed.labels = removed.ids[kept], removed.log_p[kept], removed.labels[kept]
    expected, _, truth = removed.run(**options)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    gradients["hidden"] = gradients["hidden"][kept]
    for k in gradients:
        torch.testing.assert_close(gradients[k], truth[k], rtol=1e-5, atol=1e-7)


def test_rows_that_are_masked_rather_than_removed():
    """Devices where looking for ignored rows would synchronise keep them in the GEMMs; their results must be zero."""
    labels = torch.tensor([3, -1, 5])
    side = sparse_ops.Side(torch.randn(3, V), Objective(ce_weight=0.5), None)
    side.logits[1] = math.nan
    side = side._replace(gradient=side.logits.clone())
    losses, statistics = torch.ones(3), torch.ones(3, 4)
    ids, log_p = torch.tensor([[1, 2], [-7, 10**6], [5, 6]]), torch.tensor([[-1.0, -2], [math.nan, 3], [-1, -2]])
    sparse_ops._sparse_rows(
        side,
        labels,
        ids,
        log_p,
        torch.ones(3),
        losses,
        statistics,
        slice(0, 3),
        tail="bucket",
        temperature=1.0,
        vocab_size=V,
    )
    assert losses[1] == 0 and (statistics[1] == 0).all() and (side.gradient[1] == 0).all()
    assert losses[[0, 2]].isfinite().all() and (side.gradient[[0, 2]].abs().sum(-1) > 0.1).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tail, divergence", MODES)
def test_token_weights_and_reductions(tail, divergence, reduction):
    upstream = torch.randn(N, device=DEVICE) if reduction == "none" else 3.0
    assert_as_good_as_plain(
        Problem(),
        slack=32.0,
        tail=tail,
        divergence=divergence,
        reduction=reduction,
        upstream=upstream,
        token_weights=torch.rand(N, device=DEVICE),
        ce_weight=0.4,
    )


def test_micro_batches_with_a_normalizer_equal_one_batch():
    whole, _, expected = Problem().run()
    total, dw = 0.0, 0.0
    for rows in (slice(0, 3), slice(3, N)):  # 2 and 4 counted tokens: a mean of means would be wrong
        problem = Problem()
        problem.operands["hidden"] = problem.operands["hidden"][rows]
        problem.ids, problem.log_p, problem.labels = problem.ids[rows], problem.log_p[rows], problem.labels[rows]
        loss, _, gradients = problem.run(normalizer=6)
        total, dw = total + loss.item(), dw + gradients["weight"]
    assert total == pytest.approx(whole.item(), rel=1e-6)
    torch.testing.assert_close(dw, expected["weight"], rtol=1e-5, atol=1e-8)


def test_leading_shapes():
    problem = Problem(n=6)
    loss, metrics, gradients = problem.run(reduction="none")
    problem.operands["hidden"] = problem.operands["hidden"].reshape(2, 3, D)
    problem.ids, problem.log_p = problem.ids.reshape(2, 3, 5), problem.log_p.reshape(2, 3, 5)
    problem.labels = problem.labels.reshape(2, 3)
    shaped, shaped_metrics, shaped_gradients = problem.run(reduction="none")
    assert torch.equal(shaped, loss.reshape(2, 3))
    assert all(torch.equal(shaped_metrics[k], metrics[k].reshape(2, 3)) for k in metrics)
    assert all(torch.equal(shaped_gradients[k].reshape(gradients[k].shape), gradients[k]) for k in gradients)


def test_all_ignored_and_no_token():
    for problem in (Problem(ignored=range(N)), Problem(n=0)):
        loss, _, gradients = problem.run(ce_weight=0.5)
        assert loss == 0 and all((g == 0).all() for g in gradients.values())


@pytest.mark.parametrize("v, dtype", [(V, torch.float32), (1024, torch.float64)])  # rows of 1024 get a gap
@pytest.mark.parametrize("tail, divergence", MODES)
def test_chunks_change_nothing_but_rounding(tail, divergence, v, dtype):
    options = {"tail": tail, "divergence": divergence, "ce_weight": 0.5}
    one, many = (Problem(n=13, v=v, dtype=dtype).run(workspace_bytes=size, **options) for size in (1 << 30, 1))
    torch.testing.assert_close(one[0], many[0], rtol=1e-6, atol=1e-7)
    for x, y in zip(one[1:], many[1:], strict=True):
        for k in x:
            torch.testing.assert_close(x[k], y[k], rtol=1e-5, atol=1e-7)


def test_vocab_size_cuts_padding_off():
    problem = Problem()
    expected, _, truth = problem.run()
    for name in ("weight", "bias", "up"):
        x = problem.operands[name]
        problem.operands[name] = torch.cat([x, torch.full_like(x[:9], 50.0)])
    loss, _, gradients = problem.run(vocab_size=V)
    assert loss == expected
    for k in gradients:
        if k != "hidden":
            assert (gradients[k][V:] == 0).all()
        torch.testing.assert_close(gradients[k] if k == "hidden" else gradients[k][:V], truth[k])


def test_a_grad_scalers_factor_saves_fp16_gradients_of_a_mean():
    torch.manual_seed(0)
    x, w = torch.randn(6, 16).half(), torch.randn(40, 16).half()
    ids, log_p, _ = linear_topk(torch.randn(6, 8), torch.randn(40, 8), 5)
    gradients = []
    for dtype in (torch.float16, torch.float64):
        operands = [t.detach().to(dtype).requires_grad_() for t in (x, w)]
        loss = linear_sparse_distillation_loss(*operands, ids, log_p, normalizer=1e6)
        (loss.student * 2.0**16).backward()
        gradients.append([t.grad for t in operands])
    for found, truth in zip(*gradients, strict=True):
        assert found.dtype == torch.float16
        assert ((found.double() - truth).norm() / truth.norm()) < 5e-3


def test_backward_twice():
    for reduction in ("mean", "none"):
        problem = Problem()
        t = problem.leaves()
        loss = linear_sparse_distillation_loss(
            t["hidden"], t["weight"], problem.ids, problem.log_p, problem.labels, reduction=reduction
        ).student.sum()
        loss.backward(retain_graph=True)
        once = t["hidden"].grad.clone(), t["weight"].grad.clone()
        loss.backward()
        assert torch.equal(t["hidden"].grad, 2 * once[0]) and torch.equal(t["weight"].grad, 2 * once[1])


def test_fp64_operands_stay_fp64():
    problem = Problem(dtype=torch.float64)
    problem.log_p = problem.log_p.double()
    loss, _, gradients = problem.run(divergence="reverse_kl")
    expected, _, truth = problem.truth(tail="bucket", divergence="reverse_kl")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert all(relative_error(gradients[k], truth[k]) < 1e-12 for k in truth)


def test_autocast_keeps_fp32_logits():
    problem = Problem(spread=0.1)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        loss, _, gradients = problem.run()
    problem.operands = {k: x.bfloat16() for k, x in problem.operands.items()}
    expected, _, truth = problem.truth(tail="bucket")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for k in truth:
        assert gradients[k].dtype == torch.float32 and relative_error(gradients[k], truth[k]) < BF16


# --- work and memory ---------------------------------------------------------------------------------------------


def recorded(requires, n=8, **options):
    """What a call really ran and allocated, by torch's profiler: result shapes of GEMMs, largest tensor."""
    problem = Problem(v=512, n=n, ignored=())
    problem.has_bias = False
    profile = torch.profiler.profile(record_shapes=True, profile_memory=True)
    problem.run(requires=requires, watch=profile, **{"workspace_bytes": 1 << 30, **options})
    gemms = []
    for event in profile.events():
        if event.name == "aten::mm":
            gemms.append((event.input_shapes[0][0], event.input_shapes[1][1]))
        elif event.name == "aten::addmm":
            gemms.append(tuple(event.input_shapes[0]))
    return gemms, max(event.self_cpu_memory_usage for event in profile.events())


LOGITS, DX, DW = (8, 512), (8, D), (512, D)


@pytest.mark.parametrize(
    "requires, gemms",
    [
        ((), [LOGITS]),
        (("hidden",), [LOGITS, DX]),
        (("weight",), [LOGITS, DW]),
        (("hidden", "weight"), [LOGITS, DX, DW]),
    ],
)
def test_only_wanted_gradients_are_computed(requires, gemms):
    assert recorded(requires)[0] == gemms


def test_no_grad_does_no_gradient_work():
    with torch.no_grad():
        assert recorded(GRADIENTS)[0] == [LOGITS]


@pytest.mark.skipif(DEVICE != "cpu", reason="the profiler's figures are of the CPU's memory")
def test_frozen_head_allocates_no_dw():
    """In chunks of one row, a dW of 512 x 16 floats is by far the largest tensor."""
    frozen, trained = (recorded((k,), workspace_bytes=1)[1] for k in ("hidden", "weight"))
    assert frozen < 512 * D * 4 == trained


@pytest.mark.skipif(DEVICE != "cpu", reason="the profiler's figures are of the CPU's memory")
def test_whole_logits_never_exist():
    """64 rows in chunks of 4: no tensor is larger than a chunk's logits, whatever N is."""
    assert recorded(("hidden",), n=64, workspace_bytes=4 * 2 * 512 * 4)[1] == 4 * 512 * 4


# --- top-k -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, V])
def test_topk(k, temperature, dtype):
    problem = Problem(dtype=dtype)
    problem.head_options, problem.has_lora = {"logit_scale": 1.7, "softcap": 6.0}, dtype != torch.bfloat16
    t = problem.leaves()  # they require gradients, which the targets must not carry on
    found = linear_topk(t["hidden"], problem.head(t), k, temperature=temperature, workspace_bytes=4096)
    z = problem.logits({name: x.double() for name, x in problem.operands.items()}) / temperature
    log_probs, ids = z.log_softmax(-1).topk(k)
    gaps = -log_probs.diff(dim=1)
    if not len(gaps.flatten()) or gaps.min() > 1e-5:
        assert torch.equal(found.ids, ids)
    tolerance = 1e-13 if dtype == torch.float64 else 5e-6
    # ids of a near tie may change places; each must have its own log-probability
    own = z.log_softmax(-1).gather(1, found.ids)
    for x, y in ((found.log_probs, own), (found.log_probs, log_probs), (found.log_sum_exp, z.logsumexp(-1))):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)
    assert (found.log_probs.diff(dim=1) <= 0).all()
    assert all(len(row.unique()) == k for row in found.ids)
    assert found.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not found.log_probs.requires_grad


def test_topk_shapes_chunks_and_vocab_size():
    problem = Problem(n=6)
    x, w = problem.operands["hidden"], problem.operands["weight"]
    whole = linear_topk(x, w, 4)
    padded = torch.cat([w, torch.full_like(w[:9], 50.0)])
    parts = linear_topk(x.reshape(2, 3, D), padded, 4, vocab_size=V, workspace_bytes=1)
    assert parts.ids.shape == parts.log_probs.shape == (2, 3, 4) and parts.log_sum_exp.shape == (2, 3)
    assert torch.equal(parts.ids.reshape(6, 4), whole.ids)
    torch.testing.assert_close(parts.log_probs.reshape(6, 4), whole.log_probs)
    torch.testing.assert_close(parts.log_sum_exp.reshape(6), whole.log_sum_exp)
    assert linear_topk(x[:0], w, 4).ids.shape == (0, 4)


def test_topk_of_excluded_tokens_is_minus_infinity():
    bias = torch.full((V,), -math.inf, device=DEVICE)
    bias[[3, 8]] = 0
    head = LinearHead(torch.zeros(V, D, device=DEVICE), bias)
    found = linear_topk(torch.zeros(1, D, device=DEVICE), head, 4)
    assert found.log_probs[0].exp().tolist() == pytest.approx([0.5, 0.5, 0, 0])
    assert found.log_probs[0, 2:].tolist() == [-math.inf] * 2
    assert found.log_sum_exp.item() == pytest.approx(math.log(2))


def test_topk_keeps_the_distance_of_a_certain_token_to_one():
    """log p = -1e-9 has no digits left as z - logsumexp(z); the loss reads its tail off it."""
    bias = torch.zeros(V, device=DEVICE)
    bias[3] = 20 + math.log(V - 1)
    head = LinearHead(torch.zeros(V, D, device=DEVICE), bias)
    found = linear_topk(torch.zeros(1, D, device=DEVICE), head, 1)
    truth = bias.double().log_softmax(-1)[3]
    assert found.ids.item() == 3 and found.log_probs.item() == pytest.approx(truth.item(), rel=1e-5)


# --- torch.compile -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_gives_the_same_numbers_for_changing_n(reduction):
    torch._dynamo.reset()

    def step(hidden, head, ids, log_p, labels, **options):
        targets = linear_topk(hidden.flip(0), head, 3)
        loss = linear_sparse_distillation_loss(hidden, head, ids, log_p, labels, ce_weight=0.2, **options)
        more = linear_sparse_distillation_loss(hidden, head, targets.ids, targets.log_probs, labels, **options)
        return DistillationLoss(loss.student + more.student, None, loss.metrics)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for n in (6, 9):
        (loss, metrics, gradients), (expected, expected_metrics, truth) = (
            Problem(n=n).run(loss_function=f, reduction=reduction) for f in (compiled, step)
        )
        torch.testing.assert_close(loss, expected)
        for x, y in ((metrics, expected_metrics), (gradients, truth)):
            assert x.keys() == y.keys()
            for k in x:
                torch.testing.assert_close(x[k], y[k])


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("extras", [True, False])
def test_opcheck(per_token, extras):
    """With bias, LoRA and labels, and without."""
    problem = Problem(3, v=37, n=5)
    t = problem.leaves()
    shapes = (37,), (5, 2), (37, 2)
    others = [torch.randn(s, device=DEVICE, requires_grad=True) if extras else None for s in shapes]
    operands = [t["hidden"], t["weight"], *others]
    labels = torch.where(problem.labels >= 0, problem.labels, -1) if extras else None
    torch.library.opcheck(
        torch.ops.okd_kernels.sparse_distillation.default,
        (
            *operands,
            labels,
            *(problem.ids, problem.log_p, torch.rand(5, device=DEVICE), torch.tensor(0.3, device=DEVICE), per_token),
            *("forward_kl", "bucket"),
            *([0.7, 0.3 if extras else 0.0], [1.3, 5.0], 1.5, 37, 2048, [x is not None for x in operands]),
        ),
    )
    detached = [None if x is None else x.detach() for x in operands]
    torch.library.opcheck(torch.ops.okd_kernels.topk.default, (*detached, 3, [1.3, 5.0], 1.5, 37, 2048))


# --- errors ------------------------------------------------------------------------------------------------------

X, W, IDS, P = torch.zeros(4, 8), torch.zeros(32, 8), torch.zeros(4, 3).long(), torch.full((4, 3), -2.0)


@pytest.mark.parametrize(
    "args, options, error, message",
    [
        ((X, W, IDS, P), {"tail": "drop"}, ValueError, "tail to be one of bucket, renormalize, none; got 'drop'"),
        ((X, W, IDS, P), {"divergence": "jsd"}, ValueError, "forward_kl or reverse_kl.*got 'jsd'.*linear_distillation"),
        ((X, W, IDS, P), {"divergence": "kl"}, ValueError, "expected a divergence out of"),
        (
            (X, W, IDS, P),
            {"divergence": "reverse_kl", "tail": "none"},
            ValueError,
            "tail='bucket' for reverse_kl; got 'none'",
        ),
        ((X, W, IDS.int(), P), {}, TypeError, r"target_ids of dtype torch.int64; got torch.int32.*long\(\)"),
        ((X, W, IDS, P.long()), {}, TypeError, "floating-point target_log_probs; got torch.int64"),
        ((X, W, IDS[:3], P), {}, ValueError, r"target_ids of shape \(4, K\).*got \(3, 3\)"),
        ((X, W, IDS[:, :0], P[:, :0]), {}, ValueError, r"K >= 1.*got \(4, 0\)"),
        ((X, W, IDS[:, 0], P[:, 0]), {}, ValueError, r"target_ids of shape \(4, K\).*got \(4,\)"),
        ((X, W, IDS, P[:, :2]), {}, ValueError, r"target_log_probs of shape \(4, 3\).*got \(4, 2\)"),
        ((X, W, IDS.to("meta"), P), {}, ValueError, "target_ids on cpu.*got meta"),
        ((X, W, IDS + 32, P), {}, ValueError, r"target_ids in \[0, 32\).*got 32"),
        ((X, W, IDS, P.exp()), {}, ValueError, "target_log_probs <= 0; got 0.1353: pass log_softmax"),
        ((X, W, IDS, P), {"vocab_size": 33}, ValueError, r"vocab_size in \[1, 32\].*got 33"),
        ((X, W, IDS, P), {"ce_weight": 0.5}, ValueError, "labels, since the student's ce_weight is 0.5"),
        ((X, W, IDS, P), {"temperature": 0}, ValueError, "temperature > 0; got 0"),
        ((X, W, IDS, P), {"reduction": "avg"}, ValueError, "mean, sum or none; got 'avg'"),
        ((X, W, IDS, P), {"workspace_bytes": 0}, ValueError, "workspace_bytes > 0; got 0"),
        ((X, W, IDS, P), {"weight": -1.0}, ValueError, "weight to be finite and at least 0; got -1"),
        ((X[:, :6], W, IDS, P), {}, ValueError, r"student_hidden of shape \(\.\.\., 8\).*got \(4, 6\)"),
    ],
)
def test_errors(args, options, error, message):
    with pytest.raises(error, match=message):
        linear_sparse_distillation_loss(*args, **options)


@pytest.mark.parametrize(
    "k, options, message",
    [
        (0, {}, r"k in \[1, 32\], the vocabulary; got 0"),
        (33, {}, "got 33"),
        (9, {"vocab_size": 8}, r"k in \[1, 8\].*got 9"),
        (3, {"vocab_size": 0}, r"vocab_size in \[1, 32\].*got 0"),
        (3, {"temperature": -1.0}, "temperature > 0; got -1"),
        (3, {"workspace_bytes": -1}, "workspace_bytes > 0; got -1"),
    ],
)
def test_topk_errors(k, options, message):
    with pytest.raises(ValueError, match=message):
        linear_topk(X, W, k, **options)
