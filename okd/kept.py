"""Responses that are written once and read by many batches: in memory, and in files that a restart finds again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object

from okd.data import STUDENT, seed_of
from okd.durable import writing
from okd.models import numbers_of, weights_of
from okd.options import option
from okd.sharding import ranks


@dataclass
class KeptOptions:
    """Read by methods that may keep what was written."""

    generate: str | None = option(
        None,
        "when responses are written: step (anew for each batch), epoch (all at its start), or once (beam search by the "
        "teacher, kept by example); default: as the method says",
        choices=("step", "epoch", "once"),
    )
    num_beams: int = option(5, "beams of responses that are written once", least=1)


class Asked(NamedTuple):
    name: str  # id of the row
    prompt: list[int]  # as the writer reads it
    limit: int  # longest response


class Kept:
    """Responses by key, in memory and in JSON lines under the run's directory, one file for each process."""

    def __init__(self, directory: Path, name: str, rank: int):
        self.directory, self.file = directory, directory / f"{name}_{rank}.jsonl"
        self.found: dict[str, list[int]] = {}
        self.is_cut = self.file.is_file() and not self.file.read_text().endswith("\n")
        for path in sorted(directory.glob(f"{name}_*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    self.found |= json.loads(line)
                except ValueError:  # cut short where a run was killed: it is written anew
                    continue

    def put(self, responses: Mapping[str, list[int]], write: bool = True) -> None:
        self.found |= responses
        if write and responses:
            self.directory.mkdir(parents=True, exist_ok=True)
            with writing(self.file, self.directory.parent), self.file.open("a") as file:
                file.write("\n" * self.is_cut)
                self.is_cut = False
                file.writelines(json.dumps({key: ids}) + "\n" for key, ids in responses.items())


class Keeper:
    """What a run's writers have written: the teacher's for good, the student's for an epoch.

    Args:
        write: responses of a writer to what it is asked, anew.
        vocab_size: ids that it may write.
        together: the largest of a number of each process that writes in step with this one.
    """

    def __init__(
        self,
        options: Any,
        teacher: Any,
        write: Callable[[Sequence[Asked], str], list[list[int]]],
        vocab_size: Callable[[], int],
        together: Callable[[int], int] = int,
    ):
        self.options, self.teacher, self.write, self.vocab_size = options, teacher, write, vocab_size
        self.together = together
        self.directory = Path(str(options.output_dir)) / "responses"
        self.epoch, self.kept = 0, dict[str, Kept]()

    def look_up(self, asked: Sequence[Asked], writer: str) -> list[list[int]]:
        """Kept responses; what is missing is written, and kept."""
        kept, keys = self._of(writer), [self._key(one) for one in asked]
        missing = {key: one for key, one in zip(keys, asked, strict=True) if key not in kept.found}
        if self.together(len(missing)):
            kept.put(dict(zip(missing, self.write(list(missing.values()), writer), strict=True)))
        return [kept.found[key] for key in keys]

    def write_ahead(self, asked: Sequence[Asked], writer: str, size: int) -> None:
        """Write what is missing, so many at a time, each process a share of it."""
        kept = self._of(writer)
        share = asked[self.options.process_index :: ranks()]
        own = sorted((one for one in share if self._key(one) not in kept.found), key=lambda one: len(one.prompt))
        for i in range(self.together(-(-len(own) // size))):
            part = own[i * size : (i + 1) * size]
            written = self.write(part, writer)
            kept.put({self._key(one): ids for one, ids in zip(part, written, strict=True)})
        if ranks() > 1:
            for found in gather_object([kept.found]):
                kept.put(found, write=False)

    def begin_run(self, epoch: int) -> None:
        """Forget what the student of an earlier run in this directory wrote for later epochs (-1: for any); and then
        what a self-teacher did, which was made of that student."""
        self.kept = {}
        is_self_taught = self.teacher is not None and not self.teacher.judges
        if self.options.local_process_index == 0:
            for path in self.directory.glob("*.jsonl"):
                writer, number, *_ = path.stem.split("_")
                if int(number) > epoch if writer == STUDENT else epoch < 0 and is_self_taught:
                    path.unlink()

    def _of(self, writer: str) -> Kept:
        name = f"{writer}_{self.epoch}" if writer == STUDENT else writer
        if name not in self.kept:
            for old in [other for other in self.kept if other.startswith(f"{STUDENT}_") and writer == STUDENT]:
                del self.kept[old]
            self.kept[name] = Kept(self.directory, name, self.options.process_index)
        return self.kept[name]

    def _key(self, asked: Asked) -> str:
        """Of an example as it is answered by this run's teacher, options and seed."""
        return f"{seed_of(self.how, asked.name, asked.limit, *asked.prompt):x}"

    @cached_property
    def how(self) -> int:
        """A few numbers of every weight of the teacher, without those that train; and how responses are written."""
        options, method, teacher, weights = self.options, self.options.resolved, self.teacher, list[torch.Tensor]()
        training = {id(p) for p in teacher.parameters() if p.requires_grad}
        if teacher.judges:
            with teacher.as_it_was() as model:
                weights = numbers_of((p for p in weights_of(model) if id(p) not in training), 8)
        numbers = torch.cat(weights).tolist() if weights else []
        return seed_of(*numbers, options.seed, options.num_beams, method.draw, method.generate, self.vocab_size())
