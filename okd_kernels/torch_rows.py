"""The row contract in plain PyTorch: the CPU path, and devices without Triton.

The chunk's logits are worked off a few rows at a time, so that every pass finds them in a CPU's cache. Passes are what
costs there, one as much as another whatever it computes, and each has a fixed cost beside that of its size. So no row
is divided by its sum, differences of logits stand for those of log-probabilities, one pass serves both sides where it
can, and the inner products of a block are one batched matrix product. Logarithms in rows are to base 2: the factor goes
with the subtraction of the maximum, and on some CPUs an exponential to base 2 takes a third of the time of base e.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from okd_kernels.divergences import DIVERGENCES, TINY, Objective
from okd_kernels.rows import FLOOR, INFINITE, Side

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


def _logits(side: Side, rows: slice, v: int, dtype: torch.dtype, ignored: Tensor | None) -> Tensor:
    """Logits after bias, scale and softcap; zeros in ignored rows, which may hold anything."""
    x = side.logits[rows, :v].to(dtype)
    if ignored is not None:
        x = x.masked_fill(ignored, 0)
    if side.bias is not None:
        x = x + side.bias[:v]
    if side.logit_scale != 1.0:
        x = x * side.logit_scale
    if side.softcap is not None:
        x = torch.tanh(x / side.softcap) * side.softcap
    return x


def _transform(side: Side, rows: slice, v: int, dtype: torch.dtype, ignored: Tensor | None) -> Tensor:
    """The same, and never -inf; for other losses than these."""
    x = _logits(side, rows, v, dtype, ignored)
    # Reading the minimum is cheaper than clamping; on an accelerator it would synchronise.
    if x.device.type != "cpu" or not x.amin() >= FLOOR:  # a NaN in one row must not leave -inf in another
        x = x.clamp_min(FLOOR)
    return x


def _infinite(value: Tensor) -> Tensor:
    return torch.where(value > INFINITE, torch.inf, value)


def _sum(x: Tensor, exact: torch.dtype) -> Tensor:
    """Sums (...) of (..., W): by pieces of columns, which are then added in `exact`."""
    return x.unflatten(-1, (-1, PIECE)).sum(-1).sum(-1, dtype=exact)


class Block:
    """Two softmaxes of n rows, the student's and the teacher's, in buffers that serve one block after the other.

    The probabilities are exps / sums, their logarithms ln(2) * logs - ln(sums). W is V and padding of probability 0:
    rows fall into equal pieces, and none ends amid a CPU's vector, whose rest it rounds differently. All views are made
    once: made for each block, they would cost as much as a pass.
    """

    sums: Tensor  # (2, n, 1), of `exps`
    inverses: Tensor  # (2, n, 1), of `sums`, in the dtype of `exps`
    products: Tensor  # (n, 2, 3), `multiply` of `factors`: of each model with the first, and with its own log
    offsets: Tensor  # (2, n, 1), what was added to logits / (T ln(2))

    def __init__(self, memory: Tensor, n: int, v: int, width: int, exact: torch.dtype):
        memory = memory[: BUFFERS * n * width].view(BUFFERS, n, width)
        self.exact, self.dtype = exact, memory.dtype
        self.exps, self.factors = memory[:2], memory[2:5]
        self.log_ratio = memory[2]  # (n, W), log2 p - log2 q but for a constant in each row
        self.logs = memory[3:5]  # (2, n, W), logits over T less the row's largest, over ln(2)
        self.columns, self.padding = self.logs[:, :, :v], self.logs[:, :, v:]
        self.exp, self.log, self.log_columns = (x.unbind() for x in (self.exps, self.logs, self.columns))
        self.spare = memory[5:].unbind()  # (n, W)
        self.from_m = memory[6:]  # (2, n, W), the last two of `spare`
        self.exp_pieces = self.exps.view(2, -1, PIECE).transpose(0, 1)
        self.exp_columns, self.spare_columns = ([x[:, :v] for x in buffers] for buffers in (self.exp, self.spare))
        setting: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        precise = self.dtype == torch.float64 or setting.fp32_precision in ("none", "ieee")
        self.by_matrix_product = memory.device.type == "cpu" and precise  # TF32 and bf16 are not

    def fill(self, *logits: Tensor, temperature: float, careful: bool) -> bool:
        """From both models' logits, (n, V). False if that must be done again: carefully, and without -inf in them."""
        scale = LOG2_E / temperature
        top = torch.stack([x.amax(-1, keepdim=True) for x in logits])
        self.offsets = torch.zeros_like(top) if careful else top * -scale
        for i, (x, log) in enumerate(zip(logits, self.log_columns, strict=True)):
            if careful:
                torch.sub(x, top[i], out=log).mul_(scale)
            else:  # one pass less, but the largest becomes the rounding of its offset
                torch.add(self.offsets[i], x, alpha=scale, out=log)
        self.padding.fill_(FLOOR)  # a JSD has written there
        torch.exp2(self.logs, out=self.exps)
        torch.sub(self.log[1], self.log[0], out=self.log_ratio)
        self.sums = _sum(self.exps, self.exact).unsqueeze(2)
        self.inverses = self.sums.reciprocal().to(self.dtype)
        self.products = self.multiply(self.factors, ((0, 0), (1, 0), (0, 1), (1, 2)))
        # Else 0 * log 0 was among them, or logits are so large that their offset's rounding matters.
        return careful or bool(math.isfinite(self.products.sum()) and self.offsets.norm(math.inf) < LARGE)

    def multiply(self, factors: Tensor, wanted: Sequence[tuple[int, int]]) -> Tensor:
        """(n, 2, j): ln(2) times inner products of the rows of `exps` and factors, (j, n, W); at least those wanted."""
        n, j = factors.shape[1], len(factors)
        if self.by_matrix_product:
            pieces = torch.bmm(self.exp_pieces, factors.view(j, -1, PIECE).permute(1, 2, 0))
            products = pieces.view(n, -1, 2, j).sum(1, dtype=self.exact)
        else:
            products = factors.new_zeros(n, 2, j, dtype=self.exact)
            for model, factor in wanted:
                product = torch.mul(self.exp[model], factors[factor], out=self.spare[0])
                products[:, model, factor] = _sum(product, self.exact)
        return products.mul_(LN2)

    def common_top(self) -> Tensor:
        """(n,) the largest product of a token's `exps`: 1, but for rounding, where one is the most probable of both."""
        return torch.mul(*self.exp, out=self.spare[0]).amax(-1)


