"""Several teachers over one vocabulary: weighed or selected (`okd.selection`), or named by the data.

Shapes: N response tokens; D_i the hidden size of teacher i.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from okd.data import Batch, batch_rows, row_of_token, tokens_of
from okd.models import check_head, head_of, is_adapter, load_model, response_rows, vocabulary_of
from okd.objectives import Totals, joined
from okd.selection import Lesson, divergences_of
from okd.teachers import Frozen, Placed, base_of, refuse_injected
from okd_kernels import DistillationLoss, LinearHead

if TYPE_CHECKING:
    from okd.pair import StudentTeacher


class Ensemble(Placed):
    """Several frozen teachers. The first one judges: evaluation measures against it, whatever is learned meanwhile.

    Args:
        members: models, or pairs (PEFT model, name of its adapter; None for its base), or a mapping of names to those.
            Members may share a model, whose adapters are then switched, so that its base exists once.

    Raises:
        ValueError: the first teacher, as judge, has a prompt or prefix; a head does more than a matrix product.
    """

    learns, judges = False, True

    def __init__(self, members: Sequence[Any] | Mapping[str, Any]):
        super().__init__()
        named = members if isinstance(members, Mapping) else {str(i): m for i, m in enumerate(members, start=1)}
        self.names = list(named)
        pairs = [
            m if isinstance(m, tuple) else (m, m.active_adapter if hasattr(m, "peft_config") else None)
            for m in named.values()
        ]
        for model, _ in pairs:
            refuse_injected(model)
        models = {id(model): model for model, _ in pairs}
        self.models = nn.ModuleList(models.values())
        self.members = [(list(models).index(id(model)), adapter) for model, adapter in pairs]
        model, adapter = pairs[0]
        if adapter is not None and model.peft_config[adapter].is_prompt_learning:
            raise ValueError(
                f"expected a first teacher, which judges, without prompt or prefix; got adapter {adapter!r}: put it "
                "second, or merge what it learned into a model"
            )
        self.requires_grad_(False)
        for i, name in enumerate(self.names):
            with self.active(i) as member:
                check_head(member, f"teacher {name}")

    @contextmanager
    def active(self, i: int) -> Iterator[Any]:
        """The model of member i, with its adapter switched on and no other."""
        index, adapter = self.members[i]
        model: Any = self.models[index]
        if adapter is None:
            if not hasattr(model, "disable_adapter"):
                yield model
                return
            with base_of(model) as base:
                yield base
            return
        if model.active_adapter != adapter:
            model.set_adapter(adapter, inference_mode=True)
        yield model

    @torch.no_grad()
    def taught(self, i: int, batch: Batch) -> tuple[Tensor, LinearHead]:
        """(N, D_i) hidden states of teacher i that predict the response tokens, and its head."""
        with self.active(i) as model:
            return response_rows(model, batch, as_teacher=True), head_of(model, batch["targets"].device)

    def widths(self) -> list[int]:
        """Hidden size of each teacher."""
        models: list[Any] = [self.models[index] for index, _ in self.members]
        return [model.config.get_text_config().hidden_size for model in models]

    def vocabularies(self) -> list[int]:
        """Rows of each teacher's head."""
        return [vocabulary_of(self.models[index]) for index, _ in self.members]

    # --- the protocol: the ensemble as its first teacher

    @property
    def model(self) -> Any:
        return self.models[0]

    def rows(self, batch: Batch) -> Tensor:
        return self.taught(0, batch)[0]

    def head(self, device: torch.device | None = None) -> LinearHead:
        with self.active(0) as model:
            return head_of(model, device)

    @contextmanager
    def as_it_was(self) -> Iterator[Any]:
        with self.active(0) as model:
            yield model

    after_update, train = Frozen.after_update, Frozen.train


