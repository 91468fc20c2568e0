"""The published methods as presets, over the parts that they are made of. A method of your own is as good:

def my_loss(pair, batch, totals):
    return pair.distil(pair.student_rows(batch), pair.teacher_rows(batch), batch["targets"], totals.tokens)

OKDConfig(method=Method("mine", "what it does", student=Objective("jsd"), loss=my_loss))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from okd import ensemble, mixup, objectives, on_policy, sampling, selection
from okd.cache import CacheOptions
from okd.decoding import Draw
from okd.leash import Leash
from okd.online import MODULE_OPTIONS, OnlineOptions
from okd.options import groups_of, option
from okd.teachers import SelfTeacherOptions
from okd_kernels import Objective

OKD_TEACHER = Objective("forward_kl", weight=0.1, ce_weight=0.9)  # L_t of OKD (Eq. 16); a = 0.1 is ours


@dataclass
class DivergenceOptions:
    """Read by methods whose student minimises a divergence."""

    student_divergence: str | None = option(None, "the student's divergence in place of the preset's")
    divergence_alpha: float | None = option(None, "alpha of the student's divergence (skew, alpha_beta)")
    divergence_beta: float | None = option(None, "beta of the student's divergence (jsd, alpha_beta)")
    backward_columns: str | None = option(
        None, "share of the heads' columns in backward GEMMs, 0.25, or a bound on the error, 1%"
    )
    exact_head: bool = option(False, "with backward_columns: the heads' own gradients from all of them, nevertheless")
    temperature: float = option(1.0, "temperature of the divergences, which are multiplied by its square", above=0)
    online_teacher: bool = option(False, "let the teacher learn too; for methods with a divergence from one teacher")


@dataclass(frozen=True)
class Method:
    """A method: who writes the responses, what is minimised, what the teacher does, who teaches what.

    Attributes:
        student: what the student minimises; a weight of 0 leaves its cross-entropy, and needs no teacher.
        teacher: what the teacher's online module minimises (L_t); None: the teacher is frozen.
        loss: how a batch becomes a loss, see `okd.objectives`; a class where it remembers something.
        responses: who writes them, a policy of `okd.sampling`.
        selection: how several teachers share an example, a class of `okd.selection`; None: one teacher.
        is_routed: each example names its teacher, out of several.
        online_module: what that module is.
        alternating: student and online module learn at every other step, in turns, rather than both at each.
        student_share: of the steps, with `responses=student`, at which the student writes.
        teacher_share: in the mixture that `responses=mixture` samples from.
        draw: temperature and cuts of sampled responses.
        generate: when responses are written, see `okd.kept.KeptOptions`.
        fixed_divergence: the method has its own; another one would be another method.
        left_out: what of the publication is not here, or is not from there.
    """

    name: str
    summary: str
    student: Objective = Objective("forward_kl")
    teacher: Objective | None = None
    loss: Any = objectives.divergence
    responses: sampling.Policy = sampling.dataset
    selection: type[selection.Selection] | None = None
    is_routed: bool = False
    online_module: str = "lora"
    alternating: bool = False
    student_share: float = 1.0
    teacher_share: float = 0.0
    draw: Draw = Draw()
    generate: str = "step"
    fixed_divergence: bool = False
    left_out: str = ""

    @property
    def needs_teacher(self) -> bool:
        return self.student.weight > 0 or self.responses is sampling.teacher

    @property
    def takes_several(self) -> bool:
        return self.selection is not None or self.is_routed

    @property
    def option_groups(self) -> frozenset[type]:
        """The groups of options that the method reads."""
        groups = set(groups_of(self.loss, self.responses, self.selection))
        if self.student.weight > 0:
            groups.add(DivergenceOptions)
        if self.teacher is not None:
            groups |= {OnlineOptions, MODULE_OPTIONS[self.online_module]}
        if self.needs_teacher and not self.takes_several:
            groups.add(SelfTeacherOptions)
            if self.responses is sampling.dataset and self.loss is not mixup.mixkd:
                groups.add(CacheOptions)
        return frozenset(groups)


_SFT = Objective(weight=0.0, ce_weight=1.0)
_PRESETS = (
    Method("okd", "online KD (arXiv 2409.12512): the teacher's online module trains too", teacher=OKD_TEACHER),
    Method(
        "okd_leash",
        "online KD whose teacher is held near its base, by a penalty on KL(base || teacher)",
        teacher=Objective("forward_kl", weight=0.7, ce_weight=0.3),
        loss=Leash,
        left_out="a published source: it is ours (benchmarks/RESULTS.md)",
    ),
    Method("sft", "supervised fine-tuning: cross-entropy, no teacher", _SFT, loss=objectives.cross_entropy),
    Method("forward_kd", "KL(teacher || student), teacher frozen"),
    Method("reverse_kd", "KL(student || teacher), teacher frozen", Objective("reverse_kl")),
    Method("jsd", "generalised Jensen-Shannon (GKD's divergence, off-policy), teacher frozen", Objective("jsd")),
    Method("skew_kd", "skew KL (DistiLLM's divergence, off-policy), teacher frozen", Objective("skew_kl")),
    Method(
        "alpha_beta_kd",
        "alpha-beta divergence (arXiv 2505.04560), teacher frozen",
        Objective("alpha_beta", alpha=0.2, beta=0.7),
    ),
    Method("taid", "TAID (arXiv 2501.16937): the target moves from student to teacher", loss=objectives.Taid),
    Method("rlkd", "RLKD (arXiv 2409.12545): forward KL and the order of the top tokens", loss=objectives.rlkd),
    Method(
        "mixkd",
        "MixKD (arXiv 2011.00593): cross-entropy and forward KL, on mixed embeddings too",
        Objective("forward_kl", ce_weight=1.0),
        loss=mixup.mixkd,
        left_out="several mixtures a row",
    ),
    Method(
        "minillm",
        "MiniLLM (arXiv 2306.08543): policy gradient of the responses' reverse KL",
        Objective("reverse_kl"),
        loss=on_policy.minillm,
        responses=sampling.mixture,
        teacher_share=0.2,
        fixed_divergence=True,
        left_out="PPO's clipping and four passes over a sample, whitening: one step a sample",
    ),
    Method(
        "distillm2",
        "DistiLLM-2 (arXiv 2503.07067): skew KL on the teacher's responses, skew reverse KL on the student's",
        Objective("skew_kl", alpha=0.1),
        loss=on_policy.Contrastive,
        responses=sampling.paired,
        draw=Draw(temperature=0.8),
        generate="epoch",
        fixed_divergence=True,
        left_out="curricula, off as in the released code: skew_curriculum (of a batch, not a response), lowering_start",
    ),
    Method(
        "seqkd",
        "cross-entropy of responses that the teacher writes, by beam search (arXiv 1606.07947)",
        _SFT,
        loss=objectives.cross_entropy,
        responses=sampling.teacher,
        generate="once",
        left_out="mixing with references",
    ),
    Method(
        "imitkd",
        "KL(teacher || student), half of the steps student-written (arXiv 2009.07253)",
        responses=sampling.student,
        student_share=0.5,
        left_out="the share's decay",
    ),
    Method(
        "gkd",
        "generalised JSD, half of the steps student-written (arXiv 2306.13649)",
        Objective("jsd", beta=0.5),
        responses=sampling.student,
        student_share=0.5,
        left_out="its mixture with RL",
    ),
    Method(
        "skd",
        "KL(teacher || student) on the student's drafts, mended by the teacher (arXiv 2410.11325)",
        responses=sampling.interleaved,
    ),
    Method(
        "distillm",
        "skew reverse KL, ever more student-written and replayed batches (arXiv 2402.03898)",
        Objective("skew_reverse_kl", alpha=0.1),
        responses=sampling.replay,
        left_out="its language-model term",
    ),
    Method(
        "clda",
        "collaborative learning (arXiv 2409.02699): the teacher's least salient weights train, in turns",
        teacher=OKD_TEACHER,
        online_module="non_salient",
        alternating=True,
        left_out="carried over from vision: saliency and modules are ours",
    ),
    Method(
        "gated_ensemble",
        "several teachers, each example's weights learned by a gate (arXiv 2011.04106)",
        Objective("forward_kl", ce_weight=1.0),
        loss=ensemble.ensemble,
        selection=selection.Gate,
        left_out="carried over from click prediction",
    ),
    Method(
        "rl_multi_teacher",
        "several teachers, each example's selected by a policy (arXiv 2012.06048)",
        Objective("forward_kl", ce_weight=1.0),
        loss=ensemble.ensemble,
        selection=selection.Policy,
        left_out="rewards at the end of an epoch: here after each step",
    ),
    Method(
        "routed",
        "several teachers, each example's named by the data",
        loss=ensemble.routed,
        is_routed=True,
    ),
)
METHODS: Mapping[str, Method] = MappingProxyType({method.name: method for method in _PRESETS})


def readers_of(group: type) -> list[str]:
    """Names of the presets that read a group of options."""
    return [name for name, method in METHODS.items() if group in method.option_groups]
