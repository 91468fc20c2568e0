"""What a run did, for the eye: its curves, a table of before and after, answers side by side."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Log = Sequence[Mapping[str, Any]]

STUDENT, TEACHER, OTHER = "#1f6fb4", "#e07b28", "#808080"  # one colour each, in every panel


class Curve(NamedTuple):
    key: str  # of a log entry; an evaluation's ("eval_...") is drawn dashed
    label: str
    color: str = STUDENT
    scale: float = 1.0


PANELS: dict[tuple[str, str], tuple[Curve, ...]] = {  # (title, y label) -> curves
    ("Loss", "nats per token"): (
        Curve("loss", "total", OTHER),
        Curve("student_loss", "student"),
        Curve("teacher_loss", "teacher's online module", TEACHER),
        Curve("eval_loss", "eval_loss, held out"),
    ),
    ("KL(base teacher ‖ student)", "nats per token"): (
        Curve("base_forward_kl", "training"),
        Curve("eval_forward_kl", "held out"),
    ),
    ("KL(base teacher ‖ online teacher)", "nats per token"): (Curve("teacher_shift", "training", TEACHER),),
    ("Top-1 agreement with the teacher", "% of tokens"): (
        Curve("top1_agreement", "training", scale=100),
        Curve("eval_top1_agreement", "held out", scale=100),
    ),
    ("Learning rate", "learning rate"): (
        Curve("learning_rate", "student"),
        Curve("online_learning_rate", "teacher's online module", TEACHER),
    ),
    ("Throughput", "tokens per second"): (Curve("tokens_per_second", "training", OTHER),),
}


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


def plot_curves(log_history: Log, path: str | Path) -> None:
    """A PNG of a run's curves over its steps, from `TrainerState.log_history`; only panels that have data.

    The file appears whole or not at all. Raises ValueError if no entry has anything to plot.
    """
    figure = _figure(log_history)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        figure.savefig(unfinished, format="png", dpi=150)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def format_table(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> str:
    """The metrics of `okd.evaluate` that both have, as lines of "metric before after change better".

    A change is a ratio where lower is better, a difference where higher is. Raises ValueError if they share no metric.
    """
    lines = []
    for metric in METRICS:
        old, new = before.get(metric.key), after.get(metric.key)
        if old is None or new is None:
            continue
        if metric.better == "higher":
            change = f"{metric.scale * (new - old):+.{metric.decimals}f}{metric.unit}"
        else:
            change = f"×{new / old:.2f}" if old else "n/a"
        values = (f"{metric.scale * value:.{metric.decimals}f}" for value in (old, new))
        lines.append((metric.name, *values, change, metric.better))
    if not lines:
        raise ValueError(
            f"expected a metric in common out of {', '.join(metric.key for metric in METRICS)}, got {sorted(before)} "
            f"and {sorted(after)}; pass the metrics of two calls of okd.evaluate"
        )
    lines.insert(0, ("metric", "before", "after", "change", "better"))
    w = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(f"{a:<{w[0]}}  {b:>{w[1]}}  {c:>{w[2]}}  {d:>{w[3]}}  {e}" for a, b, c, d, e in lines)


def format_samples(before_answers: Sequence[dict], after_answers: Sequence[dict], count: int = 3) -> str:
    """`count` rows answered by both, evenly spread: prompt, reference, and the answers before and after.

    The answers are those of `okd.answers.generate_answers`, paired by id; lines are wrapped to 100 columns. Raises
    ValueError if they share no id.
    """
    after = {answer["id"]: answer for answer in after_answers}
    pairs = [(answer, after[answer["id"]]) for answer in before_answers if answer["id"] in after]
    if not pairs:
        raise ValueError(
            f"expected answers to the same rows, got {len(before_answers)} before and {len(after_answers)} after, no "
            "id in both; generate both from one list of rows"
        )
    count = min(count, len(pairs))
    return "\n\n".join(_sample(*pairs[i * len(pairs) // count]) for i in range(count))


def _sample(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    fields = [_wrapped(name, before[name]) for name in ("prompt", "reference")]
    fields += [_wrapped("before", before["answer"]), _wrapped("after", after["answer"])]
    return "\n".join([f"[{before['id']}]", *fields])


def _wrapped(label: str, text: str) -> str:
    """The label, and beside it the text: wrapped at the last column, its own line breaks kept."""
    lines = []
    for line in text.strip().splitlines() or ["(nothing)"]:
        lines += textwrap.wrap(line, COLUMNS - INDENT) or [""]
    return label + textwrap.indent("\n".join(lines), " " * INDENT)[len(label) :]


def _figure(log_history: Log) -> Figure:
    """The panels that have data, two in a row. A `Figure` without pyplot leaves the caller's matplotlib alone."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    panels = {
        panel: {curve: points for curve in curves if (points := _points(log_history, curve))}
        for panel, curves in PANELS.items()
    }
    panels = {panel: curves for panel, curves in panels.items() if curves}
    if not panels:
        keys = ", ".join(curve.key for curves in PANELS.values() for curve in curves)
        raise ValueError(
            f"expected log entries with a step and a finite value of one of {keys}, got {len(log_history)} without; "
            "pass trainer.state.log_history of a run that has logged"
        )
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12)
    figure = Figure(figsize=(5.5 * columns, 3 * rows + 0.5), layout=layout)  # inches, as the pads
    figure.suptitle("Training curves", fontweight="bold")
    grid = figure.add_gridspec(rows, columns)
    for i, ((title, ylabel), curves) in enumerate(panels.items()):
        row, column = divmod(i, columns)
        alone = i == len(panels) - 1 and column == 0
        axes = figure.add_subplot(grid[row, :] if alone else grid[row, column])
        for curve, points in curves.items():
            held_out = curve.key.startswith("eval_")
            axes.plot(
                *zip(*points, strict=True),
                label=curve.label,
                color=curve.color,
                linestyle="--" if held_out else "-",
                marker="o" if held_out or len(points) < 20 else "",
                markersize=4,
            )
        axes.set(title=title, xlabel="step", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))  # from zero, so that heights compare
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def _points(log_history: Log, curve: Curve) -> list[tuple[int, float]]:
    """The curve's (step, scaled value) pairs, without those that are missing, None or not finite."""
    entries = [(entry["step"], entry.get(curve.key)) for entry in log_history if "step" in entry]
    return [(step, curve.scale * value) for step, value in entries if value is not None and math.isfinite(value)]
