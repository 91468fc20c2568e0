"""The step: one backward and one optimizer serve student and teacher; logs and errors around it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from okd.checkpoints import STUDENT, load, save
from okd.config import OKDConfig
from okd.data import Collator, Encoded, encode
from okd.evaluate import divergence_metrics
from okd.models import check_head, describe_parameters, evaluating, position_limit
from okd.objectives import Loss
from okd.pair import StudentTeacher
from okd.sampling import Sampler
from okd.teachers import Ensemble, check_vocabularies, distance_from_base, prepare_teacher
from okd_kernels import DistillationLoss, has_fast_gemm

UNLOGGED = {"reverse_kl", "student_entropy", "teacher_entropy", "student_nll", "teacher_nll"}  # of a loss's metrics
BATCH = ("input_ids", "attention_mask", "positions", "targets", "student_written")  # what the pair's forward takes
logger = logging.get_logger(__name__)


class _Progress(ProgressCallback):
    """The training bar, with the last log entry beside it instead of a line for every entry."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            names = (("student_loss", "student"), ("teacher_loss", "teacher"), ("base_forward_kl", "KL"))
            shown = {short: f"{logs[name]:.3f}" for name, short in names if name in logs}
            if "tokens_per_second" in logs:
                shown["tok/s"] = f"{logs['tokens_per_second']:.0f}"
            if shown:
                self.training_bar.set_postfix(shown)


