"""What importing the packages does and does not do, and which way their imports point."""

import ast
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import okd
import okd_kernels
from okd_kernels import operator, problem

ROOT = Path(__file__).parent.parent


def imports(package):
    """(file name, imported module) of every import statement in a package."""
    for path in sorted((ROOT / package).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((path.name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield path.name, node.module
                yield from ((path.name, f"{node.module}.{alias.name}") for alias in node.names)


def test_importing_the_losses_is_light():
    """No transformers, and no CUDA context: a trainer may fork after the import."""
    code = (
        "import sys, okd_kernels, torch\n"
        "heavy = [m for m in ('transformers', 'peft', 'okd', 'matplotlib') if m in sys.modules]\n"
        "print(heavy, torch.cuda.is_initialized())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "[] False", result.stderr


def test_training_without_its_packages_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None; import okd_kernels, okd; okd.OKDTrainer"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    last = result.stderr.strip().splitlines()[-1]
    assert last == 'ImportError: okd expected transformers; got no such package: pip install "okd-kernels[train]"'


def test_imports_point_one_way():
    found = set(imports("okd_kernels"))
    assert not {(f, m) for f, m in found if m == "okd" or m.startswith("okd.")}
    kernels = {"row_kernels", "torch_rows"}
    assert {f"{name}.py" for name in kernels} < {f for f, _ in found}
    assert not {(f, m) for f, m in found if f.removesuffix(".py") in kernels and "reference" in m}
    assert not {(f, m) for f, m in found if f == "reference.py" and kernels & set(m.split("."))}
    # Data goes from the call to the rows; what stands further down knows nothing of what stands above.
    order = ["losses", "problem", "operator", "engine", "sides", "call", "heads"]
    for i, lower in enumerate(order):
        above = {f"okd_kernels.{name}" for name in order[:i]}
        assert not {m for f, m in found if f == f"{lower}.py"} & above, lower


def test_the_training_layer_uses_public_names_only():
    public = {f"okd_kernels.{name}" for name in okd_kernels.__all__} | {"okd_kernels"}
    reached = {m for _, m in imports("okd") if m.startswith("okd_kernels")}
    assert reached <= public


def test_public_names_exist_and_are_documented():
    for package in (okd, okd_kernels):
        for name in package.__all__:
            thing = getattr(package, name)
            if name not in ("METHODS", "DIVERGENCES"):
                assert thing.__doc__ and not thing.__doc__.startswith(f"{name}("), name


def test_what_would_synchronise_the_host_stands_where_only_a_cpu_comes():
    """`.item()` and its kind, numbers made of tensors, and constructors that copy host data to a device."""
    waits = {"item", "tolist", "nonzero", "new_tensor", "as_tensor", "tensor", "frombuffer", "cpu", "synchronize"}
    found = set()
    for path in sorted((ROOT / "okd_kernels").glob("*.py")):
        functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
        for function in functions:
            calls = [n.func for n in ast.walk(function) if isinstance(n, ast.Call)]
            names = {f.attr for f in calls if isinstance(f, ast.Attribute)} & waits
            names |= {f.id for f in calls if isinstance(f, ast.Name)} & {"bool", "int"}
            found |= {(path.stem, function.name, name) for name in names}
    assert found == {
        ("call", "check_labels", "item"),  # error messages, where the CPU holds what is read
        ("call", "check_sparse_targets", "item"),
        ("problem", "inverse_normalizer", "item"),  # of a CPU's tensor
        ("columns", "_within_bound", "tolist"),  # documented: a bound waits
        ("cpu", "empty_like", "frombuffer"),
        ("outcomes", "__post_init__", "int"),  # on a CPU
        ("targets", "_all_closed", "bool"),  # on a CPU
        ("torch_block", "fill", "bool"),  # on a CPU: `careful` elsewhere
        ("operator", "counted_rows", "nonzero"),  # documented: `compact`
        ("operator", "vocabulary_of", "int"),  # documented: with a group, ranks compare once a call what they do
        ("sharding", "shared_vocabulary", "tolist"),
        ("sharding", "shared_vocabulary", "frombuffer"),
    }


class Transfers(TorchDispatchMode):
    """Operations between devices, and those that need numbers on the host."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, result)) if isinstance(x, torch.Tensor)]
        copies = "copy" in str(function)  # else a CPU's scalar is an argument of the kernel
        devices = {x.device.type for x in tensors if x.dim() > 0 or copies}
        if len(devices) > 1 or any(name in str(function) for name in ("_local_scalar", "nonzero", "is_nonzero")):
            self.found.append(str(function))
        return result


@pytest.mark.parametrize(
    "options", [{}, {"labels": None}, {"temperature": 2.0, "target_mix": 0.5}, {"reduction": "none"}]
)
@pytest.mark.parametrize("tail", ["", "bucket", "renormalize"])
def test_no_loss_waits_for_its_device(tail, options, monkeypatch):
    """The device "meta", which has no numbers, stands for one: every copy from or to it shows, and so does a read."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # not known for it
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())

    def distil(*arguments):  # all gradients; not through the dispatcher, which would run no code for this device
        operands, spec = operator.arguments_of(arguments)
        learners = ("student", "teacher") if spec.teacher else ("student",)
        wanted = [name for name, x in operands._asdict().items() if x is not None and name.startswith(learners)]
        return operator._distil(*operands, *spec._replace(wanted=",".join(wanted)))

    monkeypatch.setattr(problem, "distil", distil)
    shapes = (6, 8), (37, 8), (6, 12), (37, 12)
    x, w, y, u = (torch.empty(shape, device="meta") for shape in shapes)
    labels, ids = (torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((6,), (6, 4)))
    options = {"labels": labels, "normalizer": None, "compact": False, "workspace_bytes": 1024, **options}
    if options.get("reduction") is None:
        options["normalizer"] = torch.empty((), device="meta")
    with torch.no_grad(), Transfers() as transfers:
        if tail:
            found = okd_kernels.linear_sparse_distillation_loss(x, w, ids, y[:, :4], tail=tail, **options)
        else:
            teacher = None if options.get("target_mix") else "reverse_kl"
            found = okd_kernels.linear_distillation_loss(x, w, y, u, student="jsd", teacher=teacher, **options)
    assert found.student.device.type == "meta" and transfers.found == []