def _divergence(
    objective: Objective,
    block: Block,
    q: int,  # index of the learner; the other one is p
    scale: Tensor,  # (n, 1)
    out: Tensor | None,  # (n, V): written, scale times the gradient with respect to T * logits of the learner
    last: bool,  # the block's `logs` may be overwritten: on a CPU, writing where one reads is the faster
) -> Tensor | None:
    """Value (n,); None for the two KLs, which `block.products` gives."""
    p, a, dtype = 1 - q, objective.a, block.dtype

    def centred(log_ratio: Tensor, mean: Tensor, factor: float, spare: Tensor) -> None:
        """out = scale * factor * q * (ln(2) * log_ratio - mean): a row's constants cancel, and their rounding, too."""
        if out is not None:
            torch.sub(log_ratio, (mean * LOG2_E).to(dtype), out=spare).mul_(block.exp[q])
            torch.mul(spare[:, : out.shape[1]], scale * block.inverses[q] * (factor * LN2), out=out)

    if objective.divergence == "forward_kl":
        if out is not None:
            torch.mul(block.exp[q], scale * block.inverses[q], out=block.spare[0])
            torch.addcmul(block.spare_columns[0], block.exp_columns[p], scale * block.inverses[p], value=-1, out=out)
        return None
    if objective.divergence == "reverse_kl":
        centred(block.log_ratio, block.products[:, q, :1] / block.sums[q], 2 * q - 1, block.spare[0])
        return None
    if objective.divergence == "jsd":
        # The mixture (1 - a) q + a p, times a total near either's sum, so that the logarithms' differences stay small.
        weights = torch.stack(((1 - a) / block.sums[q], a / block.sums[p]))
        weights = (weights / weights.sum(0)).to(dtype)
        total = weights[0] * block.sums[q] + weights[1] * block.sums[p]
        log_m = torch.mul(block.exp[q], weights[0], out=block.spare[0]).addcmul_(block.exp[p], weights[1])
        from_m = torch.sub(block.logs, log_m.clamp_min_(TINY).log2_(), out=block.logs if last else block.from_m)
        products = block.multiply(from_m, ((0, 0), (1, 1)))
        means = [products[:, i, i : i + 1] / block.sums[i] for i in (0, 1)]
        centred(from_m[q], means[q], 1 - a, from_m[q])
        values = [weight * (means[i] + (total / block.sums[i]).log()) for i, weight in ((q, 1 - a), (p, a))]
        return (values[0] + values[1]).squeeze(1).clamp_min(0)
    log_q, log_p = (torch.add(-block.sums[i].log().to(dtype), block.log[i], alpha=LN2) for i in (q, p))
    # Exponentials of these, since the Bregman form wants them to agree.
    l, g = DIVERGENCES[objective.divergence].formula(log_q, log_p, prob := log_q.exp(), log_p.exp(), a, objective.b)
    if out is not None:
        g = torch.addcmul(g, prob, g.sum(-1, keepdim=True), value=-1)
        torch.mul(g[:, : out.shape[1]], scale, out=out)
    return _infinite(l.sum(-1)).clamp_min(0)


