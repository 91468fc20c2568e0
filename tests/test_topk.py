"""`linear_topk` against whole logits in fp64."""

import math

import pytest
import torch
from sparse_problems import DEVICE, EPS, D, SparseProblem, V

from okd_kernels import LinearHead, linear_topk


def log_softmax_error(problem, z, temperature):
    """Twice the largest error of plain PyTorch, inner dimensions in a few orders, and 8 eps of the largest logit."""
    dtype = torch.promote_types(problem.operands["hidden"].dtype, torch.float32)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for _ in range(4):
        order = torch.randperm(D, generator=generator).to(DEVICE)
        t = {name: x.to(dtype) for name, x in problem.operands.items()}
        t |= {name: t[name][..., order] for name in ("hidden", "weight", "down")}
        plain = problem.head(t).logits(t["hidden"]) / temperature
        worst = max(worst, (plain.log_softmax(-1).double() - z.log_softmax(-1)).abs().max().item())
    return 2 * worst + 8 * torch.finfo(dtype).eps * z.abs().max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, V])
def test_topk(k, temperature, dtype):
    problem = SparseProblem(dtype=dtype)
    problem.head_options, problem.lora = {"logit_scale": 1.7, "softcap": 6.0}, dtype != torch.bfloat16
    t = problem.leaves()  # they require gradients, which the targets must not carry on
    found = linear_topk(t["hidden"], problem.head(t), k, temperature=temperature, workspace_bytes=4096)
    double = {name: x.double() for name, x in problem.operands.items()}
    z = problem.head(double).logits(double["hidden"]) / temperature
    log_probs, ids = z.log_softmax(-1).topk(k)
    budget = log_softmax_error(problem, z, temperature)
    # Ids of a near tie may change places; each must have its own log-probability.
    assert (z.log_softmax(-1).gather(1, found.ids) - log_probs).abs().max() <= 2 * budget
    own = z.log_softmax(-1).gather(1, found.ids)
    for x, y in ((found.log_probs, own), (found.log_sum_exp, z.logsumexp(-1))):
        assert (x.double() - y).abs().max() <= budget
    if k < V:
        assert torch.equal(found.ids, ids)
    assert (found.log_probs.diff(dim=1) <= 0).all()
    assert all(len(row.unique()) == k for row in found.ids)
    assert found.log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert not found.log_probs.requires_grad


def test_shapes_chunks_and_vocab_size():
    problem = SparseProblem(n=6)
    x, w = problem.operands["hidden"], problem.operands["weight"]
    whole = linear_topk(x, w, 4)
    padded = torch.cat([w, torch.full_like(w[:9], 50.0)])
    parts = linear_topk(x.reshape(2, 3, D), padded, 4, vocab_size=V, workspace_bytes=1)
    assert torch.equal(parts.ids, whole.ids.reshape(2, 3, 4))
    torch.testing.assert_close(parts.log_probs, whole.log_probs.reshape(2, 3, 4), rtol=8 * EPS, atol=0)
    torch.testing.assert_close(parts.log_sum_exp, whole.log_sum_exp.reshape(2, 3), rtol=8 * EPS, atol=0)
    assert linear_topk(x[:0], w, 4).ids.shape == (0, 4)


def test_excluded_tokens_are_minus_infinity():
    bias = torch.full((V,), -math.inf, device=DEVICE)
    bias[[3, 8]] = 0
    head = LinearHead(torch.zeros(V, D, device=DEVICE), bias)
    found = linear_topk(torch.zeros(1, D, device=DEVICE), head, 4)
    assert found.log_probs[0].exp().tolist() == pytest.approx([0.5, 0.5, 0, 0], rel=2 * EPS)
    assert found.log_probs[0, 2:].tolist() == [-math.inf] * 2
    assert found.log_sum_exp.item() == pytest.approx(math.log(2), rel=2 * EPS)


def test_the_distance_of_a_certain_token_to_one_is_kept():
    """log p = -2e-9 has no digits left as z - logsumexp(z); the loss reads its tail off it."""
    bias = torch.zeros(V, device=DEVICE)
    bias[3] = 20 + math.log(V - 1)
    head = LinearHead(torch.zeros(V, D, device=DEVICE), bias)
    found = linear_topk(torch.zeros(1, D, device=DEVICE), head, 1)
    truth = bias.double().log_softmax(-1)[3].item()
    # Logits of 25 from each other, in fp32: exp of their rounding.
    assert found.ids.item() == 3 and found.log_probs.item() == pytest.approx(truth, rel=EPS * bias[3].item())


def test_autocast_rounds_operands_once():
    problem = SparseProblem()
    problem.bias = False
    x, w = problem.operands["hidden"], problem.operands["weight"]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = linear_topk(x, w, 5)
    expected = linear_topk(x.bfloat16(), w.bfloat16(), 5)
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.log_probs, expected.log_probs)


@pytest.mark.parametrize("extras", [True, False])
def test_opcheck(extras):
    """With bias and LoRA, and without."""
    shapes = (5, D), (37, D), (37,), (5, 2), (37, 2)
    operands = [torch.randn(s, device=DEVICE) if extras or i < 2 else None for i, s in enumerate(shapes)]
    torch.library.opcheck(torch.ops.okd_kernels.topk.default, (*operands, [1.3, 5.0], 3, 1.5, 37, 2048))


X, W = torch.zeros(4, 8), torch.zeros(32, 8)


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
def test_errors(k, options, message):
    with pytest.raises(ValueError, match=message):
        linear_topk(X, W, k, **options)
