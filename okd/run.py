"""A whole run: load, evaluate, train, evaluate, save. What `okd train` and `okd demo` do.

Order matters: what can be wrong with the input is found before anything is removed or written, and the student is
saved before the second evaluation. Of several processes all evaluate, and the first one writes.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from peft import PeftConfig

import okd_kernels
from okd.alignment import reading
from okd.budget import available_memory, check_fits
from okd.callbacks import First
from okd.checkpoints import ADAPTER, STUDENT
from okd.checks import check_stream
from okd.clock import EVALUATING, LOADING, SAVING, timed
from okd.config import OKDConfig
from okd.data import column
from okd.directory import (
    Measured,
    check_output_dir,
    check_same_run,
    chosen_options,
    exact_config,
    measured_before,
    remove_run,
)
from okd.durable import begun, write_whole, writing
from okd.encoding import Encoded, Encoder, encoder_options
from okd.evaluate import evaluate
from okd.hub import create_repository
from okd.loading import ModelOptions, files_of, load_models, load_teacher, stored_states, teacher_sources
from okd.models import is_dispatched
from okd.online import attach_online_module
from okd.options import check, option
from okd.page import PAGE, write_page
from okd.plan import plan
from okd.record import Record
from okd.report import BEFORE, CONFIG, FIGURES, format_samples, format_table
from okd.sharding import is_elsewhere
from okd.sources import DataOptions, encode_all, open_all
from okd.trackers import check_trackers, send
from okd.trainer import OKDTrainer
from okd.vocabularies import with_vocab_size


@dataclass
class RunConfig(ModelOptions, DataOptions):
    """Models, data and evaluation of a run, beside `OKDConfig`."""

    eval_answers: int = option(32, "held-out prompts that are answered for ROUGE-L", least=0)
    eval_max_new_tokens: int = option(64, "longest such answer, in tokens", least=1)
    resume: bool = option(False, "go on from the last checkpoint in output_dir")
    overwrite: bool = option(False, "remove the run that output_dir holds")

    def __post_init__(self) -> None:
        check(self)
        _ = self.columns  # raises where they are none
        if not 0 < self.eval_share < 1:
            raise ValueError(f"expected eval_share between 0 and 1; got {self.eval_share}")


def run(config: RunConfig, args: OKDConfig) -> dict[str, Any]:
    """Distil, and return what `metrics.json` holds.

    Under `args.output_dir`: student/, teacher_adapter/, report.html and what it shows (metrics.json, config.yaml,
    log.jsonl, before.json, report.json), checkpoints.
    Raises ValueError, FileNotFoundError, FileExistsError saying what to do.
    """
    started, output_dir = time.perf_counter(), Path(str(args.output_dir))
    sources = teacher_sources(config, args)
    opened = open_all(config)
    checkpoint = check_output_dir(config, output_dir)
    check_trackers(args.report_to)
    with begun(output_dir, args.process_index == 0), Record(args) as record:
        if args.push_to_hub and args.process_index == 0:
            create_repository(args)
        return _run(config, args, sources, opened, checkpoint, started, record)


def cache_teacher(config: RunConfig, args: OKDConfig) -> None:
    """Compute what the run with these options would find missing in its teacher's cache, and nothing else.

    Raises ValueError, FileNotFoundError, OSError saying what to do.
    """
    if args.teacher_cache is None:
        raise ValueError("expected a directory for the teacher's states; got none: pass --teacher-cache")
    sources, opened = teacher_sources(config, args), open_all(config)
    transformers.set_seed(args.seed)
    trainer, *_ = _prepare(config, args, sources, opened, None)
    if trainer.is_sharded:
        raise ValueError(
            "expected a whole teacher on each process, which share the rows; got one that they divide: leave --shard "
            "out, or let okd train fill the cache"
        )
    trainer.fill_cache()
    if args.process_index == 0:
        print(f"{args.teacher_cache} is complete: pass the same options to okd train.")


def _prepare(
    config: RunConfig, args: OKDConfig, sources: Any, opened: Any, checkpoint: str | None
) -> tuple[OKDTrainer, Any, dict[str, str | None], str]:
    """The trainer, its teacher as it was loaded, the held-out prompts by id, and the text of config.yaml."""
    method, files = args.resolved, files_of(config, args, sources)
    stored = stored_states(config, args, files)
    student, teacher, tokenizer, teacher_tokenizers = load_models(config, args, sources, stored is not None)
    args = with_vocab_size(args, student, teacher, tokenizer, teacher_tokenizers)
    chosen = args.online and method.online_module == "non_salient" and not hasattr(teacher, "peft_config")
    if checkpoint and chosen:  # once, not again
        modules = PeftConfig.from_pretrained(str(Path(checkpoint) / ADAPTER)).modules_to_save
        teacher = attach_online_module(teacher, args, modules)
    # Before the trainer, whose accelerator would miss what this sets up anew.
    written_config = yaml.safe_dump(exact_config(config, args), sort_keys=False)
    if config.resume:
        check_same_run(Path(str(args.output_dir)) / CONFIG, written_config)
    _, data = encoded(config, args, opened, tokenizer, teacher_tokenizers, student, teacher)
    check_stream(args, data["train"])  # before its rows are asked for
    if args.process_index == 0:
        print("\n".join(f"{use}: {part.summary()}" for use, part in data.items() if isinstance(part, Encoded)))
    held_out: Any = data["held-out"].rows[: config.eval_examples]
    prompts = dict(zip(*(column(data["held-out"].rows, name) for name in ("id", "prompt")), strict=True))
    if stored is not None and (stored.missing(data["train"].rows) or stored.held_out.missing(held_out)):
        teacher = load_teacher(config, args, sources)
    trainer = OKDTrainer(
        student,
        teacher,
        args,
        train_dataset=data["train"],
        eval_dataset=Encoded(held_out),
        processing_class=tokenizer,
        teacher_processing_class=teacher_tokenizers,
        teacher_files=files,
        text_dataset=data["text"],
    )
    return trainer, teacher, prompts, written_config


def encoded(
    config: RunConfig, args: OKDConfig, opened: Any, tokenizer: Any, teacher_tokenizers: Any, student: Any, teacher: Any
) -> tuple[Encoder, dict[str, Any]]:
    """The data of a run, and what has encoded them: for both tokenizers where there are two."""
    alignment, ends = reading(args, tokenizer, teacher_tokenizers, student, teacher)
    encoder = Encoder(tokenizer, ends=ends, columns=config.columns, alignment=alignment, **encoder_options(args))
    return encoder, encode_all(config, args, opened, encoder)


def _run(
    config: RunConfig,
    args: OKDConfig,
    sources: Any,
    opened: Any,
    checkpoint: str | None,
    started: float,
    record: Record,
) -> dict[str, Any]:
    output_dir, method = Path(str(args.output_dir)), args.resolved
    with timed(LOADING):
        planned = plan(config, args)
        check_fits(planned, available_memory(args.device))
        transformers.set_seed(args.seed)
        trainer, teacher, prompts, written_config = _prepare(config, args, sources, opened, checkpoint)
    record.about |= {
        "summary": method.summary,
        "options": chosen_options(written_config, config, args),
        "versions": versions(),
        "parameters": planned.parameters,
    }
    record.planned = planned.peak
    args = trainer.args

    def begin() -> None:
        """With the models where they will train, and before anything of the training."""
        nonlocal teacher
        trainer.fill_cache()
        if checkpoint:
            record.resume(trainer, config)
        else:
            record.choose(trainer, _judge(trainer, teacher), config)
        if trainer.cache is not None and not trainer.is_sharded:
            trainer.pair.teacher.release()
            teacher = None
        before = None if checkpoint else measured("before")
        trainer.accelerator.wait_for_everyone()  # all have looked at output_dir
        if args.process_index == 0:
            if config.overwrite and not checkpoint:
                remove_run(output_dir)
            write_whole(output_dir / CONFIG, written_config)
            if before is not None:
                write_whole(output_dir / BEFORE, json.dumps(before))
        record.write()

    def measured(when: str) -> Measured:
        scores, answers = _measured(trainer, teacher, config, prompts)
        record.answered(when, trainer, _judge(trainer, teacher), answers)
        return scores, answers

    after: Measured = {}, []
    seconds: dict[str, float] = {}

    def end() -> None:
        nonlocal after
        seconds["training"] = round(time.perf_counter() - training_started, 1)
        with timed(SAVING), writing(output_dir / STUDENT, output_dir):
            trainer.save_model(str(output_dir))
        after = measured("after")
        if args.process_index == 0:
            send(trainer, "after", after[0], trainer.state.global_step)

    def send_before() -> None:
        if args.process_index == 0:
            send(trainer, "before", measured_before(output_dir)[0], 0)

    trainer.callback_handler.callbacks.insert(0, First(begin, end))
    trainer.callback_handler.callbacks.append(First(send_before))  # after the trackers have begun
    training_started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    before = measured_before(output_dir)
    seconds["all"] = round(time.perf_counter() - started, 1)
    metrics = {"before": before[0], "after": after[0], "method": method.name, "seed": args.seed}
    metrics |= {"steps": result.global_step, "seconds": seconds, "versions": versions()}
    if args.process_index == 0:
        _report(trainer, output_dir, metrics, record)
        if args.push_to_hub:
            trainer.upload_student()
    return metrics


def _judge(trainer: OKDTrainer, teacher: Any) -> Any:
    """What student and teacher are held against; None where there is none."""
    args, judge = trainer.args, trainer.pair.teacher
    if judge is None and teacher is not None and not is_elsewhere(teacher):  # where a method without one has left it
        judge = teacher if is_dispatched(teacher) else teacher.to(args.teacher_device or args.device)
    return judge if getattr(judge, "judges", True) else None


def _measured(trainer: OKDTrainer, teacher: Any, config: RunConfig, prompts: dict[str, str | None]) -> Measured:
    """Of the held-out rows; answers stand beside the prompts as the data have them."""
    args, judge, rows = trainer.args, _judge(trainer, teacher), trainer.eval_dataset
    with timed(EVALUATING), trainer.accelerator.autocast():
        scores, answers = trainer.inside(
            lambda: evaluate(
                trainer.pair.student,
                judge,
                trainer.tokenizer,
                rows,
                batch_size=args.per_device_eval_batch_size,
                vocab_size=args.vocab_size,
                outcomes=trainer.pair.outcomes,
                generate=config.eval_answers,
                max_new_tokens=config.eval_max_new_tokens,
                progress=args.process_index == 0 and not args.disable_tqdm,
                in_step=trainer.is_sharded,
            )
        )
    return scores, [{**answer, "prompt": prompts.get(answer["id"]) or answer["prompt"]} for answer in answers]


def _report(trainer: OKDTrainer, output_dir: Path, metrics: dict[str, Any], record: Record) -> None:
    """metrics.json, report.html, and what a person reads at the end."""
    write_whole(output_dir / FIGURES, json.dumps(metrics, indent=2))
    record.write()
    trainer.create_model_card()
    print(f"\n{format_table(metrics['before'], metrics['after'])}")
    if shown := format_samples(record.samples):
        print(f"\n{shown}")
    with timed(SAVING):
        write_page([output_dir], output_dir / PAGE)
    print(f"\nStudent, metrics and {PAGE} are in {output_dir} ({metrics['seconds']['all']:.0f} s).")


def versions() -> dict[str, str]:
    """Versions that a figure depends on."""
    modules = {"okd-kernels": okd_kernels, "torch": torch, "transformers": transformers}
    return {"python": platform.python_version(), **{name: str(m.__version__) for name, m in modules.items()}}
