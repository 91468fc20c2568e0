"""report.json: what a run says of itself beside its figures: machine, time, memory, a few answers, warnings.

Written as the training begins and as the run ends, however it does, so that `okd report` needs no models.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch

from okd.answers import generate_answers
from okd.clock import EVALUATING, Clock, timed
from okd.data import Row
from okd.durable import write_whole
from okd.models import has_weights
from okd.report import REPORT
from okd.samples import shown_rows, token_divergences
from okd.sharding import ranks
from okd.teachers import Stored, as_it_was

MOST_WARNINGS = 100


class Record:
    """Of a run that goes on inside `with record:`.

    Attributes:
        about: what is known as it begins; planned: bytes that `okd plan` expects of the device.
        samples: a few held-out prompts: `{"id", "prompt", "reference", "teacher"}`, and of `before` and `after`
            `{"answer", "tokens": [(text, nats), ...]}`.
    """

    def __init__(self, args: Any):
        self.directory, self.device, self.writes = Path(str(args.output_dir)), args.device, args.process_index == 0
        self.clock, self.warnings = Clock(args.device), Warnings()
        self.about: dict[str, Any] = {"machine": machine(args.device)}
        self.planned: float | None = None
        self.samples: list[dict[str, Any]] = []
        self.rows: Sequence[Row] = ()
        self.speed: dict[str, float] = {}  # by side, tokens a second in answering the prompts, all at once
        self.is_begun = False

    def __enter__(self) -> Record:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._stop = listening(self.warnings)
        self._stop.__enter__()
        self.clock.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.clock.__exit__(*error)
        self._stop.__exit__(*error)
        if self.is_begun:
            self.write()

    def choose(self, trainer: Any, judge: Any, config: Any) -> None:
        """The prompts; and, where the teacher as it was is whole in memory, its answers and both models' speed."""
        args, self.rows = trainer.args, shown_rows(islice(trainer.eval_dataset, config.eval_answers))
        self.samples = [{"id": row["id"]} for row in self.rows]
        if not self.rows or judge is None or trainer.is_sharded or "aligned" in self.rows[0]:
            return
        inside = judge.computing(args.device) if isinstance(judge, Stored) else as_it_was(judge)
        with timed(EVALUATING), trainer.accelerator.autocast(), inside as model:
            if model is None or not has_weights(model):
                return
            answers = self._asked(model, trainer, config.eval_max_new_tokens)
            for side, one in (("teacher", model), ("student", trainer.pair.student)):  # one after the other
                self._time(side, one, trainer, config.eval_max_new_tokens)
        self._add({answer["id"]: {"teacher": answer["answer"]} for answer in answers})

    def answered(self, when: str, trainer: Any, judge: Any, answers: Sequence[Mapping[str, Any]]) -> None:
        """The student's answers `before` or `after`, and how far it is from the teacher at each token of them."""
        tokens: dict[str, Any] = {}
        if judge is not None and getattr(judge, "cache", None) is None and not trainer.is_sharded:
            with timed(EVALUATING), trainer.accelerator.autocast():
                tokens = token_divergences(
                    *(trainer.pair.student, judge, trainer.tokenizer, self.rows, answers),
                    vocab_size=trainer.args.vocab_size,
                    batch_size=trainer.args.per_device_eval_batch_size,
                )
        shared = ("prompt", "reference")
        self._add(
            {
                answer["id"]: {name: answer[name] for name in shared}
                | {when: {"answer": answer["answer"], "tokens": tokens.get(answer["id"])}}
                for answer in answers
            }
        )

    def resume(self, trainer: Any, config: Any) -> None:
        """Go on with what the run said of itself before."""
        self.rows = shown_rows(islice(trainer.eval_dataset, config.eval_answers))
        path = self.directory / REPORT
        before = json.loads(path.read_text()) if path.is_file() else {}
        self.samples, self.speed = before.get("samples", []), before.get("tokens_per_second", {})

    def write(self) -> None:
        if not self.writes:
            return
        self.is_begun = True
        contents = {
            **self.about,
            "tokens_per_second": self.speed,
            "seconds": {part: round(seconds, 2) for part, seconds in self.clock.seconds().items()},
            "memory": {"measured": peak_memory(self.device), "planned": self.planned},
            "samples": self.samples,
            "warnings": list(self.warnings.counts.items()),
        }
        write_whole(self.directory / REPORT, json.dumps(contents))

    def _asked(self, model: Any, trainer: Any, tokens: int, **options: Any) -> list[dict[str, Any]]:
        """The model's answers to the prompts, all at once, of at most so many tokens."""
        options |= {"max_new_tokens": tokens, "batch_size": len(self.rows), "progress": False}
        return generate_answers(model, trainer.tokenizer, self.rows, **options)

    def _time(self, side: str, model: Any, trainer: Any, tokens: int) -> None:
        """Of answers that end nowhere: else a model whose answers are of one length would seem the faster one."""
        self._asked(model, trainer, 1)  # a first call is slower
        started = time.perf_counter()
        answers = self._asked(model, trainer, tokens, min_new_tokens=tokens)
        written = sum(len(answer["response"]) for answer in answers)
        self.speed[side] = round(written / (time.perf_counter() - started), 2)

    def _add(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        for sample in self.samples:
            sample |= found.get(sample["id"], {})


class Warnings(logging.Handler):
    """Messages, and how often each came."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.counts: dict[str, int] = {}

    def emit(self, record: logging.LogRecord) -> None:
        self.keep(record.getMessage())
        if not record.name.startswith("transformers") and not logging.root.handlers and logging.lastResort is not None:
            logging.lastResort.handle(record)  # as without this handler

    def keep(self, text: str) -> None:
        if text in self.counts or len(self.counts) < MOST_WARNINGS:
            self.counts[text] = self.counts.get(text, 0) + 1


@contextmanager
def listening(kept: Warnings) -> Iterator[None]:
    """Keeps what this library, transformers and Python warn of; it is shown as ever."""
    shown, loggers = warnings.showwarning, [logging.getLogger(name) for name in ("okd", "transformers")]

    def show(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        kept.keep(f"{category.__name__}: {message}")
        shown(message, category, *where, **options)

    for logger in loggers:
        logger.addHandler(kept)
    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
        for logger in loggers:
            logger.removeHandler(kept)


def machine(device: torch.device) -> dict[str, Any]:
    """Device, cores that this process may use, and bytes of memory."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"device": _processor() if gpu is None else gpu.name, "cores": cores, "processes": ranks()}
    if gpu is not None:
        found["GPU memory"] = gpu.total_memory
    return {**found, "memory": psutil.virtual_memory().total}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of the GPU's tensors, or of this process as a whole."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
