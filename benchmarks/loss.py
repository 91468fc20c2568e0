"""Time, memory and gradient error of the loss, from hidden states to gradients: `python -m benchmarks.loss --help`.

Time: all candidates in one process, round-robin, there and back, the first round discarded; beside them, in the same
rounds, the bare GEMMs that no method without approximation can avoid (the floor). Ratios are medians over rounds. On a
GPU a round queues each of them several times, as a trainer does, after one more that is not timed: the host's overhead
hides, and the clocks are those of a GPU at this very work, not at what came before. Memory: the peak beyond inputs and
returned gradients, each candidate in a fresh process. Error: of the gradients at std(z - u) = 0.1, against plain
PyTorch in fp64 on the same operands.
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
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from operator import truediv
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import peers
from okd_kernels.chunks import HEAD_BLOCK, has_fast_gemm, row_stride
from okd_kernels.memory import release

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ACCURACY_TOKENS = 128
TRUTH_BYTES = 16 << 30  # above this, heads in fp64 would not fit beside the rest: the truth is then fp32
QUEUED = 4  # timed runs of one measurement on a GPU
FLOOR_CHUNKS = (256, 512, 1024, 2048, 4096)
SWEEPS = {"tokens": (256, 512, 1024, 2048, 4096), "vocab": (8192, 16384, 32768, 65536, 131072)}


@dataclass(frozen=True)
class Case:
    """The shapes of one comparison: V, D_s, D_t, N, and what is asked of them."""

    vocab: int
    student: int
    teacher: int
    tokens: int
    dtype: str = "fp32"
    device: str = "cpu"
    divergence: str = "forward_kl"
    masked: int = 0

    def operands(self) -> list[Tensor]:
        shapes = (self.vocab, self.student, self.teacher, self.tokens)
        return peers.operands(*shapes, dtype=DTYPES[self.dtype], device=self.device, masked=self.masked)


PRESETS = {
    "tiny": Case(8192, 64, 128, 256),
    "smollm2-cpu": Case(49152, 576, 1536, 1024),  # the 135M student; a teacher between 360M (960) and 1.7B (2048)
    "gpt2-base<-xl": Case(50257, 768, 1600, 8192),
    "llama-1b<-8b": Case(128256, 2048, 4096, 8192),
    "qwen2.5-0.5b<-7b": Case(151936, 896, 3584, 8192),
    "gemma-1b<-4b": Case(262144, 1152, 2560, 8192),
}


class Candidate(NamedTuple):
    """Something to measure: a function of `benchmarks.peers`, and how it is called."""

    name: str
    function: str
    workspace_bytes: int | None = None  # ours only
    frozen_head: bool = False

    def loss(self, labels: Tensor) -> Callable[..., Tensor]:
        function = getattr(peers, self.function)
        if self.function != "ours":
            return function
        counted = labels != peers.IGNORE
        kept = counted.nonzero().squeeze(1) if labels.is_cuda and not counted.all() else None
        return partial(function, workspace_bytes=self.workspace_bytes, kept=kept)

    def leaves(self, tensors: list[Tensor], case: Case) -> list[Tensor]:
        """The operands, sharing their storage, with gradients where this candidate makes them."""
        needs = (True, not self.frozen_head, case.divergence == "okd", False, False)
        return [x.detach().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]

    def floor_parts(self, case: Case) -> list[str]:
        parts = ["student logits", "teacher logits", "student dX"]
        return parts + ["student dW"] * (not self.frozen_head) + ["teacher dX"] * (case.divergence == "okd")


def step(loss: Callable[..., Tensor], tensors: list[Tensor], divergence: str) -> list[Tensor | None]:
    """Forward and backward; the gradients of the first three operands, taken off them so that none stays in memory."""
    loss(*tensors, divergence).backward()
    gradients = [x.grad for x in tensors[:3]]
    for x in tensors:
        x.grad = None
    return gradients


def seconds(run: Callable[[], Any], device: str) -> float:
    """Wall-clock time of one call; on a GPU see `queued_seconds`."""
    if device == "cuda":
        return queued_seconds([run])[0]
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def queued_seconds(runs: list[Callable[[], Any]]) -> list[float]:
    """Mean time of each run in the GPU's queue: all of them by turns, once untimed and then `QUEUED` times."""
    for run in runs:
        run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(QUEUED * len(runs) + 1)]
    marks[0].record()
    for run, mark in zip(QUEUED * runs, marks[1:], strict=True):
        run()
        mark.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]
    return [statistics.fmean(times[i :: len(runs)]) for i in range(len(runs))]


