"""Who fills the second logits buffer: what the student learns from, as logits of a model that may not exist.

    a `Side` (sides.py)  another model: its head, or logits that are given
    `SparseTarget`        K probabilities a row
    `MixedTarget`         any of them, part of the way from the student

A sparse target is a dense teacher. With p on K ids and p_tail left for all others, let p~_v be p_v on the ids and
p_tail q_v / q_tail off them, held still. On the tail p~ / q is one ratio, so that every f-divergence of p~ and q is
that of their K + 1 outcomes, and so is its slope. In logits over T:

    u_v = log p_v                           on the ids
    u_v = z_v - lse_off_ids(z) + log p_tail off them

Legend: n rows, V vocabulary (of this rank), K ids a row, T temperature.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from okd_kernels.rows import FLOOR, LogitRows
from okd_kernels.sharding import Vocabulary
from okd_kernels.torch_block import LN2, LOG2_E
from okd_kernels.torch_rows import block_rows, blocks

ROUNDING = 8  # eps; a tail below this share of 1 - max p is rounding of the K log-probabilities
SPARSE_METRICS = ("target_mass", "student_mass")


class Target(Protocol):
    def project(self, rows: slice, buffer: Tensor, vocab_size: int) -> LogitRows:
        """Logits of the rows in the chunk's buffer, as far as they do not hang on the student's."""

    def takes(self, own: LogitRows) -> LogitRows:
        """What the row passes take of a chunk, given what `project` returned."""

    def fill(self, rows: slice, student: LogitRows, own: LogitRows) -> None:
        """Write those of some of its rows, whose student's logits are there by now."""


class MixedTarget:
    """softmax((1 - mix) z + mix u): from the student z, held still, to another target u (TAID, arXiv 2501.16937)."""

    def __init__(self, target: Target, mix: float):
        self.target, self.mix = target, mix

    def project(self, rows: slice, buffer: Tensor, vocab_size: int) -> LogitRows:
        self.out, self.start = LogitRows(buffer[: rows.stop - rows.start, :vocab_size]), rows.start
        return self.target.project(rows, buffer, vocab_size)

    def takes(self, own: LogitRows) -> LogitRows:
        self.own = self.target.takes(own)
        return self.out

    def fill(self, rows: slice, student: LogitRows, own: LogitRows) -> None:
        self.target.fill(rows, student, own)
        of_chunk = slice(rows.start - self.start, rows.stop - self.start)
        own, out = self.own.at(of_chunk), self.out.logits[of_chunk]
        for part in blocks(len(out), block_rows(out.shape[1], out.device)):
            z, u = (side.at(part).transformed(out.shape[1], out.dtype).clamp_min(FLOOR) for side in (student, own))
            torch.lerp(z, u, self.mix, out=out[part])


def sums_by_column(column: Tensor, p: Tensor) -> Tensor:
    """(N, K): the sum of p over all entries of a row that have the entry's column."""
    ordered, order = column.sort(1)
    group = torch.cat([torch.zeros_like(column[:, :1]), (ordered.diff(dim=1) != 0).cumsum(1)], 1)
    sums = torch.zeros_like(p).scatter_add_(1, group, p.gather(1, order)).gather(1, group)
    return torch.empty_like(p).scatter_(1, order, sums)


