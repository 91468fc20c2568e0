"""What the row kernels compile to, and the times that this allows: `python -m benchmarks.compile_report`.

Compiles ahead of time for sm_80, sm_90, sm_100 and gfx942, and reads the result off the binaries: of each kernel that a
case launches, registers, spills, shared memory and the width of loads and stores; of its loop, one pass over the rows,
bytes, instructions and special functions. From those, summed over the passes, lower bounds of the time on
H100, H200, B200 and MI300X, beside that of the GEMMs. No GPU is needed. Run it without TRITON_INTERPRET.

Nothing here is measured. The kernels take at least their longest bound; latency, barriers, launches and pipes slower
than the issue (compare, select, convert) come on top. Instructions are all that a warp issues (NVIDIA) or the vector
ones (AMD: others issue beside them).

"Per logit" counts the logits of both models, 2 N V. The least that must move: the softmax needs a whole row before the
first gradient, so both rows are read twice (statistics, then gradient), 4 bytes a logit each time, and each gradient is
written once: 8 + b g / 2 bytes, b bytes a gradient's element, g models that learn. A third pass reads 4 more. A cache
serves the later reads only if it holds the rows in flight: their size stands beside that of the last cache. A bias (V
values, the same for all rows) comes out of cache and is not counted. Targets that are made in the second buffer before
the passes (sparse ones, and any with `target_mix`) cost PyTorch's passes beside these, and take the same kernels.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.binaries import read
from benchmarks.machines import MACHINES, Shape, bounds
from okd_kernels import DIVERGENCES, Objective
from okd_kernels.gemms import row_stride
from okd_kernels.row_kernels import LAUNCH, Launch, arguments
from okd_kernels.row_programs import _emit_kernel, _slopes_kernel, _statistics_kernel
from okd_kernels.rows import LogitRows, Rows, needs_slope_sum

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OKD = (Objective("forward_kl"), Objective("forward_kl", weight=0.5, ce_weight=0.5))
CASES: dict[str, dict[str, Any]] = {
    "okd": {"objectives": OKD},
    "okd, temperature, softcap, bias": {"objectives": OKD, "temperature": 2.0, "softcap": 30.0, "bias": True},
    "okd, fp32 gradients": {"objectives": OKD, "gradient": torch.float32},
    "okd, vocabulary 50257": {"objectives": OKD, "vocab": 50257},  # masks within 16 bytes
    "okd, vocabulary 151665": {"objectives": OKD, "vocab": 151665},
    **{name: {"objectives": (Objective(name), None)} for name in DIVERGENCES},
}
KERNELS = {"statistics": _statistics_kernel, "slopes": _slopes_kernel, "emit": _emit_kernel}
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64"}


def compile_kernels(
    target: GPUTarget,
    objectives: tuple[Objective, Objective | None],
    temperature: float = 1.0,
    softcap: float | None = None,
    bias: bool = False,
    gradient: torch.dtype = torch.bfloat16,
    vocab: int = Shape.vocab,
    launch: Launch = LAUNCH,
) -> dict[str, Any]:
    """Compiled, by name, the kernels that one case launches; logits fp32, rows padded as `okd_kernels.gemms` does."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    width = row_stride(vocab)
    sides = [
        LogitRows(
            empty(2, width),
            objective,
            None if objective is None else empty(2, width, dtype=gradient),
            empty(vocab) if bias else None,
            softcap=softcap,
        )
        for objective in objectives
    ]
    rows = Rows(*sides, empty(2, dtype=torch.int64), empty(2, 4))
    outputs = {f"{name}_ptr": empty(1) for name in ("statistics", "slopes", "values")}
    given = {**arguments(rows, vocab, temperature, 0, launch), **outputs}
    names = [name for name in KERNELS if name != "slopes" or any(map(needs_slope_sum, rows.sides))]
    return {name: _compile(KERNELS[name], given, target, launch) for name in names}


def _compile(kernel: Any, given: dict[str, Any], target: GPUTarget, launch: Launch) -> Any:
    """Specialised on what Triton finds at run time: torch aligns tensors, and rows are padded to 16 elements."""
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = given[name]
        if parameter.is_constexpr:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
        aligned = value % 16 == 0 if signature[name] == "i32" else signature[name].startswith("*")
        if aligned and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=launch.options(target.backend == "cuda"))


