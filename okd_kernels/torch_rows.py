"""The row contract in plain PyTorch: the CPU path, and devices without Triton.

The chunk's logits are worked off a few rows at a time, so that every pass finds them in a CPU's cache: on 2 cores the
passes then cost a few percent of the GEMMs; over the whole chunk they cost as much as a third.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from okd_kernels.divergences import DIVERGENCES, TINY, Objective
from okd_kernels.rows import FLOOR, INFINITE, Side

BLOCK_ELEMENTS = 600_000  # logits of one side that are worked on together: 2.4 MB in fp32, about a cache
ACCELERATOR_BLOCK_ELEMENTS = 1 << 24  # elsewhere than on a CPU: few launches, and 64 MiB for each temporary


def block_rows(vocab_size: int, device: torch.device) -> int:
    """Rows that are worked on together."""
    if device.type == "cpu":
        return max(torch.get_num_threads(), BLOCK_ELEMENTS // vocab_size)
    return max(1, ACCELERATOR_BLOCK_ELEMENTS // vocab_size)


def _transform(side: Side, rows: slice, v: int, dtype: torch.dtype, ignored: Tensor | None) -> Tensor:
    """Logits after bias, scale and softcap; never -inf; zeros in ignored rows, which may hold anything."""
    x = side.logits[rows, :v].to(dtype)
    if ignored is not None:
        x = x.masked_fill(ignored, 0)
    if side.bias is not None:
        x = x + side.bias[:v]
    if side.logit_scale != 1.0:
        x = x * side.logit_scale
    if side.softcap is not None:
        x = torch.tanh(x / side.softcap) * side.softcap
    # Reading the minimum is cheaper than clamping; on an accelerator it would synchronise.
    if x.device.type != "cpu" or not x.amin() >= FLOOR:  # a NaN in one row must not leave -inf in another
        x = x.clamp_min(FLOOR)
    return x


def _infinite(value: Tensor) -> Tensor:
    return torch.where(value > INFINITE, torch.inf, value)


class Distribution(NamedTuple):
    """A softmax of n rows. `log` is the logarithm of `prob` plus `error`, all rounding aside."""

    log: Tensor  # (n, V)
    prob: Tensor  # (n, V)
    top: Tensor  # (n, 1), the largest probability
    error: Tensor  # (n,)
    mass: Tensor  # (n,), the sum of exp(log): 1 but for rounding


def _softmax(x: Tensor, log: Tensor, prob: Tensor) -> Distribution:
    """Into `log` and `prob`. The logarithm comes from that of the largest probability: log_softmax and exp would cost 8
    more passes."""
    torch.softmax(log.copy_(x), -1, out=prob)  # of a view with gaps, it would make a copy of its own
    top = prob.amax(-1, keepdim=True)
    exact = top.to(torch.float64 if x.device.type == "cpu" else x.dtype).log()
    log_top = exact.to(x.dtype)
    error = (log_top - exact).to(x.dtype).squeeze(1)
    log.sub_(log.amax(-1, keepdim=True)).add_(log_top)
    return Distribution(log, prob, top, error, prob.sum(-1) + error)


def _dot(a: Tensor, b: Tensor, product: Tensor) -> Tensor:
    """Each row's inner product (n,); `torch.linalg.vecdot` allocates what is `product` here."""
    return torch.mul(a, b, out=product).sum(-1)


def _nll(logits: Tensor, log_q: Tensor, target: Tensor, temperature: float) -> Tensor:
    """-log q(target) at temperature 1, (n,); log_q is at the loss's temperature."""
    if temperature == 1.0:
        return -log_q.gather(1, target).squeeze(1)
    return logits.logsumexp(-1) - logits.gather(1, target).squeeze(1)


def _divergence(
    objective: Objective,
    learner: Distribution,  # q
    target: Distribution,  # p
    forward: Tensor,  # (n,) KL(p || q)
    reverse: Tensor,  # (n,) KL(q || p)
    wants_gradient: bool,
    spare: Sequence[Tensor],  # three of (n, V); the first may be returned
) -> tuple[Tensor, Tensor | None]:
    """Value (n,) and gradient (n, V) with respect to T * logits of the learner; three divergences in fewer passes."""
    log_q, q, log_p, p = *learner[:2], *target[:2]
    a, gradient = objective.a, None
    if objective.divergence == "forward_kl":
        return forward, torch.sub(q, p, out=spare[0]) if wants_gradient else None
    if objective.divergence == "reverse_kl":
        # Centred on its own sum, not on `reverse`: a rounded log-sum-exp then leaves the gradient alone.
        if wants_gradient:
            g = torch.sub(log_q, log_p, out=spare[0])
            gradient = g.sub_(_dot(q, g, spare[1]).unsqueeze(1)).mul_(q)
        return reverse, gradient
    if objective.divergence == "jsd":
        g, log_m, product = spare
        torch.lerp(q, p, a, out=log_m).clamp_min_(TINY).log_()
        from_q = _dot(q, torch.sub(log_q, log_m, out=g), product)
        from_p = _dot(p, torch.sub(log_p, log_m, out=log_m), product)
        if wants_gradient:
            gradient = g.sub_(from_q.unsqueeze(1)).mul_(q).mul_(1 - a)
        return (1 - a) * (from_q - learner.error) + a * (from_p - target.error), gradient
    q, p = log_q.exp(), log_p.exp()  # the Bregman form wants them to agree with the logarithms
    l, g = DIVERGENCES[objective.divergence].formula(log_q, log_p, q, p, a, objective.b)
    if wants_gradient:
        gradient = torch.addcmul(g, q, g.sum(-1, keepdim=True), value=-1)
    return l.sum(-1), gradient


