"""A few rows of both models in PyTorch: exponentials, sums, inner products; values and gradients of the divergences.

Passes are what costs on a CPU, one as much as another whatever it computes, and each has a fixed cost beside that of
its size. So no row is divided by its sum, differences of logits stand for those of log-probabilities, one pass serves
both sides where it can, and the inner products of a block are one batched matrix product. Logarithms in rows are to
base 2: the factor goes with the subtraction of the maximum, and on some CPUs an exponential to base 2 takes a third of
the time of base e.

Legend: n rows of a block, V vocabulary (of this rank), W columns of a buffer, T temperature; index 0 is the student.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from okd_kernels.divergences import DIVERGENCES, TINY, Objective
from okd_kernels.rows import FLOOR

BUFFERS = 8  # of a block
LARGE = 1024  # of logits over T ln(2); above, subtracting their maximum is a pass of its own
LN2, LOG2_E = math.log(2), 1 / math.log(2)
PIECE = 256  # columns that are summed in the logits' dtype, one after the other on some CPUs; pieces are added in fp64


def buffer_width(vocab_size: int) -> int:
    """W: whole pieces."""
    return -(-vocab_size // PIECE) * PIECE


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


def divergence_of(
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
