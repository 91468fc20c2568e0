"""The k most probable tokens of a head, chunk by chunk: what sparse targets are made of.

Legend: N tokens (any leading shape), V vocabulary, D hidden size, r rank of a LoRA on the head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from okd_kernels.call import chunk_workspace, compute_dtype
from okd_kernels.cpu import workspace
from okd_kernels.gemms import chunk_rows, row_stride
from okd_kernels.heads import LinearHead
from okd_kernels.rows import FLOOR, INFINITE
from okd_kernels.sides import Side, wide
from okd_kernels.torch_rows import block_rows, blocks


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
    head = LinearHead.of(head).gathered()
    shape = hidden.shape[:-1]
    dtype = compute_dtype("teacher", hidden, head)
    rows = len(head.weight)
    if vocab_size is not None and not 0 < vocab_size <= rows:
        raise ValueError(f"expected vocab_size in [1, {rows}], as the head has rows; got {vocab_size}")
    vocab_size = vocab_size or rows
    if not 0 < k <= vocab_size:
        raise ValueError(f"expected k in [1, {vocab_size}], the vocabulary; got {k}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"expected a temperature > 0; got {temperature}")
    with torch.no_grad():
        flat = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        lora_x, lora_b = head.low_rank(flat)
        ids, log_probs, log_sum_exp = _topk(
            *(flat, head.weight.to(dtype), head.bias, lora_x, lora_b),
            *([head.logit_scale, head.softcap or 0.0], k, float(temperature), vocab_size),
            chunk_workspace(workspace_bytes, hidden.device),
        )
    return TopK(ids.reshape(*shape, k), log_probs.reshape(*shape, k), log_sum_exp.reshape(shape))


@torch.library.custom_op("okd_kernels::topk", mutates_args=())
def _topk(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    lora_x: Tensor | None,  # (N, r) scaled hidden @ A.T
    lora_b: Tensor | None,  # (V, r)
    head_numbers: list[float],  # logit scale and softcap (0: none)
    k: int,
    temperature: float,
    vocab_size: int,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (N, k), log-probabilities (N, k), log-sum-exps (N,)."""
    ids, log_probs, log_sum_exp = _outputs(hidden, k)
    if lora_x is not None and lora_b is not None:
        hidden = torch.cat([hidden, lora_x.to(hidden.dtype)], 1)
        weight = torch.cat([weight, lora_b.to(hidden.dtype)], 1)
    side = Side(hidden, weight, bias, head_numbers[0], head_numbers[1] or None, None)
    step = max(
        1, chunk_rows(max(1, len(hidden)), 2 * vocab_size * log_probs.element_size(), workspace_bytes, hidden.device)
    )
    (buffer,) = workspace((step, row_stride(vocab_size)), like=log_probs)
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk in blocks(len(hidden), step):
            logits = side.project(chunk, buffer, vocab_size)
            for block in blocks(chunk.stop - chunk.start, block_rows(vocab_size, hidden.device)):
                z = logits.at(block).transformed(vocab_size, log_probs.dtype).clamp_min(FLOOR) / temperature
                values, at = z.topk(k)
                top = values[:, :1]
                # log1p of the others' sum: a probability near 1 keeps the digits of its distance to 1.
                log_sum = z.sub_(top).exp_().scatter_(1, at[:, :1], 0).sum(-1, keepdim=True).log1p()
                log_p = values - top - log_sum
                out = slice(chunk.start + block.start, chunk.start + block.stop)
                ids[out], log_sum_exp[out] = at, (top + log_sum).squeeze(1)
                log_probs[out] = log_p.masked_fill(log_p < -INFINITE, -torch.inf)
    return ids, log_probs, log_sum_exp


def _outputs(hidden: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = hidden.shape[0], wide(hidden.dtype)
    ids = hidden.new_empty(n, k, dtype=torch.int64)
    return ids, hidden.new_empty(n, k, dtype=dtype), hidden.new_empty(n, dtype=dtype)


@_topk.register_fake
def _(hidden, weight, bias, lora_x, lora_b, head_numbers, k, *_):
    return _outputs(hidden, k)
