"""Which of several teachers teaches an example: the gate weighs them, the policy selects.

A selection sees each example with each teacher and gives weights that sum to one over the teachers. The gate learns
with the student, through the weights themselves; the policy from a reward, once the student has learned.

Shapes: B examples, N response tokens, K teachers; D_s and D_i hidden sizes of the student and of teacher i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from okd.data import Batch, uniform
from okd.meters import summed
from okd.options import option, reads
from okd_kernels import DistillationLoss, LinearHead, linear_topk

if TYPE_CHECKING:
    from okd.pair import StudentTeacher


@dataclass
class SelectionOptions:
    """Read by methods that weigh or select among several teachers."""

    selection_learning_rate: float | None = option(
        None,
        "learning rate of what selects among several teachers; default: 1e-2 of the gate's AdamW, 0.1 of the policy's "
        "gradient ascent",
        least=0,
    )


@dataclass
class PolicyOptions:
    """Read by rl_multi_teacher."""

    selection_warmup: float = option(
        0.1, "share of the training with all teachers averaged, before a policy selects", least=0, most=1
    )
    selection_reward: str = option(
        "ce",
        "the policy's reward, of the student after it has learned: ce (-CE), ce_kd (-CE - KD of the selected), or dev "
        "(the mean of the latter and of the accuracy on a held-out batch)",
        choices=("ce", "ce_kd", "dev"),
    )


class Lesson(NamedTuple):
    """What the teachers would teach the student on a batch. A selection's states are made of it, without gradient."""

    batch: Batch
    student_rows: Tensor  # (N, D_s) hidden states
    taught: list[tuple[Tensor, LinearHead]]  # K of (N, D_i) and the head
    losses: list[DistillationLoss]  # K of per-token losses and statistics: `student` (N,) is D(p_i, q) + c CE
    divergences: Tensor  # (N, K), D(p_i, q) alone
    mean: Tensor  # (B, N), by which a product with (N, ...) gives means over each example's tokens
    seed: tuple[int, int]  # of the run, and the step: what is drawn for an example hangs on these and its id
    progress: float  # share of the training that is done

    def encoding(self, rows: Tensor) -> Tensor:
        """(B, D) mean hidden state of each example, of length 1: whatever D, it weighs as much as one number."""
        return nn.functional.normalize(self.mean @ rows.detach().to(self.mean.dtype), dim=1)

    def summary(self, teacher: int, *names: str) -> Tensor:
        """(B, len(names)) mean statistics of a teacher on each example, as log(1 + x): lest large ones drown others."""
        statistics = torch.stack([self.losses[teacher].metrics[name] for name in names], 1)
        return (self.mean @ statistics.to(self.mean.dtype)).clamp_min(0).log1p()


def divergences_of(losses: Sequence[DistillationLoss], ce_weight: float) -> Tensor:
    """(N, K), D(p_i, q) alone, of per-token losses D(p_i, q) + c CE, without gradient."""
    return torch.stack([loss.student.detach() - ce_weight * loss.metrics["student_nll"] for loss in losses], 1)


class Choice(NamedTuple):
    weights: Tensor  # (B, K), summing to 1 over the teachers
    metrics: Mapping[str, Tensor] = {}  # (B,) or (B, K), for the log


