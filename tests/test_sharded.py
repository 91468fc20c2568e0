"""A vocabulary sharded over ranks, against whole heads in one process: values and gradients."""

import problems
import pytest
import torch
import torch.distributed as dist
from problems import GRADIENTS, Problem, assert_as_good_as_the_reference
from ranks import run_ranks
from sparse_problems import MODES, SparseProblem, assert_as_good_as_the_definition

from okd_kernels import DIVERGENCES, Objective, linear_distillation_loss

# Other vocabularies are in equal parts. At a workspace of 4 KiB, ranks left to themselves would take unequal chunks.
SHARDS = {2: (90, 41), 4: (40, 1, 57, 33)}  # rows of each rank, 131 in all
WORLDS = [pytest.param(2, id="2 ranks"), pytest.param(4, id="4 ranks", marks=pytest.mark.slow)]
BOTH = {"student": Objective("forward_kl", 0.7, 0.3), "teacher": Objective("forward_kl", 0.4, 0.6)}
N = 11


def shard_of(rank, world, v=131):
    sizes = SHARDS[world] if v == 131 else (v // world,) * world
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


class Gathered(Problem):
    """A problem whose sharded runs have been done: `run("sharded")` hands them out, put together."""

    def run(self, backend, *args, **options):
        return self.gathered if backend == "sharded" else super().run(backend, *args, **options)

    def logit_gradients(self, requires=None, **options):
        return super().logit_gradients(**options)


def dense(options=BOTH, head_options=({}, {}), loss_options=None, **problem):
    """(problem, options); loss_options are tensors that belong to the problem."""
    problem = Gathered(**{"n": N, "ignored": (2, 7), **problem})
    problem.head_options, problem.loss_options = head_options, loss_options or {}
    return problem, options


def sparse(lora=False, head_options=None, k=5, temperature=1.0, dtype=torch.float32, n=N, **options):
    problem = SparseProblem(k, n=n, ignored=(2, 7), temperature=temperature, dtype=dtype)
    problem.lora, problem.head_options = lora, head_options or {}
    return problem, options


def cases():
    found, weights, upstream = {}, torch.linspace(0.5, 2, N), torch.linspace(-1, 1, N)
    for name in DIVERGENCES:
        for temperature in (1.0, 2.5):
            sides = {"student": Objective(name, 0.7, 0.3), "teacher": Objective(name, 0.4, 0.6)}
            found[f"{name}, T={temperature}"] = dense({**sides, "temperature": temperature})
        found[f"{name}, close, bf16"] = dense({"student": name, "teacher": name}, dtype=torch.bfloat16, spread=0.1)
    for i, (tail, name) in enumerate(MODES):
        options = {"tail": tail, "student": Objective(name, 0.7, 0.3), "temperature": (1.0, 2.5)[i % 2]}
        found[f"sparse {tail} {name}"] = sparse(**options)
    caps = ({"softcap": 5.0}, {"logit_scale": 0.5, "softcap": 8.0})
    found["softcap and scale"] = dense({**BOTH, "temperature": 2.0}, caps)
    found["two divergences"] = dense({"student": Objective("jsd", ce_weight=0.1, beta=0.2), "teacher": "reverse_kl"})
    found["target mix"] = dense({"student": Objective("jsd", ce_weight=0.1), "target_mix": 0.4, "temperature": 1.5})
    found["weights"] = dense({**BOTH, "normalizer": 5.0}, loss_options={"token_weights": weights})
    found["per token"] = dense({**BOTH, "reduction": "none", "upstream": (upstream, 1 - upstream)})
    found["sum, ignored rows stay"] = dense({**BOTH, "reduction": "sum", "compact": False})
    found["one chunk"] = dense({**BOTH, "workspace_bytes": None})
    found["fp16"] = dense({**BOTH, "normalizer": 1e4, "upstream": (2.0**16, 2.0**16)}, dtype=torch.float16)
    found["far offsets"] = dense(offset=60.0)
    found["nothing counted"] = dense(ignored=range(N))
    found["rows of whole pages"] = dense({**BOTH, "workspace_bytes": 2**16}, v=4096)  # get a gap: `row_stride`
    found["padded"] = dense({**BOTH, "vocab_size": 120})  # columns of the last rank that are none
    found["padded"][0].labels.clamp_(max=119)
    found["hidden only"] = dense({**BOTH, "requires": ("student_hidden", "teacher_hidden")})
    found["teacher's head only"] = dense({**BOTH, "requires": ("teacher_weight", "teacher_bias")})
    found["triton"] = dense({"student": "jsd", "teacher": "reverse_kl", "backend": "triton"}, n=3, ignored=(1,))
    found["sparse, triton"] = sparse(n=3, student="jsd", backend="triton")
    found["sparse, one id"] = sparse(k=1, student=Objective(ce_weight=0.3))
    found["sparse, LoRA, softcap"] = sparse(lora=True, head_options={"logit_scale": 1.7, "softcap": 4.0}, student="tvd")
    found["sparse, per token, weights"] = sparse(reduction="none", upstream=upstream, token_weights=weights)
    found["sparse, target mix"] = sparse(target_mix=0.4, student=Objective("skew_kl", ce_weight=0.1))
    found["sparse, bf16"] = sparse(dtype=torch.bfloat16, student="reverse_kl")
    return found


def run_dense(problem, shard, backend="auto", requires=GRADIENTS, upstream=(1.0, 1.0), loss=None, **options):
    """(values, gradients) of this rank, with its part of the heads."""
    operands = {
        name: (x if name.endswith("hidden") else x[shard]).clone().requires_grad_(name in requires)
        for name, x in problem.operands.items()
    }
    student, teacher = problem.heads(operands)
    options = {"workspace_bytes": 4096, "group": dist.group.WORLD, **problem.loss_options, **options}
    hidden = operands["student_hidden"], student, operands["teacher_hidden"], teacher
    found = (loss or linear_distillation_loss)(*hidden, problem.labels, backend=backend, **options)
    problems.backward(found, upstream)
    values = {name: None if x is None else x.detach() for name, x in problems.values_of(found).items()}
    return values, {name: x.grad for name, x in operands.items()}


def run_case(case, rank, world, **more):
    problem, options = case
    if isinstance(problem, SparseProblem):
        return problem.run(shard=shard_of(rank, world), group=dist.group.WORLD, **{**options, **more})
    v = len(problem.operands["student_weight"])
    return run_dense(problem, shard_of(rank, world, v), **{**options, **more})


LOGITS = {
    "both": {"student": Objective("jsd", 0.7, 0.3), "teacher": Objective("reverse_kl", 0.4, 0.6), "temperature": 2.0},
    "mixed": {"student": Objective("reverse_kl", ce_weight=0.5), "target_mix": 0.4},
    "none": {"student": "forward_kl", "teacher": "tvd", "reduction": "none"},
}


def logits():
    g = torch.Generator().manual_seed(0)
    z, noise = (torch.randn(N, 131, generator=g) * 2 for _ in range(2))
    return z, z + noise / 2, torch.randint(0, 131, (N,), generator=g).index_fill_(0, torch.tensor([2, 7]), -100)


def run_sharded_logits(shard, options):
    z, u, labels = logits()
    return problems.run_logits(z[:, shard], u[:, shard], labels, "torch", group=dist.group.WORLD, **options)


def work(rank, world):
    return {
        "runs": {name: run_case(case, rank, world) for name, case in cases().items()},
        "again": {name: run_case(cases()[name], rank, world) for name in ("per token", "sparse, target mix")},
        "logits": {name: run_sharded_logits(shard_of(rank, world), options) for name, options in LOGITS.items()},
    }


@pytest.fixture(scope="module", params=WORLDS)
def ranks(request, tmp_path_factory):
    return run_ranks(work, request.param, tmp_path_factory.mktemp(f"ranks{request.param}"))


def equal(a, b):
    return (a is None) == (b is None) and (a is None or torch.equal(a, b))


def together(runs):
    """(values, gradients) of all ranks, which must agree bit by bit on losses and gradients of hidden states."""
    values, gradients = runs[0]
    whole = dict(gradients)
    for other_values, other_gradients in runs[1:]:
        assert all(equal(x, other_values[name]) for name, x in values.items())
        assert all(
            equal(x, other_gradients[name]) for name, x in gradients.items() if name.endswith(("hidden", "down"))
        )
    for name, x in gradients.items():
        if x is not None and name.endswith(("weight", "bias", "up")):
            # All ranks have the whole operand of a `SparseProblem`, and gradients in their own rows of it.
            parts = [run[1][name] for run in runs]
            whole[name] = sum(parts) if len(x) == 131 else torch.cat(parts)
    return values, whole


@pytest.mark.parametrize("name", cases())
def test_sharded_is_as_good_as_one_process(ranks, name):
    problem, options = cases()[name]
    found = together([rank["runs"][name] for rank in ranks])
    if isinstance(problem, SparseProblem):
        backend = options.pop("backend", "torch")
        assert_as_good_as_the_definition(problem, backend, found=found, **options)
    else:
        problem.gathered = found
        options.pop("backend", None)
        assert_as_good_as_the_reference(problem, "sharded", **options)


@pytest.mark.parametrize("name", LOGITS)
def test_columns_of_logits_that_are_given(ranks, name, monkeypatch):
    runs, run = [rank["logits"][name] for rank in ranks], problems.run_logits
    for values, _ in runs[1:]:
        assert all(equal(x, runs[0][0][key]) for key, x in values.items())
    gradients = {
        side: None if x is None else torch.cat([of_rank[side] for _, of_rank in runs], 1)
        for side, x in runs[0][1].items()
    }

    def run_or_found(z, u, labels, backend, *args, **options):
        return (runs[0][0], gradients) if backend == "sharded" else run(z, u, labels, backend, *args, **options)

    monkeypatch.setattr(problems, "run_logits", run_or_found)
    problems.assert_logits_as_good_as_the_reference(*logits(), "sharded", **LOGITS[name])


def test_sharded_is_deterministic(ranks):
    for rank in ranks:
        for name, (values, gradients) in rank["again"].items():
            first_values, first_gradients = rank["runs"][name]
            assert all(equal(x, first_values[k]) for k, x in values.items()), name
            assert all(equal(x, first_gradients[k]) for k, x in gradients.items()), name
