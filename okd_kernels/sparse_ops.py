"""Rows, chunks and operators behind `sparse`: one model's logits against K target probabilities a row.

Shapes: N tokens, V vocabulary, D hidden size, r rank of a LoRA on the head, K target ids a row, c rows of a chunk, n
rows of it that are worked on together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from okd_kernels.arguments import resolve_backend
from okd_kernels.chunks import Model, backward, chunk_rows, project, row_stride
from okd_kernels.divergences import Objective
from okd_kernels.memory import workspace
from okd_kernels.ops import (
    BY_ROW,
    PER_SIDE,
    _finish,
    _sum_buffer,
    counted_rows,
    differentiate,
    empty_gradients,
    row_factors,
    wide,
)
from okd_kernels.rows import FLOOR, INFINITE, Side
from okd_kernels.torch_rows import _finish_gradient, _infinite, _transform, block_rows

SPARSE_STATISTICS = ("forward_kl", "student_nll", "target_mass", "student_mass")
ROUNDING = 8  # eps; a target's tail below this share of 1 - max p is rounding of the K log-probabilities


def _chunks(model: Model, vocab_size: int, rows_like: Tensor, workspace_bytes: int) -> Iterator[tuple[slice, Side]]:
    """Rows and logits of each chunk; the logits are half of the workspace, see `_blocks`."""
    n = len(rows_like)
    if n == 0:
        return
    chunk = chunk_rows(n, 2 * vocab_size * rows_like.element_size(), workspace_bytes)
    (buffer,) = workspace((chunk, row_stride(vocab_size)), like=rows_like)
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        yield rows, project(model, rows, buffer, vocab_size)


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Rows of a chunk to work on together: on a CPU what stays in cache (see `torch_rows`), elsewhere a quarter.

    The about four temporaries of a quarter take together what the chunk's logits take.
    """
    c, width = logits.shape
    step = block_rows(width, logits.device) if logits.device.type == "cpu" else -(-c // 4)
    for start in range(0, c, step):
        yield slice(start, min(start + step, c))


def _target_masses(log_p: Tensor, tail: str, divergence: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(p (n, K), p_tail (n,), what D leaves out of 1 = sum p + p_tail (n,), sum p as given (n,)).

    1 - sum p is taken as -expm1(log max p) - sum of the others: its error is eps of 1 - max p, not eps of 1.
    """
    info = torch.finfo(log_p.dtype)
    log_p = log_p.masked_fill(log_p < math.log(info.tiny), -torch.inf)
    p, top = log_p.exp(), log_p.argmax(-1, keepdim=True)
    off_top = -torch.expm1(log_p.gather(1, top).squeeze(1))
    rest, mass = off_top - p.scatter(1, top, 0).sum(-1), p.sum(-1)
    zero = torch.zeros_like(rest)
    if tail == "none":
        return p, zero, rest, mass
    if tail == "renormalize":
        empty = mass == 0
        return p / mass.masked_fill(empty, 1).unsqueeze(1), zero, empty.to(p.dtype), mass
    if divergence == "reverse_kl":
        return p, rest.clamp_min(info.eps), zero, mass
    # A student that excludes the whole tail would find a rounding error's worth of mass there infinitely bad.
    return p, torch.where(rest > ROUNDING * info.eps * off_top, rest, 0), zero, mass


def _bregman(a: Tensor, b: Tensor, log_ratio: Tensor) -> Tensor:
    """a log(a / b) - a + b >= 0, log_ratio = log(a / b); near 0 not as a difference of the two masses."""
    near = a * (torch.expm1(-log_ratio) + log_ratio)
    return torch.where(log_ratio.abs() < 0.5, near, a * log_ratio - a + b)


def _sparse_rows(
    side: Side,
    labels: Tensor | None,  # (c,) int64, negative: ignored
    ids: Tensor,  # (c, K)
    log_p: Tensor,  # (c, K)
    row_scales: Tensor,  # (c,): factor of each row's gradient
    losses: Tensor,  # (c,): written
    statistics: Tensor,  # (c, len(SPARSE_STATISTICS)): written
    rows: slice,
    *,
    tail: str,
    temperature: float,
    vocab_size: int,
) -> None:
    """Fill losses, statistics and gradient of a block of rows; zeros for ignored rows.

    Gradient with respect to T * logits, M = sum p + p_tail, D = sum q log(q / p):

        forward KL    q_v M - p_v on the ids      q_v M - p_tail q_v / q_tail off them
        reverse KL    q_v (log(q_v / p_v) - D)    q_v (log(q_tail / p_tail) - D)

    The exponentials of the tail are taken against the tail's own maximum: q_tail then has a logarithm however small it
    is, and its sum is a sum, not a difference of two masses near 1. The K ids are written into the row afterwards.
    """
    objective, dtype = side.objective, losses.dtype
    assert objective is not None
    target = None if labels is None else labels[rows].clamp_min(0).unsqueeze(1)
    ignored = None if labels is None else (labels[rows] < 0).unsqueeze(1)
    logits = _transform(side, rows, vocab_size, dtype, ignored)
    z = logits / temperature if temperature != 1.0 else logits
    log_p = log_p[rows] if ignored is None else log_p[rows].masked_fill(ignored, -torch.inf)
    p, p_tail, left_out, target_mass = _target_masses(log_p, tail, objective.divergence)

    ids = ids[rows].masked_fill(p == 0, 0)
    z_k = z.gather(1, ids)
    e = z.scatter(1, ids, 0.0).scatter_add_(1, ids, p)
    total = e.gather(1, ids)  # each id's whole mass: p itself unless ids repeat
    is_target = total > 0
    share = torch.where(is_target, p / total, 0)  # sums to 1 over an id's repetitions
    # From here on, writing into a row at `ids` writes one value wherever ids repeat: no atomics, no order.
    e.scatter_(1, ids, torch.where(is_target, -torch.inf, z_k))
    tail_top = e.amax(-1, keepdim=True).clamp_min(torch.finfo(dtype).min)  # finite, also where there is no tail
    e.sub_(tail_top).exp_()
    tail_sum = e.sum(-1)

    # Differences to the row's maximum: the log-sum-exp of large logits would bring their rounding into every log q.
    top = torch.maximum(tail_top, z_k.masked_fill(~is_target, -torch.inf).amax(-1, keepdim=True))
    z_k, shift = z_k - top, (tail_top - top).squeeze(1)
    log_tail, log_head = shift + tail_sum.log(), (z_k + share.log()).logsumexp(-1)
    lse = torch.logaddexp(log_tail, log_head)
    log_q, log_q_tail = z_k - lse.unsqueeze(1), (log_tail - lse).clamp_min(FLOOR)
    q, q_tail, unit = log_q.exp(), log_q_tail.exp(), (shift - lse).exp()  # unit: q of the tail's top
    p_tail = p_tail.masked_fill(tail_sum == 0, 0)

    log_ratio = torch.where(is_target, total, 1).log() - log_q
    tail_log_ratio = p_tail.clamp_min(torch.finfo(dtype).tiny).log() - log_q_tail
    forward = _bregman(p, share * q, log_ratio).sum(-1) + _bregman(p_tail, q_tail, tail_log_ratio)
    value = forward = _infinite(forward - left_out)
    mass = p.sum(-1) + p_tail
    if objective.divergence == "reverse_kl":
        value = _bregman(share * q, p, -log_ratio).sum(-1) + _bregman(q_tail, p_tail, -tail_log_ratio)
        mean = mass - 1 - value  # of log p - log q under q

    nll = torch.zeros_like(value)
    if target is not None:
        normal = lse + top.squeeze(1) if temperature == 1.0 else logits.logsumexp(-1)
        nll = normal - logits.gather(1, target).squeeze(1)
    losses[rows] = objective.loss(value, nll, temperature)
    statistics[rows] = torch.stack((forward, nll, target_mass, (log_head - lse).exp()), 1)

    if side.gradient is not None:
        row_scale = row_scales[rows].unsqueeze(1)
        if objective.divergence == "reverse_kl":
            in_tail = unit * (mean - tail_log_ratio)
            on_ids = q * (mean.unsqueeze(1) - log_ratio)
        else:  # q_v / q_tail is e / tail_sum, also where q_tail underflows
            in_tail = unit * mass - p_tail / tail_sum.clamp_min(1)
            on_ids = q * mass.unsqueeze(1) - total
        in_tail, unit = in_tail.unsqueeze(1), unit.unsqueeze(1)
        at_ids = e.gather(1, ids)
        gradient = (e * in_tail).scatter_(1, ids, torch.where(is_target, on_ids, at_ids * in_tail))
        q_row = e.mul_(unit).scatter_(1, ids, torch.where(is_target, q, at_ids * unit))
        if ignored is not None:
            row_scale = row_scale.masked_fill(ignored, 0)
        row_scale = row_scale * side.logit_scale
        gradient.mul_(row_scale * (objective.weight * temperature))
        scale, one = row_scale * objective.ce_weight, torch.ones_like(row_scale)
        _finish_gradient(side, gradient, rows, scale, logits, q_row, one, target, temperature)
    if ignored is not None:
        losses[rows] = losses[rows].masked_fill(ignored.squeeze(1), 0)
        statistics[rows] = statistics[rows].masked_fill(ignored, 0)


# --- operators ---------------------------------------------------------------------------------------------------


@torch.library.custom_op("okd_kernels::topk", mutates_args=())
def topk(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    low: Tensor | None,  # (N, r) a LoRA's scaled hidden @ A.T
    up: Tensor | None,  # (V, r) its B
    k: int,
    head_numbers: Sequence[float],  # logit scale and softcap (0: none)
    temperature: float,
    vocab_size: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (N, k), log-probabilities (N, k), log-sum-exps (N,)."""
    ids, log_probs, log_sum_exp = _topk_outputs(hidden, k)
    model = Model(hidden, weight, bias, low, up, head_numbers[0], head_numbers[1] or None, None, None)
    with torch.autocast(hidden.device.type, enabled=False):
        for rows, side in _chunks(model, vocab_size, log_sum_exp, workspace_bytes):
            for block in _blocks(side.logits):
                z = _transform(side, block, vocab_size, side.logits.dtype, None) / temperature
                values, at = z.topk(k)
                top = values[:, :1]
                # log1p of the others' sum: a probability near 1 keeps the digits of its distance to 1.
                log_sum = z.sub_(top).exp_().scatter_(1, at[:, :1], 0).sum(-1, keepdim=True).log1p()
                log_p = values - top - log_sum
                out = slice(rows.start + block.start, rows.start + block.stop)
                ids[out], log_sum_exp[out] = at, (top + log_sum).squeeze(1)
                log_probs[out] = log_p.masked_fill(log_p < -INFINITE, -torch.inf)
    return ids, log_probs, log_sum_exp


def _topk_outputs(hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = hidden.shape[0], wide(hidden.dtype)
    ids = hidden.new_empty(n, k, dtype=torch.int64)
    return ids, hidden.new_empty(n, k, dtype=dtype), hidden.new_empty(n, dtype=dtype)


@topk.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _topk_outputs(arguments[0], arguments[PER_SIDE])


@torch.library.custom_op("okd_kernels::sparse_distillation", mutates_args=())
def sparse_distillation(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    low: Tensor | None,  # (N, r) a LoRA's scaled hidden @ A.T
    up: Tensor | None,  # (V, r) its B
    labels: Tensor | None,  # (N,) int64, negative: ignored
    ids: Tensor,  # (N, K)
    log_p: Tensor,  # (N, K), fp32 or fp64
    row_weights: Tensor,  # (N,) weight of each token in the total
    scale: Tensor,  # () factor of the total: 1 / normalizer
    per_token: bool,  # gradients are made in backward, from the upstream of `losses`; otherwise from that of the total
    divergence: str,
    tail: str,
    weights: Sequence[float],  # of the divergence, of the cross-entropy
    head_numbers: Sequence[float],  # logit scale and softcap (0: none)
    temperature: float,
    vocab_size: int,
    workspace_bytes: int,
    needs: Sequence[bool],  # which of the first five want a gradient
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Total (), per-token losses (N,), statistics (N, 4), and the total's gradients of the first five arguments."""
    _, losses, statistics, *gradients = _outputs(hidden, weight, bias, low, up, per_token, needs)
    kept = counted_rows(labels)

    def compact(x: Tensor) -> Tensor:
        return x if kept is None else x[kept]

    operands = (compact(hidden), weight, bias, None if low is None else compact(low), up)
    buffers = [
        _sum_buffer(x, output, by_row=i in BY_ROW, compacted=kept is not None) if need and not per_token else None
        for i, (x, output, need) in enumerate(zip(operands, gradients, needs, strict=True))
    ]
    row_scales, sum_scale = row_factors(compact(row_weights), scale, hidden.dtype)
    objective = Objective(divergence, *weights)
    model = Model(*operands, head_numbers[0], head_numbers[1] or None, objective, sum_scale, *buffers)
    row_losses, row_statistics = compact(losses), compact(statistics)
    if len(row_losses):
        with torch.autocast(losses.device.type, enabled=False):
            _run_chunks(
                model,
                None if labels is None else compact(labels),
                compact(ids),
                compact(log_p),
                row_scales,
                row_losses,
                row_statistics,
                tail=tail,
                temperature=temperature,
                vocab_size=vocab_size,
                workspace_bytes=workspace_bytes,
            )
    if kept is not None:
        losses[kept], statistics[kept] = row_losses, row_statistics
    _finish(gradients, model, kept, vocab_size)
    return (losses * row_weights).sum() * scale, losses, statistics, *gradients  # type: ignore[return-value]


def _run_chunks(
    model: Model,
    labels: Tensor | None,  # (N,) int64, negative: ignored
    ids: Tensor,  # (N, K)
    log_p: Tensor,  # (N, K)
    row_scales: Tensor,  # (N,) factor of each row's gradient
    losses: Tensor,  # (N,): written
    statistics: Tensor,  # (N, len(SPARSE_STATISTICS)): written
    *,
    tail: str,
    temperature: float,
    vocab_size: int,
    workspace_bytes: int,
) -> None:
    """`chunks.run_chunks` with one model: N >= 1 tokens, no host synchronisation."""
    for rows, side in _chunks(model, vocab_size, losses, workspace_bytes):
        for block in _blocks(side.logits):
            _sparse_rows(
                side,
                None if labels is None else labels[rows],
                ids[rows],
                log_p[rows],
                row_scales[rows],
                losses[rows],
                statistics[rows],
                block,
                tail=tail,
                temperature=temperature,
                vocab_size=vocab_size,
            )
        if side.gradient is not None:
            backward(model, rows, side.gradient[:, :vocab_size], labels)


def _outputs(hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """Total, losses and statistics, zeroed, and the gradients; from the first five arguments, per_token, needs."""
    *operands, per_token, needs = (hidden, *others)
    losses = hidden.new_zeros(hidden.shape[0], dtype=wide(hidden.dtype))
    gradients = empty_gradients(operands, losses, [need and not per_token for need in needs])
    return losses.new_zeros(()), losses, losses.new_zeros(len(losses), len(SPARSE_STATISTICS)), *gradients


@sparse_distillation.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    return _outputs(*arguments[:PER_SIDE], arguments[PER_SIDE + 5], arguments[-1])


differentiate(
    sparse_distillation,
    1,
    PER_SIDE + 5,
    lambda upstream, _: resolve_backend("auto", upstream.device, upstream.dtype),
)
