"""The row contract in plain PyTorch: the CPU path, and devices without Triton.

The chunk's logits are worked off a few rows at a time, so that every pass finds them in a CPU's cache. Passes are what
costs there, one as much as another whatever it computes, and each has a fixed cost beside that of its size. So no row
is divided by its sum, differences of logits stand for those of log-probabilities, one pass serves both sides where it
can, and the inner products of a block are one batched matrix product.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from okd_kernels.divergences import DIVERGENCES, TINY, Objective
from okd_kernels.rows import FLOOR, INFINITE, Side

BLOCK_ELEMENTS = 600_000  # logits of one side that are worked on together: 2.4 MB in fp32
ACCELERATOR_BLOCK_ELEMENTS = 1 << 24  # elsewhere than on a CPU: few launches, and 64 MiB for each temporary
MEMORY = 8  # buffers of a block
PIECE = 1024  # columns that are summed in the logits' dtype; sums of pieces are added in fp64


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
    """The same, and never -inf."""
    x = _logits(side, rows, v, dtype, ignored)
    # Reading the minimum is cheaper than clamping; on an accelerator it would synchronise.
    if x.device.type != "cpu" or not x.amin() >= FLOOR:  # a NaN in one row must not leave -inf in another
        x = x.clamp_min(FLOOR)
    return x


def _infinite(value: Tensor) -> Tensor:
    return torch.where(value > INFINITE, torch.inf, value)


def _sum(x: Tensor, exact: torch.dtype) -> Tensor:
    """Sums (...) of (..., W), right to 1e-8 of the terms' sizes."""
    return x.unflatten(-1, (-1, PIECE)).sum(-1).sum(-1, dtype=exact)


