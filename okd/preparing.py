"""The teacher that a method makes of what it was given, its cache, and the device that it is on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from okd.cache import TeacherCache
from okd.data import Row, column
from okd.ensemble import Ensemble
from okd.methods import METHODS, Method
from okd.models import check_head, find_device, has_weights
from okd.online import Online, attach_online_module
from okd.salience import calibration_batches, non_salient_modules
from okd.sharding import is_divided, is_elsewhere, ranks
from okd.teachers import Averaged, Frozen, Itself, Placed, Stored, refuse_injected
from okd.vocabularies import check_vocabularies


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

    given: what it was made of; None: no teacher. Raises ValueError for one that cannot be elsewhere than the student,
    and for a device that this machine has not.
    """
    device = options.teacher_device
    if device is not None:
        find_device(device)
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
