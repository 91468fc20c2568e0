"""Ours beside Liger's, TRL's and ORDA's losses on a CPU, with torch.distributions in fp64 as the judge.

A wrong convention (direction of the KL, beta, label shift, reduction, T^2) is an error of at least a few percent here,
rounding is one of 1e-6. What rounding may cost is computed: plain PyTorch in the same dtype, the inner dimensions in
other orders, is wrong by so much. So agreement within it means that all compute the same thing.
"""

import functools

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from benchmarks import peers

V, D_S, D_T, N = 401, 24, 40, 48
DIVERGENCES = tuple(peers.BETAS)
PEERS = {"liger_chunked": "liger_kernel", "trl_chunked": "trl", "orda": "orda_kernel"}
OPTIONS = {"liger_chunked": {"compiled": False}}  # what torch.compile adds to Liger's is speed
CARRY_T2 = ("ours", "orda")
LEAVES = ("student_hidden", "student_weight", "teacher_hidden")
DRAWS = 4


def oracle(student_hidden, student_weight, teacher_hidden, teacher_weight, labels, divergence, temperature=1.0):
    """Mean over the counted rows at temperature T, without T^2. Where both models learn, each term reaches one."""
    counted = labels != peers.IGNORE
    z = student_hidden[counted] @ student_weight.T / temperature
    q = Categorical(logits=z)
    if divergence == "sparse":
        ids, p = teacher_hidden[counted], teacher_weight[counted].exp()
        q = q.probs.gather(1, ids)
        q, p = (Categorical(probs=torch.cat([x, 1 - x.sum(1, keepdim=True)], 1)) for x in (q, p))
        return kl_divergence(p, q).mean()
    u = teacher_hidden[counted] @ teacher_weight.T / temperature
    p = Categorical(logits=u.detach())
    if divergence == "reverse_kl":
        return kl_divergence(q, p).mean()
    if divergence == "jsd":
        m = Categorical(probs=(p.probs + q.probs) / 2)
        return (kl_divergence(p, m) + kl_divergence(q, m)).mean() / 2
    loss = kl_divergence(p, q).mean()
    if divergence in peers.ONLINE:
        weight, ce_weight = peers.ONLINE[divergence]
        loss = loss + weight * kl_divergence(Categorical(logits=z.detach()), Categorical(logits=u)).mean()
        loss = loss - ce_weight * Categorical(logits=u * temperature).log_prob(labels[counted]).mean()
    return loss


def run(loss, operands, divergence, dtype=torch.float32, upstream=1.0, **options):
    """{"loss": value, leaf: gradient of upstream * loss}, in fp64."""
    tensors = [x.to(dtype).clone() if x.is_floating_point() else x for x in operands]
    leaves = tensors[: 3 if divergence in peers.ONLINE else 2]
    for x in leaves:
        x.requires_grad_()
    value = loss(*tensors, divergence, **options)
    (upstream * value).backward()
    gradients = {name: x.grad.double() for name, x in zip(LEAVES, leaves, strict=False)}
    return {"loss": value.detach().double(), **gradients}


def errors(results, truth):
    return {name: ((results[name] - x).norm() / x.norm()).item() for name, x in truth.items()}


def budgets(loss, operands, truth, divergence, dtype=torch.float32, **options):
    """Twice the worst error of `DRAWS` draws of a loss, the inner dimensions permuted, and 8 eps: {name: error}."""
    generator, draws = torch.Generator().manual_seed(0), []
    for _ in range(DRAWS):
        x, w, y, u, labels = operands
        order = torch.randperm(x.shape[1], generator=generator)
        orders = {"student_hidden": order, "student_weight": order}
        x, w = x[:, order], w[:, order]
        if y.is_floating_point():
            orders["teacher_hidden"] = torch.randperm(y.shape[1], generator=generator)
            y, u = (tensor[:, orders["teacher_hidden"]] for tensor in (y, u))
        found = run(loss, [x, w, y, u, labels], divergence, dtype, **options)
        found = {name: g[:, orders[name].argsort()] if name in orders else g for name, g in found.items()}
        draws.append(errors(found, truth))
    return {name: 2 * max(draw[name] for draw in draws) + 8 * torch.finfo(dtype).eps for name in truth}


def assert_within(found, truth, budget, name):
    for key, error in errors(found, truth).items():
        assert error <= budget[key], f"{name}, {key}: error {error:.1e}, budget {budget[key]:.1e}"


def peer(name):
    if name in PEERS:
        pytest.importorskip(PEERS[name])
    return functools.partial(getattr(peers, name), **OPTIONS.get(name, {}))


