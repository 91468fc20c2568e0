"""Losses of responses that the student wrote: MiniLLM's policy gradient, DistiLLM-2's pair of responses.

Shapes: B rows padded to T tokens, N of which come before a response token; D the hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from okd.data import OWN, STUDENT, TEXT, Batch, rows_written, tokens_of
from okd.meters import mean_over_ranks
from okd.objectives import Totals, joined, nll, rows_written_otherwise, without_ce
from okd.options import option, reads
from okd_kernels import DistillationLoss, Objective

if TYPE_CHECKING:
    from okd.pair import StudentTeacher


@dataclass
class PolicyGradientOptions:
    """Read by minillm."""

    reward_clip: float = option(
        50.0, "a token's reward log p - log q is cut to so many nats (released code: 100, of halves)", above=0
    )
    length_normalized: bool = option(True, "divide a token's return by the number of tokens after it")
    text_weight: float = option(1.0, "weight of the cross-entropy on the second data set (lm_data)", least=0)


@reads(PolicyGradientOptions)
def minillm(pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
    """The policy gradient of KL(q || p) over whole responses of the student (MiniLLM, arXiv 2306.08543, Sec. 2.2).

        sum_t  w_t KL(q_t || p_t)  -  w_t R_{t+1} log q(y_t)  +  CE of plain text,    all but q held still
        R_{t+1} = mean_{t' > t} log p(y_t') / q(y_t')         w_t = q(y_t) / ((1 - a) q(y_t) + a p(y_t))

    The first term is the token's own part of that gradient, exact over the vocabulary; the second rewards a token for
    the likelihood of what followed it; w corrects for responses that were sampled from a mixture with the teacher, a
    its share (the paper's one-step weight). `length_normalized=False` has the sum in place of the mean: the unbiased
    estimator, whose variance grows with length. Rows that the student did not write have the first term only. One step
    a sample, so that PPO's clipping, whitened returns and four passes of the released code have nothing to do.
    """
    text = rows_written(batch, TEXT)
    at = tokens_of(batch, rows_written_otherwise(batch, text))
    student, teacher, targets = pair.student_rows(batch), pair.teacher_rows(batch), batch["targets"]
    own = student.new_zeros(len(targets), dtype=torch.float32)
    own[tokens_of(batch, rows_written(batch, STUDENT))] = 1
    share = pair.method.teacher_share
    objectives = {"student": pair.student_objective, "teacher": pair.teacher_objective}
    loss = pair.distil(student[at], teacher[at], targets[at], reduction="none", **without_ce(objectives))
    q, p = (-loss.metrics[f"{side}_nll"] for side in ("student", "teacher"))
    mixture = torch.logaddexp(q + math.log1p(-share), p + math.log(share)) if share else q
    weights = torch.where(own[at] > 0, (q - mixture).exp(), 1.0)
    rewards = (p - q).clamp(-pair.options.reward_clip, pair.options.reward_clip)
    returns = _future(_scattered(rewards, at, targets), batch, mean=pair.options.length_normalized)[at]
    policy = nll(pair, student[at], targets[at], totals.tokens, token_weights=weights * returns * own[at])
    total = (weights * loss.student).sum() / totals.tokens + policy.student
    online = None if loss.teacher is None else loss.teacher.sum() / totals.tokens
    if ce := pair.student_objective.ce_weight:
        total = total + nll(pair, student[at], targets[at], totals.tokens, ce, token_weights=1 - own[at]).student
    metrics = loss.metrics | {"return": returns, "importance": weights}
    if text:
        of_text = tokens_of(batch, text)
        plain = nll(pair, student[of_text], targets[of_text], totals.text_tokens, pair.options.text_weight)
        total = total + plain.student
    return DistillationLoss(total, online, metrics)


def _scattered(values: Tensor, at: Tensor, like: Tensor) -> Tensor:
    return values.new_zeros(len(like)).index_copy(0, at, values)


def _future(values: Tensor, batch: Batch, mean: bool) -> Tensor:
    """Sum or mean of `values` (N,) over the later response tokens of the same row, for each of N; 0 for the last."""
    counts, longest = batch["counts"], max(1, *batch["counts"])
    at = [i * longest + j for i, n in enumerate(counts) for j in range(n)]
    places = torch.tensor(at, dtype=torch.long).to(values.device)

    def later(x: Tensor) -> Tensor:
        grid = x.new_zeros(len(counts) * longest).scatter(0, places, x).view(-1, longest)
        return (grid.flip(1).cumsum(1).flip(1) - grid).flatten()[places]

    return later(values) / later(torch.ones_like(values)).clamp_min(1) if mean else later(values)


@dataclass
class ContrastiveOptions:
    """Read by distillm2; the released code has both of the paper's curricula off."""

    skew_curriculum: bool = option(
        False, "alpha of each batch follows the gap between the models: larger gaps, up to the alpha given"
    )
    lowering_start: float = option(
        1.0,
        "weight of the loss on the student's responses at the first step; it grows to 1 along the training",
        least=0,
    )


@reads(ContrastiveOptions)
class Contrastive:
    """Skew KL where the teacher wrote, skew reverse KL where the student did (DistiLLM-2, arXiv 2503.07067).

        mean over the teacher's responses of SKL  +  mean over the student's of SRKL, each the mean over its tokens

    The first raises the student on the teacher's responses, the second lowers it on its own; in the second, the
    student inside the mixture is held still. A cross-entropy goes with the first only.

    `skew_curriculum`: alpha = 1 - (1 - alpha_0) m / gap, within [0.01, alpha_0], gap the difference of the mean
    probabilities that teacher and student give the batch's tokens, m its moving average: an easy batch, whose gap is
    small, is skewed less. `lowering_start`: the second term's weight grows from it to 1, linearly (ours).
    """

    def __init__(self, options: Any):
        self.options = options
        self.state: dict[str, Any] = {"gap": None}
        self.gaps: list[Tensor] = []

    def __call__(self, pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
        student, teacher, targets = pair.student_rows(batch), pair.teacher_rows(batch), batch["targets"]
        own = rows_written(batch, *OWN)
        growth = self.options.lowering_start + (1 - self.options.lowering_start) * pair.progress
        objective, online = pair.student_objective, without_ce({"teacher": pair.teacher_objective})
        parts = []
        for rows, name, weight, number, options in (
            (rows_written_otherwise(batch, own), objective.divergence, 1.0, totals.given_rows, {}),
            (own, "skew_reverse_kl_detached", growth, totals.own_rows, online),
        ):
            at = tokens_of(batch, rows)
            ce_weight = 0.0 if rows is own else objective.ce_weight
            alpha = self._alpha(pair, student[at], teacher[at], targets[at])
            chosen = Objective(name, weight * objective.weight, ce_weight, alpha=alpha)
            counts = torch.tensor([batch["counts"][i] for i in rows], dtype=torch.float32)
            each = counts.reciprocal().repeat_interleave(counts.long()).to(student.device)
            loss = pair.distil(
                student[at], teacher[at], targets[at], number, student=chosen, token_weights=each, **options
            )
            parts.append((at, loss))
        return joined(parts)

    def _alpha(self, pair: StudentTeacher, student: Tensor, teacher: Tensor, targets: Tensor) -> float:
        base = pair.student_objective.alpha
        if not self.options.skew_curriculum or not len(targets):
            return base
        with torch.no_grad():
            nlls = pair.distil(student, teacher, targets, teacher=None, reduction="none").metrics
            gap = ((-nlls["teacher_nll"].mean()).exp() - (-nlls["student_nll"].mean()).exp()).detach()
        if pair.training:
            self.gaps.append(gap)
        if self.state["gap"] is None:
            return base
        return float(min(max(1 - (1 - base) * self.state["gap"] / (gap.item() + 1e-5), 0.01), base))

    def after_update(self, pair: StudentTeacher, loss: float) -> None:
        if self.options.skew_curriculum:
            gap = mean_over_ranks(self.gaps)
            self.state["gap"] = gap if self.state["gap"] is None else 0.9 * self.state["gap"] + 0.1 * gap
            self.gaps = []