class OKDTrainer(Trainer):
    """Distil a teacher into a student: online knowledge distillation, or any preset of `okd.config.METHODS`.

    `OKDTrainer(student, teacher, OKDConfig(output_dir=...), train_dataset=..., processing_class=tokenizer).train()`

    Args:
        student, teacher: transformers causal LMs with one tokenizer. The student's weights should be fp32 (`bf16=True`
            computes in bf16 all the same). With an online method, the teacher gets its online module here, in place,
            unless it is a PEFT model already; use `trainer.pair.teacher` from then on. Methods that choose among
            several take a list, or an `okd.teachers.Ensemble`; evaluation measures against the first. `teacher=None`
            with `method="sft"` only.
        train_dataset, eval_dataset: examples (`messages`, `prompt` + `completion`, or `text`), or `okd.data.encode`'s.
        processing_class: the tokenizer.

    It saves the student (plain `from_pretrained` loads it) and the teacher's adapter, and resumes from checkpoints.

    Raises:
        ValueError: nothing would train, fp16 weights would, a base weight of the teacher would, a head does more than a
            matrix product, or the heads have different numbers of rows and `vocab_size` is not given.
        FloatingPointError: a loss is not finite; the ids of its batch are saved first.
    """

    args: OKDConfig

    def __init__(
        self,
        student: Any,
        teacher: Any | None = None,
        args: OKDConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        args = args or OKDConfig()
        if processing_class is None:
            raise ValueError("expected processing_class, the tokenizer of both models; got None")
        if args.preset.needs_teacher and teacher is None:
            raise ValueError(f"expected a teacher for method {args.method!r}; got None: pass one, or use method='sft'")
        if not args.preset.needs_teacher:
            teacher = None
        train_rows, eval_rows = (_rows(data, processing_class, args) for data in (train_dataset, eval_dataset))
        collator = kwargs.pop("data_collator", None) or Collator(processing_class.pad_token_id)
        if not any(p.requires_grad for p in student.parameters()):
            raise ValueError("expected a student with trainable parameters; all are frozen: call requires_grad_()")
        _check_trained_dtypes("student", student)
        check_head(student, "student")
        if teacher is not None:
            if isinstance(teacher, list | tuple) and len(teacher) == 1:
                (teacher,) = teacher
            several = isinstance(teacher, list | tuple | Ensemble)
            if not several:  # before the online module goes in: a teacher that is refused stays as it was
                check_head(teacher, "teacher")
                check_vocabularies(student, teacher, args.vocab_size)
            teacher = prepare_teacher(teacher, args, student, train_rows, collator)
            if several:  # the ensemble has checked its members' heads
                check_vocabularies(student, teacher, args.vocab_size)
            _check_trained_dtypes("teacher's online module", teacher)
        _warn_of_slow_products((student, teacher), args)
        _warn_of_long_rows((student, teacher), [*(train_rows or ()), *(eval_rows or ())])
        super().__init__(
            model=StudentTeacher(student, teacher, args),
            args=args,
            data_collator=collator,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            processing_class=processing_class,
            **kwargs,
        )
        self.pair: Any = self.model
        self.tokenizer: Any = processing_class
        for callback in (ProgressCallback, PrinterCallback):
            if self.pop_callback(callback) is not None and callback is ProgressCallback:
                self.add_callback(_Progress)
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self.sampler = Sampler(args, self.pair, processing_class)
        self._sums: dict[str, Any] = {}
        self._counts: dict[str, int] = {}  # of tokens behind each sum: not every loss is of every step
        self._last_batch: dict[str, Tensor] = {}
        self._logged_at = time.perf_counter()
        logger.warning(describe_parameters(student, teacher))

    @property
    def is_sharded(self) -> bool:
        """Each process holds a part of the models."""
        return self.is_fsdp_enabled or is_deepspeed_zero3_enabled()

    # --- the step ---

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint and self.is_fsdp_enabled:
            raise ValueError(
                "expected whole models on each process to resume; got FSDP's shards: start anew from the checkpoint's "
                "student and adapter, or use DDP"
            )
        if self.args.preset.sequences != "dataset" and self.is_sharded:
            raise ValueError(
                f"expected whole models on each process with method {self.args.method}, which samples responses of "
                "unequal lengths; got sharded ones, which would wait for one another for ever: use DDP"
            )
        if self.is_fsdp_enabled:
            kind = str(self.accelerator.state.fsdp_plugin.state_dict_type)
            if "FULL_STATE_DICT" not in kind:  # Trainer.save_model would silently save nothing
                raise ValueError(
                    f"expected FSDP with state_dict_type FULL_STATE_DICT, from which the student is saved; got {kind}: "
                    "set it in fsdp_config, or as fsdp_state_dict_type in accelerate's configuration"
                )
        self._logged_at = self.sampler.since = time.perf_counter()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one optimizer step, rewritten by the method's sampling policy, and their response tokens."""
        if 0 < self.state.max_steps <= self.state.global_step:  # resumed at its end: Trainer would take one step more
            self.control.should_training_stop = True
            return [], None
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.pair.at(self.state.global_step, self.state.max_steps)
        if self.args.preset.sequences != "dataset" and batches:
            with self.accelerator.autocast():  # as in the step
                batches = self.sampler(batches, self.state.global_step)
            count = self._get_num_items_in_batch(batches, device)
        return batches, count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = inputs.pop("ids", None)
        batch = {name: inputs[name] for name in BATCH}
        loss = model(**batch, normalizer=num_items_in_batch)
        total = loss.total
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            total = total * self.accelerator.num_processes  # DDP averages gradients; the normalizer counts all devices
        if not torch.isfinite(total):
            self._stop(loss, ids)
        self._note(loss, batch, num_items_in_batch)
        return (total, loss) if return_outputs else total

    def _stop(self, loss: DistillationLoss, ids: Sequence[str] | None) -> None:
        step = self.state.global_step
        path = Path(str(self.args.output_dir)) / f"non_finite_batch_{step}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"step": step, "ids": ids}, indent=2))
        teacher = "none" if loss.teacher is None else f"{loss.teacher.item():.4g}"
        raise FloatingPointError(
            f"step {step}: expected a finite loss; got student {loss.student.item():.4g}, teacher {teacher}. {path} "
            "names the examples of its batch: look at them, or lower learning_rate or max_grad_norm"
        )

    def _note(self, loss: DistillationLoss, batch: dict[str, Tensor], normalizer: Tensor | None) -> None:
        """Add this micro-batch to the sums behind the next log entry; stays on the device."""
        n = len(batch["targets"])
        share = n if normalizer is None else normalizer
        sums: dict[str, Any] = {
            "student_loss": loss.student.detach() * share,
            "tokens": batch["attention_mask"].sum(),
        }
        if loss.teacher is not None:
            sums["teacher_loss"] = loss.teacher.detach() * share
        sums |= {name: value.sum() for name, value in loss.metrics.items() if name not in UNLOGGED}
        for name, value in sums.items():
            self._sums[name] = self._sums.get(name, 0) + value
            self._counts[name] = self._counts.get(name, 0) + n
        self._last_batch = batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add per-token losses and statistics since the last entry, two KLs to the base teacher, and the throughput."""
        if "loss" in logs and self._sums:
            sums = {name: float(value) for name, value in self._sums.items()}
            tokens = sums.pop("tokens")
            now = time.perf_counter()
            logs |= {name: value / self._counts[name] for name, value in sums.items()}
            logs["tokens_per_second"] = tokens / (now - self._logged_at)
            if self.pair.teacher is not None:
                with evaluating(self.pair.student, self.pair.teacher), self.accelerator.autocast():
                    found = self.pair(**self._last_batch, loss=distance_from_base).metrics
                logs["base_forward_kl"] = found["forward_kl"].mean().item()
                if self.args.online:
                    logs["teacher_shift"] = found["teacher_shift"].mean().item()
            if self.args.preset.sequences != "dataset":
                logs |= self.sampler.logs()
            if self.args.online and self.optimizer is not None:
                rate, own = self.args.learning_rate, self.optimizer.param_groups[-1]["initial_lr"]
                logs["online_learning_rate"] = logs["learning_rate"] * (own / rate) if rate else own
            self._sums, self._counts, self._logged_at = {}, {}, time.perf_counter()
        super().log(logs, start_time)

    # --- the two sides' parameters ---

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One optimizer: the student's weights that decay, those that do not, the selection among several teachers, and
        the teacher's online module."""
        if self.optimizer is None:
            decaying = set(self.get_decay_parameter_names(self.pair.student))
            student = [(n, p) for n, p in self.pair.student.named_parameters() if p.requires_grad]
            rate = self.args.online_learning_rate
            online = [] if self.pair.teacher is None else self.pair.teacher.parameters()
            selection = [] if self.pair.selection is None else self.pair.selection.parameters()
            groups = [
                {"params": [p for n, p in student if n in decaying], "weight_decay": self.args.weight_decay},
                {"params": [p for n, p in student if n not in decaying], "weight_decay": 0.0},
                {"params": list(selection), "weight_decay": 0.0, "lr": self.args.selection_learning_rate},
                {
                    "params": [p for p in online if p.requires_grad],
                    "weight_decay": 0.0,
                    "lr": self.args.learning_rate if rate is None else rate,
                },
            ]
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.pair.student)
            self.optimizer = optimizer_class([group for group in groups if group["params"]], **options)
        return self.optimizer

    # --- evaluation, saving, resuming ---

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Divergences, perplexity and top-1 agreement on held-out rows, against the base teacher.

        `eval_loss` is KL(p || q), whatever divergence trains, so that methods compare; without a teacher the NLL, with
        several ones the method's distillation loss. Raises ValueError without rows, or under FSDP or ZeRO-3.
        """
        if self.is_sharded:
            raise ValueError(
                "expected whole models on each process to evaluate; got sharded ones: pass eval_strategy='no', and "
                "give the saved student to okd evaluate"
            )
        started = time.perf_counter()
        rows: Any = self.eval_dataset if eval_dataset is None else _rows(eval_dataset, self.tokenizer, self.args)
        if rows is None:
            raise ValueError("expected an eval_dataset; got None: pass one to OKDTrainer or to evaluate")
        metrics = divergence_metrics(
            self.pair.student,
            self.pair.teacher,
            rows,
            pad_token_id=self.tokenizer.pad_token_id,
            batch_size=self.args.per_device_eval_batch_size,
            vocab_size=self.args.vocab_size,
            progress=not self.args.disable_tqdm,
        )
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        if self.pair.selection is not None:  # the KL to the first teacher is not what these students minimise
            loss = self.held_out_means(rows)["distillation_loss"]
        else:
            loss = metrics.get(f"{metric_key_prefix}_forward_kl", math.log(metrics[f"{metric_key_prefix}_perplexity"]))
        metrics[f"{metric_key_prefix}_loss"] = loss
        if eval_dataset is None:  # not for other data that somebody else evaluates in between
            self.sampler.on_evaluate(loss)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        seconds = time.perf_counter() - started  # no part of the training's tokens per second
        self._logged_at += seconds
        self.sampler.since += seconds
        return metrics

    def held_out_means(self, rows: list[dict[str, Any]], loss: Loss | None = None) -> dict[str, float]:
        """Means over the response tokens of held-out, encoded rows: the metrics of the method's loss, or another."""
        size, tokens = self.args.per_device_eval_batch_size, 0
        sums: dict[str, float] = {}
        with evaluating(self.pair), self.accelerator.autocast():
            for start in range(0, len(rows), size):
                collated = self._prepare_inputs(self.data_collator(rows[start : start + size]))
                metrics = self.pair(**{key: collated[key] for key in BATCH}, loss=loss).metrics
                for name, values in metrics.items():
                    sums[name] = sums.get(name, 0.0) + values.double().sum().item()
                tokens += len(collated["targets"])
        return {name: value / max(tokens, 1) for name, value in sums.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:  # Trainer leaves it to this method that one process writes
            return
        directory = Path(str(output_dir or self.args.output_dir))
        save(self.pair, directory, state_dict)
        self.tokenizer.save_pretrained(directory / STUDENT)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load(self.pair, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Beside what continues a run, and not merely its weights: the sampler's state."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.args.preset.sequences != "dataset":
            self.sampler.load(self._sampler_file(Path(checkpoint)))

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the random state that every process saves with a checkpoint: its sampler's."""
        super()._save_rng_state(output_dir)
        if self.args.preset.sequences != "dataset":
            self.sampler.save(self._sampler_file(Path(output_dir)))

    def _sampler_file(self, directory: Path) -> Path:
        return directory / f"sampler_{self.args.process_index}.json"

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))


