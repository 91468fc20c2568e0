"""Forward and backward of every candidate under pytest-benchmark: `pytest benchmarks/ --benchmark-only`.

Small shapes, for watching a change; `python -m benchmarks.loss` makes the comparison that is reported.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks import peers
from benchmarks.loss import PRESETS, Candidate, step

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
CASES = [(name, divergence) for divergence in peers.DIVERGENCES for name in ("ours", *peers.names(divergence))]
ON_GPUS = {"liger_fused": "triton", "liger_cute": "cutlass.cute", "liger_cutile": "cuda.tile"}
PACKAGES = {"liger_chunked": "liger_kernel", "trl_chunked": "trl", "orda": "orda_kernel"}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "divergence"), CASES)
def test_speed(benchmark, name, divergence, device):
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name])
    if name in ON_GPUS:
        pytest.importorskip("liger_kernel")
        pytest.importorskip(ON_GPUS[name])
        if device == "cpu":
            pytest.skip("these kernels need a GPU")
    case = replace(PRESETS["tiny"], device=device, divergence=divergence)
    candidate = Candidate(name, name)
    operands = case.operands()
    loss, tensors = candidate.loss(operands[4]), candidate.leaves(operands, case)

    def run():
        gradients = step(loss, tensors, divergence)
        if device == "cuda":
            torch.cuda.synchronize()
        return gradients

    gradients = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    assert all(x is not None and x.isfinite().all() for x in gradients[:2])
