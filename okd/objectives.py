"""How a batch becomes a loss: one function for each way.

Each takes the pair, a batch of `okd.data.Collator` and the totals of the optimizer step, and returns a
`DistillationLoss`. Metrics beyond those of `okd_kernels` are per-token too: the trainer logs their means. A loss that
remembers something is a class, made once for each pair, with `state` (JSON, in every checkpoint) and `after_update`.

Shapes: B rows padded to T tokens, N of which come before a response token; D the hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from okd.data import IGNORE, OWN, STUDENT, TEXT, Batch, rows_written, seed_of, tokens_of
from okd.meters import mean_over_ranks
from okd.models import hidden_states
from okd.options import option, reads
from okd.ranking import soft_rank, spearman
from okd.selection import Lesson
from okd_kernels import DistillationLoss, Objective, linear_sparse_distillation_loss, linear_topk

if TYPE_CHECKING:
    from okd.pair import StudentTeacher

RANKED = 5  # most probable tokens of each model whose order RLKD compares


class Totals(NamedTuple):
    """What losses are divided by: of the whole optimizer step, its accumulated batches and all devices."""

    tokens: Any  # response tokens, without those of plain text
    own_rows: Any  # responses that the student wrote, or drafted
    given_rows: Any  # other responses
    text_tokens: Any  # of a second data set

    @classmethod
    def of(cls, batches: Sequence[Batch], reduce: Callable[[Tensor], Tensor] | None = None) -> Totals:
        """Of these batches, `reduce` summing a tensor over the ranks; 1 where there is nothing to count."""
        counts = {"tokens": 0, "own_rows": 0, "given_rows": 0, "text_tokens": 0}
        for batch in batches:
            for writer, n in zip(batch["writers"], batch["counts"], strict=True):
                if writer == TEXT:
                    counts["text_tokens"] += n
                else:
                    counts["tokens"] += n
                    counts["own_rows" if writer in OWN else "given_rows"] += 1
        if reduce is None:
            return cls(*(max(n, 1) for n in counts.values()))
        return cls(*reduce(torch.tensor(list(counts.values()))).clamp_min(1).unbind())


Loss = Callable[["StudentTeacher", Batch, Totals], DistillationLoss]


# --- one teacher, frozen or online


def divergence(pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
    """The student's divergence from its teacher, and the teacher's loss where it learns (OKD, Eq. 16 and 17)."""
    return _distil(pair, batch, pair.student_rows(batch), pair.teacher_rows(batch), totals.tokens)


def _distil(
    pair: StudentTeacher, batch: Batch, rows: Tensor, teacher_rows: Tensor, normalizer: Any, **options: Any
) -> DistillationLoss:
    """`pair.distil` of all rows; cross-entropies, of either side, count those rows only whose tokens are references.

    A student would otherwise learn, as labels, what it sampled itself.
    """
    own = rows_written(batch, *OWN)
    objectives = {"student": pair.student_objective, "teacher": pair.teacher_objective}
    objectives |= {name: options.pop(name) for name in objectives if name in options}
    if not own or not any(objective is not None and objective.ce_weight for objective in objectives.values()):
        return pair.distil(rows, teacher_rows, batch["targets"], normalizer, **objectives, **options)
    parts = []
    for part, chosen in ((own, _without_ce(objectives)), (rows_written_otherwise(batch, own), objectives)):
        at = tokens_of(batch, part)
        loss = pair.distil(rows[at], teacher_rows[at], batch["targets"][at], normalizer, **chosen, **options)
        parts.append((at, loss))
    return _joined(parts)


def rows_written_otherwise(batch: Batch, rows: Sequence[int]) -> list[int]:
    """The rows that are not among these."""
    return sorted(set(range(len(batch["counts"]))) - set(rows))


def _without_ce(objectives: dict[str, Objective | None]) -> dict[str, Objective | None]:
    return {
        name: None if x is None else Objective(x.divergence, weight=x.weight, **x.parameters)
        for name, x in objectives.items()
    }


def _joined(parts: Sequence[tuple[Tensor, DistillationLoss]]) -> DistillationLoss:
    """Losses of parts of the tokens as one: a sum, and metrics in the tokens' order."""
    order = torch.cat([at for at, _ in parts]).argsort()
    losses = [loss for _, loss in parts]
    teachers = [loss.teacher for loss in losses if loss.teacher is not None]
    metrics = {name: torch.cat([loss.metrics[name] for loss in losses])[order] for name in losses[0].metrics}
    student = torch.stack([loss.student for loss in losses]).sum()
    return DistillationLoss(student, torch.stack(teachers).sum() if teachers else None, metrics)


