"""What mkdocs adds to these pages: files from beside docs/, and tables of what the packages know.

A page links to files as they lie in the repository; on the site README.md is the front page, and whatever else is
linked from outside docs/ keeps its path. `<!-- table: NAME -->` becomes one of `TABLES`.
"""

import dataclasses
import inspect
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BESIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md", "benchmarks/results/*.png")
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)")


def on_files(files, config):
    from mkdocs.structure.files import File  # the tables are tested without mkdocs

    for path in (p for pattern in BESIDE for p in sorted(ROOT.glob(pattern))):
        files.append(File.generated(config, site_path(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    source = Path(page.file.abs_src_path)
    markdown = LINK.sub(lambda link: relative(link[0], source), markdown)
    return re.sub(r"<!-- table: (\w+) -->", lambda marker: TABLES[marker[1]](), markdown)


def site_path(path: Path) -> str:
    inside = path.relative_to(ROOT).as_posix()
    return "index.md" if inside == "README.md" else inside.removeprefix("docs/")


def relative(link: str, source: Path) -> str:
    """The link as the site has it; one that leads to no file stays, for mkdocs to complain of."""
    target = Path(os.path.normpath(source.parent / link))
    if not target.exists() or ROOT not in target.parents:
        return link
    return os.path.relpath(site_path(target), Path(site_path(source)).parent)


def divergences() -> str:
    from okd_kernels import DIVERGENCES

    rows = []
    for name, entry in DIVERGENCES.items():
        limits = [
            f"{', '.join(f'{k} = {v:g}' for k, v in zip(entry.parameters, at, strict=True))}: `{other}`"
            for at, other in entry.limits
        ]
        parameters = ", ".join(f"`{k}` = {v:g}" for k, v in entry.parameters.items())
        source = re.search(r"\(([^()]*\d{4}[^()]*)\)", entry.formula.__doc__ or "")
        rows.append((f"`{name}`", entry.definition, parameters, "; ".join(limits), source[1] if source else ""))
    return table(("name", "D", "parameters", "limits", "source"), rows)


def methods() -> str:
    from okd import METHODS, objectives

    rows = []
    for name, m in METHODS.items():
        parts = [] if m.fixed_divergence or not m.student.weight else [form(m.student)]
        parts += [] if m.loss is objectives.divergence else [first_line(m.loss)]
        responses = f"`{m.responses.__name__}`"
        responses += f", at {m.student_share:g} of the steps" if m.student_share < 1 else ""
        if m.takes_several:
            teacher = "several, frozen"
        elif m.teacher is not None:
            teacher = f"`{m.online_module}` minimises {form(m.teacher)}{', in turns' if m.alternating else ''}"
        else:
            teacher = "frozen" if m.needs_teacher else "none"
        rows.append((f"`{name}`", m.summary, responses, "; ".join(parts), teacher, m.left_out))
    return table(("preset", "what", "responses", "D; student minimises", "teacher", "left out"), rows)


def policies() -> str:
    from okd import METHODS

    found = {m.responses.__name__: first_line(m.responses) for m in METHODS.values()}
    return table(("responses", "who writes"), [(f"`{name}`", text) for name, text in found.items()])


def options() -> str:
    """Every group of options that `OKDConfig` and `RunConfig` inherit, and their own."""
    from okd.config import OKDConfig, TrainingArguments
    from okd.run import RunConfig

    parts = []
    for config in (RunConfig, OKDConfig):
        parts.append(f"## {config.__name__}\n\n{first_line(config)}\n\n{fields(config, set(vars(config)))}")
        for group in (base for base in config.__bases__ if base is not TrainingArguments):
            title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", group.__name__).capitalize()
            parts.append(f"### {title}\n\n{first_line(group)}\n\n{fields(group)}")
    return "\n\n".join(parts)


def fields(group: type, own: set[str] | None = None) -> str:
    rows = []
    for field in dataclasses.fields(group):
        if own is not None and (field.name not in own or "help" not in field.metadata):
            continue
        default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
        text = field.metadata["help"]
        rows.append((f"`{field.name}`", "" if default is None else f"`{default}`", text + limits(text)))
    return table(("option", "default", ""), rows)


def limits(text: Any) -> str:
    least, above, most, choices = (getattr(text, name, None) for name in ("least", "above", "most", "choices"))
    bounds = [f"at least {least}" if least is not None else "", f"above {above}" if above is not None else ""]
    bounds += [f"at most {most}" if most not in (None, float("inf")) else ""]
    bounds += [f"one of {', '.join(choices)}" if choices and not all(c in text for c in choices) else ""]
    found = ", ".join(bound for bound in bounds if bound)
    return f" ({found})" if found else ""


def commands() -> str:
    from okd.cli import COMMANDS

    return table(("command", ""), [(f"`okd {name}`", what) for name, (_, _, what) in COMMANDS.items()])


def names(package: str) -> str:
    """mkdocstrings' directive for each public name."""
    public = __import__(package).__all__
    return "\n\n".join(f"::: {package}.{name}" for name in public if name.upper() != name)


def form(objective: Any) -> str:
    parameters = "".join(f", {k} = {v:g}" for k, v in objective.parameters.items())
    weight = "" if objective.weight == 1 else f"{objective.weight:g} "
    ce = "" if not objective.ce_weight else f" + {objective.ce_weight:g} CE".replace(" 1 CE", " CE")
    return f"{weight}`{objective.divergence}`{parameters}{ce}"


def first_line(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(cell(text) for text in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(text: str) -> str:
    text = text if "`" in text else text.replace("[", "\\[")
    text = text.replace("||", "‖").replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return re.sub(r"(?:arXiv )?\b(\d{4}\.\d{5})\b", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


TABLES = {
    "divergences": divergences,
    "methods": methods,
    "policies": policies,
    "options": options,
    "commands": commands,
    "okd": lambda: names("okd"),
    "okd_kernels": lambda: names("okd_kernels"),
}
