"""Laws that every divergence obeys, in every backend, on either side; and addresses beyond 2^31."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from okd_kernels.chunks import Model, run_chunks

from okd_kernels import DIVERGENCES, Objective, distillation_loss, linear_distillation_loss
from okd_kernels.rows import STATISTICS

N, V = 4, 61
CASES = [
    pytest.param(name, backend, side, id=f"{name}-{backend}-{side}")
    for name in DIVERGENCES
    for backend in ("reference", "torch", "triton")
    for side in ("student", "teacher")
]
cases = pytest.mark.parametrize("name, backend, side", CASES)


def loss_and_gradient(z, u, name, backend, side, **options):
    """Per-token loss of one side (N,) and its gradient; the other side's objective is there but not looked at."""
    logits = {"student": z.clone().requires_grad_(), "teacher": u.clone().requires_grad_()}
    objectives = {"student": Objective(name), "teacher": Objective(name)}
    loss = distillation_loss(*logits.values(), **objectives, backend=backend, reduction="none", **options)
    value = getattr(loss, side)
    value.sum().backward()
    return value.detach(), logits[side].grad


def logits(seed, spread):
    torch.manual_seed(seed)
    z = 2 * torch.randn(N, V)
    return z, z + spread * torch.randn(N, V)


@cases
@given(seed=st.integers(0, 2**20), spread=st.sampled_from([4.0, 1.0, 0.3, 0.03]), offset=st.floats(-20, 20))
@settings(max_examples=5, deadline=None)
def test_nonnegative_invariant_and_balanced(name, backend, side, seed, spread, offset):
    z, u = logits(seed, spread)
    value, gradient = loss_and_gradient(z, u, name, backend, side)
    assert (value > 0).all()
    size = gradient.abs().sum(-1)
    assert (gradient.sum(-1).abs() <= 4e-6 * size + 4e-7).all(), "a softmax does not see a constant"
    shifted, shifted_gradient = loss_and_gradient(z + offset, u - offset, name, backend, side)
    # Adding 20 rounds logits of size 2 in their 21st bit; a gradient of size `spread` feels it as 1 / spread.
    torch.testing.assert_close(shifted, value, rtol=2e-5 / spread, atol=1e-6)
    assert (shifted_gradient - gradient).norm() <= (2e-5 / spread) * gradient.norm()


@cases
def test_equal_distributions_have_no_divergence_and_no_gradient(name, backend, side):
    z, _ = logits(0, 1.0)
    value, gradient = loss_and_gradient(z, z, name, backend, side)
    assert (value.abs() <= 1e-7).all()
    assert gradient.abs().max() <= 2e-7


@cases
def test_tokens_are_independent(name, backend, side):
    """Additivity over tokens, and row permutation."""
    z, u = logits(1, 1.0)
    value, gradient = loss_and_gradient(z, u, name, backend, side)
    order = torch.tensor([2, 0, 3, 1])
    permuted, permuted_gradient = loss_and_gradient(z[order], u[order], name, backend, side)
    assert torch.equal(permuted, value[order]) and torch.equal(permuted_gradient, gradient[order])
    alone, alone_gradient = loss_and_gradient(z[1:2], u[1:2], name, backend, side)
    torch.testing.assert_close(alone, value[1:2], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alone_gradient, gradient[1:2], rtol=1e-5, atol=1e-8)


@cases
def test_vocabulary_order_does_not_matter(name, backend, side):
    z, u = logits(2, 1.0)
    value, gradient = loss_and_gradient(z, u, name, backend, side)
    order = torch.randperm(V)
    permuted, permuted_gradient = loss_and_gradient(z[:, order], u[:, order], name, backend, side)
    torch.testing.assert_close(permuted, value, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(permuted_gradient, gradient[:, order], rtol=1e-5, atol=1e-7)


@cases
def test_temperature_law(name, backend, side):
    """loss_T(z, u) = T^2 loss_1(z / T, u / T), and the gradient T times that one's."""
    z, u = logits(3, 1.0)
    t = 2.5
    value, gradient = loss_and_gradient(z, u, name, backend, side, temperature=t)
    expected, expected_gradient = loss_and_gradient(z / t, u / t, name, backend, side)
    torch.testing.assert_close(value, t**2 * expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, t * expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("v", [50257, 32768 + 13])
def test_large_vocabularies_of_odd_size(v, name):
    """GPT-2's 50257: rows are padded, and 25 blocks are walked. fp32 against fp64, std(z - u) = 0.1."""
    torch.manual_seed(0)
    z = 2 * torch.randn(3, v, dtype=torch.float64)
    u = z + 0.1 * torch.randn(3, v, dtype=torch.float64)
    truth = loss_and_gradient(z, u, name, "reference", "student")
    plain = loss_and_gradient(z.float(), u.float(), name, "reference", "student")
    for backend in ("torch", "triton"):
        value, gradient = loss_and_gradient(z.float(), u.float(), name, backend, "student")
        budget = 2 * (plain[0].double() - truth[0]).abs().max() + 1e-6
        assert (value.double() - truth[0]).abs().max() <= budget
        budget = 2 * (plain[1].double() - truth[1]).norm() / truth[1].norm() + 1e-6
        assert (gradient.double() - truth[1]).norm() / truth[1].norm() <= budget


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_rows_beyond_two_to_the_31(backend):
    """Liger #862, CCE #37: rows that lie 2^30 elements apart. Memory that is never touched is never committed."""
    v, stride = 40, 2**30 + 16
    sides = []
    for _ in range(2):
        storage = torch.empty(2 * stride + v, dtype=torch.bfloat16)
        rows = storage.as_strided((3, v), (stride, 1))
        rows.copy_(torch.randn(3, v))
        sides.append(rows)
    far = distillation_loss(*sides, backend=backend, reduction="none")
    near = distillation_loss(*(s.clone() for s in sides), backend="reference", reduction="none")
    torch.testing.assert_close(far.student, near.student, rtol=1e-5, atol=1e-6)


def test_more_rows_than_a_grid_dimension():
    """Liger #1294: 70,000 rows. The kernel's grid is one-dimensional, which reaches 2^31 - 1."""
    n = 70_000
    torch.manual_seed(0)
    x, w, y, u = torch.randn(n, 4), torch.randn(8, 4), torch.randn(n, 3), torch.randn(8, 3)
    ours = linear_distillation_loss(x, w, y, u, backend="torch", reduction="none").student
    truth = linear_distillation_loss(x, w, y, u, backend="reference", reduction="none").student
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_no_host_synchronisation_on_a_device(scaled, labels, dtype):
    """On meta tensors, which have no values: the chunk loop reads none, and no shape depends on one."""

    def side(d, objective):
        hidden, weight, bias = (torch.empty(s, dtype=dtype, device="meta") for s in ((9, d), (V, d), (V,)))
        gradients = [torch.empty_like(t) for t in (hidden, weight, bias)]
        scale = None if scaled else torch.empty((), device="meta")
        return Model(hidden, weight, bias, None, None, 1.0, 5.0, objective, scale, *gradients)

    run_chunks(
        (side(4, Objective("jsd")), side(6, Objective("forward_kl", ce_weight=0.5 if labels else 0.0))),
        torch.empty(9, dtype=torch.int64, device="meta") if labels else None,
        torch.empty(9, 2, device="meta"),
        torch.empty(9, 2, device="meta"),
        torch.empty(9, len(STATISTICS), device="meta"),
        temperature=1.3,
        vocab_size=V,
        workspace_bytes=4 * V * 8,
        backend="torch",
    )
