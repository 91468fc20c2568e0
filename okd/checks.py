"""What is refused, or warned of, before a run begins; and the teacher that the method makes of what it was given."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from okd import sampling
from okd.cache import TeacherCache
from okd.data import Row, Rows, column, lengths_of, start_of_response
from okd.decoding import Decoder, check_writing, recurrent_layers
from okd.encoding import Stream
from okd.ensemble import Ensemble, models_of
from okd.methods import METHODS, Method
from okd.models import (
    check_head,
    check_packing,
    check_tokenizers,
    evaluating,
    has_weights,
    position_limit,
    tokenizer_of,
    tokenizer_of_model,
    vocabulary_of,
)
from okd.on_policy import PolicyGradientOptions
from okd.online import Online, attach_online_module
from okd.salience import calibration_batches, non_salient_modules
from okd.selection import Policy
from okd.sharding import is_divided, is_elsewhere, ranks
from okd.teachers import Averaged, Frozen, Itself, Placed, Stored, refuse_injected
from okd_kernels import has_fast_gemm

logger = logging.get_logger(__name__)


def prepare_teacher(
    teacher: Any,
    options: Any,
    student: Any = None,
    rows: Sequence[Row] | None = None,
    collator: Callable[[Any], Any] | None = None,
    outcomes: Any = None,
) -> Any:
    """The `Teacher` of a method: frozen, with an online module that alone trains, several, the student, or None.

    teacher: a model, several as a list or by name, or a `Teacher`; None with a method that needs none, or with a
        self-teacher. Student, training rows and collator serve self-teachers, and to find the weights that matter
        least (`online_module="non_salient"`), which the `outcomes` of a teacher with a tokenizer of its own serve, too.

    Raises ValueError for what does not fit the method.
    """
    method = options.resolved
    if isinstance(teacher, list | tuple) and len(teacher) == 1:
        (teacher,) = teacher
    if not method.needs_teacher:
        return None
    if teacher is None:
        return _self_teacher(student, options, rows)
    if options.self_teacher is not None:
        raise ValueError(
            f"expected no teacher beside self_teacher={options.self_teacher}; got both: leave one of them out"
        )
    if teacher is student or (hasattr(student, "disable_adapter") and teacher is student.get_base_model()):
        raise ValueError(
            "expected two models, since a model is at no distance from itself; got one as student and teacher: pass "
            "teacher=None with self_teacher='average', or 'student' with data whose teacher_prompt tells it more, or a "
            "copy of the model"
        )
    if isinstance(teacher, list | tuple | Mapping):
        check_number_of_teachers(method, len(teacher))
        teacher = Ensemble(teacher)
    check_number_of_teachers(method, len(teacher.members) if isinstance(teacher, Ensemble) else 1)
    if method.is_routed:
        _check_routes(teacher, rows or ())
    if isinstance(teacher, Ensemble):
        check_vocabularies(student, teacher, options.vocab_size)
        return teacher
    if hasattr(teacher, "as_it_was"):
        return teacher
    refuse_injected(teacher)
    if student is not None:  # before the online module goes in: a teacher that is refused stays as it was
        if not is_elsewhere(teacher) and has_weights(teacher):
            check_head(teacher, "teacher")
        if options.teacher_tokenizer is None:
            check_vocabularies(student, teacher, options.vocab_size)
    if not options.online:
        return Frozen(teacher)
    if not hasattr(teacher, "peft_config"):
        modules = None
        if method.online_module == "non_salient":
            if not rows or collator is None:
                raise ValueError(
                    f"expected training data, by which {method.name} finds the teacher's weights that matter least; "
                    "got none: pass train_dataset, or a teacher that has its adapter already"
                )
            if is_divided(teacher):
                raise ValueError(
                    "expected a whole teacher, among whose weights those of least saliency are sought; got parts of "
                    "one under ZeRO-3: use FSDP2"
                )
            batches = calibration_batches(rows, collator, options)
            modules = non_salient_modules(student, teacher, options, batches, outcomes)
        teacher = attach_online_module(teacher, options, modules)
    return Online(teacher)


def with_cache(teacher: Any, options: Any, tokenizer: Any, files: str | None) -> tuple[Any, TeacherCache | None]:
    """The teacher and its cache, where the options name one: a frozen teacher is its stored states, if those are of its
    last layer.

    Raises ValueError as `TeacherCache.of` and `Stored` do.
    """
    if options.teacher_cache is None:
        return teacher, None
    cache = TeacherCache.of(options, teacher.model, tokenizer, files)
    if cache.manifest.is_last:
        return Stored(teacher.model, cache), cache
    teacher.cache = cache
    return teacher, cache


def place(teacher: Any, given: Any, options: Any) -> None:
    """Put a `Teacher` on the `teacher_device`; without one, what is on an accelerator already stays there.

    given: what it was made of; None: no teacher. Raises ValueError for one that cannot be elsewhere than the student.
    """
    device = options.teacher_device
    if isinstance(teacher, Placed):
        if device is not None or ranks() == 1:
            teacher.place(None if device is None else torch.device(device))
    elif device is not None and (teacher is not None or given is None):
        raise ValueError(
            f"expected a teacher of its own to put on {device}; got {type(teacher).__name__}: leave teacher_device out"
        )


def refuse_elsewhere(trainer: Any) -> None:
    """Raise ValueError for a teacher that is not where its student is, in a run of several processes."""
    teacher, device = trainer.pair.teacher, trainer.args.device
    if not isinstance(teacher, Placed) or not (trainer.is_sharded or ranks() > 1):
        return
    others = {str(p.device) for model in teacher.staying() for p in model.parameters() if p.device != device}
    if others:
        raise ValueError(
            f"expected the teacher on {device}, as its student, in a run of {ranks()} processes; got one on "
            f"{', '.join(sorted(others))}: start one process, or leave out teacher_device and device_map"
        )


def _self_teacher(student: Any, options: Any, rows: Sequence[Row] | None) -> Any:
    method = options.resolved
    if options.self_teacher is None:
        raise ValueError(
            f"expected a teacher for method {method.name}; got None: pass one, or self_teacher='average', or use sft"
        )
    if options.online:
        raise ValueError(
            f"expected a teacher of its own for method {method.name}, whose teacher learns; got a self-teacher: pass a "
            "teacher, or use a method with a frozen one"
        )
    if options.self_teacher == "average":
        return Averaged(student, options.average_decay)
    prompts = zip(column(rows or (), "id"), column(rows or (), "teacher_prompt"), strict=True)
    without = [name for name, prompt in prompts if prompt is None]
    if without:
        raise ValueError(
            "expected a teacher_prompt in every example with self_teacher='student', which is at no distance from "
            f"itself else; got {len(without)} without ({', '.join(without[:5])}): add one, or use 'average'"
        )
    return Itself(student)


def _check_routes(teacher: Any, rows: Sequence[Row]) -> None:
    names = set(teacher.names)
    lost = [pair for pair in zip(column(rows, "id"), column(rows, "teacher"), strict=True) if pair[1] not in names]
    if lost:
        got = sorted({str(name) for _, name in lost})
        raise ValueError(
            f'expected "teacher" of every example to be one of {", ".join(sorted(names))}; got {", ".join(got[:5])} in '
            f"{len(lost)} examples, such as {lost[0][0]}: correct them, or name the teachers so"
        )


def check_number_of_teachers(method: Method, n: int) -> None:
    """Raise ValueError unless the method takes so many teachers."""
    if n > 1 and not method.takes_several:
        names = " or ".join(name for name, other in METHODS.items() if other.takes_several)
        raise ValueError(f"expected one teacher for method {method.name}; got {n}: pass one, or use {names}")
    if n == 1 and method.takes_several:
        raise ValueError(
            f"expected several teachers for method {method.name}; got one: pass OKDTrainer(student, [one, another, "
            "...]), on the command line --teachers, or use a method with one teacher"
        )


def check_vocabularies(student: Any, teacher: Any, vocab_size: int | None) -> None:
    """Raise ValueError unless all heads have one number of rows, or `vocab_size` and more."""
    sizes = [vocabulary_of(student)]
    if isinstance(teacher, Ensemble):
        sizes += teacher.vocabularies()
    else:
        sizes += map(vocabulary_of, models_of(teacher))
    if vocab_size is None and len(set(sizes)) > 1:
        raise ValueError(
            f"expected heads of one vocabulary size; got student {sizes[0]} and teacher "
            f"{', '.join(map(str, sizes[1:]))}. If they share a tokenizer and are padded differently, pass "
            f"teacher_processing_class, or vocab_size=len(tokenizer), at most {min(sizes)}"
        )
    if vocab_size is not None and not 0 < vocab_size <= min(sizes):
        raise ValueError(f"expected vocab_size in [1, {min(sizes)}], as all heads have rows; got {vocab_size}")


def with_vocab_size(options: Any, student: Any, teacher: Any, *tokenizers: Any) -> Any:
    """The options, with the `shared_vocab_size` where the method has a teacher."""
    if teacher is None or not options.resolved.needs_teacher or options.teacher_tokenizer is not None:
        return options
    vocab_size = shared_vocab_size(options.vocab_size, student, teacher, *tokenizers)
    options = copy.copy(options)
    options.vocab_size = vocab_size
    return options


def shared_vocab_size(
    vocab_size: int | None, student: Any, teacher: Any, tokenizer: Any, teacher_tokenizers: Any = None
) -> int | None:
    """The ids that all heads have and all tokenizers share; None where no id is beyond them. A given one stays.

    teacher: as `prepare_teacher` takes it. teacher_tokenizers: one or several; None: those that lie beside the
        teachers on this machine. Heads of several sizes beside an unknown tokenizer are left to `prepare_teacher`.

    Raises ValueError for tokenizers that map tokens to other ids.
    """
    models = models_of(teacher)
    if teacher_tokenizers is None:
        found = [tokenizer_of_model(model) for model in models]
    else:
        found = [tokenizer_of(one) for one in models_of(teacher_tokenizers)]
    others = [other for other in found if other is not None]
    counts = [check_tokenizers(tokenizer, other, vocab_size) for other in others]
    if vocab_size is not None:
        return vocab_size
    sizes = [vocabulary_of(model) for model in (student, *models)]
    shared, own = min([*sizes, *counts]), tokenizer.get_vocab()
    padded = len(set(sizes)) > 1 and len(others) == len(found)
    if not padded and (shared == min(sizes) or all(other.get_vocab() == own for other in others)):
        return None
    logger.warning(f"vocab_size={shared}: the ids that all share, whose heads have {', '.join(map(str, sizes))} rows")
    return shared


def check_ids(student: Any, options: Any, *datasets: Any) -> None:
    """Raise ValueError for a row with a token that the heads do not have, or not in common."""
    limit = options.vocab_size or vocabulary_of(student)
    for data in datasets:
        for rows in data.values() if isinstance(data, Mapping) else [data or ()]:
            highest = column(rows, "highest") if isinstance(rows, Rows) else map(_highest, rows)
            for i, largest in enumerate(highest):
                if largest >= limit:
                    raise ValueError(
                        f"expected token ids below {limit}, which the models share; got {largest} in row "
                        f"{rows[i]['id']}: leave it out, or use the tokenizer of the models"
                    )


def check_aligned(teacher: Any, *datasets: Any) -> None:
    """Raise ValueError for rows without a teacher's tokens of their own, or with one that its head does not have."""
    (model, *_) = models_of(teacher)
    limit = vocabulary_of(model)
    for data in datasets:
        for rows in data.values() if isinstance(data, Mapping) else [data or ()]:
            if isinstance(rows, Rows):
                highest = column(rows, "teacher_highest")
            else:
                highest = [max(row["teacher_input_ids"]) if "teacher_input_ids" in row else None for row in rows]
            for i, largest in enumerate(highest):
                if largest is None:
                    raise ValueError(
                        f"expected rows with the teacher's tokens, because of teacher_tokenizer; got {rows[i]['id']} "
                        "without: pass the examples, or encode(..., alignment=...)"
                    )
                if largest >= limit:
                    raise ValueError(
                        f"expected the teacher's token ids below {limit}, the rows of its head; got {largest} in row "
                        f"{rows[i]['id']}: correct teacher_tokenizer"
                    )


