"""What is refused, or warned of, before a run begins: models, arguments, data, who writes, processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from okd import sampling
from okd.data import Row, column, lengths_of, start_of_response
from okd.decoding import Decoder, check_writing, recurrent_layers
from okd.encoding import Stream
from okd.ensemble import models_of
from okd.models import check_head, check_packing, evaluating, has_weights, position_limit
from okd.on_policy import PolicyGradientOptions
from okd.selection import Policy
from okd.sharding import is_elsewhere, ranks
from okd.teachers import Averaged
from okd_kernels import has_fast_gemm

logger = logging.get_logger(__name__)


def check_student(student: Any) -> None:
    """Raise ValueError for a student that cannot be trained by this loss."""
    if not any(p.requires_grad for p in student.parameters()):
        raise ValueError("expected a student with trainable parameters; all are frozen: call requires_grad_()")
    check_trained_dtypes("student", student)
    if not is_elsewhere(student):
        check_head(student, "student")


def check_packed(options: Any, student: Any, teacher: Any) -> None:
    """Raise ValueError for a model whose rows on one line of a packed batch would see one another."""
    if options.packing and not is_elsewhere(student):
        check_packing(student, "student")
        for model in models_of(teacher):
            if model is not None and has_weights(model):
                check_packing(model, "teacher")


def check_models(options: Any, student: Any, teacher: Any) -> None:
    """Raise ValueError for what shows in a forward: heads that do more than a product, lines of rows."""
    for name, model in (("student", student), ("teacher", getattr(teacher, "model", None))):
        if model is not None:
            check_head(model, name)
            if options.packing:
                check_packing(model, name)


def check_trained_dtypes(name: str, model: nn.Module) -> None:
    """Raise ValueError where fp16 weights would train, warn where bf16 ones would.

    AdamW moves a weight by about the learning rate, which bf16 rounds away from 256 of them on.
    """
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    if torch.float16 in dtypes:
        raise ValueError(
            f"expected the {name} in float32, since its weights train; got float16, which loses their updates: call "
            ".float() on it (okd train: --dtype float32), and pass fp16=True to compute in fp16"
        )
    if torch.bfloat16 in dtypes:
        logger.warning(
            f"expected the {name} in float32, since its weights train; got bfloat16, in which updates below a 256th of "
            "a weight are lost: call .float() on it (okd train: --dtype float32), and pass bf16=True to compute in bf16"
        )


def check_arguments(tokenizer: Any, ignored: Mapping[str, Any]) -> None:
    """Raise ValueError without a tokenizer, or for arguments of transformers' Trainer that would never be asked."""
    if tokenizer is None:
        raise ValueError("expected processing_class, the tokenizer of both models; got None")
    given = [name for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics") if
             ignored.get(name) is not None]  # fmt: skip
    if given:
        raise ValueError(
            f"expected no {given[0]}, as the loss and its metrics are the method's; got one: give OKDConfig a Method "
            "with a loss of your own, or override OKDTrainer.evaluate"
        )


def check_stream(options: Any, train: Any) -> None:
    """Raise ValueError for a `Stream` of training data where all of them, or their number, must be known."""
    method = options.resolved
    if not isinstance(train, Stream):
        return
    if method.generate != "step":
        raise ValueError(
            f"expected all training data at once with method {method.name}, which keeps a response to each example; "
            "got a stream: leave stream out, or pass generate=step"
        )
    if options.teacher_cache is not None:
        raise ValueError(
            "expected all training data at once with teacher_cache, which is computed before the training; got a "
            "stream: leave stream or teacher_cache out"
        )
    if options.max_steps <= 0:
        raise ValueError(
            f"expected max_steps above 0 with a stream, whose length nobody knows; got {options.max_steps}"
        )


def check_data(options: Any, train: Any, rows: Sequence[Row], texts: Sequence[Row]) -> None:
    """Raise ValueError for data that the method would not read, or read otherwise than they say."""
    method = options.resolved
    if texts and PolicyGradientOptions not in method.option_groups:
        raise ValueError(f"expected text_dataset with minillm, which reads it; got it with {method.name}")
    check_stream(options, train)
    if method.responses not in (sampling.interleaved, sampling.mixture):
        return
    told = zip(column(rows, "id"), column(rows, "teacher_prompt"), strict=True)
    names = [name for name, prompt in told if prompt is not None]
    if names:
        raise ValueError(
            f"expected no teacher_prompt with method {method.name}, whose teacher reads the student's prompt while it "
            f"writes; got {len(names)} ({', '.join(names[:5])}): leave them out, or use gkd"
        )


WRITERS: dict[Any, tuple[str, ...]] = {  # by policy
    sampling.student: ("student",),
    sampling.replay: ("student",),
    sampling.teacher: ("teacher",),
    sampling.paired: ("student", "teacher"),
    sampling.mixture: ("student", "teacher"),
    sampling.interleaved: ("student", "teacher"),
}


