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

import torch
from torch import Tensor

from okd.data import OWN, TEXT, Batch, rows_written, tokens_of
from okd.options import option, reads
from okd.ranking import soft_rank, spearman
from okd_kernels import DistillationLoss, LinearHead, Objective, linear_sparse_distillation_loss, linear_topk

if TYPE_CHECKING:
    from okd.pair import StudentTeacher

RANKED = 5  # most probable tokens of each model whose order RLKD compares


class Totals(NamedTuple):
    """What losses are divided by: of the whole optimizer step, its accumulated batches and all devices."""

    tokens: Any  # response tokens, without those of plain text
    own_rows: Any  # responses that the student wrote, or drafted
    given_rows: Any  # other responses
    text_tokens: Any  # of a second data set
    teacher_tokens: Any = 1  # response tokens of a teacher with a tokenizer of its own
    aligned: Any = 1  # positions where it is compared with the student

    @classmethod
    def of(cls, batches: Sequence[Batch], reduce: Callable[[Tensor], Tensor] | None = None) -> Totals:
        """Of these batches, `reduce` summing a tensor over the ranks; 1 where there is nothing to count."""
        counts = dict.fromkeys(cls._fields, 0)
        for batch in batches:
            if "aligned" in batch:
                counts["teacher_tokens"] += len(batch["teacher_targets"])
                counts["aligned"] += batch["aligned"].shape[1]
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


@dataclass
class TokenizerOptions:
    """Read by methods with a divergence from one teacher."""

    teacher_tokenizer: str | None = option(
        None, "where it is not the student's: auto (beside the teacher), hub id or directory"
    )


@reads(TokenizerOptions)
def divergence(pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
    """The student's divergence from its teacher, and the teacher's loss where it learns (OKD, Eq. 16 and 17)."""
    if "aligned" in batch:
        return aligned_divergence(pair, batch, totals)
    return distil_rows(pair, batch, pair.student_rows(batch), pair.teacher_rows(batch), totals.tokens)


divergence.takes_top_k = True  # type: ignore[attr-defined]


def distil_rows(
    pair: StudentTeacher, batch: Batch, rows: Tensor, teacher_rows: Tensor, normalizer: Any, **options: Any
) -> DistillationLoss:
    """`pair.distil` of all rows; cross-entropies, of either side, count those rows only whose tokens are references.

    A student would otherwise learn, as labels, what it sampled itself.
    """
    own = rows_written(batch, *OWN)
    objectives: dict[str, Any] = {"student": pair.student_objective, "teacher": pair.teacher_objective}
    objectives |= {name: options.pop(name) for name in objectives if name in options}
    if not own or not any(objective is not None and objective.ce_weight for objective in objectives.values()):
        return pair.distil(rows, teacher_rows, batch["targets"], normalizer, **objectives, **options)
    parts = []
    for part, chosen in ((own, without_ce(objectives)), (rows_written_otherwise(batch, own), objectives)):
        at = tokens_of(batch, part)
        loss = pair.distil(rows[at], teacher_rows[at], batch["targets"][at], normalizer, **chosen, **options)
        parts.append((at, loss))
    return joined(parts)


def aligned_divergence(pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
    """The same of a teacher with a tokenizer of its own: divergences over outcomes (`okd.alignment`), as means over the
    aligned positions; cross-entropies as means over all response tokens, of each model its own."""
    student, teacher = pair.student_rows(batch), pair.teacher_rows(batch)
    objectives: dict[str, Any] = {"student": pair.student_objective, "teacher": pair.teacher_objective}
    loss = pair.distil_aligned(student, teacher, batch, totals.aligned, **without_ce(objectives))
    losses: dict[str, Any] = {"student": loss.student, "teacher": loss.teacher}
    is_given = [writer not in OWN for writer in batch["writers"]]
    of_student = student, pair.student_head, batch["targets"], batch["counts"], totals.tokens
    of_teacher = (
        *(teacher, pair.teacher_head),
        *(batch["teacher_targets"], batch["teacher_counts"], totals.teacher_tokens),
    )
    for side, (rows, head, targets, counts, normalizer) in zip(losses, (of_student, of_teacher), strict=True):
        if objectives[side] is None or not objectives[side].ce_weight:
            continue
        weights = torch.tensor(is_given, dtype=torch.float32).repeat_interleave(torch.tensor(counts))
        weights = weights.to(targets.device, non_blocking=True)
        options = {"ce_weight": objectives[side].ce_weight, "token_weights": weights}
        ce = cross_entropy_of(rows, head(), targets, normalizer, **options)
        losses[side] = losses[side] + ce.student
    return loss._replace(**losses)


def rows_written_otherwise(batch: Batch, rows: Sequence[int]) -> list[int]:
    """The rows that are not among these."""
    return sorted(set(range(len(batch["counts"]))) - set(rows))


def without_ce(objectives: dict[str, Objective | None]) -> dict[str, Any]:
    return {
        name: None if x is None else Objective(x.divergence, weight=x.weight, **x.parameters)
        for name, x in objectives.items()
    }


def joined(parts: Sequence[tuple[Tensor, DistillationLoss]]) -> DistillationLoss:
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
    loss = nll(pair, pair.student_rows(batch), batch["targets"], totals.tokens, ce_weight=weight)
    return loss._replace(metrics={"student_nll": loss.metrics["student_nll"]})


def nll(
    pair: StudentTeacher, student: Tensor, targets: Tensor, normalizer: Any, ce_weight: float = 1.0, **options: Any
) -> DistillationLoss:
    """Cross-entropy of the student's rows (N, D), chunk by chunk, `token_weights` of either sign."""
    options = {"ce_weight": ce_weight, "vocab_size": pair.options.vocab_size, **options}
    return cross_entropy_of(student, pair.student_head(), targets, normalizer, **options)


def cross_entropy_of(
    rows: Tensor, head: LinearHead, targets: Tensor, normalizer: Any, ce_weight: float = 1.0, **options: Any
) -> DistillationLoss:
    """Of any model's rows (N, D)."""
    unused = targets.unsqueeze(1)
    return linear_sparse_distillation_loss(
        rows,
        head,
        unused,
        torch.zeros_like(unused, dtype=torch.float32),
        targets,
        student=Objective(weight=0.0, ce_weight=ce_weight),
        normalizer=normalizer,
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
        loss = distil_rows(pair, batch, student, teacher, totals.tokens, teacher=None, target_mix=t)
        metrics = {
            "student_nll": loss.metrics["student_nll"],
            "target_kl": loss.metrics["forward_kl"],
            "target_t": torch.full_like(loss.metrics["forward_kl"], t),
        }
        if pair.teacher_objective is None:
            return DistillationLoss(loss.student, None, metrics)
        still = {"student": Objective(weight=0.0), "student_head": pair.student_head().detach()}  # it has learned above
        online = distil_rows(pair, batch, student.detach(), teacher, totals.tokens, **still)
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
    loss = distil_rows(pair, batch, student, teacher, totals.tokens)
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
