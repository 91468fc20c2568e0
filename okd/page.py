"""report.html: what one run says, or several beside one another, in one file that needs nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from okd.curves import SERIES, panels
from okd.durable import write_whole
from okd.report import METRICS, Metric, Run, change_of, read_run

PAGE, COMPARISON = "report.html", "comparison.html"
TEMPLATE = Path(__file__).with_name("report.html.j2")
# Characters of a text, tokens of an answer, answers of students: the page stays below 1 MB.
LONGEST, MOST_TOKENS, MOST_ANSWERS = 2000, 256, 24
MODELS = ("student", "student_layers", "teacher", "teachers", "train_data", "eval_data")
GIB = 2**30
Groups = Mapping[str, Sequence[Run]]


def write_page(directories: Sequence[str | Path], output: str | Path) -> None:
    """Of these runs. Raises FileNotFoundError for a directory that holds none."""
    write_whole(Path(output), page([read_run(directory) for directory in directories]))


def page(runs: Sequence[Run]) -> str:
    """Runs whose options differ in their seeds alone are one configuration: a mean, and its deviation."""
    groups, (first, *_) = grouped(runs), runs
    asked = answers(groups)
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"cut": cut, "percent": lambda x: f"{100 * x:.0f} %", "gib": lambda x: f"{x / GIB:.1f} GiB"}
    return environment.from_string(TEMPLATE.read_text()).render(
        runs=runs,
        groups=groups,
        run=first,
        is_one=len(groups) == 1,
        title=" and ".join(groups) if len(groups) < 4 else f"{len(groups)} configurations",
        panels=panels(groups),
        colors={name: f"--c{SERIES[i % len(SERIES)]:02x}" for i, name in enumerate(groups)},
        what=what_ran(first),
        options=first.record.get("options") or first.configuration,
        differing=differing(groups),
        changes=[row for metric in METRICS if (row := change(metric, runs))],
        halves=[cells for metric in METRICS if (cells := half(metric, runs))],
        compared=compared(groups),
        answers=asked,
        colored=any(side.get("tokens") for sample in asked for side in sample["sides"].values()),
        spent=spent(first),
        state=state(first),
        most_tokens=MOST_TOKENS,
        heat=lambda nats: 1 - math.exp(-max(nats, 0.0)),
    )


def grouped(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by the name of their configuration: its method where that tells them apart, else its first directory."""
    groups: list[list[Run]] = []
    for run in runs:
        same = next((g for g in groups if run.options and g[0].configuration == run.configuration), None)
        if same is None:
            groups.append([run])
        else:
            same.append(run)
    for name in (_method, lambda run: run.path.resolve().name, lambda run: str(run.path)):
        names = [name(group[0]) for group in groups]
        if len(groups) > 1 and all(names) and len(set(names)) == len(groups):
            break
    if len(groups) == 1:
        names = [groups[0][0].path.resolve().name]
    return dict(zip(names, groups, strict=True))


def _method(run: Run) -> str:
    return str(run.figures.get("method") or run.options.get("method") or "")


def what_ran(run: Run) -> dict[str, Any]:
    record, machine = run.record, dict(run.record.get("machine", {}))
    found: dict[str, Any] = {"method": " · ".join(filter(None, (_method(run), record.get("summary"))))}
    found |= {name.replace("_", " "): run.options.get(name) for name in MODELS}
    found["parameters"] = {name: f"{count:,}" for name, count in record.get("parameters", {}).items()}
    speed = record.get("tokens_per_second", {})
    found["answers, tokens/s"] = {name: f"{x:.1f}" for name, x in speed.items()}
    found["versions"] = record.get("versions") or run.figures.get("versions")
    sizes = {name: f"{machine.pop(name) / GIB:.0f} GiB" for name in ("memory", "GPU memory") if name in machine}
    found["machine"] = machine | sizes
    found["directory"] = str(run.path)
    return {name: _text(value) for name, value in found.items() if value}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def state(run: Run) -> str:
    steps = f"{run.steps:,} steps"
    if not run.figures:
        return f"not finished: {steps} logged"
    seconds = run.figures.get("seconds")
    whole = seconds.get("all") if isinstance(seconds, Mapping) else seconds
    return steps if whole is None else f"{steps} in {whole:,.0f} s"


