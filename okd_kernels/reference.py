"""The specification: the same losses from whole logits and plain autograd, in any dtype (tests run it in fp64).

Slow and large on purpose; every other backend is measured against this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from okd_kernels.divergences import DIVERGENCES, Objective
from okd_kernels.rows import FLOOR, INFINITE, LOG_0, METRICS, combine


def _divergence(objective: Objective, log_q: Tensor, log_p: Tensor) -> Tensor:
    q, p = log_q.exp(), log_p.exp()
    terms, _ = DIVERGENCES[objective.divergence].formula(log_q, log_p, q, p, objective.alpha, objective.beta)
    value = terms.sum(-1)
    infinite = value > INFINITE
    for name, mass, other in (("forward_kl", p, log_q), ("reverse_kl", q, log_p)):
        if objective.divergence == name:  # mass, however little, where the other side has log 0
            infinite = infinite | ((mass > 0) & (other < -LOG_0)).any(-1)
    return torch.where(infinite, torch.inf, value)


def sparse_teacher_logits(
    student_logits: Tensor,  # (N, V) after bias, scale, softcap
    ids: Tensor,  # (N, K), any where log_probs are -inf
    log_probs: Tensor,  # (N, K)
    tail: str,
    temperature: float,
    least_tail: float,  # of a bucket
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, V) of a teacher that is p on the ids and, with a bucket, p_tail q_v / q_tail off them; and the mass on
    the ids, of p and of q (N,). A softmax divides the whole by its sum, which rounded storage lets exceed 1.
    """
    z = student_logits.detach() / temperature
    p = log_probs.to(z.dtype).exp()
    given = torch.zeros_like(z).scatter_add(1, ids.masked_fill(p == 0, 0), p)
    on, mass = given > 0, p.sum(-1, keepdim=True)
    p_tail = torch.where(mass == 0, 1, (1 - mass).clamp_min(least_tail) if tail == "bucket" else 0)
    off = p_tail.log() + z.masked_fill(on, -torch.inf).log_softmax(-1)
    log_p = torch.where(on, given.clamp_min(torch.finfo(z.dtype).tiny).log(), off)
    student_mass = (z.softmax(-1) * on).sum(-1)
    return temperature * log_p.nan_to_num(-torch.inf).clamp_min(FLOOR), mass.squeeze(1), student_mass


def reference_losses(
    student_logits: Tensor,  # (N, V) after bias, scale, softcap; gradients flow into both
    teacher_logits: Tensor,  # (N, V)
    labels: Tensor | None,  # (N,) int64
    *,
    student: Objective | None,
    teacher: Objective | None,
    temperature: float,
    target_mix: float = 1.0,
    mass: Tensor | None = None,  # (N,) M, of a target that sums to M: the student's D is M D(p / M, q) + M log M
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """Per-token losses (N, 2) of student and teacher, and metrics (N, len(METRICS)), zero in ignored rows.

    Each loss holds the other side still: the student's is differentiated through `q` only, the teacher's through `p`.
    A label that is no token makes its row's losses NaN.
    """
    v = student_logits.shape[1]
    if labels is not None:  # ignored rows may hold anything, NaN included
        ignored = (labels == ignore_index).unsqueeze(1)
        student_logits = torch.where(ignored, 0, student_logits)
        teacher_logits = torch.where(ignored, 0, teacher_logits)
    z, u = student_logits.clamp_min(FLOOR), teacher_logits.clamp_min(FLOOR)
    if target_mix != 1.0:
        u = (1 - target_mix) * z.detach() + target_mix * u
    log_q, log_p = (z / temperature).log_softmax(-1), (u / temperature).log_softmax(-1)
    nlls = [torch.zeros_like(z[:, 0])] * 2
    if labels is not None:
        nlls = [-x.log_softmax(-1).gather(1, labels.clamp(0, v - 1).unsqueeze(1)).squeeze(1) for x in (z, u)]
        unknown = ~ignored.squeeze(1) & ((labels < 0) | (labels >= v))
        nlls = [torch.where(unknown, torch.nan, torch.where(x > INFINITE, torch.inf, x)) for x in nlls]

    def weighted(kl: Tensor) -> Tensor:
        return kl if mass is None else mass * kl + torch.xlogy(mass, mass)

    losses = []
    for objective, learner, target_distribution, nll in (
        (student, log_q, log_p.detach(), nlls[0]),
        (teacher, log_p, log_q.detach(), nlls[1]),
    ):
        if objective is None:
            losses.append(torch.zeros_like(nll))
            continue
        divergence = _divergence(objective, learner, target_distribution)
        losses.append(
            combine(objective, weighted(divergence) if objective is student else divergence, nll, temperature)
        )

    with torch.no_grad():
        q, p = log_q.exp(), log_p.exp()
        at_top = (z == z.amax(-1, keepdim=True)) & (u == u.amax(-1, keepdim=True))
        metrics = {
            "forward_kl": weighted(_divergence(Objective("forward_kl"), log_q, log_p)),
            "reverse_kl": _divergence(Objective("reverse_kl"), log_q, log_p),
            "student_entropy": -(q * log_q).sum(-1),
            "teacher_entropy": -(p * log_p).sum(-1),
            "student_nll": nlls[0],
            "teacher_nll": nlls[1],
            "top1_agreement": at_top.any(-1).to(z.dtype),
        }
        columns = torch.stack([metrics[name] for name in METRICS], 1)
    both = torch.stack(losses, 1)
    if labels is not None:
        both = torch.where(unknown.unsqueeze(1), torch.nan, both).masked_fill(ignored, 0)
        columns = columns.masked_fill(ignored, 0)
    return both, columns
