"""A teacher with a tokenizer of its own: where both models have read the same text, and what both can say next.

A response is one string of bytes, which each tokenizer cuts into tokens of its own. Where tokens of both end at the
same byte, and at its start, student and teacher have read the same text, and predict what comes next: there their
distributions are compared, as outcomes (`okd_kernels.Outcomes`): texts with which both tokenizers begin what comes, the
ends of a response, and one bucket of all else. What lies before the response each reads in its own words: bos, chat
template, roles.

Tokens of the same bytes alone would leave 15 % of the places in GSM8K's answers to the bucket, with SmolLM2's tokenizer
as the student's and DeepSeek's as the teacher's: digits in groups of three, which the student writes one by one. It
would learn to say there what it has and the teacher has not.

Others compare sorted probabilities whatever their tokens (ULD, arXiv 2402.12030; with text alignment in TRL's GOLD),
project hidden states into the other model's space (DSKD, 2406.17328), or compare likelihoods of the text between
aligned positions (ALM, 2503.20083). What is not seen here: that after a token a model knows that the text is cut there,
and that the next text may join a token to a longer one of the other model.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from okd import sampling
from okd.answers import end_tokens
from okd.chat import IGNORE, Template
from okd.data import Row
from okd.ensemble import models_of
from okd.examples import Tokens, encode_one, teacher_prompt_of, template_of
from okd.models import load_tokenizer, tokenizer_of, tokenizer_of_model, vocabulary_of
from okd_kernels import Outcomes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO = "auto"


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """The text that each id stands for; of a special token its name. Of ids with one text the usual one comes last.

    Raises ValueError without a fast tokenizer.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"expected fast tokenizers to align, whose tokens say their bytes; got {type(tokenizer).__name__}: load "
            "one with AutoTokenizer.from_pretrained"
        )
    backend: Any = tokenizer.backend_tokenizer
    pipeline = json.loads(backend.to_str())
    kinds = json.dumps([pipeline["pre_tokenizer"], pipeline["decoder"]])
    alphabet = {letter: byte for byte, letter in bytes_to_unicode().items()} if '"ByteLevel"' in kinds else None
    added, found = set(tokenizer.added_tokens_decoder), {}  # a property that builds a dictionary
    for token, i in sorted(tokenizer.get_vocab().items(), key=lambda item: (not _is_byte(item[0]), -item[1])):
        if i in added:
            found[i] = token.encode(errors="replace")
        elif alphabet is not None and all(letter in alphabet for letter in token):
            found[i] = bytes(alphabet[letter] for letter in token)
        elif alphabet is None and _is_byte(token):
            found[i] = bytes([int(token[3:5], 16)])
        else:
            found[i] = (token if alphabet is not None else token.replace("\u2581", " ")).encode(errors="replace")
    return found


def _is_byte(token: str) -> bool:
    """<0x0A>, as SentencePiece falls back to."""
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def same_text(ours: Sequence[bytes], theirs: Sequence[bytes]) -> list[tuple[int, int]]:
    """(i, j) where the first i tokens of the one and the first j of the other are the same text.

    Space around it may differ: a template strips it, a tokenizer puts one first. Then what comes before the first other
    character is not the same text.
    """
    texts = [b"".join(tokens) for tokens in (ours, theirs)]
    leads = [len(text) - len(text.lstrip()) for text in texts]
    limit = _common(*(text[lead:] for text, lead in zip(texts, leads, strict=True)))
    same_lead = texts[0][: leads[0]] == texts[1][: leads[1]]
    ends = [
        {end - lead: i for i, end in enumerate(accumulate(map(len, tokens), initial=0))}
        for tokens, lead in zip((ours, theirs), leads, strict=True)
    ]
    common = sorted(end for end in ends[0].keys() & ends[1].keys() if end <= limit and (same_lead or end > 0))
    return [(ends[0][end], ends[1][end]) for end in common]


def _common(one: bytes, other: bytes) -> int:
    """Length of their common prefix."""
    n = min(len(one), len(other))
    return n if one[:n] == other[:n] else next(i for i in range(n) if one[i] != other[i])