def _finish_gradient(
    side: Side,
    gradient: Tensor,  # (n, V) of the divergence, scaled; may be where it belongs
    rows: slice,
    scale: Tensor,  # (n, 1), of the cross-entropy
    logits: Tensor,  # (n, V) transformed
    q: Tensor,  # (n, V) at the loss's temperature, times a sum
    inverse: Tensor,  # (n, 1), of the sum
    target: Tensor | None,  # (n, 1)
    temperature: float,
) -> None:
    """Add the cross-entropy's gradient, go back through the softcap, and store."""
    assert side.gradient is not None and side.objective is not None
    if side.objective.ce_weight > 0:
        assert target is not None
        if temperature != 1.0:
            q, inverse = logits.softmax(-1), torch.ones_like(inverse)
        gradient.addcmul_(q, scale * inverse).scatter_add_(1, target, -scale)
    if side.softcap is not None:
        gradient.mul_(1 - (logits / side.softcap) ** 2)
    out = side.gradient[rows, : logits.shape[1]]
    if gradient.data_ptr() != out.data_ptr():
        out.copy_(gradient)


def torch_rows(
    student: Side,
    teacher: Side,
    labels: Tensor | None,  # (n,) int64, negative: ignored
    row_scales: Tensor,  # (n, 2): factor of each side's gradient
    losses: Tensor,  # (n, 2): written
    statistics: Tensor,  # (n, len(STATISTICS)): written
    *,
    vocab_size: int,
    temperature: float,
    teacher_share: float = 1.0,
) -> None:
    """Fill losses, statistics and both gradients of n rows, in the dtype of `losses`; zeros for ignored rows."""
    n, v, dtype, on_cpu = len(losses), vocab_size, losses.dtype, losses.device.type == "cpu"
    exact = torch.float64 if on_cpu else dtype
    width = -(-v // PIECE) * PIECE
    step = min(n, block_rows(width, losses.device))
    memory = losses.new_empty(BUFFERS * step * width)
    block = Block(memory, step, v, width, exact)
    targets = None if labels is None else labels.clamp_min(0).unsqueeze(1).expand(2, n, 1)
    ignored = None if labels is None else (labels < 0).unsqueeze(1)
    if ignored is not None and on_cpu and not ignored.any():
        ignored = None
    row_scales = row_scales.to(dtype) if ignored is None else row_scales.to(dtype).masked_fill(ignored, 0)
    scales: list[tuple[Tensor, Tensor]] = []  # (n, 1) of each side's divergence, and of its cross-entropy
    for i, side in enumerate((student, teacher)):
        weight, ce_weight = (side.objective.weight, side.objective.ce_weight) if side.objective else (0.0, 0.0)
        scale = row_scales[:, i : i + 1] * side.logit_scale
        scales.append((scale * (weight * temperature), scale * ce_weight))

    found: list[tuple[Tensor, ...]] = []
    nlls: list[Tensor] = []
    values: tuple[list[Tensor], list[Tensor]] = ([], [])
    careful = not on_cpu  # where looking whether it is needed would synchronise
    last = 0 if teacher.objective is None else 1  # of the sides that learn
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        if rows.stop - start < step:
            block = Block(memory, rows.stop - start, v, width, exact)
        mask = None if ignored is None else ignored[rows]
        while True:
            z, u = (_logits(side, rows, v, dtype, mask) for side in (student, teacher))
            if careful:
                z, u = z.clamp_min(FLOOR), u.clamp_min(FLOOR)
            if teacher_share != 1.0:
                u = torch.lerp(z, u, teacher_share)
            if block.fill(z, u, temperature=temperature, careful=careful):
                break
            careful = True  # later blocks are likely to want it, too
        found.append((block.sums, block.offsets, block.products, block.common_top()))
        if targets is not None:
            target = targets[:, rows]
            if temperature == 1.0:
                nlls.append(block.columns.gather(2, target))  # a logit: the rest follows below
            else:
                nlls.append(torch.stack([x.logsumexp(-1, keepdim=True) - x.gather(1, target[0]) for x in (z, u)]))
        for i, (side, x) in enumerate(((student, z), (teacher, u))):
            objective, out = side.objective, None
            if objective is None:
                continue
            scale, ce_scale = (of_all[rows] for of_all in scales[i])
            if side.gradient is not None:
                direct = side.gradient.dtype == dtype and temperature == 1.0  # else the logits are needed to the end
                out = side.gradient[rows, :v] if direct else block.spare_columns[1]
            value = _divergence(objective, block, i, scale, out, i == last)
            if value is not None:
                values[i].append(value)
            if out is not None:
                q, inverse, label = block.exp_columns[i], block.inverses[i], None if targets is None else target[0]
                _finish_gradient(side, out, rows, ce_scale, x, q, inverse, label, temperature)

    columns = zip(zip(*found, strict=True), (1, 1, 0, 0), strict=True)
    sums, offsets, products, common_top = (torch.cat(x, dim) for x, dim in columns)
    sums, offsets = sums.squeeze(2), offsets.squeeze(2)
    # The largest of a row's `exps` is 1 but for the rounding of its offset, which is less than `LARGE`.
    top = common_top >= 1 - torch.finfo(dtype).eps * (4 + offsets.abs().sum(0))
    log_sums = sums.log()
    nll = torch.zeros_like(log_sums) if targets is None else torch.cat(nlls, 1).squeeze(2)
    if targets is not None and temperature == 1.0:
        nll = (log_sums - LN2 * nll).clamp_min(0)
    from_q, from_p = products[:, 0, 0] / sums[0], products[:, 1, 0] / sums[1]  # means of log p - log q + shift
    # The log of a mean lies between these, whatever rounding says, and so neither KL is negative.
    shift = (sums[1] / sums[0]).log().maximum(from_q).minimum(from_p)
    kls = _infinite((from_p - shift).clamp_min(0)), _infinite((shift - from_q).clamp_min(0))
    entropies = ((log_sums[i] - products[:, i, 1 + i] / sums[i]).clamp_min(0) for i in (0, 1))
    statistics[:] = torch.stack((*kls, *entropies, *nll, top), 1)
    for i, side in enumerate((student, teacher)):
        if side.objective is None:
            losses[:, i] = 0
            continue
        value = {"forward_kl": kls[i], "reverse_kl": kls[1 - i]}.get(side.objective.divergence)
        if value is None:
            value = torch.cat(values[i])
        losses[:, i] = side.objective.loss(value, nll[i], temperature)
    if ignored is not None:
        losses.masked_fill_(ignored, 0)
        statistics.masked_fill_(ignored, 0)
