"""What stands between hidden states and logits: weight, bias, LoRA, scale and softcap of a language model's head."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

GATHERED_ELEMENTS = 1 << 24  # of the gathered rows (c, K, D) that exist at a time: 64 MiB in fp32
SCALES = {  # configurations' names for a factor of the logits, and the power that it has
    "logit_scale": 1,  # Cohere
    "logits_scaling": -1,  # Granite, MiniCPM3
    "lm_head_multiplier": 1,  # Falcon-H1
    "output_multiplier": 1,  # Muse
    "logits_mup_width_multiplier": -1,  # Inkling
}
MULTIPLY_BY_LOGITS_SCALING = ("hyperclovax",)  # model types
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM


@dataclass(frozen=True)
class LinearHead:
    """logits = softcap * tanh(logit_scale * x / softcap), x = hidden @ weight.T + bias + LoRA; else no tanh.

    A weight or bias that FSDP2 has sharded (a DTensor) is gathered when a loss is computed, once a call; its gradient
    comes back in its placement, averaged over the ranks, as FSDP2 does with all others.

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        logit_scale: factor of the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: Gemma's `final_logit_softcapping`, or None.
        lora: None, or (A (r, D), B (V, r), scaling): x += scaling * (hidden @ A.T) @ B.T, without merging anything.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; a scale or softcap that is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    lora: tuple[Tensor, Tensor, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Tensor) or not self.weight.is_floating_point():
            kind = self.weight.dtype if isinstance(self.weight, Tensor) else type(self.weight).__name__
            raise TypeError(
                f"expected the head's weight as a floating-point tensor (V, D); got {kind}: dequantise it first"
            )
        if self.weight.dim() != 2:
            raise ValueError(f"expected the head's weight of shape (V, D); got {tuple(self.weight.shape)}")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(
                f"expected the head's bias of shape ({self.weight.shape[0]},), one for each row of its weight; "
                f"got {tuple(self.bias.shape)}"
            )
        if self.bias is not None and self.bias.device != self.weight.device:
            raise ValueError(f"expected the head's bias on {self.weight.device}, as its weight; got {self.bias.device}")
        if self.lora is not None:
            down, up, _ = self.lora
            if down.shape != (up.shape[1], self.weight.shape[1]) or up.shape[0] != self.weight.shape[0]:
                raise ValueError(
                    f"expected the head's LoRA of shapes (r, {self.weight.shape[1]}) and ({self.weight.shape[0]}, r); "
                    f"got {tuple(down.shape)} and {tuple(up.shape)}"
                )
        if not self.logit_scale > 0:
            raise ValueError(f"expected logit_scale > 0; got {self.logit_scale}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"expected softcap > 0, or None for no softcap; got {self.softcap}")

    @classmethod
    def of(cls, head: Any) -> LinearHead:
        """From a weight (V, D), an `nn.Linear`, a `LinearHead`, or PEFT's LoRA around an `nn.Linear`."""
        if isinstance(head, cls):
            return head
        if isinstance(head, Tensor):
            return cls(head)
        if _is_linear(head):
            return cls(head.weight, head.bias)
        if _is_linear(getattr(head, "base_layer", None)) and hasattr(head, "lora_A"):
            return cls(head.base_layer.weight, head.base_layer.bias, lora=_active_lora(head))
        raise TypeError(
            f"expected a head as a weight (V, D), nn.Linear or LinearHead; got {type(head).__name__}, which may do "
            "more than a matrix product: merge adapters or dequantise it, then pass LinearHead(weight, bias)"
        )

    @classmethod
    def from_model(cls, model: Any) -> LinearHead:
        """Read the head off a transformers causal LM (or a PEFT model around one), without importing either.

        Honours the scales and softcaps that configurations have (`SCALES`, `SOFTCAPS`), and a LoRA that is active on
        the head. What a model's code does without saying so in its configuration is not seen.

        Raises:
            ValueError: there is no output embedding.
            TypeError: it is adapted or quantised, so that a plain matrix product would silently leave something out.
        """
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        layer = base.get_output_embeddings()
        if layer is None:
            raise ValueError(f"expected a causal LM with an output embedding; {type(base).__name__} has none")
        head = cls.of(layer)
        config = base.config.get_text_config() if hasattr(base.config, "get_text_config") else base.config
        scale = 1.0
        for name, power in SCALES.items():
            if (value := getattr(config, name, None)) is not None:
                if not isinstance(value, int | float):
                    raise TypeError(
                        f"expected the configuration's {name} as a number; got {value!r}: pass a LinearHead"
                    )
                inverted = name == "logits_scaling" and config.model_type in MULTIPLY_BY_LOGITS_SCALING
                scale *= float(value) ** (-power if inverted else power)
        softcap = next((cap for name in SOFTCAPS if (cap := getattr(config, name, None)) is not None), None)
        return cls(head.weight, head.bias, scale, softcap, head.lora)

    def gathered(self) -> LinearHead:
        """The same head in plain tensors: itself, unless it is sharded."""
        tensors = (self.weight, self.bias, *(self.lora or ())[:2])
        if not any(isinstance(x, Tensor) and hasattr(x, "full_tensor") for x in tensors):
            return self
        return self._map(_gathered)

    def cast(self, dtype: torch.dtype) -> LinearHead:
        """The same head in another dtype; gradients flow through the cast."""
        return self._map(lambda x: x.to(dtype))

    def to(self, device: torch.device | str) -> LinearHead:
        """The same head on another device; gradients flow through the copy."""
        return self._map(lambda x: x.to(device))

    def detach(self) -> LinearHead:
        """The same head, cut from the graph."""
        return self._map(Tensor.detach)

    def _map(self, change: Callable[[Tensor], Tensor]) -> LinearHead:
        bias = None if self.bias is None else change(self.bias)
        lora = None if self.lora is None else (change(self.lora[0]), change(self.lora[1]), self.lora[2])
        return LinearHead(change(self.weight), bias, self.logit_scale, self.softcap, lora)

    def low_rank(self, hidden: Tensor, ignored: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """(scaling * hidden @ A.T, B): the LoRA as r more inner dimensions of the GEMM; (None, None) without.

        In hidden's dtype: PEFT keeps an adapter in fp32 beside a 16-bit model. Ignored rows (N,) may hold anything.
        """
        if self.lora is None:
            return None, None
        down, up, scaling = self.lora
        if ignored is not None:
            hidden = hidden.masked_fill(ignored.unsqueeze(1), 0)
        return scaling * (hidden @ down.to(hidden.dtype).t()), up

    def logits(self, hidden: Tensor, vocab_size: int | None = None) -> Tensor:
        """Whole logits (..., vocab_size) by the definition above."""
        head = self.gathered()
        x = hidden @ head.weight[:vocab_size].t()
        if head.bias is not None:
            x = x + head.bias[:vocab_size]
        lora_x, lora_b = head.low_rank(hidden)
        if lora_x is not None and lora_b is not None:
            x = x + lora_x @ lora_b[:vocab_size].to(hidden.dtype).t()
        return self._scaled(x)

    def logits_at(
        self,
        hidden: Tensor,  # (N, D)
        ids: Tensor,  # (N, K) int64, in [0, V)
    ) -> Tensor:
        """The logits (N, K) of a few tokens of each row, differentiable; fp32 or wider, also under autocast.

        Costs K dot products a row, where `logits` costs V. Ids of one row may repeat.
        """
        head = self.gathered()
        x = gathered_products(hidden, head.weight, ids)
        if head.bias is not None:
            x = x + head.bias[ids]
        lora_x, lora_b = head.low_rank(hidden)
        if lora_x is not None and lora_b is not None:
            x = x + gathered_products(lora_x, lora_b.to(hidden.dtype), ids)
        return self._scaled(x)

    def _scaled(self, x: Tensor) -> Tensor:
        x = x * self.logit_scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


def _is_linear(layer: Any) -> bool:
    """Whether it is an `nn.Linear` and no more. FSDP2 makes a class of its own for each module that it shards."""
    kind = type(layer)
    return kind is nn.Linear or (kind.__name__ == "FSDPLinear" and kind.__bases__[-1] is nn.Linear)


def _gathered(x: Tensor) -> Tensor:
    return _Gathered.apply(x) if hasattr(x, "full_tensor") else x


class _Gathered(torch.autograd.Function):
    """The whole of a DTensor. Backward averages the ranks' gradients and leaves each its part: what FSDP2 does, and
    right, too, where all ranks have computed the same one."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        ctx.mesh, ctx.placements = x.device_mesh, x.placements
        return x.full_tensor()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        from torch.distributed.tensor import DTensor, Partial

        mean = upstream[0] / ctx.mesh.size()
        parts = DTensor.from_local(mean, ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        return parts.redistribute(placements=ctx.placements)


def _active_lora(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """A, B and scaling of the adapter that PEFT's layer applies now; None if it is switched off or merged."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return None
    name = names[0]
    drops = layer.training and getattr(layer.lora_dropout[name], "p", 0.0) > 0
    plain = not (layer.use_dora.get(name) or layer.lora_bias.get(name))
    if len(names) > 1 or drops or not plain:
        raise TypeError(
            f"expected one active LoRA on the head, without dropout, DoRA or bias; got {', '.join(names)}: activate "
            "one, set its dropout to 0, or merge it"
        )
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def gathered_products(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ids: Tensor,  # (N, K) int64
) -> Tensor:
    """out[n, k] = hidden[n] . weight[ids[n, k]], (N, K), in fp32 (fp64 for fp64 operands), also under autocast.

    The gathered rows, (N, K, D), exist a chunk of tokens at a time, in forward and in backward.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _GatheredProducts.apply(hidden, weight, ids)


class _GatheredProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, ids)
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        out = hidden.new_empty(ids.shape, dtype=dtype)
        for rows in _chunks(ids, hidden.shape[1]):
            out[rows] = torch.linalg.vecdot(weight[ids[rows]].to(dtype), hidden[rows].to(dtype).unsqueeze(1))
        return out

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = upstream
        hidden, weight, ids = ctx.saved_tensors
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=gradient.dtype) if needs_weight else None
        for rows in _chunks(ids, hidden.shape[1]):
            g = gradient[rows].unsqueeze(2)  # (c, K, 1)
            if grad_hidden is not None:
                grad_hidden[rows] = (g * weight[ids[rows]]).sum(1).to(hidden.dtype)
            if grad_weight is not None:
                parts = g * hidden[rows].unsqueeze(1)  # (c, K, D)
                grad_weight.index_add_(0, ids[rows].flatten(), parts.flatten(0, 1).to(grad_weight.dtype))
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None


def _chunks(ids: Tensor, width: int) -> Iterator[slice]:
    n, k = ids.shape
    step = max(1, GATHERED_ELEMENTS // max(1, k * width))
    return (slice(start, start + step) for start in range(0, n, step))
