"""The contract of the row passes: what two rows of logits bring, what comes out, and what that makes of a call.

A row's logits go through up to three passes, in Triton (`row_kernels`) or in PyTorch (`torch_rows`):

    statistics   (2, n, 5)  of the student and of the teacher, see `STATISTICS`; nothing else of a row goes on
    slopes       (n, 2)     sum of each objective's slopes, where the statistics do not give it
    emit         (n, 9)     sums over the vocabulary, see `VALUES`; logits become gradients

All three are sums over the vocabulary: those of its parts merge, and so a sharded vocabulary needs a reduction after
each pass, and nothing else.

Legend: n rows, V vocabulary (of this rank), T temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from okd_kernels.divergences import DIVERGENCES, Objective

STATISTICS = (
    "top",  # a number near the row's largest logit: the exponentials are taken from it
    "sum",  # sum_v exp((x_v - top) / T)
    "sum_at_1",  # the same at T = 1
    "cross",  # sum_v exp((x_v - top) / T) ((u_v - top_u) - (z_v - top_z)) / T, z the student's logits, u the teacher's
    "label",  # the label's logit; 0 where it is on another rank, or is no token
)
METRICS = (
    "forward_kl",  # KL(teacher || student), at the loss's temperature, without T^2
    "reverse_kl",  # KL(student || teacher)
    "student_entropy",
    "teacher_entropy",
    "student_nll",  # -log q(label), at temperature 1; 0 without labels
    "teacher_nll",
    "top1_agreement",  # 1 where one token is the most probable of both
)
VALUES = (
    *("student", "teacher"),  # the objectives' divergences, but for the two KLs
    *METRICS[:4],
    "top1_agreement",
    *("forward_infinite", "reverse_infinite"),  # above 0 where one side has mass and the other log 0
)

KLS = ("forward_kl", "reverse_kl")  # of the student as learner; the teacher's are the other way round
FLOOR = -1e30  # stands for log 0, so that 0 * log 0 is 0 by plain arithmetic
LOG_0 = 1e20  # a difference of logarithms beyond it is one to log 0
INFINITE = 1e10  # a finite divergence cannot reach this


class LogitRows(NamedTuple):
    """One model's rows: logits before bias, scale and softcap, and where their gradient goes."""

    logits: Tensor  # (n, >= V), any float dtype, unit column stride
    objective: Objective | None = None  # None: this side does not learn
    gradient: Tensor | None = None  # (n, >= V), may lie over the logits; None: not wanted
    bias: Tensor | None = None  # (>= V,)
    logit_scale: float = 1.0
    softcap: float | None = None

    def at(self, rows: slice) -> LogitRows:
        gradient = None if self.gradient is None else self.gradient[rows]
        return self._replace(logits=self.logits[rows], gradient=gradient)

    def transformed(self, vocab_size: int, dtype: torch.dtype) -> Tensor:
        """Logits (n, V) after bias, scale and softcap, in `dtype`: a view where there is nothing to do."""
        x = self.logits[:, :vocab_size].to(dtype)
        if self.bias is not None:
            x = x + self.bias[:vocab_size]
        if self.logit_scale != 1.0:
            x = x * self.logit_scale
        return x if self.softcap is None else torch.tanh(x / self.softcap) * self.softcap


class Rows(NamedTuple):
    """The same rows of both models, with what belongs to a token."""

    student: LogitRows
    teacher: LogitRows
    labels: Tensor | None  # (n,) ids in the whole vocabulary; negative: the row is ignored
    weights: Tensor  # (n, 4) factors of the gradients: of each side's divergence, then of its cross-entropy

    def at(self, rows: slice) -> Rows:
        labels = None if self.labels is None else self.labels[rows]
        return Rows(self.student.at(rows), self.teacher.at(rows), labels, self.weights[rows])

    @property
    def sides(self) -> tuple[LogitRows, LogitRows]:
        return self.student, self.teacher