def _write_gradient(
    side: Side,
    gradient: Tensor,  # (n, V) of the divergence
    rows: slice,
    row_scale: Tensor,  # (n, 1)
    logits: Tensor,  # (n, V) transformed
    q: Tensor,  # (n, V) at the loss's temperature
    target: Tensor | None,  # (n, 1)
    temperature: float,
) -> None:
    assert side.gradient is not None and side.objective is not None
    v, objective = logits.shape[1], side.objective
    factor = objective.weight * temperature
    if objective.ce_weight > 0:
        assert target is not None
        gradient = gradient.mul_(factor).add_(
            q if temperature == 1.0 else logits.softmax(-1), alpha=objective.ce_weight
        )
        gradient.scatter_add_(1, target, gradient.new_full(target.shape, -objective.ce_weight))
        factor = 1.0
    if side.softcap is not None:
        gradient = gradient.mul_(1 - (logits / side.softcap) ** 2)
    torch.mul(gradient, row_scale * (factor * side.logit_scale), out=side.gradient[rows, :v])


def torch_rows(
    student: Side,
    teacher: Side,
    labels: Tensor | None,  # (n,) int64, negative: ignored
    row_scales: Tensor,  # (n, 2): factor of each side's gradient
    losses: Tensor,  # (n, 2): written
    statistics: Tensor,  # (n, len(STATISTICS)): written
    *,
    vocab_size: int,
    temperature: float,
    teacher_share: float = 1.0,
) -> None:
    """Fill losses, statistics and both gradients of n rows, in the dtype of `losses`; zeros for ignored rows."""
    n, dtype = losses.shape[0], losses.dtype
    step = min(n, block_rows(vocab_size, student.logits.device))
    scratch = student.logits.new_empty(7, step, vocab_size, dtype=dtype)  # fresh memory for every block would cost more
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        target = None if labels is None else labels[rows].clamp_min(0).unsqueeze(1)
        ignored = None if labels is None else (labels[rows] < 0).unsqueeze(1)
        if ignored is not None and ignored.device.type == "cpu" and not ignored.any():
            ignored = None
        z = _transform(student, rows, vocab_size, dtype, ignored)
        u = _transform(teacher, rows, vocab_size, dtype, ignored)
        if teacher_share != 1.0:
            u = torch.lerp(z, u, teacher_share)
        log_q, prob_q, log_p, prob_p, *spare = scratch[:, : z.shape[0]]
        q = _softmax(z / temperature if temperature != 1.0 else z, log_q, prob_q)
        p = _softmax(u / temperature if temperature != 1.0 else u, log_p, prob_p)

        difference, product, _ = spare
        torch.sub(p.log, q.log, out=difference)
        mass = q.mass - p.mass  # zero but for rounding, which it takes out of the divergences
        forward = _infinite(_dot(p.prob, difference, product) + mass)
        reverse = _infinite(-_dot(q.prob, difference, product) - mass)
        joint = torch.mul(q.prob, p.prob, out=difference)  # reaches the tops' product only where both are at their top
        agree = joint.amax(-1, keepdim=True) == q.top * p.top
        s_nll = t_nll = torch.zeros_like(forward)
        if target is not None:
            s_nll, t_nll = (_nll(x, y.log, target, temperature) for x, y in ((z, q), (u, p)))
        s_entropy, t_entropy = (-_dot(x.prob, x.log, product) for x in (q, p))
        statistics[rows] = torch.stack((forward, reverse, s_entropy, t_entropy, s_nll, t_nll, agree.squeeze(1)), 1)

        sides = ((student, z, s_nll, (q, p, forward, reverse)), (teacher, u, t_nll, (p, q, reverse, forward)))
        for i, (side, logits, nll, distributions) in enumerate(sides):
            if side.objective is None:
                losses[rows, i] = 0
                continue
            value, gradient = _divergence(side.objective, *distributions, side.gradient is not None, spare)
            losses[rows, i] = side.objective.weight * temperature**2 * _infinite(value) + side.objective.ce_weight * nll
            if gradient is not None:
                row_scale = row_scales[rows, i : i + 1].to(dtype)
                if ignored is not None:
                    row_scale = row_scale.masked_fill(ignored, 0)
                _write_gradient(side, gradient, rows, row_scale, logits, distributions[0].prob, target, temperature)
        if ignored is not None:
            losses[rows] = losses[rows].masked_fill(ignored, 0)
            statistics[rows] = statistics[rows].masked_fill(ignored, 0)
