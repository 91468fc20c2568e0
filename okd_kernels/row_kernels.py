"""The launches of Triton's row passes, and a gradient times its upstream factor.

Shapes: n rows of this chunk, V vocabulary (of this rank). Strides count elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from okd_kernels.divergences import DIVERGENCES
from okd_kernels.row_programs import _emit_kernel, _slopes_kernel, _statistics_kernel
from okd_kernels.rows import KLS, STATISTICS, VALUES, LogitRows, Rows, needs_slope_sum

SCALE_BLOCK = 4096  # elements that a program of `scale_` works on at a time
SCALE_PROGRAMS = 1024  # at most: where there is nothing to do, each costs its start


class Launch(NamedTuple):
    """How a row is worked on. Fixed rather than tuned at run time: a trial would overwrite the logits, and synchronise.

    Given 112 registers a thread, ptxas spills in no case and two to four rows share a multiprocessor; left to itself it
    squeezes some cases further and spills a little. `benchmarks.tune` times `LAUNCHES` on a GPU.
    """

    block: int = 2048  # columns at a time
    warps: int = 8
    registers: int = 112  # that a thread may take; CUDA only

    def options(self, is_cuda: bool) -> dict[str, int]:
        return {"num_warps": self.warps, **({"maxnreg": self.registers} if is_cuda else {})}


LAUNCH = Launch()
LAUNCHES = (
    LAUNCH,
    *(Launch(2048, 8, registers) for registers in (80, 128)),
    *(Launch(block, warps, 128) for block, warps in ((1024, 4), (2048, 4), (4096, 8), (4096, 16))),
)


def arguments(rows: Rows, vocab_size: int, temperature: float, first: int, launch: Launch = LAUNCH) -> dict[str, Any]:
    """Every argument of the three kernels that rows and options give, by name; compile-time ones in capitals."""
    found: dict[str, Any] = {
        "labels_ptr": rows.weights if rows.labels is None else rows.labels,
        "weights_ptr": rows.weights,
        **{"n": len(rows.weights), "v": vocab_size, "first": first, "temperature": temperature},
        "HAS_LABELS": rows.labels is not None,
        "HAS_TEMPERATURE": temperature != 1.0,
        "BLOCK": launch.block,
    }
    for x, s, side in (("z", "s", rows.student), ("u", "t", rows.teacher)):
        gradient, objective = side.logits if side.gradient is None else side.gradient, side.objective
        kind = _slope_kind(side)
        for name, tensor, extent in ((x, side.logits, "loadable"), (f"d{x}", gradient, "storable")):
            found |= {f"{name}_ptr": tensor, f"{name}_stride": tensor.stride(0), f"{name}_{extent}": tensor.shape[1]}
        found |= {
            f"{x}_bias_ptr": side.logits if side.bias is None else side.bias.contiguous(),
            f"{x}_scale": side.logit_scale,
            f"{x}_softcap": side.softcap or 1.0,
            f"{x.upper()}_BIAS": side.bias is not None,
            f"{x.upper()}_SOFTCAP": side.softcap is not None,
            f"D{x.upper()}": side.gradient is not None,
            f"{s.upper()}_RULE": None if objective is None else DIVERGENCES[objective.divergence].rule,
            f"{s.upper()}_SLOPE_SUM": kind,
            f"{s.upper()}_CROSS": kind == "value",
            f"{s.upper()}_VALUE": objective is not None and objective.divergence not in KLS,
            f"{s.upper()}_CE": objective is not None and objective.ce_weight > 0,
        }
        for name in ("alpha", "beta"):
            found[f"{s}_{name}"] = 0.0 if objective is None else getattr(objective, name)
    return found


def _slope_kind(side: LogitRows) -> str:
    if side.objective is None or side.gradient is None:
        return "zero"
    return DIVERGENCES[side.objective.divergence].slope_sum or "unknown"


class TritonRows:
    """`RowPasses` on GPUs, in fp32. No host synchronisation."""

    def __init__(self, vocab_size: int, temperature: float, first: int = 0, launch: Launch = LAUNCH):
        self.v, self.temperature, self.first, self.launch = vocab_size, temperature, first, launch

    def run(self, rows: Rows, fill: Callable[[slice], None]) -> tuple[Tensor, Tensor]:
        fill(slice(0, len(rows.weights)))
        statistics = self.statistics(rows)
        slopes = self.slopes(rows, statistics) if any(map(needs_slope_sum, rows.sides)) else None
        return statistics, self.emit(rows, statistics, slopes)

    def statistics(self, rows: Rows) -> Tensor:
        out = rows.weights.new_zeros(2, len(rows.weights), len(STATISTICS))
        self._launch(_statistics_kernel, rows, statistics_ptr=out)
        return out

    def slopes(self, rows: Rows, statistics: Tensor) -> Tensor:
        out = rows.weights.new_zeros(len(rows.weights), 2)
        self._launch(_slopes_kernel, rows, statistics_ptr=statistics, slopes_ptr=out)
        return out

    def emit(self, rows: Rows, statistics: Tensor, slopes: Tensor | None) -> Tensor:
        out = rows.weights.new_zeros(len(rows.weights), len(VALUES))
        slopes = out if slopes is None else slopes
        self._launch(_emit_kernel, rows, statistics_ptr=statistics, slopes_ptr=slopes, values_ptr=out)
        return out

    def _launch(self, kernel: Any, rows: Rows, **tensors: Tensor) -> None:
        given = {**arguments(rows, self.v, self.temperature, self.first, self.launch), **tensors}
        options = self.launch.options(torch.version.cuda is not None)
        with torch.cuda.device_of(rows.student.logits):
            kernel[(len(rows.weights),)](**{name: given[name] for name in kernel.arg_names}, **options)


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
    """x (any shape, contiguous) times factor (), of x's precision or better, in place. No host synchronisation.

    It reads and writes x only where the factor is not 1: the upstream gradient of most losses is, but the host does not
    know without waiting for the device.
    """
    n = x.numel()
    with torch.cuda.device_of(x):
        programs = max(1, min(SCALE_PROGRAMS, triton.cdiv(n, SCALE_BLOCK)))
        _scale_kernel[(programs,)](x, factor, n, BLOCK=SCALE_BLOCK, num_warps=8)
    return x
