"""What the row kernel compiles to, and the times that this allows: `python -m benchmarks.compile_report`.

Compiles ahead of time for sm_80, sm_90, sm_100 and gfx942, and reads the result off the binary: registers, spills,
shared memory, width of loads and stores, and in each pass's loop the bytes, instructions and special-function
operations. From those, lower bounds of the kernel's time on H100, H200, B200 and MI300X, beside that of the GEMMs. No
GPU is needed. Run it without TRITON_INTERPRET.

Nothing here is measured. A kernel takes at least its longest bound; latency, barriers and pipes slower than the issue
(compare, select, convert) come on top. Instructions are all that a warp issues (NVIDIA) or the vector ones (AMD: others
issue beside them).

"Per logit" counts the logits of both models, 2 N V. The least that must move: the softmax needs a whole row before the
first gradient, so both rows are read twice (statistics, then gradient), 4 bytes a logit each time, and each gradient is
written once: 8 + b g / 2 bytes, b bytes a gradient's element, g models that learn. A third pass reads 4 more. A cache
serves the later reads only if it holds the rows in flight: their size stands beside that of the last cache. A bias (V
values, the same for all rows) comes out of cache and is not counted.
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
from okd_kernels.row_kernel import LAUNCH, _row_kernel, constants
from okd_kernels.rows import Side

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
    "okd, fp32 gradients": {"objectives": OKD, "gradient": "fp32"},
    "okd, odd vocabulary": {"objectives": OKD, "vocab": 50257},  # masks within 16 bytes
    "taid": {"objectives": (Objective("forward_kl"), None), "teacher_share": 0.5},
    **{name: {"objectives": (Objective(name), None)} for name in DIVERGENCES},
}


def compile_row_kernel(
    target: GPUTarget,
    objectives,
    temperature=1.0,
    teacher_share=1.0,
    softcap=None,
    bias=False,
    gradient="bf16",
    vocab=Shape.vocab,
    launch=LAUNCH,
):
    """The compiled kernel of one case; logits fp32, rows padded as `okd_kernels.chunks` pads them."""
    tensor = torch.empty(0)
    student, teacher = (
        Side(tensor, o, None if o is None else tensor, tensor if bias else None, 1.0, softcap) for o in objectives
    )
    fixed = {**constants(student, teacher, True, temperature, teacher_share), "BLOCK": launch.block}
    names = _row_kernel.arg_names
    pointers = {"dz_ptr": gradient, "du_ptr": gradient, "labels_ptr": "i64"}
    signature = {}
    for name in names:
        if name in fixed:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, "fp32")
        elif name.endswith(("_stride", "able")) or name == "v":
            signature[name] = "i32"
        else:
            signature[name] = "fp32"
    # What Triton finds at run time: torch aligns tensors, and rows are padded to 16 elements.
    endings = ("_ptr", "_stride", "able", *(["v"] if vocab % 16 == 0 else []))
    aligned = [i for i, name in enumerate(names) if name.endswith(endings)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(_row_kernel, signature, fixed, attributes)
    return triton.compile(source, target=target, options=launch.options(target.backend == "cuda"))


def per_logit(counts: list[dict[str, int]], threads: int, bias: bool, stored: float) -> list[dict[str, float]]:
    """The passes' counts for one thread and iteration, per logit.

    Raises:
        ValueError: an iteration does not read one block of both rows, or the last pass does not write `stored` bytes a
            logit: the loop was unrolled or the kernel changed, and what follows would be wrong.
    """
    logits = 2 * LAUNCH.block / threads
    passes = [{name: n / logits for name, n in one.items()} for one in counts]
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
        written = (4 if options.get("gradient") == "fp32" else 2) * learners / 2
        for name, target in TARGETS.items():
            kernel = compile_row_kernel(target, **{"vocab": shape.vocab, **options})
            threads = kernel.metadata.num_warps * target.warp_size
            row: dict[str, Any] = {"case": case, "target": name, **read(kernel)}
            row["passes"] = per_logit(row["passes"], threads, options.get("bias", False), written)
            row["bytes"] = sum(one["loaded_bytes"] + one["stored_bytes"] for one in row["passes"])
            row["least_bytes"] = 2 * 4 + written
            counts = {
                "moved_bytes": row["bytes"],
                "instructions": sum(one["instructions"] for one in row["passes"]),
                "special": sum(one["special"] for one in row["passes"]),
            }
            row["bounds"] = {
                label: bounds(machine, shape, **counts, registers=row["registers"], threads=threads, learners=learners)
                for label, machine in MACHINES.items()
                if machine.target == name
            }
            rows.append(row)
    return rows


def _table(rows: list[dict[str, Any]]) -> str:
    def widths(counts: dict[int, int]) -> str:
        return " ".join(f"{width}x{n}" for width, n in sorted(counts.items(), reverse=True))

    def least(row: dict[str, Any]) -> str:
        return f"({row['least_bytes']:g})"

    def passes(row: dict[str, Any], name: str) -> str:
        return " + ".join(f"{one[name]:.1f}" for one in row["passes"])

    lines = [
        f"{'':<40} |                                | per logit, pass by pass",
        f"{'case':<32}{'target':<8} | registers  spilled B  shared B | {'instructions':<20}{'special':<18}"
        f"bytes (least)  loads, stores: bytes x instructions",
    ]
    lines += [
        f"{row['case']:<32}{row['target']:<8} | "
        f"{row['registers']:>9}{row['spilled_bytes']:>11}{row['shared_bytes']:>10} | "
        f"{passes(row, 'instructions'):<20}{passes(row, 'special'):<18}{row['bytes']:>5g} {least(row):<8} "
        f"{widths(row['loads'])}, {widths(row['stores'])}"
        for row in rows
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
