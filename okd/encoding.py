"""Examples -> rows: which become a row, and what is said of those that do not.

Every example that is shortened, changed or left out is counted and named. Examples become records (`FEATURES`): a row,
or why there is none. A list of them gives rows in memory, a `datasets.Dataset` rows on disk, mapped once for all
processes and runs, and an iterable data set rows as they are read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import jinja2
import torch
import transformers
from datasets import Features, List, Value
from transformers.utils import logging

from okd import alignment as of_alignment
from okd import chat
from okd import examples as of_examples
from okd.alignment import Alignment, cut_at
from okd.chat import IGNORE
from okd.data import ALIGNED, Packed, Row, Rows, column, lengths_of, packed_windows
from okd.examples import encode_one, id_of, in_our_words, parse, place_of, teacher_prompt_of, template_of, without_none
from okd.options import option

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)


@dataclass
class RowOptions:
    """Read by all methods."""

    max_length: int = option(512, "tokens of an example; longer ones are cut on the right, and counted", least=1)
    packing: bool = option(
        False,
        "join rows up to max_length tokens, each attending to itself; a batch is so many lines",
    )
    dataset_num_proc: int | None = option(
        None, "processes that encode a large data set; default: one for each core, at most 16", least=1
    )

    @property
    def processes(self) -> int:
        return self.dataset_num_proc or min(16, os.cpu_count() or 1)


FEATURES = Features(
    {
        "id": Value("string"),
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "teacher": Value("string"),
        "teacher_prompt": List(Value("int32")),
        **{name: List(Value("int32")) for name in ALIGNED},
        "length": Value("int32"),  # tokens of the row
        "responses": Value("int32"),  # of which are response
        "highest": Value("int32"),  # id of its tokens, and of the teacher's prompt
        "positions": Value("int32"),  # aligned with those of a teacher with a tokenizer of its own
        "teacher_highest": Value("int32"),  # id of the tokens of such a teacher
        "part": Value("int32"),  # 0 in the first record of an example
        "place": Value("float64"),  # of the example by its prompt, in [0, 1): see `place_of`
        "prompt": Value("string"),  # as the data have it
        "truncated": Value("bool"),
        "skipped": Value("string"),  # why the example, or a turn of it, gives no row
        "bad": Value("string"),  # why the example is none
        "notes": Value("string"),  # what was done to it, a line each
    }
)
LINE = "jsonl"  # the column of a data set whose examples are lines of JSON
JUDGED = 1000  # examples of a stream after which `max_bad_share` is held to


@dataclass
class Encoded:
    """What `encode` made of its examples: the rows, and the ids of those it shortened, left out, or changed."""

    rows: Sequence[Row] = field(default_factory=list)
    truncated: list[str] = field(default_factory=list)  # ids of rows cut to max_length
    skipped: dict[str, list[str]] = field(default_factory=dict)  # reason -> ids of examples without a response
    bad: dict[str, list[str]] = field(default_factory=dict)  # reason -> ids of examples that are none
    notes: dict[str, list[str]] = field(default_factory=dict)  # what was done to examples -> their ids

    @classmethod
    def of(cls, records: Sequence[dict[str, Any]] | datasets.Dataset, max_bad_share: float = 1.0) -> Encoded:
        """Of records. Raises ValueError where there is no row, or more than this share of the examples are none."""

        def values(name: str) -> list[Any]:
            return records[name][:] if isinstance(records, datasets.Dataset) else [r[name] for r in records]

        names, parts, bad, skipped = (values(name) for name in ("id", "part", "bad", "skipped"))
        kept = [i for i in range(len(names)) if bad[i] is None and skipped[i] is None]
        rows: Sequence[Row]
        if isinstance(records, datasets.Dataset):
            rows = Rows(records if len(kept) == len(names) else records.select(kept))
        else:
            rows = [Rows.row(records[i]) for i in kept]
        found = cls(rows)
        found.truncated = [name for name, cut in zip(names, values("truncated"), strict=True) if cut]
        for reasons, given in ((found.bad, bad), (found.skipped, skipped)):
            for name, reason in zip(names, given, strict=True):
                if reason is not None:
                    reasons.setdefault(reason, []).append(name)
        for name, part, notes in zip(names, parts, values("notes"), strict=True):
            for note in notes.splitlines() if notes and not part else ():
                found.notes.setdefault(note, []).append(name.removesuffix("#1"))
        check_bad(found.bad, parts.count(0), max_bad_share)
        if not rows:
            raise ValueError(
                f"expected at least one example with a response token, got {found.summary()}; "
                'raise max_length, or see that the data has completions or messages of role "assistant"'
            )
        return found

    def summary(self) -> str:
        """One line for the log: "3 examples, 40 tokens (12 response); truncated 1; skipped 1 for a reason (its id)"."""
        if isinstance(self.rows, Rows):
            responses = sum(column(self.rows, "responses"))
        else:
            responses = sum(label != IGNORE for row in self.rows for label in row["labels"])
        parts = [f"{len(self.rows):,} examples, {sum(lengths_of(self.rows)):,} tokens ({responses:,} response)"]
        if self.truncated:
            parts.append(f"truncated {len(self.truncated):,}")
        is_stored = isinstance(self.rows, Rows)
        aligned = column(self.rows, "positions") if is_stored else [len(row.get("aligned", ())) for row in self.rows]
        if positions := sum(n or 0 for n in aligned):
            parts.append(f"{positions:,} positions aligned with the teacher's tokens")
        bad = list(self.bad.items())
        parts += [f"skipped {_counted(ids)}: {reason}" for reason, ids in bad[:5]]
        if len(bad) > 5:  # a reason quotes the example, so there may be as many
            parts.append(f"skipped {sum(len(ids) for _, ids in bad[5:]):,} for other reasons")
        parts += [f"skipped {_counted(ids, reason)}" for reason, ids in self.skipped.items()]
        parts += [_counted(ids, note) for note, ids in self.notes.items()]
        return "; ".join(parts)


def _counted(ids: Sequence[str], reason: str = "") -> str:
    return f"{len(ids):,}{reason and ' '}{reason} ({', '.join(ids[:5])}{', ...' if len(ids) > 5 else ''})"


def check_bad(bad: Mapping[str, Sequence[str]], seen: int, max_bad_share: float) -> None:
    """Raise ValueError where more than this share of the examples seen are none."""
    count = sum(map(len, bad.values()))
    if count > max_bad_share * seen:
        reasons = "; ".join(f"{reason} ({', '.join(ids[:5])})" for reason, ids in list(bad.items())[:5])
        raise ValueError(
            f"expected at most {100 * max_bad_share:.1f} % of the examples to be none; got {count:,} of {seen:,}: "
            f"{reasons}. Correct them, or raise max_bad_share"
        )


def encode(
    examples: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template: bool | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    ends: Collection[int] = (),
    max_bad_share: float = 0.01,
    alignment: Alignment | None = None,
) -> Encoded:
    """Rows whose labels equal input_ids on response tokens and -100 elsewhere, cut on the right to max_length.

    chat_template
        True   "messages" and "prompt" + "completion" are rendered with the tokenizer's chat template; which tokens are
               responses, `okd.chat` says
        False  [bos] + prompt + completion + eos; the response is completion + eos
        None   True if the tokenizer has a chat template, else False
    template_kwargs: variables of the template. `ends`: ids that end a response at generation, beside the tokenizer's.
    "text" is never rendered: [bos] + text + eos is all response. Rows pass through, under the same rules.
    `alignment`: with a teacher that has a tokenizer of its own, whose tokens each row then carries, too.

    An example that cannot be encoded is left out, and counted by reason. Raises ValueError if more than `max_bad_share`
    of them are, or if none has a response token.
    """
    encoder = Encoder(
        tokenizer,
        max_length=max_length,
        chat_template=chat_template,
        template_kwargs=template_kwargs,
        ends=ends,
        alignment=alignment,
    )
    return Encoded.of(encoder.records(examples), max_bad_share)


class Encoder:
    """Examples -> records, as `encode` says.

    columns: our names of fields -> theirs in the data. It pickles, so that `map` may have processes, and its
    `fingerprint` says all that its records hang on.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        chat_template: bool | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        ends: Collection[int] = (),
        columns: Mapping[str, str] | None = None,
        alignment: Alignment | None = None,
    ):
        self.tokenizer, self.max_length, self.columns = tokenizer, max_length, dict(columns or {})
        self.template, self.alignment = template_of(tokenizer, chat_template, ends, template_kwargs), alignment
        self.options = (max_length, chat_template, sorted(ends), sorted(self.columns.items()))

    def __call__(self, example: Any, name: str) -> list[dict[str, Any]]:
        """The records of an example, whose own id goes before this name."""
        if isinstance(example, Mapping):
            renamed = {ours: example[theirs] for ours, theirs in self.columns.items() if theirs in example}
            example = in_our_words({**example, **renamed})
        name, place = _stored(id_of(example, default=name)), place_of(example)
        empty: Any = {"id": name, "input_ids": [], "labels": [], "length": 0, "responses": 0, "part": 0, "place": place}
        empty = {**dict.fromkeys(FEATURES), **empty, "truncated": False}
        try:
            rows, notes = encode_one(example, self.tokenizer, self.template)
            if self.alignment is None:
                of_rows = [labels for _, labels in rows]
                teacher_prompt = teacher_prompt_of(example, of_rows, self.tokenizer, self.template)
                told: Sequence[dict[str, list[int]] | None] = [None] * len(rows)
            else:
                teacher_prompt = None
                rows, told = self.alignment.rows(example, rows)
        except (ValueError, TypeError, jinja2.TemplateError) as error:
            return [{**empty, "bad": _stored(str(error))}]
        given, records = example.get("prompt"), []
        common = {
            "teacher": None if example.get("teacher") is None else _stored(str(example["teacher"])),
            "teacher_prompt": teacher_prompt,
            "prompt": given if isinstance(given, str) else None,
            "notes": "\n".join(dict.fromkeys(notes)) or None,
        }
        for part, ((ids, labels), of_teacher) in enumerate(zip(rows, told, strict=True)):
            record = {**empty, **common, "id": name if len(rows) == 1 else f"{name}#{part + 1}", "part": part}
            record |= self._cut(ids, labels, of_teacher)
            records.append({**record, "highest": max([*record["input_ids"], *(teacher_prompt or ())], default=0)})
        return records

    def _cut(self, ids: list[int], labels: list[int], told: dict[str, list[int]] | None) -> dict[str, Any]:
        cut = len(ids) > self.max_length
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        labels[:1] = [IGNORE]  # no position comes before the first token to predict it
        responses = len(labels) - labels.count(IGNORE)
        if not responses:
            where = f" in the first {self.max_length:,}" if cut else ""
            return {"skipped": f"without response token{where}"}
        found = {"input_ids": ids, "labels": labels, "length": len(ids), "responses": responses, "truncated": cut}
        if told is None:
            return found
        told = cut_at(told, self.max_length)
        if not told["aligned"]:
            return {"skipped": "without position aligned with the teacher's tokens"}
        numbers = {"positions": len(told["aligned"]), "teacher_highest": max(told["teacher_input_ids"])}
        return {**found, **told, **numbers}

    def stream(self, examples: Iterable[Any]) -> Iterator[dict[str, Any]]:
        """The records of examples that come one after the other, which are called #0, #1, ..."""
        for i, example in enumerate(examples):
            yield from self(example, f"#{i}")

    def columnar(self, columns: dict[str, list[Any]], indices: Sequence[int], name: str) -> dict[str, list[Any]]:
        """Of a batch of a `datasets` data set, whose examples are called after its name, and the line or number."""
        records: list[dict[str, Any]] = []
        if list(columns) == [LINE]:
            for line, i in zip(columns[LINE], indices, strict=True):
                if line.strip():
                    records += self(parse(line, f"{name}:{i + 1}"), f"{name}:{i + 1}")
        else:
            for i, values in zip(indices, zip(*columns.values(), strict=True), strict=True):
                example = without_none(dict(zip(columns, values, strict=True)))
                records += self(example, f"{name}:{i + 1}" if name else f"#{i}")
        return {key: [record[key] for record in records] for key in FEATURES}

    def records(self, examples: Any, num_proc: int | None = None) -> Any:
        """In memory, or of a `datasets.Dataset` on disk."""
        if isinstance(examples, datasets.Dataset):
            return self.map(examples, num_proc=num_proc)
        return list(self.stream(examples))

    def map(self, examples: Any, name: str = "", num_proc: int | None = None) -> Any:
        """Records of a `datasets` data set; on disk, for all processes, and found again by the next run; of an
        iterable one, an iterable."""
        missing = sorted(set(self.columns.values()) - set(examples.column_names or self.columns.values()))
        if missing and LINE not in examples.column_names:
            raise ValueError(
                f"expected columns {', '.join(self.columns.values())}; got none called {', '.join(missing)} in "
                f"{name or 'the data set'}, which has {', '.join(examples.column_names)}: correct data_columns"
            )
        options: dict[str, Any] = {"batched": True, "with_indices": True, "features": FEATURES}
        options |= {"remove_columns": examples.column_names, "batch_size": 250}
        function = partial(self.columnar, name=name)
        if isinstance(examples, datasets.IterableDataset):
            return examples.map(function, **options)
        options |= {"new_fingerprint": self.fingerprint(examples, name), "desc": f"encoding {name}".strip()}
        many = num_proc and num_proc > 1 and len(examples) >= 1000 * num_proc
        return examples.map(function, num_proc=num_proc if many else None, **options)

    def fingerprint(self, examples: datasets.Dataset, name: str) -> str:
        """Of the examples and of what becomes of them: the tokenizer, its template, the options, and this code."""
        parts: list[Any] = [examples._fingerprint, name, self.options, transformers.__version__]
        parts += _identity(self.tokenizer, self.template)
        if self.alignment is not None:
            parts += _identity(self.alignment.tokenizers[1], self.alignment.template)
            parts += [sorted(self.alignment.ends), sorted(self.alignment.teacher_ends)]
        modules = (__file__, of_examples.__file__, chat.__file__, of_alignment.__file__)
        parts += [Path(str(module)).read_text() for module in modules]
        return hashlib.sha256(repr(parts).encode(errors="surrogatepass")).hexdigest()[:32]