def ensemble(pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
    """sum_i w_i D(p_i, q) + c CE over the teachers, with each example's weights w from the pair's selection.

    The weights sum to one, so that of sum_i w_i (D(p_i, q) + c CE) the cross-entropy counts once. They hang on the
    losses themselves (a teacher's NLL), so per-token losses come first, and both projections are made twice per
    teacher: forward, and again with the gradients in backward. Whole logits never exist.

    Metrics: those of `okd_kernels`, averaged with the weights; `distillation_loss` sum_i w_i D(p_i, q); and for teacher
    i = 1, 2, ... `teacher_<i>_weight`, and with a policy `teacher_<i>_selected`.
    """
    teachers: Any = pair.teacher
    targets, student = batch["targets"], pair.student_rows(batch)
    taught = [teachers.taught(i, batch) for i in range(len(teachers.members))]
    losses = [pair.distil(student, rows, targets, teacher_head=head, reduction="none") for rows, head in taught]
    example = row_of_token(batch)
    examples = torch.arange(len(batch["counts"]), device=example.device).unsqueeze(1)
    own = (example == examples).to(losses[0].student.dtype)  # (B, N)
    divergences = divergences_of(losses, pair.student_objective.ce_weight)
    mean = own / own.sum(1, keepdim=True).clamp_min(1)
    lesson = Lesson(batch, student.detach(), taught, losses, divergences, mean, pair.seed, pair.progress)
    assert pair.selection is not None
    with torch.autocast(student.device.type, enabled=False):  # what it compares are small differences of large sums
        choice = pair.selection(lesson)

    weights = choice.weights[example]  # (N, K)
    per_token = (weights * torch.stack([loss.student for loss in losses], 1)).sum(1)
    weights = weights.detach()
    metrics = {
        name: (weights * torch.stack([loss.metrics[name] for loss in losses], 1)).sum(1) for name in losses[0].metrics
    }
    metrics["distillation_loss"] = (weights * divergences).sum(1)
    for name, value in {"weight": weights, **{k: v[example] for k, v in choice.metrics.items()}}.items():
        metrics |= {f"teacher_{i}_{name}": column for i, column in enumerate(value.unbind(1), start=1)}
    return DistillationLoss(per_token.sum() / totals.tokens, None, metrics)


def routed(pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
    """D(p_i, q) + c CE, i the teacher that each example names. A teacher reads its own examples only.

    Metrics beyond the usual: `distillation_loss`, KL(p_i || q), whatever D is.
    """
    teachers: Any = pair.teacher
    lost = [row for row, name in zip(batch["ids"], batch["teachers"], strict=True) if name not in teachers.names]
    if lost:
        raise ValueError(
            f'expected "teacher" of every example to be one of {", ".join(teachers.names)}; got another, or none, in '
            f"{', '.join(lost[:5])}: correct it, in the held-out examples too"
        )
    student, parts = pair.student_rows(batch), []
    for i, name in enumerate(teachers.names):
        rows = [row for row, of in enumerate(batch["teachers"]) if of == name]
        if rows:
            at = tokens_of(batch, rows)
            hidden, head = teachers.taught(i, batch_rows(batch, rows))
            loss = pair.distil(student[at], hidden, batch["targets"][at], totals.tokens, teacher_head=head)
            parts.append((at, loss))
        elif pair.is_sharded:  # for the processes that have rows of its
            teachers.taught(i, batch_rows(batch, [0]))
    loss = joined(parts)
    return loss._replace(metrics=loss.metrics | {"distillation_loss": loss.metrics["forward_kl"]})


def models_of(teacher: Any) -> list[Any]:
    """The models of what a trainer takes as its teacher: one, several, or by name; of a `Teacher` its own."""
    given: list[Any] = [teacher]
    if isinstance(teacher, Ensemble):
        given = list(teacher.models)
    elif isinstance(teacher, list | tuple):
        given = list(teacher)
    elif isinstance(teacher, Mapping):
        given = list(teacher.values())
    models = [member[0] if isinstance(member, tuple) else member for member in given]
    return [model.model if hasattr(model, "as_it_was") else model for model in models]


def named_sources(sources: Sequence[str]) -> dict[str, str]:
    """Names and places of teachers given as `name=source`, or `source` alone: those are called 1, 2, ...

    A name is letters, digits, `_`, `.` and `-`: a path may have a `=` of its own.
    """
    found: dict[str, str] = {}
    for i, text in enumerate(sources, start=1):
        name, equals, source = text.partition("=")
        if not (equals and re.fullmatch(r"[\w.-]+", name)):
            name, source = str(i), text
        if not source or name in found:
            raise ValueError(f"expected teachers as name=source, each name once; got {text!r}: correct it")
        found[name] = source
    return found


def load_ensemble(first: Any, sources: Mapping[str, str], **options: Any) -> Ensemble:
    """The first of the named teachers, already loaded, and the others: models, or adapters over the first.

    options: of `load_model`.
    """
    from peft import PeftModel

    adapted: Any = None
    members: dict[str, Any] = {}
    for name, source in list(sources.items())[1:]:
        if not is_adapter(source):
            members[name] = load_model(source, **options)
            continue
        if adapted is None:
            adapted = PeftModel.from_pretrained(first, source, adapter_name=f"teacher_{name}")
        else:
            adapted.load_adapter(source, adapter_name=f"teacher_{name}")
        members[name] = (adapted, f"teacher_{name}")
    return Ensemble({next(iter(sources)): first if adapted is None else (adapted, None), **members})
