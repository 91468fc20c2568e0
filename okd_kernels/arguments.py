"""Argument checks that the public losses share, and what they settle: objectives, operands, backend, workspace.

Every error says what was expected, what came, and what to do.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from okd_kernels.divergences import DIVERGENCES, Objective
from okd_kernels.heads import LinearHead

BACKENDS = ("auto", "triton", "torch", "reference")
WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # where the GEMMs are near their peak: see benchmarks/RESULTS.md


def check_objectives(student, teacher, labels) -> list[Objective | None]:
    objectives = [Objective.of(student), None if teacher is None else Objective.of(teacher)]
    for name, objective in zip(("student", "teacher"), objectives, strict=True):
        if objective is not None and objective.ce_weight > 0 and labels is None:
            raise ValueError(f"expected labels, since the {name}'s ce_weight is {objective.ce_weight}; got None")
    return objectives


def gemm_operands(name: str, hidden: Tensor, head: LinearHead) -> tuple[Tensor, LinearHead]:
    """Hidden states and head in the dtype of their GEMM: autocast's where it is on, which leaves fp64 alone."""
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
        dtype = torch.get_autocast_dtype(hidden.device.type)
        return hidden.to(dtype), head.cast(dtype)
    if hidden.dtype != head.weight.dtype:
        raise TypeError(
            f"expected the {name}'s head in {hidden.dtype}, as its hidden states; got {head.weight.dtype}: cast one of "
            "them, or run under torch.autocast"
        )
    return hidden, head


def common_shape(student: Tensor, teacher: Tensor, what: str = "hidden") -> torch.Size:
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            f"expected student_{what} and teacher_{what} of one leading shape; got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: select the same tokens of both"
        )
    if student.device != teacher.device:
        raise ValueError(f"expected both models' {what} on one device; got {student.device} and {teacher.device}")
    return student.shape[:-1]


def shared_vocab(student: int, teacher: int, vocab_size: int | None) -> int:
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


def check_temperature(temperature: float) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"expected a temperature > 0; got {temperature}")


def check_teacher_share(teacher_share: float, teacher: Objective | None) -> None:
    if not 0 <= teacher_share <= 1:
        raise ValueError(f"expected teacher_share between 0 and 1; got {teacher_share}")
    if teacher_share < 1 and teacher is not None:
        raise ValueError(
            f"expected teacher=None with teacher_share below 1, which moves the student's target only; got {teacher}: "
            "let the teacher learn in a call of its own"
        )


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
