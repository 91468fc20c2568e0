"""What a run is: the published methods as named presets, and the options on top of transformers' own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import TrainingArguments

from okd_kernels import DIVERGENCES, Objective

ONLINE_MODULES = ("lora", "prefix", "p_tuning", "non_salient")


@dataclass(frozen=True)
class Method:
    """A published method: where its sequences come from, what is minimised, what the teacher does, who teaches what.

    Attributes:
        divergence: the student's, a name out of `okd_kernels.DIVERGENCES`; None: cross-entropy only.
        ce_weight: weight of the student's cross-entropy.
        parameters: of the divergence, where they differ from its defaults.
        loss: how a batch becomes a loss, a name out of `okd.objectives.LOSSES`.
        sequences: who writes the responses, a name out of `okd.sampling.POLICIES`.
        student_share: with `sequences="student"`, the share of batches that the student writes.
        online: the teacher's online module trains too, on L_t = a KL(student || teacher) + (1 - a) CE (OKD, Eq. 16).
        online_module: what that module is, where the method says so; else `OKDConfig.online_module`.
        alternating: student and online module learn at every other step, in turns, rather than both at each.
        selection: how several teachers share an example, a name out of `okd.selection.SELECTIONS`; None: one teacher.
    """

    summary: str
    divergence: str | None
    ce_weight: float = 0.0
    parameters: Mapping[str, float] = field(default_factory=dict)
    loss: str = "divergence"
    sequences: str = "dataset"
    student_share: float = 1.0
    online: bool = False
    online_module: str | None = None
    alternating: bool = False
    selection: str | None = None

    @property
    def needs_teacher(self) -> bool:
        return self.divergence is not None or self.sequences == "teacher"


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "sft": Method("supervised fine-tuning: cross-entropy, no teacher", None, 1.0, loss="cross_entropy"),
        "forward_kd": Method("KL(teacher || student), teacher frozen", "forward_kl"),
        "reverse_kd": Method("KL(student || teacher), teacher frozen", "reverse_kl"),
        "jsd": Method("generalised Jensen-Shannon (GKD's divergence, off-policy), teacher frozen", "jsd"),
        "skew_kd": Method("skew KL (DistiLLM's divergence, off-policy), teacher frozen", "skew_kl"),
        "alpha_beta_kd": Method(
            "alpha-beta divergence (arXiv 2505.04560), teacher frozen",
            "alpha_beta",
            parameters={"alpha": 0.2, "beta": 0.7},
        ),
        "okd": Method(
            "online KD (arXiv 2409.12512): the teacher's online module trains too", "forward_kl", online=True
        ),
        "clda": Method(
            "collaborative learning (arXiv 2409.02699): the teacher's least salient weights train, in turns",
            "forward_kl",
            online=True,
            online_module="non_salient",
            alternating=True,
        ),
        "gated_ensemble": Method(
            "several teachers, each example's weights learned by a gate (arXiv 2011.04106)",
            "forward_kl",
            1.0,
            loss="ensemble",
            selection="gate",
        ),
        "rl_multi_teacher": Method(
            "several teachers, each example's selected by a policy (arXiv 2012.06048)",
            "forward_kl",
            1.0,
            loss="ensemble",
            selection="policy",
        ),
    }
)


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help on the command line."""
    return field(default=default, metadata={"help": help})


