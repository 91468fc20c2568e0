"""What the row kernel compiles to, for each target, on any machine: `python -m benchmarks.compile_report [--json]`.

Compiles ahead of time for sm_80, sm_90, sm_100 and gfx942, and reads the result off the binary: registers, spills,
shared memory, and the width of the loads and stores of logits. No GPU is needed. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from okd_kernels import DIVERGENCES, Objective
from okd_kernels.row_kernel import _row_kernel, constants, launch_options
from okd_kernels.rows import Side

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
OKD = (Objective("forward_kl"), Objective("forward_kl", weight=0.5, ce_weight=0.5))
CASES = {
    "okd": {"objectives": OKD},
    "okd, temperature, softcap, bias": {"objectives": OKD, "temperature": 2.0, "softcap": 30.0, "bias": True},
    "okd, fp32 gradients": {"objectives": OKD, "gradient": "fp32"},
    "taid": {"objectives": (Objective("forward_kl"), None), "teacher_share": 0.5},
    **{name: {"objectives": (Objective(name), None)} for name in DIVERGENCES},
}


def compile_row_kernel(
    target: GPUTarget, objectives, temperature=1.0, teacher_share=1.0, softcap=None, bias=False, gradient="bf16"
):
    """The compiled kernel of one case; logits fp32, rows padded as `okd_kernels.chunks` pads them."""
    tensor = torch.empty(0)
    sides = [Side(tensor, o, None if o is None else tensor, tensor if bias else None, 1.0, softcap) for o in objectives]
    fixed = constants(*sides, True, temperature, teacher_share)
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
    aligned = [i for i, name in enumerate(names) if name.endswith(("_ptr", "_stride", "able"))]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(_row_kernel, signature, fixed, attributes)
    return triton.compile(source, target=target, options=launch_options(target.backend == "cuda"))


def _nvidia_tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def read_cubin(kernel) -> dict[str, object]:
    """Registers, spilled bytes, shared memory and access widths, as cuobjdump and nvdisasm print them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _nvidia_tool("cuobjdump", "-res-usage", file.name)
        assembly = _nvidia_tool("nvdisasm", "-c", file.name)
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert match, usage
    registers, stack, _, local = map(int, match.groups())
    width = {".128": 16, ".64": 8, "": 4, ".U16": 2}
    loads = Counter(width[m] for m in re.findall(r"\bLDG\.E(\.128|\.64|\.U16)?\b", assembly))
    stores = Counter(width[m] for m in re.findall(r"\bSTG\.E(\.128|\.64|\.U16)?\b", assembly))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", assembly))
    return {
        "registers": registers,
        "spilled_bytes": stack + local,
        "spill_instructions": spills,
        "shared_bytes": kernel.metadata.shared,
        "loads": dict(loads),
        "stores": dict(stores),
    }


def read_hsaco(kernel) -> dict[str, object]:
    """The same from AMD's assembly and its metadata."""
    assembly = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[-1])

    def accesses(kind: str) -> dict[int, int]:
        width = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}
        found = re.findall(rf"(?:global|buffer)_{kind}_(dwordx\d|dword|ushort|short)", assembly)
        return dict(Counter(width[m] for m in found))

    return {
        "registers": field("vgpr_count"),
        "spilled_bytes": field("private_segment_fixed_size"),
        "spill_instructions": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "shared_bytes": kernel.metadata.shared,
        "loads": accesses("load"),
        "stores": accesses("store"),
    }


def report() -> list[dict[str, object]]:
    """One entry for each case and target."""
    rows = []
    for case, options in CASES.items():
        for name, target in TARGETS.items():
            kernel = compile_row_kernel(target, **options)
            read = read_cubin if target.backend == "cuda" else read_hsaco
            rows.append({"case": case, "target": name, **read(kernel)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    rows = report()
    if parser.parse_args().json:
        print(json.dumps({"triton": triton.__version__, "rows": rows}))
        return
    print(f"triton {triton.__version__}; loads and stores: bytes x instructions")
    for row in rows:
        loads, stores = (
            " ".join(f"{width}x{n}" for width, n in sorted(row[k].items(), reverse=True)) for k in ("loads", "stores")
        )
        print(
            f"{row['case']:<32}{row['target']:<8}{row['registers']:>4} registers {row['spilled_bytes']:>4} B spilled "
            f"{row['shared_bytes']:>4} B shared   loads {loads}   stores {stores}"
        )


if __name__ == "__main__":
    main()
