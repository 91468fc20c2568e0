"""Who writes the responses of a training batch: one policy for each answer, named in `POLICIES`.

A policy gets the rows of a batch as the dataset has them and returns the rows to train on. Sampling is seeded by the
run's seed, the step and the process, so that a resumed run draws what an uninterrupted one would.

A row is `{"id": str, "input_ids": list[int], "labels": list[int]}`, and `"student_written": True` where it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from okd.data import IGNORE, Collator

if TYPE_CHECKING:
    from okd.config import OKDConfig

Row = dict[str, Any]
SEED_STRIDE = 1_000_003  # between the seeds of two steps


class Sampler:
    """Rewrites batches by the method's policy, and keeps what the policy must remember.

    Attributes:
        state: what the policy remembers, JSON: it is saved with each checkpoint.
    """

    def __init__(self, args: OKDConfig, pair: Any, tokenizer: Any):
        self.args, self.pair, self.tokenizer = args, pair, tokenizer
        self.policy = POLICIES[args.preset.sequences]
        self.collate = Collator(tokenizer.pad_token_id)
        self.state: dict[str, Any] = {}
        self._sums: dict[str, float] = {}
        self._since = time.perf_counter()

    def __call__(self, batches: Sequence[Mapping[str, Any]], step: int) -> list[dict[str, Any]]:
        """The batches of one optimizer step, written by whom the policy chooses; on the device of the old ones."""
        result = []
        for i, batch in enumerate(batches):
            device = batch["input_ids"].device
            started = time.perf_counter()
            devices = [device] if device.type == "cuda" else []
            seed = (self.args.seed + (step * len(batches) + i) * SEED_STRIDE) * 64 + self.args.process_index
            with torch.random.fork_rng(devices), torch.no_grad():
                torch.manual_seed(seed)
                rows = self.policy(self, rows_of(batch))
            self.note(generating_seconds=time.perf_counter() - started)
            collated = self.collate(rows)
            result.append({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in collated.items()})
        return result

    def note(self, **values: float) -> None:
        """Add to the sums behind the next log entry."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def logs(self) -> dict[str, float]:
        """What happened since the last call: `generating_share` of the time, and what the policy notes."""
        now, sums = time.perf_counter(), self._sums
        seconds = sums.pop("generating_seconds", 0.0)
        logs = {"generating_share": seconds / (now - self._since)}
        self._sums, self._since = {}, now
        return logs | sums

    def on_evaluate(self, loss: float) -> None:
        """The held-out loss, for policies that adapt to it."""

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.state))

    def load(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected the sampler's state of this run; got no such file")
        self.state = json.loads(path.read_text())


def rows_of(batch: Mapping[str, Any]) -> list[Row]:
    """The rows that `okd.data.Collator` made a batch of."""
    lengths = batch["attention_mask"].sum(1).tolist()
    columns = zip(batch["ids"], batch["input_ids"].tolist(), batch["labels"].tolist(), lengths, strict=True)
    return [{"id": name, "input_ids": ids[:n], "labels": labels[:n]} for name, ids, labels, n in columns]


def prompt_of(row: Row) -> list[int]:
    """The tokens before the first response."""
    start = next((i for i, label in enumerate(row["labels"]) if label != IGNORE), len(row["labels"]))
    return row["input_ids"][:start]


def dataset(sampler: Sampler, rows: list[Row]) -> list[Row]:
    """The responses of the dataset."""
    return rows


POLICIES: Mapping[str, Callable[[Sampler, list[Row]], list[Row]]] = {"dataset": dataset}
