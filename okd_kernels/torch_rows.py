"""The row passes in plain PyTorch: the CPU path, and devices without Triton.

Rows are worked off a block at a time, so that on a CPU every pass finds them in its cache (`torch_block`).

Legend: n rows, V vocabulary (of this rank), T temperature; index 0 is the student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from okd_kernels.call import chunk_workspace
from okd_kernels.gemms import chunk_rows, row_stride
from okd_kernels.rows import FLOOR, LOG_0, LogitRows, Rows
from okd_kernels.torch_block import BUFFERS, LN2, Block, Normal, buffer_width, divergence_of

BLOCK_ELEMENTS = 400_000  # logits of one side that are worked on together: 1.6 MB in fp32
ACCELERATOR_BLOCK_ELEMENTS = 1 << 24  # elsewhere than on a CPU: few launches, and 64 MiB for each buffer


def block_rows(vocab_size: int, device: torch.device) -> int:
    """Rows that are worked on together."""
    if device.type == "cpu":
        return max(torch.get_num_threads(), BLOCK_ELEMENTS // vocab_size)
    return max(1, ACCELERATOR_BLOCK_ELEMENTS // vocab_size)


def workspace_size(tokens: int, vocab_size: int, device: torch.device) -> int:
    """Bytes that a dense loss of so many rows takes for its chunks, beside operands and gradients: two buffers of fp32
    logits and, in PyTorch's rows, those of a block."""
    chunk = chunk_rows(tokens, 2 * vocab_size * 4, chunk_workspace(None, device), device)
    buffers = 2 * chunk * row_stride(vocab_size) * 4
    if device.type == "cuda":
        return buffers
    width = buffer_width(vocab_size)
    return buffers + BUFFERS * min(chunk, block_rows(width, device)) * width * 4


