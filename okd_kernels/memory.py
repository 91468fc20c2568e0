"""Large allocations on the CPU, in huge pages where Linux has them.

A fresh gigabyte costs 250 thousand page faults, more than a tenth of a second for each 300 MB: of a distillation step
on a CPU they took as much time as all row mathematics. In pages of 2 MiB they disappear. Nothing is kept for later: the
memory goes back to the system with the tensor.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

HUGE_BYTES = 4 << 20  # allocations from here on; NumPy's threshold for the same


def empty(*shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)`."""
    # A tracer's tensors are subclasses, and have no memory.
    dtype = dtype or like.dtype
    size = torch.Size(shape).numel() * dtype.itemsize
    if type(like) is not Tensor or like.device.type != "cpu" or size < HUGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # as malloc's: a fork copies on write
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
