"""Which ids models share: tokenizers that agree, heads with as many rows, data of no other tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from okd.data import Row, Rows, column
from okd.ensemble import Ensemble, models_of
from okd.models import tokenizer_of, tokenizer_of_model, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.get_logger(__name__)


def check_tokenizers(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> int:
    """The number of ids, from 0 on, that count: `vocab_size`, or one more than the last that both tokenizers know.

    Raises ValueError unless these map the same tokens to the same ids. Beyond them added tokens may differ; with a
    `vocab_size`, all.
    """
    ours, theirs = (set(tokenizer.get_vocab().items()) for tokenizer in (student, teacher))
    shared = 1 + max((i for _, i in ours & theirs), default=0) if vocab_size is None else vocab_size
    added = {*student.get_added_vocab(), *teacher.get_added_vocab()}
    differing = {(t, i) for t, i in ours ^ theirs if i < shared or (vocab_size is None and t not in added)}
    if differing:
        example, _ = min(differing)
        found = [t.convert_tokens_to_ids(example) if example in t.get_vocab() else None for t in (student, teacher)]
        raise ValueError(
            f"expected student and teacher to share a tokenizer; {len({t for t, _ in differing}):,} tokens differ, "
            f"such as {example!r} (student id {found[0]}, teacher id {found[1]}): choose models of one family, "
            "teacher_tokenizer=auto to compare them where both tokenizers end at the same byte, or a vocab_size below "
            "which they agree"
        )
    return shared


def check_vocabularies(student: Any, teacher: Any, vocab_size: int | None) -> None:
    """Raise ValueError unless all heads have one number of rows, or `vocab_size` and more."""
    sizes = [vocabulary_of(student)]
    if isinstance(teacher, Ensemble):
        sizes += teacher.vocabularies()
    else:
        sizes += map(vocabulary_of, models_of(teacher))
    if vocab_size is None and len(set(sizes)) > 1:
        raise ValueError(
            f"expected heads of one vocabulary size; got student {sizes[0]} and teacher "
            f"{', '.join(map(str, sizes[1:]))}. If they share a tokenizer and are padded differently, pass "
            f"teacher_processing_class, or vocab_size=len(tokenizer), at most {min(sizes)}"
        )
    if vocab_size is not None and not 0 < vocab_size <= min(sizes):
        raise ValueError(f"expected vocab_size in [1, {min(sizes)}], as all heads have rows; got {vocab_size}")


def with_vocab_size(options: Any, student: Any, teacher: Any, *tokenizers: Any) -> Any:
    """The options, with the `shared_vocab_size` where the method has a teacher."""
    if teacher is None or not options.resolved.needs_teacher or options.teacher_tokenizer is not None:
        return options
    vocab_size = shared_vocab_size(options.vocab_size, student, teacher, *tokenizers)
    options = copy.copy(options)
    options.vocab_size = vocab_size
    return options


def shared_vocab_size(
    vocab_size: int | None, student: Any, teacher: Any, tokenizer: Any, teacher_tokenizers: Any = None
) -> int | None:
    """The ids that all heads have and all tokenizers share; None where no id is beyond them. A given one stays.

    teacher: as `prepare_teacher` takes it. teacher_tokenizers: one or several; None: those that lie beside the
        teachers on this machine. Heads of several sizes beside an unknown tokenizer are left to `prepare_teacher`.

    Raises ValueError for tokenizers that map tokens to other ids.
    """
    models = models_of(teacher)
    if teacher_tokenizers is None:
        found = [tokenizer_of_model(model) for model in models]
    else:
        found = [tokenizer_of(one) for one in models_of(teacher_tokenizers)]
    others = [other for other in found if other is not None]
    counts = [check_tokenizers(tokenizer, other, vocab_size) for other in others]
    if vocab_size is not None:
        return vocab_size
    sizes = [vocabulary_of(model) for model in (student, *models)]
    shared, own = min([*sizes, *counts]), tokenizer.get_vocab()
    padded = len(set(sizes)) > 1 and len(others) == len(found)
    if not padded and (shared == min(sizes) or all(other.get_vocab() == own for other in others)):
        return None
    logger.warning(f"vocab_size={shared}: the ids that all share, whose heads have {', '.join(map(str, sizes))} rows")
    return shared


def check_ids(student: Any, options: Any, *datasets: Any) -> None:
    """Raise ValueError for a row with a token that the heads do not have, or not in common."""
    limit = options.vocab_size or vocabulary_of(student)
    for rows, i, largest in _highest_ids(datasets, "highest", _highest):
        if largest >= limit:
            raise ValueError(
                f"expected token ids below {limit}, which the models share; got {largest} in row "
                f"{rows[i]['id']}: leave it out, or use the tokenizer of the models"
            )


def check_aligned(teacher: Any, *datasets: Any) -> None:
    """Raise ValueError for rows without a teacher's tokens of their own, or with one that its head does not have."""
    (model, *_) = models_of(teacher)
    limit = vocabulary_of(model)
    for rows, i, largest in _highest_ids(datasets, "teacher_highest", _teacher_highest):
        if largest is None:
            raise ValueError(
                f"expected rows with the teacher's tokens, because of teacher_tokenizer; got {rows[i]['id']} "
                "without: pass the examples, or encode(..., alignment=...)"
            )
        if largest >= limit:
            raise ValueError(
                f"expected the teacher's token ids below {limit}, the rows of its head; got {largest} in row "
                f"{rows[i]['id']}: correct teacher_tokenizer"
            )


def _highest_ids(
    datasets: Sequence[Any], name: str, of_row: Callable[[Row], int | None]
) -> Iterator[tuple[Sequence[Row], int, Any]]:
    """Of each row of each data set, also of those by name: the rows it is among, its index, and its highest id."""
    for data in datasets:
        for rows in data.values() if isinstance(data, Mapping) else [data or ()]:
            for i, largest in enumerate(column(rows, name) if isinstance(rows, Rows) else map(of_row, rows)):
                yield rows, i, largest


def _highest(row: Row) -> int:
    return max(*row["input_ids"], *row.get("teacher_prompt", ()), 0)


def _teacher_highest(row: Row) -> int | None:
    return max(row["teacher_input_ids"]) if "teacher_input_ids" in row else None
