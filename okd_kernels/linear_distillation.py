"""The public losses: argument checks, reductions, and the choice of a backend.

Legend: N tokens (any leading shape), V vocabulary, D_s / D_t hidden sizes of student and teacher.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from okd_kernels import divergences, ops
from okd_kernels.divergences import Objective
from okd_kernels.heads import LinearHead
from okd_kernels.reference import reference_losses
from okd_kernels.rows import STATISTICS

BACKENDS = ("auto", "triton", "torch", "reference")
WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # where the GEMMs are near their peak: see README, "Measured"


class DistillationLoss(NamedTuple):
    """Losses of both sides, and detached per-token statistics.

    Attributes:
        student, teacher: scalars, or per token with `reduction="none"`; fp32 (fp64 for fp64 inputs). `teacher` is None
            where the teacher does not learn.
        metrics: name -> (...,) per-token statistics, zero in ignored rows: `forward_kl` = KL(teacher || student),
            `reverse_kl`, `student_entropy`, `teacher_entropy` (these at the loss's temperature), `student_nll`,
            `teacher_nll` (at temperature 1; zero without labels), `top1_agreement` (0 or 1).
    """

    student: Tensor
    teacher: Tensor | None
    metrics: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """student + teacher: one backward serves both, since neither loss reaches the other side."""
        return self.student if self.teacher is None else self.student + self.teacher


def linear_distillation_loss(
    student_hidden: Tensor,  # (..., D_s)
    student_head: Tensor | nn.Linear | LinearHead,  # (V, D_s)
    teacher_hidden: Tensor,  # (..., D_t)
    teacher_head: Tensor | nn.Linear | LinearHead,  # (V, D_t)
    labels: Tensor | None = None,  # (...,)
    *,
    student: str | Objective = "forward_kl",
    teacher: str | Objective | None = None,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,  # (...,)
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> DistillationLoss:
    """sum_i w_i (weight T^2 D(learner_i, target_i) + ce_weight CE(learner_i, label_i)) / normalizer, for both sides.

    From hidden states and head weights, chunk by chunk: whole logits never exist. Each objective holds the other side
    still, so the student's reaches `student_hidden` and the student's head only, the teacher's `teacher_hidden` and the
    teacher's head only. Nothing is computed for an input that needs no gradient; under `no_grad`, no gradient at all.

    Args:
        student_hidden, teacher_hidden: (..., D_s) and (..., D_t), equal leading shapes. Already shifted: row i predicts
            `labels[i]`.
        student_head, teacher_head: weight (V, D), `nn.Linear`, or `LinearHead` (bias, logit scale, softcap).
        labels: (...,) int64. Rows equal to `ignore_index` are excluded. Needed where a `ce_weight` is not 0.
        student: what the student minimises: a name out of `DIVERGENCES`, or an `Objective`.
        teacher: the same for the teacher; None holds it frozen. OKD (arXiv 2409.12512, Eq. 16):
            `Objective("forward_kl", weight=a, ce_weight=1 - a)`.
        temperature: T. Divergences are taken at T and times T^2 (Hinton et al. 2015); cross-entropies at T = 1.
        token_weights: (...,) factor of each token's loss.
        normalizer: divisor of the mean; default: the number (or total weight) of counted tokens. Under gradient
            accumulation pass the number of tokens of the whole batch.
        reduction: "mean", "sum", or "none": per token, differentiable, recomputed in backward.
        vocab_size: columns shared by both heads when they are padded differently; later columns exist for neither.
        workspace_bytes: bound of the two chunk buffers; default 256 MiB on a CPU, 2 GiB on a GPU.
        backend: "auto" (triton on GPUs, torch elsewhere), "triton", "torch", "reference". Never falls back silently.

    Returns:
        A `DistillationLoss`. Call `.total.backward()`, or backward on either side's loss.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
    """
    objectives = _objectives(student, teacher, labels)
    heads = [LinearHead.of(student_head), LinearHead.of(teacher_head)]
    hiddens = [student_hidden, teacher_hidden]
    shape = _common_shape(student_hidden, teacher_hidden)
    for i, name in enumerate(("student", "teacher")):
        hiddens[i], heads[i] = _operands(name, hiddens[i], heads[i])
    vocab_size = _shared_vocab(heads[0].weight.shape[0], heads[1].weight.shape[0], vocab_size)
    backend = resolve_backend(backend, student_hidden.device)
    rows = _Rows(shape, labels, token_weights, normalizer, reduction, ignore_index, vocab_size, student_hidden.device)
    _check_temperature(temperature)
    hiddens = [hidden.reshape(-1, hidden.shape[-1]) for hidden in hiddens]

    if backend == "reference":
        wide = ops.wide(hiddens[0].dtype, hiddens[1].dtype)
        with torch.autocast(student_hidden.device.type, enabled=False):
            logits = [
                head.cast(wide).logits(hidden.to(wide), vocab_size) for hidden, head in zip(hiddens, heads, strict=True)
            ]
            losses, statistics = reference_losses(
                logits[0],
                logits[1],
                rows.labels,
                student=objectives[0],
                teacher=objectives[1],
                temperature=temperature,
            )
        return rows.reduce(losses, statistics, objectives)

    operands = [
        operand
        for hidden, head in zip(hiddens, heads, strict=True)
        for operand in (hidden, head.weight, head.bias, *head.low_rank(hidden))
    ]
    learns = torch.is_grad_enabled()
    needs = [
        learns and t is not None and t.requires_grad and objectives[i // ops.PER_SIDE] is not None
        for i, t in enumerate(operands)
    ]
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES.get(student_hidden.device.type, WORKSPACE_BYTES["cuda"])
    elif workspace_bytes <= 0:
        raise ValueError(f"expected workspace_bytes > 0; got {workspace_bytes}")
    options = (
        *_packed(objectives),
        [number for head in heads for number in (head.logit_scale, head.softcap or 0.0)],
        float(temperature),
        vocab_size,
        workspace_bytes,
        backend,
        needs,
    )
    per_token = reduction == "none"
    weights, scale = rows.weights(ops.wide(hiddens[0].dtype, hiddens[1].dtype))
    totals, losses, statistics, *_ = ops.linear_distillation(
        *operands, rows.labels, weights, scale, per_token, *options
    )
    if per_token:
        return rows.reduce(losses, statistics, objectives)
    return DistillationLoss(totals[0], None if objectives[1] is None else totals[1], rows.metrics(statistics))


def distillation_loss(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    labels: Tensor | None = None,  # (...,)
    *,
    student: str | Objective = "forward_kl",
    teacher: str | Objective | None = None,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    vocab_size: int | None = None,
    backend: str = "auto",
) -> DistillationLoss:
    """`linear_distillation_loss` for a trainer that holds logits already: the same objectives, options and errors.

    The row mathematics is in fp32 whatever the logits' dtype, but logits rounded to bf16 have lost most of the gradient
    of two similar models before they get here (see README, "Numerics"): prefer hidden states.
    """
    objectives = _objectives(student, teacher, labels)
    for name, logits in (("student", student_logits), ("teacher", teacher_logits)):
        if not logits.is_floating_point():
            raise TypeError(f"expected floating-point {name}_logits; got {logits.dtype}")
    _common_shape(student_logits, teacher_logits, "logits")
    vocab_size = _shared_vocab(student_logits.shape[-1], teacher_logits.shape[-1], vocab_size)
    backend = resolve_backend(backend, student_logits.device)
    rows = _Rows(
        student_logits.shape[:-1],
        labels,
        token_weights,
        normalizer,
        reduction,
        ignore_index,
        vocab_size,
        student_logits.device,
    )
    _check_temperature(temperature)
    z, u = (logits.reshape(-1, logits.shape[-1]) for logits in (student_logits, teacher_logits))
    if backend == "reference":
        wide = ops.wide(z.dtype, u.dtype)
        z, u = z[:, :vocab_size].to(wide), u[:, :vocab_size].to(wide)
        losses, statistics = reference_losses(
            z, u, rows.labels, student=objectives[0], teacher=objectives[1], temperature=temperature
        )
    else:
        learns = torch.is_grad_enabled()
        needs = [learns and x.requires_grad and o is not None for x, o in zip((z, u), objectives, strict=True)]
        z, u = (x if x.stride(-1) == 1 else x.contiguous() for x in (z, u))
        losses, statistics, *_ = ops.logit_distillation(
            z, u, rows.labels, *_packed(objectives), float(temperature), vocab_size, backend, needs
        )
    return rows.reduce(losses, statistics, objectives)


class LinearDistillationLoss(nn.Module):
    """`linear_distillation_loss` with its options fixed: `LinearDistillationLoss(student="jsd", teacher=None, ...)`."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(
        self, student_hidden, student_head, teacher_hidden, teacher_head, labels=None, **options
    ) -> DistillationLoss:
        """The loss of one batch; keyword options override those of the constructor."""
        return linear_distillation_loss(
            student_hidden, student_head, teacher_hidden, teacher_head, labels, **{**self.options, **options}
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class _Rows:
    """Labels, weights and reduction of the flattened tokens."""

    def __init__(self, shape, labels, token_weights, normalizer, reduction, ignore_index, vocab_size, device):
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"expected reduction to be mean, sum or none; got {reduction!r}")
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
        self.labels = None
        if labels is not None:
            flat = labels.reshape(-1)
            counted = flat != ignore_index
            if device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere, reading them would synchronise
                wrong = flat[counted & ((flat < 0) | (flat >= vocab_size))]
                if len(wrong):
                    raise ValueError(
                        f"expected labels in [0, {vocab_size}) or ignore_index={ignore_index}; got {wrong[0].item()}"
                    )
            self.labels = torch.where(counted, flat, -1)
        self.token_weights = None if token_weights is None else token_weights.reshape(-1)

    def _token_weights(self, dtype: torch.dtype) -> Tensor:
        n = self.shape.numel()
        weights = torch.ones(n, dtype=dtype, device=self.device)
        if self.token_weights is not None:
            weights = self.token_weights.to(dtype)
        return weights if self.labels is None else torch.where(self.labels >= 0, weights, 0)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Row weights (N, 2) and the factor 1 / normalizer, a 0-d tensor on the device."""
        weights = self._token_weights(dtype)
        if self.reduction != "mean":
            scale = torch.ones((), dtype=dtype, device=self.device)
        else:
            total = weights.sum() if self.normalizer is None else self.normalizer
            total = torch.as_tensor(total, device=self.device).to(dtype)
            scale = torch.where(total > 0, 1 / total, 0)  # no counted token: zero loss, zero gradients
        return weights.unsqueeze(1).expand(-1, 2), scale

    def reduce(self, losses: Tensor, statistics: Tensor, objectives: list[Objective | None]) -> DistillationLoss:
        """From per-token losses (N, 2)."""
        if self.reduction == "none":
            losses = losses if self.token_weights is None else losses * self.token_weights.to(losses.dtype).unsqueeze(1)
            student, teacher = (losses[:, i].reshape(self.shape) for i in range(2))
        else:
            weights, scale = self.weights(losses.dtype)
            student, teacher = (losses * weights).sum(0) * scale
        return DistillationLoss(student, None if objectives[1] is None else teacher, self.metrics(statistics))

    def metrics(self, statistics: Tensor) -> dict[str, Tensor]:
        return {name: statistics[:, i].detach().reshape(self.shape) for i, name in enumerate(STATISTICS)}


def _packed(objectives: list[Objective | None]) -> list[Any]:
    return [part for objective in objectives for part in ops.pack(objective)]


def _objectives(student, teacher, labels) -> list[Objective | None]:
    objectives = [Objective.of(student), None if teacher is None else Objective.of(teacher)]
    for name, objective in zip(("student", "teacher"), objectives, strict=True):
        if objective is not None and objective.ce_weight > 0 and labels is None:
            raise ValueError(f"expected labels, since the {name}'s ce_weight is {objective.ce_weight}; got None")
    return objectives


def _operands(name: str, hidden: Tensor, head: LinearHead) -> tuple[Tensor, LinearHead]:
    """Hidden states and head in the dtype of their GEMM: autocast's where it is on."""
    if not hidden.is_floating_point():
        raise TypeError(f"expected floating-point {name}_hidden; got {hidden.dtype}")
    if hidden.dim() < 1 or hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"expected {name}_hidden of shape (..., {head.weight.shape[1]}), since the {name}'s head is "
            f"{tuple(head.weight.shape)}; got {tuple(hidden.shape)}: are student and teacher swapped?"
        )
    if hidden.device != head.weight.device:
        raise ValueError(
            f"expected the {name}'s head on {hidden.device}, as its hidden states; got {head.weight.device}"
        )
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), head.cast(dtype)
    if hidden.dtype != head.weight.dtype:
        raise TypeError(
            f"expected the {name}'s head in {hidden.dtype}, as its hidden states; got {head.weight.dtype}: cast one of "
            "them, or run under torch.autocast"
        )
    return hidden, head


