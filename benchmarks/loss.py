"""Time, memory and gradient error of the loss, from hidden states to gradients: `python -m benchmarks.loss --help`.

Time: all candidates in one process, round-robin, there and back, the first round discarded; beside them, in the same
rounds, the bare GEMMs that no method without approximation can avoid (the floor, `benchmarks.floor`), and with
`--against` another version of this library ("before"). Ratios are medians over rounds. Memory: the peak beyond inputs
and returned gradients, each candidate in a fresh process. Error: of the gradients at std(z - u) = 0.1, against plain
PyTorch in fp64 on the same operands.

Besides divergences of a whole teacher, whom "okd" and "mutual" let learn (`benchmarks.peers`): "sparse", of 64 target
probabilities a row, and on a CPU "sharded", over a vocabulary that two processes share (`benchmarks.sharded`).
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import torch

from benchmarks import checkout, peers, sharded
from benchmarks.cases import DTYPES, KINDS, PRESETS, SHARDED, Candidate, Case, step
from benchmarks.floor import PARTS, Floor, seconds

ACCURACY_TOKENS = 128
TRUTH_BYTES = 16 << 30  # above this, heads in fp64 would not fit beside the rest: the truth is then fp32
BEFORE = "before"
SWEEPS = {"tokens": (256, 512, 1024, 2048, 4096), "vocab": (8192, 16384, 32768, 65536, 131072)}


def measure_time(case: Case, candidates: list[Candidate], repeats: int) -> tuple[dict, dict, dict]:
    """Seconds of each round: {part of the floor: [...]}, the same of plain GEMMs, {candidate: [...], or why not}."""
    torch.compiler.reset()  # else a second shape is compiled with dynamic sizes
    tensors = case.operands()
    wanted = {part for c in candidates for part in c.floor_parts(case)}
    floor = Floor(tensors, case.device, [part for part in PARTS if part in wanted])
    best, plain = ({part: [] for part in floor.parts} for _ in range(2))
    times: dict[str, list[float]] = {c.name: [] for c in candidates}
    of_ours = [c.name for c in candidates if c.is_ours]
    failures: dict[str, str] = {}
    runs = {c.name: partial(step, c.loss(tensors[4]), c.leaves(tensors, case), case.divergence) for c in candidates}

    def measure_floor(durations: dict[str, list[float]], ways: dict[str, tuple]) -> None:
        for part, duration in floor.times(ways).items():
            durations[part].append(duration)

    def measure_candidate(name: str) -> None:
        try:
            times[name].append(seconds(runs[name], case.device))
        except Exception as error:  # whatever a peer raises here is a result, not a reason to lose the others
            if name in of_ours:
                raise
            failures[name] = _reason(error)

    jobs = [partial(measure_floor, best, floor.best), partial(measure_floor, plain, floor.plain)]
    for i in range(1 + repeats):
        round_robin = jobs + [partial(measure_candidate, name) for name in runs if name not in failures]
        for job in round_robin[:: 1 if i % 2 else -1]:
            job()
    best, plain = ({part: x[1:] for part, x in durations.items()} for durations in (best, plain))
    return best, plain, {name: failures.get(name, x[1:]) for name, x in times.items()}


def measure_memory(case: Case, candidate: Candidate) -> int | str:
    """Peak bytes beyond inputs and returned gradients; or why it did not run. On a CPU in a fresh process, whose
    resident set is its own."""
    if case.device == "cuda":
        return memory_job(case, candidate)
    job = json.dumps([asdict(case), candidate])
    # Without a fixed threshold, glibc keeps freed blocks and a later run would not show what it allocates.
    result = subprocess.run(
        ["env", "MALLOC_MMAP_THRESHOLD_=131072", sys.executable, "-m", "benchmarks.loss", "--memory-job", job],
        capture_output=True,
        text=True,
    )
    lines = result.stdout.strip().splitlines()
    return json.loads(lines[-1]) if result.returncode == 0 and lines else result.stderr.strip()[-200:]


def memory_job(case: Case, candidate: Candidate) -> int | str:
    """One warm-up, so that compilation and libraries' own buffers do not count, then one measured step."""
    tensors = case.operands()
    run = partial(step, candidate.loss(tensors[4]), candidate.leaves(tensors, case), case.divergence)
    try:
        run()
    except Exception as error:
        return _reason(error)
    checkout.release(candidate.library)  # the buffers that ours keeps from call to call are the measured call's memory
    gc.collect()
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident set
        before = peak_rss()
    gradients = run()
    peak = torch.cuda.max_memory_allocated() if case.device == "cuda" else peak_rss()
    return peak - before - sum(g.nbytes for g in gradients if g is not None)


