"""`okd train --dry-run`: says what the run would be, from shapes, and changes nothing."""

import json
import re
import shlex
import shutil

import pytest
import tiny
import yaml

from okd import dry_run, encoding, loading
from okd.cli import main, parse_train
from okd.data import IGNORE


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Models without weights, which nobody may look for."""
    tiny.save_inputs(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    monkeypatch.setattr(loading, "load_model", lambda *_, **__: pytest.fail("loaded a model"))
    monkeypatch.setattr(dry_run, "measured_tflops", lambda _: 1.0)
    return tmp_path


def arguments(folder, method, *options):
    result = ["train", method, "--student", str(folder / "student"), "--train-data", str(folder / "train.jsonl")]
    result += ["--output-dir", str(folder / "run"), "--use-cpu", "--max-steps", "7", "--max-length", "24", *options]
    return result if "--self-teacher" in options else [*result, "--teacher", str(folder / "teacher")]


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("okd", ("--packing",)),
        ("forward_kd", ("--stream", "--learning-rate", "3e-4")),
        ("sft", ()),
        ("forward_kd", ("--self-teacher", "average")),
    ],
)
def test_it_says_what_the_run_would_be_and_writes_nothing(folder, capsys, method, options):
    given, before = arguments(folder, method, *options), files(folder)
    assert main([*given, "--dry-run"]) == 0
    assert files(folder) == before and not (folder / "run").exists()
    said = capsys.readouterr()
    assert f"next: {shlex.join(['okd', *given])}\n" in said.err
    titles = re.findall(r"^(.*)\n-+$", said.out, re.MULTILINE)
    assert [t.split()[0] for t in titles] == ["Options", "Data", "An", "Parameters", "Memory", "Steps", "Files"]
    text = dict(zip((t.split()[0] for t in titles), re.split(r"\n?.*\n-+\n", said.out)[1:], strict=True))
    options_said = yaml.safe_load(text["Options"])
    assert (options_said.get("method", "okd"), options_said["max_steps"]) == (method, 7)
    assert options_said.get("learning_rate") == (3e-4 if "3e-4" in options else None) and "dry_run" not in options_said
    # the example's response are the tokens with labels
    config, args = parse_train(given[1:])
    rows = encoding.encode(map(json.loads, (folder / "train.jsonl").open()), tiny.tokenizer(), max_length=24).rows
    row = next(row for row in rows if row["id"] in titles[2])
    words = tiny.tokenizer().convert_ids_to_tokens([i for i in row["labels"] if i != IGNORE])
    prompt, response = text["An"].strip().removesuffix("⟧").split("⟦")
    assert response.split() == words and len(prompt.split()) + len(words) == len(row["input_ids"])
    total = tiny.llama().num_parameters()
    assert f"student: {total:,} of {total:,} parameters train" in text["Parameters"]
    assert ("lora_A" in text["Parameters"]) == ("teacher_adapter/" in text["Files"]) == args.online
    assert "student weights" in text["Memory"] and text["Steps"].startswith("7 steps")
    assert ("a stream" in text["Data"]) == config.stream and "held-out: " in text["Data"]
    written = ("config.yaml", "log.jsonl", "before.json", "metrics.json", "report.json", "report.html", "student/")
    assert set(written) <= set(text["Files"].split(": ", 1)[1].split(", "))


def test_what_is_found_in_models_and_machine_is_no_option_that_somebody_chose(folder, capsys):
    """The ids that padded heads share; that no memory is pinned where there is no GPU."""
    tiny.llama(seed=1, vocab=80).config.save_pretrained(folder / "teacher")
    for options in ((), ("--vocab-size", "60")):
        given = arguments(folder, "okd", *options)
        given.remove("--use-cpu")
        assert main([*given, "--dry-run"]) == 0
        said = capsys.readouterr().out
        assert ("vocab_size: 60\n" in said) == ("vocab_size" in said) == bool(options)
        assert "dataloader_pin_memory" not in said


def test_a_directory_that_holds_a_run_is_said(folder, capsys):
    (folder / "run" / "student").mkdir(parents=True)
    assert main([*arguments(folder, "okd"), "--dry-run"]) == 0
    assert "okd train would stop here" in (said := capsys.readouterr().out) and "holds another run" in said


def test_steps_are_those_of_the_run(folder, capsys):
    """60 rows of which 54 or so train: epochs, lines and micro-batches as transformers counts them."""
    given = arguments(folder, "sft", "--eval-data", str(folder / "eval.jsonl"), "--gradient-accumulation-steps", "2")
    at = given.index("--max-steps")
    given[at : at + 2] = ["--num-train-epochs", "2", "--per-device-train-batch-size", "7"]
    assert main([*given, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "10 steps, each of 14 rows" in said and "an epoch is 5 steps (60 rows, " in said


def test_what_the_run_would_refuse_is_refused(folder, capsys):
    other = folder / "other"
    shutil.copytree(folder / "teacher", other)
    tiny.tokenizer(vocab=60).save_pretrained(other)
    assert main([*arguments(folder, "okd"), "--teacher", str(other), "--dry-run"]) == 2
    assert "share a tokenizer; 4 tokens differ" in capsys.readouterr().err
    assert main(["cache", *arguments(folder, "okd")[1:], "--dry-run"]) == 0


def test_long_parts_are_cut_and_responses_coloured():
    row = {"id": "a", "input_ids": [2] * 400 + [3, 1], "labels": [IGNORE] * 400 + [3, 1]}
    said = dry_run.example(row, tiny.tokenizer(), colour=True)
    assert said.endswith("\033[32mw3 <eos>\033[0m") and "[... 599 characters ...]" in said