class Floor:
    """The GEMMs alone, in the operands' dtype and into preallocated outputs, over counted rows only; in fp32 on a CPU
    that does not multiply that dtype, where fp32 is the faster.

    `plain`: one `torch.mm` each, over all of N and V. `best`: over the whole of N or in chunks, logits dense or at
    `row_stride`, on a CPU also by blocks of the head, whichever a calibration found fastest, so that the sum is a lower
    bound and not one more implementation. The gradients that they read are those of forward KL: a GPU's clocks depend
    on the data.
    """

    def __init__(self, tensors: list[Tensor], device: str):
        counted = tensors[4] != peers.IGNORE
        if not has_fast_gemm(tensors[0].dtype, device):
            tensors = [x.float() for x in tensors]
        self.device, (_, self.w, _, self.u, _) = device, tensors
        self.x, self.y = tensors[0][counted], tensors[2][counted]
        n, v = len(self.x), len(self.w)
        buffers = [tuple(self.x.new_empty(n, stride)[:, :v] for _ in range(2)) for stride in sorted({v, row_stride(v)})]
        for start in range(0, n, FLOOR_CHUNKS[0]):
            rows = slice(start, start + FLOOR_CHUNKS[0])
            q, p = ((x[rows] @ w.t()).float().softmax(-1) for x, w in ((self.x, self.w), (self.y, self.u)))
            for _, gradients in buffers:
                gradients[rows] = q - p
        self.dx, self.dy, self.dw = (torch.empty_like(t) for t in (self.x, self.y, self.w))
        self.parts = {
            "student logits": lambda rows, block, out, _: self._logits(self.x[rows], self.w, block, out[rows]),
            "teacher logits": lambda rows, block, out, _: self._logits(self.y[rows], self.u, block, out[rows]),
            "student dX": lambda rows, _, __, gradients: torch.mm(gradients[rows], self.w, out=self.dx[rows]),
            "student dW": self._dw,
            "teacher dX": lambda rows, _, __, gradients: torch.mm(gradients[rows], self.u, out=self.dy[rows]),
        }
        plain = (n, v, *buffers[0])
        for part in self.parts:
            for pair in buffers:
                self._run(part, n, v, *pair)
        sizes = sorted({min(size, n) for size in (*FLOOR_CHUNKS, n)})
        self.plain, self.best = dict.fromkeys(self.parts, plain), {}
        for part in self.parts:
            blocks = {v, min(HEAD_BLOCK, v)} if device == "cpu" and "logits" in part else {v}
            ways = [(size, block, *pair) for pair in buffers for size in sizes for block in sorted(blocks)]
            once = sorted(ways, key=lambda way, p=part: self._time(p, *way))
            self.best[part] = min(once[:3], key=lambda way, p=part: min(self._time(p, *way) for _ in range(3)))

    @staticmethod
    def _logits(hidden: Tensor, head: Tensor, block: int, logits: Tensor) -> None:
        for weight, out in zip(head.split(block), logits.split(block, dim=1), strict=True):
            torch.mm(hidden, weight.t(), out=out)

    def _dw(self, rows: slice, _: int, __: Tensor, gradients: Tensor) -> None:
        torch.addmm(self.dw, gradients[rows].t(), self.x[rows], beta=int(rows.start > 0), out=self.dw)

    def _run(self, part: str, chunk: int, block: int, logits: Tensor, gradients: Tensor) -> None:
        for start in range(0, len(self.x), chunk):
            self.parts[part](slice(start, min(start + chunk, len(self.x))), block, logits, gradients)

    def _time(self, part: str, *way: Any) -> float:
        return seconds(partial(self._run, part, *way), self.device)

    def times(self, ways: dict[str, tuple]) -> dict[str, float]:
        """Of each part; on a GPU all parts are queued one after the other, as they are in a step."""
        if self.device != "cuda":
            return {part: self._time(part, *way) for part, way in ways.items()}
        runs = [partial(self._run, part, *way) for part, way in ways.items()]
        return dict(zip(ways, queued_seconds(runs), strict=True))


def measure_time(case: Case, candidates: list[Candidate], repeats: int) -> tuple[dict, dict, dict]:
    """Seconds of each round: {part of the floor: [...]}, the same of plain GEMMs, {candidate: [...], or why not}."""
    torch.compiler.reset()  # else a second shape is compiled with dynamic sizes
    tensors = case.operands()
    floor = Floor(tensors, case.device)
    best, plain = ({part: [] for part in floor.parts} for _ in range(2))
    times: dict[str, list[float]] = {c.name: [] for c in candidates}
    failures: dict[str, str] = {}
    runs = {c.name: partial(step, c.loss(tensors[4]), c.leaves(tensors, case), case.divergence) for c in candidates}

    def measure_floor(durations: dict[str, list[float]], ways: dict[str, tuple]) -> None:
        for part, duration in floor.times(ways).items():
            durations[part].append(duration)

    def measure_candidate(name: str) -> None:
        try:
            times[name].append(seconds(runs[name], case.device))
        except Exception as error:  # whatever a peer raises here is a result, not a reason to lose the others
            if name.startswith("ours"):
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
    release()  # the chunk buffers that ours keeps from call to call are memory of the measured one
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
    """{candidate: {gradient: |g - truth| / |truth|}} on `ACCURACY_TOKENS` tokens; candidates that fail are absent."""
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


