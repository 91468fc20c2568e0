"""A second device on a machine that has one: its tensors say "far", compute on the CPU, and meet no others.

Importing this makes "far" the accelerator of the process: for a process of its own. Needs the Python backends that
torch 2.10 has, and later ones.
"""

import torch
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

aten = torch.ops.aten
crossed = []  # (from far to near, elements) of each copy from one device to the other


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.float32]


class Far(torch.Tensor):
    @staticmethod
    def __new__(cls, near):
        layout = {"strides": near.stride(), "storage_offset": near.storage_offset(), "dtype": near.dtype}
        far = torch.Tensor._make_wrapper_subclass(cls, near.size(), device="far:0", **layout)
        far.near = near
        return far

    def __repr__(self, *, tensor_contents=None):
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        goes_near = False
        if op is aten.copy_.default:
            goes_near = type(args[0]) is not Far
            if goes_near or type(args[1]) is not Far:
                crossed.append((goes_near, args[0].numel()))
        elif any(type(x) is not Far and x.dim() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)):
            raise RuntimeError(f"expected all tensors of {op} on one device; got some on cpu and some on far")
        if kwargs.get("device") is not None:
            goes_near = torch.device(kwargs["device"]).type == "cpu"
            kwargs["device"] = "cpu"
            if goes_near and op is aten._to_copy.default:
                crossed.append((True, args[0].numel()))
        bare_args, bare_kwargs = tree_map(lambda x: x.near if isinstance(x, Far) else x, (args, kwargs))
        out = op(*bare_args, **bare_kwargs)
        if op._schema.name.endswith("_") or goes_near:
            return args[0] if op._schema.name.endswith("_") else out
        return tree_map(lambda x: Far(x) if type(x) is torch.Tensor else x, out)


def _copy(source, target, non_blocking=False):
    crossed.append((type(source) is Far, source.numel()))
    near = [x.near if isinstance(x, Far) else x for x in (source, target)]
    near[1].copy_(near[0])
    return target


_setup_privateuseone_for_python_backend("far", backend_module=Backend())
_library = torch.library.Library("aten", "IMPL")
for _op in (aten.empty.memory_format, aten.empty_strided.default):
    _library.impl(_op, lambda *a, _op=_op, **k: Far(_op(*a, **{**k, "device": "cpu"})), "PrivateUse1")
_library.impl(aten._copy_from.default, _copy, "PrivateUse1")
