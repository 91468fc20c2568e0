"""Ours, plain PyTorch and other libraries behind one signature, and the operands on which they are compared.

Every loss takes `(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, divergence, temperature)` and
returns the mean over counted rows: a scalar to call backward on. Rows are shifted already: none of them shifts.

Two conventions differ. With a temperature, ours and ORDA's carry T^2 (Hinton et al. 2015) and the others do not. And
Liger and TRL hold the teacher frozen. Where both models learn, each holds the other still:

    mutual   KL(p || q) for the student, KL(q || p) for the teacher: `teacher=Objective("forward_kl")`, ORDA's "mutual"
    okd      the same with a KL(q || p) + (1 - a) CE(p, y) for the teacher; ORDA has one weight for both KLs

For "sparse" the teacher is K ids and their log-probabilities a row (`with_sparse_targets`), in the places of the
teacher's hidden states and head: KL over K + 1 outcomes, the rest of the vocabulary being one of them.

Legend: N tokens, V vocabulary, D_s / D_t hidden sizes of student and teacher, K target ids.
"""

from __future__ import annotations

import functools
import inspect
import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import okd_kernels

IGNORE = -100
BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # GKD's convention, which Liger, TRL and we share
OKD_WEIGHT = 0.1  # a of OKD's teacher: a KL(q || p) + (1 - a) CE(p, y)
ONLINE = {"okd": (OKD_WEIGHT, 1 - OKD_WEIGHT), "mutual": (1.0, 0.0)}  # weights of the teacher's KL and cross-entropy
DIVERGENCES = (*BETAS, *ONLINE, "sparse")
TARGETS = 64  # K
TINY = 1e-30


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


def with_sparse_targets(operands: list[Tensor]) -> list[Tensor]:
    """The same with the teacher's `TARGETS` most probable ids of each row and their log-probabilities (at T = 1)."""
    hidden, weight, teacher_hidden, teacher_weight, labels = operands
    top = okd_kernels.linear_topk(teacher_hidden, teacher_weight, min(TARGETS, len(teacher_weight)))
    return [hidden, weight, top.ids, top.log_probs, labels]


def ours(
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V, D_s)
    teacher_hidden: Tensor,  # (N, D_t), or ids (N, K)
    teacher_weight: Tensor,  # (V, D_t), or log-probabilities (N, K)
    labels: Tensor,  # (N,)
    divergence: str,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
    kept: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    library: ModuleType = okd_kernels,
    **options: Any,
) -> Tensor:
    """This library, or another version of it, with further options.

    On a GPU the caller leaves out ignored rows by passing the others' indices, which `okd`'s collator knows without
    waiting for the device; on a CPU the loss does so itself.
    """
    sparse = divergence == "sparse"
    if kept is not None:
        student_hidden, teacher_hidden, labels = student_hidden[kept], teacher_hidden[kept], labels[kept]
        teacher_weight = teacher_weight[kept] if sparse else teacher_weight
    loss = library.linear_sparse_distillation_loss if sparse else library.linear_distillation_loss
    options |= {"temperature": temperature, "workspace_bytes": workspace_bytes}
    if group is not None:
        loss, options["group"] = getattr(library, "vocab_parallel_distillation_loss", loss), group
    if student_hidden.is_cuda and "compact" in inspect.signature(loss).parameters:
        options["compact"] = False
    if divergence in ONLINE:
        weight, ce_weight = ONLINE[divergence]
        options["teacher"] = library.Objective("forward_kl", weight=weight, ce_weight=ce_weight)
    elif not sparse:
        options["student"] = divergence
    return loss(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, **options).total


