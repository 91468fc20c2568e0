"""The row passes in plain PyTorch: the CPU path, and devices without Triton.

Rows are worked off a block at a time, so that on a CPU every pass finds them in its cache. Passes are what costs there,
one as much as another whatever it computes, and each has a fixed cost beside that of its size. So no row is divided by
its sum, differences of logits stand for those of log-probabilities, one pass serves both sides where it can, and the
inner products of a block are one batched matrix product. Logarithms in rows are to base 2: the factor goes with the
subtraction of the maximum, and on some CPUs an exponential to base 2 takes a third of the time of base e.

Legend: n rows of a block, V vocabulary (of this rank), W columns of a buffer, T temperature; index 0 is the student.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from okd_kernels.divergences import DIVERGENCES, TINY, Objective
from okd_kernels.rows import FLOOR, LOG_0, LogitRows, Rows

BLOCK_ELEMENTS = 400_000  # logits of one side that are worked on together: 1.6 MB in fp32
ACCELERATOR_BLOCK_ELEMENTS = 1 << 24  # elsewhere than on a CPU: few launches, and 64 MiB for each buffer
BUFFERS = 8  # of a block
LARGE = 1024  # of logits over T ln(2); above, subtracting their maximum is a pass of its own
LN2, LOG2_E = math.log(2), 1 / math.log(2)
PIECE = 256  # columns that are summed in the logits' dtype, one after the other on some CPUs; pieces are added in fp64


def block_rows(vocab_size: int, device: torch.device) -> int:
    """Rows that are worked on together."""
    if device.type == "cpu":
        return max(torch.get_num_threads(), BLOCK_ELEMENTS // vocab_size)
    return max(1, ACCELERATOR_BLOCK_ELEMENTS // vocab_size)


def blocks(n: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def _sum(x: Tensor, exact: torch.dtype) -> Tensor:
    """Sums (...) of (..., W): by pieces of columns, which are then added in `exact`."""
    return x.unflatten(-1, (-1, PIECE)).sum(-1).sum(-1, dtype=exact)


class Block:
    """Exponentials and logarithms of n rows of both models, in buffers that serve one block after the other.

    W is V and padding of probability 0: rows fall into equal pieces, and none ends amid a CPU's vector, whose rest it
    rounds differently. All views are made once: made for each block, they would cost as much as a pass.
    """

    offsets: Tensor  # (2, n), what was added to logits / (T ln(2)); 0 where the largest was subtracted exactly
    tops: Tensor  # (2, n), in `exact`: what the exponentials are taken from
    sums: Tensor  # (2, n), in `exact`: of `exps`
    products: Tensor  # (2, n, 3), `multiply` of `factors`: of each model with the first, and with its own log
    log_sums: Tensor  # (2, n), in `exact`, of whole rows; only after `normalise`, as what follows
    exact_inverses: Tensor  # (2, n): probabilities are `exps` times these
    inverses: Tensor  # (2, n, 1) in `dtype`
    means: Tensor  # (2, n) of ln(2) `log_ratio`, in whole rows

    def __init__(self, memory: Tensor, n: int, v: int, width: int, exact: torch.dtype):
        memory = memory[: BUFFERS * n * width].view(BUFFERS, n, width)
        self.n, self.exact, self.dtype = n, exact, memory.dtype
        self.exps, self.factors = memory[:2], memory[2:5]
        self.log_ratio = memory[2]  # (n, W), log2 p - log2 q but for a constant in each row
        self.logs = memory[3:5]  # (2, n, W), logits over T less the row's top, over ln(2)
        self.columns, self.padding = self.logs[:, :, :v], self.logs[:, :, v:]
        self.exp, self.log, self.log_columns = (x.unbind() for x in (self.exps, self.logs, self.columns))
        self.spare = memory[5:].unbind()  # (n, W)
        self.from_m = memory[6:]  # (2, n, W), the last two of `spare`
        self.exp_pieces = self.exps.view(2, -1, PIECE).transpose(0, 1)
        self.exp_columns, self.spare_columns = ([x[:, :v] for x in buffers] for buffers in (self.exp, self.spare))
        setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        precise = self.dtype == torch.float64 or setting.fp32_precision in ("none", "ieee")
        self.by_matrix_product = memory.device.type == "cpu" and precise  # TF32 and bf16 are not

    def fill(self, logits: Sequence[Tensor], temperature: float, careful: bool) -> bool:
        """From both models' logits, (n, V). False if that must be done again: carefully, and without -inf in them."""
        scale = LOG2_E / temperature
        top = torch.stack([x.amax(-1, keepdim=True) for x in logits])
        offsets = torch.zeros_like(top) if careful else top * -scale
        for i, (x, log) in enumerate(zip(logits, self.log_columns, strict=True)):
            if careful:
                torch.sub(x, top[i], out=log).mul_(scale)
            else:  # one pass less, but the largest becomes the rounding of its offset
                torch.add(offsets[i], x, alpha=scale, out=log)
        self.offsets = offsets.squeeze(2)
        self.tops = top.squeeze(2).to(self.exact) if careful else self.offsets.to(self.exact).mul_(-1 / scale)
        self.padding.fill_(FLOOR)  # a JSD has written there
        torch.exp2(self.logs, out=self.exps)
        torch.sub(self.log[1], self.log[0], out=self.log_ratio)
        self.sums = _sum(self.exps, self.exact)
        self.products = self.multiply(self.factors, ((0, 0), (1, 0), (0, 1), (1, 2)))
        # Else 0 * log 0 was among them, or logits are so large that their offset's rounding matters.
        return careful or bool(math.isfinite(self.products.sum()) and self.offsets.norm(math.inf) < LARGE)

    def multiply(self, factors: Tensor, wanted: Sequence[tuple[int, int]]) -> Tensor:
        """(2, n, j): ln(2) times inner products of the rows of `exps` and factors, (j, n, W); at least those wanted."""
        n, j = factors.shape[1], len(factors)
        if self.by_matrix_product:
            pieces = torch.bmm(self.exp_pieces, factors.view(j, -1, PIECE).permute(1, 2, 0))
            products = pieces.view(n, -1, 2, j).sum(1, dtype=self.exact).transpose(0, 1)
        else:
            products = factors.new_zeros(2, n, j, dtype=self.exact)
            for model, factor in wanted:
                product = torch.mul(self.exp[model], factors[factor], out=self.spare[0])
                products[model, :, factor] = _sum(product, self.exact)
        return products.mul_(LN2)

    def normalise(self, whole: Normal | None) -> None:
        """Take on the sums of whole rows: this block's own, unless other ranks have a part of them."""
        if whole is None:
            self.log_sums, self.exact_inverses = self.sums.log(), self.sums.reciprocal()
            self.means = self.products[..., 0] * self.exact_inverses
        else:
            self.log_sums, self.exact_inverses, self.means = whole
        self.inverses = self.exact_inverses.to(self.dtype).unsqueeze(-1)


