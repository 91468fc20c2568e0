"""x *= factor, by Triton, which reads and writes x only where the factor is not 1.

The upstream gradient of most losses is 1, but the host does not know without waiting for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements that a program works on at a time
PROGRAMS = 1024  # at most: where there is nothing to do, each costs its start


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in range(first, n, tl.num_programs(0) * BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + offsets, mask=offsets < n)
            tl.store(x_ptr + offsets, (x.to(factor.dtype) * factor).to(x_ptr.dtype.element_ty), mask=offsets < n)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """x (any shape, contiguous) times factor (), of x's precision or better, in place. No host synchronisation."""
    n = x.numel()
    with torch.cuda.device_of(x):
        _scale_kernel[(max(1, min(PROGRAMS, triton.cdiv(n, BLOCK))),)](x, factor, n, BLOCK=BLOCK, num_warps=8)
    return x
