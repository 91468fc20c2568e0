"""The matrix products of a chunk, on every device: fp32 logits out of narrower operands, and sums of gradients.

Shapes: c rows of a chunk, V vocabulary, D inner size.
"""

from __future__ import annotations

import torch
from torch import Tensor

HEAD_BLOCK = 1024  # head rows of a GEMM on a CPU: its logits and the block stay in cache, and little is to widen


def has_fast_gemm(dtype: torch.dtype, device: str | torch.device) -> bool:
    """Whether products of matrices of this dtype are worth it on this device.

    False for 16-bit dtypes on a CPU without instructions for them: PyTorch's GEMMs are loops there, many times as slow
    as those of widened operands. The losses widen theirs, and `okd` its models.
    """
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if name is None or torch.device(device).type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


def logits_into(
    hidden: Tensor,  # (c, D)
    weight: Tensor,  # (V, D)
    out: Tensor,  # (c, V), fp32 also for 16-bit operands: 16-bit logits would ruin the gradients
) -> None:
    """out = hidden @ weight.T. Of the CPU's fp32 GEMMs the process decides how precise they are (`torch.backends`)."""
    if hidden.dtype == out.dtype and hidden.device.type != "cpu":
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.device.type == "cuda" and out.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:  # where operands are narrower, no GEMM has this output: they are widened, the weight a block at a time
        hidden = hidden.to(out.dtype)
        for block, columns in zip(weight.split(HEAD_BLOCK), out.split(HEAD_BLOCK, dim=1), strict=True):
            torch.mm(hidden, block.to(out.dtype).t(), out=columns)


def accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b, summed over chunks in total's dtype; `first` overwrites what total holds."""
    beta = 0 if first else 1
    if not has_fast_gemm(a.dtype, a.device):
        _accumulate_widened(total, a, b, beta)
    elif a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.device.type == "cuda" and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))


def _accumulate_widened(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """The same with fp32 operands, of which a block of `a` and its part of `b` exist at a time."""
    wide = total.float()
    for out, of_a in zip(wide.split(HEAD_BLOCK), a.split(HEAD_BLOCK), strict=True):
        for i, (x, y) in enumerate(zip(of_a.split(HEAD_BLOCK, dim=1), b.split(HEAD_BLOCK), strict=True)):
            torch.addmm(out, x.float(), y.float(), beta=beta if i == 0 else 1, out=out)
    if wide is not total:
        total.copy_(wide)


def chunk_rows(n: int, row_bytes: int, workspace_bytes: int, device: torch.device) -> int:
    """Rows of a chunk: as many as the workspace holds, evened out so that the last chunk is no remnant.

    Of several on a GPU a multiple of 128, the rows of a GEMM's tile, where that many fit.
    """
    most = max(1, workspace_bytes // row_bytes)
    if n <= most:
        return n
    tile = 1 if device.type == "cpu" or most < 128 else 128
    chunks = -(-n // (most // tile * tile))
    return -(-n // (chunks * tile)) * tile


def row_stride(vocab_size: int) -> int:
    """Elements between the logits of two rows: a multiple of 16, for alignment, but of no 4 KiB in fp32.

    Else the same columns of all rows would share few cache sets, which costs a CPU a tenth of all GEMMs.
    """
    width = -(-vocab_size // 16) * 16
    return width if width % 1024 else width + min(512, max(16, width // 8192 * 16))