class Normal(NamedTuple):
    """What makes a block's exponentials probabilities, where whole rows lie on several ranks; as `Block` has it."""

    log_sums: Tensor  # (2, n), from this rank's tops
    exact_inverses: Tensor  # (2, n)
    means: Tensor  # (2, n)

    @classmethod
    def of(cls, statistics: Tensor, tops: Tensor, temperature: float) -> Normal:
        """From whole rows' statistics (2, n, 5), and the tops (2, n) from which this rank took its exponentials."""
        top, total, _, cross, _ = statistics.unbind(-1)
        rise = (top - tops) / temperature
        return cls(total.log() + rise, (-rise).exp() / total, cross / total + (rise[1] - rise[0]))

    def at(self, rows: slice) -> Normal:
        return Normal(*(x[:, rows] for x in self))


class Found:
    """What the blocks leave behind, put together once: a few numbers a row, each operation on which costs a call."""

    def __init__(self) -> None:
        self.numbers: list[tuple[Tensor, ...]] = []  # of each block
        self.divergences: tuple[list[Tensor], list[Tensor]] = ([], [])  # of both sides, where blocks give them

    def add(self, *numbers: Tensor) -> None:
        self.numbers.append(numbers)

    def joined(self) -> Iterator[Tensor]:
        return (torch.cat(x, 1) for x in zip(*self.numbers, strict=True))


