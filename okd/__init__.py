"""Online Knowledge Distillation of language models: a thin training layer over `okd_kernels`."""

try:
    from okd.config import OKDConfig
    from okd.methods import METHODS, Method
    from okd.trainer import OKDTrainer
except ModuleNotFoundError as error:  # the losses alone want torch only
    raise ImportError(f"okd expected {error.name}; got no such package: pip install 'okd-kernels[train]'") from error

__all__ = ["METHODS", "Method", "OKDConfig", "OKDTrainer"]
