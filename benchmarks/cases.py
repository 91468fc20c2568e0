"""What the benchmarks of the loss compare: shapes, operands, and candidates. Read by `loss`, `sharded` and `tune`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

import okd_kernels
from benchmarks import checkout, peers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARDED = "sharded"  # forward KL over a vocabulary that two processes share: `benchmarks.sharded`
KINDS = (*peers.DIVERGENCES, SHARDED)


@dataclass(frozen=True)
class Case:
    """The shapes of one comparison: V, D_s, D_t, N, and what is asked of them."""

    vocab: int
    student: int
    teacher: int
    tokens: int
    dtype: str = "fp32"
    device: str = "cpu"
    divergence: str = "forward_kl"
    masked: int = 0
    rows: str = ""  # file of `benchmarks.rows`; "": random ones

    def operands(self) -> list[Tensor]:
        """The five tensors that a loss takes."""
        if self.rows:
            x, w, y, u, labels = (load_file(self.rows, self.device)[str(i)] for i in range(5))
            x, w, y, u = (t.to(DTYPES[self.dtype]) for t in (x, w, y, u))
            return [x[: self.tokens], w, y[: self.tokens], u, labels[: self.tokens]]
        shapes = (self.vocab, self.student, self.teacher, self.tokens)
        found = peers.operands(*shapes, dtype=DTYPES[self.dtype], device=self.device, masked=self.masked)
        return peers.with_sparse_targets(found) if self.divergence == "sparse" else found


PRESETS = {
    "tiny": Case(8192, 64, 128, 256),
    "smollm2-cpu": Case(49152, 576, 1536, 1024),  # the 135M student; a teacher between 360M (960) and 1.7B (2048)
    "smollm2-sparse": Case(49152, 576, 1536, 512),
    "gpt2-base<-xl": Case(50257, 768, 1600, 8192),
    "llama-1b<-8b": Case(128256, 2048, 4096, 8192),
    "qwen2.5-0.5b<-7b": Case(151936, 896, 3584, 8192),  # the heads' rows, padding included
    "qwen2.5-0.5b<-7b-151665": Case(151665, 896, 3584, 8192),  # len(tokenizer), which is odd
    "gemma-1b<-4b": Case(262144, 1152, 2560, 8192),
}


class Candidate(NamedTuple):
    """Something to measure: a function of `benchmarks.peers`, and how it is called."""

    name: str
    function: str
    workspace_bytes: int | None = None  # ours only
    frozen_head: bool = False
    directory: str = ""  # of the checkout whose library is taken for ours; "": this one
    columns: str | None = None  # ours only: `backward_columns`

    @property
    def is_ours(self) -> bool:
        return self.function == "ours"

    @property
    def library(self) -> ModuleType:
        return checkout.load(self.directory) if self.directory else okd_kernels

    def loss(self, labels: Tensor) -> Callable[..., Tensor]:
        function = getattr(peers, self.function)
        if not self.is_ours:
            return function
        counted = labels != peers.IGNORE
        kept = counted.nonzero().squeeze(1) if labels.is_cuda and not counted.all() else None
        options = {} if self.columns is None else {"backward_columns": self.columns}
        return partial(function, workspace_bytes=self.workspace_bytes, kept=kept, library=self.library, **options)

    def leaves(self, tensors: list[Tensor], case: Case) -> list[Tensor]:
        """The operands, sharing their storage, with gradients where this candidate makes them."""
        needs = (True, not self.frozen_head, case.divergence in peers.ONLINE, False, False)
        return [x.detach().requires_grad_(need) for x, need in zip(tensors, needs, strict=True)]

    def floor_parts(self, case: Case) -> list[str]:
        """The GEMMs that it cannot do without."""
        return [
            "student logits",
            *["teacher logits"] * (case.divergence != "sparse"),
            "student dX",
            *["student dW"] * (not self.frozen_head),
            *["teacher dX"] * (case.divergence in peers.ONLINE),
        ]


def step(loss: Callable[..., Tensor], tensors: list[Tensor], divergence: str) -> list[Tensor | None]:
    """Forward and backward; the gradients of the first three operands, taken off them so that none stays in memory."""
    loss(*tensors, divergence).backward()
    gradients = [x.grad for x in tensors[:3]]
    for x in tensors:
        x.grad = None
    return gradients
