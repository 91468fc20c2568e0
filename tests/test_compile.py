"""The row kernels compiled ahead of time for every target, without a GPU, and read off the binaries."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from okd_kernels import DIVERGENCES

triton = pytest.importorskip("triton", reason="Triton is Linux only")
ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SOFTCAP = "okd, temperature, softcap, bias"

pytestmark = pytest.mark.slow


def compiling(cache, *arguments):
    """JSON that Python prints in a process of its own: this one decorates its kernels for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return compiling(tmp_path_factory.mktemp("triton"), "-m", "benchmarks.compile_report", "--json")["rows"]


def kernels(rows):
    return [(row["case"], row["target"], kernel) for row in rows for kernel in row["kernels"]]


def test_every_case_compiles_for_every_target(rows):
    odd = {f"okd, vocabulary {v}" for v in (50257, 151665)}
    cases = {SOFTCAP, "okd", "okd, fp32 gradients", *odd, *DIVERGENCES}
    assert {(row["case"], row["target"]) for row in rows} == {(c, t) for c in cases for t in TARGETS}
    assert len(rows) == len(cases) * len(TARGETS)


def test_slopes_are_summed_only_where_no_statistic_gives_them(rows):
    for row in rows:
        names = ["statistics", "emit"] if two_passes(row) else ["statistics", "slopes", "emit"]
        assert [one["kernel"] for one in row["kernels"]] == names
        assert [one["kernel"] for one in row["passes"]] == names, "one loop that loads in each kernel"


def test_no_register_spills(rows):
    assert not [(c, t, k["kernel"]) for c, t, k in kernels(rows) if k["spilled_bytes"] or k["spill_instructions"]]


def test_two_rows_share_a_multiprocessor(rows):
    assert max(kernel["registers"] for *_, kernel in kernels(rows)) <= 128


def two_passes(row):
    return row["case"].startswith("okd") or row["case"] in ("forward_kl", "reverse_kl")


def test_logits_move_in_sixteen_bytes(rows):
    """A pass reads two rows; of a block of 2048, a thread of 8 warps has two times 16 bytes (gfx942: once). What else
    a program loads are scalars: the label and its logits; the label, statistics, factors and slope sums."""
    scalars = {"statistics": 5, "slopes": 5, "emit": 15}
    for case, target, kernel in kernels(rows):
        wide = (2 if target == "gfx942" else 4) * (2 if case == SOFTCAP else 1)  # the biases
        assert kernel["loads"].get("16") == wide, (case, target, kernel)
        if target != "gfx942":
            others = sum(n for width, n in kernel["loads"].items() if width != "16")
            assert others <= scalars[kernel["kernel"]], (case, target, kernel)


def test_a_row_is_read_twice_where_the_slope_sum_is_known(rows):
    for row in rows:
        assert len(row["passes"]) == (2 if two_passes(row) else 3), row
        gradients = 4 if "fp32" in row["case"] else 2 if row["case"].startswith("okd") else 1
        assert row["least_bytes"] == 8 + gradients
        assert row["bytes"] == 4 * len(row["passes"]) + gradients


def test_special_functions_are_those_of_the_mathematics(rows):
    """One exponential a logit and pass. Of a pair of logits, mixtures have a logarithm (NVIDIA's is a polynomial) and
    a division, alpha_beta's slope 3 powers and its term 3 more, a softcap an exponential and a division a logit. The
    statistics' pass further rescales the two rows' totals once a block."""
    log = {"gfx942": 0.5}
    for row in rows:
        threads = 512 if row["target"] == "gfx942" else 256
        rescale = (4 if row["case"] == SOFTCAP else 2) * threads / (2 * 2048)
        mixture = 1 + log.get(row["target"], 0)
        first, later = {
            SOFTCAP: (4, [3.5]),  # temperature and 1; in the gradient, at 1 the cross-entropy of the teacher alone
            "skew_kl": (1, [1.5, mixture + 0.5]),
            "skew_reverse_kl": (1, [mixture + 0.5] * 2),
            "skew_reverse_kl_detached": (1, [mixture] * 2),
            "jsd": (1, [mixture] * 2),
            "tvd": (1, [1, 1]),
            "alpha_beta": (1, [1.5, 3]),
        }.get(row["case"], (1, [1]))
        assert [one["special"] for one in row["passes"]] == [first + rescale, *later], row


def test_memory_bounds_the_kernels_on_a_hopper(rows):
    """Instructions and special functions of every case fit under the time that an H100 takes to read the logits."""
    checked = [row["bounds"]["H100 SXM"] for row in rows if "H100 SXM" in row["bounds"]]
    assert len(checked) == len(rows) / len(TARGETS)
    for bound in checked:
        assert max(bound["issue_ms"], bound["special_ms"]) < bound["memory_ms"] < bound["gemm_peak_ms"]


def test_one_reduction_finds_both_maxima(rows):
    """Warps meet twice a block in the statistics pass (in two reductions they would four times); in the last, once
    before they write over the logits."""
    reduction = 2 if triton.__version__ >= "3.7" else 3
    for row in rows:
        logits = 2 * 2048 / (512 if row["target"] == "gfx942" else 256)
        barriers = [one["barriers"] * logits for one in row["passes"]]
        assert barriers == [reduction, *[0] * (len(barriers) - 2), 1], row


