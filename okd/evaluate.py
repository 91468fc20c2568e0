"""How close is the student to its teacher, and how good are its answers?

A falling OKD training loss says little, because its target moves with the student. So everything here is measured
against the teacher as it was before training, its online module switched off, over all response tokens of given rows.

A row is `{"id": str, "input_ids": list[int], "labels": list[int]}`, as `okd.data.encode` makes them.
Shapes: B rows padded to T tokens, N of which come before a response token; D the hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice, takewhile
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd.data import IGNORE, Collator
from okd.models import hidden_states
from okd.teachers import base_teacher
from okd_kernels import LinearHead, linear_distillation_loss

Row = dict[str, Any]
Item = TypeVar("Item")

STATISTICS = ("student_nll", "teacher_nll", "forward_kl", "reverse_kl", "top1_agreement")  # of the loss, per token


def evaluate(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch_size: int = 8,
    generate: int | None = None,
    max_new_tokens: int = 64,
    progress: bool = True,
) -> tuple[dict[str, float | None], list[dict[str, str]]]:
    """(metrics, answers): `divergence_metrics` of all `rows`, and ROUGE-L of answers to the first `generate` of them.

    `generate=None` answers every row, 0 none. It adds `rouge_l` (0 to 100; None when nothing was answered) to the
    metrics, and two counts, `rows` and `answers`. Raises ValueError where `divergence_metrics` does.
    """
    if generate is not None and generate < 0:
        raise ValueError(f"expected generate to be a number of rows >= 0, got {generate}; pass None to answer all rows")
    pad_token_id = _pad_token_id(tokenizer)
    divergences = divergence_metrics(
        student, teacher, rows, pad_token_id=pad_token_id, batch_size=batch_size, progress=progress
    )
    asked = islice(rows, generate)
    answers = generate_answers(
        student, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size, progress=progress
    )
    score = rouge_l(answers) if answers else None
    return {**divergences, "rouge_l": score, "rows": len(rows), "answers": len(answers)}, answers


def divergence_metrics(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    rows: Iterable[Row],
    *,
    pad_token_id: int,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, float]:
    """Means over all response tokens y of `rows`, with p the *unadapted* teacher and q the student.

    `forward_kl` KL(p‖q) and `reverse_kl` KL(q‖p) in nats; `perplexity` exp(mean of -log q(y)) and `teacher_perplexity`;
    `top1_agreement`, the share of tokens with argmax p = argmax q; `tokens`, their number. With `teacher=None` only
    `perplexity` and `tokens`. If one head is padded further than the other, over the ids they share. Sums are float64:
    the batch size changes nothing beyond the models' own rounding.

    Raises ValueError for rows without a response token or with an id outside a model's vocabulary, and if student and
    teacher are one model.
    """
    if teacher is student:
        raise ValueError(
            "expected two models, got one as student and teacher; load the teacher apart, as its adapter is off here "
            "while the student's is on"
        )
    rows = [row for row in rows if any(label != IGNORE for label in row["labels"][1:])]  # none predicts a first token
    if not rows:
        raise ValueError("expected a row with a response token, got none; pass rows whose labels are not all -100")
    collate = Collator(pad_token_id)
    totals, tokens = torch.zeros(len(STATISTICS), dtype=torch.float64), 0
    with _evaluating(student, teacher), nullcontext() if teacher is None else base_teacher(teacher):
        student_head = _head(student, "student", rows)
        # without a teacher the student stands in for it, so that its perplexity takes one forward
        teacher_head = student_head if teacher is None else _head(teacher, "teacher", rows)
        vocab_size = min(len(student_head.weight), len(teacher_head.weight))
        for batch_rows in _batches(rows, lambda row: len(row["input_ids"]), batch_size, "divergence", progress):
            batch = collate(batch_rows)
            student_hidden = _response_hidden(student, batch)
            teacher_hidden = student_hidden if teacher is None else _response_hidden(teacher, batch)
            targets = batch["targets"].to(student_hidden.device)
            loss = linear_distillation_loss(
                student_hidden, student_head, teacher_hidden, teacher_head, targets, vocab_size=vocab_size
            )
            # summed on the CPU: one transfer a batch, and not every accelerator has float64
            totals += torch.stack([loss.metrics[name] for name in STATISTICS]).cpu().double().sum(dim=1)
            tokens += len(targets)

    mean = dict(zip(STATISTICS, (totals / tokens).tolist(), strict=True))
    metrics = {"perplexity": math.exp(mean.pop("student_nll")), "tokens": tokens}
    if teacher is not None:
        metrics |= {"teacher_perplexity": math.exp(mean.pop("teacher_nll")), **mean}
    return metrics


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: bool = True,
    **generation_kwargs: Any,
) -> list[dict[str, str]]:
    """`[{"id", "prompt", "reference", "answer"}]`: the model's greedy answers to the prompts of `rows`, in their order.

    The prompt is everything before the first response, the reference that response; none has special tokens. Rows of
    plain text, all response but for the first token, have no prompt and are left out. An answer ends at the tokenizer's
    or the model's end-of-sequence token, or after `max_new_tokens`. `generation_kwargs` go to `model.generate`.
    """

    def text(ids: list[int]) -> str:
        return tokenizer.batch_decode([ids], skip_special_tokens=True)[0]

    asked: list[tuple[list[int], dict[str, str]]] = []
    for row in rows:
        prompt, reference = _prompt_and_reference(row)
        if len(prompt) > 1 and reference:
            asked.append((prompt, {"id": row["id"], "prompt": text(prompt), "reference": text(reference)}))

    pad_token_id = _pad_token_id(tokenizer)
    # a chat model's own list of ends may be longer than the tokenizer's
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    # greedy whatever generation_config.json says: Qwen's, say, samples under a repetition penalty
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
    options |= {"pad_token_id": pad_token_id, "eos_token_id": sorted(ends) or None, **generation_kwargs}
    with _evaluating(model):
        for batch in _batches(asked, lambda item: len(item[0]), batch_size, "answers", progress):
            width = len(batch[0][0])  # the longest comes first
            # left-padded by hand, as tokenizer.padding_side is the caller's
            padding = [width - len(prompt) for prompt, _ in batch]
            input_ids = [[pad_token_id] * n + prompt for n, (prompt, _) in zip(padding, batch, strict=True)]
            attention_mask = [[0] * n + [1] * (width - n) for n in padding]
            output = model.generate(  # type: ignore[operator]  # of GenerationMixin, not of PreTrainedModel
                input_ids=torch.tensor(input_ids, device=model.device),
                attention_mask=torch.tensor(attention_mask, device=model.device),
                # not max_new_tokens, beside which transformers warns of a max_length in generation_config.json
                max_length=width + max_new_tokens,
                max_new_tokens=None,
                **options,
            )
            for (_, sample), tokens in zip(batch, output[:, width:].tolist(), strict=True):
                sample["answer"] = text(list(takewhile(lambda token: token not in ends, tokens)))
    return [sample for _, sample in asked]


def rouge_l(answers: Sequence[dict[str, str]]) -> float:
    """100 * mean F1 of the longest common subsequence of stemmed words of "answer" and "reference" (Lin 2004).

    Computed by `rouge_score`, whose words are of a-z and 0-9: text in other scripts scores 0.
    """
    if not answers:
        raise ValueError("expected at least one answer, got none; generate for rows that have a prompt")
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("expected the package rouge_score, got none; pip install rouge-score") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [scorer.score(answer["reference"], answer["answer"])["rougeL"].fmeasure for answer in answers]
    return 100 * sum(scores) / len(scores)


@contextmanager
def _evaluating(*models: PreTrainedModel | None) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every `training` and `requires_grad` flag is as it was.

    Flag by flag, because a frozen part may be in another mode than its parent, and because leaving PEFT's
    `disable_adapter` makes frozen adapters trainable. Not `inference_mode`: modules may cache tensors made inside.
    """
    modules = [(module, module.training) for model in models if model is not None for module in model.modules()]
    parameters = [(p, p.requires_grad) for model in models if model is not None for p in model.parameters()]
    try:
        for module, _ in modules:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modules:
            module.training = training
        for parameter, requires_grad in parameters:
            parameter.requires_grad_(requires_grad)