def _kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) of each row."""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def _bucket_kl(log_q: Tensor, ids: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) of each row over the ids and what is left of both."""
    log_q = log_q.gather(1, ids)
    p_tail, q_tail = ((1 - x.exp().sum(-1)).clamp_min(TINY) for x in (log_p, log_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1) + p_tail * (p_tail / q_tail).log()


def eager(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, divergence, temperature=1.0
) -> Tensor:
    """What trainers write: whole logits in the operands' dtype, widened to fp32 for the softmax. fp64 stays fp64."""

    def log_softmax(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(hidden, weight)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return z, (z / temperature if temperature != 1.0 else z).log_softmax(-1)

    counted = labels != IGNORE
    _, log_q = log_softmax(student_hidden, student_weight)
    if divergence == "sparse":
        losses = _bucket_kl(log_q, teacher_hidden, teacher_weight)
        return torch.where(counted, losses, 0).sum() / counted.sum()
    u, log_p = log_softmax(teacher_hidden, teacher_weight)
    target = log_p.detach()
    if divergence == "reverse_kl":
        losses = _kl(log_q, target)
    elif divergence == "jsd":
        log_m = torch.logaddexp(log_q, target) - math.log(2)
        losses = (_kl(target, log_m) + _kl(log_q, log_m)) / 2
    else:
        losses = _kl(target, log_q)
    if divergence in ONLINE:
        weight, ce_weight = ONLINE[divergence]
        losses = losses + weight * _kl(log_q.detach(), log_p)
        if ce_weight:
            losses = losses + ce_weight * F.cross_entropy(u, labels, ignore_index=IGNORE, reduction="none")
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


def _liger_on_gpu(operands: list[Tensor], divergence: str, temperature: float, kernels: str) -> Tensor:
    """`LigerFusedLinearJSD` with its row kernels in one language, where the library would choose by the card.

    Raises RuntimeError where there is no GPU, no compiler for them, or a card that is too old.
    """
    if not operands[0].is_cuda:
        raise RuntimeError("Liger's kernels need a GPU")
    from liger_kernel.ops import LigerFusedLinearJSDFunction

    options = (BETAS[divergence], IGNORE, temperature, None, kernels, None)
    return LigerFusedLinearJSDFunction.apply(*operands, *options)


def liger_fused(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, divergence, temperature=1.0
) -> Tensor:
    """Liger's `LigerFusedLinearJSD` in Triton (GPUs only)."""
    operands = [student_hidden, student_weight, teacher_hidden, teacher_weight, labels]
    return _liger_on_gpu(operands, divergence, temperature, "nvidia-triton")


def liger_cute(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, divergence, temperature=1.0
) -> Tensor:
    """The same in CuTe: needs `cutlass.cute` and compute capability 9.0, and is Liger's own choice there."""
    operands = [student_hidden, student_weight, teacher_hidden, teacher_weight, labels]
    return _liger_on_gpu(operands, divergence, temperature, "nvidia-cutedsl")


def liger_cutile(
    student_hidden, student_weight, teacher_hidden, teacher_weight, labels, divergence, temperature=1.0
) -> Tensor:
    """The same in cuTile: needs `cuda.tile`, its compiler and compute capability 10.0."""
    operands = [student_hidden, student_weight, teacher_hidden, teacher_weight, labels]
    return _liger_on_gpu(operands, divergence, temperature, "nvidia-cutile")


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


def orda(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, divergence, temperature=1.0) -> Tensor:
    """ORDA's `distillation_loss` with a separate head: Triton on GPUs, in chunks; whole logits on a CPU.

    Its cross-entropies are switched off, and labels are taken to be valid: checking them would wait for the device.
    "cojeffreys", its other loss that teaches the teacher, lets KL(p || q) + KL(q || p) reach both models whole.
    """
    from orda_kernel import KernelConfig, SeparateTeacher, distillation_loss

    return distillation_loss(
        student_hidden,
        student_weight,
        labels,
        SeparateTeacher(teacher_hidden, teacher_weight),
        student_ce_weight=0.0,
        kl_weight=1.0,
        kl_temperature=temperature,
        kl_divergence=ORDA_NAMES[divergence],
        kl_beta=0.5 if divergence == "jsd" else None,
        backend="triton" if student_hidden.is_cuda else "torch",
        config=KernelConfig(assume_valid_labels=True),
    ).loss


ORDA_NAMES = {"forward_kl": "forward", "reverse_kl": "reverse", "jsd": "skew_js", "mutual": "mutual"}
FROZEN_TEACHER = {
    "liger_chunked": liger_chunked,
    "liger_fused": liger_fused,
    "liger_cute": liger_cute,
    "liger_cutile": liger_cutile,
    "trl_chunked": trl_chunked,
}
PEERS = {"eager": eager, "compiled": compiled, "orda": orda, **FROZEN_TEACHER}


def names(divergence: str) -> list[str]:
    """The peers that have a divergence."""
    return [
        name
        for name in PEERS
        if divergence in (BETAS if name in FROZEN_TEACHER else ORDA_NAMES if name == "orda" else DIVERGENCES)
    ]
