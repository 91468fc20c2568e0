"""A student that is a LoRA over a frozen base, and how a student is saved so that others can load it.

An adapter is worth what its base is. Where the base's name (a hub id, a directory) loads that base, the adapter's
configuration says the name; else (a shortened copy, a GGUF file, a model made or changed in Python) the base lies
beside the adapter, in `student/base`.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME

from okd.models import BASE, decoder_modules, load_model
from okd.online import adapter_names
from okd.options import option
from okd.sharding import is_divided, loaded_whole
from okd.teachers import refuse_injected

FLOATS = ("float32", "bfloat16", "float16")


@dataclass
class StudentOptions:
    """Read by all methods."""

    student_lora_rank: int | None = option(
        None,
        "rank of a LoRA that trains in place of the student's weights; default: no LoRA, all weights train",
        least=1,
    )
    student_lora_alpha: int | None = option(
        None, "alpha of the student's LoRA, scaled by alpha / rank; default: its rank"
    )
    student_lora_dropout: float = option(0.0, "dropout of the student's LoRA", least=0, most=1)
    student_lora_target_modules: list[str] | None = option(
        None, "linear modules of the student's decoder that carry the LoRA, such as q_proj v_proj; default: all"
    )
    student_save: str = option(
        "adapter",
        "how a student with a LoRA is saved: adapter, or merged",
        choices=("adapter", "merged"),
    )
    save_dtype: str | None = option(
        None, "dtype of the student that is saved, but for checkpoints; default: that of its training", choices=FLOATS
    )


def check_student_options(options: StudentOptions) -> None:
    """Raise ValueError for an option of a LoRA that is not there."""
    names = ("student_lora_alpha", "student_lora_dropout", "student_lora_target_modules")
    given = [name for name in names if getattr(options, name) != getattr(StudentOptions, name)]
    if given and options.student_lora_rank is None:
        raise ValueError(
            f"expected student_lora_rank with {given[0]}; got {getattr(options, given[0])} without: pass it, or leave "
            f"{given[0]} out"
        )


def prepare_student(student: Any, options: Any) -> Any:
    """The student as it trains: as it is, or with `student_lora_rank` as a PEFT model whose LoRA alone trains, in fp32.

    The LoRA goes into linear modules of the decoder, never into the head or a vision tower. The base is frozen as it
    is, quantised or not: QLoRA without the casts to fp32, which frozen weights do not need. A PEFT model stays itself.

    Raises ValueError for a student or an option that does not fit.
    """
    import peft

    is_peft = hasattr(student, "disable_adapter")
    if options.student_lora_rank is None:
        if options.student_save == "merged" and not is_peft:
            raise ValueError(
                "expected a student with a LoRA to be merged; got one without: pass student_lora_rank, or leave "
                "student_save out"
            )
        return _with_named_base(student, options) if is_peft else student
    if is_peft:
        raise ValueError(
            f"expected no student_lora_rank for a student that is a PEFT model; got {options.student_lora_rank}: leave "
            "it out to train the adapter that it has, or pass student.merge_and_unload()"
        )
    refuse_injected(student, "student")
    return _with_named_base(peft.get_peft_model(student, lora_config(student, options)), options)


def lora_config(student: Any, options: Any) -> Any:
    """PEFT's configuration of the student's LoRA."""
    import peft

    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.student_lora_rank,
        lora_alpha=options.student_lora_rank if options.student_lora_alpha is None else options.student_lora_alpha,
        lora_dropout=options.student_lora_dropout,
        target_modules=_linear_modules(student, options.student_lora_target_modules),
    )


def _linear_modules(model: Any, wanted: Sequence[str] | None) -> list[str]:
    """Names of the decoder's linear modules, or of those that end in the `wanted` names."""
    names = [name for name, module in decoder_modules(model) if isinstance(module, nn.Linear | Conv1D)]
    if wanted is None:
        return names
    unknown = [end for end in wanted if not any(f".{name}".endswith(f".{end}") for name in names)]
    if unknown:
        kinds = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(
            f"expected student_lora_target_modules among {', '.join(kinds)}, the linear modules of the student's "
            f"decoder; got {unknown[0]}: correct it"
        )
    return [name for name in names if any(f".{name}".endswith(f".{end}") for end in wanted)]


