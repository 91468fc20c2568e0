"""How a batch becomes a loss: one function for each way, named in `LOSSES`.

Each takes the pair, a batch of `okd.data.Collator` and the normalizer, and returns a `DistillationLoss`. Metrics beyond
those of `okd_kernels` are per-token too: the trainer logs their means.

Shapes: B rows padded to T tokens, N of which come before a response token; D the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from okd.data import IGNORE
from okd.models import hidden_states
from okd.ranking import soft_rank, spearman
from okd.selection import Lesson
from okd_kernels import (
    DistillationLoss,
    LinearHead,
    Objective,
    linear_distillation_loss,
    linear_sparse_distillation_loss,
    linear_topk,
)

if TYPE_CHECKING:
    from okd.pair import Batch, StudentTeacher

Normalizer = Tensor | float | None
Loss = Callable[["StudentTeacher", "Batch", Normalizer], DistillationLoss]

TAID_START = 0.4  # the teacher's share of the target at the first step
RANKED = 5  # most probable tokens of each model whose order RLKD compares


def divergence(pair: StudentTeacher, batch: Batch, normalizer: Normalizer) -> DistillationLoss:
    """The student's divergence from its teacher, and the teacher's loss where it learns (OKD, Eq. 16 and 17).

    On a batch of which the student wrote a row, or drafted (SKD), the teacher's loss has no cross-entropy (ours): the
    tokens are no references.
    """
    options = _references_or_not(pair, batch)
    return pair.distil(pair.student_rows(batch), pair.teacher_rows(batch), batch["targets"], normalizer, **options)


def _references_or_not(pair: StudentTeacher, batch: Batch) -> dict[str, Any]:
    """Options of `distil` for a batch some of whose responses may be the student's words."""
    policy = pair.args.preset.sequences
    own = policy == "interleaved" or (policy != "dataset" and bool(batch["student_written"].any()))
    return _no_references(pair) if own else {}


def _no_references(pair: StudentTeacher) -> dict[str, Any]:
    """Options of `distil` for rows whose tokens no teacher should learn as labels."""
    teacher = pair.teacher_objective
    return {} if teacher is None else {"teacher": Objective(teacher.divergence, weight=teacher.weight)}


def cross_entropy(pair: StudentTeacher, batch: Batch, normalizer: Normalizer) -> DistillationLoss:
    """Cross-entropy of the response tokens, without a teacher."""
    weight = pair.student_objective.ce_weight
    loss = _nll(pair, pair.student_rows(batch), batch["targets"], normalizer, ce_weight=weight)
    return loss._replace(metrics={"student_nll": loss.metrics["student_nll"]})


def taid(pair: StudentTeacher, batch: Batch, normalizer: Normalizer) -> DistillationLoss:
    """D(softmax((1 - t) z + t u), q), z in the target held still (TAID, arXiv 2501.16937), t from 0.4 to 1.

    t grows linearly with the training done. The paper lets it run ahead of that line by 5e-4 sigmoid(m) (1 - t) a step,
    m a moving average of the loss's relative fall. Here it follows the step alone, so that neither devices nor a
    resumed run can disagree about the target.

    Where the teacher learns, it learns from the student as in OKD: from q, not from the target.
    """
    t = TAID_START + (1 - TAID_START) * pair.progress
    student, teacher, targets = pair.student_rows(batch), pair.teacher_rows(batch), batch["targets"]
    loss = pair.distil(student, teacher, targets, normalizer, teacher=None, target_mix=t)
    shares = torch.full_like(loss.metrics["forward_kl"], t)
    metrics = {"student_nll": loss.metrics["student_nll"], "target_kl": loss.metrics["forward_kl"], "target_t": shares}
    if pair.teacher_objective is None:
        return DistillationLoss(loss.student, None, metrics)
    reverse = linear_distillation_loss(  # the teacher in the learner's place, the student in the target's
        teacher,
        LinearHead.from_model(pair.teacher),
        student,
        pair.student_head(),
        targets,
        student=pair.teacher_objective,
        temperature=pair.args.temperature,
        normalizer=normalizer,
        vocab_size=pair.args.vocab_size,
        compact=False,
    )
    metrics |= {"forward_kl": reverse.metrics["reverse_kl"], "top1_agreement": reverse.metrics["top1_agreement"]}
    return DistillationLoss(loss.student, reverse.student, metrics)


