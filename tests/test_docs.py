"""The documents' text: what a user is told to type is parsed, and what is said of the packages held against them."""

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shlex
import tomllib
from pathlib import Path
from unittest import mock

import pytest
import yaml

import okd
import okd_kernels
from benchmarks.plot_peers import CANDIDATES
from okd import METHODS, OKDConfig, cli, examples
from okd.config import TrainingArguments
from okd.run import RunConfig
from okd_kernels import DIVERGENCES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
BLOCKS = [(name, language, code) for name, text in TEXTS.items() for _, language, code in BLOCK.findall(text)]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
OF_OTHERS = {"--nproc-per-node", "--no-deps", "--dist", "--strict", "--enable-lora", "--max-lora-rank"} | {
    "--weight-transfer-config", "--config_file", "--help",
}  # fmt: skip


def commands():
    """(page, words) of every shell command, those after && too."""
    for name, language, code in BLOCKS:
        if language == "bash":
            for line in code.replace("\\\n", " ").splitlines():
                assert "`" not in re.sub(r"'[^']*'", "", line), f"{name}: a shell runs what stands in backticks: {line}"
                words = shlex.split(line, comments=True)
                while "&&" in words:
                    at = words.index("&&")
                    yield name, words[:at]
                    words = words[at + 1 :]
                if words:
                    yield name, words


def ours(words):
    """The arguments of `okd`, however it is started; None: another program."""
    words = [word for i, word in enumerate(words) if "=" not in word or i > 0]  # VARIABLE=value before the program
    if words[0] == "okd":
        return words[1:]
    return words[words.index("okd.cli") + 1 :] if "okd.cli" in words else None


OURS = [(name, ours(words)) for name, words in commands() if ours(words)]


def test_blocks_are_of_known_languages():
    assert {language for _, language, _ in BLOCKS} <= {"python", "bash", "json", "yaml", "text"}
    assert sum(text.count("```") for text in TEXTS.values()) == 2 * len(BLOCKS)


@pytest.mark.parametrize("name, words", OURS, ids=[f"{name}:{' '.join(words)[:40]}" for name, words in OURS])
def test_okd_takes_the_command(name, words, monkeypatch, capsys):
    seen = []

    def record(options, rest):
        if options.command in ("train", "plan", "cache"):
            seen.append(cli.parse_train([*rest, "--use-cpu"]))
        else:
            seen.append(options)

    add_arguments, _, *others = cli.COMMANDS[words[0]]
    monkeypatch.setitem(cli.COMMANDS, words[0], (add_arguments, record, *others))
    try:
        with mock.patch.dict(os.environ):  # accelerate's options of --shard
            assert cli.main(words) == 0 and len(seen) == 1
    except SystemExit:
        pytest.fail(f"{name}: {' '.join(words)}: {capsys.readouterr().err}")


def test_other_commands_name_what_exists():
    found = set()
    for name, words in commands():
        if ours(words):
            continue
        words = [word for i, word in enumerate(words) if "=" not in word or i > 0]
        found.add(words[0])
        for extras in re.findall(r"\[([\w,]+)\]", " ".join(words) if words[0] == "pip" else ""):
            assert set(extras.split(",")) <= set(EXTRAS), name
        for word in words[1:]:
            if re.fullmatch(r"(tests|benchmarks|okd|docs|\.ci)/[\w./-]+", word):
                assert (ROOT / word).exists(), f"{name}: {word}"
    assert found <= {"pip", "pytest", "python", "ruff", "mypy", "mkdocs", "bash", ".", "vllm", "twine", "git"}


def test_options_in_the_text_exist():
    known = {f.name for config in (RunConfig, OKDConfig) for f in dataclasses.fields(config)}
    for add_arguments, *_ in cli.COMMANDS.values():
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        known |= {action.dest for action in parser._actions}
    known |= {"config", "device", "dry_run", "version"}
    for name, text in TEXTS.items():
        if name != "CONTRIBUTING.md":
            for option in set(re.findall(r"(?<![\w-])--[a-z][a-z_-]+[a-z]", text)) - OF_OTHERS:
                assert option[2:].replace("-", "_") in known, f"{name}: {option}"


