"""Divergences between a distribution that learns and one that is held still.

Everything a divergence is to this library is one entry of `DIVERGENCES`: its pointwise term `l` and the slope
`g = dl / d(log q)`. The formula is written once: PyTorch runs it, and Triton compiles it. Chunks, padding,
log-sum-exps, GEMMs, autograd and the question which model plays which part are written elsewhere, once for all of them.

Notation: `q` is the *learner* (the model that receives the gradient), `p` the *target* (held still).

    D = sum_v l_v            dD/dz_v = (g_v - q_v * sum_u g_u) / T            z: the learner's logits

The terms are written in Bregman form: `-p + q` and the like are added where they sum to zero over the vocabulary.
Each term is then nonnegative, and an error of the log-sum-exp enters the value in second order only, so that a KL of
1e-4 is right to many digits in fp32 (the textbook form loses it to cancellation and may come out negative).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import FunctionType, MappingProxyType
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    jit: Callable = triton.jit
except ImportError:  # macOS, Windows: the torch backend needs no rules

    def jit(fn: Callable) -> None:
        return None


Terms = tuple[Any, Any]  # the pointwise term l, and its slope g
TINY = 1e-37  # floor of a mixture before its logarithm: above fp32's smallest normal number


# --- What formulas call: in Triton these, in PyTorch those of `_IN_PYTORCH`
@jit
def exp(x):
    """e^x as 2^(x log2 e): two instructions. `tl.exp` spends three more on results below 1e-38, which are 0 here."""
    return tl.exp2(x * 1.4426950408889634)


@jit
def expm1(x):
    series = 1 / 120 + x * (1 / 720 + x * (1 / 5040 + x * (1 / 40320)))
    series = x + x * x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * series)))
    return tl.where(tl.abs(x) < 0.5, series, exp(x) - 1)


@jit
def log(x):
    return tl.log(x)


@jit
def positive(x):
    return tl.maximum(x, 1e-37)


@jit
def larger(x, y):
    return tl.maximum(x, y)


@jit
def sign(x):
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


@jit
def still(x):
    return x


_IN_PYTORCH = {
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "positive": lambda x: x.clamp_min(TINY),
    "larger": torch.maximum,
    "sign": torch.sign,
    "still": Tensor.detach,
}


# --- The formulas, (log_q, log_p, q, p, alpha, beta) -> (l, g), elementwise
def _forward_kl(log_q, log_p, q, p, alpha, beta):
    """KL(p || q)"""
    return p * (log_p - log_q) - p + q, q - p


def _reverse_kl(log_q, log_p, q, p, alpha, beta):
    """KL(q || p)"""
    g = q * (log_q - log_p)
    return g - q + p, g


def _skew_kl(log_q, log_p, q, p, alpha, beta):
    """KL(p || m), m = alpha p + (1 - alpha) q  (DistiLLM, arXiv 2402.03898, Eq. 3)"""
    m = positive(alpha * p + (1 - alpha) * q)
    return p * (log_p - log(m)) - p + m, (1 - alpha) * q * (1 - p / m)


def _skew_reverse_kl(log_q, log_p, q, p, alpha, beta):
    """KL(q || m), m = (1 - alpha) p + alpha q  (DistiLLM, arXiv 2402.03898, Eq. 4)"""
    m = positive((1 - alpha) * p + alpha * q)
    g = q * (log_q - log(m))
    return g - q + m, g + alpha * q * (1 - q / m)


def _skew_reverse_kl_detached(log_q, log_p, q, p, alpha, beta):
    """The same number with the q in m held still: the gradient of KL(q || m), m constant  (DistiLLM-2, 2503.07067)"""
    m = positive((1 - alpha) * p + alpha * still(q))
    g = q * (log_q - log(m))
    return g - q + m, g


def _jsd(log_q, log_p, q, p, alpha, beta):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q  (GKD, arXiv 2306.13649, Eq. 1)"""
    log_m = log(positive(beta * p + (1 - beta) * q))
    g = (1 - beta) * q * (log_q - log_m)
    return g + beta * p * (log_p - log_m), g


