"""Autograd: the `torch.library` operators behind the public losses, so that `torch.compile` sees one node each.

Gradients are made in the forward pass and multiplied by the upstream scalar in backward. What the forward pass cannot
know, the per-token upstream gradients of `reduction="none"`, makes backward run the chunks again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from okd_kernels.chunks import Model, row_backend, run_chunks
from okd_kernels.divergences import DIVERGENCES, Objective
from okd_kernels.memory import empty_like
from okd_kernels.rows import STATISTICS, Side

FP16_GAIN = 256.0  # lifts fp16 logit gradients out of the subnormal range; divided out in fp32
PER_SIDE = 5  # operands of a side: hidden, weight, bias, and a LoRA's low and up
BY_ROW = (0, 3)  # those of them that have a row for each token
N_OPERANDS = 2 * PER_SIDE  # the first arguments of linear_distillation

# Both totals, both per-token losses, statistics, and a gradient for each operand: operators cannot return tuples of any
# length.
Outputs = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]  # fmt: skip


def wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of losses and row mathematics: fp32, or fp64 if an operand is."""
    dtype = torch.float32
    for other in dtypes:
        dtype = torch.promote_types(dtype, other)
    return dtype


def pack(objective: Objective | None) -> tuple[str, list[float]]:
    """An objective as operator arguments; ("", []) for a side that does not learn."""
    if objective is None:
        return "", []
    return objective.divergence, [objective.weight, objective.ce_weight, objective.a, objective.b]


def _unpack(divergence: str, numbers: Sequence[float]) -> Objective | None:
    if not divergence:
        return None
    weight, ce_weight, *values = numbers
    parameters = dict(zip(DIVERGENCES[divergence].parameters, values, strict=False))
    return Objective(divergence, weight, ce_weight, **parameters)


