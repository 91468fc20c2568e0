"""What stands between hidden states and logits: weight, bias, LoRA, scale and softcap of a language model's head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from okd_kernels.gather import gathered_products

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
        if hasattr(self.weight, "full_tensor"):
            raise TypeError(
                "expected the head's weight as a plain tensor; got a DTensor: compute the loss inside the forward of "
                "the FSDP root module, which gathers it, or pass weight.full_tensor(); for a head sharded by rows, see "
                "vocab_parallel_distillation_loss with weight.to_local()"
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
        if type(head) is nn.Linear:
            return cls(head.weight, head.bias)
        if type(getattr(head, "base_layer", None)) is nn.Linear and hasattr(head, "lora_A"):
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

    def cast(self, dtype: torch.dtype) -> LinearHead:
        """The same head in another dtype; gradients flow through the cast."""
        bias = None if self.bias is None else self.bias.to(dtype)
        lora = None if self.lora is None else (self.lora[0].to(dtype), self.lora[1].to(dtype), self.lora[2])
        return LinearHead(self.weight.to(dtype), bias, self.logit_scale, self.softcap, lora)

    def low_rank(self, hidden: Tensor, labels: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """(scaling * hidden @ A.T, B): the LoRA as r more inner dimensions of the GEMM; (None, None) without.

        In hidden's dtype: PEFT keeps an adapter in fp32 beside a 16-bit model. Rows with a negative label (N,) may hold
        anything.
        """
        if self.lora is None:
            return None, None
        down, up, scaling = self.lora
        if labels is not None:
            hidden = hidden.masked_fill((labels < 0).unsqueeze(1), 0)
        return scaling * (hidden @ down.to(hidden.dtype).t()), up.to(hidden.dtype)

    def logits(self, hidden: Tensor, vocab_size: int | None = None) -> Tensor:
        """Whole logits (..., vocab_size) by the definition above."""
        x = hidden @ self.weight[:vocab_size].t()
        if self.bias is not None:
            x = x + self.bias[:vocab_size]
        low, up = self.low_rank(hidden)
        if low is not None and up is not None:
            x = x + low @ up[:vocab_size].t()
        return self._scaled(x)

    def logits_at(
        self,
        hidden: Tensor,  # (N, D)
        ids: Tensor,  # (N, K) int64, in [0, V)
    ) -> Tensor:
        """The logits (N, K) of a few tokens of each row, differentiable; fp32 or wider, also under autocast.

        Costs K dot products a row, where `logits` costs V. Ids of one row may repeat.
        """
        x = gathered_products(hidden, self.weight, ids)
        if self.bias is not None:
            x = x + self.bias[ids]
        low, up = self.low_rank(hidden)
        if low is not None and up is not None:
            x = x + gathered_products(low, up, ids)
        return self._scaled(x)

    def _scaled(self, x: Tensor) -> Tensor:
        x = x * self.logit_scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)


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
