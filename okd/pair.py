"""Student and teacher as one module, whose forward is the loss of a batch: what DDP and FSDP wrap."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from okd.cache import Head
from okd.clock import LOSS, timed
from okd.data import Batch
from okd.models import device_of, response_rows
from okd.objectives import Loss, Totals
from okd.routers import Routers
from okd.selection import Selection
from okd_kernels import (
    DistillationLoss,
    LinearHead,
    Objective,
    Outcomes,
    TopK,
    linear_distillation_loss,
    linear_outcome_distillation_loss,
    linear_sparse_distillation_loss,
)

logger = logging.get_logger(__name__)


class StudentTeacher(nn.Module):
    """A student, its `Teacher` (None: it has none), and the method's loss: forward is the loss of a batch.

    Only response tokens reach the heads: the collator has found their positions on the CPU.

    Attributes:
        seed: of the run, and the step: what is drawn hangs on these and on the rows' ids.
        progress, progress_after: share of the training that is done before and after the step, 0 to 1.
        teacher_objective: L_t; None where the teacher is frozen, or does not learn at this step.
        student_learns: at this step; else its loss is a value without gradient.
        selection: what weighs or selects among several teachers.
        is_replicated: DDP wraps it, which wants a gradient of every parameter at every step.
        is_sharded: each process holds a part of its weights (`okd.sharding`).
        outcomes: what student and teacher are compared by, where they have tokenizers of their own (`okd.alignment`).
    """

    accepts_loss_kwargs = True  # tells Trainer that the loss is divided by the tokens of the whole (accumulated) batch

    def __init__(self, student: Any, teacher: Any | None, options: Any):
        super().__init__()
        method = options.resolved
        self.student, self.options, self.method = student, options, method
        self.teacher: Any = teacher
        self.student_objective: Objective = method.student
        self.loss: Any = method.loss(options) if isinstance(method.loss, type) else method.loss
        self.seed, self.progress, self.progress_after = (options.seed, 0), 0.0, 0.0
        self.teacher_objective: Objective | None = method.teacher
        self.student_learns, self.is_replicated, self.is_sharded = True, False, False
        self.outcomes: tuple[Outcomes, Outcomes] | None = None
        self.routers = Routers(student, options.router_aux_loss_coef)
        self.selection: Selection | None = None
        if method.selection is not None and teacher is not None:
            width = student.config.get_text_config().hidden_size
            self.selection = method.selection(width, teacher.widths(), options)
        # DDP sends the first rank's weights to the others, but cannot send torchao's, which all have loaded alike
        self._ddp_params_and_buffers_to_ignore = [
            name for name, p in self.named_parameters() if hasattr(p, "__tensor_flatten__") and not p.requires_grad
        ]

    def at(self, step: int, max_steps: int) -> None:
        """Set who learns at a step of the training. Where they alternate, the student has the even steps; with
        `online_every` k the online module has the multiples of k, the student all.

        A side that does not learn has no gradient at all, rather than one of zero, by which AdamW's momentum would go
        on moving it.
        """
        self.seed = self.options.seed, step
        self.progress, self.progress_after = (x / max(1, max_steps) for x in (step, step + 1))
        options = self.options
        online = self.method.teacher is not None and options.online_start <= self.progress < options.online_stop
        alternating = self.method.alternating and online
        turn = step % 2 == 1 if alternating else step % options.online_every == 0
        self.teacher_objective = self.method.teacher if online and turn else None
        self.student_learns = not (alternating and turn)
        if self.method.teacher is not None and self.teacher is not None:
            self.teacher.learning = self.teacher_objective is not None

    def idle(self) -> list[nn.Parameter]:
        """Trainable parameters of a side that does not learn at this step."""
        sides = ((self.student, self.student_learns), (self.teacher, self.teacher_objective is not None))
        return [p for m, learns in sides if m is not None and not learns for p in m.parameters() if p.requires_grad]

    @property
    def _no_split_modules(self) -> list[str]:
        """Decoder layers, as their models name them: FSDP2 makes a unit of each."""
        below = [module for module in self.modules() if module is not self]
        named = {name for module in below for name in getattr(module, "_no_split_modules", None) or ()}
        return sorted(named & {type(module).__name__ for module in below})

    def tie_weights(self) -> None:
        """What is one weight under two names is so again, where FSDP2 has sent all under their names."""
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                module.tie_weights()

    def heads(self) -> list[nn.Module]:
        """The last layers of all models in it."""
        models = [module for module in self.modules() if isinstance(module, PreTrainedModel)]
        heads = [head for head in (model.get_output_embeddings() for model in models) if head is not None]
        return [*heads, *(module for module in self.modules() if isinstance(module, Head))]

    def forward(
        self,
        batch: Batch | Callable[[], Any],  # or what is to be done where all weights are whole: `Sharded.inside`
        totals: Totals | None = None,  # of the optimizer step; None: of this batch alone
        loss: Loss | None = None,  # in place of the method's
    ) -> Any:  # DistillationLoss, or what the callable returned
        if callable(batch):
            return batch()
        totals = Totals.of([batch]) if totals is None else totals
        chosen: Loss = loss or self.loss
        if self.routers.coefficient and self.training and self.student_learns and torch.is_grad_enabled():
            chosen = self.routers.beside(chosen)
        with timed(LOSS):
            result = chosen(self, batch, totals)
        if self.is_replicated and torch.is_grad_enabled() and self.training and (idle := self.idle()):
            return result._replace(student=_WithZeros.apply(result.student, *idle))
        return result

    def student_rows(self, batch: Batch) -> Tensor:
        """(N, D) hidden states of the student that predict a response token."""
        with torch.set_grad_enabled(self.student_learns and torch.is_grad_enabled()):
            return response_rows(self.student, batch)

    def student_head(self) -> LinearHead:
        """The student's head, cut from the graph where it does not learn."""
        head = LinearHead.from_model(self.student)
        return head if self.student_learns else head.detach()

    def teacher_rows(self, batch: Batch) -> Tensor:
        """(N, D) of the teacher of the moment; with a graph only where it learns."""
        assert self.teacher is not None
        return self.teacher.rows(batch)

    def teacher_head(self) -> LinearHead:
        """The teacher's head on the student's device."""
        assert self.teacher is not None
        return self.teacher.head(device_of(self.student))

    def distil(
        self,
        student_hidden: Tensor,  # (N, D_s)
        teacher_hidden: Tensor | TopK,  # (N, D_t), or the teacher's k likeliest tokens
        targets: Tensor,  # (N,)
        normalizer: Tensor | float | None = None,
        student_head: LinearHead | None = None,
        teacher_head: LinearHead | None = None,
        **options: Any,
    ) -> DistillationLoss:
        """`linear_distillation_loss` with this pair's heads, objectives and options, or others in their place; of a
        teacher's likeliest tokens alone, `linear_sparse_distillation_loss`."""
        defaults = {
            "student": self.student_objective,
            "teacher": self.teacher_objective,
            "temperature": self.options.temperature,
            "vocab_size": self.options.vocab_size,
            "backward_columns": self.options.backward_columns,
            "exact_head": self.options.exact_head,
            "compact": False,  # the rows are those with a target already: finding them anew would make the host wait
        }
        student_head = self.student_head() if student_head is None else student_head
        if isinstance(teacher_hidden, TopK):
            given = {**defaults, **options}
            given.pop("teacher")
            target = teacher_hidden.ids, teacher_hidden.log_probs
            return linear_sparse_distillation_loss(
                student_hidden, student_head, *target, targets, normalizer=normalizer, **given
            )
        return linear_distillation_loss(
            student_hidden,
            student_head,
            teacher_hidden,
            self.teacher_head() if teacher_head is None else teacher_head,
            targets,
            normalizer=normalizer,
            **{**defaults, **options},
        )

    def distil_aligned(
        self,
        student_hidden: Tensor,  # (N, D_s)
        teacher_hidden: Tensor,  # (N', D_t)
        batch: Batch,
        normalizer: Tensor | float | None = None,
        teacher_head: LinearHead | None = None,
        **options: Any,
    ) -> DistillationLoss:
        """The divergence of both models' outcomes at the batch's M aligned positions, as `distil` is that of tokens."""
        ours, theirs = batch["aligned"]
        assert self.outcomes is not None
        self.outcomes = self.outcomes[0].to(ours.device), self.outcomes[1].to(ours.device)
        return linear_outcome_distillation_loss(
            student_hidden.index_select(0, ours),
            self.student_head(),
            self.outcomes[0],
            teacher_hidden.index_select(0, theirs),
            self.teacher_head() if teacher_head is None else teacher_head,
            self.outcomes[1],
            normalizer=normalizer,
            **{"temperature": self.options.temperature, **options},
        )

    def after_update(self, loss: float | None) -> dict[str, float]:
        """Once after each optimizer step, with its loss where `remembers_loss`. What it returns is logged."""
        if self.remembers_loss:
            self.loss.after_update(self, loss)
        if self.teacher is not None:
            self.teacher.after_update(self.student)
        return {} if self.selection is None else self.selection.after_update(self)

    @property
    def remembers_loss(self) -> bool:
        return hasattr(self.loss, "after_update")

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        chosen = options.get("gradient_checkpointing_kwargs") or {}
        if self.is_replicated and chosen.get("use_reentrant"):  # DDP takes one backward of each weight, MixKD has two
            logger.warning("expected use_reentrant=False under DDP; got True: checkpoints are not reentrant here")
            options["gradient_checkpointing_kwargs"] = {**chosen, "use_reentrant": False}
        self.student.gradient_checkpointing_enable(**options)
        if self.teacher is not None and self.teacher.learns:
            self.teacher.gradient_checkpointing_enable(**options)

    def parameter_groups(self, decaying: set[str]) -> list[dict[str, Any]]:
        """For one optimizer: the student's weights that decay, those that do not, what weighs several teachers, and the
        teacher's online module. `decaying`: names of weights of the student."""
        options, student = self.options, [(n, p) for n, p in self.student.named_parameters() if p.requires_grad]
        of_student = {p for _, p in student}
        rates = (options.learning_rate, options.selection_learning_rate, options.online_learning_rate)
        sides = self.sides()
        groups = [
            ([p for n, p in student if n in decaying], options.weight_decay, rates[0]),
            ([p for n, p in student if n not in decaying], 0.0, rates[0]),
            ([p for p in sides["student"] if p not in of_student], 0.0, 1e-2 if rates[1] is None else rates[1]),
            (sides["teacher"], 0.0, rates[0] if rates[2] is None else rates[2]),
        ]
        return [{"params": p, "weight_decay": decay, "lr": rate} for p, decay, rate in groups if p]

    def sides(self) -> dict[str, list[nn.Parameter]]:
        """What trains, by side; what selects among teachers trains with the student."""
        selection: Iterable[nn.Parameter] = () if self.selection is None else self.selection.parameters()
        teacher: Iterable[nn.Parameter] = () if self.teacher is None else self.teacher.parameters()
        parameters = {"student": [*self.student.parameters(), *selection], "teacher": list(teacher)}
        return {side: [p for p in of_side if p.requires_grad] for side, of_side in parameters.items()}


class _WithZeros(torch.autograd.Function):
    """A value as it is, in whose graph stand parameters with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return upstream[0], *(torch.zeros_like(p) for p in ctx.saved_tensors)
