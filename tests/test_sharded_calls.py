"""What the ranks of a sharded vocabulary do together: collectives, errors on all of them, torch.compile."""

import re

import pytest
import torch
import torch.distributed as dist
from problems import GRADIENTS, Problem
from ranks import run_ranks
from sparse_problems import SparseProblem, assert_same
from test_sharded import SHARDS, WORLDS, N, cases, dense, run_case, shard_of, sparse

from okd_kernels import Objective, linear_distillation_loss, linear_sparse_distillation_loss


def collectives(rank, world):
    """(all-gathers, all-reduces) of calls in chunks of 4 rows, 11 - 1 counted."""
    found, calls = {}, []
    gather, reduce = dist.all_gather, dist.all_reduce
    dist.all_gather = lambda *args, **options: (calls.append("gather"), gather(*args, **options))
    dist.all_reduce = lambda *args, **options: (calls.append("reduce"), reduce(*args, **options))
    for name, case, requires in (
        *((name, dense({"student": name, "teacher": name}, ignored=(2,)), GRADIENTS) for name in ("forward_kl", "jsd")),
        ("jsd without gradients", dense({"student": "jsd", "teacher": "jsd"}, ignored=(2,)), ()),
        ("sparse", sparse(), ("hidden", "weight")),
        ("sparse, frozen head", sparse(student="jsd"), ("hidden",)),
    ):
        calls.clear()
        run_case(case, rank, world, requires=requires, workspace_bytes=4 * 2 * 4 * max(SHARDS[world]))
        found[name] = calls.count("gather"), calls.count("reduce")
    dist.all_gather, dist.all_reduce = gather, reduce
    return found


def errors(rank, world):
    """The messages of calls that must fail, on every rank: what only one rank does otherwise, all must hear of."""
    first, shard, group = rank == 0, shard_of(rank, world), dist.group.WORLD
    problem, other = Problem(n=N), Problem(n=N)
    x, y = problem.operands["student_hidden"], problem.operands["teacher_hidden"]
    w, u = (problem.operands[f"{side}_weight"][shard] for side in ("student", "teacher"))
    few, unknown = other.labels.clone(), problem.labels.clone()
    few[:4], unknown[5] = -100, 131
    last = problem.labels.index_fill(0, torch.tensor([N - 1]), -100)  # as many are counted with that row as without
    rows = N if first else N - 1

    def call(*args, x=x, w=w, u=u, **options):
        return linear_distillation_loss(x, w, y, u, *args, **{"group": group, **options})

    ids, log_p = torch.zeros(N, 3).long(), torch.full((N, 3), -2.0)
    calls = {
        "split": lambda: call(u=u if first else u[:-1] if len(u) > 1 else torch.cat([u, u])),
        "divergence": lambda: call(student="jsd" if first else "tvd"),
        "parameter": lambda: call(student=Objective("jsd", beta=0.3 if first else 0.4)),
        "temperature": lambda: call(temperature=1.0 + first),
        "gradients": lambda: call(w=w.clone().requires_grad_(first)),
        "counted": lambda: call(few if first else problem.labels),
        "rows": lambda: linear_distillation_loss(x[:rows], w, y[:rows], u, last[:rows], group=group, compact=False),
        "workspace": lambda: call(workspace_bytes=4096 + first),
        "reduction": lambda: call(reduction="sum" if first else "none"),
        "mix": lambda: call(target_mix=1.0 if first else 0.5),
        "tail": lambda: linear_sparse_distillation_loss(
            x, w, ids, log_p, tail="bucket" if first else "none", group=group
        ),
        "kind": lambda: linear_sparse_distillation_loss(x, w, ids, log_p, group=group) if first else call(),
        "labels": lambda: call(unknown),
        "vocab_size": lambda: call(vocab_size=132),
        "no column": lambda: call(vocab_size=3),
        "no workspace": lambda: call(workspace_bytes=0),
        "reference": lambda: call(backend="reference"),
    }
    messages = {}
    for name, must_fail in calls.items():
        with pytest.raises(ValueError) as error:
            must_fail()
        messages[name] = str(error.value)
    return messages


