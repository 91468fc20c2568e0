"""The demo's data, without a download: questions and answers from the docstrings of Python's standard library."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SKIPPED_PACKAGES = {"encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "turtledemo"}
C_MODULES = {"array", "binascii", "cmath", "math", "unicodedata", *sys.builtin_module_names} & sys.stdlib_module_names
PREFIXES = {"builtins": "", "posix": "os.", "nt": "os.", "posixpath": "os.path.", "genericpath": "os.path."}
SIGNATURES = re.compile(r"\A([\w.]+\(.*\)(\s*-+>.*)?:?\n\s*)+")  # "log(x, [base=math.e]) -> float" on the first lines


def stdlib_examples() -> list[dict[str, Any]]:
    """Questions on the standard library, "What does `os.path.join` do?", answered by its docstring's first paragraph.

    4,400 to 4,900 examples, by version of Python, without a download: sorted by id, the same in every process of one
    Python. Sources are parsed, not imported (C modules are). No answer occurs twice, so a split never shares one.
    """
    documented: dict[str, tuple[bool, str]] = {}
    for name, is_noun, docstring in [*_python_docstrings(), *_c_docstrings()]:
        documented.setdefault(name, (is_noun, docstring))
    examples: dict[str, dict[str, Any]] = {}  # by answer
    for name, (is_noun, docstring) in sorted(documented.items()):
        paragraph = re.split(r"\n\s*\n", SIGNATURES.sub("", inspect.cleandoc(docstring)), maxsplit=1)[0]
        answer = " ".join(paragraph.split())
        is_prose = answer[:1].isupper() and not answer.endswith(":") and ">>>" not in answer and "->" not in answer
        if is_prose and 20 <= len(answer) <= 600:
            prompt = f"What is `{name}`?" if is_noun else f"What does `{name}` do?"
            examples.setdefault(answer, {"id": name, "prompt": prompt, "completion": answer})
    return list(examples.values())


def _python_docstrings() -> Iterator[tuple[str, bool, str]]:
    """(name, is_noun, docstring) of public functions, classes and their members in modules written in Python."""
    root = Path(os.__file__).parent
    for top in sorted(sys.stdlib_module_names):
        for path in [*root.glob(f"{top}.py"), *sorted(root.glob(f"{top}/**/*.py"))]:
            parts = [part for part in path.relative_to(root).with_suffix("").parts if part != "__init__"]
            if any(part.startswith("_") or part in SKIPPED_PACKAGES for part in parts):
                continue
            module = ".".join(parts)
            found = [(PREFIXES.get(module, f"{module}."), node) for node in ast.parse(path.read_bytes()).body]
            for prefix, node in found:  # grows by the members of the classes found
                is_class = isinstance(node, ast.ClassDef)
                if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name[0] == "_":
                    continue
                if is_class:
                    found += [(f"{prefix}{node.name}.", member) for member in node.body]
                is_property = any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list)
                yield prefix + node.name, is_class or is_property, ast.get_docstring(node) or ""


def _c_docstrings() -> Iterator[tuple[str, bool, str]]:
    """The same of modules written in C: those within the interpreter, and a few known to do nothing on import."""
    for module in sorted(name for name in C_MODULES if not name.startswith("_")):
        found: list[tuple[str, Any]] = [(PREFIXES.get(module, f"{module}."), importlib.import_module(module))]
        for prefix, owner in found:  # grows by the classes found
            for name, member in vars(owner).items():
                is_class = isinstance(member, type) and member.__module__ == module
                is_function = inspect.isbuiltin(member) or inspect.ismethoddescriptor(member)
                is_hook = name.endswith("hook")  # made to be replaced, so it can differ from process to process
                if name.startswith("_") or is_hook or not (is_class or is_function):
                    continue
                if is_class:
                    found.append((f"{prefix}{name}.", member))
                yield prefix + name, is_class, member.__doc__ or ""
