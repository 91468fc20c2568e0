"""Backward passes over some of the columns: what they keep, what they report, and what they leave exact."""

import pytest
import torch
import torch.distributed as dist
from problems import DEVICE, Problem, relative_error
from ranks import run_ranks

from okd_kernels import LinearHead, Objective, columns, linear_distillation_loss, linear_sparse_distillation_loss

V, N = 2048, 24
BOTH = {"student": Objective("forward_kl", 0.7, 0.3), "teacher": Objective("forward_kl", 0.4, 0.6)}
HIDDEN = ("student_hidden", "teacher_hidden")


@pytest.fixture(autouse=True)
def few_directions(monkeypatch):
    """Of the 16 and 24 that the heads here have: in 8 of them nothing would be left to be wrong."""
    monkeypatch.setattr(columns, "DIRECTIONS", 2)


def peaked(sharpness=3.0, common=0.0, dtype=torch.float32, **options):
    """Rows whose gradient lies in few columns; `common` is a part that all rows of a head share."""
    problem = Problem(v=V, n=N, spread=0.3, dtype=torch.float64, **options)
    for name, x in problem.operands.items():
        if name.endswith("weight"):
            problem.operands[name] = x * sharpness + common * torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)
    problem.operands = {name: x.to(DEVICE, dtype) for name, x in problem.operands.items()}
    problem.loss_options = {"workspace_bytes": 1 << 20}  # one chunk
    return problem


def errors(problem, backend="torch", **options):
    """(values, gradients, relative errors of the gradients of hidden states and heads) beside all columns."""
    options = {**BOTH, **options}
    _, exact = problem.run(backend, **{k: x for k, x in options.items() if k not in ("backward_columns", "exact_head")})
    values, found = problem.run(backend, **options)
    return values, found, {k: relative_error(found[k], exact[k].double()) for k in found if exact[k] is not None}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"student": "jsd", "teacher": None}, {"common": 2.0}])
def test_losses_are_exact_and_the_error_of_dx_is_what_is_said(backend, options):
    problem = peaked(common=options.get("common", 0.0))
    options = {"backward_columns": 0.2, **{k: x for k, x in options.items() if k != "common"}}
    values, _, found = errors(problem, backend, **options)
    truth, _ = problem.run(backend, **{**BOTH, **options, "backward_columns": None})
    for name, x in truth.items():
        assert x is None or torch.equal(values[name], x), name
    for side in ("student", "teacher"):
        if f"{side}_dx_error" not in values:
            assert side == "teacher" and options["teacher"] is None
            continue
        said, kept = (values[f"{side}_{x}"] for x in ("dx_error", "columns_kept"))
        counted = problem.labels >= 0
        assert (said[counted] == said[counted][0]).all() and (said[~counted] == 0).all()
        assert kept[counted].tolist() == [pytest.approx(448 / V)] * int(counted.sum())  # 409.6, and a multiple of 64
        assert 1e-5 < found[f"{side}_hidden"] < 0.1
        assert said.max().item() == pytest.approx(found[f"{side}_hidden"], rel=0.35)


def test_what_all_rows_of_a_head_share_costs_no_error(monkeypatch):
    """It would be most of the error: dropped columns add up in it."""
    found = {}
    for count in (0, 2):
        monkeypatch.setattr(columns, "DIRECTIONS", count)
        found[count] = errors(peaked(common=5.0), backward_columns=0.1)[2]["student_hidden"]
    assert found[2] < 0.4 * found[0]


def test_dropped_rows_of_a_head_get_no_gradient_and_kept_ones_their_own():
    problem = peaked()
    _, exact = problem.run("torch", **BOTH)
    _, found = problem.run("torch", **BOTH, backward_columns=0.1)
    for side in ("student", "teacher"):
        ours, truth = found[f"{side}_weight"], exact[f"{side}_weight"]
        kept = ours.abs().sum(1) > 0
        assert kept.sum() == 256
        torch.testing.assert_close(ours[kept], truth[kept], rtol=1e-4, atol=1e-7)
        gone = truth[~kept].norm() / truth.norm()
        assert gone < 0.05 and torch.equal(found[f"{side}_bias"], exact[f"{side}_bias"])


def test_chunks_choose_their_own_columns_and_sum_them():
    problem = peaked()
    _, found, error = errors(problem, backward_columns=0.1, workspace_bytes=4 * 2 * V * 4)  # 6 chunks
    assert (found["student_weight"].abs().sum(1) > 0).sum() > 256
    assert max(error.values()) < 0.05


