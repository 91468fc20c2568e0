"""What a run is: the published methods as named presets, and the options on top of transformers' own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from okd_kernels import DIVERGENCES, Objective

logger = logging.get_logger(__name__)

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
        "taid": Method("TAID (arXiv 2501.16937): the target moves from student to teacher", "forward_kl", loss="taid"),
        "rlkd": Method(
            "RLKD (arXiv 2409.12545): forward KL and the order of the top tokens", "forward_kl", loss="rlkd"
        ),
        "mixkd": Method("MixKD (arXiv 2011.00593): forward KL, on mixed embeddings too", "forward_kl", loss="mixkd"),
        "minillm": Method(
            "MiniLLM (arXiv 2306.08543): policy gradient of the responses' reverse KL",
            "reverse_kl",
            loss="minillm",
            sequences="student",
        ),
        "distillm2": Method(
            "DistiLLM-2 (arXiv 2503.07067): skew KL on the teacher's responses, skew reverse KL on the student's",
            "skew_kl",
            loss="distillm2",
            sequences="paired",
        ),
        "okd": Method(
            "online KD (arXiv 2409.12512): the teacher's online module trains too", "forward_kl", online=True
        ),
        "seqkd": Method(
            "cross-entropy of responses that the teacher writes (arXiv 1606.07947)",
            None,
            1.0,
            loss="cross_entropy",
            sequences="teacher",
        ),
        "imitkd": Method(
            "KL(teacher || student), half of the batches student-written (arXiv 2009.07253)",
            "forward_kl",
            sequences="student",
            student_share=0.5,
        ),
        "gkd": Method(
            "generalised JSD, half of the batches student-written (arXiv 2306.13649)",
            "jsd",
            parameters={"beta": 0.5},
            sequences="student",
            student_share=0.5,
        ),
        "skd": Method(
            "KL(teacher || student) on the student's drafts, mended by the teacher (arXiv 2410.11325)",
            "forward_kl",
            sequences="interleaved",
        ),
        "distillm": Method(
            "skew reverse KL, ever more student-written and replayed batches (arXiv 2402.03898)",
            "skew_reverse_kl",
            parameters={"alpha": 0.1},
            sequences="replay",
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
    """transformers' TrainingArguments plus the method's options. Defaults follow the OKD paper, where it has any.

    Raises:
        ValueError: an unknown method, divergence or online module, or a number out of range.
    """

    method: str = option("okd", f"preset: {', '.join(METHODS)}")
    student_divergence: str | None = option(None, "the student's divergence in place of the preset's")
    student_ce_weight: float | None = option(None, "weight of the student's cross-entropy in place of the preset's")
    divergence_alpha: float | None = option(None, "alpha of the student's divergence (skew, alpha_beta)")
    divergence_beta: float | None = option(None, "beta of the student's divergence (jsd, alpha_beta)")
    online_teacher: bool = option(False, "let the teacher learn too; for methods with a divergence from one teacher")
    temperature: float = option(1.0, "temperature of the divergences, which are multiplied by its square")
    teacher_kl_weight: float = option(0.1, "a of the teacher's loss a KL(student || teacher) + (1 - a) CE")
    online_module: str = option("lora", f"what trains in the teacher: {', '.join(ONLINE_MODULES)}")
    online_rank: int = option(32, "rank of the teacher's LoRA")
    online_alpha: int | None = option(None, "alpha of the teacher's LoRA, scaled by alpha / rank; default: its rank")
    online_dropout: float = option(0.0, "dropout of the teacher's LoRA")
    online_layers: float = option(1.0, "share of the teacher's layers, from the top, that carry the LoRA")
    online_virtual_tokens: int = option(20, "length of a prefix or p-tuning prompt")
    online_learning_rate: float | None = option(None, "learning rate of the online module; default: learning_rate")
    mixup_alpha: float = option(0.4, "mixkd: a of lambda ~ Beta(a, a), the share of a row in its mixture")
    mixup_ce_weight: float = option(1.0, "mixkd: weight of the cross-entropy on mixed rows")
    mixup_weight: float = option(1.0, "mixkd: weight of the divergence on mixed rows")
    online_start: float = option(0.0, "share of the training after which the online module begins to learn")
    alternating: bool | None = option(None, "student and online module learn in turns; default: as the method says")
    clda_share: float = option(
        0.1, "share of the teacher's decoder weights, the least salient, that non_salient trains"
    )
    selection_learning_rate: float = option(1e-2, "learning rate of what selects among several teachers")
    selection_warmup: float = option(0.1, "share of the training with all teachers averaged, before a policy selects")
    early_stopping_patience: int | None = option(
        None, "evaluations without a better metric_for_best_model, by default eval_loss, after which training stops"
    )
    vocab_size: int | None = option(None, "columns shared by both heads where they are padded differently")
    max_length: int = option(512, "tokens of an example; longer ones are cut on the right, and counted")
    chat_template: bool | None = option(
        None, "render examples with the tokenizer's chat template; default: if it has one"
    )

    # responses that are not the dataset's
    student_share: float | None = option(None, "share of batches that the student writes, in place of the preset's")
    max_new_tokens: int = option(128, "longest sampled response, in tokens; with its prompt, at most max_length")
    sampling_temperature: float = option(1.0, "temperature of sampled responses")
    sampling_top_p: float = option(1.0, "nucleus of sampled responses")
    sampling_top_k: int = option(0, "sample out of so many likeliest tokens; 0: out of all")
    skd_gamma: int = option(5, "skd: tokens that the student drafts in a round")
    skd_top_k: int = option(25, "skd: the teacher replaces a draft that is not among its so many likeliest tokens")
    skd_student_temperature: float = option(0.5, "skd: temperature of the student's drafts")
    skd_teacher_temperature: float = option(0.2, "skd: temperature of the teacher's replacements")
    skd_top_p: float = option(0.5, "skd: nucleus of both")
    replay_size: int = option(1000, "distillm: student-written rows that are kept for replay, on each process")

    # transformers' options whose defaults differ here
    learning_rate: float = option(2e-4, "peak learning rate of the student")
    lr_scheduler_type: str = option("linear", "schedule of the learning rates")
    warmup_steps: float = option(0.03, "steps of linear warm-up; below 1, a share of all steps")
    logging_steps: float = option(10, "steps between log entries, each of a few more forward passes of one batch")
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
        if self.metric_for_best_model is not None and self.greater_is_better is None:
            # transformers takes greater for better in all but losses; here that is agreement alone
            self.greater_is_better = "agreement" in self.metric_for_best_model
        super().__post_init__()
        if self.n_gpu > 1:  # DataParallel would cut `positions`, which count rows of the whole batch, into pieces
            logger.warning(f"expected one process for each of {self.n_gpu} GPUs; using one GPU: start with torchrun")
            self._n_gpu = 1
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
        for name, least in (
            *(("online_rank", 1), ("online_virtual_tokens", 1), ("max_length", 1), ("max_new_tokens", 1)),
            *(("sampling_top_k", 0), ("skd_gamma", 1), ("skd_top_k", 0), ("replay_size", 1)),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}; got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature > 0; got {self.temperature}")
        for name in ("sampling_temperature", "skd_student_temperature", "skd_teacher_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"expected {name} > 0; got {getattr(self, name)}: a small one is greedy")
        for name in ("sampling_top_p", "skd_top_p"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"expected {name} in (0, 1]; got {getattr(self, name)}: 1 cuts nothing")
        if self.student_share is not None and self.preset.sequences != "student":
            raise ValueError(
                f"expected student_share with a method whose student writes some batches, such as gkd; got it with "
                f"{self.method}: leave it out"
            )
        if self.student_share is not None and not 0 <= self.student_share <= 1:
            raise ValueError(f"expected student_share between 0 and 1; got {self.student_share}")
        if self.preset.loss == "mixkd" and self.per_device_train_batch_size < 2:
            raise ValueError(
                "expected a per_device_train_batch_size of at least 2 rows for method mixkd to mix; got "
                f"{self.per_device_train_batch_size}: raise it, and lower gradient_accumulation_steps instead"
            )
        if not self.mixup_alpha > 0:
            raise ValueError(f"expected mixup_alpha > 0, of a Beta distribution; got {self.mixup_alpha}")
        for name in ("mixup_ce_weight", "mixup_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} to be finite and at least 0; got {getattr(self, name)}")
        if self.online_teacher and (self.preset.divergence is None or self.preset.selection is not None):
            raise ValueError(
                f"expected online_teacher with a method that distils from one teacher; got {self.method}: leave it out"
            )
        if self.online and self.online_kind == "prefix" and self.gradient_checkpointing:
            raise ValueError(
                "expected online_module prefix without gradient_checkpointing, which drops its keys; got both: "
                "leave one out, or use online_module=lora"
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
        if self.student_divergence and self.preset.loss in ("minillm", "distillm2"):
            raise ValueError(
                f"expected no student_divergence with method {self.method}, which has its own; got {name}: leave it out"
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
