"""The router loss of a student that is a mixture of experts: that of its own modelling file.

Without it, training lets a few experts take all tokens (Switch Transformer, arXiv 2101.03961, Eq. 4 to 6).

Shapes: n tokens of a forward pass, padding included; E experts.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from okd.data import Batch
from okd.layers import base_of
from okd.objectives import Loss, Totals
from okd_kernels import DistillationLoss

if TYPE_CHECKING:
    from okd.pair import StudentTeacher

ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]  # of `load_balancing_loss_func`


class Routers:
    """coefficient * E * sum_e (share of the tokens sent to e) * (mean probability of e), the layers' tokens together.

    Raises ValueError for a coefficient given for a model whose modelling file has no such loss.
    """

    def __init__(self, model: Any, coefficient: float | None = None):
        base = base_of(model)
        config = base.config.get_text_config()
        files = (sys.modules[cls.__module__] for cls in type(base).__mro__)  # a subclass may stand elsewhere
        function: Any = next((f for file in files if (f := getattr(file, "load_balancing_loss_func", None))), None)
        known = function is not None and list(inspect.signature(function).parameters) == ARGUMENTS
        if coefficient and not known:
            raise ValueError(
                "expected router_aux_loss_coef with a student whose modelling file has a load_balancing_loss_func; got "
                f"{coefficient} with {type(base).__name__}: leave it out"
            )
        own = getattr(config, "router_aux_loss_coef", None)
        self.coefficient = (own if coefficient is None else coefficient) or 0.0 if known else 0.0
        self.decoder, self.function = base.get_decoder, function
        self.top_k: Any = getattr(base, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None)

    def beside(self, loss: Loss) -> Loss:
        """The loss with the router loss added to the student's, by the micro-batch's share of the step's tokens."""

        def both(pair: StudentTeacher, batch: Batch, totals: Totals) -> DistillationLoss:
            with self._watched(batch["attention_mask"]) as seen:
                result = loss(pair, batch, totals)
            if not seen:  # no layer of it has a router
                return result
            balance = torch.stack(seen).mean().to(result.student.device)
            if not balance.requires_grad:
                raise ValueError(
                    "expected a router loss with a gradient; got none, as nothing trains before the routers, or "
                    "checkpoints are reentrant: pass gradient_checkpointing_kwargs={'use_reentrant': False}, or "
                    "router_aux_loss_coef=0"
                )
            share = Totals.of([batch]).tokens / totals.tokens
            n = len(next(iter(result.metrics.values())))
            metrics = result.metrics | {"router_loss": balance.detach().expand(n)}
            return result._replace(student=result.student + self.coefficient * share * balance, metrics=metrics)

        return both

    @contextmanager
    def _watched(self, mask: Tensor) -> Iterator[list[Tensor]]:
        """The unweighted losses of the decoder's forward passes with a graph inside, one each.

        mask: of a pass whose tokens it has, where the decoder gets none.
        """
        found, decoder = list[Tensor](), self.decoder()

        def ask(_: Any, args: Any, options: dict[str, Any]) -> Any:
            return args, {**options, "output_router_logits": True} if torch.is_grad_enabled() else options

        def take(_: Any, args: Any, options: dict[str, Any], output: Any) -> None:
            gates, given = getattr(output, "router_logits", None), options.get("attention_mask")
            if torch.is_grad_enabled() and gates:
                n = len(gates[0])
                at = mask if given is None else given[:, -(n // len(given)) :]  # without virtual tokens
                found.append(self.function(gates, gates[0].shape[-1], self.top_k, at if at.numel() == n else None))

        hooks = [
            decoder.register_forward_pre_hook(ask, with_kwargs=True),
            decoder.register_forward_hook(take, with_kwargs=True),
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()
