"""What stands between hidden states and logits: weight, bias, scale and softcap of a language model's head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LinearHead:
    """logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap); without softcap the tanh is absent.

    Attributes:
        weight: (V, D).
        bias: (V,) or None.
        logit_scale: factor of the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        softcap: Gemma's `final_logit_softcapping`, or None.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; a scale or softcap that is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

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
        if not self.logit_scale > 0:
            raise ValueError(f"expected logit_scale > 0; got {self.logit_scale}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"expected softcap > 0, or None for no softcap; got {self.softcap}")

    @classmethod
    def of(cls, head: Tensor | nn.Linear | LinearHead) -> LinearHead:
        """From a weight (V, D), an `nn.Linear`, or a `LinearHead`."""
        if isinstance(head, cls):
            return head
        if isinstance(head, Tensor):
            return cls(head)
        if type(head) is nn.Linear:
            return cls(head.weight, head.bias)
        raise TypeError(
            f"expected a head as a weight (V, D), nn.Linear or LinearHead; got {type(head).__name__}, which may do "
            "more than a matrix product: merge adapters or dequantise it, then pass LinearHead(weight, bias)"
        )

    @classmethod
    def from_model(cls, model: Any) -> LinearHead:
        """Read the head off a transformers causal LM (or a PEFT model around one), without importing either.

        Honours `final_logit_softcapping` (Gemma), `logit_scale` (Cohere), `logits_scaling` (Granite) and
        `lm_head_multiplier` (Falcon-H1).

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
        for name, factor in (("logit_scale", 1), ("logits_scaling", -1), ("lm_head_multiplier", 1)):
            value = getattr(config, name, None)
            if value is not None:
                scale *= float(value) ** factor
        return cls(head.weight, head.bias, scale, getattr(config, "final_logit_softcapping", None))

    def cast(self, dtype: torch.dtype) -> LinearHead:
        """The same head in another dtype; gradients flow through the cast."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return LinearHead(self.weight.to(dtype), bias, self.logit_scale, self.softcap)

    def logits(self, hidden: Tensor, vocab_size: int | None = None) -> Tensor:
        """Whole logits (..., vocab_size) by the definition above."""
        x = hidden @ self.weight[:vocab_size].t()
        if self.bias is not None:
            x = x + self.bias[:vocab_size]
        x = x * self.logit_scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)