class Alignment:
    """The teacher's tokenizer beside the student's.

    ends, teacher_ends: ids that end a response of either model. chat_template, template_kwargs: as for `encode`, of
    both. It pickles, with its tokenizers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        teacher_tokenizer: PreTrainedTokenizerBase,
        *,
        ends: Collection[int] = (),
        teacher_ends: Collection[int] = (),
        chat_template: bool | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.tokenizers = tokenizer, teacher_tokenizer
        self.ends, self.teacher_ends = (
            {*given, of.eos_token_id} - {None} for given, of in zip((ends, teacher_ends), self.tokenizers, strict=True)
        )
        self.template = template_of(teacher_tokenizer, chat_template, self.teacher_ends, template_kwargs)

    @cached_property
    def texts(self) -> tuple[dict[int, bytes], dict[int, bytes]]:
        ours, theirs = map(token_bytes, self.tokenizers)
        return ours, theirs

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "texts"}

    def rows(self, example: Any, rows: Sequence[Tokens]) -> tuple[list[Tokens], list[dict[str, list[int]]]]:
        """The student's rows of an example and, of each, the teacher's: its tokens, and where they are aligned.

        Where one template makes a row of each turn, both do. Raises ValueError for a response that the two spell as
        different texts.
        """
        if example.get("input_ids") is not None:
            raise ValueError("expected text with teacher_tokenizer, as both tokenizers cut it; got a row of input_ids")
        theirs, _ = encode_one(example, self.tokenizers[1], self.template)
        prompt = teacher_prompt_of(example, [labels for _, labels in theirs], self.tokenizers[1], self.template)
        if prompt is not None:
            ((start, _),) = responses(theirs[0][1])
            theirs = [(prompt + ids[start:], [IGNORE] * len(prompt) + labels[start:]) for ids, labels in theirs]
        ours = list(rows)
        if not len(ours) == len(theirs) == 1:
            ours, theirs = apart(ours), apart(theirs)
        if len(ours) != len(theirs):
            raise ValueError(_counts(len(ours), len(theirs)))
        return ours, [self._aligned(*pair) for pair in zip(ours, theirs, strict=True)]

    def _aligned(self, ours: Tokens, theirs: Tokens) -> dict[str, list[int]]:
        spans = responses(ours[1]), responses(theirs[1])
        if len(spans[0]) != len(spans[1]):
            raise ValueError(_counts(*map(len, spans)))
        pairs = []
        for (a, b), (c, d) in zip(*spans, strict=True):
            texts = self._text(ours[0][a:b]), self._text(theirs[0][c:d], teacher=True)
            one, other = (b"".join(text).strip() for text in texts)
            if one != other:
                at = _common(one, other)
                raise ValueError(
                    "expected a response that both tokenizers and templates write alike; got "
                    f"{one[at : at + 20].decode(errors='replace')!r} of the student's and "
                    f"{other[at : at + 20].decode(errors='replace')!r} of the teacher's"
                )
            pairs += [(a + i, c + j) for i, j in same_text(*texts) if 0 < a + i < b and 0 < c + j < d]
        return _row(theirs, pairs)

    def answered(self, row: Row, before: Row) -> Row:
        """A row that the student has written in place of another one, with what the teacher reads of it.

        Text that is no UTF-8 is aligned up to there.
        """
        start, told = responses(row["labels"])[0][0], before["teacher_input_ids"]
        ((first, last), *_) = responses(before["teacher_labels"])
        written = self._text(row["input_ids"][start:])
        text = b"".join(written).decode(errors="ignore")
        ids = Template(self.tokenizers[1]).cut(text, goes_on=True)[0] if text else []
        if len(written) < len(row["input_ids"]) - start:  # it has ended
            ends = [token for token in told[first:last] if token in self.teacher_ends]
            ids = ids + (ends[:1] or [self.tokenizers[1].eos_token_id])
        pairs = same_text(written, self._text(ids, teacher=True))
        kept = [(start + i, first + j) for i, j in pairs if start + i < len(row["input_ids"]) and j < len(ids)]
        found: Any = {**row, **_row((told[:first] + ids, [IGNORE] * first + ids), kept)}
        return found

    def _text(self, ids: Sequence[int], teacher: bool = False) -> list[bytes]:
        """Bytes of the tokens before the one that ends the response."""
        ends, of = (self.teacher_ends if teacher else self.ends), self.texts[teacher]
        n = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        return [of.get(token, b"") for token in ids[:n]]

    def outcomes(self, student_rows: int, teacher_rows: int) -> tuple[Outcomes, Outcomes]:
        """What ids of heads with so many rows are among what both models can say next.

        An outcome is a text with which both tokenizers begin it, and all tokens that either one begins with it: where
        the teacher says "123" and the student's tokenizer makes "1", "2", "3" of that, the outcome is "1". The ends of
        a response are one, and all else is one, where both have such ids. With one vocabulary each id is one.
        """
        rows, vocabularies = (student_rows, teacher_rows), [tokenizer.get_vocab() for tokenizer in self.tokenizers]
        if vocabularies[0] == vocabularies[1]:
            n = min(rows) if student_rows == teacher_rows else min(*rows, 1 + max(vocabularies[0].values()))
            ours, theirs = (Outcomes(torch.arange(v).where(torch.arange(v) < n, -1), n) for v in rows)
            return ours, theirs
        begun = self._begun()
        texts = [{text for i, text in of.items() if i < n} for of, n in zip(begun, rows, strict=True)]
        index = {text: k for k, text in enumerate(sorted(texts[0] & texts[1]))}
        end, rest, found = len(index), len(index) + 1, list[torch.Tensor]()
        for of, ends, n in zip(begun, (self.ends, self.teacher_ends), rows, strict=True):
            of_ids = torch.full((n,), rest)
            for i, text in of.items():
                if i < n:
                    of_ids[i] = index.get(text, rest)
            of_ids[[i for i in ends if i < n]] = end
            found.append(of_ids)
        for outcome in (rest, end):  # without a counterpart it exists for nobody
            if not all((of_ids == outcome).any() for of_ids in found):
                found = [of_ids.masked_fill(of_ids == outcome, -1) - (of_ids > outcome).long() for of_ids in found]
        size = 1 + int(found[0].max())
        return Outcomes(found[0], size), Outcomes(found[1], size)

    def _begun(self) -> list[dict[int, bytes]]:
        """Of each id of either model that is text, that with which both tokenizers begin this text."""
        special = self._special(0), self._special(1)
        of_text = [{i: text for i, text in of.items() if i not in special[k]} for k, of in enumerate(self.texts)]
        texts = {text for of in of_text for text in of.values()}
        first = [_first_tokens(*x, texts) for x in zip(self.tokenizers, self.texts, strict=True)]

        def begun(text: bytes) -> bytes:
            while (shorter := first[1].get(first[0].get(text, b""), b"")) != text:
                text = shorter
            return text

        return [{i: begun(text) for i, text in of.items()} for of in of_text]

    def outcomes_of(self, student: Any, teacher: Any) -> tuple[Outcomes, Outcomes]:
        """Of the heads of these models, the teacher's as a trainer takes it."""
        return self.outcomes(vocabulary_of(student), vocabulary_of(models_of(teacher)[0]))

    def _special(self, side: int) -> set[int]:
        """Ids that stand for no text, and those that end a response."""
        tokenizer: Any = self.tokenizers[side]
        added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        return added | set(tokenizer.all_special_ids) | (self.teacher_ends if side else self.ends)