def differing(groups: Groups) -> dict[str, list[str]]:
    """Options that are not the same in all groups: what each has."""
    configurations = [runs[0].configuration for runs in groups.values()]
    names = dict.fromkeys(name for one in configurations for name in one)
    values = {name: [_text(one.get(name, "default")) for one in configurations] for name in names}
    return {name: found for name, found in values.items() if len(set(found)) > 1}


def mean(metric: Metric, found: Sequence[Mapping[str, Any]]) -> tuple[float, str] | None:
    """Over runs: the mean, and as text, with the deviation over them, or over the seeds of the only one's answers."""
    held = [one for one in found if isinstance(one.get(metric.key), int | float)]
    if not held:
        return None
    values = [metric.scale * one[metric.key] for one in held]
    spread = held[0].get(f"{metric.key}_std") if len(held) == 1 else None
    if len(held) > 1 and all(map(math.isfinite, values)):
        spread = statistics.stdev(values)
    text = f"{statistics.fmean(values):.{metric.decimals}f}"
    return statistics.fmean(values), text if spread is None else f"{text} ± {spread:.{metric.decimals}f}"


def change(metric: Metric, runs: Sequence[Run]) -> dict[str, str] | None:
    """A row of before and after; the latter may be to come."""
    before, after = (mean(metric, found) for found in ([r.before for r in runs], [r.after for r in runs]))
    if before is None and after is None:
        return None
    row = {"name": metric.name, "better": metric.better}
    row |= {"before": before[1] if before else "–", "after": after[1] if after else "–"}
    return row | {"change": change_of(metric, before[0], after[0]) if before and after else ""}


def half(metric: Metric, runs: Sequence[Run]) -> list[str] | None:
    """A row of easy tokens before and after, and hard ones."""
    cells = [
        mean(metric._replace(key=f"{metric.key}_{kind}"), found)
        for kind in ("easy", "hard")
        for found in ([r.before for r in runs], [r.after for r in runs])
    ]
    return [metric.name, *(cell[1] if cell else "–" for cell in cells)] if any(cells) else None


def compared(groups: Groups) -> tuple[list[str], dict[str, list[str]]]:
    """Names of columns, and by group its cells: the metrics after, and what it took."""
    columns = [metric for metric in METRICS if any(metric.key in run.after for runs in groups.values() for run in runs)]
    rows = {}
    for name, runs in groups.items():
        cells = [mean(metric, [run.after for run in runs]) for metric in columns]
        rates = [value for run in runs for _, value in run.points("tokens_per_second")]
        taken = [s["training"] for run in runs if isinstance(s := run.figures.get("seconds"), dict) and "training" in s]
        costs = [f"{statistics.fmean(taken):,.0f}" if taken else "–"]
        costs += [f"{statistics.fmean(rates):,.0f}" if rates else "–", str(len(runs))]
        rows[name] = [*(cell[1] if cell else "–" for cell in cells), *costs]
    return [*(metric.name for metric in columns), "training (s)", "tokens/s", "runs"], rows


def answers(groups: Groups) -> list[dict[str, Any]]:
    """Prompts of the first run, and what stands side by side: the answers of its teacher, of its student before and
    after; of several configurations, of each one's student after, in its first run, where at least two have one."""
    (first, *_), *others = groups.values()
    found = []
    for sample in first.samples:
        same = {name: _same_prompt(sample, runs[0].samples) for name, runs in groups.items()}
        if others:
            students = {name: one["after"] for name, one in same.items() if "after" in one}
        else:
            students = {f"Student {when}": sample[when] for when in ("before", "after") if when in sample}
        teachers = {one["teacher"] for one in same.values() if "teacher" in one}
        teacher = {"Teacher": {"answer": teachers.pop()}} if len(teachers) == 1 else {}
        if not others or len(students) > 1:
            found.append({**sample, "sides": teacher | students})
    return found[: MOST_ANSWERS // (len(groups) if others else 2)]


def _same_prompt(sample: Mapping[str, Any], samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    named = ("id", "prompt")
    return next((one for one in samples if all(one[name] == sample[name] for name in named)), {})


def spent(run: Run) -> list[tuple[str, float, float]]:
    """(part, seconds, share of all), the largest first."""
    seconds = {part: x for part, x in run.record.get("seconds", {}).items() if x >= 0.05}
    total = sum(seconds.values())
    return [(part, x, x / total) for part, x in sorted(seconds.items(), key=lambda item: -item[1])]


def cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
