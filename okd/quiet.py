"""What other libraries say on a healthy run, and what is no use where nobody watches."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable

UNASKED = {  # logger -> a part of its message
    "torchao": "Failed to load",  # kernels of other machines; transformers imports it wherever it is installed
    "torch.utils._pytree": "register_constant",  # by torchao, of its own enumerations
    "bitsandbytes.backends.cpu.ops": "gemm_4bit_forward",  # of a hub; PEFT imports it wherever it is installed
    "DeepSpeed": "Setting accelerator to CPU",  # accelerate imports it wherever it is installed
}


def _without(part: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: part not in str(record.msg)


def quiet() -> None:
    """Before other libraries are imported: leave out these messages, and, but in a terminal, all progress bars."""
    for name, part in UNASKED.items():
        logging.getLogger(name).addFilter(_without(part))
    # of a teacher that is one GGUF file, where PEFT saves its LoRA, which touches no embeddings
    warnings.filterwarnings("ignore", "Could not find a config file", module="peft")
    if not sys.stderr.isatty() and "tqdm" not in sys.modules:
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; `okd.callbacks.Lines` in their place
