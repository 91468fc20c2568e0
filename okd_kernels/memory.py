"""The chunk buffers of the CPU, kept from call to call.

A fresh 200 MB costs 50 thousand page faults, as much time as all row mathematics of a step. On a GPU the caching
allocator keeps freed memory anyway; here each thread keeps one buffer, as large as the largest call has needed, which
`workspace_bytes` bounds.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_kept = threading.local()


def workspace(*shapes: tuple[int, ...], like: Tensor) -> list[Tensor]:
    """Uninitialised tensors of `like`'s dtype and device, aligned to 64 bytes, valid until the thread's next call."""
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


def release() -> None:
    """Give this thread's buffer back."""
    _kept.buffer = None
