"""The step: one backward and one optimizer serve student and teacher."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, Trainer
from transformers.utils import logging

from okd import checks
from okd.alignment import reading
from okd.callbacks import AroundUpdate, Bar, Lines
from okd.checkpoints import Checkpointing
from okd.clock import BACKWARD, GENERATING, timed
from okd.config import OKDConfig
from okd.data import Batch, Collator
from okd.durable import Durable
from okd.encoding import Stream, encoded_rows, in_lines
from okd.evaluate import Evaluation
from okd.filling import Filling
from okd.finite import stop
from okd.hub import Hub
from okd.meters import LogFile, Logging, Meters, summed
from okd.models import describe_parameters, tokenizer_of
from okd.objectives import Totals
from okd.pair import StudentTeacher
from okd.preparing import place, prepare_teacher, refuse_elsewhere, with_cache
from okd.sampling import Sampler
from okd.selection import Policy
from okd.sharding import Sharded, ranks, whole
from okd.student import prepare_student
from okd.vocabularies import check_aligned, check_ids, with_vocab_size
from okd_kernels import DistillationLoss

logger = logging.get_logger(__name__)


class OKDTrainer(Logging, Evaluation, Filling, Checkpointing, Sharded, Hub, Durable, Trainer):  # type: ignore[misc]
    """Distil a teacher into a student: online knowledge distillation, or any other `Method`.

    `OKDTrainer(student, teacher, OKDConfig(output_dir=...), train_dataset=..., processing_class=tokenizer).train()`

    Args:
        student, teacher: transformers causal LMs with one tokenizer. The student's weights should be fp32 (`bf16=True`
            computes in bf16 all the same). With an online method, the teacher gets its online module here, in place,
            unless it is a PEFT model already; `trainer.teacher` is that model. Methods that choose among several take
            a list, a mapping of names, or an `okd.ensemble.Ensemble`; evaluation measures against the first. None with
            a method that needs none, or with a self-teacher.
        train_dataset, eval_dataset: examples (`messages`, `prompt` + `completion`, or `text`) as a list or a
            `datasets.Dataset`, or what `okd.encoding.encode` made of them; the first also an iterable data set, which
            is encoded as it is read, the latter also by name, each evaluated under its own.
        text_dataset: plain text of a second kind, which minillm learns beside the responses.
        processing_class: the tokenizer, or a processor that has one, which is then saved with the student.
        teacher_processing_class: the teacher's, or one for each of several; default: what lies beside the teacher on
            this machine. Only compared: both must map the same tokens to the same ids, below `vocab_size`, which is set
            to the ids that both share where their heads are padded differently. With `teacher_tokenizer` it may be
            another one, which reads the same texts for the teacher (`okd.alignment`).
        teacher_files: a hash of the files that the teacher came from (`okd.loading.files_of`), by which its cache knows
            it without its weights.

    With `student_lora_rank` the student gets its LoRA here, in place, unless it is a PEFT model already.

    It saves the student (plain `from_pretrained` loads it) and the teacher's adapter, and resumes from checkpoints.

    Raises:
        ValueError: nothing would train, fp16 weights would, a base weight of the teacher would, a head does more than a
            matrix product, the heads have different numbers of rows and neither `vocab_size` nor the teacher's
            tokenizer is known, tokenizers differ, or an argument would change nothing.
        FloatingPointError: a loss is not finite; the ids of its step's examples are saved first.
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
        text_dataset: Any = None,
        teacher_processing_class: Any = None,
        teacher_files: str | None = None,
        **kwargs: Any,
    ):
        args = args or OKDConfig()
        checks.check_arguments(processing_class, kwargs)
        tokenizer = tokenizer_of(processing_class)
        alignment, ends = reading(args, tokenizer, teacher_processing_class, student, teacher)
        args = with_vocab_size(args, student, teacher, tokenizer, teacher_processing_class)
        datasets = (train_dataset, text_dataset, eval_dataset)
        train, texts, held_out = (encoded_rows(data, tokenizer, args, ends, alignment) for data in datasets)
        collator: Any = kwargs.pop("data_collator", None) or Collator(tokenizer.pad_token_id)
        student = prepare_student(student, args)
        checks.check_student(student)
        rows = () if isinstance(train, Stream) else train or ()  # those of a stream are not known yet
        checks.check_data(args, train, rows, texts or ())
        check_ids(student, args, rows, texts, held_out)
        if alignment is not None:
            check_aligned(teacher, rows, held_out)
        checks.check_packed(args, student, teacher)
        outcomes = None if alignment is None else alignment.outcomes_of(student, teacher)
        given, teacher = teacher, prepare_teacher(teacher, args, student, rows, collator, outcomes)
        teacher, cache = with_cache(teacher, args, tokenizer, teacher_files)
        collator = collator if cache is None else cache.collating(collator)
        place(teacher, given, args)
        checks.check_writers(args, student, teacher)
        checks.warn_of_models(student, teacher, args, rows)
        pair = StudentTeacher(student, teacher, args)
        pair.outcomes = outcomes
        super().__init__(
            model=pair,
            args=args,
            data_collator=collator,
            train_dataset=in_lines(train, args.max_length) if args.packing and train is not None else train,
            eval_dataset=held_out,
            processing_class=processing_class,
            **kwargs,
        )
        self.pair: Any = pair
        self.tokenizer: Any = tokenizer
        self.ends = ends
        for callback in (ProgressCallback, PrinterCallback):
            self.pop_callback(callback)
        self.add_callback(Lines if args.disable_tqdm or os.environ.get("TQDM_DISABLE") else Bar)
        self.add_callback(AroundUpdate(self))
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        pair.is_replicated, pair.is_sharded = ranks() > 1 and not self.is_sharded, self.is_sharded
        refuse_elsewhere(self)
        if isinstance(pair.selection, Policy) and pair.selection.reward == "dev":
            pair.selection.held_out = self.held_out_batches()
        self.alignment, self.cache = alignment, cache
        self.sampler = Sampler(args, pair, tokenizer, ends, rows, texts or (), alignment)
        self.meters, self.log_file = Meters(), LogFile(Path(str(args.output_dir)))
        self._step: list[tuple[list[str], DistillationLoss]] = []  # ids and losses of the micro-batches of a step
        self._last_batch: Batch | None = None
        self._norms: dict[str, Tensor] = {}
        logger.warning(describe_parameters(student, teacher))

    @property
    def student(self) -> Any:
        """The student's model: a PEFT model where it has a LoRA."""
        return self.pair.student

    @property
    def teacher(self) -> Any:
        """The teacher's model of the moment: a PEFT model where it has an online module. None without a teacher."""
        return None if self.pair.teacher is None else self.pair.teacher.model

    # --- the step, in the order of a batch's way

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one optimizer step, rewritten by the method's sampling policy, and what they come to."""
        if 0 < self.state.max_steps <= self.state.global_step:  # resumed at its end: Trainer would take one step more
            self.control.should_training_stop = True
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.pair.at(self.state.global_step, self.state.max_steps)
        if not self.sampler.is_idle and batches:
            with timed(GENERATING):
                batches = self._sampled(batches)
        shared = ranks() > 1 and self.args.average_tokens_across_devices
        return batches, Totals.of(batches, (lambda x: summed(x.to(device))) if shared else None)

    def _sampled(self, batches: list[Batch]) -> list[Batch]:
        self.sampler.push(step=self.state.global_step)
        if self.sampler.is_served:
            return self.sampler(batches, self.state.global_step)
        with self.accelerator.autocast():  # as in the step
            return self.inside(lambda: self.sampler(batches, self.state.global_step), self.pair.student)

    def _get_num_items_in_batch(self, batch_samples, device):
        """`Totals` count instead."""
        return None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with timed(BACKWARD):  # but for what `response_rows` and the pair take of it
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        totals = Totals.of([inputs]) if num_items_in_batch is None else num_items_in_batch
        loss = model(inputs, totals)
        self.meters.add_loss(loss, inputs, totals.tokens)
        self._last_batch = inputs
        self._step.append((inputs["ids"], loss._replace(metrics={})))
        # DDP averages gradients; the totals count all devices.
        total = loss.total * (ranks() if self.args.average_tokens_across_devices else 1)
        return (total, loss) if return_outputs else total

    def _clip_grad_norm(self, model):
        """Each side by its own norm: a teacher's large gradient would scale the student's step."""
        if self.is_deepspeed_enabled:  # which clips both by one norm
            return super()._clip_grad_norm(model)
        self.accelerator.unscale_gradients()
        norms = {
            side: whole(nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm))
            for side, parameters in self.pair.sides().items()
        }
        learns = {"student": self.pair.student_learns, "teacher": self.pair.teacher_objective is not None}
        self._norms |= {side: norm for side, norm in norms.items() if learns[side]}  # else that of its last step
        return self._norms.get("student", norms["student"])

    def before_update(self) -> None:
        """Stop at a loss that is not finite, once a step; and leave sides alone that do not learn."""
        finite = torch.stack([torch.isfinite(loss.total.detach()) for _, loss in self._step])
        if summed((~finite).sum()).item():
            stop(self.state.global_step, str(self.args.output_dir), self._step, finite.tolist())
        for parameter in self.pair.idle():
            parameter.grad = None

    def after_update(self) -> None:
        """What the method, its teacher and its selection make of the student's new weights."""
        loss = None
        if self.pair.remembers_loss:
            loss = summed(torch.stack([one.student.detach() for _, one in self._step]).sum()).item()
        with self.accelerator.autocast(), torch.no_grad():
            self.meters.add(1, **self.pair.after_update(loss))
        self._step = []

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One for both sides."""
        if self.optimizer is None:
            decaying = set(self.get_decay_parameter_names(self.pair.student))
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.pair.student)
            self.optimizer = optimizer_class(self.pair.parameter_groups(decaying), **options)
        return self.optimizer

    # --- around the step

    def check_divided(self) -> None:
        """What is looked at in whole models as they come, where each process has a part only."""
        if self.is_sharded:
            self.inside(lambda: checks.check_models(self.args, self.pair.student, self.pair.teacher))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        checks.refuse_sharded(self)
        return super().train(resume_from_checkpoint, *args, **kwargs)
