"""A teacher that is computed once: hidden states of its frozen layers for each example, kept on disk.

The data of a run do not change, nor do the teacher's layers below its online module. So what enters the lowest layer
that learns is a constant of each example. Where nothing learns, the boundary is the top: the last hidden states of the
response tokens, from which any divergence at any temperature is exact, with the teacher's head and without its body; or
the probabilities of its k likeliest tokens, of less disk and a lower bound of the divergence.

A directory holds a manifest, `okd.store.Store`, and for a boundary at the top the head. Rows are found by their
tokens, so that none is taken for another.

Shapes: B rows on lines of T tokens, N of which come before a response token; D the hidden size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from okd.chat import IGNORE
from okd.data import Batch, Row, start_of_response
from okd.durable import write_whole
from okd.layers import first_trainable_layer
from okd.models import fingerprint, has_weights
from okd.options import option
from okd.sharding import of_first
from okd.store import KEY_BYTES, Store
from okd_kernels import LinearHead

MANIFEST, STATES, HEAD, HELD_OUT = "cache.json", "states", "head.safetensors", "held-out"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class CacheOptions:
    """Read by methods that distil one teacher on responses that do not change."""

    teacher_cache: str | None = option(
        None, "directory that keeps hidden states of the teacher's frozen layers, each example's once"
    )
    teacher_cache_dtype: str | None = option(
        None, "their dtype in a new directory; default: as they are computed", choices=tuple(DTYPES)
    )
    teacher_cache_top_k: int | None = option(
        None, "of a frozen teacher keep so many likeliest tokens instead: less disk, a lower bound", least=1
    )


def check_cache_options(options: Any) -> None:
    """Raise ValueError for what a cache would not serve."""
    given = [name for name in ("teacher_cache_dtype", "teacher_cache_top_k") if getattr(options, name) is not None]
    if options.teacher_cache is None:
        if given:
            raise ValueError(f"expected teacher_cache with {given[0]}; got none: pass a directory, or leave it out")
        return
    if options.self_teacher is not None:
        raise ValueError(
            f"expected a teacher of its own with teacher_cache; got self_teacher={options.self_teacher}, which is "
            "another one after each update: leave teacher_cache out"
        )
    if options.teacher_cache_top_k is None:
        return
    if options.teacher_tokenizer is not None:
        raise ValueError(
            "expected the teacher's hidden states with teacher_tokenizer, whose outcomes are merged from all tokens; "
            f"got teacher_cache_top_k={options.teacher_cache_top_k}: leave it out"
        )
    if options.online or not getattr(options.resolved.loss, "takes_top_k", False):
        why = "whose teacher learns" if options.online else "which reads the teacher's hidden states"
        raise ValueError(
            f"expected teacher_cache_top_k with a frozen teacher and a divergence from it alone; got method "
            f"{options.resolved.name}, {why}: leave teacher_cache_top_k out"
        )
    if options.resolved.student.divergence == "alpha_beta":
        raise ValueError(
            "expected a divergence that has a value where the likeliest tokens alone are known; got alpha_beta: leave "
            "teacher_cache_top_k out"
        )


@dataclass(frozen=True)
class Manifest:
    """What a directory holds, and what it was made with.

    Attributes:
        layer: that the states enter; the number of layers: those that the head projects, of response tokens alone.
        width, dtype: of the states.
        name, teacher, files: the teacher's name, a hash of numbers from all its weights that do not train, and one of
            the files that they came from.
        tokenizer, template: hashes.
        top_k, temperature, vocab_size: of probabilities in place of states.
        is_complete: all rows of its data are in it.
    """

    layer: int
    n_layers: int
    width: int
    dtype: str
    name: str
    teacher: str | None
    files: str | None
    tokenizer: str
    template: str
    top_k: int | None = None
    temperature: float = 1.0
    vocab_size: int | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    is_complete: bool = False

    @property
    def is_last(self) -> bool:
        return self.layer == self.n_layers

    @property
    def bytes_a_token(self) -> int:
        """Of all tokens, or, at the top, of response tokens."""
        return 8 * self.top_k if self.top_k is not None else self.width * DTYPES[self.dtype].itemsize

    @classmethod
    def of(cls, options: Any, model: Any, tokenizer: Any, files: str | None) -> Manifest:
        """Of a directory that this run would make. Raises ValueError where no layer is frozen below all that learns."""
        config, layer = model.config.get_text_config(), first_trainable_layer(model)
        if layer == 0:
            raise ValueError(
                "expected a teacher with frozen layers below all that learns, whose states are kept; got an online "
                f"module ({options.resolved.online_module}, online_layers={options.online_layers:g}) that the first "
                "layer feels already: pass online_module=lora with online_layers=0.33, or leave teacher_cache out"
            )
        embeddings, top_k = model.get_input_embeddings().weight, options.teacher_cache_top_k
        head = LinearHead.from_model(model) if layer == config.num_hidden_layers else None
        template = tokenizer.chat_template, options.chat_template, options.chat_template_kwargs
        return cls(
            layer=layer,
            n_layers=config.num_hidden_layers,
            width=config.hidden_size,
            dtype=options.teacher_cache_dtype or str(embeddings.dtype).removeprefix("torch."),
            name=str(getattr(model, "name_or_path", "") or type(model).__name__),
            teacher=of_first(fingerprint(model) if has_weights(model) else None),
            files=files,
            tokenizer=_hash(sorted(tokenizer.get_vocab().items())),
            template=_hash(template),
            top_k=top_k,
            temperature=1.0 if top_k is None else options.temperature,
            vocab_size=None if top_k is None else options.vocab_size,
            logit_scale=1.0 if head is None else head.logit_scale,
            softcap=None if head is None else head.softcap,
        )


def _hash(x: Any) -> str:
    return hashlib.blake2b(repr(x).encode(), digest_size=16).hexdigest()


def read_manifest(directory: Path) -> Manifest | None:
    """None where there is none. Raises ValueError for one that cannot be read."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: expected the manifest of a teacher cache; got {error}: remove {directory}"
        ) from error


