"""What the teacher is: frozen, online (with a module that trains), or several.

OKD (arXiv 2409.12512) adds a small module to every layer of the teacher, CLDA (arXiv 2409.02699) trains the weights
that matter least. Either way the teacher becomes a PEFT model: its base stays as it was and comes back with
`base_teacher`, and what trains is saved as an adapter that plain `peft` loads.

Shapes: B rows padded to T tokens, N of which come before a response token; D the hidden size.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from okd.config import METHODS, OKDConfig
from okd.models import check_head, hidden_states, load_model
from okd.pair import Batch, StudentTeacher
from okd.salience import calibration_batches, non_salient_modules
from okd_kernels import DistillationLoss, LinearHead


def prepare_teacher(
    teacher: Any,
    args: OKDConfig,
    student: Any = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    collator: Callable[[Any], dict[str, Any]] | None = None,
) -> Any:
    """Frozen, with an online module that alone trains, or the `Ensemble` of a list.

    Student, training rows and collator serve to find the weights that matter least (`online_module="non_salient"`).
    Raises ValueError where something else would train, or where the method wants another number of teachers.
    """
    for member in teacher if isinstance(teacher, list | tuple) else [teacher]:
        _refuse_injected(member)
    if isinstance(teacher, list | tuple):
        teacher = Ensemble(teacher) if len(teacher) > 1 else teacher[0]
    check_number_of_teachers(args, len(teacher.members) if isinstance(teacher, Ensemble) else 1)
    if hasattr(teacher, "peft_config"):
        teacher.adapter_is_online = args.online  # else it is part of the teacher, to `base_teacher` too
    if not args.online:
        return teacher.requires_grad_(False)
    if not hasattr(teacher, "peft_config"):
        modules = None
        if args.online_kind == "non_salient":
            if not rows or collator is None:
                raise ValueError(
                    f"expected training data, by which {args.method} finds the teacher's weights that matter least; "
                    "got none: pass train_dataset, or a teacher that has its adapter already"
                )
            modules = non_salient_modules(student, teacher, args, calibration_batches(rows, collator, args))
        teacher = attach_online_module(teacher, args, modules)
    adapter = adapter_names(teacher)
    training = {name for name, p in teacher.named_parameters() if p.requires_grad}
    if training - adapter:
        raise ValueError(
            f"expected only the online module of the teacher to train; {len(training - adapter)} weights of the base "
            f"would too, such as {min(training - adapter)}: call requires_grad_(False) on them"
        )
    if not training:
        raise ValueError(
            "expected a teacher whose online module trains; all of its parameters are frozen: merge the adapter that "
            "it has, load it with PeftModel.from_pretrained(teacher, directory, is_trainable=True) to train it, or "
            "use a method with a frozen teacher"
        )
    return teacher


def _refuse_injected(teacher: Any) -> None:
    """Raise ValueError for a model that PEFT has wrapped, which holds an adapter that nobody can switch off."""
    if hasattr(teacher, "disable_adapter") or not hasattr(teacher, "peft_config"):
        return
    if getattr(teacher, "_hf_peft_config_loaded", False):  # transformers has loaded it with an adapter, its own
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    if any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in teacher.modules()):
        raise ValueError(
            "expected a teacher as it was loaded, or a PEFT model; got a model that an online module has been put "
            "into, as OKDTrainer does in place: pass trainer.pair.teacher, or load the teacher again"
        )


def check_vocabularies(student: Any, teacher: Any, vocab_size: int | None) -> None:
    """Raise ValueError unless all heads have one number of rows, or `vocab_size` and more."""
    heads = [LinearHead.from_model(student)]
    if isinstance(teacher, Ensemble):
        for i in range(len(teacher.members)):
            with teacher.active(i) as member:
                heads.append(LinearHead.from_model(member))
    else:
        heads.append(LinearHead.from_model(teacher))
    sizes = [len(head.weight) for head in heads]
    if vocab_size is None and len(set(sizes)) > 1:
        raise ValueError(
            f"expected heads of one vocabulary size; got student {sizes[0]} and teacher "
            f"{', '.join(map(str, sizes[1:]))}. If they share a tokenizer and are padded differently, pass "
            f"vocab_size=len(tokenizer), at most {min(sizes)}"
        )
    if vocab_size is not None and not 0 < vocab_size <= min(sizes):
        raise ValueError(f"expected vocab_size in [1, {min(sizes)}], as all heads have rows; got {vocab_size}")


def check_number_of_teachers(args: OKDConfig, n: int) -> None:
    """Raise ValueError unless the method takes so many teachers."""
    if n > 1 and args.preset.selection is None:
        names = " or ".join(name for name, method in METHODS.items() if method.selection)
        raise ValueError(f"expected one teacher for method {args.method}; got {n}: pass one, or use {names}")
    if n == 1 and args.preset.selection is not None:
        raise ValueError(
            f"expected several teachers for method {args.method}; got one: pass OKDTrainer(student, [one, another, "
            "...]), on the command line --more-teachers, or use a method with one teacher"
        )


# --- the online module ---


def attach_online_module(teacher: Any, args: OKDConfig, modules: Sequence[str] | None = None) -> Any:
    """The teacher as a PEFT model whose base is frozen and whose adapter, starting at no change, trains.

    LoRA on the query and value projections as in the paper (arXiv 2409.12512, Sec. 3.1), prefix tuning or p-tuning; or
    a copy of each of the `modules` named, which trains in its place while the original is kept.
    """
    import peft
    from peft.utils.constants import DUMMY_TARGET_MODULES

    config: Any
    if modules is not None:
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", target_modules=DUMMY_TARGET_MODULES, modules_to_save=list(modules)
        )
    elif args.online_kind == "prefix":
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=args.online_virtual_tokens)
    elif args.online_kind == "p_tuning":
        config = peft.PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=args.online_virtual_tokens,
            encoder_hidden_size=teacher.config.get_text_config().hidden_size,
        )
    else:
        n_layers = teacher.config.get_text_config().num_hidden_layers
        first = n_layers - max(1, round(args.online_layers * n_layers))
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=args.online_rank,
            lora_alpha=args.online_rank if args.online_alpha is None else args.online_alpha,
            lora_dropout=args.online_dropout,
            target_modules=_query_and_value(teacher),
            layers_to_transform=list(range(first, n_layers)) if first else None,
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of tied embeddings, which no adapter touches here
        return peft.get_peft_model(teacher, config)


def _query_and_value(model: nn.Module) -> list[str] | None:
    """Names of the query and value projections; None leaves the choice to PEFT's table (fused projections)."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    for pair in (["q_proj", "v_proj"], ["query", "value"], ["q", "v"]):
        if names.issuperset(pair):
            return pair
    return None


