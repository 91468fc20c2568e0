"""Online Knowledge Distillation of language models: a thin training layer over `okd_kernels`.

Its names are imported as they are asked for, so that the command line can say what is missing, and answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from okd.config import OKDConfig
    from okd.methods import METHODS, Method
    from okd.trainer import OKDTrainer

__all__ = ["METHODS", "Method", "OKDConfig", "OKDTrainer"]
_MODULES = {"METHODS": "methods", "Method": "methods", "OKDConfig": "config", "OKDTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'okd' has no attribute {name!r}")
    try:
        return getattr(import_module(f"okd.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:  # the losses alone want torch only
        raise ImportError(
            f'okd expected {error.name}; got no such package: pip install "okd-kernels[train]"'
        ) from error
