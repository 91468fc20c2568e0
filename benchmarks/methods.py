"""Which method makes the best student? `python -m benchmarks.methods --train-file F --eval-file F --output-dir D`.

All methods start from one student and one teacher, read one file, and are judged on another against the (tuned) base
teacher, over several seeds, under two budgets: equal steps, and equal training time W, in which each method takes as
many steps as fit W by its own step time, its learning-rate schedule fitted to them. W is `--seconds`, or else what the
first method's `--steps` steps take, whose runs then serve both tables. Training time excludes loading and all
evaluation, and includes generating.

Steps are compared as steps of the student. Where student and online module learn in turns (clda), the student has every
other one, so that such a method takes twice as many; its learning-rate schedule is fitted to those.

A method may carry options: `okd:teacher_kl_weight=0.9,online_learning_rate=5e-5`. One with `teacher_cache=new` fills a
cache of its own before its first step, in its training time. Each (method, seed, steps) is a process of its own, so
that its memory is its own, and its result a line of results.jsonl: a run that was killed goes on where it was, and more
methods or seeds can be added. `--dry-run` times a few steps of each and estimates the rest.

The paper's protocol fine-tunes the teacher on the training data first (`--tune-teacher`: steps of LoRA SFT, merged),
and its students are pre-trained models: a student that has lost layers is mended first (`--tune-student`: steps, by
default of forward KD from the teacher as it was before its own tuning). Both are made once, under output-dir/models.

`--preset small` wants no download: `benchmarks.small` makes tokenizer, teacher and student of the training file.
`--labelled N` leaves the students N of its rows, others with each seed. On one thread (`--threads 1`) training time is
the process's CPU time, which other work on the machine hardly changes, so that `--jobs J` may run J processes at once.

Each table is followed by paired differences to forward_kd, or to the first method where that is not among them: the
mean over the seeds that both have, and its 95 % interval by Student's t.

Of an online teacher the table says how far its module has moved it, KL(base ‖ online teacher), and its own CE.

Peak memory is of training in its process, with the teacher that judges, which sft would not need.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

from benchmarks import small
from benchmarks.loss import environment
from benchmarks.step import (
    KNOWN,
    Clock,
    parse_options,
    parse_variant,
    peak_bytes,
    read_by,
    reset_peak,
    subprocess_job,
)
from benchmarks.tables import aggregate, differences, plot, table, table_of_differences
from okd import OKDConfig, OKDTrainer
from okd.config import MethodLike
from okd.encoding import encode
from okd.evaluate import divergence_metrics, evaluate
from okd.examples import read_jsonl
from okd.layers import keep_layers, parse_layers
from okd.models import SMOLLM2, load_model, load_tokenizer
from okd.online import distance_from_base
from okd.vocabularies import check_tokenizers

DEFAULT_METHODS = ("okd", "sft", "forward_kd", "gkd")
TEACHER_RANK = 16  # of the LoRA that `--tune-teacher` merges
PROBE_STEPS = 5  # that time a method; the first is left out, the others are as many odd as even ones
EVAL_BATCH = 32
SETTINGS = (  # what all lines of a results.jsonl have in common
    "train_file", "eval_file", "labelled", "threads", "teacher", "student", "student_layers",
    "tune_teacher", "tune_student", "tune_student_method", "batch_size", "max_length", "learning_rate", "set", "device",
    "eval_examples", "answers", "answer_seeds", "max_new_tokens", "curve_examples", "curve_points",
)  # fmt: skip


# --- a job: one process ---


def load(job: dict[str, Any], *names: str) -> list[Any]:
    """The tokenizer, and models that `prepare` made."""
    folder = Path(job["output_dir"]) / "models"
    return [load_tokenizer(str(folder / "teacher")), *(load_model(str(folder / n)).to(job["device"]) for n in names)]


def training_arguments(job: dict[str, Any], folder: str, method: MethodLike, steps: int, **options: Any) -> OKDConfig:
    """Common options, then those of the job's `--set` that the method reads, then these."""
    common = {
        "output_dir": folder,
        "method": method,
        "max_steps": steps,
        "per_device_train_batch_size": job["batch_size"],
        "max_length": job["max_length"],
        "learning_rate": job["learning_rate"],
        "logging_strategy": "no",
        "logging_first_step": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": job["device"] == "cpu",
    }
    if "teacher_cache" in options:  # each training fills its own, which counts as its time
        options = {**options, "teacher_cache": f"{folder}/cache"}
    return OKDConfig(**{**common, **read_by(method, options, parse_options(job["set"])), **options})