def _first_tokens(tokenizer: Any, of: Mapping[int, bytes], texts: Collection[bytes]) -> dict[bytes, bytes]:
    """Text of the first token of each text; of what is no UTF-8, or normalised, the longest token that begins it."""
    tokens, whole = set(of.values()), dict[bytes, str]()
    for text in texts:
        with suppress(UnicodeDecodeError):
            whole[text] = text.decode()
    before = "\n" if of.get(tokenizer("a", add_special_tokens=False)["input_ids"][0], b"").startswith(b" ") else ""
    skipped = tokenizer(before, add_special_tokens=False)["input_ids"]  # SentencePiece puts a space before a text
    n, found = len(skipped), dict[bytes, bytes]()
    encoded = tokenizer([before + text for text in whole.values()], add_special_tokens=False)["input_ids"]
    for text, ids in zip(whole, encoded, strict=True):
        first = of.get(ids[n], b"") if ids[:n] == skipped and len(ids) > n else b""
        if first and text.startswith(first):
            found[text] = first
    for text in texts - found.keys():
        found[text] = next((text[:n] for n in range(len(text), 0, -1) if text[:n] in tokens), b"")
    return found


def _row(theirs: Tokens, pairs: Sequence[tuple[int, int]]) -> dict[str, list[int]]:
    aligned, of_teacher = ([pair[i] for pair in pairs] for i in (0, 1))
    ids, labels = theirs
    labels = [IGNORE, *labels[1:]]  # nothing predicts a first token
    return {"teacher_input_ids": ids, "teacher_labels": labels, "aligned": aligned, "teacher_aligned": of_teacher}