def _divergence(
    objective: Objective,
    block: Block,
    q: int,  # index of the learner; the other one is p
    slope_sum: Tensor | None = None,  # (n,) of whole rows; None: the block has whole rows
    scale: Tensor | None = None,  # (n, 1)
    out: Tensor | None = None,  # (n, V): written, scale times the gradient with respect to T * logits of the learner
    last: bool = False,  # the block's `logs` may be overwritten: on a CPU, writing where one reads is the faster
) -> tuple[Tensor | None, Tensor | None]:
    """Value and slope sum (n,) of the block's part of the rows. Of the two KLs, `Block.values` has the value."""
    p, beta, dtype = 1 - q, objective.beta, block.dtype

    def centred(log_ratio: Tensor, mean: Tensor, factor: float, spare: Tensor) -> None:
        """out = scale * factor * q * (ln(2) * log_ratio - mean): a row's constants cancel, and their rounding, too."""
        if out is not None and scale is not None:
            torch.sub(log_ratio, (mean * LOG2_E).to(dtype).unsqueeze(1), out=spare).mul_(block.exp[q])
            torch.mul(spare[:, : out.shape[1]], scale * block.inverses[q] * (factor * LN2), out=out)

    if objective.divergence == "forward_kl":
        if out is not None and scale is not None:
            torch.mul(block.exp[q], scale * block.inverses[q], out=block.spare[0])
            torch.addcmul(block.spare_columns[0], block.exp_columns[p], scale * block.inverses[p], value=-1, out=out)
        return None, None
    if objective.divergence == "reverse_kl":
        centred(block.log_ratio, block.means[q], 2 * q - 1, block.spare[0])
        return None, None
    if objective.divergence == "jsd":
        # The mixture m = (1 - beta) q + beta p, times e^log_total, so that the logarithms' differences stay small.
        log_weights = {q: math.log(1 - beta) - block.log_sums[q], p: math.log(beta) - block.log_sums[p]}
        log_total = torch.logaddexp(log_weights[q], log_weights[p])
        w_q, w_p = ((log_weights[i] - log_total).exp().to(dtype).unsqueeze(1) for i in (q, p))
        log_m = torch.mul(block.exp[q], w_q, out=block.spare[0]).addcmul_(block.exp[p], w_p)
        from_m = torch.sub(block.logs, log_m.clamp_min_(TINY).log2_(), out=block.logs if last else block.from_m)
        products = block.multiply(from_m, ((0, 0), (1, 1)))
        means = {i: products[i, :, i] * block.exact_inverses[i] for i in (q, p)}
        constant = {i: block.log_sums[i] + log_total for i in (q, p)}  # log i - log m = ln(2) from_m - constant
        kls = {i: means[i] - constant[i] * (block.sums[i] * block.exact_inverses[i]) for i in (q, p)}
        mean = means[q] if slope_sum is None else slope_sum / (1 - beta) + constant[q]
        centred(from_m[q], mean, 1 - beta, from_m[q])
        return beta * kls[p] + (1 - beta) * kls[q], (1 - beta) * kls[q]
    log_q, log_p = (torch.add(-block.log_sums[i].to(dtype).unsqueeze(1), block.log[i], alpha=LN2) for i in (q, p))
    # Exponentials of these, since the Bregman form wants them to agree.
    formula = DIVERGENCES[objective.divergence].formula
    l, g = formula(log_q, log_p, prob := log_q.exp(), log_p.exp(), objective.alpha, beta)
    own_sum = g.sum(-1)
    if out is not None and scale is not None:
        total = own_sum if slope_sum is None else slope_sum.to(dtype)
        g = torch.addcmul(g, prob, total.unsqueeze(1), value=-1)
        torch.mul(g[:, : out.shape[1]], scale, out=out)
    return l.sum(-1), own_sum


class Part(NamedTuple):
    """The rows of a block."""

    rows: slice  # among those of the chunk
    sides: tuple[LogitRows, LogitRows]
    logits: Sequence[Tensor]  # (n, V) of each side, transformed; zeros in ignored rows
    target: Tensor | None  # (2, n, 1) column of the label (any, where it is none of them)
    here: Tensor | None  # (n, 1) whether it is one of them
    weights: Tensor  # (n, 4)