def test_an_exact_head_is_exact():
    _, _, error = errors(peaked(), backward_columns=0.1, exact_head=True)
    assert error["student_weight"] == error["teacher_weight"] == 0 < min(error[name] for name in HIDDEN)


@pytest.mark.parametrize("bound", [0.002, 0.01, 0.05])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_bound_is_kept_by_the_fewest_columns_that_it_needs(bound, seed):
    values, _, error = errors(peaked(seed=seed, common=1.0), backward_columns=f"{100 * bound}%")
    for side in ("student", "teacher"):
        assert error[f"{side}_hidden"] < 1.35 * bound
        assert values[f"{side}_dx_error"].max() <= bound
        assert values[f"{side}_columns_kept"].max() < 1 or bound == 0.002


@pytest.mark.parametrize("operands", ["flat", "uniform"])
def test_a_bound_that_no_share_keeps_takes_all_columns(operands, monkeypatch):
    """At a high temperature, and where all columns carry alike: as without the option, bit by bit, and nearly as
    cheap: the energies say so before anything else is computed."""
    monkeypatch.setattr(columns.Directions, "of", None)
    problem, options = peaked(0.1), {"temperature": 8.0, "backward_columns": "1%"}
    if operands == "uniform":
        for side in ("student", "teacher"):
            x = problem.operands[f"{side}_weight"]
            x.copy_(x / x.norm(dim=1, keepdim=True))
    values, _, error = errors(problem, **options)
    assert set(error.values()) == {0.0}
    assert values["student_columns_kept"].max() == 1 and values["student_dx_error"].max() == 0


def test_energies_alone_would_break_the_bound(monkeypatch):
    """Dropped columns add up: the shares that their energies allow are not enough, and the measured error says so."""
    bound = 0.01
    monkeypatch.setattr(columns, "DIRECTIONS", 0)
    _, _, error = errors(peaked(common=5.0), backward_columns=f"{100 * bound}%")
    assert error["student_hidden"] < 1.35 * bound
    keep = columns.Compaction._keep
    monkeypatch.setattr(columns.Compaction, "_keep", lambda *args: (*keep(*args)[:2], torch.zeros(())))
    _, _, trusting = errors(peaked(common=5.0), backward_columns=f"{100 * bound}%")
    assert trusting["student_hidden"] > 1.35 * bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype):
    values, found, error = errors(peaked(dtype=dtype), backward_columns=0.2)
    assert all(x is None or x.isfinite().all() for x in found.values())
    floor = {torch.bfloat16: 4e-3, torch.float16: 1e-3}.get(dtype, 0)
    for name in HIDDEN:
        said = values[f"{name.partition('_')[0]}_dx_error"].max().item()
        assert error[name] < 1.35 * said + 3 * floor


def test_lora_softcap_scale_and_token_weights():
    """A LoRA's parts are columns of the same products."""
    torch.manual_seed(0)
    x, w = torch.randn(N, 16), 3 * torch.randn(V, 16)
    u = w + 0.1 * torch.randn(V, 16)
    lora = [torch.randn(4, 16), torch.randn(V, 4) * 0.1]
    grads = {}
    for given in (None, 0.2):
        leaves = [t.clone().requires_grad_() for t in (x, *lora)]
        head = LinearHead(w, None, 0.8, 100.0, (leaves[1], leaves[2], 0.5))
        loss = linear_distillation_loss(
            leaves[0], head, x, u, token_weights=torch.linspace(0.5, 2, N), backward_columns=given
        )
        loss.student.backward()
        grads[given] = [leaf.grad for leaf in leaves]
    for ours, truth in zip(grads[0.2], grads[None], strict=True):
        assert 0 < relative_error(ours, truth.double()) < 0.1


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_sparse_targets(tail):
    torch.manual_seed(0)
    x, w = torch.randn(N, 16), 3 * torch.randn(V, 16)
    p, ids = (x @ w.T + torch.randn(N, V)).log_softmax(1).topk(8)
    grads, metrics = {}, {}
    for given in (None, 0.2):
        hidden, head = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = linear_sparse_distillation_loss(hidden, head, ids, p, tail=tail, backward_columns=given)
        loss.student.backward()
        grads[given], metrics[given] = (hidden.grad, head.grad), loss.metrics
    said = metrics[0.2]["student_dx_error"].max().item()
    assert relative_error(grads[0.2][0], grads[None][0].double()) == pytest.approx(said, rel=0.35)
    assert set(metrics[0.2]) - set(metrics[None]) == {"student_dx_error", "student_columns_kept"}
    assert relative_error(grads[0.2][1], grads[None][1].double()) < 0.1


