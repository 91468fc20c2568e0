"""What a run needs, counted from shapes alone, before any weight is loaded: an `okd.budget.Plan`.

Where devices divide the models, each gathers what it needs for a moment, and a step's time is that of products and of
transfers (`okd.cluster`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from okd import mixup, sampling
from okd.budget import Part, Plan
from okd.cluster import SHARDINGS, SLACK, Cluster, sharding_of
from okd.layers import decoder_of, keep_layers, parse_layers
from okd.loading import config_of, given_options, teacher_sources, whole_teachers
from okd.models import is_adapter
from okd.online import online_config
from okd.shapes import Trace, skeleton, time_layer, trace
from okd.sharding import loaded_whole
from okd.student import lora_config
from okd_kernels import has_fast_gemm, workspace_size

logger = logging.get_logger(__name__)
CONTEXT = 600 << 20  # what CUDA and cuBLAS take of a GPU
BITS = {"4bit": 4.127, "8bit": 8.0}  # a weight: nf4 with its doubly quantised scales; int8
STATES = (  # bytes of the optimizer's states for each trainable weight, None: two of its dtype, by the name's beginning
    ("adamw_torch_8bit", 2.0), ("adamw_torch_4bit", 1.0), ("adamw_torch", None), ("adamw_apex", None),
    ("adamw_8bit", 2.0), ("adamw_bnb_8bit", 2.0), ("paged_adamw_8bit", 2.0), ("paged_adamw", None),
    ("lion_8bit", 1.0), ("paged_lion_8bit", 1.0), ("lion", 4.0), ("paged_lion", 4.0),
    ("sgd", 0.0), ("adafactor", 0.0), ("adagrad", 4.0), ("rmsprop_bnb_8bit", 1.0), ("rmsprop", 4.0),
)  # fmt: skip
SPREAD = {"auto", "balanced", "balanced_low_0", "sequential", "disk"}  # what a device_map says in place of a device
BY_MAP = "device_map"


def measured_tflops(plan: Plan) -> float | None:
    """1e12 FLOPs a second of one of the student's layers, forward and backward, on this machine's device.

    Norms, activations and attention's softmax are in that, which take as long as the products on a CPU. None where the
    plan is for another device, or the layer cannot be made.
    """
    if plan.layer is None or (plan.device.type == "cuda" and not torch.cuda.is_available()):
        return None
    try:
        work, seconds = time_layer(plan.layer, *plan.rows, plan.device, plan.autocast)
    except Exception as error:  # whatever a model's code asks of its configuration
        logger.warning(f"expected a layer to time; got none: pass --tflops ({_line(error)})")
        return None
    return work / seconds / 1e12


def plan(
    config: Any,
    args: Any,
    device: str | torch.device | None = None,
    devices: int | None = None,
    sharding: str | None = None,
) -> Plan:
    """Of a run with these `RunConfig` and `OKDConfig`. device: cpu or cuda; devices: how many; sharding: what they
    divide, a name of `okd.cluster.SHARDINGS`; default: as `args` and accelerate's launcher say.

    Raises ValueError and FileNotFoundError for models that are not there. What cannot be built without weights is
    counted from the configuration's numbers, and noted.
    """
    device, devices = torch.device(device or args.device), devices or args.world_size
    with loaded_whole():
        return _Planner(config, args, device, devices, sharding or sharding_of(args)).plan()


def teacher_place(config: Any, args: Any, device: torch.device) -> str | None:
    """Where the teachers are, if not on this device: another one's name, or `device_map`, by which they are spread.

    By names alone, since a plan may be for another machine. Raises ValueError for what is no name of a device.
    """
    chosen = given_options(config, "teacher").get("device_map")
    chosen = args.teacher_device if chosen in (None, {}) else chosen
    places = set(chosen.values()) if isinstance(chosen, Mapping) else {chosen}
    if len(places) > 1 or places & SPREAD:
        return BY_MAP
    (place,) = places
    if place is None:
        return None
    name = f"cuda:{place}" if isinstance(place, int) else str(place)
    try:
        other = torch.device(name)
    except RuntimeError as error:
        raise ValueError(
            f"expected the teacher on a device such as cpu or cuda:1; got {place!r} ({str(error).splitlines()[0]}): "
            "correct teacher_device, or device_map in teacher_kwargs"
        ) from error
    is_here = other.type == device.type and other.index in (None, device.index or 0)
    return None if is_here else name


class _Model(NamedTuple):
    """One side: its skeleton (None: unknown architecture), what its weights take, and what trains in it."""

    skeleton: Any
    config: Any
    n: int  # parameters
    bytes: float
    trainable: int
    trainable_bytes: float
    trace: Trace | None
    head: tuple[int, int]  # (V, D)
    head_dtype: torch.dtype
    share: float  # of the weights that a device holds


class _Planner:
    """One plan in the making."""

    def __init__(self, config: Any, args: Any, device: torch.device, devices: int, sharding: str):
        self.config, self.args, self.method, self.device = config, args, args.resolved, device
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
        self.sharding, self.devices = SHARDINGS[sharding], devices
        self.wide = (self.autocast or torch.float32) if self.sharding.deepspeed else torch.float32  # what trains
        rows = 2 if self.method.responses is sampling.paired or self.method.loss is mixup.mixkd else 1
        self.batch, self.length = rows * args.per_device_train_batch_size, args.max_length
        self.n, self.steps = self.batch * self.length, args.gradient_accumulation_steps
        self.result = Plan(device, devices, self.autocast, (self.batch, self.length), sharding)
        self.notes = self.result.notes

    def plan(self) -> Plan:
        args, result, given = self.args, self.result, teacher_sources(self.config, self.args, is_planned=True)
        sources = whole_teachers(given)
        if len(sources) < len(given):
            self.notes.append("adapters of further teachers are not counted")
        place = teacher_place(self.config, args, self.device)
        if sources and place == BY_MAP:
            self.notes.append(
                "the teacher is where its device_map puts it: what of it is on this device, or comes to it to be "
                "computed, is not in the sum"
            )
        teachers = [self._teacher(source) for source in sources]
        student = self._student(self.config.student or sources[0])
        result.tokens = self.n * self.steps
        result.layer = student.config
        result.models = [model.skeleton for model in (student, *teachers)]
        result.parameters = {"student": student.n, "student, that train": student.trainable}
        result.parameters |= {f"teacher{_number(i, teachers)}": t.n - t.trainable for i, t in enumerate(teachers)}
        self._count_student(student)
        for i, teacher in enumerate(teachers):
            self._count_teacher(teacher, _number(i, teachers), place)
        if args.self_teacher == "average":
            self._add("averaged self-teacher", student.trainable_bytes * student.share)
        if args.self_teacher is not None and student.trace is not None:
            result.flops["self-teacher forward"] = self.steps * student.trace.forward
        self._count_loss(student, teachers)
        self._count_sharing(student, teachers)
        self._count_the_rest(teachers)
        return result

    # --- the models

    def _teacher(self, source: str) -> _Model:
        model, config, dtype = self._built("teacher", source)
        trainable = None
        if self.args.online and model is not None:
            if self.method.online_module == "non_salient":
                trainable = self._least_salient(model)
            else:
                model = self._adapted("online module", model, lambda: online_config(model, self.args))
        elif model is not None:
            model.requires_grad_(False)
        if not self.args.online:
            trainable = 0
        teacher = self._measured("teacher", model, config, dtype, trainable)
        return teacher if self.args.teacher_cache is None or teacher.trace is None else self._cached(teacher)

    def _cached(self, teacher: _Model) -> _Model:
        """What a cache leaves of a teacher: its layers from the lowest that learns on, or the head alone."""
        found: Any = teacher.trace
        frozen = next((i for i, layer in enumerate(found.layers) if layer.trainable), len(found.layers))
        below, is_last = found.layers[:frozen], frozen == len(found.layers)
        a_token = _width(teacher)
        if self.args.teacher_cache_dtype is not None:
            a_token = teacher.head[1] * getattr(torch, self.args.teacher_cache_dtype).itemsize
        if self.args.teacher_cache_top_k is not None:
            a_token = 8 * self.args.teacher_cache_top_k
        flops = found.forward if is_last else sum(layer.flops for layer in below)
        self.notes.append(
            f"teacher cache: {a_token:,} bytes on disk for each {'response ' * is_last}token of the data, and once "
            f"{flops / self.n / 1e9:.3g} GFLOP for each token"
        )
        self._add("teacher's stored states", self.n * a_token, 0, is_certain=False)
        if is_last:
            return teacher._replace(bytes=teacher.head[0] * teacher.head[1] * teacher.head_dtype.itemsize, trace=None)
        attention = found.attention - sum(layer.attention for layer in below)
        trace = found._replace(forward=found.forward - flops, attention=attention, layers=found.layers[frozen:])
        if self.sharding.weights:
            return teacher._replace(trace=trace)
        frozen_bytes = sum(x.weights - x.trainable for x in found.layers) + found.around[0] - found.around[1]
        dropped = sum(layer.weights for layer in below) / frozen_bytes
        return teacher._replace(trace=trace, bytes=(1 - dropped) * teacher.bytes)

    def _least_salient(self, model: Any) -> int:
        """CLDA's weights are chosen by data: until then all that it chooses from have gradients."""
        linear = [m.weight for m in model.get_decoder().modules() if isinstance(m, nn.Linear | Conv1D)]
        model.requires_grad_(False)
        for weight in linear:
            weight.requires_grad_()
        self.notes.append("which of the teacher's weights are least salient is not known yet: its graph is all layers'")
        return round(self.args.clda_share * sum(weight.numel() for weight in linear))

    def _student(self, source: str) -> _Model:
        model, config, dtype = self._built("student", source)
        if model is not None and self.args.student_lora_rank is not None:
            model = self._adapted("student's LoRA", model, lambda: lora_config(model, self.args))
        elif is_adapter(source) and self.config.student_layers is None:
            self.notes.append("the student's own adapter is not counted: it is taken to train as a whole")
        return self._measured("student", None if model is None else model.train(), config, dtype)

    def _adapted(self, what: str, model: Any, config: Any) -> Any:
        import peft

        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return peft.get_peft_model(model, config())
        except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:
            self.notes.append(f"the {what} is not counted: it could not be built without weights ({_line(error)})")
            return model.requires_grad_(False)

    def _built(self, role: str, source: str) -> tuple[Any, Any, torch.dtype]:
        """(skeleton or None, configuration of its text, dtype of the weights)."""
        given, config = given_options(self.config, role), config_of(self.config, role, source)
        dtype = self._dtype(role, config, given)
        attention = given.get("attn_implementation", self.config.attn_implementation)
        if getattr(config, "quantization_config", None) is not None:
            self.notes.append(f"the {role} was saved quantised: its weights are counted as {dtype}")
        try:
            model = skeleton(config, dtype, attention)
            if role == "student" and self.config.student_layers is not None:
                layers = parse_layers(self.config.student_layers, config.get_text_config().num_hidden_layers)
                model = keep_layers(model, layers)
            return model, model.config.get_text_config(), dtype
        except (RuntimeError, NotImplementedError, AttributeError, TypeError, KeyError, ImportError) as error:
            self.notes.append(f"the {role} could not be built without weights ({_line(error)}): a rough count instead")
            return None, config.get_text_config(), dtype

    def _dtype(self, role: str, config: Any, given: Mapping[str, Any]) -> torch.dtype:
        name = given.get("dtype", getattr(self.config, f"{role}_dtype") or self.config.dtype)
        if name != "auto":
            return getattr(torch, name)
        saved = getattr(config, "dtype", None) or torch.float32
        trains = role == "student" and self.args.student_lora_rank is None
        return torch.float32 if trains or not has_fast_gemm(saved, self.device) else saved

    def _measured(self, role: str, model: Any, config: Any, dtype: torch.dtype, trainable: int | None = None) -> _Model:
        """trainable: how many parameters train, and in fp32; None: as the skeleton says."""
        bits = BITS.get(getattr(self.config, f"{role}_quantization") or "")
        share = 1 / self.devices if self.sharding.weights and bits is None else 1.0
        if self.sharding.weights and bits is not None:
            self.notes.append(f"the {role}'s weights are quantised, and not divided")
        if model is None:
            n, shape = _rough_count(config), (config.vocab_size, config.hidden_size)
            trains = n if role == "student" else 0
            of_training = trains * self.wide.itemsize
            return _Model(None, config, n, n * dtype.itemsize, trains, of_training, None, shape, dtype, share)
        if self.sharding.deepspeed:
            model.to(self.wide)
        elif self.sharding.weights and self.autocast is not None:  # accelerate widens what trains
            for p in (p for p in model.parameters() if p.requires_grad):
                p.data = p.data.float()
        linear = {id(m.weight) for m in decoder_of(model).modules() if isinstance(m, nn.Linear)}
        training = [p for p in model.parameters() if p.requires_grad]
        weights = [p for p in model.parameters() if not (p.requires_grad and hasattr(model, "peft_config"))]
        n_bytes = sum(p.numel() * (bits / 8 if bits and id(p) in linear else p.element_size()) for p in weights)
        n = sum(p.numel() for p in model.parameters())
        if trainable is None:
            trains, of_training = sum(p.numel() for p in training), sum(p.numel() * p.element_size() for p in training)
        else:
            n, trains, of_training = n + trainable, trainable, trainable * self.wide.itemsize
        if self.sharding.weights and self.autocast is not None:  # they are gathered as the products take them
            model.to(self.autocast)
        found, head = self._traced(role, model), model.get_output_embeddings().weight
        return _Model(model, config, n, n_bytes, trains, of_training, found, tuple(head.shape), head.dtype, share)

    def _traced(self, role: str, model: Any) -> Trace | None:
        learns = any(p.requires_grad for p in model.parameters())
        batch = self.batch if role == "student" or self.method.needs_teacher else 0
        if not batch:
            return None
        try:
            with torch.set_grad_enabled(learns):
                return trace(model, batch, self.length, self.autocast)
        except Exception as error:
            self.notes.append(f"the {role}'s activations and FLOPs are not known ({_line(error)})")
            return None

    # --- what they take

    def _states(self, model: _Model) -> float:
        name = str(getattr(self.args.optim, "value", self.args.optim))
        found = next((x for x in STATES if name.startswith(x[0])), None)
        note = f"the optimizer {name} is counted as AdamW"
        if found is None and note not in self.notes:
            self.notes.append(note)
        per_weight = None if found is None else found[1]
        if self.sharding.deepspeed:
            per_weight = 4 + (8 if per_weight is None else per_weight)
        states = 2 * model.trainable_bytes if per_weight is None else per_weight * model.trainable
        return states / self.devices if self.sharding.states else states

    def _gradients(self, model: _Model) -> tuple[float, float]:
        """Bytes at the end of the forward pass, of earlier micro-batches, and at the optimizer's step."""
        part = 1 / self.devices if self.sharding.gradients else 1.0
        kept = part * model.trainable_bytes
        waits = self.steps > 1 if not self.sharding.weights else self.sharding.deepspeed  # ZeRO-3 has them always
        wide = 4 * model.trainable / self.devices if self.sharding.deepspeed else 0  # which the optimizer takes
        return kept if waits else 0, kept + wide

    def _add(
        self,
        name: str,
        forward: float,
        update: float | None = None,
        is_certain: bool = True,
        place: str | None = None,  # where it is, if not on this device
    ) -> None:
        if not (forward or update):
            return
        part = Part(name, forward, forward if update is None else update, is_certain)
        if place is None:
            self.result.parts.append(part)
        else:
            self.result.elsewhere.append(part._replace(name=f"{name} ({place})"))

    def _count_student(self, student: _Model) -> None:
        frozen = hasattr(student.skeleton, "peft_config")
        self._add("student weights", student.bytes * student.share)
        if frozen:
            self._add("student LoRA", student.trainable_bytes * student.share)
        self._add("student gradients", *self._gradients(student))
        self._add("student optimizer states", self._states(student))
        self._count_pass("student", student.trace, True)

    def _count_teacher(self, teacher: _Model, number: str, place: str | None) -> None:
        module = teacher.trainable_bytes * teacher.share
        self._add(f"teacher{number} weights", teacher.bytes * teacher.share, place=place)
        if place is not None:
            copy = teacher.head[0] * teacher.head[1] * teacher.head_dtype.itemsize
            self._add(f"copy of the teacher{number}'s head", copy)
        if module:
            held, gradients = module + self._states(teacher), self._gradients(teacher)
            self._add("online module, its states", held + gradients[0], held + gradients[1], place=place)
            self.result.parameters["teacher's online module"] = teacher.trainable
        if self.method.needs_teacher:
            self._count_pass(f"teacher{number}", teacher.trace, teacher.trainable > 0, self.args.online_every, place)

    def _count_pass(
        self, name: str, found: Trace | None, learns: bool, every: int = 1, place: str | None = None
    ) -> None:
        """Of a model that learns at every so many steps: the mean step's work, and the memory of one where it does."""
        if found is None:
            return
        flops, steps, saved, again = self.result.flops, self.steps, found.saved, 0.0
        dtype = str(self.autocast).removeprefix("torch.")
        if learns and self.args.gradient_checkpointing:
            saved, again = found.checkpointed()
        self._add(f"{name} activations", saved, 0, is_certain=False, place=place)
        self._add(f"{name} weights in {dtype}", found.copies, 0, place=place)
        flops[f"{name} forward"] = steps * found.forward
        if learns:
            flops[f"{name} backward"] = steps * found.backward / every
        if again:
            flops[f"{name} recomputation"] = steps * again / every
        idle = found.backward * (1 - 1 / every) / (found.forward + found.backward)  # share of the pass that is left out
        self.result.attention_flops += steps * found.attention * (1 - idle)

    def _count_loss(self, student: _Model, teachers: list[_Model]) -> None:
        """As `okd_kernels` allocates: two chunk buffers, gradients of hidden rows, dW of the student's head in fp32."""
        used = (teachers or [student]) if self.method.needs_teacher else []  # without a teacher: itself
        models, n, flops = [student, *used], self.n, self.result.flops
        v = self.args.vocab_size or min(model.head[0] for model in models)
        buffers = workspace_size(n, v, self.device)
        learning = [student, *(teacher for teacher in teachers if teacher.trainable)]
        trains = student.trainable > 0 and not hasattr(student.skeleton, "peft_config")
        gradient = 4 * student.head[0] * student.head[1] if trains else 0
        twice = self.steps > 1 or getattr(student.config, "tie_word_embeddings", False)  # beside another one's
        twice = twice and not self.sharding.gradients
        narrow = [m for m in models if self.autocast not in (None, m.head_dtype)]
        self._add("loss: chunk buffers", buffers, buffers if self.device.type == "cpu" else 0, is_certain=False)
        self._add("loss: hidden rows, gradients", n * sum(map(_width, models + learning)), 0, is_certain=False)
        self._add("loss: head's gradient", gradient, gradient if twice else 0)
        self._add("loss: heads in 16 bit", sum(2 * m.head[0] * m.head[1] for m in narrow), 0)
        per_width = 2.0 * n * v * self.steps
        flops["heads forward"] = per_width * sum(m.head[1] for m in models)
        of_student = student.head[1] * (2 if trains else 1)
        of_teachers = sum(m.head[1] for m in learning[1:]) / self.args.online_every
        flops["heads backward"] = per_width * (of_student + of_teachers)

    def _count_sharing(self, student: _Model, teachers: list[_Model]) -> None:
        models = {"student": student} | {f"teacher{_number(i, teachers)}": x for i, x in enumerate(teachers)}
        itemsize = (self.autocast or torch.float32).itemsize
        cluster = Cluster(self.sharding, self.devices, itemsize, self.steps)
        for name, size in cluster.for_a_moment(models).items():
            self._add(name, size, 0)
        self.result.traffic = traffic = cluster.traffic(models)
        if self.args.self_teacher is not None and (again := traffic.get("student weights, forward")):
            traffic["self-teacher weights, forward"] = again
        self.notes.extend(cluster.notes())
        if self.sharding == SHARDINGS["ddp"] and self.devices > 1:
            self._add("DDP's buckets", sum(model.trainable_bytes for model in models.values()))

    def _count_the_rest(self, teachers: list[_Model]) -> None:
        if self.sharding.weights:
            forward, update = (sum(sizes) for sizes in zip(*(part[1:3] for part in self.result.parts), strict=True))
            self._add(f"allocator's slack, {SLACK:.0%}", SLACK * forward, SLACK * update, is_certain=False)
        if self.device.type == "cuda":
            self._add("CUDA", CONTEXT, is_certain=False)
        else:
            self._add("Python and libraries", psutil.Process().memory_info().rss, is_certain=False)
        if self.method.responses is not sampling.dataset:
            self.notes.append("writing responses is neither in the step's work nor in the memory (a KV cache)")
        if len(teachers) > 1 and self.method.is_routed:
            self.notes.append("each example has one of the teachers: their forward passes share the rows")
        self.notes.append(
            f"rows of {self.length} tokens, all of which are learned: shorter ones, and prompts, take less"
        )


def _width(model: _Model) -> int:
    """Bytes of a hidden row."""
    return model.head[1] * (model.head_dtype.itemsize if model.trace is None else model.trace.hidden.element_size())


def _number(i: int, of: list[Any]) -> str:
    return f" {i + 1}" if len(of) > 1 else ""


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"


def _rough_count(config: Any) -> int:
    """Parameters of a decoder with gated MLPs, by the usual numbers of its configuration."""
    d, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
    layer = 2 * d * d * (1 + kv / heads) + 3 * d * inner * experts
    tied = getattr(config, "tie_word_embeddings", False)
    return round(config.num_hidden_layers * layer + config.vocab_size * d * (1 if tied else 2))
