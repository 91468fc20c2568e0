"""A whole run: load, evaluate, train, evaluate, save. What `okd train` and `okd demo` do.

Order matters: what can be wrong with the input is found before anything is removed or written, and the student is
saved before the second evaluation. Of several processes all evaluate, and the first one writes.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from peft import PeftModel
from transformers.utils import logging

import okd_kernels
from okd.alignment import alignment_of
from okd.answers import end_tokens
from okd.callbacks import First
from okd.checkpoints import ADAPTER, STUDENT
from okd.checks import with_vocab_size
from okd.clock import EVALUATING, LOADING, SAVING, timed
from okd.config import OKDConfig
from okd.data import column
from okd.durable import (
    BEGUN,
    begun,
    check_checkpoint,
    checkpoints,
    last_checkpoint,
    remove,
    write_whole,
    writing,
)
from okd.encoding import Encoded, Encoder, encoder_options
from okd.ensemble import models_of
from okd.evaluate import evaluate
from okd.hub import create_repository
from okd.loading import ModelOptions, files_of, load_models, load_teacher, stored_states, teacher_sources
from okd.models import is_dispatched
from okd.options import check, option
from okd.page import PAGE, write_page
from okd.plan import available_memory, check_fits, plan
from okd.record import REPORT, Record
from okd.report import format_samples, format_table
from okd.sharding import is_elsewhere
from okd.sources import DataOptions, encode_all, open_all
from okd.trackers import check_trackers, send
from okd.trainer import OKDTrainer

BEFORE = "before.json"  # what was measured first, and the answers
RUN_FILES = {
    "student",
    "teacher_adapter",
    "metrics.json",
    "config.yaml",
    "curves.png",  # of earlier versions
    BEFORE,
    REPORT,
    PAGE,
    "log.jsonl",
    "method.json",
    "responses",
    "rollouts",
    "selection.safetensors",
    "teacher_average",
}
# transformers' options that decide a run, written down even at their defaults
RECORDED = {
    "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "adam_beta1", "adam_beta2", "weight_decay",
    "max_grad_norm", "seed",
}  # fmt: skip
# options that may be others where a run goes on; not the *_steps, which its checkpoint holds
FREE_TO_CHANGE = {
    "output_dir", "max_steps", "num_train_epochs", "per_device_eval_batch_size", "save_total_limit", "use_cpu",
    "gradient_checkpointing", "activation_checkpointing", "gradient_checkpointing_kwargs",
    "torch_empty_cache_steps", "report_to", "run_name", "project", "disable_tqdm", "log_level", "logging_dir",
    "logging_first_step", "ddp_backend", "dataloader_num_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision",
    "teacher_device", "teacher_cache",
    "student_save", "save_dtype",
}  # fmt: skip

logger = logging.get_logger(__name__)


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


DERIVED = {"accelerator_config", "ddp_find_unused_parameters", "do_eval", "output_dir"}  # set by others, or shown apart
DEFAULTS = {field.name: field.default for group in (RunConfig, OKDConfig) for field in dataclasses.fields(group)}


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
        teacher = PeftModel.from_pretrained(teacher, str(Path(checkpoint) / ADAPTER), is_trainable=True)
    # Before the trainer, whose accelerator would miss what this sets up anew.
    written_config = yaml.safe_dump(exact_config(config, args), sort_keys=False)
    if config.resume:
        check_same_run(Path(str(args.output_dir)) / "config.yaml", written_config)
    _, data = encoded(config, args, opened, tokenizer, teacher_tokenizers, student, teacher)
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
    alignment = alignment_of(args, tokenizer, teacher_tokenizers, student, teacher)
    ends = end_tokens(tokenizer, student, *models_of(teacher)) if alignment is None else alignment.ends
    encoder = Encoder(tokenizer, ends=ends, columns=config.columns, alignment=alignment, **encoder_options(args))
    return encoder, encode_all(config, args, opened, encoder)


def chosen_options(written_config: str) -> dict[str, Any]:
    """The options of config.yaml that somebody chose: what differs from the defaults, and is not derived."""
    options = yaml.safe_load(written_config).items()
    return {name: value for name, value in options if name not in DERIVED and value != DEFAULTS.get(name)}


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
    args = trainer.args
    record.about |= {
        "summary": method.summary,
        "options": chosen_options(written_config),
        "versions": versions(),
        "parameters": planned.parameters,
    }
    record.planned = planned.peak

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
                _remove_run(output_dir)
            write_whole(output_dir / "config.yaml", written_config)
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
        record.compare_speed(trainer, config)
        if args.process_index == 0:
            send(trainer, "after", after[0], trainer.state.global_step)

    def send_before() -> None:
        if args.process_index == 0:
            send(trainer, "before", _before(output_dir)[0], 0)

    trainer.callback_handler.callbacks.insert(0, First(begin, end))
    trainer.callback_handler.callbacks.append(First(send_before))  # after the trackers have begun
    training_started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    before = _before(output_dir)
    seconds["all"] = round(time.perf_counter() - started, 1)
    metrics = {"before": before[0], "after": after[0], "method": method.name, "seed": args.seed}
    metrics |= {"steps": result.global_step, "seconds": seconds, "versions": versions()}
    if args.process_index == 0:
        _report(trainer, output_dir, metrics, record)
        if args.push_to_hub:
            trainer.upload_student()
    return metrics


Measured = tuple[dict[str, Any], list[dict[str, Any]]]  # metrics and answers, as `okd.evaluate` has them


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


def _before(output_dir: Path) -> Measured:
    """What was measured first; of a run that an earlier version finished, the metrics alone."""
    if (output_dir / BEFORE).is_file():
        scores, answers = json.loads((output_dir / BEFORE).read_text())
        return scores, answers
    return json.loads((output_dir / "metrics.json").read_text())["before"], []


def _report(trainer: OKDTrainer, output_dir: Path, metrics: dict[str, Any], record: Record) -> None:
    """metrics.json, report.html, and what a person reads at the end."""
    write_whole(output_dir / "metrics.json", json.dumps(metrics, indent=2))
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


def exact_config(config: RunConfig, args: OKDConfig) -> dict[str, Any]:
    """The options that decide a run or differ from the defaults; `okd train --config` takes them back."""
    # Making a configuration sets up accelerate's processes anew: they must come out as they were.
    device: dict[str, Any] = {name: getattr(args, name) for name in ("use_cpu", "ddp_backend")}
    options = {"output_dir": args.output_dir, **device}
    ours, theirs = (c(**options).to_dict() for c in (OKDConfig, transformers.TrainingArguments))
    chosen = {
        k: v
        for k, v in args.to_dict().items()
        if v != ours[k] or (v is not None and (k in RECORDED or theirs.get(k) != v))
    }
    chosen |= {name: value for name, value in device.items() if value}
    chosen.pop("hub_token", None)  # which is hidden there
    transient = ("resume", "overwrite")  # of one invocation, not of the run
    own = {k: v for k, v in dataclasses.asdict(config).items() if k not in transient}
    return {**{k: v for k, v in own.items() if v is not None or getattr(RunConfig, k) is not None}, **chosen}


def check_output_dir(config: RunConfig, output_dir: Path) -> str | None:
    """The checkpoint to go on from, or None. Raises FileExistsError rather than touch another run."""
    holds_run = output_dir.is_dir() and any(map(_is_of_a_run, output_dir.iterdir()))
    if config.resume:
        checkpoint = last_checkpoint(output_dir, warn=True)
        if checkpoint is not None:
            check_checkpoint(checkpoint, contents=False)  # the trainer looks at those, too
            return str(checkpoint)
        was_begun = any((output_dir / name).is_file() for name in ("config.yaml", BEGUN))
        if not was_begun or (output_dir / "metrics.json").is_file():
            raise FileNotFoundError(
                f"expected a checkpoint to resume from in {output_dir}; got none: leave out --resume"
            )
        logger.warning(f"expected a checkpoint to resume from in {output_dir}; got none: the run begins anew")
        return None
    if holds_run and not config.overwrite:
        raise FileExistsError(
            f"{output_dir} holds another run; pass another --output-dir, or --overwrite to remove it, or to okd train "
            "--resume to go on from its last checkpoint"
        )
    return None


def check_same_run(path: Path, written_config: str) -> None:
    """Raise ValueError where a run would go on with other options than it began with, but for `FREE_TO_CHANGE`."""
    if not path.is_file():
        return
    old, new = yaml.safe_load(path.read_text()), yaml.safe_load(written_config)
    pairs = (
        (name, old.get(name, "default"), new.get(name, "default")) for name in sorted({*old, *new} - FREE_TO_CHANGE)
    )
    differing = [f"{name} (was {was}, now {now})" for name, was, now in pairs if was != now]
    if differing:
        raise ValueError(
            f"expected the options with which the run in {path.parent} began; got other ones for {', '.join(differing)}"
            f": pass --config {path} --output-dir {path.parent} --resume, or start a new run"
        )


def _is_of_a_run(path: Path) -> bool:
    return path.name in RUN_FILES or path.name.startswith(("checkpoint-", "non_finite_batch_"))


def _remove_run(output_dir: Path) -> None:
    """Checkpoints first, and last what says whose they were: a run that is killed here is not resumed as another."""
    found, first = filter(_is_of_a_run, list(output_dir.iterdir())), checkpoints(output_dir)
    for path in sorted(found, key=lambda path: (path.name == "config.yaml", path not in first)):
        remove(path) if path.is_dir() else path.unlink()