def _rows(data: Any, tokenizer: Any, args: OKDConfig) -> list[dict[str, Any]] | None:
    if data is None:
        return None
    if isinstance(data, Encoded):
        return data.rows
    encoded = encode(data, tokenizer, max_length=args.max_length, chat_template=args.chat_template)
    logger.log(logging.WARNING if encoded.truncated or encoded.skipped else logging.INFO, encoded.summary())
    return encoded.rows


def _check_trained_dtypes(name: str, model: nn.Module) -> None:
    """Raise ValueError where fp16 weights would train, warn where bf16 ones would.

    AdamW moves a weight by about the learning rate, which bf16 rounds away from 256 of them on.
    """
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if torch.float16 in dtypes:
        raise ValueError(
            f"expected the {name} in float32, since its weights train; got float16, which loses their updates: call "
            ".float() on it (okd train: --dtype float32), and pass fp16=True to compute in fp16"
        )
    if torch.bfloat16 in dtypes:
        logger.warning(
            f"expected the {name} in float32, since its weights train; got bfloat16, in which updates below a 256th of "
            "a weight are lost: call .float() on it (okd train: --dtype float32), and pass bf16=True to compute in bf16"
        )


def _warn_of_slow_products(models: Sequence[Any], args: OKDConfig) -> None:
    """16-bit models on a CPU without instructions for them train many times as slowly as 32-bit ones."""
    dtypes = {p.dtype for model in models if model is not None for p in model.parameters()}
    dtypes |= {dtype for dtype, chosen in ((torch.bfloat16, args.bf16), (torch.float16, args.fp16)) if chosen}
    slow = sorted(str(dtype).removeprefix("torch.") for dtype in dtypes if not has_fast_gemm(dtype, args.device))
    if slow:
        logger.warning(
            f"expected float32 on this CPU, which has no instructions for {' and '.join(slow)} products: training will "
            "be many times as slow; leave bf16 and fp16 out, and call .float() on 16-bit models (okd train: no --dtype)"
        )


def _warn_of_long_rows(models: Sequence[Any], rows: Sequence[dict[str, Any]]) -> None:
    """Learned position embeddings end in an index error there, on a GPU in one that names no index."""
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    limit = min((n for n in map(position_limit, models) if n is not None), default=longest)
    if longest > limit:
        logger.warning(
            f"expected rows of at most {limit} tokens, as both models have positions; got one of {longest}: "
            f"pass max_length={limit}, unless the models extrapolate"
        )
