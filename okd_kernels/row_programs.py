"""The row passes in Triton: `statistics`, `slopes`, `emit`, one kernel each (`row_kernels` launches them).

One program owns one token: a row of student logits and a row of teacher logits. Student and teacher are one piece of
code that is called twice, the second time with its arguments swapped: either learns from the other. The divergences
are inlined (a `@triton.jit` function may be a `tl.constexpr`), so this file knows none of them.

The passes share ten numbers a row and no cache: the rows that a GPU has in flight exceed its last cache.

Shapes: n rows of this chunk, V vocabulary (of this rank). Strides count elements.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from okd_kernels.divergences import exp
from okd_kernels.rows import FLOOR, STATISTICS, VALUES

_FLOOR, _LOST = tl.constexpr(FLOOR), tl.constexpr(1e4)
_LOG_TINY = tl.constexpr(-103.0)  # fp32 has no probabilities below e^-103
_LOG2_E = tl.constexpr(math.log2(math.e))
_N_STATISTICS, _N_VALUES = tl.constexpr(len(STATISTICS)), tl.constexpr(len(VALUES))
PER_TOKEN = ["labels_ptr", "weights_ptr", "statistics_ptr", "slopes_ptr", "values_ptr"]  # they move with the chunk


@triton.jit
def _load(pointer, bias, offsets, loadable, v, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Logits after bias, scale and softcap, below `_FLOOR` outside the vocabulary; and their derivative."""
    x = tl.load(pointer + offsets, mask=offsets < loadable, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + offsets, mask=offsets < v, other=0.0).to(tl.float32)
    x *= scale
    slope = scale
    if HAS_SOFTCAP:
        e = exp(tl.abs(x) * (-2.0 / softcap))
        tanh = (1.0 - e) / (1.0 + e)
        slope = scale * (1.0 - tanh * tanh)
        x = tl.where(x < 0, -softcap * tanh, softcap * tanh)
    # NaN stays NaN: it must reach the loss, not become an improbable token.
    return tl.where(offsets < v, tl.maximum(x, _FLOOR, propagate_nan=tl.PropagateNan.ALL), 2 * _FLOOR), slope


@triton.jit
def _fold(x):
    """Sums of four neighbours, which one thread holds: running totals take a quarter of the registers."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 4, 4]), axis=1)


@triton.jit
def _highest(running, x):
    """Running maxima, folded likewise."""
    return tl.maximum(running, tl.max(tl.reshape(x, [x.shape[0] // 4, 4]), axis=1))


@triton.jit
def _grow(
    x, difference, rise, other_rise, total, total_at_1, cross, rate,
    HAS_TEMPERATURE: tl.constexpr, HAS_CROSS: tl.constexpr,
):  # fmt: skip
    """One side's running sums after a block of x, taken from a top that has risen; `difference` is u - z, so taken."""
    e = tl.exp2(x * rate)
    fall = tl.exp2(-rise * rate)
    if HAS_CROSS:
        cross = fall * (cross + other_rise * total) + _fold(e * difference)
    total = total * fall + _fold(e)
    if HAS_TEMPERATURE:  # the cross-entropies stay at temperature 1
        total_at_1 = total_at_1 * exp(-rise) + _fold(exp(x))
    return total, total_at_1, cross


@triton.jit
def _store_statistics(pointer, top, total, total_at_1, cross, label, HAS_TEMPERATURE: tl.constexpr):
    total = tl.sum(total, axis=0)
    tl.store(pointer, top)
    tl.store(pointer + 1, total)
    tl.store(pointer + 2, tl.sum(total_at_1, axis=0) if HAS_TEMPERATURE else total)
    tl.store(pointer + 3, tl.sum(cross, axis=0))
    tl.store(pointer + 4, label)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=PER_TOKEN)
