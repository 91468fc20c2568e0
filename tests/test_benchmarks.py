"""The benchmarks of steps and methods: they compare like with like, time what they say, and go on where they were."""

import json
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from benchmarks import floor, methods, step
from okd import OKDConfig
from okd.data import Collator
from okd.encoding import encode
from okd.evaluate import evaluate
from okd.models import load_model
from okd.objectives import Totals
from okd.pair import StudentTeacher
from okd.preparing import prepare_teacher


@pytest.fixture
def now(monkeypatch):
    """The time, set by the test."""
    time = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(step.time, "perf_counter", lambda: time.seconds)
    return time


# --- clocks ---


def test_the_clock_counts_steps_and_neither_logging_nor_evaluation(now):
    clock = step.Clock("cpu")
    now.seconds = 100.0
    clock.on_train_begin()
    for event, seconds in (
        ("on_step_begin", 1), ("on_step_end", 2), ("on_log", 50), ("on_evaluate", 70),
        ("on_step_begin", 3), ("on_step_end", 4),
        ("on_step_begin", 5), ("on_step_end", 6),
    ):  # fmt: skip
        now.seconds += seconds
        getattr(clock, event)()
    assert clock.steps == [3, 7, 11]
    assert clock.before == [1, 3, 5]


def test_the_loss_clock_counts_the_loss_and_its_backward_but_no_model(now):
    """Seconds pass in the forward and backward of three stages: model, loss, and what is done with it."""

    class Stage(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = seconds
            now.seconds += seconds
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            now.seconds += 10 * ctx.seconds
            return gradient, None

    weight = torch.ones(3, requires_grad=True)

    def distil(student, teacher, targets, normalizer=None):
        return step.DistillationLoss(Stage.apply(student, 2.0).sum(), Stage.apply(teacher, 3.0).sum(), {})

    clock = step.LossClock(distil, "cpu")
    hidden = [Stage.apply(weight, 100.0), Stage.apply(weight, 100.0)]
    loss = clock(*hidden, torch.zeros(3))
    (Stage.apply(loss.total, 1000.0)).backward()
    assert clock.seconds() == [2 + 3 + 20 + 30]
    assert clock.tokens == [3]


def test_a_queue_gives_each_run_its_own_time_and_leaves_out_the_first(now, monkeypatch):
    """Two runs by turns, whose first calls are slow."""

    class Event:
        def __init__(self, enable_timing):
            self.at = None

        def record(self):
            self.at = now.seconds

        def elapsed_time(self, end):  # ms
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []

    def run(name, seconds):
        now.seconds += seconds if name in calls else 1000
        calls.append(name)

    assert floor.queued_seconds([lambda: run("a", 2), lambda: run("b", 5)]) == [2, 5]
    assert calls == ["a", "b"] * (1 + floor.QUEUED)


# --- steps ---


def pair(method, **options):
    args = OKDConfig(method=method, use_cpu=True, **options)
    return StudentTeacher(tiny.llama(), prepare_teacher(tiny.llama(seed=1, layers=3, hidden=48), args), args)


@pytest.mark.parametrize("method", ["forward_kd", "reverse_kd", "jsd", "okd"])
def test_eager_steps_minimise_what_ours_do(method):
    """Both candidates of a comparison: one loss, one gradient."""
    both = pair(method)
    for name, parameter in both.teacher.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    batch = Collator(tiny.EOS)(encode(tiny.examples(4), tiny.tokenizer(), max_length=32).rows)
    found = []
    for distil in (both.distil, step.eager_distil(both)):
        both.distil = distil
        both.zero_grad()
        loss = both(batch, Totals.of([batch])).total
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in both.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 5
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)


def test_eager_refuses_what_it_would_get_wrong():
    with pytest.raises(ValueError, match=r"expected what peers.eager can"):
        step.eager_distil(pair("okd", teacher_kl_weight=0.9))
    with pytest.raises(ValueError, match=r"expected what peers.eager can"):
        step.eager_distil(pair("skew_kd"))


