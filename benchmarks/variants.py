"""Methods that are tried beside the presets of `okd.METHODS`: by name, for `benchmarks.methods` and `benchmarks.step`.

OKD's teacher follows a weak student down where a is large, and is SFT beside KD where it is small. These hold the
target rather than weigh it: p is the online teacher, q the student, L_t = a KL(q || p) + (1 - a) CE the teacher's loss,
a `teacher_kl_weight`. They take the dataset's responses, and teachers with the student's tokenizer.

    okd_trust_d                KL(base || p) is kept at d nats a token by a, which a controller sets
    okd_unc, okd_lost          the pull KL(q || p) where the token is hard for the teacher, or for the student
    okd_decay                  the module's learning rate falls to 0 by `online_stop`

`okd_leash`, a preset, holds it by a penalty. Further ones are options: `okd:online_start=0.3` begins when the student
has caught up, `okd:online_stop=0.5` ends suddenly, `taid:online_teacher=True` has OKD's
teacher as the end point of TAID's path.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from okd import Method
from okd.data import Batch
from okd.leash import Leash, from_base, is_measured
from okd.methods import OKD_TEACHER
from okd.objectives import Totals
from okd.pair import StudentTeacher
from okd_kernels import DistillationLoss, Objective

BUDGETS = (0.05, 0.2)  # nats a token


class Trust(Leash):
    """OKD with a by the controller: it falls while KL(base || p) is above the budget, and rises while it is below.

    Cross-entropy moves the teacher too, but one that was tuned on the same responses little: its way is to the student.
    The budget is not held where cross-entropy alone, at the least a, exceeds it.
    """

    least, most, budget = 0.01, 0.9, 0.0

    def __init__(self, options: Any):
        self.leash, self.shifts = self.budget, []
        self.state = {"value": options.resolved.teacher.weight}

    @staticmethod
    def factor(ratio: float) -> float:
        """Of a."""
        return min(max(1 / max(ratio, 1e-6), 0.8), 1.25)

    def __call__(self, pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
        a, student, teacher = self.state["value"], pair.student_rows(batch), pair.teacher_rows(batch)
        objective = None if pair.teacher_objective is None else Objective(weight=a, ce_weight=1 - a)
        loss = pair.distil(student, teacher, batch["targets"], totals.tokens, teacher=objective)
        if is_measured(pair):
            shift = from_base(pair, batch, teacher.detach(), totals.tokens, 1.0).metrics["forward_kl"]
            self.shifts.append(shift.sum() / max(len(shift), 1))
        return loss._replace(metrics=loss.metrics | {"kl_weight": torch.full_like(loss.metrics["forward_kl"], a)})


class Weighted:
    """OKD whose pull a KL(q || p) is multiplied, token by token, by 1 - r(y), r the probability of the label: ATKD's
    uncertainty coefficient (arXiv 2402.11890) where r is the teacher's, which has no gradient here."""

    whose = "teacher"

    def __init__(self, options: Any):
        """It has no options of its own."""

    def __call__(self, pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
        student, teacher, objective = pair.student_rows(batch), pair.teacher_rows(batch), pair.teacher_objective
        if objective is None:
            return pair.distil(student, teacher, batch["targets"], totals.tokens)
        ce = Objective(weight=0.0, ce_weight=objective.ce_weight)
        loss = pair.distil(student, teacher, batch["targets"], totals.tokens, teacher=ce)
        weights = 1 - loss.metrics[f"{self.whose}_nll"].neg().exp()
        still = {"student": Objective(weight=0.0), "student_head": pair.student_head().detach()}  # it has learned above
        options: dict[str, Any] = {"teacher": Objective(weight=objective.weight), "token_weights": weights, **still}
        pull = pair.distil(student.detach(), teacher, batch["targets"], totals.tokens, **options)
        assert loss.teacher is not None and pull.teacher is not None
        metrics = loss.metrics | {"pull_weight": weights}
        return loss._replace(teacher=loss.teacher + pull.teacher, metrics=metrics)


class Decay:
    """OKD whose module has the learning rate of its schedule times 1 - s / `online_stop`, s the share of the training.

    The optimizer's step is shortened afterwards, which is the same: AdamW's is proportional to its rate, and its
    moments do not know it.
    """

    def __init__(self, options: Any):
        self.stop: float = options.online_stop
        self.before: list[Tensor] = []

    def __call__(self, pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
        if pair.training and not self.before:
            self.before = [p.detach().clone() for p in pair.sides()["teacher"]]
        return pair.distil(pair.student_rows(batch), pair.teacher_rows(batch), batch["targets"], totals.tokens)

    def after_update(self, pair: StudentTeacher, loss: float) -> None:
        rate = max(0.0, 1 - pair.progress / self.stop)
        for p, start in zip(pair.sides()["teacher"], self.before, strict=True):
            p.copy_(torch.lerp(start, p, rate))
        self.before = []


def _variant(name: str, summary: str, loss: type, **constants: Any) -> Method:
    made = type(loss.__name__, (loss,), constants)
    return Method(name, f"OKD, {summary}", teacher=OKD_TEACHER, loss=made)


_VARIANTS = (
    *(_variant(f"okd_trust_{d}", f"a such that KL(base || p) is {d}", Trust, budget=d) for d in BUDGETS),
    _variant("okd_unc", "the pull where the teacher is unsure of the label", Weighted, whose="teacher"),
    _variant("okd_lost", "the pull where the student is unsure of the label", Weighted, whose="student"),
    _variant("okd_decay", "the module's learning rate falls to 0 by online_stop", Decay),
)
VARIANTS: dict[str, Method] = {method.name: method for method in _VARIANTS}
