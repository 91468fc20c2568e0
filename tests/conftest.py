"""Triton kernels run in its interpreter; that is decided when `triton.jit` decorates them, hence first.

`OKD_TEST_DEVICE=cuda` runs the tests of the losses on a GPU instead.
"""

import os
import zlib

if os.environ.get("OKD_TEST_DEVICE", "cpu") == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)  # models this small only make threads wait for one another


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the many cases that Triton's interpreter works on, a second or more each, five in six run when asked for."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    for item in items:
        interpreted = "triton" in getattr(getattr(item, "callspec", None), "params", {}).values()
        if interpreted and zlib.crc32(item.nodeid.encode()) % 6:
            item.add_marker(pytest.mark.interpreted)