def blocks(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


class Part(NamedTuple):
    """The rows of a block."""

    rows: slice  # among those of the chunk
    sides: tuple[LogitRows, LogitRows]
    logits: Sequence[Tensor]  # (n, V) of each side, transformed; zeros in ignored rows
    target: Tensor | None  # (2, n, 1) column of the label (any, where it is none of them)
    here: Tensor | None  # (n, 1) whether it is one of them
    weights: Tensor  # (n, 4)


class TorchRows:
    """`RowPasses` in the dtype of the losses.

    What a block leaves behind are a few numbers a row. They are put together once for all blocks: each operation on
    them costs a call, however few they are.
    """

    def __init__(self, like: Tensor, n: int, vocab_size: int, temperature: float, first: int = 0):
        self.v, self.temperature, self.first, self.dtype = vocab_size, temperature, first, like.dtype
        self.on_cpu = like.device.type == "cpu"
        self.exact = torch.float64 if self.on_cpu else like.dtype
        self.width = buffer_width(vocab_size)
        self.step = min(n, block_rows(self.width, like.device))
        self.memory = like.new_empty(BUFFERS * self.step * self.width)
        self.block = Block(self.memory, self.step, vocab_size, self.width, self.exact)
        self.nothing = like.new_zeros(2, self.step)
        self.careful = not self.on_cpu  # where looking whether it is needed would synchronise

    def run(self, rows: Rows, fill: Callable[[slice], None]) -> tuple[Tensor, Tensor]:
        of_statistics, of_values = [], []
        for part, block in self._parts(rows, fill):
            found = self._read(part, block)
            of_statistics.append(found)
            block.normalise(None)
            of_values.append(self._emit(part, block, None, found[-1]))
        statistics = self._statistics(rows, of_statistics)
        return statistics, self._values(statistics, of_values)

    def statistics(self, rows: Rows) -> Tensor:
        return self._statistics(rows, [self._read(*both) for both in self._parts(rows)])

    def slopes(self, rows: Rows, statistics: Tensor) -> Tensor:
        sums = statistics.new_zeros(len(rows.weights), 2)
        for part, block in self._parts(rows):
            block.normalise(Normal.of(statistics[:, part.rows], block.tops, self.temperature))
            for i, side in enumerate(part.sides):
                slope_sum = None if side.objective is None else divergence_of(side.objective, block, i)[1]
                if slope_sum is not None:
                    sums[part.rows, i] = slope_sum.to(sums.dtype)
        return sums

    def emit(self, rows: Rows, statistics: Tensor, slopes: Tensor | None) -> Tensor:
        of_values = []
        log_sums_at_1 = statistics[..., 0] + statistics[..., 2].log()
        for part, block in self._parts(rows):
            block.normalise(Normal.of(statistics[:, part.rows], block.tops, self.temperature))
            of_part = None if slopes is None else slopes[part.rows]
            of_values.append(self._emit(part, block, of_part, log_sums_at_1[:, part.rows]))
        return self._values(statistics, of_values)

    def _parts(self, rows: Rows, fill: Callable[[slice], None] | None = None) -> Iterator[tuple[Part, Block]]:
        """The rows by blocks, each loaded; `fill` makes the teacher's logits of a block, where that waits for it."""
        n, target, here, ignored, weights = len(rows.weights), None, None, None, rows.weights
        if rows.labels is not None:
            column, here = self._columns(rows.labels)
            here, target = here.unsqueeze(1), column.clamp(0, self.v - 1).expand(2, n).unsqueeze(2)
            ignored = (rows.labels < 0).unsqueeze(1)
            if self.on_cpu and not ignored.any():
                ignored = None
            else:
                weights = weights.masked_fill(ignored, 0)
        for at in blocks(n, self.step):
            if fill is not None:
                fill(at)
            sides = rows.student.at(at), rows.teacher.at(at)
            logits = self._load(sides, None if ignored is None else ignored[at])
            at_label = None if target is None else target[:, at]
            yield Part(at, sides, logits, at_label, None if here is None else here[at], weights[at]), self.block

    def _columns(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) of the labels, and whether they are this rank's."""
        column = labels - self.first
        return column, (column >= 0) & (column < self.v)

    def _load(self, sides: tuple[LogitRows, LogitRows], ignored: Tensor | None) -> list[Tensor]:
        """Fill the block; the logits as they went there."""
        n = len(sides[0].logits)
        if n != self.block.n:
            self.block = Block(self.memory, n, self.v, self.width, self.exact)
        logits = [side.transformed(self.v, self.dtype) for side in sides]
        if ignored is not None:  # they may hold anything
            logits = [x.masked_fill(ignored, 0) for x in logits]
        while True:
            if self.careful:
                logits = [x.clamp_min(FLOOR) for x in logits]
            if self.block.fill(logits, self.temperature, self.careful):
                return logits
            self.careful = True  # later blocks are likely to want it, too

    def _read(self, part: Part, block: Block) -> tuple[Tensor, ...]:
        """(2, n) each: tops, sums, cross, log2 of the label from its top, log-sum-exp at T = 1."""
        at_label = log_sum_at_1 = self.nothing[:, : block.n]
        if part.target is not None:
            at_label = block.columns.gather(2, part.target).squeeze(2)
            if self.temperature != 1.0:
                log_sum_at_1 = torch.stack([x.logsumexp(-1) for x in part.logits])
        return block.tops, block.sums, block.products[..., 0], at_label, log_sum_at_1

    def _statistics(self, rows: Rows, found: list[tuple[Tensor, ...]]) -> Tensor:
        tops, sums, cross, at_label, log_sums_at_1 = (torch.cat(x, 1) for x in zip(*found, strict=True))
        if rows.labels is not None:
            _, here = self._columns(rows.labels)
            at_label = (tops + at_label * (LN2 * self.temperature)).masked_fill(~here, 0)
        sums_at_1 = sums if self.temperature == 1.0 else (log_sums_at_1 - tops).exp()
        return torch.stack([tops, sums, sums_at_1, cross, at_label.to(tops.dtype)], -1)

    def _emit(self, part: Part, block: Block, slopes: Tensor | None, log_sums_at_1: Tensor) -> tuple[Tensor, ...]:
        """Gradients of a block; and, of its values, sums (2, n), products (2, n, 3), tops, offsets, divergences, masses
        that meet log 0 (2, n), and common tops (1, n)."""
        common = torch.mul(*block.exp, out=block.spare[0]).amax(-1)  # 1 where one token is the most probable of both
        lost = divergences = self.nothing[:, : block.n]
        if self.careful:
            pairs = ((block.log_ratio, block.exp[1]), (-block.log_ratio, block.exp[0]))
            lost = torch.stack([torch.where(ratio > LOG_0, mass, 0).amax(-1) for ratio, mass in pairs])
        values: list[Tensor | None] = [None, None]
        last = 0 if part.sides[1].objective is None else 1  # of the sides that learn
        for i, side in enumerate(part.sides):
            if side.objective is None:
                continue
            out, scale = None, part.weights[:, i : i + 1] * side.logit_scale
            if side.gradient is not None:
                direct = side.gradient.dtype == self.dtype and self.temperature == 1.0  # else logits are needed below
                out = side.gradient[:, : self.v] if direct else block.spare_columns[1]
            slope_sum = None if slopes is None else slopes[:, i]
            values[i], _ = divergence_of(side.objective, block, i, slope_sum, scale, out, last=i == last)
            if out is not None:
                self._finish_gradient(part, i, out, log_sums_at_1[i])
        if any(x is not None for x in values):
            divergences = torch.stack(
                [divergences[0].to(self.exact) if x is None else x.to(self.exact) for x in values]
            )
        return block.sums, block.products, block.tops, block.offsets, divergences, lost, common.unsqueeze(0)

    def _finish_gradient(self, part: Part, i: int, gradient: Tensor, log_sum_at_1: Tensor) -> None:
        """Add the cross-entropy's to the divergence's (n, V), go back through the softcap, and store."""
        side, block, x = part.sides[i], self.block, part.logits[i]
        assert side.gradient is not None and side.objective is not None
        if side.objective.ce_weight > 0:
            assert part.target is not None and part.here is not None
            scale = part.weights[:, 2 + i : 3 + i] * side.logit_scale
            q, inverse = block.exp_columns[i], block.inverses[i]
            if self.temperature != 1.0:
                rounded = log_sum_at_1.to(self.dtype).unsqueeze(1)
                q, inverse = (x - rounded).exp_(), (rounded - log_sum_at_1.unsqueeze(1)).exp().to(self.dtype)
            gradient.addcmul_(q, scale * inverse).scatter_add_(1, part.target[0], -scale * part.here)
        if side.softcap is not None:
            gradient.mul_(1 - (x / side.softcap) ** 2)
        out = side.gradient[:, : self.v]
        if gradient.data_ptr() != out.data_ptr():
            out.copy_(gradient)

    def _values(self, statistics: Tensor, found: list[tuple[Tensor, ...]]) -> Tensor:
        columns = (torch.cat(x, 1) for x in zip(*found, strict=True))
        sums, products, tops, offsets, divergences, lost, common = columns
        log_sums, inverses, _ = Normal.of(statistics, tops, self.temperature)
        mass, means = sums * inverses, products * inverses.unsqueeze(2)  # mass: 1 but for the other ranks' part
        reverse, forward = means[..., 0] + (log_sums[0] - log_sums[1]) * mass
        entropies = log_sums * mass - torch.stack((means[0, :, 1], means[1, :, 2]))
        # The largest of a row's `exps` is 1 but for the rounding of its offset, which is less than `LARGE`.
        tolerance = torch.finfo(self.dtype).eps * (4 + offsets.abs().sum(0))
        agrees = common[0] * ((tops - statistics[..., 0]) / self.temperature).sum(0).exp() >= 1 - tolerance
        return torch.stack([*divergences, forward, -reverse, *entropies, agrees, *lost], 1)