def cross_entropy(pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
    """Cross-entropy of the response tokens, without a teacher."""
    weight = pair.student_objective.ce_weight
    loss = _nll(pair, pair.student_rows(batch), batch["targets"], totals.tokens, ce_weight=weight)
    return loss._replace(metrics={"student_nll": loss.metrics["student_nll"]})


def _nll(
    pair: StudentTeacher, student: Tensor, targets: Tensor, normalizer: Any, ce_weight: float = 1.0, **options: Any
) -> DistillationLoss:
    """Cross-entropy of the student's rows (N, D), chunk by chunk, `token_weights` of either sign."""
    unused = targets.unsqueeze(1)
    return linear_sparse_distillation_loss(
        student,
        pair.student_head(),
        unused,
        torch.zeros_like(unused, dtype=torch.float32),
        targets,
        student=Objective(weight=0.0, ce_weight=ce_weight),
        normalizer=normalizer,
        vocab_size=pair.options.vocab_size,
        compact=False,
        **options,
    )


@dataclass
class TaidOptions:
    """Read by taid."""

    taid_start: float = option(0.4, "teacher's share t of the target at the first step", least=0, most=1)
    taid_rate: float = option(
        5e-4, "how far t runs ahead of its line in a step, at most half of this; 0: not at all", least=0, most=1
    )
    taid_momentum: float = option(0.99, "of the moving average of the loss's relative fall", least=0, most=1)


@reads(TaidOptions)
class Taid:
    """D(softmax((1 - t) z + t u), q), z in the target held still (TAID, arXiv 2501.16937), t from 0.4 to 1.

    After each step, m <- 0.99 m + 0.01 (L' - L) / L', L the step's loss on all devices and L' the one before, and

        t <- min(1, max(line(step), t + 5e-4 sigmoid(m) (1 - t)))

    so that t never falls behind the line from 0.4 to 1 over the training, and runs ahead of it while the loss falls.
    Where the teacher learns, it learns from the student as in OKD: from q, not from the target.
    """

    def __init__(self, options: Any):
        self.options = options
        self.state: dict[str, Any] = {"t": options.taid_start, "momentum": 0.0, "loss": None}

    def __call__(self, pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
        t = self.state["t"]
        student, teacher = pair.student_rows(batch), pair.teacher_rows(batch)
        loss = _distil(pair, batch, student, teacher, totals.tokens, teacher=None, target_mix=t)
        metrics = {
            "student_nll": loss.metrics["student_nll"],
            "target_kl": loss.metrics["forward_kl"],
            "target_t": torch.full_like(loss.metrics["forward_kl"], t),
        }
        if pair.teacher_objective is None:
            return DistillationLoss(loss.student, None, metrics)
        still = {"student": Objective(weight=0.0), "student_head": pair.student_head().detach()}  # it has learned above
        online = _distil(pair, batch, student.detach(), teacher, totals.tokens, **still)
        metrics |= {name: online.metrics[name] for name in ("forward_kl", "top1_agreement")}
        return DistillationLoss(loss.student, online.teacher, metrics)

    def after_update(self, pair: StudentTeacher, loss: float) -> None:
        state, options = self.state, self.options
        if state["loss"] is not None:
            fall = (state["loss"] - loss) / (state["loss"] + 1e-15)
            state["momentum"] = options.taid_momentum * state["momentum"] + (1 - options.taid_momentum) * fall
            line = options.taid_start + (1 - options.taid_start) * pair.progress_after
            ahead = options.taid_rate / (1 + math.exp(-state["momentum"])) * (1 - state["t"])
            state["t"] = min(1.0, max(line, state["t"] + ahead))
        state["loss"] = loss


def rlkd(pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
    """1 - Spearman(soft_rank(z_S), soft_rank(u_S)) + L_distill / 2 (RLKD, arXiv 2409.12545), S = both models' top 5.

    The order of the few tokens that either model would say, which a divergence hardly sees where they share little
    mass. Only logits in S are computed; to find S, both models are projected a second time, without gradient.
    """
    student, teacher = pair.student_rows(batch), pair.teacher_rows(batch)
    loss = _distil(pair, batch, student, teacher, totals.tokens)
    heads, vocab_size = (pair.student_head(), pair.teacher_head()), pair.options.vocab_size
    ours, theirs = (
        linear_topk(rows, head, min(RANKED, vocab_size or len(head.weight)), vocab_size=vocab_size).ids
        for rows, head in zip((student, teacher), heads, strict=True)
    )
    new = (ours.unsqueeze(2) != theirs.unsqueeze(1)).all(2)
    ids, in_union = torch.cat((theirs, ours), 1), torch.cat((torch.ones_like(theirs, dtype=torch.bool), new), 1)
    z = heads[0].logits_at(student, ids)
    with torch.no_grad():
        u = heads[1].logits_at(teacher, ids)
    rank_loss = 1 - spearman(soft_rank(z, in_union), soft_rank(u, in_union), in_union)
    total = rank_loss.sum() / totals.tokens + loss.student / 2
    return loss._replace(student=total, metrics=loss.metrics | {"rank_loss": rank_loss.detach()})


# --- mixed embeddings


@dataclass
class MixupOptions:
    """Read by mixkd."""

    mixup_alpha: float = option(0.4, "a of lambda ~ Beta(a, a), the share of a row in its mixture", above=0)
    mixup_ce_weight: float = option(1.0, "weight of the cross-entropy on mixed rows", least=0)
    mixup_weight: float = option(1.0, "weight of the divergence on mixed rows", least=0)


class Mixed(NamedTuple):
    """What rows and their partners come to, at each of the N places before a response token."""

    student: Tensor  # (N, D_s) hidden states of the mixed rows
    teacher: Tensor  # (N, D_t)
    others: Tensor  # (N,) the partner's token there, IGNORE where it has none
    share: Tensor  # (N,) lambda


def _mixed(pair: StudentTeacher, batch: Batch) -> Mixed:
    """Both models read lambda e_i + (1 - lambda) e_j, each of its own embeddings, lambda ~ Beta(a, a); j follows i
    along a random cycle through the rows."""
    ids, mask, positions, targets = (batch["input_ids"], batch["attention_mask"], batch["positions"], batch["targets"])
    draws = np.random.default_rng(seed_of(*pair.seed, *batch["ids"]))  # of these rows, on whatever rank they are
    order = torch.from_numpy(draws.permutation(len(ids)))
    partner = torch.empty_like(order).scatter(0, order, order.roll(1)).to(ids.device)
    a = pair.options.mixup_alpha
    shares = torch.from_numpy(draws.beta(a, a, len(ids))).to(ids.device, torch.float32)  # (B,)

    def rows_of(model: Any) -> Tensor:
        embedded = model.get_input_embeddings()(ids)
        mixed = torch.lerp(embedded[partner], embedded, shares.to(embedded.dtype).view(-1, 1, 1))
        return hidden_states(model, None, mask, inputs_embeds=mixed).flatten(0, 1)[positions]

    labels = torch.full_like(ids, IGNORE).flatten().scatter(0, positions, targets).view_as(ids)
    student = rows_of(pair.student)
    with torch.no_grad():
        teacher = rows_of(pair.teacher.model)
    return Mixed(student, teacher, labels[partner].flatten()[positions], shares[positions // ids.shape[1]])


@reads(MixupOptions)
def mixkd(pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
    """CE(x) + L_distill(x) + a_SM CE_mix + a_TMKD D(p(mixed), q(mixed)) (MixKD, arXiv 2011.00593, Eq. 8).

    Each row i of the batch meets another one, j (a row alone meets itself). CE_mix is lambda CE(q, y_i) + (1 - lambda)
    CE(q, y_j). The last two terms are summed over positions before a response token of both rows, which see no padding,
    and divided as the first two are: a mixed token weighs as much as a plain one, however few there are.

    Where the teacher learns, it learns from plain text; on mixed text it is held still.
    """
    loss, mixed = divergence(pair, batch, totals), _mixed(pair, batch)
    options, objective, targets = pair.options, pair.student_objective, batch["targets"]
    in_both = mixed.others != IGNORE
    counted = torch.where(in_both, targets, IGNORE)
    alone = Objective(objective.divergence, options.mixup_weight, **objective.parameters)
    of_mixture = pair.distil(
        mixed.student, mixed.teacher, counted, totals.tokens, student=alone, teacher=None, compact=True
    )
    # The cross-entropy with two labels is the divergence from their mixture, and that mixture's entropy.
    share, weight = mixed.share, options.mixup_ce_weight
    cross_entropy = linear_sparse_distillation_loss(
        mixed.student,
        pair.student_head(),
        torch.stack((targets, mixed.others), 1),
        torch.stack((share, 1 - share), 1).log(),
        counted,
        student=Objective(weight=weight),
        tail="none",
        normalizer=totals.tokens,
        vocab_size=options.vocab_size,
    ).student
    entropy = torch.special.entr(share) + torch.special.entr(1 - share)
    entropy = weight * torch.where(in_both & (targets != mixed.others), entropy, 0).sum() / totals.tokens
    metrics = loss.metrics | {"mixed_share": in_both.float()}
    return loss._replace(student=loss.student + of_mixture.student + cross_entropy + entropy, metrics=metrics)


# --- responses that the student wrote


@dataclass
class PolicyGradientOptions:
    """Read by minillm."""

    reward_clip: float = option(
        50.0, "a token's reward log p - log q is cut to so many nats (released code: 100, of halves)", above=0
    )
    length_normalized: bool = option(True, "divide a token's return by the number of tokens after it")
    text_weight: float = option(1.0, "weight of the cross-entropy on the second data set (lm_file)", least=0)


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
    loss = pair.distil(student[at], teacher[at], targets[at], reduction="none", **_without_ce(objectives))
    q, p = (-loss.metrics[f"{side}_nll"] for side in ("student", "teacher"))
    mixture = torch.logaddexp(q + math.log1p(-share), p + math.log(share)) if share else q
    weights = torch.where(own[at] > 0, (q - mixture).exp(), 1.0)
    rewards = (p - q).clamp(-pair.options.reward_clip, pair.options.reward_clip)
    returns = _future(_scattered(rewards, at, targets), batch, mean=pair.options.length_normalized)[at]
    policy = _nll(pair, student[at], targets[at], totals.tokens, token_weights=weights * returns * own[at])
    total = (weights * loss.student).sum() / totals.tokens + policy.student
    online = None if loss.teacher is None else loss.teacher.sum() / totals.tokens
    if ce := pair.student_objective.ce_weight:
        total = total + _nll(pair, student[at], targets[at], totals.tokens, ce, token_weights=1 - own[at]).student
    metrics = loss.metrics | {"return": returns, "importance": weights}
    if text:
        of_text = tokens_of(batch, text)
        plain = _nll(pair, student[of_text], targets[of_text], totals.text_tokens, pair.options.text_weight)
        total = total + plain.student
    return DistillationLoss(total, online, metrics)


def _scattered(values: Tensor, at: Tensor, like: Tensor) -> Tensor:
    return values.new_zeros(len(like)).index_copy(0, at, values)


def _future(values: Tensor, batch: Batch, mean: bool) -> Tensor:
    """Sum or mean of `values` (N,) over the later response tokens of the same row, for each of N; 0 for the last."""
    rows, positions = batch["input_ids"], batch["positions"]

    def later(x: Tensor) -> Tensor:
        grid = x.new_zeros(rows.numel()).scatter(0, positions, x).view_as(rows)
        return (grid.flip(1).cumsum(1).flip(1) - grid).flatten()[positions]

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
        objective, online = pair.student_objective, _without_ce({"teacher": pair.teacher_objective})
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
        return _joined(parts)

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


# --- several teachers


def ensemble(pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
    """sum_i w_i D(p_i, q) + c CE over the teachers, with each example's weights w from the pair's selection.

    The weights sum to one, so that of sum_i w_i (D(p_i, q) + c CE) the cross-entropy counts once. They hang on the
    losses themselves (a teacher's NLL), so per-token losses come first, and both projections are made twice per
    teacher: forward, and again with the gradients in backward. Whole logits never exist.

    Metrics: those of `okd_kernels`, averaged with the weights; `distillation_loss` sum_i w_i D(p_i, q); and for teacher
    i = 1, 2, ... `teacher_<i>_weight`, and with a policy `teacher_<i>_selected`.
    """
    teachers: Any = pair.teacher
    targets, student = batch["targets"], pair.student_rows(batch)
    taught = [teachers.taught(i, batch) for i in range(len(teachers.members))]
    losses = [pair.distil(student, rows, targets, teacher_head=head, reduction="none") for rows, head in taught]
    example = batch["positions"] // batch["input_ids"].shape[1]
    examples = torch.arange(len(batch["counts"]), device=example.device).unsqueeze(1)
    own = (example == examples).to(losses[0].student.dtype)  # (B, N)
    c = pair.student_objective.ce_weight
    divergences = torch.stack([loss.student.detach() - c * loss.metrics["student_nll"] for loss in losses], 1)
    mean = own / own.sum(1, keepdim=True).clamp_min(1)
    lesson = Lesson(batch, student.detach(), taught, losses, divergences, mean, pair.seed, pair.progress)
    assert pair.selection is not None
    with torch.autocast(student.device.type, enabled=False):  # what it compares are small differences of large sums
        choice = pair.selection(lesson)

    weights = choice.weights[example]  # (N, K)
    per_token = (weights * torch.stack([loss.student for loss in losses], 1)).sum(1)
    weights = weights.detach()
    metrics = {
        name: (weights * torch.stack([loss.metrics[name] for loss in losses], 1)).sum(1) for name in losses[0].metrics
    }
    metrics["distillation_loss"] = (weights * divergences).sum(1)
    for name, value in {"weight": weights, **{k: v[example] for k, v in choice.metrics.items()}}.items():
        metrics |= {f"teacher_{i}_{name}": column for i, column in enumerate(value.unbind(1), start=1)}
    return DistillationLoss(per_token.sum() / totals.tokens, None, metrics)


def routed(pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
    """D(p_i, q) + c CE, i the teacher that each example names. A teacher reads its own examples only.

    Metrics beyond the usual: `distillation_loss`, D alone.
    """
    teachers: Any = pair.teacher
    lost = [row for row, name in zip(batch["ids"], batch["teachers"], strict=True) if name not in teachers.names]
    if lost:
        raise ValueError(
            f'expected "teacher" of every example to be one of {", ".join(teachers.names)}; got another, or none, in '
            f"{', '.join(lost[:5])}: correct it, in the held-out examples too"
        )
    student, parts = pair.student_rows(batch), []
    for i, name in enumerate(teachers.names):
        rows = [row for row, of in enumerate(batch["teachers"]) if of == name]
        if rows:
            at = tokens_of(batch, rows)
            hidden, head = teachers.taught(i, batch_rows(batch, rows))
            loss = pair.distil(student[at], hidden, batch["targets"][at], totals.tokens, teacher_head=head)
            parts.append((at, loss))
    loss = _joined(parts)
    name = pair.student_objective.divergence
    distance = loss.metrics[name if name in loss.metrics else "forward_kl"]
    return loss._replace(metrics=loss.metrics | {"distillation_loss": distance})


def batch_rows(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch, as a batch of their own."""
    at = torch.tensor(rows)
    part: Any = {n: x[at.to(x.device)] for n, x in batch.items() if isinstance(x, Tensor) and x.dim() == 2}
    part |= {name: [x[i] for i in rows] for name, x in batch.items() if isinstance(x, list)}
    tokens, row = tokens_of(batch, rows), []
    for i, n in enumerate(part["counts"]):
        row += [i] * n
    for prefix in ("", "teacher_"):
        if f"{prefix}positions" in batch:
            values: Any = batch
            length = values[f"{prefix}input_ids"].shape[1]
            places = values[f"{prefix}positions"][tokens] % length
            part[f"{prefix}positions"] = places + torch.tensor(row, device=places.device) * length
    part["targets"] = batch["targets"][tokens]
    return part
