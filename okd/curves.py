"""Curves of runs over their steps, as SVG inside a page: its style says the colours, for light and dark alike."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from okd.report import Run

Points = Sequence[tuple[float, float]]
MOST_POINTS, MOST_EVALUATIONS, MOST_OF_A_PANEL = 500, 100, 2000


class Curve(NamedTuple):
    key: str  # of a log entry; an evaluation's ("eval_...") is dashed, a mark at each
    label: str
    color: int = 1  # number of the page's colour
    scale: float = 1.0

    @property
    def is_held_out(self) -> bool:
        return self.key.startswith("eval_")


PERPLEXITY = "Perplexity"  # stands in where there is no teacher to be held against
STUDENT, TEACHER, OTHER, TEXT, GRID = range(1, 6)
SERIES = range(16, 24)  # of configurations that are compared
PANELS: dict[tuple[str, str], tuple[Curve, ...]] = {  # (title, unit) -> curves
    ("Losses", "nats per token"): (
        Curve("student_loss", "student"),
        Curve("teacher_loss", "teacher's online module", TEACHER),
    ),
    ("KL(base teacher ‖ student)", "nats per token"): (
        Curve("base_forward_kl", "training"),
        Curve("eval_forward_kl", "held out"),
    ),
    ("Shift of the online teacher, KL(base ‖ online)", "nats per token"): (
        Curve("teacher_shift", "training", TEACHER),
    ),
    ("Top-1 agreement with the teacher", "% of tokens"): (
        Curve("top1_agreement", "training", scale=100),
        Curve("eval_top1_agreement", "held out", scale=100),
    ),
    (PERPLEXITY, "of the labels"): (Curve("eval_perplexity", "held out"),),
    ("Learning rate", "of the student"): (Curve("learning_rate", "training"),),
    ("Throughput", "tokens per second"): (Curve("tokens_per_second", "training", OTHER),),
}


class Line(NamedTuple):
    label: str
    color: int
    is_held_out: bool
    points: Points


class Panel(NamedTuple):
    title: str
    unit: str
    lines: list[Line]
    svg: Markup

    @property
    def legend(self) -> list[Line]:
        return list({line.label: line for line in self.lines}.values())


def panels(groups: Mapping[str, Sequence[Run]]) -> list[Panel]:
    """Those that have data. Of one group of runs (seeds of one configuration) a colour for each curve, of several one
    for each group; training and evaluations of one figure share a panel."""
    found: list[Panel] = []
    for (title, unit), curves in PANELS.items():
        if title == PERPLEXITY and any(line.is_held_out for panel in found for line in panel.lines):
            continue
        parts = {title: curves}
        if len(groups) > 1:
            trained = [curve for curve in curves if not curve.is_held_out]
            parts = {f"{title}: {c.label}": (c,) for c in trained} if len(trained) > 1 else parts
        for name, part in parts.items():
            if lines := _lines(groups, part):
                found.append(Panel(name, unit, lines, svg(lines, f"p{len(found)}", name)))
    return found


def _lines(groups: Mapping[str, Sequence[Run]], curves: Sequence[Curve]) -> list[Line]:
    lines = []
    for curve in curves:
        for i, (group, runs) in enumerate(groups.items()):
            label, color = curve.label, curve.color
            if len(groups) > 1:
                label = f"{group}, held out" if curve.is_held_out and len(curves) > 1 else group
                color = SERIES[i % len(SERIES)]
            for run in runs:
                if points := [(step, curve.scale * value) for step, value in run.points(curve.key)]:
                    lines.append(Line(label, color, curve.is_held_out, points))
    most = max(30, MOST_OF_A_PANEL // max(len(lines), 1))
    limits = {False: min(MOST_POINTS, most), True: min(MOST_EVALUATIONS, most)}
    return [line._replace(points=thinned(line.points, limits[line.is_held_out])) for line in lines]


def thinned(points: Points, most: int) -> Points:
    """At most so many, each the mean of neighbours; the first and the last stay."""
    if len(points) <= most:
        return points
    inner, n = points[1:-1], most - 2
    parts = [inner[i * len(inner) // n : (i + 1) * len(inner) // n] for i in range(n)]
    means = [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]
    return [points[0], *means, points[-1]]


def svg(lines: Sequence[Line], name: str, title: str) -> Markup:
    """name: a prefix of its ids, other than that of any other in the page."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    text, grid = _color(TEXT), _color(GRID)
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9, "axes.edgecolor": grid}
    style |= {"xtick.color": grid, "ytick.color": grid, "xtick.labelcolor": text, "ytick.labelcolor": text}
    style |= {"text.color": text, "axes.labelcolor": text, "grid.color": grid}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5, 2.5))  # no pyplot: the caller's matplotlib is left alone
        axes = figure.add_axes((0.13, 0.18, 0.85, 0.79))
        for line in lines:
            axes.plot(
                *zip(*line.points, strict=True),
                color=_color(line.color),
                linewidth=1.5,
                linestyle="--" if line.is_held_out else "-",
                marker="o" if line.is_held_out or len(line.points) < 20 else "",
                markersize=4 if line.is_held_out else 3,
            )
        axes.set(xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter("{x:g}")
        values = [y for line in lines for _, y in line.points]
        low, high = min(0, *values), max(0, *values)  # from zero, so that heights compare
        margin = 0.05 * (high - low or 1)
        axes.set_ylim(low - margin * (low < 0), high + margin)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(linewidth=0.5)
        axes.set_axisbelow(True)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return Markup(_for_a_page(file.getvalue(), name, title))


def _color(number: int) -> str:
    return f"#0000{number:02x}"  # stands for var(--cNN) until matplotlib has written it


def _for_a_page(text: str, name: str, title: str) -> str:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{escape(title)}">', text
    )
    text = re.sub(r"#0000([0-9a-f]{2})\b", r"var(--c\1)", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)  # in the page's own font
    text = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d[0]), text)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda id: f' id="{name}-{id[1]}"' if id[1] in used else "", text)
    return re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
