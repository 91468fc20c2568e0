"""A teacher that learns: the module that trains in it, and how far it has moved from what it was.

OKD (arXiv 2409.12512) adds a small module to every layer of the teacher, CLDA (arXiv 2409.02699) trains the weights
that matter least. Either way the teacher becomes a PEFT model: its base stays as it was, and what trains is saved as an
adapter that plain `peft` loads.

Shapes: N response tokens; D the hidden size.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from okd.data import Batch
from okd.models import decoder_modules, head_of, response_rows
from okd.options import option
from okd.teachers import Placed, base_of, head_of_judge, refuse_injected, rows_of_judge
from okd_kernels import DistillationLoss, LinearHead

if TYPE_CHECKING:
    from okd.objectives import Totals
    from okd.pair import StudentTeacher


@dataclass
class OnlineOptions:
    """Read where the teacher learns."""

    teacher_kl_weight: float | None = option(
        None,
        "a of the teacher's loss a KL(student || teacher) + (1 - a) CE; default: 0.1, or as the method says",
        least=0,
        most=1,
    )
    online_module: str | None = option(
        None,
        "what trains in the teacher: lora, prefix, p_tuning or non_salient (weights); default: as the method says",
        choices=("lora", "prefix", "p_tuning", "non_salient"),
    )
    online_learning_rate: float | None = option(None, "learning rate of the online module; default: learning_rate")
    online_start: float = option(
        0.0, "share of the training after which the online module begins to learn", least=0, most=1
    )
    online_stop: float = option(1.0, "share of the training after which the online module rests", least=0, most=1)
    online_every: int = option(1, "the online module learns at every so many steps", least=1)
    alternating: bool | None = option(None, "student and online module learn in turns; default: as the method says")


@dataclass
class LoraOptions:
    """Read by online_module=lora."""

    online_target_modules: list[str] | None = option(
        None,
        "linear modules of the teacher's decoder that carry the LoRA, such as q_proj v_proj, or all-linear; default: "
        "query and value projections, or what holds them",
    )
    online_rank: int = option(32, "rank of the teacher's LoRA", least=1)
    online_alpha: int | None = option(None, "alpha of the teacher's LoRA, scaled by alpha / rank; default: its rank")
    online_dropout: float = option(0.0, "dropout of the teacher's LoRA", least=0, most=1)
    online_layers: float = option(
        1.0, "share of the teacher's layers, from the top, that carry the LoRA", above=0, most=1
    )


@dataclass
class PromptOptions:
    """Read by online_module=prefix and p_tuning."""

    online_virtual_tokens: int = option(20, "length of a prefix or p-tuning prompt", least=1)


@dataclass
class SalienceOptions:
    """Read by online_module=non_salient."""

    clda_share: float = option(
        0.1, "share of the teacher's decoder weights, the least salient, that non_salient trains", above=0, most=1
    )


MODULE_OPTIONS: dict[str, type] = {
    "lora": LoraOptions,
    "prefix": PromptOptions,
    "p_tuning": PromptOptions,
    "non_salient": SalienceOptions,
}


TARGETS = (  # query and value projections, fused ones, and the last ones of DeepSeek's latent attention
    ("q_proj", "v_proj"), ("query", "value"), ("q", "v"),
    ("qkv_proj",), ("query_key_value",), ("Wqkv",), ("c_attn",),
    ("q_b_proj", "kv_b_proj"), ("q_proj", "kv_b_proj"),
)  # fmt: skip


class Online(Placed):
    """A PEFT model whose adapter alone trains. It has a graph where `learning`; its base judges.

    Raises ValueError where anything else would train, or nothing.
    """

    learns, judges = True, True

    def __init__(self, model: Any):
        super().__init__()
        refuse_injected(model)
        adapter = adapter_names(model)
        training = {name for name, p in model.named_parameters() if p.requires_grad}
        if training - adapter:
            raise ValueError(
                f"expected only the online module of the teacher to train; {len(training - adapter)} weights of the "
                f"base would too, such as {min(training - adapter)}: call requires_grad_(False) on them"
            )
        if not training:
            raise ValueError(
                "expected a teacher whose online module trains; all of its parameters are frozen: merge the adapter "
                "that it has, load it with PeftModel.from_pretrained(teacher, directory, is_trainable=True) to train "
                "it, or use a method with a frozen teacher"
            )
        _widen_copies(model)
        self.model, self.learning = model, True

    def rows(self, batch: Batch) -> Tensor:
        with torch.set_grad_enabled(self.learning and torch.is_grad_enabled()):
            return response_rows(self.model, batch, as_teacher=True)

    def head(self, device: torch.device | None = None) -> LinearHead:
        return head_of(self.model, device)

    @contextmanager
    def as_it_was(self) -> Iterator[Any]:
        with base_of(self.model) as base:
            yield base

    def after_update(self, student: nn.Module) -> None:
        """The optimizer has moved its module."""

    def train(self, mode: bool = True) -> Online:
        """Evaluation mode but for the LoRA's dropout: any other would blur the target."""
        super().train(False)
        self.training = mode
        for name, module in self.model.named_modules():
            # a layer asks its own flag whether to checkpoint
            if "lora_dropout" in name or getattr(module, "gradient_checkpointing", False):
                module.training = mode
        return self

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        self.model.gradient_checkpointing_enable(**options)
        for module in self.model.modules():  # `train` sets the flag that some layers' own dropout looks at
            if getattr(module, "gradient_checkpointing", False):
                for name in [n for n, x in vars(module).items() if "drop" in n and isinstance(x, float)]:
                    setattr(module, name, 0.0)
        chosen = options.get("gradient_checkpointing_kwargs") or {}
        if not chosen.get("use_reentrant", False):
            # For reentrant checkpoints, transformers gives the embeddings' output a gradient. It would take the
            # backward pass through every frozen layer below the first adapted one.
            self.model.disable_input_require_grads()


