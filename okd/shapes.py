"""Models as shapes: built on the meta device without weights, and what a pass through them saves and computes.

What autograd saves is what it says it saves (`saved_tensors_hooks`), of any architecture. What the meta device does not
have stands here: fused attention, which saves no T x T scores, products grouped by experts, and autocast.
"""

from __future__ import annotations

import copy
import statistics
import struct
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from okd.models import adapter_base, from_pretrained, hidden_states, is_adapter, locate

# its numbers' types and formats; 8 is text, 9 an array
GGUF_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
PRODUCTS: dict[Any, tuple[int, int]] = {  # and which of their arguments are the factors
    F.linear: (0, 1),
    **dict.fromkeys(
        (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm), (0, 1)
    ),
    **dict.fromkeys((torch.addmm, torch.baddbmm), (1, 2)),
}
GROUPED = {getattr(module, name, None) for module, name in ((F, "grouped_mm"), (torch, "_grouped_mm"))}
TIMED = 2e10  # FLOPs, a few tenths of a second of a CPU
WIDE = {F.layer_norm, F.softmax, torch.softmax, Tensor.softmax}  # what autocast does in fp32


def read_config(source: str, **options: Any) -> Any:
    """The configuration of a model; of an adapter's directory, its base's. Raises as `load_model` does."""
    if is_adapter(source):
        return read_config(adapter_base(source), **options)
    location = locate(source)
    if "gguf_file" in location:
        try:
            return _gguf_config(Path(location["pretrained_model_name_or_path"]) / location["gguf_file"])
        except (KeyError, ValueError, TypeError, struct.error):
            pass
    return from_pretrained(AutoConfig, source, **options)


def _gguf_config(path: Path) -> Any:
    """By the file's header alone: transformers' reader takes seconds for the vocabulary."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    with path.open("rb") as file:
        values, tensors = _gguf_header(file)
    kind = values["general.architecture"]
    mapping: Any = GGUF_CONFIG_MAPPING[kind]
    names = {ours: f"{kind}.{theirs}" for theirs, ours in mapping.items() if ours}
    found = {"vocab_size": len(values["tokenizer.ggml.tokens"])}
    found |= {ours: values[name] for ours, name in names.items() if name in values}
    return AutoConfig.for_model(kind, **found, tie_word_embeddings="output.weight" not in tensors)


def _gguf_header(file: BinaryIO) -> tuple[dict[str, Any], set[str]]:
    """Metadata, and names of the tensors."""

    def numbers(format: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{format}", file.read(struct.calcsize(f"<{format}")))

    def text() -> str:
        return file.read(*numbers("Q")).decode()

    def value(kind: int) -> Any:
        if kind == 8:
            return text()
        if kind != 9:
            return numbers(GGUF_FORMATS[kind])[0]
        of, n = numbers("IQ")
        return [text() for _ in range(n)] if of == 8 else list(numbers(f"{n}{GGUF_FORMATS[of]}"))

    _, _, n_tensors, n_values = numbers("IIQQ")
    values, tensors = {}, set()
    for _ in range(n_values):
        name = text()
        values[name] = value(*numbers("I"))
    for _ in range(n_tensors):
        tensors.add(text())
        numbers(f"{numbers('I')[0]}QIQ")  # extents, type, offset
    return values, tensors


def skeleton(config: Any, dtype: torch.dtype, attn_implementation: str | None = None) -> Any:
    """The causal LM without its weights. Fused attentions, which are not installed everywhere, are all sdpa here."""
    chosen = "eager" if attn_implementation == "eager" else "sdpa"
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=chosen)
        except (ValueError, ImportError):  # it has no sdpa
            return AutoModelForCausalLM.from_config(config, dtype=dtype)


class Layer(NamedTuple):
    """A layer that gradient checkpointing would run again, and FSDP gathers at once; sizes in bytes."""

    input: int
    saved: int  # what autograd saves inside; 0 without a graph
    flops: float  # of its forward pass
    attention: float  # of these, T^2 products
    weights: int
    trainable: int  # those of them that want a gradient


class Trace(NamedTuple):
    """A pass through the decoder: FLOPs, two for each multiplication and addition, and bytes."""

    forward: float
    backward: float  # of the gradients that are wanted
    attention: float  # of the T^2 products in both
    saved: int  # what autograd saves, without weights and their copies
    copies: int  # of weights, which autocast keeps until the forward pass ends
    layers: list[Layer]
    around: tuple[int, int]  # bytes of the weights outside the layers, and of those of them that want a gradient
    hidden: Tensor  # (B, T, D), on the meta device

    def checkpointed(self) -> tuple[int, float]:
        """Bytes that are saved with gradient checkpointing, one layer's at a time beside all inputs; FLOPs it adds."""
        layers = [layer for layer in self.layers if layer.saved]
        kept = self.saved - sum(x.saved for x in layers) + sum(x.input for x in layers)
        return kept + max((x.saved for x in layers), default=0), sum(x.flops for x in layers)