def _common_shape(student: Tensor, teacher: Tensor, what: str = "hidden") -> torch.Size:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"expected student_{what} and teacher_{what} of one leading shape; got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: select the same tokens of both"
        )
    if student.device != teacher.device:
        raise ValueError(f"expected both models' {what} on one device; got {student.device} and {teacher.device}")
    return student.shape[:-1]


def _shared_vocab(student: int, teacher: int, vocab_size: int | None) -> int:
    if vocab_size is None:
        if student != teacher:
            raise ValueError(
                f"expected heads of one vocabulary size; got student {student} and teacher {teacher}. If they share a "
                f"tokenizer and are padded differently, pass vocab_size=len(tokenizer), at most {min(student, teacher)}"
            )
        return student
    if not 0 < vocab_size <= min(student, teacher):
        raise ValueError(
            f"expected vocab_size in [1, {min(student, teacher)}], as both heads have rows; got {vocab_size}"
        )
    return vocab_size


def _check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"expected a temperature > 0; got {temperature}")


def resolve_backend(backend: str, device: torch.device) -> str:
    """The backend that will run on `device`: "auto" resolved, any other checked. Raises ValueError."""
    if backend not in BACKENDS:
        raise ValueError(f"expected backend to be one of {', '.join(BACKENDS)}; got {backend!r}")
    has_triton = divergences.DIVERGENCES["forward_kl"].rule is not None
    if backend == "auto":
        return "triton" if has_triton and device.type == "cuda" else "torch"
    if backend == "triton" and not has_triton:
        raise ValueError(
            "expected Triton for backend='triton'; it is not installed: pip install triton, or backend='torch'"
        )
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "expected CUDA or ROCm tensors for backend='triton'; got cpu: use backend='auto', or set "
            "TRITON_INTERPRET=1 before Python starts to debug"
        )
    return backend
