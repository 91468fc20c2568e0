"""Several devices: what they divide of a run, what they send one another, and how fast cards and links are.

Sources: NVIDIA's data sheets for peaks and links, `torch.cuda.get_device_properties` for memory, and for what training
reaches of a peak torchtitan's docs/performance.md: Llama 3.1 8B on 8 H100 with FSDP2, 33 to 39 %.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

EFFICIENCY = 0.4  # of a card's peak that a run's products reach, with all that happens between them
LINK_EFFICIENCY = 0.8  # of a link's bandwidth that NCCL reaches with large messages
NODE, NETWORK = 8, 50.0  # devices of a machine; GB/s that each has to other machines, 400 Gb/s
SLACK = 0.05  # of the memory, which the allocator cannot use between tensors that come and go
BUCKET, LIVE = 5e8, 1e9  # DeepSpeed's defaults, in weights: reduce_bucket_size, stage3_max_live_parameters


class Card(NamedTuple):
    name: str
    memory: float  # GiB
    tflops: float  # 1e12 FLOPs a second of dense bf16 products, at most
    bandwidth: float  # GB/s that it receives over NVLink, or PCIe: half of the data sheet's, which counts both ways

    def link(self, devices: int) -> float:
        """GB/s at most of each of so many; machines are joined by the networks of all their devices."""
        return self.bandwidth if devices <= NODE else min(self.bandwidth, NODE * NETWORK)

    def assumptions(self, devices: int) -> list[str]:
        network = f", machines of {NODE} joined by {NETWORK:.0f} GB/s a device" if devices > NODE else ""
        return [
            f"{self.name}: products at {EFFICIENCY:.0%} of {self.tflops:.0f} TFLOP/s (bf16, dense), transfers at "
            f"{LINK_EFFICIENCY:.0%} of {self.link(devices):.0f} GB/s{network}, where --tflops and --bandwidth do not "
            "say otherwise",
            "a step's time has neither the optimizer's update nor reading data, saving or evaluating in it",
        ]


CARDS = {
    "a100": Card("A100 SXM 80 GB", 79.2, 312, 300),
    "h100": Card("H100 SXM 80 GB", 79.1, 989, 450),
    "h200": Card("H200 SXM 141 GB", 139.8, 989, 450),
    "b200": Card("B200 180 GB", 178.0, 2250, 900),
    "l40s": Card("L40S 48 GB", 44.4, 362, 32),
}


class Sharding(NamedTuple):
    """What devices divide among them, so that each holds its share; of the rest each has all."""

    weights: bool = False  # gathered a layer at a time
    gradients: bool = False
    states: bool = False
    deepspeed: bool = False  # weights in the dtype of the products, and an fp32 copy with the optimizer's states


SHARDINGS = {
    "ddp": Sharding(),
    "fsdp2": Sharding(True, True, True),
    "zero1": Sharding(False, False, True, True),
    "zero2": Sharding(False, True, True, True),
    "zero3": Sharding(True, True, True, True),
}


def sharding_of(args: Any) -> str:
    """Of a run with these arguments, or as accelerate's launcher has it in the environment."""
    if args.deepspeed_plugin is not None:
        stage = args.deepspeed_plugin.zero_stage
        return f"zero{stage}" if stage else "ddp"
    is_fsdp = args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1")
    return "fsdp2" if is_fsdp else "ddp"


class Cluster(NamedTuple):
    """So many devices in a step. `models` below: by name, as `okd.plan` has measured them."""

    sharding: Sharding
    devices: int
    itemsize: int  # bytes of a weight as the products take it, and of a gradient on its way
    steps: int  # micro-batches of an optimizer step

    def for_a_moment(self, models: Mapping[str, Any]) -> dict[str, float]:
        """Bytes that a device holds of the others' shares, and of gradients that have not been divided yet."""
        if self.sharding == SHARDINGS["ddp"] or self.devices == 1:
            return {}
        divided = [m for m in models.values() if m.share < 1 and m.trace is not None]
        layers = [layer for model in divided for layer in model.trace.layers]
        two = 2.0 * max((layer.weights for layer in layers), default=0)
        around = sum(model.trace.around[0] for model in divided)
        trainable = self.itemsize * sum(model.trainable for model in models.values())
        if self.sharding.deepspeed:
            whole = around + sum(layer.weights for layer in layers)
            return {
                "gathered layers": max(two, min(LIVE * self.itemsize, whole)),
                "gathered heads": sum(self.itemsize * math.prod(model.head) for model in divided),
                "gradients on their way": min(2 * BUCKET * self.itemsize, trainable),
            }
        of_unit = sum(m.trace.around[1] for m in divided) + 2 * max((x.trainable for x in layers), default=0)
        return {
            "gathered layers": two,
            "gathered embeddings, heads": around,
            "gradients on their way": of_unit if self.steps == 1 else trainable,
        }

    def traffic(self, models: Mapping[str, Any]) -> dict[str, float]:
        """Bytes that a device receives in an optimizer step: of all that is gathered or summed, what it has not."""
        ring, found = (self.devices - 1) / self.devices, {}
        for name, model in models.items():
            if model.share == 1 or model.trace is None:
                continue
            layers = model.trace.layers
            once = model.trace.around[0] + sum(layer.weights for layer in layers)
            again = sum(layer.weights for layer in layers if layer.saved)
            found[f"{name} weights, forward"] = ring * self.steps * once
            found[f"{name} weights, backward"] = ring * self.steps * again
        trainable = sum(model.trainable for model in models.values())
        if self.sharding.gradients:
            times = self.steps if self.sharding.deepspeed else 1
            found["gradients, summed and divided"] = ring * times * self.itemsize * trainable
        else:  # summed where they are whole: as many come to be summed as come back
            found["gradients, summed"] = 2 * ring * sum(model.trainable_bytes for model in models.values())
        if self.sharding.states and not self.sharding.weights:
            found["updated weights"] = ring * self.itemsize * trainable
        return {name: size for name, size in found.items() if size}

    def notes(self) -> list[str]:
        bits = 8 * self.itemsize
        if self.devices == 1:
            return []
        if self.sharding == SHARDINGS["ddp"]:
            return ["each device holds all of it (DDP); FSDP2 and DeepSpeed's ZeRO divide it"]
        if not self.sharding.weights:
            return [f"each device holds all weights in {bits} bit, and its share of an fp32 copy of what trains (ZeRO)"]
        found = [f"layers are gathered in {bits} bit as they are needed, forward and backward, the next one beside it"]
        if self.sharding.deepspeed:
            found.append("buckets and live parameters are DeepSpeed's defaults")
        elif self.steps > 1:
            found.append("FSDP2 divides gradients at the last micro-batch alone: raise the batch, not the accumulation")
        return found
