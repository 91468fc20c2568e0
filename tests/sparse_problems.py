"""Problems of random operands with sparse targets, the definition of their losses, and what a backend may be wrong by.

The definition is that of `linear_sparse_distillation_loss`: a divergence of the K + 1 outcomes that K ids and the tail
are, from whole logits and plain autograd. No teacher over the vocabulary is made up for it, but for the metrics that
ask for one. The budget is that of `problems`, with the definition in fp32 as plain PyTorch.
"""

import math
from contextlib import nullcontext

import torch
from problems import DEVICE, DRAWS, OF_CHUNKS, error, relative_error, rounded

from okd_kernels import DIVERGENCES, LinearHead, Objective, linear_sparse_distillation_loss

N, V, D, R = 7, 131, 16, 3
EPS = torch.finfo(torch.float32).eps
ALL = slice(None)
LOG_0 = -1e30  # finite, so that 0 * log 0 is 0
GRADIENTS = ("hidden", "weight", "bias", "down", "up")
TAILS = ("bucket", "renormalize", "none")
MODES = [
    *(("bucket", name) for name in DIVERGENCES if name != "alpha_beta"),
    *(("renormalize", name) for name in DIVERGENCES if name != "reverse_kl"),
    ("none", "forward_kl"),
]


def divergence(name, log_q, log_p, alpha=0.0, beta=0.0):
    """(N,) over outcomes (N, ...), infinite where a KL is."""
    terms, _ = DIVERGENCES[name].formula(log_q, log_p, log_q.exp(), log_p.exp(), alpha, beta)
    value = terms.sum(-1)
    return torch.where(value > 1e10, torch.inf, value)


def definition(z, ids, log_probs, labels, *, student="forward_kl", tail="bucket", temperature=1.0, target_mix=1.0):
    """Per-token losses (N,) and metrics of whole logits z (N, V)."""
    objective, v = Objective.of(student), z.shape[1]
    mix, options = target_mix, {"alpha": objective.alpha, "beta": objective.beta}
    entries = log_probs.to(z.dtype).exp()
    p = torch.zeros_like(z).scatter_add(1, ids.masked_fill(entries == 0, 0), entries)  # repeated ids add up
    on, mass = p > 0, p.sum(-1, keepdim=True)
    log_q = (z / temperature).log_softmax(-1)
    off = torch.where(on, LOG_0, log_q)  # the tail's tokens
    log_q_tail = off.logsumexp(-1, keepdim=True)
    log_p = torch.where(on, p, 1).log()
    empty = mass == 0
    if tail == "bucket":
        least = EPS if objective.divergence == "reverse_kl" else 0.0
        has_tail = ~on.all(-1, keepdim=True)
        log_p_tail = torch.where(empty, 1, (1 - mass).clamp_min(least)).log().clamp_min(LOG_0)
        log_p = torch.cat([torch.where(on, log_p, LOG_0), torch.where(has_tail, log_p_tail, LOG_0)], 1)
        log_q_of = torch.cat([torch.where(on, log_q, LOG_0), torch.where(has_tail, log_q_tail, LOG_0)], 1)
        log_p = log_p.log_softmax(-1)  # where sum p exceeds 1, or there is no tail
    else:  # tokens off the ids have p = 0: whether they are one outcome or many is the same, but for alpha_beta
        log_q_of = log_q
        log_p = torch.where(on, log_p - mass.clamp_min(torch.finfo(z.dtype).tiny).log(), LOG_0)
        log_p = torch.where(empty, log_q.detach(), log_p)
    if mix != 1.0:  # geometric: tokens of one ratio p / q go through it together
        log_p = ((1 - mix) * log_q_of.detach() + mix * log_p).log_softmax(-1)
    value, mass = divergence(objective.divergence, log_q_of, log_p, **options), mass.squeeze(1)
    with torch.no_grad():
        kls = {
            "forward_kl": divergence("forward_kl", log_q_of, log_p),
            "reverse_kl": divergence("reverse_kl", log_q_of, log_p),
        }
    if tail == "none" and mix == 1.0:
        value = (p * (torch.where(on, p, 1).log() - log_q)).sum(-1)
        kls["forward_kl"] = value
    counted = torch.ones_like(mass, dtype=torch.bool) if labels is None else labels != -100
    nll = torch.zeros_like(mass)
    target = log_p.detach()  # over tokens, for the metrics: the tail in proportion to q
    if tail == "bucket":
        target = torch.where(on, log_p[:, :v], (log_p[:, v:] + off - log_q_tail).clamp_min(LOG_0)).detach()
    target_nll = nll
    if labels is not None:
        at = labels.clamp_min(0).unsqueeze(1)
        nll, target_nll = (-x.log_softmax(-1).gather(1, at).squeeze(1) for x in (z, temperature * target))
    tops = (log_q == log_q.amax(-1, keepdim=True)) & (target == target.amax(-1, keepdim=True))
    metrics = {
        **kls,
        "student_entropy": -(log_q.exp() * log_q).sum(-1),
        "teacher_entropy": -(target.exp() * target).sum(-1),
        "student_nll": nll,
        "teacher_nll": torch.where(target_nll > 1e10, torch.inf, target_nll),
        "top1_agreement": tops.any(-1).to(z.dtype),
        "target_mass": mass,
        "student_mass": (log_q.exp() * on).sum(-1),
    }
    losses = objective.weight * temperature**2 * value + objective.ce_weight * nll
    return torch.where(counted, losses, 0), {k: torch.where(counted, x, 0).detach() for k, x in metrics.items()}


