"""The bare GEMMs that no method without approximation can avoid, and how everything is timed.

On a GPU a measurement queues each run several times, as a trainer does, after one more that is not timed: the host's
overhead hides, and the clocks are those of a GPU at this very work, not at what came before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from okd_kernels.gemms import HEAD_BLOCK, has_fast_gemm, row_stride

QUEUED = 4  # timed runs of one measurement on a GPU
FLOOR_CHUNKS = (256, 512, 1024, 2048, 4096)
PARTS = ("student logits", "teacher logits", "student dX", "student dW", "teacher dX")


def seconds(run: Callable[[], Any], device: str) -> float:
    """Wall-clock time of one call; on a GPU see `queued_seconds`."""
    if device == "cuda":
        return queued_seconds([run])[0]
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def queued_seconds(runs: list[Callable[[], Any]]) -> list[float]:
    """Mean time of each run in the GPU's queue: all of them by turns, once untimed and then `QUEUED` times."""
    for run in runs:
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(QUEUED * len(runs) + 1)]
    marks[0].record()
    for run, mark in zip(QUEUED * runs, marks[1:], strict=True):
        run()
        mark.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]
    return [statistics.fmean(times[i :: len(runs)]) for i in range(len(runs))]


class Floor:
    """The GEMMs alone, in the operands' dtype and into preallocated outputs, over counted rows only; in fp32 on a CPU
    that does not multiply that dtype, where fp32 is the faster.

    `plain`: one `torch.mm` each, over all of N and V. `best`: over the whole of N or in chunks, logits dense or at
    `row_stride`, on a CPU also by blocks of the head, whichever a calibration found fastest, so that the sum is a lower
    bound and not one more implementation. The gradients that they read are those of forward KL: a GPU's clocks depend
    on the data.
    """

    def __init__(self, tensors: list[Tensor], device: str, parts: Sequence[str] = PARTS):
        counted = tensors[4] != peers.IGNORE
        if not has_fast_gemm(tensors[0].dtype, device):
            tensors = [x.float() if x.is_floating_point() else x for x in tensors]
        self.device, (_, self.w, _, self.u, _) = device, tensors
        self.x, self.y = tensors[0][counted], tensors[2][counted]
        if sparse := not self.y.is_floating_point():  # ids and log-probabilities in place of a teacher
            self.u = self.u[counted]
        n, v = len(self.x), len(self.w)
        buffers = [tuple(self.x.new_empty(n, stride)[:, :v] for _ in range(2)) for stride in sorted({v, row_stride(v)})]
        for start in range(0, n, FLOOR_CHUNKS[0]):
            rows = slice(start, start + FLOOR_CHUNKS[0])
            q = (self.x[rows] @ self.w.t()).float().softmax(-1)
            if sparse:
                p = torch.zeros_like(q).scatter_(1, self.y[rows], self.u[rows].float().exp())
            else:
                p = (self.y[rows] @ self.u.t()).float().softmax(-1)
            for _, gradients in buffers:
                gradients[rows] = q - p
        self.dx, self.dy, self.dw = (torch.empty_like(t) for t in (self.x, self.y, self.w))
        runs = {
            "student logits": lambda rows, block, out, _: self._logits(self.x[rows], self.w, block, out[rows]),
            "teacher logits": lambda rows, block, out, _: self._logits(self.y[rows], self.u, block, out[rows]),
            "student dX": lambda rows, _, __, gradients: torch.mm(gradients[rows], self.w, out=self.dx[rows]),
            "student dW": self._dw,
            "teacher dX": lambda rows, _, __, gradients: torch.mm(gradients[rows], self.u, out=self.dy[rows]),
        }
        self.parts = {part: runs[part] for part in PARTS if part in parts}
        plain = (n, v, *buffers[0])
        for part in self.parts:
            for pair in buffers:
                self._run(part, n, v, *pair)
        sizes = sorted({min(size, n) for size in (*FLOOR_CHUNKS, n)})
        self.plain, self.best = dict.fromkeys(self.parts, plain), {}
        for part in self.parts:
            blocks = {v, min(HEAD_BLOCK, v)} if device == "cpu" and "logits" in part else {v}
            ways = [(size, block, *pair) for pair in buffers for size in sizes for block in sorted(blocks)]
            once = sorted(ways, key=lambda way, p=part: self._time(p, *way))
            self.best[part] = min(once[:3], key=lambda way, p=part: min(self._time(p, *way) for _ in range(3)))

    @staticmethod
    def _logits(hidden: Tensor, head: Tensor, block: int, logits: Tensor) -> None:
        for weight, out in zip(head.split(block), logits.split(block, dim=1), strict=True):
            torch.mm(hidden, weight.t(), out=out)

    def _dw(self, rows: slice, _: int, __: Tensor, gradients: Tensor) -> None:
        torch.addmm(self.dw, gradients[rows].t(), self.x[rows], beta=int(rows.start > 0), out=self.dw)

    def _run(self, part: str, chunk: int, block: int, logits: Tensor, gradients: Tensor) -> None:
        for start in range(0, len(self.x), chunk):
            self.parts[part](slice(start, min(start + chunk, len(self.x))), block, logits, gradients)

    def _time(self, part: str, *way: Any) -> float:
        return seconds(partial(self._run, part, *way), self.device)

    def times(self, ways: dict[str, tuple]) -> dict[str, float]:
        """Of each part; on a GPU all parts are queued one after the other, as they are in a step."""
        if self.device != "cuda":
            return {part: self._time(part, *way) for part, way in ways.items()}
        runs = [partial(self._run, part, *way) for part, way in ways.items()]
        return dict(zip(ways, queued_seconds(runs), strict=True))