def _row_outputs(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Zeroed per-token losses (N, 2) and statistics (N, len(STATISTICS))."""
    n, dtype = student.shape[0], wide(student.dtype, teacher.dtype)
    return student.new_zeros(n, 2, dtype=dtype), student.new_zeros(n, len(STATISTICS), dtype=dtype)


def counted_rows(labels: Tensor | None) -> Tensor | None:
    """Indices of the rows that stay for the GEMMs; None for all, as elsewhere than on the CPU, where finding them would
    synchronise."""
    if labels is None or labels.device.type != "cpu" or not bool((labels < 0).any()):
        return None
    return (labels >= 0).nonzero().squeeze(1)


def by_side(both: Tensor) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's of (..., 2), copied: outputs of an operator must not alias."""
    return both[..., 0].clone(), both[..., 1].clone()


def gradient_dtype(operand: Tensor) -> torch.dtype:
    """Of a gradient that waits for its upstream factor: fp32 for fp16, which holds it only after a GradScaler's."""
    return torch.float32 if operand.dtype == torch.float16 else operand.dtype


def _empty_gradient(operand: Tensor | None, like: Tensor, need: bool, by_row: bool = True) -> Tensor:
    """An output for the operand's gradient; without elements where none is wanted (operators cannot return None)."""
    if operand is None or not need:
        return like.new_empty(0)
    return _uninitialised(operand, gradient_dtype(operand), by_row)


def _uninitialised(operand: Tensor, dtype: torch.dtype, by_row: bool) -> Tensor:
    """Contiguous, of the operand's shape; a weight's, of which each step needs one of the same size, in kept memory."""
    if by_row:
        return torch.empty_like(operand, dtype=dtype, memory_format=torch.contiguous_format)
    return empty_like(operand, dtype)


def empty_gradients(operands: Sequence[Tensor | None], like: Tensor, needs: Sequence[bool]) -> list[Tensor]:
    """The operands', which are in the order of a side's."""
    wanted = enumerate(zip(operands, needs, strict=True))
    return [_empty_gradient(x, like, need, by_row=i % PER_SIDE in BY_ROW) for i, (x, need) in wanted]


def row_factors(weights: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """weights * scale as factors (n,) of the rows' gradients, and one () of the sums that they make.

    The latter costs a pass over dX and dW: it is None but in fp16, where it keeps the rows' gradients within range.
    """
    if dtype != torch.float16:
        return weights * scale, None
    weights, largest = normalise(weights)
    return weights * FP16_GAIN, scale * (largest / FP16_GAIN)


@torch.library.custom_op("okd_kernels::linear_distillation", mutates_args=())
def linear_distillation(
    student_hidden: Tensor,  # (N, D_s)
    student_weight: Tensor,  # (V, D_s)
    student_bias: Tensor | None,
    student_low: Tensor | None,  # (N, r) a LoRA's scaled hidden @ A.T
    student_up: Tensor | None,  # (V, r) its B
    teacher_hidden: Tensor,  # (N, D_t)
    teacher_weight: Tensor,  # (V, D_t)
    teacher_bias: Tensor | None,
    teacher_low: Tensor | None,
    teacher_up: Tensor | None,
    labels: Tensor | None,  # (N,) int64, negative: ignored
    row_weights: Tensor,  # (N, 2) weight of each token in each side's total
    scale: Tensor,  # () factor of the totals: 1 / normalizer
    per_token: bool,  # gradients are made in backward, from the upstream of `losses`; otherwise from that of `totals`
    student: str,
    student_numbers: Sequence[float],
    teacher: str,
    teacher_numbers: Sequence[float],
    head_numbers: Sequence[float],  # logit scale and softcap (0: none) of the student, then of the teacher
    temperature: float,
    teacher_share: float,  # of the student's target; the rest are its own logits
    vocab_size: int,
    workspace_bytes: int,
    backend: str,
    needs: Sequence[bool],  # which of the operands want a gradient
) -> Outputs:
    """Totals () and per-token losses (N,) of student and teacher, statistics (N, 7), and the totals' gradients in the
    operands' order."""
    operands: tuple[Any, ...] = (
        *(student_hidden, student_weight, student_bias, student_low, student_up),
        *(teacher_hidden, teacher_weight, teacher_bias, teacher_low, teacher_up),
    )
    losses, statistics = _row_outputs(student_hidden, teacher_hidden)
    makes_gradients = [need and not per_token for need in needs]
    gradients = empty_gradients(operands, losses, makes_gradients)

    kept = counted_rows(labels)

    def compact(x: Tensor) -> Tensor:
        return x if kept is None else x[kept]

    models, row_scales = [], []
    for i, name, numbers, head in (
        (0, student, student_numbers, head_numbers[:2]),
        (PER_SIDE, teacher, teacher_numbers, head_numbers[2:]),
    ):
        hidden, weight, bias, low, up = operands[i : i + PER_SIDE]
        mine = (compact(hidden), weight, bias, None if low is None else compact(low), up)
        factors, sum_scale = row_factors(compact(row_weights)[:, i // PER_SIDE], scale, hidden.dtype)
        row_scales.append(factors)
        buffers = [
            _sum_buffer(x, output, by_row=j in BY_ROW, compacted=kept is not None) if need else None
            for j, (x, output, need) in enumerate(
                zip(mine, gradients[i : i + PER_SIDE], makes_gradients[i : i + PER_SIDE], strict=True)
            )
        ]
        objective = _unpack(name, numbers)
        models.append(Model(*mine, head[0], head[1] or None, objective, sum_scale, *buffers))

    row_losses, row_statistics = compact(losses), compact(statistics)
    if len(row_losses):
        with torch.autocast(losses.device.type, enabled=False):
            run_chunks(
                (models[0], models[1]),
                None if labels is None else compact(labels),
                torch.stack(row_scales, 1),
                row_losses,
                row_statistics,
                temperature=temperature,
                teacher_share=teacher_share,
                vocab_size=vocab_size,
                workspace_bytes=workspace_bytes,
                backend=backend,
            )
    if kept is not None:
        losses[kept], statistics[kept] = row_losses, row_statistics
    for i, model in enumerate(models):
        _finish(gradients[PER_SIDE * i :], model, kept, vocab_size)
    totals = (losses * row_weights).sum(0) * scale
    return *by_side(totals), *by_side(losses), statistics, *gradients  # type: ignore[return-value]


def _sum_buffer(operand: Tensor | None, output: Tensor, by_row: bool, compacted: bool) -> Tensor:
    """What an operand's gradient is summed in: the output itself where its rows and dtype allow."""
    assert operand is not None
    dtype = gradient_dtype(operand) if by_row else wide(operand.dtype)
    if output.dtype == dtype and not (by_row and compacted):
        return output
    return _uninitialised(operand, dtype, by_row)


def _finish(outputs: list[Tensor], model: Model, kept: Tensor | None, vocab_size: int) -> None:
    """Scale the summed gradients, once, and bring them to the operands' rows and dtypes."""
    for output, rows in ((outputs[0], model.grad_hidden), (outputs[3], model.grad_low)):
        if rows is not None and model.scale is not None:
            rows.mul_(model.scale)
        if rows is not None and kept is not None:
            output.zero_().index_copy_(0, kept, rows)
    for output, total in ((outputs[1], model.grad_weight), (outputs[2], model.grad_bias), (outputs[4], model.grad_up)):
        if total is None:
            continue
        total[vocab_size if len(model.hidden) else 0 :] = 0  # padding, or everything where no chunk has written
        if model.scale is not None:
            torch.mul(total, model.scale, out=output)
        elif output is not total:
            output.copy_(total)


@linear_distillation.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    operands, per_token, needs = arguments[:N_OPERANDS], arguments[N_OPERANDS + 3], arguments[-1]
    losses, statistics = _row_outputs(operands[0], operands[PER_SIDE])
    gradients = empty_gradients(operands, losses, [need and not per_token for need in needs])
    return *by_side(losses.new_empty(2)), *by_side(losses), statistics, *gradients


def normalise(upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Row weights of at most 1, and their factor (): an upstream of 1/N would let fp16 gradients underflow."""
    largest = upstream.abs().sum() if upstream.numel() == 0 else upstream.abs().amax()
    scale = torch.where(largest > 0, largest, 1)
    return upstream / scale, scale


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
        from okd_kernels.scale_kernel import scale_

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


def differentiate(operator: Any, sides: int, per_token: int, backend: Callable[[Tensor, Any], str]) -> None:
    """Register the backward pass of an operator that makes its operands' gradients along with its values.

    Inputs: operands, other tensors, row weights, scale, `per_token` (at that position), options, the last of which says
    which operands need a gradient. Outputs: totals of each side, losses of each, statistics, gradients. `backend` tells
    from upstream and options who multiplies. A side whose loss nobody differentiates gets no gradient, not zeros. Where
    losses per token are differentiated, their upstream weights a second run.
    """
    n_operands, made = PER_SIDE * sides, 2 * sides + 1  # gradients come after totals, losses and statistics

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.per_token, ctx.options = inputs[per_token], inputs[per_token + 1 :]
        ctx.dtypes = [None if x is None else x.dtype for x in inputs[:n_operands]]
        ctx.set_materialize_grads(False)  # else autograd would fill a zero dW for every output that nobody used
        saved = inputs[: per_token - 2] if ctx.per_token else output[made:]
        # A frozen teacher may have run in inference mode, whose tensors autograd does not save.
        ctx.save_for_backward(*(x.clone() if x is not None and x.is_inference() else x for x in saved))

    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        *options, needs = ctx.options
        factors = upstream[sides : 2 * sides] if ctx.per_token else upstream[:sides]
        needs = [need and factors[i // PER_SIDE] is not None for i, need in enumerate(needs)]
        given = next((x for x in factors if x is not None), None)
        gradients: list[Tensor | None] = [None] * n_operands
        if given is not None and ctx.per_token:
            columns = [torch.zeros_like(given) if x is None else x for x in factors]
            weights = columns[0] if sides == 1 else torch.stack(columns, 1)
            gradients = operator(*ctx.saved_tensors, *normalise(weights), False, *options, needs)[made:]
        elif given is not None:
            by = backend(given, ctx.options)
            gradients = [
                times(gradient, factor, by) if need and (factor := factors[i // PER_SIDE]) is not None else None
                for i, (gradient, need) in enumerate(zip(ctx.saved_tensors, needs, strict=True))
            ]
        found = zip(gradients, needs, ctx.dtypes, strict=True)
        of_operands = tuple(g.to(dtype) if need and g is not None else None for g, need, dtype in found)
        return of_operands + (None,) * (per_token + 2 - n_operands + len(options))

    operator.register_autograd(backward, setup_context=save)


differentiate(linear_distillation, 2, N_OPERANDS + 3, lambda _, options: options[-2])


@torch.library.custom_op("okd_kernels::logit_distillation", mutates_args=())
def logit_distillation(
    student_logits: Tensor,  # (N, >= vocab_size)
    teacher_logits: Tensor,  # (N, >= vocab_size)
    labels: Tensor | None,  # (N,) int64, negative: ignored
    student: str,
    student_numbers: Sequence[float],
    teacher: str,
    teacher_numbers: Sequence[float],
    temperature: float,
    vocab_size: int,
    backend: str,
    needs: Sequence[bool],  # which of the logits want a gradient
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Per-token losses (N,) of student and teacher, statistics (N, 7), and each row's gradient with respect to its own
    logits."""
    losses, statistics = _row_outputs(student_logits, teacher_logits)
    gradients = [
        _empty_gradient(x, losses, need) for x, need in zip((student_logits, teacher_logits), needs, strict=True)
    ]
    written = [gradient if need else None for gradient, need in zip(gradients, needs, strict=True)]
    if len(losses):
        with torch.autocast(losses.device.type, enabled=False):
            row_backend(backend)(
                Side(student_logits, _unpack(student, student_numbers), written[0]),
                Side(teacher_logits, _unpack(teacher, teacher_numbers), written[1]),
                labels,
                torch.ones_like(losses),
                losses,
                statistics,
                vocab_size=vocab_size,
                temperature=temperature,
            )
    for gradient in written:
        if gradient is not None:
            gradient[:, vocab_size:] = 0  # padding; no backend writes it
    return *by_side(losses), statistics, gradients[0], gradients[1]


@logit_distillation.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    losses, statistics = _row_outputs(arguments[0], arguments[1])
    return *by_side(losses), statistics, *(_empty_gradient(arguments[i], losses, arguments[-1][i]) for i in range(2))


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs, ctx.n_inputs = inputs[-1], len(inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[3:])


@once_differentiable
def _backward_rows(ctx: Any, student: Tensor | None, teacher: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradients: list[Tensor | None] = []
    for gradient, need, upstream in zip(ctx.saved_tensors, ctx.needs, (student, teacher), strict=True):
        if not need or upstream is None:
            gradients.append(None)
        elif kept_for_another_backward(gradient):
            gradients.append((gradient * upstream.unsqueeze(1)).to(gradient.dtype))
        else:
            gradients.append(gradient.mul_(upstream.unsqueeze(1)))
    return *gradients, *(None,) * (ctx.n_inputs - 2)


logit_distillation.register_autograd(_backward_rows, setup_context=_save_rows)