@pytest.mark.parametrize("variant", step.DEFAULT_METHODS)
@pytest.mark.parametrize("loss", ["ours", "eager"])
def test_candidates_train_on_equally_many_tokens(variant, loss):
    if variant.partition(":")[0] not in step.METHODS:
        pytest.skip("no method of this version")
    job = {
        "variant": variant, "loss": loss, "student": "llama-tiny", "teacher": "llama-tiny", "device": "cpu",
        "dtype": "fp32", "batch_size": 2, "length": 17, "warmup": 1, "steps": 2,
    }  # fmt: skip
    found = step.run_job(job)
    assert found["tokens"] == [2 * 9] * 2
    for whole, part, before in zip(found["step_s"], found["loss_s"], found["before_s"], strict=True):
        assert 0 < part < whole and 0 < before < whole
    assert found["peak_bytes"] > 2**20


def test_epochs_count_the_filling_of_a_cache():
    job = {
        "variant": "okd:online_layers=0.5,teacher_cache=new", "loss": "ours", "student": "llama-tiny",
        "teacher": "llama-tiny", "device": "cpu", "dtype": "fp32", "batch_size": 2, "length": 17, "warmup": 9,
        "steps": 2, "epochs": 3,
    }  # fmt: skip
    found = step.run_job(job)
    assert len(found["epochs_s"]) == 3 and len(found["step_s"]) == 4 and found["tokens"] == [2 * 9] * 4
    assert sum(found["epochs_s"][1:]) == pytest.approx(sum(found["step_s"]))
    assert min(found["epochs_s"]) > 0
    of_states = 2 * 2 * 17 * 64 * 4
    assert of_states < found["cache_bytes"] < of_states + 2000
    uncached = step.run_job({**job, "variant": "okd"})
    assert uncached["cache_bytes"] == 0 and step.summarise([uncached])["epochs_s"] == sum(uncached["epochs_s"])


def test_a_method_whose_loss_cannot_be_timed_is_refused():
    job = {
        "variant": "sft", "loss": "ours", "student": "llama-tiny", "teacher": "llama-tiny", "device": "cpu",
        "dtype": "fp32", "batch_size": 2, "length": 17, "warmup": 1, "steps": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="calls distil once a step, as forward_kd does; got 0 calls in 2 steps of sft"):
        step.run_job(job)


def test_variants_are_methods_with_typed_options():
    assert step.parse_variant("okd") == ("okd", {})
    found = step.parse_variant("okd:online_learning_rate=5e-5,online_rank=16,student_divergence=reverse_kl,bf16=False")
    assert found == (
        "okd",
        {"online_learning_rate": 5e-5, "online_rank": 16, "student_divergence": "reverse_kl", "bf16": False},
    )
    with pytest.raises(ValueError, match=r"expected a method out of .*; got 'okdd'"):
        step.parse_variant("okdd")
    for text in ("okd:rank=16", "okd:online_rank"):
        with pytest.raises(ValueError, match=r"expected name=value with an option of OKDConfig; got '.*rank"):
            step.parse_variant(text)


def test_common_options_go_to_the_methods_that_read_them():
    common = {"max_new_tokens": 9, "online_rank": 8, "student_ce_weight": 0.5, "weight_decay": 0.1}
    everywhere = {"student_ce_weight": 0.5, "weight_decay": 0.1}
    assert step.read_by("sft", {}, common) == everywhere
    assert step.read_by("gkd", {}, common) == {**everywhere, "max_new_tokens": 9}
    assert step.read_by("okd", {}, common) == {**everywhere, "online_rank": 8}
    assert step.read_by("okd", {"online_module": "prefix"}, common) == everywhere
    assert step.read_by("gkd", {"online_teacher": True}, common) == common
    together = {"online_teacher": True, "online_rank": 8}
    assert step.read_by("jsd", {}, together) == together
    assert step.read_by("sft", {}, together) == {}


@pytest.mark.slow
def test_a_job_that_fails_in_its_process_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)benchmarks.step exited with 1: .*KeyError: 'device'"):
        step.subprocess_job("benchmarks.step", {"variant": "okd"})