class SparseProblem:
    """Student operands with logits of std 2; K of a teacher's log-probabilities, the teacher `spread` away."""

    def __init__(self, k=5, n=N, v=V, dtype=torch.float32, spread=1.0, ignored=(2,), temperature=1.0, sampled=False):
        g = torch.Generator().manual_seed(0)

        def normal(*shape, scale=1.0):
            return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

        operands = {
            "hidden": normal(n, D),
            "weight": normal(v, D, scale=2 / D**0.5),
            "bias": normal(v, scale=0.1),
            "down": normal(R, D, scale=0.3),
            "up": normal(v, R, scale=0.3),
        }
        self.operands = {name: x.to(DEVICE, dtype) for name, x in operands.items()}
        self.bias, self.lora, self.head_options = True, False, {}
        z = self.head({name: x.double() for name, x in self.operands.items()}).logits(self.operands["hidden"].double())
        log_p = ((z.cpu() + normal(n, v, scale=spread)) / temperature).log_softmax(-1)
        if sampled:  # ids drawn with replacement: they repeat, with equal weights 1 / k
            self.ids = torch.multinomial(log_p.exp(), k, replacement=True, generator=g)
            self.log_p = torch.full((n, k), -math.log(k))
        else:
            self.log_p, self.ids = log_p.topk(k)
        self.ids, self.log_p = self.ids.to(DEVICE), self.log_p.to(DEVICE, torch.float32)
        self.labels = torch.randint(0, v, (n,), generator=g).to(DEVICE)
        self.labels[[i for i in ignored if i < n]] = -100
        self.options = {"temperature": temperature}

    def head(self, t, shard=ALL):
        lora = (t["down"], t["up"][shard], 0.7) if self.lora else None
        return LinearHead(t["weight"][shard], t["bias"][shard] if self.bias else None, lora=lora, **self.head_options)

    def leaves(self, requires=GRADIENTS):
        return {k: x.clone().requires_grad_(k in requires) for k, x in self.operands.items()}

    def rows(self, kept):
        """The same problem with some of its rows."""
        self.operands["hidden"] = self.operands["hidden"][kept]
        self.ids, self.log_p, self.labels = self.ids[kept], self.log_p[kept], self.labels[kept]
        return self

    def run(
        self, backend="auto", requires=GRADIENTS, watch=None, upstream=1.0, shard=slice(None), loss=None, **options
    ):
        """(values, gradients) of the library; `shard`: the head's rows of this rank."""
        t = self.leaves(requires)
        options = {"workspace_bytes": 4096, **self.options, **options, "backend": backend}
        with watch or nullcontext():
            found = (loss or linear_sparse_distillation_loss)(
                t["hidden"], self.head(t, shard), self.ids, self.log_p, self.labels, **options
            )
            assert found.teacher is None
            if found.student.requires_grad:
                (found.student * upstream).sum().backward()
        values = {"student": found.student.detach(), **found.metrics}
        return values, {k: x.grad for k, x in t.items() if x.grad is not None}

    def truth(self, dtype=torch.float64, requires=GRADIENTS, upstream=1.0, order=None, rounding=None, **options):
        """The same by the definition, on the same operands in `dtype`, their inner dimension in some order.

        rounding: gives back the gradients of an error instead, that of the logits' gradient under this function.
        """
        options = {k: x for k, x in {**self.options, **options}.items() if k not in OF_CHUNKS}
        reduction, normalizer = options.pop("reduction", "mean"), options.pop("normalizer", None)
        weights = options.pop("token_weights", None)
        leaves = self.leaves(requires)  # below, gradients are rounded to the operands' dtype, as a backend's are
        if dtype == torch.float64:
            leaves = {k: x.detach().double().requires_grad_(k in requires) for k, x in leaves.items()}
        t = {k: x.to(dtype) for k, x in leaves.items()}
        if order is not None:
            t |= {k: t[k][..., order] for k in ("hidden", "weight", "down")}
        ignored = torch.zeros(len(self.ids), 1, dtype=torch.bool, device=DEVICE)
        ids, log_p = self.ids, self.log_p
        if self.labels is not None:  # ignored rows may hold anything
            ignored = (self.labels == -100).unsqueeze(1)
            ids, log_p = ids.masked_fill(ignored, 0), log_p.masked_fill(ignored, -1.0)
        lora = (t["down"], t["up"], 0.7) if self.lora else None
        x = LinearHead(t["weight"], lora=lora).logits(t["hidden"].masked_fill(ignored, 0))
        bias = t["bias"] if self.bias else torch.zeros_like(t["bias"])
        z = LinearHead(torch.eye(len(bias), dtype=dtype, device=DEVICE), bias, **self.head_options).logits(x)
        losses, metrics = definition(z, ids, log_p, self.labels, **options)
        weights = (torch.ones_like(losses) if weights is None else weights.to(dtype)).masked_fill(ignored.squeeze(1), 0)
        total = losses * weights
        if reduction != "none":
            total = total.sum() / (1 if reduction == "sum" else normalizer or weights.sum())
        if total.requires_grad:
            scaled = (total * upstream).sum()
            if rounding is not None:
                (gradient,) = torch.autograd.grad(scaled, x, retain_graph=True)
                lost = rounding(gradient) - gradient
                (x * lost).sum().backward()
                leaves["bias"].grad = lost.sum(0) if self.bias else None
            else:
                scaled.backward()
        gradients = {k: leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}
        return {"student": total.detach(), **metrics}, {k: g for k, g in gradients.items() if self.bias or k != "bias"}


