"""Problems of random operands, and what a backend may be wrong by: computed, from what plain PyTorch is wrong by.

A result in floating point is one draw of a random variable. Plain PyTorch with fp32 logits (backend="reference") gives
others: the inner dimension permuted, the same sums are rounded otherwise. A backend may be as wrong as twice the worst
of them. With 16-bit operands it may also round the gradients of the logits to the operands' dtype before they enter the
backward GEMMs; what that costs is computed in fp64, by doing nothing else.
"""

import copy
import functools
import os
from contextlib import nullcontext

import torch

from okd_kernels import LinearHead, Objective, distillation_loss, has_fast_gemm, linear_distillation_loss

BACKENDS = ("torch", "triton")
DEVICE = os.environ.get("OKD_TEST_DEVICE", "cpu")
N, V, D_S, D_T = 7, 131, 16, 24
SIDES = ("student", "teacher")
GRADIENTS = tuple(f"{side}_{x}" for side in SIDES for x in ("hidden", "weight", "bias"))
DRAWS = 4
OF_CHUNKS = ("workspace_bytes", "compact", "group", "requires", "watch")  # of no concern to whole logits


class Problem:
    """Random operands in `dtype`, whose logits have std(z) of about 2 and std(z - u) = spread."""

    def __init__(self, v=V, n=N, dtype=torch.float32, spread=1.0, offset=0.0, ignored=(2,), seed=0):
        g = torch.Generator().manual_seed(seed)

        def normal(*shape, scale=1.0):
            return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

        hidden, weight = normal(n, D_S), normal(v, D_S, scale=2 / D_S**0.5)
        # The teacher sees the student's logits through D_S of its dimensions, and a disagreement through the others.
        self.operands = {
            "student_hidden": hidden,
            "student_weight": weight,
            "student_bias": normal(v, scale=0.1) + offset,
            "teacher_hidden": torch.cat([hidden, normal(n, D_T - D_S)], 1),
            "teacher_weight": torch.cat([weight, normal(v, D_T - D_S, scale=spread / (D_T - D_S) ** 0.5)], 1),
            "teacher_bias": normal(v, scale=0.1 * spread) - offset,
        }
        self.operands = {name: x.to(DEVICE, dtype) for name, x in self.operands.items()}
        self.labels = torch.randint(0, v, (n,), generator=g).to(DEVICE)
        self.labels[[i for i in ignored if i < n]] = -100
        self.bias = True
        self.head_options = ({}, {})
        self.loss_options = {}

    def heads(self, t):
        return [
            LinearHead(t[f"{side}_weight"], t[f"{side}_bias"] if self.bias else None, **head_options)
            for side, head_options in zip(SIDES, self.head_options, strict=True)
        ]

    def run(self, backend, dtype=None, upstream=(1.0, 1.0), requires=GRADIENTS, watch=None, **options):
        """(values, gradients) of one run; operands are widened to `dtype` if given; `watch` sees loss and backward."""
        t = {k: x.to(dtype or x.dtype).clone().requires_grad_(k in requires) for k, x in self.operands.items()}
        heads = self.heads(t)
        with watch or nullcontext():
            loss = linear_distillation_loss(
                t["student_hidden"],
                heads[0],
                t["teacher_hidden"],
                heads[1],
                self.labels,
                backend=backend,
                **{"workspace_bytes": 4096, **self.loss_options, **options},
            )
            backward(loss, upstream)
        return values_of(loss), {k: t[k].grad for k in GRADIENTS}

    def logits(self, dtype=torch.float64):
        """Those of both sides before bias, scale and softcap, and what these make of them."""
        t = {k: x.to(dtype) for k, x in self.operands.items()}
        raw = [t[f"{side}_hidden"] @ t[f"{side}_weight"].T for side in SIDES]
        return raw, [
            LinearHead(
                torch.eye(len(head.weight), dtype=dtype, device=DEVICE), head.bias, head.logit_scale, head.softcap
            )
            for head in self.heads(t)
        ]

    def logit_gradients(self, upstream=(1.0, 1.0), **options):
        """In fp64, of both sides' products of hidden states and weight (None: of a side that does not learn)."""
        raw, heads = self.logits()
        raw = [x.requires_grad_() for x in raw]
        options = {k: x for k, x in {**self.loss_options, **options}.items() if k not in OF_CHUNKS}
        logits = [head.logits(x) for head, x in zip(heads, raw, strict=True)]
        backward(distillation_loss(*logits, self.labels, backend="reference", **options), upstream)
        return [x.grad for x in raw]

    def permuted(self, generator):
        """The same problem with inner dimensions in another order, and the way back for its gradients."""
        other, orders = copy.copy(self), {}
        other.operands = dict(self.operands)
        for side in SIDES:
            width = self.operands[f"{side}_weight"].shape[1]
            order = torch.randperm(width, generator=generator).to(DEVICE)
            for name in (f"{side}_hidden", f"{side}_weight"):
                other.operands[name], orders[name] = self.operands[name][..., order].contiguous(), order.argsort()
        return other, lambda found: {
            k: x if x is None or k not in orders else x[..., orders[k]] for k, x in found.items()
        }


