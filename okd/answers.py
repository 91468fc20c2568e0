"""What a model answers: greedy or sampled responses in batches, and their score against references.

A row is `{"id": str, "input_ids": list[int], "labels": list[int]}`, as `okd.encoding.encode` makes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from okd.data import IGNORE, Row, start_of_response
from okd.models import device_of, evaluating, position_limit

Item = TypeVar("Item")

# Scripts that are written without spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # answers that follow the model's own q


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Row],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: bool = True,
    **generation_kwargs: Any,
) -> list[dict[str, Any]]:
    """`[{"id", "prompt", "reference", "answer", "response"}]`: the model's greedy answers to the prompts of `rows`, in
    their order, and as ids, with the one that ended it.

    The prompt is everything before the first response, the reference that response; none has special tokens. Rows of
    plain text, all response but for the first token, have no prompt and are left out. An answer ends at the tokenizer's
    or the model's end-of-sequence token, or after `max_new_tokens`. `generation_kwargs` go to `model.generate`.
    """

    def text(ids: list[int]) -> str:
        return tokenizer.batch_decode([ids], skip_special_tokens=True)[0]

    asked: list[tuple[list[int], dict[str, Any]]] = []
    for row in rows:
        prompt, reference = prompt_and_reference(row)
        if len(prompt) > 1 and reference:
            asked.append((prompt, {"id": row["id"], "prompt": text(prompt), "reference": text(reference)}))
    ends = end_tokens(tokenizer, model)
    responses = generate_responses(
        model,
        [prompt for prompt, _ in asked],
        ends=ends,
        pad_token_id=padding_token(tokenizer),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        progress=progress,
        **generation_kwargs,
    )
    for (_, answer), response in zip(asked, responses, strict=True):
        answer["answer"] = text(response[:-1] if response[-1:] and response[-1] in ends else response)
        answer["response"] = response
    return [answer for _, answer in asked]


def end_tokens(tokenizer: PreTrainedTokenizerBase, *models: Any) -> set[int]:
    """The ids that end a response: the tokenizer's, and the models' own lists, which may be longer in chat models."""
    ends = {tokenizer.eos_token_id}
    for model in models:
        own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        ends |= set(own if isinstance(own, list) else [own])
    return ends - {None}


def generate_responses(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    *,
    ends: set[int],
    pad_token_id: int,
    max_new_tokens: int,
    batch_size: int,
    progress: bool = True,
    **generation_kwargs: Any,
) -> list[list[int]]:
    """The model's greedy response to each prompt, in their order, with the token out of `ends` that ended it.

    A response ends where the model has no more positions. Raises ValueError for a prompt that leaves none.
    """
    longest, limit = max(map(len, prompts), default=0), position_limit(model)
    if limit is not None and longest >= limit:
        raise ValueError(
            f"expected prompts shorter than the model's {limit} positions; got one of {longest} tokens: shorten it"
        )
    # greedy whatever generation_config.json says: Qwen's, say, samples under a repetition penalty
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
    options |= {"pad_token_id": pad_token_id, "eos_token_id": sorted(ends) or None, **generation_kwargs}
    responses: list[list[int]] = [[] for _ in prompts]
    with evaluating(model):
        for batch in batches(list(enumerate(prompts)), lambda item: len(item[1]), batch_size, "answers", progress):
            width = len(batch[0][1])  # the longest comes first
            # left-padded by hand, as tokenizer.padding_side is the caller's
            padding = [width - len(prompt) for _, prompt in batch]
            input_ids = [[pad_token_id] * n + prompt for n, (_, prompt) in zip(padding, batch, strict=True)]
            attention_mask = [[0] * n + [1] * (width - n) for n in padding]
            output = model.generate(  # type: ignore[operator]  # of GenerationMixin, not of PreTrainedModel
                input_ids=torch.tensor(input_ids, device=device_of(model)),
                attention_mask=torch.tensor(attention_mask, device=device_of(model)),
                # not max_new_tokens, beside which transformers warns of a max_length in generation_config.json
                max_length=width + max_new_tokens if limit is None else min(width + max_new_tokens, limit),
                max_new_tokens=None,
                **options,
            )
            for (index, _), tokens in zip(batch, output[:, width:].tolist(), strict=True):
                end = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
                responses[index] = tokens[: end + 1]
    return responses


def rouge_l(answers: Sequence[dict[str, Any]]) -> float:
    """100 * mean F1 of the longest common subsequence of words of "answer" and "reference" (Lin 2004).

    Computed by `rouge_score`, whose words are stems of a-z and 0-9. Where most letters of a reference are others, its
    words and its answer's are those of any script, and characters of scripts that have no spaces.
    """
    if not answers:
        raise ValueError("expected at least one answer, got none; generate for rows that have a prompt")
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("expected the package rouge_score, got none; pip install rouge-score") from error
    scorers = RougeScorer(["rougeL"], use_stemmer=True), RougeScorer(["rougeL"], tokenizer=_AnyScript())
    scores = [
        scorers[not _is_latin(answer["reference"])].score(answer["reference"], answer["answer"])["rougeL"].fmeasure
        for answer in answers
    ]
    return 100 * sum(scores) / len(scores)


def _is_latin(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return 2 * sum(c.isascii() for c in letters) >= len(letters)


class _AnyScript:
    """Words for `rouge_score`: runs of letters and digits; each character of its own in Chinese, Japanese, Thai, ..."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(rf"[{UNSPACED}]|(?:(?![{UNSPACED}])[^\W_])+", text.lower())


@contextmanager
def seeded(seed: int, *models: PreTrainedModel) -> Iterator[None]:
    """The random numbers of `seed`; afterwards the caller's go on as if nothing had been drawn."""
    with torch.random.fork_rng({device for device in map(device_of, models) if device.type == "cuda"}):
        torch.manual_seed(seed)
        yield


def bar(items: range, description: str, is_shown: bool) -> Iterable[int]:
    """These with a progress bar, which TQDM_DISABLE hides, too."""
    silent: dict[str, Any] = {} if is_shown else {"disable": True}
    return tqdm(items, description, leave=False, **silent)


def batches(
    items: Sequence[Item], length: Callable[[Item], int], batch_size: int, description: str, progress: bool
) -> Iterator[list[Item]]:
    """Batches of like lengths, to waste little padding; the longest first, to run out of memory at once or never."""
    if batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}; 8 is the default")
    ordered = sorted(items, key=length, reverse=True)
    for start in bar(range(0, len(ordered), batch_size), description, progress):
        yield ordered[start : start + batch_size]


def prompt_and_reference(row: Row) -> tuple[list[int], list[int]]:
    """The ids before the first response, and the ids of that response."""
    ids, labels = row["input_ids"], row["labels"]
    start = start_of_response(row)
    end = next((i for i in range(start, len(ids)) if labels[i] == IGNORE), len(ids))
    return ids[:start], ids[start:end]


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token, or else any: the attention mask hides it."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