def steps_of(settings: dict[str, Any], variant: str, student_steps: int) -> int:
    """Steps in which the student learns so many times: where it learns in turns with the teacher, twice as many, but
    for the shares of the training before the teacher begins (`online_start`) and after it rests (`online_stop`)."""
    method, options = parse_variant(variant)
    args = training_arguments({**settings, "device": "cpu"}, settings["output_dir"], method, 1, **options)
    if not args.resolved.alternating:
        return student_steps
    return round(2 * student_steps / (2 - args.online_stop + args.online_start))


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Write models/teacher and models/student, tuned where the settings say so."""
    make = small.make if job["teacher"].startswith(small.PREFIX) else shorten
    tokenizer, teacher, student = make(job, tune)
    models = Path(job["output_dir"]) / "models"
    unfinished = models.with_name("models.part")
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(unfinished / name)
        tokenizer.save_pretrained(unfinished / name)
    os.replace(unfinished, models)
    return {}


def shorten(job: dict[str, Any], tune: Callable[..., None]) -> tuple[Any, Any, Any]:
    """Tokenizer, teacher, and a student that is another model or a part of the teacher's layers."""
    import peft

    tokenizer, teacher = load_tokenizer(job["teacher"]), load_model(job["teacher"]).to(job["device"])
    if job["student"] is None:
        n_layers = teacher.config.get_text_config().num_hidden_layers
        student = keep_layers(teacher, parse_layers(job["student_layers"], n_layers))
    else:
        check_tokenizers(load_tokenizer(job["student"]), tokenizer)
        student = load_model(job["student"]).to(job["device"])
    data = encode(read_jsonl(job["train_file"]), tokenizer, max_length=job["max_length"]).rows
    if job["tune_student"]:
        tune(job, student, tokenizer, job["tune_student"], data, teacher=teacher, method=job["tune_student_method"])
    if job["tune_teacher"]:
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=TEACHER_RANK, lora_alpha=2 * TEACHER_RANK, target_modules="all-linear"
        )
        adapted: Any = peft.get_peft_model(teacher, config)
        tune(job, adapted, tokenizer, job["tune_teacher"], data)
        teacher = adapted.merge_and_unload()
    return tokenizer, teacher, student


def tune(
    job: dict[str, Any],
    model: Any,
    tokenizer: Any,
    steps: int,
    rows: Any,
    eval_rows: Any = None,
    teacher: Any = None,
    method: str = "sft",
    **options: Any,
) -> None:
    transformers.set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(job, folder, method, steps, **options)
        OKDTrainer(model, teacher, args, rows, eval_rows, processing_class=tokenizer).train()


def labelled(settings: dict[str, Any], tokenizer: Any, seed: int) -> Sequence[Any]:
    """What the students learn from: all rows of the training file, or N that the seed draws from those that a small
    teacher is trained on. Raises ValueError where there are fewer."""
    examples, count = read_jsonl(settings["train_file"]), settings["labelled"]
    if count is None:
        return encode(examples, tokenizer, max_length=settings["max_length"]).rows
    rows = encode(small.split(examples)[0], tokenizer, max_length=settings["max_length"]).rows
    if len(rows) < count:
        raise ValueError(f"expected {count} labelled rows; got {len(rows)}: pass a smaller --labelled")
    return random.Random(seed).sample(rows, count)


def held_out(job: dict[str, Any], tokenizer: Any) -> list[dict[str, Any]]:
    return encode(read_jsonl(job["eval_file"]), tokenizer, max_length=job["max_length"]).rows


