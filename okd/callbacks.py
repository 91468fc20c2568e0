"""What happens where `Trainer` calls back: the bar or lines of a run, and what goes on around the optimizer's step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from okd.clock import EVALUATING, GENERATING, UPDATE, running, timed
from okd.meters import Meters

SHOWN = {  # of an entry, beside the bar or in its place
    "student_loss": ("student", ".3f"),
    "teacher_loss": ("teacher", ".3f"),
    "base_forward_kl": ("KL", ".3f"),
    "eval_loss": ("held-out loss", ".3f"),
    "tokens_per_second": ("tok/s", ".0f"),
}


def brief(logs: Mapping[str, Any]) -> dict[str, str]:
    """The few numbers of an entry that are shown while a run goes on."""
    return {short: f"{logs[name]:{form}}" for name, (short, form) in SHOWN.items() if name in logs}


class Bar(ProgressCallback):
    """The training bar, with the last log entry beside it instead of a line for every entry."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and (shown := brief(logs or {})):
            self.training_bar.set_postfix(shown)


class Lines(TrainerCallback):
    """A line for every log entry, where there is no bar."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and (shown := brief(logs or {})):
            numbers = "  ".join(f"{name} {value}" for name, value in shown.items())
            place = f"step {state.global_step:,} of {state.max_steps:,}" if state.max_steps else "before training"
            print(f"{place}  {numbers}", flush=True)


class First(TrainerCallback):
    """What is to be done when a training begins: its models are where they will be, and nothing has changed yet; and
    when it ends, and the trackers have not been closed."""

    def __init__(self, begin: Callable[[], None], end: Callable[[], None] = lambda: None):
        self.begin, self.end = begin, end

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin()

    def on_train_end(self, args, state, control, **kwargs):
        self.end()


class AroundUpdate(TrainerCallback):
    """What happens around the optimizer's step, where `Trainer` calls back."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        trainer.check_divided()
        trainer.fill_cache()
        if state.is_world_process_zero:
            trainer.log_file.start(state.global_step)
        with timed(GENERATING):
            trainer.inside(lambda: trainer.sampler.begin_run(int(state.epoch or 0) if state.global_step else -1))
        trainer.accelerator.wait_for_everyone()
        if trainer.sampler.wants_reference and args.eval_strategy != "no":
            with timed(EVALUATING):
                trainer.sampler.on_evaluate(trainer.measured(trainer.first_eval_set())["cross_entropy"])
        trainer.meters, trainer._step = Meters(), []
        trainer.sampler.since = trainer.meters.since

    def on_epoch_begin(self, args, state, control, **kwargs):
        trainer, epoch = self.trainer, int(state.epoch or 0)
        trainer.sampler.push(epoch=epoch)
        with timed(GENERATING), trainer.accelerator.autocast():
            trainer.inside(lambda: trainer.sampler.begin_epoch(epoch), trainer.pair.student)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if (clock := running()) is not None:
            clock.enter(UPDATE)
        self.trainer.before_update()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.after_update()
        if (clock := running()) is not None:
            clock.leave()