def compiled(rank, world):
    """(values, gradients) under `torch.compile`, and without it, by kind of target."""
    found = {}
    for name in ("two divergences", "sparse, target mix", "per token"):
        torch._dynamo.reset()
        problem, _ = case = cases()[name]
        loss = linear_sparse_distillation_loss if isinstance(problem, SparseProblem) else linear_distillation_loss
        graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found[name] = run_case(case, rank, world, loss=graph), run_case(case, rank, world)
    return found


def work(rank, world):
    return {
        "collectives": collectives(rank, world),
        "errors": errors(rank, world),
        "compiled": compiled(rank, world),
    }


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, tmp_path_factory):
    return run_ranks(work, request.param, tmp_path_factory.mktemp(f"ranks{request.param}"))


def test_compiled_equals_eager(ranks):
    for rank in ranks:
        for ours, eager in rank["compiled"].values():
            ours, eager = ((v, {k: x for k, x in g.items() if x is not None}) for v, g in (ours, eager))
            ours = {k: x for k, x in ours[0].items() if x is not None}, ours[1]
            assert_same(ours, ({k: x for k, x in eager[0].items() if x is not None}, eager[1]), rtol=0)


def test_number_of_collectives(ranks):
    """All-gathers: that of the agreement, and in each of three chunks the statistics, and what a sparse target's tail
    is; all-reduces: a chunk's slope sums where no statistic gives them, the values, and each gradient of hidden states.
    """
    expected = {
        "forward_kl": (1 + 3, 1 + 2),
        "jsd": (1 + 3, 3 + 1 + 2),
        "jsd without gradients": (1 + 3, 1),
        "sparse": (1 + 3 * 2, 1 + 1),
        "sparse, frozen head": (1 + 3 * 2, 3 + 1 + 1),
    }
    for rank in ranks:
        assert rank["collectives"] == expected


@pytest.mark.parametrize(
    "name, message",
    [
        ("split", r"heads that are split alike.*got \[\d+, .*split both at the same token ids"),
        (
            "divergence",
            r"same student on all ranks; got \['jsd', 'tvd'.*pass the same tokens and options everywhere",
        ),
        ("parameter", r"same student_numbers on all ranks; got \[\[1.0, 0.0, 0.0, 0.3\], \[1.0, 0.0, 0.0, 0.4\]"),
        ("temperature", r"the same temperature on all ranks; got \[2.0, 1.0"),
        ("gradients", r"the same wanted on all ranks; got \['student_weight', ''"),
        ("counted", r"the same number of counted tokens on all ranks; got \[\d, 10"),
        ("rows", r"the same number of tokens on all ranks; got \[11, 10"),
        ("workspace", r"the same workspace_bytes on all ranks; got \[4097, 4096"),
        ("reduction", r"the same per_token on all ranks; got \[False, True"),
        ("mix", r"the same target_mix on all ranks; got \[1.0, 0.5"),
        ("tail", r"the same tail on all ranks; got \['bucket', 'none'"),
        ("kind", r"the same tail on all ranks; got \['bucket', ''"),
        ("labels", r"labels in \[0, 131\).*got 131"),
        ("vocab_size", r"vocab_size in \[\d+, 131\], so that each rank has a column; got 132"),
        ("no column", r"vocab_size in \[\d+, 131\], so that each rank has a column; got 3"),
        ("no workspace", "workspace_bytes > 0; got 0"),
        ("reference", "whole heads for backend='reference'; got a group"),
    ],
)
def test_errors_are_raised_on_all_ranks(ranks, name, message):
    for rank in ranks:
        assert re.search(message, rank["errors"][name]), rank["errors"][name]


def test_without_a_process_group():
    group = object()
    with pytest.raises(ValueError, match=r"initialised process group.*init_process_group.*or leave out group"):
        linear_distillation_loss(*(torch.zeros(8, 4),) * 4, group=group)
