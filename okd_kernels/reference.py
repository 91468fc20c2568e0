"""The specification: the same losses from whole logits and plain autograd, in any dtype (tests run it in fp64).

Slow and large on purpose; every other backend is measured against this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from okd_kernels.divergences import DIVERGENCES, Objective
from okd_kernels.rows import FLOOR, INFINITE, STATISTICS


def _divergence(objective: Objective, log_q: Tensor, log_p: Tensor) -> Tensor:
    terms, _ = DIVERGENCES[objective.divergence].formula(
        log_q, log_p, log_q.exp(), log_p.exp(), objective.a, objective.b
    )
    value = terms.sum(-1)
    return torch.where(value > INFINITE, torch.inf, value)


def reference_losses(
    student_logits: Tensor,  # (N, V) after bias, scale, softcap; gradients flow into both
    teacher_logits: Tensor,  # (N, V)
    labels: Tensor | None,  # (N,) int64, negative: ignored
    *,
    student: Objective | None,
    teacher: Objective | None,
    temperature: float,
    teacher_share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Per-token losses (N, 2) of student and teacher, and statistics (N, len(STATISTICS)), zero in ignored rows.

    Each loss holds the other side still: the student's is differentiated through `q` only, the teacher's through `p`.
    """
    if labels is not None:  # ignored rows may hold anything, NaN included
        ignored = (labels < 0).unsqueeze(1)
        student_logits = torch.where(ignored, 0, student_logits)
        teacher_logits = torch.where(ignored, 0, teacher_logits)
    z, u = student_logits.clamp_min(FLOOR), teacher_logits.clamp_min(FLOOR)
    if teacher_share != 1.0:
        u = (1 - teacher_share) * z.detach() + teacher_share * u
    log_q, log_p = (z / temperature).log_softmax(-1), (u / temperature).log_softmax(-1)
    nlls = [torch.zeros_like(z[:, 0])] * 2
    if labels is not None:
        target = labels.clamp_min(0).unsqueeze(1)
        nlls = [-x.log_softmax(-1).gather(1, target).squeeze(1) for x in (z, u)]

    losses = []
    for objective, learner, target_distribution, nll in (
        (student, log_q, log_p.detach(), nlls[0]),
        (teacher, log_p, log_q.detach(), nlls[1]),
    ):
        if objective is None:
            losses.append(torch.zeros_like(nll))
        else:
            divergence = _divergence(objective, learner, target_distribution)
            losses.append(objective.loss(divergence, nll, temperature))

    with torch.no_grad():
        q, p = log_q.exp(), log_p.exp()
        at_top = (z == z.amax(-1, keepdim=True)) & (u == u.amax(-1, keepdim=True))
        statistics = {
            "forward_kl": _divergence(Objective("forward_kl"), log_q, log_p),
            "reverse_kl": _divergence(Objective("reverse_kl"), log_q, log_p),
            "student_entropy": -(q * log_q).sum(-1),
            "teacher_entropy": -(p * log_p).sum(-1),
            "student_nll": nlls[0],
            "teacher_nll": nlls[1],
            "top1_agreement": at_top.any(-1).to(z.dtype),
        }
        columns = torch.stack([statistics[name] for name in STATISTICS], 1)
    both = torch.stack(losses, 1)
    if labels is not None:
        both, columns = both.masked_fill(ignored, 0), columns.masked_fill(ignored, 0)
    return both, columns
