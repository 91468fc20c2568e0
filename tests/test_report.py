"""okd.report: what is drawn, read back from the figure; what is printed, to the letter."""

from __future__ import annotations

import math
import sys

import pytest

from okd import report
from okd.report import format_samples, format_table, plot_curves

LOG = [
    {"step": 10, "epoch": 0.1, "loss": 3.0, "student_loss": 2.0, "teacher_loss": 1.0, "learning_rate": 1e-4},
    {"step": 10, "eval_loss": 2.9, "eval_forward_kl": 1.5, "eval_top1_agreement": 0.25, "eval_runtime": 3.0},
    {"step": 20, "loss": 2.5, "student_loss": 1.5, "teacher_loss": math.nan, "learning_rate": 5e-5},
    {"step": 20, "base_forward_kl": 1.25, "top1_agreement": 0.5, "tokens_per_second": None},
    {"step": 20, "online_learning_rate": 2e-4},
    {"step": 30, "loss": 2.0, "student_loss": None, "teacher_loss": 0.5, "learning_rate": 0.0},
    {"step": 30, "base_forward_kl": math.inf, "top1_agreement": 0.75, "grad_norm": 1.0},
    {"loss": 99.0},  # no step
    {"step": 30, "train_runtime": 12.0, "train_loss": 2.5},
]