def measure(case: Case, names: list[str], repeats: int, workspace_mib: int) -> dict[str, Any]:
    """Everything about one case. Ours is given a tenth of eager's memory too, where eager's could be measured."""
    workspace = workspace_mib << 20
    candidates = [
        Candidate("ours", "ours", workspace),
        Candidate("ours, frozen head", "ours", workspace, frozen_head=True),
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
        if isinstance(times[c.name], str):
            rows.append({"name": c.name, "skipped": times[c.name]})
            continue
        row |= {"median_s": statistics.median(times[c.name]), "min_s": min(times[c.name]), "times_s": times[c.name]}
        for name, parts in zip(("floor", "plain"), floors, strict=True):
            rounds = [sum(x) for x in zip(*(parts[part] for part in c.floor_parts(case)), strict=True)]
            row[f"{name}_s"] = statistics.median(rounds)
            row[f"over_{name}"] = statistics.median(map(truediv, times[c.name], rounds))
        rows.append(row)
    return {"case": asdict(case), "floor_s": floors[0], "plain_s": floors[1], "candidates": rows}


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
    columns = f"{'median ms':>11}{'min ms':>11}{'x floor':>9}{'x plain':>9}{'extra MiB':>11}"
    print(f"{'':<20}{columns}   relative gradient error")
    for row in result["candidates"]:
        if "skipped" in row:
            print(f"{row['name']:<20}  skipped: {row['skipped']}")
            continue
        extra = row["extra_bytes"]
        mib = f"{extra / 2**20:.0f}" if isinstance(extra, int) else "failed"
        errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
        times = f"{1e3 * row['median_s']:>11.1f}{1e3 * row['min_s']:>11.1f}"
        times += f"{row['over_floor']:>9.2f}{row['over_plain']:>9.2f}"
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


def cpu_name() -> str:
    try:
        from cpuinfo import get_cpu_info  # comes with pytest-benchmark
    except ImportError:
        return platform.processor() or platform.machine()
    return get_cpu_info()["brand_raw"]


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to compare these numbers with others."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "transformers", "liger-kernel", "trl"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    command = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:  # no git
        commit = ""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--preset", choices=PRESETS, help="default: smollm2-cpu, or llama-1b<-8b on a GPU")
    add("--dtype", choices=DTYPES, help="default: fp32, or bf16 on a GPU")
    add("--tokens", type=int, help="N; default: the preset's")
    add("--divergence", default=",".join(peers.DIVERGENCES), help="comma list; default: %(default)s")
    add("--peers", default="all", help=f"all, none, or a comma list of {', '.join(peers.PEERS)}")
    add("--masked", type=int, default=0, metavar="PERCENT", help="rows whose label is ignored")
    add("--repeats", type=int, default=7, help="measured rounds; one more is discarded")
    add("--workspace-mib", type=int, default=256, help="of ours")
    add("--sweep", choices=("tokens", "vocab"), help=f"N in {SWEEPS['tokens']} or V in {SWEEPS['vocab']}; plots it")
    add("--output", type=Path, help="default: benchmarks/results/DATE-PRESET.json")
    add("--memory-job", help=argparse.SUPPRESS)
    return parser.parse_args()


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
    names = {"all": list(peers.PEERS), "none": []}.get(args.peers, args.peers.split(","))
    about = environment(args.device)
    print(f"{about['device']}, {about['threads']} threads, commit {about['commit']}, {about['versions']}")
    label = "-".join(filter(None, (preset.replace("<-", "-from-"), base.dtype, args.sweep)))
    default = Path(__file__).parent / "results" / f"{about['date'][:19].replace(':', '')}-{args.device}-{label}.json"
    path = args.output or default
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {name: str(x) if isinstance(x, Path) else x for name, x in vars(args).items()}
    results = []
    for divergence in args.divergence.split(","):
        chosen = [name for name in names if divergence != "okd" or name not in peers.FROZEN_TEACHER]
        for value in SWEEPS[args.sweep] if args.sweep else (None,):
            case = replace(base, divergence=divergence, **({args.sweep: value} if args.sweep else {}))
            results.append(measure(case, chosen, args.repeats, args.workspace_mib))
            show(results[-1])
            whole = {**about, "arguments": options, "preset": preset, "results": results}
            path.write_text(json.dumps(whole, indent=1) + "\n")  # each time: a run that is cut off has what it has
    print(f"\n{path}")
    if args.sweep:
        plot(results, args.sweep, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
