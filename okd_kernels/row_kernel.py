"""Two rows of logits -> two losses, two gradients written over them, row statistics: the Triton kernel and its launcher.

A program owns a piece of a token's two rows, in one of the passes over them. The divergences are inlined into it (a
`@triton.jit` function may be a `tl.constexpr`), so this file knows none of them.

    pass 0   maxima and sums (and the divergence itself where its slope sum needs it)
    pass 1   sum of the slopes; there is none where `Divergence.slope_sum` is known: forward KL, reverse KL, CE
    last     losses, statistics, gradients

The programs of a row's next pass come a few hundred after those of the one before, so that they find its logits in the
GPU's L2 cache: memory is read once. Who finishes a pass of a row as the last of its programs adds up what all of them
have found, in the order of the pieces, and signals; the next pass waits for that. This needs programs to start in
order, as GPUs start them: a program waits for earlier ones only, so that the earliest never waits. Nothing is summed
by atomics: two runs are bitwise equal.

Shapes: n rows of this chunk, V vocabulary. Strides count elements.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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

    `benchmarks.tune` times `LAUNCHES` on a GPU.
    """

    block: int = 4096  # columns of a piece
    warps: int = 4
    registers: int | None = None  # that a thread may take; CUDA only
    apart: int = 768  # programs between two passes of a row: more than run at once, and their logits fit the L2

    def lag(self, n: int, pieces: int, passes: int) -> int:
        """Rows of n between two passes of one."""
        return min(n, -(-self.apart // (pieces * passes)))

    def options(self, is_cuda: bool) -> dict[str, int]:
        return {"num_warps": self.warps, **({"maxnreg": self.registers} if is_cuda and self.registers else {})}


LAUNCH = Launch()
LAUNCHES = tuple(
    Launch(*options, apart=apart)
    for options in ((4096, 4), (4096, 4, 168), (4096, 4, 128), (4096, 8), (2048, 4), (2048, 2), (2048, 2, 168), (8192, 8))
    for apart in (512, 768, 1280, 2048)
)


def lead_rows(n: int, vocab_size: int) -> int:
    """Rows by which 16-bit gradients lie before the fp32 logits that they overwrite; even.

    A gradient then takes the place of logits that were read long before, and its program does not wait for others.
    """
    return min(4 * LAUNCH.lag(n, triton.cdiv(vocab_size, LAUNCH.block), 2), n + n % 2)


@triton.jit
def _load(pointer, bias, offsets, loadable, v, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Logits after bias, scale and softcap, `_FLOOR` outside the vocabulary; and their derivative."""
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
    return tl.where(offsets < v, tl.maximum(x, _FLOOR, propagate_nan=tl.PropagateNan.ALL), _FLOOR), slope


@triton.jit
def _is_last(count_ptr, PIECES: tl.constexpr):
    """Whether this program is the last of a row's pass; what the others have stored is then there to be read."""
    tl.debug_barrier()
    return tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == PIECES - 1


@triton.jit
def _signal(count_ptr):
    """The row's pass is done, beyond its pieces: what they have found is added up."""
    tl.debug_barrier()
    tl.atomic_add(count_ptr, 1, sem="release", scope="gpu")


@triton.jit
def _infinite(x):
    return tl.where(x > _INFINITE, float("inf"), x)


@triton.jit
def _wait(count_ptr, count):
    while tl.atomic_add(count_ptr, 0, sem="acquire", scope="gpu") < count:
        pass


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
    dz_ptr, du_ptr,  # (n, V) gradients; may lie over the logits, see `lead`
    z_bias_ptr, u_bias_ptr,  # (V,)
    labels_ptr,  # (n,) int64, negative: ignored
    row_scales_ptr,  # (n, 2) fp32, factor of each side's gradient
    losses_ptr, statistics_ptr,  # (n, 2), (n, STATISTICS) fp32
    parts_ptr,  # (n, 8, PARTS) fp32, what the programs of a pass have found: see there
    facts_ptr,  # (n, 8) fp32, of whole rows: both maxima, logs of sums, the same at temperature 1, slope sums
    counts_ptr,  # (n, PASSES) int32, zeroed: programs that are done, and one when what they found is added up
    z_stride, u_stride, dz_stride, du_stride,
    z_loadable, u_loadable, dz_storable, du_storable,  # columns of a row that exist in memory, padding included
    n, v,
    lag,  # rows between two passes of one
    lead,  # gradient rows before the logits that they lie over; n: they lie elsewhere, or each on its own logit
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
    BLOCK: tl.constexpr, PIECES: tl.constexpr, PARTS: tl.constexpr, PASSES: tl.constexpr, N_STATISTICS: tl.constexpr,
    ONLY: tl.constexpr,  # the pass that is compiled, for `benchmarks.compile_report`; None: all
):  # fmt: skip
    turn, piece = tl.program_id(0) // PIECES, tl.program_id(0) % PIECES
    step = turn % PASSES
    row = (turn // PASSES - step * lag).to(tl.int64)  # 64-bit: row * stride passes 2^31
    if (row >= 0) & (row < n):
        counts_ptr += row * PASSES
        last_count = counts_ptr + (PASSES - 1)
        z_ptr += row * z_stride
        u_ptr += row * u_stride
        parts_ptr += row * 8 * PARTS
        facts_ptr += row * 8
        statistics_ptr += row * N_STATISTICS
        offsets = piece * BLOCK + tl.arange(0, BLOCK)
        pieces = tl.arange(0, PARTS)
        inverse_temperature = 1.0 / temperature
        rate = _LOG2_E / temperature  # exp(x / T) is 2^(rate x)
        label = row * 0
        if HAS_LABELS:
            label = tl.load(labels_ptr + row)

        if ONLY is None or ONLY == 0:
            if (step == 0) & (label >= 0):
                z, _ = _load(z_ptr, z_bias_ptr, offsets, z_loadable, v, z_scale, z_softcap, Z_BIAS, Z_SOFTCAP)
                u, _ = _load(u_ptr, u_bias_ptr, offsets, u_loadable, v, u_scale, u_softcap, U_BIAS, U_SOFTCAP)
                if HAS_SHARE:
                    u = z + teacher_share * (u - z)
                z_top, u_top = tl.split(tl.max(tl.join(z, u), axis=0))
                # Logits are taken from their own maximum, lest a constant between the models cost digits.
                z -= z_top
                u -= u_top
                e_z = tl.exp2(z * rate)
                e_u = tl.exp2(u * rate)
                z_sum = tl.sum(e_z, axis=0)
                u_sum = tl.sum(e_u, axis=0)
                part = parts_ptr + piece
                tl.store(part, z_top)
                tl.store(part + PARTS, u_top)
                tl.store(part + 2 * PARTS, z_sum)
                tl.store(part + 3 * PARTS, u_sum)
                if HAS_TEMPERATURE:  # the cross-entropies stay at temperature 1
                    z_sum_1 = tl.sum(exp(z), axis=0)
                    u_sum_1 = tl.sum(exp(u), axis=0)
                    tl.store(part + 4 * PARTS, z_sum_1)
                    tl.store(part + 5 * PARTS, u_sum_1)
                if S_SLOPE_SUM == "value":
                    tl.store(part + 6 * PARTS, tl.sum(e_z * (z - u), axis=0))
                if T_SLOPE_SUM == "value":
                    tl.store(part + 7 * PARTS, tl.sum(e_u * (u - z), axis=0))

                if _is_last(counts_ptr, PIECES):
                    found = parts_ptr + pieces
                    there = pieces < PIECES
                    z_tops = tl.load(found, mask=there, other=_FLOOR, volatile=True)
                    u_tops = tl.load(found + PARTS, mask=there, other=_FLOOR, volatile=True)
                    z_sums = tl.load(found + 2 * PARTS, mask=there, other=0.0, volatile=True)
                    u_sums = tl.load(found + 3 * PARTS, mask=there, other=0.0, volatile=True)
                    z_max, u_max = tl.split(tl.max(tl.join(z_tops, u_tops), axis=0))
                    z_fall = z_tops - z_max
                    u_fall = u_tops - u_max
                    z_rescale = tl.exp2(z_fall * rate)
                    u_rescale = tl.exp2(u_fall * rate)
                    z_sum = tl.sum(z_sums * z_rescale, axis=0)
                    u_sum = tl.sum(u_sums * u_rescale, axis=0)
                    z_log = tl.log(z_sum)
                    u_log = tl.log(u_sum)
                    z_log_1 = z_log
                    u_log_1 = u_log
                    if HAS_TEMPERATURE:
                        z_sums_1 = tl.load(found + 4 * PARTS, mask=there, other=0.0, volatile=True)
                        u_sums_1 = tl.load(found + 5 * PARTS, mask=there, other=0.0, volatile=True)
                        z_sum_1 = tl.sum(z_sums_1 * exp(z_fall), axis=0)
                        u_sum_1 = tl.sum(u_sums_1 * exp(u_fall), axis=0)
                        z_log_1 = tl.log(z_sum_1)
                        u_log_1 = tl.log(u_sum_1)
                    s_slope_sum = z_log * 0.0
                    t_slope_sum = u_log * 0.0
                    if S_SLOPE_SUM == "value":
                        values = tl.load(found + 6 * PARTS, mask=there, other=0.0, volatile=True)
                        value = tl.sum(z_rescale * (values + (z_fall - u_fall) * z_sums), axis=0)
                        s_slope_sum = value / (z_sum * temperature) - (z_log - u_log)
                    if T_SLOPE_SUM == "value":
                        values = tl.load(found + 7 * PARTS, mask=there, other=0.0, volatile=True)
                        value = tl.sum(u_rescale * (values + (u_fall - z_fall) * u_sums), axis=0)
                        t_slope_sum = value / (u_sum * temperature) - (u_log - z_log)
                    tl.store(facts_ptr, z_max)
                    tl.store(facts_ptr + 1, u_max)
                    tl.store(facts_ptr + 2, z_log)
                    tl.store(facts_ptr + 3, u_log)
                    tl.store(facts_ptr + 4, z_log_1)
                    tl.store(facts_ptr + 5, u_log_1)
                    tl.store(facts_ptr + 6, s_slope_sum)
                    tl.store(facts_ptr + 7, t_slope_sum)
                    if HAS_LABELS:  # here, since gradients may overwrite the logits of labels later on
                        z_label, _z = _load(z_ptr, z_bias_ptr, label, z_loadable, v, z_scale, z_softcap, Z_BIAS, Z_SOFTCAP)
                        u_label, _u = _load(u_ptr, u_bias_ptr, label, u_loadable, v, u_scale, u_softcap, U_BIAS, U_SOFTCAP)
                        if HAS_SHARE:
                            u_label = z_label + teacher_share * (u_label - z_label)
                        # NaN for a label that is no token, which a GPU does not look for beforehand
                        tl.store(statistics_ptr + 4, tl.where(label < v, z_log_1 - (z_label - z_max), float("nan")))
                        tl.store(statistics_ptr + 5, tl.where(label < v, u_log_1 - (u_label - u_max), float("nan")))
                    _signal(counts_ptr)

        if PASSES == 3 and ONLY != 0 and ONLY != 2:
            if (step == 1) & (label >= 0):
                z, _ = _load(z_ptr, z_bias_ptr, offsets, z_loadable, v, z_scale, z_softcap, Z_BIAS, Z_SOFTCAP)
                u, _ = _load(u_ptr, u_bias_ptr, offsets, u_loadable, v, u_scale, u_softcap, U_BIAS, U_SOFTCAP)
                if HAS_SHARE:
                    u = z + teacher_share * (u - z)
                _wait(counts_ptr, PIECES + 1)
                log_q = (z - tl.load(facts_ptr, volatile=True)) * inverse_temperature
                log_p = (u - tl.load(facts_ptr + 1, volatile=True)) * inverse_temperature
                log_q -= tl.load(facts_ptr + 2, volatile=True)
                log_p -= tl.load(facts_ptr + 3, volatile=True)
                q = exp(log_q)
                p = exp(log_p)
                part = parts_ptr + piece
                if S_SLOPE_SUM == "unknown":
                    _, g = S_RULE(log_q, log_p, q, p, s_a, s_b)
                    tl.store(part, tl.sum(g, axis=0))
                if T_SLOPE_SUM == "unknown":
                    _, g = T_RULE(log_p, log_q, p, q, t_a, t_b)
                    tl.store(part + PARTS, tl.sum(g, axis=0))
                if _is_last(counts_ptr + 1, PIECES):
                    found = parts_ptr + pieces
                    there = pieces < PIECES
                    if S_SLOPE_SUM == "unknown":
                        slopes = tl.load(found, mask=there, other=0.0, volatile=True)
                        tl.store(facts_ptr + 6, tl.sum(slopes, axis=0))
                    if T_SLOPE_SUM == "unknown":
                        slopes = tl.load(found + PARTS, mask=there, other=0.0, volatile=True)
                        tl.store(facts_ptr + 7, tl.sum(slopes, axis=0))
                    _signal(counts_ptr + 1)

        if ONLY is None or ONLY == PASSES - 1:
            if step == PASSES - 1:
                dz_ptr += row * dz_stride
                du_ptr += row * du_stride
                if label < 0:  # ignored: costs no exponential, leaves zeros
                    zeros = tl.zeros([BLOCK], dtype=tl.float32)
                    if row >= lead:
                        _wait(last_count - (row - (row - lead) // 2) * PASSES, PIECES)
                    if DZ:
                        tl.store(dz_ptr + offsets, zeros.to(dz_ptr.dtype.element_ty), mask=offsets < dz_storable)
                    if DU:
                        tl.store(du_ptr + offsets, zeros.to(du_ptr.dtype.element_ty), mask=offsets < du_storable)
                    tl.debug_barrier()
                    tl.atomic_add(last_count, 1, sem="release", scope="gpu")
                else:
                    z, z_slope = _load(z_ptr, z_bias_ptr, offsets, z_loadable, v, z_scale, z_softcap, Z_BIAS, Z_SOFTCAP)
                    u, u_slope = _load(u_ptr, u_bias_ptr, offsets, u_loadable, v, u_scale, u_softcap, U_BIAS, U_SOFTCAP)
                    if HAS_SHARE:
                        u = z + teacher_share * (u - z)
                    s_row_scale = tl.load(row_scales_ptr + row * 2)
                    t_row_scale = tl.load(row_scales_ptr + row * 2 + 1)
                    _wait(last_count - 1, PIECES + 1)
                    if row >= lead:
                        _wait(last_count - (row - (row - lead) // 2) * PASSES, PIECES)
                    z -= tl.load(facts_ptr, volatile=True)
                    u -= tl.load(facts_ptr + 1, volatile=True)
                    # The maximum is subtracted on its own: (z - max) / T - log sum keeps more digits than z / T - lse.
                    log_q = z * inverse_temperature - tl.load(facts_ptr + 2, volatile=True)
                    log_p = u * inverse_temperature - tl.load(facts_ptr + 3, volatile=True)
                    q = exp(log_q)
                    p = exp(log_p)
                    difference = log_p - log_q
                    forward_kl = tl.sum(p * difference - p + q, axis=0)
                    reverse_kl = tl.sum(p - q - q * difference, axis=0)
                    s_entropy = tl.sum(q * log_q, axis=0)
                    t_entropy = tl.sum(p * log_p, axis=0)
                    part = parts_ptr + piece
                    tl.store(part, forward_kl)
                    tl.store(part + PARTS, reverse_kl)
                    tl.store(part + 2 * PARTS, s_entropy)
                    tl.store(part + 3 * PARTS, t_entropy)
                    tl.store(part + 4 * PARTS, tl.max(z + u, axis=0))  # 0 where both rows have their maximum in one place
                    is_label = tl.where(offsets == label, 1.0, 0.0)
                    s_loss, g = S_RULE(log_q, log_p, q, p, s_a, s_b)
                    tl.store(part + 5 * PARTS, tl.sum(s_loss, axis=0))
                    if DZ:
                        q_at_1 = q
                        if HAS_TEMPERATURE and S_CE:
                            q_at_1 = exp(z - tl.load(facts_ptr + 4, volatile=True))
                        s_factor = z_slope * (s_row_scale * s_weight * temperature)  # 1/T, and T^2 on the loss
                        s_ce_factor = z_slope * (s_row_scale * s_ce_weight)
                        slope_sum = tl.load(facts_ptr + 6, volatile=True)
                        dz = _gradient(g, slope_sum, q, q_at_1, s_factor, s_ce_factor, is_label, S_CE)
                        dz = tl.where(offsets < v, dz, 0.0)
                        tl.store(dz_ptr + offsets, dz.to(dz_ptr.dtype.element_ty), mask=offsets < dz_storable)
                    if T_RULE is not None:
                        t_loss, g = T_RULE(log_p, log_q, p, q, t_a, t_b)
                        tl.store(part + 6 * PARTS, tl.sum(t_loss, axis=0))
                        if DU:
                            p_at_1 = p
                            if HAS_TEMPERATURE and T_CE:
                                p_at_1 = exp(u - tl.load(facts_ptr + 5, volatile=True))
                            t_factor = u_slope * (t_row_scale * t_weight * temperature)
                            t_ce_factor = u_slope * (t_row_scale * t_ce_weight)
                            slope_sum = tl.load(facts_ptr + 7, volatile=True)
                            du = _gradient(g, slope_sum, p, p_at_1, t_factor, t_ce_factor, is_label, T_CE)
                            du = tl.where(offsets < v, du, 0.0)
                            tl.store(du_ptr + offsets, du.to(du_ptr.dtype.element_ty), mask=offsets < du_storable)

                    if _is_last(last_count, PIECES):
                        found = parts_ptr + pieces
                        there = pieces < PIECES
                        forward = tl.load(found, mask=there, other=0.0, volatile=True)
                        reverse = tl.load(found + PARTS, mask=there, other=0.0, volatile=True)
                        s_entropies = tl.load(found + 2 * PARTS, mask=there, other=0.0, volatile=True)
                        t_entropies = tl.load(found + 3 * PARTS, mask=there, other=0.0, volatile=True)
                        tops = tl.load(found + 4 * PARTS, mask=there, other=2 * _FLOOR, volatile=True)
                        s_losses = tl.load(found + 5 * PARTS, mask=there, other=0.0, volatile=True)
                        s_nll = tl.load(statistics_ptr + 4, volatile=True)
                        t_nll = tl.load(statistics_ptr + 5, volatile=True)
                        s_total = _infinite(tl.sum(s_losses, axis=0))
                        losses_ptr += row * 2
                        square = temperature * temperature
                        tl.store(losses_ptr, s_weight * square * s_total + s_ce_weight * s_nll)
                        if T_RULE is not None:
                            t_losses = tl.load(found + 6 * PARTS, mask=there, other=0.0, volatile=True)
                            t_total = _infinite(tl.sum(t_losses, axis=0))
                            tl.store(losses_ptr + 1, t_weight * square * t_total + t_ce_weight * t_nll)
                        forward_kl = tl.sum(forward, axis=0)
                        reverse_kl = tl.sum(reverse, axis=0)
                        s_entropy = tl.sum(s_entropies, axis=0)
                        t_entropy = tl.sum(t_entropies, axis=0)
                        tl.store(statistics_ptr + 0, _infinite(forward_kl))
                        tl.store(statistics_ptr + 1, _infinite(reverse_kl))
                        tl.store(statistics_ptr + 2, -s_entropy)
                        tl.store(statistics_ptr + 3, -t_entropy)
                        tl.store(statistics_ptr + 6, tl.where(tl.max(tops, axis=0) == 0, 1.0, 0.0))


def _slope_sum(objective: Objective | None) -> str:
    return "zero" if objective is None else DIVERGENCES[objective.divergence].slope_sum or "unknown"


def constants(
    student: Side, teacher: Side, has_labels: bool, temperature: float, teacher_share: float = 1.0
) -> dict[str, Any]:
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
        PASSES=3 if "unknown" in (_slope_sum(student.objective), _slope_sum(teacher.objective)) else 2,
        N_STATISTICS=len(STATISTICS),
        ONLY=None,
    )


def _scalars(objective: Objective | None) -> tuple[float, float, float, float]:
    return (0.0,) * 4 if objective is None else (objective.weight, objective.ce_weight, objective.a, objective.b)


def _lead(side: Side, n: int) -> int:
    """Rows by which the gradient lies before the logits that it overwrites; n where no logit is another's gradient."""
    logits, gradient = side.logits, side.gradient
    if gradient is None or gradient.untyped_storage().data_ptr() != logits.untyped_storage().data_ptr():
        return n
    before, width = logits.data_ptr() - gradient.data_ptr(), gradient.stride(0) * gradient.itemsize
    if before == 0 and gradient.dtype == logits.dtype and gradient.stride(0) == logits.stride(0):
        return n
    if before <= 0 or before % width or logits.stride(0) * logits.itemsize != 2 * width:
        raise ValueError(
            "expected a gradient elsewhere than the logits, on them, or half as wide and `lead_rows` before them; got "
            f"{gradient.dtype} over {logits.dtype}, {before} bytes before: see `okd_kernels.chunks.run_chunks`"
        )
    return before // width


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
    """Fill losses, statistics and both gradients of n rows. Ignored rows keep zeros. No host synchronisation.

    A gradient may lie elsewhere than the logits, on them if it is as wide, or be half as wide and begin `lead_rows`
    rows before them. Raises ValueError where it overlaps them otherwise.
    """
    z, u = student.logits, teacher.logits
    dz = z if student.gradient is None else student.gradient
    du = u if teacher.gradient is None else teacher.gradient
    n, fixed = len(z), constants(student, teacher, labels is not None, temperature, teacher_share)
    pieces, passes = triton.cdiv(vocab_size, launch.block), fixed["PASSES"]
    lag, parts = launch.lag(n, pieces, passes), triton.next_power_of_2(pieces)
    found = losses.new_empty(n * 8 * (parts + 1))
    with torch.cuda.device_of(z):
        _row_kernel[((n + (passes - 1) * lag) * passes * pieces,)](
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
            found,
            found[n * 8 * parts :],
            losses.new_zeros(n * passes, dtype=torch.int32),
            *(t.stride(0) for t in (z, u, dz, du)),
            *(t.shape[1] for t in (z, u, dz, du)),
            n,
            vocab_size,
            lag,
            min(_lead(side, n) for side in (student, teacher)),
            temperature,
            teacher_share,
            student.logit_scale,
            student.softcap or 1.0,
            teacher.logit_scale,
            teacher.softcap or 1.0,
            *_scalars(student.objective),
            *_scalars(teacher.objective),
            **fixed,
            BLOCK=launch.block,
            PIECES=pieces,
            PARTS=parts,
            **launch.options(torch.version.cuda is not None),
        )
