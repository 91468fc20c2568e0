"""Real operands of the loss: what SmolLM2 and its student make of a file's responses (`benchmarks.loss --rows FILE`).

Random rows have gradients in all columns alike; those of language models have not. The student is SmolLM2 without its
layers 10-19, its head SmolLM2's. A teacher of another width is SmolLM2 turned into more dimensions by an orthonormal
matrix: the same logits from wider states, for GEMMs of the width that is asked for.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from okd.encoding import encode
from okd.examples import read_jsonl
from okd.layers import keep_layers, parse_layers
from okd.models import SMOLLM2, load_model, load_tokenizer

STUDENT_LAYERS = "0-9,20-29"
MAX_LENGTH = 256


def make(file: Path, tokens: int, teacher_size: int, path: Path) -> None:
    """Write hidden states and heads of both, and labels, of so many response tokens of the file's first examples."""
    tokenizer, teacher = load_tokenizer(SMOLLM2), load_model(SMOLLM2).eval()
    student = keep_layers(teacher, parse_layers(STUDENT_LAYERS, teacher.config.num_hidden_layers)).eval()
    found: list[list[torch.Tensor]] = [[], [], []]
    for row in encode(read_jsonl(file), tokenizer, max_length=MAX_LENGTH).rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        counted = labels >= 0
        with torch.no_grad():
            states = [m.get_decoder()(ids).last_hidden_state[0, :-1][counted] for m in (student, teacher)]
        for part, x in zip(found, (*states, labels[counted]), strict=True):
            part.append(x)
        if sum(map(len, found[2])) >= tokens:
            break
    hidden, teacher_hidden, labels = (torch.cat(x)[:tokens] for x in found)
    if len(labels) < tokens:
        raise ValueError(f"expected {tokens} response tokens in {file}; got {len(labels)}: pass fewer --tokens")
    head = teacher.get_output_embeddings().weight.detach()
    generator = torch.Generator().manual_seed(0)
    wide = torch.linalg.qr(torch.randn(teacher_size, head.shape[1], generator=generator)).Q.t()
    tensors = [hidden, head.clone(), teacher_hidden @ wide, head @ wide, labels]
    save_file({str(i): x.contiguous() for i, x in enumerate(tensors)}, path)