def _with_named_base(model: Any, options: Any) -> Any:
    """The PEFT model, whose configuration names no base if none can be loaded by its name."""
    quantized = getattr(model.get_base_model(), "is_quantized", False)
    if quantized and options.student_save == "merged":
        raise ValueError(
            "expected a base of whole precision to merge the student's LoRA into; got a quantised one: leave "
            "student_save out, and merge the saved adapter into the base as it was published"
        )
    if options.should_save and options.student_save == "adapter" and not _is_what_its_name_loads(model):
        if quantized:
            raise ValueError(
                "expected a quantised student with the name of what it was loaded from, which its adapter says; got "
                "none: save the model before it is quantised, and load that"
            )
        model.active_peft_config.base_model_name_or_path = ""
    return model


def _is_what_its_name_loads(model: Any) -> bool:
    base = model.get_base_model()
    if getattr(base, "is_quantized", False) or is_divided(base):  # as they were loaded, for nothing changes them
        return bool(base.name_or_path)
    own = base_state(model)
    try:
        files = _weight_files(base.name_or_path)
        with loaded_whole():
            return bool(files) and (_are_in(files, own) or _are_equal(own, load_model(base.name_or_path).state_dict()))
    except (OSError, ValueError):  # no model of that name
        return False


def _weight_files(name: str) -> list[Path]:
    """Of a directory, or of a model of the hub on this machine."""
    if not name:
        return []
    folder = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, local_files_only=True))
    return sorted(folder.glob("model*.safetensors"))


def _are_in(files: Sequence[Path], own: dict[str, Tensor]) -> bool:
    """One tensor after the other, so that no second model is in memory. False, too, where transformers renames them."""
    same = set()
    for file in files:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (it is no mapping)
                if name not in own or not _are_equal({name: own[name]}, {name: stored.get_tensor(name)}):
                    return False
                same.add(own[name].data_ptr())
    return all(x.data_ptr() in same for x in own.values())  # a tied head is in the file once


def _are_equal(own: dict[str, Tensor], named: dict[str, Tensor]) -> bool:
    return own.keys() == named.keys() and all(
        x.shape == named[name].shape and torch.equal(x, named[name].to(x.device, x.dtype)) for name, x in own.items()
    )


def base_state(model: Any, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of a PEFT model's base, as it was before PEFT; out of the PEFT model's if that was gathered."""
    prefix = "base_model." if model.active_peft_config.is_prompt_learning else "base_model.model."
    adapter = adapter_names(model)
    return {
        name.removeprefix(prefix).replace(".base_layer.", ".").replace(".original_module.", "."): x
        for name, x in (model.state_dict() if state is None else state).items()
        if name.startswith(prefix) and name not in adapter
    }


def save_student(
    student: Any, directory: Path, options: Any, state: dict[str, Tensor] | None = None, checkpoint: bool = False
) -> None:
    """`save_pretrained`: of a checkpoint as the student trains, else as `student_save` and `save_dtype` say.

    state: the student's state dict, where FSDP or ZeRO has gathered it.
    """
    dtype = None if checkpoint or options.save_dtype is None else getattr(torch, options.save_dtype)
    is_adapter = hasattr(student, "disable_adapter")
    if is_adapter and options.student_save == "merged" and not checkpoint:
        student, is_adapter = copy.deepcopy(student).merge_and_unload(), False
    if dtype is not None:
        state = _cast(student.state_dict() if state is None else state, dtype)
    if is_adapter:
        root = directory.parents[1] / directory.name if checkpoint else directory
        with _base_in(root / BASE, student, state):
            student.save_pretrained(directory, state_dict=state)
        return
    student.save_pretrained(directory, state_dict=state)
    if dtype is not None:
        path = directory / CONFIG_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": options.save_dtype}, indent=2) + "\n")


@contextmanager
def _base_in(directory: Path, model: Any, state: dict[str, Tensor] | None) -> Iterator[None]:
    """Inside, the adapter names this directory if its base has no name; it holds the base from the first time on."""
    config = model.active_peft_config
    if config.base_model_name_or_path != "":
        yield
        return
    if not directory.is_dir():
        part = directory.with_name(f".{directory.name}.part")  # a run that is killed here leaves no half of a base
        shutil.rmtree(part, ignore_errors=True)
        model.get_base_model().save_pretrained(part, state_dict=base_state(model, state))
        os.replace(part, directory)
    config.base_model_name_or_path = str(directory.resolve())
    try:
        yield
    finally:
        config.base_model_name_or_path = ""


def _cast(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating-point tensors in another dtype; what is one tensor under two names stays one."""
    cast = {(x.data_ptr(), x.shape): x.to(dtype) if x.is_floating_point() else x for x in state.values()}
    return {name: cast[x.data_ptr(), x.shape] for name, x in state.items()}