def without_t2(results, name, temperature):
    return {key: x / temperature**2 for key, x in results.items()} if name in CARRY_T2 else results


@pytest.fixture(params=[0, 50], ids=["all rows", "half ignored"])
def operands(request):
    return peers.operands(V, D_S, D_T, N, masked=request.param, spread=1.0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", ["ours", *PEERS])
def test_the_same_loss(name, divergence, temperature, operands):
    """Same value and gradients, but for T^2. Upstream gradients that are not 1 reach all."""
    setting = {"temperature": temperature, "upstream": 0.3}
    truth = run(oracle, operands, divergence, torch.float64, **setting)
    budget = budgets(peers.eager, operands, truth, divergence, **setting)
    assert_within(without_t2(run(peer(name), operands, divergence, **setting), name, temperature), truth, budget, name)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", ["ours", "orda"])
def test_the_same_loss_where_both_models_learn(name, temperature, operands):
    """ORDA's "mutual" is the student's forward KL and the teacher's, each with the other model held still."""
    setting = {"temperature": temperature, "upstream": 0.3}
    truth = run(oracle, operands, "mutual", torch.float64, **setting)
    budget = budgets(peers.eager, operands, truth, "mutual", **setting)
    found = without_t2(run(peer(name), operands, "mutual", **setting), name, temperature)
    assert set(found) == {"loss", *LEAVES}
    assert_within(found, truth, budget, name)


@pytest.mark.parametrize("divergence", ["okd", "sparse"])
def test_losses_that_no_other_library_has(divergence, operands):
    operands = peers.with_sparse_targets(operands) if divergence == "sparse" else operands
    truth = run(oracle, operands, divergence, torch.float64)
    budget = budgets(peers.eager, operands, truth, divergence)
    assert_within(run(peers.ours, operands, divergence), truth, budget, "ours")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", PEERS)
def test_no_further_from_the_truth(name, divergence):
    """Models that nearly agree: there fp32 logits lose digits, and each side may lose as many as plain PyTorch does."""
    operands = peers.operands(V, D_S, D_T, N, spread=0.1)
    truth = run(oracle, operands, divergence, torch.float64)
    plain = budgets(peers.eager, operands, truth, divergence)
    theirs = errors(run(peer(name), operands, divergence), truth)
    eps = 8 * torch.finfo(torch.float32).eps
    budget = {key: min(plain[key], 2 * theirs[key] + eps) for key in ("student_hidden", "student_weight")}
    assert_within(run(peers.ours, operands, divergence), truth, {**budget, "loss": plain["loss"]}, "ours")


@pytest.mark.parametrize("name", PEERS)
def test_beta_has_a_direction(name):
    """The two KLs exchanged differ by a thousand times the budget of the comparisons above."""
    operands = peers.operands(V, D_S, D_T, N, spread=1.0)
    truth = run(oracle, operands, "forward_kl", torch.float64)
    budget = budgets(peers.eager, operands, truth, "forward_kl")
    exchanged = errors(run(peer(name), operands, "reverse_kl"), truth)
    assert all(exchanged[key] > 1000 * budget[key] for key in truth), exchanged


@pytest.mark.parametrize("divergence", peers.DIVERGENCES)
def test_eager_is_the_definition(divergence):
    """The baseline of the benchmark, in fp64, as near to the judge as the judge to itself."""
    temperature = 2.0 if divergence in DIVERGENCES else 1.0
    operands = peers.operands(V, D_S, D_T, N, masked=50, spread=1.0)
    operands = peers.with_sparse_targets(operands) if divergence == "sparse" else operands
    truth = run(oracle, operands, divergence, torch.float64, temperature=temperature)
    budget = budgets(oracle, operands, truth, divergence, torch.float64, temperature=temperature)
    found = run(peers.eager, operands, divergence, torch.float64, temperature=temperature)
    assert_within(found, truth, budget, "eager")


@pytest.mark.parametrize("name", ["liger_fused", "liger_cute", "liger_cutile"])
def test_kernels_of_a_gpu_are_refused_on_a_cpu(name):
    pytest.importorskip("liger_kernel")
    with pytest.raises(RuntimeError, match="Liger's kernels need a GPU"):
        run(getattr(peers, name), peers.operands(V, D_S, D_T, N), "jsd")


def test_a_peer_is_asked_for_what_it_has():
    assert peers.names("jsd") == list(peers.PEERS)
    assert peers.names("mutual") == ["eager", "compiled", "orda"]
    assert peers.names("okd") == peers.names("sparse") == ["eager", "compiled"]