def _identity(tokenizer: Any, template: Any) -> list[Any]:
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary: Any = sorted(tokenizer.get_vocab().items())
    if backend is not None:  # calls leave truncation and padding behind
        vocabulary = {**json.loads(backend.to_str()), "truncation": None, "padding": None}
    of_template = None if template is None else (template.now, sorted(map(repr, template.kwargs.items())))
    return [vocabulary, tokenizer.special_tokens_map, of_template, tokenizer.chat_template]


def _stored(text: str) -> str:
    """As Arrow takes it: a lone surrogate is spelled out."""
    return text.encode(errors="backslashreplace").decode()


class Stream(torch.utils.data.IterableDataset):
    """Rows of records as they come, which may have no end; lines of rows where they are packed, to so many tokens.

    Raises ValueError where more than `max_bad_share` of the examples are none, from `JUDGED` examples on.
    """

    def __init__(self, records: Iterable[dict[str, Any]], max_bad_share: float, packed_to: int | None = None):
        self.records, self.max_bad_share, self.packed_to = records, max_bad_share, packed_to

    def __iter__(self) -> Iterator[Any]:
        return self._rows() if self.packed_to is None else packed_windows(self._rows(), self.packed_to)

    def _rows(self) -> Iterator[Row]:
        seen, bad = 0, dict[str, list[str]]()
        for record in self.records:
            seen += not record["part"]
            if record["bad"] is not None:
                if record["bad"] not in bad and len(bad) < 5:
                    logger.warning(f"skipped {record['id']}: {record['bad']}")
                bad.setdefault(record["bad"], []).append(record["id"])
                if seen >= JUDGED:
                    check_bad(bad, seen, self.max_bad_share)
            elif record["skipped"] is None:
                yield Rows.row(record)
        check_bad(bad, seen, self.max_bad_share)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.records, "set_epoch"):
            self.records.set_epoch(epoch)


