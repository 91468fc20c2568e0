"""Exposure bias: how much more does the student err after its own words than after its teacher's?

A student that learned on given prefixes meets its own when it answers, and errors there add up. The excess accumulated
error compares the two (Arora et al. 2022, arXiv 2204.01171; reported by MiniLLM and by OKD, arXiv 2409.12512).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd.answers import SAMPLED, end_tokens, generate_responses, padding_token, prompt_and_reference, seeded
from okd.data import IGNORE, Row
from okd.evaluate import STATISTICS, token_statistics
from okd.teachers import as_it_was
from okd_kernels import LinearHead


def answerable_prompts(rows: Sequence[Row], n: int | None = None) -> list[list[int]]:
    """Tokens of the rows' first n prompts, None: all. Raises ValueError without any."""
    asked = [prompt for prompt, reference in map(prompt_and_reference, rows) if len(prompt) > 1 and reference][:n]
    if not asked:
        raise ValueError("expected a row with a prompt, got none; pass rows that are not all plain text")
    return asked


def exposure_bias(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    prompts: int | None = None,
    max_new_tokens: int = 64,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    vocab_size: int | None = None,
    progress: bool = True,
) -> dict[str, float | None]:
    """`exaccerr_l` in percent, for each l of `lengths` (default: a quarter, a half and all of `max_new_tokens`):

        ExAccErr(l) = (R(l) - l e(l)) / (l e(l)) * 100
        R(l)   = sum_{t<=l} E_{y_<t ~ q} KL(p(. | y_<t) || q(. | y_<t))      prefixes that the student q samples
        l e(l) = the same sum with y_<t ~ p                                  prefixes that the teacher p samples

    0: the student is as good after its own words as after its teacher's. p is the *unadapted* teacher. Each model
    samples one response (T = 1) to each of the first `prompts` of `rows`, None: all; the expectation over the next
    token is the exact KL, no sample. A sequence that has ended adds nothing to either sum, as after its end p and q
    agree on what follows. So a sum depends on lengths too: `student_steps` and `teacher_steps` are the mean numbers of
    steps until the end, at most `max_new_tokens`. None where the teacher's prefixes find no error at all.

    Raises ValueError for rows without a prompt, for lengths outside 1 .. max_new_tokens, and if the two are one model.
    """
    lengths = sorted({max(1, max_new_tokens * k // 4) for k in (1, 2, 4)}) if lengths is None else lengths
    if not lengths or not 1 <= min(lengths) <= max(lengths) <= max_new_tokens:
        raise ValueError(f"expected lengths between 1 and max_new_tokens, {max_new_tokens}; got {list(lengths)}")
    asked = answerable_prompts(rows, prompts)
    heads = [len(LinearHead.from_model(model).weight) for model in (student, teacher)]
    shared = min(heads) if vocab_size is None else vocab_size
    options: dict[str, Any] = {
        "pad_token_id": padding_token(tokenizer),
        "batch_size": batch_size,
        "progress": progress,
    }

    sampled = {"ends": end_tokens(tokenizer, student, teacher), "max_new_tokens": max_new_tokens, **options, **SAMPLED}
    with seeded(seed, student):
        by_student = generate_responses(student, asked, suppress_tokens=_padding(shared, heads[0]), **sampled)
    with as_it_was(teacher) as base, seeded(seed, student, base):
        by_teacher = generate_responses(base, asked, suppress_tokens=_padding(shared, heads[1]), **sampled)
    own, given = (
        _errors(student, teacher, asked, written, max_new_tokens, vocab_size=shared, **options)
        for written in (by_student, by_teacher)
    )
    metrics: dict[str, float | None] = {
        "student_steps": sum(map(len, by_student)) / len(asked),
        "teacher_steps": sum(map(len, by_teacher)) / len(asked),
    }
    for length in lengths:
        expected = given[:length].sum().item()
        metrics[f"exaccerr_{length}"] = 100 * (own[:length].sum().item() / expected - 1) if expected else None
    return metrics


def _padding(shared: int, size: int) -> list[int] | None:
    """Ids that only one of the models has."""
    return list(range(shared, size)) or None


def _errors(
    student: Any, teacher: Any, asked: list[list[int]], written: list[list[int]], steps: int, **options: Any
) -> torch.Tensor:
    """(steps,) mean KL of each step after these prefixes."""
    total = torch.zeros(steps, dtype=torch.float64)
    sequences: list[Row] = [
        {"id": "", "input_ids": prompt + response, "labels": [IGNORE] * len(prompt) + response}
        for prompt, response in zip(asked, written, strict=True)
    ]
    for statistics in token_statistics(student, teacher, sequences, **options):
        total[: statistics.shape[1]] += statistics[STATISTICS.index("forward_kl")]
    return total / len(asked)
