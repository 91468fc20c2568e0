"""Tensors of many examples on disk, by key: safetensors files that are memory-mapped when they are read.

A file holds many examples, one after the other, their keys and where each begins. It appears under its name when it is
whole, so that a run that is killed loses what it had not written yet, and nothing else; several processes write files
of their own.
"""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

UNWRITTEN_BYTES, UNWRITTEN_SECONDS = 256 << 20, 300.0  # what is not written yet is at most so much, and so old
KEY_BYTES = 16
KEYS, STARTS = "keys", "starts"  # (n, KEY_BYTES) uint8; (n + 1,) int64


class Store:
    """Entries {name: (length, ...)} by key, of one length each, in the files of a directory."""

    def __init__(self, directory: Path):
        self.directory = directory
        self._places: dict[bytes, tuple[Path, int, int]] = {}  # file, first row, last row + 1
        self._opened: dict[Path, Any] = {}
        self._new: dict[bytes, dict[str, Tensor]] = {}
        self._n_bytes, self._since = 0, time.monotonic()
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places or key in self._new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}  # workers that load data open files themselves

    def refresh(self) -> None:
        """Find what other processes have written."""
        known = {path for path, _, _ in self._places.values()}
        for path in sorted(set(self.directory.glob("*.safetensors")) - known):
            file = self._open(path)
            keys, starts = file.get_tensor(KEYS).numpy(), file.get_tensor(STARTS).tolist()
            for key, first, last in zip(keys, starts, starts[1:], strict=False):
                self._places[key.tobytes()] = path, first, last

    def get(self, key: bytes) -> dict[str, Tensor]:
        """Raises KeyError."""
        if key in self._new:
            return self._new[key]
        path, first, last = self._places[key]
        file = self._open(path)
        return {name: file.get_slice(name)[first:last] for name in file.keys() if name not in (KEYS, STARTS)}  # noqa: SIM118

    def put(self, key: bytes, entry: dict[str, Tensor]) -> None:
        self._new[key] = {name: x.detach().cpu().clone() for name, x in entry.items()}
        self._n_bytes += sum(x.numel() * x.element_size() for x in entry.values())
        if self._n_bytes >= UNWRITTEN_BYTES or time.monotonic() - self._since >= UNWRITTEN_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has been put since the last time."""
        self._since = time.monotonic()
        if not self._new:
            return
        entries = list(self._new.values())
        names = list(entries[0])
        lengths = torch.tensor([0, *(len(entry[names[0]]) for entry in entries)])
        tensors = {name: torch.cat([entry[name] for entry in entries]) for name in names}
        tensors[KEYS] = torch.frombuffer(bytearray(b"".join(self._new)), dtype=torch.uint8).reshape(-1, KEY_BYTES)
        tensors[STARTS] = lengths.cumsum(0)
        path = self.directory / f"{uuid.uuid4().hex}.safetensors"
        part = path.with_suffix(".part")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, part)
            os.replace(part, path)
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            raise OSError(f"{path}: expected to write it; got {error}: make room and start again, to go on") from error
        self._new, self._n_bytes = {}, 0
        self.refresh()

    def _open(self, path: Path) -> Any:
        if path not in self._opened:
            try:
                self._opened[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(
                    f"{path}: expected a whole safetensors file; got one that cannot be read ({error}): remove it, and "
                    "what was in it is computed anew"
                ) from error
        return self._opened[path]
