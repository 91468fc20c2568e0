"""What runs say of themselves, read from their directories; as text, a table of before and after, and answers.

Every file may be missing or cut short: of a run that was killed or goes on, or of an earlier version.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

SEEDS = {"seed", "data_seed"}
PLACES = {"output_dir", "logging_dir", "run_name"}  # options that say where a run is, not what
# files of a run's directory
CONFIG, LOG, FIGURES = "config.yaml", "log.jsonl", "metrics.json"
BEFORE, REPORT = "before.json", "report.json"  # what was measured first, and the answers; what `okd.record` writes


@dataclass
class Run:
    """A run's directory.

    Attributes:
        options: config.yaml. log: entries of log.jsonl. figures: metrics.json. record: report.json (`okd.record`).
    """

    path: Path
    options: dict[str, Any] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def after(self) -> dict[str, Any]:
        return self.figures.get("after") or {}

    @property
    def samples(self) -> list[dict[str, Any]]:
        return [sample for sample in self.record.get("samples", []) if "prompt" in sample]

    @property
    def configuration(self) -> dict[str, Any]:
        """The options but for seeds and places."""
        return {name: value for name, value in self.options.items() if name not in SEEDS | PLACES}

    @property
    def steps(self) -> int:
        """That it has made, as far as it has said."""
        return self.figures.get("steps") or max((entry.get("step", 0) for entry in self.log), default=0)

    def points(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a key of the log, where it is finite. Keys of evaluations (`eval_...`) have those before
        and after the run, too."""
        entries = list(self.log)
        if key.startswith("eval_"):
            metric = key.removeprefix("eval_")
            entries.insert(0, {"step": 0, key: self.before.get(metric)})
            entries.append({"step": self.figures.get("steps"), key: self.after.get(metric)})
        found = {entry["step"]: entry[key] for entry in entries if _is_finite(entry.get(key)) and "step" in entry}
        return sorted(found.items())


def read_run(path: str | Path) -> Run:
    """Raises FileNotFoundError for a directory that holds no run."""
    path = Path(path)
    names = (CONFIG, LOG, FIGURES)
    if not any((path / name).is_file() for name in names):
        raise FileNotFoundError(
            f"{path}: expected the directory of a run, with {', '.join(names[:-1])} or {names[-1]}; got none of them: "
            "pass the --output-dir of okd train or okd demo"
        )
    figures, before = _json(path / FIGURES, {}), _json(path / BEFORE, [{}])
    return Run(
        path,
        yaml.safe_load((path / CONFIG).read_text()) if (path / CONFIG).is_file() else {},
        _lines(path / LOG),
        figures,
        figures.get("before") or before[0],
        _json(path / REPORT, {}),
    )


def _json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return default


def _lines(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:  # cut short where the run was killed, or is being written
            continue
    return entries


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class Metric(NamedTuple):
    key: str  # of `okd.evaluate`
    name: str
    better: str  # "lower": its change is a ratio; "higher": a difference
    decimals: int
    scale: float = 1.0
    unit: str = ""  # of a difference


METRICS = (
    Metric("forward_kl", "forward KL to the base teacher (nats)", "lower", 4),
    Metric("reverse_kl", "reverse KL to the base teacher (nats)", "lower", 4),
    Metric("perplexity", "perplexity", "lower", 2),
    Metric("top1_agreement", "top-1 agreement (%)", "higher", 1, 100, " pts"),
    Metric("rouge_l", "ROUGE-L", "higher", 1),
)

COLUMNS, INDENT = 100, 11  # of a sample: its width, and where its texts begin


def format_table(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> str:
    """The metrics of `okd.evaluate` that both have, as lines of "metric before after change better".

    A change is a ratio where lower is better, a difference where higher is. Raises ValueError if they share no metric.
    """
    lines = []
    for metric in METRICS:
        old, new = before.get(metric.key), after.get(metric.key)
        if old is None or new is None:
            continue
        old, new = metric.scale * old, metric.scale * new
        change, values = change_of(metric, old, new), (f"{value:.{metric.decimals}f}" for value in (old, new))
        lines.append((metric.name, *values, change, metric.better))
    if not lines:
        raise ValueError(
            f"expected a metric in common out of {', '.join(metric.key for metric in METRICS)}, got {sorted(before)} "
            f"and {sorted(after)}; pass the metrics of two calls of okd.evaluate"
        )
    lines.insert(0, ("metric", "before", "after", "change", "better"))
    w = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"{a:<{w[0]}}  {b:>{w[1]}}  {c:>{w[2]}}  {d:>{w[3]}}  {e}" for a, b, c, d, e in lines)


def change_of(metric: Metric, old: float, new: float) -> str:
    """Of scaled values."""
    if metric.better == "higher":
        return f"{new - old:+.{metric.decimals}f}{metric.unit}"
    return f"×{new / old:.2f}" if old else "n/a"


def format_samples(samples: Sequence[Mapping[str, Any]], count: int = 3) -> str:
    """`count` of a run's samples (`okd.record`), evenly spread: prompt, reference, the teacher's answer where there is
    one, and the student's before and after; lines are wrapped to 100 columns."""
    both = [sample for sample in samples if "before" in sample and "after" in sample]
    count = min(count, len(both))
    return "\n\n".join(_sample(both[i * len(both) // count]) for i in range(count))


def _sample(sample: Mapping[str, Any]) -> str:
    names = [name for name in ("prompt", "reference", "teacher") if name in sample]
    if sample.get("teacher") == sample["reference"]:
        names.remove("reference")
    fields = [_wrapped(name, sample[name]) for name in names]
    fields += [_wrapped(when, sample[when]["answer"]) for when in ("before", "after")]
    return "\n".join([f"[{sample['id']}]", *fields])


def _wrapped(label: str, text: str) -> str:
    """The label, and beside it the text: wrapped at the last column, its own line breaks kept."""
    lines = []
    for line in text.strip().splitlines() or ["(nothing)"]:
        lines += textwrap.wrap(line, COLUMNS - INDENT) or [""]
    return label + textwrap.indent("\n".join(lines), " " * INDENT)[len(label) :]
