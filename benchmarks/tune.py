"""Which launch of the row kernel, and which chunk size, is fastest on this GPU? `python -m benchmarks.tune`.

Times the row kernel alone for each of `okd_kernels.row_kernel.LAUNCHES`, and the whole loss for several workspaces, and
stores every trial. The fastest launch belongs into `row_kernel.Launch`'s defaults, if it wins by more than the spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.loss import PRESETS, Candidate, environment, seconds, step
from okd_kernels import Objective
from okd_kernels.row_kernel import LAUNCHES, triton_rows
from okd_kernels.rows import STATISTICS, Side

OBJECTIVES: dict[str, tuple[Objective, Objective | None]] = {
    "forward_kl": (Objective("forward_kl"), None),
    "jsd": (Objective("jsd"), None),
    "okd": (Objective("forward_kl"), Objective("forward_kl", weight=0.5, ce_weight=0.5)),
}
WORKSPACES_MIB = (256, 512, 1024, 2048, 4096)


def time_launches(rows: int, vocab: int, repeats: int) -> list[dict[str, Any]]:
    """One trial for each divergence and launch; gradients lie over the logits, bf16 over fp32, as in the loss."""
    logits = [torch.randn(rows, vocab, device="cuda") for _ in range(2)]
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    scales = torch.ones(rows, 2, device="cuda")
    losses, found = torch.zeros_like(scales), torch.zeros(rows, len(STATISTICS), device="cuda")
    trials = []
    for name, objectives in OBJECTIVES.items():
        sides = [
            Side(x, objective, None if objective is None else x.view(torch.bfloat16)[:, :vocab])
            for x, objective in zip(logits, objectives, strict=True)
        ]
        passes = 3 if name == "jsd" else 2
        moved = rows * vocab * (8 * passes + 2 * sum(side.gradient is not None for side in sides))
        for launch in LAUNCHES:
            run = partial(
                triton_rows, *sides, labels, scales, losses, found, vocab_size=vocab, temperature=1.0, launch=launch
            )
            for x in logits:
                x.normal_()
            run()  # compiles; from the second call on the logits are gradients, whose values take the same time
            times = [seconds(run, "cuda") for _ in range(repeats)]
            median = statistics.median(times)
            trial = {"divergence": name, **launch._asdict(), "median_s": median, "min_s": min(times)}
            trials.append({**trial, "bytes_per_s": moved / median})
            rate = moved / median / 1e12
            print(f"{name:<12}{launch}: {1e3 * median:.3f} ms (least {1e3 * min(times):.3f}), {rate:.2f} TB/s")
    return trials


def time_workspaces(preset: str, repeats: int) -> list[dict[str, Any]]:
    """The whole loss, forward and backward, for each workspace."""
    trials = []
    for divergence in ("forward_kl", "okd"):
        case = replace(PRESETS[preset], dtype="bf16", device="cuda", divergence=divergence)
        tensors = case.operands()
        for mib in WORKSPACES_MIB:
            candidate = Candidate("ours", "ours", mib << 20)
            run = partial(step, candidate.loss(tensors[4]), candidate.leaves(tensors, case), divergence)
            run()
            times = [seconds(run, "cuda") for _ in range(repeats)]
            trials.append({"divergence": divergence, "workspace_mib": mib, "median_s": statistics.median(times)})
            print(f"{divergence:<12}{mib:>5} MiB: {1e3 * trials[-1]['median_s']:.1f} ms")
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="llama-1b<-8b")
    parser.add_argument("--rows", type=int, default=2048, help="of the chunk that the row kernel works on")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/DATE-tune.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a GPU; found none: `python -m benchmarks.compile_report` says what can be said without")
    about = environment("cuda")
    path = args.output or Path(__file__).parent / "results" / f"{about['date'][:19].replace(':', '')}-tune.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {**about, "preset": args.preset, "rows": args.rows}
    for name, trials in (
        ("launches", lambda: time_launches(args.rows, PRESETS[args.preset].vocab, args.repeats)),
        ("workspaces", lambda: time_workspaces(args.preset, args.repeats)),
    ):
        result[name] = trials()
        path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
