"""The vocabulary that a process group shares: which columns are whose, and that all ranks ask for the same.

What differs between the ranks of a call would make them wait for one another for ever, or reduce numbers that do not
belong together. So they tell each other what they are about to do, once a call, and all raise the same error.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

MESSAGE_BYTES = 4096


class Vocabulary(NamedTuple):
    """This rank's part of the vocabulary."""

    size: int  # columns of this rank
    whole: int  # of all ranks
    first: int = 0  # id of this rank's first
    group: dist.ProcessGroup | None = None  # the ranks that share it; None: this one has all of it
    widest: int = 0  # columns of the rank that has most

    def gathered(self, x: Tensor) -> Tensor:
        """(ranks, *x.shape), the same on all of them."""
        if self.group is None:
            return x.unsqueeze(0)
        parts = x.new_empty(dist.get_world_size(self.group), *x.shape)
        dist.all_gather(list(parts), x.contiguous(), group=self.group)
        return parts


def shared_vocabulary(
    name: str, heads: list[int], vocab_size: int, device: torch.device, facts: dict[str, Any]
) -> Vocabulary:
    """Of heads with these rows on this rank, in the group of that name; with vocab_size > 0 later columns are cut off.

    Raises ValueError, on all ranks: heads that are split differently, ranks without a column, and whatever of `facts`
    (JSON) is not the same everywhere.
    """
    group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    message = json.dumps({"heads": heads, **facts}).encode()
    padded = torch.zeros(MESSAGE_BYTES, dtype=torch.uint8)
    padded[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    padded = padded.to(device)
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, padded, group=group)
    said = [json.loads(bytes(part.tolist()).rstrip(b"\0")) for part in parts]

    of_ranks = [x.pop("heads") for x in said]
    if any(len(set(x)) > 1 or min(x) < 1 for x in of_ranks):
        student, teacher = zip(*of_ranks, strict=True)
        raise ValueError(
            f"expected heads that are split alike, with at least one row on each rank; got {list(student)} rows of the "
            f"student's and {list(teacher)} of the teacher's: split both at the same token ids"
        )
    for fact in facts:
        values = [x[fact] for x in said]
        if any(value != values[0] for value in values):
            raise ValueError(
                f"expected the same {fact} on all ranks; got {values}: pass the same tokens and options everywhere"
            )
    sizes = [rows[0] for rows in of_ranks]
    rank, whole = dist.get_rank(group), sum(sizes)
    if vocab_size:
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        sizes = [min(size, vocab_size - first) for size, first in zip(sizes, firsts, strict=True)]
        if vocab_size > whole or min(sizes) < 1:
            raise ValueError(
                f"expected vocab_size in [{firsts[-1] + 1}, {whole}], so that each rank has a column; got {vocab_size}"
            )
        whole = vocab_size
    return Vocabulary(sizes[rank], whole, sum(sizes[:rank]), group, max(sizes))