@contextmanager
def base_teacher(teacher: Any) -> Iterator[None]:
    """The teacher as it was before its online module: the judge of student and teacher. Of several, the first.

    An adapter that a run keeps frozen stays on: there it belongs to the teacher. Raises ValueError for a model that
    holds an online module without being the PEFT model around it.
    """
    _refuse_injected(teacher)
    if not hasattr(teacher, "disable_adapter") or not getattr(teacher, "adapter_is_online", True):
        yield
        return
    flags = [(p, p.requires_grad) for p in teacher.parameters()]
    with teacher.disable_adapter():
        yield
    for parameter, requires_grad in flags:  # PEFT leaves every adapter trainable, frozen ones too
        parameter.requires_grad_(requires_grad)


@torch.no_grad()
def distance_from_base(pair: StudentTeacher, batch: Batch, normalizer: Any = None) -> DistillationLoss:
    """The student's divergence from the teacher as it was. For `pair(loss=...)`.

    With an online teacher the metrics also hold, for each token, `teacher_shift`, KL(base || online teacher) in nats,
    which says how far the module has moved its teacher, and `online_teacher_nll`, of the label.
    """
    with base_teacher(pair.teacher):
        base, base_head = pair.teacher_rows(batch), LinearHead.from_model(pair.teacher)
    targets = batch["targets"]
    options: dict[str, Any] = {"teacher": None, "teacher_head": base_head, "temperature": 1.0}  # as in evaluations
    loss = pair.distil(pair.student_rows(batch), base, targets, normalizer, **options)
    if not pair.args.online:
        return loss
    online = LinearHead.from_model(pair.teacher)
    shift = pair.distil(pair.teacher_rows(batch), base, targets, normalizer, student_head=online, **options).metrics
    moved = {"teacher_shift": shift["forward_kl"], "online_teacher_nll": shift["student_nll"]}
    return loss._replace(metrics=loss.metrics | moved)


