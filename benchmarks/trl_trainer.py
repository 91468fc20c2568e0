"""TRL's DistillationTrainer and the subclass of docs/how-to/trl.md: `python -m benchmarks.trl_trainer --train-file F`.

The same run of both: prompts out of a file, completions that the student samples, TRL's own step around the loss. Each
is a process of its own, by turns and back; its first steps are discarded. TRL seeds a run, so that both see the same
prompts and, as long as their weights agree to rounding, write the same completions: hence TRL's own learning rate,
1e-6, and the loss of each step beside the other's.

Of a step, "learning" is what is left without the sampling: both models' forward, loss, backward, clipping and AdamW.
Memory: peak resident set over all steps, weights included.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset

from benchmarks.loss import environment
from benchmarks.step import Clock, peak_bytes, reset_peak, save_models, subprocess_job
from okd.models import SMOLLM2, load_model, load_tokenizer

ROOT = Path(__file__).parent.parent
LOSSES = ("trl", "ours")


def block(text: str) -> str:
    """The Python block of the page that has this text in it."""
    page = (ROOT / "docs" / "how-to" / "trl.md").read_text()
    (found,) = [x for x in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if text in x]
    return found


def fused() -> type[trl.DistillationTrainer]:
    """`FusedDistillationTrainer`, as the page shows it."""
    namespace: dict[str, Any] = {}
    exec(block("class FusedDistillationTrainer"), namespace)
    return namespace["FusedDistillationTrainer"]


def prompts(path: str, tokenizer: Any, count: int, longest: int) -> list[dict[str, Any]]:
    """The first `count` of a file whose prompt, rendered, has at most `longest` tokens. Raises ValueError for fewer."""
    found: list[dict[str, Any]] = []
    for line in Path(path).read_text().splitlines():
        messages = [{"role": "user", "content": json.loads(line)["prompt"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        if len(ids) <= longest:
            found.append({"prompt": messages})
        if len(found) == count:
            return found
    raise ValueError(
        f"expected {count} prompts of at most {longest} tokens in {path}; got {len(found)}: take fewer steps"
    )


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """A few steps of one of both in this process, the warm-up left out."""
    count, rows = job["warmup"] + job["steps"], job["batch_size"]
    student, teacher = (load_model(job[side], torch.float32) for side in ("student", "teacher"))
    tokenizer = load_tokenizer(job["tokenizer"])
    data = Dataset.from_list(prompts(job["train_file"], tokenizer, count * rows, job["length"] - job["completion"]))
    clock, generating = Clock("cpu"), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        args = trl.DistillationConfig(
            output_dir=folder,
            beta=job["beta"],
            max_steps=count,
            per_device_train_batch_size=rows,
            max_completion_length=job["completion"],
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=job["seed"],
        )
        kind = fused() if job["loss"] == "ours" else trl.DistillationTrainer
        trainer = kind(student, teacher, args, data, processing_class=tokenizer, callbacks=[clock])
        generate = trainer._generate_single_turn

        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            completions = generate(*arguments, **options)
            generating.append(time.perf_counter() - start)
            return completions

        trainer._generate_single_turn = timed
        reset_peak("cpu")
        trainer.train()
    logged = [x for x in trainer.state.log_history if "loss" in x]
    return {
        "step_s": clock.steps[job["warmup"] :],
        "learning_s": [a - b for a, b in zip(clock.steps, generating, strict=True)][job["warmup"] :],
        "loss": [x["loss"] for x in logged],
        "completion_tokens": [rows * x["completions/mean_length"] for x in logged],
        "peak_bytes": peak_bytes("cpu"),
    }


def summarise(beta: float, rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Of one beta: medians and peaks of both, medians of the rounds' ratios, and how far the losses are apart."""
    found: dict[str, Any] = {"beta": beta}
    for loss in LOSSES:
        found[loss] = {
            "median_s": statistics.median(x for r in rounds for x in r[loss]["step_s"]),
            "median_learning_s": statistics.median(x for r in rounds for x in r[loss]["learning_s"]),
            "peak_bytes": max(r[loss]["peak_bytes"] for r in rounds),
        }
    pairs = [pair for r in rounds for pair in zip(r["trl"]["loss"], r["ours"]["loss"], strict=True)]
    found["largest_relative_difference_of_losses"] = max(abs(a - b) / abs(a) for a, b in pairs)
    for name in ("step_s", "learning_s"):
        ratios = [statistics.median(r["trl"][name]) / statistics.median(r["ours"][name]) for r in rounds]
        found[f"{name}_trl_over_ours"] = statistics.median(ratios)
    return {**found, "rounds": rounds}


