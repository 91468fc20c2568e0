"""How a batch becomes a loss: one function for each way, named in `LOSSES`.

Each takes the pair, a batch of `okd.data.Collator` and the normalizer, and returns a `DistillationLoss`. Metrics beyond
those of `okd_kernels` are per-token too: the trainer logs their means.

Shapes: B rows padded to T tokens, N of which come before a response token; D the hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from okd_kernels import DistillationLoss, LinearHead

if TYPE_CHECKING:
    from okd.pair import Batch, StudentTeacher

Normalizer = Tensor | float | None
Loss = Callable[["StudentTeacher", "Batch", Normalizer], DistillationLoss]


def divergence(pair: StudentTeacher, batch: Batch, normalizer: Normalizer) -> DistillationLoss:
    """The student's divergence from its teacher, and the teacher's loss where it learns (OKD, Eq. 16 and 17)."""
    return pair.distil(pair.student_rows(batch), pair.teacher_rows(batch), batch["targets"], normalizer)


def cross_entropy(pair: StudentTeacher, batch: Batch, normalizer: Normalizer) -> DistillationLoss:
    """Cross-entropy of the response tokens, without a teacher."""
    targets = batch["targets"]
    logits = LinearHead.from_model(pair.student).logits(pair.student_rows(batch)).float()
    nll = nn.functional.cross_entropy(logits, targets, reduction="none")
    loss = pair.student_objective.ce_weight * nll.sum() / (max(len(targets), 1) if normalizer is None else normalizer)
    return DistillationLoss(loss, None, {"student_nll": nll.detach()})


LOSSES: Mapping[str, Loss] = {"divergence": divergence, "cross_entropy": cross_entropy}
