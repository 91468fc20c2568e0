"""The benchmark of the loss: what it compares is what it says, in one process, in two, and against another checkout."""

import os
import re
import sys
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch

import okd_kernels
from benchmarks import checkout, loss, peers, sharded
from benchmarks.cases import Candidate, Case, step
from benchmarks.floor import PARTS, Floor
from okd_kernels.rows import STATISTICS, VALUES
from okd_kernels.sharding import MESSAGE_BYTES

ROOT = str(Path(__file__).parent.parent)
CASE = Case(512, 16, 24, 32, masked=25)
COUNTED = 24  # rows of it
EPS = torch.finfo(torch.float32).eps


def of(divergence, **changes):
    return Case(**{**vars(CASE), "divergence": divergence, **changes})


@pytest.fixture
def plain_errors():
    """Relative errors of eager PyTorch in fp32 over all rows, of a case: {gradient: error}."""
    return lambda case: loss.measure_errors(case, [Candidate("eager", "eager")])["eager"]


# --- the floor ---


@pytest.mark.parametrize("divergence", ["okd", "sparse"])
def test_the_floor_multiplies_counted_rows_only_and_what_the_loss_cannot_do_without(divergence):
    case = of(divergence)
    tensors = case.operands()
    floor = Floor(tensors, "cpu", Candidate("ours", "ours").floor_parts(case))
    x, w, y, u, labels = tensors
    counted = labels != peers.IGNORE
    assert counted.sum() == COUNTED
    assert list(floor.parts) == [part for part in PARTS if divergence == "okd" or "teacher" not in part]
    q = (x[counted].double() @ w.double().T).softmax(-1)
    if divergence == "sparse":
        p = torch.zeros_like(q).scatter_(1, y[counted], u[counted].double().exp())
    else:
        p = (y[counted].double() @ u.double().T).softmax(-1)
    for part, way in floor.best.items():
        floor._run(part, *way)
    products = {"dx": (q - p) @ w.double(), "dw": (q - p).T @ x[counted].double()}
    if divergence == "okd":
        products["dy"] = (q - p) @ u.double()
    plain = {"dx": (q - p).float() @ w, "dw": (q - p).float().T @ x[counted]}
    plain["dy"] = (q - p).float() @ u if divergence == "okd" else None
    scale = (q + p).norm() / (q - p).norm()  # what fp32 logits lose in q - p
    for name, exact in products.items():
        budget = 2 * (plain[name].double() - exact).norm() + 8 * EPS * scale * exact.norm()
        assert (getattr(floor, name).double() - exact).norm() <= budget, name


# --- another checkout ---


def test_another_checkout_is_another_package_with_operators_of_its_own(tmp_path):
    library = checkout.load(ROOT)
    assert library.__name__ == checkout.NAME and Path(library.__file__).parent != Path(okd_kernels.__file__).parent
    before, ours = (getattr(torch.ops, name).distil.default for name in (checkout.NAME, "okd_kernels"))
    assert before is not ours
    case = of("okd")
    found = []
    for directory in ("", ROOT):
        candidate = Candidate("ours", "ours", directory=directory)
        tensors = candidate.leaves(case.operands(), case)
        found.append(step(candidate.loss(tensors[4]), tensors, "okd"))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.norm() > 0
    checkout.release(library)
    assert library.cpu._kept.buffer is None and okd_kernels.cpu._kept.buffer is not None
    with pytest.raises(ValueError, match="expected one other checkout in a process"):
        (tmp_path / "okd_kernels").mkdir()
        (tmp_path / "okd_kernels" / "__init__.py").touch()
        checkout.load(str(tmp_path))
    with pytest.raises(ValueError, match="expected a checkout that holds okd_kernels"):
        checkout.load(str(tmp_path / "okd_kernels"))


def test_a_library_is_called_by_the_names_that_it_has():
    """The sharded loss under either name, and only what it knows."""
    calls = []

    def called(name):
        return lambda *_, **options: calls.append((name, options)) or SimpleNamespace(total=name)

    both = SimpleNamespace(
        linear_distillation_loss=called("whole"), vocab_parallel_distillation_loss=called("parallel")
    )
    one = SimpleNamespace(linear_distillation_loss=called("whole"))
    operands = CASE.operands()
    for library, name in ((both, "parallel"), (one, "whole")):
        assert peers.ours(*operands, "jsd", group="ranks", library=library) == name
    options = {"temperature": 1.0, "workspace_bytes": None, "student": "jsd"}
    assert calls == [(name, {**options, "group": "ranks"}) for name in ("parallel", "whole")]
    assert peers.ours(*operands, "jsd", library=both) == "whole"
    assert calls[-1] == ("whole", options)