def _statistics_kernel(
    z_ptr, u_ptr,  # (n, V) logits of student and teacher; any float dtype
    z_bias_ptr, u_bias_ptr,  # (V,)
    labels_ptr,  # (n,) int64 ids in the whole vocabulary, negative: ignored
    statistics_ptr,  # (2, n, STATISTICS) fp32, zeroed
    z_stride, u_stride,
    z_loadable, u_loadable,  # columns of a row that exist in memory, padding included
    n, v, first,  # first: id of column 0
    temperature,
    z_scale, z_softcap, u_scale, u_softcap,
    S_CROSS: tl.constexpr, T_CROSS: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    Z_BIAS: tl.constexpr, U_BIAS: tl.constexpr, Z_SOFTCAP: tl.constexpr, U_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # 64-bit: row * stride passes 2^31
    z_ptr, u_ptr = z_ptr + row * z_stride, u_ptr + row * u_stride
    label = tl.load(labels_ptr + row) if HAS_LABELS else row * 0
    if label >= 0:  # an ignored row costs no exponential
        rate = _LOG2_E / temperature  # exp(x / T) is 2^(rate x)
        z_top, u_top = _FLOOR + 0.0, _FLOOR + 0.0
        zeros = tl.zeros([BLOCK // 4], dtype=tl.float32)  # running totals are vectors, reduced once at the end
        z_total, z_total_1, z_cross = zeros, zeros, zeros
        u_total, u_total_1, u_cross = zeros, zeros, zeros
        for start in range(0, v, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            z, _ = _load(z_ptr, z_bias_ptr, offsets, z_loadable, v, z_scale, z_softcap, Z_BIAS, Z_SOFTCAP)
            u, _ = _load(u_ptr, u_bias_ptr, offsets, u_loadable, v, u_scale, u_softcap, U_BIAS, U_SOFTCAP)
            z_block_top, u_block_top = tl.split(tl.max(tl.join(z, u), axis=0))  # one reduction: half the barriers
            z_rise = tl.maximum(z_top, z_block_top) - z_top
            u_rise = tl.maximum(u_top, u_block_top) - u_top
            z_top = tl.maximum(z_top, z_block_top)
            u_top = tl.maximum(u_top, u_block_top)
            # Logits are taken from their own top, lest a constant between the models cost digits.
            z -= z_top
            u -= u_top
            shift = z_rise - u_rise
            z_total, z_total_1, z_cross = _grow(
                z, u - z, z_rise, shift, z_total, z_total_1, z_cross, rate, HAS_TEMPERATURE, S_CROSS
            )
            u_total, u_total_1, u_cross = _grow(
                u, u - z, u_rise, shift, u_total, u_total_1, u_cross, rate, HAS_TEMPERATURE, T_CROSS
            )
        z_label, u_label = z_top * 0.0, u_top * 0.0
        if HAS_LABELS:
            column = label - first
            if (column >= 0) & (column < v):
                z_label, _ = _load(z_ptr, z_bias_ptr, column, z_loadable, v, z_scale, z_softcap, Z_BIAS, Z_SOFTCAP)
                u_label, _ = _load(u_ptr, u_bias_ptr, column, u_loadable, v, u_scale, u_softcap, U_BIAS, U_SOFTCAP)
        z_out = statistics_ptr + row * _N_STATISTICS
        u_out = z_out + n.to(tl.int64) * _N_STATISTICS
        _store_statistics(z_out, z_top, z_total, z_total_1, z_cross / temperature, z_label, HAS_TEMPERATURE)
        _store_statistics(u_out, u_top, u_total, u_total_1, u_cross / temperature, u_label, HAS_TEMPERATURE)


@triton.jit
def _read(pointer):
    """Top, log-sums at T and 1, and mean of (u - z) / T from the tops, of one side of a row."""
    total = tl.load(pointer + 1)
    return tl.load(pointer), tl.log(total), tl.log(tl.load(pointer + 2)), tl.load(pointer + 3) / total


@triton.jit
def _log_distribution(x, top, log_sum, inverse_temperature):
    """Logits from their top, and log-probabilities. The top is subtracted on its own: (x - top) / T - log sum keeps
    more digits than x / T - lse."""
    x -= top
    return x, x * inverse_temperature - log_sum


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=PER_TOKEN)
def _slopes_kernel(
    z_ptr, u_ptr, z_bias_ptr, u_bias_ptr, labels_ptr,  # as above
    statistics_ptr,  # (2, n, STATISTICS), of whole rows
    slopes_ptr,  # (n, 2), zeroed
    z_stride, u_stride, z_loadable, u_loadable, n, v,
    temperature, z_scale, z_softcap, u_scale, u_softcap,
    s_alpha, s_beta, t_alpha, t_beta,
    S_RULE: tl.constexpr, T_RULE: tl.constexpr,
    S_SLOPE_SUM: tl.constexpr, T_SLOPE_SUM: tl.constexpr,  # "unknown": this side needs it
    HAS_LABELS: tl.constexpr,
    Z_BIAS: tl.constexpr, U_BIAS: tl.constexpr, Z_SOFTCAP: tl.constexpr, U_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr, u_ptr = z_ptr + row * z_stride, u_ptr + row * u_stride
    label = tl.load(labels_ptr + row) if HAS_LABELS else row * 0
    if label >= 0:
        statistics_ptr += row * _N_STATISTICS
        of_teacher = n.to(tl.int64) * _N_STATISTICS
        z_top, z_log, _z_log_1, _z_mean = _read(statistics_ptr)
        u_top, u_log, _u_log_1, _u_mean = _read(statistics_ptr + of_teacher)
        inverse_temperature = 1.0 / temperature
        zeros = tl.zeros([BLOCK // 4], dtype=tl.float32)
        s_sums, t_sums = zeros, zeros
        for start in range(0, v, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            z, _ = _load(z_ptr, z_bias_ptr, offsets, z_loadable, v, z_scale, z_softcap, Z_BIAS, Z_SOFTCAP)
            u, _ = _load(u_ptr, u_bias_ptr, offsets, u_loadable, v, u_scale, u_softcap, U_BIAS, U_SOFTCAP)
            _, log_q = _log_distribution(z, z_top, z_log, inverse_temperature)
            _, log_p = _log_distribution(u, u_top, u_log, inverse_temperature)
            q, p = exp(log_q), exp(log_p)
            if S_SLOPE_SUM == "unknown":
                _, g = S_RULE(log_q, log_p, q, p, s_alpha, s_beta)
                s_sums += _fold(g)
            if T_SLOPE_SUM == "unknown":
                _, g = T_RULE(log_p, log_q, p, q, t_alpha, t_beta)
                t_sums += _fold(g)
        tl.store(slopes_ptr + row * 2, tl.sum(s_sums, axis=0))
        tl.store(slopes_ptr + row * 2 + 1, tl.sum(t_sums, axis=0))


@triton.jit
def _slope_sum(pointer, mean, log_sum, other_log_sum, KIND: tl.constexpr):
    """mean: of log q - log p under q, but for the log-sums; q the learner."""
    if KIND == "unknown":
        return tl.load(pointer)
    if KIND == "value":
        return mean - log_sum + other_log_sum
    return log_sum * 0.0


@triton.jit
def _learn(
    value, log_q, log_p, q, p, x, log_sum_1, slope_sum,  # q: the learner, x its logits from their top
    factor, ce_factor, slope, is_label, alpha, beta,
    out_ptr, offsets, v, storable,
    RULE: tl.constexpr, VALUE: tl.constexpr, GRADIENT: tl.constexpr, CE: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
):  # fmt: skip
    """One side: the running value, but for the KLs, which are summed anyway; this block's gradient, stored."""
    l, g = RULE(log_q, log_p, q, p, alpha, beta)
    if GRADIENT:
        gradient = slope * factor * (g - q * slope_sum)
        if CE:
            q_at_1 = q
            if HAS_TEMPERATURE:
                q_at_1 = exp(x - log_sum_1)
            gradient += slope * ce_factor * (q_at_1 - is_label)
        gradient = tl.where(offsets < v, gradient, 0.0)
        tl.store(out_ptr + offsets, gradient.to(out_ptr.dtype.element_ty), mask=offsets < storable)
    return value + _fold(l) if VALUE else value


@triton.jit
def _store_values(
    pointer, s_value, t_value, forward, reverse, s_entropy, t_entropy, common, forward_lost, reverse_lost
):  # fmt: skip
    tl.store(pointer + 0, tl.sum(s_value, axis=0))
    tl.store(pointer + 1, tl.sum(t_value, axis=0))
    tl.store(pointer + 2, tl.sum(forward, axis=0))
    tl.store(pointer + 3, tl.sum(reverse, axis=0))
    tl.store(pointer + 4, tl.sum(s_entropy, axis=0))
    tl.store(pointer + 5, tl.sum(t_entropy, axis=0))
    tl.store(pointer + 6, tl.where(tl.max(common, axis=0) == 0, 1.0, 0.0))
    tl.store(pointer + 7, tl.where(tl.max(forward_lost, axis=0) > _LOST + _LOG_TINY, 1.0, 0.0))
    tl.store(pointer + 8, tl.where(tl.max(reverse_lost, axis=0) > _LOST + _LOG_TINY, 1.0, 0.0))


@triton.jit
def _clear(pointer, v, storable, WANTED: tl.constexpr, BLOCK: tl.constexpr):
    if WANTED:
        for start in range(0, v, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            tl.store(pointer + offsets, tl.zeros([BLOCK], dtype=pointer.dtype.element_ty), mask=offsets < storable)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=PER_TOKEN)
def _emit_kernel(
    z_ptr, u_ptr,
    dz_ptr, du_ptr,  # (n, V) gradients; may lie over the logits
    z_bias_ptr, u_bias_ptr, labels_ptr,
    weights_ptr,  # (n, 4) fp32, factors of the gradients: of each side's divergence, then of its cross-entropy
    statistics_ptr, slopes_ptr,  # of whole rows
    values_ptr,  # (n, VALUES) fp32, zeroed
    z_stride, u_stride, dz_stride, du_stride, z_loadable, u_loadable, dz_storable, du_storable,
    n, v, first, temperature, z_scale, z_softcap, u_scale, u_softcap,
    s_alpha, s_beta, t_alpha, t_beta,
    S_RULE: tl.constexpr, T_RULE: tl.constexpr,  # T_RULE None: the teacher does not learn
    S_SLOPE_SUM: tl.constexpr, T_SLOPE_SUM: tl.constexpr, S_VALUE: tl.constexpr, T_VALUE: tl.constexpr,
    S_CE: tl.constexpr, T_CE: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr,
    Z_BIAS: tl.constexpr, U_BIAS: tl.constexpr, Z_SOFTCAP: tl.constexpr, U_SOFTCAP: tl.constexpr,
    DZ: tl.constexpr, DU: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_ptr, u_ptr = z_ptr + row * z_stride, u_ptr + row * u_stride
    dz_ptr, du_ptr = dz_ptr + row * dz_stride, du_ptr + row * du_stride
    label = tl.load(labels_ptr + row) if HAS_LABELS else row * 0
    if label < 0:  # ignored: leaves zeros
        _clear(dz_ptr, v, dz_storable, DZ, BLOCK)
        _clear(du_ptr, v, du_storable, DU, BLOCK)
    else:
        statistics_ptr += row * _N_STATISTICS
        of_teacher = n.to(tl.int64) * _N_STATISTICS
        z_top, z_log, z_log_1, z_mean = _read(statistics_ptr)
        u_top, u_log, u_log_1, u_mean = _read(statistics_ptr + of_teacher)
        s_slope_sum = _slope_sum(slopes_ptr + row * 2, -z_mean, z_log, u_log, S_SLOPE_SUM)
        t_slope_sum = _slope_sum(slopes_ptr + row * 2 + 1, u_mean, u_log, z_log, T_SLOPE_SUM)
        inverse_temperature = 1.0 / temperature
        weights_ptr += row * 4
        s_factor, t_factor = tl.load(weights_ptr), tl.load(weights_ptr + 1)
        s_ce_factor, t_ce_factor = tl.load(weights_ptr + 2), tl.load(weights_ptr + 3)
        column = label - first
        zeros = tl.zeros([BLOCK // 4], dtype=tl.float32)
        s_value, t_value, forward, reverse, s_entropy, t_entropy = zeros, zeros, zeros, zeros, zeros, zeros
        # Mass that meets log 0: the other side's FLOOR / T counts _LOST, and no p > 0 takes as much off again. The
        # highest such sum costs two operations and no predicate, which would take more registers than there are.
        per_log_0 = temperature * (_LOST / _FLOOR)
        forward_lost, reverse_lost = zeros, zeros
        common = tl.full([BLOCK // 4], 2 * _FLOOR, dtype=tl.float32)  # 0 where both rows have their top in one place
        for start in range(0, v, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            z, z_slope = _load(z_ptr, z_bias_ptr, offsets, z_loadable, v, z_scale, z_softcap, Z_BIAS, Z_SOFTCAP)
            u, u_slope = _load(u_ptr, u_bias_ptr, offsets, u_loadable, v, u_scale, u_softcap, U_BIAS, U_SOFTCAP)
            z, log_q = _log_distribution(z, z_top, z_log, inverse_temperature)
            u, log_p = _log_distribution(u, u_top, u_log, inverse_temperature)
            q, p = exp(log_q), exp(log_p)
            difference = log_p - log_q
            forward += _fold(p * difference - p + q)
            reverse += _fold(p - q - q * difference)
            forward_lost = _highest(forward_lost, log_p + log_q * per_log_0)
            reverse_lost = _highest(reverse_lost, log_q + log_p * per_log_0)
            s_entropy -= _fold(q * log_q)
            t_entropy -= _fold(p * log_p)
            common = _highest(common, z + u)
            is_label = tl.where(offsets == column, 1.0, 0.0)
            if DZ or DU:
                # A 16-bit gradient lies in the first half of its fp32 row: every warp must have read its logits
                # of this block before any warp writes.
                tl.debug_barrier()
            s_value = _learn(
                s_value, log_q, log_p, q, p, z, z_log_1, s_slope_sum,
                s_factor, s_ce_factor, z_slope, is_label, s_alpha, s_beta,
                dz_ptr, offsets, v, dz_storable, S_RULE, S_VALUE, DZ, S_CE, HAS_TEMPERATURE,
            )  # fmt: skip
            if T_RULE is not None:
                t_value = _learn(
                    t_value, log_p, log_q, p, q, u, u_log_1, t_slope_sum,
                    t_factor, t_ce_factor, u_slope, is_label, t_alpha, t_beta,
                    du_ptr, offsets, v, du_storable, T_RULE, T_VALUE, DU, T_CE, HAS_TEMPERATURE,
                )  # fmt: skip
        _store_values(
            values_ptr + row * _N_VALUES, s_value, t_value, forward, reverse, s_entropy, t_entropy,
            common, forward_lost, reverse_lost,
        )  # fmt: skip
