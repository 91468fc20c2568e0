"""What `okd demo` learns from, and what it says at its end. The demo itself is run by hand before a release."""

import json

from okd.demo import QUESTIONS, story
from okd.report import Run


def read(name):
    return [json.loads(line) for line in (QUESTIONS / f"{name}.jsonl").read_text().splitlines()]


def test_no_subject_is_asked_about_on_both_sides():
    train, held_out = read("train"), read("held_out")
    assert len(train) > 500 and len(held_out) == 64
    subjects = [example["id"] for example in [*train, *held_out]]
    assert len(set(subjects)) == len(subjects)
    assert len({example["prompt"] for example in [*train, *held_out]}) == len(subjects)
    for example in [*train, *held_out]:
        assert example["id"] in example["prompt"] and 20 < len(example["completion"]) < 400
    assert [held_out[i]["id"] for i in (0, 4, 8)] == ["volcano", "teacher", "bicycle"], "those that are shown"


def test_story_says_what_was_recorded(tmp_path):
    record = {
        "parameters": {"student": 113_000_000, "teacher": 134_500_000},
        "tokens_per_second": {"student": 41.4, "teacher": 33.0},
    }
    log = [{"step": 1, "teacher_shift": 0.0}, {"step": 3, "teacher_shift": 0.0123}]
    told = story(Run(tmp_path, log=log, record=record))
    assert "113 M of the teacher's 134 M parameters" in told
    assert "41 tokens a second, the teacher with 33" in told
    assert "moved by 0.012 nats" in told
    assert "Meanwhile" not in story(Run(tmp_path, record=record)), "of a frozen teacher nothing"
    assert story(Run(tmp_path)) == ""
    assert "forward KD comes nearer" in story(Run(tmp_path, figures={"method": "okd"}))
    assert story(Run(tmp_path, figures={"method": "forward_kd"})) == ""