def test_data_of_the_page_are_examples():
    lines = [line for _, language, code in BLOCKS if language == "json" for line in code.splitlines()]
    assert [examples._shape(json.loads(line)) for line in lines] == ["messages", "prompt", "text"]
    assert all(isinstance(yaml.safe_load(code), dict) for _, language, code in BLOCKS if language == "yaml")


def test_links_lead_somewhere():
    """As a code host has them; `mkdocs build --strict` checks the site's."""

    def anchors(page):
        headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.M)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    for page in PAGES:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for path, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]+))?\)", prose):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {path}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {path}#{anchor}"


# --- what the site fills in


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(table, name):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")]
    return line


def test_every_table_is_used_and_every_marker_known(hooks):
    marked = re.findall(r"<!-- table: (\w+) -->", "".join(TEXTS.values()))
    assert sorted(marked) == sorted(hooks.TABLES)


def test_table_of_divergences(hooks):
    table = hooks.divergences()
    for name, entry in DIVERGENCES.items():
        for parameter, default in entry.parameters.items():
            assert f"`{parameter}` = {default}" in row(table, name)
        for _, limit in entry.limits:
            assert f": `{limit}`" in row(table, name)
    assert "DistiLLM-2, [arXiv 2503.07067]" in row(table, "skew_reverse_kl_detached")


def test_table_of_methods_and_the_page_that_explains_them(hooks):
    table = hooks.methods()
    for name, method in METHODS.items():
        assert method.left_out in row(table, name) and f"`{method.responses.__name__}`" in row(table, name)
    assert "`lora` minimises 0.1 `forward_kl` + 0.9 CE" in row(table, "okd")
    heads = re.findall(r"^\* (`.*?):", TEXTS["docs/explanation/methods.md"], flags=re.M | re.DOTALL)
    named = [name for head in heads for name in re.findall(r"`(\w+)`", head)]
    assert sorted(named) == sorted(METHODS)


def test_table_of_options(hooks):
    table = hooks.options()
    theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
    for config in (RunConfig, OKDConfig):
        for field in dataclasses.fields(config):
            if field.name not in theirs:
                assert field.metadata["help"][:20].split("[")[0].split("|")[0] in row(table, field.name)
    assert "`0.0002`" in row(table, "learning_rate") and "above 0" in row(table, "temperature")


@pytest.mark.parametrize("package", [okd, okd_kernels])
def test_reference_has_every_public_name(hooks, package):
    written = re.findall(r"::: ([\w.]+)", hooks.TABLES[package.__name__]())
    constants = {"METHODS", "DIVERGENCES"}
    assert {f"{package.__name__}.{name}" for name in set(package.__all__) - constants} == set(written)
    assert all(f"`{name}`" in TEXTS[f"docs/reference/{package.__name__}.md"] for name in constants & {*package.__all__})


def test_links_on_the_site(hooks):
    page = ROOT / "docs" / "how-to" / "data.md"
    assert hooks.relative("../../benchmarks/RESULTS.md", page) == "../benchmarks/RESULTS.md"
    assert hooks.relative("../../README.md", page) == "../index.md"
    assert hooks.relative("docs/how-to/data.md", ROOT / "README.md") == "how-to/data.md"
    assert hooks.relative("nowhere.md", page) == "nowhere.md"


def test_the_picture_has_the_measured_numbers():
    picture = (ROOT / "docs" / "images" / "loss-h100.svg").read_text()
    results = json.loads((ROOT / "benchmarks" / "results" / "gpu-loss.json").read_text())["results"]
    shown = [c for r in results for c in r["candidates"] if c["name"] in CANDIDATES]
    expected = [f"{c['over_floor']:.2f} ×" for c in shown] + [f"{c['extra_bytes'] / 2**30:.1f} GiB" for c in shown]
    assert sorted(re.findall(r">([\d.]+ (?:×|GiB))<", picture)) == sorted(expected)
