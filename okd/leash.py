"""A teacher that learns and stays near what it was: OKD with a penalty on the way from its base.

Without it a teacher that minimises a KL(q || p) + (1 - a) CE follows a weak student down where a is large
(benchmarks/RESULTS.md). Here it minimises
L_t + b KL(base || p), p the online teacher, and b is set by what is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from okd.data import Batch
from okd.meters import mean_over_ranks
from okd.objectives import Totals, distil_rows
from okd.options import option, reads
from okd.teachers import head_of_judge, rows_of_judge
from okd_kernels import DistillationLoss, Objective

if TYPE_CHECKING:
    from okd.pair import StudentTeacher

EVERY = 8  # steps between two adjustments


@dataclass
class LeashOptions:
    """Read by okd_leash."""

    teacher_leash: float = option(0.05, "nats a token by which the teacher may leave its base, at best", above=0)


@reads(LeashOptions)
class Leash:
    """b doubles where KL(base || p) is above 1.5 leashes and is halved below 1 / 1.5, as PPO's adaptive penalty
    (arXiv 1707.06347, Sec. 4). The base is run, without a graph, at every step at which the teacher learns."""

    least, most = 1 / 64, 64.0  # of b

    def __init__(self, options: Any):
        self.leash: float = options.teacher_leash
        self.state = {"value": 1.0}
        self.shifts: list[Tensor] = []  # of the step's micro-batches

    def __call__(self, pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
        b, student, teacher = self.state["value"], pair.student_rows(batch), pair.teacher_rows(batch)
        loss = distil_rows(pair, batch, student, teacher, totals.tokens)
        if loss.teacher is None:
            return loss
        held = from_base(pair, batch, teacher, totals.tokens, b)
        shift = held.metrics["forward_kl"]
        if is_measured(pair):
            self.shifts.append(shift.sum() / max(len(shift), 1))
        metrics = {"leash": torch.full_like(shift, b), "shift": shift}
        return loss._replace(teacher=loss.teacher + held.student, metrics=loss.metrics | metrics)

    def after_update(self, pair: StudentTeacher, loss: float) -> None:
        if is_measured(pair):
            factor = self.factor(mean_over_ranks(self.shifts) / self.leash)
            self.state["value"] = min(max(self.state["value"] * factor, self.least), self.most)
        self.shifts = []

    @staticmethod
    def factor(ratio: float) -> float:
        """Of b, where the shift is so many leashes."""
        return 2.0 if ratio > 1.5 else 0.5 if ratio < 1 / 1.5 else 1.0


def is_measured(pair: StudentTeacher) -> bool:
    return pair.training and pair.teacher_objective is not None and pair.seed[1] % EVERY == 0


def from_base(pair: StudentTeacher, batch: Batch, rows: Tensor, normalizer: Any, weight: float) -> DistillationLoss:
    """weight KL(base || p) of p's rows (N, D), at temperature 1: `student` is the teacher here."""
    with torch.no_grad(), pair.teacher.as_it_was() as model:
        base, base_head = rows_of_judge(model, batch), head_of_judge(model, rows.device)
    objectives: dict[str, Any] = {"student": Objective(weight=weight), "teacher": None}
    heads = {"student_head": pair.teacher_head(), "teacher_head": base_head}
    return pair.distil(rows, base, batch["targets"], normalizer, **heads, **objectives, temperature=1.0)
