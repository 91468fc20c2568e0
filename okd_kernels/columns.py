"""A backward pass over the columns that carry the gradient: what the others add is corrected, and the error measured.

The gradient of a distillation loss is nearly sparse: of a chunk's V columns few carry it. The K of most energy are
multiplied alone. What the dropped ones D would have added to dX is large, since the rows of a head have much in common,
and lies in few directions U (D', r) for the same reason. There it is exact, for r columns more:

    dX ~ G_K W_K + (G_D W_D U) U^T,    G_D W_D U = G P - G_K P_K,    P = W U

The error E of that is measured, by s random directions R: E R = G_D W_D R - (G_D W_D U) U^T R. |E R| / |dX R| is
|E| / |dX| to a few percent, whatever the rows are; energies alone say a half or a third of it, as dropped columns add
up. Of dW, the dropped rows stay 0.

Legend: V vocabulary (of this rank), D' columns of a head whose gradient is wanted, c rows of a chunk, N of all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from okd_kernels.gemms import accumulate, logits_into
from okd_kernels.sharding import Vocabulary

DIRECTIONS, PROBES = 8, 8
SAMPLED_ROWS, ITERATIONS = 1024, 2  # of the search for a head's common directions
BLOCK_ROWS = 8  # a CPU's: a pass over them finds them in its cache
ALIGNMENT = 64  # K is a multiple of it
TRIED_ROWS = 64  # of a chunk, by a bound
SHARES = (0.05, 0.1, 0.2, 0.3)  # which a bound chooses from, or all
METRICS = ("dx_error", "columns_kept")  # of a side


class BackwardColumns(NamedTuple):
    """Which columns the backward GEMMs multiply: a share of them, or as many as keep dX's error below a bound."""

    share: float = 1.0
    bound: float = 0.0  # 0: none
    exact_head: bool = False  # dW of all columns

    @classmethod
    def of(cls, given: float | str | None, exact_head: bool = False) -> BackwardColumns:
        """From a share of the vocabulary, 0.25 or "0.25", or a bound, "1%". Raises ValueError."""
        share, bound = 1.0, 0.0
        try:
            if isinstance(given, str) and given.endswith("%"):
                bound = float(given[:-1]) / 100
            elif given is not None:
                share = float(given)
        except ValueError:
            share = 0.0
        if not (0 < share <= 1 and 0 <= bound < 1) or (isinstance(given, str) and "%" in given and bound == 0):
            raise ValueError(
                "expected backward_columns as a share of the vocabulary above 0 and at most 1, such as 0.25, or as a "
                f"bound on the relative error of dX between 0% and 100%, such as '1%'; got {given!r}"
            )
        return cls(share, bound, exact_head)

    @property
    def all(self) -> bool:
        return self.share == 1.0 and self.bound == 0.0