def test_a_candidate_that_fails_costs_no_other(monkeypatch, tmp_path, capsys):
    """What was measured is written after each process."""
    written = []

    def job(module, job):
        path = tmp_path / "step.json"
        written.append(json.loads(path.read_text())["results"] if path.is_file() else [])
        if job["variant"] == "okd":
            raise RuntimeError("benchmarks.step exited with 1:\nout of memory")
        steps = {name: [0.5, 0.5] for name in ("step_s", "before_s", "loss_s")}
        return {**steps, "tokens": [18, 18], "peak_bytes": 2**20, "epochs_s": [], "cache_bytes": 0}

    monkeypatch.setattr(step, "subprocess_job", job)
    models = ("--teacher", "llama-tiny", "--student", "llama-tiny", "--eager", "--rounds", "1", "--device", "cpu")
    step.main([*models, "--methods", "forward_kd", "okd", "reverse_kd", "--output", str(tmp_path / "step.json")])
    assert [len(results) for results in written] == [0, 1, 1]
    found = json.loads((tmp_path / "step.json").read_text())
    assert [row["variant"] for row in found["results"]] == ["forward_kd", "reverse_kd"]
    assert found["failed"] == {"okd, ours": "benchmarks.step exited with 1:\nout of memory"}
    assert "okd, ours: FAILED: out of memory" in capsys.readouterr().out


