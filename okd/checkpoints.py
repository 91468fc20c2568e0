"""What a run keeps of a pair: the student, the teacher's adapter, what selects among teachers. No pickles.

Plain `from_pretrained` loads the student, and plain `peft` the adapter.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from okd.models import load_model
from okd.pair import StudentTeacher

STUDENT, ADAPTER = "student", "teacher_adapter"  # directories of a saved run or checkpoint
SELECTION = "selection.safetensors"
ENCODER = "prompt_encoder.safetensors"  # beside the adapter, whose prompt is the encoder's output


def save(pair: StudentTeacher, directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """`student/`, `teacher_adapter/` and the selection, but not the base teacher.

    state_dict: the pair's, where FSDP or ZeRO has gathered it.
    """
    parts: dict[str, Any] = {STUDENT: pair.student}
    if pair.args.online:
        parts[ADAPTER] = pair.teacher
    for name, model in parts.items():
        own = None if state_dict is None else _part(state_dict, "student." if name == STUDENT else "teacher.")
        model.save_pretrained(directory / name, state_dict=own)
        if name == ADAPTER and _has_encoder(model.active_peft_config):
            save_file(_trainable(model, own), directory / name / ENCODER)
    if pair.selection is not None:
        own = _part(state_dict, "selection.") if state_dict is not None else pair.selection.state_dict()
        save_file(own, directory / SELECTION)


def load(pair: StudentTeacher, directory: Path) -> None:
    """What `save` wrote, into the live pair.

    Raises FileNotFoundError without such a directory, ValueError where another adapter trains here.
    """
    _load_weights(pair.student, directory / STUDENT)
    if pair.args.online:
        _load_weights(pair.teacher, directory / ADAPTER)
    if pair.selection is not None:
        pair.selection.load_state_dict(load_file(directory / SELECTION))


def _part(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One of the pair's models, out of a state dict that FSDP or ZeRO gathered, with the pair's prefixes."""
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def _has_encoder(config: Any) -> bool:
    """Whether a network makes the prompt or prefix: PEFT saves what it makes, not itself."""
    return config.peft_type == "P_TUNING" or getattr(config, "prefix_projection", False)


def _trainable(model: Any, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What trains in the model, by name; out of its state dict if that was gathered."""
    return {
        n: p.detach() if state_dict is None else state_dict[n] for n, p in model.named_parameters() if p.requires_grad
    }


def _load_weights(model: Any, directory: Path) -> None:
    """Weights that `save_pretrained` wrote, into a live model or adapter. Raises FileNotFoundError."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: expected a checkpoint of this run; got no such directory")
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

        name, file = model.active_adapter, directory / ENCODER
        encoder = file.is_file()
        directory = directory if name == "default" else directory / name
        weights = load_file(file) if encoder else load_peft_weights(str(directory))
        expected = _trainable(model) if encoder else get_peft_model_state_dict(model, adapter_name=name)
        differing = sorted(weights.keys() ^ expected.keys())
        if differing:
            raise ValueError(
                f"{directory}: expected the adapter that trains here; {len(differing)} weights are in one of the two "
                f"only, such as {differing[0]}: pass PeftModel.from_pretrained(teacher, directory, "
                "is_trainable=True) as the teacher"
            )
        if encoder:
            model.load_state_dict(weights, strict=False)
        else:
            set_peft_model_state_dict(model, weights, adapter_name=name)
    else:
        model.load_state_dict(load_model(str(directory), dtype=model.dtype).state_dict())
