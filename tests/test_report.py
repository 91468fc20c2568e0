"""okd.report: what is read of a run's directory, and what is printed, to the letter."""

from __future__ import annotations

import json
import math

import pytest

from okd.report import format_samples, format_table, read_run

LOG = [
    {"step": 10, "epoch": 0.1, "loss": 3.0, "student_loss": 2.0, "teacher_loss": 1.0, "learning_rate": 1e-4},
    {"step": 10, "eval_loss": 2.9, "eval_forward_kl": 1.5, "eval_top1_agreement": 0.25, "eval_runtime": 3.0},
    {"step": 20, "loss": 2.5, "student_loss": 1.5, "teacher_loss": math.nan, "learning_rate": 5e-5},
    {"step": 20, "base_forward_kl": 1.25, "top1_agreement": 0.5, "tokens_per_second": None},
    {"step": 30, "loss": 2.0, "student_loss": "inf", "teacher_loss": 0.5, "learning_rate": 0.0},
    {"loss": 99.0, "student_loss": 99.0},  # no step
]


def log_file(path, entries, end=""):
    (path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + end)


def test_a_curve_has_every_finite_value_and_nothing_else(tmp_path):
    log_file(tmp_path, LOG)
    run = read_run(tmp_path)
    assert run.points("student_loss") == [(10, 2.0), (20, 1.5)]
    assert run.points("teacher_loss") == [(10, 1.0), (30, 0.5)]
    assert run.points("tokens_per_second") == [] and run.steps == 30


def test_held_out_curves_begin_before_and_end_after_the_training(tmp_path):
    log_file(tmp_path, LOG)
    (tmp_path / "before.json").write_text(json.dumps([{"forward_kl": 2.0}, []]))
    assert read_run(tmp_path).points("eval_forward_kl") == [(0, 2.0), (10, 1.5)], "of a run that goes on"
    figures = {"before": {"forward_kl": 2.5}, "after": {"forward_kl": 1.0}, "steps": 30}
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    assert read_run(tmp_path).points("eval_forward_kl") == [(0, 2.5), (10, 1.5), (30, 1.0)]


def test_lines_and_files_that_are_cut_short_are_passed_over(tmp_path):
    log_file(tmp_path, LOG[:1], end='{"step": 20, "student_l')
    for name in ("before.json", "metrics.json", "report.json"):
        (tmp_path / name).write_text('{"before": {"forw')
    run = read_run(tmp_path)
    assert run.points("student_loss") == [(10, 2.0)] and run.before == run.after == run.record == {}


def test_what_a_run_is_leaves_seeds_and_places_out(tmp_path):
    (tmp_path / "config.yaml").write_text("method: okd\nseed: 3\ndata_seed: 1\noutput_dir: runs/a\n")
    assert read_run(tmp_path).configuration == {"method": "okd"}


def test_a_directory_without_a_run_is_refused(tmp_path):
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"expected the directory of a run, with config.yaml, .* pass the --out"
    ):
        read_run(tmp_path)
    with pytest.raises(FileNotFoundError, match="got none of them"):
        read_run(tmp_path / "nowhere")


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


def samples(count: int) -> list[dict]:
    return [
        {
            "id": f"row {i}",
            "prompt": f"What is {i}?",
            "reference": f"It is {i}.",
            "teacher": f"well {i}",
            "before": {"answer": f"old {i}", "tokens": None},
            "after": {"answer": f"new {i}", "tokens": None},
        }
        for i in range(count)
    ]


def test_samples_text():
    (sample,) = samples(1)
    sample |= {"prompt": "abcdefgh " * 12, "before": {"answer": " Well,\n\n  no 0"}, "after": {"answer": " \n"}}
    text = (
        "[row 0]\n"
        "prompt     abcdefgh abcdefgh abcdefgh abcdefgh abcdefgh abcdefgh abcdefgh abcdefgh abcdefgh abcdefgh\n"
        "           abcdefgh abcdefgh\n"
        "reference  It is 0.\n"
        "teacher    well 0\n"
        "before     Well,\n"
        "\n"
        "             no 0\n"
        "after      (nothing)"
    )
    assert format_samples([sample]) == text
    as_reference = text.replace("reference  It is 0.\n", "").replace("well 0", "It is 0.")
    assert format_samples([{**sample, "teacher": "It is 0."}]) == as_reference, "which need not be said twice"
    del sample["teacher"]
    assert format_samples([sample]) == text.replace("teacher    well 0\n", "")


def test_samples_end_by_column_100_even_without_spaces():
    (sample,) = samples(1)
    sample |= {"before": {"answer": "x" * 300}, "after": {"answer": "y z" * 100}}
    assert max(map(len, format_samples([sample]).splitlines())) == 100


@pytest.mark.parametrize(("count", "chosen"), [(0, []), (1, [0]), (3, [0, 2, 5]), (8, range(8)), (99, range(8))])
def test_samples_are_spread_evenly_over_those_that_are_answered_twice(count, chosen):
    killed = samples(9)[8]
    del killed["after"]
    text = format_samples([*samples(8), killed], count)
    assert [line for line in text.splitlines() if line.startswith("[")] == [f"[row {i}]" for i in chosen]
    for i in chosen:
        assert f"before     old {i}\nafter      new {i}" in text
