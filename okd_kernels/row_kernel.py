"""Two rows of logits -> two losses, two gradients written in place, row statistics: the Triton kernel and its launcher.

One program owns one token: a row of student logits and a row of teacher logits. The divergences are inlined into it (a
`@triton.jit` function may be a `tl.constexpr`), so this file knows none of them.

    pass 1  online max and sum of both rows (and the divergence itself where its slope sum needs it)
    pass 2  sum of the slopes; skipped where `Divergence.slope_sum` is known: forward KL, reverse KL, cross-entropy
    pass 3  losses, statistics, gradients

Shapes: n rows of this chunk, V vocabulary. Strides count elements.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from okd_kernels.divergences import DIVERGENCES, Objective, exp
from okd_kernels.rows import FLOOR, INFINITE, STATISTICS, Side

_FLOOR = tl.constexpr(FLOOR)
_INFINITE = tl.constexpr(INFINITE)
_LOG2_E = tl.constexpr(math.log2(math.e))


class Launch(NamedTuple):
    """How a row is worked on. Fixed rather than tuned at run time: a trial would overwrite the logits, and synchronise.

    Given 96 registers a thread, ptxas spills in no case and two to four rows share a multiprocessor; left to itself it
    squeezes some cases further and spills a little. `benchmarks.tune` times `LAUNCHES` on a GPU.
    """

    block: int = 2048  # columns at a time
    warps: int = 8
    registers: int = 96  # that a thread may take; CUDA only

    def options(self, is_cuda: bool) -> dict[str, int]:
        return {"num_warps": self.warps, **({"maxnreg": self.registers} if is_cuda else {})}


LAUNCH = Launch()
LAUNCHES = (
    LAUNCH,
    *(Launch(2048, 8, registers) for registers in (80, 128)),
    *(Launch(block, warps, 128) for block, warps in ((1024, 4), (2048, 4), (4096, 8), (4096, 16))),
)


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
def _gradient(g, slope_sum, q, q_at_1, factor, ce_factor, is_label, HAS_CE: tl.constexpr):
    """d(loss)/d(logit): `factor` times the divergence's, `ce_factor` times the CE's."""
    gradient = factor * (g - q * slope_sum)
    if HAS_CE:
        gradient += ce_factor * (q_at_1 - is_label)
    return gradient


# The per-token pointers move with the chunk: a kernel for each alignment would be compiled anew.
@triton.jit(do_not_specialize_on_alignment=["labels_ptr", "row_scales_ptr", "losses_ptr", "statistics_ptr"])
def _row_kernel(
    z_ptr, u_ptr,  # (n, V) logits of student and teacher; any float dtype
    dz_ptr, du_ptr,  # (n, V) gradients; may lie over the logits
    z_bias_ptr, u_bias_ptr,  # (V,)
    labels_ptr,  # (n,) int64, negative: ignored
    row_scales_ptr,  # (n, 2) fp32, factor of each side's gradient
    losses_ptr, statistics_ptr,  # (n, 2), (n, STATISTICS) fp32
    z_stride, u_stride, dz_stride, du_stride,
    z_loadable, u_loadable, dz_storable, du_storable,  # columns of a row that exist in memory, padding included
    v,
    temperature,
    teacher_share,  # of the student's target; the rest are its own logits
    z_scale, z_softcap, u_scale, u_softcap,
    s_weight, s_ce_weight, s_a, s_b,
    t_weight, t_ce_weight, t_a, t_b,
    S_RULE: tl.constexpr, T_RULE: tl.constexpr,  # T_RULE None: the teacher does not learn
    S_SLOPE_SUM: tl.constexpr, T_SLOPE_SUM: tl.constexpr,
    S_CE: tl.constexpr, T_CE: tl.constexpr,
    HAS_LABELS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_SHARE: tl.constexpr,
    Z_BIAS: tl.constexpr, U_BIAS: tl.constexpr, Z_SOFTCAP: tl.constexpr, U_SOFTCAP: tl.constexpr,
    DZ: tl.constexpr, DU: tl.constexpr,
    BLOCK: tl.constexpr, N_STATISTICS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # 64-bit: row * stride passes 2^31
    z_ptr += row * z_stride
    u_ptr += row * u_stride
    dz_ptr += row * dz_stride
    du_ptr += row * du_stride
    losses_ptr += row * 2
    statistics_ptr += row * N_STATISTICS
    columns = tl.arange(0, BLOCK)

    label = row * 0
    if HAS_LABELS:
        label = tl.load(labels_ptr + row)
    if label < 0:  # ignored: costs no exponential, leaves zeros
        zeros = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, v, BLOCK):
            if DZ:
                tl.store(
                    dz_ptr + start + columns, zeros.to(dz_ptr.dtype.element_ty), mask=start + columns < dz_storable
                )
            if DU:
                tl.store(
                    du_ptr + start + columns, zeros.to(du_ptr.dtype.element_ty), mask=start + columns < du_storable
                )
    else:
        inverse_temperature = 1.0 / temperature
        rate = _LOG2_E / temperature  # exp(x / T) is 2^(rate x)

        # pass 1: log-sum-exps. Running totals are vectors, reduced once at the end.
        z_max = _FLOOR + 0.0
        u_max = _FLOOR + 0.0
        z_total = tl.zeros([BLOCK // 4], dtype=tl.float32)
        u_total = tl.zeros([BLOCK // 4], dtype=tl.float32)
        z_total_1 = tl.zeros([BLOCK // 4], dtype=tl.float32)
        u_total_1 = tl.zeros([BLOCK // 4], dtype=tl.float32)
        s_value = tl.zeros([BLOCK // 4], dtype=tl.float32)  # sum of exp(z - max z) ((z - max z) - (u - max u))
        t_value = tl.zeros([BLOCK // 4], dtype=tl.float32)
        for start in range(0, v, BLOCK):
            offsets = start + columns
            z, _ = _load(z_ptr, z_bias_ptr, offsets, z_loadable, v, z_scale, z_softcap, Z_BIAS, Z_SOFTCAP)
            u, _ = _load(u_ptr, u_bias_ptr, offsets, u_loadable, v, u_scale, u_softcap, U_BIAS, U_SOFTCAP)
            if HAS_SHARE:
                u = z + teacher_share * (u - z)
            z_block_max, u_block_max = tl.split(tl.max(tl.join(z, u), axis=0))  # one reduction: half the barriers
            z_new = tl.maximum(z_max, z_block_max)
            u_new = tl.maximum(u_max, u_block_max)
            z_rise = z_new - z_max
            u_rise = u_new - u_max
            z -= z_new
            u -= u_new
            z_rescale = tl.exp2(-z_rise * rate)
            u_rescale = tl.exp2(-u_rise * rate)
            e_z = tl.exp2(z * rate)
            e_u = tl.exp2(u * rate)
            # Logits are taken from their own maximum, lest a constant between the models cost digits.
            if S_SLOPE_SUM == "value":
                s_value = z_rescale * (s_value + (u_rise - z_rise) * z_total) + _fold(e_z * (z - u))
            if T_SLOPE_SUM == "value":
                t_value = u_rescale * (t_value + (z_rise - u_rise) * u_total) + _fold(e_u * (u - z))
            z_total = z_total * z_rescale + _fold(e_z)
            u_total = u_total * u_rescale + _fold(e_u)
            if HAS_TEMPERATURE:  # the cross-entropies stay at temperature 1
                z_total_1 = z_total_1 * exp(-z_rise) + _fold(exp(z))
                u_total_1 = u_total_1 * exp(-u_rise) + _fold(exp(u))
            z_max = z_new
            u_max = u_new
        z_sum = tl.sum(z_total, axis=0)
        u_sum = tl.sum(u_total, axis=0)
        # The maximum is subtracted on its own: (z - max) / T - log sum keeps more digits than z / T - lse.
        z_log = tl.log(z_sum)
        u_log = tl.log(u_sum)
        z_log_1 = z_log
        u_log_1 = u_log
        if HAS_TEMPERATURE:
            z_log_1 = tl.log(tl.sum(z_total_1, axis=0))
            u_log_1 = tl.log(tl.sum(u_total_1, axis=0))
        s_slope_sum = z_log * 0.0
        t_slope_sum = u_log * 0.0
        if S_SLOPE_SUM == "value":
            s_slope_sum = tl.sum(s_value, axis=0) / (z_sum * temperature) - (z_log - u_log)
        if T_SLOPE_SUM == "value":
            t_slope_sum = tl.sum(t_value, axis=0) / (u_sum * temperature) - (u_log - z_log)

        # pass 2: slope sums that no statistic gives.
        if (S_SLOPE_SUM == "unknown") or (T_SLOPE_SUM == "unknown"):
            s_sums = tl.zeros([BLOCK // 4], dtype=tl.float32)
            t_sums = tl.zeros([BLOCK // 4], dtype=tl.float32)
            for start in range(0, v, BLOCK):
                offsets = start + columns
                z, _ = _load(z_ptr, z_bias_ptr, offsets, z_loadable, v, z_scale, z_softcap, Z_BIAS, Z_SOFTCAP)
                u, _ = _load(u_ptr, u_bias_ptr, offsets, u_loadable, v, u_scale, u_softcap, U_BIAS, U_SOFTCAP)
                if HAS_SHARE:
                    u = z + teacher_share * (u - z)
                log_q = (z - z_max) * inverse_temperature - z_log
                log_p = (u - u_max) * inverse_temperature - u_log
                q = exp(log_q)
                p = exp(log_p)
                if S_SLOPE_SUM == "unknown":
                    _, g = S_RULE(log_q, log_p, q, p, s_a, s_b)
                    s_sums += _fold(g)
                if T_SLOPE_SUM == "unknown":
                    _, g = T_RULE(log_p, log_q, p, q, t_a, t_b)
                    t_sums += _fold(g)
            s_slope_sum += tl.sum(s_sums, axis=0)
            t_slope_sum += tl.sum(t_sums, axis=0)

        # pass 3: losses, statistics, gradients.
        s_nll = z_log * 0.0
        t_nll = u_log * 0.0
        if HAS_LABELS:
            z_label, _ = _load(z_ptr, z_bias_ptr, label, z_loadable, v, z_scale, z_softcap, Z_BIAS, Z_SOFTCAP)
            u_label, _ = _load(u_ptr, u_bias_ptr, label, u_loadable, v, u_scale, u_softcap, U_BIAS, U_SOFTCAP)
            if HAS_SHARE:
                u_label = z_label + teacher_share * (u_label - z_label)
            # NaN for a label that is no token, which a GPU does not look for beforehand
            s_nll = tl.where(label < v, z_log_1 - (z_label - z_max), float("nan"))
            t_nll = tl.where(label < v, u_log_1 - (u_label - u_max), float("nan"))
        s_row_scale = tl.load(row_scales_ptr + row * 2)
        t_row_scale = tl.load(row_scales_ptr + row * 2 + 1)
        s_factor = s_row_scale * s_weight * temperature  # 1/T from the logits, T^2 on the loss
        t_factor = t_row_scale * t_weight * temperature
        s_ce_factor = s_row_scale * s_ce_weight
        t_ce_factor = t_row_scale * t_ce_weight
        s_losses = tl.zeros([BLOCK // 4], dtype=tl.float32)
        t_losses = tl.zeros([BLOCK // 4], dtype=tl.float32)
        forward = tl.zeros([BLOCK // 4], dtype=tl.float32)
        reverse = tl.zeros([BLOCK // 4], dtype=tl.float32)
        s_entropy = tl.zeros([BLOCK // 4], dtype=tl.float32)
        t_entropy = tl.zeros([BLOCK // 4], dtype=tl.float32)
        top = tl.full([BLOCK // 4], 2 * _FLOOR, dtype=tl.float32)  # 0 where both rows have their maximum in one place
        for start in range(0, v, BLOCK):
            offsets = start + columns
            z, z_slope = _load(z_ptr, z_bias_ptr, offsets, z_loadable, v, z_scale, z_softcap, Z_BIAS, Z_SOFTCAP)
            u, u_slope = _load(u_ptr, u_bias_ptr, offsets, u_loadable, v, u_scale, u_softcap, U_BIAS, U_SOFTCAP)
            if HAS_SHARE:
                u = z + teacher_share * (u - z)
            z -= z_max
            u -= u_max
            log_q = z * inverse_temperature - z_log
            log_p = u * inverse_temperature - u_log
            q = exp(log_q)
            p = exp(log_p)
            difference = log_p - log_q
            forward += _fold(p * difference - p + q)
            reverse += _fold(p - q - q * difference)
            s_entropy -= _fold(q * log_q)
            t_entropy -= _fold(p * log_p)
            top = tl.maximum(top, tl.max(tl.reshape(z + u, [BLOCK // 4, 4]), axis=1))
            q_at_1 = q
            p_at_1 = p
            is_label = tl.where(offsets == label, 1.0, 0.0)
            if DZ or DU:
                # A 16-bit gradient lies in the first half of its fp32 row: every warp must have read its logits
                # of this block before any warp writes.
                tl.debug_barrier()
            l, g = S_RULE(log_q, log_p, q, p, s_a, s_b)
            s_losses += _fold(l)
            if DZ:
                if HAS_TEMPERATURE and S_CE:
                    q_at_1 = exp(z - z_log_1)
                dz = _gradient(g, s_slope_sum, q, q_at_1, z_slope * s_factor, z_slope * s_ce_factor, is_label, S_CE)
                dz = tl.where(offsets < v, dz, 0.0)
                tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=offsets < dz_storable)
            if T_RULE is not None:
                l, g = T_RULE(log_p, log_q, p, q, t_a, t_b)
                t_losses += _fold(l)
                if DU:
                    if HAS_TEMPERATURE and T_CE:
                        p_at_1 = exp(u - u_log_1)
                    du = _gradient(g, t_slope_sum, p, p_at_1, u_slope * t_factor, u_slope * t_ce_factor, is_label, T_CE)
                    du = tl.where(offsets < v, du, 0.0)
                    tl.store(du_ptr + offsets, du.to(du_ptr.dtype.element_ty), mask=offsets < du_storable)

        forward_kl = tl.sum(forward, axis=0)
        reverse_kl = tl.sum(reverse, axis=0)
        s_loss = tl.sum(s_losses, axis=0)
        t_loss = tl.sum(t_losses, axis=0)
        infinity = float("inf")
        s_loss = tl.where(s_loss > _INFINITE, infinity, s_loss)
        t_loss = tl.where(t_loss > _INFINITE, infinity, t_loss)
        s_loss = tl.where(s_weight == 0, 0.0, s_weight * temperature * temperature * s_loss)  # 0, not 0 times infinity
        t_loss = tl.where(t_weight == 0, 0.0, t_weight * temperature * temperature * t_loss)
        tl.store(losses_ptr, s_loss + s_ce_weight * s_nll)
        tl.store(losses_ptr + 1, t_loss + t_ce_weight * t_nll)
        tl.store(statistics_ptr + 0, tl.where(forward_kl > _INFINITE, infinity, forward_kl))
        tl.store(statistics_ptr + 1, tl.where(reverse_kl > _INFINITE, infinity, reverse_kl))
        tl.store(statistics_ptr + 2, tl.sum(s_entropy, axis=0))
        tl.store(statistics_ptr + 3, tl.sum(t_entropy, axis=0))
        tl.store(statistics_ptr + 4, s_nll)
        tl.store(statistics_ptr + 5, t_nll)
        tl.store(statistics_ptr + 6, tl.where(tl.max(top, axis=0) == 0, 1.0, 0.0))


def _slope_sum(objective: Objective | None) -> str:
    return "zero" if objective is None else DIVERGENCES[objective.divergence].slope_sum or "unknown"


def constants(
    student: Side, teacher: Side, has_labels: bool, temperature: float, teacher_share: float = 1.0
) -> dict[str, object]:
    """The kernel's compile-time arguments for these two sides."""

    def rule(objective: Objective | None) -> object:
        return None if objective is None else DIVERGENCES[objective.divergence].rule

    def ce(objective: Objective | None) -> bool:
        return objective is not None and objective.ce_weight > 0

    return dict(
        S_RULE=rule(student.objective),
        T_RULE=rule(teacher.objective),
        S_SLOPE_SUM=_slope_sum(student.objective),
        T_SLOPE_SUM=_slope_sum(teacher.objective),
        S_CE=ce(student.objective),
        T_CE=ce(teacher.objective),
        HAS_LABELS=has_labels,
        HAS_TEMPERATURE=temperature != 1.0,
        HAS_SHARE=teacher_share != 1.0,
        Z_BIAS=student.bias is not None,
        U_BIAS=teacher.bias is not None,
        Z_SOFTCAP=student.softcap is not None,
        U_SOFTCAP=teacher.softcap is not None,
        DZ=student.gradient is not None,
        DU=teacher.gradient is not None,
        N_STATISTICS=len(STATISTICS),
    )


