"""okd.record and okd.samples: what a run keeps for its report, against whole logits and plain loops."""

from __future__ import annotations

import json
import logging
import warnings
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers.utils import logging as transformers_logging

from okd.answers import generate_answers
from okd.cli import main
from okd.record import MOST_WARNINGS, Record, Warnings, listening, machine, peak_memory
from okd.samples import END, pieces, shown_rows, token_divergences

ROWS = [
    {"id": "a", "input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9]},
    {"id": "text", "input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"id": "b", "input_ids": [9, 8, 7, 6], "labels": [-100, -100, 7, 6]},
]


# --- samples


def test_shown_rows_have_a_prompt_and_are_spread_evenly():
    rows = [{**ROWS[0], "id": str(i)} for i in range(10)]
    assert [row["id"] for row in shown_rows([ROWS[1], *rows], 4)] == ["0", "2", "5", "7"]
    assert [row["id"] for row in shown_rows(ROWS)] == ["a", "b"]


def test_divergences_of_an_answers_tokens_are_those_of_whole_logits():
    student, teacher, tokenizer = tiny.llama(0), tiny.llama(1, layers=3, hidden=48), tiny.tokenizer()
    answers = generate_answers(student, tokenizer, ROWS, max_new_tokens=5, progress=False)
    found = token_divergences(student, teacher, tokenizer, ROWS, answers)
    assert list(found) == ["a", "b"]
    for row, prompt in ((ROWS[0], 3), (ROWS[2], 2)):
        (response,) = [answer["response"] for answer in answers if answer["id"] == row["id"]]
        ids = torch.tensor([row["input_ids"][:prompt] + response])
        with torch.no_grad():
            p, q = (model(ids).logits[0, prompt - 1 : -1].double().log_softmax(-1) for model in (teacher, student))
        expected = (p.exp() * (p - q)).sum(-1)
        texts, nats = zip(*found[row["id"]], strict=True)
        assert nats == pytest.approx(expected.tolist(), abs=1e-5)
        assert "".join(texts) == tokenizer.decode(response)


@pytest.mark.parametrize(
    ("row", "vocab_size"),
    [({"aligned": []}, None), ({"teacher_input_ids": [5, 6]}, None), ({}, 8), ({"input_ids": [5] * 63}, None)],
)
def test_answers_that_the_teacher_does_not_read_so_are_left_out(row, vocab_size):
    student, teacher = tiny.llama(0, max_position_embeddings=128), tiny.llama(1)
    answers = [{"id": "a", "response": [8, 9, 10]}]
    labels = [-100] * (len(row.get("input_ids", ROWS[0]["input_ids"])) - 1) + [8]
    rows = [{**ROWS[0], "labels": labels, **row}]
    assert token_divergences(student, teacher, tiny.tokenizer(), rows, answers, vocab_size) == {}
    assert token_divergences(student, teacher, tiny.tokenizer(), ROWS[:1], answers)


def test_pieces_are_what_each_token_adds():
    tokenizer = tiny.tokenizer()
    assert pieces(tokenizer, [5, 6, 1], {1}) == ["w5", " w6", END]
    characters = SimpleNamespace(batch_decode=lambda many: [bytes(ids).decode(errors="replace") for ids in many])
    assert pieces(characters, list("aßb".encode())) == ["a", "", "ß", "b"], "a character is its last byte's"


def test_speed_is_that_of_answers_of_one_length(tmp_path):
    """Of a model that would end at once: every answer has the length that is asked for."""
    student, record = tiny.llama(), Record(tiny.config(tmp_path))
    record.rows, trainer = [ROWS[0], ROWS[2]], SimpleNamespace(tokenizer=tiny.tokenizer())
    with torch.no_grad():
        student.lm_head.weight[tiny.EOS] = 9 * student.lm_head.weight[9]  # tied: a token's own direction, and its end's
    record._asked = lambda *args, asked=record._asked, **options: seen.append(asked(*args, **options)) or seen[-1]
    seen = []
    record._time("student", student, trainer, 12)
    assert [len(answer["response"]) for answer in seen[-1]] == [12, 12] and record.speed["student"] > 0
    ended = generate_answers(student, tiny.tokenizer(), record.rows, max_new_tokens=12, progress=False)
    assert min(len(answer["response"]) for answer in ended) < 12, "without"


# --- warnings


def test_warnings_are_kept_once_and_shown_as_ever(capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    kept = Warnings()
    with pytest.warns(UserWarning, match="python"), listening(kept):
        for _ in range(2):
            logging.getLogger("okd.trainer").warning("ours %d", 1)
        logging.getLogger("okd.trainer").info("nothing")
        transformers_logging.get_logger("transformers.trainer").warning("theirs")
        warnings.warn("python", UserWarning, stacklevel=1)
    logging.getLogger("okd.trainer").warning("later")
    assert kept.counts == {"ours 1": 2, "theirs": 1, "UserWarning: python": 1}
    assert capsys.readouterr().err.count("ours 1") == 2
    for i in range(2 * MOST_WARNINGS):
        kept.keep(str(i))
    assert len(kept.counts) == MOST_WARNINGS


# --- the record


def test_machine_and_memory_are_this_ones():
    found = machine(torch.device("cpu"))
    assert found["cores"] >= 1 and found["memory"] > peak_memory(torch.device("cpu")) > 2**26
    assert found["device"] and found["processes"] == 1


def test_a_run_that_fails_leaves_its_record_once_it_has_begun(tmp_path):
    args = SimpleNamespace(output_dir=str(tmp_path), device=torch.device("cpu"), process_index=0)
    with pytest.raises(KeyError), Record(args):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), Record(args) as record:
        record.write()
        record.warnings.keep("late")
        raise KeyError
    assert json.loads((tmp_path / "report.json").read_text())["warnings"] == [["late", 1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny.save_inputs(root)
    return root


def record_of(folder, output, *options, method="okd"):
    options = ("--save-strategy", "no", "--max-steps", "2", "--eval-answers", "4", *options)
    assert main(tiny.train_arguments(folder, output, *options, method=method)) == 0
    return json.loads((output / "report.json").read_text())


def test_a_run_records_what_its_report_shows(folder, tmp_path, capsys):
    found = record_of(folder, tmp_path / "run")
    assert [sample["id"] for sample in found["samples"]] == [f"example-{i}" for i in range(4)]
    for sample in found["samples"]:
        assert sample["teacher"] and sample["prompt"] and sample["reference"]
        for when in ("before", "after"):
            texts, nats = zip(*sample[when]["tokens"], strict=True)
            assert "".join(texts).replace(END, "").strip() == sample[when]["answer"] and min(nats) > 0
    parts = {"loading", "evaluating", "teacher's forward", "student's forward", "loss and its gradients", "backward"}
    assert parts | {"optimizer", "saving"} <= found["seconds"].keys() and min(found["seconds"].values()) >= 0
    assert (
        sum(found["seconds"].values()) >= json.loads((tmp_path / "run" / "metrics.json").read_text())["seconds"]["all"]
    )
    assert found["options"]["learning_rate"] == 1e-2 and "weight_decay" not in found["options"]
    assert found["memory"]["measured"] > 2**26 and found["parameters"]["student"] > 10**4
    assert found["tokens_per_second"].keys() == {"student", "teacher"} and min(found["tokens_per_second"].values()) > 0
    assert any("parameters train" in text for text, _ in found["warnings"])
    printed = capsys.readouterr().out
    assert f"teacher    {found['samples'][0]['teacher']}" in printed
    # the teacher answers as it was: as the model on the disk does
    from transformers import AutoModelForCausalLM

    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(folder / "teacher"), tiny.tokenizer()
    ids = tokenizer(found["samples"][0]["prompt"], return_tensors="pt").input_ids
    expected = teacher.generate(ids, do_sample=False, max_new_tokens=2)[0, ids.shape[1] :]
    assert tokenizer.decode(expected, skip_special_tokens=True) == found["samples"][0]["teacher"]


@pytest.mark.parametrize("top_k", [(), ("--teacher-cache-top-k", "4")])
@pytest.mark.slow
def test_a_teacher_in_a_cache_answers_but_does_not_colour(folder, tmp_path, top_k):
    cache = ("--teacher-cache", str(tmp_path / "cache"), *top_k)
    for name in ("first", "second"):
        found = record_of(folder, tmp_path / name, *cache, method="forward_kd")
        assert all(sample["after"]["tokens"] is None for sample in found["samples"])
        assert ("teacher" in found["samples"][0]) == (name == "first"), "the second run has no need of its weights"
    assert "teacher's cache" in found["seconds"]


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_what_it_said_before(folder, tmp_path):
    output = tmp_path / "run"
    saved = ("--save-strategy", "steps", "--save-steps", "1", "--lr-scheduler-type", "constant")
    first = record_of(folder, output, *saved)
    second = record_of(folder, output, *saved, "--max-steps", "3", "--resume")
    for one, other in zip(first["samples"], second["samples"], strict=True):
        assert {**one, "after": None} == {**other, "after": None} and one["after"] != other["after"]


@pytest.mark.slow
def test_without_answers_there_are_no_samples(folder, tmp_path, capsys):
    assert record_of(folder, tmp_path / "run", "--eval-answers", "0")["samples"] == []
    assert "before     " not in capsys.readouterr().out


def test_the_command_says_where_the_report_is(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "student_loss": 1.0}')
    assert main(["report", "run"]) == 0 and capsys.readouterr().out == "run/report.html\n"
    assert main(["report", "run", "run"]) == 0 and capsys.readouterr().out == "comparison.html\n"
    assert main(["report", "run", "--output", "a.html"]) == 0 and capsys.readouterr().out == "a.html\n"
    assert all((tmp_path / name).is_file() for name in ("run/report.html", "comparison.html", "a.html"))
    assert main(["report", "."]) == 2 and "expected the directory of a run" in capsys.readouterr().err