def _check_same(directory: Path, found: Manifest, wanted: Manifest, options: Any) -> None:
    """Raise ValueError for a directory of another teacher, tokenizer, template or kind."""
    remedy = "pass another --teacher-cache, or remove that directory"

    def refuse(expected: Any, got: Any) -> ValueError:
        return ValueError(f"{directory}: expected a cache of {expected}; got one of {got}: {remedy}")

    is_known = found.files is not None and found.files == wanted.files
    if not is_known and (wanted.teacher is None or found.teacher != wanted.teacher):
        raise refuse(f"the teacher {wanted.name}", f"{found.name}, or of other weights")
    for name in ("tokenizer", "template"):
        if getattr(found, name) != getattr(wanted, name):
            raise refuse(f"this {name.replace('template', 'chat template and its options')}", "another one")
    for name in ("top_k", "temperature", "vocab_size"):
        if getattr(found, name) != getattr(wanted, name):
            raise refuse(f"{name}={getattr(wanted, name)}", getattr(found, name))
    if options.teacher_cache_dtype not in (None, found.dtype):
        raise refuse(f"teacher_cache_dtype={options.teacher_cache_dtype}", found.dtype)
    if found.layer > wanted.layer:
        raise refuse(f"states that enter layer {wanted.layer}, the lowest that learns, or a lower one", found.layer)


def as_read(row: Row) -> Row:
    """The row as its teacher reads it."""
    if "teacher_input_ids" in row:
        return {"id": row["id"], "input_ids": row["teacher_input_ids"], "labels": row["teacher_labels"]}
    start = start_of_response(row)
    prompt = row.get("teacher_prompt", row["input_ids"][:start])
    labels = [IGNORE] * len(prompt) + row["labels"][start:]
    return {"id": row["id"], "input_ids": prompt + row["input_ids"][start:], "labels": labels}


class Missing(NamedTuple):
    """A row that a cache lacks: its place among others, the tokens that the teacher reads, and those that are kept."""

    at: int
    tokens: int
    kept: int


