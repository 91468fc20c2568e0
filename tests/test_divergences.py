"""Each divergence against its textbook definition in fp64, its slope against autograd, and the laws it must obey."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from okd_kernels import DIVERGENCES, Objective

V = 23


def kl(a, b):
    return (a * (a.log() - b.log())).sum(-1)


# Written from the papers, not from the library: learner q, target p.
TEXTBOOK = {
    "forward_kl": lambda q, p: kl(p, q),
    "reverse_kl": lambda q, p: kl(q, p),
    "skew_kl": lambda q, p, alpha=0.1: kl(p, alpha * p + (1 - alpha) * q),
    "skew_reverse_kl": lambda q, p, alpha=0.1: kl(q, (1 - alpha) * p + alpha * q),
    "skew_reverse_kl_detached": lambda q, p, alpha=0.1: kl(q, (1 - alpha) * p + alpha * q.detach()),
    "jsd": lambda q, p, beta=0.5: (
        beta * kl(p, beta * p + (1 - beta) * q) + (1 - beta) * kl(q, beta * p + (1 - beta) * q)
    ),
    "tvd": lambda q, p: (p - q).abs().sum(-1) / 2,
    "alpha_beta": lambda q, p, alpha=0.2, beta=0.7: (
        -(
            p**alpha * q**beta
            - alpha / (alpha + beta) * p ** (alpha + beta)
            - beta / (alpha + beta) * q ** (alpha + beta)
        ).sum(-1)
        / (alpha * beta)
    ),
}


def evaluate(objective, log_q, log_p):
    entry = DIVERGENCES[objective.divergence]
    return entry.formula(log_q, log_p, log_q.exp(), log_p.exp(), objective.alpha, objective.beta)


def logit_gradient(objective, log_q, log_p):
    _, g = evaluate(objective, log_q, log_p)
    return g - log_q.exp() * g.sum(-1, keepdim=True)


def pair(n=5, spread=1.0):
    z = torch.randn(n, V, dtype=torch.float64) * 2
    u = z + spread * torch.randn(n, V, dtype=torch.float64)
    return z.log_softmax(-1), u.log_softmax(-1)


def test_the_table_is_covered():
    assert set(TEXTBOOK) == set(DIVERGENCES)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_is_the_textbook_definition(name):
    log_q, log_p = pair()
    terms, _ = evaluate(Objective(name), log_q, log_p)
    torch.testing.assert_close(terms.sum(-1), TEXTBOOK[name](log_q.exp(), log_p.exp()), rtol=1e-12, atol=1e-14)
    assert (terms >= -1e-16).all(), "Bregman form: every term is nonnegative"


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("skew_kl", {"alpha": 0.4}),
        ("skew_reverse_kl", {"alpha": 0.7}),
        ("jsd", {"beta": 0.1}),
        ("alpha_beta", {"alpha": 0.5, "beta": 0.5}),
        ("alpha_beta", {"alpha": 1.5, "beta": 0.3}),
    ],
)
def test_parameters_reach_the_formula(name, parameters):
    log_q, log_p = pair()
    terms, _ = evaluate(Objective(name, **parameters), log_q, log_p)
    torch.testing.assert_close(
        terms.sum(-1), TEXTBOOK[name](log_q.exp(), log_p.exp(), **parameters), rtol=1e-12, atol=1e-14
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_slope_is_the_derivative_through_the_softmax(name):
    log_q, log_p = pair()
    z = log_q.clone().requires_grad_()
    TEXTBOOK[name](z.softmax(-1), log_p.exp()).sum().backward()
    torch.testing.assert_close(logit_gradient(Objective(name), log_q, log_p), z.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n, d in DIVERGENCES.items() if d.slope_sum is not None])
def test_known_slope_sums(name):
    log_q, log_p = pair()
    terms, g = evaluate(Objective(name), log_q, log_p)
    expected = {"zero": torch.zeros(5, dtype=torch.float64), "value": terms.sum(-1)}[DIVERGENCES[name].slope_sum]
    torch.testing.assert_close(g.sum(-1), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", DIVERGENCES)
@given(seed=st.integers(0, 2**20), spread=st.floats(1e-3, 8), offset=st.floats(-20, 20))
@settings(max_examples=20, deadline=None)
def test_laws(name, seed, spread, offset):
    torch.manual_seed(seed)
    log_q, log_p = pair(3, spread)
    objective = Objective(name)
    value = evaluate(objective, log_q, log_p)[0].sum(-1)
    gradient = logit_gradient(objective, log_q, log_p)
    assert (value > 0).all()
    assert evaluate(objective, log_p, log_p)[0].sum(-1).abs().max() < 1e-14
    assert logit_gradient(objective, log_p, log_p).abs().max() < 1e-14
    assert gradient.sum(-1).abs().max() < 1e-12
    shifted = (log_q + offset).log_softmax(-1)
    torch.testing.assert_close(evaluate(objective, shifted, log_p)[0].sum(-1), value, rtol=1e-10, atol=1e-13)
    order = torch.randperm(V)
    torch.testing.assert_close(
        logit_gradient(objective, log_q[:, order], log_p[:, order]), gradient[:, order], rtol=1e-9, atol=1e-13
    )


def test_fp32_value_of_close_distributions_is_accurate_and_not_negative():
    """The textbook form loses this to cancellation: KL is 5e-7 and fp32's eps times log V about 1e-6."""
    z = torch.randn(64, 50257, dtype=torch.float64)
    u = z + 1e-3 * torch.randn_like(z)
    truth = kl(u.softmax(-1), z.softmax(-1))
    log_q, log_p = z.float().log_softmax(-1), u.float().log_softmax(-1)
    ours = evaluate(Objective("forward_kl"), log_q, log_p)[0].sum(-1)
    textbook = (log_p.exp() * (log_p - log_q)).sum(-1)
    error = ((ours - truth) / truth).abs().max()
    assert (ours >= 0).all()
    assert error < 0.02 < ((textbook - truth) / truth).abs().max()


