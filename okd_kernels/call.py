"""What a call is, checked: objectives, operands, tokens, and the static options that the operator takes.

Every error says what was expected, what came, and what to do. Labels are read by the operator, where it can without
waiting for a device.

Legend: N tokens (any leading shape), V vocabulary (of this rank), D_s / D_t hidden sizes, r rank of a LoRA on a head,
K target ids.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from okd_kernels.columns import BackwardColumns
from okd_kernels.divergences import DIVERGENCES, Objective
from okd_kernels.heads import LinearHead

TAILS = ("bucket", "renormalize", "none")
BACKENDS = ("auto", "triton", "torch", "reference")
WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # where the GEMMs are near their peak: see benchmarks/RESULTS.md


class Operands(NamedTuple):
    """The tensors of a call."""

    student_hidden: Tensor  # (N, D_s), or logits (N, >= V) where there is no weight
    student_weight: Tensor | None  # (V, D_s)
    student_bias: Tensor | None  # (V,)
    student_lora_x: Tensor | None  # (N, r) scaled hidden @ A.T
    student_lora_b: Tensor | None  # (V, r)
    teacher_hidden: Tensor | None  # (N, D_t); None: the target is sparse
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    teacher_lora_x: Tensor | None
    teacher_lora_b: Tensor | None
    target_ids: Tensor | None  # (N, K) int64
    target_log_probs: Tensor | None  # (N, K)
    labels: Tensor | None  # (N,) int64
    row_weights: Tensor  # (N, 2) weight of each token in each side's total
    inverse_normalizer: Tensor  # () factor of the totals


class Spec(NamedTuple):
    """The static options of a call, as the operator's schema has them: numbers and strings only."""

    student: str  # divergence
    student_numbers: list[float]  # weight, ce_weight, alpha, beta
    teacher: str  # "": the teacher does not learn
    teacher_numbers: list[float]
    head_numbers: list[float]  # logit scale and softcap (0: none) of the student's head, then of the teacher's
    student_dtype: torch.dtype  # of the GEMMs' operands
    teacher_dtype: torch.dtype
    tail: str  # of a sparse target; "": the target is a model
    target_mix: float
    temperature: float
    vocab_size: int  # columns of all ranks; 0: all that the heads have
    ignore_index: int
    workspace_bytes: int
    backend: str  # "torch" or "triton"
    group: str  # name of the process group that shares the vocabulary; "": none
    compact: bool
    backward_share: float  # of the columns, in the backward GEMMs
    backward_bound: float  # of dX's relative error; 0: none
    exact_head: bool
    per_token: (
        bool  # gradients are made in backward, from the upstream of the losses; otherwise from that of the totals
    )
    wanted: str  # names of the operands whose gradients are wanted, by commas

    @property
    def columns(self) -> BackwardColumns:
        return BackwardColumns(self.backward_share, self.backward_bound, self.exact_head)

    @property
    def tells_columns(self) -> bool:
        """Whether the metrics hold those of `columns`: per token, gradients are made in backward, too late for them."""
        return not (self.columns.all or self.per_token)

    @property
    def objectives(self) -> tuple[Objective, Objective | None]:
        return _objective(self.student, self.student_numbers), (
            _objective(self.teacher, self.teacher_numbers) if self.teacher else None
        )


def check_labels(labels: Tensor, ignore_index: int, vocab_size: int) -> Tensor:
    """(N,) with -1 for ignored rows, and vocab_size for labels that are no token.

    Raises ValueError for the latter where they can be read without waiting: on a CPU.
    """
    ignored = labels == ignore_index
    unknown = ((labels < 0) | (labels >= vocab_size)) & ~ignored
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and len(wrong := labels[unknown]):
        raise ValueError(f"expected labels in [0, {vocab_size}) or ignore_index={ignore_index}; got {wrong[0].item()}")
    return labels.masked_fill(unknown, vocab_size).masked_fill(ignored, -1)


def packed(objective: Objective | None) -> tuple[str, list[float]]:
    """An objective as `Spec` has it."""
    if objective is None:
        return "", [0.0] * 4
    return objective.divergence, [objective.weight, objective.ce_weight, objective.alpha, objective.beta]