@dataclass
class OKDConfig(TrainingArguments):
    """transformers' TrainingArguments plus the method's options. Defaults of both sides follow the OKD paper.

    Raises:
        ValueError: an unknown method, divergence or online module, or a number out of range.
    """

    method: str = option("okd", f"preset: {', '.join(METHODS)}")
    student_divergence: str | None = option(None, "the student's divergence in place of the preset's")
    student_ce_weight: float | None = option(None, "weight of the student's cross-entropy in place of the preset's")
    divergence_alpha: float | None = option(None, "alpha of the student's divergence (skew, alpha_beta)")
    divergence_beta: float | None = option(None, "beta of the student's divergence (jsd, alpha_beta)")
    online_teacher: bool = option(False, "let the teacher's online module train with a method whose teacher is frozen")
    temperature: float = option(1.0, "temperature of the divergences, which are multiplied by its square")
    teacher_kl_weight: float = option(0.5, "a of the teacher's loss a KL(student || teacher) + (1 - a) CE")
    online_module: str = option("lora", f"what trains in the teacher: {', '.join(ONLINE_MODULES)}")
    online_rank: int = option(32, "rank of the teacher's LoRA")
    online_alpha: int | None = option(None, "scale of the teacher's LoRA; default: its rank")
    online_dropout: float = option(0.0, "dropout of the teacher's LoRA")
    online_layers: float = option(1.0, "share of the teacher's layers, from the top, that carry the LoRA")
    online_virtual_tokens: int = option(20, "length of a prefix or p-tuning prompt")
    online_learning_rate: float | None = option(None, "learning rate of the online module; default: learning_rate")
    online_start: float = option(0.0, "share of the training after which the online module begins to learn")
    alternating: bool | None = option(None, "student and online module learn in turns; default: as the method says")
    clda_share: float = option(
        0.1, "share of the teacher's decoder weights, the least salient, that non_salient trains"
    )
    selection_learning_rate: float = option(1e-2, "learning rate of what selects among several teachers")
    selection_warmup: float = option(0.1, "share of the training with all teachers averaged, before a policy selects")
    early_stopping_patience: int | None = option(
        None, "evaluations without a lower eval_loss after which training stops"
    )
    vocab_size: int | None = option(None, "columns shared by both heads where they are padded differently")
    max_length: int = option(512, "tokens of an example; longer ones are cut on the right, and counted")
    chat_template: bool | None = option(
        None, "render examples with the tokenizer's chat template; default: if it has one"
    )

    # transformers' options whose defaults differ here
    learning_rate: float = option(2e-4, "peak learning rate of the student")
    lr_scheduler_type: str = option("linear", "schedule of the learning rates")
    warmup_steps: float = option(0.03, "steps of linear warm-up; below 1, a share of all steps")
    logging_steps: float = option(10, "steps between log entries; each costs one forward pass of the base teacher")
    logging_first_step: bool = option(True, "log the first step too, so that even a short run has a curve")
    logging_nan_inf_filter: bool = option(False, "keep NaN out of the log; here a NaN stops the run instead")
    remove_unused_columns: bool = option(False, "drop columns of the data; here the collator needs them")
    report_to: None | str | list[str] = option(  # noqa: RUF036  (HfArgumentParser wants this order)
        "none", "integrations that receive the log (tensorboard, wandb, ...)"
    )

    def __post_init__(self) -> None:
        if self.early_stopping_patience is not None:
            self.metric_for_best_model = self.metric_for_best_model or "loss"
            self.restore_callback_states_from_checkpoint = True  # a resumed run goes on counting
        super().__post_init__()
        self.dataloader_pin_memory &= torch.cuda.is_available()  # else torch warns on every run
        if self.method not in METHODS:
            raise ValueError(f"expected method to be one of {', '.join(METHODS)}; got {self.method!r}")
        if self.online_module not in ONLINE_MODULES:
            raise ValueError(
                f"expected online_module to be one of {', '.join(ONLINE_MODULES)}; got {self.online_module!r}"
            )
        if not 0 <= self.teacher_kl_weight <= 1:
            raise ValueError(f"expected teacher_kl_weight between 0 and 1; got {self.teacher_kl_weight}")
        for name, of in (("online_layers", "layers"), ("clda_share", "weights")):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in (0, 1], a share of the {of}; got {getattr(self, name)}")
        for name in ("online_start", "selection_warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in [0, 1], a share of the training; got {getattr(self, name)}")
        if self.early_stopping_patience is not None and (
            self.early_stopping_patience < 1 or self.eval_strategy == "no"
        ):
            raise ValueError(
                "expected early_stopping_patience of at least 1, and evaluations to watch; got "
                f"{self.early_stopping_patience} and {'no' if self.eval_strategy == 'no' else 'some'} evaluations: "
                "pass eval_strategy='steps'"
            )
        for name in ("online_rank", "online_virtual_tokens", "max_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1; got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature > 0; got {self.temperature}")
        if self.online_teacher and (self.preset.divergence is None or self.preset.selection is not None):
            raise ValueError(
                f"expected online_teacher with a method that distils from one teacher; got {self.method}: leave it out"
            )
        if self.alternates and (not self.online or self.preset.loss != "divergence"):
            raise ValueError(
                f"expected alternating with a method whose teacher learns by its divergence, such as okd or clda; got "
                f"{self.method}: leave it out"
            )
        _ = self.student_objective  # raises where divergence and parameters do not fit

    @property
    def preset(self) -> Method:
        return METHODS[self.method]

    @property
    def online(self) -> bool:
        """The teacher learns too, because the method or `online_teacher` says so."""
        return self.preset.online or self.online_teacher

    @property
    def online_kind(self) -> str:
        """One of ONLINE_MODULES: the method's, or the one that was chosen."""
        return self.preset.online_module or self.online_module

    @property
    def alternates(self) -> bool:
        return self.preset.alternating if self.alternating is None else self.alternating

    @property
    def student_objective(self) -> Objective:
        """L_s, with the preset's divergence or the one that replaces it."""
        name = self.student_divergence or self.preset.divergence
        ce_weight = self.preset.ce_weight if self.student_ce_weight is None else self.student_ce_weight
        if name is None:
            return Objective(weight=0.0, ce_weight=ce_weight)
        if self.student_divergence and not self.preset.divergence:
            raise ValueError(
                f"expected no student_divergence with method {self.method}, which has no teacher; got {name}"
            )
        given = {"alpha": self.divergence_alpha, "beta": self.divergence_beta}
        parameters = {k: v for k, v in given.items() if v is not None}
        if not self.student_divergence:
            parameters = {**self.preset.parameters, **parameters}
        if name in DIVERGENCES:
            unknown = sorted(set(parameters) - set(DIVERGENCES[name].parameters))
            if unknown:
                names = ", ".join(f"divergence_{k}" for k in unknown)
                raise ValueError(f"{name} has no {', '.join(unknown)}; got {names}: leave it out")
        return Objective(name, ce_weight=ce_weight, **parameters)

    @property
    def teacher_objective(self) -> Objective | None:
        """L_t of OKD (Eq. 16); None where the teacher is frozen."""
        if not self.online:
            return None
        return Objective("forward_kl", weight=self.teacher_kl_weight, ce_weight=1 - self.teacher_kl_weight)
