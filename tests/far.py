"""A second device on a machine that has one: its tensors say "far", compute on the CPU, and meet no others.

Importing this makes "far" the accelerator of the process: for a process of its own.
"""

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
crossed = []  # (it comes from far, its elements), of each tensor that has gone from one device to the other


class Far(torch.Tensor):
    """Wraps the CPU's tensor `near`."""

    @staticmethod
    def __new__(cls, near):
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        far = torch.Tensor._make_wrapper_subclass(cls, near.size(), device="far:0", **layout)
        far.near = near
        return far

    def __repr__(self, *, tensor_contents=None):
        return f"Far({self.near})"

    def tolist(self):
        return self.near.tolist()

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if op is aten.copy_.default:
            return _copy(args[1], args[0])
        if any(type(x) is not Far and x.dim() for x in tensors):
            raise RuntimeError(f"expected all tensors of {op} on one device; got some on cpu and some on far")
        leaves = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        bare_args, bare_kwargs = tree_map(_near, (args, kwargs))
        out = op(*bare_args, **bare_kwargs)
        if leaves:
            crossed.append((True, tensors[0].numel()))
            return out
        if op._schema.name.endswith("_"):
            return args[0] if op._schema.returns else None
        return tree_map(lambda x: Far(x) if type(x) is torch.Tensor else x, out)


def _near(x):
    return x.near if isinstance(x, Far) else x


def _copy(source, target, non_blocking=False):
    if type(source) is not type(target):
        crossed.append((type(source) is Far, source.numel()))
    _near(target).copy_(_near(source))
    return target


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float32]


_setup_privateuseone_for_python_backend("far", backend_module=Backend())
_library = torch.library.Library("aten", "IMPL")
for _op in (aten.empty.memory_format, aten.empty_strided.default):
    _library.impl(_op, lambda *a, _op=_op, **k: Far(_op(*a, **{**k, "device": "cpu"})), "PrivateUse1")
_library.impl(aten._copy_from.default, _copy, "PrivateUse1")