def _objective(divergence: str, numbers: list[float]) -> Objective:
    weight, ce_weight, alpha, beta = numbers
    given = {"alpha": alpha, "beta": beta}
    return Objective(
        divergence, weight, ce_weight, **{name: given[name] for name in DIVERGENCES[divergence].parameters}
    )


def check_objectives(student: Any, teacher: Any, labels: Tensor | None) -> tuple[Objective, Objective | None]:
    objectives = Objective.of(student), None if teacher is None else Objective.of(teacher)
    for name, objective in zip(("student", "teacher"), objectives, strict=True):
        if objective is not None and objective.ce_weight > 0 and labels is None:
            raise ValueError(f"expected labels, since the {name}'s ce_weight is {objective.ce_weight}; got None")
    return objectives


def compute_dtype(name: str, hidden: Tensor, head: LinearHead) -> torch.dtype:
    """The dtype of hidden states and head in their GEMM: autocast's where it is on, which leaves fp64 alone."""
    if not hidden.is_floating_point():
        raise TypeError(f"expected floating-point {name}_hidden; got {hidden.dtype}")
    if hidden.dim() < 1 or hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"expected {name}_hidden of shape (..., {head.weight.shape[1]}), since the {name}'s head is "
            f"{tuple(head.weight.shape)}; got {tuple(hidden.shape)}: are student and teacher swapped?"
        )
    if hidden.device != head.weight.device:
        raise ValueError(
            f"expected the {name}'s head on {hidden.device}, as its hidden states; got {head.weight.device}"
        )
    if torch.is_autocast_enabled(hidden.device.type) and torch.float64 not in (hidden.dtype, head.weight.dtype):
        return torch.get_autocast_dtype(hidden.device.type)
    if hidden.dtype != head.weight.dtype:
        raise TypeError(
            f"expected the {name}'s head in {hidden.dtype}, as its hidden states; got {head.weight.dtype}: cast one of "
            "them, or run under torch.autocast"
        )
    return hidden.dtype


def common_shape(student: Tensor, teacher: Tensor, what: str = "hidden") -> torch.Size:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"expected student_{what} and teacher_{what} of one leading shape; got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: select the same tokens of both"
        )
    if student.device != teacher.device:
        raise ValueError(f"expected both models' {what} on one device; got {student.device} and {teacher.device}")
    return student.shape[:-1]


def shared_vocab(student: int, teacher: int, vocab_size: int | None, group: dist.ProcessGroup | None = None) -> int:
    """Columns of both; 0 with a group, whose ranks' parts the operator adds up, unless a vocab_size cuts the sum."""
    if group is not None:
        if vocab_size is not None and vocab_size < 1:
            raise ValueError(f"expected vocab_size >= 1, of all ranks; got {vocab_size}")
        return vocab_size or 0
    if vocab_size is None:
        if student != teacher:
            raise ValueError(
                f"expected heads of one vocabulary size; got student {student} and teacher {teacher}. If they share a "
                f"tokenizer and are padded differently, pass vocab_size=len(tokenizer), at most {min(student, teacher)}"
            )
        return student
    if not 0 < vocab_size <= min(student, teacher):
        raise ValueError(
            f"expected vocab_size in [1, {min(student, teacher)}], as both heads have rows; got {vocab_size}"
        )
    return vocab_size


def check_options(
    temperature: float, target_mix: float, teacher: Objective | None, group: dist.ProcessGroup | None, backend: str
) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"expected a temperature > 0; got {temperature}")
    if not 0 <= target_mix <= 1:
        raise ValueError(f"expected target_mix between 0 and 1; got {target_mix}")
    if target_mix < 1 and teacher is not None:
        raise ValueError(
            f"expected teacher=None with target_mix below 1, which moves the student's target only; got {teacher}: "
            "let the teacher learn in a call of its own"
        )
    if group is None:
        return
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "expected an initialised process group; got none: call torch.distributed.init_process_group first, or "
            "leave out group where one process holds whole heads"
        )
    if backend == "reference":
        raise ValueError("expected whole heads for backend='reference'; got a group: use backend='auto'")