class TorchRows:
    """`RowPasses` in the dtype of the losses.

    What a block leaves behind are a few numbers a row. They are put together once for all blocks: each operation on
    them costs a call, however few they are.
    """

    def __init__(self, like: Tensor, n: int, vocab_size: int, temperature: float, first: int = 0):
        self.v, self.temperature, self.first, self.dtype = vocab_size, temperature, first, like.dtype
        self.on_cpu = like.device.type == "cpu"
        self.exact = torch.float64 if self.on_cpu else like.dtype
        self.width = -(-vocab_size // PIECE) * PIECE
        self.step = min(n, block_rows(self.width, like.device))
        self.memory = like.new_empty(BUFFERS * self.step * self.width)
        self.block = Block(self.memory, self.step, vocab_size, self.width, self.exact)
        self.nothing = like.new_zeros(2, self.step)
        self.careful = not self.on_cpu  # where looking whether it is needed would synchronise

    def run(self, rows: Rows, fill: Callable[[slice], None]) -> tuple[Tensor, Tensor]:
        of_statistics, of_values = [], []
        for part, block in self._parts(rows, fill):
            found = self._read(part, block)
            of_statistics.append(found)
            block.normalise(None)
            of_values.append(self._emit(part, block, None, found[-1]))
        statistics = self._statistics(rows, of_statistics)
        return statistics, self._values(statistics, of_values)

    def statistics(self, rows: Rows) -> Tensor:
        return self._statistics(rows, [self._read(*both) for both in self._parts(rows)])

    def slopes(self, rows: Rows, statistics: Tensor) -> Tensor:
        sums = statistics.new_zeros(len(rows.weights), 2)
        for part, block in self._parts(rows):
            block.normalise(Normal.of(statistics[:, part.rows], block.tops, self.temperature))
            for i, side in enumerate(part.sides):
                slope_sum = None if side.objective is None else _divergence(side.objective, block, i)[1]
                if slope_sum is not None:
                    sums[part.rows, i] = slope_sum.to(sums.dtype)
        return sums

    def emit(self, rows: Rows, statistics: Tensor, slopes: Tensor | None) -> Tensor:
        of_values = []
        log_sums_at_1 = statistics[..., 0] + statistics[..., 2].log()
        for part, block in self._parts(rows):
            block.normalise(Normal.of(statistics[:, part.rows], block.tops, self.temperature))
            of_part = None if slopes is None else slopes[part.rows]
            of_values.append(self._emit(part, block, of_part, log_sums_at_1[:, part.rows]))
        return self._values(statistics, of_values)

    def _parts(self, rows: Rows, fill: Callable[[slice], None] | None = None) -> Iterator[tuple[Part, Block]]:
        """The rows by blocks, each loaded; `fill` makes the teacher's logits of a block, where that waits for it."""
        n, target, here, ignored, weights = len(rows.weights), None, None, None, rows.weights
        if rows.labels is not None:
            column = rows.labels - self.first
            here = ((column >= 0) & (column < self.v)).unsqueeze(1)
            target = column.clamp(0, self.v - 1).expand(2, n).unsqueeze(2)
            ignored = (rows.labels < 0).unsqueeze(1)
            if self.on_cpu and not ignored.any():
                ignored = None
            else:
                weights = weights.masked_fill(ignored, 0)
        for at in blocks(n, self.step):
            if fill is not None:
                fill(at)
            sides = rows.student.at(at), rows.teacher.at(at)
            logits = self._load(sides, None if ignored is None else ignored[at])
            at_label = None if target is None else target[:, at]
            yield Part(at, sides, logits, at_label, None if here is None else here[at], weights[at]), self.block

    def _load(self, sides: tuple[LogitRows, LogitRows], ignored: Tensor | None) -> list[Tensor]:
        """Fill the block; the logits as they went there."""
        n = len(sides[0].logits)
        if n != self.block.n:
            self.block = Block(self.memory, n, self.v, self.width, self.exact)
        logits = [side.transformed(self.v, self.dtype) for side in sides]
        if ignored is not None:  # they may hold anything
            logits = [x.masked_fill(ignored, 0) for x in logits]
        while True:
            if self.careful:
                logits = [x.clamp_min(FLOOR) for x in logits]
            if self.block.fill(logits, self.temperature, self.careful):
                return logits
            self.careful = True  # later blocks are likely to want it, too

    def _read(self, part: Part, block: Block) -> tuple[Tensor, ...]:
        """(2, n) each: tops, sums, cross, log2 of the label from its top, log-sum-exp at T = 1."""
        at_label = log_sum_at_1 = self.nothing[:, : block.n]
        if part.target is not None:
            at_label = block.columns.gather(2, part.target).squeeze(2)
            if self.temperature != 1.0:
                log_sum_at_1 = torch.stack([x.logsumexp(-1) for x in part.logits])
        return block.tops, block.sums, block.products[..., 0], at_label, log_sum_at_1

    def _statistics(self, rows: Rows, found: list[tuple[Tensor, ...]]) -> Tensor:
        tops, sums, cross, at_label, log_sums_at_1 = (torch.cat(x, 1) for x in zip(*found, strict=True))
        if rows.labels is not None:
            column = rows.labels - self.first
            here = (column >= 0) & (column < self.v)
            at_label = (tops + at_label * (LN2 * self.temperature)).masked_fill(~here, 0)
        sums_at_1 = sums if self.temperature == 1.0 else (log_sums_at_1 - tops).exp()
        return torch.stack([tops, sums, sums_at_1, cross, at_label.to(tops.dtype)], -1)

    def _emit(self, part: Part, block: Block, slopes: Tensor | None, log_sums_at_1: Tensor) -> tuple[Tensor, ...]:
        """Gradients of a block; and, of its values, sums (2, n), products (2, n, 3), tops, offsets, divergences, masses
        that meet log 0 (2, n), and common tops (1, n)."""
        common = torch.mul(*block.exp, out=block.spare[0]).amax(-1)  # 1 where one token is the most probable of both
        lost = divergences = self.nothing[:, : block.n]
        if self.careful:
            pairs = ((block.log_ratio, block.exp[1]), (-block.log_ratio, block.exp[0]))
            lost = torch.stack([torch.where(ratio > LOG_0, mass, 0).amax(-1) for ratio, mass in pairs])
        values: list[Tensor | None] = [None, None]
        last = 0 if part.sides[1].objective is None else 1  # of the sides that learn
        for i, side in enumerate(part.sides):
            if side.objective is None:
                continue
            out, scale = None, part.weights[:, i : i + 1] * side.logit_scale
            if side.gradient is not None:
                direct = side.gradient.dtype == self.dtype and self.temperature == 1.0  # else logits are needed below
                out = side.gradient[:, : self.v] if direct else block.spare_columns[1]
            slope_sum = None if slopes is None else slopes[:, i]
            values[i], _ = _divergence(side.objective, block, i, slope_sum, scale, out, last=i == last)
            if out is not None:
                self._finish_gradient(part, i, out, log_sums_at_1[i])
        if any(x is not None for x in values):
            divergences = torch.stack(
                [divergences[0].to(self.exact) if x is None else x.to(self.exact) for x in values]
            )
        return block.sums, block.products, block.tops, block.offsets, divergences, lost, common.unsqueeze(0)

    def _finish_gradient(self, part: Part, i: int, gradient: Tensor, log_sum_at_1: Tensor) -> None:
        """Add the cross-entropy's to the divergence's (n, V), go back through the softcap, and store."""
        side, block, x = part.sides[i], self.block, part.logits[i]
        assert side.gradient is not None and side.objective is not None
        if side.objective.ce_weight > 0:
            assert part.target is not None and part.here is not None
            scale = part.weights[:, 2 + i : 3 + i] * side.logit_scale
            q, inverse = block.exp_columns[i], block.inverses[i]
            if self.temperature != 1.0:
                rounded = log_sum_at_1.to(self.dtype).unsqueeze(1)
                q, inverse = (x - rounded).exp_(), (rounded - log_sum_at_1.unsqueeze(1)).exp().to(self.dtype)
            gradient.addcmul_(q, scale * inverse).scatter_add_(1, part.target[0], -scale * part.here)
        if side.softcap is not None:
            gradient.mul_(1 - (x / side.softcap) ** 2)
        out = side.gradient[:, : self.v]
        if gradient.data_ptr() != out.data_ptr():
            out.copy_(gradient)

    def _values(self, statistics: Tensor, found: list[tuple[Tensor, ...]]) -> Tensor:
        columns = (torch.cat(x, 1) for x in zip(*found, strict=True))
        sums, products, tops, offsets, divergences, lost, common = columns
        log_sums, inverses, _ = Normal.of(statistics, tops, self.temperature)
        mass, means = sums * inverses, products * inverses.unsqueeze(2)  # mass: 1 but for the other ranks' part
        reverse, forward = means[..., 0] + (log_sums[0] - log_sums[1]) * mass
        entropies = log_sums * mass - torch.stack((means[0, :, 1], means[1, :, 2]))
        # The largest of a row's `exps` is 1 but for the rounding of its offset, which is less than `LARGE`.
        tolerance = torch.finfo(self.dtype).eps * (4 + offsets.abs().sum(0))
        agrees = common[0] * ((tops - statistics[..., 0]) / self.temperature).sum(0).exp() >= 1 - tolerance
        return torch.stack([*divergences, forward, -reverse, *entropies, agrees, *lost], 1)