def _head(model: PreTrainedModel, name: str, rows: Iterable[Row]) -> LinearHead:
    """The model's head. Raises ValueError if an id in `rows` lies outside its vocabulary, which crashes a GPU."""
    head, largest = LinearHead.from_model(model), max(max(row["input_ids"]) for row in rows)
    if largest >= len(head.weight):
        raise ValueError(
            f"expected token ids below {len(head.weight)}, the {name}'s vocabulary size, got {largest}; use the "
            "model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))"
        )
    return head


def _response_hidden(model: PreTrainedModel, batch: dict[str, Any]) -> torch.Tensor:
    """(N, D) hidden states that predict response tokens."""
    hidden = hidden_states(model, batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device))
    return hidden.flatten(0, 1)[batch["positions"].to(hidden.device)]


def _batches(
    items: Sequence[Item], length: Callable[[Item], int], batch_size: int, description: str, progress: bool
) -> Iterator[list[Item]]:
    """Batches of like lengths, to waste little padding; the longest first, to run out of memory at once or never."""
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}; 8 is the default")
    ordered = sorted(items, key=length, reverse=True)
    for start in tqdm(range(0, len(ordered), batch_size), description, leave=False, disable=not progress):
        yield ordered[start : start + batch_size]


def _prompt_and_reference(row: Row) -> tuple[list[int], list[int]]:
    """The ids before the first response, and the ids of that response."""
    ids, labels = row["input_ids"], row["labels"]
    start = next((i for i, label in enumerate(labels) if label != IGNORE), len(ids))
    end = next((i for i in range(start, len(ids)) if labels[i] == IGNORE), len(ids))
    return ids[:start], ids[start:end]


def _pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token, or else any: the attention mask hides it."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
