"""Models whose weights are divided over the processes, by FSDP2 or DeepSpeed's ZeRO-3: what is whole where, and when.

A weight is whole inside the forward of the module that its wrapper wraps, here the pair of student and teacher: what
reads one runs there (`Sharded.inside`), on all processes, in the same order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.integrations import is_deepspeed_zero3_enabled

LAUNCH = Path(__file__).parent / "launch"  # accelerate's configurations, by name
SHARDS = "shards"  # in a checkpoint: each process's part of an FSDP2 run
KINDS = tuple(sorted(file.stem for file in LAUNCH.glob("*.yaml")))

T = TypeVar("T")


def ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def most(x: int) -> int:
    """The largest of a number of each process, the same on all."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = torch.tensor(x, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found.item())


def of_first(x: T) -> T:
    """What the first process has, on all."""
    if ranks() == 1:
        return x
    found = [x]
    dist.broadcast_object_list(found)
    return found[0]


def launch_options(kind: str) -> dict[str, Any]:
    """What `TrainingArguments` take for a shipped configuration, where accelerate's launcher has not read it."""
    given = yaml.safe_load((LAUNCH / f"{kind}.yaml").read_text())
    if "fsdp_config" in given:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # accelerate says so later, when models have been loaded
            os.environ["ACCELERATE_USE_FSDP"] = "true"
        return {"fsdp": True, "fsdp_config": given["fsdp_config"]}
    stage = given["deepspeed_config"]["zero_stage"]
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
    dtypes: Any = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}
    return {"deepspeed": {"zero_optimization": {"stage": stage}, **auto, **dtypes}}


def is_divided(model: nn.Module) -> bool:
    """ZeRO-3 has loaded it in parts."""
    return any(hasattr(p, "ds_id") for p in model.parameters())


def is_elsewhere(model: nn.Module) -> bool:
    """The weights of a model as it was loaded are not all in this process."""
    return is_divided(model) or _is_to_be_sent()


def _is_to_be_sent() -> bool:
    flags = (os.environ.get(name, "false") for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"))
    return all(flag.lower() in ("true", "1") for flag in flags) and ranks() > 1 and dist.get_rank() > 0


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Inside, models are loaded whole on each process, whatever ZeRO-3 is configured to; they are divided later."""
    kept = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = kept


@contextmanager
def with_buffers(model: nn.Module) -> Iterator[None]:
    """Inside, saved buffers look unsaved to accelerate, which takes them for weights when it sends those of the first
    process to the others; they are sent here."""
    saved = [
        (module, name)
        for module in model.modules()
        for name, x in module._buffers.items()
        if x is not None and name not in module._non_persistent_buffers_set
    ]
    for module, name in saved:
        module._non_persistent_buffers_set.add(name)
    try:
        yield
    finally:
        for module, name in saved:
            module._non_persistent_buffers_set.discard(name)
            dist.broadcast(module.get_buffer(name), 0)


def shape_of(p: Tensor) -> torch.Size:
    """Of the whole weight."""
    return getattr(p, "ds_shape", p.shape)


def whole(p: Tensor) -> Tensor:
    """The whole of a weight, without a graph; where it is divided, all processes call it."""
    if hasattr(p, "full_tensor"):
        return p.detach().full_tensor()  # type: ignore[attr-defined]
    if hasattr(p, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().clone()
    return p.detach()


def hold_heads(pair: Any) -> None:
    """ZeRO-3 gathers a weight for the module that has it. A head is read in the pair's forward, and may be the input
    embedding, too, which would take it away when it has run."""
    import deepspeed

    for head in pair.heads():
        for p in (p for p in head.parameters() if hasattr(p, "ds_id")):
            p.is_external_param = True
            deepspeed.zero.register_external_parameter(pair, p)


class Sharded:
    """A trainer's part in it."""

    accelerator: Any
    deepspeed: Any
    is_deepspeed_enabled: Any
    is_fsdp_enabled: Any
    model_wrapped: Any
    pair: Any

    @property
    def is_sharded(self) -> bool:
        """Each process holds a part of the weights."""
        return bool(self.is_fsdp_enabled or is_deepspeed_zero3_enabled())

    def inside(self, work: Callable[[], T], kept: nn.Module | None = None) -> T:
        """What `work` returns where the pair's weights are whole; layers are gathered one after the other as they run.

        FSDP2 leaves those of a model that is `kept` whole after their first forward, for others that come at once.
        All processes call it, and pass the same layers in the same order. Raises ValueError before a training begins.
        """
        if not self.is_sharded:
            return work()
        if not (isinstance(self.pair, FSDPModule) if self.is_fsdp_enabled else self.deepspeed):
            raise ValueError(
                "expected a training that divides the models before they are evaluated; got none: call train() first, "
                "or give the saved student to okd evaluate"
            )
        units = [] if kept is None else [module for module in kept.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
        try:
            return self.model_wrapped(work)
        finally:
            for unit in units:
                unit.set_reshard_after_forward(self.accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)
            divide(self.pair)


def divide(model: nn.Module) -> None:
    """Where a forward without a backward has left FSDP2's weights whole."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# --- checkpoints


def whole_state(model: nn.Module, state: Mapping[str, Tensor], keeps: bool) -> dict[str, Tensor]:
    """Divided weights whole, on the CPU of a process that `keeps` them; one tensor under two names stays one."""
    divide(model)
    found: dict[str, Tensor] = {}
    once: dict[int, Tensor] = {}
    for name, x in state.items():
        if id(x) not in once:
            full = whole(x)
            once[id(x)] = full.cpu() if keeps else full.new_empty(0)
        found[name] = once[id(x)]
    return found if keeps else {}


def save_shards(
    model: nn.Module, state: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, directory: Path
) -> None:
    """FSDP2's parts of these weights and of the optimizer's state, through torch.distributed.checkpoint."""
    divide(model)
    weights = {name: x.detach() for name, x in state.items()}
    dcp.save({"weights": weights, "optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=directory)


def load_shards(model: nn.Module, state: Mapping[str, Tensor], directory: Path) -> None:
    """What `save_shards` wrote, into the weights, in place. Raises FileNotFoundError."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory}: expected the shards of an FSDP2 run; got no such directory: resume without FSDP, or start "
            "from the checkpoint's student"
        )
    divide(model)
    dcp.load({"weights": {name: x.detach() for name, x in state.items()}}, checkpoint_id=directory)


def load_optimizer_shards(model: nn.Module, optimizer: torch.optim.Optimizer, directory: Path) -> None:
    """The optimizer's state, which this makes first where there has been no step."""
    divide(model)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=directory)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def save_deepspeed(engine: Any, model: Any, state: Mapping[str, Tensor], directory: Path) -> None:
    """These weights as far as they train, and the optimizer's state, by each process its part."""

    def without_others(module: nn.Module, found: dict[str, Any], *_: Any) -> None:
        for name in found.keys() - state.keys():  # DeepSpeed leaves a frozen head there that is the input embedding
            del found[name]

    hook = model.register_state_dict_post_hook(without_others)
    try:
        engine.save_checkpoint(str(directory), exclude_frozen_parameters=True)
    finally:
        hook.remove()


def load_deepspeed(engine: Any, directory: Path) -> None:
    """What DeepSpeed saved: weights that train, and the optimizer's state. Raises FileNotFoundError."""
    path, _ = engine.load_checkpoint(str(directory), load_module_strict=False)
    if path is None:
        raise FileNotFoundError(
            f"{directory}: expected a checkpoint of a DeepSpeed run; got none: resume without DeepSpeed, or start from "
            "the checkpoint's student"
        )
