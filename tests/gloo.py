"""FSDP2 and DeepSpeed between processes of a CPU, where accelerate leaves both off: its list of process groups that can
be sharded lacks that of CPUs, and `use_cpu` turns DeepSpeed off. Nothing else is changed.

`python -m gloo okd.cli train ...` runs a module so.
"""

import importlib
import os
import runpy
import sys

from accelerate import state
from accelerate.utils import DistributedType

_initialise = state.AcceleratorState.__init__
_prepare = state.PartialState._prepare_backend


def _with_fsdp(self, *args, fsdp_plugin=None, **options):
    _initialise(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        self.fsdp_plugin = fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def _as_if_of_gpus(self, cpu=False, *args, **options):
    is_one_of_several = "LOCAL_RANK" in os.environ and not cpu
    return ("gloo", DistributedType.MULTI_GPU) if is_one_of_several else _prepare(self, cpu, *args, **options)


def on_gloo(with_deepspeed=False):
    """Call it first. DeepSpeed wants use_cpu=False."""
    state.AcceleratorState.__init__ = _with_fsdp
    state.PartialState._prepare_backend = _as_if_of_gpus
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    if with_deepspeed:
        deepspeed_torch = importlib.import_module("deepspeed.comm.torch")
        deepspeed_torch.build_shm_op = lambda: None  # collectives in shared memory, which it would compile for minutes


if __name__ == "__main__":
    on_gloo()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
