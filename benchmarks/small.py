"""Models and a tokenizer made of a training file and a seed: an experiment over epochs that two cores hold.

A byte-level BPE of the training text; a small Llama as teacher and a much smaller one as student, both pre-trained on
that text, prompts and completions, by the cross-entropy of every token; then the teacher tuned on the responses. What
is trained is kept as it was at the epoch of its best validation, on a part of the training file that nothing but this
ever reads.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from okd.data import Row
from okd.encoding import encode
from okd.examples import read_jsonl

PREFIX = "small:"  # of a model's name, WIDTHxLAYERS
OPTIONS: dict[str, Any] = {  # of `benchmarks.methods --preset small`, where they are not given
    "teacher": f"{PREFIX}96x4", "student": f"{PREFIX}48x2", "tune_teacher": 800, "threads": 1, "batch_size": 16,
    "max_length": 80, "learning_rate": 2e-3, "eval_examples": 300, "curve_examples": 300, "answers": 300,
    "answer_seeds": 5, "max_new_tokens": 24, "curve_points": 6,
}  # fmt: skip
VOCAB_SIZE, END = 2048, "<|end|>"
HEAD_SIZE = 16
EPOCHS, LEARNING_RATE = {"teacher": 5, "student": 3}, 3e-3  # of pre-training
VALIDATION = 0.1  # of the training file
KEEP_BEST = {
    "eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True, "save_total_limit": 1,
    "per_device_eval_batch_size": 32,
}  # fmt: skip


def split(examples: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Training and validation part, each in a seeded order."""
    shuffled = random.Random(0).sample(list(examples), len(examples))
    n = round(VALIDATION * len(examples))
    return shuffled[n:], shuffled[:n]


def make_tokenizer(examples: Sequence[Any], vocab_size: int) -> PreTrainedTokenizerFast:
    backend = ByteLevelBPETokenizer()
    texts = (text for x in examples for text in (x["prompt"], x["completion"]))
    backend.train_from_iterator(texts, vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend._tokenizer, eos_token=END, pad_token=END)


def make_model(name: str, tokenizer: Any, seed: int) -> Any:
    """A Llama with random weights from "small:WIDTHxLAYERS". Raises ValueError for another name."""
    found = re.fullmatch(rf"{PREFIX}(\d+)x(\d+)", name)
    if not found or int(found[1]) % HEAD_SIZE:
        raise ValueError(f"expected {PREFIX}WIDTHxLAYERS, the width a multiple of {HEAD_SIZE}; got {name!r}")
    width, layers = map(int, found.groups())
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // HEAD_SIZE,
        num_key_value_heads=width // HEAD_SIZE,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def windows(examples: Sequence[Any], tokenizer: Any, length: int) -> list[Row]:
    """All text of the examples in rows of at most so many tokens, each a label."""
    found: list[Row] = []
    for row in encode(examples, tokenizer, max_length=10**6).rows:
        for start in range(0, len(row["input_ids"]), length):
            ids = row["input_ids"][start : start + length]
            if len(ids) > 1:
                found.append({"id": f"{row['id']}@{start}", "input_ids": ids, "labels": ids})
    return found


def make(job: dict[str, Any], tune: Callable[..., None]) -> tuple[Any, Any, Any]:
    """Tokenizer, teacher and student of a job's settings. `tune(job, model, tokenizer, steps, rows, eval_rows,
    **options)` trains."""
    parts = split(read_jsonl(job["train_file"]))
    tokenizer = make_tokenizer(parts[0], VOCAB_SIZE)
    texts = [windows(part, tokenizer, job["max_length"]) for part in parts]
    models = {}
    for seed, side in enumerate(("teacher", "student")):
        models[side] = make_model(job[side], tokenizer, seed).to(job["device"])
        steps = EPOCHS[side] * math.ceil(len(texts[0]) / job["batch_size"])
        tune(job, models[side], tokenizer, steps, *texts, learning_rate=LEARNING_RATE, **KEEP_BEST)
    if job["tune_teacher"]:
        responses = [encode(part, tokenizer, max_length=job["max_length"]).rows for part in parts]
        rate = LEARNING_RATE / 4
        tune(job, models["teacher"], tokenizer, job["tune_teacher"], *responses, learning_rate=rate, **KEEP_BEST)
    return tokenizer, models["teacher"], models["student"]
