"""What a run keeps of a pair: the student, what the teacher has become, what the method remembers. No pickles.

Plain `from_pretrained` loads the student, and plain `peft` the adapter.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import GENERATION_CONFIG_NAME

from okd.models import load_model
from okd.pair import StudentTeacher
from okd.student import save_student
from okd.teachers import Averaged

STUDENT, ADAPTER, AVERAGE = "student", "teacher_adapter", "teacher_average"  # directories of a run or checkpoint
SELECTION, MEMORY = "selection.safetensors", "method.json"
ENCODER = "prompt_encoder.safetensors"  # beside the adapter, whose prompt is the encoder's output


def _models(pair: StudentTeacher) -> dict[str, tuple[str, Any]]:
    """Directory -> (prefix of its weights in the pair, model), of what trains."""
    models = {STUDENT: ("student.", pair.student)}
    if pair.teacher is not None and pair.teacher.learns:
        models[ADAPTER] = ("teacher.model.", pair.teacher.model)
    if isinstance(pair.teacher, Averaged):
        models[AVERAGE] = ("teacher.model.", pair.teacher.model)
    return models


def save(pair: StudentTeacher, directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
    """`student/`, the teacher's adapter or average, the selection and the loss's memory, but not the base teacher.

    The student as its options say, but as it trains where the directory is a checkpoint's (`checkpoint-<step>`).

    state_dict: the pair's, where FSDP or ZeRO has gathered it.
    """
    checkpoint = directory.name.startswith(PREFIX_CHECKPOINT_DIR)
    for name, (prefix, model) in _models(pair).items():
        own = None if state_dict is None else _part(state_dict, prefix)
        if name == STUDENT:
            save_student(model, directory / name, pair.options, own, checkpoint)
        else:
            model.save_pretrained(directory / name, state_dict=own)
        if name == ADAPTER and _has_encoder(model.active_peft_config):
            save_file(_trainable(model, own), directory / name / ENCODER)
    if pair.selection is not None:
        own = _part(state_dict, "selection.") if state_dict is not None else pair.selection.state_dict()
        save_file(own, directory / SELECTION)
    if hasattr(pair.loss, "state"):
        (directory / MEMORY).write_text(json.dumps(pair.loss.state))


def load(pair: StudentTeacher, directory: Path) -> None:
    """What `save` wrote, into the live pair.

    Raises FileNotFoundError without such a directory, ValueError where another adapter trains here.
    """
    for name, (_, model) in _models(pair).items():
        _load_weights(model, directory / name)
    if pair.selection is not None:
        pair.selection.load_state_dict(load_file(directory / SELECTION))
    if hasattr(pair.loss, "state"):
        pair.loss.state = json.loads((directory / MEMORY).read_text())


class Checkpointing:
    """What `Trainer` asks of a trainer whose model is a pair."""

    args: Any
    ends: set[int]
    pair: Any
    processing_class: Any
    sampler: Any
    state: Any

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:  # Trainer leaves it to this method that one process writes
            return
        directory = Path(str(output_dir or self.args.output_dir))
        save(self.pair, directory, state_dict)
        self.processing_class.save_pretrained(directory / STUDENT)
        generation = copy.deepcopy(self.pair.student.generation_config)
        generation.eos_token_id = sorted(self.ends) or None  # where the responses that it learned end
        # not save_pretrained, which refuses what is odd in many published ones as soon as they are changed
        generation.to_json_file(directory / STUDENT / GENERATION_CONFIG_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load(self.pair, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Beside what continues a run, and not merely its weights: the sampler's state."""
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self.sampler.load(self._sampler_file(Path(checkpoint)))

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the random state that every process saves with a checkpoint: its sampler's."""
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        if self.sampler.state:
            self.sampler.save(self._sampler_file(Path(output_dir)))

    def _sampler_file(self, directory: Path) -> Path:
        return directory / f"sampler_{self.args.process_index}.json"


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
