"""Student and teacher as one module, whose forward is the loss of a batch: what DDP and FSDP wrap."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from okd.config import OKDConfig
from okd.models import hidden_states
from okd.objectives import LOSSES, Loss
from okd.selection import SELECTIONS
from okd_kernels import DistillationLoss, LinearHead, Objective, linear_distillation_loss

Batch = Mapping[str, Tensor]  # input_ids and attention_mask (B, T), positions and targets (N,), student_written (B,)


class StudentTeacher(nn.Module):
    """Student and teacher, or teachers and what selects among them, as one module: forward is the loss of a batch.

    Only response tokens reach the heads: `positions`, found by the collator on the CPU, select the rows.

    Attributes:
        progress: share of the training that is done, 0 to 1, kept by the trainer for losses that follow a schedule.
        teacher_objective: L_t; None where the teacher is frozen, or does not learn at this step.
        student_learns: at this step; else its loss is a value without gradient.
    """

    accepts_loss_kwargs = True  # tells Trainer that the loss is divided by the tokens of the whole (accumulated) batch

    def __init__(self, student: Any, teacher: Any | None, args: OKDConfig):
        super().__init__()
        self.student, self.teacher, self.args = student, teacher, args
        self.student_objective: Objective = args.student_objective
        self.teacher_objective: Objective | None = args.teacher_objective
        self.loss = LOSSES[args.preset.loss]
        self.progress = 0.0
        self.student_learns = True
        self.selection: nn.Module | None = None
        if args.preset.selection is not None and teacher is not None:
            width = student.config.get_text_config().hidden_size
            self.selection = SELECTIONS[args.preset.selection](width, teacher.widths, args)

    def at(self, step: int, max_steps: int) -> None:
        """Set who learns at a step of the training. Where they alternate, the student has the even steps.

        A side that does not learn has no gradient at all, rather than one of zero, by which AdamW's momentum would go
        on moving it.
        """
        self.progress = step / max(1, max_steps)
        online = self.args.online and self.progress >= self.args.online_start
        teacher_turn = step % 2 == 1 if self.args.alternates else True
        self.teacher_objective = self.args.teacher_objective if online and teacher_turn else None
        self.student_learns = not (online and self.args.alternates and teacher_turn)

    def forward(
        self, normalizer: Tensor | float | None = None, loss: Loss | None = None, **batch: Tensor
    ) -> DistillationLoss:
        """The loss of a batch; with `loss`, another one than the method's."""
        return (loss or self.loss)(self, batch, normalizer)

    def student_rows(self, batch: Batch) -> Tensor:
        """(N, D) hidden states of the student that predict a response token."""
        with torch.set_grad_enabled(self.student_learns and torch.is_grad_enabled()):
            return self._rows(self.student, batch)

    def student_head(self) -> LinearHead:
        """The student's head, cut from the graph where it does not learn."""
        head = LinearHead.from_model(self.student)
        if self.student_learns:
            return head
        bias = None if head.bias is None else head.bias.detach()
        lora = None if head.lora is None else (head.lora[0].detach(), head.lora[1].detach(), head.lora[2])
        return dataclasses.replace(head, weight=head.weight.detach(), bias=bias, lora=lora)

    def teacher_rows(self, batch: Batch) -> Tensor:
        """(N, D) of the teacher; with a graph only where it learns."""
        with torch.set_grad_enabled(self.teacher_objective is not None and torch.is_grad_enabled()):
            return self._rows(self.teacher, batch)

    @staticmethod
    def _rows(model: Any, batch: Batch) -> Tensor:
        return hidden_states(model, batch["input_ids"], batch["attention_mask"]).flatten(0, 1)[batch["positions"]]

    def distil(
        self,
        student_hidden: Tensor,  # (N, D_s)
        teacher_hidden: Tensor,  # (N, D_t)
        targets: Tensor,  # (N,)
        normalizer: Tensor | float | None = None,
        student_head: LinearHead | None = None,
        teacher_head: LinearHead | None = None,
        **options: Any,
    ) -> DistillationLoss:
        """`linear_distillation_loss` with this pair's heads, objectives and options, or others in their place."""
        defaults = {
            "student": self.student_objective,
            "teacher": self.teacher_objective,
            "temperature": self.args.temperature,
            "vocab_size": self.args.vocab_size,
            "compact": False,  # the rows are those with a target already: finding them anew would make the host wait
        }
        return linear_distillation_loss(
            student_hidden,
            self.student_head() if student_head is None else student_head,
            teacher_hidden,
            LinearHead.from_model(self.teacher) if teacher_head is None else teacher_head,
            targets,
            normalizer=normalizer,
            **{**defaults, **options},
        )

    def train(self, mode: bool = True) -> StudentTeacher:
        """The teacher stays in evaluation mode but for its LoRA's dropout: any other would blur the target."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
            for name, module in self.teacher.named_modules() if self.args.online else ():
                # a layer asks its own flag whether to checkpoint
                if "lora_dropout" in name or getattr(module, "gradient_checkpointing", False):
                    module.training = mode
        return self

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.student.gradient_checkpointing_enable(**options)
        if self.teacher is not None and self.args.online:
            self.teacher.gradient_checkpointing_enable(**options)
            for module in self.teacher.modules():  # `train` sets the flag that some layers' own dropout looks at
                if getattr(module, "gradient_checkpointing", False):
                    for name in [n for n, x in vars(module).items() if "drop" in n and isinstance(x, float)]:
                        setattr(module, name, 0.0)
            chosen = options.get("gradient_checkpointing_kwargs") or {}
            if not chosen.get("use_reentrant", False):
                # For reentrant checkpoints, transformers gives the embeddings' output a gradient. It would take the
                # backward pass through every frozen layer below the first adapted one.
                self.teacher.disable_input_require_grads()