def peak_rss() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def measure_errors(case: Case, candidates: list[Candidate]) -> dict[str, dict[str, float]]:
    """{candidate: {gradient: |g - truth| / |truth|}} on `ACCURACY_TOKENS` tokens, or on all where some leave columns
    out, chunk by chunk; candidates that fail are absent."""
    if not any(c.columns for c in candidates):
        case = replace(case, tokens=min(case.tokens, ACCURACY_TOKENS))
    tensors = case.operands()
    wide = torch.float64 if 16 * (tensors[1].numel() + tensors[3].numel()) < TRUTH_BYTES else torch.float32
    exact = Candidate("truth", "eager").leaves([x.to(wide) if x.is_floating_point() else x for x in tensors], case)
    truth = step(peers.eager, exact, case.divergence)
    errors = {}
    for candidate in candidates:
        try:
            gradients = step(candidate.loss(tensors[4]), candidate.leaves(tensors, case), case.divergence)
        except Exception:
            continue
        pairs = zip(("dX", "dW", "dTeacherX"), gradients, truth, strict=True)
        errors[candidate.name] = {
            name: ((g.to(wide) - t).norm() / t.norm()).item() for name, g, t in pairs if g is not None and t is not None
        }
    return errors


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def measure(
    case: Case, names: list[str], repeats: int, workspace_mib: int, against: str = "", columns: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything about one case. Ours is given a tenth of eager's memory too, where eager's could be measured.

    against: directory of the checkout that is "before", if any; columns: of `backward_columns`, each a candidate.
    """
    workspace = workspace_mib << 20
    candidates = [
        Candidate("ours", "ours", workspace),
        *([Candidate(BEFORE, "ours", workspace, directory=against)] if against else []),
        Candidate("ours, frozen head", "ours", workspace, frozen_head=True),
        *(Candidate(f"ours, columns {x}", "ours", workspace, columns=x) for x in columns),
        *(Candidate(name, name) for name in names),
    ]
    memory = {c.name: measure_memory(case, c) for c in candidates}
    if isinstance(memory.get("eager"), int):
        tenth = Candidate("ours, tenth", "ours", memory["eager"] // 10)
        candidates.insert(1, tenth)
        memory[tenth.name] = measure_memory(case, tenth)
    errors = measure_errors(case, candidates)
    *floors, times = measure_time(case, candidates, repeats)
    rows = []
    for c in candidates:
        row: dict[str, Any] = {**c._asdict(), "extra_bytes": memory[c.name], "errors": errors.get(c.name, {})}
        del row["directory"]
        if isinstance(times[c.name], str):
            rows.append({"name": c.name, "skipped": times[c.name]})
            continue
        row |= {"median_s": statistics.median(times[c.name]), "min_s": min(times[c.name]), "times_s": times[c.name]}
        for name, parts in zip(("floor", "plain"), floors, strict=True):
            rounds = [sum(x) for x in zip(*(parts[part] for part in c.floor_parts(case)), strict=True)]
            row[f"{name}_s"] = statistics.median(rounds)
            row[f"over_{name}"] = statistics.median(map(truediv, times[c.name], rounds))
        if against and not c.frozen_head:  # whose gradients "before" has, too
            row["over_before"] = statistics.median(map(truediv, times[c.name], times[BEFORE]))
        rows.append(row)
    described = asdict(case) | {"rows": Path(case.rows).name}
    return {"case": described, "floor_s": floors[0], "plain_s": floors[1], "candidates": rows}


def over_before(row: dict[str, Any]) -> str:
    """The column "x before", blank where there is nothing to compare with."""
    return f"{row['over_before']:>10.3f}" if "over_before" in row else " " * 10


def show(result: dict[str, Any]) -> None:
    """One case as a table."""
    case = Case(**result["case"])
    print(
        f"\n{case.divergence}: N {case.tokens} ({case.masked} % masked), V {case.vocab}, {case.student} <- "
        f"{case.teacher}, {case.dtype}, {case.device}"
    )
    for name in ("floor", "plain"):
        parts = result[f"{name}_s"]
        print(f"{name}: " + ", ".join(f"{part} {1e3 * statistics.median(x):.1f} ms" for part, x in parts.items()))
    columns = f"{'median ms':>11}{'min ms':>11}{'x floor':>9}{'x plain':>9}{'x before':>10}{'extra MiB':>11}"
    print(f"{'':<20}{columns}   relative gradient error")
    for row in result["candidates"]:
        if "skipped" in row:
            print(f"{row['name']:<20}  skipped: {row['skipped']}")
            continue
        extra = row["extra_bytes"]
        mib = f"{extra / 2**20:.0f}" if isinstance(extra, int) else "failed"
        errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        times = f"{1e3 * row['median_s']:>11.1f}{1e3 * row['min_s']:>11.1f}"
        times += f"{row['over_floor']:>9.2f}{row['over_plain']:>9.2f}" + over_before(row)
        print(f"{row['name']:<20}{times}{mib:>11}   {errors}")
        if mib == "failed":
            print(f"{'':<20}  memory: {extra}")


def plot(results: list[dict[str, Any]], axis: str, path: Path) -> None:
    """Time and extra memory against N or V, a line for each candidate, a row of panels for each divergence."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    divergences = list(dict.fromkeys(r["case"]["divergence"] for r in results))
    figure, axes = plt.subplots(len(divergences), 2, figsize=(11, 4 * len(divergences)), squeeze=False)
    for (left, right), divergence in zip(axes, divergences, strict=True):
        chosen = [r for r in results if r["case"]["divergence"] == divergence]
        names = (c["name"] for r in chosen for c in r["candidates"] if not c.get("frozen_head"))  # its floor is another
        for name in dict.fromkeys(names):
            rows = [(r["case"][axis], c) for r in chosen for c in r["candidates"] if c["name"] == name]
            rows = [(x, c) for x, c in rows if "skipped" not in c]
            if name == "ours":
                left.plot([x for x, _ in rows], [1e3 * c["floor_s"] for _, c in rows], "k--", label="bare GEMMs")
            left.plot([x for x, _ in rows], [1e3 * c["median_s"] for _, c in rows], marker="o", label=name)
            known = [(x, c["extra_bytes"] / 2**20) for x, c in rows if isinstance(c["extra_bytes"], int)]
            right.plot(*zip(*known, strict=True), marker="o", label=name) if known else None
        for panel, label in ((left, "forward + backward, ms"), (right, "extra memory, MiB")):
            panel.set(xlabel=axis, ylabel=label, xscale="log", yscale="log", title=divergence)
            panel.set_xticks(SWEEPS[axis], labels=SWEEPS[axis])
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def plot_columns(results: list[dict[str, Any]], path: Path) -> None:
    """Time over the error of dX, a panel for each divergence: `backward_columns` beside all columns and the peers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(6 * len(results), 4.5), squeeze=False)
    for panel, result in zip(axes[0], results, strict=True):
        rows = [c for c in result["candidates"] if "skipped" not in c and not c.get("frozen_head") and c["errors"]]
        some = sorted((c for c in rows if c["columns"]), key=lambda c: c["errors"]["dX"])
        xs, ys = zip(*((100 * c["errors"]["dX"], c["over_floor"]) for c in some), strict=True)
        panel.plot(xs, ys, marker="o", label="ours, backward_columns")
        for c, x, y in zip(some, xs, ys, strict=True):
            panel.annotate(c["columns"], (x, y), textcoords="offset points", xytext=(4, 5), fontsize=8)
        for c in rows:
            if not c["columns"]:
                panel.plot(max(100 * c["errors"]["dX"], 1e-5), c["over_floor"], "s", label=c["name"])
        panel.axhline(1, color="k", linestyle="--", label="bare GEMMs")
        panel.set(xlabel="relative error of dX, %", ylabel="time / bare GEMMs", xscale="log")
        panel.set_title(result["case"]["divergence"])
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def cpu_name() -> str:
    try:
        from cpuinfo import get_cpu_info  # comes with pytest-benchmark
    except ImportError:
        return platform.processor() or platform.machine()
    return get_cpu_info()["brand_raw"]


def commit(directory: Path) -> str:
    """Of the checkout in a directory; empty without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=directory).stdout.strip()
    except OSError:
        return ""


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to compare these numbers with others."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "liger-kernel", "orda-kernel", "trl"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit(Path(__file__).parent),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--preset", choices=PRESETS, help="default: smollm2-cpu, or llama-1b<-8b on a GPU")
    add("--dtype", choices=DTYPES, help="default: fp32, or bf16 on a GPU")
    add("--tokens", type=int, help="N; default: the preset's")
    kinds = ", ".join(KINDS)
    add("--divergence", default="forward_kl,jsd,reverse_kl,okd", help=f"comma list of {kinds}; default: %(default)s")
    add("--peers", default="all", help=f"all, none, or a comma list of {', '.join(peers.PEERS)}")
    add("--rows", type=Path, metavar="FILE", help="JSON lines: real rows of its responses; smollm2-cpu alone")
    add("--columns", nargs="+", default=[], metavar="X", help="of ours: backward_columns, such as 0.2 or 1%%")
    add("--masked", type=int, default=0, metavar="PERCENT", help="rows whose label is ignored")
    add("--repeats", type=int, default=7, help="measured rounds; one more is discarded")
    add("--workspace-mib", type=int, default=256, help="of ours")
    add("--against", type=Path, metavar="DIRECTORY", help='another checkout, whose okd_kernels is "before"')
    add("--sweep", choices=("tokens", "vocab"), help=f"N in {SWEEPS['tokens']} or V in {SWEEPS['vocab']}; plots it")
    add("--output", type=Path, help="default: benchmarks/results/DATE-PRESET.json")
    add("--memory-job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if SHARDED in args.divergence.split(",") and (args.device != "cpu" or args.sweep):
        parser.error(f"expected {SHARDED} on a CPU and without a sweep; got {args.device}, {args.sweep}")
    if args.rows and (args.preset not in (None, "smollm2-cpu") or args.sweep or args.masked):
        parser.error(
            f"expected --rows with preset smollm2-cpu, without --sweep and --masked; got {args.preset}, {args.sweep}, "
            f"{args.masked}"
        )
    if (args.rows or args.columns) and {SHARDED, "sparse"} & set(args.divergence.split(",")):
        parser.error(f"expected --rows and --columns with divergences of a whole teacher; got {args.divergence}")
    if unknown := set(args.divergence.split(",")) - set(KINDS):
        parser.error(f"expected divergences out of {kinds}; got {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    args = arguments()
    if args.memory_job:
        case, candidate = json.loads(args.memory_job)
        print(json.dumps(memory_job(Case(**case), Candidate(*candidate))))
        return
    gpu = args.device == "cuda"
    preset = args.preset or ("llama-1b<-8b" if gpu else "smollm2-cpu")
    base = replace(
        PRESETS[preset],
        device=args.device,
        dtype=args.dtype or ("bf16" if gpu else "fp32"),
        tokens=args.tokens or PRESETS[preset].tokens,
        masked=args.masked,
    )
    if args.rows:
        folder = tempfile.TemporaryDirectory()  # gone with the process
        base = replace(base, rows=f"{folder.name}/rows.safetensors")
        from benchmarks.rows import make  # it reads models, which random rows do not

        make(args.rows, base.tokens, base.teacher, Path(base.rows))
    names = {"all": list(peers.PEERS), "none": []}.get(args.peers, args.peers.split(","))
    about = environment(args.device)
    if args.against:
        about["commit_before"] = commit(args.against)
    against = str(args.against.resolve()) if args.against else ""
    print(f"{about['device']}, {about['threads']} threads, commit {about['commit']}, {about['versions']}")
    label = "-".join(filter(None, (preset.replace("<-", "-from-"), base.dtype, args.sweep)))
    default = Path(__file__).parent / "results" / f"{about['date'][:19].replace(':', '')}-{args.device}-{label}.json"
    path = args.output or default
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {name: x for name, x in vars(args).items() if name not in ("against", "memory_job")}
    options = {name: x.name if isinstance(x, Path) else x for name, x in told.items()}  # files, not where they lie
    results = []
    for divergence in args.divergence.split(","):
        chosen = [name for name in names if name in peers.names(divergence)]
        for value in SWEEPS[args.sweep] if args.sweep else (None,):
            case = replace(base, divergence=divergence, **({args.sweep: value} if args.sweep else {}))
            if divergence == SHARDED:
                results.append(sharded.measure(case, args.repeats, args.workspace_mib, against))
                sharded.show(results[-1])
            else:
                results.append(measure(case, chosen, args.repeats, args.workspace_mib, against, args.columns))
                show(results[-1])
            whole = {**about, "arguments": options, "preset": preset, "results": results}
            path.write_text(json.dumps(whole, indent=1) + "\n")  # each time: a run that is cut off has what it has
    print(f"\n{path}")
    if args.sweep:
        plot(results, args.sweep, path.with_suffix(".png"))
    elif args.columns:
        plot_columns(results, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
