"""Peaks of the machines, and how fast a row kernel and its GEMMs can be on them at best."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Peaks. A unit is a multiprocessor (NVIDIA) or a compute unit (AMD); rates are per unit and clock."""

    target: str
    units: int
    clock: float  # Hz, the highest: a bound must not be beaten
    bandwidth: float  # bytes/s of the HBM
    flops: float  # dense bf16
    cache: float  # bytes, the last before the HBM
    issue: int  # threads that may issue an instruction
    special: int  # exp2, log2, reciprocal
    registers: int = 65536  # 32-bit
    threads: int = 2048


# NVIDIA: 4 schedulers issue one instruction for 32 threads each; 16 special functions in compute capability 8.0, 9.0
# and 10.0 (CUDA C++ Programming Guide, "Arithmetic Instructions"). Bandwidth and FLOPs: "H100 Tensor Core GPU" and
# "H200 Tensor Core GPU" datasheets (SXM), "Blackwell Architecture Technical Brief" (HGX B200). Multiprocessors, L2 and
# clock: "H100 Tensor Core GPU Architecture" white paper (H200: the same die); B200: as its driver reports them.
# AMD: "Instinct MI300X" data sheet (304 CUs, 2100 MHz, 5.3 TB/s, 1307 TFLOP/s, 256 MB Infinity Cache); 4 SIMDs of 16
# lanes, 512 vector registers a lane, special functions at a quarter of the rate: "CDNA 3" white paper and ISA guide.
MACHINES = {
    "H100 SXM": Machine("sm_90", 132, 1.98e9, 3.35e12, 989e12, 50e6, 128, 16),
    "H200 SXM": Machine("sm_90", 132, 1.98e9, 4.8e12, 989e12, 50e6, 128, 16),
    "B200": Machine("sm_100", 148, 1.965e9, 8.0e12, 2250e12, 126e6, 128, 16),
    "MI300X": Machine("gfx942", 304, 2.1e9, 5.3e12, 1307e12, 256e6, 64, 16, registers=131072),
}


@dataclass(frozen=True)
class Shape:
    """Tokens, vocabulary, hidden sizes of student and teacher. Operands are bf16, logits fp32."""

    tokens: int = 8192
    vocab: int = 128256
    student: int = 2048
    teacher: int = 4096


def bounds(
    machine: Machine,
    shape: Shape,
    *,
    moved_bytes: float,  # per logit, as are instructions and special
    instructions: float,
    special: float,
    registers: int,  # of a thread
    threads: int,  # of a program, which owns a token
    learners: int,
) -> dict[str, float]:
    """Milliseconds for the whole shape: three bounds of the row kernel, that of the GEMMs; bytes of rows in flight."""
    logits = 2 * shape.tokens * shape.vocab
    clocks = machine.units * machine.clock
    # Logits, dX and dW of the student; logits of the teacher, and its dX where it learns (its head is frozen).
    gemms = logits * (3 * shape.student + learners * shape.teacher)
    allocated = -(-registers // 8) * 8
    rows = min(machine.registers // (allocated * threads), machine.threads // threads)
    return {
        "memory_ms": 1e3 * moved_bytes * logits / machine.bandwidth,
        "issue_ms": 1e3 * instructions * logits / (clocks * machine.issue),
        "special_ms": 1e3 * special * logits / (clocks * machine.special),
        "gemm_peak_ms": 1e3 * gemms / machine.flops,
        "in_flight_bytes": machine.units * rows * 2 * 4 * shape.vocab,
    }
