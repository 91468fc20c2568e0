"""Dot products of each token with a few rows of a matrix: logits of chosen ids, for losses that need no others.

Shapes: N tokens, V vocabulary, D hidden size, K ids of a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24  # of the gathered rows (c, K, D) that exist at a time: 64 MiB in fp32


def gathered_products(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (N, K) int64
) -> Tensor:
    """out[n, k] = hidden[n] . weight[ids[n, k]], (N, K), in fp32 (fp64 for fp64 operands), also under autocast.

    The gathered rows, (N, K, D), exist a chunk of tokens at a time, in forward and in backward.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _GatheredProducts.apply(hidden, weight, ids)


class _GatheredProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        out = hidden.new_empty(ids.shape, dtype=dtype)
        for rows in _chunks(ids, hidden.shape[1]):
            out[rows] = torch.linalg.vecdot(weight[ids[rows]].to(dtype), hidden[rows].to(dtype).unsqueeze(1))
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = upstream
        hidden, weight, ids = ctx.saved_tensors
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=gradient.dtype) if needs_weight else None
        for rows in _chunks(ids, hidden.shape[1]):
            g = gradient[rows].unsqueeze(2)  # (c, K, 1)
            if grad_hidden is not None:
                grad_hidden[rows] = (g * weight[ids[rows]]).sum(1).to(hidden.dtype)
            if grad_weight is not None:
                parts = g * hidden[rows].unsqueeze(1)  # (c, K, D)
                grad_weight.index_add_(0, ids[rows].flatten(), parts.flatten(0, 1).to(grad_weight.dtype))
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _chunks(ids: Tensor, width: int) -> Iterator[slice]:
    n, k = ids.shape
    step = max(1, CHUNK_ELEMENTS // max(1, k * width))
    return (slice(start, start + step) for start in range(0, n, step))
