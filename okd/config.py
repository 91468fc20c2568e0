"""What a run is: a method, the options that it reads, and transformers' own. Overrides become one `Method`, here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from okd import mixup, objectives, sampling
from okd.alignment import check_tokenizer_options
from okd.cache import CacheOptions, check_cache_options
from okd.chat import ChatOptions
from okd.decoding import Draw
from okd.encoding import RowOptions
from okd.hub import check_push_options
from okd.kept import KeptOptions
from okd.leash import Leash, LeashOptions
from okd.methods import METHODS, OKD_TEACHER, DivergenceOptions, Method, readers_of
from okd.mixup import MixupOptions
from okd.objectives import TaidOptions, TokenizerOptions
from okd.on_policy import ContrastiveOptions, PolicyGradientOptions
from okd.online import LoraOptions, OnlineOptions, PromptOptions, SalienceOptions
from okd.options import check, option
from okd.rollouts import RolloutOptions, check_rollout_options
from okd.sampling import (
    DrawOptions,
    InterleavedOptions,
    LengthOptions,
    MixtureOptions,
    ReplayOptions,
    ShareOptions,
)
from okd.selection import PolicyOptions, SelectionOptions
from okd.sharding import KINDS, launch_options
from okd.student import StudentOptions, check_student_options
from okd.teachers import PlaceOptions, SelfTeacherOptions
from okd_kernels import DIVERGENCES, BackwardColumns, Objective

if TYPE_CHECKING:
    MethodLike = str | Method
else:
    MethodLike = str  # what HfArgumentParser makes of a word

logger = logging.get_logger(__name__)


@dataclass
class OKDConfig(
    DivergenceOptions,
    PlaceOptions,
    SelfTeacherOptions,
    OnlineOptions,
    LoraOptions,
    PromptOptions,
    SalienceOptions,
    LeashOptions,
    TokenizerOptions,
    CacheOptions,
    TaidOptions,
    MixupOptions,
    SelectionOptions,
    PolicyOptions,
    LengthOptions,
    DrawOptions,
    KeptOptions,
    RolloutOptions,
    ShareOptions,
    PolicyGradientOptions,
    MixtureOptions,
    ContrastiveOptions,
    InterleavedOptions,
    ReplayOptions,
    ChatOptions,
    RowOptions,
    StudentOptions,
    TrainingArguments,
):
    """transformers' TrainingArguments plus the method's options. Defaults follow the OKD paper, where it has any.

    Raises:
        ValueError: an unknown method, divergence or online module, a number out of range, or an option that the method
            does not read.
    """

    method: MethodLike = option("okd", f"preset: {', '.join(METHODS)}; in Python also a `Method`")
    student_ce_weight: float | None = option(
        None, "weight of the student's cross-entropy in place of the preset's", least=0
    )
    router_aux_loss_coef: float | None = option(
        None,
        "weight of the router loss of a student that is a mixture of experts; 0: none; default: as its config has it",
        least=0,
    )
    early_stopping_patience: int | None = option(
        None, "evaluations without a better metric_for_best_model, by default eval_loss, after which training stops"
    )
    vocab_size: int | None = option(None, "columns shared by both heads where they are padded differently")

    shard: str | None = option(
        None,
        "how processes that torchrun has started divide the models: fsdp2, zero2 (gradients and optimizer alone) or "
        "zero3, as okd/launch/*.yaml say to accelerate launch",
        choices=KINDS,
    )

    # transformers' options whose defaults differ here
    learning_rate: float = option(2e-4, "peak learning rate of the student")
    lr_scheduler_type: str = option("linear", "schedule of the learning rates")
    warmup_steps: float = option(0.03, "steps of linear warm-up; below 1, a share of all steps")
    logging_steps: float = option(10, "steps between log entries, each of a few more forward passes of one batch")
    logging_first_step: bool = option(True, "log the first step too, so that even a short run has a curve")
    logging_nan_inf_filter: bool = option(False, "keep NaN out of the log; here a NaN stops the run instead")
    hub_strategy: str = option("end", "when push_to_hub pushes the student: end, or every_save, too")
    remove_unused_columns: bool = option(False, "drop columns of the data; here the collator needs them")
    report_to: None | str | list[str] = option(  # noqa: RUF036  (HfArgumentParser wants this order)
        "none", "integrations that receive the log (tensorboard, wandb, ...)"
    )

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
            self.restore_callback_states_from_checkpoint = True  # a resumed run goes on counting
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # transformers takes greater for better in all but losses; here that is agreement alone
            self.greater_is_better = "agreement" in self.metric_for_best_model
        self._divide()
        super().__post_init__()
        if self.n_gpu > 1:  # DataParallel would cut `positions`, which count rows of the whole batch, into pieces
            if self.teacher_device is None:
                logger.warning(f"expected one process for each of {self.n_gpu} GPUs; using one: start with torchrun")
            self._n_gpu = 1
        self.dataloader_pin_memory &= torch.cuda.is_available()  # else torch warns on every run
        accelerator: Any = self.accelerator_config
        if accelerator.dispatch_batches is None:  # batches hold text, which no process can send to others
            accelerator.dispatch_batches = False
        if self.ddp_find_unused_parameters is None:  # what does not learn at a step gets a gradient of zero instead
            self.ddp_find_unused_parameters = False
        check(self)
        _ = self.template_kwargs, BackwardColumns.of(self.backward_columns)  # raise where they are none
        if not isinstance(self.method, Method) and self.method not in METHODS:
            raise ValueError(f"expected method to be one of {', '.join(METHODS)}, or a Method; got {self.method!r}")
        self._resolved = self._resolve()
        self._refuse_unread()
        self._check_combinations()

    @property
    def resolved(self) -> Method:
        """The method, with this configuration's overrides."""
        return self._resolved

    @property
    def online(self) -> bool:
        """The teacher learns too, because the method or `online_teacher` says so."""
        return self._resolved.teacher is not None

    def to_dict(self) -> dict[str, Any]:
        given = {**super().to_dict(), "method": self._resolved.name}
        return {k: v for k, v in given.items() if self.shard is None or k not in ("fsdp", "fsdp_config", "deepspeed")}

    def _divide(self) -> None:
        if self.shard is None:
            return
        if self.shard not in KINDS or self.fsdp or self.deepspeed:
            raise ValueError(
                f"expected shard to be one of {', '.join(KINDS)}, without fsdp or deepspeed beside it; got "
                f"{self.shard!r}, fsdp={self.fsdp} and deepspeed={self.deepspeed}: choose one"
            )
        for name, value in launch_options(self.shard).items():
            setattr(self, name, value)

    def _resolve(self) -> Method:
        method = self.method if isinstance(self.method, Method) else METHODS[self.method]
        teacher = method.teacher
        if self.online_teacher and method.takes_several:
            raise ValueError(
                f"expected online_teacher with a method that distils from one teacher; got {method.name}: leave it out"
            )
        if self.online_teacher and method.student.weight > 0:
            teacher = teacher or OKD_TEACHER
        if teacher is not None and self.teacher_kl_weight is not None:
            a = self.teacher_kl_weight
            teacher = Objective(teacher.divergence, weight=a, ce_weight=1 - a, **teacher.parameters)
        draw = Draw(
            method.draw.temperature if self.sampling_temperature is None else self.sampling_temperature,
            method.draw.top_p if self.sampling_top_p is None else self.sampling_top_p,
            method.draw.top_k if self.sampling_top_k is None else self.sampling_top_k,
        )
        given = {
            "student_share": self.student_share,
            "teacher_share": self.teacher_share,
            "online_module": self.online_module,
            "alternating": self.alternating,
            "generate": self.generate,
        }
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(method, student=self._student(method), teacher=teacher, draw=draw, **changes)

    def _student(self, method: Method) -> Objective:
        """L_s, with the method's divergence or the one that replaces it."""
        objective = method.student
        ce_weight = objective.ce_weight if self.student_ce_weight is None else self.student_ce_weight
        given = {"alpha": self.divergence_alpha, "beta": self.divergence_beta}
        parameters = {k: v for k, v in given.items() if v is not None}
        name = self.student_divergence or objective.divergence
        if self.student_divergence is None:
            parameters = {**objective.parameters, **parameters}
        elif method.fixed_divergence:
            raise ValueError(
                f"expected no student_divergence with method {method.name}, which has its own; got {name}: leave it out"
            )
        if name in DIVERGENCES and objective.weight > 0:
            unknown = sorted(set(parameters) - set(DIVERGENCES[name].parameters))
            if unknown:
                names = ", ".join(f"divergence_{k}" for k in unknown)
                raise ValueError(f"{name} has no {', '.join(unknown)}; got {names}: leave it out")
        if objective.weight == 0:
            return Objective(weight=0.0, ce_weight=ce_weight)
        return Objective(name, objective.weight, ce_weight, **parameters)

    def _refuse_unread(self) -> None:
        """Raise ValueError for an option that would change nothing."""
        method = self._resolved
        for group in (g for g in GROUPS if g not in method.option_groups):
            for field in dataclasses.fields(group):
                value = getattr(self, field.name)
                if value == field.default:
                    continue
                names = ", ".join(readers_of(group)) or "none as it stands"
                raise ValueError(
                    f"expected options that method {method.name} reads; got {field.name}={value!r} "
                    f"({(group.__doc__ or '').strip().rstrip('.').lower()}): leave it out, or choose a method that "
                    f"does: {names}"
                )

    def _check_combinations(self) -> None:
        method = self._resolved
        if self.label_smoothing_factor or self.neftune_noise_alpha is not None:
            raise ValueError(
                "expected neither label_smoothing_factor nor neftune_noise_alpha, which no method here reads; got "
                f"{self.label_smoothing_factor} and {self.neftune_noise_alpha}: leave them out"
            )
        if self.early_stopping_patience is not None and (
            self.early_stopping_patience < 1 or self.eval_strategy == "no"
        ):
            raise ValueError(
                "expected early_stopping_patience of at least 1, and evaluations to watch; got "
                f"{self.early_stopping_patience} and {'no' if self.eval_strategy == 'no' else 'some'} evaluations: "
                "pass eval_strategy='steps'"
            )
        if method.loss is mixup.mixkd and self.per_device_train_batch_size < 2:
            raise ValueError(
                f"expected a per_device_train_batch_size of at least 2 rows for method {method.name} to mix; got "
                f"{self.per_device_train_batch_size}: raise it, and lower gradient_accumulation_steps instead"
            )
        prompts = self.online and method.online_module in ("prefix", "p_tuning")
        if self.packing and (method.loss is mixup.mixkd or prompts):
            why = f"with online_module={method.online_module}" if prompts else "whose rows are mixed"
            raise ValueError(
                f"expected packing with rows that may share a line; got method {method.name}, {why}: leave packing out"
            )
        if self.packing and self.train_sampling_strategy in ("group_by_length", "batch_rebalance"):
            raise ValueError(
                f"expected packing, or batches of like lengths; got both (train_sampling_strategy="
                f"{self.train_sampling_strategy}): leave one of them out"
            )
        if self.online and method.online_module == "prefix" and self.gradient_checkpointing:
            raise ValueError(
                "expected online_module prefix without gradient_checkpointing, which drops its keys; got both: "
                "leave one out, or use online_module=lora"
            )
        if method.alternating and not (self.online and method.loss in (objectives.divergence, Leash)):
            raise ValueError(
                f"expected alternating with a method whose teacher learns by its divergence, such as okd or clda; got "
                f"{method.name}: leave it out"
            )
        if method.alternating and self.online_every > 1:
            raise ValueError(
                f"expected alternating or online_every; got {method.name} with both (online_every="
                f"{self.online_every}): choose one, by alternating=False or by leaving online_every out"
            )
        if self.online_stop < 1 and self.online_stop <= self.online_start:
            raise ValueError(
                f"expected online_stop after online_start={self.online_start}; got {self.online_stop}, with which the "
                "teacher would never learn: raise it, or use a method with a frozen teacher"
            )
        if self.average_decay != SelfTeacherOptions.average_decay and self.self_teacher != "average":
            raise ValueError(
                f"expected average_decay with self_teacher=average; got {self.average_decay} without: leave it out"
            )
        if self.exact_head and self.backward_columns is None:
            raise ValueError("expected backward_columns with exact_head; got none: pass both, or leave both out")
        check_student_options(self)
        check_tokenizer_options(self)
        check_cache_options(self)
        check_push_options(self)
        check_rollout_options(self)
        self._check_generation(method)

    def _check_generation(self, method: Method) -> None:
        if method.generate == "epoch" and method.responses not in (sampling.teacher, sampling.paired):
            raise ValueError(
                f"expected generate=epoch with a method whose policy is `teacher` or `paired`; got {method.name}: pass "
                "step"
            )
        if method.generate == "once" and method.responses is not sampling.teacher:
            raise ValueError(
                f"expected generate=once with a method whose teacher writes, such as seqkd; got {method.name}, whose "
                "student learns from its own words: pass epoch or step"
            )
        drawn = [field.name for field in dataclasses.fields(DrawOptions) if getattr(self, field.name) is not None]
        if method.generate == "once" and drawn:
            raise ValueError(
                f"expected no {drawn[0]} with generate=once, which searches by beams; got {getattr(self, drawn[0])}: "
                "leave it out, or pass generate=step"
            )
        if method.generate != "once" and self.num_beams != KeptOptions.num_beams:
            raise ValueError(
                f"expected num_beams with generate=once; got {self.num_beams} with generate={method.generate}, which "
                "samples: leave it out"
            )


READ_BY_ALL = (ChatOptions, RowOptions, StudentOptions, PlaceOptions)
GROUPS = tuple(base for base in OKDConfig.__bases__ if base not in (TrainingArguments, *READ_BY_ALL))