def _counts(ours: int, theirs: int) -> str:
    return f"expected as many responses by the teacher's template as by the student's; got {theirs} and {ours}"


def responses(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Where each run of response tokens begins and ends."""
    inside = [False, *(label != IGNORE for label in labels), False]
    turns = [i for i in range(len(labels) + 1) if inside[i] != inside[i + 1]]
    return list(zip(turns[::2], turns[1::2], strict=True))


def apart(rows: Sequence[Tokens]) -> list[Tokens]:
    """A row of each response, which ends with it."""
    return [
        (ids[:last], [IGNORE] * first + labels[first:last]) for ids, labels in rows for first, last in responses(labels)
    ]


def cut_at(told: Mapping[str, list[int]], max_length: int) -> dict[str, list[int]]:
    """What is aligned with the first so many tokens of the student's row."""
    n = sum(i < max_length for i in told["aligned"])
    if n == len(told["aligned"]):
        return dict(told)
    last = told["teacher_aligned"][n - 1] + 1 if n else 0
    found = {name: told[name][:n] for name in ("aligned", "teacher_aligned")}
    return found | {name: told[name][:last] for name in ("teacher_input_ids", "teacher_labels")}


def check_tokenizer_options(options: Any) -> None:
    """Raise ValueError for what takes one tokenizer, in an `OKDConfig` with `teacher_tokenizer`."""
    if options.teacher_tokenizer is None:
        return
    method = options.resolved
    if method.responses not in (sampling.dataset, sampling.student, sampling.replay):
        raise ValueError(
            f"expected responses of the data or the student's with teacher_tokenizer; got method {method.name}, whose "
            "teacher writes, too, in tokens of its own: leave it out, or use gkd"
        )
    given = {"packing": False, "vocab_size": None, "self_teacher": None, "backward_columns": None}
    for name, default in given.items():
        if (value := getattr(options, name)) != default:
            raise ValueError(f"expected no {name} with teacher_tokenizer; got {value}: leave one of them out")


def reading(
    options: Any, tokenizer: Any, teacher_tokenizer: Any, student: Any, teacher: Any
) -> tuple[Alignment | None, set[int]]:
    """How a run reads its data, by an `OKDConfig`: `alignment_of` its tokenizers, and the ids that end a response.

    Those are the student's, and of all teachers that share its tokenizer.
    """
    alignment = alignment_of(options, tokenizer, teacher_tokenizer, student, teacher)
    return alignment, end_tokens(tokenizer, student, *models_of(teacher)) if alignment is None else alignment.ends


def alignment_of(options: Any, tokenizer: Any, teacher_tokenizer: Any, student: Any, teacher: Any) -> Alignment | None:
    """By an `OKDConfig`; None where both models share a tokenizer. teacher_tokenizer: None: where the options say.

    Raises ValueError where no tokenizer lies beside the teacher.
    """
    source = options.teacher_tokenizer
    if source is None:
        return None
    if teacher is None:
        raise ValueError("expected a teacher with teacher_tokenizer; got None: pass one, or leave that out")
    model, *_ = models_of(teacher)
    given = teacher_tokenizer[0] if isinstance(teacher_tokenizer, list | tuple) else teacher_tokenizer
    if given is None:
        given = tokenizer_of_model(model) if source == AUTO else load_tokenizer(source)
    if given is None:
        raise ValueError(
            "expected a tokenizer beside the teacher, because of teacher_tokenizer=auto; got none: pass "
            "teacher_processing_class, or its place as teacher_tokenizer"
        )
    theirs = tokenizer_of(given)
    return Alignment(
        tokenizer,
        theirs,
        ends=end_tokens(tokenizer, student),
        teacher_ends=end_tokens(theirs, model),
        chat_template=options.chat_template,
        template_kwargs=options.template_kwargs,
    )