# --- all of one case ---


@pytest.mark.parametrize("divergence", ["forward_kl", "sparse"])
def test_a_case_against_a_checkout(divergence, monkeypatch, capsys, plain_errors):
    case = of(divergence)
    monkeypatch.setattr(loss, "measure_memory", lambda case, candidate: 10 << 20)
    result = loss.measure(case, ["eager"], repeats=3, workspace_mib=1, against=ROOT)
    rows = {row["name"]: row for row in result["candidates"]}
    assert list(rows) == ["ours", "ours, tenth", "before", "ours, frozen head", "eager"]
    assert "over_before" not in rows["ours, frozen head"] and rows["before"]["over_before"] == 1
    assert ROOT not in str(result)
    parts = result["floor_s"]
    assert ("teacher logits" in parts) == (divergence == "forward_kl") and "teacher dX" not in parts
    floors = [sum(x) for x in zip(*parts.values(), strict=True)]
    for name in ("ours", "before", "eager"):
        times = rows[name]["times_s"]
        ratios = [a / b for a, b in zip(times, rows["before"]["times_s"], strict=True)]
        assert rows[name]["over_before"] == median(ratios)
        assert rows[name]["over_floor"] == median(a / b for a, b in zip(times, floors, strict=True))
    for name, error in plain_errors(case).items():
        assert rows["ours"]["errors"][name] <= 2 * error + 8 * EPS
        assert rows["before"]["errors"][name] == rows["ours"]["errors"][name]
    loss.show(result)
    lines = {line[:20].strip(): line[20:].split() for line in capsys.readouterr().out.splitlines()}
    assert "x before" in " ".join(lines[""]) and lines["before"][4] == "1.000"
    assert lines["ours"][4] == f"{rows['ours']['over_before']:.3f}"
    assert lines["ours, frozen head"][4] == "10"  # MiB


# --- a sharded vocabulary ---


@pytest.mark.slow
def test_a_sharded_case_has_the_whole_loss_and_counts_what_ranks_tell_each_other(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    case = of("sharded")
    result = sharded.measure(case, repeats=1, workspace_mib=1, against=ROOT)
    ours, before = result["candidates"]
    dense = of("forward_kl").operands()
    truth = peers.eager(*(x.double() if x.is_floating_point() else x for x in dense), "forward_kl").item()
    plain = abs(peers.eager(*dense, "forward_kl").item() - truth)
    assert abs(ours["loss"] - truth) <= 2 * plain + 8 * EPS * truth
    assert before["loss"] == ours["loss"] and before["over_before"] == 1
    # One chunk: options, then statistics of both models; values, then dX. Sums over columns are in fp64.
    gathered = MESSAGE_BYTES + 2 * COUNTED * len(STATISTICS) * 8
    reduced = COUNTED * (len(VALUES) * 8 + case.student * 4)
    assert ours["collectives"] == {"all_gather": [2, gathered], "all_reduce": [2, reduced]}
    assert len(ours["times_s"]) == 1 and ours["over_floor"] == ours["times_s"][0] / ours["floor_s"]
    assert ROOT not in str(result)
    sharded.show(result)
    assert f"2 all_gather, {gathered / 1024:.1f} KiB, 2 all_reduce, {reduced / 1024:.1f} KiB" in capsys.readouterr().out


def test_ranks_share_the_heads_rows_and_nothing_else():
    tensors = Case(513, 16, 24, 32).operands()
    parts = [sharded.part_of(tensors, rank) for rank in range(sharded.RANKS)]
    for i, x in enumerate(tensors):
        assert torch.equal(torch.cat([part[i] for part in parts]) if i in (1, 3) else parts[1][i], x)


@pytest.mark.slow
def test_a_rank_that_fails_says_why(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(RuntimeError, match=r"rank\d.: ValueError: expected a checkout that holds okd_kernels"):
        sharded.measure(of("sharded"), repeats=1, workspace_mib=1, against=os.devnull)


# --- the command ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--divergence", "sharded", "--sweep", "tokens"), "expected sharded on a CPU and without a sweep"),
        (("--divergence", "sharded", "--device", "cuda"), "expected sharded on a CPU and without a sweep"),
        (("--divergence", "jsd,tvd"), "expected divergences out of .*; got tvd"),
    ],
)
def test_the_command_refuses(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loss", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit):
        loss.arguments()
    assert re.search(message, capsys.readouterr().err)
