"""Soft ranks against what defines a projection, their slope against finite differences, and rank correlation."""

import pytest
import torch

from okd.ranking import soft_rank, spearman


def problem(k, n_rows=40, spread=1.0):
    """Scores of which each row has another number, at any place; and which exist."""
    scores = spread * torch.randn(n_rows, k, dtype=torch.float64)
    valid = torch.rand(n_rows, k).argsort(1) < torch.randint(1, k + 1, (n_rows, 1))
    return scores + 50, valid


@pytest.mark.parametrize("k, spread", [(2, 0.5), (3, 1.0), (6, 0.2), (10, 1.0), (10, 5.0)])
def test_soft_ranks_are_the_projection_onto_the_permutahedron(k, spread):
    """A point x of a convex set is the projection of s if and only if (s - x) . (v - x) <= 0 for each of its corners v.

    Of all permutations v of 1..n, the one in the order of s - x has the largest product with it.
    """
    scores, valid = problem(k, spread=spread)
    ranks = soft_rank(scores, valid)
    assert (ranks[~valid] == 0).all()
    pooled = 0
    for s, x, exists in zip(scores, ranks, valid, strict=True):
        s, x = s[exists], x[exists]
        corners = torch.arange(1, len(s) + 1, dtype=torch.float64)
        falling = x.sort(descending=True).values.cumsum(0)
        assert (falling <= corners.flip(0).cumsum(0) + 1e-9).all(), "inside: no few ranks add up to more than the top's"
        assert falling[-1].item() == pytest.approx(corners.sum().item())
        towards = s - x
        assert (towards.sort().values @ corners - towards @ x).abs() < 1e-9
        pooled += int(((x - x.round()).abs() > 1e-6).any())
    assert pooled > (len(scores) // 4 if k > 3 and spread <= 1 else 0), "the problem must show ranks that are shared"


def test_soft_ranks_of_scores_far_apart_are_hard_and_flat():
    scores = torch.tensor([[30.0, 10.0, 50.0, 40.0, 99.0]], requires_grad=True)
    ranks = soft_rank(scores, torch.tensor([[True, True, True, True, False]]))
    assert ranks.tolist() == [[2.0, 1.0, 4.0, 3.0, 0.0]]
    (ranks * torch.arange(5.0)).sum().backward()
    assert (scores.grad == 0).all()


def test_scores_that_are_equal_share_their_ranks():
    assert soft_rank(torch.full((1, 4), 7.0), torch.ones(1, 4, dtype=torch.bool)).tolist() == [[2.5] * 4]


@pytest.mark.parametrize("k", [2, 5, 10])
def test_slope_of_soft_ranks_and_correlation(k):
    scores, valid = problem(k, n_rows=6, spread=0.7)
    others, _ = problem(k, n_rows=6)
    scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: soft_rank(x, valid), scores, eps=1e-7, atol=1e-6)
    valid[:, 0] = True

    def loss(x):
        return spearman(soft_rank(x, valid), soft_rank(others, valid), valid)[valid.sum(1) > 1]

    assert torch.autograd.gradcheck(loss, scores, eps=1e-7, atol=1e-6)


def test_correlation_of_hard_ranks_is_spearmans_rho():
    """1 - 6 sum d^2 / (n (n^2 - 1)), over the ranks that exist."""
    a, b = (torch.stack([torch.randperm(7) + 1.0 for _ in range(20)]) for _ in range(2))
    a, b = (torch.cat((x, torch.randn(20, 3)), 1) for x in (a, b))
    valid = torch.arange(10).expand(20, 10) < 7
    d = (a - b)[:, :7]
    torch.testing.assert_close(spearman(a, b, valid), 1 - 6 * d.square().sum(1) / (7 * 48))


def test_correlation_of_a_constant_is_zero_without_nan():
    a = torch.full((1, 4), 2.5, requires_grad=True)
    value = spearman(a, torch.arange(4.0).unsqueeze(0), torch.ones(1, 4, dtype=torch.bool))
    value.sum().backward()
    assert value.item() == 0 and a.grad.isfinite().all()
