"""Autograd: the one `torch.library` operator behind all losses, so that `torch.compile` sees one node.

Gradients are made in the forward pass and multiplied by the upstream scalar in backward. What the forward pass cannot
know, the per-token upstream gradients of `reduction="none"`, makes backward run the operator again.

Legend: N tokens, n of them counted, V vocabulary rows of this rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from okd_kernels.call import Operands, Spec, check_labels
from okd_kernels.columns import METRICS as COLUMN_METRICS
from okd_kernels.engine import run_chunks
from okd_kernels.rows import METRICS, finish
from okd_kernels.sharding import Vocabulary, shared_vocabulary
from okd_kernels.sides import Model, gradient_dtype, normalise, wide
from okd_kernels.targets import SPARSE_METRICS, MixedTarget, SparseTarget, Target

SCHEMA = (
    "(Tensor student_hidden, Tensor? student_weight, Tensor? student_bias, Tensor? student_lora_x, "
    "Tensor? student_lora_b, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, "
    "Tensor? teacher_lora_x, Tensor? teacher_lora_b, Tensor? target_ids, Tensor? target_log_probs, Tensor? labels, "
    "Tensor row_weights, Tensor inverse_normalizer, "
    "str student, float[] student_numbers, str teacher, float[] teacher_numbers, float[] head_numbers, "
    "ScalarType student_dtype, ScalarType teacher_dtype, str tail, float target_mix, float temperature, "
    "SymInt vocab_size, int ignore_index, int workspace_bytes, str backend, str group, bool compact, "
    "float backward_share, float backward_bound, bool exact_head, bool per_token, "
    "str wanted) -> (Tensor student_total, Tensor teacher_total, Tensor student_losses, Tensor teacher_losses, "
    "Tensor metrics, Tensor[] gradients)"
)


class Outputs(NamedTuple):
    student_total: Tensor  # ()
    teacher_total: Tensor
    student_losses: Tensor  # (N,)
    teacher_losses: Tensor
    metrics: Tensor  # (N, len(metric_names(spec)))
    gradients: list[Tensor]  # of the totals, with respect to the operands `Spec.wanted`, in that order


def arguments_of(arguments: tuple[Any, ...]) -> tuple[Operands, Spec]:
    n = len(Operands._fields)
    return Operands(*arguments[:n]), Spec(*arguments[n:])


def vocabulary_of(operands: Operands, spec: Spec) -> Vocabulary:
    """This rank's columns. With a group the ranks compare what they do; raises ValueError on all where it differs."""

    def columns(hidden: Tensor | None, weight: Tensor | None) -> int:
        return len(weight) if weight is not None else hidden.shape[1] if hidden is not None else 0

    student = columns(operands.student_hidden, operands.student_weight)
    if not spec.group:
        return Vocabulary(spec.vocab_size, spec.vocab_size)
    teacher = student if spec.tail else columns(operands.teacher_hidden, operands.teacher_weight)
    labels = operands.labels
    counted = len(operands.row_weights) if labels is None else int((labels != spec.ignore_index).sum())
    options = {
        name: str(x) if isinstance(x, torch.dtype) else x for name, x in spec._asdict().items() if name != "group"
    }
    facts = {"number of tokens": len(operands.row_weights), "number of counted tokens": counted, **options}
    if labels is not None:  # one rank's bad label would be its error alone, and the others would wait for it
        facts["sum of labels"] = int(labels.sum())
    device = operands.student_hidden.device
    return shared_vocabulary(spec.group, [student, teacher], spec.vocab_size, device, facts)


