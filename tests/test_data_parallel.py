"""Whole heads on several ranks: DDP, FSDP2, and heads whose rows FSDP2 has sharded, outside of a wrapped forward."""

import pytest
import torch
from problems import GRADIENTS, Problem, assert_as_good_as_the_reference, backward, relative_error, values_of
from ranks import run_ranks
from torch import nn

from okd_kernels import LinearHead, Objective, linear_distillation_loss, linear_topk

pytestmark = pytest.mark.slow

EPS = torch.finfo(torch.float32).eps


def pair_of(folder):
    """The trainer's module: a student and a teacher with an online module, the same on every rank."""
    import tiny

    from okd import OKDConfig
    from okd.online import Online, attach_online_module
    from okd.pair import StudentTeacher

    args = OKDConfig(use_cpu=True, output_dir=str(folder), student_divergence="jsd")
    teacher = attach_online_module(tiny.llama(seed=1, layers=3, hidden=48), args)
    torch.manual_seed(2)
    for name, parameter in teacher.named_parameters():
        if "lora_B" in name:  # LoRA starts at no change, where half of its gradients are zero
            torch.nn.init.normal_(parameter, std=0.2)
    return StudentTeacher(tiny.llama(), Online(teacher), args).train()


def batch_of(part=slice(None)):
    """A part of 5 examples as the collator makes it, and the totals of all of them."""
    import tiny

    from okd.data import Collator
    from okd.encoding import encode
    from okd.objectives import Totals

    collate, rows = Collator(tiny.EOS), encode(tiny.examples(5), tiny.tokenizer(), max_length=32).rows
    return collate(rows[part]), Totals.of([collate(rows)])


def gradients_of(module, batch, totals, world=1):
    """Gradients by name; `world` makes a sum over ranks of their mean, as the trainer does."""
    loss = module(batch, totals)
    (loss.total * world).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}


