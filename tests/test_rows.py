"""Statistics of parts of a vocabulary merge into those of whole rows, in any order, in every backend."""

from itertools import pairwise

import pytest
import torch
from problems import BACKENDS, DEVICE

from okd_kernels import Objective
from okd_kernels.engine import row_passes
from okd_kernels.rows import STATISTICS, LogitRows, Rows, merge
from okd_kernels.sharding import Vocabulary

N, V = 5, 97
CUTS = [(0, 97), (0, 1, 97), (0, 40, 41, 97), (0, 13, 60, 80, 97)]


def statistics(backend, z, u, labels, temperature, first, stop, dtype):
    """Of columns first to stop."""
    z, u = (x[:, first:stop].to(dtype).clone() for x in (z, u))  # a gradient lies over its logits
    weights = torch.ones(N, 4, dtype=dtype, device=DEVICE)
    sides = [LogitRows(x, Objective("reverse_kl"), x) for x in (z, u)]  # which wants the cross terms
    passes = row_passes(backend, weights, N, Vocabulary(stop - first, V, first), temperature)
    return passes.statistics(Rows(*sides, labels, weights)).double()


def comparable(x, temperature):
    """The same numbers from a top of 0, for what they are taken from is the backend's own affair."""
    top, total, total_at_1, cross, label = x.unbind(-1)
    shift = (top[0] - top[1]) / temperature  # cross: of (u - z) / T, without tops
    mean = cross / total - shift
    return torch.stack([total.log() + top / temperature, total_at_1.log() + top, mean, label])


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_merge_into_whole_rows(backend, cuts, temperature):
    torch.manual_seed(0)
    z, u = (3 * torch.randn(N, V, dtype=torch.float64, device=DEVICE) for _ in range(2))
    u[:, 30:] += 40  # the tops of the parts differ widely
    labels = torch.tensor([0, 41, 96, 13, 60], device=DEVICE)
    log_q, log_p = z / temperature, u / temperature
    truth = torch.stack(
        [
            torch.stack([log_q.logsumexp(-1), log_p.logsumexp(-1)]),
            torch.stack([z.logsumexp(-1), u.logsumexp(-1)]),
            torch.stack([(x.softmax(-1) * (log_p - log_q)).sum(-1) for x in (log_q, log_p)]),
            torch.stack([x.gather(1, labels.unsqueeze(1)).squeeze(1) for x in (z, u)]),
        ]
    )
    parts = torch.stack(
        [statistics(backend, z, u, labels, temperature, first, stop, torch.float32) for first, stop in pairwise(cuts)]
    )
    assert parts.shape == (len(cuts) - 1, 2, N, len(STATISTICS))
    whole = comparable(statistics(backend, z, u, labels, temperature, 0, V, torch.float32), temperature)
    budget = 2 * (whole - truth).abs().max() + 8 * torch.finfo(torch.float32).eps * truth.abs().max()
    found = merge(parts, temperature)
    assert (comparable(found, temperature) - truth).abs().max() <= budget
    for split in range(1, len(parts)):  # any association
        halves = torch.stack([merge(parts[:split], temperature), merge(parts[split:], temperature)])
        assert (comparable(merge(halves, temperature), temperature) - truth).abs().max() <= budget
    order = torch.randperm(len(parts))
    assert (comparable(merge(parts[order], temperature), temperature) - truth).abs().max() <= budget
