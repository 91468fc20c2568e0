"""The library of another checkout beside this one, in one process: two versions are compared round by round.

Minutes apart, a shared machine differs from itself by more than one change of the library makes.
"""

from __future__ import annotations

import functools
import importlib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from types import ModuleType

NAME = "okd_kernels_before"
_folders: list[tempfile.TemporaryDirectory] = []  # kept until the process ends: Triton reads sources when it compiles


@functools.cache
def load(directory: str) -> ModuleType:
    """`okd_kernels` of a checkout as the package `NAME`, its operators' namespaces included. One directory a process.

    Raises ValueError where there is no such package, or another directory's is loaded.
    """
    source = Path(directory) / "okd_kernels"
    if not (source / "__init__.py").is_file():
        raise ValueError(f"expected a checkout that holds okd_kernels; got {directory}")
    if NAME in sys.modules:
        raise ValueError(f"expected one other checkout in a process; got {directory} as a second")
    folder = tempfile.TemporaryDirectory(prefix=NAME)
    _folders.append(folder)
    copy = Path(folder.name) / NAME
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for path in copy.rglob("*.py"):
        path.write_text(re.sub(r"\bokd_kernels\b", NAME, path.read_text()))
    sys.path.insert(0, folder.name)
    return importlib.import_module(NAME)


def release(library: ModuleType) -> None:
    """Give back the memory that a version of the library keeps from call to call."""
    module = next(x for name in ("cpu", "memory") if (x := getattr(library, name, None)) is not None)
    module.release()
