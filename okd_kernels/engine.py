"""The chunk loop, which every loss runs through: GEMMs to logits, row passes, the backward GEMMs.

A chunk's logits live in two buffers that are allocated once. The row passes overwrite them with gradients, which feed
the backward GEMMs right away: the forward pass makes the gradients, no GEMM is done twice, and the memory beyond inputs
and returned gradients does not grow with N.

Legend: N tokens, V vocabulary (of this rank), D inner size of either model's head, c rows of a chunk.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from okd_kernels.cpu import workspace
from okd_kernels.gemms import chunk_rows, row_stride
from okd_kernels.rows import LogitRows, RowPasses, Rows, merge, needs_slope_sum
from okd_kernels.sharding import Vocabulary
from okd_kernels.sides import Side
from okd_kernels.targets import Target
from okd_kernels.torch_rows import TorchRows


def row_passes(backend: str, like: Tensor, n: int, vocabulary: Vocabulary, temperature: float) -> RowPasses:
    """PyTorch's, or Triton's, which is imported only here since Triton is optional."""
    if backend == "torch":
        return TorchRows(like, n, vocabulary.size, temperature, vocabulary.first)
    from okd_kernels.row_kernels import TritonRows

    return TritonRows(vocabulary.size, temperature, vocabulary.first)


def run_chunks(
    student: Side,
    target: Target,
    labels: Tensor | None,  # (N,) ids in the whole vocabulary, negative: ignored
    weights: Tensor,  # (N, 4) factors of the gradients (`Rows.weights`), in the chunk already: they feed 16-bit GEMMs
    vocabulary: Vocabulary,
    *,
    temperature: float,
    workspace_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Statistics (2, N, 5) and values (N, 9) of N >= 1 tokens (`rows.finish` makes losses of them), of whole rows; and
    the gradients of `student` and `target`, of this rank's part. No host synchronisation."""
    n, v, group = len(weights), vocabulary.size, vocabulary.group
    widest = max(v, vocabulary.widest)  # all ranks take the same chunks
    chunk = chunk_rows(n, 2 * widest * weights.element_size(), workspace_bytes, weights.device)
    passes = row_passes(backend, weights, chunk, vocabulary, temperature)
    given = [isinstance(side, Side) and side.weight is None for side in (student, target)]
    chunk = n if all(given) else chunk
    buffers = workspace(*((0 if of_side else chunk, row_stride(v)) for of_side in given), like=weights)
    found = []
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        z, u = (side.project(rows, buffer, v) for side, buffer in zip((student, target), buffers, strict=True))
        of = Rows(z, target.takes(u), None if labels is None else labels[rows], weights[rows])

        def fill(at: slice, start: int = start, z: LogitRows = z, u: LogitRows = u) -> None:
            target.fill(slice(start + at.start, start + at.stop), z.at(at), u.at(at))

        if group is None:
            found.append(passes.run(of, fill))
        else:
            fill(slice(0, len(of.weights)))
            found.append(_run_sharded(passes, of, vocabulary, temperature))
        for side, of_side in ((student, z), (target, u)):
            if isinstance(side, Side) and of_side.gradient is not None:
                side.accumulate_gradients(rows, of_side.gradient[:, :v], labels)
    statistics, values = (torch.cat(x, dim) for x, dim in zip(zip(*found, strict=True), (1, 0), strict=True))
    if group is not None:
        dist.all_reduce(values, group=group)
    return statistics, values


def _run_sharded(passes: RowPasses, rows: Rows, vocabulary: Vocabulary, temperature: float) -> tuple[Tensor, Tensor]:
    """The passes one by one, each reduced over the ranks before the next."""
    statistics, slopes = merge(vocabulary.gathered(passes.statistics(rows)), temperature), None
    if any(map(needs_slope_sum, rows.sides)):
        slopes = passes.slopes(rows, statistics)
        dist.all_reduce(slopes, group=vocabulary.group)
    return statistics, passes.emit(rows, statistics, slopes)
