"""Ours, plain PyTorch and other libraries behind one signature, and the operands on which they are compared.

Every loss takes `(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, divergence, temperature)` and
returns the mean over counted rows: a scalar to call backward on. Rows are shifted already: none of them shifts.

Two conventions differ. With a temperature, ours carries T^2 (Hinton et al. 2015) and the others do not. And the others
hold the teacher frozen: they have no "okd", in which both models learn; eager PyTorch is there the only comparison.

Legend: N tokens, V vocabulary, D_s / D_t hidden sizes of student and teacher.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from okd_kernels import Objective, linear_distillation_loss

IGNORE = -100
BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # GKD's convention, which Liger, TRL and we share
OKD_WEIGHT = 0.1  # a of OKD's teacher: a KL(q || p) + (1 - a) CE(p, y)
DIVERGENCES = (*BETAS, "okd")


def operands(
    vocab: int,
    student_size: int,
    teacher_size: int,
    tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    masked: int = 0,
    spread: float = 0.1,
) -> list[Tensor]:
    """The five tensors that a loss takes: std(z) is 2, std(z - u) is `spread`, `masked` percent of rows are ignored.

    The teacher sees the student's logits through D_s of its dimensions, and a disagreement through the others: models
    that agree, as they do for most of a distillation, are where a gradient is hardest to get right. Ignored rows come
    first in runs of 64, as prompts do.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int, std: float) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device).mul_(std).to(dtype)

    extra = teacher_size - student_size
    hidden, weight = normal(tokens, student_size, 1.0), normal(vocab, student_size, 2 / student_size**0.5)
    teacher_hidden = torch.cat([hidden, normal(tokens, extra, 1.0)], 1)
    teacher_weight = torch.cat([weight, normal(vocab, extra, spread / extra**0.5)], 1)
    labels = torch.randint(0, vocab, (tokens,), generator=generator, device=device)
    run = min(64, tokens)
    labels[torch.arange(tokens, device=device) % run < run * masked // 100] = IGNORE
    return [hidden, weight, teacher_hidden, teacher_weight, labels]


def ours(
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V, D_s)
    teacher_hidden: Tensor,  # (N, D_t)
    teacher_weight: Tensor,  # (V, D_t)
    labels: Tensor,  # (N,)
    divergence: str,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    backend: str = "auto",
    kept: Tensor | None = None,
) -> Tensor:
    """This library. On a GPU the caller leaves out ignored rows by passing the others' indices, which `okd`'s collator
    knows without waiting for the device; on a CPU the loss does so itself."""
    if kept is not None:
        student_hidden, teacher_hidden, labels = student_hidden[kept], teacher_hidden[kept], labels[kept]
    okd = divergence == "okd"
    return linear_distillation_loss(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        labels,
        student="forward_kl" if okd else divergence,
        teacher=Objective("forward_kl", weight=OKD_WEIGHT, ce_weight=1 - OKD_WEIGHT) if okd else None,
        temperature=temperature,
        workspace_bytes=workspace_bytes,
        backend=backend,
    ).total


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row."""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def eager(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, divergence, temperature=1.0
) -> Tensor:
    """What trainers write: whole logits in the operands' dtype, widened to fp32 for the softmax. fp64 stays fp64."""
    z, u = F.linear(student_hidden, student_weight), F.linear(teacher_hidden, teacher_weight)
    z, u = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (z, u))
    log_q, log_p = ((x / temperature if temperature != 1.0 else x).log_softmax(-1) for x in (z, u))
    target = log_p.detach()
    if divergence == "reverse_kl":
        losses = _kl(log_q, target)
    elif divergence == "jsd":
        log_m = torch.logaddexp(log_q, target) - math.log(2)
        losses = (_kl(target, log_m) + _kl(log_q, log_m)) / 2
    else:
        losses = _kl(target, log_q)
    if divergence == "okd":
        losses = losses + OKD_WEIGHT * _kl(log_q.detach(), log_p)
        losses = losses + (1 - OKD_WEIGHT) * F.cross_entropy(u, labels, ignore_index=IGNORE, reduction="none")
    counted = labels != IGNORE
    return torch.where(counted, losses, 0).sum() / counted.sum()


@functools.cache
def _compiled_eager():
    return torch.compile(eager, dynamic=False)


def compiled(*arguments, **options) -> Tensor:
    """`torch.compile(eager)`. On a CPU it needs a C++ compiler."""
    return _compiled_eager()(*arguments, **options)


def liger_chunked(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, divergence, temperature=1.0, compiled=True
) -> Tensor:
    """Liger's `LigerFusedLinearJSDLoss` (chunks of 1024 tokens, PyTorch, any device). `compiled` is its own default."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, BETAS[divergence], IGNORE, temperature, compiled)
    return loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)


def liger_fused(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, divergence, temperature=1.0
) -> Tensor:
    """Liger's `LigerFusedLinearJSD` (Triton, GPUs only)."""
    if not student_hidden.is_cuda:
        raise RuntimeError("Liger's Triton kernels need a GPU")
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(BETAS[divergence], IGNORE, temperature)
    return loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels)


def trl_chunked(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, divergence, temperature=1.0
) -> Tensor:
    """TRL's `DistillationTrainer` loss (tiles of 4096 x 32768; recomputes the logits in backward)."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    loss, _, _ = _chunked_divergence_loss(
        student_hidden.unsqueeze(0),
        teacher_hidden.unsqueeze(0),
        student_weight,
        teacher_weight,
        (labels != IGNORE).unsqueeze(0),
        BETAS[divergence],
        temperature=temperature,
    )
    return loss


FROZEN_TEACHER = {"liger_chunked": liger_chunked, "liger_fused": liger_fused, "trl_chunked": trl_chunked}
PEERS = {"eager": eager, "compiled": compiled, **FROZEN_TEACHER}