def test_per_token_losses_choose_in_backward():
    """So that the forward pass has nothing to say of it."""
    problem, upstream = peaked(), tuple(torch.linspace(0.1, 1, N) for _ in range(2))
    options = {**BOTH, "reduction": "none", "upstream": upstream}
    _, exact = problem.run("torch", **options)
    values, found = problem.run("torch", **options, backward_columns=0.2)
    assert "student_dx_error" not in values
    assert 0 < relative_error(found["student_hidden"], exact["student_hidden"].double()) < 0.1


def test_nothing_is_measured_where_nothing_is_dropped():
    problem = peaked()
    values, _ = problem.run("torch", **BOTH, backward_columns=0.2, requires=("student_weight",))
    assert values["student_columns_kept"].max() == 1 and values["student_dx_error"].max() == 0
    assert "student_dx_error" not in problem.run("torch", **BOTH, backward_columns=1.0)[0]


def test_compiled_equals_eager():
    problem = peaked()
    torch._dynamo.reset()

    def loss(x, w):
        found = linear_distillation_loss(x, w, x.detach() + 0.1, w.detach(), backward_columns=0.2)
        return found.student, found.metrics["student_dx_error"]

    x, w = (problem.operands[f"student_{name}"].clone().requires_grad_() for name in ("hidden", "weight"))
    found = []
    for one in (loss, torch.compile(loss, fullgraph=True)):
        x.grad = w.grad = None
        value, error = one(x, w)
        value.backward()
        found.append((value, error, x.grad, w.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("given", [0, 1.5, -0.1, "0%", "100%", "1 per cent", "150%", "x", float("nan")])
def test_shares_and_bounds_are_checked(given):
    with pytest.raises(ValueError, match=r"expected backward_columns as a share .*; got"):
        peaked().run("torch", **BOTH, backward_columns=given)


def test_the_reference_is_exact():
    with pytest.raises(ValueError, match="expected backward_columns=None for backend='reference'"):
        peaked().run("reference", **BOTH, backward_columns=0.2)


# --- a vocabulary that ranks share ---


def sharded(rank, world):
    """Of each option, dX of both sides, this rank's dW and what is said, its part of the heads being a half."""
    found = {}
    for given in (0.2, "3%"):
        columns.DIRECTIONS = 2 if given == 0.2 else 0  # so that errors are large, too
        problem = peaked(common=20.0)  # the ranks' parts of dX are large, and cancel
        part = slice(rank * V // world, (rank + 1) * V // world)
        leaves = {
            name: (x if name in HIDDEN else x[part]).clone().requires_grad_() for name, x in problem.operands.items()
        }
        student, teacher = problem.heads(leaves)
        loss = linear_distillation_loss(
            *(leaves["student_hidden"], student, leaves["teacher_hidden"], teacher, problem.labels),
            **BOTH, group=dist.group.WORLD, backward_columns=given,
        )  # fmt: skip
        loss.total.backward()
        found[given] = {name: x.grad for name, x in leaves.items()}, loss.metrics
    return found


@pytest.mark.slow
def test_ranks_keep_columns_of_their_own_and_say_the_same(tmp_path):
    ranks = run_ranks(sharded, 2, tmp_path)
    _, exact = peaked(common=20.0).run("torch", **BOTH)
    for given in (0.2, "3%"):
        (first, metrics), (second, others) = (rank[given] for rank in ranks)
        assert all(torch.equal(metrics[name], others[name]) for name in metrics)
        for side in ("student", "teacher"):
            ours = first[f"{side}_hidden"]
            assert torch.equal(ours, second[f"{side}_hidden"])
            error = relative_error(ours, exact[f"{side}_hidden"].double())
            assert error == pytest.approx(metrics[f"{side}_dx_error"].max().item(), rel=0.35)
            assert 0 < error < (1 if given == 0.2 else 1.35 * 0.03)
            weight = torch.cat([x[f"{side}_weight"] for x in (first, second)])
            assert relative_error(weight, exact[f"{side}_weight"].double()) < 0.05
            share = (weight.abs().sum(1) > 0).double().mean().item()
            assert share == pytest.approx(metrics[f"{side}_columns_kept"].max().item(), abs=1e-3)
