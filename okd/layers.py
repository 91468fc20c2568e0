"""A decoder's list of layers: keep some of them, or run a part of them.

A part is run by the decoder's own code and modules: a shallow copy of the decoder, made for one call, has stand-ins in
its list for the layers that are not to run. Nothing is written onto the model, and no weight exists twice.

Shapes: B rows of T tokens; D the hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# whether a decoder's layers return tuples
_returns_tuple: MutableMapping[nn.Module, bool] = WeakKeyDictionary()


def parse_layers(text: str, n_layers: int) -> list[int]:
    """Layer numbers from text such as "0-9,20-29", of a model with n_layers. Raises ValueError."""
    kept: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or not (last if dash else first).isdigit():
            raise ValueError(f'expected layers such as "0-9,20-29"; got {text!r}')
        kept += range(int(first), int(last or first) + 1)
    if not kept or kept != sorted(set(kept)) or kept[-1] >= n_layers:
        raise ValueError(f"expected increasing layers below {n_layers}, as the model has; got {text!r}")
    return kept


def layers_of(decoder: Any) -> str | None:
    """Name of its list of layers; None where that is not one list of modules."""
    n_layers = decoder.config.num_hidden_layers
    names = [n for n, m in decoder.named_children() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    return names[0] if len(names) == 1 else None


def keep_layers(model: PreTrainedModel, kept: list[int]) -> PreTrainedModel:
    """A copy of the model with these decoder layers only: the student of the demo.

    Raises ValueError where the decoder's layers are not one list of modules.
    """
    n_layers = model.config.get_text_config().num_hidden_layers
    name = layers_of(model.get_decoder())
    if name is None:
        raise ValueError(
            f"expected a decoder with one list of its {n_layers} layers, of which the student keeps some; got another "
            f"in {type(model).__name__}: pass a student, or leave the layers out to keep all"
        )
    student = copy.deepcopy(model)
    student.config = copy.deepcopy(model.config)
    config = student.config.get_text_config()
    for key, value in vars(config).items():
        if isinstance(value, list) and len(value) == n_layers:  # a property of each layer, such as `layer_types`
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)
    decoder = student.get_decoder()
    decoder.config = config
    old = getattr(decoder, name)
    layers = nn.ModuleList(old[i] for i in kept)
    setattr(decoder, name, layers)
    module: Any
    for i, layer in enumerate(layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # its slot in the KV cache
                module.layer_idx = i
            if hasattr(module, "config"):
                module.config = config
    return student


class _StandIn(nn.Module):
    """In a decoder's list in place of a layer, whose other attributes it has."""

    def __init__(self, layer: nn.Module, make: Callable[[Tensor], Tensor], returns_tuple: bool):
        super().__init__()
        self._layer, self._make, self._returns_tuple = (layer,), make, returns_tuple  # not registered

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_layer")[0], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = self._make(args[0] if args else kwargs["hidden_states"])
        return (made,) if self._returns_tuple else made


def _part(decoder: Any, made: Mapping[int, Callable[[Tensor], Tensor]]) -> Any:
    """The decoder with these layers' hidden states made otherwise."""
    name = layers_of(decoder)
    if name is None:
        raise ValueError(
            f"expected a decoder with one list of its {decoder.config.num_hidden_layers} layers, of which a part runs; "
            f"got another in {type(decoder).__name__}: leave teacher_cache out"
        )
    layers = list(getattr(decoder, name))
    if decoder not in _returns_tuple:
        _returns_tuple[decoder] = _finds_tuple(decoder, layers[0])
    part = copy.copy(decoder)
    part.__dict__["_modules"] = dict(decoder._modules)
    stand_ins = {i: _StandIn(layers[i], make, _returns_tuple[decoder]) for i, make in made.items()}
    part._modules[name] = nn.ModuleList(stand_ins.get(i, layer) for i, layer in enumerate(layers))
    return part


def _finds_tuple(decoder: Any, layer: nn.Module) -> bool:
    found: list[Any] = []
    handle = layer.register_forward_hook(lambda module, args, output: found.append(output))
    device = decoder.get_input_embeddings().weight.device
    try:
        with torch.no_grad():
            decoder(input_ids=torch.ones(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        handle.remove()
    return isinstance(found[0], tuple)


def _unchanged(x: Tensor) -> Tensor:
    return x


def states_entering(decoder: Any, layer: int, **inputs: Any) -> Tensor:
    """(B, T, D) hidden states that enter a layer, no higher one being run. Raises ValueError where layers are no list
    of modules, or do not run one after the other."""
    found: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        found.append(x)
        return x

    n_layers = decoder.config.num_hidden_layers
    _part(decoder, {i: keep if i == layer else _unchanged for i in range(layer, n_layers)})(**inputs)
    if len(found) != 1:
        raise ValueError(
            f"expected {type(decoder).__name__} to run each layer once; layer {layer} ran {len(found)} times: leave "
            "teacher_cache out"
        )
    return found[0]


def states_above(decoder: Any, layer: int, states: Tensor, **inputs: Any) -> Tensor:
    """(B, T, D) last hidden states, from those that enter a layer, no lower one being run. Raises as the above."""
    used: list[int] = []

    def enter(x: Tensor) -> Tensor:
        used.append(1)
        given = states.to(x.device, x.dtype).reshape(x.shape).detach()
        return given.requires_grad_(x.requires_grad)  # as embeddings have for the sake of reentrant checkpoints

    made = {i: enter if i == layer - 1 else _unchanged for i in range(layer)}
    hidden = _part(decoder, made)(**inputs).last_hidden_state
    if len(used) != 1:
        raise ValueError(
            f"expected {type(decoder).__name__} to run each layer once; layer {layer - 1} ran {len(used)} times: leave "
            "teacher_cache out"
        )
    return hidden


def base_of(model: Any) -> Any:
    """The causal LM: the model, or what a PEFT model is around."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(model: Any) -> Any:
    """Of a model, or of a PEFT model around one."""
    return base_of(model).get_decoder()


def first_trainable_layer(model: Any) -> int:
    """The lowest of the decoder's layers that a trainable weight has an influence on; their number where it is none.

    0 where one of them is below the layers, or where there is no list of layers.
    """
    decoder = decoder_of(model)
    name = layers_of(decoder)
    n_layers = decoder.config.num_hidden_layers
    training = {id(p) for p in model.parameters() if p.requires_grad}
    if name is None or (getattr(model, "active_peft_config", None) and model.active_peft_config.is_prompt_learning):
        return 0 if training else n_layers
    if any(id(p) in training for p in decoder.get_input_embeddings().parameters()):
        return 0
    for i, layer in enumerate(getattr(decoder, name)):
        if any(id(p) in training for p in layer.parameters()):
            return i
    return n_layers


def drop_below(decoder: Any, layer: int) -> None:
    """Leave no weights to the layers below one: only `states_above` runs from then on, which has to have run before."""
    for module in getattr(decoder, str(layers_of(decoder)))[:layer]:
        for p in module.parameters():
            p.data = p.data.new_empty(0)
