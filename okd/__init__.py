"""Online Knowledge Distillation of language models: a thin training layer over `okd_kernels`."""

from okd.config import METHODS, Method, OKDConfig
from okd.trainer import OKDTrainer

__all__ = ["METHODS", "Method", "OKDConfig", "OKDTrainer"]