def _highest(row: Row) -> int:
    return max(*row["input_ids"], *row.get("teacher_prompt", ()), 0)


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


def check_data(options: Any, train: Any, rows: Sequence[Row], texts: Sequence[Row]) -> None:
    """Raise ValueError for data that the method would not read, or read otherwise than they say."""
    method = options.resolved
    if texts and PolicyGradientOptions not in method.option_groups:
        raise ValueError(f"expected text_dataset with minillm, which reads it; got it with {method.name}")
    if isinstance(train, Stream) and method.generate != "step":
        raise ValueError(
            f"expected all training data at once with method {method.name}, which keeps a response to each example; "
            "got a stream: leave stream out, or pass generate=step"
        )
    if isinstance(train, Stream) and options.teacher_cache is not None:
        raise ValueError(
            "expected all training data at once with teacher_cache, which is computed before the training; got a "
            "stream: leave stream or teacher_cache out"
        )
    if isinstance(train, Stream) and options.max_steps <= 0:
        raise ValueError(
            f"expected max_steps above 0 with a stream, whose length nobody knows; got {options.max_steps}"
        )
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
    policy = options.resolved.responses
    models = {"student": student, "teacher": getattr(teacher, "model", None)}
    for name in WRITERS.get(policy, ()):
        model = models[name]
        by_server = name == "student" and options.rollout_url is not None
        if model is None or by_server or not recurrent_layers(model):
            continue
        if policy is sampling.interleaved:
            Decoder(model, 1, rollback=True)
        elif options.per_device_train_batch_size > 1:
            with evaluating(model):
                check_writing(model, name)


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


def stop(step: int, output_dir: str, losses: Sequence[tuple[list[str], Any]], finite: Sequence[bool]) -> None:
    """Raise FloatingPointError for the micro-batches whose loss is not finite; their ids are written first."""
    bad = [pair for pair, good in zip(losses, finite, strict=True) if not good]
    path = Path(output_dir) / f"non_finite_batch_{step}.json"
    if bad:  # else those of another rank
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"step": step, "ids": [name for names, _ in bad for name in names]}, indent=2))
    _, loss = (bad or losses)[0]
    teacher = "none" if loss.teacher is None else f"{loss.teacher.item():.4g}"
    raise FloatingPointError(
        f"step {step}: expected a finite loss; got student {loss.student.item():.4g}, teacher {teacher}. {path} names "
        "the examples of its batch: look at them, or lower learning_rate or max_grad_norm"
    )