def values_of(loss):
    return {"student": loss.student, "teacher": loss.teacher, **loss.metrics}


def backward(loss, upstream=(1.0, 1.0)):
    total = (loss.student * upstream[0]).sum()
    if loss.teacher is not None:
        total = total + (loss.teacher * upstream[1]).sum()
    if total.requires_grad:
        total.backward()


def relative_error(x, truth):
    return ((x.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def rounded(x, dtype, truncate=False):
    """x (fp64) with the significand of a 16-bit dtype, and any exponent."""
    bits = {torch.bfloat16: 8, torch.float16: 11}[dtype]
    significand, exponent = torch.frexp(x)
    significand = significand * 2**bits
    return torch.ldexp(significand.trunc() if truncate else significand.round(), exponent - bits)


def truncates(backend, dtype):
    """Triton's interpreter truncates to bf16, where a GPU rounds to nearest."""
    return backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16


def rounding_errors(problem, backend, truth, **options):
    """name -> relative error of a gradient whose only error is that of the logits' gradients, rounded to 16 bits."""
    errors = dict.fromkeys(GRADIENTS, 0.0)
    for side, gradient in zip(SIDES, problem.logit_gradients(**options), strict=True):
        of_side = {x: problem.operands[f"{side}_{x}"] for x in ("hidden", "weight", "bias")}
        dtype = of_side["hidden"].dtype
        if gradient is None or dtype not in (torch.bfloat16, torch.float16):
            continue
        lost = rounded(gradient, dtype, truncates(backend, dtype)) - gradient
        hidden = of_side["hidden"].double()
        if problem.labels is not None:  # ignored rows may hold anything
            hidden = hidden.masked_fill((problem.labels == -100).unsqueeze(-1), 0)
        found = {
            "hidden": lost @ of_side["weight"].double(),
            "weight": lost.flatten(0, -2).T @ hidden.flatten(0, -2),
            "bias": lost.flatten(0, -2).sum(0),
        }
        for x, error in found.items():
            if (expected := truth[f"{side}_{x}"]) is not None:
                errors[f"{side}_{x}"] = (error.norm() / expected.norm().clamp_min(1e-30)).item()
    return errors


def masses(labels, **options):
    """name -> the size of the sums of probabilities that a divergence is a difference of: 1 in each token."""
    weights = torch.ones(labels.numel()) if (given := options.get("token_weights")) is None else given.flatten().cpu()
    weights = weights[labels.flatten().cpu() != -100].abs()
    size = {"mean": lambda x: 1.0, "sum": torch.sum, "none": torch.amax}[options.get("reduction", "mean")]
    found = {"forward_kl": 1.0, "reverse_kl": 1.0}
    for side, default in (("student", "forward_kl"), ("teacher", None)):
        if (objective := options.get(side, default)) is not None:
            found[side] = Objective.of(objective).weight * options.get("temperature", 1.0) ** 2 * float(size(weights))
    return found


def error(x, truth):
    """Largest difference of finite numbers; others must be the same."""
    finite = truth.isfinite()
    assert torch.equal(x[~finite].double().nan_to_num(nan=0.5), truth[~finite].nan_to_num(nan=0.5)), (x, truth)
    return (x.double() - truth)[finite].abs().max().item() if finite.any() else 0.0


def assert_within_budgets(found, truth, draws, wide, mass, of_rounding, dtypes):
    """found, truth and draws are (values, gradients); see `assert_as_good_as_the_reference`."""
    eps = torch.finfo(wide).eps
    for name, ours in found[0].items():
        expected = truth[0][name]
        assert (ours is None) == (expected is None), name
        if expected is None:
            continue
        assert ours.dtype == wide
        budget = 2 * max(error(values[name], expected) for values, _ in draws)
        if (finite := expected[expected.isfinite()]).numel():
            budget += eps * (8 * finite.abs().max().item() + 2 * mass.get(name, 0.0))
        of_ours = error(ours, expected)
        assert of_ours <= budget, f"{name}: error {of_ours:.2e}, budget {budget:.2e}"
    for name, ours in found[1].items():
        expected = truth[1][name]
        assert (ours is None) == (expected is None), name
        if expected is None:
            continue
        assert ours.dtype == dtypes[name], name
        budget = 2 * max(relative_error(gradients[name], expected) for _, gradients in draws)
        budget += 8 * torch.finfo(torch.promote_types(ours.dtype, torch.float32)).eps + of_rounding.get(name, 0.0)
        of_ours = relative_error(ours, expected)
        assert of_ours <= budget, f"d{name}: error {of_ours:.2e}, budget {budget:.2e}"


def assert_as_good_as_the_reference(problem, backend, found=None, plain=None, **options):
    """Twice the worst draw of plain PyTorch, 8 eps of the result, and one rounding of the logits' gradients, at most.

    Divergences may be wrong by one eps more of each of the two sums of probabilities that they are differences of.
    found: (values, gradients), or some of them, that were come by otherwise than by `problem.run`. plain: dtype in
    which PyTorch has the operands, if not their own; gradients then come in it.
    """
    truth, draws = problem.run("reference", torch.float64, **options), [problem.run("reference", plain, **options)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS - 1):
        other, restored = problem.permuted(generator)
        values, gradients = other.run("reference", plain, **options)
        draws.append((values, restored(gradients)))
    dtypes = {name: plain or x.dtype for name, x in problem.operands.items()}
    wide = functools.reduce(torch.promote_types, dtypes.values(), torch.float32)
    if found is None:
        found = problem.run(backend, **options)
        assert set(found[0]) == set(truth[0])
    of_rounding = rounding_errors(problem, backend, truth[1], **options)
    if plain is not None and DEVICE == "cpu" and has_fast_gemm(torch.bfloat16, "cpu"):
        for name, x in truth[1].items():  # PyTorch's GEMMs of bf16 round what they return there
            if x is not None:
                of_rounding[name] = of_rounding.get(name, 0.0) + relative_error(x.bfloat16(), x)
    mass = masses(problem.labels, **{**problem.loss_options, **options})
    assert_within_budgets(found, truth, draws, wide, mass, of_rounding, dtypes)


def run_logits(z, u, labels, backend, upstream=(1.0, 1.0), **options):
    """(values, gradients) of `distillation_loss`."""
    z, u = (x.detach().clone().requires_grad_() for x in (z, u))
    loss = distillation_loss(z, u, labels, backend=backend, **options)
    backward(loss, upstream)
    return values_of(loss), {"student": z.grad, "teacher": u.grad}


def assert_logits_as_good_as_the_reference(z, u, labels, backend, truth=None, **options):
    """The same of `distillation_loss`, whose draws are the vocabulary in another order; truth: in fp64, if known."""
    v, generator = options.get("vocab_size") or z.shape[-1], torch.Generator().manual_seed(0)
    draws = []
    for _ in range(DRAWS):
        order = torch.randperm(v, generator=generator).to(z.device)
        back = order.argsort()
        moved = None if labels is None else torch.where(labels < 0, labels, back[labels.clamp_min(0)])
        plain = {k: x for k, x in options.items() if k != "vocab_size"}
        values, gradients = run_logits(z[..., order], u[..., order], moved, "reference", **plain)
        for name, x, given in zip(SIDES, gradients.values(), (z, u), strict=True):
            if x is not None:
                gradients[name] = torch.zeros_like(given)
                gradients[name][..., :v] = x[..., back]
        draws.append((values, gradients))
    truth = truth or run_logits(z.double(), u.double(), labels, "reference", **options)
    found, of_rounding = run_logits(z, u, labels, backend, **options), {}
    for name, x, given in zip(SIDES, truth[1].values(), (z, u), strict=True):
        if x is not None and given.dtype in (torch.bfloat16, torch.float16):
            of_rounding[name] = relative_error(rounded(x, given.dtype, truncates(backend, given.dtype)), x)
    wide = torch.promote_types(torch.promote_types(z.dtype, u.dtype), torch.float32)
    tokens = torch.zeros(z.shape[:-1]) if labels is None else labels
    dtypes = {"student": z.dtype, "teacher": u.dtype}
    assert_within_budgets(found, truth, draws, wide, masses(tokens, **options), of_rounding, dtypes)