class RowPasses(Protocol):
    """What a backend implements. Ignored rows get gradients of zero; what else comes out of them, nobody looks at."""

    def run(self, rows: Rows, fill: Callable[[slice], None]) -> tuple[Tensor, Tensor]:
        """All passes over whole rows: statistics and values. `fill` makes the teacher's logits of some of the rows, of
        targets that hang on the student's, and comes before those are read."""

    def statistics(self, rows: Rows) -> Tensor:
        """(2, n, len(STATISTICS))"""

    def slopes(self, rows: Rows, statistics: Tensor) -> Tensor:
        """(n, 2)"""

    def emit(self, rows: Rows, statistics: Tensor, slopes: Tensor | None) -> Tensor:
        """(n, len(VALUES)). Overwrites logits with gradients. slopes: None where no side `needs_slope_sum`."""


def needs_slope_sum(side: LogitRows) -> bool:
    """Whether its gradient takes a sum over the vocabulary that no statistic gives."""
    if side.gradient is None or side.objective is None:
        return False
    return DIVERGENCES[side.objective.divergence].slope_sum is None


def merge(parts: Tensor, temperature: float) -> Tensor:
    """Statistics (2, n, 5) of whole rows from those of parts of the vocabulary (parts, 2, n, 5)."""
    top, total, total_at_1, cross, label = parts.unbind(-1)
    whole = top.amax(0)
    rise = (whole - top) / temperature
    cross = cross + (rise[:, :1] - rise[:, 1:]) * total
    fall, fall_at_1 = (-rise).exp(), (top - whole).exp()
    sums = (fall * total, fall_at_1 * total_at_1, fall * cross, label)
    return torch.stack([whole, *(x.sum(0) for x in sums)], -1)


def combine(objective: Objective, divergence: Tensor, nll: Tensor, temperature: float) -> Tensor:
    """weight T^2 divergence + ce_weight nll; a weight of 0 drops its term, even where that is infinite."""
    terms = ((objective.weight * temperature**2, divergence), (objective.ce_weight, nll))
    return sum((weight * term for weight, term in terms if weight != 0), torch.zeros_like(nll))


def finish(
    statistics: Tensor,  # (2, N, len(STATISTICS))
    values: Tensor,  # (N, len(VALUES))
    labels: Tensor | None,  # (N,) negative: ignored; not below vocab_size: no token
    objectives: Sequence[Objective | None],  # of student and teacher
    temperature: float,
    vocab_size: int,
    mass: Tensor | None = None,  # (N,) M, of a target that sums to M: the student's D is M D(p / M, q) + M log M
) -> tuple[Tensor, Tensor]:
    """Losses (N, 2) and metrics (N, len(METRICS)) of whole rows: 0 in ignored ones, NaN where a label is no token."""
    top, _, total_at_1, _, label = statistics.unbind(-1)
    divergences, kls, entropies = values[:, :2], values[:, 2:4], values[:, 4:6]
    nll = torch.zeros_like(divergences)
    if labels is not None:
        nll = (total_at_1.log() + (top - label)).clamp_min(0).T.to(nll.dtype)
        nll = torch.where(nll > INFINITE, torch.inf, nll)
    kls = torch.where((values[:, 7:] > 0) | (kls > INFINITE), torch.inf, kls.clamp_min(0))
    divergences = torch.where(divergences > INFINITE, torch.inf, divergences.clamp_min(0))
    if mass is not None:
        kls = torch.stack([mass * kls[:, 0] + torch.xlogy(mass, mass), kls[:, 1]], 1)
    losses = []
    for i, objective in enumerate(objectives):
        if objective is None:
            losses.append(torch.zeros_like(nll[:, i]))
            continue
        divergence = divergences[:, i]
        if objective.divergence in KLS:
            divergence = kls[:, (KLS.index(objective.divergence) + i) % 2]
        losses.append(combine(objective, divergence, nll[:, i], temperature))
    both = torch.stack(losses, 1)
    metrics = torch.cat([kls, entropies.clamp_min(0), nll, (values[:, 6:7] > 0).to(kls.dtype)], 1)
    if labels is not None:
        ignored, unknown = (labels < 0).unsqueeze(1), (labels >= vocab_size).unsqueeze(1)
        both = both.masked_fill(unknown, torch.nan).masked_fill(ignored, 0)
        metrics[:, 4:6] = nll.masked_fill(unknown, torch.nan)
        metrics = metrics.masked_fill(ignored, 0)
    return both, metrics