def quality(job: dict[str, Any], student: Any, teacher: Any, tokenizer: Any) -> dict[str, Any]:
    """All metrics of `okd.evaluate` on the held-out examples, `rouge_l` of greedy answers; and of sampled ones."""
    rows = held_out(job, tokenizer)[: job["eval_examples"]]
    options = {"max_new_tokens": job["max_new_tokens"], "batch_size": EVAL_BATCH, "progress": False}
    metrics: dict[str, Any] = evaluate(student, teacher, tokenizer, rows, generate=job["answers"], **options)[0]
    if job["answer_seeds"] > 1:
        sampled = evaluate(student, None, tokenizer, rows[: job["answers"]], seeds=job["answer_seeds"], **options)[0]
        metrics["sampled_rouge_l"] = sampled["rouge_l"]
    return metrics


def curve_point(student: Any, teacher: Any, rows: list[dict[str, Any]], tokenizer: Any) -> list[float]:
    """KL to the teacher, and CE."""
    found = divergence_metrics(student, teacher, rows, pad_token_id=tokenizer.pad_token_id, progress=False)
    return [found["forward_kl"], math.log(found["perplexity"])]


def baseline(job: dict[str, Any]) -> dict[str, Any]:
    """The student before training, or the teacher in its place; and what a point of a curve costs."""
    tokenizer, student, teacher = load(job, job["variant"], "teacher")
    rows = held_out(job, tokenizer)[: job["curve_examples"]]
    started = time.perf_counter()
    curve = [[0, 0.0, *curve_point(student, teacher, rows, tokenizer)]]
    seconds = time.perf_counter() - started
    return {"metrics": quality(job, student, teacher, tokenizer), "curve": curve, "curve_s": seconds}


class CPUClock(Clock):
    """CPU time of the process, of all its threads."""

    def _now(self) -> float:
        return time.process_time()


class Curve(TrainerCallback):
    """At each evaluation [step, seconds of training, KL to the base teacher, CE], nats per token."""

    def __init__(self, clock: Clock, measure: Callable[[], list[float]]):
        self.clock, self.measure = clock, measure
        self.points: list[list[float]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        if "eval_forward_kl" in metrics:
            found = [metrics["eval_forward_kl"], math.log(metrics["eval_perplexity"])]
        else:  # the method has no teacher
            found = self.measure()
        self.points.append([state.global_step, sum(self.clock.steps), *found])


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train one student; its curve, its quality, its cost. A probe is only timed."""
    method, options = parse_variant(job["variant"])
    tokenizer, student, teacher = load(job, "student", "teacher")
    data = labelled(job, tokenizer, job["seed"])
    rows = held_out(job, tokenizer)[: job["curve_examples"]]
    steps, probe = job["steps"], job["kind"] == "probe"
    if not probe:
        options = {"eval_strategy": "steps", "eval_steps": math.ceil(steps / job["curve_points"]), **options}
    transformers.set_seed(job["seed"])
    clock = (CPUClock if job["threads"] == 1 and job["device"] == "cpu" else Clock)(job["device"])
    curve = Curve(clock, lambda: curve_point(student, teacher, rows, tokenizer))
    with tempfile.TemporaryDirectory() as folder:
        args = training_arguments(job, folder, method, steps, seed=job["seed"], **options)
        # the clock comes last: it goes on when the curve has its point
        given = teacher if args.self_teacher is None else None
        trainer = OKDTrainer(student, given, args, data, rows, processing_class=tokenizer, callbacks=[curve, clock])
        reset_peak(job["device"])
        trainer.train()
        step = statistics.fmean(clock.steps[1:] or clock.steps)  # the first allocates
        result: dict[str, Any] = {
            "train_s": sum(clock.steps),
            "step_s": step,
            "filling_s": clock.steps[0] - step if trainer.cache is not None else 0.0,
            "generating_share": sum(clock.before) / sum(clock.steps),
            "peak_bytes": peak_bytes(job["device"]),
        }
        if probe:
            return result
        if not curve.points or curve.points[-1][0] < steps:
            trainer.evaluate()
    judge = trainer.pair.teacher if getattr(trainer.pair.teacher, "judges", False) else teacher
    if trainer.args.online:
        rows = held_out(job, tokenizer)[: job["eval_examples"]]
        result["teacher"] = trainer.held_out_means(rows, distance_from_base)
    return {**result, "metrics": quality(job, student, judge, tokenizer), "curve": curve.points}


JOBS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "prepare": prepare,
    "baseline": baseline,
    "probe": train,
    "train": train,
}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    with redirect_stdout(sys.stderr):
        return JOBS[job["kind"]](job)


# --- the run: each job is kept when it is done ---


def forked_job(job: dict[str, Any]) -> dict[str, Any]:
    """The job's result from a process of its own, forked from one that has imported everything, as importing takes as
    long as a small job. Raises RuntimeError where it failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__spec__.name])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(run_job, job).result()
        except Exception as error:
            raise RuntimeError("".join(traceback.format_exception(error)).strip()) from error