def replicas_of(rank, world, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    batch, totals = batch_of(slice(0, 2) if rank == 0 else slice(2, None))  # unequal numbers of tokens
    ddp = gradients_of(DistributedDataParallel(pair_of(folder)), batch, totals, world)
    result = {"ddp": {name.removeprefix("module."): gradient for name, gradient in ddp.items()}}

    pair, mesh = pair_of(folder), init_device_mesh("cpu", (world,))
    for layer in (*pair.student.model.layers, *pair.teacher.model.get_base_model().model.layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(pair, mesh=mesh)  # both heads: whole while the pair's forward runs, which is where the loss is
    for step in ("fsdp", "fsdp, second step"):
        sharded_gradients = gradients_of(pair, batch, totals, world)
        result[step] = {name: gradient.full_tensor() for name, gradient in sharded_gradients.items()}
        pair.zero_grad()
    result["tokens"] = len(batch["targets"])
    return result


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    pair, (batch, totals) = pair_of(folder), batch_of()
    plain = gradients_of(pair, batch, totals)
    pair.zero_grad()
    truth = gradients_of(pair.double(), batch, totals)
    return run_ranks(replicas_of, 2, folder, str(folder)), plain, truth


@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp, second step"])
def test_ranks_get_the_gradients_of_the_whole_batch(replicas, how):
    """Each rank a part of the batch, and the number of tokens of all ranks as normalizer."""
    ranks, plain, truth = replicas
    assert ranks[0]["tokens"] != ranks[1]["tokens"], "else a mean over ranks would do as well"
    for rank in ranks:
        assert rank[how].keys() == truth.keys()
        for name, expected in truth.items():
            error, budget = (
                relative_error(rank[how][name], expected),
                2 * relative_error(plain[name], expected) + 8 * EPS,
            )
            assert error <= budget, f"{name}: relative error {error:.1e}, budget {budget:.1e}"


# --- heads that are DTensors -----------------------------------------------------------------------------------------

BOTH = {"student": Objective("jsd", 0.7, 0.3), "teacher": Objective("forward_kl", 0.4, 0.6)}
N, WORLD = 11, 2
ROWS = slice(0, 4), slice(4, N)  # of the ranks, of which the second row is ignored, and the eighth
WAYS = ("module", "layer", "tensor", "replicated")


class Gathered(Problem):
    """A problem of which the ranks have done a part each: `run("ranks")` hands out what they come to."""

    def run(self, backend, *args, **options):
        return self.gathered if backend == "ranks" else super().run(backend, *args, **options)


def whole_problem():
    return Gathered(n=N, ignored=(2, 7))  # 131 rows: shards of 66 and 65


def sharded_heads(problem, way, mesh):
    """Both heads' (weight, bias), sharded, and the heads as they are passed."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    parameters, heads = {}, []
    for side in ("student", "teacher"):
        weight, bias = (problem.operands[f"{side}_{x}"] for x in ("weight", "bias"))
        if way in ("module", "layer"):
            layer = nn.Linear(weight.shape[1], len(weight))
            layer.load_state_dict({"weight": weight, "bias": bias})
            fully_shard(layer if way == "layer" else nn.Sequential(layer), mesh=mesh)
            parameters |= {f"{side}_weight": layer.weight, f"{side}_bias": layer.bias}
            heads.append(layer)
        else:
            placement = [Shard(0) if way == "tensor" else Replicate()]
            tensors = [nn.Parameter(distribute_tensor(x, mesh, placement)) for x in (weight, bias)]
            parameters |= {f"{side}_weight": tensors[0], f"{side}_bias": tensors[1]}
            heads.append(LinearHead(*tensors))
    return parameters, heads


def heads_work(rank, world):
    """way -> (values, gradients) of this rank's tokens; sharded gradients put together, and whether placed as asked."""
    from torch.distributed.device_mesh import init_device_mesh

    problem, mesh, found = whole_problem(), init_device_mesh("cpu", (world,)), {}
    rows, counted = ROWS[rank], int((problem.labels != -100).sum())
    for way in WAYS:
        parameters, heads = sharded_heads(problem, way, mesh)
        hidden = [problem.operands[f"{x}_hidden"][rows].clone().requires_grad_() for x in ("student", "teacher")]
        loss = linear_distillation_loss(
            *(hidden[0], heads[0], hidden[1], heads[1], problem.labels[rows]),
            **{**BOTH, "normalizer": counted / world, "workspace_bytes": 4096},
        )
        backward(loss)
        gradients = {name: x.grad.full_tensor() for name, x in parameters.items()}
        placed = all(x.grad.placements == x.placements for x in parameters.values())
        gradients |= {"student_hidden": hidden[0].grad / world, "teacher_hidden": hidden[1].grad / world}
        values = {name: x.detach() for name, x in values_of(loss).items()}
        found[way] = values, gradients, placed
        if way == "tensor":
            found["topk"] = linear_topk(hidden[0].detach(), heads[0], 5)
    return found


@pytest.fixture(scope="module")
def of_heads(tmp_path_factory):
    return run_ranks(heads_work, WORLD, tmp_path_factory.mktemp("heads"))


@pytest.mark.parametrize("way", WAYS)
def test_sharded_heads_outside_of_a_wrapped_forward(of_heads, way):
    """Each rank its own tokens, and the whole head: the mean over ranks, of losses and gradients, is one process's."""
    problem, runs = whole_problem(), [rank[way] for rank in of_heads]
    values = {
        name: torch.stack([run[0][name] for run in runs]).mean(0)
        if name in ("student", "teacher")
        else torch.cat([run[0][name] for run in runs])
        for name in runs[0][0]
    }
    gradients = {}
    for name in GRADIENTS:
        parts = [run[1][name] for run in runs]
        if name.endswith("hidden"):
            gradients[name] = torch.cat(parts)
        else:
            gradients[name] = parts[0]
            assert torch.equal(*parts), f"d{name} differs between ranks"
    assert all(placed for *_, placed in runs), "a gradient is placed as its parameter"
    problem.gathered = values, gradients
    assert_as_good_as_the_reference(problem, "ranks", **BOTH)


def test_topk_of_a_sharded_head(of_heads):
    problem = whole_problem()
    hidden, weight, bias = (problem.operands[f"student_{x}"] for x in ("hidden", "weight", "bias"))
    for rank, rows in zip(of_heads, ROWS, strict=True):
        expected = linear_topk(hidden[rows], LinearHead(weight, bias), 5)
        assert all(torch.equal(x, y) for x, y in zip(rank["topk"], expected, strict=True))
