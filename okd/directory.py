"""What a run's directory holds: which files are the run's, its options, what was measured first.

No two runs share one: what is there is gone on with, refused, or removed.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from okd.checkpoints import ADAPTER, AVERAGE, MEMORY, SELECTION, STUDENT
from okd.config import OKDConfig
from okd.durable import BEGUN, check_checkpoint, checkpoints, last_checkpoint, remove
from okd.finite import NON_FINITE
from okd.page import PAGE
from okd.report import BEFORE, CONFIG, FIGURES, LOG, REPORT

if TYPE_CHECKING:
    from okd.run import RunConfig

RUN_FILES = {
    STUDENT, ADAPTER, AVERAGE, SELECTION, MEMORY, CONFIG, LOG, BEFORE, FIGURES, REPORT, PAGE, "responses", "rollouts",
    "curves.png",  # of earlier versions
}  # fmt: skip
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
DERIVED = {"accelerator_config", "ddp_find_unused_parameters", "do_eval", "output_dir"}  # set by others, or shown apart
Measured = tuple[dict[str, Any], list[dict[str, Any]]]  # metrics and answers, as `okd.evaluate` has them

logger = logging.get_logger(__name__)


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
    if not torch.cuda.is_available():  # then it is off whatever was chosen, which says nothing of another machine
        chosen.pop("dataloader_pin_memory", None)
    transient = ("resume", "overwrite")  # of one invocation, not of the run
    own = {k: v for k, v in dataclasses.asdict(config).items() if k not in transient}
    return {**{k: v for k, v in own.items() if v is not None or getattr(type(config), k) is not None}, **chosen}


def chosen_options(written_config: str, config: RunConfig, args: OKDConfig) -> dict[str, Any]:
    """The options of config.yaml that somebody chose: what differs from the defaults, and is not derived.

    args: as they were given, without a `vocab_size` that was found in the models.
    """
    defaults = {field.name: field.default for group in (config, args) for field in dataclasses.fields(group)}
    derived = DERIVED if args.vocab_size is not None else {*DERIVED, "vocab_size"}
    options = yaml.safe_load(written_config).items()
    return {name: value for name, value in options if name not in derived and value != defaults.get(name)}


def check_output_dir(config: RunConfig, output_dir: Path) -> str | None:
    """The checkpoint to go on from, or None. Raises FileExistsError rather than touch another run."""
    holds_run = output_dir.is_dir() and any(map(_is_of_a_run, output_dir.iterdir()))
    if config.resume:
        checkpoint = last_checkpoint(output_dir, warn=True)
        if checkpoint is not None:
            check_checkpoint(checkpoint, contents=False)  # the trainer looks at those, too
            return str(checkpoint)
        was_begun = any((output_dir / name).is_file() for name in (CONFIG, BEGUN))
        if not was_begun or (output_dir / FIGURES).is_file():
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


def measured_before(output_dir: Path) -> Measured:
    """What was measured first; of a run that an earlier version finished, the metrics alone."""
    if (output_dir / BEFORE).is_file():
        scores, answers = json.loads((output_dir / BEFORE).read_text())
        return scores, answers
    return json.loads((output_dir / FIGURES).read_text())["before"], []


def remove_run(output_dir: Path) -> None:
    """Checkpoints first, and last what says whose they were: a run that is killed here is not resumed as another."""
    found, first = filter(_is_of_a_run, list(output_dir.iterdir())), checkpoints(output_dir)
    for path in sorted(found, key=lambda path: (path.name == CONFIG, path not in first)):
        remove(path) if path.is_dir() else path.unlink()


def _is_of_a_run(path: Path) -> bool:
    return path.name in RUN_FILES or path.name.startswith((f"{PREFIX_CHECKPOINT_DIR}-", NON_FINITE))
