"""Which of several teachers teaches an example: one module for each answer, named in `SELECTIONS`.

A selection sees each example with each teacher and gives weights that sum to one over the teachers. It learns with the
student: the gate through the weights themselves, the policy through a reward.

Shapes: B examples, N response tokens, K teachers; D_s and D_i hidden sizes of the student and of teacher i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from okd_kernels import DistillationLoss

if TYPE_CHECKING:
    from okd.config import OKDConfig


class Lesson(NamedTuple):
    """What the teachers would teach the student on a batch. A selection's states are made of it, without gradient."""

    student_rows: Tensor  # (N, D_s) hidden states
    teacher_rows: list[Tensor]  # K of (N, D_i)
    losses: list[DistillationLoss]  # K of per-token losses and statistics: `student` (N,) is D(p_i, q) + c CE
    divergences: Tensor  # (N, K), D(p_i, q) alone
    mean: Tensor  # (B, N), by which a product with (N, ...) gives means over each example's tokens
    progress: float  # share of the training that is done

    def encoding(self, rows: Tensor) -> Tensor:
        """(B, D) mean hidden state of each example, of length 1: whatever D, it weighs as much as one number."""
        return nn.functional.normalize(self.mean @ rows.detach().to(self.mean.dtype), dim=1)

    def summary(self, teacher: int, *names: str) -> Tensor:
        """(B, len(names)) mean statistics of a teacher on each example, as log(1 + x): lest large ones drown others."""
        statistics = torch.stack([self.losses[teacher].metrics[name] for name in names], 1)
        return (self.mean @ statistics.to(self.mean.dtype)).clamp_min(0).log1p()


class Choice(NamedTuple):
    weights: Tensor  # (B, K), summing to 1 over the teachers
    policy_loss: Tensor | None = None  # (B,) whose gradient, and not its value, joins the student's loss
    metrics: Mapping[str, Tensor] = {}  # (B,) or (B, K), for the log


class Selection(nn.Module):
    """Scores (B, K) = w_i . s_i + b_i of each teacher on each example; all are zero at the start."""

    def __init__(self, widths: Sequence[int], args: OKDConfig):
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(width) for width in widths)
        self.bias = nn.Parameter(torch.zeros(len(widths)))

    def scores(self, states: Sequence[Tensor]) -> Tensor:
        return torch.stack([s @ w for s, w in zip(states, self.weights, strict=True)], 1) + self.bias


class Gate(Selection):
    """a = softmax_i(w_i . s_i + b_i), learned with the student (arXiv 2011.04106, carried over from CTR prediction).

    s_i = [mean hidden state of teacher i over the response; its entropy; its NLL of the response]: what the teacher
    makes of the example, how sure it is, and how right. It starts as the plain mean of the teachers.

    What minimises sum_i a_i D(p_i, q) is the teacher nearest to the student, whatever it knows; the cross-entropy alone
    draws the student, and the gate after it, towards those that are right. With a student that cannot speak yet, a
    teacher of flat distributions is nearest: begin with one that can.
    """

    def __init__(self, student_width: int, teacher_widths: Sequence[int], args: OKDConfig):
        super().__init__([width + 2 for width in teacher_widths], args)

    def forward(self, lesson: Lesson) -> Choice:
        states = [
            torch.cat([lesson.encoding(rows), lesson.summary(i, "teacher_entropy", "teacher_nll")], 1)
            for i, rows in enumerate(lesson.teacher_rows)
        ]
        return Choice(self.scores(states).softmax(1))


class Policy(Selection):
    """Teacher i is selected with probability sigmoid(A_i s_i + b_i); the mean of the selected ones teaches
    (arXiv 2012.06048).

    s_i = [mean hidden state of the student over the response; summary of teacher i's soft labels: its entropy, KL from
    the student, top-1 agreement; its CE]. The policy learns by REINFORCE from each example's reward -CE_student - L_KD,
    against a running mean as baseline, once all teachers have been averaged for `selection_warmup` of the training.
    Where none is selected, the most probable one teaches; the policy is still judged by what it drew, which keeps the
    gradient unbiased. Out of training nothing is drawn: teachers of probability 1/2 or more are selected.
    """

    BASELINE_RATE = 0.05  # of the running mean, once 20 batches have been seen; before, all weigh the same
    baseline: Tensor
    batches: Tensor

    def __init__(self, student_width: int, teacher_widths: Sequence[int], args: OKDConfig):
        super().__init__([student_width + 4] * len(teacher_widths), args)
        self.warmup = args.selection_warmup
        self.register_buffer("baseline", torch.zeros(()))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, lesson: Lesson) -> Choice:
        encoding = lesson.encoding(lesson.student_rows)
        names = ("teacher_entropy", "forward_kl", "top1_agreement", "teacher_nll")
        scores = self.scores([torch.cat([encoding, lesson.summary(i, *names)], 1) for i in range(len(lesson.losses))])
        probability = scores.detach().sigmoid()
        warming_up = self.training and lesson.progress < self.warmup
        if warming_up:
            drawn = torch.ones_like(probability)
        elif self.training:
            drawn = torch.bernoulli(probability)
        else:
            drawn = (probability >= 0.5).to(probability.dtype)
        most_probable = nn.functional.one_hot(probability.argmax(1), probability.shape[1]).to(drawn.dtype)
        selected = torch.where(drawn.sum(1, keepdim=True) > 0, drawn, most_probable)
        weights = selected / selected.sum(1, keepdim=True)

        student_nll = lesson.mean @ lesson.losses[0].metrics["student_nll"].to(lesson.mean.dtype)
        reward = -student_nll - (weights * (lesson.mean @ lesson.divergences)).sum(1)
        choice = Choice(weights, None, {"selected": selected, "reward": reward})
        if not (self.training and torch.is_grad_enabled()):
            return choice
        advantage = reward - self.baseline
        self.batches += 1
        self.baseline.lerp_(reward.mean(), (1 / self.batches).clamp_min(self.BASELINE_RATE))
        if warming_up:
            return choice
        log_policy = -nn.functional.binary_cross_entropy_with_logits(scores, drawn, reduction="none").sum(1)
        return choice._replace(policy_loss=-advantage * log_policy)


SELECTIONS: Mapping[str, type[Gate] | type[Policy]] = {"gate": Gate, "policy": Policy}
