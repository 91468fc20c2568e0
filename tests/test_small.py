"""The small experiment: models from a file and a seed, labelled rows, several jobs at once, paired differences."""

import json
import math
import time

import pytest
import tiny
import torch

from benchmarks import methods, small, step, tables
from okd import METHODS, Method
from okd.encoding import encode
from okd.evaluate import evaluate
from okd.examples import read_jsonl
from okd.models import load_model, load_tokenizer


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setattr(small, "VOCAB_SIZE", 280)
    monkeypatch.setattr(small, "EPOCHS", {"teacher": 2, "student": 1})
    for name, count, seed in (("train", 60, 0), ("eval", 12, 9)):
        lines = [json.dumps(example) for example in tiny.examples(count, seed)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    return tmp_path


def settings(files, **options):
    args = methods.arguments(["--preset", "small", "--train-file", str(files / "train.jsonl"), "--eval-file", "unused"])
    sizes = {"teacher": "small:32x2", "student": "small:16x1", "batch_size": 4, "max_length": 32, "device": "cpu"}
    return {**vars(args), "output_dir": str(files / "out"), **sizes, **options}


# --- models of a file and a seed ---


def test_no_training_row_is_validation_and_no_label_is_another_part_of_the_file(files):
    examples = read_jsonl(files / "train.jsonl")
    train, validation = small.split(examples)
    assert (train, validation) == small.split(examples) and train != examples[6:]
    assert len(validation) == 6 and sorted(x["id"] for x in train + validation) == sorted(x["id"] for x in examples)
    tokenizer = small.make_tokenizer(train, 280)
    drawn = [[x["id"] for x in methods.labelled(settings(files, labelled=40), tokenizer, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] and set(drawn[0]) != set(drawn[2])
    assert all(len(set(ids)) == 40 and set(ids) <= {x["id"] for x in train} for ids in drawn)
    assert len(methods.labelled(settings(files), tokenizer, 0)) == 60
    with pytest.raises(ValueError, match="expected 55 labelled rows; got 54: pass a smaller --labelled"):
        methods.labelled(settings(files, labelled=55), tokenizer, 0)


def test_the_tokenizer_keeps_all_text_and_has_an_end():
    tokenizer = small.make_tokenizer(tiny.examples(), vocab_size=270)
    text = "  naïve 文\n\tw3<x>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == 270 and tokenizer.decode([tokenizer.eos_token_id]) == small.END
    assert tokenizer(text + small.END)["input_ids"][-1] == tokenizer.eos_token_id


def test_windows_hold_every_token_as_a_label(files):
    examples = read_jsonl(files / "train.jsonl")[:5]
    tokenizer = small.make_tokenizer(examples, 280)
    rows = small.windows(examples, tokenizer, 8)
    whole = [row["input_ids"] for row in encode(examples, tokenizer, max_length=1000).rows]
    assert all(row["labels"] == row["input_ids"] and 1 < len(row["input_ids"]) <= 8 for row in rows)
    for i, ids in enumerate(whole):
        found = [t for row in rows if row["id"].startswith(f"{examples[i]['id']}@") for t in row["input_ids"]]
        assert found == ids[: len(ids) - (len(ids) % 8 == 1)]  # a token alone predicts none


def test_models_are_of_the_size_and_seed_that_are_named():
    tokenizer = small.make_tokenizer(tiny.examples(), vocab_size=270)
    a, b, other = (small.make_model("small:32x3", tokenizer, seed) for seed in (0, 0, 1))
    tiny.assert_same_weights(a, b)
    assert not torch.equal(a.lm_head.weight, other.lm_head.weight)
    config = a.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (32, 3, 270)
    for name in ("small:33x3", "small:32", "SmolLM2"):
        with pytest.raises(ValueError, match=f"expected small:WIDTHxLAYERS, the width a multiple of 16; got '{name}'"):
            small.make_model(name, tokenizer, 0)


@pytest.mark.slow
def test_both_learn_the_text_and_the_teacher_the_responses(files):
    rows = encode(small.split(read_jsonl(files / "train.jsonl"))[1], tokenizer_of(files), max_length=32).rows
    found = {}
    for name, steps in (("untuned", 0), ("tuned", 40)):
        job = settings(files, tune_teacher=steps, output_dir=str(files / name))
        methods.prepare(job)
        tokenizer, student, teacher = methods.load(job, "student", "teacher")
        assert student.config.hidden_size == 16 and len(tokenizer) == 280
        for side, model in (("student", student), ("teacher", teacher)):
            found[name, side] = math.log(
                evaluate(model, None, tokenizer, rows, generate=0, progress=False)[0]["perplexity"]
            )
    assert found["tuned", "student"] == found["untuned", "student"] < 0.95 * math.log(280)
    assert found["tuned", "teacher"] < 0.9 * found["untuned", "teacher"] < 0.9 * math.log(280)


def tokenizer_of(files):
    return small.make_tokenizer(small.split(read_jsonl(files / "train.jsonl"))[0], 280)


def test_the_best_epoch_is_kept(files):
    """Of a model that learns two examples by heart, an early one."""
    train, validation = small.split(read_jsonl(files / "train.jsonl"))
    tokenizer = small.make_tokenizer(train, 280)
    rows, held_out = (encode(part, tokenizer, max_length=32).rows for part in (train[:2], validation))
    model, losses = small.make_model("small:16x1", tokenizer, 0), []
    job = settings(files)
    measure = methods.OKDTrainer.evaluate

    def evaluate_and_note(self, *args, **options):
        metrics = measure(self, *args, **options)
        losses.append(metrics["eval_loss"])
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(methods.OKDTrainer, "evaluate", evaluate_and_note)
        methods.tune(job, model, tokenizer, 12, rows, held_out, learning_rate=0.1, **small.KEEP_BEST)
    assert len(losses) == 12 and losses[-1] > min(losses)
    kept = evaluate(model, None, tokenizer, held_out, generate=0, progress=False)[0]["perplexity"]
    assert math.log(kept) == pytest.approx(min(losses), rel=1e-5)


# --- jobs ---


def test_cpu_time_leaves_out_waiting():
    clock = methods.CPUClock("cpu")
    clock.on_train_begin()
    time.sleep(0.1)
    clock.on_step_begin()
    started = time.process_time()
    while time.process_time() - started < 0.05:
        pass
    clock.on_step_end()
    assert 0.05 <= clock.steps[0] < 0.1 > clock.before[0]


def test_variants_are_found_beside_the_presets(monkeypatch):
    mine = Method("mine", "forward KL")
    monkeypatch.setitem(step.VARIANTS, "mine", mine)
    monkeypatch.setitem(step.KNOWN, "mine", mine)
    assert step.parse_variant("mine:temperature=2.0") == (mine, {"temperature": 2.0})
    assert step.read_by(mine, {}, {"temperature": 2.0, "online_rank": 8}) == {"temperature": 2.0}
    assert step.parse_variant("okd") == ("okd", {}) and set(step.KNOWN) > set(METHODS)


@pytest.mark.slow
def test_a_job_has_a_process_of_its_own_and_says_why_it_failed(files):
    job = {**settings(files, labelled=8), "kind": "prepare"}
    assert methods.forked_job(job) == {}
    assert load_model(str(files / "out" / "models" / "student")).config.hidden_size == 16
    assert load_tokenizer(str(files / "out" / "models" / "teacher")).eos_token == small.END
    with pytest.raises(RuntimeError, match=r"(?s)in make_model.*expected small:WIDTHxLAYERS.*got 'small:1x1'"):
        methods.forked_job({**job, "teacher": "small:1x1"})


def test_jobs_run_at_once_over_epochs_of_what_is_labelled(files, monkeypatch):
    """Each is a line; seeds begin where they should; the reference of the differences is forward_kd."""
    running, most = set(), []

    def job(job):
        key = job["variant"], job["seed"]
        running.add(key)
        most.append(len(running))
        time.sleep(0.05)
        running.remove(key)
        if job["kind"] == "prepare":
            tokenizer_of(files).save_pretrained(files / "out" / "models" / "teacher")
            return {}
        loss = {"sft": 2.0, "okd": 1.0}.get(job["variant"], 1.5) + (job["seed"] or 0) % 2 * 0.1
        metrics = dict.fromkeys(("rouge_l", "forward_kl", "reverse_kl", "top1_agreement"), loss)
        curve = [[job["steps"] or 0, 1.0, loss, loss]]
        costs = {"train_s": 1.0, "step_s": 0.1, "generating_share": 0.0, "peak_bytes": 1}
        return {**costs, "metrics": {**metrics, "perplexity": math.exp(loss)}, "curve": curve}

    monkeypatch.setattr(methods, "forked_job", job)
    monkeypatch.setattr(methods, "environment", lambda device: {"device": device})
    methods.main(
        [
            "--preset", "small", "--train-file", str(files / "train.jsonl"), "--eval-file", str(files / "eval.jsonl"),
            "--output-dir", str(files / "out"), "--methods", "sft", "forward_kd:temperature=2.0", "okd",
            "--labelled", "30", "--epochs", "2.5", "--batch-size", "4", "--max-length", "32",
            "--seeds", "2", "--first-seed", "100", "--jobs", "2", "--budgets", "steps",
        ]
    )  # fmt: skip
    assert max(most) == 2
    lines = [json.loads(line) for line in (files / "out" / "results.jsonl").read_text().splitlines()]
    trained = sorted((x["variant"], x["seed"], x["steps"]) for x in lines if x["kind"] == "train")
    assert trained == [(v, s, 20) for v in ("forward_kd:temperature=2.0", "okd", "sft") for s in (100, 101)]
    summary = json.loads((files / "out" / "summary.json").read_text())
    (found,) = summary["differences"].values()
    assert set(found) == {"sft", "okd"} and found["okd"]["seeds"] == [100, 101]
    assert found["okd"]["ce"] == pytest.approx([-0.5, 0], abs=1e-9)
    assert "| okd | 2 | **-0.5000 ± 0.0000** |" in (files / "out" / "tables.md").read_text()


# --- paired differences ---


def test_intervals_are_students():
    assert tables.interval([2.0]) == (2.0, None)
    # 2.776 and 2.228 are the 97.5 % quantiles of Student's t with 4 and 10 degrees of freedom
    assert tables.interval([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx((3.0, 2.776 * (2.5 / 5) ** 0.5))
    assert tables.interval(list(range(11))) == pytest.approx((5.0, 2.228 * 1.0), rel=1.3e-3)


def test_differences_are_of_the_seeds_that_both_have():
    def run(seed, ce, rouge_l):
        metrics = {"perplexity": math.exp(ce), "rouge_l": rouge_l, "forward_kl": ce, "top1_agreement": ce / 10}
        return {"seed": seed, "metrics": metrics}

    rows = {
        "okd": [run(0, 2.0, 1.0), run(1, 2.2, 2.0), run(7, 9.0, 9.0)],
        "forward_kd": [run(1, 2.0, None), run(0, 2.1, None)],
        "sft": [],
    }
    found = tables.differences(rows)
    assert set(found) == {"okd"} and found["okd"]["seeds"] == [0, 1]
    mean, half = found["okd"]["ce"]
    assert mean == pytest.approx(0.05) and half == pytest.approx(12.706 * 0.15)
    assert found["okd"]["top1_agreement"][0] == pytest.approx(0.5) and "rouge_l" not in found["okd"]
    assert "| okd | 2 | +0.0500 ± 1.9059 |  | " in tables.table_of_differences(rows)
