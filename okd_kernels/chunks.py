"""The chunk loop: two GEMMs to logits, one row kernel, the backward GEMMs.

A chunk's logits live in two buffers that are allocated once. The row backend overwrites them with gradients, which feed
the backward GEMMs right away: the forward pass makes the gradients, no GEMM is done twice, and the memory beyond inputs
and returned gradients does not grow with N.

Shapes: N tokens, V vocabulary, D hidden size of either model, c rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from okd_kernels.divergences import Objective
from okd_kernels.memory import workspace
from okd_kernels.rows import Side
from okd_kernels.torch_rows import torch_rows

HEAD_BLOCK = 1024  # head rows of a GEMM on a CPU: its logits and the block stay in cache, and little is to widen


class Model(NamedTuple):
    """One side's operands, and the gradients to fill (None: not wanted)."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    low: Tensor | None  # (N, r) scaled hidden states after a LoRA's A
    up: Tensor | None  # (V, r) its B
    logit_scale: float
    softcap: float | None
    objective: Objective | None
    scale: Tensor | None  # () factor of the sums, still to be multiplied; None: the rows' factors hold it
    grad_hidden: Tensor | None = None  # (N, D), hidden's dtype or wider
    grad_weight: Tensor | None = None  # (V, D), fp32 or wider; rows beyond vocab_size are not written
    grad_bias: Tensor | None = None  # (V,), likewise
    grad_low: Tensor | None = None  # (N, r), as grad_hidden
    grad_up: Tensor | None = None  # (V, r), as grad_weight

    @property
    def learns(self) -> bool:
        gradients = (self.grad_hidden, self.grad_weight, self.grad_bias, self.grad_low, self.grad_up)
        return any(gradient is not None for gradient in gradients)


def row_backend(name: str) -> Callable[..., None]:
    """`torch_rows`, or Triton's, imported only here since Triton is optional."""
    if name == "torch":
        return torch_rows
    from okd_kernels.row_kernel import triton_rows

    return triton_rows


@contextmanager
def bf16_products() -> Iterator[None]:
    """Let a CPU's fp32 GEMMs multiply in bf16 and add in fp32, which widened bf16 operands lose nothing by.

    It is a setting of the process: fp32 GEMMs of other threads may round their operands meanwhile. Only its default is
    changed, since any other is somebody's, and where it was set (here or one level above) could not be restored.
    """
    setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    if setting.fp32_precision != "none":
        yield
        return
    try:
        setting.fp32_precision = "bf16"
        yield
    finally:
        setting.fp32_precision = "none"


def has_fast_gemm(dtype: torch.dtype, device: str | torch.device) -> bool:
    """Whether products of matrices of this dtype are worth it on this device.

    False for 16-bit dtypes on a CPU without instructions for them: PyTorch's GEMMs are loops there, many times as slow
    as those of widened operands. The losses widen theirs, and `okd` its models.
    """
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if name is None or torch.device(device).type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