def rlkd(pair: StudentTeacher, batch: Batch, normalizer: Normalizer) -> DistillationLoss:
    """1 - Spearman(soft_rank(z_S), soft_rank(u_S)) + L_distill / 2 (RLKD, arXiv 2409.12545), S = both models' top 5.

    The order of the few tokens that either model would say, which a divergence hardly sees where they share little
    mass. Only logits in S are computed; to find S, both models are projected a second time, without gradient.
    """
    student, teacher = pair.student_rows(batch), pair.teacher_rows(batch)
    loss = pair.distil(student, teacher, batch["targets"], normalizer)
    heads = pair.student_head(), LinearHead.from_model(pair.teacher)
    vocab_size = pair.args.vocab_size
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
    total = rank_loss.sum() / _count(batch, normalizer) + loss.student / 2
    return loss._replace(student=total, metrics=loss.metrics | {"rank_loss": rank_loss.detach()})


def mixkd(pair: StudentTeacher, batch: Batch, normalizer: Normalizer) -> DistillationLoss:
    """L_distill(x) + a_SM CE_mix + a_TMKD D(p(mixed), q(mixed)) (MixKD, arXiv 2011.00593).

    Each row i of the batch meets another one, j (a row alone meets itself): both models read lambda e_i + (1 - lambda)
    e_j, each of its own embeddings, lambda ~ Beta(a, a). CE_mix is lambda CE(q, y_i) + (1 - lambda) CE(q, y_j). The
    last two terms are summed over positions before a response token of both rows, which see no padding, and divided as
    the first is: a mixed token weighs as much as a plain one, however few there are.

    Where the teacher learns, it learns from plain text; on mixed text it is held still.
    """
    loss = divergence(pair, batch, normalizer)
    ids, mask, positions, targets = (batch[k] for k in ("input_ids", "attention_mask", "positions", "targets"))
    args, n_rows, device = pair.args, len(ids), ids.device
    order = torch.randperm(n_rows)  # drawn on the CPU, whose random state checkpoints keep
    partner = torch.empty_like(order).scatter(0, order, order.roll(1)).to(device)  # along a random cycle through all
    shares = torch.distributions.Beta(args.mixup_alpha, args.mixup_alpha).sample((n_rows,)).to(device)  # (B,) lambda

    def mixed_rows(model: Any) -> Tensor:
        embedded = model.get_input_embeddings()(ids)
        mixed = torch.lerp(embedded[partner], embedded, shares.to(embedded.dtype).view(-1, 1, 1))
        return hidden_states(model, None, mask, inputs_embeds=mixed).flatten(0, 1)[positions]

    labels = torch.full_like(ids, IGNORE).flatten().scatter(0, positions, targets).view_as(ids)
    others = labels[partner].flatten()[positions]  # (N,) the other row's token at the same place, or none
    in_both = others != IGNORE
    counted, count = torch.where(in_both, targets, IGNORE), _count(batch, normalizer)

    student = mixed_rows(pair.student)
    with torch.no_grad():
        teacher = mixed_rows(pair.teacher)
    objective = pair.student_objective
    alone = Objective(objective.divergence, args.mixup_weight, **objective.parameters)
    mixed = pair.distil(student, teacher, counted, count, student=alone, teacher=None, compact=True)

    # The cross-entropy with two labels is the divergence from their mixture, and that mixture's entropy.
    share = shares[positions // ids.shape[1]]
    cross_entropy = linear_sparse_distillation_loss(
        student,
        pair.student_head(),
        torch.stack((targets, others), 1),
        torch.stack((share, 1 - share), 1).log(),
        counted,
        student=Objective(weight=args.mixup_ce_weight),
        tail="none",
        normalizer=count,
        vocab_size=args.vocab_size,
    ).student
    entropy = torch.special.entr(share) + torch.special.entr(1 - share)
    entropy = args.mixup_ce_weight * torch.where(in_both & (targets != others), entropy, 0).sum() / count
    metrics = loss.metrics | {"mixed_share": in_both.float()}
    return loss._replace(student=loss.student + mixed.student + cross_entropy + entropy, metrics=metrics)


def minillm(
    pair: StudentTeacher, batch: Batch, normalizer: Normalizer, length_normalized: bool = True
) -> DistillationLoss:
    """The policy gradient of KL(q || p) over whole responses of the student (MiniLLM, arXiv 2306.08543, Sec. 2.2).

        sum_t  KL(q_t || p_t)  -  R_{t+1} log q(y_t),    R_{t+1} = mean_{t' > t} log p(y_t') / q(y_t'), held still

    The first term is the token's own part of that gradient, exact over the vocabulary; the second rewards a token for
    the likelihood of what followed it. `length_normalized=False` has the sum in place of the mean: the unbiased
    estimator, whose variance grows with length. The second term counts where the student wrote, the only place where
    it estimates that gradient. One step a sample, so that PPO's clipping and importance weights have nothing to do.
    """
    student, targets = pair.student_rows(batch), batch["targets"]
    options = _references_or_not(pair, batch)
    loss = pair.distil(student, pair.teacher_rows(batch), targets, normalizer, **options)
    rewards = loss.metrics["student_nll"] - loss.metrics["teacher_nll"]
    returns = _future(rewards, batch, mean=length_normalized)
    returns = returns * batch["student_written"][batch["positions"] // batch["input_ids"].shape[1]]
    policy = _nll(pair, student, targets, _count(batch, normalizer), token_weights=returns)
    return loss._replace(student=loss.student + policy.student, metrics=loss.metrics | {"return": returns})


def _future(values: Tensor, batch: Batch, mean: bool) -> Tensor:
    """Sum or mean of `values` (N,) over the later response tokens of the same row, for each of N; 0 for the last."""
    rows, positions = batch["input_ids"], batch["positions"]

    def later(x: Tensor) -> Tensor:
        grid = x.new_zeros(rows.numel()).scatter(0, positions, x).view_as(rows)
        return (grid.flip(1).cumsum(1).flip(1) - grid).flatten()[positions]

    return later(values) / later(torch.ones_like(values)).clamp_min(1) if mean else later(values)


def distillm2(pair: StudentTeacher, batch: Batch, normalizer: Normalizer) -> DistillationLoss:
    """Skew KL where the teacher wrote, skew reverse KL where the student did (DistiLLM-2, arXiv 2503.07067).

    The first raises the student on the teacher's responses, the second lowers it on its own; in the second, the
    student inside the mixture is held still. Both have the method's alpha; a cross-entropy goes with the first only.
    The metrics' tokens come in that order too.
    """
    student, teacher, targets = pair.student_rows(batch), pair.teacher_rows(batch), batch["targets"]
    count = _count(batch, normalizer)
    own = batch["student_written"][batch["positions"] // batch["input_ids"].shape[1]]  # (N,) bool
    parts = []
    lowering = Objective("skew_reverse_kl_detached", alpha=pair.student_objective.alpha)
    for objective, rows, options in ((pair.student_objective, ~own, {}), (lowering, own, _no_references(pair))):
        at = rows.nonzero().squeeze(1)  # synchronises once, where sampling has done so for every token
        parts.append(pair.distil(student[at], teacher[at], targets[at], count, student=objective, **options))
    first, second = parts
    teacher_loss = None if first.teacher is None or second.teacher is None else first.teacher + second.teacher
    metrics = {name: torch.cat((value, second.metrics[name])) for name, value in first.metrics.items()}
    return DistillationLoss(first.student + second.student, teacher_loss, metrics)


def _nll(
    pair: StudentTeacher,
    student: Tensor,
    targets: Tensor,
    normalizer: Normalizer,
    ce_weight: float = 1.0,
    **options: Any,
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
        vocab_size=pair.args.vocab_size,
        compact=False,
        **options,
    )


def _count(batch: Batch, normalizer: Normalizer) -> Tensor | float:
    """What a loss is divided by: the normalizer, or this batch's response tokens."""
    return max(len(batch["targets"]), 1) if normalizer is None else normalizer


def ensemble(pair: StudentTeacher, batch: Batch, normalizer: Normalizer) -> DistillationLoss:
    """sum_i w_i D(p_i, q) + c CE over the teachers, with each example's weights w from the pair's selection.

    The weights sum to one, so that of sum_i w_i (D(p_i, q) + c CE) the cross-entropy counts once. They hang on the
    losses themselves (a teacher's NLL, the reward), so per-token losses come first, and both projections are made twice
    per teacher: forward, and again with the gradients in backward. Whole logits never exist.

    Metrics: those of `okd_kernels`, averaged with the weights; `distillation_loss` sum_i w_i D(p_i, q); and for teacher
    i = 1, 2, ... `teacher_<i>_weight`, and with a policy `teacher_<i>_selected` and `reward`.
    """
    assert pair.teacher is not None and pair.selection is not None
    targets, positions = batch["targets"], batch["positions"]
    n, length = batch["input_ids"].shape
    student = pair.student_rows(batch)
    taught = pair.teacher(batch["input_ids"], batch["attention_mask"], positions)
    losses = [pair.distil(student, rows, targets, teacher_head=head, reduction="none") for rows, head in taught]
    example = positions // length
    own = (example == torch.arange(n, device=example.device).unsqueeze(1)).to(losses[0].student.dtype)  # (B, N)
    c = pair.student_objective.ce_weight
    divergences = torch.stack([loss.student.detach() - c * loss.metrics["student_nll"] for loss in losses], 1)
    mean = own / own.sum(1, keepdim=True).clamp_min(1)
    lesson = Lesson(student, [rows for rows, _ in taught], losses, divergences, mean, pair.progress)
    with torch.autocast(student.device.type, enabled=False):  # rewards are small differences of large sums
        choice = pair.selection(lesson)

    weights = choice.weights[example]  # (N, K)
    per_token = (weights * torch.stack([loss.student for loss in losses], 1)).sum(1)
    if choice.policy_loss is not None:
        surrogate = choice.policy_loss[example]
        per_token = per_token + (surrogate - surrogate.detach())
    weights = weights.detach()
    metrics = {
        name: (weights * torch.stack([loss.metrics[name] for loss in losses], 1)).sum(1) for name in losses[0].metrics
    }
    metrics["distillation_loss"] = (weights * divergences).sum(1)
    for name, value in {"weight": weights, **{k: v[example] for k, v in choice.metrics.items()}}.items():
        if value.dim() == 1:
            metrics[name] = value
        else:
            metrics |= {f"teacher_{i}_{name}": column for i, column in enumerate(value.unbind(1), start=1)}
    total = per_token.sum() / (max(len(targets), 1) if normalizer is None else normalizer)
    return DistillationLoss(total, None, metrics)


LOSSES: Mapping[str, Loss] = {
    "divergence": divergence,
    "cross_entropy": cross_entropy,
    "taid": taid,
    "rlkd": rlkd,
    "mixkd": mixkd,
    "minillm": minillm,
    "distillm2": distillm2,
    "ensemble": ensemble,
}