class Results:
    """Lines of results.jsonl, one for each job, by (kind, variant, seed, steps)."""

    def __init__(self, settings: dict[str, Any]):
        self.settings = settings
        self.path = Path(settings["output_dir"]) / "results.jsonl"
        self.writing = threading.Lock()
        lines = self.path.read_text().splitlines() if self.path.is_file() else []
        self.found = {self._key(line): line for line in map(json.loads, lines) if "failed" not in line}

    @staticmethod
    def _key(job: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(job.get(name) for name in ("kind", "variant", "seed", "steps"))

    def get(self, kind: str, variant: str, seed: int | None = None, steps: int | None = None) -> dict[str, Any] | None:
        return self.found.get((kind, variant, seed, steps))

    def run(self, kind: str, variant: str, seed: int | None = None, steps: int | None = None) -> dict[str, Any] | None:
        """The job's result, kept or new; None where it failed, which a later run tries again."""
        job = {"kind": kind, "variant": variant, "seed": seed, "steps": steps}
        if self._key(job) in self.found:
            return self.found[self._key(job)]
        started = time.perf_counter()
        try:
            whole = {**self.settings, **job}
            result = {**job, **(forked_job(whole) if whole["threads"] else subprocess_job("benchmarks.methods", whole))}
        except RuntimeError as error:
            result = {**job, "failed": str(error)}
        wall = result["wall_s"] = time.perf_counter() - started
        with self.writing, self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        name = " ".join(str(x) for x in (variant, *(["seed", seed, "steps", steps] if steps else [kind])))
        if "failed" in result:
            print(f"{name}: FAILED after {wall:.0f} s: {result['failed'].splitlines()[-1]}", flush=True)
            return None
        self.found[self._key(job)] = result
        metrics = result.get("metrics", {})
        shown = [
            f"{k} {metrics[k]:.4g}" for k in ("rouge_l", "forward_kl", "top1_agreement") if metrics.get(k) is not None
        ]
        print(f"{name}: {', '.join([*shown, f'{wall:.0f} s'])}", flush=True)
        return result


def wall_clock_plan(results: Results, args: argparse.Namespace) -> dict[str, Any] | None:
    """{"seconds": W, "steps": {variant: steps that fit W}}, by the step times of equal steps, else of probes.

    Written to plan.json, so that a run that goes on, or gains seeds, keeps to it. None without the first method's time.
    """
    path = results.path.with_name("plan.json")
    plans = json.loads(path.read_text()) if path.is_file() else {}
    name = f"{args.steps} steps, {f'{args.seconds:g} s' if args.seconds else f'time of {args.methods[0]}'}"
    times: dict[str, tuple[float, float]] = {}  # of a step, and of filling a cache before the first
    for variant in args.methods:
        if "steps" in args.budgets:
            steps = steps_of(results.settings, variant, args.steps)
            runs = [results.get("train", variant, seed, steps) for seed in args.seeds]
        else:
            runs = [results.run("probe", variant, 0, PROBE_STEPS)]
        taken = [(run["step_s"], run.get("filling_s", 0.0)) for run in runs if run is not None]
        if taken:
            step, filling = map(statistics.fmean, zip(*taken, strict=True))
            times[variant] = step, filling
    first = args.methods[0]
    if not args.seconds and first not in times:
        return None
    reference = args.seconds or times[first][0] * steps_of(results.settings, first, args.steps) + times[first][1]
    plan = plans.setdefault(name, {"seconds": reference, "steps": {}})
    for variant, (step, filling) in times.items():
        plan["steps"].setdefault(variant, max(1, round((plan["seconds"] - filling) / step)))
    path.write_text(json.dumps(plans, indent=1))
    return plan


def estimate(results: Results, args: argparse.Namespace) -> float:
    """Seconds that the jobs still missing will take, from probes and the baseline, which it runs. Prints them."""
    start = results.run("baseline", "student")
    if start is None:
        raise SystemExit("the start could not be measured: see above")
    overhead = start["wall_s"] + (args.curve_points - 1) * start["curve_s"]
    total, reference = 0.0, args.seconds
    for variant in args.methods:
        probe = results.run("probe", variant, 0, PROBE_STEPS)
        if probe is None:
            continue
        seconds, steps = probe["step_s"], steps_of(results.settings, variant, args.steps)
        reference = reference or seconds * steps
        missing = [s for s in args.seeds if results.get("train", variant, s, steps) is None]
        steps_part = len(missing) * (steps * seconds + overhead) if "steps" in args.budgets else 0.0
        timed = "time" in args.budgets and round(reference / seconds) != steps
        time_part = len(args.seeds) * (reference + overhead) if timed else 0.0
        total += steps_part + time_part
        print(f"{variant:<40}{seconds:>6.2f} s/step{steps_part / 60:>7.1f} min{time_part / 60:>7.1f} min")
    total /= args.jobs
    print(f"about {total / 60:.0f} min, of which evaluating and loading take {overhead:.0f} s a job")
    return total


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train-file", help="JSON lines")
    add("--eval-file", help="JSON lines")
    add("--output-dir", default="okd-output/methods", help="default: %(default)s")
    add(
        "--methods",
        nargs="+",
        default=list(DEFAULT_METHODS),
        metavar="METHOD[:OPTION=VALUE,...]",
        help="the first sets W",
    )
    add("--seeds", type=int, default=3, help="of each method")
    add("--first-seed", type=int, default=0, help="another one for what is tuned, and not reported")
    add("--steps", type=int, default=24, help="of equal steps, in which the student learns")
    add("--epochs", type=float, help="of the student over what is labelled, in place of steps")
    add("--jobs", type=int, default=1, help="processes at once")
    add("--threads", type=int, help="of each process; with 1, training time is CPU time")
    add("--preset", choices=("small",), help="models made here: defaults of benchmarks.small for other options")
    add("--labelled", type=int, metavar="N", help="rows that the students learn from; default: all")
    add("--seconds", type=float, help="W; default: the time of the first method's steps")
    add("--budgets", nargs="+", choices=("steps", "time"), default=["steps", "time"])
    add("--teacher", default=SMOLLM2)
    add("--student", help="default: layers of the teacher")
    add("--student-layers", default="0-9,20-29")
    add("--tune-teacher", type=int, default=0, metavar="STEPS")
    add("--tune-student", type=int, default=0, metavar="STEPS")
    add("--tune-student-method", choices=("forward_kd", "sft"), default="forward_kd")
    add("--batch-size", type=int, default=4)
    add("--max-length", type=int, default=256)
    add("--learning-rate", type=float, default=2e-4)
    add("--set", nargs="+", default=[], metavar="OPTION=VALUE", help="of OKDConfig, for all that read it, tuning too")
    add("--eval-examples", type=int, default=64, help="held-out examples of the tables")
    add("--answers", type=int, default=32, help="of these, answered greedily for ROUGE-L")
    add("--answer-seeds", type=int, default=0, help="2 or more: also answers sampled at T = 1, of so many seeds")
    add("--max-new-tokens", type=int, default=32)
    add("--curve-examples", type=int, default=32, help="held-out examples of the curves")
    add("--curve-points", type=int, default=3)
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dry-run", action="store_true", help="estimate the time, from a few steps of each method")
    add("--job", help=argparse.SUPPRESS)
    if parser.parse_known_args(argv)[0].preset:
        parser.set_defaults(**small.OPTIONS)
    args = parser.parse_args(argv)
    args.seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    if not args.job:
        for name in ("train_file", "eval_file"):
            if getattr(args, name) is None:
                parser.error(f"expected --{name.replace('_', '-')} with JSON lines")
        parse_options(args.set)
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.job:
        print(json.dumps(run_job(json.loads(args.job))))
        return
    absent = [variant for variant in args.methods if variant.partition(":")[0] not in KNOWN]
    for variant in absent:
        print(f"skipped: {variant}, which is no method of this version")
    args.methods = [variant for variant in args.methods if variant not in absent]
    for variant in args.methods:
        parse_variant(variant)
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in SETTINGS}
    path = output / "settings.json"
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise SystemExit(f"{path} holds other settings than these; pass another --output-dir, or the same options")
    path.write_text(json.dumps(settings, indent=1))

    results = Results({**settings, "output_dir": args.output_dir})
    if not (output / "models").is_dir() and results.run("prepare", "models") is None:
        raise SystemExit("the models could not be prepared: see above")
    if args.epochs:
        rows = len(labelled(settings, load_tokenizer(str(output / "models" / "teacher")), seed=0))
        args.steps = math.ceil(args.epochs * math.ceil(rows / args.batch_size))
    if args.dry_run:
        estimate(results, args)
        return

    def run_all(jobs: Iterable[tuple[Any, ...]]) -> list[dict[str, Any] | None]:
        with ThreadPoolExecutor(args.jobs) as pool:
            return list(pool.map(lambda job: results.run(*job), jobs))

    sides = ("student", "teacher")
    baselines = dict(zip(sides, run_all(("baseline", side) for side in sides), strict=True))
    tables: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def train_all(title: str, steps: dict[str, int]) -> None:
        """Seed by seed, so that a run that is cut short has compared what it has."""
        runs = [run for run in run_all(("train", v, seed, n) for seed in args.seeds for v, n in steps.items()) if run]
        tables[title] = {variant: [run for run in runs if run["variant"] == variant] for variant in args.methods}

    if "steps" in args.budgets:
        steps = {variant: steps_of(results.settings, variant, args.steps) for variant in args.methods}
        train_all(f"Equal steps: {args.steps}", steps)
    plan = wall_clock_plan(results, args) if "time" in args.budgets else None
    if plan is not None:
        fitting = {variant: plan["steps"][variant] for variant in args.methods if variant in plan["steps"]}
        train_all(f"Equal training time: {plan['seconds']:.3g} s", fitting)
    known = {name: result for name, result in baselines.items() if result is not None}
    text = "\n\n".join(f"{table(title, rows, known)}\n\n{table_of_differences(rows)}" for title, rows in tables.items())
    print(f"\n{text}")
    (output / "tables.md").write_text(text + "\n")
    if "student" in known:
        plot(tables, known["student"], output / "curves.png")
    summary = {
        **environment(args.device),
        "arguments": {name: value for name, value in vars(args).items() if name != "job"},
        "skipped": absent,
        "baselines": baselines,
        "tables": {
            title: {v: {"mean_and_deviation": aggregate(r) if r else None, "runs": r} for v, r in rows.items()}
            for title, rows in tables.items()
        },
        "differences": {title: differences(rows) for title, rows in tables.items()},
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\n{output}/tables.md, curves.png, summary.json")


if __name__ == "__main__":
    main()