def budgets(problem, backend, truth, **options):
    """name -> largest absolute error of a value, relative error of a gradient, but for 8 eps: see `problems`."""
    generator = torch.Generator().manual_seed(0)
    values, gradients = dict.fromkeys(truth[0], 0.0), dict.fromkeys(truth[1], 0.0)
    for _ in range(DRAWS):
        plain = problem.truth(torch.float32, order=torch.randperm(D, generator=generator).to(DEVICE), **options)
        for name, x in truth[0].items():
            finite = x.isfinite()
            values[name] = max(values[name], 2 * error(plain[0][name][finite], x[finite]))
        for name, x in truth[1].items():
            gradients[name] = max(gradients[name], 2 * relative_error(plain[1][name], x))
    dtype = problem.operands["hidden"].dtype
    if dtype in (torch.bfloat16, torch.float16):  # the logits' gradient is rounded once; the interpreter truncates bf16
        truncate = backend == "triton" and DEVICE == "cpu" and dtype == torch.bfloat16
        lost = problem.truth(rounding=lambda x: rounded(x, dtype, truncate), **options)[1]
        for name, x in truth[1].items():
            gradients[name] += (lost[name].double().norm() / x.double().norm().clamp_min(1e-30)).item()
    return values, gradients


def assert_as_good_as_the_definition(problem, backend, found=None, **options):
    """No worse than twice the worst draw of the definition in fp32, 8 eps, and for 16-bit operands one rounding.

    The eps of values are of 1 + the largest: probabilities of a row sum to 1 up to that, however small a KL is.
    """
    wide = torch.promote_types(problem.operands["hidden"].dtype, torch.float32)
    truth = problem.truth(**options)
    of_values, of_gradients = budgets(problem, backend, truth, **options)
    values, gradients = problem.run(backend, **options) if found is None else found
    eps = 8 * EPS
    assert values.keys() == truth[0].keys() and gradients.keys() == truth[1].keys()
    for name, x in truth[0].items():
        finite = x.isfinite()
        assert torch.equal(values[name][~finite].double(), x[~finite]), name
        budget = of_values[name] + eps * (1 + (x[finite].abs().max().item() if finite.any() else 0))
        ours = error(values[name][finite], x[finite])
        assert ours <= budget and values[name].dtype == wide, f"{name}: error {ours:.2e}, budget {budget:.2e}"
    for name, x in truth[1].items():
        budget, ours = of_gradients[name] + eps, relative_error(gradients[name], x.double())
        assert ours <= budget, f"d{name}: error {ours:.2e}, budget {budget:.2e}"
        assert gradients[name].dtype == problem.operands[name].dtype


def assert_same(ours, other, rtol=8 * EPS):
    """Values and gradients of two runs of one backend, but for the order of sums: eps of 1 + value, of the norm."""
    (values, gradients), (expected, truth) = ours, other
    for name, x in expected.items():
        torch.testing.assert_close(values[name], x, rtol=rtol, atol=rtol)
    assert gradients.keys() == truth.keys()
    for name, x in truth.items():
        assert relative_error(gradients[name], x.double()) <= rtol, name
