"""Rows and batches: what examples become before a model reads them.

Shapes: B rows in a batch, T tokens in the longest, N positions whose next token is a response token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from okd.chat import IGNORE

DATASET, STUDENT, TEACHER, BOTH, TEXT = "dataset", "student", "teacher", "both", "text"  # who wrote a row's response
OWN = (STUDENT, BOTH)  # the student's words, in part at least: no references, and so no labels of a cross-entropy


class Row(TypedDict):
    """An example ready to train on; labels are not shifted."""

    id: str
    input_ids: list[int]
    labels: list[int]  # input_ids on response tokens, IGNORE elsewhere
    writer: NotRequired[str]  # DATASET where it is not given; TEXT is plain text of a second data set
    teacher: NotRequired[str]  # name of the teacher, out of several
    teacher_prompt: NotRequired[list[int]]  # what the teacher reads in place of all before the response


class Batch(TypedDict):
    """Rows padded on the right to T tokens, of which N come before a response token. Lists stay on the host."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    labels: Tensor  # (B, T); IGNORE in padding
    positions: Tensor  # (N,) flat indices b * T + t, in order, where labels[b, t + 1] is a response token
    targets: Tensor  # (N,) those labels
    counts: list[int]  # response tokens of each row: their sum is N
    writers: list[str]
    teachers: list[str | None]
    ids: list[str]
    teacher_input_ids: NotRequired[Tensor]  # the same three as the teacher reads them, where a row says how
    teacher_attention_mask: NotRequired[Tensor]
    teacher_positions: NotRequired[Tensor]  # (N,)


def on_device(batch: Any, device: Any) -> Batch:
    """The batch with its tensors there."""
    moved: Any = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
    return moved


def tokens_of(batch: Batch, rows: Iterable[int]) -> Tensor:
    """(n,) indices into the N response tokens of those that belong to these rows. No device synchronisation."""
    starts = [0, *accumulate(batch["counts"])]
    indices = [i for row in rows for i in range(starts[row], starts[row + 1])]
    return torch.tensor(indices, dtype=torch.long).to(batch["positions"].device, non_blocking=True)


def rows_written(batch: Batch, *writers: str) -> list[int]:
    """Indices of the rows whose response one of these wrote."""
    return [i for i, writer in enumerate(batch["writers"]) if writer in writers]


def rows_of(batch: Batch) -> list[Row]:
    """The rows that `Collator` made a batch of."""
    lengths = batch["attention_mask"].sum(1).tolist()
    columns = zip(batch["ids"], batch["input_ids"].tolist(), batch["labels"].tolist(), lengths, strict=True)
    rows: list[Row] = [{"id": name, "input_ids": ids[:n], "labels": labels[:n]} for name, ids, labels, n in columns]
    for i, row in enumerate(rows):
        if batch["writers"][i] != DATASET:
            row["writer"] = batch["writers"][i]
        if (teacher := batch["teachers"][i]) is not None:
            row["teacher"] = teacher
    if "teacher_input_ids" in batch:
        masks = batch["teacher_attention_mask"].sum(1).tolist()
        for row, ids, n in zip(rows, batch["teacher_input_ids"].tolist(), masks, strict=True):
            row["teacher_prompt"] = ids[: n - (len(row["input_ids"]) - start_of_response(row))]
    return rows


def batch_rows(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch, as a batch of their own."""
    at = torch.tensor(rows)
    part: Any = {n: x[at.to(x.device)] for n, x in batch.items() if isinstance(x, Tensor) and x.dim() == 2}
    part |= {name: [x[i] for i in rows] for name, x in batch.items() if isinstance(x, list)}
    tokens, row = tokens_of(batch, rows), []
    for i, n in enumerate(part["counts"]):
        row += [i] * n
    for prefix in ("", "teacher_"):
        if f"{prefix}positions" in batch:
            values: Any = batch
            length = values[f"{prefix}input_ids"].shape[1]
            places = values[f"{prefix}positions"][tokens] % length
            part[f"{prefix}positions"] = places + torch.tensor(row, device=places.device) * length
    part["targets"] = batch["targets"][tokens]
    return part


def start_of_response(row: Row) -> int:
    """Tokens before the first response token; all of them without one."""
    return next((i for i, label in enumerate(row["labels"]) if label != IGNORE), len(row["labels"]))


@dataclass(frozen=True)
class Collator:
    """Rows -> one right-padded `Batch`, all that needs the values of its tensors found on the CPU.

    `hidden.flatten(0, 1)[positions]` needs no device synchronisation; indexing by a boolean mask does, to learn N.
    Padding follows from lengths, never from ids: the pad token is often eos, which is a response token too.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int):
            raise ValueError(f"expected an int as pad_token_id, got {self.pad_token_id!r}; eos_token_id will do")

    def __call__(self, rows: Sequence[Row]) -> Batch:
        input_ids, attention_mask = self._padded([row["input_ids"] for row in rows])
        labels = torch.full_like(input_ids, IGNORE)
        for i, row in enumerate(rows):
            labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
        b, t = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        batch: Batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "positions": b * input_ids.shape[1] + t,
            "targets": labels[b, t + 1],
            "counts": b.bincount(minlength=len(rows)).tolist(),
            "writers": [row.get("writer", DATASET) for row in rows],
            "teachers": [row.get("teacher") for row in rows],
            "ids": [row["id"] for row in rows],
        }
        if any("teacher_prompt" in row for row in rows):
            starts = [start_of_response(row) for row in rows]
            prompts = [
                row.get("teacher_prompt", row["input_ids"][:start]) for row, start in zip(rows, starts, strict=True)
            ]
            sequences = [p + row["input_ids"][n:] for p, row, n in zip(prompts, rows, starts, strict=True)]
            ids, mask = self._padded(sequences)
            moved = torch.tensor([len(p) - n for p, n in zip(prompts, starts, strict=True)])
            batch |= {
                "teacher_input_ids": ids,
                "teacher_attention_mask": mask,
                "teacher_positions": b * ids.shape[1] + t + moved[b],
            }
        return batch

    def _padded(self, sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        multiple = self.pad_to_multiple_of or 1
        length = -(-max(map(len, sequences)) // multiple) * multiple
        ids = torch.full((len(sequences), length), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = torch.tensor(sequence)
            mask[i, : len(sequence)] = 1
        return ids, mask


def seed_of(*parts: object) -> int:
    """A seed that hangs on these alone: the run's seed, the step, an example's id. The same on any rank."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def uniform(*parts: object) -> float:
    """A number in [0, 1) that hangs on these alone."""
    return seed_of(*parts) / 2**63
