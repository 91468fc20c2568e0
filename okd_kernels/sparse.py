"""Distillation from K token probabilities a row: stored top-k or sampled targets, and the top-k that makes them.

The student's logits pass through a chunk buffer as in `chunks`, but the target is K numbers instead of a second model.
What the K ids leave out is where such losses differ (and go wrong), so it has a name: the tail.

Legend: N tokens (any leading shape), V vocabulary, D hidden size, K target ids a row. `q` is the student, `p` the
target; `q_tail`, `p_tail` their mass off the K ids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from okd_kernels.arguments import check_objectives, check_temperature, chunk_workspace, gemm_operands
from okd_kernels.divergences import Objective
from okd_kernels.heads import LinearHead
from okd_kernels.ops import wide
from okd_kernels.sparse_ops import SPARSE_STATISTICS, sparse_distillation, topk
from okd_kernels.tokens import DistillationLoss, Tokens

TAILS = ("bucket", "renormalize", "none")


class TopK(NamedTuple):
    """The k most probable tokens of each row, by descending probability.

    Attributes:
        ids: (..., k) int64.
        log_probs: (..., k) log softmax(logits / T) at the ids; fp32 (fp64 for fp64 inputs).
        log_sum_exp: (...,) of logits / T: `log_probs + log_sum_exp` are the logits / T.
    """

    ids: Tensor
    log_probs: Tensor
    log_sum_exp: Tensor


def linear_topk(
    hidden: Tensor,  # (..., D)
    head: Tensor | nn.Linear | LinearHead,  # (V, D)
    k: int,
    *,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    workspace_bytes: int | None = None,
) -> TopK:
    """The k largest of log softmax(logits / T), in chunks: whole logits never exist. Makes targets; has no gradient.

    Args:
        vocab_size: columns of the head that exist; later ones are padding. Default: all.
        workspace_bytes: bound of the chunk's buffers; default 256 MiB on a CPU, 2 GiB on a GPU.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
    """
    head = LinearHead.of(head)
    shape = hidden.shape[:-1]
    hidden, head = gemm_operands("teacher", hidden, head)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    vocab_size = _vocabulary(head, vocab_size)
    if not 0 < k <= vocab_size:
        raise ValueError(f"expected k in [1, {vocab_size}], the vocabulary; got {k}")
    check_temperature(temperature)
    numbers = [head.logit_scale, head.softcap or 0.0]
    workspace_bytes = chunk_workspace(workspace_bytes, hidden.device)
    with torch.no_grad():
        ids, log_probs, log_sum_exp = topk(
            *(hidden, head.weight, head.bias, *head.low_rank(hidden)),
            k,
            numbers,
            float(temperature),
            vocab_size,
            workspace_bytes,
        )
    return TopK(ids.reshape(*shape, k), log_probs.reshape(*shape, k), log_sum_exp.reshape(shape))


def linear_sparse_distillation_loss(
    student_hidden: Tensor,  # (..., D)
    student_head: Tensor | nn.Linear | LinearHead,  # (V, D)
    target_ids: Tensor,  # (..., K) int64
    target_log_probs: Tensor,  # (..., K)
    labels: Tensor | None = None,  # (...,)
    *,
    tail: str = "bucket",
    ce_weight: float = 0.0,
    weight: float = 1.0,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    token_weights: Tensor | None = None,  # (...,)
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    vocab_size: int | None = None,
    workspace_bytes: int | None = None,
) -> DistillationLoss:
    """sum_i w_i (weight T^2 D(student_i, target_i) + ce_weight CE(student_i, label_i)) / normalizer, targets of K ids.

    `tail` says what D makes of the mass p_tail = 1 - sum_k p_k that the K ids leave out:

    * "bucket": D = sum_k p_k log(p_k / q_k) + p_tail log(p_tail / q_tail). All other tokens are one outcome, for the
      student too. No mass is invented; D is a lower bound of the full KL, and equals it for K = V. Where rounded
      storage lets sum p exceed 1, p_tail is 0, and D the generalised KL (- sum p + sum q added), which is not negative.
    * "renormalize": D = sum_k p'_k log(p'_k / q_k), p' = p / sum p, q the student's full softmax. The tail is
      declared impossible: the student is taught to be surer than the teacher.
    * "none": D = sum_k p_k log(p_k / q_k), the mass as it is. For ids sampled from the teacher with `target_log_probs`
      = log of normalised counts or importance weights: an unbiased estimate of the full KL's gradient (random sampling
      KD, arXiv 2503.16870). Below 0 is possible where sum p < 1.

    An id that repeats in a row adds up its mass. A log-probability of -inf (or below fp32's smallest normal number,
    about -87) is padding: its id is not looked at, and may be anything.

    Args:
        student_hidden, student_head, labels, token_weights, normalizer, reduction, ignore_index: as in
            `linear_distillation_loss`.
        target_ids, target_log_probs: of the teacher at the loss's temperature, as `linear_topk` gives them; held still.
        divergence: "forward_kl", KL(p || q); or, with the bucket, "reverse_kl", KL(q || p) over the K + 1 outcomes,
            where p_tail is taken as at least eps (1.2e-7 in fp32), the resolution of 1 - sum p.
        vocab_size: columns of the head that exist; later ones are padding. Default: all.
        workspace_bytes: bound of the chunk's buffers; default 256 MiB on a CPU, 2 GiB on a GPU.

    Returns:
        A `DistillationLoss` whose `teacher` is None and whose metrics are `forward_kl` (with this tail), `student_nll`
        (at temperature 1), and `target_mass`, `student_mass` on the K ids.

    Raises:
        TypeError, ValueError: what was expected, what came, what to do.
    """
    objective = Objective(divergence, weight, ce_weight)
    check_objectives(objective, None, labels)
    if tail not in TAILS:
        raise ValueError(f"expected tail to be one of {', '.join(TAILS)}; got {tail!r}")
    if divergence not in ("forward_kl", "reverse_kl"):
        raise ValueError(
            f"expected divergence forward_kl or reverse_kl for sparse targets; got {divergence!r}: it needs the "
            "teacher's whole distribution, see linear_distillation_loss"
        )
    if divergence == "reverse_kl" and tail != "bucket":
        raise ValueError(
            f"expected tail='bucket' for reverse_kl; got {tail!r}: the student has mass off the target's ids, where "
            "a target without a tail has none, so that KL(q || p) is infinite"
        )
    head = LinearHead.of(student_head)
    hidden, head = gemm_operands("student", student_hidden, head)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    vocab_size = _vocabulary(head, vocab_size)
    shape = student_hidden.shape[:-1]
    rows = Tokens(shape, labels, token_weights, normalizer, reduction, ignore_index, vocab_size, hidden.device)
    check_temperature(temperature)
    _check_targets(shape, hidden.device, target_ids, target_log_probs, rows.labels, vocab_size)

    dtype, width = wide(hidden.dtype), target_ids.shape[-1]
    per_token = reduction == "none"
    weights, scale = rows.weights(dtype)
    operands = (hidden, head.weight, head.bias, *head.low_rank(hidden, rows.labels))
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in operands]
    total, losses, statistics, *_ = sparse_distillation(
        *operands,
        rows.labels,
        target_ids.reshape(-1, width),
        target_log_probs.detach().reshape(-1, width).to(dtype),
        weights[:, 0],
        scale,
        per_token,
        divergence,
        tail,
        [objective.weight, objective.ce_weight],
        [head.logit_scale, head.softcap or 0.0],
        float(temperature),
        vocab_size,
        chunk_workspace(workspace_bytes, hidden.device),
        needs,
    )
    metrics = {name: statistics[:, i].detach().reshape(shape) for i, name in enumerate(SPARSE_STATISTICS)}
    if per_token:
        total = rows.per_token(losses)
    return DistillationLoss(total, None, metrics)


def _vocabulary(head: LinearHead, vocab_size: int | None) -> int:
    rows = head.weight.shape[0]
    if vocab_size is not None and not 0 < vocab_size <= rows:
        raise ValueError(f"expected vocab_size in [1, {rows}], as the head has rows; got {vocab_size}")
    return rows if vocab_size is None else vocab_size


def _check_targets(shape, device, ids: Tensor, log_p: Tensor, labels: Tensor | None, vocab_size: int) -> None:
    if ids.dtype != torch.int64:
        raise TypeError(f"expected target_ids of dtype torch.int64; got {ids.dtype}: pass target_ids.long()")
    if not log_p.is_floating_point():
        raise TypeError(f"expected floating-point target_log_probs; got {log_p.dtype}")
    if ids.dim() != len(shape) + 1 or ids.shape[:-1] != shape or ids.shape[-1] == 0:
        raise ValueError(
            f"expected target_ids of shape ({', '.join(map(str, (*shape, 'K')))}), K >= 1, for the student's rows; "
            f"got {tuple(ids.shape)}"
        )
    if log_p.shape != ids.shape:
        raise ValueError(
            f"expected target_log_probs of shape {tuple(ids.shape)}, as target_ids; got {tuple(log_p.shape)}"
        )
    for name, tensor in (("target_ids", ids), ("target_log_probs", log_p)):
        if tensor.device != device:
            raise ValueError(f"expected {name} on {device}, as the student's rows; got {tensor.device}")
    if device.type != "cpu" or torch.compiler.is_compiling():  # reading them would synchronise
        return
    looked_at = log_p > -torch.inf
    if labels is not None:
        looked_at = looked_at & (labels >= 0).reshape(shape).unsqueeze(-1)
    wrong = ids[looked_at & ((ids < 0) | (ids >= vocab_size))]
    if len(wrong):
        raise ValueError(
            f"expected target_ids in [0, {vocab_size}), or a target_log_prob of -inf as padding; got {wrong[0].item()}"
        )
    positive = log_p[looked_at & (log_p > 0.01)]  # 16-bit storage may round a certain token up a little
    if len(positive):
        raise ValueError(
            f"expected target_log_probs <= 0; got {positive[0].item():.4g}: pass log_softmax values, or log of "
            "normalised counts; not logits, probabilities or counts"
        )