def _tvd(log_q, log_p, q, p, alpha, beta):
    """Total variation, sum |p - q| / 2"""
    signs = sign(q - p)
    return 0.5 * signs * (q - p), 0.5 * q * signs


def _alpha_beta(log_q, log_p, q, p, alpha, beta):
    """ABKD (arXiv 2505.04560; Cichocki et al. 2011, Eq. 20). Relative to the larger of p and q, as exp(x) - 1: the
    textbook's powers cancel where p and q are close."""
    top = larger(log_q, log_p)
    to_q = log_q - top
    to_p = log_p - top
    scale = exp((alpha + beta) * top)
    q_term = expm1((alpha + beta) * to_q)
    mixed = expm1(alpha * to_p + beta * to_q)
    # Reciprocals of scalars: one division for all elements.
    l = (alpha * expm1((alpha + beta) * to_p) + beta * q_term) * (1 / (alpha + beta)) - mixed
    return scale * l * (1 / (alpha * beta)), scale * (q_term - mixed) * (1 / alpha)


# --- the table
@dataclass(frozen=True)
class Divergence:
    """One divergence: its pointwise term and slope.

    Attributes:
        name: its key in `DIVERGENCES`.
        definition: the formula, for documentation.
        formula: `(log_q, log_p, q, p, alpha, beta) -> (l, g)`, elementwise: of tensors of any floating dtype.
        rule: the same for Triton; `None` where Triton is not installed.
        dual: `(alpha, beta) -> Objective`: the same number, seen by the other side. That of a divergence which holds a
            part of its learner still has no such part: its own dual is the one that differentiates all of it.
        parameters: name -> default, names out of `alpha` and `beta`.
        limits: parameter values at which the divergence is another one: `(values, name)` pairs.
        slope_sum: `sum_v g_v` if the statistics of a row give it ("zero", or "value": the divergence itself);
            else `None`, and the row needs a pass for it.
    """

    name: str
    definition: str
    formula: Callable[..., Terms]
    dual: Callable[[float, float], Objective]
    parameters: Mapping[str, float] = field(default_factory=dict)
    limits: tuple[tuple[tuple[float, ...], str], ...] = ()
    slope_sum: str | None = None
    rule: Any = field(init=False)

    def __post_init__(self) -> None:
        written = self.formula
        assert isinstance(written, FunctionType)
        object.__setattr__(self, "rule", jit(written))
        object.__setattr__(self, "formula", FunctionType(written.__code__, _IN_PYTORCH, written.__name__))


_ENTRIES = (
    Divergence("forward_kl", "KL(p || q)", _forward_kl, lambda alpha, beta: Objective("reverse_kl"), slope_sum="zero"),
    Divergence("reverse_kl", "KL(q || p)", _reverse_kl, lambda alpha, beta: Objective("forward_kl"), slope_sum="value"),
    Divergence(
        "skew_kl",
        "KL(p || alpha p + (1 - alpha) q)",
        _skew_kl,
        lambda alpha, beta: Objective("skew_reverse_kl", alpha=alpha),
        parameters={"alpha": 0.1},
        limits=(((0.0,), "forward_kl"),),
    ),
    Divergence(
        "skew_reverse_kl",
        "KL(q || (1 - alpha) p + alpha q)",
        _skew_reverse_kl,
        lambda alpha, beta: Objective("skew_kl", alpha=alpha),
        parameters={"alpha": 0.1},
        limits=(((0.0,), "reverse_kl"),),
    ),
    Divergence(
        "skew_reverse_kl_detached",
        "KL(q || (1 - alpha) p + alpha q), the q in the mixture held still",
        _skew_reverse_kl_detached,
        lambda alpha, beta: Objective("skew_kl", alpha=alpha),
        parameters={"alpha": 0.1},
        limits=(((0.0,), "reverse_kl"),),
    ),
    Divergence(
        "jsd",
        "beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q",
        _jsd,
        lambda alpha, beta: Objective("jsd", beta=1 - beta),
        parameters={"beta": 0.5},
        limits=(((0.0,), "forward_kl"), ((1.0,), "reverse_kl")),
    ),
    Divergence("tvd", "sum |p - q| / 2", _tvd, lambda alpha, beta: Objective("tvd")),
    Divergence(
        "alpha_beta",
        "-sum [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)] / (a b), a = alpha, b = beta",
        _alpha_beta,
        lambda alpha, beta: Objective("alpha_beta", alpha=beta, beta=alpha),
        parameters={"alpha": 0.2, "beta": 0.7},
        limits=(((1.0, 0.0), "forward_kl"), ((0.0, 1.0), "reverse_kl")),
    ),
)
DIVERGENCES: Mapping[str, Divergence] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


