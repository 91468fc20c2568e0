"""How a batch becomes a loss: one function for each way, named in `LOSSES`.

Each takes the pair, a batch of `okd.data.Collator` and the normalizer, and returns a `DistillationLoss`. Metrics beyond
those of `okd_kernels` are per-token too: the trainer logs their means.

Shapes: B rows padded to T tokens, N of which come before a response token; D the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from okd.selection import Lesson
from okd_kernels import DistillationLoss, LinearHead

if TYPE_CHECKING:
    from okd.pair import Batch, StudentTeacher

Normalizer = Tensor | float | None
Loss = Callable[["StudentTeacher", "Batch", Normalizer], DistillationLoss]


def divergence(pair: StudentTeacher, batch: Batch, normalizer: Normalizer) -> DistillationLoss:
    """The student's divergence from its teacher, and the teacher's loss where it learns (OKD, Eq. 16 and 17)."""
    return pair.distil(pair.student_rows(batch), pair.teacher_rows(batch), batch["targets"], normalizer)


def cross_entropy(pair: StudentTeacher, batch: Batch, normalizer: Normalizer) -> DistillationLoss:
    """Cross-entropy of the response tokens, without a teacher."""
    targets = batch["targets"]
    logits = LinearHead.from_model(pair.student).logits(pair.student_rows(batch)).float()
    nll = nn.functional.cross_entropy(logits, targets, reduction="none")
    loss = pair.student_objective.ce_weight * nll.sum() / (max(len(targets), 1) if normalizer is None else normalizer)
    return DistillationLoss(loss, None, {"student_nll": nll.detach()})


def ensemble(pair: StudentTeacher, batch: Batch, normalizer: Normalizer) -> DistillationLoss:
    """sum_i w_i D(p_i, q) + c CE over the teachers, with each example's weights w from the pair's selection.

    The weights sum to one, so that of sum_i w_i (D(p_i, q) + c CE) the cross-entropy counts once. They hang on the
    losses themselves (a teacher's NLL, the reward), so per-token losses come first, and both projections are made twice
    per teacher: forward, and again with the gradients in backward. Whole logits never exist.

    Metrics: those of `okd_kernels`, averaged with the weights; `distillation_loss` sum_i w_i D(p_i, q); and for teacher
    i = 1, 2, ... `teacher_<i>_weight`, and with a policy `teacher_<i>_selected` and `reward`.
    """
    assert pair.teacher is not None and pair.selection is not None
    targets, positions = batch["targets"], batch["positions"]
    n, length = batch["input_ids"].shape
    student = pair.student_rows(batch)
    taught = pair.teacher(batch["input_ids"], batch["attention_mask"], positions)
    losses = [pair.distil(student, rows, targets, teacher_head=head, reduction="none") for rows, head in taught]
    example = positions // length
    own = (example == torch.arange(n, device=example.device).unsqueeze(1)).to(losses[0].student.dtype)  # (B, N)
    c = pair.student_objective.ce_weight
    divergences = torch.stack([loss.student.detach() - c * loss.metrics["student_nll"] for loss in losses], 1)
    mean = own / own.sum(1, keepdim=True).clamp_min(1)
    choice = pair.selection(Lesson(student, [rows for rows, _ in taught], losses, divergences, mean, pair.progress))

    weights = choice.weights[example]  # (N, K)
    per_token = (weights * torch.stack([loss.student for loss in losses], 1)).sum(1)
    if choice.policy_loss is not None:
        surrogate = choice.policy_loss[example]
        per_token = per_token + (surrogate - surrogate.detach())
    weights = weights.detach()
    metrics = {
        name: (weights * torch.stack([loss.metrics[name] for loss in losses], 1)).sum(1) for name in losses[0].metrics
    }
    metrics["distillation_loss"] = (weights * divergences).sum(1)
    for name, value in {"weight": weights, **{k: v[example] for k, v in choice.metrics.items()}}.items():
        if value.dim() == 1:
            metrics[name] = value
        else:
            metrics |= {f"teacher_{i}_{name}": column for i, column in enumerate(value.unbind(1), start=1)}
    total = per_token.sum() / (max(len(targets), 1) if normalizer is None else normalizer)
    return DistillationLoss(total, None, metrics)


LOSSES: Mapping[str, Loss] = {"divergence": divergence, "cross_entropy": cross_entropy, "ensemble": ensemble}
