"""Rows and batches: what examples become before a model reads them.

Shapes: B rows in a batch, on as many lines of T tokens, or packed on fewer; N positions whose next token is a response
token.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from okd.chat import IGNORE

DATASET, STUDENT, TEACHER, BOTH, TEXT = "dataset", "student", "teacher", "both", "text"  # who wrote a row's response
ALIGNED = ("teacher_input_ids", "teacher_labels", "aligned", "teacher_aligned")  # of a row
WINDOW = 1000  # rows of a stream that are packed together
OWN = (STUDENT, BOTH)  # the student's words, in part at least: no references, and so no labels of a cross-entropy


class Row(TypedDict):
    """An example ready to train on; labels are not shifted."""

    id: str
    input_ids: list[int]
    labels: list[int]  # input_ids on response tokens, IGNORE elsewhere
    writer: NotRequired[str]  # DATASET where it is not given; TEXT is plain text of a second data set
    teacher: NotRequired[str]  # name of the teacher, out of several
    teacher_prompt: NotRequired[list[int]]  # what the teacher reads in place of all before the response
    teacher_input_ids: NotRequired[list[int]]  # the row in the tokens of a teacher that has others: `okd.alignment`
    teacher_labels: NotRequired[list[int]]
    aligned: NotRequired[list[int]]  # response tokens before which the teacher has read the same text,
    teacher_aligned: NotRequired[list[int]]  # and those of the teacher's that it has yet to read there


class Rows(Sequence[Row]):
    """Rows on disk: a `datasets.Dataset` of records, see `okd.encoding.FEATURES`."""

    FIELDS = ("id", "input_ids", "labels", "teacher", "teacher_prompt", *ALIGNED)

    def __init__(self, records: Any):
        self.records, self.table = records, records.select_columns(list(self.FIELDS))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: Any) -> Any:
        return [self[j] for j in range(*i.indices(len(self)))] if isinstance(i, slice) else self.row(self.table[i])

    @classmethod
    def row(cls, record: Any) -> Row:
        found: Any = {name: record[name] for name in cls.FIELDS if record[name] is not None}
        return found


def column(rows: Sequence[Any], name: str) -> list[Any]:
    """A field of each row, None where it has none; of `Rows`, without reading the others."""
    return rows.records[name][:] if isinstance(rows, Rows) else [row.get(name) for row in rows]


def lengths_of(rows: Sequence[Row]) -> list[int]:
    """Tokens of each row."""
    return column(rows, "length") if isinstance(rows, Rows) else [len(row["input_ids"]) for row in rows]


Span = tuple[int, int, int]  # where a row lies: its line, first token there, and length


class Batch(TypedDict):
    """B rows on lines of T tokens, padded on the right, of which N come before a response token.

    Each row has a line of its own; or lines are packed, `position_ids` count each row's tokens from 0, and attention
    stays within rows by them. Lists stay on the host.
    """

    input_ids: Tensor  # (lines, T)
    attention_mask: Tensor  # (lines, T): 0 in padding
    labels: Tensor  # (lines, T); IGNORE in padding
    position_ids: NotRequired[Tensor]  # (lines, T), of packed lines
    positions: Tensor  # (N,) flat indices line * T + t, in order, where labels[line, t + 1] is a response token
    targets: Tensor  # (N,) those labels
    counts: list[int]  # response tokens of each row: their sum is N
    spans: list[Span]
    writers: list[str]
    teachers: list[str | None]
    ids: list[str]
    teacher_input_ids: NotRequired[Tensor]  # the same as the teacher reads them, a row a line, where a row says how
    teacher_attention_mask: NotRequired[Tensor]
    teacher_positions: NotRequired[Tensor]  # (N,)
    teacher_spans: NotRequired[list[Span]]
    # of a teacher with a tokenizer of its own, whose N' response tokens are others; `teacher_positions` are N', too
    teacher_labels: NotRequired[Tensor]
    teacher_targets: NotRequired[Tensor]  # (N',)
    teacher_counts: NotRequired[list[int]]
    aligned: NotRequired[Tensor]  # (2, M) indices into the N and into the N', of one text each
    # of a teacher whose hidden states lie in a cache (`okd.cache`)
    teacher_states: NotRequired[Tensor]  # those that enter a layer (lines, T, D), or the last (N, D)
    teacher_layer: NotRequired[int]  # that layer
    teacher_top_k: NotRequired[Tensor]  # (N, k) ids of its likeliest tokens,
    teacher_log_probs: NotRequired[Tensor]  # (N, k), and theirs


def on_device(batch: Any, device: Any) -> Batch:
    """The batch with its tensors there."""
    moved: Any = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
    return moved


def tokens_of(batch: Batch, rows: Iterable[int]) -> Tensor:
    """(n,) indices into the N response tokens of those that belong to these rows. No device synchronisation."""
    starts = [0, *accumulate(batch["counts"])]
    indices = [i for row in rows for i in range(starts[row], starts[row + 1])]
    return torch.tensor(indices, dtype=torch.long).to(batch["positions"].device, non_blocking=True)


def row_of_token(batch: Batch) -> Tensor:
    """(N,) index of the row that each response token belongs to. No device synchronisation."""
    rows = torch.arange(len(batch["counts"])).repeat_interleave(torch.tensor(batch["counts"], dtype=torch.long))
    return rows.to(batch["positions"].device, non_blocking=True)


def rows_written(batch: Batch, *writers: str) -> list[int]:
    """Indices of the rows whose response one of these wrote."""
    return [i for i, writer in enumerate(batch["writers"]) if writer in writers]


def rows_of(batch: Batch) -> list[Row]:
    """The rows that `Collator` made a batch of."""
    lines = batch["input_ids"].tolist(), batch["labels"].tolist()
    rows: list[Row] = []
    for name, (line, first, n) in zip(batch["ids"], batch["spans"], strict=True):
        ids, labels = (of[line][first : first + n] for of in lines)
        rows.append({"id": name, "input_ids": ids, "labels": labels})
    for i, row in enumerate(rows):
        if batch["writers"][i] != DATASET:
            row["writer"] = batch["writers"][i]
        if (teacher := batch["teachers"][i]) is not None:
            row["teacher"] = teacher
    if "aligned" in batch:
        _rows_of_teacher(batch, rows)
    elif "teacher_input_ids" in batch:
        told = zip(rows, batch["teacher_input_ids"].tolist(), batch["teacher_spans"], strict=True)
        for row, ids, (_, _, n) in told:
            row["teacher_prompt"] = ids[: n - (len(row["input_ids"]) - start_of_response(row))]
    return rows


def _rows_of_teacher(batch: Batch, rows: list[Row]) -> None:
    ids, labels = batch["teacher_input_ids"].tolist(), batch["teacher_labels"].tolist()
    firsts = [0, *accumulate(batch["counts"])]
    pairs = list(zip(*batch["aligned"].tolist(), strict=True))
    at, of_teacher = batch["positions"].tolist(), batch["teacher_positions"].tolist()
    widths = batch["input_ids"].shape[1], len(ids[0])
    for i, (row, (_, _, n)) in enumerate(zip(rows, batch["teacher_spans"], strict=True)):
        own = [pair for pair in pairs if firsts[i] <= pair[0] < firsts[i + 1]]
        row["teacher_input_ids"], row["teacher_labels"] = ids[i][:n], labels[i][:n]
        row["aligned"] = [at[a] % widths[0] + 1 for a, _ in own]
        row["teacher_aligned"] = [of_teacher[b] % widths[1] + 1 for _, b in own]


def batch_rows(batch: Batch, rows: list[int]) -> Batch:
    """Some rows of a batch, as a batch of their own, a row a line."""
    part: Any = {name: [x[i] for i in rows] for name, x in batch.items() if isinstance(x, list)}
    tokens, device = tokens_of(batch, rows), batch["positions"].device
    row = torch.arange(len(rows)).repeat_interleave(torch.tensor(part["counts"], dtype=torch.long)).to(device)
    for prefix in ("", "teacher_"):
        if f"{prefix}input_ids" not in batch:
            continue
        values: Any = batch
        spans = part[f"{prefix}spans"]
        old, width = values[f"{prefix}input_ids"].shape[1], max(n for _, _, n in spans)
        starts = torch.tensor([line * old + first for line, first, _ in spans])
        inside = torch.arange(width) < torch.tensor([n for _, _, n in spans]).unsqueeze(1)
        at = torch.where(inside, starts.unsqueeze(1) + torch.arange(width), 0).to(device)
        inside = inside.to(device)
        for name, padding in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE)):
            if f"{prefix}{name}" in batch:
                part[f"{prefix}{name}"] = torch.where(inside, values[f"{prefix}{name}"].flatten()[at], padding)
        moved = torch.arange(len(rows)) * width - starts
        part[f"{prefix}positions"] = values[f"{prefix}positions"][tokens] + moved.to(device)[row]
        part[f"{prefix}spans"] = [(i, 0, n) for i, (_, _, n) in enumerate(spans)]
    part["targets"] = batch["targets"][tokens]
    return part


def start_of_response(row: Row) -> int:
    """Tokens before the first response token; all of them without one."""
    return next((i for i, label in enumerate(row["labels"]) if label != IGNORE), len(row["labels"]))


@dataclass(frozen=True)
class Collator:
    """Rows, or lines of rows that share one, -> a `Batch`, all that needs the values of its tensors found on the CPU.

    `hidden.flatten(0, 1)[positions]` needs no device synchronisation; indexing by a boolean mask does, to learn N.
    Padding follows from lengths, never from ids: the pad token is often eos, which is a response token too.
    """

    pad_token_id: int

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token_id, int):
            raise ValueError(f"expected an int as pad_token_id, got {self.pad_token_id!r}; eos_token_id will do")

    def __call__(self, given: Sequence[Row] | Sequence[list[Row]]) -> Batch:
        lines: list[list[Row]] = [line if isinstance(line, list) else [line] for line in given]
        rows, spans, owners = list[Row](), list[Span](), list[Tensor]()
        for i, line in enumerate(lines):
            first = 0
            for row in line:
                n = len(row["input_ids"])
                owners.append(torch.full((n,), len(rows)))
                spans.append((i, first, n))
                rows.append(row)
                first += n
        input_ids, attention_mask = self._padded([list(chain(*(row["input_ids"] for row in line))) for line in lines])
        labels, owner, position_ids = torch.full_like(input_ids, IGNORE), *torch.zeros(2, *input_ids.shape).long()
        for row, (i, first, n), own in zip(rows, spans, owners, strict=True):
            labels[i, first + 1 : first + n] = torch.tensor(row["labels"][1:])  # nothing predicts a first token
            owner[i, first : first + n] = own
            position_ids[i, first : first + n] = torch.arange(n)
        at, t = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        of = owner[at, t]
        batch: Batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "positions": at * input_ids.shape[1] + t,
            "targets": labels[at, t + 1],
            "counts": of.bincount(minlength=len(rows)).tolist(),
            "spans": spans,
            "writers": [row.get("writer", DATASET) for row in rows],
            "teachers": [row.get("teacher") for row in rows],
            "ids": [row["id"] for row in rows],
        }
        if any(isinstance(line, list) for line in given):
            batch["position_ids"] = position_ids
        if any("aligned" in row for row in rows):
            batch |= self._of_teacher(rows, batch)
        elif any("teacher_prompt" in row for row in rows):
            starts = [start_of_response(row) for row in rows]
            prompts = [
                row.get("teacher_prompt", row["input_ids"][:start]) for row, start in zip(rows, starts, strict=True)
            ]
            sequences = [p + row["input_ids"][n:] for p, row, n in zip(prompts, rows, starts, strict=True)]
            ids, mask = self._padded(sequences)
            firsts = torch.tensor([first for _, first, _ in spans])
            moved = torch.tensor([len(p) - n for p, n in zip(prompts, starts, strict=True)])
            batch |= {
                "teacher_input_ids": ids,
                "teacher_attention_mask": mask,
                "teacher_positions": of * ids.shape[1] + t + (moved - firsts)[of],
                "teacher_spans": [(i, 0, len(sequence)) for i, sequence in enumerate(sequences)],
            }
        return batch

    def _of_teacher(self, rows: Sequence[Row], batch: Batch) -> Any:
        """The rows as a teacher with a tokenizer of its own reads them, each on a line, as the student's are."""
        ids, mask = self._padded([row["teacher_input_ids"] for row in rows])
        labels = torch.full_like(ids, IGNORE)
        for i, row in enumerate(rows):
            labels[i, 1 : len(row["teacher_labels"])] = torch.tensor(row["teacher_labels"][1:])
        at, t = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
        index = {pair: n for n, pair in enumerate(zip(at.tolist(), t.tolist(), strict=True))}
        width = batch["input_ids"].shape[1]
        own = {position: n for n, position in enumerate(batch["positions"].tolist())}
        pairs = [
            (own[i * width + a - 1], index[i, b - 1])
            for i, row in enumerate(rows)
            for a, b in zip(row["aligned"], row["teacher_aligned"], strict=True)
        ]
        return {
            "teacher_input_ids": ids,
            "teacher_attention_mask": mask,
            "teacher_positions": at * ids.shape[1] + t,
            "teacher_spans": [(i, 0, len(row["teacher_input_ids"])) for i, row in enumerate(rows)],
            "teacher_labels": labels,
            "teacher_targets": labels[at, t + 1],
            "teacher_counts": at.bincount(minlength=len(rows)).tolist(),
            "aligned": torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).t().contiguous(),
        }

    def _padded(self, sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        ids = torch.full((len(sequences), max(map(len, sequences))), self.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = torch.tensor(sequence)
            mask[i, : len(sequence)] = 1
        return ids, mask


def packed(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Lines of indices whose lengths come to max_length at most: the longest first, each where least room is left."""
    lines: list[list[int]] = []
    rooms: list[int] = []  # sorted, each once
    open_lines: dict[int, list[int]] = {}  # by room
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(rooms, lengths[i])
        if at < len(rooms):
            room = rooms[at]
            line = open_lines[room].pop()
            if not open_lines[room]:
                del open_lines[room], rooms[at]
        else:
            room, line = max_length, len(lines)
            lines.append([])
        lines[line].append(i)
        if (left := room - lengths[i]) > 0:
            if left not in open_lines:
                insort(rooms, left)
            open_lines.setdefault(left, []).append(line)
    return lines


class Packed(torch.utils.data.Dataset):
    """Lines of rows that come to max_length tokens together, at most: what a `Collator` packs."""

    def __init__(self, rows: Sequence[Row], lengths: Sequence[int], max_length: int):
        self.rows, self.lines = rows, packed(lengths, max_length)

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> list[Row]:
        return [self.rows[j] for j in self.lines[i]]


def packed_windows(rows: Iterable[Row], max_length: int) -> Iterator[list[Row]]:
    """Lines of rows that come one after the other, `WINDOW` of them packed at a time."""
    rows = iter(rows)
    while window := list(islice(rows, WINDOW)):
        for line in packed([len(row["input_ids"]) for row in window], max_length):
            yield [window[i] for i in line]


def seed_of(*parts: object) -> int:
    """A seed that hangs on these alone: the run's seed, the step, an example's id. The same on any rank."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def uniform(*parts: object) -> float:
    """A number in [0, 1) that hangs on these alone."""
    return seed_of(*parts) / 2**63
