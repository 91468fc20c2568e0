"""The loss between two vocabularies: over outcomes that both models know, each in ids of its own.

Models with different tokenizers share tokens, and each has others. Outcomes are what the two can be compared by: a
token of both, or several ids of a model together, such as all that the other one lacks. The rows of a chunk are
projected as in the engine; their outcomes' logits go through `distillation_loss`, and what comes back through the two
GEMMs.

Legend: N positions, V_s / V_t vocabularies, D_s / D_t hidden sizes, K outcomes, c rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from okd_kernels.call import check_options, chunk_workspace, common_shape, compute_dtype
from okd_kernels.divergences import Objective
from okd_kernels.gemms import accumulate, chunk_rows, logits_into
from okd_kernels.heads import LinearHead
from okd_kernels.losses import Head, distillation_loss
from okd_kernels.problem import DistillationLoss
from okd_kernels.rows import METRICS
from okd_kernels.sides import FP16_GAIN, gradient_dtype, wide
from okd_kernels.torch_rows import blocks


@dataclass(frozen=True)
class Outcomes:
    """What each id of a model is among outcomes 0, 1, ..., `size` - 1, that are those of another model's ids, too.

    Several ids may be one outcome together; an id of -1 exists for nobody. Raises ValueError for others.
    """

    of_ids: Tensor  # (V,) int64
    size: int

    def __post_init__(self) -> None:
        ids = self.of_ids
        if ids.device.type == "cpu" and len(ids) and not -1 <= int(ids.min()) <= int(ids.max()) < self.size:
            raise ValueError(f"expected outcomes in [0, {self.size}), or -1; got {int(ids.min())} to {int(ids.max())}")

    def to(self, device: torch.device | str) -> Outcomes:
        if self.of_ids.device == torch.device(device):
            return self
        moved = Outcomes(self.of_ids.to(device), self.size)
        *columns, each_alone = self._columns  # found where they were: there would be waiting to do
        moved.__dict__["_columns"] = (*(x.to(device) for x in columns), each_alone)
        return moved

    @cached_property
    def _columns(self) -> tuple[Tensor, Tensor, Tensor, Tensor, bool]:
        """Ids that are in an outcome, by outcome; these outcomes; those of one id; their ids; whether all are."""
        order = self.of_ids.argsort(stable=True)
        kept = order[self.of_ids[order] >= 0]
        outcome = self.of_ids[kept]
        alone = outcome.bincount(minlength=self.size)[outcome] == 1
        return kept, outcome, outcome[alone], kept[alone], len(outcome[alone]) == self.size

    def logits(self, z: Tensor, temperature: float = 1.0) -> Tensor:
        """(n, size) u such that softmax(u / T) are the sums of softmax(z / T), z (n, V) without the ids of -1.

        An outcome's is the log-sum-exp of its own logits, never 1 - the others, which cancels; of one id its logit.
        """
        kept, outcome, places, single, each_alone = self._columns
        if each_alone:
            return z.index_select(1, kept)
        of_kept = z.index_select(1, kept)
        top = of_kept.detach().amax(1, keepdim=True)
        sums = z.new_zeros(len(z), self.size)
        sums = sums.scatter_add(1, outcome.expand_as(of_kept), ((of_kept - top) / temperature).exp())
        u = top + temperature * sums.clamp_min(torch.finfo(z.dtype).tiny).log()
        return u.index_copy(1, places, z.index_select(1, single))


def linear_outcome_distillation_loss(
    student_hidden: Tensor,  # (..., D_s)
    student_head: Head,  # (V_s, D_s)
    student_outcomes: Outcomes,  # of V_s ids
    teacher_hidden: Tensor,  # (..., D_t)
    teacher_head: Head,  # (V_t, D_t)
    teacher_outcomes: Outcomes,  # of V_t ids
    *,
    student: str | Objective = "forward_kl",
    teacher: str | Objective | None = None,
    temperature: float = 1.0,
    normalizer: float | Tensor | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> DistillationLoss:
    """sum_i weight T^2 D(learner_i, target_i) / normalizer for both sides, D of the K outcomes' probabilities.

    An outcome's probability is the sum of its ids', in softmax(logits / T) over the ids that are in an outcome. Where
    all are, each in one of its own and in the same order, this is `linear_distillation_loss` without labels; where ids
    are merged, D of an f-divergence is a lower bound of that over tokens (which `alpha_beta`, being none, is not).

    Args:
        student_hidden, teacher_hidden: row i of both has read the same text.
        student_outcomes, teacher_outcomes: on the device of the hidden states.
        student, teacher: objectives without cross-entropy, as each model has labels of its own.
        workspace_bytes: bound of the logits, outcomes and gradients of a chunk.

    The other arguments, and the result, are those of `linear_distillation_loss`; metrics are of outcomes.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
    """
    objectives = Objective.of(student), None if teacher is None else Objective.of(teacher)
    shape, outcomes = common_shape(student_hidden, teacher_hidden), (student_outcomes, teacher_outcomes)
    check_options(temperature, 1.0, objectives[1], None, backend)
    if any(objective is not None and objective.ce_weight for objective in objectives):
        raise ValueError(
            f"expected objectives without cross-entropy, as outcomes are no labels; got {objectives}: add it by "
            "linear_sparse_distillation_loss with weight=0"
        )
    if student_outcomes.size != teacher_outcomes.size:
        raise ValueError(
            f"expected the same outcomes of both models; got {student_outcomes.size} of the student, and "
            f"{teacher_outcomes.size} of the teacher"
        )
    heads, operands = [], list[Tensor | None]()
    given = (("student", student_hidden, student_head), ("teacher", teacher_hidden, teacher_head))
    for (name, hidden, of_model), of_side in zip(given, outcomes, strict=True):
        head = LinearHead.of(of_model).gathered()
        _check_outcomes(name, of_side, head)
        hidden, dtype = hidden.reshape(-1, hidden.shape[-1]), compute_dtype(name, hidden, head)
        x, weight, (lora_x, lora_b) = hidden.to(dtype), head.weight.to(dtype), head.low_rank(hidden)
        if lora_x is not None and lora_b is not None:
            x, weight = torch.cat([x, lora_x.to(dtype)], 1), torch.cat([weight, lora_b.to(dtype)], 1)
        heads.append(LinearHead(weight.detach(), None, head.logit_scale, head.softcap))
        operands += [x, weight, head.bias]
    if objectives[1] is None:
        operands[3:] = [None if x is None else x.detach() for x in operands[3:]]
    if not torch.is_grad_enabled():
        operands = [None if x is None else x.detach() for x in operands]
    workspace = chunk_workspace(workspace_bytes, student_hidden.device)
    call = _Call((heads[0], heads[1]), outcomes, (objectives[0], objectives[1]), float(temperature), workspace, backend)
    *losses, metrics = _Divergences.apply(call, *operands)
    total: Any = shape.numel() if normalizer is None else normalizer
    if not isinstance(total, Tensor):
        total = losses[0].new_full((), total)
    total = total.to(losses[0].device, losses[0].dtype).reshape(())
    factor = torch.where(total == 0, 0, 1 / total)  # nothing counted: zero loss, zero gradients
    student_loss, teacher_loss = (loss * factor for loss in losses)
    named = {name: x.reshape(shape) for name, x in zip(METRICS, metrics.unbind(), strict=True)}
    return DistillationLoss(student_loss, None if teacher is None else teacher_loss, named)


def _check_outcomes(name: str, outcomes: Outcomes, head: LinearHead) -> None:
    if outcomes.of_ids.device != head.weight.device:
        raise ValueError(
            f"expected the {name}'s outcomes on {head.weight.device}, as its head; got {outcomes.of_ids.device}"
        )
    if len(outcomes.of_ids) != len(head.weight):
        raise ValueError(
            f"expected an outcome, or -1, for each of the {len(head.weight)} rows of the {name}'s head; got "
            f"{len(outcomes.of_ids)}"
        )


@dataclass(frozen=True)
class _Call:
    heads: tuple[LinearHead, LinearHead]  # for their scales
    outcomes: tuple[Outcomes, Outcomes]
    objectives: tuple[Objective, Objective | None]
    temperature: float
    workspace_bytes: int
    backend: str


class _Divergences(torch.autograd.Function):
    """Sums of both losses, and the metrics (len(METRICS), N); gradients are made along the way, as in the engine."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *operands: Any) -> Any:
        sides = [operands[:3], operands[3:]]  # hidden (N, D), weight (V, D), bias (V,)
        wanted = [ctx.needs_input_grad[1:4], ctx.needs_input_grad[4:7]]
        dtype = wide(*(x.dtype for x in operands if x is not None))
        n, device = len(sides[0][0]), sides[0][0].device
        gradients: list[Tensor | None] = [
            torch.zeros_like(x, dtype=gradient_dtype(x) if i % 3 == 0 else wide(x.dtype)) if needed else None
            for i, (x, needed) in enumerate(zip(operands, ctx.needs_input_grad[1:], strict=True))
        ]
        gains = [FP16_GAIN if side[0].dtype == torch.float16 else 1.0 for side in sides]
        losses = torch.zeros(2, dtype=dtype, device=device)
        metrics = torch.empty(len(METRICS), n, dtype=dtype, device=device)
        row_bytes = 3 * dtype.itemsize * sum(len(side[1]) for side in sides)  # logits, outcomes, gradients
        step = chunk_rows(max(1, n), row_bytes, call.workspace_bytes, device)
        with torch.autocast(device.type, enabled=False):
            for rows in blocks(n, step):
                raw = []
                for (hidden, weight, _), needs in zip(sides, wanted, strict=True):
                    z = torch.empty(rows.stop - rows.start, len(weight), dtype=dtype, device=device)
                    logits_into(hidden[rows], weight, z)
                    raw.append(z.requires_grad_(any(needs)))
                loss, of_raw = _of_chunk(call, raw, [side[2] for side in sides], gains)
                losses += torch.stack([loss.student, losses.new_zeros(()) if loss.teacher is None else loss.teacher])
                metrics[:, rows] = torch.stack([loss.metrics[name] for name in METRICS])
                for i, ((hidden, weight, _), g) in enumerate(zip(sides, of_raw, strict=True)):
                    if g is not None:
                        _accumulate(gradients[3 * i : 3 * i + 3], rows, g, hidden, weight)
        ctx.save_for_backward(*gradients)
        ctx.gains, ctx.dtypes = gains, [None if x is None else x.dtype for x in operands]
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)  # a loss that nobody asks the gradient of gives none
        return losses[0].clone(), losses[1].clone(), metrics

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> Any:
        found = []
        for i, (g, dtype) in enumerate(zip(ctx.saved_tensors, ctx.dtypes, strict=True)):
            of_side, gain = upstream[i // 3], ctx.gains[i // 3]
            found.append(None if g is None or of_side is None else (g * (of_side / gain)).to(dtype))
        return None, *found


def _of_chunk(call: _Call, raw: list[Tensor], biases: list[Any], gains: list[float]) -> Any:
    """The chunk's losses and metrics, and the gradients (c, V) of those products that want one, times their gains."""
    with torch.enable_grad():
        given = [
            outcomes.logits(head._scaled(x if bias is None else x + bias.detach()), call.temperature)
            for head, outcomes, x, bias in zip(call.heads, call.outcomes, raw, biases, strict=True)
        ]
        loss = distillation_loss(
            given[0],
            given[1],
            student=call.objectives[0],
            teacher=call.objectives[1],
            temperature=call.temperature,
            reduction="sum",
            backend=call.backend,
        )
        pairs = list(zip((loss.student, loss.teacher), gains, strict=True))  # neither reaches the other's logits
        learning = [x for x, (of_side, _) in zip(raw, pairs, strict=True) if of_side is not None and x.requires_grad]
        total = torch.stack([of_side * gain for of_side, gain in pairs if of_side is not None]).sum()
        gradients = iter(torch.autograd.grad(total, learning) if learning else ())
    found = [next(gradients) if any(x is one for one in learning) else None for x in raw]
    teacher = None if loss.teacher is None else loss.teacher.detach()
    return DistillationLoss(loss.student.detach(), teacher, loss.metrics), found


def _accumulate(gradients: list[Tensor | None], rows: slice, g: Tensor, hidden: Tensor, weight: Tensor) -> None:
    of_hidden, of_weight, of_bias = gradients
    narrow = g.to(hidden.dtype)
    if of_hidden is not None:
        accumulate(of_hidden[rows], narrow, weight, first=True)
    if of_weight is not None:
        accumulate(of_weight, narrow.t(), hidden[rows], first=False)
    if of_bias is not None:
        of_bias += g.sum(0)
