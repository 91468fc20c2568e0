"""Gradient error near convergence, by how logits are kept: `python -m benchmarks.numerics`.

The same bf16 operands for all: hidden states and heads whose logits differ by std(z - u). Error: ||g - g*|| / ||g*||, g
the gradient with respect to the student's hidden states, g* that of the fp64 reference.

    bf16 logits   what a bf16 lm_head returns, then fp32 softmax: the usual trainer
    fp32 logits   plain PyTorch with fp32 logits, the result in bf16: as good as bf16 operands allow
    torch, triton this library's backends (Triton in its interpreter where there is no GPU, if TRITON_INTERPRET=1)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import date
from pathlib import Path

import torch

from okd_kernels import distillation_loss, linear_distillation_loss

SPREADS = (1.0, 0.3, 0.1, 0.03)


def operands(v: int, n: int, spread: float) -> list[torch.Tensor]:
    """Student hidden and head, teacher hidden and head, in bf16: the teacher's logits are the student's plus noise."""
    d, extra = 64, 64
    hidden, weight = torch.randn(n, d), torch.randn(v, d) * 2 / d**0.5
    noise = torch.randn(n, extra), torch.randn(v, extra) * spread / extra**0.5
    teacher = torch.cat([hidden, noise[0]], 1), torch.cat([weight, noise[1]], 1)
    return [t.bfloat16() for t in (hidden, weight, *teacher)]


def gradient(tensors: list[torch.Tensor], divergence: str, way: str) -> torch.Tensor:
    """dX of the student, one of the ways of the module's docstring."""
    dtype = torch.float64 if way == "truth" else torch.bfloat16
    x, w, y, u = (t.detach().clone().to(dtype) for t in tensors)
    x.requires_grad_()
    if way == "bf16 logits":
        loss = distillation_loss(x @ w.T, y @ u.T, student=divergence, backend="reference")
    else:
        backend = {"truth": "reference", "fp32 logits": "reference"}.get(way, way)
        loss = linear_distillation_loss(x, w, y, u, student=divergence, backend=backend)
    loss.student.backward()
    assert x.grad is not None
    return x.grad.double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/numerics.json"))
    options = parser.parse_args()
    ways = ["bf16 logits", "fp32 logits", "torch"]
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        ways.append("triton")
    rows = []
    print("| divergence | std(z−u) | " + " | ".join(ways) + " |\n|---|---|" + "---|" * len(ways))
    for divergence in ("forward_kl", "reverse_kl", "jsd"):
        for spread in SPREADS:
            torch.manual_seed(0)
            tensors = operands(options.vocab, options.tokens, spread)
            truth = gradient(tensors, divergence, "truth")
            errors = {}
            for way in ways:
                difference = gradient(tensors, divergence, way) - truth
                errors[way] = (difference.norm() / truth.norm()).item()
            rows.append({"divergence": divergence, "spread": spread, **errors})
            print(f"| {divergence} | {spread} | " + " | ".join(f"{errors[w]:.2%}" for w in ways) + " |", flush=True)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    result = {"date": str(date.today()), "device": device, "versions": versions, **vars(options), "rows": rows}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1, default=str))


if __name__ == "__main__":
    main()
