"""The loss for heads whose rows are sharded over a process group (tensor parallelism): no rank sees whole logits.

Each rank projects the tokens onto its own part of the vocabulary. What a row needs of the other parts are a few numbers
per token, summed over the group: two collectives a chunk, three where a divergence's slope sum is not known beforehand,
and after the last chunk one for the values and one for each hidden gradient.

Legend: N counted tokens, c of a chunk, V_r vocabulary rows of this rank, D hidden size of either model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from okd_kernels.arguments import (
    check_objectives,
    check_temperature,
    chunk_workspace,
    common_shape,
    gemm_operands,
    resolve_backend,
)
from okd_kernels.chunks import Model, backward, chunk_rows, project, row_stride
from okd_kernels.divergences import DIVERGENCES, Objective
from okd_kernels.heads import LinearHead
from okd_kernels.memory import workspace
from okd_kernels.ops import BY_ROW, PER_SIDE, by_side, gradient_dtype, once_differentiable, row_factors, times, wide
from okd_kernels.rows import STATISTICS, Side
from okd_kernels.tokens import DistillationLoss, Tokens
from okd_kernels.torch_rows import _infinite, _transform, block_rows


def vocab_parallel_distillation_loss(
    student_hidden: Tensor,  # (..., D_s), the same on all ranks
    student_head: Tensor | nn.Linear | LinearHead,  # (V_r, D_s)
    teacher_hidden: Tensor,  # (..., D_t), the same on all ranks
    teacher_head: Tensor | nn.Linear | LinearHead,  # (V_r, D_t)
    labels: Tensor | None = None,  # (...,) global ids, the same on all ranks
    *,
    group: dist.ProcessGroup | None = None,
    student: str | Objective = "forward_kl",
    teacher: str | Objective | None = None,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,  # (...,)
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
) -> DistillationLoss:
    """`linear_distillation_loss` of the heads concatenated over the ranks of `group`: losses, metrics and gradients.

    Every rank calls it with the same tokens and options, and gets the same losses and the whole gradients of the hidden
    states (summed over the group in the forward pass), and those of its own rows of the heads. The row mathematics is
    PyTorch's on every device; the result is deterministic where the group's all-reduce is.

    Args:
        student_head, teacher_head: this rank's rows, in rank order; both heads split alike, evenly or not. Of a DTensor
            sharded by rows, pass `weight.to_local()`.
        group: the ranks that share the vocabulary; default: all.
        reduction: "mean" or "sum".

    The other arguments are those of `linear_distillation_loss`. Row counts are exchanged once a call, which on an
    accelerator synchronises with the host.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do. What only shows between ranks (heads split
            differently, other tokens) is raised on all of them.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "expected an initialised process group; got none: call torch.distributed.init_process_group first, or "
            "linear_distillation_loss where one process holds whole heads"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"expected reduction to be mean or sum over a sharded vocabulary; got {reduction!r}")
    workspace_bytes = chunk_workspace(workspace_bytes, student_hidden.device)
    check_temperature(temperature)
    objectives = check_objectives(student, teacher, labels)
    shape, device = common_shape(student_hidden, teacher_hidden), student_hidden.device
    pairs = (
        gemm_operands("student", student_hidden, LinearHead.of(student_head)),
        gemm_operands("teacher", teacher_hidden, LinearHead.of(teacher_head)),
    )
    counted = shape.numel() if labels is None else int((labels != ignore_index).sum())
    shards = _shards(group, device, [len(head.weight) for _, head in pairs], counted, workspace_bytes)
    rows = Tokens(shape, labels, token_weights, normalizer, reduction, ignore_index, sum(shards), device)

    dtype = wide(student_hidden.dtype, teacher_hidden.dtype)
    row_labels, (weights, scale) = rows.labels, rows.weights(dtype)
    hiddens = [hidden.reshape(-1, hidden.shape[-1]) for hidden, _ in pairs]
    kept = None  # ignored rows leave before the GEMMs
    if row_labels is not None and counted < len(row_labels):
        kept = (row_labels >= 0).nonzero().squeeze(1)
        row_labels, weights = row_labels[kept], weights[kept]
        hiddens = [hidden.index_select(0, kept) for hidden in hiddens]
    operands = [
        operand
        for hidden, (_, head) in zip(hiddens, pairs, strict=True)
        for operand in (hidden, head.weight, head.bias, *head.low_rank(hidden))
    ]
    learns = torch.is_grad_enabled()
    needs = [
        learns and x is not None and x.requires_grad and objectives[i // PER_SIDE] is not None
        for i, x in enumerate(operands)
    ]
    task = _Task(
        (objectives[0], objectives[1]),
        (pairs[0][1], pairs[1][1]),
        row_labels,
        weights,
        scale,
        float(temperature),
        chunk_rows(counted, 2 * dtype.itemsize * max(shards), workspace_bytes) if counted else 1,
        sum(shards[: dist.get_rank(group)]),
        sum(shards),
        group,
        needs,
    )
    student_total, teacher_total, statistics = _VocabParallel.apply(task, *operands)
    if kept is not None:
        statistics = statistics.new_zeros(shape.numel(), len(STATISTICS)).index_copy_(0, kept, statistics)
    return DistillationLoss(student_total, None if objectives[1] is None else teacher_total, rows.metrics(statistics))


def _shards(
    group: dist.ProcessGroup | None,
    device: torch.device,
    head_rows: list[int],  # of student and teacher
    tokens: int,
    workspace_bytes: int,
) -> list[int]:
    """Each rank's number of vocabulary rows; raises ValueError, on all ranks, where the ranks do not fit together."""
    facts = torch.tensor([*head_rows, tokens, workspace_bytes], device=device)
    gathered = [torch.empty_like(facts) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, facts, group=group)
    student, teacher, *shared = torch.stack(gathered, 1).tolist()
    if student != teacher or min(student) < 1:
        raise ValueError(
            f"expected heads that are split alike, with at least one row on each rank; got {student} rows of the "
            f"student's and {teacher} of the teacher's: split both at the same token ids"
        )
    for name, values in zip(("number of counted tokens", "workspace_bytes"), shared, strict=True):
        if len(set(values)) > 1:  # the ranks would wait for one another for ever
            raise ValueError(f"expected the same {name} on all ranks; got {values}: pass the same tokens and options")
    return student


class _Task(NamedTuple):
    """What the forward pass needs beside the operands."""

    objectives: tuple[Objective | None, Objective | None]
    heads: tuple[LinearHead, LinearHead]  # for their scale and softcap
    labels: Tensor | None  # (N,) global ids, none ignored
    weights: Tensor  # (N, 2) weight of each token in each side's total
    scale: Tensor  # () 1 / normalizer
    temperature: float
    chunk: int  # rows of a chunk, the same on all ranks
    first: int  # global id of this rank's first vocabulary row
    vocab_size: int  # of all ranks
    group: dist.ProcessGroup | None
    needs: list[bool]  # which of the operands want a gradient


class _VocabParallel(torch.autograd.Function):
    """Gradients are made in the forward pass and multiplied by the upstream scalar in backward."""

    @staticmethod
    def forward(ctx: Any, task: _Task, *operands: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Totals () of student and teacher, and statistics (N, 7); operands: hidden, weight, bias, low, up of each."""
        # A sum over ranks of rounded parts would be worse than one process: parts are summed wide, and rounded once.
        dtype = task.weights.dtype
        sums = [
            torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) if need else None
            for x, need in zip(operands, task.needs, strict=True)
        ]
        models, row_scales = [], []
        for i, (objective, head) in enumerate(zip(task.objectives, task.heads, strict=True)):
            side = slice(PER_SIDE * i, PER_SIDE * (i + 1))
            hidden, weight, bias, low, up = operands[side]
            factors, sum_scale = row_factors(task.weights[:, i], task.scale, hidden.dtype)
            row_scales.append(factors)
            numbers = head.logit_scale, head.softcap, objective, sum_scale
            models.append(Model(hidden, weight, bias, low, up, *numbers, *sums[side]))
        with torch.autocast(task.weights.device.type, enabled=False):
            losses, statistics = _run(models, task, torch.stack(row_scales, 1))
        for i, total in enumerate(sums):
            if total is not None and i % PER_SIDE in BY_ROW:
                dist.all_reduce(total, group=task.group)
            if total is not None and (scale := models[i // PER_SIDE].scale) is not None:
                total.mul_(scale)
        found = zip(sums, operands, strict=True)
        ctx.save_for_backward(*(None if g is None else g.to(gradient_dtype(x)) for g, x in found))
        ctx.dtypes = [None if x is None else x.dtype for x in operands]
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        return *by_side((losses * task.weights).sum(0) * task.scale), statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = []
        for i, (gradient, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            total = upstream[i // PER_SIDE]
            if gradient is not None and total is not None:
                gradient = times(gradient, total, resolve_backend("auto", total.device, total.dtype)).to(dtype)
            gradients.append(None if total is None else gradient)
        return None, *gradients


def _run(models: list[Model], task: _Task, row_scales: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (N, 2) and statistics (N, 7) of the whole group; this rank's gradients into the models' buffers."""
    (n, _), v = row_scales.shape, len(models[0].weight)
    width = row_stride(v)
    buffers = workspace((task.chunk, width), (task.chunk, width), like=row_scales)
    values, nlls = row_scales.new_zeros(n, len(_Chunk.VALUES)), row_scales.new_zeros(n, 2)
    for start in range(0, n, task.chunk):
        rows = slice(start, min(start + task.chunk, n))
        sides = [project(model, rows, buffer[:, :v], v) for model, buffer in zip(models, buffers, strict=True)]
        chunk = _Chunk(sides, None if task.labels is None else task.labels[rows], task)
        nlls[rows] = chunk.normalise()
        chunk.values(values[rows])
        chunk.gradients(row_scales[rows])
        for model, side in zip(models, sides, strict=True):
            if side.gradient is not None:
                backward(model, rows, side.gradient, None)

    dist.all_reduce(values, group=task.group)
    student, teacher, forward, reverse, *entropies, common_tops = values.unbind(1)
    columns = [_infinite(forward), _infinite(reverse), *entropies, *nlls.unbind(1), (common_tops > 0).to(values.dtype)]
    losses = torch.zeros_like(nlls)
    for i, (objective, value) in enumerate(zip(task.objectives, (student, teacher), strict=True)):
        if objective is not None:
            losses[:, i] = objective.loss(_infinite(value), nlls[:, i], task.temperature)
    return losses, torch.stack(columns, 1)


class _Chunk:
    """The rows of one chunk on this rank's part of the vocabulary, in the order of its passes.

    A pass works on a block of rows at a time, which bounds its temporaries and, on a CPU, stays in cache.
    """

    VALUES = ("student", "teacher", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "common_tops")

    def __init__(self, sides: list[Side], labels: Tensor | None, task: _Task):
        self.sides, self.labels, self.task = sides, labels, task
        self.n, self.v = sides[0].logits.shape
        self.target: Tensor | None = None  # (c, 1) column of the label, or any where `here` is 0
        if labels is not None:
            column = (labels - task.first).unsqueeze(1)
            self.here = ((column >= 0) & (column < self.v)).to(sides[0].logits.dtype)  # (c, 1)
            self.target = column.clamp(0, self.v - 1)

    def _blocks(self) -> Iterator[slice]:
        step = block_rows(self.v, self.sides[0].logits.device)
        return (slice(start, min(start + step, self.n)) for start in range(0, self.n, step))

    def normalise(self) -> Tensor:
        """Transform the logits in place and find the group's log-sum-exps; returns the labels' -log q (c, 2)."""
        new, temperature = self.sides[0].logits.new_zeros, self.task.temperature
        self.top = new(self.n, 2)  # of the whole rows, by which exponents are taken
        for rows in self._blocks():
            for i, side in enumerate(self.sides):
                logits = _transform(side, rows, self.v, side.logits.dtype, None)
                side.logits[rows] = logits
                self.top[rows, i] = logits.amax(-1)
        dist.all_reduce(self.top, dist.ReduceOp.MAX, group=self.task.group)

        sums = new(3, self.n, 2)  # of exponentials at the loss's temperature and at 1; the label's logit
        for rows in self._blocks():
            for i in range(2):
                logits = self._below_top(rows, i)
                sums[0, rows, i] = (logits / temperature).exp_().sum(-1)
                if self.target is not None:
                    sums[1, rows, i] = sums[0, rows, i] if temperature == 1.0 else logits.exp().sum(-1)
                    sums[2, rows, i] = (logits.gather(1, self.target[rows]) * self.here[rows]).squeeze(1)
        dist.all_reduce(sums, group=self.task.group)
        self.log_sum, self.log_sum_at_1 = sums[0].log(), sums[1].log()
        if self.labels is None:
            return self.top.new_zeros(self.n, 2)
        # NaN for a label that is no token, which a GPU does not look for beforehand
        return (self.log_sum_at_1 - sums[2]).masked_fill((self.labels >= self.task.vocab_size).unsqueeze(1), torch.nan)

    def _below_top(self, rows: slice, i: int) -> Tensor:
        return self.sides[i].logits[rows] - self.top[rows, i : i + 1]

    def _distributions(self, rows: slice) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(log_q, log_p, q, p) as the student's objective sees them, and as the teacher's does."""
        log_q, log_p = (
            (self._below_top(rows, i) / self.task.temperature).sub_(self.log_sum[rows, i : i + 1]) for i in range(2)
        )
        q, p = log_q.exp(), log_p.exp()
        return (log_q, log_p, q, p), (log_p, log_q, p, q)

    def values(self, out: Tensor) -> None:
        """This rank's part of `VALUES` into out (c, 7), and the group's slope sums where a gradient needs them."""
        self.slope_sum = self.top.new_zeros(self.n, 2)
        for rows in self._blocks():
            both = self._distributions(rows)
            log_q, log_p, q, p = both[0]
            tops = (self.sides[0].logits[rows] == self.top[rows, :1]) & (
                self.sides[1].logits[rows] == self.top[rows, 1:]
            )
            difference, mass = log_p - log_q, q.sum(-1) - p.sum(-1)
            columns = [
                torch.linalg.vecdot(p, difference) + mass,
                -torch.linalg.vecdot(q, difference) - mass,
                -torch.linalg.vecdot(q, log_q),
                -torch.linalg.vecdot(p, log_p),
                tops.sum(-1).to(out.dtype),
            ]
            out[rows, 2:] = torch.stack(columns, 1)
            for i, (side, distributions) in enumerate(zip(self.sides, both, strict=True)):
                if side.objective is not None:
                    l, g = _terms(side.objective, distributions)
                    out[rows, i] = l.sum(-1)
                    if _waits(side):
                        self.slope_sum[rows, i] = g.sum(-1)
        if any(map(_waits, self.sides)):
            dist.all_reduce(self.slope_sum, group=self.task.group)

    def gradients(self, row_scales: Tensor) -> None:
        """Overwrite the logits of a side that learns with their gradient, times row_scales (c, 2)."""
        if all(side.gradient is None for side in self.sides):
            return
        for rows in self._blocks():
            for i, (side, distributions) in enumerate(zip(self.sides, self._distributions(rows), strict=True)):
                if side.gradient is None or side.objective is None:
                    continue
                _, g = _terms(side.objective, distributions)
                if _waits(side):
                    g = torch.addcmul(g, distributions[2], self.slope_sum[rows, i : i + 1], value=-1)
                scale = row_scales[rows, i : i + 1]
                g = g.mul_(scale * (side.objective.weight * self.task.temperature))
                if side.objective.ce_weight > 0:
                    assert self.target is not None
                    q = distributions[2]
                    if self.task.temperature != 1.0:
                        q = self._below_top(rows, i).sub_(self.log_sum_at_1[rows, i : i + 1]).exp_()
                    ce_scale = scale * side.objective.ce_weight
                    g.addcmul_(q, ce_scale).scatter_add_(1, self.target[rows], -ce_scale * self.here[rows])
                if side.softcap is not None:
                    g.mul_(1 - (side.logits[rows] / side.softcap) ** 2)
                side.gradient[rows] = g.mul_(side.logit_scale)


def _terms(objective: Objective, distributions: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    formula: Any = DIVERGENCES[objective.divergence].formula
    return formula(*distributions, objective.a, objective.b)


def _waits(side: Side) -> bool:
    """Whether the side's gradient needs a slope sum over the whole vocabulary."""
    if side.gradient is None or side.objective is None:
        return False
    return DIVERGENCES[side.objective.divergence].slope_sum != "zero"
