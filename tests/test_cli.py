"""The command line around its commands: without the extra, versions, what to do next, what others print."""

import logging
import os
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import tiny

from okd import cli
from okd.cli import main
from okd.quiet import quiet

ROOT = Path(__file__).parent.parent


def python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, **options)


def test_without_the_extra_every_command_says_what_to_install():
    """In one sentence; versions and help are there, and nothing slow is imported for them."""
    needed = {"evaluate": ["--student", "x", "--data", "y"], "generate": ["--model", "x", "--prompt", "y"]}
    words = [[name, *needed.get(name, ["x"] if name == "report" else [])] for name in cli.COMMANDS]
    code = (
        "import sys\n"
        f"for name in {cli.EXTRA!r}: sys.modules[name] = None\n"
        "from okd.cli import main\n"
        f"for words in {[*words, ['--version'], ['--help']]!r}:\n"
        "    try:\n        status = main(words)\n    except SystemExit as stop:\n        status = stop.code\n"
        "    print(*words[:1], status)\n"
        "print('torch' in sys.modules)"
    )
    done = python(code)
    said, lines = done.stdout.splitlines(), done.stderr.splitlines()
    assert said[: len(words)] == [f"{name} 2" for name in cli.COMMANDS], done.stderr
    assert said[len(words) : len(words) + 2] == [f"okd-kernels {version('okd-kernels')}", "--version 0"]
    assert "COMMAND" in said[len(words) + 2] and said[-2:] == ["--help 0", "False"]
    got = f'expected {", ".join(cli.EXTRA)}; got no such package: pip install "okd-kernels[train]"'
    assert lines == [f"okd {name}: error: {got}" for name in cli.COMMANDS]


def test_the_packages_of_the_extra_are_those_that_are_asked_for():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["train"]
    modules = {name.split(">")[0].split("[")[0].replace("-", "_") for name in named}
    assert {{"yaml": "pyyaml"}.get(name, name) for name in cli.EXTRA} == modules


def test_what_to_do_next_is_said_beside_the_output(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "lr=3e-4"
    tiny.save_inputs(folder)
    student, data = folder / "student", folder / "eval.jsonl"
    monkeypatch.setattr("okd.run.run", lambda *_: None)
    monkeypatch.setattr("okd.plan.measured_tflops", lambda _: 1.0)
    measured = ["--student", str(student), "--data", str(data), "--answers", "0"]
    models = ["--teacher", str(folder / "teacher"), "--student", str(student), "--use-cpu"]
    trained = [*models, "--train-data", str(data), "--eval-data", str(data), "--output-dir", str(tmp_path / "a run")]
    at = shlex.quote(str(tmp_path / "a run" / "student"))
    for words, expected in (
        (["train", "okd", *trained], f'okd generate --model {at} --prompt "..."\n      okd evaluate --student {at} '
         f"--teacher {folder / 'teacher'} --data {data}"),
        (["plan", "okd", *models], f"okd train okd {' '.join(models)} --train-data DATA.jsonl"),
        (["generate", "--model", str(student), "--prompt", "w2 w3"], f"okd evaluate --student {student} --data "),
        (["evaluate", *measured], f"okd generate --model {student}"),
        (["env"], "okd demo"),
    ):  # fmt: skip
        assert main(words) == 0
        said = capsys.readouterr()
        assert expected in said.err.partition("next: ")[2] and "next:" not in said.out


def test_the_messages_left_out_are_these_alone(caplog):
    quiet()
    for name, message in (
        ("torchao", "Failed to load /lib/_C.so: no such symbol"),
        ("torchao", "something is wrong"),
        ("torch.utils._pytree", "%s is an Enum subclass. Calling register_constant() is deprecated"),
        ("okd.checks", "Failed to load register_constant"),
    ):
        logging.getLogger(name).warning(message)
    assert [r.getMessage() for r in caplog.records] == ["something is wrong", "Failed to load register_constant"]


@pytest.mark.slow
def test_a_log_file_has_lines_of_the_run_alone(tmp_path):
    tiny.save_inputs(tmp_path)
    words = ["train", *tiny.train_arguments(tmp_path, tmp_path / "run", method="okd")[1:]]
    shown = [word for i, word in enumerate(words) if "--disable-tqdm" not in (word, words[i - 1])]
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = python(f"import sys; from okd.cli import main; sys.exit(main({shown!r}))", env=environment)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr + done.stdout and "step 1 of" in done.stdout
    first, *others = done.stderr.splitlines()
    assert first.startswith("student: ") and others[0].startswith("next: okd generate"), done.stderr


def test_the_wheel_holds_the_packages_and_their_files():
    wheel = pytest.importorskip("hatchling.builders.wheel")
    found = {file.distribution_path for file in wheel.WheelBuilder(str(ROOT)).recurse_included_files()}
    expected = {
        str(path.relative_to(ROOT))
        for package in ("okd", "okd_kernels")
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert found == expected
    assert {"okd/py.typed", "okd_kernels/py.typed", "okd/launch/zero3.yaml", "okd/report.html.j2"} <= found
