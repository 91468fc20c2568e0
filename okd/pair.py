"""Student and teacher as one module, whose forward is the loss of a batch: what DDP and FSDP wrap."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from okd.config import OKDConfig
from okd.models import hidden_states
from okd_kernels import DistillationLoss, LinearHead, Objective, linear_distillation_loss


class StudentTeacher(nn.Module):
    """Student and teacher as one module: forward is the loss of a batch.

    Only response tokens reach the heads: `positions`, found by the collator on the CPU, select the rows.
    """

    accepts_loss_kwargs = True  # tells Trainer that the loss is divided by the tokens of the whole (accumulated) batch

    def __init__(self, student: Any, teacher: Any | None, args: OKDConfig):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.student_objective: Objective = args.student_objective
        self.teacher_objective: Objective | None = args.teacher_objective
        self.temperature, self.vocab_size = args.temperature, args.vocab_size

    def forward(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T)
        positions: Tensor,  # (N,) flat indices of the rows that predict a response token
        targets: Tensor,  # (N,)
        normalizer: Tensor | float | None = None,
    ) -> DistillationLoss:
        student = self._rows(self.student, input_ids, attention_mask, positions)
        head = LinearHead.from_model(self.student)
        if self.teacher is None:
            return _supervised(student, head, targets, normalizer, self.student_objective.ce_weight)
        with torch.set_grad_enabled(self.teacher_objective is not None and torch.is_grad_enabled()):
            teacher = self._rows(self.teacher, input_ids, attention_mask, positions)
        return linear_distillation_loss(
            student,
            head,
            teacher,
            LinearHead.from_model(self.teacher),
            targets,
            student=self.student_objective,
            teacher=self.teacher_objective,
            normalizer=normalizer,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
        )

    @staticmethod
    def _rows(model: Any, input_ids: Tensor, attention_mask: Tensor, positions: Tensor) -> Tensor:
        return hidden_states(model, input_ids, attention_mask).flatten(0, 1)[positions]

    def train(self, mode: bool = True) -> StudentTeacher:
        """A frozen teacher stays in evaluation mode: dropout would blur the target."""
        super().train(mode)
        if self.teacher is not None and self.teacher_objective is None:
            self.teacher.eval()
        return self

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.student.gradient_checkpointing_enable(**options)
        if self.teacher is not None and self.teacher_objective is not None:
            self.teacher.gradient_checkpointing_enable(**options)
            self.teacher.enable_input_require_grads()


def _supervised(
    hidden: Tensor, head: LinearHead, targets: Tensor, normalizer: Tensor | float | None, weight: float
) -> DistillationLoss:
    """Cross-entropy of the response rows, for a student without a teacher."""
    logits = head.logits(hidden).float()
    nll = nn.functional.cross_entropy(logits, targets, reduction="none")
    loss = weight * nll.sum() / (max(len(targets), 1) if normalizer is None else normalizer)
    return DistillationLoss(loss, None, {"student_nll": nll.detach()})
