"""Ranks that can be differentiated, and their correlation, for a few scores a row.

`torchsort` computes the same for any length, but is compiled when it is installed. For the ten scores that a ranking
loss looks at, the projection has a closed form in a handful of tensor operations.

Shapes: N rows, K scores of a row, of which `valid` says which exist.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def soft_rank(
    scores: Tensor,  # (N, K)
    valid: Tensor,  # (N, K) bool
) -> Tensor:
    """Ranks (N, K), 1 for the lowest of a row's n valid scores and n for the highest, 0 where there is no score.

    The Euclidean projection of the scores onto the permutahedron of (n, ..., 1): soft ranks with L2 regularisation of
    strength 1 (Blondel et al., Fast Differentiable Sorting and Ranking, arXiv 2002.08871, Prop. 3). Scores further
    apart than 1 get the hard ranks, and no gradient. With s sorted to fall and w = (n, ..., 1), it is s - v, v the
    falling isotonic regression of y = s - w, here by its min-max formula, in O(K^2) memory for each row:

        v_i = min_{j <= i} max_{k >= i} mean(y_j, ..., y_k)
    """
    at = torch.arange(scores.shape[1], device=scores.device)
    n = valid.sum(1, keepdim=True)
    s, order = scores.masked_fill(~valid, -torch.inf).sort(1, descending=True)
    exists = at < n
    s = torch.where(exists, s - s[:, :1].detach(), 0)  # ranks do not see a shift; the sums below would
    y = torch.where(exists, s - (n - at), 0)
    sums = nn.functional.pad(y.cumsum(1), (1, 0))
    j, k = at.unsqueeze(1), at
    means = (sums[:, 1:].unsqueeze(1) - sums[:, :-1].unsqueeze(2)) / (k - j + 1).clamp_min(1)  # (N, K, K) over j to k
    means = means.masked_fill((k < j) | ~exists.unsqueeze(1), -torch.inf)
    largest = means.flip(2).cummax(2).values.flip(2)  # (N, K, K) over k >= i
    v = largest.masked_fill(k < j, torch.inf).amin(1)
    return torch.zeros_like(s).scatter(1, order, torch.where(exists, s - v, 0))


def spearman(
    a: Tensor,  # (N, K) ranks
    b: Tensor,  # (N, K)
    valid: Tensor,  # (N, K) bool
) -> Tensor:
    """Correlation (N,) of two rows of ranks, -1 to 1; 0 where one of them is constant."""
    n = valid.sum(1, keepdim=True).clamp_min(1)
    a, b = (torch.where(valid, x - torch.where(valid, x, 0).sum(1, keepdim=True) / n, 0) for x in (a, b))
    return nn.functional.cosine_similarity(a, b, dim=1)