def adapter_names(teacher: nn.Module) -> set[str]:
    """Names of the parameters that belong to a PEFT adapter rather than to the base model."""
    if not hasattr(teacher, "peft_config"):
        return set()
    prefix = getattr(teacher.base_model, "prefix", None) or "prompt_encoder"
    prefixes = (prefix, "modules_to_save")
    return {name for name, _ in teacher.named_parameters() if any(p.startswith(prefixes) for p in name.split("."))}


# --- several teachers ---


class Ensemble(nn.Module):
    """Several frozen teachers over one vocabulary. Its forward gives each one's hidden rows and head.

    The first one is the judge: to `base_teacher`, `hidden_states` and `LinearHead.from_model`, and so to evaluation,
    the ensemble is that teacher. It is one model whatever is learned meanwhile; a mixture of them is not.

    Args:
        members: models, or pairs (PEFT model, name of its adapter; None for its base). Members may share a model, whose
            adapters are then switched, so that its base exists once.

    Raises:
        ValueError: the first teacher, as judge, has a prompt or prefix; a head does more than a matrix product.
    """

    def __init__(self, members: Sequence[Any]):
        super().__init__()
        pairs = [
            m if isinstance(m, tuple) else (m, m.active_adapter if hasattr(m, "peft_config") else None) for m in members
        ]
        models = {id(model): model for model, _ in pairs}
        self.models = nn.ModuleList(models.values())
        self.members = [(list(models).index(id(model)), adapter) for model, adapter in pairs]
        model, adapter = pairs[0]
        if adapter is not None and model.peft_config[adapter].is_prompt_learning:
            raise ValueError(
                f"expected a first teacher, which judges, without prompt or prefix; got adapter {adapter!r}: put it "
                "second, or merge what it learned into a model"
            )
        self.requires_grad_(False)
        for i in range(len(self.members)):
            with self.active(i) as member:
                check_head(member, f"teacher {i + 1}")

    @contextmanager
    def active(self, i: int) -> Iterator[Any]:
        """The model of member i, with its adapter switched on and no other."""
        index, adapter = self.members[i]
        model: Any = self.models[index]
        if adapter is None:
            with base_teacher(model):
                yield model
            return
        if model.active_adapter != adapter:
            model.set_adapter(adapter, inference_mode=True)
        yield model

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T)
        positions: Tensor,  # (N,)
    ) -> list[tuple[Tensor, LinearHead]]:
        """(N, D_i) hidden rows that predict a response token, and the head, of each teacher."""
        result = []
        for i in range(len(self.members)):
            with self.active(i) as model:
                rows = hidden_states(model, input_ids, attention_mask).flatten(0, 1)[positions]
                result.append((rows, LinearHead.from_model(model)))
        return result

    @property
    def widths(self) -> list[int]:
        """Hidden size of each teacher."""
        models: list[Any] = [self.models[index] for index, _ in self.members]
        return [model.config.get_text_config().hidden_size for model in models]

    # What makes the ensemble look like its first teacher, in the terms of PEFT.

    def disable_adapter(self) -> Any:
        return self.active(0)

    def get_base_model(self) -> Any:
        model: Any = self.models[0]
        return model.get_base_model() if hasattr(model, "peft_config") else model

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device


def is_adapter(source: str) -> bool:
    """A directory that holds a PEFT adapter rather than a model."""
    return (Path(source) / "adapter_config.json").is_file()


def load_ensemble(
    first: Any, sources: Sequence[str], dtype: str = "auto", device: torch.device | None = None
) -> Ensemble:
    """The first teacher, already loaded, and one for each source: a model, or a directory with an adapter over it."""
    from peft import PeftModel

    adapted: Any = None
    members: list[Any] = []
    for i, source in enumerate(sources, start=2):
        if not is_adapter(source):
            members.append(load_model(source, dtype, device))
            continue
        name = f"teacher_{i}"
        if adapted is None:
            adapted = PeftModel.from_pretrained(first, source, adapter_name=name)
        else:
            adapted.load_adapter(source, adapter_name=name)
        members.append((adapted, name))
    return Ensemble([first if adapted is None else (adapted, None), *members])