def _dots(a: Tensor, b: Tensor, exact: torch.dtype) -> Tensor:
    """Inner products (n, i, j) of each row of a, (i, n, W), with each of b, (j, n, W)."""
    if a.device.type != "cpu" or torch.get_float32_matmul_precision() != "highest":  # TF32 or bf16 might do it
        return _sum(a.transpose(0, 1).unsqueeze(2) * b.transpose(0, 1).unsqueeze(1), exact)
    (i, n, w), j = a.shape, len(b)
    a, b = a.view(i, n * w // PIECE, PIECE), b.view(j, n * w // PIECE, PIECE)
    return torch.bmm(a.transpose(0, 1), b.permute(1, 2, 0)).view(n, -1, i, j).sum(1, dtype=exact)


def _row_dots(a: Tensor, b: Tensor, exact: torch.dtype) -> Tensor:
    """Inner products (...) of the rows of (..., W), each with its own."""
    return _dots(a.flatten(0, -2)[None], b.flatten(0, -2)[None], exact).view(a.shape[:-1])


class Block:
    """Two softmaxes of n rows, the student's and the teacher's, in buffers that serve one block after the other.

    The probabilities are exps / sums, their logarithms logs - ln(sums). W is V and padding of probability 0 up to a
    multiple of PIECE. All views are made once: made for each block, they would cost as much as a pass.
    """

    sums: Tensor  # (2, n, 1), of `exps`
    inverses: Tensor  # (2, n, 1), of `sums`, in the dtype of `exps`
    dots: Tensor  # (n, 2, 3), inner products of `exps` with (log_ratio, logs)

    def __init__(self, memory: Tensor, n: int, v: int, exact: torch.dtype):
        width = -(-v // PIECE) * PIECE
        memory = memory[: MEMORY * n * width].view(MEMORY, n, width)
        self.exact, self.dtype = exact, memory.dtype
        self.exps, self.factors = memory[:2], memory[2:5]
        self.log_ratio, *logs = self.factors.unbind()  # (n, W), log p - log q but for a constant in each row
        self.logs = memory[3:5]  # (2, n, W), logits over T less the row's largest
        self.exp, self.log = self.exps.unbind(), logs  # (n, W)
        self.padding = self.logs[:, :, v:]
        self.from_m = memory[6:]  # (2, n, W)
        self.spare = memory[5:].unbind()  # (n, W)
        self.exp_columns, self.log_columns, self.spare_columns = (
            [x[:, :v] for x in buffers] for buffers in (self.exp, self.log, self.spare)
        )

    def fill(self, *logits: Tensor) -> None:
        """From both models' logits over T, (n, V)."""
        for x, log in zip(logits, self.log_columns, strict=True):
            torch.sub(x, x.amax(-1, keepdim=True), out=log)
        if self.padding.numel():
            self.padding.fill_(FLOOR)  # a JSD has written there
        torch.exp(self.logs, out=self.exps)
        torch.sub(self.log[1], self.log[0], out=self.log_ratio)
        self.sums = _sum(self.exps, self.exact).unsqueeze(2)
        self.dots = _dots(self.exps, self.factors, self.exact)

    def same_top(self) -> Tensor:
        """(n,) 1 where one token is the most probable of both, else less."""
        return torch.mul(*self.exp, out=self.spare[0]).amax(-1)


def _divergence(
    objective: Objective,
    block: Block,
    q: int,  # index of the learner; the other one is p
    scale: Tensor,  # (n, 1)
    out: Tensor | None,  # (n, V): written, scale times the gradient with respect to T * logits of the learner
    last: bool,  # the block's `logs` may be overwritten: on a CPU, writing where one reads is the faster
) -> Tensor | None:
    """Value (n,); None for the two KLs, which `block.dots` gives."""
    p, a, dtype = 1 - q, objective.a, block.dtype

    def centred(log_ratio: Tensor, mean: Tensor, factor: float, spare: Tensor) -> None:
        """out = scale * factor * q * (log_ratio - its mean): constants of a row cancel, and so does their rounding."""
        if out is not None:
            torch.sub(log_ratio, mean.to(dtype), out=spare).mul_(block.exp[q])
            torch.mul(spare[:, : out.shape[1]], scale * block.inverses[q] * factor, out=out)

    if objective.divergence == "forward_kl":
        if out is not None:
            torch.mul(block.exp[q], scale * block.inverses[q], out=block.spare[0])
            torch.addcmul(block.spare_columns[0], block.exp_columns[p], scale * block.inverses[p], value=-1, out=out)
        return None
    if objective.divergence == "reverse_kl":
        centred(block.log_ratio, block.dots[:, q, :1] / block.sums[q], 2 * q - 1, block.spare[0])
        return None
    if objective.divergence == "jsd":
        # The mixture (1 - a) q + a p, times `total`, which differs as little from either's sum as they do.
        parts = (1 - a) / block.sums[q], a / block.sums[p]
        total = 1 / (parts[0] + parts[1])
        log_m = torch.lerp(block.exp[q], block.exp[p], (parts[1] * total).to(dtype), out=block.spare[0])
        from_m = torch.sub(block.logs, log_m.clamp_min_(TINY).log_(), out=block.logs if last else block.from_m)
        means = _row_dots(block.exps, from_m, block.exact).unsqueeze(2) / block.sums
        centred(from_m[q], means[q], 1 - a, from_m[q])
        means += (total / block.sums).log()
        return ((1 - a) * means[q] + a * means[p]).squeeze(1).clamp_min(0)
    log_q, log_p = (block.log[i] - block.sums[i].log().to(dtype) for i in (q, p))
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
    step = min(n, block_rows(v, losses.device))
    memory = losses.new_empty(MEMORY * step * -(-v // PIECE) * PIECE)
    block = Block(memory, step, v, exact)
    targets = None if labels is None else labels.clamp_min(0).unsqueeze(1).expand(2, n, 1)
    ignored = None if labels is None else (labels < 0).unsqueeze(1)
    if ignored is not None and on_cpu and not ignored.any():
        ignored = None
    scales = row_scales.to(dtype) if ignored is None else row_scales.to(dtype).masked_fill(ignored, 0)

    found: list[tuple[Tensor, ...]] = []
    nlls: list[Tensor] = []
    values: tuple[list[Tensor], list[Tensor]] = ([], [])
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        if rows.stop - start < step:
            block = Block(memory, rows.stop - start, v, exact)
        mask = None if ignored is None else ignored[rows]
        for floored in (not on_cpu, True):
            z, u = (_logits(side, rows, v, dtype, mask) for side in (student, teacher))
            if floored:
                z, u = z.clamp_min(FLOOR), u.clamp_min(FLOOR)
            if teacher_share != 1.0:
                u = torch.lerp(z, u, teacher_share)
            block.fill(*((z, u) if temperature == 1.0 else (z / temperature, u / temperature)))
            if floored or math.isfinite(block.dots.sum()):  # with log 0 it is not: 0 * log 0
                break
        block.inverses = block.sums.reciprocal().to(dtype)
        found.append((block.sums, block.dots, block.same_top()))
        if targets is not None:
            target = targets[:, rows]
            if temperature == 1.0:
                nlls.append(-block.logs.gather(2, target))  # ln(sum) is added below
            else:
                nlls.append(torch.stack([x.logsumexp(-1, keepdim=True) - x.gather(1, target[0]) for x in (z, u)]))
        for i, (side, x) in enumerate(((student, z), (teacher, u))):
            objective, out = side.objective, None
            if objective is None:
                continue
            scale = scales[rows, i : i + 1] * side.logit_scale
            if side.gradient is not None:
                direct = side.gradient.dtype == dtype and temperature == 1.0  # else the logits are needed to the end
                out = side.gradient[rows, :v] if direct else block.spare_columns[1]
            last = i == 1 or teacher.objective is None
            value = _divergence(objective, block, i, scale * (objective.weight * temperature), out, last)
            if value is not None:
                values[i].append(value)
            if out is not None:
                q, inverse, label = block.exp_columns[i], block.inverses[i], None if targets is None else target[0]
                _finish_gradient(side, out, rows, scale * objective.ce_weight, x, q, inverse, label, temperature)

    sums, dots, top = (torch.cat(x, dim) for x, dim in zip(zip(*found, strict=True), (1, 0, 0), strict=True))
    sums = sums.squeeze(2)
    log_sums = sums.log()
    nll = torch.zeros_like(log_sums) if targets is None else torch.cat(nlls, 1).squeeze(2)
    if targets is not None and temperature == 1.0:
        nll = nll + log_sums
    from_q, from_p = dots[:, 0, 0] / sums[0], dots[:, 1, 0] / sums[1]  # means of log p - log q + shift
    # The log of a mean lies between these, whatever rounding says, and so neither KL is negative.
    shift = (log_sums[1] - log_sums[0]).maximum(from_q).minimum(from_p)
    kls = _infinite((from_p - shift).clamp_min(0)), _infinite((shift - from_q).clamp_min(0))
    entropies = (log_sums[i] - dots[:, i, 1 + i] / sums[i] for i in (0, 1))
    statistics[:] = torch.stack((*kls, *entropies, *nll, top == 1), 1)
    for i, side in enumerate((student, teacher)):
        if side.objective is None:
            losses[:, i] = 0
            continue
        value = {"forward_kl": kls[i], "reverse_kl": kls[1 - i]}.get(side.objective.divergence)
        if value is None:
            value = torch.cat(values[i])
        losses[:, i] = side.objective.weight * temperature**2 * value + side.objective.ce_weight * nll[i]
    if ignored is not None:
        losses.masked_fill_(ignored, 0)
        statistics.masked_fill_(ignored, 0)