class SparseTarget:
    """K probabilities a row, and what their tail is."""

    def __init__(
        self,
        ids: Tensor,  # (N, K) in the whole vocabulary
        log_probs: Tensor,  # (N, K)
        dtype: torch.dtype,  # of the losses
        vocabulary: Vocabulary,
        *,
        tail: str,
        reverse: bool,  # the divergence is infinite where the target has no mass: its tail has at least eps
        temperature: float,
    ):
        self.vocabulary, self.temperature = vocabulary, temperature
        info, log_probs = torch.finfo(dtype), log_probs.to(dtype)
        log_probs = log_probs.masked_fill(log_probs < math.log(info.tiny), -torch.inf)
        column, p = ids - vocabulary.first, log_probs.exp()
        here = (p > 0) & (column >= 0) & (column < vocabulary.size)
        # An entry that is no target here points to column 0, and so to whatever that column is: what is written there
        # is the same for all entries that point to it, in any order.
        self.column = column.masked_fill(~here, 0)  # (N, K)
        total = sums_by_column(self.column, p.masked_fill(~here, 0))  # (N, K) of all entries with its column
        self.is_target, self.log_p = total > 0, total.log()
        self.log_share = torch.where(here, (p / total).log(), -torch.inf)  # sums to 1 over an id's repetitions
        self.mass = p.sum(-1)  # (N,) as given, on all ranks
        self.log_head = torch.zeros_like(self.mass)  # (N,) log-sum-exp of the student's logits / T on the ids
        p_tail = torch.zeros_like(self.mass)
        if tail == "bucket":
            # 1 - sum p as -expm1(log max p) - sum of the others: its error is eps of 1 - max p, not eps of 1.
            top = log_probs.argmax(-1, keepdim=True)
            off_top = -torch.expm1(log_probs.gather(1, top).squeeze(1))
            rest = off_top - p.scatter(1, top, 0).sum(-1)
            # A student that excludes the whole tail would find a rounding error's worth of mass there infinitely bad.
            p_tail = rest.clamp_min(info.eps) if reverse else rest.where(rest > ROUNDING * info.eps * off_top, p_tail)
        # A row without any target is one that the student has reached.
        self.log_p_tail = p_tail.masked_fill(self.mass == 0, 1).log()

    def project(self, rows: slice, buffer: Tensor, vocab_size: int) -> LogitRows:
        return LogitRows(buffer[: rows.stop - rows.start, :vocab_size])

    def takes(self, own: LogitRows) -> LogitRows:
        return own

    def fill(self, rows: slice, student: LogitRows, own: LogitRows) -> None:
        v, out, group = self.vocabulary.size, own.logits, self.vocabulary.group
        parts = [
            (slice(rows.start + at.start, rows.start + at.stop), student.at(at), out[at])
            for at in blocks(len(out), block_rows(v, out.device))
        ]
        log_tail = torch.cat([self._log_tail(at, z.transformed(v, out.dtype), u) for at, z, u in parts])
        if group is not None:
            both = self.vocabulary.gathered(torch.stack([log_tail, self.log_head[rows]]))
            log_tail, self.log_head[rows] = both.logsumexp(0)
        for at, z, u in parts:
            self._write(at, z.transformed(v, out.dtype), u, log_tail[at.start - rows.start : at.stop - rows.start])

    def _log_tail(self, rows: slice, z: Tensor, scratch: Tensor) -> Tensor:
        """(n,) log-sum-exp of z / T over this rank's columns off the ids; -inf where nobody will ask."""
        column, at_ids = self.column[rows], z.gather(1, self.column[rows])
        self.log_head[rows] = (at_ids / self.temperature + self.log_share[rows]).logsumexp(-1)
        if self._all_closed(rows):
            return torch.full_like(self.mass[rows], -torch.inf)
        z.scatter_(1, column, torch.where(self.is_target[rows], -torch.inf, at_ids))
        scale = LOG2_E / self.temperature
        offset = z.amax(-1, keepdim=True).clamp_min(FLOOR) * -scale  # of the tail: finite where there is none
        torch.add(offset, z, alpha=scale, out=scratch).exp2_()
        z.scatter_(1, column, at_ids)
        return scratch.sum(-1).log() - offset.squeeze(1) * LN2

    def _write(self, rows: slice, z: Tensor, out: Tensor, log_tail: Tensor) -> None:
        """The target's logits, less log p_tail where there is a tail: the ids are fewer than the others."""
        log_p_tail, column = self.log_p_tail[rows], self.column[rows]
        closed = (log_p_tail == -torch.inf) | (log_tail == -torch.inf)  # nothing but the ids
        if self._all_closed(rows):
            out.fill_(FLOOR)
        else:
            torch.sub(z, (log_tail * self.temperature).unsqueeze(1), out=out)
            if out.device.type != "cpu" or closed.any():
                out.masked_fill_(closed.unsqueeze(1), FLOOR)
        log_p = (self.log_p[rows] - log_p_tail.masked_fill(closed, 0).unsqueeze(1)) * self.temperature
        out.scatter_(1, column, torch.where(self.is_target[rows], log_p, out.gather(1, column)))

    def _all_closed(self, rows: slice) -> bool:
        """Whether it is known without waiting that the rows have no tail."""
        return self.log_p_tail.device.type == "cpu" and bool((self.log_p_tail[rows] == -torch.inf).all())

    def masses(self, statistics: Tensor) -> Tensor:
        """(N, len(SPARSE_METRICS)) from the rows' statistics (2, N, 5), after all rows have been filled."""
        log_sum = statistics[0, :, 1].log() + statistics[0, :, 0] / self.temperature
        return torch.stack([self.mass, (self.log_head - log_sum).exp().to(self.mass.dtype)], 1)