def per_logit(counts: list[dict[str, Any]], threads: int, bias: bool, stored: float) -> list[dict[str, Any]]:
    """The passes' counts for one thread and iteration, per logit.

    Raises:
        ValueError: an iteration does not read one block of both rows, or the last pass does not write `stored` bytes a
            logit: the loop was unrolled or a kernel changed, and what follows would be wrong.
    """
    logits = 2 * LAUNCH.block / threads
    passes = [{name: n if name == "kernel" else n / logits for name, n in one.items()} for one in counts]
    expected = [(8.0 if bias else 4.0, stored if one is counts[-1] else 0.0) for one in counts]
    found = [(one["loaded_bytes"], one["stored_bytes"]) for one in passes]
    if found != expected:
        raise ValueError(f"expected (loaded, stored) bytes per logit {expected}, got {found}: count the loop's blocks")
    return [{**one, "loaded_bytes": 4.0} for one in passes]


def report(shape: Shape) -> list[dict[str, Any]]:
    """One entry for each case and target."""
    rows = []
    for case, options in CASES.items():
        learners = sum(objective is not None for objective in options["objectives"])
        written = options.get("gradient", torch.bfloat16).itemsize * learners / 2
        for name, target in TARGETS.items():
            compiled = compile_kernels(target, **{"vocab": shape.vocab, **options})
            kernels = [{"kernel": kernel, **read(binary)} for kernel, binary in compiled.items()]
            threads = LAUNCH.warps * target.warp_size
            passes = [{"kernel": one["kernel"], **loop} for one in kernels for loop in one.pop("passes")]
            row: dict[str, Any] = {"case": case, "target": name, "kernels": kernels}
            row["passes"] = per_logit(passes, threads, options.get("bias", False), written)
            row["bytes"] = sum(one["loaded_bytes"] + one["stored_bytes"] for one in row["passes"])
            row["least_bytes"] = 2 * 4 + written
            counts = {
                "moved_bytes": row["bytes"],
                "instructions": sum(one["instructions"] for one in row["passes"]),
                "special": sum(one["special"] for one in row["passes"]),
            }
            registers = max(one["registers"] for one in kernels)  # fewest rows in flight
            row["bounds"] = {
                label: bounds(machine, shape, **counts, registers=registers, threads=threads, learners=learners)
                for label, machine in MACHINES.items()
                if machine.target == name
            }
            rows.append(row)
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    def widths(counts: dict[int, int]) -> str:
        return " ".join(f"{width}x{n}" for width, n in sorted(counts.items(), reverse=True))

    def passes(row: dict[str, Any], name: str) -> str:
        return " + ".join(f"{one[name]:.1f}" for one in row["passes"])

    lines = [
        f"{'per logit, kernel by kernel':<40} | {'instructions':<20}{'special':<18}bytes (least)",
        *(
            f"{row['case']:<32}{row['target']:<8} | {passes(row, 'instructions'):<20}{passes(row, 'special'):<18}"
            f"{row['bytes']:>5g} ({row['least_bytes']:g})"
            for row in rows
        ),
        "",
        f"{'kernels':<51} | registers  spilled B  shared B | loads, stores: bytes x instructions",
        *(
            f"{row['case']:<32}{row['target']:<8}{one['kernel']:<11} | "
            f"{one['registers']:>9}{one['spilled_bytes']:>11}{one['shared_bytes']:>10} | "
            f"{widths(one['loads'])}, {widths(one['stores'])}"
            for row in rows
            for one in row["kernels"]
        ),
    ]
    lines += [
        "",
        f"{'lower bounds, ms':<40} |  memory   issue  special functions | GEMMs at peak | MB in flight / cache",
    ]
    lines += [
        f"{row['case']:<32}{machine:<8} | {b['memory_ms']:>7.2f}{b['issue_ms']:>8.2f}{b['special_ms']:>19.2f} | "
        f"{b['gemm_peak_ms']:>13.2f} | {b['in_flight_bytes'] / 1e6:>12.0f} / {MACHINES[machine].cache / 1e6:.0f}"
        for row in rows
        for machine, b in row["bounds"].items()
    ]
    return "\n".join(lines)


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return result.stdout.strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--output", type=Path, help="store JSON, such as benchmarks/results/compile_report.json")
    options = parser.parse_args()
    shape = Shape(options.tokens, options.vocab, options.student, options.teacher)
    result = {
        "kind": "bounds computed from the binary, not measurements",
        "date": date.today().isoformat(),
        "commit": _commit(),
        "triton": triton.__version__,
        "shape": asdict(shape),
        "machines": {name: asdict(machine) for name, machine in MACHINES.items()},
        "rows": report(shape),
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"triton {triton.__version__}; {shape.tokens} tokens x {shape.vocab} logits, hidden sizes {shape.student} <- "
        f"{shape.teacher}, bf16 operands\nBounds computed from the binary, not measurements.\n"
    )
    print(_table(result["rows"]))


if __name__ == "__main__":
    main()
