"""The contract of the row backends: what one side brings, how log 0 is written, which statistics come out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from okd_kernels.divergences import Objective

STATISTICS = (
    "forward_kl",  # KL(teacher || student), at the loss's temperature, without T^2
    "reverse_kl",  # KL(student || teacher)
    "student_entropy",
    "teacher_entropy",
    "student_nll",  # -log q(label), at temperature 1; 0 without labels
    "teacher_nll",
    "top1_agreement",  # 1 where one token is the most probable of both
)


FLOOR = -1e30  # stands for log 0, so that 0 * log 0 is 0 by plain arithmetic
INFINITE = 1e10  # a finite divergence cannot reach this; one that met log 0 where the other has mass does


class Side(NamedTuple):
    """One model's rows: logits before bias, scale and softcap, and where their gradient goes."""

    logits: Tensor  # (n, V), any float dtype, unit column stride
    objective: Objective | None  # None: this side does not learn
    gradient: Tensor | None = None  # (n, V), may lie over the logits; None: not wanted
    bias: Tensor | None = None  # (V,)
    logit_scale: float = 1.0
    softcap: float | None = None