def test_candidates_beside_another_have_its_time(monkeypatch, tmp_path, capsys):
    """Cores change hands, and ratios are of what ran at the same time."""
    seen, speed = [], {"forward_kd": 2.0, "okd": 3.0, "okd:online_layers=0.5": 1.0}

    def job(module, job):
        seen.append((job["variant"], job["core"]))
        slow = 1.0 + 9.0 * (len(seen) > 4)  # the machine, in the second round
        steps = {name: [slow * speed[job["variant"]]] * 2 for name in ("step_s", "before_s", "loss_s", "epochs_s")}
        return {**steps, "tokens": [18, 18], "peak_bytes": 2**20, "cache_bytes": 0}

    monkeypatch.setattr(step, "subprocess_job", job)
    monkeypatch.setattr(step.os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    models = ("--teacher", "llama-tiny", "--student", "llama-tiny", "--device", "cpu", "--output")
    methods = ("--methods", "forward_kd", "okd", "okd:online_layers=0.5", "--beside", "forward_kd", "--rounds", "2")
    step.main([*models, str(tmp_path / "step.json"), *methods])
    found = json.loads((tmp_path / "step.json").read_text())["results"]
    assert {row["variant"]: row["ratios"]["step"] for row in found} == {
        "okd": [1.5, 1.5],
        "okd:online_layers=0.5": [0.5, 0.5],
    }
    assert {core for variant, core in seen if variant == "okd"} == {3, 5}
    assert "okd / forward_kd: step 1.500, epochs 1.500, peak 1.000" in capsys.readouterr().out


# --- methods ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    tiny.llama(seed=1, layers=3, hidden=48).save_pretrained(root / "teacher")
    tiny.tokenizer().save_pretrained(root / "teacher")
    (root / "train.jsonl").write_text("\n".join(json.dumps(e) for e in tiny.examples(40)))
    (root / "eval.jsonl").write_text("\n".join(json.dumps(e) for e in tiny.examples(12, seed=9)))
    return root


@pytest.fixture
def jobs(monkeypatch):
    """Jobs run in this process, at 0.1 s a step for okd and 0.05 s for others; the list of those that ran."""
    ran = []

    def in_process(module, job):
        ran.append(tuple(job[name] for name in ("kind", "variant", "seed", "steps")))
        result = json.loads(json.dumps(methods.JOBS[job["kind"]](job)))
        if "step_s" in result:
            result["step_s"] = 0.1 if job["variant"].startswith("okd") else 0.05
            result["filling_s"] = 0.15 if result["filling_s"] > 0 else 0.0
        return result

    monkeypatch.setattr(methods, "subprocess_job", in_process)
    monkeypatch.setattr(methods, "environment", lambda device: {"device": device})
    return ran


def compare(folder, output, *options):
    arguments = [
        "--train-file", str(folder / "train.jsonl"), "--eval-file", str(folder / "eval.jsonl"),
        "--output-dir", str(output), "--teacher", str(folder / "teacher"), "--student-layers", "0,2",
        "--answers", "4", "--max-new-tokens", "4", "--learning-rate", "1e-2", "--device", "cpu",
    ]  # fmt: skip
    methods.main([*arguments, *options])


def settings_of(output):
    return {**json.loads((output / "settings.json").read_text()), "output_dir": str(output)}


@pytest.mark.slow
def test_methods_are_compared_from_one_start_under_both_budgets_and_a_run_goes_on(folder, tmp_path, jobs, capsys):
    options = ("--methods", "okd", "sft", "--steps", "5", "--curve-points", "2")
    compare(folder, tmp_path, *options, "--seeds", "1")
    assert jobs == [
        ("prepare", "models", None, None), ("baseline", "student", None, None), ("baseline", "teacher", None, None),
        ("train", "okd", 0, 5), ("train", "sft", 0, 5),
        ("train", "sft", 0, 10),  # as many as fit the time of 5 steps of okd, whose run serves both tables
    ]  # fmt: skip
    lines = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    lines = {(x["kind"], x["variant"], x["steps"]): x for x in lines}
    okd, sft, start = (lines[key] for key in (("train", "okd", 5), ("train", "sft", 5), ("baseline", "student", None)))
    for run in (okd, sft):  # sft has no teacher, and a curve nevertheless; the last point comes after 5 steps, not 6
        assert [point[0] for point in run["curve"]] == [3, 5]
        assert 0 < run["curve"][0][1] < run["curve"][1][1] == pytest.approx(run["train_s"])
        assert run["curve"][-1][2] == pytest.approx(run["metrics"]["forward_kl"], rel=1e-5)  # 12 examples in both
    assert okd["curve"][-1][2] < 0.9 * start["curve"][0][2]
    assert sft["metrics"]["perplexity"] < 0.9 * start["metrics"]["perplexity"]
    assert lines["baseline", "teacher", None]["metrics"]["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert okd["teacher"]["teacher_shift"] > 1e-5 and "teacher" not in sft  # how far it moved

    jobs.clear()
    compare(folder, tmp_path, *options, "--seeds", "2")
    assert jobs == [("train", "okd", 1, 5), ("train", "sft", 1, 5), ("train", "sft", 1, 10)]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["tables"]) == ["Equal steps: 5", "Equal training time: 0.5 s"]
    found = summary["tables"]["Equal steps: 5"]["okd"]
    a, b = (run["metrics"]["forward_kl"] for run in found["runs"])
    assert a != b
    assert found["mean_and_deviation"]["forward_kl"] == pytest.approx([(a + b) / 2, abs(a - b) / 2**0.5])
    table = (tmp_path / "tables.md").read_text()
    assert f"{(a + b) / 2:.4f} ± {abs(a - b) / 2**0.5:.4f}" in table
    shift = found["mean_and_deviation"]["teacher_shift"][0]
    assert f" {shift:.4f} |" in table and "teacher_shift" not in summary["tables"]["Equal steps: 5"]["sft"]
    assert table in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    # the table's quality is that of `okd evaluate` on the models that were prepared
    student, teacher = (load_model(str(tmp_path / "models" / name)) for name in ("student", "teacher"))
    rows = encode(tiny.examples(12, seed=9), tiny.tokenizer(), max_length=256).rows
    metrics, _ = evaluate(student, teacher, tiny.tokenizer(), rows, generate=4, max_new_tokens=4, progress=False)
    assert start["metrics"] == pytest.approx(metrics)
    job = {**settings_of(tmp_path), "answers": 4, "answer_seeds": 2}
    both = methods.quality(job, student, teacher, tiny.tokenizer())
    sampled, _ = evaluate(student, None, tiny.tokenizer(), rows[:4], seeds=2, max_new_tokens=4, progress=False)
    assert both == pytest.approx(start["metrics"] | {"sampled_rouge_l": sampled["rouge_l"]})

    with pytest.raises(SystemExit, match="holds other settings"):
        compare(folder, tmp_path, *options, "--batch-size", "2")


def test_a_method_that_fails_leaves_the_others_and_is_tried_again(folder, tmp_path, jobs, monkeypatch, capsys):
    options = ("--methods", "forward_kd", "sft", "--steps", "2", "--seeds", "1", "--budgets", "steps")
    healthy = methods.subprocess_job

    def failing(module, job):
        if job["variant"] == "forward_kd":
            raise RuntimeError("benchmarks.methods exited with 1: out of memory")
        return healthy(module, job)

    monkeypatch.setattr(methods, "subprocess_job", failing)
    compare(folder, tmp_path, *options)
    assert "| forward_kd | 0 | failed |" in (tmp_path / "tables.md").read_text()
    assert "FAILED after 0 s: benchmarks.methods exited with 1: out of memory" in capsys.readouterr().out
    monkeypatch.setattr(methods, "subprocess_job", healthy)
    jobs.clear()
    compare(folder, tmp_path, *options)
    assert jobs == [("train", "forward_kd", 0, 2)]
    assert "failed" not in (tmp_path / "tables.md").read_text()


@pytest.mark.slow
def test_tuning_teaches_the_teacher_and_mends_the_student(folder, tmp_path, jobs):
    """On the data they are tuned on: the teacher's cross-entropy, and the student's KL to the teacher before that."""
    rows = encode(tiny.examples(40), tiny.tokenizer(), max_length=256).rows
    options = ("--methods", "sft", "--steps", "1", "--seeds", "1", "--budgets", "steps")
    found = {}
    for name, tuning in (("plain", ()), ("tuned", ("--tune-teacher", "20", "--tune-student", "20"))):
        compare(folder, tmp_path / name, *options, *tuning)
        student, teacher = (load_model(str(tmp_path / name / "models" / side)) for side in ("student", "teacher"))
        base = load_model(str(folder / "teacher"))
        for side, model in (("student", student), ("teacher", teacher)):
            assert model.config.num_hidden_layers == {"student": 2, "teacher": 3}[side]
            metrics, _ = evaluate(model, base, tiny.tokenizer(), rows, generate=0, progress=False)
            found[name, side] = metrics
    assert found["plain", "teacher"]["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert math.log(found["tuned", "teacher"]["perplexity"]) < 0.9 * math.log(found["plain", "teacher"]["perplexity"])
    assert found["tuned", "student"]["forward_kl"] < 0.7 * found["plain", "student"]["forward_kl"]


def test_a_dry_run_times_each_method_and_trains_none(folder, tmp_path, jobs, capsys):
    compare(folder, tmp_path, "--methods", "okd", "sft", "--steps", "600", "--seeds", "3", "--dry-run")
    kinds = [(kind, variant) for kind, variant, _, _ in jobs]
    assert kinds == [("prepare", "models"), ("baseline", "student"), ("probe", "okd"), ("probe", "sft")]
    lines = capsys.readouterr().out.splitlines()
    (okd,) = [line.split() for line in lines if line.startswith("okd ") and "s/step" in line]
    (sft,) = [line.split() for line in lines if line.startswith("sft ") and "s/step" in line]
    assert okd[1] == "0.10" and sft[1] == "0.05"
    # 3 seeds of 600 steps, and of the time that okd's take, beside what evaluating takes; okd's runs serve both
    assert float(okd[3]) >= 3.0 and float(okd[5]) == 0 and float(sft[3]) >= 1.5 and float(sft[5]) >= 3.0


@pytest.mark.slow
def test_time_alone_is_planned_from_probes_and_a_cache_pays_for_its_filling(folder, tmp_path, jobs):
    cached = "forward_kd:teacher_cache=new"
    options = ("--methods", "okd", "sft", cached, "--seconds", "0.4", "--seeds", "1", "--budgets", "time")
    compare(folder, tmp_path, *options)
    assert [job for job in jobs if job[0] != "baseline"][1:] == [
        ("probe", "okd", 0, 5), ("probe", "sft", 0, 5), ("probe", cached, 0, 5),
        ("train", "okd", 0, 4), ("train", "sft", 0, 8), ("train", cached, 0, 5),
    ]  # fmt: skip


def test_a_method_in_turns_is_compared_at_equal_steps_of_the_student(folder, tmp_path, jobs):
    """Twice the steps, whose even ones are the student's; and options of `--set` where they are read."""
    options = ("--methods", "clda", "sft", "--steps", "2", "--seeds", "1", "--set", "teacher_kl_weight=0.2")
    compare(folder, tmp_path, *options)
    assert [job for job in jobs if job[0] == "train"] == [
        ("train", "clda", 0, 4),
        ("train", "sft", 0, 2),
        ("train", "sft", 0, 4),  # in the time of 4 steps of clda, all of the same length here
    ]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["tables"]) == ["Equal steps: 2", "Equal training time: 0.2 s"]
    settings = settings_of(tmp_path)
    for variant, steps in (
        ("okd", 12), ("clda", 24), ("okd:alternating=True", 24), ("clda:alternating=False", 12),
        ("clda:online_start=0.5", 16),  # 8 alone, 8 in turns
        ("clda:online_start=0.25,online_stop=0.75", 16), ("okd:online_every=4", 12),
    ):  # fmt: skip
        assert methods.steps_of(settings, variant, 12) == steps