def resolve_backend(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that will run on `device` for row mathematics in `dtype`: "auto" resolved, any other checked.

    Triton's rows are in fp32: "auto" brings fp64 to PyTorch's. Raises ValueError.
    """
    if backend not in BACKENDS:
        raise ValueError(f"expected backend to be one of {', '.join(BACKENDS)}; got {backend!r}")
    has_triton = DIVERGENCES["forward_kl"].rule is not None
    if backend == "auto":
        return "triton" if has_triton and device.type == "cuda" and dtype == torch.float32 else "torch"
    if backend == "triton" and not has_triton:
        raise ValueError(
            "expected Triton for backend='triton'; it is not installed: pip install triton, or backend='torch'"
        )
    if backend == "triton" and dtype != torch.float32:
        raise ValueError(f"expected operands of at most fp32 for backend='triton'; got {dtype}: use backend='auto'")
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            "expected CUDA or ROCm tensors for backend='triton'; got cpu: use backend='auto', or set "
            "TRITON_INTERPRET=1 before Python starts to debug"
        )
    return backend


def chunk_workspace(workspace_bytes: int | None, device: torch.device) -> int:
    """Bytes of the chunk buffers: what was asked for, or the device's default."""
    if workspace_bytes is None:
        return WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cuda"])
    if workspace_bytes <= 0:
        raise ValueError(f"expected workspace_bytes > 0; got {workspace_bytes}")
    return workspace_bytes


def check_tail(tail: str, divergence: str) -> None:
    if tail not in TAILS:
        raise ValueError(f"expected tail to be one of {', '.join(TAILS)}; got {tail!r}")
    if divergence == "reverse_kl" and tail != "bucket":
        raise ValueError(
            f"expected tail='bucket' for reverse_kl; got {tail!r}: the student has mass off the target's ids, where "
            "a target without a tail has none, so that KL(q || p) is infinite"
        )
    if divergence == "alpha_beta" and tail == "bucket":
        raise ValueError(
            "expected tail='renormalize' for alpha_beta; got 'bucket': it is no f-divergence, and tokens of one ratio "
            "p / q count otherwise as one outcome than apart, so that it has no value over K + 1 outcomes"
        )
    if tail == "none" and divergence != "forward_kl":
        raise ValueError(
            f"expected forward_kl for tail='none'; got {divergence!r}: only KL(p || q)'s gradient is linear in p, so "
            "that samples estimate its gradient without bias: use tail='bucket' or 'renormalize'"
        )


def check_sparse_targets(
    shape: torch.Size, device: torch.device, ids: Tensor, log_p: Tensor, counted: Tensor | None, vocab_size: int
) -> None:
    """counted: (N,) or None; vocab_size: 0 where only the group knows it, and ids are looked at by nobody."""
    if ids.dtype != torch.int64:
        raise TypeError(f"expected target_ids of dtype torch.int64; got {ids.dtype}: pass target_ids.long()")
    if not log_p.is_floating_point():
        raise TypeError(f"expected floating-point target_log_probs; got {log_p.dtype}")
    if ids.dim() != len(shape) + 1 or ids.shape[:-1] != shape or ids.shape[-1] == 0:
        raise ValueError(
            f"expected target_ids of shape ({', '.join(map(str, (*shape, 'K')))}), K >= 1, for the student's rows; "
            f"got {tuple(ids.shape)}"
        )
    if log_p.shape != ids.shape:
        raise ValueError(
            f"expected target_log_probs of shape {tuple(ids.shape)}, as target_ids; got {tuple(log_p.shape)}"
        )
    for name, tensor in (("target_ids", ids), ("target_log_probs", log_p)):
        if tensor.device != device:
            raise ValueError(f"expected {name} on {device}, as the student's rows; got {tensor.device}")
    if device.type != "cpu" or torch.compiler.is_compiling():  # reading them would synchronise
        return
    looked_at = log_p > -torch.inf
    if counted is not None:
        looked_at = looked_at & counted.reshape(shape).unsqueeze(-1)
    wrong = ids[looked_at & ((ids < 0) | (ids >= (vocab_size or torch.inf)))]
    if len(wrong):
        raise ValueError(
            f"expected target_ids in [0, {vocab_size}), or a target_log_prob of -inf as padding; got {wrong[0].item()}"
        )
    positive = log_p[looked_at & (log_p > 0.01)]  # 16-bit storage may round a certain token up a little
    if len(positive):
        raise ValueError(
            f"expected target_log_probs <= 0; got {positive[0].item():.4g}: pass log_softmax values, or log of "
            "normalised counts; not logits, probabilities or counts"
        )
