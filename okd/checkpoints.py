"""What a run keeps of a pair: the student, what the teacher has become, what the method remembers. No pickles.

Plain `from_pretrained` loads the student, and plain `peft` the adapter.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import GENERATION_CONFIG_NAME

from okd.models import load_model
from okd.online import adapter_names
from okd.pair import StudentTeacher
from okd.sharding import (
    SHARDS,
    hold_heads,
    load_deepspeed,
    load_optimizer_shards,
    load_shards,
    save_deepspeed,
    save_shards,
    whole_state,
    with_buffers,
)
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
    _save_memory(pair, directory)


def _save_memory(pair: StudentTeacher, directory: Path) -> None:
    if hasattr(pair.loss, "state"):
        (directory / MEMORY).write_text(json.dumps(pair.loss.state))


def _load_memory(pair: StudentTeacher, directory: Path) -> None:
    if hasattr(pair.loss, "state"):
        pair.loss.state = json.loads((directory / MEMORY).read_text())


def weights(pair: StudentTeacher) -> dict[str, Tensor]:
    """All that `save` keeps of the pair, by its names there: what trains, and a LoRA's base where nothing names it.

    Of a pair whose weights are divided, this process's part.
    """
    names, tensors = set(), dict(_tensors(pair))
    for prefix, model in _models(pair).values():
        adapter = {f"{prefix}{name}" for name in adapter_names(model)}
        is_named = adapter and (model is not pair.student or model.active_peft_config.base_model_name_or_path != "")
        names |= adapter if is_named else {name for name in tensors if name.startswith(prefix)}
    return {name: x for name, x in tensors.items() if name in names or name.startswith("selection.")}


def _tensors(pair: StudentTeacher) -> Iterator[tuple[str, Tensor]]:
    saved = pair.state_dict(keep_vars=True)  # names of buffers, too, but for those that are made anew
    yield from ((n, p) for n, p in pair.named_parameters(remove_duplicate=False) if n in saved)
    yield from ((n, x) for n, x in pair.named_buffers(remove_duplicate=False) if n in saved)


def load(pair: StudentTeacher, directory: Path) -> None:
    """What `save` wrote, into the live pair.

    Raises FileNotFoundError without such a directory, ValueError where another adapter trains here.
    """
    for name, (_, model) in _models(pair).items():
        _load_weights(model, directory / name)
    if pair.selection is not None:
        pair.selection.load_state_dict(load_file(directory / SELECTION))
    _load_memory(pair, directory)


class Checkpointing:
    """What `Trainer` asks of a trainer whose model is a pair."""

    accelerator: Any
    args: Any
    ends: set[int]
    is_deepspeed_enabled: Any
    is_fsdp_enabled: Any
    is_sharded: Any
    lr_scheduler: Any
    model_wrapped: Any
    optimizer: Any
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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The student and what else is kept, whole, by the first process; all call it. A checkpoint of divided weights
        has them whole only where FSDP's `state_dict_type`, or ZeRO-3's `zero3_save_16bit_model`, says so; else of the
        teacher's adapter its configuration, which says what a resumed run loads the parts into."""
        directory = Path(str(output_dir or self.args.output_dir))
        if not self.is_sharded:
            self._save(str(directory))
        elif not directory.name.startswith(PREFIX_CHECKPOINT_DIR) or self._checkpoints_whole_weights:
            self._save(str(directory), whole_state(self.pair, weights(self.pair), self.args.should_save))
        elif self.args.should_save and self.pair.teacher is not None and self.pair.teacher.learns:
            self.pair.teacher.model.active_peft_config.save_pretrained(directory / ADAPTER)

    @property
    def _checkpoints_whole_weights(self) -> bool:
        state = self.accelerator.state
        if self.is_fsdp_enabled:
            return "FULL_STATE_DICT" in str(state.fsdp_plugin.state_dict_type)
        return bool(state.deepspeed_plugin.zero3_save_16bit_model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """What continues a run: of divided models each process its part, of what trains alone."""
        directory = Path(output_dir)
        if self.is_fsdp_enabled:
            directory.mkdir(parents=True, exist_ok=True)
            save_shards(self.pair, weights(self.pair), self.optimizer.optimizer, directory / SHARDS)
        elif self.is_deepspeed_enabled:
            save_deepspeed(self.model_wrapped, self.pair, weights(self.pair), directory)
        else:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        if self.args.should_save:
            _save_memory(self.pair, directory)
            torch.save(self.lr_scheduler.state_dict(), directory / SCHEDULER_NAME)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """DeepSpeed's checkpoints have no frozen weights, which transformers would look for."""
        checkpoint = resume_from_checkpoint if self.is_deepspeed_enabled else None
        with with_buffers(self.pair) if self.is_fsdp_enabled else nullcontext():
            found = super()._prepare_for_training(  # type: ignore[misc]
                max_steps, train_dataloader, None if checkpoint else resume_from_checkpoint
            )
        if self.is_sharded and self.is_deepspeed_enabled:
            hold_heads(self.pair)
        if checkpoint:
            self._load_from_checkpoint(checkpoint)
            self._load_optimizer_and_scheduler(checkpoint)
        return found

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            load_shards(self.pair, weights(self.pair), directory / SHARDS)
        elif self.is_sharded:
            load_deepspeed(self.model_wrapped, directory)
        else:
            load(self.pair, directory)
            if self.is_deepspeed_enabled:  # ZeRO-2: after what does not train
                load_deepspeed(self.model_wrapped, directory)
            return
        _load_memory(self.pair, directory)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """What continues a run, and not merely its weights; the sampler's state, too."""
        if checkpoint is None:
            return
        directory = Path(checkpoint)
        if self.is_fsdp_enabled:
            load_optimizer_shards(self.pair, self.optimizer.optimizer, directory / SHARDS)
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            self.lr_scheduler.load_state_dict(torch.load(directory / SCHEDULER_NAME, weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        self.sampler.load(self._sampler_file(directory))

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
