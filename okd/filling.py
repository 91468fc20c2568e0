"""What a teacher's cache lacks is computed: sorted by length, each process a share of it, and written as it comes.

A process that is killed loses the last minutes alone (`okd.store`); the next one goes on with what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from torch import Tensor
from transformers.utils import logging

from okd.answers import bar, batches
from okd.cache import DTYPES, Missing, TeacherCache, as_read, plain_head
from okd.clock import CACHE, timed
from okd.data import Batch, Collator, Packed, Row, on_device
from okd.durable import free_bytes
from okd.layers import states_entering
from okd.models import device_of, evaluating, hidden_states, relative_error, response_rows
from okd.sharding import most, ranks
from okd.teachers import Stored
from okd_kernels import linear_topk

CHECKED = 4  # rows by which stored states are held against the whole model's
DIFFERENCE = {torch.float32: 1e-3}  # relative, that they may make; 0.03 in 16 bit
logger = logging.get_logger(__name__)


def fill(
    cache: TeacherCache,
    teacher: Any,  # of `okd.teachers`
    rows: Sequence[Row],
    options: Any,
    pad_token_id: int,
    inside: Callable[[Callable[[], Any]], Any],
    autocast: Callable[[], AbstractContextManager[Any]],
    of_its_data: bool = False,
) -> None:
    """Compute and keep what the cache lacks of these rows; all processes call it.

    inside: runs what reads divided weights (`Sharded.inside`). of_its_data: a complete cache has some of these rows.
    Size and time are logged before anything is written.

    Raises ValueError for other data, where the teacher that computes them is not in memory, or where a part of it gives
    others than the whole does; OSError where the disk has no room.
    """
    missing = cache.missing(rows, of_its_data)
    with teacher.computing(options.device) as model:
        able = [model is not None] if ranks() == 1 else gather_object([model is not None])
        if missing and not any(able):
            name = rows[missing[0].at]["id"]
            raise ValueError(
                f"{cache.directory}: expected all rows; {len(missing):,} are missing, such as {name}, and the teacher "
                "that computes them is not in memory: run okd cache, or pass the teacher with its weights"
            )
        if missing:
            _check_room(cache, missing)
        if missing and model is not None:
            rank = dist.get_rank() if ranks() > 1 else 0
            own = missing[sum(able[:rank]) :: sum(able)]
            together = most if ranks() > 1 and all(able) else int
            inside(lambda: _compute(cache, model, rows, missing, own, together, options, pad_token_id, autocast))
        elif model is not None:
            first = [as_read(row) for row in rows[:CHECKED]]
            inside(lambda: _check(cache, model, first, pad_token_id, autocast))
    if ranks() > 1:
        dist.barrier()
        cache.store.refresh()


def _check_room(cache: TeacherCache, missing: Sequence[Missing]) -> None:
    size, free = sum(one.kept for one in missing) * cache.manifest.bytes_a_token, free_bytes(cache.directory)
    if size > free:
        raise OSError(
            f"{cache.directory}: expected {size / 2**30:.2f} GiB of room, {cache.manifest.bytes_a_token:,} bytes a "
            f"token; got {free / 2**30:.2f}: pass another --teacher-cache, --teacher-cache-dtype bfloat16, or, with a "
            "frozen teacher, --teacher-cache-top-k 64"
        )


def _compute(
    cache: TeacherCache,
    model: Any,
    rows: Sequence[Row],
    missing: Sequence[Missing],
    own: Sequence[Missing],  # this process's share of them
    together: Callable[[int], int],
    options: Any,
    pad_token_id: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    size, collate, started = options.per_device_eval_batch_size, Collator(pad_token_id), time.perf_counter()
    parts = list(batches(own, lambda one: one.tokens, size, "", False))
    # divided weights want all to compute as long as one does
    n = together(len(parts))
    is_first = own[:1] == missing[:1]
    for i in bar(range(n), "teacher cache", is_first and not options.disable_tqdm):
        part = [as_read(rows[one.at]) for one in (parts[i] if i < len(parts) else missing[:1])]
        with evaluating(model), autocast(), _or_refuse(cache, model):
            entries = _entries(cache, model, on_device(collate(part), device_of(model)))
        for row, entry in zip(part, entries, strict=True):
            cache.store.put(cache.key(row), entry)
        if i == 0:
            seconds = time.perf_counter() - started
            _check(cache, model, part[:CHECKED], pad_token_id, autocast)
            if is_first:
                done = sum(len(row["input_ids"]) for row in part)
                _announce(cache, missing, seconds / done * sum(one.tokens for one in own))
                cache.write_manifest()
                if cache.manifest.is_last and cache.manifest.top_k is None:
                    cache.write_head(plain_head(model))
    cache.store.flush()


def _announce(cache: TeacherCache, missing: Sequence[Missing], seconds: float) -> None:
    manifest, kept = cache.manifest, sum(one.kept for one in missing)
    what = "response tokens" if manifest.is_last else "tokens"
    logger.warning(
        f"{cache.directory}: {len(missing):,} rows, {kept:,} {what} of {manifest.bytes_a_token:,} bytes: "
        f"{kept * manifest.bytes_a_token / 2**20:,.1f} MiB, about {seconds:,.0f} s"
    )


def _entries(cache: TeacherCache, model: Any, batch: Batch) -> list[dict[str, Tensor]]:
    """Of each row, on the CPU."""
    manifest, dtype = cache.manifest, DTYPES[cache.manifest.dtype]
    if not manifest.is_last:
        run = partial(states_entering, layer=manifest.layer)
        states = hidden_states(model, batch["input_ids"], batch["attention_mask"], run).to(dtype).cpu()
        return [{"states": x[:n]} for x, (_, _, n) in zip(states, batch["spans"], strict=True)]
    rows = response_rows(model, batch)
    if manifest.top_k is None:
        return [{"states": x} for x in rows.to(dtype).cpu().split(batch["counts"])]
    head = plain_head(model).to(rows.device)
    found = linear_topk(rows, head, manifest.top_k, vocab_size=manifest.vocab_size, temperature=manifest.temperature)
    parts = (x.cpu().split(batch["counts"]) for x in (found.ids.int(), found.log_probs.float()))
    return [{"ids": ids, "log_probs": log_probs} for ids, log_probs in zip(*parts, strict=True)]


def _check(
    cache: TeacherCache,
    model: Any,
    rows: Sequence[Row],
    pad_token_id: int,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Raise ValueError unless what is kept gives the last hidden states that the whole model gives."""
    manifest = cache.manifest
    if manifest.top_k is not None:
        return
    batch = on_device(cache.collating(Collator(pad_token_id))(rows), device_of(model))
    with evaluating(model), autocast(), _or_refuse(cache, model):
        expected = response_rows(model, batch)
        found = batch["teacher_states"] if manifest.is_last else response_rows(model, batch, as_teacher=True)
        difference = relative_error(found.float(), expected.float())
        if not difference <= DIFFERENCE.get(DTYPES[manifest.dtype], 0.03):
            raise RuntimeError(f"they differ by {100 * difference:.2g} %")