def _project(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = hidden @ weight.T, `out` being fp32 also for 16-bit operands: 16-bit logits would ruin the gradients."""
    if hidden.dtype == out.dtype and hidden.device.type != "cpu":
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.device.type == "cuda" and out.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:  # where operands are narrower, no GEMM has this output: they are widened, the weight a block at a time
        with bf16_products() if hidden.dtype == torch.bfloat16 else nullcontext():
            hidden = hidden.to(out.dtype)
            for block, columns in zip(weight.split(HEAD_BLOCK), out.split(HEAD_BLOCK, dim=1), strict=True):
                torch.mm(hidden, block.to(out.dtype).t(), out=columns)


def project(model: Model, rows: slice, buffer: Tensor, v: int) -> Side:
    """The side that has the rows' logits for the first v ids, a LoRA included, in the buffer (>= c, >= v).

    Its gradient goes there, too: a 16-bit one takes the first half of its row.
    """
    logits = buffer[: rows.stop - rows.start]
    out = logits[:, :v]
    _project(model.hidden[rows], model.weight[:v], out=out)
    if model.low is not None and model.up is not None:
        low, up = model.low[rows], model.up[:v]
        if low.device.type == "cpu" or out.dtype != torch.float32:
            low, up = low.to(out.dtype), up.to(out.dtype)
        _accumulate(out, low, up.t(), first=False)
    gradient = logits.view(model.hidden.dtype)[:, : logits.shape[1]] if model.learns else None
    return Side(logits, model.objective, gradient, model.bias, model.logit_scale, model.softcap)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b, summed over chunks in total's dtype."""
    if not has_fast_gemm(a.dtype, a.device):
        _accumulate_widened(total, a, b, first)
    elif a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif a.device.type == "cuda" and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total.add_(torch.mm(a, b))


def _accumulate_widened(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """The same with fp32 operands, of which a block of `a` and its part of `b` exist at a time."""
    wide = total.float()
    for out, of_a in zip(wide.split(HEAD_BLOCK), a.split(HEAD_BLOCK), strict=True):
        for i, (x, y) in enumerate(zip(of_a.split(HEAD_BLOCK, dim=1), b.split(HEAD_BLOCK), strict=True)):
            torch.addmm(out, x.float(), y.float(), beta=0 if first and i == 0 else 1, out=out)
    if wide is not total:
        total.copy_(wide)


def backward(model: Model, rows: slice, gradient: Tensor, labels: Tensor | None) -> None:
    """The backward GEMMs of one chunk; gradient: (c, V) of its logits."""
    v, first = gradient.shape[1], rows.start == 0
    ignored = None if labels is None else (labels[rows] < 0).unsqueeze(1)
    for hidden, weight, grad_hidden, grad_weight in (
        (model.hidden, model.weight, model.grad_hidden, model.grad_weight),
        (model.low, model.up, model.grad_low, model.grad_up),
    ):
        if hidden is None or weight is None:
            continue
        if grad_hidden is not None:
            _accumulate(grad_hidden[rows], gradient, weight[:v], first=True)
        if grad_weight is not None:
            x = hidden[rows] if ignored is None else hidden[rows].masked_fill(ignored, 0)  # they may hold NaN
            _accumulate(grad_weight[:v], gradient.t(), x, first)
    if model.grad_bias is not None:
        total = gradient.sum(0, dtype=model.grad_bias.dtype)
        model.grad_bias[:v] = total if first else model.grad_bias[:v] + total


def chunk_rows(n: int, row_bytes: int, workspace_bytes: int) -> int:
    """Rows of a chunk: as many as the workspace holds, evened out so that the last chunk is no remnant."""
    most = max(1, min(n, workspace_bytes // row_bytes))
    chunks = -(-n // most)
    return -(-n // chunks)


def row_stride(vocab_size: int) -> int:
    """Elements between the logits of two rows: a multiple of 16, for alignment, but of no 4 KiB in fp32.

    Else the same columns of all rows would share few cache sets, which costs a CPU a tenth of all GEMMs.
    """
    width = -(-vocab_size // 16) * 16
    return width if width % 1024 else width + min(512, max(16, width // 8192 * 16))


def run_chunks(
    models: tuple[Model, Model],  # student, teacher
    labels: Tensor | None,  # (N,) int64, negative: ignored
    row_scales: Tensor,  # (N, 2) factor of each row's gradients, in the chunk already: they feed 16-bit GEMMs
    losses: Tensor,  # (N, 2): written
    statistics: Tensor,  # (N, len(STATISTICS)): written
    *,
    temperature: float,
    teacher_share: float = 1.0,
    vocab_size: int,
    workspace_bytes: int,
    backend: str,
) -> None:
    """Losses, statistics and gradients of N >= 1 tokens. No host synchronisation."""
    n, work = losses.shape[0], row_backend(backend)
    width = row_stride(vocab_size)
    chunk = chunk_rows(n, 2 * vocab_size * losses.element_size(), workspace_bytes)  # a power of two stays one
    buffers = workspace((chunk, width), (chunk, width), like=losses)
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        sides = [project(model, rows, buffer, vocab_size) for model, buffer in zip(models, buffers, strict=True)]
        work(
            *sides,
            None if labels is None else labels[rows],
            row_scales[rows],
            losses[rows],
            statistics[rows],
            vocab_size=vocab_size,
            temperature=temperature,
            teacher_share=teacher_share,
        )
        for model, side in zip(models, sides, strict=True):
            if side.gradient is not None:
                backward(model, rows, side.gradient[:, :vocab_size], labels)
