"""What happens to long runs: a checkpoint is whole or not there, whenever the run is killed or the disk is full.

While it is being written it holds `INCOMPLETE`. What goes in last is a manifest: sizes and CRC-32 of its files, and how
many processes wrote them. Older checkpoints go only after that, and first lose what makes them whole. This outlives the
process; against a machine that dies with its disk's writes pending the manifest is what tells.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from okd.clock import SAVING, timed
from okd.sharding import ranks

INCOMPLETE = "checkpoint-is-incomplete.txt"  # transformers' name of it, too, where it saves on SIGTERM
MANIFEST = "manifest.json"
BEGUN = ".begun"  # lies in the directory of a run until it has a config.yaml
PIECE = 2**24  # bytes read at once
REFUSAL = re.compile(r".*(\[Errno|os error|inline_container|PytorchStreamWriter|iostream).*")  # by a disk
logger = logging.get_logger(__name__)


def checkpoints(directory: Path) -> list[Path]:
    """Whole or not, by step."""
    found = [
        (re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name), path)
        for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    ]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match and path.is_dir())]


def is_whole(checkpoint: Path) -> bool:
    return (checkpoint / TRAINER_STATE_NAME).is_file() and not (checkpoint / INCOMPLETE).exists()


def last_checkpoint(directory: Path, before: Path | None = None, warn: bool = False) -> Path | None:
    """The newest whole one, or the newest before another. What is not whole is passed over."""
    found = checkpoints(directory)
    for path in reversed(found if before is None else found[: found.index(before)]):
        if is_whole(path):
            return path
        if warn:
            logger.warning(f"{path}: expected a whole checkpoint; got one cut short: passing it over")
    return None


def remove(checkpoint: Path) -> None:
    """At no moment does what is left of it look whole."""
    (checkpoint / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def write_manifest(checkpoint: Path) -> None:
    """From then on the checkpoint is whole."""
    paths = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name not in (INCOMPLETE, MANIFEST))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # zlib leaves the interpreter to others
        crcs = list(pool.map(crc32, paths))
    files = {str(p.relative_to(checkpoint)): [p.stat().st_size, crc] for p, crc in zip(paths, crcs, strict=True)}
    (checkpoint / MANIFEST).write_text(json.dumps({"processes": ranks(), "files": files}, indent=1))
    (checkpoint / INCOMPLETE).unlink()


def crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            value = zlib.crc32(piece, value)
    return value


def check_checkpoint(checkpoint: Path, contents: bool = True) -> None:
    """Raise ValueError for a checkpoint that is not as it was saved, or was by another number of processes.

    Without its `contents` sizes alone are looked at. Those of versions without a manifest are taken as they are.
    """
    if (checkpoint / INCOMPLETE).exists():
        raise ValueError(f"{checkpoint}: expected a whole checkpoint; got one cut short: {_remedy(checkpoint)}")
    if not (checkpoint / MANIFEST).is_file():
        return
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except ValueError as error:
        raise ValueError(f"{checkpoint / MANIFEST}: expected JSON; got {error}: {_remedy(checkpoint)}") from error
    if manifest["processes"] != ranks():
        raise ValueError(
            f"{checkpoint}: expected {manifest['processes']} processes, by whose number the data and random states are "
            f"divided; got {ranks()}: start {manifest['processes']} (torchrun --nproc-per-node), or begin a new run "
            f"with {checkpoint / 'student'} as the student"
        )
    for name, (size, _) in manifest["files"].items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            got = "none" if found is None else f"{found:,}"
            raise ValueError(f"{path}: expected the {size:,} bytes that were saved; got {got}: {_remedy(checkpoint)}")
    if not contents:
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(crc32, [checkpoint / name for name in manifest["files"]])
        for (name, (_, crc)), got in zip(manifest["files"].items(), found, strict=True):
            if got != crc:
                raise ValueError(
                    f"{checkpoint / name}: expected the bytes that were saved, of CRC-32 {crc:08x}; got {got:08x}: "
                    f"{_remedy(checkpoint)}"
                )


def _remedy(checkpoint: Path) -> str:
    earlier = last_checkpoint(checkpoint.parent, before=checkpoint)
    return f"remove {checkpoint}, and --resume {_goes_on(earlier)}"


def _goes_on(checkpoint: Path | None) -> str:
    return "begins anew" if checkpoint is None else f"goes on from {checkpoint.name}"


@contextmanager
def writing(path: Path, run: Path) -> Iterator[None]:
    """A file or checkpoint of the run. Raises OSError that says what is left where the disk refuses.

    safetensors and `torch.save` say that in errors of their own.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        refusal = REFUSAL.search(str(error))
        if refusal is None:
            raise
        raise OSError(
            f"{path}: expected to write it; got {refusal[0]} ({free_bytes(run) / 2**20:,.0f} MiB are free "
            f"there): make room, and --resume {_goes_on(last_checkpoint(run))}"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    with writing(path, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, path)


def free_bytes(path: Path) -> int:
    """Where it is, or will be."""
    return shutil.disk_usage(next(p for p in (path, *path.absolute().parents) if p.exists())).free


@contextmanager
def begun(directory: Path, writes: bool = True) -> Iterator[None]:
    """A run that is killed in here leaves `BEGUN`, by which --resume knows it; one that raises leaves nothing.

    Raises OSError where the directory cannot be written.
    """
    marker, is_new = directory / BEGUN, not directory.exists()
    if writes:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            marker.touch()
        except OSError as error:
            raise OSError(
                f"{directory}: expected a directory that can be written; got {error}: pass another --output-dir"
            ) from error
    try:
        yield
    finally:
        if writes:
            marker.unlink(missing_ok=True)
            if is_new and directory.is_dir() and not any(directory.iterdir()):
                directory.rmdir()


class Durable:
    """A trainer's checkpoints."""

    accelerator: Any
    args: Any
    state: Any
    _get_output_dir: Any
    _resumed: Path | None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """`True`: from the last whole checkpoint of output_dir. Raises ValueError for one that is not as saved."""
        if resume_from_checkpoint is True:
            last = last_checkpoint(Path(str(self.args.output_dir)), warn=True)
            resume_from_checkpoint = None if last is None else str(last)
            if last is None:
                raise ValueError(f"expected a whole checkpoint in {self.args.output_dir}; got none")
        self._resumed = None
        if resume_from_checkpoint:
            self._resumed = Path(resume_from_checkpoint).resolve()
            check_checkpoint(Path(resume_from_checkpoint), contents=self.args.should_save)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Whole, or not there. Raises OSError where it cannot be written; what was saved before is kept."""
        run = Path(self._get_output_dir(trial))
        directory = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if directory.resolve() == self._resumed:  # at its end: nothing has happened since
            return
        limit = self.args.save_total_limit
        self.args.save_total_limit = None  # Trainer would remove others before this is whole
        try:
            with timed(SAVING), writing(directory, run):
                if self.args.should_save:
                    remove(directory)  # of a run that was killed
                    directory.mkdir(parents=True)
                    (directory / INCOMPLETE).touch()
                self.accelerator.wait_for_everyone()
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_manifest(directory)
        except OSError:
            if self.args.should_save:  # another process would take away what keeps it from looking whole
                remove(directory)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit:
            self._remove_surplus(run, {directory})

    def _finalize_training(self, trial: Any, *args: Any) -> Any:
        """With save_total_limit=1 the best checkpoint alone stays: Trainer's own way leaves halves if it is killed."""
        best = self.state.best_model_checkpoint
        if best is not None and self.args.save_total_limit == 1 and self.args.should_save:
            self._remove_surplus(Path(self._get_output_dir(trial)), set())
        return super()._finalize_training(trial, *args)  # type: ignore[misc]

    def _remove_surplus(self, run: Path, kept: set[Path]) -> None:
        """The oldest ones beyond save_total_limit, but for the best and those `kept`; and what is not whole."""
        best = self.state.best_model_checkpoint
        kept = {path.resolve() for path in [*kept, *([Path(best)] if best else [])]}
        found = [path for path in checkpoints(run) if path.resolve() not in kept]
        whole = [path for path in found if is_whole(path)]
        surplus = len(kept) + len(whole) - max(self.args.save_total_limit, len(kept))
        for path in [*(path for path in found if path not in whole), *whole[: max(surplus, 0)]]:
            remove(path)