SASS_LOOP = """
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0020*/              @P0 BRA `(.L_x_1) ;
        /*0030*/                   MUFU.EX2 R4, R4 ;
.L_x_1:
        /*0040*/                   FADD R8, R8, R4 ;
        /*0050*/              @!P1 BRA `(.L_x_0) ;
        /*0060*/                   LDG.E.128 R4, desc[UR6][R2.64] ;
        /*0070*/                   EXIT ;
"""
GCN_LOOP = """
\ts_branch .LBB0_2
.LBB0_1:                                ;   in Loop: Header=BB0_2 Depth=1
\tv_exp_f32_e32 v1, v1
\ts_cbranch_scc0 .LBB0_4
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
\ts_cbranch_execz .LBB0_1
\tglobal_load_dwordx2 v[0:1], v[2:3], off
\ts_branch .LBB0_1
.LBB0_4:
\ts_endpgm
"""


def test_loops_are_found_wherever_their_blocks_lie():
    from benchmarks.binaries import GCN, SASS, passes

    (sass,), (gcn,) = passes(SASS_LOOP, SASS), passes(GCN_LOOP, GCN)
    assert (sass["instructions"], sass["special"], sass["loaded_bytes"]) == (5, 1, 16)
    assert (gcn["instructions"], gcn["special"], gcn["loaded_bytes"]) == (1, 1, 8)


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        ("MUFU.EX2 R4, R4", "BRA `(.L_x_0)", "no loop inside"),
        ("FADD R8, R8, R4", "BRA P2, `(.L_x_1)", "no loop inside"),
        ("FADD R8, R8, R4", "RET.REL.NODEC R4", "without subroutines"),
    ],
)
def test_what_cannot_be_counted_raises(line, replacement, message):
    from benchmarks.binaries import SASS, passes

    with pytest.raises(ValueError, match=message):
        passes(SASS_LOOP.replace(line, replacement), SASS)


def test_no_launch_that_tuning_may_choose_spills(tmp_path):
    code = """
import json
from benchmarks.binaries import read
from benchmarks.compile_report import OKD, TARGETS, compile_kernels
from okd_kernels.row_kernels import LAUNCHES
kernels = [kernel for x in LAUNCHES for kernel in compile_kernels(TARGETS["sm_90"], OKD, launch=x).values()]
print(json.dumps([read(kernel)["spilled_bytes"] for kernel in kernels]))
"""
    spilled = compiling(tmp_path, "-c", code)
    assert len(spilled) > 6 and not any(spilled)


def test_one_binary_serves_chunks_of_every_length(tmp_path):
    """Triton compiles anew for an argument that is 1, and for one that 16 divides: a chunk's rows, and where its tokens
    start in memory, must not do that in training."""
    code = """
import json, torch
from triton.runtime import driver
from benchmarks.compile_report import KERNELS, TARGETS
from okd_kernels import Objective
from okd_kernels.row_kernels import LAUNCH, arguments
from okd_kernels.rows import LogitRows, Rows

class Sm90:
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_current_target = staticmethod(lambda: TARGETS["sm_90"])

driver.set_active(Sm90())
z, u, weights = torch.zeros(33, 256), torch.zeros(33, 256), torch.zeros(33, 4)
labels = torch.zeros(33, dtype=torch.int64)
for n, start in ((1, 0), (2, 1), (16, 0), (17, 3)):
    student = LogitRows(z[:n], Objective("jsd"), z[:n])
    rows = Rows(student, LogitRows(u[:n]), labels[start : start + n], weights[start : start + n])
    results = {f"{name}_ptr": torch.zeros(n * 90)[start:] for name in ("statistics", "slopes", "values")}
    given = {**arguments(rows, 250, 1.0, 0), **results}
    for kernel in KERNELS.values():
        kernel.warmup(**{name: given[name] for name in kernel.arg_names}, grid=(n,), **LAUNCH.options(True))
print(json.dumps({name: len(kernel.device_caches[0][0]) for name, kernel in KERNELS.items()}))
"""
    assert compiling(tmp_path, "-c", code) == {"statistics": 1, "slopes": 1, "emit": 1}


def test_an_unrolled_loop_is_not_reported():
    from benchmarks.compile_report import per_logit

    once = {"instructions": 300, "special": 16, "barriers": 0, "loaded_bytes": 64, "stored_bytes": 16}
    assert per_logit([once], 256, False, 1.0)[0]["instructions"] == 300 / 16
    with pytest.raises(ValueError, match="count the loop's blocks"):
        per_logit([{**once, "loaded_bytes": 128}], 256, False, 1.0)


def test_tuning_times_the_passes_that_the_loss_makes(rows):
    """The same numbers, and the bytes that the binaries move."""
    from benchmarks.tune import OBJECTIVES, moved_bytes, passes_of
    from okd_kernels.row_kernels import LAUNCHES
    from okd_kernels.rows import LogitRows, Rows
    from okd_kernels.torch_rows import TorchRows

    n, v = 3, 2100
    z, u = torch.randn(2, n, v)
    for name, objectives in OBJECTIVES.items():
        sides = [
            LogitRows(x.clone(), objective, None if objective is None else torch.empty(n, v, dtype=torch.bfloat16))
            for x, objective in zip((z, u), objectives, strict=True)
        ]
        of = Rows(*sides, torch.randint(0, v, (n,)), torch.ones(n, 4))
        (row,) = (row for row in rows if (row["case"], row["target"]) == (name, "sm_90"))
        moved = moved_bytes(of, v)
        assert moved["all"] == sum(moved[one["kernel"]] for one in row["kernels"]) == row["bytes"] * 2 * n * v
        _, expected = TorchRows(of.weights, n, v, 1.0).run(of, lambda _: None)
        runs = passes_of(of, v, LAUNCHES[3])
        assert list(runs) == [*(one["kernel"] for one in row["kernels"]), "all"]
        for found in (runs["emit"](), runs["all"]()[1]):
            torch.testing.assert_close(found[:, 2:6], expected[:, 2:6].float(), rtol=1e-5, atol=1e-6)