@dataclass(frozen=True, init=False)
class Objective:
    """What one model minimises: `weight * D(learner, target) + ce_weight * CE(learner, label)`, per token.

    `Objective("jsd", beta=0.1)`, `Objective("forward_kl", weight=0.5, ce_weight=0.5)`: the latter, given as the
    teacher's objective, is L_t of OKD (arXiv 2409.12512, Eq. 16): the teacher is then the learner `q` and the student
    the target `p`, so `forward_kl` is KL(student || teacher).

    At a limit the objective becomes the divergence found there: `jsd` at beta 0 is forward KL and at 1 reverse KL
    (GKD's convention), skew at alpha 0 is its KL, `alpha_beta` at (1, 0) / (0, 1) is forward / reverse KL. A parameter
    that the divergence does not have is 0.

    Raises:
        ValueError: unknown divergence or parameter, a parameter out of range, or a negative or infinite weight.
    """

    divergence: str
    weight: float
    ce_weight: float
    alpha: float
    beta: float

    def __init__(
        self, divergence: str = "forward_kl", weight: float = 1.0, ce_weight: float = 0.0, **parameters: float
    ):
        if divergence not in DIVERGENCES:
            raise ValueError(f"expected a divergence out of {', '.join(DIVERGENCES)}; got {divergence!r}")
        for name, value in (("weight", weight), ("ce_weight", ce_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"expected {name} to be finite and at least 0; got {value}")
        entry = DIVERGENCES[divergence]
        unknown = sorted(set(parameters) - set(entry.parameters))
        if unknown:
            takes = f"takes {', '.join(entry.parameters)}" if entry.parameters else "takes no parameter"
            raise ValueError(f"{divergence} {takes}; got {', '.join(unknown)}: remove or rename it")
        values = {name: float(parameters.get(name, default)) for name, default in entry.parameters.items()}
        limit = dict(entry.limits).get(tuple(values.values()))
        if limit is not None:
            divergence, values = limit, {}
        for name, value in values.items():
            if divergence == "alpha_beta" and not 0 < value < math.inf:
                raise ValueError(
                    f"alpha_beta: expected alpha > 0 and beta > 0, or (1, 0) or (0, 1); got {values}: use a small "
                    "positive value in place of 0"
                )
            if divergence != "alpha_beta" and not 0 < value < 1:
                raise ValueError(f"{divergence}: expected {name} between 0 and 1; got {value}")
        fields = {"divergence": divergence, "weight": float(weight), "ce_weight": float(ce_weight)}
        for name, field_value in {**fields, "alpha": 0.0, "beta": 0.0, **values}.items():
            object.__setattr__(self, name, field_value)

    @classmethod
    def of(cls, objective: str | Objective) -> Objective:
        """The objective itself, or the one that a divergence's name stands for. Raises TypeError for anything else."""
        if not isinstance(objective, str | cls):
            raise TypeError(f"expected a divergence's name or an Objective; got {objective!r}")
        return cls(objective) if isinstance(objective, str) else objective

    @property
    def parameters(self) -> dict[str, float]:
        """The divergence's own parameters, as the constructor takes them."""
        return {name: getattr(self, name) for name in DIVERGENCES[self.divergence].parameters}

    @property
    def dual(self) -> Objective:
        """The objective whose divergence has the same value when learner and target exchange places.

        With `teacher=student.dual`, one divergence is differentiated into both sides: student and teacher minimise it
        together (PESF-KD's joint training), instead of each holding the other still. A cross-entropy stays behind.
        """
        other = DIVERGENCES[self.divergence].dual(self.alpha, self.beta)
        return Objective(other.divergence, self.weight, **other.parameters)
