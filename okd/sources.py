"""Where examples come from: files, directories and hub data sets, read by `datasets`; and how several are mixed.

A source is a JSON lines file (also .gz), a parquet, CSV or Arrow file, or a directory or hub id as
`name[@configuration][:split]`. Lines of JSON stay lines until they are encoded, so that one bad line ends nothing, and
examples need no common schema.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Features, Value

from okd.data import Rows
from okd.encoding import FEATURES, LINE, Encoded, Encoder, Stream
from okd.options import option

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".arrow": "arrow"}
LINES = (".jsonl", ".json", ".ndjson")
STREAMED = 256  # held-out examples of a stream, where their number is not given


@dataclass
class DataOptions:
    """Data of a run."""

    train_data: list[str] | None = option(
        None,
        "JSON lines (also .gz), parquet or CSV files, or hub ids or directories as name[@configuration][:split], of "
        "examples with messages, prompt + completion, or text; several are joined",
    )
    train_weights: list[float] | None = option(
        None, "shares in which rows are drawn from several train_data, until each has been read through"
    )
    eval_data: list[str] | None = option(
        None, "held-out examples, as train_data; default: a share of train_data, by hash of the prompt"
    )
    data_columns: list[str] | None = option(
        None, "our names of fields and theirs in the data, such as messages=conversations or prompt=question"
    )
    eval_share: float = option(0.1, "share of train_data that is held out where there is no eval_data")
    eval_examples: int | None = option(256, "held-out examples that are measured before and after training", least=1)
    stream: bool = option(False, "read train_data as it is needed, rather than encode all of it first; wants max_steps")
    stream_buffer: int = option(10_000, "rows of a stream out of which the next one is drawn", least=1)
    lm_data: list[str] | None = option(None, "plain text that minillm learns beside the responses, as train_data")

    @property
    def columns(self) -> dict[str, str]:
        """Raises ValueError for what is not ours=theirs."""
        pairs = [text.partition("=") for text in self.data_columns or []]
        known = ("messages", "prompt", "completion", "text", "id", "tools", "teacher", "teacher_prompt")
        for ours, equals, theirs in pairs:
            if not equals or not theirs or ours not in known:
                raise ValueError(
                    f"expected data_columns as ours=theirs, ours one of {', '.join(known)}; got {ours}{equals}{theirs}"
                )
        return {ours: theirs for ours, _, theirs in pairs}


def open_data(source: str, stream: bool = False) -> tuple[str, Any]:
    """(name, data set) of a source: a `datasets.Dataset`, memory-mapped, or an iterable one.

    Raises FileNotFoundError where there is none of that name, ValueError for an empty one.
    """
    path = Path(source)
    options: dict[str, Any] = {"streaming": stream, "split": "train"}
    if path.is_file():
        name, kind = path.name, Path(path.name.removesuffix(".gz")).suffix
        if kind in BUILDERS:
            options |= {"path": BUILDERS[kind]}
        elif kind not in LINES:
            expected = ", ".join([*LINES, *BUILDERS])
            raise ValueError(f"{source}: expected a file named {expected} (or with .gz); got {kind or 'no suffix'}")
        elif _starts_with_bracket(path):
            options |= {"path": "json"}
        else:
            # a byte that is no UTF-8 makes its line one that is no JSON either
            features = Features({LINE: Value("string")})
            options |= {"path": "text", "features": features, "encoding_errors": "backslashreplace"}
        options |= {"data_files": str(path.resolve())}
    else:
        place, split = source, "train"
        if not path.is_dir():
            place, colon, given = source.rpartition(":") if ":" in source else (source, "", "")
            split = given if colon else "train"
        place, _, configuration = place.partition("@")
        name = Path(place).name
        options |= {"path": place, "split": split, "name": configuration or None}
    try:
        data = datasets.load_dataset(**options)
    except (FileNotFoundError, ConnectionError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{source}: expected a file, a directory with data files, or a data set of the hub as "
            f"name[@configuration][:split]; could not load it ({str(error).splitlines()[0]}). Check the spelling, the "
            "network, and HF_HUB_OFFLINE"
        ) from error
    except ValueError as error:
        if path.is_file() and "corresponds to no data" in str(error):
            raise ValueError(f"{source}: expected at least one example, got an empty file") from error
        raise
    return name, data


def _starts_with_bracket(path: Path) -> bool:
    opened: Any = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        return next((byte for line in file for byte in line.strip()[:1]), b"") == ord("[")


def open_all(config: DataOptions) -> dict[str, list[tuple[str, Any]]]:
    """The data sets of a run and their names, by "train", "held-out" and "text".

    Raises ValueError without training data, FileNotFoundError for what is not there.
    """
    if not config.train_data:
        raise ValueError("expected training data; got none: pass --train-data with JSON lines, parquet or a hub id")
    weights, n = config.train_weights, len(config.train_data)
    if weights is not None and (len(weights) != n or min(weights) <= 0):
        raise ValueError(f"expected train_weights above 0, one for each of {n} train_data; got {weights}")
    if config.stream and weights is None and n > 1:
        raise ValueError(
            f"expected train_weights with a stream of {n} train_data, which would come one after the other; got none: "
            "pass the shares in which to draw from them"
        )
    return {
        "train": [open_data(source, config.stream) for source in config.train_data],
        "held-out": [open_data(source) for source in config.eval_data or ()],
        "text": [open_data(source) for source in config.lm_data or ()],
    }


def encode_all(
    config: DataOptions, options: Any, opened: Mapping[str, Sequence[tuple[str, Any]]], encoder: Encoder
) -> dict[str, Any]:
    """What `open_all` found as `Encoded` rows, or, with `config.stream`, "train" as a `Stream`.

    Raises ValueError where a side of the split is empty, or more than `options.max_bad_share` of the examples are none.
    """
    with options.main_process_first(desc="encoding"):
        records = {
            use: [encoder.map(data, name, options.processes) for name, data in sources]
            for use, sources in opened.items()
        }
    result: dict[str, Any] = {"text": _encoded(records["text"], options) if records["text"] else None}
    train, held_out = records["train"], records["held-out"]
    if not config.eval_data:
        train, held_out = ([_side(part, config.eval_share, held) for part in train] for held in (False, True))
    if config.stream:
        mixed = _mixed(train, config.train_weights, options.seed)
        result["train"] = Stream(mixed.shuffle(options.seed, buffer_size=config.stream_buffer), options.max_bad_share)
        if not config.eval_data:
            count = -(-(config.eval_examples or STREAMED) // len(held_out))
            held_out = [datasets.Dataset.from_list(list(part.take(count)), features=FEATURES) for part in held_out]
    elif not config.eval_data:
        whole = _encoded(records["train"], options)
        sizes = [sum(map(len, side)) for side in (train, held_out)]
        if not all(sizes):
            raise ValueError(
                f"expected examples on both sides of the split; got {sizes[0]} to train and {sizes[1]} held out of "
                f"{len(whole.rows)}: pass --eval-data, or another --eval-share"
            )
    if not config.stream:
        result["train"] = _encoded(train, options)
        if config.train_weights is not None:
            parts = [Encoded.of(part).rows.records for part in train]  # type: ignore[attr-defined]
            result["train"].rows = Rows(_mixed(parts, config.train_weights, options.seed))
    result["held-out"] = _encoded(held_out, options)
    return result


def _encoded(parts: Sequence[datasets.Dataset], options: Any) -> Encoded:
    return Encoded.of(datasets.concatenate_datasets(list(parts)), options.max_bad_share)


def _side(records: Any, share: float, held_out: bool) -> Any:
    """Records of the examples that are held out, or of the others."""
    if isinstance(records, datasets.IterableDataset):
        return records.filter(lambda place: (place < share) == held_out, input_columns="place")
    chosen = [i for i, place in enumerate(records["place"][:]) if (place < share) == held_out]
    return records.select(chosen)


def _mixed(parts: Sequence[Any], weights: Sequence[float] | None, seed: int) -> Any:
    """One after the other, or drawn in these shares until each has been read through."""
    if weights is None:
        return datasets.concatenate_datasets(list(parts))
    probabilities = [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(
        list(parts), probabilities=probabilities, seed=seed, stopping_strategy="all_exhausted"
    )
