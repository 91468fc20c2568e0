"""What the log says of a run: sums over tokens, micro-batches and ranks, their means, and where they are written."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor
from transformers.utils import logging

from okd.clock import EVALUATING, timed
from okd.data import Batch
from okd.durable import writing
from okd.models import evaluating
from okd.online import distance_from_base
from okd.report import LOG
from okd.sharding import ranks

logger = logging.get_logger(__name__)
FAR = 1.0  # nats from its base; teachers of students that learned well had moved 0.01 to 0.15 (benchmarks/RESULTS.md)
UNLOGGED = {"reverse_kl", "student_entropy", "teacher_entropy", "student_nll", "teacher_nll"}  # of a loss's metrics


def summed(x: Tensor) -> Tensor:
    """The sum over all ranks, the same on each."""
    if ranks() == 1:
        return x
    x = x.clone()
    dist.all_reduce(x)
    return x


def mean_over_ranks(values: Sequence[Tensor]) -> float:
    """The mean of numbers of which each rank has some, or none."""
    device = values[0].device if values else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    total, count = summed(torch.tensor([sum(v.item() for v in values), len(values)], device=device)).tolist()
    return total / max(count, 1)


class Meters:
    """Sums behind the next log entry. They stay on the device until it comes, and are then those of all ranks."""

    def __init__(self) -> None:
        self.since = time.perf_counter()  # when the interval began; later by what an evaluation took
        self._sums: dict[str, Any] = {}
        self._weights: dict[str, float] = {}

    def add(self, weight: float, **values: Any) -> None:
        """Means of so many tokens (or rows, or steps) each."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * weight
            self._weights[name] = self._weights.get(name, 0.0) + weight

    def add_loss(self, loss: Any, batch: Mapping[str, Any], normalizer: Any) -> None:
        """A micro-batch: its part of the step's losses, and the sums of its per-token metrics."""
        n = len(batch["targets"])
        of_step = {"student_loss": loss.student, "teacher_loss": loss.teacher}
        for name, value in of_step.items():
            if value is not None:
                self.add(n, **{name: value.detach() * normalizer / max(n, 1)})
        for name, value in loss.metrics.items():
            if name not in UNLOGGED:
                self.add(len(value), **{name: value.sum() / max(len(value), 1)})
        self.add(1, tokens=batch["attention_mask"].sum())

    def flush(self) -> dict[str, float]:
        """Means over all ranks since the last call, and `tokens_per_second` of all of them together."""
        own = {name: (float(value), self._weights[name]) for name, value in self._sums.items()}
        of_ranks = gather_object([own]) if ranks() > 1 else [own]
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        self._sums, self._weights = {}, {}
        sums: dict[str, list[float]] = {}
        for of_rank in of_ranks:
            for name, (value, weight) in of_rank.items():
                total = sums.setdefault(name, [0.0, 0.0])
                total[0] += value
                total[1] += weight
        tokens = sums.pop("tokens", [0.0, 0.0])[0]
        means = {name: value / weight for name, (value, weight) in sums.items() if weight}
        return {**means, "tokens_per_second": tokens / seconds}


def _step_of(line: str) -> float:
    try:
        return json.loads(line).get("step", 0)
    except ValueError:  # cut short where a run was killed
        return math.inf


class LogFile:
    """`log.jsonl`: every entry on a line of its own, from the first step."""

    def __init__(self, directory: Path):
        self.path = directory / LOG

    def start(self, step: int) -> None:
        """Go on after `step`: what an interrupted run wrote beyond its checkpoint is dropped."""
        if not self.path.is_file():
            return
        entries = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text("".join(f"{line}\n" for line in entries if step))
        os.replace(part, self.path)

    def write(self, entry: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        with writing(self.path, self.path.parent), self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")  # JSON has no inf


@contextmanager
def not_counted(*clocks: Any) -> Iterator[None]:
    """What happens inside takes no part in the rates of these meters (`since`)."""
    started = time.perf_counter()
    try:
        yield
    finally:
        for clock in clocks:
            clock.since += time.perf_counter() - started


class Logging:
    """A trainer's log entries."""

    accelerator: Any
    args: Any
    optimizer: Any
    pair: Any
    sampler: Any
    state: Any
    meters: Meters
    log_file: LogFile
    _last_batch: Batch | None
    _norms: dict[str, Tensor]
    _is_far = False  # as the log has said

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Per-token losses and statistics of all ranks since the last entry, the distance from the teacher as it was,
        and the throughput; into `log.jsonl` too."""
        if "loss" in logs and self._last_batch is not None:
            logs |= self.meters.flush()
            logs |= self._distances(logs)
            if logs.get("teacher_shift", 0.0) > FAR and not self._is_far:
                self._is_far = True
                logger.warning(
                    f"expected an online teacher near its base; at step {self.state.global_step} it is "
                    f"{logs['teacher_shift']:.2f} nats a token away: it may be following the student down. Lower "
                    "teacher_kl_weight or online_learning_rate"
                )
            if not self.sampler.is_idle:
                logs |= self.sampler.logs()
            if self.args.online and self.optimizer is not None:
                rate, own = self.args.learning_rate, self.optimizer.param_groups[-1]["initial_lr"]
                logs["online_learning_rate"] = logs["learning_rate"] * (own / rate) if rate else own
                if "teacher" in self._norms:
                    logs["teacher_grad_norm"] = self._norms.pop("teacher").item()
        super().log(logs, start_time)  # type: ignore[misc]
        if self.args.process_index == 0:
            self.log_file.write(self.state.log_history[-1])

    def _distances(self, logs: Mapping[str, float]) -> dict[str, float]:
        """The student's KL from the teacher as it was, and how far that has moved, on the last micro-batch of each
        rank. Where the teacher is frozen, and its distribution at T = 1, the training has measured the first."""
        teacher = self.pair.teacher
        if teacher is None or not teacher.judges or self.pair.method.takes_several:
            return {}
        if not teacher.learns and self.args.temperature == 1 and "forward_kl" in logs:
            return {"base_forward_kl": logs["forward_kl"]}
        if "teacher_top_k" in (self._last_batch or ()):  # at another temperature alone
            return {}
        meters = Meters()
        with timed(EVALUATING), evaluating(self.pair), self.accelerator.autocast():
            metrics = self.pair(self._last_batch, loss=distance_from_base).metrics
        names = {"base_forward_kl": "forward_kl", "teacher_shift": "teacher_shift"}
        for name, metric in names.items():
            if metric in metrics:
                meters.add(len(metrics[metric]), **{name: metrics[metric].mean()})
        found = meters.flush()
        return {name: found[name] for name in names if name in found}
