"""Ours beside Liger's and TRL's losses on a CPU in fp32, with torch.distributions in fp64 as the judge.

A wrong convention (direction of the KL, beta, label shift, reduction, T^2) is an error of at least a few percent here,
rounding is one of 1e-6. So agreement to 1e-5 means that the three compute the same thing.
"""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from benchmarks import peers

V, D_S, D_T, N = 401, 24, 40, 48
DIVERGENCES = tuple(peers.BETAS)
PEERS = {"liger_chunked": "liger_kernel", "trl_chunked": "trl"}
OPTIONS = {"liger_chunked": {"compiled": False}}  # what torch.compile adds to Liger's is speed


def oracle(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, divergence, temperature=1.0):
    """Mean divergence of the counted rows at temperature T, without T^2."""
    counted = labels != peers.IGNORE
    q = Categorical(logits=student_hidden[counted] @ student_weight.T / temperature)
    p = Categorical(logits=teacher_hidden[counted] @ teacher_weight.T / temperature)
    if divergence == "forward_kl":
        return kl_divergence(p, q).mean()
    if divergence == "reverse_kl":
        return kl_divergence(q, p).mean()
    m = Categorical(probs=(p.probs + q.probs) / 2)
    return (kl_divergence(p, m) + kl_divergence(q, m)).mean() / 2


def run(loss, operands, divergence, dtype=torch.float32, upstream=1.0, **options):
    """{"loss", "student_hidden", "student_weight"}: the value, and the gradients of upstream * loss, in fp64."""
    x, w, y, u = (tensor.to(dtype).clone() for tensor in operands[:4])
    value = loss(x.requires_grad_(), w.requires_grad_(), y, u, operands[4], divergence, **options)
    (upstream * value).backward()
    return {"loss": value.detach().double(), "student_hidden": x.grad.double(), "student_weight": w.grad.double()}


def errors(results, truth):
    return {name: ((results[name] - x).norm() / x.norm()).item() for name, x in truth.items()}


def peer(name):
    pytest.importorskip(PEERS[name])
    return getattr(peers, name), OPTIONS.get(name, {})


@pytest.fixture(params=[0, 50], ids=["all rows", "half ignored"])
def operands(request):
    return peers.operands(V, D_S, D_T, N, masked=request.param, spread=1.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", PEERS)
def test_the_same_loss(name, divergence, temperature, operands):
    """Same value and gradients; ours carries T^2, theirs do not. Upstream gradients that are not 1 reach both."""
    loss, options = peer(name)
    setting = {"temperature": temperature, "upstream": 0.3}
    truth = run(oracle, operands, divergence, torch.float64, **setting)
    ours = run(peers.ours, operands, divergence, **setting)
    ours = {key: x / temperature**2 for key, x in ours.items()}
    theirs = run(loss, operands, divergence, **setting, **options)
    for key, error in errors(ours, truth).items():
        assert error < 1e-5, f"ours, {key}: {error:.1e}"
    for key, error in errors(theirs, truth).items():
        assert error < 1e-5, f"{name}, {key}: {error:.1e}"
    for key, difference in errors(ours, theirs).items():
        assert difference < 1e-5, f"ours against {name}, {key}: {difference:.1e}"


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", PEERS)
def test_no_further_from_the_truth(name, divergence):
    """Models that nearly agree: there fp32 logits lose digits, and each side may lose as many as plain PyTorch does."""
    loss, options = peer(name)
    operands = peers.operands(V, D_S, D_T, N, spread=0.1)
    truth = run(oracle, operands, divergence, torch.float64)
    plain = errors(run(peers.eager, operands, divergence), truth)
    ours = errors(run(peers.ours, operands, divergence), truth)
    theirs = errors(run(loss, operands, divergence, **options), truth)
    for key in ("student_hidden", "student_weight"):
        assert ours[key] < 1.5 * min(plain[key], theirs[key]), (
            f"{key}: {ours[key]:.1e}, {plain[key]:.1e}, {theirs[key]:.1e}"
        )
    assert ours["loss"] < 2e-5


@pytest.mark.parametrize("name", PEERS)
def test_beta_has_a_direction(name):
    """The two KLs exchanged differ by a thousand times the budget of the comparisons above."""
    loss, options = peer(name)
    operands = peers.operands(V, D_S, D_T, N, spread=1.0)
    forward = run(peers.ours, operands, "forward_kl")
    exchanged = errors(run(loss, operands, "reverse_kl", **options), forward)
    assert min(exchanged.values()) > 0.01, exchanged


def test_eager_is_the_definition():
    """The baseline of the benchmark, in fp64, against the judge; "okd" is written out."""
    operands = peers.operands(V, D_S, D_T, N, masked=50, spread=1.0)
    for divergence in DIVERGENCES:
        truth = run(oracle, operands, divergence, torch.float64, temperature=2.0)
        found = errors(run(peers.eager, operands, divergence, torch.float64, temperature=2.0), truth)
        assert max(found.values()) < 1e-9, (divergence, found)


def okd_oracle(student_hidden, student_weight, teacher_hidden, teacher_weight, labels):
    """KL(p || q) + a KL(q || p) + (1 - a) CE(p, y): each term reaches its learner only."""
    counted = labels != peers.IGNORE
    z, u = student_hidden[counted] @ student_weight.T, teacher_hidden[counted] @ teacher_weight.T
    student = kl_divergence(Categorical(logits=u.detach()), Categorical(logits=z)).mean()
    teacher = kl_divergence(Categorical(logits=z.detach()), Categorical(logits=u)).mean()
    nll = -Categorical(logits=u).log_prob(labels[counted]).mean()
    return student + peers.OKD_WEIGHT * teacher + (1 - peers.OKD_WEIGHT) * nll


def test_okd_of_ours_and_of_eager(operands):
    def gradients(loss, *arguments):
        leaves = [x.double().clone().requires_grad_() for x in operands[:3]]
        value = loss(*leaves, operands[3].double(), operands[4], *arguments)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    truth = gradients(okd_oracle)
    for loss in (peers.ours, peers.eager):
        for x, exact in zip(gradients(loss, "okd"), truth, strict=True):
            torch.testing.assert_close(x, exact, rtol=1e-9, atol=1e-12)
