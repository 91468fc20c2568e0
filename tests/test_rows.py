"""The parts of a call: statistics of pieces of the vocabulary, chunk sizes, strides, factors, scaling."""

import itertools
import math

import pytest
import torch
from problems import BACKENDS, DEVICE

from okd_kernels import Objective, row_kernels
from okd_kernels.gemms import chunk_rows, row_stride
from okd_kernels.row_kernels import TritonRows, scale_
from okd_kernels.rows import LogitRows, Rows, merge
from okd_kernels.sides import Model, wide
from okd_kernels.torch_rows import TorchRows

PIECES = (0, 50, 51, 100, 131)
EPS = torch.finfo(torch.float32).eps


def statistics(z, u, labels, columns, temperature, backend):
    """Of a part of the vocabulary, as a rank would compute them that holds these columns."""
    n, v = len(z), columns.stop - columns.start
    objective = Objective("reverse_kl", ce_weight=0.5)
    sides = (LogitRows(x[:, columns].contiguous(), objective, torch.empty(n, v, device=DEVICE)) for x in (z, u))
    rows = Rows(*sides, labels, torch.ones(n, 4, device=DEVICE))
    if backend == "triton":
        return TritonRows(v, temperature, columns.start).statistics(rows)
    return TorchRows(rows.weights, n, v, temperature, columns.start).statistics(rows)


def meaning(found, temperature):
    """What statistics (2, n, 5) say, whatever top they are taken from: (2, n) each."""
    top, total, total_at_1, cross, label = found.double().unbind(-1)
    return {
        "log_sum_exp": top / temperature + total.log(),
        "log_sum_exp_at_1": top + total_at_1.log(),
        "mean_difference": cross / total + (top[1] - top[0]) / temperature,
        "label": label,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("level", [0.0, 40.0])
def test_statistics_of_pieces_merge_to_those_of_whole_rows(level, temperature, backend):
    """In any association; labels lie in each of the pieces, and one row is ignored."""
    g = torch.Generator().manual_seed(0)
    z, u = (torch.randn(2, 6, 131, generator=g) * 3).to(DEVICE)
    z[:, 60:] += level  # tops of pieces far apart, the other way round for the teacher
    u[:, 60:] -= level
    labels = torch.tensor([3, 50, 51, 130, -1, 49], device=DEVICE)
    counted = labels >= 0
    columns = [slice(*ends) for ends in itertools.pairwise(PIECES)]
    parts = [statistics(z, u, labels, part, temperature, backend) for part in columns]

    def joined(*parts):
        return merge(torch.stack(parts), temperature)

    a, b, c, d = parts
    associations = [
        joined(a, b, c, d),
        joined(joined(joined(a, b), c), d),
        joined(a, joined(b, joined(c, d))),
        joined(joined(a, b), joined(c, d)),
        joined(joined(d, a), joined(c, b)),
    ]
    whole = meaning(statistics(z, u, labels, slice(0, 131), temperature, backend), temperature)
    x = torch.stack([z, u]).double()
    q = (x / temperature).softmax(-1)
    truth = {
        "log_sum_exp": (x / temperature).logsumexp(-1),
        "log_sum_exp_at_1": x.logsumexp(-1),
        "mean_difference": (q * (x[1] - x[0])).sum(-1) / temperature,
        "label": x.gather(2, labels.clamp_min(0).expand(2, 6).unsqueeze(2)).squeeze(2),
    }
    for name, expected in truth.items():
        expected = expected[:, counted]
        error = (whole[name][:, counted] - expected).abs().max()
        for found in associations:
            budget = 2 * error + 8 * EPS * expected.abs().max()
            assert (meaning(found, temperature)[name][:, counted] - expected).abs().max() <= budget, name


@pytest.mark.parametrize("vocab_size", [1, 131, 1024, 32768, 50257, 128256, 131072, 262144, 524288])
def test_rows_of_logits_do_not_share_cache_sets(vocab_size):
    stride = row_stride(vocab_size)
    assert vocab_size <= stride <= 1.02 * vocab_size + 16
    assert stride % 16 == 0 and stride % 1024 != 0


GPU_CHUNKS = [(6277, 4096, 3200), (6277, 6277, 6277), (6277, 1600, 1280), (6277, 100, 100), (300, 1000, 300)]


@pytest.mark.parametrize("n, most, expected", GPU_CHUNKS)
def test_chunks_on_a_gpu_are_of_whole_tiles(n, most, expected):
    """Multiples of 128 where the workspace holds that many and not all rows; no last chunk of a few."""
    assert chunk_rows(n, 10, 10 * most, torch.device("cuda")) == expected


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300, 6277, 100_000])
@pytest.mark.parametrize("most", [1, 100, 128, 1000, 4096, 10**6])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chunks_fit_the_workspace_and_are_even(device, n, most):
    """As few as the workspace allows, and of their number the smallest."""
    tile = 1 if device == "cpu" or most < 128 else 128
    rows = chunk_rows(n, 10, 10 * most + 9, torch.device(device))
    chunks = -(-n // rows)
    if n <= most:
        assert rows == n
    else:
        assert rows <= most and rows % tile == 0
        assert chunks == -(-n // (most // tile * tile)) and (rows - tile) * chunks < n


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_factors_of_rows_and_sums(dtype):
    """Together weights * scale; only fp16's range wants a factor of the sums, which costs one more pass over dW."""
    weights, scale = torch.tensor([0.0, 1e-3, 2.0], dtype=wide(dtype)), torch.tensor(1e-6, dtype=wide(dtype))
    model = object.__new__(Model)
    model.gradient_dtype, model.wanted, model.strength = dtype, {"student_hidden"}, 3.0
    rows = model.row_factors(weights, scale)
    assert (model.deferred_scale is None) == (dtype != torch.float16)
    whole = rows if model.deferred_scale is None else rows * model.deferred_scale
    torch.testing.assert_close(whole, weights * scale, rtol=8 * torch.finfo(wide(dtype)).eps, atol=0)
    if dtype == torch.float16:
        assert (rows * model.strength).max() <= torch.finfo(dtype).max


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scaling_by_triton(dtype, monkeypatch):
    """Every element once, also where each program has several blocks; a factor of 1 leaves all as it is."""
    for name, value in (("SCALE_BLOCK", 64), ("SCALE_PROGRAMS", 3)):
        monkeypatch.setattr(row_kernels, name, value)
    x = torch.randn(19, 37, dtype=dtype, device=DEVICE)
    factors = torch.tensor([1.0, 1 / 3, math.nan], dtype=wide(dtype), device=DEVICE)
    for factor in factors:
        # Triton's interpreter truncates to bf16.
        eps = torch.finfo(dtype).eps if dtype == torch.bfloat16 and DEVICE == "cpu" else 0
        torch.testing.assert_close(scale_(x.clone(), factor), (x * factor).to(dtype), rtol=eps, atol=0, equal_nan=True)
    assert torch.equal(scale_(x.clone(), factors[0]), x)
    assert scale_(x[:0].clone(), factors[1]).shape == (0, 37)
