"""Options of a call: scales, weights, reductions, shapes, strides, vocabulary, chunks. Budgets: `problems`."""

import math
import threading

import pytest
import torch
from problems import (
    BACKENDS,
    DEVICE,
    GRADIENTS,
    N,
    Problem,
    V,
    assert_as_good_as_the_reference,
    assert_logits_as_good_as_the_reference,
)

from okd_kernels import DIVERGENCES, LinearDistillationLoss, LinearHead, Objective, linear_distillation_loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_scale_softcap_bias(temperature, backend):
    problem = Problem()
    problem.head_options = ({"logit_scale": 0.5, "softcap": 5.0}, {"logit_scale": 1.7, "softcap": 3.0})
    objectives = {"student": Objective("forward_kl", ce_weight=0.5), "teacher": Objective("reverse_kl", ce_weight=0.5)}
    assert_as_good_as_the_reference(problem, backend, **objectives, temperature=temperature)
    problem.bias = False
    assert_as_good_as_the_reference(problem, backend, student="jsd", teacher="tvd", temperature=temperature)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_of_any_stride(backend):
    x, w, b, y, u, c = Problem().operands.values()

    def loss(b, c):
        return linear_distillation_loss(x, LinearHead(w, b), y, LinearHead(u, c), backend=backend).student

    assert torch.equal(loss(*(torch.stack([bias, bias + 1], 1)[:, 0] for bias in (b, c))), loss(b, c))


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
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_weights_and_reductions(reduction, backend):
    """By their definition, from per-token losses in fp64."""
    problem, weights = Problem(), torch.rand(N, device=DEVICE)
    options = {"reduction": reduction, "token_weights": weights}
    per_token = problem.run("reference", torch.float64, reduction="none")[0]["student"]
    weighted, total = per_token * weights.double(), weights[problem.labels != -100].double().sum()
    expected = {"mean": weighted.sum() / total, "sum": weighted.sum(), "none": weighted}[reduction]
    found = problem.run("reference", torch.float64, **options)[0]["student"]
    torch.testing.assert_close(found, expected, rtol=8 * torch.finfo(torch.float64).eps, atol=0)
    assert_as_good_as_the_reference(problem, backend, teacher="jsd", **options)


@pytest.mark.parametrize("backend", (*BACKENDS, "reference"))
def test_a_mean_is_its_definition_for_any_total_weight(backend):
    """Negative ones as well, whoever adds them up; equal weights cancel."""
    weights, total = torch.full((N,), -0.5, device=DEVICE), -0.5 * (N - 1)
    for normalizer in (None, torch.tensor([total], device=DEVICE), torch.tensor(total, dtype=torch.float64)):
        values, gradients = Problem().run(backend, token_weights=weights, normalizer=normalizer)
        assert values["student"].shape == ()
        assert_as_good_as_the_reference(Problem(), backend, found=(values, gradients))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalizer", [6, 6.0, torch.tensor(6), torch.tensor([6.0])])