def show(results: list[dict[str, Any]]) -> None:
    print(f"\n{'beta':<6}{'loss':<6}{'s/step':>8}{'learning':>10}{'peak MiB':>10}")
    for x in results:
        for loss in LOSSES:
            one = x[loss]
            print(
                f"{x['beta']:<6}{loss:<6}{one['median_s']:>8.2f}{one['median_learning_s']:>10.2f}"
                f"{one['peak_bytes'] / 2**20:>10.0f}"
            )
        print(
            f"trl / ours: step {x['step_s_trl_over_ours']:.2f}, learning {x['learning_s_trl_over_ours']:.2f}; "
            f"losses apart by {x['largest_relative_difference_of_losses']:.1e} at most"
        )
        for a, b in zip(x["rounds"][0]["trl"]["loss"], x["rounds"][0]["ours"]["loss"], strict=True):
            print(f"    {a:.7f} {b:.7f}")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train-file", help="JSON lines with a prompt each")
    add("--teacher", default=SMOLLM2)
    add("--student", help="default: layers of the teacher")
    add("--student-layers", default="0-9,20-29")
    add("--betas", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    add("--batch-size", type=int, default=4)
    add("--length", type=int, default=256, help="most tokens of a row")
    add("--completion", type=int, default=128, help="most of these that the student writes")
    add("--steps", type=int, default=4, help="measured steps of a process")
    add("--warmup", type=int, default=1, help="steps before them")
    add("--rounds", type=int, default=2, help="processes of each")
    add("--output", type=Path, default=ROOT / "benchmarks" / "results" / "cpu-trl-trainer.json")
    add("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not args.job and not args.train_file:
        parser.error("expected --train-file, JSON lines with a prompt each")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    if args.job:
        print(json.dumps(run_job(json.loads(args.job))))
        return
    about = environment("cpu")
    told = {name: x for name, x in vars(args).items() if name not in ("job", "output")}
    told["train_file"] = Path(args.train_file).name
    rounds: dict[float, list[dict[str, dict[str, Any]]]] = {beta: [] for beta in args.betas}
    print(f"{about['device']}, {about['threads']} threads, commit {about['commit']}, {about['versions']}")
    with tempfile.TemporaryDirectory() as folder:
        student, teacher = save_models(args, Path(folder))
        names = ("train_file", "batch_size", "length", "completion", "steps", "warmup")
        shape = {name: getattr(args, name) for name in names}
        shape |= {"student": student, "teacher": teacher, "tokenizer": args.teacher}
        for number in range(args.rounds):
            for beta, measured in rounds.items():
                found = {}
                for loss in LOSSES[:: 1 if number % 2 == 0 else -1]:
                    job = {**shape, "beta": beta, "loss": loss, "seed": number}
                    found[loss] = subprocess_job("benchmarks.trl_trainer", job)
                    seconds = statistics.median(found[loss]["step_s"])
                    print(f"round {number + 1}: beta {beta}, {loss}: {seconds:.2f} s/step", flush=True)
                measured.append(found)
            results = [summarise(beta, x) for beta, x in rounds.items()]
            args.output.write_text(json.dumps({**about, "arguments": told, "results": results}, indent=1) + "\n")
    show(results)
    print(f"\n{args.output}")


if __name__ == "__main__":
    main()
