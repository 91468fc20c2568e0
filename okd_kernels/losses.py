"""The public losses: signatures, definitions, and the checks that belong to each.

Legend: N tokens (any leading shape), V vocabulary, D_s / D_t hidden sizes of student and teacher, K target ids a row.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from okd_kernels.call import check_objectives, check_sparse_targets, check_tail, common_shape, shared_vocab
from okd_kernels.columns import BackwardColumns
from okd_kernels.divergences import Objective
from okd_kernels.heads import LinearHead
from okd_kernels.problem import CallSide, DistillationLoss, Tokens, solve

Head = Tensor | nn.Linear | LinearHead


def linear_distillation_loss(
    student_hidden: Tensor,  # (..., D_s)
    student_head: Head,  # (V, D_s)
    teacher_hidden: Tensor,  # (..., D_t)
    teacher_head: Head,  # (V, D_t)
    labels: Tensor | None = None,  # (...,)
    *,
    student: str | Objective = "forward_kl",
    teacher: str | Objective | None = None,
    temperature: float = 1.0,
    target_mix: float = 1.0,
    token_weights: Tensor | None = None,  # (...,)
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    compact: bool = True,
    backward_columns: float | str | None = None,
    exact_head: bool = False,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> DistillationLoss:
    """sum_i w_i (weight T^2 D(learner_i, target_i) + ce_weight CE(learner_i, label_i)) / normalizer, for both sides.

    From hidden states and head weights, chunk by chunk: whole logits never exist. Each objective holds the other side
    still, so the student's reaches `student_hidden` and the student's head only, the teacher's `teacher_hidden` and the
    teacher's head only. Nothing is computed for an input that needs no gradient; under `no_grad`, no gradient at all.

    Args:
        student_hidden, teacher_hidden: (..., D_s) and (..., D_t), equal leading shapes. Already shifted: row i predicts
            `labels[i]`.
        student_head, teacher_head: weight (V, D), `nn.Linear`, or `LinearHead` (bias, logit scale, softcap, LoRA). One
            that FSDP2 has sharded is gathered, and its gradient averaged over the ranks.
        labels: (...,) int64. Rows equal to `ignore_index` are excluded. Needed where a `ce_weight` is not 0. Any other
            label that is no token is an error on a CPU, and a NaN loss of its row on a GPU.
        student: what the student minimises: a name out of `DIVERGENCES`, or an `Objective`.
        teacher: the same for the teacher; None holds it frozen. OKD (arXiv 2409.12512, Eq. 16):
            `Objective("forward_kl", weight=a, ce_weight=1 - a)`.
        temperature: T. Divergences are taken at T and times T^2 (Hinton et al. 2015); cross-entropies at T = 1.
        target_mix: t. Below 1, the student's target is softmax((1 - t) z + t u) of its own logits z, held still, and
            the teacher's u (TAID, arXiv 2501.16937); so are the metrics'. For a frozen teacher.
        token_weights: (...,) factor of each token's loss.
        normalizer: divisor of the mean; default: the number (or total weight) of counted tokens; 0 makes loss and
            gradients 0. Under gradient accumulation pass the number of tokens of the whole batch.
        reduction: "mean", "sum", or "none": per token, differentiable, recomputed in backward.
        vocab_size: columns shared by both heads when they are padded differently; later columns exist for neither.
        group: ranks over which the heads' rows are sharded (tensor parallelism), each with its part, in rank order,
            both heads split alike. All ranks pass the same tokens and options, and get the same losses, the whole
            gradients of the hidden states, and those of their own rows of the heads. They tell each other what they are
            about to do, once a call, which synchronises; where that differs, all of them raise.
        compact: take ignored rows out before the GEMMs. On a GPU the host waits once for their number, except while a
            CUDA graph is captured, where they stay. False: they stay everywhere, and nothing synchronises.
        backward_columns: None for all, or which columns of a chunk the backward GEMMs multiply, by their gradients'
            energy: a share of the vocabulary, 0.25, or the least share that keeps the relative error of dX below a
            bound, "1%" (all, where none does; a GPU is waited for a few times a chunk). What the others would add to dX
            is corrected in the directions that the head's rows share; of the head, their rows get no gradient. Losses,
            metrics and a bias's gradient stay exact. Where dX is not wanted, all columns are multiplied. Their copies
            take that share of a chunk's logits and of the head in memory.
        exact_head: the gradient of the head from all columns nevertheless.
        workspace_bytes: bound of the two chunk buffers, padding aside; default 256 MiB on a CPU, 2 GiB on a GPU.
        backend: "auto" (triton on GPUs, torch elsewhere), "triton", "torch", "reference". Never falls back silently.

    Returns:
        A `DistillationLoss`. Call `.total.backward()`, or backward on one side's loss: the other gets no gradient then
        (under torch.compile zeros). Both apart take `retain_graph=True` on the first.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
    """
    objectives = check_objectives(student, teacher, labels)
    shape = common_shape(student_hidden, teacher_hidden)
    sides = CallSide.of("student", student_hidden, student_head), CallSide.of("teacher", teacher_hidden, teacher_head)
    return solve(
        *(Tokens(shape, labels, token_weights, normalizer, reduction, ignore_index, student_hidden.device), objectives),
        sides,
        vocab_size=shared_vocab(sides[0].columns, sides[1].columns, vocab_size, group),
        temperature=temperature,
        target_mix=target_mix,
        group=group,
        compact=compact,
        columns=BackwardColumns.of(backward_columns, exact_head),
        workspace_bytes=workspace_bytes,
        backend=backend,
    )


def distillation_loss(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V)
    labels: Tensor | None = None,  # (...,)
    *,
    student: str | Objective = "forward_kl",
    teacher: str | Objective | None = None,
    temperature: float = 1.0,
    target_mix: float = 1.0,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    compact: bool = True,
    backend: str = "auto",
) -> DistillationLoss:
    """`linear_distillation_loss` for a trainer that holds logits already: the same objectives, options and errors.

    The row mathematics is in fp32 whatever the logits' dtype, but logits rounded to bf16 have lost most of the gradient
    of two similar models before they get here (docs/explanation/numerics.md): prefer hidden states. With a `group`,
    each rank has its columns of both.
    """
    objectives = check_objectives(student, teacher, labels)
    for name, logits in (("student", student_logits), ("teacher", teacher_logits)):
        if not logits.is_floating_point():
            raise TypeError(f"expected floating-point {name}_logits; got {logits.dtype}")
    shape = common_shape(student_logits, teacher_logits, "logits")
    sides = CallSide.of_logits(student_logits), CallSide.of_logits(teacher_logits)
    return solve(
        *(Tokens(shape, labels, token_weights, normalizer, reduction, ignore_index, student_logits.device), objectives),
        sides,
        vocab_size=shared_vocab(sides[0].columns, sides[1].columns, vocab_size, group),
        temperature=temperature,
        target_mix=target_mix,
        group=group,
        compact=compact,
        columns=BackwardColumns(),
        backend=backend,
    )


def linear_sparse_distillation_loss(
    student_hidden: Tensor,  # (..., D_s)
    student_head: Head,  # (V, D_s)
    target_ids: Tensor,  # (..., K) int64
    target_log_probs: Tensor,  # (..., K)
    labels: Tensor | None = None,  # (...,)
    *,
    student: str | Objective = "forward_kl",
    tail: str = "bucket",
    temperature: float = 1.0,
    target_mix: float = 1.0,
    token_weights: Tensor | None = None,  # (...,)
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    vocab_size: int | None = None,
    group: dist.ProcessGroup | None = None,
    compact: bool = True,
    backward_columns: float | str | None = None,
    exact_head: bool = False,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> DistillationLoss:
    """`linear_distillation_loss` from K target probabilities a row in place of a teacher, `tail` being what is made of
    the mass p_tail = 1 - sum_k p_k that they leave out:

    * "bucket": all other tokens are one outcome, for the student too: D of K + 1 probabilities. No mass is invented; D
      is a lower bound of the whole vocabulary's, and equals it for K = V. Of forward KL:
      sum_k p_k log(p_k / q_k) + p_tail log(p_tail / q_tail). Where rounded storage lets sum p exceed 1, p is divided by
      it. For `reverse_kl`, p_tail is taken as at least eps (1.2e-7 in fp32), the resolution of 1 - sum p.
    * "renormalize": D(p / sum p, q), q the student's full softmax. The tail is declared impossible: the student is
      taught to be surer than the teacher.
    * "none": sum_k p_k log(p_k / q_k), the mass as it is. For ids sampled from the teacher with `target_log_probs`
      = log of normalised counts or importance weights: an unbiased estimate of the full forward KL's gradient (random
      sampling KD, arXiv 2503.16870). Below 0 is possible where sum p < 1.

    An id that repeats in a row adds up its mass. A log-probability of -inf (or below fp32's smallest normal number,
    about -87) is padding: its id is not looked at, and may be anything.

    Args:
        target_ids, target_log_probs: of the teacher at the loss's temperature, as `linear_topk` gives them; held still.
            Sharded heads take global ids.
        student: any of `DIVERGENCES`, but for three that have no value here: `reverse_kl` without a bucket (infinite),
            `alpha_beta` with one (it is no f-divergence: merging outcomes of one ratio changes it), and with
            tail="none" all but `forward_kl` (nothing else is linear in p, and so estimated without bias).

    The other arguments, and the result, are those of `linear_distillation_loss`.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
    """
    objectives = check_objectives(student, None, labels)
    check_tail(tail, objectives[0].divergence)
    side, shape = CallSide.of("student", student_hidden, student_head), student_hidden.shape[:-1]
    tokens = Tokens(shape, labels, token_weights, normalizer, reduction, ignore_index, student_hidden.device)
    vocab_size = shared_vocab(side.columns, side.columns, vocab_size, group)
    counted = None if tokens.ignored is None else ~tokens.ignored
    check_sparse_targets(shape, side.hidden.device, target_ids, target_log_probs, counted, vocab_size)
    return solve(
        *(tokens, objectives, (side,)),
        targets=tuple(x.detach().reshape(-1, x.shape[-1]) for x in (target_ids, target_log_probs)),
        tail=tail,
        vocab_size=vocab_size,
        temperature=temperature,
        target_mix=target_mix,
        group=group,
        compact=compact,
        columns=BackwardColumns.of(backward_columns, exact_head),
        workspace_bytes=workspace_bytes,
        backend=backend,
    )


class LinearDistillationLoss(nn.Module):
    """`linear_distillation_loss` with its options fixed: `LinearDistillationLoss(student="jsd", teacher=None, ...)`."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(
        self, student_hidden, student_head, teacher_hidden, teacher_head, labels=None, **options
    ) -> DistillationLoss:
        """The loss of one batch; keyword options override those of the constructor."""
        return linear_distillation_loss(
            student_hidden, student_head, teacher_hidden, teacher_head, labels, **{**self.options, **options}
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
