"""One model of a call: what the chunks take of it, made of the call's operands, and the way back from the gradients.

A LoRA on a head is r more inner dimensions: [hidden, x A^T] [W, B]^T costs a copy of W, where a product of its own
would cost one more pass over fp32 logits in each chunk.

Legend: N tokens, n of them counted, V vocabulary rows of this rank, D inner size, c rows of a chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from okd_kernels.call import Operands, Spec
from okd_kernels.columns import Compaction
from okd_kernels.cpu import empty_like
from okd_kernels.divergences import Objective
from okd_kernels.gemms import accumulate, logits_into
from okd_kernels.rows import LogitRows
from okd_kernels.sharding import Vocabulary

FP16_GAIN = 256.0  # lifts fp16 logit gradients out of the subnormal range; divided out in fp32


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of losses and row mathematics: fp32, or fp64 if an operand is."""
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def gradient_dtype(operand: Tensor) -> torch.dtype:
    """Of a gradient that waits for its upstream factor: fp32 for fp16, which holds it only after a GradScaler's."""
    return torch.float32 if operand.dtype == torch.float16 else operand.dtype


def normalise(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of at most 1, and their factor (): an upstream of 1/N would let fp16 gradients underflow."""
    largest = weights.abs().sum() if weights.numel() == 0 else weights.abs().amax()
    scale = torch.where(largest > 0, largest, 1)
    return weights / scale, scale


class Side(NamedTuple):
    """One model: its operands, and the gradients to fill (None: not wanted). As a `Target`, the student's teacher."""

    hidden: Tensor  # (N, D), or logits (N, >= V) where there is no weight
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    objective: Objective | None
    grad_hidden: Tensor | None = None  # (N, D'), hidden's dtype or wider, of the `hidden_columns`
    grad_weight: Tensor | None = None  # (V, D'), fp32 or wider, of the `weight_columns`; rows from V on are not written
    grad_bias: Tensor | None = None  # (V,), likewise
    hidden_columns: slice = slice(None)
    weight_columns: slice = slice(None)
    compaction: Compaction | None = None  # None: the backward GEMMs multiply all columns

    @property
    def learns(self) -> bool:
        return any(gradient is not None for gradient in (self.grad_hidden, self.grad_weight, self.grad_bias))

    def project(self, rows: slice, buffer: Tensor, vocab_size: int) -> LogitRows:
        """The rows' logits in the buffer (>= c, >= V). Their gradient goes there, too: a 16-bit one takes the first
        half of its row. Logits that are given stay as they are."""
        transformations = (self.bias, self.logit_scale, self.softcap)
        if self.weight is None:
            gradient = None if self.grad_hidden is None else self.grad_hidden[rows]
            return LogitRows(self.hidden[rows], self.objective, gradient, *transformations)
        logits = buffer[: rows.stop - rows.start]
        logits_into(self.hidden[rows], self.weight[:vocab_size], logits[:, :vocab_size])
        gradient = logits.view(self.hidden.dtype)[:, : logits.shape[1]] if self.learns else None
        return LogitRows(logits, self.objective, gradient, *transformations)

    def takes(self, own: LogitRows) -> LogitRows:
        return own

    def fill(self, rows: slice, student: LogitRows, own: LogitRows) -> None:
        """Its logits are there already."""

    def accumulate_gradients(self, rows: slice, gradient: Tensor, labels: Tensor | None) -> None:
        """The backward GEMMs of one chunk; gradient: (c, V) of its logits."""
        if self.weight is None:
            return
        v, first = gradient.shape[1], rows.start == 0
        compact = None if self.compaction is None else self.compaction(rows, gradient)
        if self.grad_hidden is not None:
            left, weight = gradient, self.weight[:v, self.hidden_columns]
            if compact is not None:
                left, weight = compact.gradient, compact.weight
            accumulate(self.grad_hidden[rows], left, weight, first=True)
            if self.compaction is not None:
                self.compaction.made(rows, self.grad_hidden[rows])
        if self.grad_weight is not None:
            x = self.hidden[rows, self.weight_columns]
            if labels is not None:
                x = x.masked_fill((labels[rows] < 0).unsqueeze(1), 0)  # ignored rows may hold NaN
            if compact is None or compact.exact_head:
                accumulate(self.grad_weight[:v], gradient.t(), x, first)
            else:
                compact.add_to(self.grad_weight[:v], x, first)
        if self.grad_bias is not None:
            total = gradient.sum(0, dtype=self.grad_bias.dtype)
            self.grad_bias[:v] = total if first else self.grad_bias[:v] + total


class Model:
    """One side of a call: the engine's operands, made of the call's, and the way back from their gradients."""

    def __init__(self, name: str, operands: Operands, spec: Spec, kept: Tensor | None, vocabulary: Vocabulary):
        self.name, self.kept, self.vocabulary = name, kept, vocabulary
        of_side = {x: getattr(operands, f"{name}_{x}") for x in ("hidden", "weight", "bias", "lora_x", "lora_b")}
        self.operands = {f"{name}_{x}": tensor for x, tensor in of_side.items()}
        self.wanted = set() if spec.per_token else set(spec.wanted.split(",")) & set(self.operands)
        hidden, weight, bias, lora_x, lora_b = of_side.values()
        i = ("student", "teacher").index(name)
        dtype = gradient_dtype(hidden) if weight is None else (spec.student_dtype, spec.teacher_dtype)[i]
        scale, softcap = spec.head_numbers[2 * i : 2 * i + 2]
        objective = spec.objectives[i]
        self.width, self.gradient_dtype = hidden.shape[1], dtype
        hidden = hidden if kept is None else hidden[kept]
        if weight is not None:
            hidden, weight = hidden.to(dtype), weight.to(dtype)
        if lora_x is not None:  # r more inner dimensions cost less than a second pass over fp32 logits
            lora_x = lora_x if kept is None else lora_x[kept]
            hidden = torch.cat([hidden, lora_x.to(dtype)], 1)
            weight = torch.cat([weight, lora_b.to(dtype)], 1)
        self.side = Side(hidden, weight, bias, scale, softcap or None, objective)
        if objective is not None:
            self.strength = (objective.weight * spec.temperature + objective.ce_weight) * scale or 1.0
        self._make_buffers(spec)

    def _columns(self, first: str, second: str) -> slice:
        """Of hidden and LoRA side by side, those whose gradient is wanted."""
        start = 0 if f"{self.name}_{first}" in self.wanted else self.width
        return slice(start, None if f"{self.name}_{second}" in self.wanted else self.width)

    def _make_buffers(self, spec: Spec) -> None:
        side, of = self.side, {x: self.operands[f"{self.name}_{x}"] for x in ("hidden", "weight", "bias")}
        columns = self._columns("hidden", "lora_x"), self._columns("weight", "lora_b")
        buffers: list[Tensor | None] = [None, None, None]
        if {f"{self.name}_hidden", f"{self.name}_lora_x"} & self.wanted:
            # A sum over ranks of rounded parts would be worse than one process: parts are wide, and rounded once.
            dtype = gradient_dtype(of["hidden"])
            dtype = wide(dtype) if self.vocabulary.group is not None and side.weight is not None else dtype
            buffers[0] = torch.empty_like(
                side.hidden[:, columns[0]], dtype=dtype, memory_format=torch.contiguous_format
            )
        if side.weight is not None and {f"{self.name}_weight", f"{self.name}_lora_b"} & self.wanted:
            buffers[1] = empty_like(side.weight[:, columns[1]], wide(side.weight.dtype))
        if f"{self.name}_bias" in self.wanted:
            buffers[2] = torch.empty_like(of["bias"], dtype=wide(of["bias"].dtype))
        compaction = None
        if not spec.columns.all and buffers[0] is not None and side.weight is not None and len(side.hidden):
            weight = side.weight[: self.vocabulary.size, columns[0]]
            compaction = Compaction(spec.columns, weight, len(side.hidden), wide(weight.dtype), self.vocabulary)
        self.side = side._replace(
            grad_hidden=buffers[0],
            grad_weight=buffers[1],
            grad_bias=buffers[2],
            hidden_columns=columns[0],
            weight_columns=columns[1],
            compaction=compaction,
        )

    def row_factors(self, weights: Tensor, scale: Tensor) -> Tensor:
        """weights (n,) * scale as factors of the rows' gradients; in fp16, a part of it waits for their sums.

        The latter costs a pass over dX and dW, and keeps the rows' gradients within range.
        """
        self.deferred_scale: Tensor | None = None
        if self.gradient_dtype != torch.float16 or not self.wanted:
            return weights * scale
        weights, largest = normalise(weights)
        gain = FP16_GAIN / self.strength
        self.deferred_scale = scale * (largest / gain)
        return weights * gain

    def of_columns(self) -> Tensor:
        """(2,) `columns.METRICS`."""
        if self.side.compaction is not None:
            return self.side.compaction.report()
        return torch.stack([self.side.hidden.new_zeros(()), self.side.hidden.new_ones(())])

    def gradients(self) -> dict[str, Tensor]:
        """Of the operands that are wanted, by their names: scaled, in the operands' rows and dtypes."""
        side, found = self.side, dict[str, Tensor]()
        if side.grad_hidden is not None:
            total = side.grad_hidden
            if side.weight is None:
                total[:, self.vocabulary.size :] = 0  # padding; no backend writes it
            elif self.vocabulary.group is not None:
                dist.all_reduce(total, group=self.vocabulary.group)
            if self.deferred_scale is not None:
                total.mul_(self.deferred_scale)
            if self.kept is not None:
                total = total.new_zeros(len(self.operands[f"{self.name}_hidden"]), total.shape[1]).index_copy_(
                    0, self.kept, total
                )
            found |= self._by_columns(total, "hidden", "lora_x")
        for by_column in (side.grad_weight, side.grad_bias):
            if by_column is not None:  # padding, or everything where no chunk has written
                by_column[self.vocabulary.size if len(side.hidden) else 0 :] = 0
                if self.deferred_scale is not None:
                    by_column.mul_(self.deferred_scale)
        if side.grad_weight is not None:
            found |= self._by_columns(side.grad_weight, "weight", "lora_b")
        if side.grad_bias is not None:
            found[f"{self.name}_bias"] = side.grad_bias
        return {name: self._in_dtype(x, self.operands[name]) for name, x in found.items()}

    def _by_columns(self, total: Tensor, first: str, second: str) -> dict[str, Tensor]:
        names = [name for name in (f"{self.name}_{first}", f"{self.name}_{second}") if name in self.wanted]
        if len(names) == 1:
            return {names[0]: total}
        return {
            name: x.clone(memory_format=torch.contiguous_format)  # of one row, `contiguous` would be a view
            for name, x in zip(names, (total[:, : self.width], total[:, self.width :]), strict=True)
        }

    @staticmethod
    def _in_dtype(x: Tensor, operand: Tensor) -> Tensor:
        dtype = gradient_dtype(operand)
        return x if x.dtype == dtype else empty_like(operand, dtype).copy_(x)
