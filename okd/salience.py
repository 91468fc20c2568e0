"""The teacher's weights that matter least, which train as its online module (CLDA, arXiv 2409.02699)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from okd.data import Batch, on_device
from okd.models import decoder_modules, find_device, head_of, is_dispatched, response_rows
from okd.objectives import Totals, divergence
from okd.pair import StudentTeacher
from okd_kernels import LinearHead

CALIBRATION_BATCHES = 8  # of the training batch size, spread over the training data


def calibration_batches(
    rows: Sequence[Mapping[str, Any]], collator: Callable[[Any], dict[str, Any]], args: Any
) -> list[dict[str, Any]]:
    """CALIBRATION_BATCHES batches of rows at even distances in the data."""
    size = args.per_device_train_batch_size
    n = min(len(rows), CALIBRATION_BATCHES * size)
    chosen = [rows[i * len(rows) // n] for i in range(n)]
    return [collator(chosen[start : start + size]) for start in range(0, n, size)]


def non_salient_modules(
    student: Any, teacher: Any, args: Any, batches: Sequence[Mapping[str, Any]], outcomes: Any = None
) -> list[str]:
    """Names of the weight matrices of least saliency that together hold at most `clda_share` of all their weights.

    At least one. The mean saliency ranks them, so that the sum that is given up is least for the number of weights
    gained, and size alone decides nothing. Every process takes the first one's choice.
    """
    scores = saliency(student, teacher, args, batches, outcomes)
    sizes = {name: teacher.get_submodule(name).weight.numel() for name in scores}
    budget = args.clda_share * sum(sizes.values())
    chosen: list[str] = []
    for name in sorted(scores, key=lambda name: (scores[name], name)):
        budget -= sizes[name]
        if chosen and budget < 0:
            break
        chosen.append(name)
    return broadcast_object_list([chosen])[0]


def saliency(
    student: Any, teacher: Any, args: Any, batches: Sequence[Mapping[str, Any]], outcomes: Any = None
) -> dict[str, float]:
    """Mean over weights and batches of |w dL_t/dw|, by name of the linear modules in the teacher's decoder.

    To first order, what L_t would change by were the weight removed (Molchanov et al. 2017). Neither embeddings nor
    lm_head take part: tied, a change there would reach the teacher's inputs too, and the rows of rare tokens would
    always count as idle. One gradient exists at a time: each is used and dropped as backward makes it.
    """
    for model, device in ((student, args.device), (teacher, args.teacher_device or args.device)):
        if not is_dispatched(model):  # where the trainer will move it anyway
            model.to(find_device(device))
    matrices = {name: module.weight for name, module in decoder_modules(teacher) if type(module) in (nn.Linear, Conv1D)}
    if not matrices:
        raise ValueError(
            f"expected linear modules in the teacher's decoder; {type(teacher).__name__} has none, or quantised ones: "
            "load it in floating point, or choose another online_module"
        )
    if any(weight.is_meta for weight in matrices.values()):
        raise ValueError(
            "expected a teacher in memory, whose weights are compared by their gradients; got an offloaded one: choose "
            "a device_map of GPUs, or online_module=lora"
        )
    scores = {name: torch.zeros((), device=weight.device) for name, weight in matrices.items()}

    def score(name: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            assert weight.grad is not None
            scores[name] += (weight.detach().float() * weight.grad.float()).abs().mean()
            weight.grad = None

        return hook

    pair = StudentTeacher(student, _Whole(teacher), args).eval()
    pair.student_learns, pair.outcomes = False, outcomes
    teacher.requires_grad_(False)
    hooks = [w.requires_grad_(True).register_post_accumulate_grad_hook(score(name)) for name, w in matrices.items()]
    for batch in batches:
        moved = on_device(batch, args.device)
        loss = divergence(pair, moved, Totals.of([moved])).teacher
        assert loss is not None
        loss.backward()
    for hook in hooks:
        hook.remove()
    teacher.requires_grad_(False)
    return dict(zip(scores, (torch.stack([x.cpu() for x in scores.values()]) / len(batches)).tolist(), strict=True))


class _Whole(nn.Module):
    """A teacher all of whose weights have gradients."""

    learns = True

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def rows(self, batch: Batch) -> Tensor:
        return response_rows(self.model, batch, as_teacher=True)

    def head(self, device: torch.device | None = None) -> LinearHead:
        return head_of(self.model, device)