def attach_online_module(teacher: Any, options: Any, modules: Sequence[str] | None = None) -> Any:
    """The teacher as a PEFT model whose base is frozen and whose adapter, starting at no change, trains.

    LoRA, by default on the query and value projections as in the paper (arXiv 2409.12512, Sec. 3.1), prefix tuning or
    p-tuning; or a copy of each of the `modules` named, which trains in its place while the original is kept.
    """
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied embeddings, which no adapter touches here
        return _in_memory(peft.get_peft_model(teacher, online_config(teacher, options, modules)))


def online_config(teacher: Any, options: Any, modules: Sequence[str] | None = None) -> Any:
    """PEFT's configuration of the online module."""
    import peft
    from peft.utils.constants import DUMMY_TARGET_MODULES

    kind: str = options.resolved.online_module
    if modules is not None:
        return peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=DUMMY_TARGET_MODULES, modules_to_save=list(modules)
        )
    if kind == "prefix":
        return peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.online_virtual_tokens)
    if kind == "p_tuning":
        return peft.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=options.online_virtual_tokens,
            encoder_hidden_size=teacher.config.get_text_config().hidden_size,
        )
    n_layers = teacher.config.get_text_config().num_hidden_layers
    first = n_layers - max(1, round(options.online_layers * n_layers))
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=options.online_rank,
        lora_alpha=options.online_rank if options.online_alpha is None else options.online_alpha,
        lora_dropout=options.online_dropout,
        layers_to_transform=list(range(first, n_layers)) if first else None,
        **_targets(teacher, options.online_target_modules),
    )


def _in_memory(model: Any) -> Any:
    """LoRA's weights beside offloaded layers, which PEFT leaves without values, drawn where those layers compute.

    Raises ValueError for another module that would be offloaded.
    """
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if isinstance(layer, LoraLayer) and any(p.is_meta for p in layer.lora_A.parameters()):
            base: Any = layer.get_base_layer()
            for weights in (layer.lora_A, layer.lora_B):
                weights.to_empty(device=base._hf_hook.execution_device)
            for name in layer.lora_A:
                layer.reset_lora_parameters(name, True)
    offloaded = [name for name, p in model.named_parameters() if p.requires_grad and p.is_meta]
    if offloaded:
        raise ValueError(
            f"expected the online module in memory, where it trains; {len(offloaded)} of its weights are offloaded, "
            f"such as {offloaded[0]}: choose online_module=lora, or another device_map"
        )
    return model