@pytest.mark.parametrize(
    "objective, limit",
    [
        (Objective("jsd", beta=0), Objective("forward_kl")),
        (Objective("jsd", beta=1), Objective("reverse_kl")),
        (Objective("skew_kl", alpha=0), Objective("forward_kl")),
        (Objective("skew_reverse_kl", alpha=0), Objective("reverse_kl")),
        (Objective("skew_reverse_kl_detached", alpha=0), Objective("reverse_kl")),
        (Objective("alpha_beta", alpha=1, beta=0), Objective("forward_kl")),
        (Objective("alpha_beta", alpha=0, beta=1), Objective("reverse_kl")),
    ],
)
def test_limits_are_other_divergences(objective, limit):
    assert objective == limit


@pytest.mark.parametrize(
    "near, factor",
    [
        (Objective("jsd", beta=1e-6), 1e6),
        (Objective("skew_kl", alpha=1e-6), 1),
        (Objective("alpha_beta", alpha=1, beta=1e-6), 1),
    ],
)
def test_limits_are_approached(near, factor):
    log_q, log_p = pair()
    value = evaluate(near, log_q, log_p)[0].sum(-1) * factor
    torch.testing.assert_close(value, kl(log_p.exp(), log_q.exp()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Objective("kl"), "expected a divergence out of forward_kl"),
        (lambda: Objective("jsd", alpha=0.5), "jsd takes beta; got alpha"),
        (lambda: Objective("tvd", beta=0.5), "tvd takes no parameter; got beta"),
        (lambda: Objective("jsd", beta=1.5), "expected beta between 0 and 1; got 1.5"),
        (lambda: Objective("skew_kl", alpha=1.0), "expected alpha between 0 and 1; got 1.0"),
        (lambda: Objective("skew_kl", alpha=math.nan), "expected alpha between 0 and 1; got nan"),
        (lambda: Objective("alpha_beta", alpha=0, beta=0.5), "expected alpha > 0 and beta > 0"),
        (lambda: Objective(weight=-1), "expected weight to be finite and at least 0; got -1"),
        (lambda: Objective(ce_weight=math.inf), "expected ce_weight to be finite"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "objective",
    [Objective(name) for name in DIVERGENCES]
    + [Objective("jsd", beta=0.1), Objective("skew_kl", alpha=0.4), Objective("alpha_beta", alpha=1.2, beta=0.3)],
    ids=str,
)
def test_dual_is_the_same_number_seen_by_the_other_side(objective):
    log_q, log_p = pair()
    value = evaluate(objective, log_q, log_p)[0].sum(-1)
    seen_by_the_other = evaluate(objective.dual, log_p, log_q)[0].sum(-1)
    torch.testing.assert_close(seen_by_the_other, value, rtol=1e-12, atol=1e-14)
    there_and_back = evaluate(objective.dual.dual, log_q, log_p)[0].sum(-1)
    torch.testing.assert_close(there_and_back, value, rtol=1e-12, atol=1e-14)
    assert Objective("jsd", weight=0.3, ce_weight=0.2).dual == Objective("jsd", weight=0.3)
