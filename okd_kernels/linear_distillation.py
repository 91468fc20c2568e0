"""The public losses of two models: `linear_distillation_loss` and its relatives.

Legend: N tokens (any leading shape), V vocabulary, D_s / D_t hidden sizes of student and teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from okd_kernels import ops
from okd_kernels.arguments import (
    check_objectives,
    check_teacher_share,
    check_temperature,
    chunk_workspace,
    common_shape,
    gemm_operands,
    resolve_backend,
    shared_vocab,
)
from okd_kernels.divergences import Objective
from okd_kernels.heads import LinearHead
from okd_kernels.reference import reference_losses
from okd_kernels.tokens import DistillationLoss, Tokens


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
    teacher_share: float = 1.0,
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
        teacher_share: t. Below 1, the student's target is softmax((1 - t) z + t u) of its own logits z, held still, and
            the teacher's u (TAID, arXiv 2501.16937); so are the metrics'. For a frozen teacher.
        token_weights: (...,) factor of each token's loss.
        normalizer: divisor of the mean; default: the number (or total weight) of counted tokens; 0 makes loss and
            gradients 0. Under gradient accumulation pass the number of tokens of the whole batch.
        reduction: "mean", "sum", or "none": per token, differentiable, recomputed in backward.
        vocab_size: columns shared by both heads when they are padded differently; later columns exist for neither.
        workspace_bytes: bound of the two chunk buffers, padding aside; default 256 MiB on a CPU, 2 GiB on a GPU.
        backend: "auto" (triton on GPUs, torch elsewhere), "triton", "torch", "reference". Never falls back silently.

    Returns:
        A `DistillationLoss`. Call `.total.backward()`, or backward on one side's loss: the other gets no gradient then
        (under torch.compile zeros). Both apart take `retain_graph=True` on the first.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
    """
    objectives = check_objectives(student, teacher, labels)
    heads = [LinearHead.of(student_head), LinearHead.of(teacher_head)]
    hiddens = [student_hidden, teacher_hidden]
    shape = common_shape(student_hidden, teacher_hidden)
    for i, name in enumerate(("student", "teacher")):
        hiddens[i], heads[i] = gemm_operands(name, hiddens[i], heads[i])
    vocab_size = shared_vocab(heads[0].weight.shape[0], heads[1].weight.shape[0], vocab_size)
    backend = resolve_backend(backend, student_hidden.device, ops.wide(hiddens[0].dtype, hiddens[1].dtype))
    rows = Tokens(shape, labels, token_weights, normalizer, reduction, ignore_index, vocab_size, student_hidden.device)
    check_temperature(temperature)
    check_teacher_share(teacher_share, objectives[1])
    hiddens = [hidden.reshape(-1, hidden.shape[-1]) for hidden in hiddens]

    if backend == "reference":
        wide = ops.wide(hiddens[0].dtype, hiddens[1].dtype)
        if rows.labels is not None:  # ignored rows may hold NaN, which their zero gradients would bring to the heads
            hiddens = [hidden.masked_fill((rows.labels < 0).unsqueeze(1), 0) for hidden in hiddens]
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
                teacher_share=teacher_share,
            )
        return rows.reduce(losses.unbind(1), statistics, objectives)

    operands = [
        operand
        for hidden, head in zip(hiddens, heads, strict=True)
        for operand in (hidden, head.weight, head.bias, *head.low_rank(hidden, rows.labels))
    ]
    learns = torch.is_grad_enabled()
    needs = [
        learns and t is not None and t.requires_grad and objectives[i // ops.PER_SIDE] is not None
        for i, t in enumerate(operands)
    ]
    options = (
        *_packed(objectives),
        [number for head in heads for number in (head.logit_scale, head.softcap or 0.0)],
        float(temperature),
        float(teacher_share),
        vocab_size,
        chunk_workspace(workspace_bytes, student_hidden.device),
        backend,
        needs,
    )
    per_token = reduction == "none"
    weights, scale = rows.weights(ops.wide(hiddens[0].dtype, hiddens[1].dtype))
    student_total, teacher_total, *losses, statistics = ops.linear_distillation(
        *operands, rows.labels, weights, scale, per_token, *options
    )[:5]
    if per_token:
        return rows.reduce(losses, statistics, objectives)
    return DistillationLoss(student_total, None if objectives[1] is None else teacher_total, rows.metrics(statistics))


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
    """`linear_distillation_loss` for a trainer that holds logits already: the same objectives and errors, and the
    same options but `teacher_share` and `workspace_bytes`.

    The row mathematics is in fp32 whatever the logits' dtype, but logits rounded to bf16 have lost most of the gradient
    of two similar models before they get here (see README, "Numerics"): prefer hidden states.
    """
    objectives = check_objectives(student, teacher, labels)
    for name, logits in (("student", student_logits), ("teacher", teacher_logits)):
        if not logits.is_floating_point():
            raise TypeError(f"expected floating-point {name}_logits; got {logits.dtype}")
    common_shape(student_logits, teacher_logits, "logits")
    vocab_size = shared_vocab(student_logits.shape[-1], teacher_logits.shape[-1], vocab_size)
    backend = resolve_backend(backend, student_logits.device, ops.wide(student_logits.dtype, teacher_logits.dtype))
    rows = Tokens(
        student_logits.shape[:-1],
        labels,
        token_weights,
        normalizer,
        reduction,
        ignore_index,
        vocab_size,
        student_logits.device,
    )
    check_temperature(temperature)
    z, u = (logits.reshape(-1, logits.shape[-1]) for logits in (student_logits, teacher_logits))
    if backend == "reference":
        wide = ops.wide(z.dtype, u.dtype)
        z, u = z[:, :vocab_size].to(wide), u[:, :vocab_size].to(wide)
        both, statistics = reference_losses(
            z, u, rows.labels, student=objectives[0], teacher=objectives[1], temperature=temperature
        )
        losses = both.unbind(1)
    else:
        learns = torch.is_grad_enabled()
        needs = [learns and x.requires_grad and o is not None for x, o in zip((z, u), objectives, strict=True)]
        z, u = (x if x.stride(-1) == 1 else x.contiguous() for x in (z, u))
        *losses, statistics = ops.logit_distillation(
            z, u, rows.labels, *_packed(objectives), float(temperature), vocab_size, backend, needs
        )[:3]
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


def _packed(objectives: list[Objective | None]) -> list[Any]:
    return [part for objective in objectives for part in ops.pack(objective)]
