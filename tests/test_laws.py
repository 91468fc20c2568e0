"""Laws that every divergence obeys, in every backend, on either side; and addresses beyond 2^31.

A law says what the truth is, given in fp64 from other operands; how far from it a backend may be, `problems` says.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    BACKENDS,
    DEVICE,
    assert_logits_as_good_as_the_reference,
    error,
    relative_error,
    run_logits,
    values_of,
)

from okd_kernels import DIVERGENCES, Objective, distillation_loss
from okd_kernels.engine import run_chunks
from okd_kernels.rows import STATISTICS, VALUES
from okd_kernels.sharding import Vocabulary
from okd_kernels.sides import Side

N, V = 4, 61
EPS = torch.finfo(torch.float32).eps
names = pytest.mark.parametrize("name", DIVERGENCES)
backends = pytest.mark.parametrize("backend", BACKENDS)


def options(name, **others):
    """Per token, both sides learning, so that one call shows the law on either side."""
    return {"student": name, "teacher": name, "reduction": "none", **others}


def logits(seed, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(N, V, generator=g)
    return z.to(DEVICE), (z + spread * torch.randn(N, V, generator=g)).to(DEVICE)


def truth_of(z, u, name, **others):
    """In fp64, by the reference; `test_definitions` holds that to the definitions."""
    return run_logits(z.double(), u.double(), None, "reference", **options(name, **others))


@backends
@names
@given(seed=st.integers(0, 2**20), spread=st.sampled_from([4.0, 1.0, 0.3, 0.03]))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_divergences_are_positive_and_their_gradients_sum_to_zero(name, backend, seed, spread):
    z, u = logits(seed, spread)
    values, gradients = run_logits(z, u, None, backend, **options(name))
    assert (values["student"] > 0).all() and (values["teacher"] > 0).all()
    for side, gradient in gradients.items():
        # q sums to 1 but for the rounding of its exponentials, one eps of each log q, whose mean is the entropy.
        entropies = values["student_entropy"] + values["teacher_entropy"]
        budget = EPS * (8 * gradient.abs().sum(-1) + 2 * (2 + entropies))
        assert (gradient.double().sum(-1).abs() <= budget).all(), side


@backends
@names
@pytest.mark.parametrize("offset", [20.0, -7.3])
@pytest.mark.parametrize("spread", [1.0, 0.03])
def test_a_constant_changes_nothing(name, backend, spread, offset):
    """Of either side's logits; that adding it rounds them is taken out, in fp64.

    What is left is rounding of a few large probabilities, which the order of the vocabulary does not change: the draws
    of plain PyTorch are other logits.
    """
    worst = {}
    for seed in range(4):
        z, u = logits(seed, spread)
        moved = z + offset, u - offset
        truth = truth_of(moved[0].double() - offset, moved[1].double() + offset, name)
        for each in ("reference", backend):
            values, gradients = run_logits(*moved, None, each, **options(name))
            errors = {k: error(values[k], x) / (8 * x.abs().max().item() + 2) for k, x in truth[0].items()}
            errors |= {f"d{k}": relative_error(gradients[k], x) / 8 for k, x in truth[1].items()}
            worst[each] = {k: max(x, worst.get(each, {}).get(k, 0.0)) for k, x in errors.items()}
    for k, ours in worst[backend].items():
        assert ours <= 2 * worst["reference"][k] + EPS, k


@backends
@names
def test_equal_distributions_have_no_divergence_and_no_gradient(name, backend):
    """But for one rounding: of the row's two sums of probabilities, and of p and q in each gradient."""
    z, _ = logits(0)
    values, gradients = run_logits(z, z, None, backend, **options(name))
    for side, gradient in gradients.items():
        assert (values[side].abs() <= 2 * EPS).all()
        assert (gradient.abs() <= 8 * EPS * z.softmax(-1)).all()