class TeacherCache:
    """The states of one teacher, in a directory.

    Attributes:
        held_out: the same of rows that are evaluated: itself, or, beside probabilities, one of states.
    """

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest, self.store = directory, manifest, Store(directory / STATES)
        self.held_out: TeacherCache = self
        if manifest.top_k is not None:
            self.held_out = TeacherCache(directory / HELD_OUT, replace(manifest, top_k=None, temperature=1.0))

    @classmethod
    def of(cls, options: Any, model: Any, tokenizer: Any, files: str | None = None) -> TeacherCache:
        """The cache in `options.teacher_cache`, or a new one, of a teacher whose online module is in place.

        files: hash of the files that it came from (`okd.loading.files_of`); a model without weights is known by it.
        Raises ValueError for a teacher none of whose layers is frozen below all that learns, and for a directory that
        was made with another teacher, tokenizer or template, or holds something else.
        """
        directory, wanted = Path(options.teacher_cache), Manifest.of(options, model, tokenizer, files)
        found = read_manifest(directory)
        if found is not None:
            _check_same(directory, found, wanted, options)
        elif directory.is_dir() and any(directory.iterdir()):
            raise ValueError(
                f"{directory}: expected a teacher cache or an empty directory; got one without {MANIFEST}: pass "
                "another --teacher-cache"
            )
        return cls(directory, found or wanted)

    def key(self, row: Row) -> bytes:
        row = as_read(row)
        at = [t for t, label in enumerate(row["labels"][1:]) if label != IGNORE] if self.manifest.is_last else []
        numbers = torch.tensor([len(row["input_ids"]), *row["input_ids"], *at], dtype=torch.int32)
        return hashlib.blake2b(numbers.numpy().tobytes(), digest_size=KEY_BYTES).digest()

    def missing(self, rows: Iterable[Row], of_its_data: bool = False) -> list[Missing]:
        """Each once. Raises ValueError where all rows `of_its_data` are missing in a cache that was complete."""
        found: dict[bytes, Missing] = {}
        has_some = False
        for i, row in enumerate(rows):
            key = self.key(row)
            if key in self.store:
                has_some = True
            elif key not in found:
                own = as_read(row)
                n = sum(x != IGNORE for x in own["labels"][1:]) if self.manifest.is_last else len(own["input_ids"])
                found[key] = Missing(i, len(own["input_ids"]), n)
        if of_its_data and self.manifest.is_complete and found and not has_some:
            raise ValueError(
                f"{self.directory}: expected the data that it was made of; got {len(found):,} rows, none of which is "
                "in it: pass another --teacher-cache, or the data and options that it was made with"
            )
        return list(found.values())

    def collating(self, collate: Callable[[Any], Batch]) -> Collating:
        """A collator whose batches have what the cache holds of their rows."""
        return Collating(collate, self)

    def entry(self, row: Row) -> dict[str, Tensor]:
        """Raises ValueError for a row that is not in it."""
        try:
            return self.store.get(self.key(row))
        except KeyError:
            raise ValueError(
                f"{self.directory}: expected the teacher's states of row {row['id']}; got none: rows are not to change "
                "once a training has begun"
            ) from None

    def head(self) -> LinearHead:
        """Of a boundary at the top. Raises FileNotFoundError where nothing has been computed."""
        path = self.directory / HEAD
        if not path.is_file():
            raise FileNotFoundError(f"{path}: expected the teacher's head; got none: run okd cache")
        tensors = load_file(path)
        return LinearHead(tensors["weight"], tensors.get("bias"), self.manifest.logit_scale, self.manifest.softcap)

    def write_manifest(self, **changes: Any) -> None:
        self.manifest = replace(self.manifest, **changes)
        write_whole(self.directory / MANIFEST, json.dumps(asdict(self.manifest), indent=1))

    def write_head(self, head: LinearHead) -> None:
        tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        part = self.directory / f".{HEAD}.part"
        save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, part)
        part.replace(self.directory / HEAD)


@dataclass(frozen=True)
class Collating:
    """See `TeacherCache.collating`."""

    collate: Callable[[Any], Batch]
    cache: TeacherCache

    def __call__(self, given: Any) -> Batch:
        batch, manifest = self.collate(given), self.cache.manifest
        rows: Any = chain.from_iterable(line if isinstance(line, list) else [line] for line in given)
        entries = [self.cache.entry(row) for row in rows]
        if manifest.top_k is not None:
            batch["teacher_top_k"] = torch.cat([entry["ids"] for entry in entries]).long()
            batch["teacher_log_probs"] = torch.cat([entry["log_probs"] for entry in entries])
            return batch
        batch["teacher_layer"] = manifest.layer
        if manifest.is_last:
            batch["teacher_states"] = torch.cat([entry["states"] for entry in entries])
            return batch
        values: Any = batch
        prefix = "teacher_" if "teacher_input_ids" in batch else ""
        states = torch.zeros(*values[f"{prefix}input_ids"].shape, manifest.width, dtype=DTYPES[manifest.dtype])
        for (line, first, n), entry in zip(values[f"{prefix}spans"], entries, strict=True):
            states[line, first : first + n] = entry["states"]
        batch["teacher_states"] = states
        return batch


def plain_head(model: Any) -> LinearHead:
    """A model's head without gradient, a LoRA on it merged into a copy."""
    head = LinearHead.from_model(model).detach()
    if head.lora is None:
        return head
    down, up, scaling = head.lora
    return replace(head, weight=(head.weight + scaling * up @ down).to(head.weight.dtype), lora=None)


class Head(nn.Module):
    """A teacher's head as a module, which moves and is gathered as others are."""

    def __init__(self, head: LinearHead):
        super().__init__()
        self.head = replace(head, weight=head.weight[:0], bias=None if head.bias is None else head.bias[:0])
        self.weight = nn.Parameter(head.weight, requires_grad=False)
        self.bias = None if head.bias is None else nn.Parameter(head.bias, requires_grad=False)

    def read(self, device: torch.device | None = None) -> LinearHead:
        head = replace(self.head, weight=self.weight, bias=self.bias)
        return head if device is None else head.to(device)