def _scalars(objective: Objective | None) -> tuple[float, float, float, float]:
    return (0.0,) * 4 if objective is None else (objective.weight, objective.ce_weight, objective.a, objective.b)


def triton_rows(
    student: Side,
    teacher: Side,
    labels: Tensor | None,  # (n,) int64, negative: ignored
    row_scales: Tensor,  # (n, 2) fp32: factor of each side's gradient
    losses: Tensor,  # (n, 2) fp32, zeroed: written
    statistics: Tensor,  # (n, len(STATISTICS)) fp32, zeroed: written
    *,
    vocab_size: int,
    temperature: float,
    teacher_share: float = 1.0,
    launch: Launch = LAUNCH,
) -> None:
    """Fill losses, statistics and both gradients of n rows. Ignored rows keep zeros. No host synchronisation."""
    z, u = student.logits, teacher.logits
    dz = z if student.gradient is None else student.gradient
    du = u if teacher.gradient is None else teacher.gradient
    with torch.cuda.device_of(z):
        _row_kernel[(z.shape[0],)](
            z,
            u,
            dz,
            du,
            z if student.bias is None else student.bias.contiguous(),
            u if teacher.bias is None else teacher.bias.contiguous(),
            row_scales if labels is None else labels,
            row_scales,
            losses,
            statistics,
            *(t.stride(0) for t in (z, u, dz, du)),
            *(t.shape[1] for t in (z, u, dz, du)),
            vocab_size,
            temperature,
            teacher_share,
            student.logit_scale,
            student.softcap or 1.0,
            teacher.logit_scale,
            teacher.softcap or 1.0,
            *_scalars(student.objective),
            *_scalars(teacher.objective),
            **constants(student, teacher, labels is not None, temperature, teacher_share),
            BLOCK=launch.block,
            **launch.options(torch.version.cuda is not None),
        )
