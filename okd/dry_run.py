"""What `okd train` would do, before it does: options, data, an example, what trains, memory, steps, files.

Models are shapes, of which no weight is read. Data are read and encoded as the run will find them again.
"""

from __future__ import annotations

import math
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import yaml

from okd.budget import Plan, available_memory
from okd.chat import IGNORE
from okd.checkpoints import ADAPTER, STUDENT
from okd.checks import check_data
from okd.config import OKDConfig
from okd.data import Row, lengths_of
from okd.directory import check_output_dir, check_same_run, chosen_options, exact_config
from okd.encoding import Encoded, Encoder, in_lines
from okd.loading import load_tokenizers, teacher_sources, whole_teachers
from okd.models import describe_parameters, stop_tokens
from okd.page import PAGE
from okd.plan import measured_tflops, plan
from okd.report import BEFORE, CONFIG, FIGURES, LOG, REPORT
from okd.run import RunConfig, encoded
from okd.sources import open_all
from okd.trackers import check_trackers
from okd.vocabularies import check_ids, with_vocab_size

LOOKED_AT = 100  # records of a stream
SHOWN = 600  # characters of a part of the example
GREEN, PLAIN = "\033[32m", "\033[0m"


def dry_run(config: RunConfig, args: OKDConfig, colour: bool = False) -> str:
    """As text, its example's response tokens in colour or in ⟦brackets⟧. Raises as the run would for its inputs."""
    given, sources, opened = args, teacher_sources(config, args), open_all(config)
    check_trackers(args.report_to)
    found = plan(config, args)
    places = whole_teachers(sources)
    for model, source in zip(found.models, [config.student or places[0], *places], strict=True):
        if model is not None and (ends := stop_tokens(source)):
            model.generation_config.eos_token_id = sorted(ends)
    student, *teachers = found.models
    tokenizer, teacher_tokenizers = load_tokenizers(config, args, sources)
    if None not in found.models:
        args = with_vocab_size(args, student, teachers or None, tokenizer, teacher_tokenizers)
    encoder, data = encoded(config, args, opened, tokenizer, teacher_tokenizers, student, teachers or None)
    rows = None if config.stream else data["train"].rows
    first, counts = _looked_at(data, opened["train"], encoder)
    texts = () if data["text"] is None else data["text"].rows
    check_data(args, data["train"] if rows is None else rows, rows or (), texts)
    if student is not None:
        check_ids(student, args, rows, texts, data["held-out"].rows)
    written = yaml.safe_dump(exact_config(config, args), sort_keys=False)
    options = yaml.safe_dump(chosen_options(written, config, given), sort_keys=False, allow_unicode=True)
    parts = {
        f"Options (method {args.resolved.name}: {args.resolved.summary})": options,
        "Data": counts,
        f"An example ({first['id']}), its response {'coloured' if colour else 'in brackets'}": example(
            first, tokenizer, colour
        ),
        "Parameters": _parameters(student, teachers),
        "Memory and work": _memory(found),
        "Steps": _steps(args, rows),
        "Files": _files(config, args, written),
    }
    return "\n\n".join(f"{title}\n{'-' * len(title)}\n{text.strip()}" for title, text in parts.items())


def example(row: Row, tokenizer: Any, colour: bool) -> str:
    """The row's text, with the tokens that have labels marked; long parts are cut in their middle."""
    begin, end = (GREEN, PLAIN) if colour else ("⟦", "⟧")
    text = ""
    for is_response, tokens in groupby(zip(row["input_ids"], row["labels"], strict=True), lambda x: x[1] != IGNORE):
        part = tokenizer.decode([i for i, _ in tokens], clean_up_tokenization_spaces=False)
        if len(part) > SHOWN:
            part = f"{part[: SHOWN // 2]} [... {len(part) - SHOWN:,} characters ...] {part[-SHOWN // 2 :]}"
        text += f"{begin}{part}{end}" if is_response else part
    return text


def _looked_at(data: Any, sources: Any, encoder: Encoder) -> tuple[Row, str]:
    """The first training row, and counts; of a stream those of its first source's first records, unshuffled."""
    counts = [f"{use}: {part.summary()}" for use, part in data.items() if isinstance(part, Encoded)]
    if isinstance(data["train"], Encoded):
        return data["train"].rows[0], "\n".join(counts)
    name, stream = sources[0]
    seen = Encoded.of(list(islice(encoder.map(stream, name), LOOKED_AT)))
    return seen.rows[0], "\n".join([f"train: a stream; of its first {LOOKED_AT}: {seen.summary()}", *counts])


def _parameters(student: Any, teachers: list[Any]) -> str:
    lines = [] if student is None else [describe_parameters(student, None)]
    for i, teacher in enumerate(model for model in teachers if model is not None):
        said = describe_parameters(teacher, None).removeprefix("student")
        lines.append(f"teacher{f' {i + 1}' if len(teachers) > 1 else ''}{said}")
    return "\n".join(lines) or "not known: the models cannot be built without weights"


def _memory(found: Plan) -> str:
    available = available_memory(found.device)
    table = found.table(available, measured_tflops(found))
    return table if found.peak <= available else f"{table}\n* to make it fit: {found.advice(available)}"


def _steps(args: OKDConfig, rows: Any) -> str:
    """As transformers' Trainer counts them."""
    per_device, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    unit = "lines" if args.packing else "rows"
    of = f"each of {per_device * accumulated * args.world_size:,} {unit}"
    if accumulated * args.world_size > 1:
        of += f" ({per_device} x {accumulated} accumulated x {args.world_size} processes)"
    if rows is None:
        return f"{args.max_steps:,} steps, {of}, out of a stream"
    lines = in_lines(rows, args.max_length) if args.packing else rows
    batches = len(lines) / (per_device * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    in_epoch = max(1, math.ceil(batches / accumulated))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * in_epoch)
    tokens = f"{len(lines):,} {unit}, {sum(lengths_of(rows)):,} tokens"
    return f"{steps:,} steps, {of}; an epoch is {in_epoch:,} steps ({tokens}), the run {steps / in_epoch:.3g} epochs"


def _files(config: RunConfig, args: OKDConfig, written_config: str) -> str:
    directory = Path(str(args.output_dir))
    written = [f"{STUDENT}/", *([f"{ADAPTER}/"] if args.online else []), PAGE, FIGURES, LOG, CONFIG, BEFORE, REPORT]
    if (strategy := getattr(args.save_strategy, "value", args.save_strategy)) != "no":
        at = f"every {args.save_steps:g} steps" if strategy == "steps" else f"by save_strategy={strategy}"
        kept = "" if args.save_total_limit is None else f", {args.save_total_limit} kept"
        written.append(f"checkpoint-* ({at}{kept})")
    lines = [f"{directory}: {', '.join(written)}"]
    if args.teacher_cache is not None:
        lines.append(f"{args.teacher_cache}: the teacher's states")
    if args.push_to_hub:
        lines.append(f"the hub: {args.hub_model_id or directory.name}")
    try:
        checkpoint = check_output_dir(config, directory)
        if config.resume:
            check_same_run(directory / CONFIG, written_config)
        lines += [f"it goes on from {checkpoint}"] if checkpoint else []
        lines += ["the run that is there is removed"] if config.overwrite and (directory / CONFIG).is_file() else []
    except (FileExistsError, FileNotFoundError, ValueError) as error:
        lines.append(f"okd train would stop here: {error}")
    return "\n".join(lines)
