"""A few answers for the eye: whose tokens are the student's own, and how far from its teacher it is at each of them.

A row is `{"id": str, "input_ids": list[int], "labels": list[int]}`, as `okd.encoding.encode` makes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from okd.answers import end_tokens, padding_token, prompt_and_reference
from okd.data import IGNORE, Row
from okd.evaluate import STATISTICS, token_statistics
from okd.models import position_limit
from okd.teachers import as_it_was

SHOWN = 6  # whatever a run answers: each costs its teacher an answer
END = "■"  # stands for the token that ends an answer


def shown_rows(rows: Iterable[Row], count: int = SHOWN) -> list[Row]:
    """At most `count` of those that have a prompt and a reference, evenly spread."""
    asked = [row for row in rows for prompt, reference in [prompt_and_reference(row)] if len(prompt) > 1 and reference]
    count = min(count, len(asked))
    return [asked[i * len(asked) // count] for i in range(count)]


def token_divergences(
    student: Any,
    judge: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    answers: Sequence[Mapping[str, Any]],
    vocab_size: int | None = None,
    batch_size: int = 8,
) -> dict[str, list[tuple[str, float]]]:
    """By row: the text of each token of the student's answer, and KL(p‖q) in nats where the student chose it.

    p is the teacher as it was, q the student. answers: of `okd.answers.generate_answers`. Left out are rows that an
    alignment or a teacher's own prompt compares otherwise, and answers that the teacher cannot read: of ids or a length
    that it does not know.
    """
    responses = {answer["id"]: answer["response"] for answer in answers if answer.get("response")}
    with as_it_was(judge) as model:
        limit = position_limit(model)
    answered: list[Any] = []
    for row in rows:
        response, prompt = responses.get(row["id"], []), prompt_and_reference(row)[0]
        is_read = limit is None or len(prompt) + len(response) <= limit
        is_known = vocab_size is None or all(token < vocab_size for token in response)
        if response and is_read and is_known and not {"aligned", "teacher_input_ids"} & row.keys():
            labels = [IGNORE] * len(prompt) + response
            answered.append({"id": row["id"], "input_ids": prompt + response, "labels": labels})
    if not answered:
        return {}
    options: dict[str, Any] = {"pad_token_id": padding_token(tokenizer), "batch_size": batch_size, "progress": False}
    found = token_statistics(student, judge, answered, vocab_size=vocab_size, **options)
    ends, index = end_tokens(tokenizer, student), STATISTICS.index("forward_kl")
    return {
        row["id"]: list(zip(pieces(tokenizer, responses[row["id"]], ends), of_row[index].tolist(), strict=True))
        for row, of_row in zip(answered, found, strict=True)
    }


def pieces(tokenizer: Any, ids: Sequence[int], ends: set[int] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """The text that each token adds to those before it; that of a character goes to its last byte."""
    texts = tokenizer.batch_decode([list(ids[: i + 1]) for i in range(len(ids))])
    result, before = [], ""
    for token, text in zip(ids, texts, strict=True):
        whole = text.rstrip("\N{REPLACEMENT CHARACTER}")
        result.append(END if token in ends else whole[len(before) :])
        before = whole
    return result