class Selection(nn.Module):
    """Scores (B, K) = w_i . s_i + b_i of each teacher on each example; all are zero at the start."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(width) for width in widths)
        self.bias = nn.Parameter(torch.zeros(len(widths)))

    def scores(self, states: Sequence[Tensor]) -> Tensor:
        return torch.stack([s @ w for s, w in zip(states, self.weights, strict=True)], 1) + self.bias

    def after_update(self, pair: StudentTeacher) -> dict[str, float]:
        """Called once after each optimizer step; what it returns is logged."""
        return {}


@reads(SelectionOptions)
class Gate(Selection):
    """a = softmax_i(w_i . s_i + b_i), learned with the student (arXiv 2011.04106, carried over from CTR prediction).

    s_i = [mean hidden state of teacher i over the response; its entropy; its NLL of the response]: what the teacher
    makes of the example, how sure it is, and how right. It starts as the plain mean of the teachers.

    What minimises sum_i a_i D(p_i, q) is the teacher nearest to the student, whatever it knows; the cross-entropy alone
    draws the student, and the gate after it, towards those that are right. With a student that cannot speak yet, a
    teacher of flat distributions is nearest: begin with one that can.
    """

    def __init__(self, student_width: int, teacher_widths: Sequence[int], options: Any):
        super().__init__([width + 2 for width in teacher_widths])

    def forward(self, lesson: Lesson) -> Choice:
        states = [
            torch.cat([lesson.encoding(rows), lesson.summary(i, "teacher_entropy", "teacher_nll")], 1)
            for i, (rows, _) in enumerate(lesson.taught)
        ]
        return Choice(self.scores(states).softmax(1))


class Drawn(NamedTuple):
    """A lesson whose reward is still to come."""

    lesson: Lesson
    states: list[Tensor]  # K of (B, D)
    actions: Tensor  # (B, K), 0 or 1
    weights: Tensor  # (B, K) of the teachers that taught
    is_warm_up: bool


@reads(SelectionOptions, PolicyOptions)
class Policy(Selection):
    """Teacher i is selected with probability sigmoid(A_i s_i + b_i); the mean of the selected ones teaches
    (arXiv 2012.06048).

    s_i = [mean hidden state of the student over the response; summary of teacher i's soft labels: its entropy, KL from
    the student, top-1 agreement; its CE]. The policy learns by REINFORCE, ascending the gradient itself as in the
    paper, from a *delayed* reward: the loss of the student on the example after the update by the teachers that were
    selected. Before that update it would be the same whoever was.

    An advantage is how much the reward rose by the update (what it was before, no action changes), less the mean rise
    of the step's other examples (the usual one, where there is no other), over the usual deviation from it; a held-out
    accuracy, which is of the whole step, is taken from its running mean. For `selection_warmup` of the training all
    teachers teach. Where none is selected, the most probable one teaches; the policy is still judged by what it drew,
    which keeps the gradient unbiased. Out of training nothing is drawn: teachers of probability 1/2 or more are
    selected.
    """

    RATE = 0.05  # of the running moments, once 20 steps have been seen; before, all weigh the same
    moments: Tensor
    updates: Tensor

    def __init__(self, student_width: int, teacher_widths: Sequence[int], options: Any):
        super().__init__([student_width + 4] * len(teacher_widths))
        self.requires_grad_(False)  # by its own ascent, not by the optimizer
        rate = options.selection_learning_rate
        self.rate = 0.1 if rate is None else rate
        self.warmup, self.reward = options.selection_warmup, options.selection_reward
        self.register_buffer("moments", torch.zeros(3))  # running: mean and variance of the rise; held-out accuracy
        self.register_buffer("updates", torch.zeros(()))
        self.drawn: list[Drawn] = []
        self.held_out: Any = None  # () -> Batch, given by the trainer: for the reward `dev`

    @torch.no_grad()
    def forward(self, lesson: Lesson) -> Choice:
        encoding = lesson.encoding(lesson.student_rows)
        names = ("teacher_entropy", "forward_kl", "top1_agreement", "teacher_nll")
        states = [torch.cat([encoding, lesson.summary(i, *names)], 1) for i in range(len(lesson.losses))]
        probability = self.scores(states).sigmoid()
        is_warm_up = self.training and lesson.progress < self.warmup
        if is_warm_up:
            actions = torch.ones_like(probability)
        elif self.training:
            draws = [uniform(*lesson.seed, name, k) for name in lesson.batch["ids"] for k in range(len(states))]
            actions = (probability.new_tensor(draws).view_as(probability) < probability).to(probability.dtype)
        else:
            actions = (probability >= 0.5).to(probability.dtype)
        most_probable = nn.functional.one_hot(probability.argmax(1), probability.shape[1]).to(actions.dtype)
        selected = torch.where(actions.sum(1, keepdim=True) > 0, actions, most_probable)
        weights = selected / selected.sum(1, keepdim=True)
        if self.training:
            self.drawn.append(Drawn(lesson, states, actions, weights, is_warm_up))
        return Choice(weights, {"selected": selected})

    @torch.no_grad()
    def after_update(self, pair: StudentTeacher) -> dict[str, float]:
        drawn, self.drawn = self.drawn, []
        if not drawn:
            return {}
        weight, accuracy = (0.5, 0.5 * _accuracy(pair, self.held_out())) if self.reward == "dev" else (1.0, 0.0)
        rises = [weight * (after - before) for after, before in (self._rewards(pair, one) for one in drawn)]
        sums = [torch.stack([x.new_tensor(len(x)), x.sum(), x.square().sum()]) for x in rises]
        count, total, squares = summed(torch.stack(sums).sum(0))
        mean = total / count
        usual, usual_variance, usual_accuracy = self.moments.clone()
        variance = squares / count - mean.square() if count > 1 else (mean - usual).square()
        found = torch.stack([mean, variance, mean.new_tensor(accuracy)])
        first = self.updates == 0
        self.updates += 1
        self.moments.lerp_(found, (1 / self.updates).clamp_min(self.RATE))
        with torch.autocast(self.bias.device.type, enabled=False):  # as in the lesson
            gradients = []
            for one, rise in zip(drawn, rises, strict=True):
                others = (total - rise) / (count - 1) if count > 1 else usual
                advantage = (rise - others + accuracy - usual_accuracy) / usual_variance.clamp_min(1e-12).sqrt()
                if not (first or one.is_warm_up):  # at first there is nothing to compare with
                    gradients.append((one, advantage.unsqueeze(1) * (one.actions - self.scores(one.states).sigmoid())))
            self._ascend(gradients, count)
        return {"reward_rise": mean.item()}

    def _rewards(self, pair: StudentTeacher, one: Drawn) -> tuple[Tensor, Tensor]:
        """(B,) after the update, and before it with all teachers in place of the selected."""
        lesson, targets = one.lesson, one.lesson.batch["targets"]
        taught = lesson.taught if self.reward != "ce" else lesson.taught[:1]
        student = pair.student_rows(lesson.batch)
        losses = [pair.distil(student, r, targets, teacher_head=h, reduction="none") for r, h in taught]
        with torch.autocast(student.device.type, enabled=False):  # small differences of large sums
            nlls = [of[0].metrics["student_nll"].to(lesson.mean.dtype) for of in (lesson.losses, losses)]
            before, after = (lesson.mean @ nll for nll in nlls)
            if self.reward != "ce":
                kd = divergences_of(losses, pair.student_objective.ce_weight).to(lesson.mean.dtype)
                after = after + (one.weights * (lesson.mean @ kd)).sum(1)
                before = before + (lesson.mean @ lesson.divergences.to(lesson.mean.dtype)).mean(1)
        return -after, -before

    def _ascend(self, gradients: list[tuple[Drawn, Tensor]], count: Tensor) -> None:
        """A <- A + rate * mean over the examples of advantage * d log policy / dA, and b likewise."""
        parameters = [*self.weights, self.bias]
        steps = [torch.zeros_like(p) for p in parameters]
        for one, by_score in gradients:  # (B, K)
            for k, state in enumerate(one.states):
                steps[k] += (by_score[:, k] @ state).to(steps[k].dtype)
            steps[-1] += by_score.sum(0).to(steps[-1].dtype)
        for parameter, step in zip(parameters, steps, strict=True):
            parameter += self.rate * summed(step) / count


def _accuracy(pair: StudentTeacher, batch: Batch) -> float:
    """Share of the response tokens that the student thinks most probable."""
    head = pair.student_head()
    guesses = linear_topk(pair.student_rows(batch), head, 1, vocab_size=pair.options.vocab_size).ids[:, 0]
    correct = torch.stack([(guesses == batch["targets"]).sum(), guesses.new_tensor(len(guesses))]).double()
    right, tokens = summed(correct)
    return (right / tokens).item()
