"""Fused knowledge-distillation losses from hidden states and head weights, for the student and for the teacher."""

from okd_kernels.call import resolve_backend
from okd_kernels.columns import BackwardColumns
from okd_kernels.divergences import DIVERGENCES, Divergence, Objective
from okd_kernels.gemms import has_fast_gemm
from okd_kernels.heads import LinearHead
from okd_kernels.losses import (
    LinearDistillationLoss,
    distillation_loss,
    linear_distillation_loss,
    linear_sparse_distillation_loss,
)
from okd_kernels.outcomes import Outcomes, linear_outcome_distillation_loss
from okd_kernels.problem import DistillationLoss
from okd_kernels.topk import TopK, linear_topk
from okd_kernels.torch_rows import workspace_size

__version__ = "0.1.0"
__all__ = [
    "DIVERGENCES",
    "BackwardColumns",
    "DistillationLoss",
    "Divergence",
    "LinearDistillationLoss",
    "LinearHead",
    "Objective",
    "Outcomes",
    "TopK",
    "distillation_loss",
    "has_fast_gemm",
    "linear_distillation_loss",
    "linear_outcome_distillation_loss",
    "linear_sparse_distillation_loss",
    "linear_topk",
    "resolve_backend",
    "workspace_size",
]