@backends
@names
def test_tokens_are_independent(name, backend):
    """Additivity over tokens, and row permutation, bitwise; a row alone as good as among others."""
    z, u = logits(1)
    values, gradients = run_logits(z, u, None, backend, **options(name))
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    permuted, permuted_gradients = run_logits(z[order], u[order], None, backend, **options(name))
    for key, value in values.items():
        assert torch.equal(permuted[key], value[order]), key
    for side, gradient in gradients.items():
        assert torch.equal(permuted_gradients[side], gradient[order]), side
    truth = tuple({k: x[1:2] for k, x in found.items()} for found in truth_of(z, u, name))
    assert_logits_as_good_as_the_reference(z[1:2], u[1:2], None, backend, truth, **options(name))
    total, of_total = run_logits(z, u, None, backend, **options(name, reduction="sum"))
    assert (total["student"] - values["student"].double().sum()).abs() <= N * EPS * values["student"].sum()
    assert all(torch.equal(of_total[side], gradients[side]) for side in gradients)


@backends
@names
def test_vocabulary_order_does_not_matter(name, backend):
    z, u = logits(2)
    order = torch.randperm(V).to(DEVICE)
    values, gradients = truth_of(z, u, name)
    truth = values, {side: x[:, order] for side, x in gradients.items()}
    assert_logits_as_good_as_the_reference(z[:, order], u[:, order], None, backend, truth, **options(name))


@backends
@names
@pytest.mark.parametrize("temperature", [0.4, 2.5])
def test_temperature_law(name, backend, temperature):
    """loss_T(z, u) = T^2 loss_1(z / T, u / T), and the gradient T times that one's."""
    z, u = logits(3)
    values, gradients = truth_of(z.double() / temperature, u.double() / temperature, name)
    values = {k: x * temperature**2 if k in ("student", "teacher") else x for k, x in values.items()}
    truth = values, {side: x * temperature for side, x in gradients.items()}
    assert_logits_as_good_as_the_reference(z, u, None, backend, truth, **options(name, temperature=temperature))


@pytest.mark.skipif(DEVICE != "cpu", reason="memory that is never touched is committed on a GPU")
@backends
def test_rows_beyond_two_to_the_31(backend):
    """Liger #862, CCE #37: rows that lie 2^30 elements apart. Memory that is never touched is never committed."""
    v, stride = 40, 2**30 + 16
    sides = []
    for _ in range(2):
        storage = torch.empty(2 * stride + v, dtype=torch.bfloat16)
        rows = storage.as_strided((3, v), (stride, 1))
        rows.copy_(torch.randn(3, v))
        sides.append(rows)
    near = [x.clone() for x in sides]
    far, found = (values_of(distillation_loss(*both, backend=backend, reduction="none")) for both in (sides, near))
    assert all(torch.equal(far[k], x) for k, x in found.items() if x is not None)
    with torch.no_grad():
        assert_logits_as_good_as_the_reference(*near, None, backend, reduction="none")


@pytest.mark.parametrize("labels", [True, False])
@names
def test_no_host_synchronisation_on_a_device(name, labels):
    """On meta tensors, which have no values: the chunk loop reads none, and no shape depends on one."""

    def side(d, objective):
        hidden, weight, bias = (torch.empty(s, device="meta") for s in ((9, d), (V, d), (V,)))
        return Side(hidden, weight, bias, 1.0, 5.0, objective, *(torch.empty_like(x) for x in (hidden, weight, bias)))

    statistics, values = run_chunks(
        side(4, Objective(name)),
        side(6, Objective("forward_kl", ce_weight=0.5 if labels else 0.0)),
        torch.empty(9, dtype=torch.int64, device="meta") if labels else None,
        torch.empty(9, 4, device="meta"),
        Vocabulary(V, V),
        temperature=1.3,
        workspace_bytes=4 * V * 8,
        backend="torch",
    )
    assert statistics.shape == (2, 9, len(STATISTICS)) and values.shape == (9, len(VALUES))
