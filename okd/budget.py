"""What a plan says of a run: memory by part, work and transfers of a step, whether it fits, and what would help.

Memory has two peaks, of which the higher counts: at the end of the forward pass, whose activations wait, and at the
optimizer's step, when all gradients are there. Between them activations go as gradients come. `okd.plan` counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psutil
import torch
from transformers.utils import logging

from okd.cluster import SHARDINGS

logger = logging.get_logger(__name__)
GIB = 2**30


class Part(NamedTuple):
    """Bytes of one thing on one device."""

    name: str
    forward: float  # at the end of the forward pass
    update: float  # at the optimizer's step
    is_certain: bool = True  # whatever the rows are; else for rows of full length, or an estimate


@dataclass
class Plan:
    """Memory, work and transfers of each process of a run, which has its own device.

    Attributes:
        parts, elsewhere: on the device, and where else the teacher is (`teacher_device`, `device_map`).
        flops: of one optimizer step; attention_flops: those of them that grow with the square of the length.
        traffic: bytes that a device receives in one optimizer step, and sends as many.
        parameters: how many, by model, and how many of them train.
        tokens: of one optimizer step, in rows of full length, all of which are taken to be response tokens.
        models: skeletons, with what trains in them: the student's, then the teachers'; None: cannot be built.
        layer: configuration of one of the student's layers; rows: (B, T); autocast: dtype of the products, or None.
    """

    device: torch.device
    devices: int
    autocast: torch.dtype | None
    rows: tuple[int, int]
    sharding: str = "ddp"  # of `okd.cluster.SHARDINGS`
    models: list[Any] = field(default_factory=list)
    layer: Any = None
    tokens: int = 0
    parts: list[Part] = field(default_factory=list)
    elsewhere: list[Part] = field(default_factory=list)
    flops: dict[str, float] = field(default_factory=dict)
    attention_flops: float = 0.0
    traffic: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def peak(self) -> float:
        """Bytes at the higher of the two peaks."""
        return max(sum(part.forward for part in self.parts), sum(part.update for part in self.parts))

    @property
    def certain(self) -> float:
        """The same of the parts that do not hang on the rows."""
        parts = [part for part in self.parts if part.is_certain]
        return max(sum(part.forward for part in parts), sum(part.update for part in parts))

    def table(self, memory: float | None = None, tflops: float | None = None, bandwidth: float | None = None) -> str:
        """As text. memory: bytes of a device; tflops: 1e12 FLOPs a second that it does; bandwidth: GB/s it receives."""
        count = {name: f"{n:,}" for name, n in self.parameters.items()}
        lines = [f"{name:<30}{n:>14} parameters" for name, n in count.items()]
        lines += ["", f"{f'GiB on each device ({self.device.type})':<34}{'forward':>10}{'update':>10}"]
        lines += [_row(part.name, part) for part in self.parts]
        total = Part("sum", sum(part.forward for part in self.parts), sum(part.update for part in self.parts))
        of = "" if memory is None else f"   of {memory / GIB:.2f}: {'fits' if self.peak <= memory else 'does not fit'}"
        lines.append(_row(total.name, total) + of)
        lines += [_row(part.name, part) + "   (not in the sum)" for part in self.elsewhere]
        if self.flops:
            lines += ["", f"{'TFLOP of a step on each device':<34}"]
            lines += [f"{name:<34}{x / 1e12:>10.3g}" for name, x in self.flops.items()]
            lines.append(f"{'sum':<34}{self.work / 1e12:>10.3g}   {self._speed(tflops)}")
            lines.append(f"{'of it attention (T^2)':<34}{self.attention_flops / 1e12:>10.3g}")
        if self.traffic:
            lines += ["", "GB to each device in a step"]
            lines += [f"{name:<34}{x / 1e9:>10.3g}" for name, x in self.traffic.items()]
            lines.append(f"{'sum':<34}{sum(self.traffic.values()) / 1e9:>10.3g}")
            if bandwidth is None:
                lines[-1] += "   pass --gpu or --bandwidth for its time"
            else:
                lines[-1] += f"   at {bandwidth:.3g} GB/s: {self.transfer_seconds(bandwidth):.3g} s a step"
            if tflops is not None and bandwidth is not None:
                lines += ["", f"{'a step of all devices':<34}{'s':>10}{'tokens/s':>10}"]
                for way, seconds in self.bounds(tflops, bandwidth).items():
                    lines.append(f"{way:<34}{seconds:>10.3g}{self.devices * self.tokens / seconds:>10,.0f}")
        return "\n".join([*lines, *(f"* {note}" for note in self.notes)])

    @property
    def work(self) -> float:
        """FLOPs of an optimizer step."""
        return sum(self.flops.values())

    def seconds(self, tflops: float) -> float:
        """Of an optimizer step whose products run at 1e12 `tflops` FLOPs a second, and nothing else takes time."""
        return self.work / (tflops * 1e12)

    def transfer_seconds(self, bandwidth: float) -> float:
        """Of an optimizer step's transfers at so many GB/s."""
        return sum(self.traffic.values()) / (bandwidth * 1e9)

    def bounds(self, tflops: float, bandwidth: float) -> dict[str, float]:
        """Least and most seconds of an optimizer step, by how much of the transfers runs beside products."""
        seconds = self.seconds(tflops), self.transfer_seconds(bandwidth)
        return {"transfers beside products": max(seconds), "one after the other": sum(seconds)}

    def _speed(self, tflops: float | None) -> str:
        if tflops is None:
            return "pass --tflops for its time"
        seconds = self.seconds(tflops)
        return f"at {tflops:.3g} TFLOP/s: {seconds:.3g} s a step, {self.devices * self.tokens / seconds:,.0f} tokens/s"

    def advice(self, available: float) -> str:
        """What may make it fit in so many bytes."""
        if self.certain <= available:
            return "lower --per-device-train-batch-size or --max-length, or pass --gradient-checkpointing"
        lora, smaller = "train a LoRA (--student-lora-rank)", "or choose smaller models"
        if SHARDINGS[self.sharding].weights:
            return f"divide the models among more devices, {lora}, {smaller}"
        divide = "divide the models (FSDP2 or ZeRO-3, by accelerate launch), " if self.devices > 1 else ""
        move = "quantise or move the teacher (--teacher-quantization, --teacher-device)"
        return f"{divide}{lora}, {move}, {smaller}"


def _row(name: str, part: Part) -> str:
    left = max(1, 43 - len(name))  # of two columns, for the number of a long name
    return f"{name} {part.forward / GIB:>{left}.2f}{part.update / GIB:>10.2f}"


def available_memory(device: torch.device) -> float:
    """Bytes of a GPU, or of the machine's memory."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def check_fits(plan: Plan, available: float) -> None:
    """Raise ValueError where even what is certain exceeds so many bytes; warn where the estimate does."""
    if plan.certain > available:
        raise ValueError(
            f"expected at least {plan.certain / GIB:.1f} GiB on each device, without activations; got "
            f"{available / GIB:.1f}: {plan.advice(available)}\n{plan.table(available)}"
        )
    if plan.peak > available:
        logger.warning(
            f"expected about {plan.peak / GIB:.1f} GiB on each device; got {available / GIB:.1f}: where rows are as "
            f"long as max_length this will not fit: {plan.advice(available)}"
        )
