"""The tokens of a call: labels, weights and reduction, flattened; and the result that they are reduced to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from okd_kernels.divergences import Objective
from okd_kernels.rows import STATISTICS


class DistillationLoss(NamedTuple):
    """Losses of both sides, and detached per-token statistics.

    Attributes:
        student, teacher: scalars, or per token with `reduction="none"`; fp32 (fp64 for fp64 inputs). `teacher` is None
            where the teacher does not learn.
        metrics: name -> (...,) per-token statistics, zero in ignored rows: `forward_kl` = KL(teacher || student),
            `reverse_kl`, `student_entropy`, `teacher_entropy` (these at the loss's temperature), `student_nll`,
            `teacher_nll` (at temperature 1; zero without labels), `top1_agreement` (0 or 1).
    """

    student: Tensor
    teacher: Tensor | None
    metrics: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """student + teacher: one backward serves both, since neither loss reaches the other side."""
        return self.student if self.teacher is None else self.student + self.teacher


class Tokens:
    """Labels, weights and reduction of the flattened tokens."""

    def __init__(self, shape, labels, token_weights, normalizer, reduction, ignore_index, vocab_size, device):
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"expected reduction to be mean, sum or none; got {reduction!r}")
        if isinstance(normalizer, Tensor) and normalizer.numel() != 1:
            raise ValueError(f"expected one normalizer; got a tensor of shape {tuple(normalizer.shape)}")
        if not isinstance(normalizer, Tensor | None) and not normalizer >= 0:
            raise ValueError(f"expected normalizer >= 0; got {normalizer}")
        if normalizer is not None and reduction != "mean":
            raise ValueError(f"expected normalizer with reduction='mean' only; got reduction={reduction!r}")
        for name, tensor in (("labels", labels), ("token_weights", token_weights)):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"expected {name} of shape {tuple(shape)}, one for each row; got {tuple(tensor.shape)}"
                )
            if tensor is not None and tensor.device != device:
                raise ValueError(f"expected {name} on {device}, as the student's rows; got {tensor.device}")
        if labels is not None and labels.dtype != torch.int64:
            raise TypeError(f"expected labels of dtype torch.int64; got {labels.dtype}: pass labels.long()")
        if token_weights is not None and token_weights.requires_grad:
            raise ValueError(
                "expected token_weights without gradient; use reduction='none' and weigh the losses yourself"
            )
        self.shape, self.reduction, self.normalizer, self.device = shape, reduction, normalizer, device
        self.labels = None
        if labels is not None:
            flat = labels.reshape(-1)
            counted = flat != ignore_index
            if device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere, reading them would synchronise
                wrong = flat[counted & ((flat < 0) | (flat >= vocab_size))]
                if len(wrong):
                    raise ValueError(
                        f"expected labels in [0, {vocab_size}) or ignore_index={ignore_index}; got {wrong[0].item()}"
                    )
            self.labels = torch.where(counted, flat, -1)
        self.token_weights = None if token_weights is None else token_weights.reshape(-1)

    def _token_weights(self, dtype: torch.dtype) -> Tensor:
        n = self.shape.numel()
        weights = torch.ones(n, dtype=dtype, device=self.device)
        if self.token_weights is not None:
            weights = self.token_weights.to(dtype)
        return weights if self.labels is None else torch.where(self.labels >= 0, weights, 0)

    def weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Row weights (N, 2) and the factor 1 / normalizer, a 0-d tensor on the device."""
        weights = self._token_weights(dtype)
        if self.reduction != "mean":
            scale = torch.ones((), dtype=dtype, device=self.device)
        else:
            total = weights.sum() if self.normalizer is None else self.normalizer
            if not isinstance(total, Tensor):  # filled on the device: copying a number there would synchronise
                total = torch.full((), total, dtype=dtype, device=self.device)
            total = total.to(self.device, dtype).reshape(())
            scale = torch.where(total == 0, 0, 1 / total)  # no counted token: zero loss, zero gradients
        return weights.unsqueeze(1).expand(-1, 2), scale

    def reduce(
        self, losses: Sequence[Tensor], statistics: Tensor, objectives: list[Objective | None]
    ) -> DistillationLoss:
        """From per-token losses (N,) of student and teacher."""
        if self.reduction == "none":
            student, teacher = map(self.per_token, losses)
        else:
            weights, scale = self.weights(losses[0].dtype)
            student, teacher = ((side * weights[:, 0]).sum() * scale for side in losses)
        return DistillationLoss(student, None if objectives[1] is None else teacher, self.metrics(statistics))

    def per_token(self, losses: Tensor) -> Tensor:
        """From losses (N,), zero in ignored rows, to weighted ones of the tokens' shape."""
        if self.token_weights is not None:
            losses = losses * self._token_weights(losses.dtype)
        return losses.reshape(self.shape)

    def metrics(self, statistics: Tensor) -> dict[str, Tensor]:
        return {name: statistics[:, i].detach().reshape(self.shape) for i, name in enumerate(STATISTICS)}
