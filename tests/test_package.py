"""What importing the packages does and does not do, and which way their imports point."""

import ast
import subprocess
import sys
from pathlib import Path

import okd
import okd_kernels

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
    code = "import sys; sys.modules['transformers'] = None; import okd_kernels, okd.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    last = result.stderr.strip().splitlines()[-1]
    assert last == "ImportError: okd expected transformers; got no such package: pip install 'okd-kernels[train]'"


def test_imports_point_one_way():
    found = set(imports("okd_kernels"))
    assert not {(f, m) for f, m in found if m == "okd" or m.startswith("okd.")}
    kernels = {"row_kernel.py", "torch_rows.py"}
    assert not {(f, m) for f, m in found if f in kernels and "reference" in m}
    assert not {(f, m) for f, m in found if f == "reference.py" and ("row_kernel" in m or "torch_rows" in m)}


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
    """`.item()` and its kind, and constructors that copy host data to a device: all behind a CPU check."""
    waits = {"item", "tolist", "nonzero", "new_tensor", "as_tensor", "tensor", "cpu", "synchronize"}
    found = {}
    for path in sorted((ROOT / "okd_kernels").glob("*.py")):
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        names = {f.attr for f in calls if isinstance(f, ast.Attribute)} & waits
        if names:
            found[path.name] = names
    assert found.pop("vocab_parallel.py"), "documented: it exchanges row counts once a call"
    assert found == {
        "ops.py": {"nonzero"},  # counted_rows
        "sparse.py": {"item"},  # error messages
        "tokens.py": {"item"},
    }
