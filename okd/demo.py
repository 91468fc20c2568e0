"""`okd demo`: a smaller student that answers like its teacher, in minutes on this machine."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from okd.config import OKDConfig
from okd.report import Run, read_run
from okd.run import RunConfig, run

QUESTIONS = Path(str(files("okd"))) / "questions"  # everyday ones, answered by the teacher (benchmarks/questions.py)


def demo(options: Any) -> tuple[RunConfig, OKDConfig]:
    """Distil the teacher into some of its own layers, and say what came of it.

    options: those of the command. Raises as `okd.run.run` does.
    """
    args = OKDConfig(
        method=options.method,
        output_dir=options.output_dir,
        seed=options.seed,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=16,
        learning_rate=3e-4,
        max_length=128,
        logging_steps=max(1, options.steps // 5),  # an entry costs forward passes
        save_strategy="no",
    )
    config = RunConfig(
        teacher=options.teacher,
        student_layers=options.student_layers,
        train_data=[str(QUESTIONS / "train.jsonl")],
        eval_data=[str(QUESTIONS / "held_out.jsonl")],
        eval_examples=48,
        eval_answers=12,
        eval_max_new_tokens=48,
        overwrite=options.overwrite,
    )
    run(config, args)
    if args.process_index == 0:
        print(f"\n{story(read_run(options.output_dir))}")
    return config, args


def story(run: Run) -> str:
    """What the student saves, and what an online teacher did meanwhile; as far as the run has recorded it."""
    said, speed, sizes = [], run.record.get("tokens_per_second", {}), run.record.get("parameters", {})
    if {"student", "teacher"} <= sizes.keys():
        student, teacher = (sizes[side] / 1e6 for side in ("student", "teacher"))
        said.append(f"The student has {student:.0f} M of the teacher's {teacher:.0f} M parameters")
    if {"student", "teacher"} <= speed.keys():
        student, teacher = speed["student"], speed["teacher"]
        said.append(f"It answers with {student:.0f} tokens a second, the teacher with {teacher:.0f}")
    if shifts := run.points("teacher_shift"):
        said.append(
            "Meanwhile the teacher learned, too: its online module, from the references and from what the\n"
            f"student finds likely. It has moved by {shifts[-1][1]:.3f} nats a token from the one that judges above"
        )
    if run.figures.get("method") == "okd":
        said.append(
            "On these questions, which the teacher knows, plain forward KD comes nearer to it, in less time: try\n"
            "okd demo --method forward_kd --output-dir okd-output/forward_kd, and okd report of both"
        )
    return "\n".join(f"{sentence}." for sentence in said)
