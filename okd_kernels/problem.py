"""A checked call as one problem: its tokens, its sides, and the way to the operator (or the reference) and back.

Legend: N tokens (any leading shape), V vocabulary, D hidden size of either model, K target ids a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from okd_kernels.call import (
    Operands,
    Spec,
    check_labels,
    check_options,
    chunk_workspace,
    compute_dtype,
    packed,
    resolve_backend,
)
from okd_kernels.columns import BackwardColumns
from okd_kernels.divergences import Objective
from okd_kernels.heads import LinearHead
from okd_kernels.operator import Outputs, distil, metric_names
from okd_kernels.reference import reference_losses, sparse_teacher_logits
from okd_kernels.rows import METRICS
from okd_kernels.sides import wide
from okd_kernels.targets import SPARSE_METRICS

EPS = torch.finfo(torch.float32).eps


class DistillationLoss(NamedTuple):
    """Losses of both sides, and detached per-token metrics.

    Attributes:
        student: a scalar, or per token with `reduction="none"`; fp32 (fp64 for fp64 inputs).
        teacher: the same; None where the teacher does not learn.
        metrics: name -> (...,) per-token numbers, zero in ignored rows: `forward_kl` = KL(teacher || student),
            `reverse_kl`, `student_entropy`, `teacher_entropy` (these at the loss's temperature), `student_nll`,
            `teacher_nll` (at temperature 1; zero without labels), `top1_agreement` (0 or 1). "teacher" is the target
            that the student has learned from; of a sparse one further `target_mass` and `student_mass`, on its ids.
            With `backward_columns` also, the same in all rows, `student_dx_error`, the relative error of dX over all of
            them, as random directions measure it, and `student_columns_kept`, the share; of a teacher that learns,
            too; not with `reduction="none"`, which makes gradients in backward.
    """

    student: Tensor
    teacher: Tensor | None
    metrics: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """student + teacher: one backward serves both, since neither loss reaches the other side."""
        return self.student if self.teacher is None else self.student + self.teacher


class Tokens:
    """Labels, weights and reduction of the flattened tokens."""

    def __init__(self, shape, labels, token_weights, normalizer, reduction, ignore_index, device):
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"expected reduction to be mean, sum or none; got {reduction!r}")
        if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
            raise ValueError(f"expected one normalizer; got a tensor of shape {tuple(normalizer.shape)}")
        if not isinstance(normalizer, Tensor | None) and not normalizer >= 0:
            raise ValueError(f"expected normalizer >= 0; got {normalizer}")
        if normalizer is not None and reduction != "mean":
            raise ValueError(f"expected normalizer with reduction='mean' only; got reduction={reduction!r}")
        for name, tensor in (("labels", labels), ("token_weights", token_weights)):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"expected {name} of shape {tuple(shape)}, one for each row; got {tuple(tensor.shape)}"
                )
            if tensor is not None and tensor.device != device:
                raise ValueError(f"expected {name} on {device}, as the student's rows; got {tensor.device}")
        if labels is not None and labels.dtype != torch.int64:
            raise TypeError(f"expected labels of dtype torch.int64; got {labels.dtype}: pass labels.long()")
        if token_weights is not None and token_weights.requires_grad:
            raise ValueError(
                "expected token_weights without gradient; use reduction='none' and weigh the losses yourself"
            )
        self.shape, self.reduction, self.normalizer, self.device = shape, reduction, normalizer, device
        self.ignore_index = ignore_index
        self.labels = None if labels is None else labels.reshape(-1)
        self.ignored = None if self.labels is None else self.labels == ignore_index  # (N,)
        self.token_weights = None if token_weights is None else token_weights.reshape(-1)

    def weights(self, dtype: torch.dtype) -> Tensor:
        """(N,), 0 in ignored rows, whatever they were given."""
        weights = torch.ones(self.shape.numel(), dtype=dtype, device=self.device)
        if self.token_weights is not None:
            weights = self.token_weights.to(dtype)
        return weights if self.ignored is None else weights.masked_fill(self.ignored, 0)

    def inverse_normalizer(self, weights: Tensor) -> Tensor:
        """1 / normalizer, (), on the device. No host synchronisation with it, wherever the normalizer is."""
        total = weights.sum() if self.normalizer is None else self.normalizer
        if self.reduction != "mean":
            total = 1.0
        elif isinstance(total, Tensor) and total.device != weights.device and not torch.compiler.is_compiling():
            total = total.item()  # of a CPU's tensor
        if not isinstance(total, Tensor):  # filled on the device: copying a number there would synchronise
            total = weights.new_full((), total)
        total = total.to(weights.device, weights.dtype).reshape(())
        return torch.where(total == 0, 0, 1 / total)  # no counted token: zero loss, zero gradients

    def result(
        self, objectives: tuple[Objective, Objective | None], losses: Sequence[Tensor], metrics: dict[str, Tensor]
    ) -> DistillationLoss:
        """From losses of student and teacher, totals () or per token (N,), the latter not weighted yet."""
        student, teacher = losses
        if self.reduction == "none":
            weights = self.weights(student.dtype)
            student, teacher = ((x if self.token_weights is None else x * weights).reshape(self.shape) for x in losses)
        metrics = {name: x.detach().reshape(self.shape) for name, x in metrics.items()}
        return DistillationLoss(student, None if objectives[1] is None else teacher, metrics)


class CallSide(NamedTuple):
    """One model as the caller gives it, flattened."""

    hidden: Tensor  # (N, D), or logits (N, V)
    head: LinearHead | None  # None: logits
    dtype: torch.dtype  # of the GEMMs' operands

    @classmethod
    def of(cls, name: str, hidden: Tensor, head: Any) -> CallSide:
        head = LinearHead.of(head).gathered()
        dtype = compute_dtype(name, hidden, head)
        return cls(hidden.reshape(-1, hidden.shape[-1]), head, dtype)

    @classmethod
    def of_logits(cls, logits: Tensor) -> CallSide:
        flat = logits.reshape(-1, logits.shape[-1])
        return cls(flat if flat.stride(-1) == 1 else flat.contiguous(), None, logits.dtype)

    @property
    def columns(self) -> int:
        return self.hidden.shape[1] if self.head is None else len(self.head.weight)

    def operands(self, name: str, ignored: Tensor | None) -> dict[str, Tensor | None]:
        found: tuple[Tensor | None, ...] = (self.hidden, None, None, None, None)
        if self.head is not None:
            found = (self.hidden, self.head.weight, self.head.bias, *self.head.low_rank(self.hidden, ignored))
        return {f"{name}_{x}": t for x, t in zip(("hidden", "weight", "bias", "lora_x", "lora_b"), found, strict=True)}

    def logits(self, dtype: torch.dtype, vocab_size: int, ignored: Tensor | None) -> Tensor:
        """Whole logits (N, vocab_size), for the reference."""
        x = self.hidden.to(self.dtype).to(dtype)
        if ignored is not None:  # they may hold NaN, which their zero gradients would bring to the heads
            x = x.masked_fill(ignored.unsqueeze(1), 0)
        if self.head is None:
            return x[:, :vocab_size]
        with torch.autocast(x.device.type, enabled=False):
            return self.head.cast(self.dtype).cast(dtype).logits(x, vocab_size)


def solve(
    tokens: Tokens,
    objectives: tuple[Objective, Objective | None],
    sides: tuple[CallSide, ...],  # student, and teacher but for sparse targets
    *,
    vocab_size: int,
    temperature: float,
    target_mix: float,
    group: dist.ProcessGroup | None,
    compact: bool,
    columns: BackwardColumns,
    backend: str,
    workspace_bytes: int | None = None,
    targets: tuple[Tensor, ...] = (),  # ids and log-probabilities (N, K) of sparse ones
    tail: str = "",
) -> DistillationLoss:
    """What all of them come to: one call of the operator, or of the reference."""
    check_options(temperature, target_mix, objectives[1], group, backend)
    dtype, device = wide(*(side.dtype for side in sides)), tokens.device
    backend, workspace_bytes = resolve_backend(backend, device, dtype), chunk_workspace(workspace_bytes, device)
    if backend == "reference":
        if not columns.all:
            raise ValueError(
                "expected backward_columns=None for backend='reference', which is exact; got a share or bound"
            )
        return _reference(tokens, objectives, sides, targets, tail, vocab_size, temperature, target_mix, dtype)
    operands: dict[str, Any] = dict.fromkeys(Operands._fields)
    for name, side in zip(("student", "teacher"), sides, strict=False):
        operands |= side.operands(name, tokens.ignored)
    learners = [name for name, x in zip(("student", "teacher"), objectives, strict=True) if x is not None]
    wanted = [
        name
        for name, x in operands.items()
        if x is not None and x.requires_grad and name.startswith(tuple(learners)) and torch.is_grad_enabled()
    ]
    operands |= dict(zip(("target_ids", "target_log_probs"), targets, strict=False))
    weights = tokens.weights(dtype)
    operands |= {
        "labels": tokens.labels,
        "row_weights": weights.unsqueeze(1).expand(-1, 2),
        "inverse_normalizer": tokens.inverse_normalizer(weights),
    }
    heads = [side.head for side in (*sides, *sides)[:2]]
    spec = Spec(
        *packed(objectives[0]),
        *packed(objectives[1]),
        [x for head in heads for x in ((1.0, 0.0) if head is None else (head.logit_scale, head.softcap or 0.0))],
        sides[0].dtype,
        sides[-1].dtype,
        tail,
        float(target_mix),
        float(temperature),
        vocab_size,
        tokens.ignore_index,
        workspace_bytes,
        backend,
        "" if group is None else group.group_name,
        compact,
        columns.share,
        columns.bound,
        columns.exact_head,
        tokens.reduction == "none",
        ",".join(wanted),
    )
    found = Outputs(*distil(*operands.values(), *spec))
    losses = found[2:4] if spec.per_token else found[:2]
    metrics = dict(zip(metric_names(spec), found.metrics.unbind(1), strict=True))
    return tokens.result(objectives, losses, metrics)


def _reference(
    tokens: Tokens,
    objectives: tuple[Objective, Objective | None],
    sides: tuple[CallSide, ...],
    targets: tuple[Tensor, ...],
    tail: str,
    vocab_size: int,
    temperature: float,
    target_mix: float,
    dtype: torch.dtype,
) -> DistillationLoss:
    """By whole logits and plain autograd."""
    if tokens.labels is not None:
        check_labels(tokens.labels, tokens.ignore_index, vocab_size)
    z, *others = (side.logits(dtype, vocab_size, tokens.ignored) for side in sides)
    masses, options = {}, {"temperature": temperature, "target_mix": target_mix, "ignore_index": tokens.ignore_index}
    if tail:
        ids, log_probs = targets
        if tokens.ignored is not None:
            log_probs = log_probs.masked_fill(tokens.ignored.unsqueeze(1), -torch.inf)
        least = EPS if objectives[0].divergence == "reverse_kl" else 0.0
        u, *of_ids = sparse_teacher_logits(z, ids, log_probs, tail, temperature, least)
        others = [u]
        of_ids = [x if tokens.ignored is None else x.masked_fill(tokens.ignored, 0) for x in of_ids]
        masses = dict(zip(SPARSE_METRICS, of_ids, strict=True))
        options["mass"] = of_ids[0] if tail == "none" else None
    both, metrics = reference_losses(
        z, others[0], tokens.labels, student=objectives[0], teacher=objectives[1], **options
    )
    losses = both.unbind(1)
    if tokens.reduction != "none":
        weights = tokens.weights(dtype)
        losses = tuple((x * weights).sum() * tokens.inverse_normalizer(weights) for x in losses)
    return tokens.result(objectives, losses, dict(zip(METRICS, metrics.unbind(1), strict=True)) | masses)
