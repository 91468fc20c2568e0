"""The loss over a vocabulary that processes of one CPU share: `python -m benchmarks.loss --divergence sharded`.

Each of `RANKS` gloo processes has its part of both heads, and its part of the machine's threads. All start a call
together, and what counts is the time that the first of them takes; beside it, by turns and at the same time on all of
them, the GEMMs of one part (the floor). Collectives are counted by number and by the bytes that one rank gives.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.cases import Candidate, Case
from benchmarks.floor import Floor, seconds

RANKS = 2
TIMEOUT = timedelta(minutes=10)
COLLECTIVES = {"all_gather": 1, "all_reduce": 0}  # position of the tensor that a rank gives


@contextmanager
def counted() -> Iterator[dict[str, list[int]]]:
    """{collective: [calls, bytes that this rank gives]} of what happens meanwhile."""
    found = {name: [0, 0] for name in COLLECTIVES}
    originals = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str, *arguments: Any, **options: Any) -> Any:
        found[name][0] += 1
        found[name][1] += arguments[COLLECTIVES[name]].nbytes
        return originals[name](*arguments, **options)

    for name in COLLECTIVES:
        setattr(dist, name, partial(counting, name))
    try:
        yield found
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def part_of(tensors: list[Tensor], rank: int) -> list[Tensor]:
    """The operands with this rank's rows of both heads."""
    x, w, y, u, labels = tensors
    return [x, w.tensor_split(RANKS)[rank], y, u.tensor_split(RANKS)[rank], labels]


def call(candidate: Candidate, tensors: list[Tensor]) -> Tensor:
    """Forward KL, forward and backward; the loss."""
    loss = candidate.loss(tensors[4])(*tensors, "forward_kl", group=dist.group.WORLD)
    loss.backward()
    for x in tensors:
        x.grad = None
    return loss.detach()


def rank_job(case: Case, rank: int, candidates: list[Candidate], repeats: int) -> dict[str, Any]:
    """What one rank finds: seconds of each round, and of each candidate the loss and the collectives of a call."""
    tensors = part_of(case.operands(), rank)
    floor = Floor(tensors, "cpu", candidates[0].floor_parts(case))
    runs = {c.name: partial(call, c, c.leaves(tensors, case)) for c in candidates}
    found: dict[str, Any] = {"floor": [], "rounds": {name: [] for name in runs}, "losses": {}, "collectives": {}}
    for name, run in runs.items():
        with counted() as collectives:
            found["losses"][name] = run().item()
        found["collectives"][name] = collectives
    for i in range(1 + repeats):
        for name in ["floor", *runs][:: 1 if i % 2 else -1]:
            dist.barrier()
            if name == "floor":
                found["floor"].append(sum(floor.times(floor.best).values()))
            else:
                found["rounds"][name].append(seconds(runs[name], "cpu"))
    return found


def measure(case: Case, repeats: int, workspace_mib: int, against: str = "") -> dict[str, Any]:
    """All about one case. Raises RuntimeError with the last line of a rank that failed."""
    workspace = workspace_mib << 20
    candidates = [Candidate("ours", "ours", workspace)]
    if against:
        candidates.append(Candidate("before", "ours", workspace, directory=against))
    threads = max(1, torch.get_num_threads() // RANKS)
    job = json.dumps([asdict(case), candidates, repeats, threads])
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{rank}.log") for rank in range(RANKS)]
        ranks = []
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", "benchmarks.sharded", f"file://{folder}/store", str(rank), job]
            with log.open("w") as out:
                ranks.append(subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
        while None in (codes := [process.poll() for process in ranks]) and not any(codes):
            time.sleep(0.1)
        for process in ranks:  # the others would wait for the one that failed
            process.kill()
            process.wait()
        last = [(log.read_text().strip().splitlines() or [""])[-1] for log in logs]
    if any(codes):
        raise RuntimeError("a rank failed: " + " | ".join(x for x, code in zip(last, codes, strict=True) if code))
    found = json.loads(last[0])
    floor, rounds = found["floor"][1:], {name: x[1:] for name, x in found["rounds"].items()}
    rows = [
        {
            "name": name,
            "median_s": statistics.median(times),
            "min_s": min(times),
            "times_s": times,
            "floor_s": statistics.median(floor),
            "over_floor": statistics.median(map(truediv, times, floor)),
            "loss": found["losses"][name],
            "collectives": found["collectives"][name],
            **({"over_before": statistics.median(map(truediv, times, rounds["before"]))} if against else {}),
        }
        for name, times in rounds.items()
    ]
    return {"case": asdict(case), "ranks": RANKS, "threads": threads, "candidates": rows}


def show(result: dict[str, Any]) -> None:
    """One case as a table."""
    case = Case(**result["case"])
    rows = result["candidates"]
    print(
        f"\nforward_kl over {result['ranks']} processes of {result['threads']} threads: N {case.tokens} "
        f"({case.masked} % masked), V {case.vocab}, {case.student} <- {case.teacher}, {case.dtype}; "
        f"floor {1e3 * rows[0]['floor_s']:.1f} ms"
    )
    print(f"{'':<20}{'median ms':>11}{'min ms':>11}{'x floor':>9}{'x before':>10}   collectives of a rank")
    for row in rows:
        times = f"{1e3 * row['median_s']:>11.1f}{1e3 * row['min_s']:>11.1f}{row['over_floor']:>9.2f}"
        before = f"{row['over_before']:>10.3f}" if "over_before" in row else " " * 10
        what = ", ".join(f"{n} {name}, {size / 1024:.1f} KiB" for name, (n, size) in row["collectives"].items())
        print(f"{row['name']:<20}{times}{before}   {what}")


def main() -> None:
    store, rank, job = sys.argv[1:]
    case, candidates, repeats, threads = json.loads(job)
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", store, timeout=TIMEOUT, world_size=RANKS, rank=int(rank))
    found = rank_job(Case(**case), int(rank), [Candidate(*x) for x in candidates], repeats)
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
