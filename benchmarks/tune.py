"""Which launch of the row kernels, and which chunk size, is fastest on this GPU? `python -m benchmarks.tune`.

Times the row passes for each of `okd_kernels.row_kernels.LAUNCHES`, one by one and together, and the whole loss for
several workspaces, and stores every trial. The launch that is fastest together belongs into `row_kernels.Launch`'s
defaults, if it wins by more than the spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import PRESETS, Candidate, step
from benchmarks.floor import seconds
from benchmarks.loss import environment
from okd_kernels import Objective
from okd_kernels.gemms import row_stride
from okd_kernels.row_kernels import LAUNCHES, Launch, TritonRows
from okd_kernels.rows import LogitRows, Rows, needs_slope_sum

OBJECTIVES: dict[str, tuple[Objective, Objective | None]] = {
    "forward_kl": (Objective("forward_kl"), None),
    "jsd": (Objective("jsd"), None),
    "okd": (Objective("forward_kl"), Objective("forward_kl", weight=0.5, ce_weight=0.5)),
}
WORKSPACES_MIB = (256, 512, 1024, 2048, 4096)


def passes_of(rows: Rows, vocab: int, launch: Launch) -> dict[str, Callable[[], Any]]:
    """The passes that these rows take, each as a call of its own, and all of them as the loss makes them."""
    passes = TritonRows(vocab, 1.0, launch=launch)
    statistics = passes.statistics(rows)
    found: dict[str, Callable[[], Any]] = {"statistics": partial(passes.statistics, rows)}
    slopes = None
    if any(map(needs_slope_sum, rows.sides)):
        slopes = passes.slopes(rows, statistics)
        found["slopes"] = partial(passes.slopes, rows, statistics)
    found["emit"] = partial(passes.emit, rows, statistics, slopes)
    return {**found, "all": partial(passes.run, rows, lambda _: None)}


def moved_bytes(rows: Rows, vocab: int) -> dict[str, int]:
    """Bytes that each pass must read and write."""
    logits = 2 * len(rows.weights) * vocab
    written = sum(side.gradient.element_size() for side in rows.sides if side.gradient is not None) * logits // 2
    found = {"statistics": 4 * logits, "slopes": 4 * logits, "emit": 4 * logits + written}
    if not any(map(needs_slope_sum, rows.sides)):
        del found["slopes"]
    return {**found, "all": sum(found.values())}


def time_launches(rows: int, vocab: int, repeats: int) -> list[dict[str, Any]]:
    """One trial for each divergence, launch and pass; gradients lie over the logits, bf16 over fp32, as in the loss."""
    logits = [torch.randn(rows, row_stride(vocab), device="cuda") for _ in range(2)]
    labels, weights = torch.randint(0, vocab, (rows,), device="cuda"), torch.ones(rows, 4, device="cuda")
    trials = []
    for name, objectives in OBJECTIVES.items():
        sides = [
            LogitRows(x, objective, None if objective is None else x.view(torch.bfloat16)[:, : x.shape[1]])
            for x, objective in zip(logits, objectives, strict=True)
        ]
        of = Rows(*sides, labels, weights)
        moved = moved_bytes(of, vocab)
        for launch in LAUNCHES:
            for x in logits:
                x.normal_()
            # The first call of each compiles. Later logits are gradients, whose values take the same time.
            for which, run in passes_of(of, vocab, launch).items():
                run()
                times = [seconds(run, "cuda") for _ in range(repeats)]
                median = statistics.median(times)
                trial = {"divergence": name, "pass": which, **launch._asdict(), "median_s": median, "min_s": min(times)}
                trials.append({**trial, "bytes_per_s": moved[which] / median})
                rate = moved[which] / median / 1e12
                line = f"{1e3 * median:.3f} ms (least {1e3 * min(times):.3f}), {rate:.2f} TB/s"
                print(f"{name:<12}{launch} {which:<11}: {line}")
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
    parser.add_argument("--rows", type=int, default=2048, help="of the chunk that the row kernels work on")
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
