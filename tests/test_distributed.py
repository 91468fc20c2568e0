"""Several processes against one: sharded vocabularies, DDP and FSDP2, on gloo and the CPU.

Ranks start once for each group of checks, since a process takes seconds to import torch; they write their results to
files, and the tests read them.
"""

import re
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_linear_distillation import GRADIENTS, Problem, assert_as_good_as_the_reference, relative_error

from okd_kernels import DIVERGENCES, LinearHead, Objective, linear_distillation_loss
from okd_kernels.vocab_parallel import vocab_parallel_distillation_loss

SHARDS = {2: (70, 61), 4: (40, 1, 57, 33)}  # rows of each rank, 131 in all; other vocabularies in equal parts


def _shard(vocab_size, rank, world):
    sizes = SHARDS[world] if vocab_size == 131 else (vocab_size // world,) * world
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def _rank(rank, work, world, folder, arguments):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    torch.save(work(rank, world, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(work, world, folder, *arguments):
    """What `work(rank, world, *arguments)` returns on each rank; an exception of any is raised here."""
    mp.start_processes(_rank, (work, world, folder, arguments), nprocs=world, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


# --- sharded vocabularies ----------------------------------------------------------------------------------------

BOTH = {"student": Objective("forward_kl", 0.7, 0.3), "teacher": Objective("forward_kl", 0.4, 0.6)}


class Gathered(Problem):
    """A problem whose sharded runs have been done: `run("vocab_parallel")` hands them out, put together."""

    def run(self, backend, *args, **options):
        return self.gathered if backend == "vocab_parallel" else super().run(backend, *args, **options)


def _case(options=BOTH, head_options=({}, {}), loss_options=None, **problem):
    """(problem, options): loss_options are tensors that belong to the problem."""
    problem = Gathered(**{"n": 11, "ignored": (2, 7), **problem})
    problem.head_options, problem.loss_options = head_options, loss_options or {}
    return problem, options


def cases():
    result = {}
    for name in DIVERGENCES:
        for temperature in (1.0, 2.5):
            sides = {"student": Objective(name, 0.7, 0.3), "teacher": Objective(name, 0.4, 0.6)}
            result[f"{name}, T={temperature}"] = _case({**sides, "temperature": temperature})
        result[f"{name}, close"] = _case({"student": Objective(name), "teacher": Objective(name)}, spread=0.03)
        result[f"{name}, bf16"] = _case({"student": name, "teacher": name}, dtype=torch.bfloat16)
    caps = ({"softcap": 5.0}, {"logit_scale": 0.5, "softcap": 8.0})
    result["softcap and scale"] = _case({**BOTH, "temperature": 2.0}, caps)
    result["two divergences"] = _case({"student": Objective("jsd", ce_weight=0.1, beta=0.2), "teacher": "reverse_kl"})
    result["frozen teacher"] = _case({"student": Objective("skew_kl", ce_weight=1.0)})
    result["fp16"] = _case({**BOTH, "normalizer": 1e4}, dtype=torch.float16)
    scaled = {"normalizer": 1e6, "upstream": (2.0**16, 2.0**16)}
    result["fp16, scaled"] = _case({**BOTH, **scaled}, dtype=torch.float16)
    result["sum"] = _case({**BOTH, "reduction": "sum"})
    result["weights"] = _case({**BOTH, "normalizer": 5.0}, loss_options={"token_weights": torch.linspace(0.5, 2, 11)})
    result["one chunk"] = _case({**BOTH, "workspace_bytes": None})
    result["rows of whole pages"] = _case({**BOTH, "workspace_bytes": 2**16}, v=4096)  # get a gap: `row_stride`
    result["far offsets"] = _case(offset=60.0)
    result["upstream"] = _case({**BOTH, "upstream": (3.0, 0.5)})
    result["nothing counted"] = _case(ignored=range(11))
    result["hidden only"] = _case({**BOTH, "requires": ("student_hidden", "teacher_hidden")})
    result["teacher's head only"] = _case({**BOTH, "requires": ("teacher_weight", "teacher_bias")})
    result["no labels"] = _case({"student": "tvd", "teacher": "jsd", "temperature": 0.7})
    result["no labels"][0].labels = None
    padded = _case({**BOTH, "temperature": 1.5})
    padded[0].operands["student_bias"][100:] = padded[0].operands["teacher_bias"][100:] = -torch.inf
    padded[0].labels.clamp_(max=99)
    result["padded"] = padded
    return result


def sharded(problem, shard, upstream=(1.0, 1.0), requires=GRADIENTS, **options):
    """(values, gradients) of this rank; `shard`: its slice of the vocabulary."""
    operands = {
        name: (x if name.endswith("hidden") else x[shard]).clone().requires_grad_(name in requires)
        for name, x in problem.operands.items()
    }
    heads = [
        LinearHead(operands[f"{side}_weight"], operands[f"{side}_bias"], **head_options)
        for side, head_options in zip(("student", "teacher"), problem.head_options, strict=True)
    ]
    loss = vocab_parallel_distillation_loss(
        operands["student_hidden"],
        heads[0],
        operands["teacher_hidden"],
        heads[1],
        problem.labels,
        **{"workspace_bytes": 4096, **problem.loss_options, **options},
    )
    values = {"student": loss.student, "teacher": loss.teacher, **loss.metrics}
    total = loss.student * upstream[0] + (0 if loss.teacher is None else loss.teacher * upstream[1])
    if total.requires_grad:
        total.backward(retain_graph=True)
        first = {name: None if x.grad is None else x.grad.clone() for name, x in operands.items()}
        for x in operands.values():
            x.grad = None
        total.backward()
        for name, x in operands.items():
            assert (x.grad is None) == (first[name] is None)
            assert x.grad is None or torch.equal(x.grad, first[name]), "backward may run twice"
    return {k: x if x is None else x.detach() for k, x in values.items()}, {k: x.grad for k, x in operands.items()}


def _work(rank, world):
    def run(problem, options):
        return sharded(problem, _shard(len(problem.operands["student_weight"]), rank, world), **options)

    runs, again = ({name: run(*case) for name, case in cases().items()} for _ in range(2))
    shard = _shard(131, rank, world)
    return {
        "runs": runs,
        "again": again,
        "lora": _lora(shard),
        "collectives": _collectives(shard, 4 * 2 * 4 * max(SHARDS[world])),
        "errors": _errors(rank, shard),
        "unknown label": _unknown_label(shard),
    }


@pytest.fixture(scope="module", params=list(SHARDS), ids=lambda world: f"{world} ranks")
def ranks(request, tmp_path_factory):
    return run_ranks(_work, request.param, tmp_path_factory.mktemp(f"ranks{request.param}"))


def _equal(a, b):
    return (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.parametrize("name", cases())
def test_sharded_is_as_good_as_the_reference(ranks, name):
    problem, options = cases()[name]
    runs = [rank["runs"][name] for rank in ranks]
    values, gradients = runs[0]
    for other_values, other_gradients in runs[1:]:
        for key, x in values.items():
            assert _equal(x, other_values[key]), f"{key} differs between ranks"
        for key in ("student_hidden", "teacher_hidden"):
            assert _equal(gradients[key], other_gradients[key]), f"d{key} differs between ranks"
    whole = dict(gradients)
    for key in GRADIENTS:
        if not key.endswith("hidden") and gradients[key] is not None:
            whole[key] = torch.cat([run[1][key] for run in runs])
    problem.gathered = values, whole
    assert_as_good_as_the_reference(problem, "vocab_parallel", **options)


def test_sharded_is_deterministic(ranks):
    for rank in ranks:
        for name, (values, gradients) in rank["again"].items():
            first_values, first_gradients = rank["runs"][name]
            assert all(_equal(x, first_values[k]) for k, x in values.items()), name
            assert all(_equal(x, first_gradients[k]) for k, x in gradients.items()), name


def _lora(shard=slice(None), loss=vocab_parallel_distillation_loss, dtype=torch.float32, **options):
    """Gradients of a LoRA on the student's head: of A, which all ranks hold, and of B's rows."""
    problem, g = Problem(n=11), torch.Generator().manual_seed(1)
    operands = {name: x.to(dtype) for name, x in problem.operands.items()}
    down, up = (torch.randn(*shape, generator=g).to(dtype) * 0.3 for shape in ((4, 16), (131, 4)))
    down, up = down.requires_grad_(), up[shard].requires_grad_()
    hidden = operands["student_hidden"].requires_grad_()
    head = LinearHead(operands["student_weight"][shard], lora=(down, up, 2.0))
    teacher = operands["teacher_hidden"], operands["teacher_weight"][shard]
    loss(hidden, head, *teacher, problem.labels, student=Objective("jsd", ce_weight=0.5), **options).total.backward()
    return down.grad, up.grad, hidden.grad


def test_lora_on_a_sharded_head(ranks):
    truth = _lora(loss=linear_distillation_loss, dtype=torch.float64, backend="reference")
    plain = _lora(loss=linear_distillation_loss, backend="reference")
    up = torch.cat([rank["lora"][1] for rank in ranks])
    for down, _, hidden in (rank["lora"] for rank in ranks):
        for ours, other, expected in zip((down, up, hidden), plain, truth, strict=True):
            assert relative_error(ours, expected) <= 2 * relative_error(other, expected) + 1e-6


def _unknown_label(shard):
    problem, is_compiling = Problem(n=11, ignored=()), torch.compiler.is_compiling
    problem.labels[3] = 131
    torch.compiler.is_compiling = lambda: True  # as on a GPU: labels are not read beforehand
    try:
        return sharded(problem, shard, requires=(), **BOTH)[0]
    finally:
        torch.compiler.is_compiling = is_compiling


def test_a_label_outside_the_vocabulary_is_nan_where_it_cannot_be_looked_for(ranks):
    for values in (rank["unknown label"] for rank in ranks):
        assert values["student"].isnan()
        assert values["student_nll"].isnan().nonzero().tolist() == [[3]]


def _collectives(shard, workspace_bytes):
    """Number of all-reduces of a run in three chunks, by divergence and whether gradients are wanted."""
    counts, reduce = {}, dist.all_reduce
    for name in ("forward_kl", "jsd"):
        for requires in ((), GRADIENTS):
            calls = []
            dist.all_reduce = lambda *args, calls=calls, **options: (calls.append(1), reduce(*args, **options))
            options = {"student": name, "teacher": name, "workspace_bytes": workspace_bytes}
            sharded(Problem(n=11), shard, requires=requires, **options)
            counts[name, bool(requires)] = len(calls)
    dist.all_reduce = reduce
    return counts


def test_number_of_collectives(ranks):
    """Two a chunk; a third where gradients need an unknown slope sum; the values; and both hidden gradients."""
    expected = {
        ("forward_kl", False): 2 * 3 + 1,
        ("forward_kl", True): 2 * 3 + 1 + 2,
        ("jsd", False): 2 * 3 + 1,
        ("jsd", True): 3 * 3 + 1 + 2,
    }
    for rank in ranks:
        assert rank["collectives"] == expected


def _errors(rank, shard):
    """The messages of calls that must fail, on every rank."""
    problem = Problem()
    x, y = problem.operands["student_hidden"], problem.operands["teacher_hidden"]
    w, u = (problem.operands[f"{side}_weight"][shard] for side in ("student", "teacher"))
    other = u if rank else u[1:]
    few = problem.labels.clone()
    few[: 4 * (rank == 0)] = -100
    calls = {
        "split": lambda: vocab_parallel_distillation_loss(x, w, y, other),
        "tokens": lambda: vocab_parallel_distillation_loss(x, w, y, u, few),
        "workspace": lambda: vocab_parallel_distillation_loss(x, w, y, u, workspace_bytes=4096 + rank),
        "reduction": lambda: vocab_parallel_distillation_loss(x, w, y, u, reduction="none"),
        "no workspace": lambda: vocab_parallel_distillation_loss(x, w, y, u, workspace_bytes=0),
        "labels": lambda: vocab_parallel_distillation_loss(x, w, y, u, torch.full((7,), 131)),
    }
    messages = {}
    for name, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        messages[name] = str(error.value)
    return messages


@pytest.mark.parametrize(
    "name, message",
    [
        ("split", r"heads that are split alike.*got \[\d+, .*split both at the same token ids"),
        ("tokens", r"the same number of counted tokens on all ranks; got \[\d, 6"),
        ("workspace", r"the same workspace_bytes on all ranks; got \[4096, 4097"),
        ("reduction", "reduction to be mean or sum over a sharded vocabulary; got 'none'"),
        ("no workspace", "workspace_bytes > 0; got 0"),
        ("labels", r"labels in \[0, 131\).*got 131"),
    ],
)
def test_errors_are_raised_on_all_ranks(ranks, name, message):
    for rank in ranks:
        assert re.search(message, rank["errors"][name])


def test_without_a_process_group():
    with pytest.raises(ValueError, match=r"initialised process group.*init_process_group.*or linear_distillation_loss"):
        vocab_parallel_distillation_loss(torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(2, 4), torch.zeros(8, 4))


# --- whole heads: DDP and FSDP2 ----------------------------------------------------------------------------------


def _pair(folder):
    """The trainer's module: a student and a teacher with an online module, the same on every rank."""
    import tiny

    from okd import OKDConfig
    from okd.pair import StudentTeacher
    from okd.teachers import attach_online_module

    args = OKDConfig(use_cpu=True, output_dir=str(folder), student_divergence="jsd")
    teacher = attach_online_module(tiny.llama(seed=1, layers=3, hidden=48), args)
    torch.manual_seed(2)
    for name, parameter in teacher.named_parameters():
        if "lora_B" in name:  # LoRA starts at no change, where half of its gradients are zero
            torch.nn.init.normal_(parameter, std=0.2)
    return StudentTeacher(tiny.llama(), teacher, args).train()


def _batch(part=slice(None)):
    """A part of 5 examples as the collator makes it, and the number of response tokens of all of them."""
    import tiny

    from okd.data import Collator, encode

    collate, rows = Collator(tiny.EOS), encode(tiny.examples(5), tiny.tokenizer(), max_length=32).rows
    names = ("input_ids", "attention_mask", "positions", "targets")
    inputs = collate(rows[part])
    return {name: inputs[name] for name in names}, torch.tensor(len(collate(rows)["targets"]))


def _backward(module, batch, normalizer, world=1):
    """Gradients by name; `world` makes a sum over ranks of their mean, as the trainer does."""
    loss = module(**batch, normalizer=normalizer)
    (loss.total * world).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def _replicas(rank, world, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    batch, normalizer = _batch(slice(0, 2) if rank == 0 else slice(2, None))  # unequal numbers of tokens
    ddp = _backward(DistributedDataParallel(_pair(folder)), batch, normalizer, world)
    result = {"ddp": {name.removeprefix("module."): gradient for name, gradient in ddp.items()}}

    pair, mesh = _pair(folder), init_device_mesh("cpu", (world,))
    for layer in (*pair.student.model.layers, *pair.teacher.get_base_model().model.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(pair, mesh=mesh)  # both heads: whole while the pair's forward runs, which is where the loss is
    for step in ("fsdp", "fsdp, second step"):
        sharded_gradients = _backward(pair, batch, normalizer, world)
        result[step] = {name: gradient.full_tensor() for name, gradient in sharded_gradients.items()}
        pair.zero_grad()
    result["tokens"] = len(batch["targets"])
    return result


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    pair, (batch, normalizer) = _pair(folder), _batch()
    plain = _backward(pair, batch, normalizer)
    pair.zero_grad()
    truth = _backward(pair.double(), batch, normalizer)
    return run_ranks(_replicas, 2, folder, str(folder)), plain, truth


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp, second step"])
def test_ranks_get_the_gradients_of_the_whole_batch(replicas, how):
    """Each rank a part of the batch, and the number of tokens of all ranks as normalizer."""
    ranks, plain, truth = replicas
    assert ranks[0]["tokens"] != ranks[1]["tokens"], "else a mean over ranks would do as well"
    for rank in ranks:
        assert rank[how].keys() == truth.keys()
        for name, expected in truth.items():
            error, budget = relative_error(rank[how][name], expected), 2 * relative_error(plain[name], expected) + 1e-6
            assert error <= budget, f"{name}: relative error {error:.1e}, budget {budget:.1e}"