def trace(model: Any, batch: int, length: int, autocast: torch.dtype | None = None) -> Trace:
    """Of rows of full length, as they come from the collator. Raises where the model's code looks at values."""
    meter, layers = _Meter(autocast), list[Layer]()
    kept = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, Any] = {}

    def save(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in kept and storage._cdata not in meter.copies:
            storages.setdefault(storage._cdata, storage)
        return x

    def saved() -> int:
        return sum(storage.nbytes() for storage in storages.values())

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append((args[0] if args else kwargs["hidden_states"], saved(), meter.forward, meter.attention))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x, before, flops, attention = entered.pop()
        spent = meter.forward - flops, meter.attention - attention
        layers.append(Layer(n_bytes([x]), saved() - before, *spent, *weight_sizes(module)))

    entered: list[tuple[Tensor, int, float, float]] = []
    handles: list[Any] = []
    for module in (m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)):
        handles += module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    try:
        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(save, lambda x: x), meter:
            hidden = hidden_states(model, ids, torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    weights, trainable = weight_sizes(model)
    around = weights - sum(x.weights for x in layers), trainable - sum(x.trainable for x in layers)
    copies = n_bytes(meter.kept.values())
    return Trace(meter.forward, meter.backward, meter.attention, saved(), copies, layers, around, hidden)


def n_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def weight_sizes(module: nn.Module) -> tuple[int, int]:
    """Bytes of its weights, and of those that want a gradient."""
    return n_bytes(module.parameters()), n_bytes(p for p in module.parameters() if p.requires_grad)


def time_layer(
    config: Any, batch: int, length: int, device: torch.device, autocast: torch.dtype | None = None
) -> tuple[float, float]:
    """FLOPs and seconds of a decoder's first layer, forward and backward in fp32 or autocast; on a CPU of few rows."""
    config = copy.deepcopy(config)
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 8, None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    of_row = trace(skeleton(config, torch.float32).train(), 1, length, autocast)
    work = of_row.forward + of_row.backward
    batch = batch if device.type != "cpu" else max(1, min(batch, round(TIMED / work)))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(device)
    ids, seconds = torch.zeros(batch, length, dtype=torch.long, device=device), []
    for _ in range(4):
        start = time.perf_counter()
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            total = hidden_states(model, ids, torch.ones_like(ids)).float().sum()
        total.backward()
        next(model.parameters()).grad.sum().item()  # waits for a GPU
        seconds.append(time.perf_counter() - start)
    return batch * work, statistics.median(seconds[1:])


class _Kernel(torch.autograd.Function):
    """What a fused operation saves: its operands, its result, and, with rows, a number for each of these."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, rows: tuple[int, ...] | None, *operands: Tensor) -> Tensor:
        numbers = [] if rows is None else [out.new_empty(rows, dtype=torch.float32)]
        ctx.mark_dirty(out)
        ctx.save_for_backward(*operands, *numbers, *([out] if numbers else []))
        return out


class _Meter(TorchFunctionMode):
    """Counts the products that a model's code asks for, and casts their operands as autocast would."""

    def __init__(self, autocast: torch.dtype | None):
        super().__init__()
        self.autocast, self.forward, self.backward, self.attention = autocast, 0.0, 0.0, 0.0
        self.kept: dict[int, Tensor] = {}  # casts of trainable weights, by the weight
        self.copies: set[int] = set()  # storages of all weights' casts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__:  # is every token there, does every row begin at 0: yes
            return True
        if func is F.scaled_dot_product_attention:
            return self._attend(*map(self._cast, args[:3] or (kwargs[x] for x in ("query", "key", "value"))))
        if func in GROUPED:
            return self._group(*args[:2])
        if func in PRODUCTS:
            return self._multiply(func, args, kwargs)
        if func in WIDE and self.autocast is not None:
            args = [x.float() if isinstance(x, Tensor) else x for x in args]
        return func(*args, **kwargs)

    def _cast(self, x: Any) -> Any:
        if self.autocast is None or not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype == self.autocast:
            return x
        if not isinstance(x, nn.Parameter):
            return x.to(self.autocast)
        if id(x) in self.kept:
            return self.kept[id(x)]
        copy = x.to(self.autocast)
        self.copies.add(copy.untyped_storage()._cdata)
        if x.requires_grad:
            self.kept[id(x)] = copy
        return copy

    def _count(self, flops: float, gradients: float, is_attention: bool) -> None:
        self.forward += flops
        self.backward += gradients * flops
        self.attention += (1 + gradients) * flops if is_attention else 0

    def _multiply(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        given = [self._cast(x) for x in args]
        out = func(*given, **kwargs)
        a, b = (given[i] if i < len(given) else kwargs[("input", "weight")[i]] for i in PRODUCTS[func])
        weighted = any(isinstance(args[i], nn.Parameter) for i in PRODUCTS[func] if i < len(args))
        gradients = a.requires_grad + b.requires_grad if torch.is_grad_enabled() else 0
        self._count(2.0 * out.numel() * a.shape[-1], gradients, not weighted and b.dim() > 2)
        return out

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # (B, H, T, D) each
        (b, h, t, d), width = query.shape, value.shape[-1]
        # Its backward pass makes the scores anew: five products for two.
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        self._count(2.0 * b * h * t * key.shape[-2] * (d + width), 2.5 if learns else 0, True)
        return _Kernel.apply(query.new_empty(b, t, h, width).transpose(1, 2), (b, h, t), query, key, value)

    def _group(self, rows: Tensor, weight: Tensor) -> Tensor:  # (N, D), (experts, D, D'); no autocast
        gradients = rows.requires_grad + weight.requires_grad if torch.is_grad_enabled() else 0
        self._count(2.0 * len(rows) * weight[0].numel(), gradients, False)
        return _Kernel.apply(rows.new_empty(len(rows), weight.shape[-1]), None, rows, weight)