def check_writers(options: Any, student: Any, teacher: Any) -> None:
    """Raise ValueError for a recurrent model that cannot write, or take back drafts, as the method's policy wants."""
    policy, generate = options.resolved.responses, options.resolved.generate
    option = "per_device_train_batch_size" if generate == "step" else "per_device_eval_batch_size"
    together = getattr(options, option)
    if generate == "once":  # what a training batch lacks, or those of all processes do where they divide the model
        together = min(together, options.per_device_train_batch_size * ranks())
    models = {"student": student, "teacher": getattr(teacher, "model", None)}
    for name in WRITERS.get(policy, ()):
        model = models[name]
        by_server = name == "student" and options.rollout_url is not None
        if model is None or by_server or not recurrent_layers(model):
            continue
        if policy is sampling.interleaved:
            Decoder(model, 1, rollback=True)
        elif together > 1:
            with evaluating(model):
                check_writing(model, name, option)


def warn_of_models(student: Any, teacher: Any, options: Any, rows: Sequence[Row]) -> None:
    """Of what will be slow, or end in an error that says little. Raises ValueError where fp16 weights would train."""
    if teacher is not None and teacher.learns:
        check_trained_dtypes("teacher's online module", teacher)
    if options.online and options.resolved.responses in (sampling.interleaved, sampling.mixture):
        logger.warning(
            f"expected references that an online teacher learns from; method {options.resolved.name} has none, as all "
            "responses are the student's: nothing holds the teacher where it was"
        )
    warn_of_slow_products((student, teacher), options)
    warn_of_long_rows([student, getattr(teacher, "model", None)], rows)


def warn_of_slow_products(models: Sequence[Any], options: Any) -> None:
    """16-bit models on a CPU without instructions for them train many times as slowly as 32-bit ones."""
    places = (options.device, options.teacher_device or options.device)
    used = {(p.dtype, at) for m, at in zip(models, places, strict=True) if m is not None for p in m.parameters()}
    chosen = ((torch.bfloat16, options.bf16), (torch.float16, options.fp16))
    used |= {(dtype, options.device) for dtype, is_chosen in chosen if is_chosen}
    slow = sorted({str(dtype).removeprefix("torch.") for dtype, at in used if not has_fast_gemm(dtype, at)})
    if slow:
        logger.warning(
            f"expected float32 on this CPU, which has no instructions for {' and '.join(slow)} products: training will "
            "be many times as slow; leave bf16 and fp16 out, and call .float() on 16-bit models (okd train: no --dtype)"
        )


def warn_of_long_rows(models: Sequence[Any], rows: Sequence[Row]) -> None:
    """Learned position embeddings end in an index error there, on a GPU in one that names no index."""
    is_told = any(x is not None for name in ("teacher_prompt", "teacher_input_ids") for x in column(rows, name))
    longer = map(_longer_prompt, rows) if is_told else [0]
    longest = max(lengths_of(rows), default=0) + max(longer, default=0)
    limit = min((n for n in map(position_limit, models) if n is not None), default=longest)
    if longest > limit:
        logger.warning(
            f"expected rows of at most {limit} tokens, as both models have positions; got one of {longest}: "
            f"pass max_length={limit}, unless the models extrapolate"
        )


def _longer_prompt(row: Row) -> int:
    """Tokens by which the teacher's prompt is longer than the student's, or its row in tokens of its own."""
    if "teacher_input_ids" in row:
        return max(0, len(row["teacher_input_ids"]) - len(row["input_ids"]))
    return max(0, len(row["teacher_prompt"]) - start_of_response(row)) if "teacher_prompt" in row else 0


def refuse_sharded(trainer: Any) -> None:
    """Raise ValueError for what wants whole models on each process, or another way to divide them."""
    args, method, is_deepspeed = trainer.args, trainer.args.resolved, trainer.is_deepspeed_enabled
    if trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version != 2:
        raise ValueError(
            "expected FSDP2; got FSDP1, which flattens weights of both models into one: set fsdp_version: 2 in "
            "accelerate's configuration"
        )
    if args.student_save == "merged" and trainer.is_sharded:
        raise ValueError(
            "expected whole models on each process to merge the student's LoRA; got sharded ones: leave student_save "
            "out, and merge the saved adapter"
        )
    if trainer.is_sharded and isinstance(trainer.pair.selection, Policy):
        raise ValueError(
            f"expected whole models on each process with method {method.name}, whose policy ascends by itself after "
            "each update; got sharded ones: use DDP, or gated_ensemble"
        )
    resting = {
        "alternating": method.alternating,
        "online_start": args.online and args.online_start > 0,
        "online_stop": args.online and args.online_stop < 1,
        "online_every": args.online and args.online_every > 1,
    }
    if is_deepspeed and any(resting.values()):
        raise ValueError(
            "expected both sides to learn at every step under DeepSpeed, which moves a side without a gradient by its "
            f"momentum; got {next(name for name, rests in resting.items() if rests)}: leave it out, or use FSDP2"
        )
    if trainer.is_sharded and is_deepspeed and isinstance(trainer.pair.teacher, Averaged):
        raise ValueError(
            "expected a self-teacher of the student's own weights under ZeRO-3, whose checkpoints leave out weights "
            "that do not train; got an average: use FSDP2"
        )