def counted_rows(labels: Tensor, compact: bool) -> Tensor | None:
    """Indices (n,) of the rows that stay for the GEMMs; None for all.

    Finding them makes the host wait for a GPU once, for GEMMs that take many times as long. While a CUDA graph is
    captured it cannot.
    """
    if not compact or labels.device.type == "meta" or (labels.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    counted = (labels >= 0).nonzero().squeeze(1)
    return None if len(counted) == len(labels) else counted


def _distil(*arguments: Any) -> Outputs:
    """The operator's implementation, on any device."""
    operands, spec = arguments_of(arguments)
    vocabulary = vocabulary_of(operands, spec)
    labels, kept = operands.labels, None
    if labels is not None:
        labels = check_labels(labels, spec.ignore_index, vocabulary.whole)
        kept = counted_rows(labels, spec.compact)

    def counted(x: Tensor) -> Tensor:
        return x if kept is None else x[kept]

    models = [Model("student", operands, spec, kept, vocabulary)]
    sparse, dtype = None, wide(spec.student_dtype, spec.teacher_dtype)
    target: Target
    if operands.target_ids is not None and operands.target_log_probs is not None:
        sparse = target = SparseTarget(
            *(counted(operands.target_ids), counted(operands.target_log_probs), dtype, vocabulary),
            tail=spec.tail,
            reverse=spec.student == "reverse_kl",
            temperature=spec.temperature,
        )
    else:
        models.append(Model("teacher", operands, spec, kept, vocabulary))
        target = models[1].side
    if spec.target_mix != 1.0:
        target = MixedTarget(target, spec.target_mix)

    row_labels, factors = None if labels is None else counted(labels), counted(operands.row_weights)
    n, names = len(operands.row_weights), metric_names(spec)
    losses = factors.new_zeros(len(factors), 2, dtype=dtype)
    metrics = factors.new_zeros(len(factors), len(names), dtype=dtype)
    if row_labels is not None:  # where a label is no token, a row's gradients are as little worth as its loss
        factors = factors.masked_fill((row_labels >= vocabulary.whole).unsqueeze(1), torch.nan)
    mass = sparse.mass if sparse is not None and spec.tail == "none" else None
    row_weights = factors.new_zeros(len(factors), 4)
    for i, (model, objective) in enumerate(zip(models, spec.objectives, strict=False)):
        if objective is not None:  # 1/T from the logits, T^2 on the loss
            factor = model.row_factors(factors[:, i], operands.inverse_normalizer)
            row_weights[:, i] = factor * (objective.weight * spec.temperature) * (1 if mass is None else mass)
            row_weights[:, 2 + i] = factor * objective.ce_weight
    if len(losses):
        with torch.autocast(losses.device.type, enabled=False):
            statistics, values = run_chunks(
                models[0].side,
                target,
                row_labels,
                row_weights,
                vocabulary,
                temperature=spec.temperature,
                workspace_bytes=spec.workspace_bytes,
                backend=spec.backend,
            )
            options = (spec.objectives, spec.temperature, vocabulary.whole, mass)
            losses, metrics[:, : len(METRICS)] = finish(statistics, values.to(dtype), row_labels, *options)
            more = [] if sparse is None else [sparse.masses(statistics)]
            if spec.tells_columns:
                more += [m.of_columns().expand(len(losses), -1) for m in models if m.side.objective is not None]
            if more:
                others = torch.cat(more, 1).to(dtype)
                if row_labels is not None:
                    others = others.masked_fill((row_labels < 0).unsqueeze(1), 0)
                metrics[:, len(METRICS) :] = others
    if kept is not None:
        losses, metrics = (x.new_zeros(n, x.shape[1]).index_copy_(0, kept, x) for x in (losses, metrics))
    weights = operands.row_weights if labels is None else operands.row_weights.masked_fill((labels < 0).unsqueeze(1), 0)
    totals = (losses * weights).sum(0) * operands.inverse_normalizer
    found = {name: gradient for model in models for name, gradient in model.gradients().items()}
    # Outputs of an operator must not alias.
    student_total, teacher_total, student, teacher = (x[..., i].clone() for x in (totals, losses) for i in (0, 1))
    return Outputs(student_total, teacher_total, student, teacher, metrics, [found[name] for name in wanted(spec)])


def metric_names(spec: Spec) -> tuple[str, ...]:
    sides = ("student", "teacher") if spec.teacher else ("student",)
    columns = [f"{side}_{name}" for side in sides for name in COLUMN_METRICS] if spec.tells_columns else ()
    return *METRICS, *(SPARSE_METRICS if spec.tail else ()), *columns


def wanted(spec: Spec) -> list[str]:
    """Names of the operands whose gradients the operator returns."""
    return [] if spec.per_token or not spec.wanted else spec.wanted.split(",")


distil = torch.library.custom_op("okd_kernels::distil", _distil, mutates_args=(), schema=SCHEMA)


@distil.register_fake
def _(*arguments: Any) -> Outputs:
    operands, spec = arguments_of(arguments)
    dtype, x = wide(spec.student_dtype, spec.teacher_dtype), operands.student_hidden
    n_metrics = len(metric_names(spec))
    tensors = (getattr(operands, name) for name in wanted(spec))
    gradients = [torch.empty_like(t, dtype=gradient_dtype(t), memory_format=torch.contiguous_format) for t in tensors]
    s_total, t_total, student, teacher, metrics = (
        x.new_empty(shape, dtype=dtype) for shape in ((), (), (len(x),), (len(x),), (len(x), n_metrics))
    )
    return Outputs(s_total, t_total, student, teacher, metrics, gradients)


def kept_for_another_backward(gradient: Tensor) -> bool:
    """Whether to leave it as it is: under `retain_graph=True`, and while `torch.compile` traces."""
    return type(gradient) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph()


def times(gradient: Tensor, upstream: Tensor, backend: str) -> Tensor:
    """upstream * gradient, in place where this is the last backward through the graph: no second dW is allocated."""
    if kept_for_another_backward(gradient):
        return (gradient * upstream).to(gradient.dtype)
    if upstream.device.type == "cpu" and upstream == 1:
        return gradient
    if backend == "triton":
        from okd_kernels.row_kernels import scale_

        return scale_(gradient, upstream)
    return gradient.mul_(upstream)


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
    """Gradients made here are constants to autograd: refuse to differentiate them again, rather than give zero.

    torch.autograd.function's decorator of this name does so only where the upstream gradient requires one.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():  # as always but under create_graph=True
            return gradients
        refuse = torch._C._functions.DelayedError(
            b"expected a first derivative of the distillation loss; got a second: use backend='reference'", 1
        )
        return tuple(None if g is None else refuse(g.detach().requires_grad_()) for g in gradients)

    return wrapper


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    operands, ctx.spec = arguments_of(inputs)
    ctx.dtypes = {name: x.dtype for name, x in operands._asdict().items() if x is not None}
    ctx.set_materialize_grads(False)  # else autograd would fill a zero dW for every output that nobody used
    if ctx.spec.per_token:
        # A frozen teacher may have run in inference mode, whose tensors autograd does not save.
        saved = operands._replace(row_weights=None, inverse_normalizer=None)  # type: ignore[arg-type]
        ctx.save_for_backward(*(x.clone() if x is not None and x.is_inference() else x for x in saved))
    else:
        # Not by `save_for_backward`, whose tensors activation offloading would bring to the host and back: V x D.
        ctx.gradients = [gradient.detach() for gradient in output[5]]  # attached, they would hold this node


@once_differentiable
def _backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
    of_side = dict(zip(("student", "teacher"), upstream[2:4] if ctx.spec.per_token else upstream[:2], strict=True))
    factors = {name: of_side[name.partition("_")[0]] for name in ctx.spec.wanted.split(",") if name}
    names = [name for name, factor in factors.items() if factor is not None]  # else: a loss that nobody differentiates
    found: dict[str, Tensor] = {}
    if names and ctx.spec.per_token:
        given = next(x for x in of_side.values() if x is not None)
        weights = torch.stack([torch.zeros_like(given) if x is None else x for x in of_side.values()], 1)
        row_weights, scale = normalise(weights)
        operands = Operands(*ctx.saved_tensors)._replace(row_weights=row_weights, inverse_normalizer=scale)
        spec = ctx.spec._replace(per_token=False, wanted=",".join(names))
        found = dict(zip(names, Outputs(*distil(*operands, *spec)).gradients, strict=True))
    elif names:
        if ctx.gradients is None:
            raise RuntimeError(
                "expected one backward pass through the distillation loss, whose gradients are freed by it; got a "
                "second: pass retain_graph=True to the first"
            )
        made = dict(zip(wanted(ctx.spec), ctx.gradients, strict=True))
        if made and not any(map(kept_for_another_backward, made.values())):
            ctx.gradients = None
        found = {name: times(made[name], factors[name], ctx.spec.backend) for name in names}
    given_back = {name: x.to(ctx.dtypes[name]) for name, x in found.items()}
    return tuple(given_back.get(name) for name in (*Operands._fields, *Spec._fields))


distil.register_autograd(_backward, setup_context=_save)
