"""What a teacher is: its rows of the moment, its head, and itself as it was before the run.

Each kind is a small module of one protocol: `Frozen` and the self-teachers here, `Online` with its module in
`okd.online`, several in `okd.ensemble`. Nothing is written onto the models that a user passes.

Shapes: N response tokens; D the hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from okd.cache import Head, TeacherCache, plain_head
from okd.data import Batch
from okd.layers import decoder_of, drop_below
from okd.models import device_of, evaluating, has_weights, head_of, is_dispatched, response_rows
from okd.options import option
from okd.sharding import is_divided, is_elsewhere
from okd_kernels import LinearHead, TopK

SELF_TEACHERS = ("average", "student")


@dataclass
class PlaceOptions:
    """Read by methods that are given a teacher, and by evaluations."""

    teacher_device: str | None = option(
        None, "where the teacher is computed, such as cuda:1 or cpu; default: with the student"
    )


@dataclass
class SelfTeacherOptions:
    """Read by methods with one teacher, where none is given."""

    self_teacher: str | None = option(
        None,
        "in place of a teacher, the student itself: its exponential average, or `student`, its weights of the moment, "
        "held still, on rows whose teacher_prompt tells it more",
        choices=SELF_TEACHERS,
    )
    average_decay: float = option(0.999, "decay of the averaged self-teacher, a step", least=0, most=1)


class Teacher(Protocol):
    """What `StudentTeacher` and the sampler ask of a teacher."""

    learns: bool  # it has a module that trains
    judges: bool  # it knows what it was before the run
    model: Any  # writes and judges responses: the teacher of the moment; None where it is not computed
    cache: Any  # `okd.cache.TeacherCache` of rows that are evaluated; None: there is none

    def rows(self, batch: Batch) -> Tensor:
        """(N, D) hidden states of the teacher of the moment that predict the response tokens."""

    def head(self, device: torch.device | None = None) -> LinearHead:
        """Its head of the moment, on this device; None: wherever it is."""

    def as_it_was(self) -> AbstractContextManager[Any]:
        """The model before the run, active inside: the judge of student and teacher. None where it does not judge."""

    def after_update(self, student: nn.Module) -> None:
        """Called once after each optimizer step."""

    def computing(self, device: torch.device) -> AbstractContextManager[Any]:
        """The model, where what it computes is to be kept; None where it is not in memory."""

    def release(self) -> None:
        """What a cache stands for is wanted no more."""


class Placed(nn.Module):
    """Models that a trainer moves to its own device, but for those that have a place: `place` says which."""

    cache: Any = None

    def __init__(self) -> None:
        super().__init__()
        self._stay: set[int] = set()
        self._is_released = False

    def place(self, device: torch.device | None = None) -> None:
        """Compute on this device; without one, each model where it is, if that is an accelerator.

        What accelerate has dispatched stays in any case. Raises ValueError for such a model with a device.
        """
        for model in self._models():
            if device is not None:
                if is_dispatched(model):
                    raise ValueError(
                        f"expected a teacher in one piece to put it on {device}; got one with the device_map "
                        f"{model.hf_device_map}: leave out teacher_device, or device_map"
                    )
                model.to(device)
            if device is not None or device_of(model).type != "cpu":
                self._stay.add(id(model))

    def staying(self) -> list[Any]:
        """The models that no trainer moves."""
        return [model for model in self._models() if is_dispatched(model) or id(model) in self._stay]

    @contextmanager
    def computing(self, device: torch.device) -> Iterator[Any]:
        yield None if self._is_released else self.model

    def release(self) -> None:
        """Of a teacher with a cache, the weights below it: nothing is to be computed by them any more."""
        if self.cache is not None:
            drop_below(decoder_of(self.model), self.cache.manifest.layer)
            self._is_released = True

    def _models(self) -> list[Any]:
        found: Any = getattr(self, "models", None) or [self.model]
        return list(found)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        staying = self.staying()
        for model in self._models():
            if not any(model is other for other in staying):
                model._apply(fn, recurse)
        return self


class Frozen(Placed):
    """A model as it is, with whatever adapter is active on it."""

    learns, judges = False, True

    def __init__(self, model: Any):
        super().__init__()
        refuse_injected(model)
        self.model = model.requires_grad_(False)

    @torch.no_grad()
    def rows(self, batch: Batch) -> Tensor:
        return response_rows(self.model, batch, as_teacher=True)

    def head(self, device: torch.device | None = None) -> LinearHead:
        return head_of(self.model, device)

    @contextmanager
    def as_it_was(self) -> Iterator[Any]:
        yield self.model

    def after_update(self, student: nn.Module) -> None:
        """It stays what it is."""

    def train(self, mode: bool = True) -> Any:
        """Dropout would blur the target."""
        return nn.Module.train(self, False)


class Stored(nn.Module):
    """A frozen model whose last hidden states, or likeliest tokens, are in a cache: it takes no part in a step.

    Its head alone moves with the student. The model itself is where it was, for what the cache lacks, until `release`.
    """

    learns, judges, model = False, True, None

    def __init__(self, model: Any, cache: TeacherCache):
        super().__init__()
        refuse_injected(model)
        if is_divided(model):
            raise ValueError(
                "expected a whole teacher to keep its last hidden states; got one that the processes divide: run okd "
                "cache before, without them"
            )
        self._source = (model.requires_grad_(False),)  # not registered
        self.lm_head = Head(plain_head(model) if has_weights(model) else cache.held_out.head())
        self.cache = cache.held_out

    def rows(self, batch: Batch) -> Any:  # (N, D) Tensor, or TopK
        if "teacher_top_k" in batch:
            log_probs = batch["teacher_log_probs"]
            return TopK(batch["teacher_top_k"], log_probs, torch.zeros_like(log_probs[:, 0]))
        return batch["teacher_states"].to(self.lm_head.weight.dtype)

    def head(self, device: torch.device | None = None) -> LinearHead:
        return self.lm_head.read(device)

    @contextmanager
    def as_it_was(self) -> Iterator[Any]:
        yield self

    @contextmanager
    def computing(self, device: torch.device) -> Iterator[Any]:
        (model,) = self._source
        if model is None or not has_weights(model) or is_elsewhere(model):
            yield None
            return
        place = device_of(model)
        moves = not is_dispatched(model) and place != device
        try:
            yield model.to(device) if moves else model
        finally:
            if moves:
                model.to(place)

    def release(self) -> None:
        """The model is wanted no more."""
        self._source = (None,)

    after_update, train = Frozen.after_update, Frozen.train


class Averaged(nn.Module):
    """The exponential average of the student's weights: w <- decay w + (1 - decay) w_student after each step.

    A mean teacher (Tarvainen and Valpola 2017, arXiv 1703.01780). Weights that do not train exist once.
    """

    learns, judges, cache = False, False, None

    def __init__(self, student: Any, decay: float):
        super().__init__()
        shared = {id(p): p for p in student.parameters() if not p.requires_grad}
        self.model = copy.deepcopy(student, memo=shared).requires_grad_(False).eval()
        self.decay = decay

    rows, head, train = Frozen.rows, Frozen.head, Frozen.train

    @contextmanager
    def as_it_was(self) -> Iterator[Any]:
        yield None

    @torch.no_grad()
    def after_update(self, student: nn.Module) -> None:
        ours = dict(self.model.named_parameters())
        pairs = [(ours[name], p) for name, p in student.named_parameters() if ours[name] is not p]
        if pairs:
            averages, weights = ([pair[i].data for pair in pairs] for i in (0, 1))
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        for mine, theirs in zip(self.model.buffers(), student.buffers(), strict=True):
            mine.copy_(theirs)


class Itself(nn.Module):
    """The student's own weights of the moment, held still, on what rows tell their teacher beyond the student's prompt.

    On-policy self-distillation with a demonstration or a solution in the teacher's prompt (OPSD, arXiv 2601.18734;
    SDFT, arXiv 2601.19897). Without such prompts it would be the student, at a divergence of 0: that is refused.
    """

    learns, judges, cache = False, False, None

    def __init__(self, student: Any):
        super().__init__()
        self._student = (student,)  # not registered: its weights are the student's

    @property
    def model(self) -> Any:
        return self._student[0]

    def rows(self, batch: Batch) -> Tensor:
        with evaluating(self.model):
            return response_rows(self.model, batch, as_teacher=True)

    def head(self, device: torch.device | None = None) -> LinearHead:
        return LinearHead.from_model(self.model).detach()

    as_it_was, after_update = Averaged.as_it_was, Frozen.after_update


def rows_of_judge(judge: Any, batch: Batch) -> Tensor:
    """(N, D) of what `as_it_was` gives: a model, or stored states."""
    return judge.rows(batch) if isinstance(judge, Stored) else response_rows(judge, batch, as_teacher=True)


def head_of_judge(judge: Any, device: torch.device) -> LinearHead:
    return judge.head(device) if isinstance(judge, Stored) else head_of(judge, device)


@contextmanager
def as_it_was(teacher: Any) -> Iterator[Any]:
    """The model that judges: of a `Teacher` itself before the run, of a PEFT model its base, else the model itself.

    Raises ValueError for a model that holds an online module without being the PEFT model around it.
    """
    if hasattr(teacher, "as_it_was"):
        with teacher.as_it_was() as model:
            yield model
    elif hasattr(teacher, "disable_adapter"):
        with base_of(teacher) as model:
            yield model
    else:
        refuse_injected(teacher)
        yield teacher


@contextmanager
def base_of(model: Any) -> Iterator[Any]:
    """The base of a PEFT model, its adapter switched off; afterwards every `requires_grad` is as it was.

    The base itself, rather than PEFT's wrapper, which would go on to look for a prompt or prefix that is off.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield model.get_base_model()
    finally:
        for parameter, requires_grad in flags:  # PEFT leaves every adapter trainable, frozen ones too
            parameter.requires_grad_(requires_grad)


def refuse_injected(model: Any, name: str = "teacher") -> None:
    """Raise ValueError for a model that PEFT has wrapped, which holds an adapter that nobody can switch off."""
    if hasattr(model, "disable_adapter") or not hasattr(model, "peft_config"):
        return
    if getattr(model, "_hf_peft_config_loaded", False):  # transformers has loaded it with an adapter, its own
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    if any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules()):
        raise ValueError(
            f"expected a {name} as it was loaded, or a PEFT model; got a model that an online module or LoRA has been "
            f"put into, as OKDTrainer does in place: pass trainer.{name}, or load the {name} again"
        )