def _targets(model: Any, wanted: Sequence[str] | None) -> dict[str, Any]:
    """`target_modules` of a LoRA: those `wanted`, or the first of TARGETS that the decoder has; None leaves the choice
    to PEFT's table. And as `exclude_modules` all but the decoder, where there are such modules too (a vision tower).

    Raises ValueError for names that no linear module of the decoder has.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS

    modules = decoder_modules(model)
    names = {
        name.rpartition(".")[2]
        for name, module in modules
        if isinstance(module, nn.Linear | Conv1D) or "Linear" in type(module).__name__
    }
    if wanted is None:
        chosen = next((list(x) for x in TARGETS if names.issuperset(x)), None)
    else:
        chosen = sorted(names) if "all-linear" in wanted else list(wanted)
    unknown = [name for name in chosen or () if name.rpartition(".")[2] not in names]
    if unknown or not (chosen or model.config.model_type in PEFT_TARGETS):
        raise ValueError(
            "expected online_target_modules by names of linear modules in the teacher's decoder, which are "
            f"{', '.join(sorted(names)) or 'none'}; got {', '.join(unknown) or 'none'}: pass some of those"
        )
    within, _ = modules[0]
    outside = [n for n, _ in model.named_modules() if within and not f"{n}.".startswith(f"{within}.")]
    if any(f".{n}".endswith(f".{name}") for n in outside for name in chosen or ()):
        return {"target_modules": chosen, "exclude_modules": rf"(?!{re.escape(within)}\.).*"}
    return {"target_modules": chosen}


def adapter_names(teacher: nn.Module) -> set[str]:
    """Names of the parameters that belong to a PEFT adapter rather than to the base model."""
    if not hasattr(teacher, "peft_config"):
        return set()
    prefix = getattr(teacher.base_model, "prefix", None) or "prompt_encoder"
    prefixes = (prefix, "modules_to_save")
    return {name for name, _ in teacher.named_parameters() if any(p.startswith(prefixes) for p in name.split("."))}


class _WideLinear(nn.Linear):
    """Weights in fp32, products in the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, self.weight.to(input.dtype), bias)


class _WideConv1D(Conv1D):
    """The same of GPT-2's linear module, whose weight is transposed."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.t().to(x.dtype), self.bias.to(x.dtype))


def _widen_copies(model: Any) -> None:
    """Copies of 16-bit modules train in fp32: bf16 would round most of their updates away."""
    from peft.utils import ModulesToSaveWrapper

    for wrapper in (module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)):
        for module in wrapper.modules_to_save.values():
            if type(module) in (nn.Linear, Conv1D) and module.weight.dtype in (torch.bfloat16, torch.float16):
                module.float()
                module.__class__ = _WideLinear if isinstance(module, nn.Linear) else _WideConv1D


@torch.no_grad()
def distance_from_base(pair: StudentTeacher, batch: Batch, totals: Totals | None = None) -> DistillationLoss:
    """The student's divergence from the teacher as it was. For `pair(batch, loss=...)`.

    With an online teacher the metrics also hold, for each token, `teacher_shift`, KL(base || online teacher) in nats,
    which says how far the module has moved its teacher, and `online_teacher_nll`, of the label.
    """
    targets = batch["targets"]
    with pair.teacher.as_it_was() as model:
        base, base_head = rows_of_judge(model, batch), head_of_judge(model, targets.device)
    options: dict[str, Any] = {"teacher": None, "teacher_head": base_head, "temperature": 1.0}  # as in evaluations
    if "aligned" in batch:
        loss = pair.distil_aligned(pair.student_rows(batch), base, batch, **options)
        targets = batch["teacher_targets"]
    else:
        loss = pair.distil(pair.student_rows(batch), base, targets, **options)
    if not pair.teacher.learns:
        return loss
    shift = pair.distil(pair.teacher_rows(batch), base, targets, student_head=pair.teacher_head(), **options).metrics
    moved = {"teacher_shift": shift["forward_kl"], "online_teacher_nll": shift["student_nll"]}
    return loss._replace(metrics=loss.metrics | moved)