@contextmanager
def _or_refuse(cache: TeacherCache, model: Any) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (TypeError, RuntimeError, AttributeError, LookupError) as error:
        raise ValueError(
            f"expected a teacher whose upper layers go on from states that enter layer {cache.manifest.layer}, and "
            f"these in {cache.directory}; got {type(model).__name__}, whose last hidden states are others than those "
            f"of the whole model ({type(error).__name__}: {error}): leave teacher_cache out, or remove that directory"
        ) from error


def _here(work: Callable[[], Any]) -> Any:
    return work()


class Filling:
    """A trainer's part in it."""

    accelerator: Any
    args: Any
    cache: TeacherCache | None
    eval_dataset: Any
    inside: Any
    pair: Any
    tokenizer: Any
    train_dataset: Any
    _filled_with: Any = False  # the rows that it has: a command fills before it measures, a training as it begins

    def fill_cache(self) -> None:
        """With all rows of the run; what has none of them is of other data from then on."""
        if self.cache is None or self._filled_with is self.train_dataset:
            return
        train = self.train_dataset.rows if isinstance(self.train_dataset, Packed) else self.train_dataset or ()
        self._fill(self.cache, train, of_its_data=True)
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, Mapping) else [self.eval_dataset or ()]
        for rows in sets:
            self.fill_held_out(rows)
        if self.args.process_index == 0:
            for cache in (self.cache, self.cache.held_out):
                if not cache.manifest.is_complete:  # one that is read alone may lie where nobody writes
                    cache.write_manifest(is_complete=True)
        self._filled_with = self.train_dataset

    def fill_held_out(self, rows: Sequence[Row]) -> None:
        """Before these rows are evaluated."""
        if self.cache is not None and len(rows):
            self._fill(self.cache.held_out, rows)

    def _fill(self, cache: TeacherCache, rows: Sequence[Row], of_its_data: bool = False) -> None:
        with timed(CACHE):
            fill(
                *(cache, self.pair.teacher, rows, self.args, self.tokenizer.pad_token_id),
                inside=_here if isinstance(self.pair.teacher, Stored) else self.inside,
                autocast=self.accelerator.autocast,
                of_its_data=of_its_data,
            )