def in_lines(rows: Any, max_length: int) -> Any:
    """Rows, or a `Stream` of them, packed on lines of at most max_length tokens."""
    if isinstance(rows, Stream):
        return Stream(rows.records, rows.max_bad_share, max_length)
    return Packed(rows, lengths_of(rows), max_length)


class _Encoding:
    """Records of an iterable of examples, from its start each time."""

    def __init__(self, encoder: Encoder, examples: Any):
        self.encoder, self.examples = encoder, examples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.encoder.stream(self.examples)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.examples, "set_epoch"):
            self.examples.set_epoch(epoch)


def encoded_rows(
    data: Any, tokenizer: Any, options: Any, ends: Collection[int] = (), alignment: Alignment | None = None
) -> Any:
    """Encoded rows, by an `OKDConfig`: a sequence, or of a mapping one of each; of an iterable data set, a `Stream`."""
    if data is None or isinstance(data, Stream):
        return data
    if isinstance(data, Mapping):
        return {name: encoded_rows(part, tokenizer, options, ends, alignment) for name, part in data.items()}
    if isinstance(data, Encoded):
        return data.rows
    encoder = Encoder(tokenizer, ends=ends, alignment=alignment, **encoder_options(options))
    if isinstance(data, torch.utils.data.IterableDataset | datasets.IterableDataset):
        return Stream(_Encoding(encoder, data), options.max_bad_share)
    with options.main_process_first(desc="encoding") if isinstance(data, datasets.Dataset) else nullcontext():
        encoded = Encoded.of(encoder.records(data, options.processes), options.max_bad_share)
    said = encoded.truncated or encoded.skipped or encoded.bad or encoded.notes
    logger.log(logging.WARNING if said else logging.INFO, encoded.summary())
    return encoded.rows


def encoder_options(options: Any) -> dict[str, Any]:
    """What an `Encoder` takes of an `OKDConfig`."""
    names = ("max_length", "chat_template", "template_kwargs")
    return {name: getattr(options, name) for name in names}