def _in_cache(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """On a CPU a few rows of each at a time; elsewhere all of them."""
    step = BLOCK_ROWS if tensors[0].device.type == "cpu" else max(1, len(tensors[0]))
    return zip(*(x.split(step) for x in tensors), strict=True)


def column_energies(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """(V,) sums of squares, without a wide copy of all rows."""
    if gradient.device.type != "cpu":
        return torch.linalg.vector_norm(gradient, dim=0, dtype=dtype).square_()
    total = torch.zeros(gradient.shape[1], dtype=dtype, device=gradient.device)
    for (block,) in _in_cache(gradient):
        total += block.to(dtype).square().sum(0)
    return total


class Compact(NamedTuple):
    """What is left of a chunk's gradient."""

    columns: Tensor  # (K,)
    gradient: Tensor  # (c, K + r) the last r of what was dropped, in the common directions
    weight: Tensor  # (K + r, D')
    exact_head: bool  # dW is made of all columns nevertheless

    def add_to(self, grad_weight: Tensor, hidden: Tensor, first: bool) -> None:
        """(V, D'') += of the kept rows, from hidden (c, D'')."""
        if first:
            grad_weight.zero_()
        kept = len(self.columns)
        rows = grad_weight[self.columns]
        accumulate(rows, self.gradient[:, :kept].t(), hidden, first=False)
        grad_weight[self.columns] = rows


class Directions(NamedTuple):
    """What the rows of a head have in common, U (D', r), and the probes R (D', s), as the GEMMs have both."""

    basis: Tensor  # (r, D') U^T
    head: Tensor  # (V, r + s) W [U, R]
    leaking: Tensor  # (r, s) U^T R, what the probes see of the basis

    @classmethod
    def of(cls, weight: Tensor, drawn: Tensor) -> Directions:
        """drawn (D', r + s): where the search for U begins, and R; in the dtype of what is measured."""
        count = drawn.shape[1] - PROBES
        basis, probes = drawn[:, :count], drawn[:, count:]
        sample = weight[:: -(-len(weight) // SAMPLED_ROWS)].to(drawn.dtype)
        for _ in range(ITERATIONS):
            basis = torch.linalg.qr(sample.t() @ (sample @ basis)).Q
        basis = basis.to(weight.dtype).to(drawn.dtype)
        both = torch.cat([basis, probes], 1).t().contiguous().to(weight.dtype)
        seen = torch.empty(len(both), len(weight), dtype=drawn.dtype, device=weight.device)
        logits_into(both, weight, seen)
        return cls(both[:count], seen.t().to(weight.dtype).contiguous(), basis.t() @ probes)


class Compaction:
    """Chooses the columns of one side of a call, chunk by chunk."""

    def __init__(
        self,
        options: BackwardColumns,
        weight: Tensor,  # (V, D')
        n: int,
        dtype: torch.dtype,  # of what is measured
        vocabulary: Vocabulary,
    ):
        self.options, self.weight, self.dtype, self.vocabulary = options, weight, dtype, vocabulary
        self.kept, self.n = 0, n  # columns of all chunks, each times its rows
        generator = torch.Generator(weight.device).manual_seed(0)  # one on all ranks
        width = weight.shape[1]
        self.drawn = torch.randn(
            width, min(DIRECTIONS, width) + PROBES, dtype=dtype, device=weight.device, generator=generator
        )
        self.probed = torch.zeros(2, n, PROBES, dtype=dtype, device=weight.device)  # E R, dX R

    @functools.cached_property
    def directions(self) -> Directions:
        return Directions.of(self.weight, self.drawn)

    def __call__(self, rows: slice, gradient: Tensor) -> Compact | None:
        """Of a chunk's gradient (c, V); None: all of it."""
        v = gradient.shape[1]
        energies = column_energies(gradient, self.dtype)
        if self.options.bound:
            found = self._within_bound(gradient, energies)
        elif (k := self._aligned(self.options.share, v)) < v:
            total = self._seen(gradient, self.directions.head)
            found = self._keep(gradient, energies.topk(k, sorted=False).indices, total)
        else:
            found = None
        self.kept += (rows.stop - rows.start) * (v if found is None else len(found[0]))
        if found is None:
            return None
        columns, part, self.probed[0, rows] = found
        weight = torch.cat([self.weight[columns], self.directions.basis])
        return Compact(columns, part, weight, self.options.exact_head)

    def made(self, rows: slice, grad_hidden: Tensor) -> None:
        """What has become of the chunk: its dX (c, D')."""
        self.probed[1, rows] = grad_hidden.to(self.dtype) @ self.drawn[:, -PROBES:]

    @staticmethod
    def _aligned(share: float, v: int) -> int:
        return min(v, -(-round(share * v) // ALIGNMENT) * ALIGNMENT)

    def _seen(self, gradient: Tensor, head: Tensor) -> Tensor:
        """(c, r + s) gradient @ head."""
        out = torch.empty(len(gradient), head.shape[1], dtype=self.dtype, device=head.device)
        accumulate(out, gradient, head, first=True)
        return out

    def _keep(self, gradient: Tensor, columns: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """These columns (K,) in order, `Compact.gradient` of them, and what the probes see of the error (c, s)."""
        columns = columns.sort().values  # neighbours in memory
        directions = self.directions
        k, r = len(columns), len(directions.basis)
        part = gradient.new_empty(len(gradient), k + r)
        for out, block in _in_cache(part, gradient):
            torch.index_select(block, 1, columns, out=out[:, :k])
        dropped = total - self._seen(part[:, :k], directions.head[columns])
        part[:, k:] = dropped[:, :r]
        return columns, part, dropped[:, r:] - dropped[:, :r] @ directions.leaking

    def _within_bound(self, gradient: Tensor, energies: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """The fewest columns of `SHARES` that keep the error below the bound; None: no share does.

        The search begins where the energy that is dropped would allow it, which is less than the error, and tries a
        share on a few of the rows before all of them.
        """
        v, group, bound = len(energies), self.vocabulary.group, self.options.bound
        order = energies.argsort(descending=True)
        ascending = energies[order.flip(0)].double()
        dropped = (ascending.cumsum(0).flip(0) / ascending.sum()).sqrt()  # [k]: share of all, where k are kept
        counts = [k for share in SHARES if (k := self._aligned(share, v)) < v]
        counts = [k for k, energy in zip(counts, dropped[counts].tolist(), strict=True) if energy <= bound]
        if not counts and group is None:
            return None
        total = self._seen(gradient, self.directions.head)
        probes = total[:, -PROBES:]
        if group is not None:
            probes = probes.clone()
            dist.all_reduce(probes, group=group)
            bound /= dist.get_world_size(group)  # errors of ranks may add up
        few, every = slice(None, None, -(-len(gradient) // TRIED_ROWS)), slice(None)
        for k in counts:
            for tried in (few, every):
                found = self._keep(gradient[tried], order[:k], total[tried])
                if not found[2].norm() <= bound * probes[tried].norm():  # nor where it is NaN
                    break
            else:
                return found
        return None

    def report(self) -> Tensor:
        """(2,) `METRICS` of all rows and ranks: relative error of dX, share of the columns that were kept."""
        probed = self.probed
        kept = probed.new_full((), self.kept / (self.n * self.vocabulary.whole))
        if self.vocabulary.group is not None:
            dist.all_reduce(probed, group=self.vocabulary.group)
            dist.all_reduce(kept, group=self.vocabulary.group)
        error, norm = probed.flatten(1).norm(dim=1)
        return torch.stack([torch.where(norm > 0, error / norm, 0), kept])
