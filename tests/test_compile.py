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


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """From a process of its own: this one decorates its kernels for the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "benchmarks.compile_report", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)["rows"]


def test_every_case_compiles_for_every_target(rows):
    cases = {"okd", "okd, temperature, softcap, bias", "okd, fp32 gradients", "taid", *DIVERGENCES}
    assert {(row["case"], row["target"]) for row in rows} == {(c, t) for c in cases for t in TARGETS}


def test_no_register_spills(rows):
    known = {("okd, temperature, softcap, bias", "sm_100")} if triton.__version__ < "3.7" else set()  # 8 bytes
    spilled = {(row["case"], row["target"]) for row in rows if row["spilled_bytes"] or row["spill_instructions"]}
    assert spilled <= known


def test_two_rows_share_a_multiprocessor(rows):
    assert max(row["registers"] for row in rows) <= 128


def test_logits_move_in_sixteen_bytes(rows):
    """A pass reads two rows; of a block of 2048, a thread of 8 warps has two times 16 bytes (gfx942: once)."""
    for row in rows:
        passes = 2 if row["case"].startswith("okd") or row["case"] in ("taid", "forward_kl", "reverse_kl") else 3
        per_pass = 2 if row["target"] == "gfx942" else 4
        assert row["loads"].get("16") == passes * per_pass, row
        if row["target"] != "gfx942" and "bias" not in row["case"]:
            assert sum(n for width, n in row["loads"].items() if width != "16") <= 6, row  # labels, scales: scalars
