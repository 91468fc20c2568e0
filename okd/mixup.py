"""MixKD: both models read mixtures of two rows' embeddings.

Shapes: B rows padded to T tokens, N of which come before a response token; D the hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from okd.data import IGNORE, Batch, seed_of
from okd.models import device_of, hidden_states
from okd.objectives import Totals, divergence
from okd.options import option, reads
from okd_kernels import DistillationLoss, Objective, linear_sparse_distillation_loss

if TYPE_CHECKING:
    from okd.pair import StudentTeacher


@dataclass
class MixupOptions:
    """Read by mixkd."""

    mixup_alpha: float = option(0.4, "a of lambda ~ Beta(a, a), the share of a row in its mixture", above=0)
    mixup_ce_weight: float = option(1.0, "weight of the cross-entropy on mixed rows", least=0)
    mixup_weight: float = option(1.0, "weight of the divergence on mixed rows", least=0)


class Mixed(NamedTuple):
    """What rows and their partners come to, at each of the N places before a response token."""

    student: Tensor  # (N, D_s) hidden states of the mixed rows
    teacher: Tensor  # (N, D_t)
    others: Tensor  # (N,) the partner's token there, IGNORE where it has none
    share: Tensor  # (N,) lambda


def _mixed(pair: StudentTeacher, batch: Batch) -> Mixed:
    """Both models read lambda e_i + (1 - lambda) e_j, each of its own embeddings, lambda ~ Beta(a, a); j follows i
    along a random cycle through the rows."""
    ids, mask, positions, targets = (batch["input_ids"], batch["attention_mask"], batch["positions"], batch["targets"])
    draws = np.random.default_rng(seed_of(*pair.seed, *batch["ids"]))  # of these rows, on whatever rank they are
    order = torch.from_numpy(draws.permutation(len(ids)))
    partner = torch.empty_like(order).scatter(0, order, order.roll(1)).to(ids.device)
    a = pair.options.mixup_alpha
    shares = torch.from_numpy(draws.beta(a, a, len(ids))).to(ids.device, torch.float32)  # (B,)

    def rows_of(model: Any) -> Tensor:
        embedded = model.get_input_embeddings()(ids.to(device_of(model)))
        weights = shares.to(embedded).view(-1, 1, 1)
        mixed = torch.lerp(embedded[partner.to(embedded.device)], embedded, weights)
        states = hidden_states(model, None, mask, inputs_embeds=mixed)
        return states.flatten(0, 1)[positions.to(states.device)].to(ids.device)

    labels = torch.full_like(ids, IGNORE).flatten().scatter(0, positions, targets).view_as(ids)
    student = rows_of(pair.student)
    with torch.no_grad():
        teacher = rows_of(pair.teacher.model)
    return Mixed(student, teacher, labels[partner].flatten()[positions], shares[positions // ids.shape[1]])


@reads(MixupOptions)
def mixkd(pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
    """CE(x) + L_distill(x) + a_SM CE_mix + a_TMKD D(p(mixed), q(mixed)) (MixKD, arXiv 2011.00593, Eq. 8).

    Each row i of the batch meets another one, j (a row alone meets itself). CE_mix is lambda CE(q, y_i) + (1 - lambda)
    CE(q, y_j). The last two terms are summed over positions before a response token of both rows, which see no padding,
    and divided as the first two are: a mixed token weighs as much as a plain one, however few there are.

    Where the teacher learns, it learns from plain text; on mixed text it is held still.
    """
    loss, mixed = divergence(pair, batch, totals), _mixed(pair, batch)
    options, objective, targets = pair.options, pair.student_objective, batch["targets"]
    in_both = mixed.others != IGNORE
    counted = torch.where(in_both, targets, IGNORE)
    alone = Objective(objective.divergence, options.mixup_weight, **objective.parameters)
    of_mixture = pair.distil(
        mixed.student, mixed.teacher, counted, totals.tokens, student=alone, teacher=None, compact=True
    )
    # The cross-entropy with two labels is the divergence from their mixture, and that mixture's entropy.
    share, weight = mixed.share, options.mixup_ce_weight
    cross_entropy = linear_sparse_distillation_loss(
        mixed.student,
        pair.student_head(),
        torch.stack((targets, mixed.others), 1),
        torch.stack((share, 1 - share), 1).log(),
        counted,
        student=Objective(weight=weight),
        tail="none",
        normalizer=totals.tokens,
        vocab_size=options.vocab_size,
    ).student
    entropy = torch.special.entr(share) + torch.special.entr(1 - share)
    entropy = weight * torch.where(in_both & (targets != mixed.others), entropy, 0).sum() / totals.tokens
    metrics = loss.metrics | {"mixed_share": in_both.float()}
    return loss._replace(student=loss.student + of_mixture.student + cross_entropy + entropy, metrics=metrics)
