"""Memory of the CPU, kept from call to call.

A fresh 200 MB costs 50 thousand page faults, as much time as all row mathematics of a step. On a GPU the caching
allocator keeps freed memory anyway. Here each thread keeps one buffer for chunks, as large as the largest call has
needed, which `workspace_bytes` bounds; and the memory of large weights' gradients, which the next ones of their size
take over once nobody holds them: training needs them again in the next step. `release` gives all of it back.
"""

from __future__ import annotations

import math
import mmap
import threading
import weakref

import torch
from torch import Tensor

KEPT_FROM = 16 << 20  # bytes; smaller memory malloc keeps by itself
PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}  # not on Windows

_kept = threading.local()


def workspace(*shapes: tuple[int, ...], like: Tensor) -> list[Tensor]:
    """Uninitialised tensors of `like`'s dtype and device, aligned to 64 bytes, valid until this thread calls again."""
    sizes = [-(-math.prod(shape) // 16) * 16 for shape in shapes]
    if like.device.type == "cpu":
        n_bytes = sum(sizes) * like.element_size()
        buffer = getattr(_kept, "buffer", None)
        if buffer is None or buffer.numel() < n_bytes:
            _kept.buffer = None  # before the new one, not beside it
            with torch.inference_mode(False):  # an inference tensor could not be written to in training
                _kept.buffer = buffer = torch.empty(n_bytes, dtype=torch.uint8, device=like.device)
        flat = buffer[:n_bytes].view(like.dtype)
    else:
        flat = like.new_empty(sum(sizes))
    return [x[: math.prod(shape)].view(shape) for x, shape in zip(flat.split(sizes), shapes, strict=True)]


def empty_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised and contiguous, of x's shape and device: for the gradient of a weight. Its storage cannot grow."""
    n_bytes = x.numel() * dtype.itemsize
    if x.device.type != "cpu" or n_bytes < KEPT_FROM or type(x) not in (Tensor, torch.nn.Parameter):  # FakeTensor
        return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    kept = _kept.__dict__.setdefault("gradients", [])  # memory, and a reference to the lease that its tensor holds
    memory = next((memory for memory, lease in kept if lease() is None and len(memory) == n_bytes), None)
    if memory is None:  # nor is what else is unused of any use
        kept[:] = [(other, lease) for other, lease in kept if lease() is not None]
        memory = mmap.mmap(-1, n_bytes, **PRIVATE)
    kept[:] = [(other, lease) for other, lease in kept if other is not memory]
    lease = memoryview(memory)
    kept.append((memory, weakref.ref(lease)))
    with torch.inference_mode(False):
        return torch.frombuffer(lease, dtype=dtype).view(x.shape)


def release() -> None:
    """Give this thread's memory back, but for gradients that somebody holds."""
    _kept.buffer = None
    _kept.gradients = []
