"""The row kernel compiled ahead of time for every target, without a GPU, and read off the binary."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from okd_kernels import DIVERGENCES

triton = pytest.importorskip("triton", reason="Triton is Linux only")
ROOT = Path(__file__).parent.parent
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SOFTCAP = "okd, temperature, softcap, bias"


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


def test_every_case_compiles_for_every_target(rows):
    cases = {SOFTCAP, "okd", "okd, fp32 gradients", "okd, odd vocabulary", "taid", *DIVERGENCES}
    assert {(row["case"], row["target"]) for row in rows} == {(c, t) for c in cases for t in TARGETS}


def test_no_register_spills(rows):
    assert not [(r["case"], r["target"]) for r in rows if r["spilled_bytes"] or r["spill_instructions"]]


def test_two_rows_share_a_multiprocessor(rows):
    assert max(row["registers"] for row in rows) <= 128


def two_passes(row):
    return row["case"].startswith("okd") or row["case"] in ("taid", "forward_kl", "reverse_kl")


def test_logits_move_in_sixteen_bytes(rows):
    """A pass reads two rows; of a block of 2048, a thread of 8 warps has two times 16 bytes (gfx942: once)."""
    for row in rows:
        per_pass = (2 if row["target"] == "gfx942" else 4) * (2 if row["case"] == SOFTCAP else 1)  # the biases
        assert row["loads"].get("16") == (2 if two_passes(row) else 3) * per_pass, row
        if row["target"] != "gfx942":
            assert sum(n for width, n in row["loads"].items() if width != "16") <= 7, row  # labels, scales: scalars


def test_a_row_is_read_twice_where_the_slope_sum_is_known(rows):
    for row in rows:
        assert len(row["passes"]) == (2 if two_passes(row) else 3), row
        gradients = 4 if "fp32" in row["case"] else 2 if row["case"].startswith("okd") else 1
        assert row["least_bytes"] == 8 + gradients
        assert row["bytes"] == 4 * len(row["passes"]) + gradients


def test_special_functions_are_those_of_the_mathematics(rows):
    """One exponential a logit and pass. Of a pair of logits, mixtures have a logarithm (NVIDIA's is a polynomial) and
    a division, alpha_beta's slope 3 powers and its term 3 more, a softcap an exponential and a division a logit. Pass 1
    further rescales the two rows' totals once a block."""
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


def test_memory_bounds_the_kernel_on_a_hopper(rows):
    """Instructions and special functions of every case fit under the time that an H100 takes to read the logits."""
    checked = [row["bounds"]["H100 SXM"] for row in rows if "H100 SXM" in row["bounds"]]
    assert len(checked) == 5 + len(DIVERGENCES)
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
from benchmarks.compile_report import OKD, TARGETS, compile_row_kernel
from okd_kernels.row_kernel import LAUNCHES
kernels = [compile_row_kernel(TARGETS["sm_90"], OKD, launch=launch) for launch in LAUNCHES]
print(json.dumps([read(kernel)["spilled_bytes"] for kernel in kernels]))
"""
    spilled = compiling(tmp_path, "-c", code)
    assert len(spilled) > 3 and not any(spilled)


def test_an_unrolled_loop_is_not_reported():
    from benchmarks.compile_report import per_logit

    once = {"instructions": 300, "special": 16, "barriers": 0, "loaded_bytes": 64, "stored_bytes": 16}
    assert per_logit([once], 256, False, 1.0)[0]["instructions"] == 300 / 16
    with pytest.raises(ValueError, match="count the loop's blocks"):
        per_logit([{**once, "loaded_bytes": 128}], 256, False, 1.0)
