"""What the runs of `benchmarks.methods` say: tables over seeds, paired differences with their intervals, curves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COLUMNS: dict[str, tuple[str, Callable[[dict[str, Any]], float | None], str]] = {  # title, of a result, format
    "rouge_l": ("ROUGE-L", lambda r: r["metrics"]["rouge_l"], ".2f"),
    "sampled_rouge_l": ("sampled ROUGE-L", lambda r: r["metrics"].get("sampled_rouge_l"), ".2f"),
    "forward_kl": ("KL(p‖q)", lambda r: r["metrics"]["forward_kl"], ".4f"),
    "reverse_kl": ("KL(q‖p)", lambda r: r["metrics"]["reverse_kl"], ".4f"),
    "top1_agreement": ("top-1 %", lambda r: 100 * r["metrics"]["top1_agreement"], ".1f"),
    "ce": ("CE", lambda r: math.log(r["metrics"]["perplexity"]), ".4f"),
    "lowest_ce": ("curve's lowest CE", lambda r: min((ce for *_, ce in r.get("curve", ())), default=None), ".4f"),
    "teacher_shift": ("KL(p‖online p)", lambda r: r.get("teacher", {}).get("teacher_shift"), ".4f"),
    "teacher_ce": ("online p's CE", lambda r: r.get("teacher", {}).get("online_teacher_nll"), ".4f"),
    "steps": ("steps", lambda r: r["steps"], ".0f"),
    "step_s": ("s/step", lambda r: r["step_s"], ".2f"),
    "train_s": ("train s", lambda r: r["train_s"], ".1f"),
    "generating": ("gen. %", lambda r: 100 * r["generating_share"], ".0f"),
    "peak": ("MiB", lambda r: r["peak_bytes"] / 2**20, ".0f"),
}
COMPARED = ("ce", "rouge_l", "sampled_rouge_l", "forward_kl", "top1_agreement")  # whose paired differences are told
REFERENCE = "forward_kd"
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 1 to 9 degrees of freedom


def aggregate(runs: list[dict[str, Any]]) -> dict[str, tuple[float, float | None]]:
    """(mean, standard deviation over seeds) of each column that all runs have; a single seed has no deviation."""
    found = {name: [column(run) for run in runs] for name, (_, column, _) in COLUMNS.items()}
    values = {name: [x for x in xs if x is not None] for name, xs in found.items() if None not in xs}
    return {name: (statistics.fmean(x), statistics.stdev(x) if len(x) > 1 else None) for name, x in values.items()}


def reference_of(variants: Sequence[str]) -> str:
    return next((v for v in variants if v.partition(":")[0] == REFERENCE), variants[0])


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half of its 95 % interval by Student's t; a single value has none.

    From 11 values on t is expanded to second order (Abramowitz & Stegun 26.7.5), at most 0.12 % too small.
    """
    n = len(values)
    if n < 2:
        return statistics.fmean(values), None
    z = statistics.NormalDist().inv_cdf(0.975)
    expansion = z + (z**3 + z) / (4 * (n - 1)) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * (n - 1) ** 2)
    t = T_975[n - 2] if n - 2 < len(T_975) else expansion
    return statistics.fmean(values), t * statistics.stdev(values) / n**0.5


def differences(rows: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of each method with runs beside the reference's: `seeds` that both have, and `interval` of each column's paired
    difference."""
    reference = {run["seed"]: run for run in rows[reference_of(list(rows))]}
    found: dict[str, dict[str, Any]] = {}
    for variant, runs in rows.items():
        pairs = [(run, reference[run["seed"]]) for run in runs if run["seed"] in reference]
        if not pairs or variant == reference_of(list(rows)):
            continue
        found[variant] = {"seeds": [run["seed"] for run, _ in pairs]}
        for name in COMPARED:
            column = COLUMNS[name][1]
            values = [(column(a), column(b)) for a, b in pairs]
            if all(None not in pair for pair in values):
                found[variant][name] = interval([a - b for a, b in values])
    return found


def table_of_differences(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown; bold where the interval excludes 0."""
    lines = [
        f"| less {reference_of(list(rows))} | seeds | " + " | ".join(COLUMNS[name][0] for name in COMPARED) + " |",
        "|---|" + "---:|" * (len(COMPARED) + 1),
    ]
    for variant, found in differences(rows).items():
        cells = []
        for name in COMPARED:
            mean, half = found.get(name, (None, None))
            cell = _cell(mean, half, f"+{COLUMNS[name][2]}")
            cells.append(f"**{cell}**" if half is not None and abs(mean) > half else cell)
        lines.append("| " + " | ".join([variant, str(len(found["seeds"])), *cells]) + " |")
    return "\n".join(lines)


def _cell(mean: float | None, deviation: float | None, form: str) -> str:
    if mean is None:
        return ""
    return f"{mean:{form}}" if deviation is None else f"{mean:{form}} ± {deviation:{form.lstrip('+')}}"


def table(title: str, rows: dict[str, list[dict[str, Any]]], baselines: dict[str, dict[str, Any]]) -> str:
    """Markdown; a row for each method, mean ± deviation over its seeds."""
    with_deviation = ("rouge_l", "sampled_rouge_l", "forward_kl", "reverse_kl", "top1_agreement", "ce")
    lines = [
        f"{title}\n",
        "| " + " | ".join(["method", "seeds", *(t for t, _, _ in COLUMNS.values())]) + " |",
        "|---|" + "---:|" * (len(COLUMNS) + 1),
    ]
    for name, result in baselines.items():
        cells = [_cell(f(result), None, form) if k in with_deviation else "" for k, (_, f, form) in COLUMNS.items()]
        lines.append("| " + " | ".join([f"*{name}*", "", *cells]) + " |")
    for variant, runs in rows.items():
        if not runs:
            lines.append(f"| {variant} | 0 | failed |" + " |" * (len(COLUMNS) - 1))
            continue
        cells = []
        values = aggregate(runs)
        for name in COLUMNS:
            mean, deviation = values.get(name, (None, None))
            cells.append(_cell(mean, deviation if name in with_deviation else None, COLUMNS[name][2]))
        lines.append("| " + " | ".join([variant, str(len(runs)), *cells]) + " |")
    return "\n".join(lines)


def plot(tables: dict[str, dict[str, list[dict[str, Any]]]], start: dict[str, Any], path: Path) -> None:
    """KL to the base teacher and CE on the held-out subset over training time: mean over seeds, and their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(tables), 8.4), layout="constrained")
    labels = {2: "KL(base teacher ‖ student), nats per token", 3: "CE of the references, nats per token"}
    for i, (title, rows) in enumerate(tables.items()):
        for j, (measure, label) in enumerate(labels.items()):
            axes = figure.add_subplot(2, len(tables), j * len(tables) + i + 1)
            for variant, runs in rows.items():
                if not runs or not runs[0]["curve"]:
                    continue
                curves = [start["curve"] + run["curve"] for run in runs]
                seconds, values = ([[point[k] for point in curve] for curve in curves] for k in (1, measure))
                x = [statistics.fmean(column) for column in zip(*seconds, strict=True)]
                columns = list(zip(*values, strict=True))
                (line,) = axes.plot(x, [statistics.fmean(c) for c in columns], marker="o", markersize=3, label=variant)
                axes.fill_between(
                    x, [min(c) for c in columns], [max(c) for c in columns], color=line.get_color(), alpha=0.2
                )
            axes.set(title=title, xlabel="training time, s", ylabel=label)
            axes.grid(alpha=0.3)
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