def test_a_normalizer_on_the_host(normalizer, backend):
    expected, truth = Problem().run(backend, reduction="mean")
    values, gradients = Problem().run(backend, normalizer=normalizer)
    assert torch.equal(values["student"], expected["student"])
    assert all(torch.equal(gradients[k], truth[k]) for k in GRADIENTS[:3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_normalizer_of_zero_makes_zeros(backend):
    values, gradients = Problem().run(backend, normalizer=0, teacher="jsd")
    assert values["student"] == 0 and values["teacher"] == 0 and not any(g.any() for g in gradients.values())


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_with_a_normalizer_equal_one_batch(backend):
    part = Problem()
    hidden, labels = {k: part.operands[k] for k in ("student_hidden", "teacher_hidden")}, part.labels
    found = []
    for rows in (slice(0, 3), slice(3, N)):  # 2 and 4 counted tokens: a mean of means would be wrong
        part.operands |= {k: x[rows] for k, x in hidden.items()}
        part.labels = labels[rows]
        found.append(part.run(backend, normalizer=6))
    total = {"student": sum(values["student"] for values, _ in found)}
    gradients = {k: sum(gradients[k] for _, gradients in found) for k in GRADIENTS[1:3]}
    gradients["student_hidden"] = torch.cat([gradients["student_hidden"] for _, gradients in found])
    assert_as_good_as_the_reference(Problem(), backend, found=(total, gradients))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_shapes_and_strides(backend):
    problem = Problem(n=6, ignored=(1,))
    for side in ("student", "teacher"):
        x = problem.operands[f"{side}_hidden"]
        problem.operands[f"{side}_hidden"] = x.reshape(2, 3, -1).transpose(0, 1).contiguous().transpose(0, 1)
        problem.operands[f"{side}_weight"] = problem.operands[f"{side}_weight"].T.contiguous().T
    problem.labels = problem.labels.reshape(2, 3)
    values, gradients = problem.run(backend, teacher="forward_kl", reduction="none")
    assert all(x.shape == (2, 3) for x in values.values())
    found = ({k: x.flatten() for k, x in values.items()}, {k: x.flatten(0, x.dim() - 2) for k, x in gradients.items()})
    found[1].update({k: x for k, x in gradients.items() if "bias" in k})
    options = {"teacher": "forward_kl", "reduction": "none"}
    assert_as_good_as_the_reference(Problem(n=6, ignored=(1,)), backend, found=found, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vocab_size_cuts_padding_off_both_heads(backend):
    """Two heads padded differently (151936 / 152064): padded columns exist for neither side, and get no gradient."""
    problem = Problem()
    for side, padding in (("student", 5), ("teacher", 13)):
        weight, bias = problem.operands[f"{side}_weight"], problem.operands[f"{side}_bias"]
        problem.operands[f"{side}_weight"] = torch.cat([weight, torch.randn(padding, weight.shape[1]).to(weight) * 9])
        problem.operands[f"{side}_bias"] = torch.cat([bias, torch.full((padding,), 50.0).to(bias)])
    values, gradients = problem.run(backend, vocab_size=V, teacher="reverse_kl")
    assert not any(gradients[k][V:].any() for k in GRADIENTS if "hidden" not in k)
    expected, _ = Problem().run(backend, teacher="reverse_kl")
    assert all(torch.equal(values[name], expected[name]) for name in ("student", "teacher"))
    found = values, {k: x if "hidden" in k else x[:V] for k, x in gradients.items()}
    assert_as_good_as_the_reference(Problem(), backend, found=found, teacher="reverse_kl")


@pytest.fixture
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("uninitialised_memory_is_nan")
def test_padding_gets_no_gradient(backend):
    """Wider than a block of the kernel, whose stores end with the vocabulary."""
    z, u = torch.randn(2, 3, 4200, device=DEVICE)
    labels = torch.tensor([1, -100, 5], device=DEVICE)
    assert_logits_as_good_as_the_reference(z, u, labels, backend, teacher="jsd", vocab_size=2048)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_minus_infinity_on_both_sides_equals_a_smaller_vocabulary(name, backend):
    problem, objective = Problem(), Objective(name, ce_weight=0.5)
    for side in ("student", "teacher"):
        problem.operands[f"{side}_bias"][100:] = -math.inf
    problem.labels.clamp_max_(99)
    options = {"student": objective, "teacher": objective, "temperature": 0.5}
    found = problem.run(backend, **options)
    assert_as_good_as_the_reference(problem, backend, found=found, vocab_size=100, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace_bytes", [1, 1 << 30])
def test_chunks_change_nothing_but_rounding(workspace_bytes, backend):
    options = {"student": "jsd", "teacher": Objective("forward_kl", ce_weight=0.5)}
    assert_as_good_as_the_reference(Problem(n=13), backend, workspace_bytes=workspace_bytes, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 1])
def test_no_token_and_one_token(n, backend):
    if n:
        assert_as_good_as_the_reference(Problem(n=n, ignored=()), backend, teacher="forward_kl")
    values, gradients = Problem(n=0, ignored=()).run(backend, teacher="forward_kl")
    assert values["student"] == 0 and values["teacher"] == 0
    assert not any(g.any() for g in gradients.values())


def same(first, second):
    return all(
        x is y or torch.equal(x, y)
        for a, b in zip(first, second, strict=True)
        for x, y in zip(a.values(), b.values(), strict=True)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bitwise_equal(backend):
    assert same(*(Problem().run(backend, teacher=Objective("reverse_kl", ce_weight=0.1)) for _ in range(2)))


@pytest.mark.parametrize("backend", ["torch"] if DEVICE == "cpu" else BACKENDS)  # Triton's interpreter has one grid
def test_two_threads_at_once_are_bitwise_equal_to_one(backend):
    """Buffers that are kept from call to call are each thread's own."""
    problems, options = [Problem(n=n, seed=n, v=400) for n in (9, 40)], {"teacher": "jsd", "workspace_bytes": 1 << 15}
    expected = [problem.run(backend, **options) for problem in problems]
    start, wrong = threading.Barrier(2), []

    def work(problem, truth):
        start.wait()
        for _ in range(20):
            if not same(problem.run(backend, **options), truth):
                wrong.append(len(problem.labels))

    threads = [threading.Thread(target=work, args=both) for both in zip(problems, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_module_form_holds_options_and_takes_others():
    operands = Problem().operands
    args = [operands[k] for k in GRADIENTS if "bias" not in k]
    module = LinearDistillationLoss(student="jsd", temperature=2.0)
    expected = linear_distillation_loss(*args, student="jsd", temperature=3.0)
    assert torch.equal(module(*args, temperature=3.0).student, expected.student)
    assert repr(module) == "LinearDistillationLoss(student='jsd', temperature=2.0)"


def test_total_is_both_sides():
    operands = Problem().operands
    args = [operands[k] for k in GRADIENTS if "bias" not in k]
    frozen = linear_distillation_loss(*args)
    assert frozen.teacher is None and frozen.total is frozen.student
    online = linear_distillation_loss(*args, teacher="reverse_kl")
    assert torch.equal(online.total, online.student + online.teacher)