def drawn(log_history) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{panel title: {legend label: points}} of the figure."""
    panels = {}
    for axes in report._figure(log_history).axes:
        lines = {line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in axes.get_lines()}
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(lines)
        panels[axes.get_title()] = lines
    return panels


def test_every_finite_value_is_drawn_in_its_panel_and_nothing_else():
    assert drawn(LOG) == {
        "Loss": {
            "total": [(10, 3.0), (20, 2.5), (30, 2.0)],
            "student": [(10, 2.0), (20, 1.5)],
            "teacher's online module": [(10, 1.0), (30, 0.5)],
            "eval_loss, held out": [(10, 2.9)],
        },
        "KL(base teacher ‖ student)": {"training": [(20, 1.25)], "held out": [(10, 1.5)]},
        "Top-1 agreement with the teacher": {"training": [(20, 50.0), (30, 75.0)], "held out": [(10, 25.0)]},
        "Learning rate": {
            "student": [(10, 1e-4), (20, 5e-5), (30, 0.0)],
            "teacher's online module": [(20, 2e-4)],
        },
    }


def test_axes_are_labelled_with_units_and_begin_at_zero():
    figure = report._figure([*LOG, {"step": 30, "tokens_per_second": 1000.0}])
    units = ["nats per token", "nats per token", "% of tokens", "learning rate", "tokens per second"]
    assert [axes.get_ylabel() for axes in figure.axes] == units
    assert {axes.get_xlabel() for axes in figure.axes} == {"step"}
    assert figure.get_suptitle() == "Training curves"
    assert all(axes.get_ylim()[0] <= 0 < axes.get_ylim()[1] for axes in figure.axes)
    figure.draw_without_rendering()  # places the panels: the fifth has a row to itself
    widths = [axes.get_position().width for axes in figure.axes]
    assert widths[4] > 1.9 * widths[0]
    (negative,) = report._figure([{"step": 1, "loss": -2.0}, {"step": 2, "loss": 1.0}]).axes
    assert negative.get_ylim()[0] < -2


def test_a_single_point_is_visible():
    (axes,) = report._figure([{"step": 1, "loss": 2.0}]).axes
    assert axes.get_lines()[0].get_marker() == "o"


def test_the_file_is_a_png_of_150_dpi(tmp_path):
    path = tmp_path / "new folder" / "curves.png"
    plot_curves(LOG, path)
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    assert (width, height) == (11 * 150, 6.5 * 150)
    assert [entry.name for entry in path.parent.iterdir()] == ["curves.png"]


def test_a_plot_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def savefig(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    with pytest.raises(OSError, match="disk full"):
        plot_curves(LOG, path)
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("curves.png", b"old")]


def test_the_callers_matplotlib_is_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    loaded = "matplotlib.pyplot" in sys.modules
    plot_curves(LOG, tmp_path / "curves.png")
    assert dict(matplotlib.rcParams) == before
    assert ("matplotlib.pyplot" in sys.modules) == loaded


@pytest.mark.parametrize("log", [[], [{"step": 1, "loss": math.nan, "epoch": 1.0}], [{"loss": 1.0}]])
def test_a_log_with_nothing_to_plot_is_refused(tmp_path, log):
    with pytest.raises(ValueError, match=f"one of loss, student_loss, .*, got {len(log)} without"):
        plot_curves(log, tmp_path / "curves.png")
    assert list(tmp_path.iterdir()) == []


BEFORE = {
    "forward_kl": 1.2345,
    "reverse_kl": 0.0,
    "perplexity": 131.4,
    "teacher_perplexity": 5.0,
    "top1_agreement": 0.412,
    "tokens": 100,
    "rouge_l": 10.1,
}
AFTER = {
    "forward_kl": 0.3827,
    "reverse_kl": 0.5,
    "perplexity": 12.02,
    "teacher_perplexity": 5.0,
    "top1_agreement": 0.643,
    "tokens": 100,
    "rouge_l": 9.55,
}


def test_table_text():
    assert format_table(BEFORE, AFTER) == (
        "metric                                 before   after     change  better\n"
        "forward KL to the base teacher (nats)  1.2345  0.3827      ×0.31  lower\n"
        "reverse KL to the base teacher (nats)  0.0000  0.5000        n/a  lower\n"
        "perplexity                             131.40   12.02      ×0.09  lower\n"
        "top-1 agreement (%)                      41.2    64.3  +23.1 pts  higher\n"
        "ROUGE-L                                  10.1     9.6       -0.5  higher"
    )


def test_table_leaves_out_what_either_lacks():
    after = {"perplexity": 2.0, "rouge_l": None, "tokens": 5}
    assert format_table({"perplexity": 4.0, "rouge_l": 3.0, "forward_kl": 1.0}, after) == (
        "metric      before  after  change  better\nperplexity    4.00   2.00   ×0.50  lower"
    )
    with pytest.raises(ValueError, match=r"expected a metric in common .* got \['forward_kl'\] and \['perplexity', "):
        format_table({"forward_kl": 1.0}, after)


def answers(count: int, answer: str) -> list[dict[str, str]]:
    return [
        {"id": f"row {i}", "prompt": f"What is {i}?", "reference": f"It is {i}.", "answer": f"{answer} {i}"}
        for i in range(count)
    ]


def test_samples_text():
    before, after = answers(1, " Well,\n\n  no")[0], answers(1, "")[0]
    after["answer"] = " \n"
    before["prompt"] = "abcdefgh " * 12
    assert format_samples([before], [after]) == (
        "[row 0]\n"
        "prompt     abcdefgh abcdefgh abcdefgh abcdefgh abcdefgh abcdefgh abcdefgh abcdefgh abcdefgh abcdefgh\n"
        "           abcdefgh abcdefgh\n"
        "reference  It is 0.\n"
        "before     Well,\n"
        "\n"
        "             no 0\n"
        "after      (nothing)"
    )


def test_samples_end_by_column_100_even_without_spaces():
    lines = format_samples(answers(1, "x" * 300), answers(1, "y z" * 100)).splitlines()
    assert max(map(len, lines)) == 100


@pytest.mark.parametrize(("count", "chosen"), [(0, []), (1, [0]), (3, [0, 2, 5]), (8, range(8)), (99, range(8))])
def test_samples_are_spread_evenly_over_the_rows_both_answered(count, chosen):
    before, after = answers(9, "old")[1:], answers(9, "new")[::-1]  # paired by id, whatever the order
    text = format_samples(before, after, count)
    assert [line for line in text.splitlines() if line.startswith("[")] == [f"[row {i + 1}]" for i in chosen]
    for i in chosen:
        assert f"before     old {i + 1}\nafter      new {i + 1}" in text


def test_samples_of_different_rows_are_refused():
    with pytest.raises(ValueError, match="got 2 before and 1 after, no id in both"):
        format_samples(answers(2, "old"), [{**answers(1, "new")[0], "id": "other"}])
